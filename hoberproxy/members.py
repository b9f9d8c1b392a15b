"""The top-level members of a JSON object as spans of its bytes: nothing below is decoded.

Whole documents are scanned at once (`scan_members`, and `scan_elements` for an array in them); one
that passes in pieces has one member replaced on its way (`MemberRewriter`). Whether the bytes are
valid JSON is orjson's business.

Neither steps through a string byte by byte or escape by escape: the next quote is looked for, and
what stands before it tells whether the string ends there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final, NamedTuple

import orjson

_QUOTE, _OPENING, _CLOSING_BRACE = ord('"'), frozenset(b"[{"), ord("}")
_FILL: Final = rb'[^"\[\]{}]*+'  # numbers, literals, commas, colons, whitespace
_PLAIN_STRING: Final = rb'"[^"]*+"'  # where escapes are hidden
_SHORT_STRING: Final = (
    rb'"[^"\\]*+(?>(?:\\[\x00-\xff][^"\\]*+)*)"'  # right for every string; 7 ns a byte
)
# Repeated groups are atomic, `(?>(?:…)*)`, instead of possessive, `(?:…)*+`: before Python 3.11.5
# the latter do not match when their body backtracks (CPython issue 106052), and Debian has 3.11.2.
# A quote behind no backslash ends a string, one behind a single backslash does not: 0.8 ns a byte.
# Only where a quote stands behind a longer run is the string read again the other way.
_STRING: Final = rb'(?:"[^"]*+(?>(?:(?<=[^\\]\\)"[^"]*+)*)(?<!\\)"|%b)' % _SHORT_STRING


def _container_pattern(levels: int, string: bytes) -> bytes:
    """Matches an object or array nested at most `levels` deep; never backtracks.

    Kinds of brackets are not paired: the input is valid JSON, or nobody relies on the answer.
    """
    pattern = rb"[\[{]%b(?>(?:%b%b)*)[\]}]" % (_FILL, string, _FILL)
    for _ in range(levels - 1):
        pattern = rb"[\[{]%b(?>(?:(?:%b|%b)%b)*)[\]}]" % (_FILL, string, pattern, _FILL)
    return pattern


def _walk_pattern(string: bytes) -> re.Pattern[bytes]:
    """Matches what fills a container, and behind it a run of brackets that may be empty.

    More than four levels at a step would only make a hostile body dearer: as it is, the worst
    found costs five times what orjson spends on it.
    """
    parts = (_FILL, string, _container_pattern(4, string), _FILL)
    return re.compile(rb"%b(?>(?:(?:%b|%b)%b)*)([\[{]++|[\]}]++|)" % parts)


# Eight levels hold real messages and most tool schemas in one step, as fast as orjson reads them;
# what is nested deeper matches as an empty value, and is walked.
_match_member: Final = re.compile(
    rb'[\s,{]*+(%b)\s*+:\s*+(%b|%b|[^\s,"\[\]{}]++|)'
    % (_SHORT_STRING, _STRING, _container_pattern(8, _STRING))
).match
_match_element: Final = re.compile(
    rb'[\s,]*+(%b|%b|[^\s,"\[\]{}]++|)' % (_STRING, _container_pattern(8, _STRING))
).match
_WALK: Final = _walk_pattern(_STRING)
_PLAIN_WALK: Final = _walk_pattern(_PLAIN_STRING)
MAX_KEPT_NAME: Final = 256  # characters
MAX_KEPT_NAMES: Final = 1024
_BACKSLASH: Final = 0x5C  # `in` takes a number at a tenth of the cost of bytes
_ORIGINAL_LIMIT_BYTES: Final = 4096  # no name of a model is longer
_SEPARATORS: Final = re.compile(rb"[\s,]*+")
_COLON: Final = re.compile(rb"[\s:]*+")
_SCALAR: Final = re.compile(rb"[^\s,}\]]*+")


class Member(NamedTuple):
    """One top-level member; offsets are in bytes from the start of the document."""

    name: str  # decoded: without quotes and escapes
    start: int  # of the name's opening quote
    value_start: int  # of the value's first byte
    end: int  # one past the value's last byte


def scan_members(data: bytes) -> list[Member]:
    """The top-level members in order, repeated names included.

    `data` must be an object that `orjson.loads` accepts; for other bytes the answer means nothing.
    """
    has_escapes = _BACKSLASH in data
    members = []
    new = tuple.__new__  # half the cost of Member(...), which is a quarter of a small body's
    position = data.find(b"{")
    while found := _match_member(data, position):
        start, name_end = found.span(1)
        value_start, position = found.span(2)
        if value_start == position:  # an empty match: nested deeper than the pattern
            position = _container_end(data, value_start)
        raw = data[start + 1 : name_end - 1]
        name = (
            orjson.loads(data[start:name_end])
            if has_escapes and _BACKSLASH in raw
            else raw.decode()
        )
        members.append(new(Member, (name, start, value_start, position)))
    return members


def model_member(name: str) -> bytes:
    """The member `model` with this value, as orjson writes it."""
    member = _model_members.get(name)
    if member is None:
        member = b'"model":%b' % orjson.dumps(name)
        if len(name) <= MAX_KEPT_NAME:  # clients choose them
            if len(_model_members) >= MAX_KEPT_NAMES:
                _model_members.clear()
            _model_members[name] = member
    return member


_model_members: Final[dict[str, bytes]] = {}  # the same few all the time


def scan_elements(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Where the elements of the array that opens at `start` begin and end, each when asked for.

    `data` must be a document that `orjson.loads` accepts; for other bytes the answer means nothing.
    """
    position = start + 1
    while found := _match_element(data, position):
        begin, position = found.span(1)
        if begin == position:  # an empty match: the array's end, or nested deeper than the pattern
            if data[begin] not in _OPENING:
                break
            position = _container_end(data, begin)
        yield begin, position


def _container_end(data: bytes, position: int) -> int:
    """The offset one past the container that opens at `position`."""
    depth = 1
    for found in _WALK.finditer(data, position + 1):
        start, end = found.span(1)
        depth = _depth_behind(data, start, end, depth)
        if depth <= 0:
            return end + depth  # the run may close outer containers too
    raise AssertionError("the document is no JSON: the caller has to check it before")


def _depth_behind(data: bytes, start: int, end: int, depth: int) -> int:
    """The depth behind a run of brackets of one direction."""
    return depth + end - start if data[start] in _OPENING else depth - end + start


def find_member(data: bytes, name: str) -> Member | None:
    """The member called `name`, the last one if it is repeated, as orjson has it."""
    for member in reversed(scan_members(data)):
        if member.name == name:
            return member
    return None


def replace_member(data: bytes, member: Member, value: bytes) -> bytes:
    """`data` with the member's value replaced by `value`, which is JSON; one copy."""
    view = memoryview(data)
    return b"".join((view[: member.value_start], value, view[member.end :]))


def _hide_escapes(data: bytes) -> bytes:
    """`data` with every escaped backslash and quote made "__": offsets stay as they are.

    A string then ends at the next quote, wherever the pieces are cut.
    """
    if _BACKSLASH not in data:
        return data
    return data.replace(b"\\\\", b"__").replace(b'\\"', b"__")


def _pass_over(pattern: re.Pattern[bytes], plain: bytes, position: int) -> int:
    found = pattern.match(plain, position)
    assert found  # these patterns match the empty string
    return found.end()


class _State(Enum):
    PREFIX = "before the object"
    BETWEEN = "between members"
    NAME = "in a name"
    COLON = "between name and value"
    SCALAR = "in a number or literal"
    VALUE = "in a string, object or array"
    REPLACED = "in the string that is replaced"
    PASSED = "behind the object, or it is none"


class MemberRewriter:
    """Replaces the string value of one top-level member in an object that passes in pieces.

    `name` and `capture` are the members' names in UTF-8, `value` is JSON. Bytes before the first
    `{` pass as they are, and so do those behind the object: a rewriter serves one object. A name
    given twice is replaced twice. A value that is not a string stays. What is no JSON passes
    unharmed, but for a string longer than 4 KB that never ends where the member's value should be.

    Held back is only the value being replaced, up to 4 KB: of a longer one the bytes are dropped
    as they come.
    """

    def __init__(
        self,
        name: bytes,
        value: bytes,
        *,
        capture: bytes | None = None,
        capture_limit_bytes: int = 16384,
    ) -> None:
        self.original: bytes | None = None  # raw JSON of the value replaced, if up to 4 KB
        self.captured: bytes | None = None  # raw JSON of the captured value, once complete
        self.is_complete = False  # the object was closed
        self._value = value
        self._target = name
        self._capture = capture
        self._capture_limit_bytes = capture_limit_bytes
        # A character of a name takes at most six bytes: \u006d. What is longer is another name.
        self._name_limit_bytes = 6 * max(len(name), len(capture or b"")) + 1
        self._state = _State.PREFIX
        self._has_pending_escape = False  # the last piece ended in an unpaired backslash
        self._name = b""  # raw, without quotes
        self._depth = 0  # containers open within the value
        self._is_in_string = False
        self._capturing: list[bytes] | None = None
        self._capturing_bytes = 0
        self._held = b""  # the value being replaced, as far as it came
        self._is_overlong = False  # it outgrew its limit and is dropped
        self._parts: list[bytes] = []  # output of this piece
        self._sent = 0  # where in this piece the output has come to
        self._steps: dict[_State, Callable[[bytes, bytes, int], int]] = {
            _State.PREFIX: self._feed_prefix,
            _State.BETWEEN: self._feed_between,
            _State.NAME: self._feed_name,
            _State.COLON: self._feed_colon,
            _State.SCALAR: self._feed_scalar,
            _State.VALUE: self._feed_value,
            _State.REPLACED: self._feed_replaced,
        }

    def feed(self, data: bytes) -> bytes:
        """What can be passed on now; `data` itself, uncopied, where nothing was replaced in it."""
        if not data or self._state is _State.PASSED:
            return data
        plain = self._hide_escapes(data)
        position = self._sent = 0
        while position < len(data) and (step := self._steps.get(self._state)):
            position = step(data, plain, position)
        if not self._sent:
            return data
        self._parts.append(data[self._sent :])
        passed = b"".join(self._parts)
        self._parts.clear()
        return passed

    def feed_eof(self) -> bytes:
        """What was still held: the beginning of a value that was cut."""
        held, self._held = self._held, b""
        self._state = _State.PASSED
        return held

    def _hide_escapes(self, data: bytes) -> bytes:
        if self._has_pending_escape and data[0] in b'"\\':
            data = b"_" + data[1:]
        plain = _hide_escapes(data)
        self._has_pending_escape = plain.endswith(b"\\")
        return plain

    # One step for each state: from an offset in the piece to the next, never beyond its end

    def _feed_prefix(self, data: bytes, plain: bytes, position: int) -> int:
        brace = plain.find(b"{", position)
        if brace < 0:
            return len(plain)
        self._state = _State.BETWEEN
        return brace + 1

    def _feed_between(self, data: bytes, plain: bytes, position: int) -> int:
        position = _pass_over(_SEPARATORS, plain, position)
        if position == len(plain):
            return position
        if plain[position] == _QUOTE:
            self._name = b""
            self._state = _State.NAME
        else:
            self.is_complete = plain[position] == _CLOSING_BRACE
            self._state = _State.PASSED
        return position + 1

    def _feed_name(self, data: bytes, plain: bytes, position: int) -> int:
        close = plain.find(b'"', position)
        stop = len(plain) if close < 0 else close
        room = self._name_limit_bytes - len(self._name)
        self._name += data[position : min(stop, position + room)]
        if close < 0:
            return stop
        self._state = _State.COLON
        return close + 1

    def _feed_colon(self, data: bytes, plain: bytes, position: int) -> int:
        position = _pass_over(_COLON, plain, position)
        if position == len(plain):
            return position
        first = plain[position]
        if first == _QUOTE and self._is_named(self._target):
            return self._begin_replaced(data, position)
        if self._capture is not None and self._is_named(self._capture):
            self.captured, self._capturing, self._capturing_bytes = None, [], 0
        self._is_in_string = first == _QUOTE
        self._depth = int(first in _OPENING)
        if not self._is_in_string and not self._depth:
            self._state = _State.SCALAR
            return position
        self._state = _State.VALUE
        self._collect(data, position, position + 1)
        return position + 1

    def _is_named(self, name: bytes) -> bool:
        if _BACKSLASH not in self._name:
            return self._name == name
        try:
            decoded: str = orjson.loads(b'"%b"' % self._name)
        except orjson.JSONDecodeError:  # cut at the limit, or no JSON
            return False
        return decoded.encode() == name

    def _feed_scalar(self, data: bytes, plain: bytes, position: int) -> int:
        end = _pass_over(_SCALAR, plain, position)
        self._collect(data, position, end)
        if end < len(plain):  # at the end of a piece the number may go on in the next
            self._end_value()
        return end

    def _feed_value(self, data: bytes, plain: bytes, position: int) -> int:
        start = position
        while position < len(plain):
            position = self._skip(plain, position)
            if not self._depth and not self._is_in_string:
                self._collect(data, start, position)
                self._end_value()
                return position
        self._collect(data, start, position)
        return position

    def _skip(self, plain: bytes, position: int) -> int:
        """Go behind the next quote or bracket that is not in a whole string or container."""
        if self._is_in_string:
            close = plain.find(b'"', position)
            self._is_in_string = close < 0
            return len(plain) if close < 0 else close + 1
        found = _PLAIN_WALK.match(plain, position)
        assert found  # it matches the empty string
        start, end = found.span(1)
        if start < end:
            self._depth = _depth_behind(plain, start, end, self._depth)
            if self._depth <= 0:
                end, self._depth = end + self._depth, 0
        elif end < len(plain):  # a quote: the string goes on in the next piece
            self._is_in_string = True
            end += 1
        return end

    # The captured value

    def _collect(self, data: bytes, start: int, end: int) -> None:
        if self._capturing is None:
            return
        self._capturing_bytes += end - start
        if self._capturing_bytes > self._capture_limit_bytes:
            self._capturing = None
        else:
            self._capturing.append(data[start:end])

    def _end_value(self) -> None:
        if self._capturing is not None:
            self.captured = b"".join(self._capturing)
            self._capturing = None
        self._state = _State.BETWEEN

    # The replaced value

    def _begin_replaced(self, data: bytes, position: int) -> int:
        self._parts.append(data[self._sent : position])
        self._sent = position + 1
        self._held = data[position : position + 1]
        self._is_overlong = False
        self._state = _State.REPLACED
        return position + 1

    def _feed_replaced(self, data: bytes, plain: bytes, position: int) -> int:
        close = plain.find(b'"', position)
        end = len(plain) if close < 0 else close + 1
        self._hold(data, end)
        self._sent = end
        if close < 0:
            return end
        if not self._is_overlong:
            self._parts.append(self._value)
            self.original, self._held = self._held, b""
        self._state = _State.BETWEEN
        return end

    def _hold(self, data: bytes, end: int) -> None:
        if self._is_overlong:
            return
        if len(self._held) + end - self._sent <= _ORIGINAL_LIMIT_BYTES:
            self._held += data[self._sent : end]
            return
        self._is_overlong = True
        self._held = b""
        self.original = None
        self._parts.append(self._value)
