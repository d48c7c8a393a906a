"""The checkpoints of other runs that a job refers to, and the pins that keep them until the job has ended."""

from pathlib import Path

from tandem.checkpoints.files import step_directory
from tandem.checkpoints.pins import pin
from tandem.checkpoints.references import RunReference, parse_reference
from tandem.jobs.spec import ClassifierJob, EvaluationJob, JobSpec, PromotionJob, TextEvaluationJob
from tandem.volume import Volume


def pin_references(spec: JobSpec, run_id: str, volume: Volume) -> None:
    """Pin each checkpoint of a run that `spec`, whose references are definite, names, for the run `run_id`.

    The run's directory must be there by now, or the pin would hold for nobody. Versions of models need no such pin:
    the registry holds them. Raises ModelNotFound or RunNotFound if one has been removed since it was looked up.
    """
    for checkpoint in referred_checkpoints(spec, volume):
        pin(checkpoint, "run", run_id)


def referred_checkpoints(spec: JobSpec, volume: Volume) -> list[Path]:
    """Return the checkpoints that `spec` names as run:<run_id>/<step>."""
    parsed = [parse_reference(name) for name in named_models(spec)]
    return [
        step_directory(volume.run(each.run_id), each.step)
        for each in parsed
        if isinstance(each, RunReference) and each.step is not None
    ]


def named_models(spec: JobSpec) -> tuple[str, ...]:
    """Return the references to models and checkpoints of runs in `spec`."""
    names: tuple[str | None, ...] = ()
    if isinstance(spec, EvaluationJob | TextEvaluationJob):
        names = (spec.model,)
    elif isinstance(spec, PromotionJob):
        names = (spec.model, spec.against)
    elif isinstance(spec, ClassifierJob):
        names = (spec.weights_from, spec.resume_from)
    return tuple(name for name in names if name)
