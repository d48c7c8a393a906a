"""What is counted of texts: tokens, and how long their readers wait for them. Fed by whoever writes the text."""

import time
from dataclasses import dataclass, field, fields, replace

from services.inference.durations import Durations
from services.inference.observation import Observed


@dataclass(slots=True)
class TextStatistics:
    """Of the texts of one version; durations count as they are seen, also of texts that don't come to their end."""

    num_waiting: int = 0
    # Those of which something was computed.
    num_running: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    # From admission to the first token.
    first_token: Durations = field(default_factory=Durations)
    # From one token to the next; where several are told at once, their mean.
    between_tokens: Durations = field(default_factory=Durations)

    def copy(self) -> "TextStatistics":
        """Return a copy that does not change."""
        return replace(self, first_token=self.first_token.copy(), between_tokens=self.between_tokens.copy())

    def __add__(self, other: "TextStatistics") -> "TextStatistics":
        return TextStatistics(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


class TextPassage:
    """What happens to one text, from admission to its end: `prefilled` once, `drew` as often as there are tokens."""

    __slots__ = ("_at", "_begun_at", "_call", "_num_tokens", "_prefilled_at", "_statistics", "_works")

    def __init__(
        self, statistics: TextStatistics, num_prompt_tokens: int, begun_at: float, call: Observed | None = None
    ) -> None:
        self._statistics, self._call = statistics, call
        self._begun_at = self._at = begun_at
        self._prefilled_at: float | None = None
        self._num_tokens = 0
        self._works = False
        statistics.num_waiting += 1
        statistics.num_prompt_tokens += num_prompt_tokens
        if call is not None:
            call.num_prompt_tokens += num_prompt_tokens

    def works(self) -> None:
        """Note that something of the text was computed; told by what follows too."""
        if not self._works:
            self._works = True
            self._statistics.num_waiting -= 1
            self._statistics.num_running += 1

    def prefilled(self, at: float | None = None) -> None:
        """Note that the prompt is through the network, since `at` (time.monotonic(); None: now)."""
        self.works()
        self._prefilled_at = time.monotonic() if at is None else at
        if self._call is not None:
            self._call.add_step("prefill", self._begun_at, self._prefilled_at)

    def drew(self, num_tokens: int) -> None:
        """Note `num_tokens` that are ready to be told."""
        if not num_tokens:
            return
        self.works()
        now, statistics = time.monotonic(), self._statistics
        num_later = num_tokens
        if not self._num_tokens:
            statistics.first_token.add(now - self._begun_at)
            num_later -= 1
        if num_later:
            statistics.between_tokens.add((now - self._at) / num_tokens, num_later)
        statistics.num_tokens += num_tokens
        self._num_tokens += num_tokens
        self._at = now

    def end(self) -> None:
        """Note the end, however it came."""
        if self._works:
            self._statistics.num_running -= 1
        else:
            self._statistics.num_waiting -= 1
        if self._call is not None:
            self._call.num_tokens += self._num_tokens
            if self._prefilled_at is not None:
                self._call.add_step("decode", self._prefilled_at, time.monotonic(), self._num_tokens)
