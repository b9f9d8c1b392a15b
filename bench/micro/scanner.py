"""StreamScanner: whole events, many in a piece, cut ones, and what is parsed."""

from __future__ import annotations

from collections.abc import Callable

from hoberproxy.relay.scanner import StreamScanner

from . import Case
from .streams import CONTENT, FINISH, OPENING, SLUG


def _feeding(piece: bytes) -> Callable[[], Callable[[], object]]:
    """A scanner in mid-stream that is fed the same piece again and again."""

    def make() -> Callable[[], object]:
        scanner = StreamScanner(SLUG, wants_usage=False)
        scanner.feed(OPENING + CONTENT)
        feed = scanner.feed
        return lambda: feed(piece)

    return make


def _feeding_halves() -> Callable[[], object]:
    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(OPENING + CONTENT)
    feed, middle = scanner.feed, len(CONTENT) // 2
    first, second = CONTENT[:middle], CONTENT[middle:]
    return lambda: (feed(first), feed(second))


def _opening() -> Callable[[], object]:
    def scan() -> object:
        scanner = StreamScanner(SLUG, wants_usage=False)
        return scanner.feed(OPENING + CONTENT)

    return scan


CASES = (
    Case("one event in a piece", _feeding(CONTENT), unit="event"),
    Case("64 events in a piece", _feeding(CONTENT * 64), 64, "event"),
    Case("an event in two pieces", _feeding_halves, unit="event"),
    Case("a finish reason, parsed", _feeding(FINISH), unit="event"),
    Case("a new stream up to its first content", lambda: _opening(), unit="stream"),
)
