"""What the broker knows of all runs, as Prometheus asks for it."""

from dataclasses import dataclass

from tandem.jobs.queue import priority_keys
from tandem.jobs.record import PRIORITIES
from tandem.jobs.store import JobStore


@dataclass(frozen=True)
class StoredFacts:
    """The QueueFacts of a store."""

    store: JobStore

    def jobs_by_state(self) -> dict[str, int]:
        """Return how many runs there are in each live state."""
        return self.store.count_by_state()

    def queue_lengths(self) -> dict[tuple[str, int], int]:
        """Return how many messages wait, by queue and priority (0 is the most urgent)."""
        queues = self.store.queues()
        places = [(queue, priority) for queue in queues for priority in PRIORITIES.values()]
        keys = [key for queue in queues for key in priority_keys(queue)]
        return dict(zip(places, self.store.count_messages(keys), strict=True))

    def queue_ages_s(self) -> dict[str, float]:
        """Return for how many seconds the oldest run of each queue has waited, 0 where none waits."""
        return {queue: self.store.queued_since_s(queue) for queue in self.store.queues()}
