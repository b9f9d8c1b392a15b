"""Heads equal to an earlier one but for some values, recognised by their bytes and not parsed."""

from __future__ import annotations

import re
from typing import Final

from .http_head import (
    FramingKind,
    RequestHead,
    ResponseHead,
    parse_response_head,
    split_lines,
)

MAX_PLAIN_DIGITS: Final = 15  # always less than MAX_LENGTH
MAX_KEPT_HEAD_BYTES: Final = 4 * 1024  # of a response; a longer one makes no pattern
MAX_PATTERNS: Final = 4  # of one server's heads: of streams, of bodies

_ZERO: Final = 0x30
_NINE: Final = 0x39
_SPACE: Final = 0x20
_TILDE: Final = 0x7E
# What else than its length settles how a response is read, and whether its connection goes on.
_TELLING_NAMES: Final = frozenset(
    (b"transfer-encoding", b"connection", b"keep-alive", b"content-type", b"content-encoding")
)
_LENGTH: Final = FramingKind.LENGTH  # as a global: see docs/mypyc.md


class RepeatedHead:
    """A request's head that comes again with another length, as SDKs send it on a kept connection.

    It is compared as bytes and not parsed: 0.5 µs instead of 6.
    """

    __slots__ = ("_after", "_before", "head", "length")

    def __init__(self, head: RequestHead, before: bytes, after: bytes) -> None:
        self.head = head  # the first one, with its length
        self.length = 0  # of the body behind the head that was found last
        self._before = before  # up to the digits of content-length
        self._after = after

    def find(self, data: bytes) -> int:
        """Return the offset past this head at the beginning of `data`, 0 if it is not all there.

        A head whose length `parse_request_head` refuses is not found.
        """
        # Slices and numbers, no methods of bytes: see docs/mypyc.md.
        if not data.startswith(self._before):
            return 0
        start = stop = len(self._before)
        length, last = 0, min(len(data), start + 9)
        while stop < last and _ZERO <= (digit := data[stop]) <= _NINE:
            length = 10 * length + digit - _ZERO
            stop += 1
        end = stop + len(self._after)
        if stop == start or data[stop:end] != self._after:
            return 0
        self.length = length
        return end


_LENGTH_LINE: Final = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9]+)")


def repeated_head(head: RequestHead, raw: bytes) -> RepeatedHead | None:
    """Return `head`, which was read from `raw`, to be compared with the next one.

    None if it has no content-length.
    """
    found = _LENGTH_LINE.search(raw) if head.kind is _LENGTH else None
    return None if found is None else RepeatedHead(head, raw[: found.start(1)], raw[found.end(1) :])


class _Pattern:
    """A head but for the values of the fields whose lines are at `_places` among its lines."""

    __slots__ = ("_names", "_places", "_texts", "found", "known", "lines")

    def __init__(self, head: ResponseHead, lines: list[bytes], places: list[int]) -> None:
        self.known = self.found = head
        self.lines = lines  # as they are in `head`
        self._places = places
        self._names = [head.headers[place - 1][0] for place in places]
        self._texts: list[bytes] = []  # before and behind the values
        text = b""
        for place, line in enumerate(lines):
            if place in places:
                value = head.headers[place - 1][1]
                start = line.index(value, line.index(b":") + 1)
                self._texts.append(text + line[:start])
                text = line[start + len(value) :] + b"\r\n"
            else:
                text += line + b"\r\n"
        self._texts.append(text + b"\r\n")

    def find(self, data: bytes) -> int:
        """Return the end of such a head at the beginning of `data`, 0 without one; see `found`."""
        texts, names, known, size = self._texts, self._names, self.known, len(data)
        values: list[bytes] = []
        length = known.length
        at = 0
        for slot in range(len(texts)):
            text = texts[slot]
            start = at + len(text)
            if data[at:start] != text:
                return 0
            at = start
            if slot == len(names):
                break
            # A loop, no expression: see docs/mypyc.md.
            while at < size and _SPACE <= data[at] <= _TILDE:
                at += 1
            if at == start or at == size or data[start] == _SPACE or data[at - 1] == _SPACE:
                return 0
            value = data[start:at]
            if names[slot] == b"content-length":
                if not value.isdigit() or len(value) > MAX_PLAIN_DIGITS:
                    return 0
                length = int(value)
            values.append(value)
        if at > MAX_KEPT_HEAD_BYTES:
            return 0
        self.found = known.varied(names, values, length) if values else known
        return at

    def widened(self, head: ResponseHead, lines: list[bytes]) -> _Pattern | None:
        """Return a pattern of this one's heads and of `head`; None if they differ in more."""
        if len(lines) != len(self.lines) or lines[0] != self.lines[0]:
            return None
        places = []
        for place in range(1, len(lines)):
            name = head.headers[place - 1][0]
            if name != self.known.headers[place - 1][0]:
                return None
            if place in self._places:
                places.append(place)
            elif lines[place] != self.lines[place]:
                if name in _TELLING_NAMES:
                    return None
                places.append(place)
        return _Pattern(head, lines, places)


class ResponseHeads:
    """The heads that one model server sends: each repeats an earlier one but for some values.

    They are compared as bytes and not parsed: 0.2 µs instead of 1.
    """

    __slots__ = ("_patterns", "head")

    def __init__(self) -> None:
        self._patterns: list[_Pattern] = []  # the oldest first
        self.head: ResponseHead | None = None  # the one that was found last

    def find(self, data: bytes) -> int:
        """Return the offset past a known head at the beginning of `data`, 0 if there is none."""
        for pattern in self._patterns:
            end = pattern.find(data)
            if end:
                self.head = pattern.found
                return end
        return 0

    def parse(self, raw: bytes) -> ResponseHead:
        """Return the head in `raw` as `parse_response_head` does, and know it again."""
        head = parse_response_head(raw)
        # Each name once, or it would not be sure whose value is whose.
        is_plain = head.status == 200 and len(head._first) == len(head.headers)
        if is_plain and len(raw) <= MAX_KEPT_HEAD_BYTES:
            self._learn(head, split_lines(raw))
        return head

    def _learn(self, head: ResponseHead, lines: list[bytes]) -> None:
        patterns = self._patterns
        for place, pattern in enumerate(patterns):
            if (wider := pattern.widened(head, lines)) is not None:
                patterns[place] = wider
                return
        self._patterns = [*patterns[1 - MAX_PATTERNS :], _Pattern(head, lines, [])]
