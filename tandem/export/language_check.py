"""Whether an exported language model does what the network does, in one piece and with its state carried on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem.errors import ExportFailed
from tandem.export.check import TIE, TOLERANCE
from tandem.export.language_programs import StateTensor

# token_ids int64 (B, T), the state → logits float32 (B, T, V), the state after them.
Step = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]

# Pieces that divide no text evenly, beside one token at a time and the whole.
_PIECE = 7
_BATCH_SIZES = (1, 3)
_TOKENS = 64
# A Transformer's window is passed, so that its oldest keys drop out; of one wider than this, not.
_WINDOW = 960


@dataclass(frozen=True)
class LanguageAgreement:
    """How near an exported language model is to the network; see LanguageExportReport for the fields."""

    num_tokens: int
    pieces: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    max_difference: float
    relative_difference: float
    num_ties: int


def check_language_model(
    network: nn.Module, step: Step, state: tuple[StateTensor, ...], vocabulary_size: int, dynamic_time: bool
) -> LanguageAgreement:
    """Run both on random tokens, one by one and, with `dynamic_time`, in pieces and whole; at two batch sizes.

    Raises ExportFailed where logits differ by more than TOLERANCE of their scale, or a likeliest word differs that is
    no tie.
    """
    length = _TOKENS + min(int(getattr(network, "context_length", 0)), _WINDOW)
    pieces = (1, _PIECE, length) if dynamic_time else (1,)
    largest, scale, num_ties = 0.0, 0.0, 0
    for batch_size in _BATCH_SIZES:
        generator = torch.Generator().manual_seed(batch_size)
        token_ids = torch.randint(vocabulary_size, (batch_size, length), generator=generator)
        with torch.inference_mode():
            expected: Tensor = network(token_ids, None)[0]
        scale = max(scale, _scale(expected))
        for piece in pieces:
            got = _in_pieces(step, token_ids, [each.zeros(batch_size) for each in state], piece)
            largest = max(largest, _difference(expected, got, piece, batch_size))
            num_ties = max(num_ties, _count_ties(expected, got))
    return LanguageAgreement(length, pieces, _BATCH_SIZES, largest, largest / scale, num_ties)


def _scale(expected: Tensor) -> float:
    if not bool(expected.isfinite().all()):
        raise ExportFailed("the network's logits are not finite; nothing was written")
    scale = float(expected.abs().max())
    if scale == 0:
        raise ExportFailed("the network's logits are zero for every word: nothing can be checked; train it first")
    return scale


def _in_pieces(step: Step, token_ids: Tensor, state: list[Tensor], piece: int) -> Tensor:
    rows = []
    for each in token_ids.split(piece, dim=1):  # type: ignore[no-untyped-call]
        logits, state = step(each, state)
        rows.append(logits)
    return torch.cat(rows, dim=1)


def _difference(expected: Tensor, got: Tensor, piece: int, batch_size: int) -> float:
    where = f"at batch size {batch_size}, {piece} tokens at a time"
    if got.shape != expected.shape:
        shapes = f"{tuple(got.shape)}, not {tuple(expected.shape)}"
        raise ExportFailed(f"the exported file is not the network: its logits have the shape {shapes}")
    difference = float((got - expected).abs().max())
    relative = difference / float(expected.abs().max())
    # Written so that NaN fails too.
    if not relative <= TOLERANCE:
        raise ExportFailed(
            f"the exported file is not the network: {where}, logits differ by up to {difference:.2g}, "
            f"{relative:.1e} of their scale (allowed: {TOLERANCE:.0e}); nothing was written"
        )
    return difference


def _count_ties(expected: Tensor, got: Tensor) -> int:
    """Return how many places have a tie for the likeliest word; raise ExportFailed where another one's differs."""
    best = expected.topk(min(2, expected.shape[2]), dim=2).values
    is_tie = best[..., 0] - best[..., -1] <= TIE * float(expected.abs().max())
    differs = (expected.argmax(2) != got.argmax(2)) & ~is_tie
    if bool(differs.any()):
        raise ExportFailed(
            f"the exported file is not the network: {int(differs.sum())} of {differs.numel()} tokens are followed by "
            "another likeliest word; nothing was written"
        )
    return int(is_tie.sum())
