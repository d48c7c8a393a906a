"""What a JPEG says of itself before it is decoded."""

import re

# A marker other than those without a segment: FF 00 is a byte of the image, D0 to D7 are restarts within a scan.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA


def has_more_scans(data: bytes, limit: int) -> bool:
    """Return whether the JPEG `data` has more than `limit` scans.

    Each scan passes over the whole image, however few bytes it has itself.
    """
    # The usual case, without a walk; what stands in metadata or behind the image is counted too.
    if data.count(bytes((0xFF, _SCAN))) <= limit:
        return False
    position = count = 0
    while count <= limit and (marker := _MARKER.search(data, position)):
        kind, position = marker[1][0], marker.end()
        if kind == _END:
            break
        if kind == _START:
            continue
        count += kind == _SCAN
        position += int.from_bytes(data[position : position + 2], "big")
    return count > limit
