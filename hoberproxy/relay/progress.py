"""Finds out whether a stream has content, or whether its upstream only keeps it open.

Comments and events without content would keep an upstream from ever being idle. exchange/attempt.py
has a stream looked at from time to time, not with each event.
"""

from __future__ import annotations

from ..dialects.chat import content_of
from ..protocol.json_bytes import load_json
from ..protocol.sse import blank_line_end, parse_event


def has_progress(events: bytes) -> bool:
    """Return whether whole `events`, as the client gets them, have content or a finish reason."""
    has_cr = b"\r" in events
    start = 0
    while start < len(events):
        end = blank_line_end(events, start, has_cr=has_cr)
        if end < 0:
            end = len(events)
        if _has_content(events[start:end]):
            return True
        start = end
    return False


def _has_content(event: bytes) -> bool:
    data = parse_event(event)
    if data is None:
        return False
    try:
        document = load_json(data.payload)
    except ValueError:
        return False
    return isinstance(document, dict) and any(content_of(document))
