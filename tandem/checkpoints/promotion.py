"""The gate in front of an alias: a version takes it only where a comparison with the one that has it shows that it may.

The decision, its evidence and who asked for it are lines of the model's history, which is only ever added to.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tandem.checkpoints.registry import Registry
from tandem.comparison.evidence import ALPHA
from tandem.comparison.results import ComparisonSummary
from tandem.errors import Conflict, InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    # It takes SciPy's bootstrap along, which takes a second to import.
    from tandem.comparison.token_differences import TokenComparison


@dataclass(frozen=True)
class Gate:
    """What a candidate must show: a gain that is no chance at the level `alpha`, and was found to be `min_gain` or more
    (a share, 0 to 1: a floor under what was measured, not part of the test).

    Of a classifier the gain is one of accuracy@1, and McNemar's mid-p tests it. Of a language model it is the share by
    which the perplexity falls, and the interval of the difference of the losses must not hold 0.
    """

    min_gain: float = 0.0
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain <= 1:
            raise InvalidRequest(f"the least gain is {self.min_gain}; it is a share, between 0 and 1", field="min_gain")
        if not 0 < self.alpha < 1:
            raise InvalidRequest(f"alpha is {self.alpha}; it must be between 0 and 1", field="alpha")


@dataclass(frozen=True)
class Decision:
    """Whether the candidate passes the gate, and why in a sentence; what it rests on."""

    passes: bool
    reason: str
    evidence: dict[str, Any]


def decide(summary: ComparisonSummary, gate: Gate, data: str) -> Decision:
    """Decide on model b of a comparison, with a as the one to beat, on `data` (dataset/split).

    Raises Conflict without labelled images, from which nothing follows.
    """
    table = summary.labelled
    if table is None or summary.evidence is None or summary.evidence.labelled is None:
        raise Conflict(f"{data} has no labelled image that both models answered: nothing shows which is better")
    found = summary.evidence.labelled
    evidence = {
        "candidate": summary.b.label,
        "against": summary.a.label,
        "on": data,
        **asdict(gate),
        "num_images": table.num_examples,
        "num_errors": summary.num_errors,
        "num_unlabelled": summary.num_images - table.num_examples,
        "accuracy": table.accuracy_b,
        "accuracy_before": table.accuracy_a,
        "gain": found.difference,
        "interval": [*found.interval],
        "only_candidate_right": table.only_b_right,
        "only_before_right": table.only_a_right,
        "mid_p": table.mid_p,
        "exact_p": table.exact_p,
    }
    figures = (
        f"{100 * found.difference:+.2f} points on {table.num_examples:,} images of {data}, mid-p {table.mid_p:.2g}"
    )
    if found.difference <= 0:
        return Decision(False, f"{summary.b.label} is no better than {summary.a.label}: {figures}", evidence)
    if table.mid_p > gate.alpha:
        return Decision(False, f"that is no evidence at alpha {gate.alpha:g}: {figures}", evidence)
    if found.difference < gate.min_gain:
        return Decision(False, f"the gain is below {100 * gate.min_gain:g} points: {figures}", evidence)
    return Decision(True, f"{summary.b.label} is better than {summary.a.label}: {figures}", evidence)


def decide_on_texts(found: "TokenComparison", candidate: str, against: str, gate: Gate, data: str) -> Decision:
    """Decide on the language model `candidate`, b of `found`, whose interval is at the level of `gate`.

    Raises Conflict where the text is too short for an interval.
    """
    if not found.has_interval:
        raise Conflict(f"{data} has {found.num_tokens:,} tokens, from which nothing follows: take a longer text")
    share = found.share
    evidence = {
        "candidate": candidate,
        "against": against,
        "on": data,
        **asdict(gate),
        "num_tokens": found.num_tokens,
        "perplexity": found.perplexity_b,
        "perplexity_before": found.perplexity_a,
        "gain": 1 - share,
        # Of the perplexity, as the gain is: what the losses say, best first.
        "interval": [1 - found.ratio.high, 1 - found.ratio.low],
    }
    low, high = (100 * each for each in evidence["interval"])
    figures = (
        f"perplexity {found.perplexity_b:.2f} against {found.perplexity_a:.2f} on {found.num_tokens:,} tokens of "
        f"{data}, {100 * (1 - share):.2f} % less ({100 * (1 - gate.alpha):g} % interval {low:.2f} to {high:.2f})"
    )
    if share >= 1:
        return Decision(False, f"{candidate} is no better than {against}: {figures}", evidence)
    if not found.interval.high < 0:
        return Decision(False, f"that is no evidence at alpha {gate.alpha:g}: {figures}", evidence)
    if 1 - share < gate.min_gain:
        return Decision(False, f"the gain is below {100 * gate.min_gain:g} %: {figures}", evidence)
    return Decision(True, f"{candidate} is better than {against}: {figures}", evidence)


def without_comparison(version: int, before: int | None, against: str | None) -> Decision | None:
    """Return what is decided of `version` without a comparison, where `before` has the alias; None where it needs one.

    `against` is what is to be beaten, None for whoever has the alias.
    """
    if against is not None:
        return None
    if before is None:
        return Decision(True, "nothing had the alias", {})
    return Decision(True, "it has the alias already", {}) if before == version else None


def opponent(name: str, alias: str, against: str | None) -> str | None:
    """Return what is to be beaten; None for whoever has the alias, which is also what NAME@ALIAS means."""
    return None if against == f"{name}@{alias}" else against


def carry_out(
    registry: Registry, name: str, alias: str, version: int, expected: int | None, decision: Decision, by: str
) -> None:
    """Move the alias, or note that it stays; raise Conflict where it is no longer at `expected`."""
    evidence = {**decision.evidence, "reason": decision.reason}
    if decision.passes and expected == version:
        registry.note(name, {"alias": alias, "kept": expected, "by": by, "evidence": evidence})
    elif decision.passes:
        registry.set_alias(name, alias, version, by, expected, {"evidence": evidence})
    else:
        registry.note(name, {"alias": alias, "kept": expected, "refused": version, "by": by, "evidence": evidence})


def roll_back(registry: Registry, name: str, alias: str, by: str) -> tuple[int, int]:
    """Point the alias where it was before its last move; return (from, to).

    A second time it goes back once more, not forth. Raises ModelNotFound where there is no alias or no move before.
    """
    now = registry.aliases(name).get(alias)
    if now is None:
        registry.versions(name)
        raise ModelNotFound(f"model {name!r} has no alias {alias!r}")
    trail: list[int] = []
    for entry in registry.history(name):
        if entry.get("alias") != alias or not isinstance(entry.get("to"), int):
            continue
        if entry.get("rollback"):
            # It took the last step back.
            trail = trail[:-1]
        else:
            trail.append(entry["to"])
    if trail[-1:] != [now]:
        # A crash has cut the line of its last move short.
        trail.append(now)
    if len(trail) < 2:
        raise ModelNotFound(f"{name}@{alias} has been nowhere before {name}:{now}: there is nothing to go back to")
    registry.set_alias(name, alias, trail[-2], by, now, {"rollback": True})
    return now, trail[-2]
