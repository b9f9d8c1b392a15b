"""A record as a row of the store's table, and back.

The row is made once, where the request ends: the journal and the store take the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import orjson

from .errors import FailedAttempt
from .record import FIELDS, Record
from .text import clip_text

Row = tuple[str | int | float | None, ...]

COLUMNS: Final = FIELDS
STARTED, KEY_ID = COLUMNS.index("started"), COLUMNS.index("key_id")

# What a value that no column can hold raises, in orjson.
_BAD_VALUE: Final = (ArithmeticError, TypeError, ValueError)


_requested: Final[dict[tuple[str, ...], str]] = {}  # a third of a row's cost is dumped once a model


def make_row(record: Record) -> Row:
    """The row of a record, in the order of COLUMNS; never fails."""
    try:
        return _row(record)
    except _BAD_VALUE:  # half a surrogate pair, in what orjson writes
        return clean_row(record)


def _row(record: Record) -> Row:
    # Cut here once more: a wildcard's slug and the list of models are the client's text.
    requested, failures = record.requested, record.failures
    return (
        record.id,
        record.started,
        record.key_id,
        record.key_label,
        record.path[:128],
        _requested.get(requested) or _dump_requested(requested),
        record.slug[:256],
        record.provider,
        record.upstream_model[:128],
        record.upstream_id[:128],
        record.client_request_id[:128],
        record.streamed,
        record.status,
        record.code,
        record.phase,
        record.finish_reason[:128],
        record.attempts,
        orjson.dumps(failures).decode() if failures else "[]",
        record.prompt_tokens,
        record.completion_tokens,
        record.reasoning_tokens,
        record.cached_tokens,
        record.has_usage,
        record.estimated,
        record.events,
        record.bytes_out,
        record.first_content,
        record.total,
        record.price,
        record.cost,
        record.overhead,
        record.cache_write_tokens,
    )


def _dump_requested(requested: tuple[str, ...]) -> str:
    text = orjson.dumps([slug[:256] for slug in requested[:32]]).decode()
    if sum(map(len, requested)) <= 512:  # the client's text: what is kept is bounded
        if len(_requested) >= 1000:
            _requested.clear()
        _requested[requested] = text
    return text


def clean_row(record: Record) -> Row:
    """The row with whatever no column can hold replaced."""
    values = {name: getattr(record, name) for name in COLUMNS}
    values["requested"] = _dump([clip_text(slug, 256) for slug in record.requested[:32]])
    values["failures"] = _dump(
        [
            {name: _clean(value) for name, value in asdict(failure).items()}
            for failure in record.failures
        ]
    )
    return tuple(_clean(values[name]) for name in COLUMNS)


def row_of(values: Mapping[str, Any]) -> Row:
    """The row of values by their names, as another version of the program may have written them."""
    return tuple(values.get(name, value) for name, value in _DEFAULTS.items())


def clean_values(row: Row) -> Row:
    """A row that no table took, with whatever no column can hold replaced."""
    return tuple(_clean(value) for value in row)


def _dump(value: object) -> str:
    return orjson.dumps(value).decode()


def _clean(value: object) -> str | int | float | None:
    if value is None:
        return None
    if isinstance(value, int):
        return max(-(2**53), min(value, 2**53))
    if isinstance(value, float):
        return value if math.isfinite(value) else 0.0  # SQLite takes NaN for NULL
    return clip_text(value, 8192) if isinstance(value, str) else ""


_DEFAULTS: Final = dict(zip(COLUMNS, _row(Record(id="", started=0.0)), strict=True))
_PARSERS: Final[dict[str, Callable[[str], object]]] = {
    "requested": lambda text: tuple(orjson.loads(text)),
    "failures": lambda text: tuple(FailedAttempt(**failure) for failure in orjson.loads(text)),
    "streamed": bool,
    "has_usage": bool,
    "estimated": bool,
}


def parse_row(row: Sequence[Any]) -> Record:
    """The record of a row."""
    values: dict[str, Any] = {
        name: _PARSERS[name](value) if name in _PARSERS else value
        for name, value in zip(COLUMNS, row, strict=True)
    }
    return Record(**values)
