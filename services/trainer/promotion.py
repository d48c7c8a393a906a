"""The promotion job, in the training process: two versions evaluated on the same data, and the gate's decision.

It leaves in the run directory both evaluations (`candidate/` and `against/`, each as an evaluation job leaves them) and
`promotion.json`:

    {"candidate", "alias", "previous_version", "promoted", "reason", "evidence"}

The decision is carried out in the registry, and stands in the model's history with the run that made it; an attempt
that finds it there, because the one before was killed, decides nothing anew. Killed between the move and that line, the
next attempt finds that the version has the alias already, and the evaluations are what is left of the evidence.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.trainer.evaluation import evaluate
from services.trainer.text_evaluation import evaluate_text
from tandem.checkpoints.promotion import (
    Decision,
    Gate,
    carry_out,
    decide,
    decide_on_texts,
    opponent,
    without_comparison,
)
from tandem.checkpoints.registry import Registry, Version
from tandem.comparison.predictions import EVALUATION_FILE, PREDICTIONS_FILE, compare_predictions
from tandem.errors import Conflict, InvalidJob
from tandem.jobs.promotion_checks import candidate_of, evaluation_of
from tandem.jobs.promotion_spec import PROMOTION_FILE, PromotionJob
from tandem.volume import Volume, replace_json, volume_errors

# How often it is compared with who has the alias by then, when others move it meanwhile, as the runs of a sweep do.
_TRIES = 8


@dataclass(frozen=True)
class Promotion:
    """What came of the job, in a sentence, and what a run's record keeps of it: promoted (1 or 0), gain, mid_p."""

    sentence: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Promoter:
    """A promotion job. What is written is written under `fence()`, which raises where the attempt may write no more."""

    spec: PromotionJob
    run: Path
    volume: Volume
    report: Callable[..., None]
    stop: Callable[[], bool]
    fence: Callable[[], AbstractContextManager[None]] = nullcontext

    def promote(self) -> Promotion | None:
        """Compare, decide and move the alias if the candidate passes; None if it was stopped before.

        Raises InvalidJob where models and data don't fit, Conflict if the alias was moved by others time and again.
        """
        registry = Registry(self.volume)
        candidate = candidate_of(self.spec.model, self.volume)
        if (settled := self._settled_before(registry, candidate)) is not None:
            return self._leave(candidate, *settled)
        against = opponent(candidate.name, self.spec.alias, self.spec.against)
        tries = 0
        while True:
            tries += 1
            before = registry.aliases(candidate.name).get(self.spec.alias)
            decision = without_comparison(candidate.version, before, against) or self._compare(
                registry, candidate, against or f"{candidate.name}:{before}"
            )
            if decision is None:
                return None
            try:
                with self.fence():
                    carry_out(registry, candidate.name, self.spec.alias, candidate.version, before, decision, self._by)
                return self._leave(candidate, decision, before)
            except Conflict:
                if against is not None or tries == _TRIES:
                    raise

    @property
    def _by(self) -> str:
        return f"run {self.run.name}"

    @property
    def _of_images(self) -> bool:
        return self.spec.kind == "promote_classifier"

    def _settled_before(self, registry: Registry, candidate: Version) -> tuple[Decision, int | None] | None:
        """Return what an attempt before this one has decided and written down, and who had the alias then."""
        for entry in registry.history(candidate.name):
            if entry.get("by") == self._by and entry.get("alias") == self.spec.alias:
                evidence = dict(entry.get("evidence") or {})
                decision = Decision("refused" not in entry, str(evidence.pop("reason", "")), evidence)
                return decision, entry.get("from", entry.get("kept"))
        return None

    def _compare(self, registry: Registry, candidate: Version, against: str) -> Decision | None:
        """Return what both evaluations say; None if it was stopped."""
        ours, theirs = f"{candidate.name}:{candidate.version}", registry.resolve(against).label
        if theirs == ours:
            raise InvalidJob(f"{ours} is what it is to beat; give another --if-better-than")
        done = self._evaluate(ours, "candidate") and self._evaluate(theirs, "against")
        return self._weigh() if done else None

    def _evaluate(self, model: str, name: str) -> bool:
        """Evaluate `model` into the directory `name`, unless that was done; return False if it was stopped."""
        directory = self.run / name
        if evaluated_model(directory) == model:
            return True
        with volume_errors(directory), self.fence():
            directory.mkdir(exist_ok=True)
        job: Any = evaluation_of(self.spec, model)
        work: Callable[..., dict[str, float] | None] = evaluate if self._of_images else evaluate_text
        return work(job, directory, self.volume, self.report, self.stop, self.fence) is not None

    def _weigh(self) -> Decision:
        gate, theirs, ours = Gate(self.spec.min_gain, self.spec.alpha), self.run / "against", self.run / "candidate"
        if self._of_images:
            summary = compare_predictions(theirs / PREDICTIONS_FILE, ours / PREDICTIONS_FILE).summary
            return decide(summary, gate, f"{self.spec.dataset}/{self.spec.split or 'val'}")
        # SciPy's bootstrap takes a second to import, which no other job needs.
        from tandem.comparison.text_evaluations import compare_text_evaluations, read_text_evaluation

        a, b = read_text_evaluation(theirs), read_text_evaluation(ours)
        found = compare_text_evaluations(a, b, confidence=1 - gate.alpha)
        return decide_on_texts(found, b.model, a.model, gate, f"{b.dataset}/{b.split}")

    def _leave(self, candidate: Version, decision: Decision, before: int | None) -> Promotion:
        label, alias = f"{candidate.name}:{candidate.version}", f"{candidate.name}@{self.spec.alias}"
        document = {
            "candidate": label,
            "alias": self.spec.alias,
            "previous_version": before,
            "promoted": decision.passes,
            "reason": decision.reason,
            "evidence": decision.evidence or None,
        }
        with volume_errors(self.run), self.fence():
            replace_json(self.run / PROMOTION_FILE, document)
        numbers: dict[str, float] = {
            name: decision.evidence[name] for name in ("gain", "mid_p") if name in decision.evidence
        }
        verdict = f"{alias} is {label}" if decision.passes else f"{alias} stays where it is"
        return Promotion(f"{verdict}: {decision.reason}", {"promoted": float(decision.passes), **numbers})


def evaluated_model(directory: Path) -> str | None:
    """Return the model whose whole evaluation is in a directory; an attempt before may have left it."""
    try:
        return str(json.loads((directory / EVALUATION_FILE).read_bytes())["model"])
    except (OSError, ValueError, KeyError):
        return None
