"""Tokens back to text, piece by piece: put one after another, the pieces are the whole text. Free of torch."""

from codecs import getincrementaldecoder
from collections.abc import Iterable

from tandem.data.subword import END, token_bytes
from tandem.data.vocabulary import Tokenizer, WordTokenizer, split_line

_NO_SPACE_BEFORE = frozenset(",.;:!?)]}%…’”»")
_NO_SPACE_AFTER = frozenset("([{$#@“‘«¿¡")
_APOSTROPHE = "'"
_OPEN_QUOTE = "open quote"
# Joins the words on both sides.
_JOINING = frozenset("-–/")
_QUOTES = frozenset("\"'")
# Words on -s after which a quote opens rather than marks a possessive.
_NOT_POSSESSIVE = frozenset("as asks does has is its means replies says this thus us was yes".split())
# Of a long prompt the end tells what the next word clings to.
_TAIL = 64


class Detokenizer:
    """Renders a stream of tokens; it remembers what it needs of those before.

    `<eos>` is a line break. `text_before` is what the text goes on from, such as a prompt. See `_Words`, `_Subwords`.
    """

    def __init__(self, tokenizer: Tokenizer, text_before: str = "") -> None:
        self._tokens = _Subwords() if tokenizer == "subword" else _Words(tokenizer, text_before)

    def push(self, tokens: Iterable[str]) -> str:
        """Return the text that `tokens` add."""
        return "".join(self._tokens.render(token) for token in tokens)

    def tell(self, tokens: Iterable[str]) -> tuple[str, tuple[str, ...]]:
        """Return the text that `tokens` add, and what to call each: itself, or of a subword the text that it adds."""
        told = [(token, self._tokens.render(token)) for token in tokens]
        as_text = isinstance(self._tokens, _Subwords)
        names = (text if as_text and token != END else token for token, text in told)
        return "".join(text for _, text in told), tuple(names)

    def name(self, token: str) -> str:
        """Return what to call a token that is no part of the text: itself, or of a subword the text that it is."""
        if isinstance(self._tokens, _Subwords) and token != END:
            return token_bytes(token).decode("utf-8", "replace")
        return token


class _Subwords:
    """Subwords carry their blanks; a character is told with the token that completes it.

    Bytes that no character has become U+FFFD when that is certain. A character that the last token leaves unfinished is
    not told.
    """

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def render(self, token: str) -> str:
        """Return the text that `token` adds."""
        return self._decoder.decode(b"\n" if token == END else token_bytes(token))


class _Words:
    """Words need their blanks.

    `whitespace` tokens are joined by single spaces, as the corpus has them. With `words`, punctuation clings to its
    word, numbers are whole (3.14; 1,000), and straight quotes open and close by turns within a line, but for the
    apostrophe of "the dogs' bones".
    """

    def __init__(self, tokenizer: WordTokenizer, text_before: str) -> None:
        self._tokenizer = tokenizer
        # Whether the next token stands at the start of a line or after a space that is there already.
        self._at_start = not text_before or text_before[-1].isspace()
        line = text_before.rpartition("\n")[2]
        # Single quotes may be apostrophes, so that only double ones are counted.
        self._open = {'"'} if line.count('"') % 2 else set()
        self._before, self._previous = ["", "", *split_line(line[-_TAIL:], tokenizer)][-2:]
        if _opens(line):
            self._open.add(line[-1])
            self._previous = _OPEN_QUOTE

    def render(self, token: str) -> str:
        """Return the text that `token` adds."""
        if token == END:
            self._at_start, self._before, self._previous = True, "", ""
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
            return token not in self._open and not self._is_apostrophe(token) and self._previous not in _NO_SPACE_AFTER
        return not (
            self._goes_on_number(token)
            or token in _NO_SPACE_BEFORE
            or token in _JOINING
            or self._previous in _NO_SPACE_AFTER
            or self._previous in _JOINING
            or self._previous == _OPEN_QUOTE
        )

    def _goes_on_number(self, token: str) -> bool:
        """True if `token` is what stands after the point or the comma of a number."""
        if not (token.isdecimal() and self._before.isdecimal()):
            return False
        return self._previous == "." or (self._previous == "," and len(token) == 3 and len(self._before) <= 3)

    def _is_apostrophe(self, token: str) -> bool:
        """True if `token` marks a possessive: after a word on -s, with no single quote open."""
        word = self._previous.lower()
        return token == _APOSTROPHE not in self._open and word[-1:] == "s" and word not in _NOT_POSSESSIVE

    def _note(self, token: str) -> None:
        apostrophe = self._is_apostrophe(token)
        self._at_start, self._before, self._previous = False, self._previous, token
        if token in _QUOTES and not apostrophe:
            if token not in self._open:
                self._previous = _OPEN_QUOTE
            self._open ^= {token}


def _opens(line: str) -> bool:
    """True if `line` ends with a quote that opens: an odd double one, or a single one that stands apart."""
    if line.endswith('"'):
        return line.count('"') % 2 == 1
    return line.endswith("'") and (len(line) == 1 or line[-2].isspace() or line[-2] in _NO_SPACE_AFTER)
