"""Whether an answer came whole: framing, events, their order, their end. No I/O, no clock.

`Answer` takes the bytes of one answer as they came from the socket. Streams of the bench's mock
carry a number and a timestamp in each content event and are counted by searching bytes; events of
other servers are parsed.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

MAX_HEAD_BYTES = 65_536
MAX_LINE_BYTES = 4_096

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r]")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n")
_CLOSE = re.compile(rb"(?i)\r\nconnection:[ \t]*close[ \t]*\r\n")
_DONE = b"data: [DONE]\n\n"
_STAMPED = re.compile(rb"([0-9]{6})@([0-9]{19})")
_NUMBERS = [b"%06d" % number for number in range(10_000)]  # to compare a read's events at once


class AnswerError(Exception):
    """The answer is not whole or not right. `kind` is its class in the report."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# Framing


class Chunks:
    """Takes chunked framing off (RFC 9112 section 7.1)."""

    __slots__ = ("_missing", "_rest", "is_complete")

    def __init__(self) -> None:
        self.is_complete = False
        self._rest = b""  # an unfinished size line, or what follows a chunk's data
        self._missing = 0  # bytes of the current chunk's data and its CRLF

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. Raises AnswerError for what is not chunked framing."""
        if not self._rest and not self._missing:
            # Faster than pretty: a read is one whole chunk where events come one by one.
            end = data.find(b"\r\n", 0, 20)
            if end > 0 and data[-2:] == b"\r\n":
                size = _chunk_size(data[:end])
                if size and len(data) == end + size + 4:
                    return data[end + 2 : -2]
        return self._feed_pieces(data)

    def _feed_pieces(self, data: bytes) -> bytes:
        if self._rest:
            data, self._rest = self._rest + data, b""
        pieces, at = [], 0
        while at < len(data):
            if self.is_complete:
                raise AnswerError("framing", "expected nothing after the last chunk, got bytes")
            if self._missing:
                piece = data[at : at + self._missing]
                at += len(piece)
                left = self._missing - len(piece)
                pieces.append(self._without_end(piece, left))
                self._missing = left
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                if len(data) - at > MAX_LINE_BYTES:
                    raise AnswerError("framing", "expected a chunk's size, got a long line")
                self._rest = data[at:]
                break
            size = _chunk_size(data[at:end])
            if size:
                self._missing = size + 2
                at = end + 2
            elif len(data) < end + 4:  # no trailers are expected: an empty line ends it
                self._rest = data[at:]
                break
            elif data[end + 2 : end + 4] != b"\r\n":
                raise AnswerError("framing", "expected an empty line after the last chunk")
            else:
                self.is_complete = True
                at = end + 4
        return b"".join(pieces)

    def _without_end(self, piece: bytes, left: int) -> bytes:
        """A chunk's data without the CRLF after it, of which `left` bytes are still to come."""
        end = min(max(2 - left, 0), len(piece))
        if not end:
            return piece
        if piece[-end:] != b"\r\n"[2 - left - end : 2 - left]:
            raise AnswerError("framing", "expected CRLF after a chunk's data, got another")
        return piece[:-end]


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].rstrip(b" \t") if b";" in line else line
    try:
        if digits.isalnum():  # no sign, no underscore
            return int(digits, 16)
    except ValueError:
        pass
    raise AnswerError("framing", "expected a chunk's size in hex, got another")


class Answer:
    """One answer, from its head to its end.

    `feed` tells how many content events became whole; `sent` then holds their timestamps (ns) if
    they carry any. `is_complete` once all has come; `finish` raises AnswerError unless it is right.
    """

    __slots__ = (
        "_chunks",
        "_expected",
        "_is_closing",
        "_is_done",
        "_is_stream",
        "_last",
        "_left",
        "_raw",
        "_size",
        "_tail",
        "completion_tokens",
        "events",
        "is_complete",
        "sent",
        "status",
    )

    def __init__(self, is_stream: bool, expected: int | None, size: int | None = None) -> None:
        """`expected` is the number of content events of a mock's stream, None for other servers.

        `size` is that of the text of a mock's answer that is not streamed.
        """
        self._is_stream = is_stream
        self._expected = expected
        self._size = size
        self._raw = b""  # the head while it comes; a body that is not streamed
        self._chunks: Chunks | None = None
        self._left: int | None = None  # of a body with a length
        self._tail = b""  # an unfinished event
        self._last = b""  # the latest whole events
        self._is_done = False
        self._is_closing = False
        self.status = 0
        self.events = 0
        self.sent: list[int] = []
        self.completion_tokens: int | None = None  # as reported by another server than the mock
        self.is_complete = False

    @property
    def can_reuse(self) -> bool:
        """Whether the connection takes another request after this answer."""
        return self.is_complete and not self._is_closing

    def feed(self, data: bytes) -> int:
        """How many content events became whole. Raises AnswerError for what cannot be right."""
        if not self.status:
            body = self._feed_head(data)
            if body is None:
                return 0
            data = body
        payload = self._unframe(data)
        if not self._is_stream or self.status != 200:
            self._raw += payload
            return 0
        return self._feed_events(payload) if payload else 0

    def feed_eof(self) -> None:
        """The connection ended: right only where nothing else tells the end."""
        if self.status and self._chunks is None and self._left is None:
            self.is_complete = True
        if not self.is_complete:
            had = "an answer" if self.status else "a head"
            raise AnswerError("cut", f"expected the end of {had}, got the end of the connection")

    def finish(self) -> None:
        """Look at the whole answer. Raises AnswerError."""
        if self.status != 200:
            raise AnswerError(f"status_{self.status}", f"expected status 200, got {self.status}")
        if not self._is_stream:
            self._check_plain()
        elif _DONE in self._last and not self._is_done:
            raise AnswerError("after_done", "expected nothing after [DONE], got more events")
        elif not self._is_done or self._tail:
            raise AnswerError("no_done", "expected the stream to end with [DONE], got another end")
        elif self.events != self._expected and (self._expected is not None or not self.events):
            expected = self._expected if self._expected is not None else "some"
            message = f"expected {expected} content events, got {self.events}"
            raise AnswerError("event_count", message)

    # Head and framing

    def _feed_head(self, data: bytes) -> bytes | None:
        raw = self._raw + data if self._raw else data
        end = raw.find(b"\r\n\r\n") + 4
        if end == 3:
            if len(raw) > MAX_HEAD_BYTES:
                raise AnswerError("framing", "expected a head of 64 KB at most, got more")
            self._raw = raw
            return None
        self._raw = b""
        head = raw[:end]
        status = _STATUS.match(head)
        if status is None:
            raise AnswerError("framing", "expected an HTTP/1.1 status line, got another")
        if status[1][:1] == b"1":  # 100 Continue: the answer follows
            return self._feed_head(raw[end:])
        self.status = int(status[1])
        self._is_closing = _CLOSE.search(head) is not None or head.startswith(b"HTTP/1.0")
        if _CHUNKED.search(head):
            self._chunks = Chunks()
        elif length := _LENGTH.search(head):
            self._left = int(length[1])
            self.is_complete = not self._left
        else:
            self._is_closing = True
        return raw[end:]

    def _unframe(self, data: bytes) -> bytes:
        if self._chunks is not None:
            payload = self._chunks.feed(data)
            self.is_complete = self._chunks.is_complete
            return payload
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise AnswerError("framing", "expected nothing after the body, got bytes")
            self.is_complete = not self._left
        return data

    # Events

    def _feed_events(self, payload: bytes) -> int:
        if self._tail:
            payload = self._tail + payload
        if b"\r" in payload:  # JSON has none but escaped: so these are line ends
            payload = payload.replace(b"\r\n", b"\n")
        if payload[-2:] == b"\n\n":
            self._tail = b""
        else:
            end = payload.rfind(b"\n\n") + 2
            if end == 1:
                self._tail = payload
                return 0
            payload, self._tail = payload[:end], payload[end:]
        self._last = payload
        if self._is_done:
            raise AnswerError("after_done", "expected nothing after [DONE], got more events")
        if payload.endswith(_DONE):
            self._is_done = True
        if b'{"error"' in payload:
            raise AnswerError("error_event", "expected no error event, got one")
        count = self._parse_events(payload) if self._expected is None else self._count(payload)
        self.events += count
        return count

    def _count(self, payload: bytes) -> int:
        """Find the mock's marks, `~number@nanoseconds~`, without parsing anything."""
        marks = payload.split(b"~")[1::2]
        first, count = self.events, len(marks)
        if [mark[:6] for mark in marks] != _numbers(first, count):
            self._explain_order(marks, first)
        try:
            if count and marks[0][6:] == marks[-1][6:]:  # of one write, so all have the same
                self.sent = [int(marks[0][7:])] * count
            else:
                self.sent = [int(mark[7:]) for mark in marks]
        except ValueError:
            self._explain_order(marks, first)
        return count

    def _explain_order(self, marks: list[bytes], first: int) -> None:
        if all(_STAMPED.fullmatch(mark) for mark in marks):
            raise AnswerError("order", f"expected content event {first} to follow, got another")
        raise AnswerError("stamp", "expected the mock's number and timestamp in content, got none")

    def _parse_events(self, payload: bytes) -> int:
        """Content events of any server: a delta that holds something."""
        count, self.sent = 0, []
        for event in payload.split(b"\n\n"):
            lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
            data = b"\n".join(lines)
            if not data or data == b"[DONE]":
                continue
            try:
                count += self._parse_event(orjson.loads(data))
            except (orjson.JSONDecodeError, AttributeError, TypeError):
                raise AnswerError(
                    "invalid_event", "expected an event of JSON, got another"
                ) from None
        return count

    def _parse_event(self, event: dict[str, Any]) -> bool:
        if event.get("error"):
            raise AnswerError("error_event", "expected no error event, got one")
        if usage := event.get("usage"):
            self.completion_tokens = usage.get("completion_tokens")
        deltas = [choice.get("delta") or {} for choice in event.get("choices") or ()]
        return any(value for delta in deltas for name, value in delta.items() if name != "role")

    def _check_plain(self) -> None:
        try:
            body = orjson.loads(self._raw)
            text = body["choices"][0]["message"]["content"]
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError):
            raise AnswerError("invalid_body", "expected a completion, got another body") from None
        if self._size is not None and len(text) != self._size:
            message = f"expected a text of {self._size} bytes, got {len(text)}"
            raise AnswerError("body_size", message)


def _numbers(first: int, count: int) -> list[bytes]:
    if first + count <= len(_NUMBERS):
        return _NUMBERS[first : first + count]
    return [b"%06d" % number for number in range(first, first + count)]
