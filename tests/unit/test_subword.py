"""Subwords: any text to token ids and back, exactly; what is learned, from how much, and what is refused."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data import subword
from tandem.data.detokenize import Detokenizer
from tandem.data.vocabulary import Vocabulary, build_subwords

TEXT = [
    "The cat sat on the mat, and the dog ran 1234 miles!",
    "  she said: <eos> <unk> don't; the naïve café",
    "שלום עולם — مرحبا بالعالم — 日本語のテキスト 👩‍👩‍👧",
]
HOSTILE = [
    "",
    " ",
    "   leading, trailing   ",
    "tabs\t\tand\xa0blanks\u3000\u2028of all\u200b kinds\x85",
    "control \x01\x02\x1b[31m\x1c\x7f\ufeff",
    "carriage\rreturn \r in the middle",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 😀",
    "e\u0301\u0301\u0302 Z\u0351\u036b\u0343\u036a a\u030a å",
    "\u202eשלום\u202c abc עולם مَرْحَبًا",
    "\U0010ffff\ue000\ufffd\ufffe",
    "<eos> <unk> <eos><eos> Ġ Ċ âĢ",
    "x" * 70_000,
    "ab " * 30_000,
    "日本語" * 20_000,
    " " * 20_000,
]


LEARNED = build_subwords(lambda: TEXT * 4, 400)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return LEARNED


def decoded(vocabulary: Vocabulary, token_ids: list[int]) -> str:
    return Detokenizer("subword").push(vocabulary.tokens[token_id] for token_id in token_ids)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back_as_it_was(vocabulary: Vocabulary, text: str) -> None:
    token_ids, unknown = vocabulary.encode(text)
    assert decoded(vocabulary, token_ids) == text
    assert (unknown, vocabulary.unknown_id) == ([], None)
    assert vocabulary.end_id not in token_ids


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")))
def test_every_line_comes_back_as_it_was(text: str) -> None:
    (token_ids,) = LEARNED.encode_lines([text])
    assert token_ids[-1] == LEARNED.end_id
    assert decoded(LEARNED, token_ids[:-1]) == text


def test_line_breaks_are_eos_and_the_last_line_goes_on(vocabulary: Vocabulary) -> None:
    token_ids, _ = vocabulary.encode("the cat\r\n\n sat")
    words = [vocabulary.tokens[token_id] for token_id in token_ids]
    assert words.count("<eos>") == 2
    assert words[-1] != "<eos>"
    assert decoded(vocabulary, token_ids) == "the cat\n\n sat"


def test_no_character_is_told_before_it_is_whole_and_none_is_lost(vocabulary: Vocabulary) -> None:
    text = "ζ🏴 ế ё 漢"
    writer, told = Detokenizer("subword"), ""
    token_ids, _ = vocabulary.encode(text)
    assert len(token_ids) > len(text)
    for token_id in token_ids:
        told += writer.push([vocabulary.tokens[token_id]])
        assert text.startswith(told)
    assert told == text


def test_bytes_that_are_no_character_are_told_when_that_is_certain() -> None:
    first, second = subword._CHARACTERS[0xE2], subword._CHARACTERS[0x82]
    writer = Detokenizer("subword")
    assert [writer.push([token]) for token in (first, second, "A", first, "<eos>", first)] == [
        "",
        "",
        "�A",
        "",
        "�\n",
        "",
    ]


def test_a_word_is_called_by_the_text_that_it_adds(vocabulary: Vocabulary) -> None:
    tokens = [vocabulary.tokens[token_id] for token_id in vocabulary.encode("the ζ\nthe")[0]]
    text, names = Detokenizer("subword").tell(tokens)
    assert text == "the ζ\nthe"
    assert names[:1] == ("the",)
    assert "" in names
    assert "".join(names).replace("<eos>", "\n") == text
    assert Detokenizer("words").tell(["a", ",", "<eos>"]) == ("a,\n", ("a", ",", "<eos>"))


def test_where_words_are_cut_is_part_of_the_format() -> None:
    from tokenizers import models

    library: Any = subword._library(models.BPE())
    text = "Don't  stop\t\t1234567 <eos>!! e\u0301t" + "a" * 70 + "  "
    words = [subword.token_bytes(word).decode() for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]
    start = ["Don", "'t", " ", " stop", "\t\t", "123", "456", "7", " <", "eos", ">!!"]
    assert words == [*start, " e\u0301t" + "a" * 61, "a" * 9, "  "]


def test_long_lines_are_cut_where_it_changes_nothing(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    line = " ".join(f"the cat {number} sat," for number in range(3000))
    (cut,) = vocabulary.encode_lines([line])
    monkeypatch.setattr(subword, "_PIECE_CHARACTERS", 10**9)
    (whole,) = vocabulary.encode_lines([line])
    assert cut == whole


def test_a_text_without_end_is_read_as_a_stream(vocabulary: Vocabulary) -> None:
    lines = (f"line {number}" for number in count())
    encoded = vocabulary.encode_lines(lines)
    assert [decoded(vocabulary, next(encoded)) for _ in range(200)] == [f"line {number}\n" for number in range(200)]
    assert int(next(lines).split()[1]) < 1000


def test_the_same_text_gives_the_same_bytes_and_they_are_read_back(vocabulary: Vocabulary) -> None:
    again = build_subwords(lambda: TEXT * 4, 400)
    assert again.to_json() == vocabulary.to_json()
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
    assert vocabulary.tokens[0] == "<eos>"
    assert 257 < len(vocabulary) <= 400
    assert "Ġthe" in vocabulary.tokens


def random_words(number: int) -> Callable[[], Iterator[str]]:
    return lambda: (f"{line * 7919 % 100_003:x} the cat" for line in range(number))


def test_of_too_many_different_words_a_part_spread_over_the_text_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subword, "MAX_DISTINCT_BYTES", 4000)
    sample = list(subword._sample(random_words(4000)(), subword._stride(random_words(4000))))
    distinct = sum(len(word) for word in {word for line in sample for word in line.split(" ")})
    assert 1000 < distinct <= 4000
    assert sample[-1] in list(random_words(4000)())[-10:]
    assert "Ġcat" in build_subwords(random_words(4000), 300).tokens


def test_of_too_long_a_text_a_part_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subword, "MAX_SAMPLE_CHARACTERS", 1000)
    assert subword._stride(lambda: ["the cat sat"] * 1000) == 16
    # A single line is cut, so that it can be sampled too.
    monkeypatch.setattr(subword, "MAX_SAMPLE_CHARACTERS", 2 * subword._PIECE_CHARACTERS)
    assert subword._stride(lambda: ["x" * 8 * subword._PIECE_CHARACTERS]) == 4


def document(vocabulary: Vocabulary, **changes: object) -> bytes:
    return json.dumps(json.loads(vocabulary.to_json()) | changes).encode()


def damaged(vocabulary: Vocabulary) -> dict[str, bytes]:
    tokens, merges = list(vocabulary.tokens), list(vocabulary.merges)
    return {
        "no merges": document(vocabulary, merges=[]),
        "a merge too many": document(vocabulary, merges=[*merges, (5, 5)]),
        "a merge out of range": document(vocabulary, merges=[*merges, (5, 100_000)]),
        "a merge below range": document(vocabulary, merges=[*merges, (5, -1)]),
        "a merge of <eos>": document(vocabulary, merges=[*merges, (0, 5)]),
        "a merge of three": document(vocabulary, merges=[*merges, (5, 5, 5)]),
        "a merge of texts": document(vocabulary, merges=[("a", "b")]),
        "merges that are none": document(vocabulary, merges=7),
        "no bytes": document(vocabulary, tokens=["<eos>", *tokens[10:]]),
        "a token that nothing makes": document(vocabulary, tokens=[*tokens, "zzzz"]),
        "an empty token": document(vocabulary, tokens=[*tokens, ""]),
        "a surrogate": document(vocabulary, tokens=[*tokens, "\ud800"]),
        "a token that is a number": document(vocabulary, tokens=[*tokens, 7]),
        "a format to come": document(vocabulary, format_version=3),
        "the format of words": document(vocabulary, format_version=1),
        "an unknown tokenizer": document(vocabulary, tokenizer="magic"),
    }


@pytest.mark.parametrize("damage", damaged(LEARNED))
def test_damage_is_found_when_it_is_read(damage: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        Vocabulary.from_json(damaged(LEARNED)[damage])


def test_merges_that_would_make_eos_of_text_are_refused() -> None:
    tokens = ["<eos>", *subword._CHARACTERS, "<e", "<eo", "<eos"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [("<", "e"), ("<e", "o"), ("<eo", "s"), ("<eos", ">")]
    with pytest.raises(ValueError, match="are not those that the merges make"):
        _ = Vocabulary(tokens, "subword", tuple((ids[left], ids[right]) for left, right in pairs)).subwords


def test_vocabularies_of_words_are_read_and_written_as_before() -> None:
    data = '{"format_version": 1, "tokenizer": "words", "tokens": ["<unk>", "<eos>", "ë"]}'.encode()
    vocabulary = Vocabulary.from_json(data)
    assert vocabulary == Vocabulary(("<unk>", "<eos>", "ë"), "words")
    assert vocabulary.to_json() == data
    assert vocabulary.encode("ë x\n") == ([2, 0, 1], ["x"])
