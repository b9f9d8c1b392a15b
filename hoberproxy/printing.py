"""Print tables, and format and parse what commands print and users write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

from .limits import PICO, format_dollars
from .store import StoreError

BAR_WIDTH = 20  # characters
_EIGHTHS = " ▏▎▍▌▋▊▉"
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_SPAN = re.compile(r"([0-9]{1,6})([smhdw])")


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int | None = None
) -> None:
    """Print `rows` under `head`; columns from `right_from` on are right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.rjust(width)
            if right_from is not None and index >= right_from
            else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def bar(part: int, most: int) -> str:
    """Draw `part` of `most` as a bar of BAR_WIDTH characters, in eighths of a character."""
    if most <= 0:
        return ""
    eighths = round(part * BAR_WIDTH * 8 / most)
    whole, rest = divmod(max(eighths, 1 if part else 0), 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(BAR_WIDTH)


def moment(seconds: float | None, otherwise: str = "-") -> str:
    """Format unix `seconds` in UTC, to the minute; None as `otherwise`."""
    if seconds is None:
        return otherwise
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def dollars(pico: int) -> str:
    """Format `pico` dollars with four decimals, with more where these would be zero."""
    if pico and pico < PICO // 10_000:
        return format_dollars(pico)
    return f"{Decimal(pico) / PICO:,.4f}"


# Parsers of options; they raise StoreError


def parse_day(text: str) -> float:
    """Return the unix seconds at which the day `text` begins in UTC."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise StoreError(f"expected a day as YYYY-MM-DD, got {text!r}") from None


def parse_span(text: str) -> float:
    """Return the seconds of a span like 90s, 15m, 12h, 30d or 2w."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise StoreError(f"expected a span like 90s, 15m, 12h, 30d or 2w, got {text!r}")
    return timedelta(**{_UNITS[match[2]]: int(match[1])}).total_seconds()


def parse_since(text: str, now: float) -> float:
    """Return the unix seconds of a day's beginning, or of a span before `now`."""
    return now - parse_span(text) if _SPAN.fullmatch(text) else parse_day(text)


def parse_expiry(text: str, now: float) -> float:
    """Return the unix seconds of a day's beginning, or of a span after `now`."""
    return now + parse_span(text) if _SPAN.fullmatch(text) else parse_day(text)


def parse_dollars(text: str) -> int:
    """Return the picodollars of an amount in USD."""
    try:
        amount = Decimal(text) * PICO
        if amount == int(amount) and amount >= 0:
            return int(amount)
    except (InvalidOperation, ValueError, OverflowError):
        pass
    raise StoreError(f"expected an amount in USD like 5.00, up to 12 decimals, got {text!r}")
