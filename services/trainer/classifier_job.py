"""A classifier's training run: images opened, network built, first weights loaded, and the card of the result."""

import torch
from torch import nn

from services.trainer.curves import Curves
from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.evaluation import Predictions
from services.trainer.engine.ranks import Ranks
from services.trainer.first_weights import load_first_weights
from services.trainer.job import Job, origin
from services.trainer.pictures import Caption, confident_mistakes, confusion_image, misclassified_grid
from tandem.checkpoints.card import Card, ClassifierCard, Preprocessing
from tandem.checkpoints.files import NETWORK_FILE
from tandem.checkpoints.registry import Registry
from tandem.comparison.classification import confusion_matrix
from tandem.data.manifest import ImageDataset
from tandem.data.splits import ImageSplit, PackedSplit, open_split
from tandem.errors import TrainingFailed
from tandem.jobs.sizes import sizes_of
from tandem.jobs.spec import ClassifierJob
from tandem.models import layers
from tandem.models.classifiers import build_classifier, check_image_size
from tandem.models.structure import layer_table
from tandem.volume import Volume

# ImageNet's statistics, which torchvision's weights and the reference script use.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What packed pixels may take of a GPU's free memory.
_RESIDENT_SHARE = 0.3


def preprocessing_of(spec: ClassifierJob, dataset: ImageDataset) -> Preprocessing:
    """Return the transform of evaluation and serving."""
    resize, size = sizes_of(spec, dataset)
    return Preprocessing(resize=resize, image_size=size, mean=_MEAN, std=_STD)


def classifier_job(
    spec: ClassifierJob, dataset: ImageDataset, volume: Volume, run_id: str, device: torch.device, ranks: Ranks
) -> Job:
    """Return the job of `spec` on prepared images."""
    preprocessing = preprocessing_of(spec, dataset)
    if spec.crop == "auto":
        # By the dataset, not by how it is read: --data-path must not change the recipe.
        spec = spec.model_copy(update={"crop": "shift" if dataset.packed else "resized"})
    network = _network(spec, dataset, preprocessing, volume, run_id)
    size = preprocessing.image_size
    # Before training: it may compute some layers in a way of its own.
    table = layers.to_json(layer_table(network, torch.zeros(1, 3, size, size)))
    train, val = _open_splits(spec, dataset, volume, preprocessing, device)
    training = ClassifierTraining(spec, network, train, val, preprocessing, device, ranks)

    def make_card(epoch: int, step: int, metrics: dict[str, float]) -> Card:
        return ClassifierCard(
            **origin(spec, dataset, network, run_id),
            epoch=epoch,
            step=step,
            metrics=metrics,
            arch=spec.arch,
            stem=spec.stem,
            classes=dataset.classes,
            preprocessing=preprocessing,
        )

    example = torch.zeros(1, 3, size, size, device=device)
    return Job(
        training,
        make_card,
        {NETWORK_FILE: table},
        "images",
        lambda curves: _finish(spec, dataset, training, curves),
        example,
        ranks,
        Registry(volume).resolve(spec.resume_from).checkpoint if spec.resume_from else None,
    )


def _network(
    spec: ClassifierJob, dataset: ImageDataset, preprocessing: Preprocessing, volume: Volume, run_id: str
) -> nn.Module:
    size, num_classes = preprocessing.image_size, len(dataset.classes)
    network = build_classifier(spec.arch, num_classes, size, spec.stem)
    for each in {size, spec.start_size or size}:
        check_image_size(network, spec.arch, num_classes, each)
    load_first_weights(network, spec, dataset.classes, size, volume, run_id)
    return network


def _open_splits(
    spec: ClassifierJob, dataset: ImageDataset, volume: Volume, preprocessing: Preprocessing, device: torch.device
) -> tuple[ImageSplit, ImageSplit]:
    directory = volume.dataset(spec.dataset)
    if spec.data_path in ("device", "mapped") and not dataset.packed:
        raise TrainingFailed(f"--data-path {spec.data_path}: {spec.dataset!r} has no packed pixels; use files")
    train, val = (
        open_split(directory, dataset, split, preprocessing, limit, spec.data_path == "files")
        for split, limit in (("train", spec.limit_train_images), ("val", spec.limit_val_images))
    )
    if isinstance(train, PackedSplit) and isinstance(val, PackedSplit) and _is_resident(spec, train, val, device):
        return train.on(device), val.on(device)
    return train, val


def _is_resident(spec: ClassifierJob, train: PackedSplit, val: PackedSplit, device: torch.device) -> bool:
    """Return whether the pixels go to the device: asked for, or automatic where they fit."""
    if device.type != "cuda" or spec.augments_each_image or spec.data_path not in ("auto", "device"):
        return False
    free, _ = torch.cuda.mem_get_info(device)
    wanted = train.num_bytes + val.num_bytes
    if spec.data_path == "device" and wanted > free:
        raise TrainingFailed(f"--data-path device: {wanted:,} bytes of pixels and {free:,} free; use mapped")
    return spec.data_path == "device" or wanted < _RESIDENT_SHARE * free


def _finish(
    spec: ClassifierJob, dataset: ImageDataset, training: ClassifierTraining, curves: Curves | None
) -> dict[str, float]:
    """Draw what the best network gets wrong; return what flip evaluation makes of it, where that was asked for."""
    network = training.served_network
    if spec.flip_evaluation:
        mirrored = training.evaluator.predict(network, training.val, mirror=True).predictions
    predictions = training.evaluator.predict(network, training.val).predictions
    if curves:
        _draw(curves, spec.epochs, dataset, training.val, predictions)
    return mirrored.metrics("val_flip_") if spec.flip_evaluation else {}


def _draw(curves: Curves, epoch: int, dataset: ImageDataset, val: ImageSplit, predictions: Predictions) -> None:
    labels, named = predictions.labels.numpy(), predictions.top_classes[:, 0].numpy()
    shares = predictions.top_probabilities[:, 0].numpy()
    words = [each.words for each in dataset.classes]
    worst = confident_mistakes(labels, named, shares)
    captions = [Caption(words[labels[row]], words[named[row]], float(shares[row])) for row in worst]
    pixels = val.eval_batch(torch.tensor(worst, dtype=torch.int64)).cpu().numpy() if worst else _NOTHING
    curves.image("misclassified", misclassified_grid(pixels, captions), epoch)
    curves.image("confusion", confusion_image(confusion_matrix(labels, named, len(words)), words), epoch)


_NOTHING = torch.zeros(0, 3, 1, 1, dtype=torch.uint8).numpy()
