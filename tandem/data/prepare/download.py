"""Sources with an address: downloaded to `datasets/.downloads`, and gone on with where a download broke off."""

import fcntl
import hashlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tandem import __version__
from tandem.data.progress import Progress
from tandem.errors import BadSource, Conflict, Unavailable
from tandem.volume import Volume, replace_json

TIMEOUT_S = 30.0
# A connection that breaks after bytes came is taken up again at once, this often.
MAX_ATTEMPTS = 5

_BLOCK_BYTES = 2**18
_MEGABYTE = 1_000_000


def is_url(source: str) -> bool:
    """Return whether `source` is an address and no path."""
    return "://" in source


def is_remote(source: str) -> bool:
    """Return whether getting at `source` takes a download."""
    return is_url(source) and not source.startswith("file:")


def public_form(source: str) -> str:
    """Return what may be recorded of `source`: an absolute path, or an address whose secrets are a digest of them."""
    if not is_url(source):
        return str(Path(source).absolute())
    parts = urllib.parse.urlsplit(source)
    query = f"sha256={hashlib.sha256(parts.query.encode()).hexdigest()[:12]}" if parts.query else ""
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


@contextmanager
def local_source(volume: Volume, source: str, progress: Progress) -> Iterator[Path]:
    """Yield the path of `source`, downloaded first if it is an address.

    The download stays when the work in the block is interrupted, to be used by the next call; it goes when the work
    is done or the source proves bad. Raises BadSource, Unavailable (no connection), Conflict (two downloads at once).
    """
    if not is_url(source):
        yield Path(source).absolute()
        return
    parts = urllib.parse.urlsplit(source)
    if parts.scheme == "file":
        yield Path(urllib.request.url2pathname(parts.path))
        return
    if parts.scheme not in ("http", "https"):
        raise BadSource(f"{source} is no http, https or file address; download it by hand and pass --source FILE")
    path = _place(volume, source, parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        download(source, path, progress)
    try:
        yield path
    except BadSource:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


def _place(volume: Volume, url: str, parts: urllib.parse.SplitResult) -> Path:
    name = urllib.parse.unquote(parts.path).rpartition("/")[2]
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)[-80:].lstrip(".")
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return volume.datasets / ".downloads" / f"{digest}-{safe or 'source'}"


def download(url: str, path: Path, progress: Progress) -> None:
    """Put the file at `url` at `path`, which appears when it is whole; what has come waits in `path`.part.

    A later call goes on from there with a Range request, and starts over if the server ignores that or has another
    file by now. Raises Unavailable on a network failure and Conflict while another process downloads the same.
    """
    part = path.with_name(f"{path.name}.part")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"{url} is being downloaded by another process; wait for it and run this again") from None
        for attempt in range(MAX_ATTEMPTS):
            before = file.tell()
            try:
                _fetch_rest(url, file, _validator_path(part), progress)
                break
            except Unavailable:
                if file.tell() <= before or attempt == MAX_ATTEMPTS - 1:
                    raise
        part.replace(path)
    _validator_path(part).unlink(missing_ok=True)


def _validator_path(part: Path) -> Path:
    return part.with_suffix(".part.json")


def _fetch_rest(url: str, file: IO[bytes], validator: Path, progress: Progress) -> None:
    have = file.tell()
    request = urllib.request.Request(url, headers=_headers(have, validator))  # noqa: S310 the scheme is checked
    with _network_errors(url):
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:
                return _after_the_end(url, error, file, validator, progress)
            raise
    with response:
        if response.status != 206 or not _continues(response, have):
            file.truncate(0)
            have = file.seek(0)
        replace_json(validator, _validator_of(response), durable=False)
        _receive(url, response, file, have, progress)
    return None


def _headers(have: int, validator: Path) -> dict[str, str]:
    headers = {"User-Agent": f"tandem/{__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
        # With If-Range, a server that has another file by now sends it from the start.
        with suppress(OSError, ValueError):
            headers |= json.loads(validator.read_bytes())
    return headers


def _validator_of(response: http.client.HTTPResponse) -> dict[str, str]:
    etag = response.headers.get("ETag", "")
    found = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    return {"If-Range": found} if found else {}


def _continues(response: http.client.HTTPResponse, have: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {have}-")


def _after_the_end(
    url: str, error: urllib.error.HTTPError, file: IO[bytes], validator: Path, progress: Progress
) -> None:
    """Handle status 416: the part is the whole file, or of another file, and then everything is fetched again."""
    if error.headers.get("Content-Range", "") == f"bytes */{file.tell()}":
        return
    file.truncate(0)
    file.seek(0)
    _fetch_rest(url, file, validator, progress)


def _receive(url: str, response: http.client.HTTPResponse, file: IO[bytes], have: int, progress: Progress) -> None:
    length = response.headers.get("Content-Length")
    total = have + int(length) if length and length.isdigit() else None
    name = urllib.parse.urlsplit(url).path.rpartition("/")[2]
    progress.start(f"downloading {name} (MB)", total // _MEGABYTE if total else None)
    shown = 0
    while True:
        with _network_errors(url):
            block = response.read(_BLOCK_BYTES)
        if not block:
            break
        file.write(block)
        have += len(block)
        progress.advance(have // _MEGABYTE - shown)
        shown = have // _MEGABYTE
    file.flush()
    if total is not None and have < total:
        raise _unavailable(url, f"the connection broke off after {have:,} of {total:,} bytes")


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise _unavailable(url, f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _unavailable(url, str(getattr(error.reason, "strerror", None) or error.reason)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _unavailable(url, str(error) or type(error).__name__) from error


def _unavailable(url: str, reason: str) -> Unavailable:
    return Unavailable(
        f"can't download {public_form(url)}: {reason}; run this again to go on, "
        "or download it by hand and pass --source FILE"
    )
