"""What a promotion needs of its models and its data, without torch."""

from collections.abc import Collection

from tandem.checkpoints.references import RunReference, parse_reference
from tandem.checkpoints.registry import Registry, Version, check_alias
from tandem.errors import InvalidJob, InvalidRequest, ModelNotFound, RunNotFound
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import EvaluationJob, PromotionJob, TextEvaluationJob, make_spec, parse_spec
from tandem.volume import Volume


def evaluation_of(spec: PromotionJob, model: str) -> EvaluationJob | TextEvaluationJob:
    """Return the evaluation of `model` that a promotion is decided by."""
    values = spec.model_dump(include={"dataset", "split", "device", "num_threads"}, exclude_none=True)
    job = make_spec({"kind": spec.kind.replace("promote_", "evaluate_"), "model": model, **values})
    assert isinstance(job, EvaluationJob | TextEvaluationJob)
    return job


def check_promotion(spec: PromotionJob, volume: Volume, awaited: Collection[str]) -> PromotionJob:
    """Return `spec` with its candidate made definite; raise InvalidJob, or what the models are refused with.

    What is to be beaten stays as it was given: whoever has the alias when the comparison begins.
    """
    try:
        check_alias(spec.alias)
    except InvalidRequest as error:
        raise InvalidJob(str(error)) from error
    if spec.against is not None:
        check_version(Registry(volume), spec.against, "--if-better-than")
    if spec.model in {f"run:{run_id}" for run_id in awaited}:
        return spec
    candidate = candidate_of(spec.model, volume)
    return spec.model_copy(update={"model": f"{candidate.name}:{candidate.version}"})


def candidate_of(reference: str, volume: Volume) -> Version:
    """Return the version that a reference names, of run:ID the one that the run has published.

    Raises ModelNotFound where the run has published none, InvalidJob for a checkpoint that is no version.
    """
    parsed = parse_reference(reference)
    if not isinstance(parsed, RunReference) or parsed.step is not None:
        return check_version(Registry(volume), reference, "REF")
    try:
        trained = parse_spec((volume.run(parsed.run_id) / SPEC_FILE).read_bytes())
    except FileNotFoundError:
        raise RunNotFound(f"no run {parsed.run_id!r} on the volume; 'tandem runs list' shows them") from None
    name = trained.model_name
    published = [each for each in Registry(volume).versions(name) if each.run_id == parsed.run_id]
    if not published:
        raise ModelNotFound(f"run {parsed.run_id} has published no version of model {name!r}")
    return published[-1]


def check_version(registry: Registry, reference: str, option: str) -> Version:
    """Return the version that a reference names now; raise InvalidJob about `option` for a checkpoint that is none."""
    version = registry.resolve(reference).version
    if version is None:
        raise InvalidJob(f"{option}: {reference} is a checkpoint of a run; an alias leads to a version: NAME:VERSION")
    return version
