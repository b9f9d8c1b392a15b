"""Finds and makes the edits of an event: the catalog's slug for `model`, and no `usage` of null.

An edit is a span of bytes and the bytes to put in its place. Only members of the event's own object
are edited, never those of an object within it. Counted names or a scan of all members prove which
it is; without a proof nothing is edited.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from ..protocol.json_bytes import load_json, model_member, scan_members
from ..protocol.sse import Data

Edit = tuple[int, int, bytes]  # the span's beginning and end, and the new bytes

MODEL_VALUE_AT: Final = len(b'"model":')
_MODEL: Final = b'"model"'
_USAGE: Final = b'"usage"'
_NULL_USAGES: Final = (b'"usage":null', b'"usage": null')
_WHITE: Final = b" \t\n\r"
_QUOTE: Final = 0x22
_COMMA: Final = 0x2C


class Editor:
    """Finds the edits of one stream's events.

    `slug` is the model's name for the client, as JSON; `model` is the upstream's name for it, ""
    until an event has had one.
    """

    __slots__ = ("_wants_usage", "model", "slug")

    def __init__(self, slug: str, *, wants_usage: bool) -> None:
        self.slug = model_member(slug)[MODEL_VALUE_AT:]  # orjson's own keeps 4 KB, however short
        self.model = ""
        self._wants_usage = wants_usage

    def note_model(self, raw: bytes) -> None:
        """Keep the upstream's first name for the model, `raw` as JSON."""
        if not self.model:
            self.model = decode_string(raw)

    def find_edits(self, payload: bytes, document: dict[str, Any]) -> list[Edit]:
        """Return the edits of an event's JSON, whose value is `document`."""
        if may_escape_names(payload):
            return self._scan_edits(payload)
        edits: list[Edit] = []
        names = payload.count(b'"model"')
        if names:
            start, end = find_model(payload, document) if names == 1 else (0, 0)
            if not end:
                return self._scan_edits(payload)
            self.note_model(payload[start:end])
            edits.append((start, end, self.slug))
        usages = payload.count(b'"usage"') if not self._wants_usage else 0
        if usages == 1 and document.get("usage", True) is not None:
            usages = 0  # it is an object, or not the object's own
        if usages:
            start, end = find_null_usage(payload)
            if not end:
                return self._scan_edits(payload)
            edits += cut_member(payload, start, end)
            edits.sort()
        return edits

    def _scan_edits(self, payload: bytes) -> list[Edit]:
        edits = scan_edits(payload, self.slug, wants_usage=self._wants_usage)
        for start, end, new in edits:
            if new:
                self.note_model(payload[start:end])
        return edits


def apply_edits(event: bytes, edits: list[Edit]) -> bytes:
    """Return `event` with all `edits` made, which are in order and do not overlap."""
    if not edits:
        return event
    parts: list[bytes] = []
    at = 0
    for start, end, new in edits:
        parts += (event[at:start], new)
        at = end
    parts.append(event[at:])
    return b"".join(parts)


def may_escape_names(payload: bytes) -> bool:
    r"""Return whether a name such as `model` or `error` may be written with escapes in it.

    Lower-case letters are \u0061 to \u007a and the underscore is \u005f; é and CJK are others.
    """
    find = payload.find
    if find(b"\\u00") < 0:
        return False
    return (
        find(b"\\u006") >= 0
        or find(b"\\u007") >= 0
        or find(b"\\u005f") >= 0
        or (find(b"\\u005F") >= 0)
    )


def find_model(payload: bytes, document: dict[str, Any]) -> tuple[int, int]:
    """Return the span of the value of member `model`; (0, 0) if not sure.

    This is a search, faster than a scan, for JSON with the value `document` and no escaped names.
    """
    model = document.get("model")
    if isinstance(model, str) and model.isascii() and payload.count(_MODEL) == 1:
        value = orjson.dumps(model)
        start = payload.find(_MODEL) + MODEL_VALUE_AT
        if payload[start : start + 1] == b" ":  # the two usual writers of JSON
            start += 1
        end = start + len(value)
        if payload[start:end] == value:
            return start, end
    return 0, 0


def find_null_usage(payload: bytes) -> tuple[int, int]:
    """Return the span of a `usage` of null, on any level; (0, 0) unless there is exactly one."""
    if payload.count(_USAGE) == 1:
        for member in _NULL_USAGES:
            place = payload.find(member)
            if place >= 0:
                return place, place + len(member)
    return 0, 0


def cut_member(payload: bytes, start: int, end: int) -> list[Edit]:
    """Return the edits that take out the member at `start` to `end`, and one comma.

    It is the comma before the member, with the white space between; for the first member of the
    object it is the comma after it.
    """
    place = start - 1
    while place >= 0 and payload[place] in _WHITE:
        place -= 1
    if place >= 0 and payload[place] == _COMMA:
        return [(place, end, b"")]
    place = end
    while place < len(payload) and payload[place] in _WHITE:
        place += 1
    if place < len(payload) and payload[place] == _COMMA:
        if place == end:
            return [(start, end + 1, b"")]
        return [(start, end, b""), (place, place + 1, b"")]
    return [(start, end, b"")]


def scan_edits(payload: bytes, slug: bytes, *, wants_usage: bool) -> list[Edit]:
    """Return all edits of an object that `load_json` takes; `slug` is the new name as JSON."""
    edits: list[Edit] = []
    members = scan_members(payload)
    is_kept = False  # any member so far stays
    drops_comma = False  # the comma before the next member is taken out
    for number in range(len(members)):
        member = members[number]
        if drops_comma and number:
            place = payload.find(b",", members[number - 1].end)
            edits.append((place, place + 1, b""))
        start, end = member.value_start, member.end
        is_dropped = not wants_usage and member.name == "usage" and payload[start:end] == b"null"
        if is_dropped:
            begin = member.start
            if is_kept:
                begin = payload.find(b",", members[number - 1].end)
            edits.append((begin, end, b""))
        elif member.name == "model" and payload[start] == _QUOTE:
            edits.append((start, end, slug))
        is_kept = is_kept or not is_dropped
        drops_comma = not is_kept
    return edits


def place_edits(data: Data, edits: list[Edit]) -> list[Edit]:
    """Return `edits` of the payload of `data` as edits of the event around it."""
    if len(data.starts) == 1:
        offset = data.starts[0]
        return [(start + offset, end + offset, new) for start, end, new in edits]
    placed: list[Edit] = []
    for start, end, new in edits:
        at = start
        while at < end:  # a member may be on several lines, a string cannot
            line_end = data.payload.find(b"\n", at, end)
            stop = end if line_end < 0 else line_end
            if at < stop:
                first = data.place_of(at)
                placed.append((first, first + stop - at, new))
            at = stop + 1
    return placed


def parse_json(payload: bytes) -> Any:
    """Return the value of an event's JSON; None if `payload` is no JSON."""
    try:
        return load_json(payload)
    except ValueError:
        return None


def decode_string(raw: bytes) -> str:
    """Return the text of a JSON string; "" if `raw` is no JSON string."""
    value = parse_json(raw)
    return value if isinstance(value, str) else ""
