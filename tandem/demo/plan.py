"""What the demonstration trains: small enough for minutes on two CPU cores, good enough to be worth serving."""

from pathlib import Path

from tandem.checkpoints.card import parse_card
from tandem.checkpoints.files import MODEL_FILE
from tandem.checkpoints.registry import Registry
from tandem.data.manifest import ImageDataset, TextDataset, read_dataset
from tandem.data.progress import Progress
from tandem.demo.sources import write_digits, write_language_reference
from tandem.errors import BadSource, TandemError
from tandem.jobs.record import JobRecord
from tandem.jobs.runs import SPEC_FILE, read_mirror
from tandem.jobs.spec import JobSpec, make_spec, parse_spec
from tandem.volume import Volume

IMAGES, TEXT = "demo-images", "demo-text"
MODEL_A, MODEL_B, LANGUAGE_MODEL = "demo-resnet18", "demo-shufflenet", "demo-lstm"

# Of the digits; on two cores the three runs take about 25, 20 and 30 s.
_IMAGE_SIZE = 64
# A person's own folder may hold millions.
_MOST_TRAIN_IMAGES, _MOST_VAL_IMAGES = 1500, 400
_MOST_TRAIN_TOKENS, _MOST_VAL_TOKENS = 110_000, 10_000
_MOST_WORDS = 5_000
# Two images, and two tokens for each of the 20 rows of a batch.
_FEWEST_TRAIN_IMAGES, _FEWEST_TRAIN_TOKENS = 2, 40


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
    prepared = (
        prepare_image_folder(volume, image_source, IMAGES, force=True, progress=progress),
        # The output layer grows with it: 239 words a second were measured with 32,650, about 12,000 with 4,000.
        prepare_text(volume, text_source, TEXT, max_vocabulary=_MOST_WORDS, force=True, progress=progress),
    )
    _check_sizes(*prepared)
    return prepared


def _check_sizes(images: ImageDataset, text: TextDataset) -> None:
    """Raise BadSource for data that training would refuse, before anything is trained."""
    if images.num_images["train"] < _FEWEST_TRAIN_IMAGES:
        raise BadSource(
            f"{images.source} gives {images.num_images['train']} train images; {_FEWEST_TRAIN_IMAGES} are needed"
        )
    if text.num_tokens["train"] < _FEWEST_TRAIN_TOKENS:
        raise BadSource(
            f"{text.source} gives {text.num_tokens['train']} words to train on; {_FEWEST_TRAIN_TOKENS} are needed"
        )


def trained_before(spec: JobSpec, volume: Volume) -> JobRecord | None:
    """Return the run of an earlier demonstration that did just this, and whose model is still the latest."""
    registry = Registry(volume)
    if spec.model_name not in registry.names():
        return None
    located = registry.resolve(spec.model_name)
    run = volume.run(located.run_id)
    try:
        same_job = parse_spec((run / SPEC_FILE).read_bytes()) == spec
        card = parse_card((located.checkpoint / MODEL_FILE).read_bytes())
        dataset = read_dataset(volume, spec.dataset)
    except (OSError, TandemError):
        return None
    is_same = same_job and card.dataset_fingerprint == dataset.fingerprint
    return read_mirror(run) if is_same else None


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
