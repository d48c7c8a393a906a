"""Texts of many callers written together: the device's thread steps them in turns, their callers are told as they come.

A turn ends after TURN_S, or at the step after which something else waits for the device. Words are told at the end of a
turn, and a text's first ones at once: a message for each word would cost more than drawing it.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from services.inference.calls import Done
from services.inference.runtimes.interface import LanguageRuntime
from services.inference.scheduler import DeviceScheduler, Place, Priority
from services.inference.text_statistics import TextPassage
from services.inference.text_table import LiveText, TextTable
from tandem.errors import TandemError
from tandem.models.decoding import Drawn, Text

# How long the texts of a model hold the device in one turn.
TURN_S = 0.1


@dataclass(frozen=True)
class News:
    """Words of text `index` of a call; `ended` says that they are its last.

    Milliseconds: how long it waited for its row, and how long the steps have taken since, with all that shared them.
    """

    index: int
    drawn: Sequence[Drawn]
    ended: bool
    queue_ms: float
    compute_ms: float


@dataclass(eq=False)
class _Inbox:
    """What has come for a call and is not yet fetched; used on the call's event loop."""

    loop: asyncio.AbstractEventLoop
    news: deque[News] = field(default_factory=deque)
    error: BaseException | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, news: News, error: BaseException | None) -> None:
        self.news.append(news)
        self.error = self.error or error
        self.arrived.set()

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.arrived.set()

    async def take(self) -> News:
        """Wait for news; raise the error of the call, if it has one, after the words that came before it."""
        while not self.news:
            if self.error is not None:
                raise self.error
            self.arrived.clear()
            await self.arrived.wait()
        return self.news.popleft()


class TextLoop:
    """Writes the texts of one model. Its callers, and `write`, are on one event loop."""

    def __init__(self, runtime: LanguageRuntime, scheduler: DeviceScheduler) -> None:
        self._runtime, self._scheduler = runtime, scheduler
        self._table: TextTable | None = None
        self._newcomers: deque[LiveText] = deque()
        self._inboxes: dict[LiveText, tuple[_Inbox, int]] = {}
        self._driver: asyncio.Task[None] | None = None

    async def write(
        self, texts: Sequence[Text], read: list[int], max_words: int, place: Place
    ) -> AsyncGenerator[News, None]:
        """Yield the words of `texts`, which all begin with the tokens `read`, as they are drawn, until all have ended.

        Raises DeadlineExceeded, CheckpointCorrupt, or Unavailable when the server stops. Closed, or cancelled, it ends
        the texts at the next step.
        """
        inbox = _Inbox(asyncio.get_running_loop())
        # The last token is read by the first step.
        now, to_read = time.monotonic(), read[:-1]
        lives = [LiveText(text, to_read, max_words, now, place.priority, place.deadline) for text in texts]
        passages = [place.text(len(to_read)) for _ in texts]
        place.passage.asks()
        self._inboxes.update({live: (inbox, index) for index, live in enumerate(lives)})
        self._newcomers.extend(lives)
        self._wake()
        try:
            num_left = len(lives)
            while num_left:
                news = await inbox.take()
                _note(passages[news.index], lives[news.index], news)
                yield news
                # Only now: until its message was written, which waits for a slow reader, nobody has read it.
                lives[news.index].taken += len(news.drawn)
                num_left -= news.ended
                self._wake()
            if inbox.error is not None:
                raise inbox.error
        finally:
            for live in lives:
                live.gone = True
                self._inboxes.pop(live, None)
            self._wake()
            place.passage.returned(_times(lives))

    def _wake(self) -> None:
        if (self._driver is None or self._driver.done()) and self._has_work():
            self._driver = asyncio.get_running_loop().create_task(self._drive())

    def _has_work(self) -> bool:
        return bool(self._newcomers) or (self._table is not None and self._table.has_work())

    async def _drive(self) -> None:
        try:
            # Between turns the device's thread leaves the table alone.
            while self._has_work():
                await self._scheduler.run(self._turn, priority=self._urgency(), runtime=self._runtime)
            if self._table is not None and not self._table.everyone():
                # Its rows may take hundreds of megabytes, which nobody needs now.
                self._table = None
        except Exception as error:  # noqa: BLE001 - it belongs to the callers, who get it
            self._fail(error)

    def _urgency(self) -> Priority:
        active = self._table.active() if self._table is not None else []
        return min((live.priority for live in (*active, *self._newcomers)), default=Priority.NORMAL)

    def _fail(self, error: BaseException) -> None:
        """End all texts with `error`, whatever state it left them in."""
        self._table = None
        self._newcomers.clear()
        for inbox, _ in set(self._inboxes.values()):
            inbox.fail(error)

    def _turn(self) -> None:
        """Step the texts, on the device's thread."""
        if self._table is None:
            self._table = TextTable(self._runtime)
        now = time.monotonic()
        ends_at = now + TURN_S
        going_on = True
        while going_on:
            while self._newcomers:
                self._table.add(self._newcomers.popleft())
            news = self._table.step(now)
            began, now = now, time.monotonic()
            # What has begun is news, and there.
            for live in {*self._table.everyone(), *news}:
                if live.started_at is not None:
                    live.compute_s += now - began
            going_on = now < ends_at and self._has_work() and not self._scheduler.is_wanted
            self._tell(news if going_on else {*self._table.everyone(), *news})

    def _tell(self, lives: "Sequence[LiveText] | set[LiveText]") -> None:
        """Send the words of `lives` to their event loop, in one go."""
        parcels: list[tuple[_Inbox, News, TandemError | None]] = []
        for live in lives:
            to = self._inboxes.get(live)
            if to is not None and (live.told or live.has_ended):
                drawn, live.told = live.told, []
                parcels.append(
                    (to[0], News(to[1], drawn, live.has_ended, live.waited_s * 1000, live.compute_s * 1000), live.error)
                )
        if parcels:
            # A loop that was closed has nobody left who waits.
            with suppress(RuntimeError):
                parcels[0][0].loop.call_soon_threadsafe(_put, parcels)


def _put(parcels: Sequence[tuple[_Inbox, News, TandemError | None]]) -> None:
    for inbox, news, error in parcels:
        inbox.put(news, error)


def _note(passage: TextPassage, live: LiveText, news: News) -> None:
    """Count the news of a text; here, since counts are kept on the event loop."""
    if live.joined_at is not None and not live.is_noted:
        live.is_noted = True
        passage.prefilled(live.joined_at)
    passage.drew(len(news.drawn))


def _times(lives: Sequence[LiveText]) -> Done[None]:
    """Return how long the texts of a call waited for their rows and were on the device, the longest of each."""
    waited_s = max(live.waited_s for live in lives)
    return Done(None, waited_s * 1000, max(live.compute_s for live in lives) * 1000)
