"""Finds the top-level members of a request's body, at a bounded part of what its parse costs.

The scan of protocol/json_bytes.py is fast where strings are long, and up to fifty times slower than
orjson where they are short. Here orjson itself says where such a value ends: after it stands a
comma or a brace, and the error for that has its position; no object is made on the way to it.
`Survey` counts how many values a body has before any of them is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import orjson

from ..protocol.json_bytes import Member, scan_elements, scan_members

MAX_VALUES: Final = 200_000  # of any kind, on all levels: what 40 ms can make objects of
MAX_MEMBERS: Final = 256  # on the top level
_FEWEST_BYTES: Final = 2  # of a value and its comma
_COUNTED_BYTES: Final = 8 * 1024 * 1024  # at a stretch: some 10 ms

_SMALL_BYTES: Final = 4096  # a body that is scanned in any case, which takes 0.3 ms at most
_SCANNED_BYTES: Final = 64 * 1024  # the largest body that is scanned
_SPARSE: Final = 256  # bytes for each byte that the scan stops at
_DENSE: Final = 16  # likewise, in a text that costs less than its objects
_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 512
_HOPS: Final = 64
_HOP_BYTES: Final = 1024  # for each quote, where strings are long
_RUN_BYTES: Final = 64 * 1024
_PIECE_BYTES: Final = 256  # a value that is looked for by the scan
_SLACK_BYTES: Final = 256 * 1024  # that may be searched in vain on top of half a body
_TAIL_BYTES: Final = 4096  # of a body, where small members are after a large one
_TRIES: Final = 8  # occurrences of a name that are looked at

_ALL: Final = bytes(range(256))
_PLAIN: Final = bytes(set(_ALL) - set(b'"\\[]{},'))
_NO_VALUES: Final = bytes(set(_ALL) - set(b",[{"))
_NO_STRINGS: Final = bytes(set(_ALL) - set(b'",[{'))
# What may be escaped stays, so that only a quote after a backslash is one that was escaped.
_NO_ESCAPES: Final = bytes(set(_ALL) - set(b'"\\,[{/bfnrtu'))

_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_SPACES: Final = b" \t\n\r"
_match_name: Final = re.compile(
    rb'[ \t\n\r]*+,?+[ \t\n\r]*+("[^"\\]*+(?>(?:\\[\x00-\xff][^"\\]*+)*)")[ \t\n\r]*+:[ \t\n\r]*+'
).match
_match_scalar: Final = re.compile(rb'[^ \t\n\r,"\[\]{}]++').match
_match_string: Final = re.compile(rb'"[^"\\]*+"').match
_match_flat: Final = re.compile(rb'[\[{][^"\\\[\]{}]*+(?>(?:"[^"\\]*+"[^"\\\[\]{}]*+)*)[\]}]').match
_match_colon: Final = re.compile(rb"[ \t\n\r]*+:").match
_match_escapes: Final = re.compile(rb"\\*+[\x00-\xff]").match  # and one byte after them
_TRAILING: Final = "unexpected content after document"  # orjson's words
_loads: Final = orjson.loads


def may_have_too_many(data: bytes) -> bool:
    """Return whether `data` is long enough to have more values than a body may."""
    return len(data) > _FEWEST_BYTES * MAX_VALUES


class RepeatedName(Exception):
    """A top-level name is given again."""

    def __init__(self, name: str, start: int) -> None:
        super().__init__("a name is given twice")
        self.name = name
        self.start = start


class TangledMembers(Exception):
    """Names of top-level members occur below the top level too often to find where these end."""


# Values


class Survey:
    """A count of the values in a body before it is parsed: call `step` until it returns False.

    For a body that is no JSON the numbers mean nothing.
    """

    def __init__(self, data: bytes) -> None:
        self.values = 0  # an upper bound, once all is counted; 0 for a short body
        self._data = data
        self._count: Callable[[], bool] = self._count_between  # the next step
        self._start = 0
        self._in_string = 0
        self._has_long_strings = False

    @property
    def has_too_many(self) -> bool:
        """Return whether there are more values than a body may have."""
        return self.values > MAX_VALUES

    @property
    def can_be_scanned(self) -> bool:
        """Return whether the scan of json_bytes.py is fast: for a short body or long strings."""
        size = len(self._data)
        if size <= _SMALL_BYTES:
            return True
        if size > _SCANNED_BYTES:
            return False
        marks = self._data.translate(None, _PLAIN)
        # Behind two backslashes a quote may end a string, which the scan is slow to find.
        return len(marks) * _SPARSE <= size and b'\\\\"' not in marks

    @property
    def is_dense(self) -> bool:
        """Return whether, by samples, the objects of a value cost more than its text."""
        size = len(self._data)
        if self._has_long_strings:
            return self.values * _DENSE > size
        distance = max(size // _SAMPLES, _SAMPLE_BYTES)
        sample = b"".join([self._data[i : i + _SAMPLE_BYTES] for i in range(0, size, distance)])
        marks = sample.translate(None, _PLAIN)
        return (len(marks) - 2 * marks.count(b"\\")) * _DENSE > len(sample)

    def step(self) -> bool:
        """Count in some more megabytes, and return whether there are more."""
        if not may_have_too_many(self._data) or self.has_too_many:
            return False
        return self._count()

    def _count_between(self) -> bool:
        """Count from string to string; where strings are not long, start `_count_all`."""
        data, find, position = self._data, self._data.find, 0
        left = _HOPS  # and one more with each kilobyte
        while (opening := find(b'"', position)) >= 0:
            self.values += len(data[position:opening].translate(None, _NO_VALUES))
            position = opening + 1
            while True:
                closing = find(b'"', position)
                left -= 1
                if closing < 0 or left + position // _HOP_BYTES < 0:
                    self.values, self._count = 0, self._count_all
                    return True
                piece_start, position = position, closing + 1
                if data[closing - 1] != _BACKSLASH or _is_even(data[piece_start:closing]):
                    break
        self.values += len(data[position:].translate(None, _NO_VALUES))
        self._has_long_strings = True
        return False

    def _count_all(self) -> bool:
        """Count marks in strings too; if that makes too many, start `_count_outside`."""
        self.values += len(self._next_piece().translate(None, _NO_VALUES))
        if self.values > MAX_VALUES:
            self.values, self._start, self._count = 0, 0, self._count_outside
            return True
        return self._start < len(self._data)

    def _count_outside(self) -> bool:
        """Count outside of strings, which is exact and three times as dear as a parse."""
        piece = self._next_piece()
        if _BACKSLASH in piece:
            piece = piece.translate(None, _NO_ESCAPES)
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = piece.translate(None, _NO_STRINGS)
        quotes = marks.count(b'"')
        if quotes > 4 * MAX_VALUES:  # a value has one string, and perhaps a name
            self.values = MAX_VALUES + 1
            return False
        parts = marks.split(b'"')
        self.values += len(b"".join(parts[self._in_string :: 2]))
        self._in_string = (self._in_string + quotes) % 2
        return self._start < len(self._data)

    def _next_piece(self) -> bytes:
        data, start = self._data, self._start
        self._start = end = _cut(data, start + _COUNTED_BYTES)
        return data if end - start == len(data) else data[start:end]


def _is_even(piece: bytes) -> bool:
    """Return whether the backslashes at the end of `piece` escape each other."""
    end = len(piece)
    while True:
        start = max(end - _RUN_BYTES, 0)
        part = piece[start:end]
        if start and part.count(b"\\") == len(part):  # to strip them takes four times as long
            end = start
            continue
        run = len(piece) - end + len(part) - len(part.rstrip(b"\\"))
        return run % 2 == 0


def _cut(data: bytes, end: int) -> int:
    """Return a place at or after `end` that is not within an escape."""
    if end >= len(data):
        return len(data)
    found = _match_escapes(data, end - 1)
    return found.end() if found else end


# Members


def find_members(
    data: bytes, names: list[str], known: dict[int, int], survey: Survey
) -> list[Member]:
    """Return the top-level members of `data`, which have these `names` in this order.

    `data` must be an object that `orjson.loads` accepts. `known` has the ends of values by their
    beginnings, as far as the caller knows them; `survey` has counted `data`. Raises RepeatedName,
    and TangledMembers where the members' ends would cost more than the whole parse.
    """
    if survey.can_be_scanned:
        members = scan_members(data)
        _check_names(members, names)
        return members
    return _Search(data, names, known, survey.is_dense).members()


def _check_names(members: list[Member], names: list[str]) -> None:
    # A name that is repeated keeps its first place in the document.
    if len(members) != len(names):
        for place, member in enumerate(members):
            if place >= len(names) or member.name != names[place]:
                raise RepeatedName(member.name, member.start)


class _Search:
    """A walk through the members of a body that is dense with quotes, brackets or escapes."""

    def __init__(
        self, data: bytes, names: list[str], known: dict[int, int], is_dense: bool
    ) -> None:
        self._data = data
        self._is_dense = is_dense
        self._view = memoryview(data)
        self._names = names
        self._known = known
        self._left = len(data) // 2 + _SLACK_BYTES  # bytes that may be searched in vain

    def members(self) -> list[Member]:
        data, names = self._data, self._names
        members: list[Member] = []
        position = data.find(b"{") + 1
        while found := _match_name(data, self._behind_space(position)):
            start, name_end = found.span(1)
            name: str = _loads(data[start:name_end])
            place = len(members)
            if place >= len(names) or name != names[place]:
                raise RepeatedName(name, start)
            value_start = self._behind_space(found.end())
            following = names[place + 1] if place + 1 < len(names) else None
            position = self._end(value_start, following)
            members.append(Member(name, start, value_start, position))
        return members

    def _behind_space(self, position: int) -> int:
        """Return the place after a long run of space; a pattern takes three times as long."""
        data = self._data
        while data[position : position + _PIECE_BYTES].isspace():
            piece = data[position : position + _COUNTED_BYTES]
            position += len(piece) - len(piece.lstrip())
        return position

    def _end(self, start: int, following: str | None) -> int:
        data = self._data
        first = data[start]
        if first == _QUOTE:
            found = _match_string(data, start, start + _PIECE_BYTES)
        elif first == 0x5B or first == 0x7B:
            found = _match_flat(data, start, start + _PIECE_BYTES)
        else:
            found = _match_scalar(data, start)
        if found is not None:
            return found.end()
        end = self._known.get(start)
        return end if end is not None else self._long_end(start, following)

    def _long_end(self, start: int, following: str | None) -> int:
        """Return the end of the value at `start` that has the member `following` after it."""
        data = self._data
        stop = self._likely_stop(start, following)
        end = self._try(start, stop)
        if end < 0 and following is not None:
            self._spend(stop - start)
            stop = max(data.rfind(_token(following), start), stop)
            end = self._try(start, stop)
        if end < 0 and following is not None:
            self._spend(stop - start)
            stop = len(data) - 1
            end = self._try(start, stop)
        if end < 0:  # another orjson, with other words
            _, end = next(scan_elements(data, start - 1))
        self._spend(stop - end - _PIECE_BYTES)
        return end

    def _try(self, start: int, stop: int) -> int:
        """Return the end of the value at `start`, -1 if it does not end before `stop`."""
        # What is mostly text is parsed faster than an error is made, which holds the text.
        end = stop + 1 if self._is_dense else _before_comma(self._data, start, stop)
        return end_of_value(self._view, start, end)

    def _likely_stop(self, start: int, following: str | None) -> int:
        """Return a place after `start` where the member `following` may begin."""
        data = self._data
        if following is None:
            return data.rfind(b"}")
        token = _token(following)
        stop = data.rfind(token, max(start, len(data) - _TAIL_BYTES))
        if stop >= 0:
            return stop
        stop = data.find(token, start)
        for _ in range(_TRIES):
            if stop < 0 or _match_colon(data, stop + len(token)):
                break
            stop = data.find(token, stop + 1)
        return stop if stop >= 0 else len(data) - 1

    def _spend(self, amount: int) -> None:
        if amount > 0:
            self._left -= amount
            if self._left < 0:
                raise TangledMembers


def _token(name: str) -> bytes:
    return b'"%b"' % name.encode("utf-8", "replace")


def _before_comma(data: bytes, start: int, stop: int) -> int:
    """Return the place before `stop` and before the comma and space that precede it."""
    piece = data[max(start, stop - _PIECE_BYTES) : stop]
    rest = piece.rstrip(_SPACES).removesuffix(b",").rstrip(_SPACES)
    return stop - len(piece) + len(rest)


def end_of_value(view: memoryview, start: int, stop: int) -> int:
    """Return the offset one past the value at `start`, -1 if it ends after `stop`."""
    try:
        _loads(view[start:stop])
    except orjson.JSONDecodeError as exc:
        return end_by_error(exc, view, start, stop)
    return _value_end(view, start, stop)


def end_by_error(exc: orjson.JSONDecodeError, view: memoryview, start: int, stop: int) -> int:
    """Return the end of the value at `start`, if `exc` says that more stands after it.

    `exc` is of `view` from `start` to `stop`; -1 if it says anything else.
    """
    if exc.msg != _TRAILING:
        return -1
    return _value_end(view, start, start + _bytes_before(exc, stop - start))


def _bytes_before(exc: orjson.JSONDecodeError, size: int) -> int:
    """Return the error's position, which it has in characters, in bytes of a text of `size`."""
    text, position = exc.doc, exc.pos
    if len(text) == size:
        return position
    if 2 * position < len(text):
        return len(text[:position].encode())
    return size - len(text[position:].encode())


def _value_end(view: memoryview, start: int, end: int) -> int:
    """Return the place before `end` and before the space that precedes it."""
    if view[end - 1] not in _SPACES:
        return end
    return start + len(bytes(view[start:end]).rstrip(_SPACES))
