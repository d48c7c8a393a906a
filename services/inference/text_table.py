"""The texts of one model that are being written: who waits, whose prompt is read, who is stepped, who is paused.

Plain state, without threads, and with the clock handed in. All but `LiveText.taken` and `.gone`, which the callers'
side sets, is touched by the device's thread alone. Prompts are read in pieces between the steps, so that a long one
stalls nobody; a text joins the others at the next step, and leaves them as it ends.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from services.inference.lanes import PROMOTE_AFTER_S, Priority
from services.inference.runtimes.interface import LanguageRuntime
from tandem.errors import DeadlineExceeded, QueueFull, TandemError
from tandem.models.decoding import PREFILL_TOKENS, Drawn, Text
from tandem.models.language_models import ModelState
from tandem.models.slots import Kept
from tandem.wire.limits import MAX_UNREAD_WORDS


@dataclass(eq=False)
class LiveText:
    """A text with at most `max_words`, asked for at `asked_at` and wanted by `deadline`.

    `to_read` is what is left of its prompt, but for the last token, which the first step reads. `told` are the words
    drawn since they were last fetched, `taken` says how many have reached the reader.
    """

    text: Text
    to_read: list[int]
    max_words: int
    asked_at: float
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    told: list[Drawn] = field(default_factory=list)
    taken: int = 0
    gone: bool = False
    state: ModelState | None = None
    started_at: float | None = None
    # When its prompt was read, and whether that has been counted.
    joined_at: float | None = None
    is_noted: bool = False
    ended_at: float | None = None
    compute_s: float = 0.0
    error: TandemError | None = None

    @property
    def has_ended(self) -> bool:
        """True when no more words come."""
        return self.ended_at is not None

    @property
    def waited_s(self) -> float:
        """Seconds until its prompt was begun with."""
        return 0.0 if self.started_at is None else self.started_at - self.asked_at

    @property
    def is_ahead(self) -> bool:
        """True if its reader has enough to read."""
        return self.text.num_words - self.taken >= MAX_UNREAD_WORDS

    def urgency(self, now: float) -> int:
        """Return how urgent it is, 0 the most; after PROMOTE_AFTER_S of waiting it counts as one priority higher."""
        return max(0, self.priority - int((now - self.asked_at) / PROMOTE_AFTER_S))

    def end(self, now: float, error: TandemError | None = None) -> None:
        """Let no more words come."""
        self.ended_at, self.error = now, error


class TextTable:
    """The texts of the model that `runtime` runs."""

    def __init__(self, runtime: LanguageRuntime) -> None:
        self._runtime = runtime
        self._slots = runtime.make_slots()
        # In the order of the slots' rows.
        self._rows: list[LiveText] = []
        self._paused: list[tuple[LiveText, Kept]] = []
        self._reading: deque[LiveText] = deque()
        self._waiting: list[LiveText] = []

    @property
    def num_running(self) -> int:
        """Texts that have a slot, or whose prompt is being read."""
        return len(self._rows) + len(self._reading)

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a slot."""
        return len(self._waiting)

    def add(self, live: LiveText) -> None:
        """Let a text wait for its turn."""
        self._waiting.append(live)

    def active(self) -> list[LiveText]:
        """Return the texts that are not paused."""
        return [*self._rows, *self._reading, *self._waiting]

    def everyone(self) -> list[LiveText]:
        """Return all texts that have not ended."""
        return [*self.active(), *(live for live, _ in self._paused)]

    def has_work(self) -> bool:
        """True unless all there are wait for their readers."""
        return bool(self._rows or self._reading or self._waiting) or any(
            live.gone or not live.is_ahead for live, _ in self._paused
        )

    def step(self, now: float) -> list[LiveText]:
        """Read a piece of the prompts, then write a word of each text; return those that have news: a first word, or
        their end."""
        ended = self._clear_out(now)
        self._resume()
        self._read_prompts(now)
        if not self._rows:
            return ended
        logits = self._slots.step([live.text.unread or 0 for live in self._rows])
        begun = [live for live in self._rows if not live.text.num_words]
        # From the last row on: into one that is left the last one moves.
        for row in reversed(range(len(self._rows))):
            live = self._rows[row]
            _draw(live, logits[row], now)
            if live.has_ended:
                ended.append(live)
                self._slots.remove(row)
                self._forget(row)
            elif live.is_ahead:
                self._pause(row, now, ended)
        return ended + [live for live in begun if not live.has_ended]

    def _clear_out(self, now: float) -> list[LiveText]:
        """Drop the texts whose callers have gone or whose time is over; return the latter."""
        over = [live for live in self.everyone() if live.gone or (live.deadline is not None and now >= live.deadline)]
        for live in over:
            late = DeadlineExceeded(f"the deadline passed after {live.text.num_words:,} words")
            live.end(now, None if live.gone else late)
        if over:
            for row in reversed(range(len(self._rows))):
                if self._rows[row].has_ended:
                    self._slots.remove(row)
                    self._forget(row)
            self._paused = [(live, kept) for live, kept in self._paused if not live.has_ended]
            self._reading = deque(_living(self._reading))
            self._waiting = list(_living(self._waiting))
        return [live for live in over if not live.gone]

    def _resume(self) -> None:
        """Give those whose readers have caught up their rows back, before any newcomer."""
        for each in list(self._paused):
            live, kept = each
            if not live.is_ahead and not self._slots.is_full:
                self._paused.remove(each)
                self._slots.put_back(kept)
                self._rows.append(live)

    def _read_prompts(self, now: float) -> None:
        """Read about a piece of the prompts; those that are read through get their rows."""
        if self._waiting and self.num_running < self._slots.capacity:
            # The urgent first, where waiting makes urgent, then in order.
            self._waiting.sort(key=lambda each: (each.urgency(now), each.asked_at))
        while self._waiting and self.num_running < self._slots.capacity:
            live = self._waiting.pop(0)
            live.started_at = now
            self._reading.append(live)
        left = PREFILL_TOKENS
        while self._reading and left > 0:
            live = self._reading.popleft()
            piece, live.to_read = live.to_read[:PREFILL_TOKENS], live.to_read[PREFILL_TOKENS:]
            if piece:
                live.state = self._runtime.read(piece, live.state)
                left -= len(piece)
            if live.to_read:
                # In turns, so that a short prompt never waits for a long one.
                self._reading.append(live)
            else:
                self._slots.put(live.state)
                live.state, live.joined_at = None, now
                self._rows.append(live)

    def _pause(self, row: int, now: float, ended: list[LiveText]) -> None:
        """Take the text in `row` out until its reader has caught up; one too many ends: each holds its whole memory."""
        live = self._rows[row]
        if len(self._paused) < self._slots.capacity:
            self._paused.append((live, self._slots.take(row)))
        else:
            self._slots.remove(row)
            said = f"{len(self._paused)} texts of this model wait for their readers, which is the limit; read faster"
            live.end(now, QueueFull(said, retry_after_s=1.0))
            ended.append(live)
        self._forget(row)

    def _forget(self, row: int) -> None:
        self._rows[row] = self._rows[-1]
        self._rows.pop()


def _draw(live: LiveText, logits: Tensor, now: float) -> None:
    """Draw the next word of `live` from `logits` (V,)."""
    try:
        drawn = live.text.draw(logits)
    except TandemError as error:
        live.end(now, error)
        return
    if drawn is not None:
        live.told.append(drawn)
    if live.text.stopped or live.text.num_words == live.max_words:
        live.end(now)


def _living(lives: Iterable[LiveText]) -> Iterable[LiveText]:
    return (live for live in lives if not live.has_ended)
