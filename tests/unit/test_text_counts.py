"""What a split's text holds besides tokens, and the file of the losses of its tokens."""

from pathlib import Path

import numpy as np
import pytest

from tandem.comparison.token_losses import read_token_losses, write_token_losses
from tandem.data.text_counts import TextCounts, count_text
from tandem.data.vocabulary import WordTokenizer, build_subwords, build_vocabulary
from tandem.errors import InvalidRequest


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        ("whitespace", " = a = \n\n the <unk> cat ë . \n", TextCounts(11, 8, 30, 3)),
        ("words", "the cat, (a)!\nthe dog\n", TextCounts(11, 5, 22, 5)),
        ("words", "", TextCounts(0, 0, 0, 0)),
    ],
)
def test_counts_of_a_text(tmp_path: Path, tokenizer: WordTokenizer, text: str, expected: TextCounts) -> None:
    vocabulary = build_vocabulary(["a the cat <unk> ."], tokenizer)
    (tmp_path / "test.txt").write_bytes(text.encode())
    assert count_text(tmp_path / "test.txt", vocabulary) == expected


def test_counts_of_subwords(tmp_path: Path) -> None:
    vocabulary = build_subwords(lambda: ["the cat sat on the mat"] * 20, 300)
    (tmp_path / "test.txt").write_text("the ëcat\n\n", encoding="utf-8")
    num_tokens = len(vocabulary.encode("the ëcat")[0]) + 2
    assert count_text(tmp_path / "test.txt", vocabulary) == TextCounts(num_tokens, 2, 11, 0)


def test_a_text_that_can_not_be_read_has_no_counts(tmp_path: Path) -> None:
    vocabulary = build_vocabulary(["a"], "words")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\n")
    assert count_text(tmp_path / "bad.txt", vocabulary) is None
    assert count_text(tmp_path / "absent.txt", vocabulary) is None


def test_token_losses_come_back_and_other_files_are_refused(tmp_path: Path) -> None:
    losses = np.array([1.5, 2.25, 0.0], dtype=np.float32)
    write_token_losses(tmp_path / "a.npy", losses)
    np.testing.assert_array_equal(read_token_losses(tmp_path / "a.npy"), losses)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"], "and no temporary file is left"
    np.save(tmp_path / "wide.npy", np.zeros((2, 2), dtype=np.float32))
    np.save(tmp_path / "whole.npy", np.zeros(2, dtype=np.int64))
    np.savez(tmp_path / "many.npz", losses)
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-3])
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("wide", "whole", "text", "empty", "cut", "pickle", "absent"):
        with pytest.raises(InvalidRequest, match=f"{name}.npy is no file of token losses") as caught:
            read_token_losses(tmp_path / f"{name}.npy")
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequest):
        read_token_losses(tmp_path / "many.npz")
