"""JSON on bytes: members as spans that can be replaced, and documents as model servers write them.

`scan_members` and `scan_elements` decode nothing below the level that they scan, and leave it to
orjson whether the bytes are valid JSON. Neither steps through a string byte by byte or escape by
escape: they look for the next quote, and what stands before it says whether the string ends there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import orjson

_QUOTE, _OPENING, _CLOSING_BRACE = ord('"'), frozenset(b"[{"), ord("}")
_FILL: Final = rb'[^"\[\]{}]*+'  # numbers, literals, commas, colons, whitespace
_SHORT_STRING: Final = (
    rb'"[^"\\]*+(?>(?:\\[\x00-\xff][^"\\]*+)*)"'  # right for every string; 7 ns a byte
)
# Repeated groups are atomic, `(?>(?:…)*)`, instead of possessive, `(?:…)*+`: before Python 3.11.5
# the latter do not match when their body backtracks (CPython issue 106052), and Debian has 3.11.2.
# A quote behind no backslash ends a string, one behind a single backslash does not: 0.8 ns a byte.
# Only where a quote stands behind a longer run is the string read again the other way.
_STRING: Final = rb'(?:"[^"]*+(?>(?:(?<=[^\\]\\)"[^"]*+)*)(?<!\\)"|%b)' % _SHORT_STRING


def _container_pattern(levels: int, string: bytes) -> bytes:
    """Return a pattern of objects and arrays nested at most `levels` deep; it never backtracks.

    It does not pair kinds of brackets: the input is valid JSON, or nobody relies on the answer.
    """
    pattern = rb"[\[{]%b(?>(?:%b%b)*)[\]}]" % (_FILL, string, _FILL)
    for _ in range(levels - 1):
        pattern = rb"[\[{]%b(?>(?:(?:%b|%b)%b)*)[\]}]" % (_FILL, string, pattern, _FILL)
    return pattern


def _walk_pattern(string: bytes) -> re.Pattern[bytes]:
    """Return a pattern of what fills a container, and behind it a run of brackets or nothing.

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
_BACKSLASH: Final = 0x5C  # `in` takes a number at a tenth of the cost of bytes


class Member(NamedTuple):
    """A top-level member of a document; offsets are in bytes from the document's start."""

    name: str  # decoded: without quotes and escapes
    start: int  # of the name's opening quote
    value_start: int  # of the value's first byte
    end: int  # one past the value's last byte


def scan_members(data: bytes) -> list[Member]:
    """Return the top-level members of `data` in order, repeated names included.

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
    """Return the member `model` with the value `name`, as orjson writes it."""
    return b'"model":%b' % orjson.dumps(name)


def scan_elements(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each element of the array in `data` that opens at `start`.

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
    """Return the offset one past the container that opens at `position`."""
    depth = 1
    for found in _WALK.finditer(data, position + 1):
        start, end = found.span(1)
        depth = _depth_behind(data, start, end, depth)
        if depth <= 0:
            return end + depth  # the run may close outer containers too
    raise AssertionError("the document is no JSON: the caller has to check it before")


def _depth_behind(data: bytes, start: int, end: int, depth: int) -> int:
    """Return the depth behind a run of brackets of one direction, `depth` being that before it."""
    return depth + end - start if data[start] in _OPENING else depth - end + start


def find_member(data: bytes, name: str) -> Member | None:
    """Return the member called `name`, as orjson does the last one of several, or None."""
    for member in reversed(scan_members(data)):
        if member.name == name:
            return member
    return None


def replace_member(data: bytes, member: Member, value: bytes) -> bytes:
    """Return `data`, copied once, with `value`, which is JSON, in place of the member's value."""
    view = memoryview(data)
    return b"".join((view[: member.value_start], value, view[member.end :]))


# JSON as model servers write it. Those that cut text into tokens send half an emoji as a lone
# surrogate ("\ud83d"), and some send NaN among the logprobs; orjson takes neither, the SDKs read
# both, so we must. Requests are held to the strict form.


def load_json(data: bytes) -> Any:
    """Return the value of `data`. Raises ValueError, without the data, if it is not JSON at all."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("expected JSON, got something else or a part of it") from None


def dump_json(value: Any) -> bytes:
    """Return `value` as JSON; lone surrogates stay what they were."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(value, separators=(",", ":")).encode()
