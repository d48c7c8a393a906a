"""What an evaluation of a language model needs of its model and its text, without torch."""

from tandem.checkpoints.card import Card, LanguageModelCard, parse_card
from tandem.checkpoints.files import MODEL_FILE, VOCABULARY_FILE, read_verified
from tandem.checkpoints.registry import Located, Registry
from tandem.data.manifest import TextDataset, read_dataset
from tandem.data.vocabulary import Vocabulary
from tandem.errors import CheckpointCorrupt, DatasetNotFound, InvalidJob
from tandem.jobs.spec import TextEvaluationJob
from tandem.volume import Volume


def read_card(reference: str, volume: Volume) -> tuple[Located, Card]:
    """Return where a model reference leads, and the card there; raise what `Registry.resolve` does, or why not."""
    located = Registry(volume).resolve(reference)
    return located, parse_card(read_verified(located.checkpoint, (MODEL_FILE,), located.digest)[MODEL_FILE])


def check_text_evaluation(spec: TextEvaluationJob, volume: Volume) -> TextEvaluationJob:
    """Return `spec` with its reference and its split made definite; raise InvalidJob or DatasetNotFound."""
    dataset, split = text_split(spec.dataset, spec.split, volume)
    located, card = read_card(spec.model, volume)
    if not isinstance(card, LanguageModelCard):
        raise InvalidJob(f"REF: {spec.model} is a classifier; a text needs a language model")
    check_vocabulary(located, card, dataset, volume)
    return spec.model_copy(update={"model": located.label, "split": split})


def text_split(name: str, split: str | None, volume: Volume) -> tuple[TextDataset, str]:
    """Return the dataset `name` and the name of a split in it that has something to predict.

    None is test where there is one, else valid; "val" is valid. Raises InvalidJob if the dataset is not of text, or the
    split has a token at most; DatasetNotFound if there is no such split.
    """
    dataset = read_dataset(volume, name)
    if not isinstance(dataset, TextDataset):
        raise InvalidJob(f"--data: {name!r} is a dataset of {dataset.kind}; a language model needs text")
    if split is None:
        split = "test" if "test" in dataset.num_tokens else "valid"
    elif split == "val" and split not in dataset.num_tokens:
        split = "valid"
    if split not in dataset.num_tokens:
        raise DatasetNotFound(f"dataset {name!r} has no split {split!r} (there: {', '.join(dataset.num_tokens)})")
    if dataset.num_tokens[split] < 2:
        raise InvalidJob(
            f"--split: {split} of {name!r} has {dataset.num_tokens[split]} token; a perplexity needs 2 or more, "
            "since the first has nothing to be predicted from"
        )
    return dataset, split


def check_vocabulary(located: Located, card: LanguageModelCard, dataset: TextDataset, volume: Volume) -> Vocabulary:
    """Return the vocabulary that model and dataset share; raise InvalidJob where theirs differ, if only in order."""
    of_model = read_verified(located.checkpoint, (VOCABULARY_FILE,), located.digest).get(VOCABULARY_FILE)
    path = volume.dataset(dataset.name) / VOCABULARY_FILE
    try:
        of_dataset = path.read_bytes()
        shared = Vocabulary.from_json(of_dataset)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error}; prepare the dataset again") from error
    if of_model != of_dataset:
        raise InvalidJob(
            f"--data: {dataset.name!r} numbers its {dataset.vocabulary_size:,} words otherwise than {located.label} "
            f"does its {card.vocabulary_size:,}: each number would stand for another word; evaluate it on the data "
            f"that it was trained on ({card.dataset}), or on splits prepared together with that"
        )
    return shared
