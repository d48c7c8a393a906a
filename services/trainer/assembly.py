"""From a job spec to a training loop: datasets opened, network built, and the card that will describe it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.language_model import LanguageModelTraining, perplexity
from services.trainer.engine.reports import Training
from tandem.checkpoints.card import Card, ClassifierCard, LanguageModelCard, Preprocessing
from tandem.data.corpus import load_tokens
from tandem.data.manifest import Dataset, ImageDataset, TextDataset, read_dataset
from tandem.data.randomness import derive_seed
from tandem.data.splits import open_split
from tandem.errors import InvalidJob
from tandem.jobs.spec import ClassifierJob, JobSpec, LanguageModelJob
from tandem.models.classifiers import build_classifier, check_image_size, num_parameters
from tandem.models.devices import resolve_device
from tandem.models.language_models import LanguageModelShape, build_language_model
from tandem.volume import Volume

# ImageNet's statistics, which torchvision's weights and the reference script use.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL = 96
_DEFAULT_SIZE = 224
# What a Transformer sees of the past, in training windows: state is carried, so more than one is of use.
_CONTEXT_WINDOWS = 4


@dataclass(frozen=True)
class Job:
    """A training run, ready to go."""

    training: Training
    make_card: Callable[[int, int, dict[str, float]], Card]
    vocabulary: bytes | None
    unit: Literal["images", "words"]
    best_metric: str
    # Of the finished run's best network: metrics beyond those of the val split.
    final_metrics: Callable[[], dict[str, float]]
    # Inputs that TensorBoard traces the network with.
    example: Tensor


def assemble(spec: JobSpec, volume: Volume, run_id: str) -> Job:
    """Return the job of `spec`; raise TandemError where data, network and device don't fit together."""
    device = resolve_device(spec.device)
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    dataset = read_dataset(volume, spec.dataset)
    torch.manual_seed(derive_seed(spec.seed, "weights"))
    if isinstance(spec, ClassifierJob) and isinstance(dataset, ImageDataset):
        return _classifier(spec, dataset, volume, run_id, device)
    if isinstance(spec, LanguageModelJob) and isinstance(dataset, TextDataset):
        return _language_model(spec, dataset, volume, run_id, device)
    raise InvalidJob(f"dataset {spec.dataset!r} holds {dataset.kind}, which {spec.kind} can't use")


def image_size_of(spec: ClassifierJob, dataset: ImageDataset) -> int:
    """Return the side in pixels that the network will see."""
    if spec.image_size is not None:
        return spec.image_size
    stored = dataset.image_size
    return min(stored) if stored is not None and max(stored) <= _SMALL else _DEFAULT_SIZE


def preprocessing_of(spec: ClassifierJob, dataset: ImageDataset) -> Preprocessing:
    """Return the transform of evaluation and serving.

    Small images keep their whole frame; larger ones lose an eighth at the edges, as the reference does (256 to 224).
    """
    size = image_size_of(spec, dataset)
    is_small = dataset.image_size is not None and max(dataset.image_size) <= _SMALL
    return Preprocessing(resize=size if is_small else round(size * 8 / 7), image_size=size, mean=_MEAN, std=_STD)


def _classifier(spec: ClassifierJob, dataset: ImageDataset, volume: Volume, run_id: str, device: torch.device) -> Job:
    preprocessing = preprocessing_of(spec, dataset)
    network = build_classifier(spec.arch, len(dataset.classes), preprocessing.image_size)
    check_image_size(network, spec.arch, len(dataset.classes), preprocessing.image_size)
    directory = volume.dataset(spec.dataset)
    train = open_split(directory, dataset, "train", preprocessing, spec.limit_train_images)
    val = open_split(directory, dataset, "val", preprocessing, spec.limit_val_images)
    training = ClassifierTraining(spec, network, train, val, preprocessing, device)

    def make_card(epoch: int, step: int, metrics: dict[str, float]) -> Card:
        return ClassifierCard(
            **origin(spec, dataset, network, run_id),
            epoch=epoch,
            step=step,
            metrics=metrics,
            arch=spec.arch,
            classes=dataset.classes,
            preprocessing=preprocessing,
        )

    size = preprocessing.image_size
    return Job(training, make_card, None, "images", "val_acc1", dict, torch.zeros(1, 3, size, size, device=device))


def _language_model(
    spec: LanguageModelJob, dataset: TextDataset, volume: Volume, run_id: str, device: torch.device
) -> Job:
    directory = volume.dataset(spec.dataset)
    shape = language_model_shape(spec, dataset.vocabulary_size)
    network = build_language_model(shape)
    training = LanguageModelTraining(
        spec,
        network,
        train=load_tokens(directory, "train", spec.limit_train_tokens),
        val=load_tokens(directory, "valid", spec.limit_val_tokens),
        device=device,
    )

    def make_card(epoch: int, step: int, metrics: dict[str, float]) -> Card:
        found = origin(spec, dataset, network, run_id)
        return LanguageModelCard(**found, **vars(shape), epoch=epoch, step=step, metrics=metrics)

    def final_metrics() -> dict[str, float]:
        if "test" not in dataset.num_tokens:
            return {}
        loss = training.evaluate(load_tokens(directory, "test", spec.limit_val_tokens))
        return {"test_loss": loss, "test_ppl": perplexity(loss)}

    vocabulary = (directory / "vocabulary.json").read_bytes()
    example = torch.zeros(1, spec.bptt, dtype=torch.int64, device=device)
    return Job(training, make_card, vocabulary, "words", "val_loss", final_metrics, example)


def language_model_shape(spec: LanguageModelJob, vocabulary_size: int) -> LanguageModelShape:
    """Return the shape of the network that `spec` asks for."""
    return LanguageModelShape(
        model=spec.model,
        vocabulary_size=vocabulary_size,
        embedding_size=spec.embedding_size,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        dropout=spec.dropout,
        tied=spec.tied,
        context_length=_CONTEXT_WINDOWS * spec.bptt,
    )


def origin(spec: JobSpec, dataset: Dataset, network: nn.Module, run_id: str) -> dict[str, Any]:
    """Return what every card of a run says of where its weights come from."""
    return {
        "run_id": run_id,
        "seed": spec.seed,
        "num_parameters": num_parameters(network),
        "dataset": spec.dataset,
        "dataset_fingerprint": dataset.fingerprint,
        "library_versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions that the bytes of a result depend on."""
    return {name: version(name) for name in ("torch", "torchvision", "numpy")}
