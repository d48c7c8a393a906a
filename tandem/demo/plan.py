"""What the demonstration trains: small enough for minutes on two CPU cores, good enough to be worth serving."""

from pathlib import Path

from tandem.data.manifest import ImageDataset, TextDataset
from tandem.data.progress import Progress
from tandem.demo.sources import write_digits, write_language_reference
from tandem.jobs.spec import JobSpec, make_spec
from tandem.volume import Volume

IMAGES, TEXT = "demo-images", "demo-text"
MODEL_A, MODEL_B, LANGUAGE_MODEL = "demo-resnet18", "demo-shufflenet", "demo-lstm"

# Of the digits; on two cores the three runs take about 25, 20 and 30 s.
_IMAGE_SIZE = 64
# A person's own folder may hold millions.
_MOST_TRAIN_IMAGES, _MOST_VAL_IMAGES = 1500, 400
_MOST_TRAIN_TOKENS, _MOST_VAL_TOKENS = 110_000, 10_000


def prepare(
    volume: Volume, images: Path | None, text: Path | None, progress: Progress
) -> tuple[ImageDataset, TextDataset]:
    """Prepare the two datasets, from the person's folder and file where they are given."""
    from tandem.data.prepare.image_folder import prepare_image_folder
    from tandem.data.prepare.text import prepare_text

    source = volume.home / "demo-source"
    source.mkdir(parents=True, exist_ok=True)
    image_source = images or write_digits(source / "digits")
    text_source = text or write_language_reference(source / "language_reference.txt")
    return (
        prepare_image_folder(volume, image_source, IMAGES, force=True, progress=progress),
        prepare_text(volume, text_source, TEXT, force=True, progress=progress),
    )


def specs(own_images: bool) -> list[JobSpec]:
    """Return the three runs: two classifiers to compare, and a language model."""
    return [
        make_spec(_classifier("resnet18", MODEL_A, epochs=2, learning_rate=0.02, own=own_images)),
        make_spec(_classifier("shufflenet_v2_x0_5", MODEL_B, epochs=4, learning_rate=0.05, own=own_images)),
        make_spec(
            {
                "kind": "train_language_model",
                "dataset": TEXT,
                "model_name": LANGUAGE_MODEL,
                "model": "LSTM",
                "epochs": 5,
                "limit_train_tokens": _MOST_TRAIN_TOKENS,
                "limit_val_tokens": _MOST_VAL_TOKENS,
            }
        ),
    ]


def _classifier(arch: str, name: str, epochs: int, learning_rate: float, own: bool) -> dict[str, object]:
    return {
        "kind": "train_classifier",
        "dataset": IMAGES,
        "model_name": name,
        "arch": arch,
        "epochs": epochs,
        "batch_size": 32,
        "learning_rate": learning_rate,
        "image_size": _IMAGE_SIZE,
        # A mirrored digit is another sign, or none.
        "flip": own,
        "limit_train_images": _MOST_TRAIN_IMAGES,
        "limit_val_images": _MOST_VAL_IMAGES,
    }
