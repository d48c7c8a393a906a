"""From a checkpoint to a text, as the server writes it, without a server."""

import time
from collections.abc import Iterator

from tandem.checkpoints.card import LanguageModelCard
from tandem.checkpoints.tensors import Checkpoint, load_checkpoint
from tandem.comparison.results import ModelVersion, Timings
from tandem.errors import CheckpointCorrupt, InvalidRequest
from tandem.generation.pieces import make_piece
from tandem.generation.prompts import check_max_words, check_prompt, read_prompt
from tandem.generation.request import GenerationRequest
from tandem.models.decoding import Drawn, Sequence
from tandem.models.devices import configure_device, resolve_device
from tandem.models.sampling import Sampling
from tandem.models.stepping import NetworkSteps
from tandem.wire.results import GenerationSummary, TextPiece

# Told at once; a reader sees that it goes on.
_PIECE_WORDS = 64
_PIECE_S = 0.05


def generate(request: GenerationRequest) -> Iterator[TextPiece | GenerationSummary]:
    """Yield the text as it is drawn, then the summary.

    Raises CheckpointCorrupt, InvalidPrompt, and InvalidRequest for a classifier or a value that makes no sense.
    """
    max_words = check_max_words(request.max_words)
    check_prompt(request.prompt, request.sampling.random_start)
    sampling = Sampling(**request.sampling.model_dump())
    began = time.perf_counter()
    checkpoint = load_checkpoint(request.checkpoint, request.digest)
    version = _version_of(request, checkpoint)
    if checkpoint.vocabulary is None:
        raise CheckpointCorrupt("a language model without a vocabulary")
    read, writer = read_prompt(checkpoint.vocabulary, request.prompt)
    sequence = Sequence(_stepper(checkpoint, request.device), checkpoint.vocabulary, sampling)
    text = sequence.text
    for piece in sequence.pieces(read.token_ids):
        piece()
    while text.num_words < max_words and not text.stopped:
        drawn = _write(sequence, min(max_words - text.num_words, _PIECE_WORDS))
        if drawn:
            yield make_piece(drawn, writer)
    yield GenerationSummary(
        model=version,
        num_prompt_tokens=len(read.token_ids),
        num_words=text.num_words,
        seed=sampling.seed,
        finish_reason=text.finish_reason,
        unknown_words=read.unknown_words,
        mean_negative_log_probability=text.mean_negative_log_probability,
        timings=Timings(compute_ms=(time.perf_counter() - began) * 1000),
    )


def _write(sequence: Sequence, max_words: int) -> list[Drawn]:
    ends_at = time.monotonic() + _PIECE_S
    return sequence.write(max_words, lambda: time.monotonic() < ends_at)


def _stepper(checkpoint: Checkpoint, device_name: str) -> NetworkSteps:
    try:
        device = resolve_device(device_name)
    except InvalidRequest as error:
        raise InvalidRequest(f"TANDEM_DEVICE={device_name!r}: {error}") from error
    configure_device(device)
    stepper = NetworkSteps(checkpoint.network.to(device), device)  # type: ignore[arg-type]
    stepper.warm()
    return stepper


def _version_of(request: GenerationRequest, checkpoint: Checkpoint) -> ModelVersion:
    card = checkpoint.card
    version = ModelVersion(request.name, request.version, request.run_id, card.step, card.architecture, card.dtype)
    if not isinstance(card, LanguageModelCard):
        raise InvalidRequest(
            f"{version.label} is a classifier ({card.architecture}); this call needs a language model", field="model"
        )
    return version
