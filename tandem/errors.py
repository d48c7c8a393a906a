"""Every error that Tandem raises on purpose.

    TandemError                     one clear line for a person; never a traceback
    ├── InvalidRequest              what was asked for is wrong
    │   ├── InvalidName             a name outside the allow-list
    │   ├── InvalidReference        a model reference that can't be parsed
    │   ├── InvalidJob              a job spec that fails validation
    │   ├── InvalidImage            bytes that are no image, or too large a one
    │   └── InvalidPrompt           an empty or overlong prompt
    ├── NotFound
    │   ├── ModelNotFound
    │   ├── RunNotFound
    │   └── DatasetNotFound
    ├── Conflict                    what is asked for clashes with what is there
    │   └── Superseded              a later attempt of the run has begun: this one may write nothing more
    ├── BadSource                   data that can't be prepared
    ├── AccessDenied                the server does not let the caller do that
    │   ├── Unauthenticated         no token, or an unknown one
    │   └── PermissionDenied        the token lacks the scope
    ├── CheckpointCorrupt           torn, truncated, altered or foreign files
    ├── TrainingFailed              a run that can't go on
    │   ├── NonFiniteLoss
    │   └── OutOfMemory
    ├── ModelTooLarge               a model that the whole budget of memory does not hold
    ├── ExportFailed                a network that can't be exported, or a file that is not the network
    ├── LimitExceeded               a published limit was passed
    │   └── QueueFull               too much waits already
    │       └── MemoryFull          what is in memory is in use; a model that is not has to wait
    ├── DeadlineExceeded            the caller's time ran out while the work waited
    └── Unavailable                 try again later, or start what is missing
        ├── BrokerUnavailable
        ├── ServerUnavailable
        └── VolumeUnavailable
            ├── VolumeReadOnly      it is mounted, or kept by its permissions, so that this process can't write
            └── StoreUnavailable    the object store of the checkpoints does not answer, or refuses

`wire.status` maps these to gRPC status codes; `cli.main` prints the message and exits with 1.
"""


class TandemError(Exception):
    """Base of all; `str(error)` is one line that names the thing and the remedy."""


class InvalidRequest(TandemError):
    """What was asked for is wrong; `field` names the offending field where there is one."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidName(InvalidRequest):
    """A name that is not letters, digits, '.', '_' and '-'."""


class InvalidReference(InvalidRequest):
    """A model reference that can't be parsed."""


class InvalidJob(InvalidRequest):
    """A job spec that fails validation."""


class InvalidImage(InvalidRequest):
    """Bytes that don't decode to an image, or an image over the limits."""


class InvalidPrompt(InvalidRequest):
    """A prompt that is empty or too long."""


class NotFound(TandemError):
    """The thing named does not exist."""


class ModelNotFound(NotFound):
    """No such model, version or alias."""


class RunNotFound(NotFound):
    """No such run."""


class DatasetNotFound(NotFound):
    """No such dataset, or no such split in it."""


class Conflict(TandemError):
    """What is asked for clashes with what is there."""


class Superseded(Conflict):
    """A later attempt of the same run has begun: this one may write nothing more."""


class BadSource(TandemError):
    """Data that can't be prepared: truncated, altered, incomplete or hostile."""


class AccessDenied(TandemError):
    """The server does not let the caller do that."""


class Unauthenticated(AccessDenied):
    """The call carries no token, or one that the server does not know."""


class PermissionDenied(AccessDenied):
    """The call's token lacks the scope that the method needs."""


class CheckpointCorrupt(TandemError):
    """A checkpoint whose files don't match its manifest."""


class TrainingFailed(TandemError):
    """A run that can't go on; trying again would not help."""


class NonFiniteLoss(TrainingFailed):
    """The loss became NaN or infinite."""


class OutOfMemory(TrainingFailed):
    """The device has no memory for the batch; the message says what would fit."""


class ExportFailed(TandemError):
    """A network that can't be exported, or an exported file that does not do what the network does."""


class LimitExceeded(TandemError):
    """A published limit was passed, or a bounded queue is full."""


class QueueFull(LimitExceeded):
    """The queue has no room; `retry_after_s` says when it may have."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MemoryFull(QueueFull):
    """A model is not in memory, and what is there is in use."""


class ModelTooLarge(TandemError):
    """A model needs more memory than all models may take."""


class DeadlineExceeded(TandemError):
    """The caller's deadline passed before the work began."""


class Unavailable(TandemError):
    """Something that should be there is not, for now."""


class ModelUnloaded(Unavailable):
    """An operator has taken the model out of service on this server."""


class BrokerUnavailable(Unavailable):
    """Redis does not answer."""


class ServerUnavailable(Unavailable):
    """The inference server does not answer."""


class VolumeUnavailable(Unavailable):
    """The shared volume can't be written: full, read-only, or not there."""


class VolumeReadOnly(VolumeUnavailable):
    """The shared volume is there to be read alone: trying again would not help."""


class StoreUnavailable(VolumeUnavailable):
    """The object store of the checkpoints does not answer, or does not let us in."""
