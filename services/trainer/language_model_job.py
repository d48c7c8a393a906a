"""A language model's training run: text opened, network built, and the card that will describe it."""

import torch

from services.trainer.curves import Curves
from services.trainer.engine.language_model import LanguageModelTraining, perplexity
from services.trainer.engine.ranks import Ranks
from services.trainer.job import Job, origin
from tandem.checkpoints.card import Card, LanguageModelCard
from tandem.checkpoints.files import NETWORK_FILE, VOCABULARY_FILE
from tandem.data.corpus import load_tokens
from tandem.data.manifest import TextDataset
from tandem.jobs.spec import LanguageModelJob
from tandem.models import layers
from tandem.models.awd_lstm import AwdDropouts
from tandem.models.language_models import LanguageModelShape, build_language_model
from tandem.models.structure import layer_table
from tandem.volume import Volume

# What a Transformer sees of the past, in training windows: state is carried, so more than one is of use.
_CONTEXT_WINDOWS = 4


def language_model_job(
    spec: LanguageModelJob, dataset: TextDataset, volume: Volume, run_id: str, device: torch.device, ranks: Ranks
) -> Job:
    """Return the job of `spec` on a prepared text."""
    directory = volume.dataset(spec.dataset)
    shape = language_model_shape(spec, dataset.vocabulary_size)
    dropouts = AwdDropouts(spec.embedding_dropout, spec.input_dropout, spec.hidden_dropout, spec.weight_dropout)
    network = build_language_model(shape, dropouts)
    training = LanguageModelTraining(
        spec,
        network,
        train=load_tokens(directory, "train", spec.limit_train_tokens),
        val=load_tokens(directory, "valid", spec.limit_val_tokens),
        device=device,
        ranks=ranks,
    )

    def make_card(epoch: int, step: int, metrics: dict[str, float]) -> Card:
        found = origin(spec, dataset, network, run_id)
        return LanguageModelCard(**found, **vars(shape), epoch=epoch, step=step, metrics=metrics)

    def finish(_: Curves | None) -> dict[str, float]:
        if "test" not in dataset.num_tokens:
            return {}
        loss = training.evaluate(load_tokens(directory, "test", spec.limit_val_tokens))
        return {"test_loss": loss, "test_ppl": perplexity(loss)}

    example = torch.zeros(1, spec.bptt, dtype=torch.int64, device=device)
    files = {
        VOCABULARY_FILE: (directory / VOCABULARY_FILE).read_bytes(),
        NETWORK_FILE: layers.to_json(layer_table(network, example)),
    }
    return Job(training, make_card, files, "words", finish, example, ranks)


def language_model_shape(spec: LanguageModelJob, vocabulary_size: int) -> LanguageModelShape:
    """Return the shape of the network that `spec` asks for."""
    return LanguageModelShape(
        model=spec.model,
        vocabulary_size=vocabulary_size,
        embedding_size=spec.embedding_size,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        dropout=spec.dropout,
        tied=spec.tied,
        context_length=spec.context_length or _CONTEXT_WINDOWS * spec.bptt,
    )
