"""Reads a whole stream in the plainest way: the scanner has to give the same bytes and facts.

The stream is split into lines, each event's data is joined and parsed, and the client's bytes are
joined again. Nothing here is fast, and of the package only the readers of usage and of errors are
used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hoberproxy.dialects.error_document import read_error
from hoberproxy.dialects.usage import Usage, newest_usage

HELD_EVENT = 16 * 1024  # an unfinished event
HELD_OPENING = 64 * 1024  # all events before the first content

_LINE = re.compile(rb"[^\r\n]*+(?:\r\n|\r|\n)|[^\r\n]++")
_decode_json = json.JSONDecoder(strict=False).raw_decode


@dataclass
class Reading:
    """What a stream says, and what the client gets of it."""

    output: bytes = b""
    failure: tuple[bool, int | None] | None = None
    document: Any = None
    has_content: bool = False
    is_done: bool = False
    usage: Usage | None = None
    finish_reason: str = ""
    model: str = ""
    upstream_id: str = ""
    fewest: int = 0  # events with content
    most: int = 0  # … and those that might have some
    failed_event: bytes = b""  # as the client would see it


@dataclass
class Event:
    """One event: its bytes, and its data as pairs of places, in the data and in the bytes."""

    raw: bytes
    data: bytes | None
    runs: list[tuple[int, int, int]]  # in the data, in the event, length
    names: list[tuple[bytes, bytes]]  # its other lines

    @property
    def size(self) -> int:
        return len(self.raw) - self.raw.endswith(b"\r\n")  # that LF may come late

    def place(self, offset: int) -> int:
        for start, at, length in self.runs:
            if start <= offset < start + length:
                return at + offset - start
        raise AssertionError("a line end, which is not in the event")


def read_plainly(data: bytes, *, slug: str, wants_usage: bool) -> Reading:
    """Read a stream whose client sees `slug` as the model's name."""
    reading = Reading()
    held = b""
    is_odd = False
    for event in split_events(data):
        if not reading.has_content and len(held) + event.size > HELD_OPENING:
            reading.has_content = True
        is_long = reading.has_content and event.size > HELD_EVENT
        seen = _read_event(event, reading, slug, wants_usage, is_long)
        if reading.failure is not None:
            reading.failed_event = seen
            break
        held += seen
        document = _load(event.data)
        is_odd = is_odd or bool(
            event.data and event.data != b"[DONE]" and not isinstance(document, dict)
        )
        if reading.is_done:
            break
    if reading.has_content:
        reading.output = held
    elif is_odd and reading.failure is None:
        reading.failure = (False, None)
    return reading


def split_events(data: bytes) -> Iterator[Event]:
    """Events; a blank line ends one that has another line before."""
    lines: list[bytes] = []
    for line in _LINE.findall(data):
        is_blank = line in (b"\r\n", b"\r", b"\n")
        lines.append(line)
        if is_blank and len(lines) > 1:
            yield _make_event(lines)
            lines = []
    if lines:
        yield _make_event(lines)


def _make_event(lines: list[bytes]) -> Event:
    data: bytes | None = None
    runs: list[tuple[int, int, int]] = []
    names: list[tuple[bytes, bytes]] = []
    offset = 0
    for number, line in enumerate(lines):
        text = line.rstrip(b"\r\n")
        start = 3 if number == 0 and text.startswith(b"\xef\xbb\xbf") else 0
        name, colon, value = text[start:].partition(b":")
        start += len(name) + len(colon)
        if value.startswith(b" "):
            value, start = value[1:], start + 1
        if name == b"data":
            data = value if data is None else data + b"\n" + value
            runs.append((len(data) - len(value), offset + start, len(value)))
        else:
            names.append((name, value))
        offset += len(line)
    return Event(b"".join(lines), data, runs, names)


def _load(data: bytes | None) -> Any:
    try:
        return json.loads(data or b"")
    except ValueError:
        return None


def _read_event(
    event: Event, reading: Reading, slug: str, wants_usage: bool, is_long: bool
) -> bytes:
    """Return the event as the client gets it, and add its facts to `reading`."""
    if _is_error_by_its_lines(event):
        reading.failure = (True, _status(_load(event.data)))
        for name, value in event.names:
            if name == b"error":
                reading.failure = (True, _status(_load(value)))
        return event.raw
    if not event.data:
        return event.raw
    if event.data == b"[DONE]":
        reading.is_done = True
        return event.raw + (b"\n" if event.raw.endswith((b"\r\r", b"\n\r")) else b"")
    document = _load(event.data)
    if not isinstance(document, dict):
        reading.most += 1
        return event.raw
    if _is_error(document):
        reading.failure, reading.document = (True, _status(document)), document
        return _edit(event, document, slug, wants_usage)
    reading.usage = newest_usage(reading.usage, document)
    if isinstance(document.get("id"), str):
        reading.upstream_id = reading.upstream_id or document["id"]
    if isinstance(document.get("model"), str):
        reading.model = reading.model or document["model"]
    _read_choices(document, reading)
    is_usage = not document.get("choices") and isinstance(document.get("usage"), dict)
    if is_usage and not wants_usage and not is_long:
        return b""
    return _edit(event, document, slug, wants_usage)


def _is_error_by_its_lines(event: Event) -> bool:
    return any(
        (name == b"event" and value == b"error")
        or (name == b"error" and value not in (b"", b"null", b"{}"))
        for name, value in event.names
    )


def _is_error(document: dict[str, Any]) -> bool:
    choices = [each for each in document.get("choices") or [] if isinstance(each, dict)]
    bare = not choices and not document.get("usage")
    return bool(
        document.get("error")
        or document.get("object") == "error"
        or document.get("type") == "error"
        or any(each.get("error") or each.get("finish_reason") == "error" for each in choices)
        or (document.get("base_resp") or {}).get("status_code")
        or (bare and document.get("detail"))
        or (bare and document.get("code") and document.get("message"))
    )


def _status(document: Any) -> int | None:
    """Return the status of an error, in the document or in one of its choices."""
    found = read_error(document).status
    if found is None and isinstance(document, dict):
        for choice in document.get("choices") or []:
            found = found or read_error(choice.get("error")).status
    return found


def _read_choices(document: dict[str, Any], reading: Reading) -> None:
    has_text = False
    for choice in document.get("choices") or []:
        reading.finish_reason = choice.get("finish_reason") or reading.finish_reason
        delta = {**(choice.get("delta") or {}), **(choice.get("message") or {})}
        has_text = has_text or bool(choice.get("text"))
        values = [value for name, value in delta.items() if name != "role"]
        has_text = has_text or any(isinstance(each, str | list | dict) and each for each in values)
        if choice.get("finish_reason"):
            reading.has_content = True
    reading.fewest += has_text
    reading.most += 1
    reading.has_content = reading.has_content or has_text


def _edit(event: Event, document: dict[str, Any], slug: str, wants_usage: bool) -> bytes:
    """Return the event with `slug` as its model, without a `usage` of null if usage is unwanted."""
    assert event.data is not None
    places: dict[int, bytes] = {}  # what is in place of single bytes of the event
    text = event.data.decode("latin-1")  # one character a byte
    members = list(top_level(text))
    is_dropped = [
        name == "usage" and text[start:end] == "null" and not wants_usage
        for name, _, start, end in members
    ]
    for number, (name, begin, start, end) in enumerate(members):
        if is_dropped[number]:
            _drop(event, places, begin, end)
        elif name == "model" and text[start] == '"':
            _drop(event, places, start, end)
            places[event.place(start)] = json.dumps(slug, ensure_ascii=False).encode()
        if number:
            has_kept = not all(is_dropped[:number])
            if is_dropped[number] or not has_kept:
                comma = text.index(",", members[number - 1][3])
                _drop(event, places, comma, begin if has_kept else comma + 1)
    seen, at = b"", 0
    for place in sorted(places):
        seen += event.raw[at:place] + places[place]
        at = place + 1
    return seen + event.raw[at:]


def _drop(event: Event, places: dict[int, bytes], start: int, end: int) -> None:
    assert event.data is not None
    for offset in range(start, end):
        if event.data[offset] != 0x0A:
            places[event.place(offset)] = b""


def top_level(text: str) -> Iterator[tuple[str, int, int, int]]:
    """Return the names of an object's own members, their beginnings, and their values' spans."""
    position = text.index("{") + 1
    while match := re.compile(r'[\s,]*(?=")').match(text, position):
        begin = match.end()
        name, position = _decode_json(text, begin)
        start = re.compile(r"[\s:]*").match(text, position).end()  # type: ignore[union-attr]
        _, position = _decode_json(text, start)
        yield name, begin, start, position
