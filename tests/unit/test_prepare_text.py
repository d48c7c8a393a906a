import tarfile
from pathlib import Path

import numpy as np
import pytest
from prepare_samples import tree_digest, visible, write_tree, write_zip

from tandem.data.manifest import TextDataset, read_dataset
from tandem.data.prepare import prepare_text, prepare_wikitext
from tandem.data.vocabulary import Vocabulary
from tandem.errors import BadSource, InvalidRequest
from tandem.volume import Volume

WIKI = {
    "train": b" \n = Title = \n \n a b <unk> b \n",
    "valid": b" a a new \n",
    "test": b" b \n\n",
}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "home")


def words(volume: Volume, name: str, split: str) -> list[str]:
    directory = volume.dataset(name)
    vocabulary = Vocabulary.from_json((directory / "vocabulary.json").read_bytes())
    token_ids = np.load(directory / "tokens" / f"{split}.npy")
    assert token_ids.dtype == np.int32
    return [vocabulary.tokens[token_id] for token_id in token_ids]


def refused(volume: Volume, source: Path) -> str:
    with pytest.raises(BadSource) as caught:
        prepare_text(volume, source, "mine")
    assert visible(volume.datasets) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_file_is_cut_by_lines_and_blank_lines_go(volume: Volume, tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text("".join(f"Line {i}, it's said.\n\n" for i in range(40)), "utf-8")
    dataset = prepare_text(volume, source, "book")
    assert words(volume, "book", "train")[:8] == ["Line", "0", ",", "it's", "said", ".", "<eos>", "Line"]
    lines = {s: (volume.dataset("book") / f"{s}.txt").read_text().splitlines() for s in ("train", "valid", "test")}
    assert [len(part) for part in lines.values()] == [36, 2, 2]
    assert lines["valid"][0].startswith("Line 36,")
    # Numbers that train has not seen are unknown.
    assert words(volume, "book", "test")[:2] == ["Line", "<unk>"]
    assert dataset.num_tokens == {"train": 36 * 7, "valid": 14, "test": 14}
    assert read_dataset(volume, "book") == dataset


def test_byte_order_mark_line_ends_and_a_missing_last_one(volume: Volume, tmp_path: Path) -> None:
    source = tmp_path / "dos.txt"
    source.write_bytes(b"\xef\xbb\xbfone two\r\nthree\r\nfour\r\nfive")
    prepare_text(volume, source, "dos")
    assert words(volume, "dos", "train") == ["one", "two", "<eos>", "three", "<eos>"]
    assert (volume.dataset("dos") / "test.txt").read_bytes() == b"five\n"


def test_a_vocabulary_with_a_limit(volume: Volume, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a a a b b c d\n" * 10)
    dataset = prepare_text(volume, source, "a", max_vocabulary=4, tokenizer="whitespace")
    assert dataset.vocabulary_size == 4
    assert words(volume, "a", "train")[:8] == ["a", "a", "a", "b", "b", "<unk>", "<unk>", "<eos>"]
    with pytest.raises(InvalidRequest):
        prepare_text(volume, source, "b", max_vocabulary=3)


@pytest.mark.parametrize("valid", ["valid.txt", "val.txt"])
@pytest.mark.parametrize("test", [{}, {"test.txt": b"c\n"}])
def test_a_folder_of_splits(volume: Volume, tmp_path: Path, valid: str, test: dict[str, bytes]) -> None:
    source = write_tree(tmp_path / "in", {"train.txt": b"a b\n\nc\n", valid: b"b\n", **test})
    before = tree_digest(source)
    dataset = prepare_text(volume, source, "mine")
    assert dataset.num_tokens == {"train": 5, "valid": 2} | ({"test": 2} if test else {})
    assert (volume.dataset("mine") / "test.txt").exists() == bool(test)
    assert tree_digest(source) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 lines with text"),
        (b"\n \n\n", "0 lines with text"),
        (b"just one line", "1 lines with text"),
        (b"a b\nc\n\xff\xfe d\ne\n", "not UTF-8 at byte 6"),
        (b"a b\nc\n\0\0\n", "NUL at byte 6"),
        (b"a\na\na\n", "fewer than 2 different words"),
    ],
)
def test_text_that_is_none_is_named_with_the_place(volume: Volume, tmp_path: Path, data: bytes, message: str) -> None:
    source = tmp_path / "bad.txt"
    source.write_bytes(data)
    found = refused(volume, source)
    assert message in found
    assert str(source) in found


def test_a_line_without_end(volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.data.prepare.lines.MAX_LINE_BYTES", 100)
    source = tmp_path / "long.txt"
    source.write_text("a b\n" + "x" * 200)
    assert "over 100 bytes at byte 4" in refused(volume, source)


def test_folders_that_lack_a_split(volume: Volume, tmp_path: Path) -> None:
    assert "has no valid.txt" in refused(volume, write_tree(tmp_path / "1", {"train.txt": b"a b"}))
    assert "has no train.txt" in refused(volume, write_tree(tmp_path / "2", {"valid.txt": b"a b"}))
    empty = write_tree(tmp_path / "3", {"train.txt": b"a b", "valid.txt": b"\n"})
    assert "valid.txt has no text" in refused(volume, empty)
    assert "there is no file or folder" in refused(volume, tmp_path / "nowhere")


def wiki_sources(tmp_path: Path) -> dict[str, Path]:
    plain = {f"{split}.txt": data for split, data in WIKI.items()}
    official = {f"wikitext-2/wiki.{split}.tokens": data for split, data in WIKI.items()}
    tar = tmp_path / "w.tar.gz"
    with tarfile.open(tar, "w:gz") as archive:
        archive.add(write_tree(tmp_path / "for-tar", plain), "wikitext-2")
    return {
        "tree": write_tree(tmp_path / "tree", plain),
        "parent": write_tree(tmp_path / "parent", official),
        "zip": write_zip(tmp_path / "w.zip", official),
        "tar": tar,
    }


def test_wikitext_in_every_form_is_one_dataset_with_eos_after_each_line(volume: Volume, tmp_path: Path) -> None:
    made: dict[str, TextDataset] = {}
    for name, source in wiki_sources(tmp_path).items():
        made[name] = prepare_wikitext(volume, source, name)
    assert len({dataset.fingerprint for dataset in made.values()}) == 1
    expected = ["<eos>", "=", "Title", "=", "<eos>", "<eos>", "a", "b", "<unk>", "b", "<eos>"]
    assert words(volume, "zip", "train") == expected
    assert words(volume, "zip", "test") == ["b", "<eos>", "<eos>"]
    assert (volume.dataset("tar") / "train.txt").read_bytes() == WIKI["train"]
    # The content is the identity: the same text from elsewhere is prepared already.
    assert prepare_wikitext(volume, tmp_path / "tree", "zip") == made["zip"]


def test_no_wikitext(volume: Volume, tmp_path: Path) -> None:
    cases = {"train.txt": b"a\n"}, {f"{split}.txt": b"\n" for split in WIKI}
    for number, files in enumerate(cases):
        with pytest.raises(BadSource, match=r"no WikiText|no text in it"):
            prepare_wikitext(volume, write_tree(tmp_path / str(number), files))
    assert visible(volume.datasets) == []


def test_a_truncated_or_hostile_tar(volume: Volume, tmp_path: Path) -> None:
    whole = wiki_sources(tmp_path)["tar"]
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[:-60])
    climbing = tmp_path / "climb.tar"
    with tarfile.open(climbing, "w") as archive:
        archive.addfile(tarfile.TarInfo("../evil"))
    flipped = tmp_path / "flipped.tar.gz"
    data = bytearray(whole.read_bytes())
    data[-7] ^= 1  # in the checksum at the very end
    flipped.write_bytes(data)
    for source, message in ((cut, "truncated"), (flipped, "CRC"), (climbing, r"'\.\./evil'")):
        with pytest.raises(BadSource, match=message):
            prepare_wikitext(volume, source)
    assert visible(volume.datasets) == []
