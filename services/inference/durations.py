"""How often something was done and how long it took: totals, and histograms."""

from bisect import bisect_left
from dataclasses import dataclass, field

# Upper bounds in seconds, and above the last: a small JPEG decodes in 0.1 ms, a long text may take minutes.
BOUNDS_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class Total:
    """How often, and for how long together."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """Count one more, of `seconds`."""
        self.count += 1
        self.ns += round(max(0.0, seconds) * 1e9)

    def copy(self) -> "Total":
        """Return a copy that does not change."""
        return Total(self.count, self.ns)

    def __add__(self, other: "Total") -> "Total":
        return Total(self.count + other.count, self.ns + other.ns)


@dataclass(slots=True)
class Durations(Total):
    """A total, and how many of it were within each of BOUNDS_S (beyond those before it), and above the last."""

    within: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))

    def add(self, seconds: float, times: int = 1) -> None:
        """Count `times` more, of `seconds` each."""
        self.count += times
        self.ns += round(max(0.0, seconds) * 1e9) * times
        self.within[bisect_left(BOUNDS_S, seconds)] += times

    def copy(self) -> "Durations":
        """Return a copy that does not change."""
        return Durations(self.count, self.ns, list(self.within))

    def __add__(self, other: Total) -> "Durations":
        assert isinstance(other, Durations)
        within = [own + more for own, more in zip(self.within, other.within, strict=True)]
        return Durations(self.count + other.count, self.ns + other.ns, within)
