"""Subwords: a byte-level BPE, trained and run by the `tokenizers` library. Free of torch.

Text is cut into words, each with the blank before it, and words into bytes, which learned merges join again. Every byte
is a token, so that no text is unknown and each comes back as it was. A token is written with a printable character for
each of its bytes, by GPT-2's table: `Ġ` is a blank.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE

END = "<eos>"
DEFAULT_SIZE = 8000
# <eos>, the bytes, and one merge.
MIN_SIZE = 258

# GPT-2's words, but that no part is longer than 65 characters: the trainer holds each different one, and a line without
# blanks may be of megabytes. Letters and signs never share a part, so that no text ever gives the token <eos>.
# Part of format 2 of vocabulary.json: other words would give other tokens.
_WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]{1,64}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,64}"
    r"| {1,64}(?!\S)|\t{1,64}|\s"
)
# The library spends 100 bytes on a character while it cuts.
_PIECE_CHARACTERS = 4096
_BATCH_PIECES = 64

# What bounds the trainer: its memory goes with the text of the different words, its time with all text. Random words up
# to the limit took 370 MB, Chinese without blanks 310 MB; 11 MB of English, 60 MB (n = 1).
MAX_DISTINCT_BYTES = 4 * 2**20
MAX_SAMPLE_CHARACTERS = 64 * 2**20

Merges = tuple[tuple[int, int], ...]


def _characters() -> list[str]:
    """Return the character that stands for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARACTERS = _characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def token_bytes(token: str) -> bytes:
    """Return the bytes that a token other than `<eos>` stands for: part of a UTF-8 text, perhaps of a character."""
    return bytes(_BYTES[character] for character in token)


class Subwords:
    """Encodes text with the tokens and merges of a vocabulary; raises ValueError where they don't belong together."""

    def __init__(self, tokens: Sequence[str], merges: Merges) -> None:
        from tokenizers import models

        _check(tokens, merges)
        ids = {token: token_id for token_id, token in enumerate(tokens)}
        pairs = [(tokens[left], tokens[right]) for left, right in merges]
        self._library = _library(models.BPE(ids, pairs))

    def encode_lines(self, lines: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of each line, read in batches so that memory does not grow with the text."""
        token_ids: list[int] = []
        pieces = ((piece, last) for line in lines for piece, last in _marked(line))
        while batch := list(islice(pieces, _BATCH_PIECES)):
            encodings = self._library.encode_batch_fast([piece for piece, _ in batch])
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                token_ids += encoding.ids
                if last:
                    yield token_ids
                    token_ids = []


def train_subwords(lines: Callable[[], Iterable[str]], max_size: int) -> tuple[tuple[str, ...], Merges]:
    """Learn at most `max_size` tokens; return them, `<eos>` and the bytes first, and the merges as pairs of ids.

    `lines` reads the text from its start each time. Of a text with more than MAX_SAMPLE_CHARACTERS, or with more than
    MAX_DISTINCT_BYTES of different words, every second, fourth, … piece is taken: a merge that matters is in those too.
    The same text gives the same tokens.
    """
    from tokenizers import models, pre_tokenizers, trainers

    stride = _stride(lines)
    library = _library(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=max_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_sample(lines(), stride), trainer)
    ids = library.get_vocab()
    merges = json.loads(library.to_str())["model"]["merges"]
    return tuple(sorted(ids, key=lambda token: ids[token])), tuple((ids[left], ids[right]) for left, right in merges)


def _library(model: "BPE") -> "Library":
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    library = Tokenizer(model)
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = cast(pre_tokenizers.PreTokenizer, pre_tokenizers.Sequence([words, as_bytes]))
    return library


def _pieces(line: str) -> Iterator[str]:
    """Cut a long line, before a blank where there is one: there the words are cut in any case."""
    start = 0
    while len(line) - start > _PIECE_CHARACTERS:
        blank = line.rfind(" ", start + 1, start + _PIECE_CHARACTERS)
        stop = blank if blank > start else start + _PIECE_CHARACTERS
        yield line[start:stop]
        start = stop
    yield line[start:]


def _marked(line: str) -> Iterator[tuple[str, bool]]:
    """Yield each piece of a line, and whether it is the last."""
    *others, last = _pieces(line)
    yield from ((piece, False) for piece in others)
    yield last, True


def _sample(lines: Iterable[str], stride: int) -> Iterator[str]:
    return islice((piece for line in lines for piece in _pieces(line)), 0, None, stride)


def _stride(lines: Callable[[], Iterable[str]]) -> int:
    """Return of how many pieces one is taken."""
    stride = 1
    while not _fits(_sample(lines(), stride)):
        stride *= 2
    return stride


def _fits(sample: Iterable[str]) -> bool:
    """True if the trainer can take the whole sample."""
    seen: set[str] = set()
    characters = distinct_bytes = 0
    for piece in sample:
        new = set(piece.split(" ")) - seen
        seen |= new
        characters += len(piece)
        distinct_bytes += sum(len(word.encode()) for word in new)
        if characters > MAX_SAMPLE_CHARACTERS or distinct_bytes > MAX_DISTINCT_BYTES:
            return False
    return True


def _check(tokens: Sequence[str], merges: Merges) -> None:
    """Raise ValueError unless the tokens are `<eos>`, the bytes, and what the merges make of them.

    The library is only ever handed what passes here.
    """
    if not all(0 <= part < len(tokens) and tokens[part] != END for pair in merges for part in pair):
        raise ValueError("a merge of tokens that can't be merged")
    made = {tokens[left] + tokens[right] for left, right in merges}
    if END in made or "" in tokens or {END, *_CHARACTERS, *made} != set(tokens):
        raise ValueError("the tokens are not those that the merges make")
