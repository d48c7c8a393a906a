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


def count_text(path: Path, vocabulary: Vocabulary) -> TextCounts | None:
    """Return the counts of the text file `path`; None where it can't be read."""
    num_tokens = num_words = num_bytes = num_replaced = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                words = split_line(line[:-1], vocabulary.tokenizer)
                num_tokens += len(words) + 1
                num_words += len(line.split())
                num_bytes += len(line.encode())
                num_replaced += sum(word not in vocabulary.ids for word in words)
    except (OSError, UnicodeDecodeError):
        return None
    return TextCounts(num_tokens, num_words, num_bytes, num_replaced)
