"""Framing of HTTP/1.1 bodies: where a body ends, in the bytes as the socket cuts them (RFC 9112).

Each body has a separate reader, without I/O; the same readers serve both legs. Leaves to others:
heads (protocol/http_head.py), how long a body may be, time limits.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

from .http_head import FIELD_LINE, TOKEN, VALUE, FramingKind, RequestHead, ResponseHead, quote

MAX_SIZE_LINE_BYTES: Final = 4 * 1024
MAX_TRAILER_BYTES: Final = 16 * 1024
# Of a request's body in chunks: so many are free, further ones have so many bytes on average. Each
# costs about a microsecond, and one turn of the loop may bring megabytes of them.
FREE_CHUNKS: Final = 32 * 1024
MIN_CHUNK_BYTES: Final = 256

_CR: Final = 0x0D
_LF: Final = 0x0A
_ZERO: Final = 0x30
_NINE: Final = 0x39
_LOWER_A: Final = 0x61
_LOWER_F: Final = 0x66
_UPPER_A: Final = 0x41
_UPPER_F: Final = 0x46
_CHUNKED: Final = FramingKind.CHUNKED
_UNTIL_EOF: Final = FramingKind.UNTIL_EOF
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;%b)?" % VALUE)
_SIZE_LINE_BEGUN: Final = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*+(?:;%b)?\r?" % VALUE)
_TRAILER_BEGUN: Final = re.compile(rb"(?:%b(?::%b)?)?\r?" % (TOKEN, VALUE))


class FramingError(Exception):
    """A body breaks its own framing, or the connection ends before it does."""


class BodyReader:
    """A reader that finds the end of one body. After an error it and its connection are of no use.

    What came after the body's end, the next message or rubbish, is in `leftover`; the caller
    bounds it.
    """

    __slots__ = ("is_complete", "leftover")

    def __init__(self, *, is_complete: bool = False) -> None:
        self.is_complete = is_complete
        self.leftover = b""

    @property
    def is_between_chunks(self) -> bool:
        """Return whether the body is chunked and its next byte begins a size line."""
        return False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payload in `data` in order, no piece empty. Raises FramingError."""
        raise NotImplementedError

    def feed_eof(self) -> None:
        """Take note that the peer closed. Raises FramingError if the body is not complete."""
        raise NotImplementedError


def body_reader(head: RequestHead | ResponseHead) -> BodyReader:
    """Return a new reader for the body that follows `head`."""
    if head.kind is _CHUNKED:
        return RequestChunks() if isinstance(head, RequestHead) else ChunkedBody()
    if head.kind is _UNTIL_EOF:
        return UntilEofBody()
    return NoBody() if head.length is None else LengthBody(head.length)


class NoBody(BodyReader):
    """No body at all: every byte is left over."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(is_complete=True)

    def feed(self, data: bytes) -> list[bytes]:
        self.leftover += data
        return []

    def feed_eof(self) -> None:
        """Accept the end: there is nothing to wait for."""


class LengthBody(BodyReader):
    """A body of `length` bytes (RFC 9112 6.2)."""

    __slots__ = ("_remaining",)

    def __init__(self, length: int) -> None:
        super().__init__(is_complete=length == 0)
        self._remaining = length

    def feed(self, data: bytes) -> list[bytes]:
        remaining = self._remaining
        if len(data) < remaining:
            self._remaining = remaining - len(data)
            return [data] if data else []
        self._remaining = 0
        self.is_complete = True
        self.leftover += data[remaining:]
        return [data[:remaining]] if remaining else []

    def feed_eof(self) -> None:
        if self._remaining:
            raise FramingError(
                f"expected {self._remaining} more bytes of the body, got the end of the connection"
            )


class UntilEofBody(BodyReader):
    """A response body that the end of the connection ends; a cut one looks the same."""

    __slots__ = ()

    def feed(self, data: bytes) -> list[bytes]:
        return [data] if data else []

    def feed_eof(self) -> None:
        self.is_complete = True


Parts = list[bytes | memoryview]  # of a message; large ones may be views into another
LARGE_BYTES: Final = 32 * 1024  # from here on a copy costs more than views, and further writes

# Of chunks with sizes of up to three digits, those of events: a look-up, at a third of the cost.
SIZE_LINES: Final = tuple(b"%x\r\n" % size for size in range(0x1000))


def size_line(size: int) -> bytes:
    """Return the line before a chunk of `size` bytes."""
    return SIZE_LINES[size] if size < len(SIZE_LINES) else b"%x\r\n" % size


def _read_size(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that up to sixteen hex digits at `at` write, and the offset past them."""
    # A loop, no expression: see docs/mypyc.md.
    size, place, last = 0, at, min(len(data), at + 16)
    while place < last:
        byte = data[place]
        if _ZERO <= byte <= _NINE:
            digit = byte - _ZERO
        elif _LOWER_A <= byte <= _LOWER_F:
            digit = byte - _LOWER_A + 10
        elif _UPPER_A <= byte <= _UPPER_F:
            digit = byte - _UPPER_A + 10
        else:
            break
        size = 16 * size + digit
        place += 1
    return size, place


def whole_chunk(data: bytes, at: int) -> tuple[int, int]:
    """Return the start and end of the data of the chunk that begins at `at`.

    They are (0, 0) if the chunk is not all there, if it is the last one, or unusual in any way.
    """
    size, place = _read_size(data, at)
    start = place + 2
    end = start + size
    if not size or end + 2 > len(data):
        return 0, 0
    # Numbers, not slices: nothing is made.
    if data[place] != _CR or data[place + 1] != _LF or data[end] != _CR or data[end + 1] != _LF:
        return 0, 0
    return start, end


class _Step(Enum):
    """The next part of a chunked body (RFC 9112 7.1)."""

    SIZE = "a size line"
    DATA = "data"
    DATA_END = "CR LF after data"
    TRAILER = "a trailer or the last empty line"
    DONE = "nothing"
    FAILED = "nothing after an error"


# As globals: see docs/mypyc.md.
_SIZE: Final = _Step.SIZE
_DATA: Final = _Step.DATA
_DATA_END: Final = _Step.DATA_END
_TRAILER: Final = _Step.TRAILER
_DONE: Final = _Step.DONE
_FAILED: Final = _Step.FAILED


class ChunkedBody(BodyReader):
    """A chunked body (RFC 9112 7.1), of a request or a response.

    Theory of operation: each step takes what it can at an offset and returns the offset behind it.
    Most reads hold whole chunks, which one step cuts out in a loop of four operations. Data is
    passed on as it comes, never collected; only a line that is not all there is kept, bounded, in
    `_partial`. Extensions and trailers are checked for their shape and dropped.
    """

    __slots__ = ("_partial", "_remaining", "_step", "_trailer_bytes")

    def __init__(self) -> None:
        super().__init__()
        self._step = _SIZE
        self._partial = b""
        self._remaining = 0  # bytes of the current chunk's data
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        if self._partial:
            data = self._partial + data
            self._partial = b""
        pieces: list[bytes] = []
        at = 0
        try:
            while at < len(data):
                if self._step is _SIZE:
                    at = self._take_chunks(data, at, pieces)
                else:
                    at = self._take_part(data, at, pieces)
        except FramingError:
            self._step = _FAILED  # nothing after this may pass for a body again
            raise
        return pieces

    @property
    def is_between_chunks(self) -> bool:
        return self._step is _SIZE and not self._partial

    def feed_eof(self) -> None:
        if self._step is not _DONE:
            raise FramingError(
                f"expected {self._step.value} of a chunked body, got the end of the connection"
            )

    def _take_chunks(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """Take whole chunks, the usual case, then the size line of one that is not whole."""
        # What is odd or faulty is left to the slower steps.
        while True:
            start, end = whole_chunk(data, at)
            if not end:
                break
            pieces.append(data[start:end])
            at = end + 2
        return self._take_size(data, at) if at < len(data) else at

    def _take_size(self, data: bytes, at: int) -> int:
        size, eol = _read_size(data, at)
        if eol == at or data[eol : eol + 2] != b"\r\n":
            eol = data.find(b"\r\n", at, at + MAX_SIZE_LINE_BYTES + 2)
            if eol < 0:
                return self._keep_line(data, at, MAX_SIZE_LINE_BYTES, _SIZE_LINE_BEGUN)
            match = _SIZE_LINE.fullmatch(data, at, eol)
            if match is None:
                # int(line, 16) alone would take `0x5`, `+5`, `5_0` and ` 5`: smuggling shapes all.
                line = quote(data[at:eol])
                raise FramingError(f"expected a chunk size in hex digits, got '{line}'")
            size = int(match[1], 16)
        self._remaining = size
        self._step = _DATA if size else _TRAILER
        return eol + 2

    def _take_part(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        step = self._step
        if step is _DATA:
            return self._take_data(data, at, pieces)
        if step is _DATA_END:
            return self._take_data_end(data, at)
        if step is _TRAILER:
            return self._take_trailer(data, at)
        if step is _FAILED:
            raise FramingError("expected nothing after a framing error, got more bytes")
        self.leftover += data[at:]
        return len(data)

    def _take_data(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        # A slice of the whole object is the object: a read inside a large chunk is not copied.
        piece = data[at : at + self._remaining]
        pieces.append(piece)
        self._remaining -= len(piece)
        if not self._remaining:
            self._step = _DATA_END
        return at + len(piece)

    def _take_data_end(self, data: bytes, at: int) -> int:
        end = data[at : at + 2]
        if end == b"\r\n":
            self._step = _SIZE
        elif end == b"\r":
            self._partial = end
        else:
            raise FramingError("expected CR LF after the data of a chunk, got something else")
        return at + len(end)

    def _take_trailer(self, data: bytes, at: int) -> int:
        if data[at : at + 2] == b"\r\n":  # nearly always: there are none
            self._step = _DONE
            self.is_complete = True
            return at + 2
        room = MAX_TRAILER_BYTES - self._trailer_bytes
        eol = data.find(b"\r\n", at, at + room + 2)
        if eol < 0:
            return self._keep_line(data, at, room, _TRAILER_BEGUN)
        if not FIELD_LINE.fullmatch(data, at, eol):
            raise FramingError("expected 'name: value' in each trailer, got something else")
        self._trailer_bytes += eol - at
        return eol + 2

    def _keep_line(self, data: bytes, at: int, room: int, begun: re.Pattern[bytes]) -> int:
        """Keep a line's beginning; one that no bytes can mend fails now, not by a time limit."""
        if len(data) - at > room + 1:  # its CR may be there
            raise FramingError(f"expected {self._step.value} of {room} bytes at most, got more")
        if not begun.fullmatch(data, at):
            raise FramingError(f"expected {self._step.value} ending in CR LF, got something else")
        self._partial = data[at:]
        return len(data)


class RequestChunks(ChunkedBody):
    """A chunked body of a request, whose client may not cut it into tiny chunks without end."""

    __slots__ = ("_body_bytes", "_chunks")

    def __init__(self) -> None:
        super().__init__()
        self._chunks = 0
        self._body_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        pieces = super().feed(data)
        self._chunks += max(0, len(pieces) - 1)  # one a read is the network's doing
        self._body_bytes += sum(map(len, pieces))
        if self._chunks > FREE_CHUNKS + self._body_bytes // MIN_CHUNK_BYTES:
            self._step = _FAILED
            raise FramingError(
                f"expected chunks of {MIN_CHUNK_BYTES} bytes or more on average, got smaller ones; "
                "send the body with content-length, or in larger chunks"
            )
        return pieces
