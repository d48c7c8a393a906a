"""Own text prepared into subwords: whole or absent, the same bytes each time, UTF-8 whatever the locale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepare_samples import Recorder, visible, write_tree

from tandem.data.detokenize import Detokenizer
from tandem.data.manifest import TextDataset, read_dataset
from tandem.data.prepare import prepare_text
from tandem.data.vocabulary import Vocabulary
from tandem.errors import BadSource, InvalidRequest
from tandem.volume import Volume

LINES = [f"Größe {number}: the ë  日本 👩‍👧 \u05e9\u05dc\u05d5\u05dd e\u0301" for number in range(60)]


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "home")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "größe.txt"
    path.write_bytes("\r\n".join(LINES).encode())
    return path


def read_back(volume: Volume, name: str, split: str) -> str:
    directory = volume.dataset(name)
    vocabulary = Vocabulary.from_json((directory / "vocabulary.json").read_bytes())
    token_ids = np.load(directory / "tokens" / f"{split}.npy")
    assert token_ids.dtype == np.int32
    return Detokenizer("subword").push(vocabulary.tokens[token_id] for token_id in token_ids)


def test_the_token_ids_hold_the_text_to_the_character(volume: Volume, source: Path) -> None:
    dataset = prepare_text(volume, source, "mine", tokenizer="subword")
    for split, lines in (("train", LINES[:54]), ("valid", LINES[54:57]), ("test", LINES[57:])):
        assert read_back(volume, "mine", split) == "".join(f"{line}\n" for line in lines)
        assert dataset.num_words[split] == sum(len(line.split()) for line in lines)
        assert len(np.load(volume.dataset("mine") / "tokens" / f"{split}.npy")) == dataset.num_tokens[split]
    assert dataset.tokenizer == "subword"
    assert 257 < dataset.vocabulary_size < 8000
    assert read_dataset(volume, "mine") == dataset
    options = json.loads((volume.dataset("mine") / "source.json").read_bytes())["options"]
    assert options == {"tokenizer": "subword", "max_vocabulary": 8000}


def test_the_limit_is_kept_and_has_a_floor(volume: Volume, source: Path) -> None:
    assert prepare_text(volume, source, "mine", tokenizer="subword", max_vocabulary=270).vocabulary_size == 270
    with pytest.raises(InvalidRequest, match="--max-vocabulary: 257 is under 258"):
        prepare_text(volume, source, "other", tokenizer="subword", max_vocabulary=257)


def test_the_vocabulary_is_learned_from_the_train_split_alone(volume: Volume, tmp_path: Path) -> None:
    train = b"the cat sat on the mat\n" * 20
    vocabularies = []
    for name, valid in (("one", b"the cat\n"), ("two", b"zebra zebra zebra\n" * 50)):
        prepare_text(
            volume, write_tree(tmp_path / name, {"train.txt": train, "valid.txt": valid}), name, tokenizer="subword"
        )
        vocabularies.append((volume.dataset(name) / "vocabulary.json").read_bytes())
    assert vocabularies[0] == vocabularies[1]
    assert read_back(volume, "two", "valid") == "zebra zebra zebra\n" * 50


@pytest.mark.parametrize("stage", ["reading train", "collecting words", "numbering train"])
def test_an_interrupted_preparation_leaves_no_dataset_and_is_made_good(
    volume: Volume, source: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_text(volume, source, "whole", tokenizer="subword")

    class Interrupting(Recorder):
        def advance(self, units: int = 1) -> None:
            # The second pass of "collecting words" is the trainer's.
            if self.stages[-1] == stage and (stage != "collecting words" or self.stages.count(stage) == 3):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_text(volume, source, "mine", tokenizer="subword", progress=Interrupting())
    assert not volume.dataset("mine").exists()
    again = prepare_text(volume, source, "mine", tokenizer="subword")
    assert again.fingerprint == whole.fingerprint
    assert visible(volume.datasets) == ["mine", "whole"]


@pytest.mark.parametrize("locale", ["POSIX", "C"])
@pytest.mark.parametrize("tokenizer", ["subword", "words"])
def test_utf8_whatever_the_locale_and_the_same_bytes(
    volume: Volume, source: Path, locale: str, tokenizer: str, tmp_path: Path
) -> None:
    here = prepare_text(volume, source, "mine", tokenizer="subword" if tokenizer == "subword" else "words")
    # Without the two switches Python itself takes such a locale for UTF-8.
    plain = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    command = [sys.executable, "-m", "tandem", "data", "prepare", "text", "--tokenizer", tokenizer, "--name", "mine"]
    done = subprocess.run(
        [*command, "--source", os.fsencode(source), "--json"],
        env={**kept, **plain, "TANDEM_HOME": str(tmp_path / "other"), "PYTHONHASHSEED": "7"},
        capture_output=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert json.loads(done.stdout)["source"] == str(source)
    there = read_dataset(Volume(tmp_path / "other"), "mine")
    assert there.model_dump() == here.model_dump()
    assert (tmp_path / "other/datasets/mine/train.txt").read_bytes().splitlines()[0].decode() == LINES[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 lines with text"),
        (b"a b\nc\n\xff\xfe d\ne\n", "not UTF-8 at byte 6"),
        (b"cat\n" * 30, "fewer than 2 different words"),
    ],
)
def test_text_that_is_none_is_refused_in_one_line(volume: Volume, tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(BadSource) as caught:
        prepare_text(volume, path, "mine", tokenizer="subword")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert visible(volume.datasets) == []


def test_a_file_name_that_is_no_text(volume: Volume, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xf6sse.txt"))
    path.write_bytes(b"a b\nc d\ne f\n")
    assert prepare_text(volume, path, "mine").source == str(tmp_path / "gr�sse.txt")


def test_manifests_of_older_versions_are_read(volume: Volume) -> None:
    old = {"kind": "text", "format_version": 1, "name": "old", "fingerprint": "0", "source": "x", "vocabulary_size": 9}
    (volume.dataset("old")).mkdir(parents=True)
    (volume.dataset("old") / "dataset.json").write_text(json.dumps({**old, "num_tokens": {"train": 5}}))
    dataset = read_dataset(volume, "old")
    assert isinstance(dataset, TextDataset)
    assert (dataset.tokenizer, dataset.num_words) == (None, {})
