"""Training on a GPU: the loops learn there, and a run that was interrupted goes on from its snapshot."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from training_runs import check_resume

from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import EpochDone, StepDone, Training
from tandem.checkpoints.card import Preprocessing
from tandem.data.splits import PackedSplit
from tandem.jobs.spec import ClassifierJob, LanguageModelJob
from tandem.models.awd_lstm import AwdDropouts
from tandem.models.classifiers import build_classifier
from tandem.models.language_models import LanguageModelShape, build_language_model
from tandem.models.weights import bare_state, load_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds no CUDA device"),
]

SIDE = 32


def classifier(precision: str) -> ClassifierTraining:
    preprocessing = Preprocessing(resize=SIDE, image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    labels = torch.arange(96) % 3
    pixels = torch.randint(0, 90, (96, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(96), labels] += 120
    split = PackedSplit(pixels.numpy(), torch.arange(96), labels, [str(row) for row in range(96)], preprocessing)
    spec = ClassifierJob.model_validate(
        {
            "dataset": "d",
            "model_name": "m",
            "arch": "resnet18",
            "epochs": 15,
            "learning_rate": 0.02,
            "precision": precision,
        }
    )
    torch.manual_seed(0)
    return ClassifierTraining(
        spec, build_classifier("resnet18", 3, SIDE), split, split, preprocessing, torch.device("cuda")
    )


def language_model(model: str, **changes: object) -> LanguageModelTraining:
    text: Tensor = (torch.arange(800) * 3 + torch.arange(800) // 7) % 11
    spec = LanguageModelJob.model_validate(
        {
            "dataset": "d",
            "model_name": "m",
            "model": model,
            "epochs": 8,
            "batch_size": 4,
            "bptt": 8,
            "learning_rate": 0.02,
            "dropout": 0.0,
            **changes,
        }
    )
    torch.manual_seed(0)
    shape = LanguageModelShape(spec.model, 11, 32, 32, 2, 2, spec.dropout, False, 32)
    network = build_language_model(shape, AwdDropouts(weight=spec.weight_dropout))
    return LanguageModelTraining(spec, network, text, text[:200], torch.device("cuda"))


def finish(training: Training, until: Callable[[int], bool] = lambda _: False) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for report in training.fit():
        if isinstance(report, EpochDone):
            metrics = dict(report.metrics)
        if isinstance(report, StepDone) and until(report.step):
            break
    return metrics


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_classifier_learns_and_goes_on_from_a_snapshot(precision: str) -> None:
    # As `services.trainer.assembly` sets it for every run.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    straight = classifier(precision)
    assert finish(straight)["val_acc1"] > 95
    first = classifier(precision)
    finish(first, until=lambda step: step == 5)
    second = classifier(precision)
    load_weights(second.network, bare_state(first.network))
    second.restore(first.snapshot())
    assert finish(second)["val_acc1"] > 95
    for mine, theirs in (
        (bare_state(second.network), bare_state(straight.network)),
        (second.snapshot(), straight.snapshot()),
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_a_language_model_learns(model: str) -> None:
    assert finish(language_model(model))["val_ppl"] < 4.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["LSTM", "GRU", "Transformer", "AWD_LSTM"])
def test_a_language_model_goes_on_from_a_snapshot_to_the_same_bytes(model: str, precision: str) -> None:
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    changes = {"weight_dropout": 0.5, "variable_bptt": True} if model == "AWD_LSTM" else {}
    check_resume(lambda: language_model(model, epochs=2, precision=precision, dropout=0.2, **changes), 30)
