import pytest

from tandem.data.detokenize import Detokenizer
from tandem.data.vocabulary import WordTokenizer, build_vocabulary, split_line

SENTENCES = [
    "the cat sat, and (so it is said) it ran!",
    "what? 50% of the well-known ones; see [1].",
    'he said "it is so" and "that too", then left.',
    "don't stop",
    "the dogs' bones and the cats' milk",
    "it says 'so it is' here",
    "pi is 3.14, or 1,000 times 1,234,567.8; 12 more.",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_words_come_back_as_they_were(sentence: str) -> None:
    assert Detokenizer("words").push(split_line(sentence, "words")) == sentence


@pytest.mark.parametrize("tokenizer", ["words", "whitespace"])
@pytest.mark.parametrize("sentence", SENTENCES)
def test_pieces_put_together_are_the_whole(tokenizer: WordTokenizer, sentence: str) -> None:
    tokens = [*split_line(sentence, tokenizer), "<eos>", *split_line(sentence, tokenizer)]
    whole = Detokenizer(tokenizer).push(tokens)
    writer = Detokenizer(tokenizer)
    assert "".join(writer.push([token]) for token in tokens) == whole
    assert whole.count("\n") == 1


def test_whitespace_tokens_keep_their_spaces() -> None:
    assert Detokenizer("whitespace").push(["a", ",", "b", "<eos>", "c", "."]) == "a , b\nc ."


@pytest.mark.parametrize(
    ("tokenizer", "before", "tokens", "text"),
    [
        ("words", "", ["the"], "the"),
        ("words", "the cat", ["sat"], " sat"),
        ("words", "the cat ", ["sat"], "sat"),
        ("words", "the cat", [",", "and"], ", and"),
        ("words", "the (", ["big"], "big"),
        ("words", 'he said "', ["go", '"', "so"], 'go" so'),
        ("words", "he said '", ["go", "'", "so"], "go' so"),
        ("words", 'he "went"', ["home"], " home"),
        ("words", "the dogs'", ["bones"], " bones"),
        ("words", "about 3.", ["14"], "14"),
        ("words", "in 1999,", ["200", "men"], " 200 men"),
        ("words", 'he said "go', ['"', "so"], '" so'),
        ("whitespace", "the cat", [",", "and"], " , and"),
        ("words", "the cat", ["<eos>", "so"], "\nso"),
    ],
)
def test_text_goes_on_from_the_prompt(tokenizer: WordTokenizer, before: str, tokens: list[str], text: str) -> None:
    assert Detokenizer(tokenizer, before).push(tokens) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a", "a"),
        ("a\n", "a <eos>"),
        ("\n\na", "<eos> <eos> a"),
        ("a\r\nb", "a <eos> b"),
        ("a\u2028b\x0bc\x85d\re", "a b c d e"),
        ("", ""),
    ],
)
def test_a_line_ends_where_the_corpus_ends_it(text: str, tokens: str) -> None:
    vocabulary = build_vocabulary(["a b c d e"], "whitespace")
    token_ids, unknown = vocabulary.encode(text)
    assert " ".join(vocabulary.tokens[token_id] for token_id in token_ids) == tokens
    assert unknown == []
