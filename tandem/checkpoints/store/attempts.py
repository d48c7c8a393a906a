"""The fence of a run in the store: each attempt leaves its number there, and an earlier one finds it.

On one volume the lock of `tandem.jobs.fence` lets no attempt begin between another's check and its write. Here there is
no lock: an attempt that is over may still finish the object in hand. It spoils nothing, since a checkpoint lies under
the digest of its own bytes, and a version is created once.
"""

from tandem.checkpoints.store.objects import ObjectStore
from tandem.errors import Superseded


def begin_attempt(store: ObjectStore, run_id: str, attempt: int) -> None:
    """Leave the number of an attempt; raise Superseded if a later one has begun."""
    check_attempt(store, run_id, attempt)
    store.create(f"runs/{run_id}/attempts/{attempt:08d}", b"\n")


def check_attempt(store: ObjectStore, run_id: str, attempt: int) -> None:
    """Raise Superseded if an attempt after `attempt` has begun."""
    newest = newest_attempt(store, run_id)
    if newest > attempt:
        raise Superseded(f"attempt {newest} of run {run_id} has begun; attempt {attempt} stops")


def newest_attempt(store: ObjectStore, run_id: str) -> int:
    """Return the newest attempt that has begun, 0 before the first."""
    names = (name.rpartition("/")[2] for name in store.sizes(f"runs/{run_id}/attempts"))
    return max((int(name) for name in names if name.isdecimal()), default=0)
