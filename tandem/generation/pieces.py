"""Drawn words as they are told."""

from collections.abc import Sequence

from tandem.data.detokenize import Detokenizer
from tandem.models.decoding import Drawn
from tandem.wire.results import Alternative, TextPiece


def make_piece(drawn: Sequence[Drawn], writer: Detokenizer, text_index: int = 0) -> TextPiece:
    """Return `drawn` as `writer` renders them; it remembers what it needs of them."""
    text, words = writer.tell(each.word for each in drawn)
    alternatives = tuple(
        tuple(Alternative(writer.name(word), token_id, its) for word, token_id, its in each.alternatives)
        for each in drawn
        if each.alternatives
    )
    return TextPiece(text, words, tuple(each.log_probability for each in drawn), alternatives, text_index)
