"""Text of a source, read a line at a time: it may be larger than memory."""

from collections.abc import Iterator
from pathlib import Path

from tandem.data.prepare.sources import Source
from tandem.errors import BadSource

# A longer line is no text that was meant to be read by lines.
MAX_LINE_BYTES = 16 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(source: Source, name: str) -> Iterator[str]:
    """Yield the lines of file `name` without their ends; raise BadSource where it is no UTF-8 text."""
    offset = 0
    with source.reading(name), source.open(name) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            yield _decode(line, offset, source.path / name)
            offset += len(line)


def _decode(line: bytes, offset: int, path: Path) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise BadSource(f"{path} has a line of over {MAX_LINE_BYTES:,} bytes at byte {offset}: break it into lines")
    if b"\0" in line:
        raise BadSource(f"{path} is no text: it holds a NUL at byte {offset + line.index(0)}")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadSource(f"{path} is not UTF-8 at byte {offset + error.start}: save it as UTF-8") from None
    if offset == 0 and line.startswith(_BYTE_ORDER_MARK):
        text = text[1:]
    return text.rstrip("\r\n")
