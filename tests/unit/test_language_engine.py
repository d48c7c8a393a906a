"""Training language models: that they learn, and that a run which was interrupted ends in the same bytes."""

import itertools
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from factories import MODELS
from torch import Tensor
from training_runs import check_resume, check_resume_within_evaluation, run

from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import EpochDone
from services.trainer.engine.running_mean import is_stuck
from services.trainer.engine.text_windows import window_bounds
from tandem.errors import TrainingFailed
from tandem.jobs.spec import LanguageModelJob
from tandem.models.awd_lstm import AwdDropouts
from tandem.models.language_models import LanguageModelShape, build_language_model
from tandem.models.weights import bare_state

CPU = torch.device("cpu")


def sequence(length: int) -> Tensor:
    """Each token follows from the one before, with a little noise."""
    return (torch.arange(length) * 3 + torch.arange(length) // 7) % 11


def language_model(model: str = "LSTM", **changes: object) -> LanguageModelTraining:
    values = {"dataset": "d", "model_name": "m", "model": model, "epochs": 2, "batch_size": 4, "bptt": 8}
    sizes = {"embedding_size": 16, "hidden_size": 16, "precision": "float32"}
    spec = LanguageModelJob.model_validate({**values, **sizes, **changes})
    shape = LanguageModelShape(spec.model, 11, 16, 16, spec.num_layers, spec.num_heads, spec.dropout, spec.tied, 16)
    dropouts = AwdDropouts(spec.embedding_dropout, spec.input_dropout, spec.hidden_dropout, spec.weight_dropout)
    torch.manual_seed(0)
    return LanguageModelTraining(spec, build_language_model(shape, dropouts), sequence(400), sequence(90), CPU)


def awd(**changes: object) -> LanguageModelTraining:
    recipe = {
        "embedding_dropout": 0.1,
        "input_dropout": 0.2,
        "hidden_dropout": 0.2,
        "weight_dropout": 0.5,
        "activation_penalty": 2.0,
        "change_penalty": 1.0,
        "variable_bptt": True,
        "tied": True,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "schedule": "constant",
    }
    return language_model("AWD_LSTM", **{**recipe, **changes})


def averaged() -> LanguageModelTraining:
    """Return one that was so good once that it will be stuck after its first epoch."""
    training = awd(average_after=1)
    training._val_losses = [0.0, 0.0, 0.0]
    return training


MAKERS: dict[str, Callable[[], LanguageModelTraining]] = {
    "LSTM": language_model,
    "GRU": lambda: language_model("GRU"),
    "RNN_RELU": lambda: language_model("RNN_RELU"),
    "Transformer": lambda: language_model("Transformer"),
    "Transformer, tied, bfloat16": lambda: language_model("Transformer", tied=True, precision="bfloat16"),
    "LSTM by SGD, bfloat16": lambda: language_model(optimizer="sgd", learning_rate=1.0, precision="bfloat16"),
    "LSTM in three parts, one cycle": lambda: language_model(accumulation=3, schedule="onecycle"),
    "Transformer in two parts, cosine": lambda: language_model("Transformer", accumulation=2, schedule="cosine"),
    "AWD_LSTM": awd,
    "AWD_LSTM, averaged": averaged,
}


@pytest.mark.parametrize("stop_at", [1, 14])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumed_at_any_step_ends_in_the_same_bytes(name: str, stop_at: int) -> None:
    check_resume(MAKERS[name], stop_at)


@pytest.mark.parametrize("name", ["LSTM", "AWD_LSTM"])
def test_a_run_resumed_within_an_evaluation_ends_in_the_same_bytes_and_says_the_same(name: str) -> None:
    check_resume_within_evaluation(MAKERS[name])


def test_a_run_whose_weights_are_averaged_already_resumes_too() -> None:
    stopped = averaged()
    run(stopped, until=lambda step: step == 20)
    assert stopped.served_network is not stopped.network, "the case is one that averages by then"
    check_resume(averaged, 20)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: there is no g++")
def test_a_compiled_run_resumes_exactly() -> None:
    def compiled() -> LanguageModelTraining:
        torch._dynamo.reset()
        return language_model("Transformer", compile=True, epochs=1)

    check_resume(compiled, 3)


@pytest.mark.parametrize("model", MODELS)
def test_every_language_model_learns_the_sequence(model: str) -> None:
    epochs = run(language_model(model, epochs=8, learning_rate=0.02, dropout=0.0))
    assert min(epoch.metrics["val_ppl"] for epoch in epochs) < 4.0, "11 would be a guess"


def test_the_awd_recipe_learns_the_sequence_though_so_much_is_dropped() -> None:
    epochs = run(awd(epochs=30, optimizer="adamw", learning_rate=0.02, schedule="onecycle", weight_dropout=0.2))
    assert min(epoch.metrics["val_ppl"] for epoch in epochs) < 6.0, "11 would be a guess"


@pytest.mark.parametrize("model", MODELS)
def test_parts_of_an_update_are_the_update(model: str) -> None:
    one = language_model(model, dropout=0.0, epochs=1, optimizer="sgd", learning_rate=0.5)
    two = language_model(model, dropout=0.0, epochs=1, optimizer="sgd", learning_rate=0.5, accumulation=3)
    (of_one,), (of_two,) = run(one), run(two)
    torch.testing.assert_close(bare_state(two.network), bare_state(one.network), rtol=1e-4, atol=1e-5)
    assert of_two.metrics == pytest.approx(dict(of_one.metrics), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_learning_rate_is_divided_by_four_when_val_does_not_improve(optimizer: str) -> None:
    training = language_model(optimizer=optimizer, learning_rate=0.02)
    assert training._judge(2.0)
    assert not training._judge(2.5)
    next(training.fit())
    assert {group["lr"] for group in training.optimizer.param_groups} == {0.005}


def test_the_gradient_is_told_as_it_was_before_it_was_clipped() -> None:
    training = language_model(clip_norm=1e-3)
    next(training.fit())
    assert training.running_metrics()["gradient_norm"] > 0.01
    norms = [parameter.grad.norm() for parameter in training.network.parameters() if parameter.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_state_is_carried_from_window_to_window() -> None:
    carried, fresh = language_model(dropout=0.0), language_model(dropout=0.0)
    for training, forgets in ((carried, False), (fresh, True)):
        reports = training.fit()
        next(reports)
        if forgets:
            training._states = [None]
        next(reports)
    assert carried.running_metrics()["train_loss"] != fresh.running_metrics()["train_loss"]


def test_evaluation_counts_every_token_once() -> None:
    training = language_model()
    training.network.eval()
    tokens = sequence(600)
    with torch.no_grad():
        logits, _ = training.network(tokens[None, :-1], None)
        expected = F.cross_entropy(logits[0], tokens[1:]).item()
    assert training.evaluate(tokens) == pytest.approx(expected, rel=1e-5)
    assert training.evaluate(tokens, within_s=-1.0) is None


def test_once_stuck_the_mean_of_the_weights_is_the_model() -> None:
    training = awd(epochs=1, average_after=2, learning_rate=0.1)
    for loss in (3.0, 2.0, 2.5, 2.6):
        training._judge(loss)
    assert training.served_network is training.network, "better than three evaluations ago"
    training._judge(3.1)
    served = training.served_network
    assert served is not training.network
    weights: list[Tensor] = []
    for report in training.fit():
        if not isinstance(report, EpochDone) and training.step > len(weights):
            weights.append(training.network.head.weight.detach().clone())  # type: ignore[union-attr, operator]
    mean = torch.stack(weights).mean(0)
    torch.testing.assert_close(served.head.weight, mean, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_what_stuck_means() -> None:
    assert not is_stuck([3.0, 2.0, 2.5], 2)
    assert not is_stuck([3.0, 4.0, 4.0], 2), "too early to say"
    assert is_stuck([3.0, 4.0, 4.0, 4.0], 2)
    assert not is_stuck([3.0, 2.0, 2.0, 2.9], 2), "better than what lies more than two back"


@pytest.mark.parametrize(("length", "bptt"), [(1000, 70), (1000, 8), (9, 8), (10, 8), (3, 2), (40, 1), (71, 35)])
def test_random_windows_are_as_many_and_cover_all(length: int, bptt: int) -> None:
    even = window_bounds(length, bptt)
    random = window_bounds(length, bptt, torch.Generator().manual_seed(5))
    assert (random[0], random[-1], len(random)) == (even[0], even[-1], len(even)) == (0, length - 1, len(even))
    assert all(first < last for first, last in itertools.pairwise(random))


def test_random_windows_differ_by_epoch_and_lie_about_the_length_that_was_asked_for() -> None:
    bounds = torch.tensor(window_bounds(70_001, 70, torch.Generator().manual_seed(1)))
    lengths = bounds.diff().float()
    assert 68 < lengths.median() < 74
    assert 0.02 < (lengths < 50).float().mean() < 0.09
    assert bounds.tolist() != window_bounds(70_001, 70, torch.Generator().manual_seed(2))


def test_a_short_window_is_trained_at_a_lower_rate() -> None:
    training = awd(bptt=30, learning_rate=1.0, warmup_epochs=0)
    bounds = training._bounds(0)
    for number, _ in zip(range(3), training.fit(), strict=False):
        (rate,) = {group["lr"] for group in training.optimizer.param_groups}
        assert rate == pytest.approx((bounds[number + 1] - bounds[number]) / 30)


def test_too_short_a_text_is_refused_at_the_start() -> None:
    with pytest.raises(TrainingFailed, match="too few for a batch of 300"):
        language_model(batch_size=300)


def test_a_snapshot_of_other_windows_is_refused() -> None:
    with pytest.raises(TrainingFailed, match="13 steps, this run's 20: continue with the same --batch-size, --bptt"):
        language_model(bptt=5).restore(language_model().snapshot())
