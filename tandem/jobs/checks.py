"""What can be found wrong with a job before it is queued: against its data and the registry, without torch."""

from collections.abc import Collection

from tandem.checkpoints.card import ClassifierCard, parse_card
from tandem.checkpoints.files import MODEL_FILE, read_verified
from tandem.checkpoints.registry import Registry, check_kind
from tandem.data.manifest import ImageDataset, read_dataset
from tandem.errors import DatasetNotFound, InvalidJob
from tandem.jobs.promotion_checks import check_promotion, evaluation_of
from tandem.jobs.sizes import sizes_of
from tandem.jobs.spec import ClassifierJob, EvaluationJob, JobSpec, LanguageModelJob, PromotionJob, TextEvaluationJob
from tandem.jobs.text_checks import check_text_evaluation, text_split
from tandem.volume import Volume


def check_job(spec: JobSpec, volume: Volume, awaited: Collection[str] = ()) -> JobSpec:
    """Return `spec` with its model references made definite; raise InvalidJob, naming the option, where it can't work.

    A reference to an alias would mean another model once the alias moves. One to a run among the `awaited`, which are
    to succeed first, stands for the best checkpoint that it will have.
    """
    if isinstance(spec, PromotionJob):
        return _check_promotion(spec, volume, awaited)
    if isinstance(spec, EvaluationJob | TextEvaluationJob) and spec.model in {f"run:{run_id}" for run_id in awaited}:
        return _check_awaited(spec, volume)
    if isinstance(spec, EvaluationJob):
        return _check_evaluation(spec, volume)
    if isinstance(spec, TextEvaluationJob):
        return check_text_evaluation(spec, volume)
    if isinstance(spec, LanguageModelJob):
        return _check_language_model(spec, volume)
    return _check_classifier(spec, volume)


def _check_promotion(spec: PromotionJob, volume: Volume, awaited: Collection[str]) -> PromotionJob:
    spec = check_promotion(spec, volume, awaited)
    # Both are evaluated as by jobs of their own, and refused for the same reasons.
    for model in (spec.model, spec.against):
        if model is not None:
            check_job(evaluation_of(spec, model), volume, awaited)
    return spec


def _check_awaited(spec: EvaluationJob | TextEvaluationJob, volume: Volume) -> JobSpec:
    if isinstance(spec, EvaluationJob):
        image_split(spec.dataset, spec.split, volume)
        return spec
    _, split = text_split(spec.dataset, spec.split, volume)
    return spec.model_copy(update={"split": split})


def _check_name(name: str, kind: str, volume: Volume) -> None:
    registry = Registry(volume)
    if name in registry.names():
        check_kind(name, registry.versions(name)[-1].kind, kind)


def _check_language_model(spec: LanguageModelJob, volume: Volume) -> LanguageModelJob:
    _check_name(spec.model_name, "language_model", volume)
    dataset = read_dataset(volume, spec.dataset)
    if dataset.kind != "text":
        raise InvalidJob(f"--data: {spec.dataset!r} is a dataset of {dataset.kind}; this job needs text")
    num_train = dataset.num_tokens.get("train", 0)
    check_text_length(min(num_train, spec.limit_train_tokens or num_train), spec.batch_size, spec.bptt)
    if dataset.num_tokens.get("valid", 0) < 2:
        raise InvalidJob(f"--data: {spec.dataset!r} has no text in its valid split; prepare it again with some")
    return spec


def check_text_length(num_tokens: int, batch_size: int, bptt: int) -> None:
    """Raise InvalidJob where `num_tokens` of train text are too few for a batch, or for one window of `bptt`.

    The batch parts the text into `batch_size` rows; where a row is shorter than `bptt`, so are its windows.
    """
    if num_tokens // batch_size < 2:
        remedy = f"use at most {num_tokens // 2}" if num_tokens >= 2 else "prepare a longer text"
        raise InvalidJob(f"--batch-size: {batch_size} is too wide for the {num_tokens:,} train tokens; {remedy}")
    if bptt >= num_tokens:
        raise InvalidJob(f"--bptt: {bptt} is longer than the {num_tokens:,} train tokens; use at most {num_tokens - 1}")


def _check_classifier(spec: ClassifierJob, volume: Volume) -> ClassifierJob:
    dataset = _image_dataset(spec.dataset, volume)
    if len(dataset.classes) < 2:
        raise InvalidJob(f"--data: {spec.dataset!r} has one class; a classifier needs at least 2")
    num_train = min(dataset.num_images["train"], spec.limit_train_images or dataset.num_images["train"])
    if spec.batch_size > num_train:
        raise InvalidJob(
            f"--batch-size: {spec.batch_size} is more than the {num_train} train images; use at most {num_train}"
        )
    if not dataset.num_images.get("val"):
        raise InvalidJob(f"--data: {spec.dataset!r} has no val images; prepare it again with a larger --val-fraction")
    if spec.data_path in ("device", "mapped") and not dataset.packed:
        raise InvalidJob(
            f"--data-path: {spec.dataset!r} holds large images or different sizes, which are not packed; use files"
        )
    sizes_of(spec, dataset)
    _check_name(spec.model_name, "classifier", volume)
    return _with_references(spec, dataset, volume)


def _image_dataset(name: str, volume: Volume) -> ImageDataset:
    dataset = read_dataset(volume, name)
    if not isinstance(dataset, ImageDataset):
        raise InvalidJob(f"--data: {name!r} is a dataset of {dataset.kind}; this job needs images")
    return dataset


def image_split(name: str, split: str, volume: Volume) -> ImageDataset:
    """Return the dataset `name`; raise InvalidJob if it is not of images, DatasetNotFound if `split` holds none."""
    dataset = _image_dataset(name, volume)
    if not dataset.num_images.get(split):
        there = ", ".join(name for name, count in dataset.num_images.items() if count)
        raise DatasetNotFound(f"dataset {dataset.name!r} has no images in a split {split!r} (there: {there})")
    return dataset


def _with_references(spec: ClassifierJob, dataset: ImageDataset, volume: Volume) -> ClassifierJob:
    changes = {}
    for field, option in (("weights_from", "--weights"), ("resume_from", "--resume")):
        if reference := getattr(spec, field):
            changes[field], card = _classifier_card(reference, option, volume)
            if (card.arch, card.stem) != (spec.arch, spec.stem):
                fitting = f"--arch {card.arch} --stem {card.stem}"
                raise InvalidJob(f"{option}: {reference} is a {card.arch} with the {card.stem} stem; use {fitting}")
            if field == "resume_from" and card.dataset_fingerprint != dataset.fingerprint:
                raise InvalidJob(f"{option}: {reference} was trained on other data ({card.dataset}); use --weights")
            if field == "resume_from" and card.epoch >= spec.epochs:
                raise InvalidJob(f"{option}: {reference} has {card.epoch} epochs already; give more --epochs")
    return spec.model_copy(update=changes)


def _classifier_card(reference: str, option: str, volume: Volume) -> tuple[str, ClassifierCard]:
    located = Registry(volume).resolve(reference)
    card = parse_card(read_verified(located.checkpoint, (MODEL_FILE,), located.digest)[MODEL_FILE])
    if not isinstance(card, ClassifierCard):
        raise InvalidJob(f"{option}: {reference} is a language model; this job needs a classifier")
    return located.label, card


def model_classes(card: ClassifierCard, dataset: ImageDataset, label: str) -> list[int]:
    """Return, for each class of `dataset`, its place among the outputs of the model called `label`.

    Raises InvalidJob that names the first class that the model does not know.
    """
    places = {each.id: place for place, each in enumerate(card.classes)}
    unknown = [each.id for each in dataset.classes if each.id not in places]
    if unknown:
        raise InvalidJob(
            f"{label} does not know the class {unknown[0]!r} of dataset {dataset.name!r} ({len(unknown)} of "
            f"{len(dataset.classes)} are unknown to it); evaluate it on data of its own {len(places)} classes"
        )
    return [places[each.id] for each in dataset.classes]


def _check_evaluation(spec: EvaluationJob, volume: Volume) -> EvaluationJob:
    dataset = image_split(spec.dataset, spec.split, volume)
    label, card = _classifier_card(spec.model, "REF", volume)
    model_classes(card, dataset, label)
    return spec.model_copy(update={"model": label})
