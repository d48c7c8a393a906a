"""The promotion job, in the training process: two versions evaluated on the same data, and the gate's decision.

It leaves in the run directory both evaluations (`candidate/` and `against/`, each as an evaluation job leaves them) and
`promotion.json`:

    {"candidate", "alias", "promoted", "reason", "evidence"}

The decision is carried out in the registry, and stands in the model's history with the run that made it; an attempt
that finds it there, because the one before was killed, decides nothing anew.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.trainer.evaluation import evaluate
from services.trainer.text_evaluation import evaluate_text
from tandem.checkpoints.promotion import Decision, Gate, carry_out, decide, decide_on_texts
from tandem.checkpoints.registry import Registry, Version
from tandem.comparison.predictions import PREDICTIONS_FILE, compare_predictions
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
        decision = self._decided_before(registry, candidate)
        tries = 0
        while decision is None:
            before = registry.aliases(candidate.name).get(self.spec.alias)
            decision = self._decide(registry, candidate, before)
            if decision is None:
                return None
            if before == candidate.version:
                break
            try:
                with self.fence():
                    carry_out(registry, candidate.name, self.spec.alias, candidate.version, before, decision, self._by)
            except Conflict:
                tries += 1
                if self.spec.against is not None or tries == _TRIES:
                    raise
                decision = None
        return self._leave(candidate, decision)

    @property
    def _by(self) -> str:
        return f"run {self.run.name}"

    @property
    def _of_images(self) -> bool:
        return self.spec.kind == "promote_classifier"

    def _decided_before(self, registry: Registry, candidate: Version) -> Decision | None:
        """Return what an attempt before this one has decided and written down."""
        for entry in registry.history(candidate.name):
            if entry.get("by") == self._by and entry.get("alias") == self.spec.alias:
                evidence = dict(entry.get("evidence") or {})
                return Decision("to" in entry, str(evidence.pop("reason", "")), evidence)
        return None

    def _decide(self, registry: Registry, candidate: Version, before: int | None) -> Decision | None:
        if before == candidate.version:
            return Decision(True, "it has the alias already", {})
        if self.spec.against is None and before is None:
            return Decision(True, "nothing had the alias", {})
        ours = f"{candidate.name}:{candidate.version}"
        theirs = registry.resolve(self.spec.against or f"{candidate.name}:{before}").label
        if theirs == ours:
            raise InvalidJob(f"{ours} is what it is to beat; give another --if-better-than")
        for directory, model in (("candidate", ours), ("against", theirs)):
            if not self._evaluate(model, directory):
                return None
        return self._weigh()

    def _evaluate(self, model: str, name: str) -> bool:
        """Evaluate `model` into the directory `name`; return False if it was stopped."""
        directory = self.run / name
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

    def _leave(self, candidate: Version, decision: Decision) -> Promotion:
        label, alias = f"{candidate.name}:{candidate.version}", f"{candidate.name}@{self.spec.alias}"
        document = {
            "candidate": label,
            "alias": self.spec.alias,
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
