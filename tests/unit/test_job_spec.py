"""Job specs: what is refused, and that the refusal names the field and the remedy."""

from typing import Any

import pytest

from tandem.errors import InvalidJob
from tandem.jobs.architectures import ARCHITECTURES
from tandem.jobs.spec import TextEvaluationJob, make_spec, parse_spec
from tandem.models.classifiers import classifier_builders

CLASSIFIER = {"kind": "train_classifier", "dataset": "d", "model_name": "m", "arch": "resnet18"}
LANGUAGE_MODEL = {"kind": "train_language_model", "dataset": "d", "model_name": "m", "model": "LSTM"}


EVALUATION = {"kind": "evaluate_language_model", "dataset": "d", "model": "words:1"}


def test_the_listed_architectures_are_those_of_torchvision() -> None:
    assert set(classifier_builders()) == ARCHITECTURES


def test_a_spec_survives_its_json() -> None:
    spec = make_spec({**CLASSIFIER, "epochs": 3, "seed": 7})
    assert parse_spec(spec.model_dump_json().encode()) == spec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {**CLASSIFIER, "arch": "resnet81"},
            "--arch: no torchvision classifier is called 'resnet81'; did you mean resnet18",
        ),
        ({**CLASSIFIER, "epochs": 0}, "--epochs: Input should be greater than or equal to 1 (got 0)"),
        ({**CLASSIFIER, "learning_rate": float("nan")}, "--learning-rate"),
        ({**CLASSIFIER, "model_name": "../up"}, "--name: the name '../up' is not allowed"),
        ({**CLASSIFIER, "dataset": "../up"}, "--data: the name '../up' is not allowed"),
        ({**CLASSIFIER, "warmup_epochs": float("inf")}, "--warmup-epochs"),
        ({**LANGUAGE_MODEL, "clip_norm": float("inf")}, "--clip-norm"),
        ({**CLASSIFIER, "batch_size": 1}, "--batch-size"),
        ({**CLASSIFIER, "device": "tpu"}, "--device"),
        ({**CLASSIFIER, "colour": "blue"}, "--colour: Extra inputs are not permitted"),
        ({**LANGUAGE_MODEL, "model": "LSTN"}, "--model: Input should be 'RNN_TANH'"),
        ({**LANGUAGE_MODEL, "tied": True, "hidden_size": 100}, "tied needs embedding_size (200) = hidden_size (100)"),
        ({**LANGUAGE_MODEL, "model": "Transformer", "num_heads": 3}, "must be a multiple of twice num_heads (3)"),
        ({"kind": "train_poet"}, "train_poet"),
        ({**EVALUATION, "model": "a b"}, "REF: 'a b' is no model reference"),
        ({**EVALUATION, "limit_tokens": 1}, "--limit: Input should be greater than or equal to 2 (got 1)"),
        ({**EVALUATION, "dynamic_rule": "adam"}, "--dynamic-rule: Input should be 'rms' or 'sgd'"),
        ({**EVALUATION, "dynamic_rate": float("inf")}, "--dynamic-rate"),
        ({**EVALUATION, "dynamic_decay": 1.5}, "--dynamic-decay"),
        ({**EVALUATION, "cache_lambda": 0.0}, "--cache-lambda: Input should be greater than 0"),
        ({**EVALUATION, "batch_size": 10}, "--batch-size: Extra inputs are not permitted"),
    ],
)
def test_a_bad_spec_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        make_spec(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "rate", "decay"),
    [
        ({}, 1.2e-4, 8e-3),
        ({"dynamic_rule": "sgd"}, 0.1, 1e-3),
        ({"dynamic_rate": 0.5, "dynamic_decay": None}, 0.5, 8e-3),
    ],
)
def test_a_rule_of_dynamic_evaluation_has_rates_of_its_own(values: dict[str, Any], rate: float, decay: float) -> None:
    spec = make_spec({**EVALUATION, **values})
    assert isinstance(spec, TextEvaluationJob)
    assert (spec.dynamic_rate, spec.dynamic_decay) == (rate, decay)
    assert parse_spec(spec.model_dump_json().encode()) == spec
