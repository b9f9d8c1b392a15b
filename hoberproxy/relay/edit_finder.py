"""Finds the edits of a stream's events, most of them by what earlier events had in common.

An upstream writes the member `model` alike in all events of a stream, and often all bytes before
it. An event that begins with the same bytes has its model's name in the same place.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ..protocol.json_bytes import load_json, model_member
from .event_edits import (
    MODEL_VALUE_AT,
    Edit,
    cut_member,
    find_model,
    find_null_usage,
    is_in_object_itself,
    may_escape_names,
    scan_edits,
)

_DATA: Final = b"data: "
_LF_LF: Final = b"\n\n"
_HEAD_BYTES: Final = 1024  # a longer one is not kept
# A `usage` of null with no bracket after it but the last: a member of the object itself.
_LAST_NULL: Final = re.compile(rb', ?"usage": ?null(?=[^{}\[\]\\\r\n]*+\}\n\n)')


class Editor:
    """Finds the edits of one stream's events.

    `slug` is the model's name for the client, as JSON; `model` is the upstream's name for it, ""
    until an event has had one.
    """

    __slots__ = ("_head", "_head_at", "_wants_usage", "model", "pattern", "slug", "value_at")

    def __init__(self, slug: str, *, wants_usage: bool) -> None:
        self.slug = model_member(slug)[MODEL_VALUE_AT:]  # orjson's own keeps 4 KB, however short
        self.model = ""
        self.pattern = b""  # the member `"model":"…"` as this upstream writes it
        self.value_at = 0  # place of the value in `pattern`
        self._head = b""  # the bytes of an event's JSON up to the end of this member
        self._head_at = 0  # place of the value in `_head`; `pattern` may be of a later event
        self._wants_usage = wants_usage

    def note_model(self, raw: bytes) -> None:
        """Keep the upstream's first name for the model, `raw` as JSON."""
        if not self.model:
            self.model = decode_string(raw)

    def edit_alike(self, data: bytes) -> bytes | None:
        """Return whole events as the client gets them; None if the edits have to be searched for.

        They need not be where each event is one `data: ` line that begins with the bytes of an
        earlier event, up to the end of its `model`.
        """
        head = _DATA + self._head
        if not self._head or not data.startswith(head):
            return None
        count = data.count
        events = count(_LF_LF)
        if (
            count(_LF_LF + head) != events - 1
            or count(b"\n") != 2 * events
            or count(b'"model"') != events
            or count(b'"choices"') != events
            or may_escape_names(data)
        ):
            return None
        new_head = head[: len(_DATA) + self._head_at] + self.slug
        passed = data if new_head == head else data.replace(head, new_head)
        if not self._wants_usage and (nulls := count(b'"usage"')):
            passed, cut = _LAST_NULL.subn(b"", passed)
            if cut != nulls:
                return None
        return passed

    def find_edits(self, payload: bytes, document: Any) -> list[Edit]:
        """Return the edits of an event's JSON; `document` is its value, None if not parsed."""
        is_read = isinstance(document, dict)
        if is_read and may_escape_names(payload):
            return self._scan_edits(payload, document)
        edits: list[Edit] = []
        names = payload.count(b'"model"')
        if names:
            start, end = self._find_model(payload, document) if names == 1 else (0, 0)
            if not end:
                return self._scan_edits(payload, document)
            edits.append((start, end, self.slug))
        usages = payload.count(b'"usage"') if not self._wants_usage else 0
        if usages == 1 and is_read and document.get("usage", True) is not None:
            usages = 0  # it is an object, or not the object's own
        if usages:
            start, end = find_null_usage(payload)
            if not end or not (is_read or is_in_object_itself(payload, start, end)):
                return self._scan_edits(payload, document)
            edits += cut_member(payload, start, end)
            edits.sort()
        return edits

    def _find_model(self, payload: bytes, document: Any) -> tuple[int, int]:
        """Return the span of the name in JSON with one `"model"`; (0, 0) if a scan is needed."""
        head, pattern = self._head, self.pattern
        if head and payload.startswith(head):
            return self._head_at, len(head)
        if isinstance(document, dict):
            start, value_start, end = find_model(payload, document)
        else:
            start = payload.find(pattern) if pattern else -1
            end = start + len(pattern)
            if start < 0 or not is_in_object_itself(payload, start, end):
                return 0, 0
            value_start = start + self.value_at
        if end:
            self._note_pattern(payload, start, value_start, end)
        return value_start, end

    def _scan_edits(self, payload: bytes, document: Any) -> list[Edit]:
        if document is None:
            # The scan needs JSON, and this payload may not have been parsed.
            document = parse_json(payload)
        if not isinstance(document, dict):
            return []
        edits = scan_edits(payload, self.slug, wants_usage=self._wants_usage)
        for value_start, end, new in edits:
            if new:
                start = payload.rfind(b'"model"', 0, value_start)
                if start >= 0 and payload[start + 7 : value_start].strip() == b":":
                    self._note_pattern(payload, start, value_start, end)
                else:
                    self.note_model(payload[value_start:end])
        return edits

    def _note_pattern(self, payload: bytes, start: int, value_start: int, end: int) -> None:
        """Keep the member as this upstream writes it, and the bytes before it in an event."""
        self.note_model(payload[value_start:end])
        self.pattern, self.value_at = payload[start:end], value_start - start
        is_head = end <= _HEAD_BYTES and not payload.count(b"[", 0, end)
        self._head, self._head_at = payload[:end] if is_head else b"", value_start


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
