"""Server-sent events: where one ends, and what its lines say (WHATWG HTML, 9.2.6).

These functions take whole events and keep no state; the stream is relay/scanner.py's.
"""

from __future__ import annotations

import re
from typing import Final

# Lines end with CRLF, LF or CR; atomic groups, lest the CR and LF of one line end count as two.
BLANK_LINE: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_CR: Final = 0x0D  # `in` takes a number at a tenth of the cost of bytes
BOM: Final = b"\xef\xbb\xbf"

DONE: Final = b"[DONE]"
_BARE_ERROR: Final = b'{"error"'  # the beginning of a line that lacks its `data:`


class Data:
    """The data of an event: its lines, joined by LF; empty if the event is an error without any."""

    __slots__ = ("error_line", "is_error", "payload", "starts")

    def __init__(
        self,
        payload: bytes,
        starts: tuple[int, ...],
        is_error: bool = False,
        error_line: bytes = b"",
    ) -> None:
        self.payload = payload
        self.starts = starts  # offset of each line of the payload in the event's bytes
        self.is_error = is_error  # the event has the line `event: error`
        self.error_line = error_line  # what its line `error: …` says, or a line of bare JSON

    def place_of(self, offset: int) -> int:
        """Return the place in the event's bytes of what is at `offset` in the payload."""
        line = self.payload.count(b"\n", 0, offset)
        return self.starts[line] + offset - (self.payload.rfind(b"\n", 0, offset) + 1)


def blank_line_end(data: bytes, start: int, *, has_cr: bool) -> int:
    """Return the offset past the first empty line of `data` from `start` on; -1 without one.

    It ends an event. `has_cr` says whether there may be a CR in `data`.
    """
    if not has_cr:  # as nearly all servers write; a tenth of the cost
        end = data.find(b"\n\n", start)
        return end + 2 if end >= 0 else -1
    blank = BLANK_LINE.search(data, start)
    return blank.end() if blank else -1


def parse_event(event: bytes) -> Data | None:
    """Return the data of one whole `event`, and whether it is an error.

    None if the event has neither (comments, `retry:`, blank lines).
    """
    # Nearly every event of a model server is one `data: ` line and two LF.
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and _CR not in event:
        return Data(event[6:-2], (6,))
    return _parse_lines(event)


def _parse_lines(event: bytes) -> Data | None:
    parts: list[bytes] = []
    starts: list[int] = []
    is_error, error_line = False, b""
    position = len(BOM) if event.startswith(BOM) else 0
    while position < len(event):
        end_of_line = _LINE_END.search(event, position)
        end, following = end_of_line.span() if end_of_line else (len(event), len(event))
        name, colon, value = event[position:end].partition(b":")
        skipped = len(name) + len(colon)
        if value.startswith(b" "):
            value = value[1:]
            skipped += 1
        if name == b"data":
            starts.append(position + skipped)
            parts.append(value)
        elif name == b"event" and value == b"error":
            is_error = True
        elif name == b"error":  # of llama.cpp, no field of the standard
            error_line = value
        elif name == _BARE_ERROR:
            error_line = event[position:end]
        position = following
    if not parts and not is_error and not error_line:
        return None
    return Data(b"\n".join(parts), tuple(starts), is_error, error_line)


def serialize_event(payload: bytes) -> bytes:
    """Return an event whose data is `payload`, with a `data:` for each line."""
    return b"data: %b\n\n" % payload.replace(b"\n", b"\ndata: ")
