"""Finds the values of an event that may differ in others of its kind.

Those are values of which the scanner learns nothing, and the numbers of a usage. Both templates are
made of what is found (relay/content_template.py, relay/edge_templates.py).
"""

from __future__ import annotations

from typing import Final

from ..dialects.chat import NO_CONTENT
from ..protocol.byte_template import COUNT, NUMBER, NUMBERS, OBJECT, STRING, TEXT, value_end

# As numbers: see docs/mypyc.md.
_QUOTE: Final = 0x22
_MINUS: Final = 0x2D
_ZERO: Final = 0x30
_NINE: Final = 0x39
_COLON: Final = 0x3A
_OPENING_BRACKET: Final = 0x5B
_BACKSLASH: Final = 0x5C
_CLOSING_BRACKET: Final = 0x5D
_OPENING_BRACE: Final = 0x7B
_CLOSING_BRACE: Final = 0x7D
_SPACE: Final = 0x20

# Where in an event a value stands. Of what is in OTHER none may differ.
_OUTSIDE: Final = 0
TOP: Final = 1
_CHOICES: Final = 2
_CHOICE: Final = 3
_DELTA: Final = 4
_LOGPROBS: Final = 5
USAGE: Final = 6
TIMINGS: Final = 7  # llama.cpp's, in place of a usage
_OTHER: Final = 8
_INSIDE: Final = {
    (TOP, b"choices"): _CHOICES,
    (TOP, b"usage"): USAGE,
    (TOP, b"timings"): TIMINGS,
    (_CHOICE, b"delta"): _DELTA,
    (_CHOICE, b"logprobs"): _LOGPROBS,
}
# Members of the event from which the scanner learns something.
_READ: Final = frozenset(
    (b"model", b"object", b"type", b"error", b"base_resp", b"x_groq", b"timings")
)
_NO_CONTENT: Final = frozenset([name.encode() for name in NO_CONTENT])


Found = tuple[int, int, int, int, bytes]
"""Where a value begins and ends, its kind, in what it stands, and under which name."""


def find_values(event: bytes, at: int, *, usages: tuple[bytes, ...] = ()) -> list[Found] | None:
    """Where in an event values stand that may differ; None if its names may be others than seem.

    The event has been parsed, from `at` on. Of its members those in `usages` are one value each.
    """
    found: list[Found] = []
    outer: list[int] = []
    where, name, size = _OUTSIDE, b"", len(event)
    # By hand: it is compiled, and a stream's first events have to be cheap, too.
    while at < size:
        byte, start = event[at], at
        at += 1
        if byte == _QUOTE:
            start += 1
            at = value_end(event, start, TEXT) + 1
            if _is_colon_next(event, at):
                name = event[start : at - 1]
                if _BACKSLASH in name:
                    return None
            elif (kind := _string_kind(where, name)) >= 0:
                found.append((start, at - 1, kind, where, name))
        elif byte == _OPENING_BRACE and where == TOP and name in usages:
            at = value_end(event, start, OBJECT)
            if at < 0:
                return None
            found.append((start, at, OBJECT, where, name))
        elif byte == _OPENING_BRACE or byte == _OPENING_BRACKET:
            outer.append(where)
            where = _inside(where, name, byte)
            if byte == _OPENING_BRACKET and where == _LOGPROBS:
                end = value_end(event, at, NUMBERS)
                if at < end and event[end] == _CLOSING_BRACKET:
                    found.append((at, end, NUMBERS, where, name))
                    at = end
        elif byte == _CLOSING_BRACE or byte == _CLOSING_BRACKET:
            where = outer.pop()
        elif byte == _MINUS or _ZERO <= byte <= _NINE:
            at = value_end(event, start, NUMBER)
            if at < 0:
                return None
            kind = _number_kind(where, name)
            if kind >= 0 and (kind == NUMBER or value_end(event, start, COUNT) == at):
                found.append((start, at, kind, where, name))
    return found


def _is_colon_next(event: bytes, at: int) -> bool:
    while event[at] == _SPACE:
        at += 1
    return event[at] == _COLON


def _inside(where: int, name: bytes, bracket: int) -> int:
    """Where the values stand that are within an object or array of this name."""
    if where == _OUTSIDE:
        return TOP
    if where == _CHOICES:
        return _CHOICE if bracket == _OPENING_BRACE else _OTHER
    return where if where >= _DELTA else _INSIDE.get((where, name), _OTHER)


def _string_kind(where: int, name: bytes) -> int:
    """The kind of a string that may differ; -1 if it may not."""
    if where == _DELTA:
        return -1 if name in _NO_CONTENT else TEXT
    if where == _CHOICE and name == b"text":
        return TEXT
    return STRING if where == _LOGPROBS or (where == TOP and name not in _READ) else -1


def _number_kind(where: int, name: bytes) -> int:
    """The kind of a number that may differ; -1 if it may not."""
    if where == USAGE:
        return NUMBER if b"cost" in name else COUNT
    if where == TIMINGS:
        return COUNT if name[-2:] == b"_n" else NUMBER
    if where == TOP:
        return -1 if name in _READ else NUMBER
    if where == _DELTA:
        return -1 if name == b"error" else NUMBER
    return NUMBER if where == _LOGPROBS or (where == _CHOICE and name == b"index") else -1
