"""The training loops: that they learn, and that a run which was interrupted ends in the same bytes."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from training_runs import check_resume, check_resume_within_evaluation, everything, run

from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.evaluation import Predictions
from services.trainer.engine.reports import Training
from tandem.checkpoints.card import Preprocessing
from tandem.checkpoints.tensors import to_bytes
from tandem.data.splits import PackedSplit
from tandem.errors import NonFiniteLoss, OutOfMemory, TrainingFailed
from tandem.jobs.spec import ClassifierJob
from tandem.models.classifiers import build_classifier
from tandem.models.weights import bare_state, load_weights

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize=16, image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def colours(count: int, preprocessing: Preprocessing = PREPROCESSING) -> PackedSplit:
    """Three classes, told apart by their brightest channel."""
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 90, (count, 3, 16, 16), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    pixels[torch.arange(count), labels] += 120
    files = [f"{row}.png" for row in range(count)]
    return PackedSplit(pixels.numpy(), torch.arange(count), labels, files, preprocessing)


def classifier(**changes: object) -> ClassifierTraining:
    values = {"dataset": "d", "model_name": "m", "arch": "resnet18", "epochs": 2, "batch_size": 16}
    basis = {"learning_rate": 0.01, "image_size": 16, "precision": "float32"}
    spec = ClassifierJob.model_validate({**values, **basis, **changes})
    size = spec.image_size or 16
    torch.manual_seed(0)
    network = build_classifier(spec.arch, 3, size, spec.stem)
    preprocessing = PREPROCESSING.model_copy(update={"image_size": size, "resize": size})
    return ClassifierTraining(spec, network, colours(40, preprocessing), colours(12, preprocessing), preprocessing, CPU)


EVERYTHING: dict[str, object] = {
    "ema_decay": 0.9,
    "mixup": 0.2,
    "cutmix": 1.0,
    "accumulation": 2,
    "label_smoothing": 0.1,
    "crop": "resized",
    "image_size": 32,
    "start_size": 16,
    "schedule": "onecycle",
    "arch": "shufflenet_v2_x0_5",
}

MAKERS: dict[str, Callable[[], Training]] = {
    "resnet18": classifier,
    "mobilenet with dropout": lambda: classifier(arch="mobilenet_v3_small"),
    "everything on whole batches": lambda: classifier(**EVERYTHING),
    "bfloat16": lambda: classifier(precision="bfloat16", image_size=32),
    "images augmented one by one by two processes": lambda: classifier(
        arch="shufflenet_v2_x0_5",
        auto_augment="randaugment",
        color_jitter=0.3,
        random_erasing=0.5,
        crop="resized",
        num_workers=2,
    ),
}


@pytest.mark.parametrize("stop_at", [1, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumed_at_any_step_ends_in_the_same_bytes(name: str, stop_at: int) -> None:
    check_resume(MAKERS[name], stop_at)


@pytest.mark.parametrize("name", ["resnet18", "everything on whole batches"])
def test_a_run_resumed_within_an_evaluation_ends_in_the_same_bytes_and_says_the_same(name: str) -> None:
    check_resume_within_evaluation(MAKERS[name])


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
        )
        self.head = torch.nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).flatten(1))
        return logits


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: there is no g++")
def test_a_compiled_run_resumes_exactly_and_keeps_its_names() -> None:
    def compiled() -> ClassifierTraining:
        values = {"dataset": "d", "model_name": "m", "arch": "resnet18", "precision": "float32", "compile": True}
        spec = ClassifierJob.model_validate({**values, "epochs": 2, "batch_size": 16})
        torch.manual_seed(0)
        torch._dynamo.reset()
        return ClassifierTraining(spec, Small(), colours(40), colours(12), PREPROCESSING, CPU)

    straight = compiled()
    run(straight)
    first = compiled()
    run(first, until=lambda step: step == 2)
    weights, state = bare_state(first.network), first.snapshot()
    second = compiled()
    load_weights(second.network, weights)
    second.restore(state)
    run(second)
    assert everything(second) == everything(straight)
    assert "body.0.weight" in weights


def test_without_its_average_a_run_goes_on_with_the_weights_that_were_trained() -> None:
    averaged = classifier(ema_decay=0.9)
    run(averaged, until=lambda step: step == 4)
    plain = classifier()
    load_weights(plain.served_network, bare_state(averaged.served_network))
    plain.restore(averaged.snapshot())
    assert to_bytes(bare_state(plain.network)) == to_bytes(bare_state(averaged.network))


def test_evaluation_takes_no_more_memory_than_a_part_of_an_update() -> None:
    assert classifier(accumulation=4).evaluator.batch_size == 8
    with pytest.raises(OutOfMemory, match="no memory to evaluate 16 images; lower --batch-size or raise"):
        run(greedy(11, batch_size=16, accumulation=2, refuses_evaluation=True))


def test_a_classifier_learns_colours() -> None:
    metrics = run(classifier(epochs=15, learning_rate=0.02))[-1].metrics
    assert metrics["val_acc1"] == 100.0
    assert metrics["val_acc5"] == 100.0, "three classes: every image is right at rank 5"
    assert metrics["val_best_acc1"] == 100.0


def test_a_loss_that_is_no_number_ends_the_run_with_a_remedy() -> None:
    training = classifier(epochs=1)
    with torch.no_grad():
        next(training.network.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="lower --learning-rate"):
        run(training)


def test_batches_cover_the_split_and_never_hold_one_image() -> None:
    assert classifier(batch_size=16).steps_per_epoch == 3
    assert classifier(batch_size=39).steps_per_epoch == 1, "a last batch of one image is left out"
    with pytest.raises(TrainingFailed, match="too few for --batch-size 500; use at most 40"):
        classifier(batch_size=500)


def test_a_moving_average_is_what_is_evaluated_and_saved() -> None:
    training = classifier(ema_decay=0.9, epochs=1)
    run(training)
    raw, served = bare_state(training.network), bare_state(training.served_network)
    assert any(not torch.equal(raw[name], served[name]) for name in raw)
    assert {f"network/{name}" for name in raw} <= training.snapshot().keys()


def test_parts_of_an_update_add_up_to_the_whole() -> None:
    # SqueezeNet has no batch norm, whose statistics are those of a part; its dropout is switched off.
    def after(accumulation: int) -> dict[str, Tensor]:
        training = classifier(arch="squeezenet1_1", image_size=32, accumulation=accumulation, epochs=1, crop="none")
        for module in training.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run(training)
        return bare_state(training.network)

    whole, parts = after(1), after(4)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-5, rtol=1e-4)


def test_a_start_epoch_goes_on_in_the_schedule() -> None:
    training = classifier(epochs=4, start_epoch=3)
    (done,) = run(training)
    assert done.epoch == 4
    assert training.step == 4 * training.steps_per_epoch


class Greedy(torch.nn.Module):
    """A network that runs out of memory for more than `limit` images."""

    def __init__(self, limit: int, refuses_evaluation: bool = False) -> None:
        super().__init__()
        self.limit = limit
        self.refuses_evaluation = refuses_evaluation
        self.head = torch.nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.limit and (self.refuses_evaluation or torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        logits: Tensor = self.head(images).mean((2, 3))
        return logits


def greedy(limit: int, refuses_evaluation: bool = False, **changes: object) -> ClassifierTraining:
    values = {"dataset": "d", "model_name": "m", "arch": "resnet18", "precision": "float32", **changes}
    spec = ClassifierJob.model_validate(values)
    return ClassifierTraining(spec, Greedy(limit, refuses_evaluation), colours(40), colours(12), PREPROCESSING, CPU)


def test_out_of_memory_says_which_batch_fits() -> None:
    message = "no memory for 40 images of 16×16 at once; the largest batch that fits is 11: use --batch-size 11, "
    with pytest.raises(OutOfMemory, match=message + "or keep yours with --accumulation 4"):
        run(greedy(11, batch_size=40))
    run(greedy(11, batch_size=40, accumulation=4, epochs=1))
    with pytest.raises(OutOfMemory, match="nor for 2; take a smaller --image-size or --arch"):
        run(greedy(1, batch_size=40))


def test_bfloat16_on_a_cpu_is_refused_where_its_gradients_are_wrong() -> None:
    with pytest.raises(TrainingFailed, match="use --precision float32 or a larger --image-size"):
        classifier(precision="bfloat16")
    assert classifier(precision="auto").evaluator.precision == "float32"


def test_a_snapshot_of_other_epochs_is_refused() -> None:
    with pytest.raises(TrainingFailed, match=r"epochs have 3 steps, this run's 5.*--weights"):
        classifier(batch_size=8).restore(classifier().snapshot())
    with pytest.raises(TrainingFailed, match="has no moving average"):
        classifier(ema_decay=0.9).restore(classifier().snapshot())


@pytest.mark.parametrize("num_classes", [2, 3])
def test_fewer_than_five_classes_do_not_break_accuracy_at_five(num_classes: int) -> None:
    predictions = Predictions(
        labels=torch.tensor([0, 1]),
        losses=torch.tensor([1.0, 2.0]),
        top_classes=torch.tensor([[1, 0, 2], [1, 0, 2]])[:, :num_classes],
        top_probabilities=torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])[:, :num_classes],
    )
    assert predictions.metrics() == {"val_loss": 1.5, "val_acc1": 50.0, "val_acc5": 100.0}


def test_mirrored_evaluation_is_the_mean_of_both_probabilities() -> None:
    training = classifier()
    run(training)
    network, split = training.served_network.eval(), training.val
    images = training.evaluator.to_device(split.eval_batch(torch.arange(12)))
    with torch.no_grad():
        expected = (network(images).softmax(1) + network(images.flip(-1)).softmax(1)) / 2
    mirrored = training.evaluator.predict(network, split, mirror=True).predictions
    torch.testing.assert_close(mirrored.top_probabilities[:, 0], expected.max(1).values, atol=1e-5, rtol=1e-5)
