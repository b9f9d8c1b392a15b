"""How the streams of a model server end: like its last ones, but for the numbers of the usage.

What a server writes after the last text is nearly always the same: an event with the finish reason,
one with the usage, and [DONE]. An `Ending` keeps of the first two what stands behind a stream's own
identifier and time, and the document that was parsed of it. Another event with the same bytes
around other numbers is that document with other numbers: nothing else can have changed, and usage
is read from it as from any other. Whatever differs in any other way is parsed.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ..dialects.chat import content_of, is_usage_event
from ..protocol.json_bytes import find_member, load_json
from .event_edits import Edit, apply_edits

_BACKSLASH: Final = 0x5C
_ZERO: Final = 0x30
_NINE: Final = 0x39
_KEPT: Final = 4  # events: of the usual finish reasons, with tools and without, and of the usage
MAX_EVENT_BYTES: Final = 4096
_MAX_DIGITS: Final = 15
_FIRST_LESSONS: Final = 8
_UNLIKE_A_LESSON: Final = 64
# Whole numbers that are a value each; in a text they may look so too, which the lesson finds out.
_NUMBER: Final = re.compile(rb"(?<=[:\[, ])(?:0|[1-9][0-9]{0,14})(?=[,\]} ])")
_OTHER_NUMBER: Final = 700_000_001  # and the next ones, in place of those that came
_PAYLOAD_AT: Final = len(b"data: ")


def is_lesson(unlike: int) -> bool:
    """Whether to learn from an event that had to be parsed, being so many in number.

    A server whose events are always unlike is not learnt from each time.
    """
    return unlike <= _FIRST_LESSONS or unlike % _UNLIKE_A_LESSON == 0


def read_number(data: bytes, start: int) -> tuple[int, int]:
    """The number at this place, whole and without sign as JSON has it; its end, `start` if none."""
    number, at, last = 0, start, min(len(data), start + _MAX_DIGITS + 1)
    # By hand: it is compiled, and `isdigit` would be looked up by name.
    while at < last and _ZERO <= (digit := data[at]) <= _NINE:
        number = 10 * number + digit - _ZERO
        at += 1
    digits = at - start
    if digits > _MAX_DIGITS or (digits > 1 and data[start] == _ZERO):
        return 0, start
    return number, at


class LastEvent:
    """An event but for its lead, which is its stream's own, and for the numbers of its usage.

    `document` is that of the event found last.
    """

    __slots__ = (
        "_numbers",
        "_texts",
        "document",
        "finish_reason",
        "is_usage",
        "new_start",
        "start_size",
    )

    def __init__(
        self,
        texts: list[bytes],
        numbers: list[tuple[Any, Any]],
        document: dict[str, Any],
        new_start: bytes,
    ) -> None:
        """`texts` stand around the `numbers`, each an object or array and the place in it.

        `new_start` is what the client gets in place of the first text.
        """
        self._texts = texts
        self._numbers = numbers
        self.document = document
        self.new_start = new_start
        self.start_size = len(texts[0])
        self.finish_reason = content_of(document)[0]
        self.is_usage = is_usage_event(document)

    def find(self, data: bytes, start: int) -> int:
        """Where such an event ends whose lead ends at `start`; 0 if it is none."""
        texts, numbers = self._texts, self._numbers
        at = start
        for slot in range(len(texts)):
            text = texts[slot]
            end = at + len(text)
            if data[at:end] != text:
                return 0
            at = end
            if slot == len(numbers):
                break
            number, at = read_number(data, end)
            if at == end:
                return 0
            container, place = numbers[slot]
            container[place] = number
        return at


class Ending:
    """Of one model server's streams under one slug that have their shape in common."""

    __slots__ = ("_unlike", "events")

    def __init__(self) -> None:
        self.events: list[LastEvent] = []  # the oldest first
        self._unlike = 0  # events that were parsed

    def learn(self, event: bytes, document: dict[str, Any], lead: bytes, edits: list[Edit]) -> None:
        """Keep the form of an event behind the content that was parsed to `document`.

        Duty of the caller: it is one `data:` line and an empty one, both ended by LF, and begins
        with `lead`, the bytes of its stream alone. What the client sees of it differs by `edits`.
        """
        self._unlike += 1
        if not is_lesson(self._unlike):
            return
        if _BACKSLASH in event or len(event) > MAX_EVENT_BYTES:
            return
        if content_of(document)[1]:  # an answer's text is nothing to be kept, and never alike
            return
        last = _make_last_event(event, document, len(lead), edits)
        # Nothing is taken for granted.
        if last is not None and last.find(event, len(lead)) == len(event):
            self.events = [*self.events[1 - _KEPT :], last]


def _make_last_event(
    event: bytes, document: dict[str, Any], lead_size: int, edits: list[Edit]
) -> LastEvent | None:
    """The form of an event; None if it is not sure what stands where."""
    spans = _find_numbers(event, document)
    renumbered = _renumbered(event, spans)
    if renumbered is None:
        return None
    numbers = _find_others(renumbered.get("usage"))
    if [container[place] for container, place in numbers] != list(_others(len(spans))):
        return None
    for (container, place), (start, end) in zip(numbers, spans, strict=True):
        container[place] = int(event[start:end])
    stops = [lead_size, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(event)]
    texts = [event[stop:start] for stop, start in zip(stops, starts, strict=True)]
    if event.count(b'"model"') != len([new for _, _, new in edits if new]):
        return None
    for start, end, _ in edits:
        if start < lead_size or end > lead_size + len(texts[0]):
            return None
    new_start = apply_edits(event[: lead_size + len(texts[0])], edits)[lead_size:]
    return LastEvent(texts, numbers, renumbered, new_start)


def _find_numbers(event: bytes, document: dict[str, Any]) -> list[tuple[int, int]]:
    """Where in the event the whole numbers of its usage seem to be."""
    if not isinstance(document.get("usage"), dict):
        return []
    member = find_member(event[_PAYLOAD_AT:-2], "usage")
    if member is None:
        return []
    start, end = member.value_start + _PAYLOAD_AT, member.end + _PAYLOAD_AT
    return [found.span() for found in _NUMBER.finditer(event, start, end)]


def _renumbered(event: bytes, spans: list[tuple[int, int]]) -> dict[str, Any] | None:
    """The document with another number in each of these places."""
    parts: list[bytes] = []
    at = _PAYLOAD_AT
    for (start, end), other in zip(spans, _others(len(spans)), strict=True):
        parts += (event[at:start], b"%d" % other)
        at = end
    parts.append(event[at:-2])
    try:
        document = load_json(b"".join(parts))
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _others(count: int) -> range:
    return range(_OTHER_NUMBER, _OTHER_NUMBER + count)


def _find_others(value: Any) -> list[tuple[Any, Any]]:
    """Where these are in it, in order: the object or array, and the place in it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for place, each in items:
            if type(each) is int and each >= _OTHER_NUMBER:
                found.append((value, place))
            else:
                found += _find_others(each)
    return found
