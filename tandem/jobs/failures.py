"""Why attempts end badly, and what follows: which failures are tried again, and after how long."""

from enum import StrEnum

_LONGEST_DELAY_S = 300.0


class Failure(StrEnum):
    """The class of a failure."""

    BAD_SPEC = "bad_spec"
    BAD_DATA = "bad_data"
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE = "non_finite"
    CONFLICT = "conflict"
    TIME_LIMIT = "time_limit"
    INTERNAL = "internal"
    WORKER_LOST = "worker_lost"
    PROCESS_LOST = "process_lost"
    PREEMPTED = "preempted"
    VOLUME = "volume"

    @property
    def is_retried(self) -> bool:
        """True where another attempt may end better."""
        return self in (Failure.WORKER_LOST, Failure.PROCESS_LOST, Failure.PREEMPTED, Failure.VOLUME)

    @property
    def is_counted(self) -> bool:
        """True where it uses up one of the run's tries; to be stopped with its worker is no fault of a run."""
        return self is not Failure.PREEMPTED


# The training process names the error that ended it by its class, see tandem.errors.
_BY_ERROR = {
    "InvalidJob": Failure.BAD_SPEC,
    "InvalidRequest": Failure.BAD_SPEC,
    "BadSource": Failure.BAD_DATA,
    "InvalidImage": Failure.BAD_DATA,
    "DatasetNotFound": Failure.BAD_DATA,
    "ModelNotFound": Failure.BAD_DATA,
    "RunNotFound": Failure.BAD_DATA,
    "CheckpointCorrupt": Failure.BAD_DATA,
    "TrainingFailed": Failure.BAD_SPEC,
    "NonFiniteLoss": Failure.NON_FINITE,
    "Conflict": Failure.CONFLICT,
    "OutOfMemory": Failure.OUT_OF_MEMORY,
    "VolumeUnavailable": Failure.VOLUME,
    "VolumeReadOnly": Failure.VOLUME,
    "StoreUnavailable": Failure.VOLUME,
}


def failure_of(error: str) -> Failure:
    """Return the class of the error with this class name; what nobody foresaw is INTERNAL."""
    return _BY_ERROR.get(error, Failure.INTERNAL)


def backoff_s(failure: Failure, num_failures: int) -> float:
    """Return the seconds to wait before the next attempt, after `num_failures` in a row (this one counted).

    A lost worker is nobody's fault, so the first retry comes at once; a full volume takes somebody time to clear.
    """
    if not failure.is_counted:
        return 0.0
    if failure is Failure.VOLUME:
        return min(5.0 * 2.0 ** (num_failures - 1), _LONGEST_DELAY_S)
    return 0.0 if num_failures <= 1 else min(2.0 ** (num_failures - 2), _LONGEST_DELAY_S)
