"""All shadows: calls that were answered are handed over here, and seen by a candidate when a device has nothing to do.

What waits is bounded in images and bytes, and one task works it off. It asks a device only while no call holds a place
on it, with the lowest priority, and never for long enough to be counted as more urgent. Both models run here, in
float32, as Compare runs them: the answer that the caller got is not kept, so a call costs its caller the same whether a
shadow has it or not.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.inference.aside import TookTooLong
from services.inference.decoding import Batch, Decoder
from services.inference.devices import Devices
from services.inference.loading import ServedClassifier, as_classifier
from services.inference.registry import ServingRegistry
from services.inference.residents import key_of
from services.inference.shadow import Shadow, Terms
from services.inference.shadow_runs import Busy, Handed, Runner
from services.inference.tally import check_common_class
from tandem.errors import Conflict, InvalidRequest, LimitExceeded, ModelNotFound
from tandem.wire.limits import MAX_IMAGES, MAX_SHADOWS

if TYPE_CHECKING:
    from services.inference.classify import GivenImage

# What waits, of all shadows together: as many images as a call may have, of 64 px some 12 MiB.
MAX_WAITING_IMAGES = MAX_IMAGES
MAX_WAITING_BYTES = 64 * 2**20

log = logging.getLogger("tandem.inference.shadow")


class Shadows:
    """Lives on one event loop; `run` is to go on beside the server."""

    def __init__(self, models: ServingRegistry, devices: Devices, decoder: Decoder) -> None:
        self._models = models
        self._runner = Runner(devices, decoder)
        # By the reference; those that have ended, too.
        self._shadows: dict[str, Shadow] = {}
        # By what callers write; those that go on.
        self._active: dict[str, Shadow] = {}
        self._waiting: deque[Handed] = deque()
        self.num_images = self.num_bytes = 0
        self._wake = asyncio.Event()

    def all(self) -> tuple[Shadow, ...]:
        """Return the shadows by their names, those that have ended, too."""
        # In one go: a scrape asks on a thread of its own.
        return tuple(shadow for _, shadow in sorted(self._shadows.items(), key=lambda item: item[0]))

    async def start(self, terms: Terms, candidate: str) -> Shadow:
        """Let `candidate`, a reference of a version, see a share of the calls; it is loaded into free room alone.

        Raises Conflict if the calls have a shadow, LimitExceeded if there are too many, InvalidRequest for models that
        can't be compared, and what loading does.
        """
        self._check_room(terms)
        production = as_classifier(await self._models.get(terms.label), "name")
        with _names("candidate"):
            challenger = as_classifier(await self._models.get_ahead(candidate), "candidate")
        check_common_class(production, challenger, "candidate")
        # It may have been taken meanwhile.
        self._check_room(terms)
        shadow = self._shadows[terms.label] = Shadow(terms, production, challenger)
        self._active.update(dict.fromkeys(terms.written, shadow))
        log.info("%s sees %g of the calls of %s", challenger.located.label, terms.share, terms.label)
        return shadow

    def stop(self, name: str, alias: str) -> Shadow:
        """End and forget a shadow; raise ModelNotFound if there is none."""
        shadow = self._shadows.pop(f"{name}@{alias}", None)
        if shadow is None:
            there = ", ".join(sorted(self._shadows)) or "none"
            raise ModelNotFound(f"{name}@{alias} has no shadow on this server (there: {there})")
        self._end(shadow, "it was stopped")
        return shadow

    def close(self) -> None:
        """End them all."""
        for shadow in self._shadows.values():
            self._end(shadow, "the server stops")

    def check(self) -> None:
        """End the shadows whose models are no longer what they were."""
        for shadow in {*self._active.values()}:
            if reason := self._why_over(shadow):
                self._end(shadow, reason)

    def offer(self, reference: str, served: ServedClassifier, images: "Sequence[GivenImage]", batch: Batch) -> None:
        """Hand over a call of `reference` that `served` has answered, decoded as `batch`; all else is done later."""
        # In the way of each call: 0.09 µs without a shadow, 0.8 µs with one (one core, best of 15 times 1000). What is
        # called soon, once the answer is on its way, takes 0.3 µs, and 2.8 µs if the call is chosen.
        if (shadow := self._active.get(reference)) is not None:
            asyncio.get_running_loop().call_soon(self._take, shadow, served, images, batch)

    async def run(self) -> None:
        """Work off what is handed over; runs until cancelled."""
        while True:
            self._wake.clear()
            while self._waiting:
                await self._see_next()
            await self._wake.wait()

    def _check_room(self, terms: Terms) -> None:
        self.check()
        there = self._shadows.get(terms.label)
        if there is not None and not there.ended:
            raise Conflict(f"{terms.label} has a shadow, {there.labels[1]}: stop it first")
        if there is None and len(self._shadows) >= MAX_SHADOWS:
            raise LimitExceeded(f"{len(self._shadows)} shadows are the limit: stop one first")

    def _take(self, shadow: Shadow, served: ServedClassifier, images: "Sequence[GivenImage]", batch: Batch) -> None:
        if key_of(served.located) != shadow.key:
            # The alias has moved; or it had, and this was answered before.
            self.check()
            return
        if shadow.ended or not batch.indices or not shadow.chooses(len(batch.indices)):
            return
        shadow.seen_at(served)
        handed = Handed.of(shadow, images, batch)
        if not self._has_room(handed):
            shadow.drop(handed.num_images, "full")
            return
        self._count(handed, 1)
        self._waiting.append(handed)
        self._wake.set()

    def _has_room(self, handed: Handed) -> bool:
        num_images, num_bytes = self.num_images + handed.num_images, self.num_bytes + handed.num_bytes
        return num_images <= MAX_WAITING_IMAGES and num_bytes <= MAX_WAITING_BYTES

    def _count(self, handed: Handed, sign: int) -> None:
        self.num_images += sign * handed.num_images
        self.num_bytes += sign * handed.num_bytes

    async def _see_next(self) -> None:
        handed = self._waiting.popleft()
        try:
            await self._see(handed)
        finally:
            self._count(handed, -1)

    async def _see(self, handed: Handed) -> None:
        """Let the candidate see the images of a call, a few at a time."""
        shadow, first = handed.shadow, 0
        while first < handed.num_images:
            self.check()
            if shadow.ended:
                shadow.drop(handed.num_images - first, "ended")
                return
            end = min(handed.num_images, first + shadow.batch_size)
            if not await self._is_seen(handed, first, end):
                shadow.drop(handed.num_images - first, "busy")
                self._drop_waiting()
                return
            first = end

    async def _is_seen(self, handed: Handed, first: int, end: int) -> bool:
        """Let both models see a batch, or count why not; return False if no device had time for it."""
        shadow = handed.shadow
        try:
            await self._runner.run(handed, first, end)
        except Busy:
            return False
        except Exception as error:  # noqa: BLE001 - nobody but the shadow is to know of it
            self._note(shadow, end - first, error)
        if shadow.ended:
            self._forget(shadow)
        return True

    def _note(self, shadow: Shadow, num_images: int, error: Exception) -> None:
        """Count a batch that came to nothing by `error`; of failures the first is logged."""
        if shadow.ended:
            shadow.drop(num_images, "ended")
        elif isinstance(error, TookTooLong):
            shadow.trouble(num_images, "slow")
        else:
            if not shadow.num_dropped["failed"]:
                said = shadow.labels[1], shadow.terms.label
                log.error("a batch of %s beside %s failed; such is told once", *said, exc_info=error)
            shadow.trouble(num_images, "failed")

    def _drop_waiting(self) -> None:
        """Drop all that waits: it would not come sooner, and be older than what comes next."""
        while self._waiting:
            handed = self._waiting.popleft()
            handed.shadow.drop(handed.num_images, "busy")
            self._count(handed, -1)

    def _why_over(self, shadow: Shadow) -> str:
        """Return why a shadow can't go on; "" if it can."""
        terms, (production, candidate) = shadow.terms, shadow.labels
        answers = self._models.pointed(terms.reference)
        if answers is not None and key_of(answers.located) != shadow.key:
            return f"{terms.label} is {answers.located.label} now, and was {production}"
        if self._models.is_unloaded(terms.name):
            return f"model {terms.name} was unloaded on this server"
        if answers is None and not self._models.changes.leads(terms.name, terms.alias):
            return f"{terms.label} is gone"
        served = shadow.candidate()
        if served is None or not self._models.has(served):
            return f"{candidate} is no longer in memory: it was unloaded, or another model needed its room"
        return ""

    def _end(self, shadow: Shadow, reason: str) -> None:
        shadow.end(reason)
        self._forget(shadow)

    def _forget(self, shadow: Shadow) -> None:
        """Take no more calls for a shadow that has ended."""
        if self._active.get(shadow.terms.label) is shadow:
            for written in shadow.terms.written:
                del self._active[written]
            log.info("the shadow of %s has ended: %s", shadow.terms.label, shadow.ended)


@contextmanager
def _names(field: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        raise type(error)(str(error), field=field) from None
