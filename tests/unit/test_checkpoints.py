import hashlib
import json
from pathlib import Path

import pytest
import torch
from factories import classifier_card, classifier_files, language_card, language_files, vocabulary

from tandem import volume
from tandem.checkpoints.card import parse_card
from tandem.checkpoints.files import (
    MANIFEST_FILE,
    MODEL_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    list_checkpoints,
    manifest_digest,
    read_pointer,
    read_verified,
    step_directory,
    write_checkpoint,
    write_pointer,
)
from tandem.checkpoints.tensors import build_network, from_bytes, load_checkpoint, to_bytes
from tandem.errors import CheckpointCorrupt, VolumeUnavailable
from tandem.models.weights import bare_state, load_weights

FILES = {"a.bin": b"some bytes", "b.json": b"{}"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = step_directory(tmp_path, 12)
    write_checkpoint(path, FILES)
    return path


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    words = vocabulary()
    path = step_directory(tmp_path, 1)
    write_checkpoint(path, language_files(language_card("GRU", len(words)), words))
    return path


def rewrite(checkpoint: Path, name: str, data: bytes) -> None:
    """Change a file and its entry in the manifest, as a foreign writer would have it."""
    (checkpoint / name).write_bytes(data)
    document = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
    document["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(document) + "\n")


def test_what_was_written_is_read(checkpoint: Path) -> None:
    assert checkpoint.name == "step-00000012"
    assert read_verified(checkpoint) == FILES
    assert read_verified(checkpoint, ("b.json",), manifest_digest(checkpoint)) == {"b.json": b"{}"}
    assert list_checkpoints(checkpoint.parent.parent) == [checkpoint]


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointCorrupt, match=name.replace(".", r"\.")):
        read_verified(checkpoint)


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_truncated_file_is_refused(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-1])
    if name == MANIFEST_FILE:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointCorrupt):
        read_verified(checkpoint)


@pytest.mark.parametrize("position", range(len(FILES["a.bin"])))
def test_each_flipped_bit_is_found(checkpoint: Path, position: int) -> None:
    data = bytearray(FILES["a.bin"])
    data[position] ^= 1 << (position % 8)
    (checkpoint / "a.bin").write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="altered"):
        read_verified(checkpoint)


def test_the_digest_stands_for_the_manifest(checkpoint: Path) -> None:
    digest = manifest_digest(checkpoint)
    rewrite(checkpoint, "a.bin", b"other bytes")
    assert read_verified(checkpoint)["a.bin"] == b"other bytes"
    with pytest.raises(CheckpointCorrupt, match="not the one that was registered"):
        read_verified(checkpoint, digest=digest)


@pytest.mark.parametrize("manifest", [b"", b"[]", b'{"format_version": 2, "files": {}}', b'{"format_version": 1}'])
def test_a_foreign_manifest_is_refused(checkpoint: Path, manifest: bytes) -> None:
    (checkpoint / MANIFEST_FILE).write_bytes(manifest)
    with pytest.raises(CheckpointCorrupt):
        read_verified(checkpoint)


def test_one_that_is_there_is_replaced_whole(checkpoint: Path) -> None:
    (checkpoint / "a.bin").write_bytes(b"torn")
    write_checkpoint(checkpoint, {"a.bin": b"new"})
    assert read_verified(checkpoint) == {"a.bin": b"new"}
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(volume, "sync_together", full)
    with pytest.raises(VolumeUnavailable, match="No space left"):
        write_checkpoint(step_directory(tmp_path, 1), FILES)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_pointers(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    assert read_pointer(run, "latest") is None
    write_pointer(run, "latest", checkpoint, {"val_loss": 0.5})
    assert read_pointer(run, "latest") == checkpoint
    (run / "latest.json").write_text('{"checkpoint": "../../else"}')
    with pytest.raises(CheckpointCorrupt):
        read_pointer(run, "latest")


def test_a_language_model_comes_back_to_the_bit(language_model: Path) -> None:
    loaded = load_checkpoint(language_model, manifest_digest(language_model))
    weights = from_bytes((language_model / WEIGHTS_FILE).read_bytes())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bare_state(loaded.network).items())
    assert loaded.vocabulary == vocabulary()
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    path = step_directory(tmp_path, 1)
    write_checkpoint(path, classifier_files(classifier_card()))
    loaded = load_checkpoint(path)
    assert loaded.card.kind == "classifier"
    assert loaded.vocabulary is None
    assert loaded.network(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", [MODEL_FILE, WEIGHTS_FILE, VOCABULARY_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_each_damage_to_each_file_is_refused(language_model: Path, name: str, damage: str) -> None:
    path = language_model / name
    digest = manifest_digest(language_model)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt):
        load_checkpoint(language_model, digest)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (WEIGHTS_FILE, b"junk", "tensors"),
        (WEIGHTS_FILE, to_bytes({"other.weight": torch.zeros(2)}), "lack"),
        (MODEL_FILE, b"{}", "format"),
        (MODEL_FILE, b"\x80\x04", "format"),
        (VOCABULARY_FILE, b"[]", "vocabulary"),
        (VOCABULARY_FILE, vocabulary("whitespace").to_json(), "vocabulary"),
        (VOCABULARY_FILE, vocabulary("subword").to_json()[:-20], "vocabulary"),
        (VOCABULARY_FILE, vocabulary("subword").to_json().replace(b"[[", b"[[9999, 1], [", 1), "a merge of tokens"),
    ],
)
def test_foreign_files_under_a_right_manifest_are_refused(
    language_model: Path, name: str, data: bytes, says: str
) -> None:
    rewrite(language_model, name, data)
    with pytest.raises(CheckpointCorrupt, match=says):
        load_checkpoint(language_model)


def test_foreign_keys_and_shapes_are_refused() -> None:
    network = build_network(language_card("GRU", 20))
    state = bare_state(network)
    with pytest.raises(CheckpointCorrupt, match=r"lack head\.bias"):
        load_weights(network, {name: tensor for name, tensor in state.items() if name != "head.bias"})
    with pytest.raises(CheckpointCorrupt, match=r"unknown module\.x"):
        load_weights(network, {**state, "module.x": torch.zeros(1)})
    with pytest.raises(CheckpointCorrupt, match=r"another shape of head\.bias"):
        load_weights(network, {**state, "head.bias": torch.zeros(3)})


def test_equal_tensors_give_equal_bytes_without_wrappers_prefix() -> None:
    network = build_network(language_card("RNN_TANH", 20))
    state = bare_state(network)
    assert to_bytes(state) == to_bytes(dict(reversed(state.items())))
    wrapped = torch.nn.Module()
    wrapped.module = network
    assert bare_state(wrapped).keys() == state.keys()


def test_a_card_with_unknown_fields_is_refused() -> None:
    document = json.loads(classifier_card().model_dump_json())
    assert parse_card(json.dumps(document).encode()) == classifier_card()
    with pytest.raises(CheckpointCorrupt, match="surprise"):
        parse_card(json.dumps({**document, "surprise": 1}).encode())
