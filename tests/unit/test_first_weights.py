"""Weights to begin with: files of others, other models, and everything about them that does not fit."""

import contextlib
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from factories import class_names, publish_classifier, publish_language_model
from torch import Tensor, nn
from torchvision import models

from services.trainer.first_weights import load_first_weights
from tandem.checkpoints.foreign import read_weights
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import load_checkpoint
from tandem.errors import CheckpointCorrupt, TrainingFailed
from tandem.jobs.spec import ClassifierJob
from tandem.models.classifiers import build_classifier, head_parameters
from tandem.volume import Volume

CLASSES = class_names(("a", "b", "c"))


def spec(**values: object) -> ClassifierJob:
    return ClassifierJob.model_validate({"dataset": "d", "model_name": "m", "arch": "resnet18", **values})


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Tensor]:
    """What torchvision's weights of ResNet-18 look like: a thousand classes."""
    torch.manual_seed(1)
    weights: dict[str, Tensor] = models.resnet18(num_classes=1000).state_dict()
    return weights


def begin(volume: Volume, file: str = "", **values: object) -> nn.Module:
    job = spec(**({"weights_file": file} if file else {}), **values)
    torch.manual_seed(2)
    network = build_classifier(job.arch, len(CLASSES), 32, job.stem)
    load_first_weights(network, job, CLASSES, 32, volume, "run-1")
    return network


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    (tmp_path / "runs" / "run-1" / "weights").mkdir(parents=True)
    return Volume(tmp_path)


def path(volume: Volume, name: str) -> Path:
    return volume.run("run-1") / "weights" / name


@pytest.mark.parametrize("form", ["safetensors", "state dict", "the reference script's", "parameters"])
def test_pretrained_weights_are_taken_and_the_head_is_new(
    volume: Volume, pretrained: dict[str, Tensor], form: str
) -> None:
    if form == "safetensors":
        safetensors.torch.save_file(pretrained, path(volume, "w"))
    elif form == "state dict":
        torch.save(pretrained, path(volume, "w"))
    elif form == "parameters":
        parameters = {name: nn.Parameter(each, requires_grad=False) for name, each in pretrained.items()}
        torch.save(parameters, path(volume, "w"))
    else:
        wrapped = {f"module.{name}": tensor for name, tensor in pretrained.items()}
        rest = {"epoch": 90, "arch": "resnet18", "best_acc1": torch.tensor(69.8), "optimizer": {"lr": 0.1, "state": []}}
        torch.save({**rest, "state_dict": wrapped}, path(volume, "w"))
    state = begin(volume, "weights/w").state_dict()
    assert state["fc.weight"].shape == (3, 512)
    for name, tensor in pretrained.items():
        if not name.startswith("fc."):
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),
        ("mobilenet_v3_small", {"classifier.3.weight", "classifier.3.bias"}),
        ("vit_b_32", {"heads.head.weight", "heads.head.bias"}),
        ("densenet121", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_the_head_is_what_follows_the_number_of_classes(arch: str, head: set[str]) -> None:
    assert head_parameters(arch, 64) == head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "layer1.0.conv1.weight"}, "has no tensor 'layer1.0.conv1.weight', which resnet18 .* needs"),
        ({"add": "layer9.weight"}, "has a tensor 'layer9.weight' that resnet18 .* has not"),
        ({"stem": "small"}, r"conv1.weight of w has the shape \(64, 3, 7, 7\), .* \(64, 3, 3, 3\): .*--stem"),
    ],
)
def test_weights_of_another_shape_are_named(
    volume: Volume, pretrained: dict[str, Tensor], change: dict[str, str], message: str
) -> None:
    weights = {name: tensor for name, tensor in pretrained.items() if name != change.get("drop")}
    if "add" in change:
        weights[change["add"]] = torch.zeros(1)
    safetensors.torch.save_file(weights, path(volume, "w"))
    with pytest.raises(TrainingFailed, match=message):
        begin(volume, "weights/w", stem=change.get("stem", "stock"))


def test_a_models_head_is_kept_where_the_classes_are_the_same(volume: Volume) -> None:
    publish_classifier(volume, "m", "run-a", classes=("a", "b", "c"))
    publish_classifier(volume, "other", "run-b", classes=("a", "c", "b"), seed=5)
    head = "classifier.1.weight"
    for name, is_kept in (("m", True), ("other", False)):
        located = Registry(volume).resolve(name)
        theirs = load_checkpoint(located.checkpoint).network.state_dict()
        ours = begin(volume, arch="squeezenet1_1", weights_from=name).state_dict()
        assert torch.equal(ours["features.0.weight"], theirs["features.0.weight"])
        assert torch.equal(ours[head], theirs[head]) is is_kept


def test_a_language_model_gives_no_weights(volume: Volume) -> None:
    publish_language_model(volume, "words", "run-l")
    with pytest.raises(TrainingFailed, match="words:1 is a language model"):
        begin(volume, weights_from="words")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", ["function", "module", "numpy"])
def test_a_file_can_not_name_what_is_called(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import numpy as np

    documents = {"function": Harmful(), "module": nn.Linear(2, 2), "numpy": np.float64(1.5)}
    torch.save({"w": torch.zeros(2), "more": documents[content]}, tmp_path / "w.pth")
    with pytest.raises(CheckpointCorrupt, match=r"not tensors alone.*safetensors"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "harm").exists()


def test_what_are_no_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.pth"
    torch.save({"w": torch.arange(1000)}, good)
    assert torch.equal(read_weights(good)["w"], torch.arange(1000))
    files = {"empty": b"", "text": b"hello", "pickle": pickle.dumps({"w": 1}), "cut": good.read_bytes()[:900]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"epoch": 1}, tmp_path / "numbers")
    torch.save([torch.zeros(2)], tmp_path / "list")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    for name in (*files, "numbers", "list", "zip", "missing"):
        with pytest.raises(CheckpointCorrupt) as caught:
            read_weights(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damaged_bytes_are_refused_whatever_they_say(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}, good)
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (script,) = (name for name in members if name.endswith("data.pkl"))
    chance = random.Random(0)
    for _ in range(300):
        data = bytearray(members[script])
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with zipfile.ZipFile(bad, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, bytes(data) if name == script else content)
        with contextlib.suppress(CheckpointCorrupt):
            read_weights(bad)


def test_storages_that_are_shared_offset_or_strided_come_out_right(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    tensors = {"a": base[1:3, ::2], "b": base.t(), "c": torch.tensor(3, dtype=torch.int64), "d": torch.zeros(0, 3)}
    tensors["e"] = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    torch.save(tensors, tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
