"""Small real things for tests: checkpoints of tiny networks, images, datasets, on a volume of the test's own."""

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tandem.checkpoints.card import ClassifierCard, LanguageModelCard, Preprocessing
from tandem.checkpoints.files import MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE, step_directory, write_checkpoint
from tandem.checkpoints.registry import Registry, Version
from tandem.checkpoints.tensors import build_network, to_bytes
from tandem.data.manifest import ClassName, ImageDataset
from tandem.data.vocabulary import Tokenizer, Vocabulary, build_subwords, build_vocabulary
from tandem.gpus import Gpu
from tandem.jobs import record as machine
from tandem.jobs.record import JobRecord
from tandem.models.weights import bare_state
from tandem.volume import Volume, to_json

SIZE = 32
MODELS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer", "AWD_LSTM")
CLASS_IDS = ("n00", "n01", "n02", "n03", "n04")
TEXT = "the cat sat on the mat , and the dog ( a big one ) ran ! who saw it ? no-one ."


def class_names(ids: Sequence[str] = CLASS_IDS) -> tuple[ClassName, ...]:
    return tuple(ClassName(id=each, words=f"thing {each[1:]}") for each in ids)


def classifier_card(
    arch: str = "squeezenet1_1", classes: Sequence[str] = CLASS_IDS, run_id: str = "run-a", step: int = 1
) -> ClassifierCard:
    return ClassifierCard(
        run_id=run_id,
        epoch=1,
        step=step,
        seed=0,
        num_parameters=1,
        dataset="shapes",
        dataset_fingerprint="0" * 64,
        metrics={"val_loss": 1.0, "val_acc1": 0.5},
        library_versions={"torch": torch.__version__},
        arch=arch,
        classes=class_names(classes),
        preprocessing=Preprocessing(resize=SIZE, image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    )


def language_card(
    model: str = "LSTM", vocabulary_size: int = 20, run_id: str = "run-l", **changes: object
) -> LanguageModelCard:
    return LanguageModelCard(
        run_id=run_id,
        epoch=1,
        step=1,
        seed=0,
        num_parameters=1,
        dataset="text",
        dataset_fingerprint="0" * 64,
        metrics={"val_loss": 2.0},
        library_versions={"torch": torch.__version__},
        model=model,
        vocabulary_size=vocabulary_size,
        embedding_size=16,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        dropout=0.1,
        tied=False,
        context_length=8,
    ).model_copy(update=changes)


def vocabulary(tokenizer: Tokenizer = "words") -> Vocabulary:
    if tokenizer == "subword":
        return build_subwords(lambda: [TEXT] * 4, 280)
    return build_vocabulary([TEXT], tokenizer)


@cache
def _classifier_bytes(arch: str, num_classes: int, seed: int) -> bytes:
    torch.manual_seed(seed)
    network = build_network(classifier_card(arch, [f"n{number:02}" for number in range(num_classes)]))
    if arch.startswith("squeezenet"):
        # Its head's own start is so small that every image gets almost the same answer.
        head: Any = network.classifier
        torch.nn.init.normal_(head[1].weight, std=0.5)
    return to_bytes(bare_state(network))


def classifier_files(card: ClassifierCard, seed: int = 0) -> dict[str, bytes]:
    return {
        MODEL_FILE: card.model_dump_json().encode(),
        WEIGHTS_FILE: _classifier_bytes(card.arch, len(card.classes), seed),
    }


def language_files(card: LanguageModelCard, words: Vocabulary, seed: int = 0) -> dict[str, bytes]:
    torch.manual_seed(seed)
    network = build_network(card)
    for parameter in network.parameters():
        # Larger than at the start of training, so that the words depend on what came before.
        parameter.data.mul_(3)
    return {
        MODEL_FILE: card.model_dump_json().encode(),
        WEIGHTS_FILE: to_bytes(bare_state(network)),
        VOCABULARY_FILE: words.to_json(),
    }


def publish_classifier(
    volume: Volume,
    name: str,
    run_id: str,
    seed: int = 0,
    classes: Sequence[str] = CLASS_IDS,
    arch: str = "squeezenet1_1",
) -> Version:
    card = classifier_card(arch, classes, run_id)
    checkpoint = step_directory(volume.run(run_id), card.step)
    write_checkpoint(checkpoint, classifier_files(card, seed))
    return Registry(volume).publish(name, "classifier", run_id, checkpoint, card.metrics)


def publish_language_model(
    volume: Volume,
    name: str,
    run_id: str,
    model: str = "LSTM",
    seed: int = 0,
    tokenizer: Tokenizer = "words",
    words: Vocabulary | None = None,
) -> Version:
    words = words or vocabulary(tokenizer)
    card = language_card(model, len(words), run_id)
    checkpoint = step_directory(volume.run(run_id), card.step)
    write_checkpoint(checkpoint, language_files(card, words, seed))
    return Registry(volume).publish(name, "language_model", run_id, checkpoint, card.metrics)


def break_weights(volume: Volume, version: Version) -> Path:
    """Flip one bit of a published checkpoint's weights."""
    path = volume.home / version.checkpoint / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def picture(seed: int, width: int = SIZE, height: int = SIZE, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height)).convert(mode)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(seed: int, width: int = SIZE, height: int = SIZE) -> bytes:
    return encode(picture(seed, width, height))


def write_image_dataset(volume: Volume, name: str, num_images: int, broken: Sequence[int] = ()) -> None:
    """Write a dataset of one split, `val`; the images at the places `broken` are none."""
    directory = volume.dataset(name)
    rows = []
    for number in range(num_images):
        label = number % len(CLASS_IDS)
        file = f"val/{CLASS_IDS[label]}/val_{number}.png"
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(b"no image" if number in broken else png(number))
        rows.append(json.dumps({"file": file, "label": label}))
    (directory / "index").mkdir()
    (directory / "index" / "val.jsonl").write_text("\n".join(rows) + "\n")
    manifest = ImageDataset(
        name=name, fingerprint="0" * 64, source="test", classes=class_names(), num_images={"val": num_images}
    )
    (directory / "dataset.json").write_bytes(to_json(manifest.model_dump(mode="json")))


def queued_record(run_id: str = "r", **changes: object) -> JobRecord:
    """Return the record of a run that waits in the queue."""
    at = machine.now()
    values = {"run_id": run_id, "kind": "train_classifier", "dataset": "d", "model_name": "m", "queue": "default"}
    return JobRecord.model_validate({**values, "submitted_at": at, "updated_at": at, **changes})


def make_gpu(index: int, name: str = "NVIDIA H200") -> Gpu:
    """Return a GPU of a kind that a test names."""
    return Gpu(index, f"GPU-{index:08x}", name, 150 * 10**9)
