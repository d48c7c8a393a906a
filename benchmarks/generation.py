"""Claim: a text of 1000 words at batch 1 on a CPU comes at 10 times the speed of encoding everything anew for each,
or more. The goal beside it: 0.9 times the speed that reading the weights once a word allows.

The bound is the time of the products of each weight matrix that a word needs with a vector, and no more: what any
decoder in float32 reads. The references draw as the well-known example does, with `multinomial` from all words:
"anew" after encoding the whole text so far, as its Transformer does, and "step" after a step with the state carried, as
its recurrent networks do. All take turns. Encoding anew is measured at the lengths ANEW_AT, and the time of a word is
their mean.
"""

import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from tandem.data.vocabulary import Vocabulary
from tandem.models.decoding import Sequence
from tandem.models.language_models import LanguageModel, LanguageModelShape, ModelState, build_language_model
from tandem.models.sampling import Sampling
from tandem.models.stepping import NetworkSteps

Way = Callable[[LanguageModel], float]

ROUNDS = 5
WORDS = 1000
VOCABULARY = 33_278
SHAPES = {
    "LSTM 200": LanguageModelShape("LSTM", VOCABULARY, 200, 200, 2, 2, 0.2, False, 0),
    "LSTM 650 tied": LanguageModelShape("LSTM", VOCABULARY, 650, 650, 2, 2, 0.5, True, 0),
    "Transformer 200": LanguageModelShape("Transformer", VOCABULARY, 200, 200, 2, 2, 0.2, False, 140),
}
# Lengths in the middle of ten equal parts of the text; encoding it anew 1000 times would take minutes a round.
ANEW_AT = range(WORDS // 20, WORDS, WORDS // 10)
# The bound needs fewer words: each takes the same time.
BOUND_WORDS = 200


def main() -> None:
    """Print the median words a second of each way, and the medians of the ratios round by round."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {WORDS} words\n")
    print(f"| network | ours | anew | step | bound | ours / anew | ours / step | ours / bound | n = {ROUNDS} rounds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        ours, *others = rounds(shape)
        speeds = " | ".join(f"{1 / statistics.median(each):.0f}" for each in (ours, *others))
        ratios = (statistics.median(b / a for a, b in zip(ours, each, strict=True)) for each in others)
        print(f"| {name} | {speeds} | " + " | ".join(f"{each:.3g}" for each in ratios) + " | |", flush=True)


@torch.inference_mode()
def rounds(shape: LanguageModelShape) -> list[list[float]]:
    """Return seconds a word of ours, anew, by step and of the bound, for each round after the first."""
    torch.manual_seed(1)
    network = cast(LanguageModel, build_language_model(shape).eval().requires_grad_(False))
    ways: tuple[Way, ...] = (decoded, anew, stepped, bound)
    times = [[way(network) for way in ways] for _ in range(ROUNDS + 1)][1:]
    return [list(each) for each in zip(*times, strict=True)]


def decoded(network: LanguageModel) -> float:
    """Return seconds a word of this package's decoder, the start included."""
    vocabulary = Vocabulary(("<unk>", "<eos>", *map(str, range(VOCABULARY - 2))))
    stepper = NetworkSteps(network, torch.device("cpu"))

    def write() -> None:
        sequence = Sequence(stepper, vocabulary, Sampling(seed=1))
        for piece in sequence.pieces(()):
            piece()
        sequence.write(WORDS)

    return seconds(write) / WORDS


def stepped(network: LanguageModel) -> float:
    """Return seconds a word of a step with the state carried, and a draw."""

    def write() -> None:
        token_ids, state = torch.randint(VOCABULARY, (1, 1)), cast(ModelState | None, None)
        for _ in range(WORDS):
            logits, state = network(token_ids, state)
            token_ids.fill_(drawn(logits))

    return seconds(write) / WORDS


def anew(network: LanguageModel) -> float:
    """Return seconds a word of encoding the whole text so far, and a draw."""
    texts = [torch.randint(VOCABULARY, (1, length)) for length in ANEW_AT]

    def write() -> None:
        for token_ids in texts:
            drawn(network(token_ids, None)[0])

    return seconds(write) / len(texts)


def drawn(logits: Tensor) -> Tensor:
    """Return a token as the example draws it."""
    return torch.multinomial(logits[0, -1].exp(), 1)[0]


def bound(network: LanguageModel) -> float:
    """Return seconds a word in which each matrix that a word needs is read once, as a product with a vector."""
    needed = [
        each
        for name, each in cast(nn.Module, network).named_parameters()
        if each.dim() == 2 and (name != "embedding.weight" or network.head.weight is each)
    ]
    vectors = [torch.ones(each.shape[1]) for each in needed]

    def read() -> None:
        for _ in range(BOUND_WORDS):
            for matrix, vector in zip(needed, vectors, strict=True):
                torch.mv(matrix, vector)

    return seconds(read) / BOUND_WORDS


def seconds(work: Callable[[], object]) -> float:
    """Return the time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
