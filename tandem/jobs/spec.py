"""Job specs: what a person asked for, validated, closed and frozen. Free of torch.

A spec holds every value that shapes the result, so that the same spec on the same data gives the same bytes.
"""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from tandem.errors import InvalidJob
from tandem.jobs.classifier_spec import ClassifierJob, EvaluationJob
from tandem.jobs.language_spec import DYNAMIC_DEFAULTS, LanguageModelJob, TextEvaluationJob
from tandem.jobs.promotion_spec import PromotionJob

__all__ = [
    "DYNAMIC_DEFAULTS",
    "ClassifierJob",
    "EvaluationJob",
    "JobSpec",
    "LanguageModelJob",
    "PromotionJob",
    "TextEvaluationJob",
    "TrainingSpec",
    "make_spec",
    "parse_spec",
]

# Where the command line's option has another name than the field.
_OPTIONS = {
    "dataset": "data",
    "model_name": "name",
    "num_workers": "workers",
    "resume_from": "resume",
    "limit_images": "limit",
    "limit_tokens": "limit",
    "alias": "promote",
}

TrainingSpec = ClassifierJob | LanguageModelJob
JobSpec = TrainingSpec | EvaluationJob | TextEvaluationJob | PromotionJob
_SPEC: TypeAdapter[JobSpec] = TypeAdapter(Annotated[JobSpec, Field(discriminator="kind")])


def make_spec(values: dict[str, Any]) -> JobSpec:
    """Validate `values` (with their `kind`); raise InvalidJob that names the first wrong field."""
    try:
        return _SPEC.validate_python(values)
    except ValidationError as error:
        raise _explained(error) from None


def parse_spec(data: bytes) -> JobSpec:
    """Read the bytes of `job.json`."""
    try:
        return _SPEC.validate_json(data)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> InvalidJob:
    first = error.errors()[0]
    if first["type"] == "missing":
        field = str(first["loc"][-1])
        return InvalidJob(f"--{_OPTIONS.get(field, field).replace('_', '-')} is missing", field=field)
    field = ".".join(str(part) for part in first["loc"][1:])
    reason = first["msg"].removeprefix("Value error, ")
    option = f"--{_OPTIONS.get(field, field).replace('_', '-')}: " if field else ""
    if str((first["loc"] or ("",))[0]).startswith(("evaluate_", "promote_")) and field == "model":
        option = "REF: "
    given = f" (got {first['input']!r})" if field and first["type"] != "value_error" else ""
    return InvalidJob(f"{option}{reason}{given}", field=field)
