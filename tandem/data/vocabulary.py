"""The map between tokens and token ids, and how text is cut into tokens. Free of torch."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from tandem.data.subword import END as END
from tandem.data.subword import Merges, Subwords, train_subwords

UNKNOWN = "<unk>"

WordTokenizer = Literal["whitespace", "words"]
Tokenizer = WordTokenizer | Literal["subword"]

_WORDS = re.compile(r"<unk>|\w+(?:['’]\w+)*|[^\w\s]")


def split_line(line: str, tokenizer: WordTokenizer) -> list[str]:
    """Cut one line into tokens.

    `whitespace` suits text that is tokenized already (WikiText); `words` parts words from punctuation.
    """
    return line.split() if tokenizer == "whitespace" else _WORDS.findall(line)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, unique; `<eos>` ends each line, `<unk>` (where present) stands for words not in it.

    Subwords lack no word. Theirs has `merges`, pairs of token ids in the order in which text is joined by them.
    """

    tokens: Sequence[str]
    tokenizer: Tokenizer = "whitespace"
    merges: Merges = ()
    ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens) or END not in ids:
            raise ValueError(f"a vocabulary needs unique tokens and {END}")
        object.__setattr__(self, "ids", ids)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def end_id(self) -> int:
        """The id of `<eos>`."""
        return self.ids[END]

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of `<unk>`, None where the text had no unknown words."""
        return None if self.tokenizer == "subword" else self.ids.get(UNKNOWN)

    @cached_property
    def subwords(self) -> Subwords:
        """What cuts text into subwords; raises ValueError if the tokens and merges are not of such a vocabulary."""
        return Subwords(self.tokens, self.merges)

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """Return the token ids of `text` and the words in it that the vocabulary lacks.

        A line break (LF or CR LF, as the corpus is cut) becomes `<eos>`; a missing word becomes `<unk>`, or is left
        out where there is none. Subwords keep every other character, blanks too.
        """
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        token_ids = [token_id for line in self.encode_lines(lines) for token_id in line]
        # The last line is not ended: what is generated goes on there.
        return token_ids[:-1], [] if self.tokenizer == "subword" else self._unknown(lines, self.tokenizer)

    def encode_lines(self, lines: Iterable[str]) -> Iterator[list[int]]:
        """Yield the token ids of each line, `<eos>` after it; no more than a few lines are held."""
        if self.tokenizer == "subword":
            for token_ids in self.subwords.encode_lines(lines):
                yield [*token_ids, self.end_id]
            return
        for line in lines:
            found = (self.ids.get(word, self.unknown_id) for word in split_line(line, self.tokenizer))
            yield [*(token_id for token_id in found if token_id is not None), self.end_id]

    def _unknown(self, lines: Iterable[str], tokenizer: WordTokenizer) -> list[str]:
        return [word for line in lines for word in split_line(line, tokenizer) if word not in self.ids]

    def to_json(self) -> bytes:
        """Return the bytes of `vocabulary.json`: format 1 of words, 2 of subwords."""
        document: dict[str, object] = {"format_version": 1, "tokenizer": self.tokenizer, "tokens": list(self.tokens)}
        if self.tokenizer == "subword":
            document |= {"format_version": 2, "merges": self.merges}
        return json.dumps(document, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Vocabulary":
        """Read the bytes of `vocabulary.json`; raise ValueError, KeyError or TypeError if they are none."""
        document = json.loads(data)
        version = document.get("format_version") if isinstance(document, dict) else None
        if version not in (1, 2):
            raise ValueError("not a vocabulary of format 1 or 2")
        if document["tokenizer"] not in (get_args(WordTokenizer) if version == 1 else ("subword",)):
            raise ValueError(f"format {version} has no tokenizer {document['tokenizer']!r}")
        if not all(isinstance(token, str) for token in document["tokens"]):
            raise ValueError("a token that is no text")
        merges = tuple((int(left), int(right)) for left, right in document["merges"]) if version == 2 else ()
        vocabulary = cls(tuple(document["tokens"]), document["tokenizer"], merges)
        if version == 2:
            # Damage is found when a checkpoint is loaded, not at the first prompt.
            _ = vocabulary.subwords
        return vocabulary


def build_vocabulary(lines: Iterable[str], tokenizer: WordTokenizer, max_size: int | None = None) -> Vocabulary:
    """Collect the words of `lines`: `<unk>` and `<eos>` first, then in order of first appearance.

    With `max_size`, the most frequent words stay (ties: the earlier one) and the rest become `<unk>`.
    """
    counts: dict[str, int] = {UNKNOWN: 0, END: 0}
    for line in lines:
        for word in split_line(line, tokenizer):
            counts[word] = counts.get(word, 0) + 1
    words = [word for word in counts if word not in (UNKNOWN, END)]
    if max_size is not None and len(words) + 2 > max_size:
        kept = set(sorted(words, key=lambda word: -counts[word])[: max(max_size - 2, 0)])
        words = [word for word in words if word in kept]
    return Vocabulary((UNKNOWN, END, *words), tokenizer)


def build_subwords(lines: Callable[[], Iterable[str]], max_size: int) -> Vocabulary:
    """Learn a vocabulary of at most `max_size` subwords from the text that `lines` reads, from its start each time."""
    tokens, merges = train_subwords(lines, max_size)
    return Vocabulary(tokens, "subword", merges)
