"""The map between tokens and token ids, and how text is cut into tokens. Free of torch."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

UNKNOWN = "<unk>"
END = "<eos>"

Tokenizer = Literal["whitespace", "words"]

_WORDS = re.compile(r"<unk>|\w+(?:['’]\w+)*|[^\w\s]")


def split_line(line: str, tokenizer: Tokenizer) -> list[str]:
    """Cut one line into tokens.

    `whitespace` suits text that is tokenized already (WikiText); `words` parts words from punctuation.
    """
    return line.split() if tokenizer == "whitespace" else _WORDS.findall(line)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, unique; `<eos>` ends each line, `<unk>` (where present) stands for words not in it."""

    tokens: Sequence[str]
    tokenizer: Tokenizer = "whitespace"
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
        return self.ids.get(UNKNOWN)

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """Return the token ids of `text` and the words in it that the vocabulary lacks.

        A line break (LF or CR LF, as the corpus is cut) becomes `<eos>`; a missing word becomes `<unk>`, or is left
        out where there is none.
        """
        token_ids: list[int] = []
        unknown: list[str] = []
        for number, line in enumerate(text.split("\n")):
            if number:
                token_ids.append(self.end_id)
            for word in split_line(line.removesuffix("\r"), self.tokenizer):
                token_id = self.ids.get(word, self.unknown_id)
                if word not in self.ids:
                    unknown.append(word)
                if token_id is not None:
                    token_ids.append(token_id)
        return token_ids, unknown

    def to_json(self) -> bytes:
        """Return the bytes of `vocabulary.json`."""
        document = {"format_version": 1, "tokenizer": self.tokenizer, "tokens": list(self.tokens)}
        return json.dumps(document, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Vocabulary":
        """Read the bytes of `vocabulary.json`; raise ValueError if they are none."""
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("format_version") != 1:
            raise ValueError("not a vocabulary of format 1")
        return cls(tuple(document["tokens"]), document["tokenizer"])


def build_vocabulary(lines: Iterable[str], tokenizer: Tokenizer, max_size: int | None = None) -> Vocabulary:
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
