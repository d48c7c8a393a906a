"""What a split's text holds besides tokens: words, bytes, and words that the vocabulary lacks. Free of torch."""

from dataclasses import dataclass
from pathlib import Path

from tandem.data.vocabulary import Vocabulary, split_line


@dataclass(frozen=True)
class TextCounts:
    """Counts of a whole split.

    `num_words` are what blanks part in its text, `num_bytes` those of its UTF-8, line ends included. `num_replaced` are
    the words that only its tokens call `<unk>`: WikiText says it in the text itself, and has none.
    """

    num_tokens: int
    num_words: int
    num_bytes: int
    num_replaced: int

    def __add__(self, other: "TextCounts") -> "TextCounts":
        return TextCounts(
            self.num_tokens + other.num_tokens,
            self.num_words + other.num_words,
            self.num_bytes + other.num_bytes,
            self.num_replaced + other.num_replaced,
        )


def count_text(path: Path, vocabulary: Vocabulary) -> TextCounts | None:
    """Return the counts of the text file `path`; None where it can't be read."""
    total = TextCounts(0, 0, 0, 0)
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                total += _count_line(line, vocabulary)
    except (OSError, UnicodeDecodeError):
        return None
    return total


def _count_line(line: str, vocabulary: Vocabulary) -> TextCounts:
    if vocabulary.tokenizer == "subword":
        # Its tokens can spell any word.
        num_tokens, num_replaced = len(vocabulary.encode(line[:-1])[0]), 0
    else:
        words = split_line(line[:-1], vocabulary.tokenizer)
        num_tokens, num_replaced = len(words), sum(word not in vocabulary.ids for word in words)
    # With the `<eos>` that ends it.
    return TextCounts(num_tokens + 1, len(line.split()), len(line.encode()), num_replaced)
