"""A language model's training run: text opened, network built, and the card that will describe it."""

import math
from typing import cast

import torch
from torch import nn

from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.ranks import Ranks
from services.trainer.job import Job, origin
from tandem.checkpoints.card import Card, LanguageModelCard
from tandem.checkpoints.files import NETWORK_FILE, VOCABULARY_FILE
from tandem.comparison.token_losses import perplexity
from tandem.data.corpus import load_tokens
from tandem.data.detokenize import Detokenizer
from tandem.data.manifest import TextDataset
from tandem.data.vocabulary import Vocabulary
from tandem.jobs.spec import LanguageModelJob
from tandem.models import layers
from tandem.models.awd_lstm import AwdDropouts
from tandem.models.decoding import Sequence
from tandem.models.language_models import LanguageModel, LanguageModelShape, build_language_model
from tandem.models.sampling import Sampling
from tandem.models.stepping import NetworkSteps
from tandem.models.structure import layer_table
from tandem.volume import Volume

# What a Transformer sees of the past, in training windows: state is carried, so more than one is of use.
_CONTEXT_WINDOWS = 4
_SAMPLE_WORDS = 60


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

    def test(within_s: float = math.inf) -> dict[str, float] | None:
        if "test" not in dataset.num_tokens:
            return None
        loss = training.evaluate(load_tokens(directory, "test", spec.limit_val_tokens), within_s)
        return None if loss is None else {"test_loss": loss, "test_ppl": perplexity(loss)}

    example = torch.zeros(1, spec.bptt, dtype=torch.int64, device=device)
    vocabulary = (directory / VOCABULARY_FILE).read_bytes()
    files = {
        VOCABULARY_FILE: vocabulary,
        NETWORK_FILE: layers.to_json(layer_table(network, example)),
    }
    return Job(
        training,
        make_card,
        files,
        "words",
        lambda _: test() or {},
        example,
        ranks,
        sample=lambda: sample_text(training.served_network, Vocabulary.from_json(vocabulary), spec.seed, device),
        test_within=test,
    )


def sample_text(network: nn.Module, vocabulary: Vocabulary, seed: int, device: torch.device) -> str:
    """Return a text of 60 words that `network` writes, from the start of a line, at temperature 1."""
    steps = NetworkSteps(cast(LanguageModel, network.eval()), device)
    sequence = Sequence(steps, vocabulary, Sampling(seed=seed))
    for piece in sequence.pieces(()):
        piece()
    return Detokenizer(vocabulary.tokenizer).push([drawn.word for drawn in sequence.write(_SAMPLE_WORDS)])


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
