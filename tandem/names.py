"""Allow-listed names: the only client text that ever becomes part of a path."""

import re

from tandem.errors import InvalidName

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME = re.compile(NAME_PATTERN)


def check_name(name: str, kind: str) -> str:
    """Return `name` if it may name a `kind` (model, dataset, run, alias), else raise InvalidName."""
    if _NAME.fullmatch(name):
        return name
    raise InvalidName(
        f"{kind} name {name[:80]!r} is not allowed: use 1 to 64 letters, digits, '.', '_' or '-', "
        "beginning with a letter or a digit",
        field=kind,
    )
