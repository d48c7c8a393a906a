"""The fields that errors name: those of the protocol's messages, in place of tandem.v1's."""

from collections.abc import Iterator
from contextlib import contextmanager

from tandem.errors import InvalidRequest

_SAMPLING, _PARAMETERS = "sampling.", "parameters."
# Of a language model's request.
_OTHERS = {"prompt": "inputs.prompt", "num_texts": f"{_PARAMETERS}num_texts"}


@contextmanager
def named(model: str, version: str = "version") -> Iterator[None]:
    """Within the context, let an InvalidRequest name its field as the message does that has `model` and `version`."""
    names = {"model": model, "version": version, **_OTHERS}
    try:
        yield
    except InvalidRequest as error:
        if error.field.startswith(_SAMPLING):
            error.field = _PARAMETERS + error.field.removeprefix(_SAMPLING)
        error.field = names.get(error.field, error.field)
        raise
