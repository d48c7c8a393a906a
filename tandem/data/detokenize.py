"""Tokens back to text, piece by piece: put one after another, the pieces are the whole text. Free of torch."""

from collections.abc import Iterable

from tandem.data.vocabulary import END, Tokenizer

_NO_SPACE_BEFORE = frozenset(",.;:!?)]}%…’”»")
_NO_SPACE_AFTER = frozenset("([{$#@“‘«¿¡")
# Joins the words on both sides.
_JOINING = frozenset("-–/")
_QUOTES = frozenset("\"'")


class Detokenizer:
    """Renders a stream of tokens; it remembers what it needs of those before.

    `whitespace` tokens are joined by single spaces, as the corpus has them. With `words`, punctuation clings to its
    word, and straight quotes open and close by turns within a line. `<eos>` is a line break. `text_before` is what the
    text goes on from, such as a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, text_before: str = "") -> None:
        self._tokenizer = tokenizer
        # Whether the next token stands at the start of a line or after a space that is there already.
        self._at_start = not text_before or text_before[-1].isspace()
        self._previous = text_before[-1:] if tokenizer == "words" else ""
        line = text_before.rpartition("\n")[2]
        self._open = {quote for quote in _QUOTES if line.count(quote) % 2 and quote == '"'}

    def push(self, tokens: Iterable[str]) -> str:
        """Return the text that `tokens` add."""
        return "".join(self._render(token) for token in tokens)

    def _render(self, token: str) -> str:
        if token == END:
            self._at_start, self._previous = True, ""
            self._open.clear()
            return "\n"
        space = "" if self._at_start or not self._parted(token) else " "
        self._note(token)
        return space + token

    def _parted(self, token: str) -> bool:
        """True if a space stands before `token`."""
        if self._tokenizer == "whitespace":
            return True
        if token in _QUOTES:
            return token not in self._open and self._previous not in _NO_SPACE_AFTER
        return not (
            token in _NO_SPACE_BEFORE
            or token in _JOINING
            or self._previous in _NO_SPACE_AFTER
            or self._previous in _JOINING
            or self._previous == "open quote"
        )

    def _note(self, token: str) -> None:
        self._at_start, self._previous = False, token
        if token in _QUOTES:
            if token not in self._open:
                self._previous = "open quote"
            self._open ^= {token}
