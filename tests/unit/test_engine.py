"""The training loops: that they learn, and that a run which was interrupted ends in the same bytes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import EpochDone, StepDone, Training
from services.trainer.engine.schedule import learning_rate_at
from tandem.checkpoints.card import Preprocessing
from tandem.checkpoints.tensors import bare_state, from_bytes, load_weights, to_bytes
from tandem.data.splits import PackedSplit
from tandem.errors import NonFiniteLoss, TrainingFailed
from tandem.jobs.spec import ClassifierJob, LanguageModelJob
from tandem.models.classifiers import build_classifier
from tandem.models.language_models import LanguageModelShape, build_language_model

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize=16, image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def colours(count: int) -> PackedSplit:
    """Three classes, told apart by their brightest channel."""
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 90, (count, 3, 16, 16), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    pixels[torch.arange(count), labels] += 120
    files = [f"{row}.png" for row in range(count)]
    return PackedSplit(pixels.numpy(), torch.arange(count), labels, files, PREPROCESSING)


def classifier(**changes: object) -> ClassifierTraining:
    values = {"dataset": "d", "model_name": "m", "arch": "resnet18", "epochs": 2, "batch_size": 16}
    spec = ClassifierJob.model_validate({**values, "learning_rate": 0.01, "image_size": 16, **changes})
    torch.manual_seed(0)
    network = build_classifier(spec.arch, 3, 16)
    return ClassifierTraining(spec, network, colours(40), colours(12), PREPROCESSING, CPU)


def sequence(length: int) -> Tensor:
    """Each token follows from the one before, with a little noise."""
    return (torch.arange(length) * 3 + torch.arange(length) // 7) % 11


def language_model(model: str = "LSTM", **changes: object) -> LanguageModelTraining:
    values = {"dataset": "d", "model_name": "m", "model": model, "epochs": 2, "batch_size": 4, "bptt": 8}
    spec = LanguageModelJob.model_validate({**values, "embedding_size": 16, "hidden_size": 16, **changes})
    shape = LanguageModelShape(spec.model, 11, 16, 16, spec.num_layers, spec.num_heads, spec.dropout, False, 16)
    torch.manual_seed(0)
    return LanguageModelTraining(spec, build_language_model(shape), sequence(400), sequence(90), CPU)


def run(training: Training, until: Callable[[int], bool] = lambda _: False) -> list[EpochDone]:
    """Train to the end, or to the first step for which `until` holds."""
    epochs = []
    for report in training.fit():
        if isinstance(report, EpochDone):
            epochs.append(report)
        if isinstance(report, StepDone) and until(report.step):
            break
    return epochs


def everything(training: Training) -> bytes:
    return to_bytes(bare_state(training.network)) + to_bytes(training.snapshot())


MAKERS: dict[str, Callable[[], Training]] = {
    "resnet18": classifier,
    "mobilenet with dropout": lambda: classifier(arch="mobilenet_v3_small"),
    "LSTM": language_model,
    "GRU": lambda: language_model("GRU"),
    "Transformer": lambda: language_model("Transformer"),
    "LSTM by SGD": lambda: language_model(optimizer="sgd", learning_rate=1.0),
}


@pytest.mark.parametrize("stop_at", [1, 4, 5])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumed_at_any_step_ends_in_the_same_bytes(name: str, stop_at: int) -> None:
    make = MAKERS[name]
    straight = make()
    run(straight)

    first = make()
    run(first, until=lambda step: step == stop_at)
    weights, state = to_bytes(bare_state(first.network)), to_bytes(first.snapshot())
    second = make()
    torch.manual_seed(123)
    load_weights(second.network, from_bytes(weights))
    second.restore(from_bytes(state))
    run(second)
    assert second.step == straight.step == 2 * straight.steps_per_epoch
    assert everything(second) == everything(straight)


def test_a_classifier_learns_colours() -> None:
    metrics = run(classifier(epochs=15, learning_rate=0.02))[-1].metrics
    assert metrics["val_acc1"] == 100.0
    assert metrics["val_acc5"] == 100.0, "three classes: every image is right at rank 5"
    assert metrics["val_best_acc1"] == 100.0


@pytest.mark.parametrize("model", ["RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer"])
def test_every_language_model_learns_the_sequence(model: str) -> None:
    epochs = run(language_model(model, epochs=8, learning_rate=0.02, dropout=0.0))
    assert min(epoch.metrics["val_ppl"] for epoch in epochs) < 4.0, "11 would be a guess"


def test_the_learning_rate_is_divided_by_four_when_val_does_not_improve() -> None:
    for optimizer in ("adamw", "sgd"):
        training = language_model(optimizer=optimizer, learning_rate=0.02)
        assert training._anneal(2.0)
        assert not training._anneal(2.5)
        assert {group["lr"] for group in training.optimizer.param_groups} == {0.005}


def test_evaluation_counts_every_token_once() -> None:
    training = language_model()
    training.network.eval()
    tokens = sequence(90)
    with torch.no_grad():
        logits, _ = training.network(tokens[None, :-1], None)
        expected = torch.nn.functional.cross_entropy(logits[0], tokens[1:]).item()
    assert math.isclose(training.evaluate(tokens), expected, rel_tol=1e-5)


def test_a_loss_that_is_no_number_ends_the_run_with_a_remedy() -> None:
    training = classifier(epochs=1)
    with torch.no_grad():
        next(training.network.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="lower --learning-rate"):
        run(training)


def test_batches_cover_the_split_and_never_hold_one_image() -> None:
    assert classifier(batch_size=16).steps_per_epoch == 3
    assert classifier(batch_size=39).steps_per_epoch == 1, "a last batch of one image is left out"
    assert classifier(batch_size=500).steps_per_epoch == 1, "a batch larger than the set is the set"


def test_too_short_a_text_is_refused_at_the_start() -> None:
    with pytest.raises(TrainingFailed, match="too few for a batch of 300"):
        language_model(batch_size=300)


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    spec = ClassifierJob(
        dataset="d", model_name="m", arch="resnet18", epochs=10, learning_rate=1.0, warmup_epochs=1, schedule="cosine"
    )
    rates = [learning_rate_at(spec, step, 100) for step in range(1000)]
    assert rates[0] < rates[50] < rates[99] < 1.0
    assert rates[100] == 1.0
    assert rates[-1] < 1e-4
    steps = spec.model_copy(update={"schedule": "step", "epochs": 9})
    assert [round(learning_rate_at(steps, epoch * 100, 100), 6) for epoch in (1, 3, 6, 8)] == [1.0, 0.1, 0.01, 0.01]
