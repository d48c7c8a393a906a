"""The tokens that the server lets in: a file of lines `scope[,scope] token`, read anew when it changes.

    # who calls
    predict        sha256:9f86d081884c7d65…      the SHA-256 of a token, in hex
    predict,admin  T0p-s3cret-T0ken-of-32-signs  the token itself: then the file is its owner's alone

Only digests are kept.
"""

import hashlib
import hmac
import logging
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.inference.tls import signature_of
from tandem.access import TOKENS_FILE
from tandem.errors import InvalidRequest

PREDICT, ADMIN = "predict", "admin"
SCOPES = frozenset({PREDICT, ADMIN})
# A shorter one can be guessed. `openssl rand -hex 32` makes 64 signs.
MIN_TOKEN_LENGTH = 16
# How long a token that was removed may still be let in; a look at the file for each call would stop the event loop.
RECHECK_S = 1.0

_HASHED = "sha256:"

log = logging.getLogger("tandem.inference.tokens")


@dataclass(frozen=True)
class Entry:
    """One line: what the token of this SHA-256 may do."""

    scopes: frozenset[str]
    digest: bytes
    is_hashed: bool


class TokenFile:
    """The tokens of `path`. Raises InvalidRequest if it can't be used now; later, the tokens before go on."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._signature = signature_of(path)
        self._entries = read_tokens(path)
        self._checked_at = clock()

    def scopes(self, token: str) -> frozenset[str] | None:
        """Return what `token` may do, None for one that is not in the file."""
        self._follow()
        digest, found = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest(), None
        # All entries each time: how long it takes says nothing of which one it was.
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.scopes
        return found

    def _follow(self) -> None:
        now = self._clock()
        if now - self._checked_at < RECHECK_S:
            return
        self._checked_at = now
        signature = signature_of(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._entries = read_tokens(self._path)
        except InvalidRequest as error:
            log.error("the tokens were changed, and those before go on being used: %s", error)
        else:
            log.info("%d tokens are let in from now on", len(self._entries))


def read_tokens(path: Path) -> tuple[Entry, ...]:
    """Return the entries of file `path`.

    Raises InvalidRequest, which names the line and never the token, and where others could read or write tokens.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text("utf-8")
    except UnicodeDecodeError:
        raise _refused(path, "is no text in UTF-8") from None
    except OSError as error:
        raise _refused(path, f"can't be read: {error.strerror}") from None
    entries = parse_tokens(text, path)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _refused(path, "can be written by others than its owner: chmod 600")
    if mode & (stat.S_IRGRP | stat.S_IROTH) and not all(entry.is_hashed for entry in entries):
        raise _refused(
            path, "has tokens that others than its owner can read: chmod 600, or write them as sha256:<hex of SHA-256>"
        )
    return entries


def parse_tokens(text: str, path: Path) -> tuple[Entry, ...]:
    """Return the entries of `text`; raise InvalidRequest, which names `path` and the line."""
    numbers: dict[bytes, int] = {}
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entry = _parse(line)
        except ValueError as error:
            raise _refused(path, f"line {number}: {error}") from None
        if entry.digest in numbers:
            raise _refused(path, f"line {number} has the token of line {numbers[entry.digest]} again")
        numbers[entry.digest] = number
        entries.append(entry)
    if not entries:
        raise _refused(path, "has no tokens: nobody could call; write lines 'predict,admin TOKEN'")
    return tuple(entries)


def _parse(line: str) -> Entry:
    words = line.split()
    if len(words) != 2:
        raise ValueError("write 'scope[,scope] token'")
    scopes = frozenset(words[0].split(","))
    if not scopes <= SCOPES:
        raise ValueError(f"a scope is neither {PREDICT} nor {ADMIN}")
    if words[1].startswith(_HASHED):
        digest = _digest(words[1].removeprefix(_HASHED))
        return Entry(scopes, digest, is_hashed=True)
    if len(words[1]) < MIN_TOKEN_LENGTH:
        raise ValueError(f"the token has fewer than {MIN_TOKEN_LENGTH} signs; 'openssl rand -hex 32' makes one")
    return Entry(scopes, hashlib.sha256(words[1].encode()).digest(), is_hashed=False)


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError("after sha256: there must be 64 hexadecimal digits")
    return digest


def _refused(path: Path, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{TOKENS_FILE}={path} {problem}")
