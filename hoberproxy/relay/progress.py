"""Does a stream go on, or does its upstream only keep the connection open?

Looked at now and then (exchange/attempt.py), not with each event: comments and events without
content keep an upstream from being idle for ever.
"""

from __future__ import annotations

from ..dialects.chat import content_of
from ..protocol.json_bytes import load_json
from ..protocol.sse import blank_line_end, parse_event


def has_progress(events: bytes) -> bool:
    """Whether whole events, as they are passed on, have any content or a finish reason."""
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
