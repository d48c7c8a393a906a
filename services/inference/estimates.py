"""How long a model's batches take: a line "duration ≈ a + b·n", fitted while it serves."""

# What an older batch still counts when one more is done: about the last thirty make the line.
_DECAY = 0.97
# A batch that took so much longer than the line says (a paused machine) counts as this much longer, so that one stall
# refuses nobody; if it is no accident, a few batches bring the line there.
_CLIP = 3.0
# So many batches come first, before any is clipped.
_TRUSTED = 4
# A line that nothing has confirmed for so long says nothing: or a model that was slow once would refuse for ever.
MAX_AGE_S = 2.0


class DurationFit:
    """A least-squares line through the batches seen, the late ones weighing more; both of its terms are ≥ 0."""

    def __init__(self) -> None:
        # Weighted sums of 1, n, t, n² and n·t over batches of n items that took t seconds.
        self._sums = [0.0] * 5
        self._num_seen = 0
        self._seen_at = 0.0

    def add(self, num_items: int, duration_s: float, now: float) -> None:
        """Count a batch of `num_items` that took `duration_s` and ended at `now`."""
        if self._num_seen >= _TRUSTED and (expected_s := self.duration_s(num_items, now)):
            duration_s = min(duration_s, _CLIP * expected_s)
        new = (1.0, num_items, duration_s, num_items**2, num_items * duration_s)
        self._sums = [_DECAY * old + value for old, value in zip(self._sums, new, strict=True)]
        self._num_seen += 1
        self._seen_at = now

    def line(self) -> tuple[float, float]:
        """Return (a, b) in seconds and seconds an item; (0, 0) before the first batch."""
        if not self._num_seen:
            return 0.0, 0.0
        weight, n, t, nn, nt = self._sums
        spread = weight * nn - n**2
        # Batches of one size say nothing of the slope.
        if spread <= 1e-6 * weight * nn:
            return t / weight, 0.0
        slope = max(0.0, (weight * nt - n * t) / spread)
        start = (t - slope * n) / weight
        return (start, slope) if start >= 0 else (0.0, nt / nn)

    def duration_s(self, num_items: int, now: float | None, max_batch: int | None = None) -> float:
        """Return the estimate for `num_items`, in batches of `max_batch`; 0 where nothing is known.

        With `now`, what was seen too long before says nothing. It errs to the short side where only other sizes were
        seen, since callers are refused by it.
        """
        if num_items <= 0 or not self._num_seen or (now is not None and now - self._seen_at > MAX_AGE_S):
            return 0.0
        start, slope = self.line()
        if not slope:
            start *= min(1.0, num_items * self._sums[0] / self._sums[1])
        num_batches = -(-num_items // max_batch) if max_batch else 1
        return start * num_batches + slope * num_items
