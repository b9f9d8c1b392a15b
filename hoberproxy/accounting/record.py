"""The record of one request, and its row in the store's table.

Every request has one, however it ends. A record holds numbers, names and the proxy's own words,
never a prompt, an answer or a key. Its row is made once, when the request ends, and goes into the
journal and into the store. What goes into a record is decided by the modules of the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import orjson

from ..errors import FailedAttempt
from ..protocol.text import clip_text

LOST: Final = "lost"  # the code of a request whose end is not known: its process was killed
CLIENT_CLOSED: Final = 499  # nginx's number for a client that went away; never sent, only recorded

# The columns of a row: what is stored of a record, in this order.
COLUMNS: Final = (
    *("id", "started", "key_id", "key_label", "path", "requested", "slug", "provider"),
    *("upstream_model", "upstream_id", "client_request_id", "streamed", "status", "code", "phase"),
    *("finish_reason", "attempts", "failures", "prompt_tokens", "completion_tokens"),
    *("reasoning_tokens", "cached_tokens", "has_usage", "estimated", "events", "bytes_out"),
    *("first_content", "total", "price", "cost", "overhead"),
    "cache_write_tokens",
)
STARTED, KEY_ID = COLUMNS.index("started"), COLUMNS.index("key_id")

Row = tuple[str | int | float | None, ...]

# What orjson raises for a value that no column can hold.
_BAD_VALUE: Final = (ArithmeticError, TypeError, ValueError)


class Record:  # no dataclass, whose making is not compiled
    """The one mutable object of a request, to which each step of the path adds its findings.

    `started` is in unix seconds; `first_content` and `total` are seconds from there. A record that
    was handed to the access log must not change any more: another thread reads it.
    """

    id: str
    started: float
    key_id: str = ""
    key_label: str = ""
    path: str = ""
    requested: tuple[str, ...] = ()  # slugs of the request, in order
    slug: str = ""  # the one that answered
    provider: str = ""
    upstream_model: str = ""  # upstream's own values, through `clip_text`
    upstream_id: str = ""
    client_request_id: str = ""  # through `escape_client_text`
    streamed: bool = False
    status: int = 0  # HTTP status; CLIENT_CLOSED when the client went away
    code: str = ""  # of the error, also of one within a stream
    phase: str = ""  # where the last attempt failed
    finish_reason: str = ""
    attempts: int = 0
    failures: tuple[FailedAttempt, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0  # reasoning included, as upstreams count
    reasoning_tokens: int = 0
    cached_tokens: int = 0  # part of prompt_tokens
    cache_write_tokens: int = 0  # another part of prompt_tokens
    has_usage: bool = False  # the upstream gave its own numbers
    estimated: bool = False  # the numbers are ours
    events: int = 0
    bytes_out: int = 0  # body bytes relayed downstream
    first_content: float | None = None
    total: float = 0.0
    price: str = ""  # by which the cost was computed, as `Prices` writes itself; empty: not known
    cost: int | None = None  # in picodollars (1e-12 USD); None: not known
    overhead: float = 0.0  # seconds from the whole request to its first attempt: the proxy's own
    # Not stored: whether the journal has its row, and the segment with its entry of the opening.
    is_sealed: bool = False
    opened_in: int = -1

    def __init__(self, id: str, started: float, path: str = "", **values: Any) -> None:
        """Take further `values` by their names in COLUMNS."""
        self.id = id
        self.started = started
        self.path = path
        for name, value in values.items():
            if name not in COLUMNS:
                raise TypeError(f"expected a field of a record, got {name}")
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in COLUMNS)

    def __repr__(self) -> str:
        values = ", ".join([f"{name}={getattr(self, name)!r}" for name in COLUMNS])
        return f"Record({values})"

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second from the first content of a stream to its end; None for anything else.

        A body has its first content together with its last.
        """
        if not self.streamed or self.first_content is None:
            return None
        seconds = self.total - self.first_content
        return self.completion_tokens / seconds if seconds > 0 else None

    @property
    def is_failure(self) -> bool:
        """Whether the proxy or an upstream failed the client, or the request was refused.

        A stream that broke after its 200 is a failure; a client that went away is not.
        """
        if self.status == CLIENT_CLOSED:
            return False
        return self.code != "" or not 200 <= self.status < 400


# Rows


def make_row(record: Record) -> Row:
    """Return the row of `record`, in the order of COLUMNS; never fails."""
    try:
        return _row(record)
    except _BAD_VALUE:  # half a surrogate pair, in what orjson writes
        return _make_clean_row(record)


def _row(record: Record) -> Row:
    # Cut here once more: a wildcard's slug and the list of models are the client's text.
    failures = record.failures
    return (
        record.id,
        record.started,
        record.key_id,
        record.key_label,
        record.path[:128],
        orjson.dumps([slug[:256] for slug in record.requested[:32]]).decode(),
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


def _make_clean_row(record: Record) -> Row:
    """Return the row of `record` with every value replaced that no column can hold."""
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
    """Return the row of `values` by their names, which another version may have written."""
    return tuple(values.get(name, value) for name, value in _DEFAULTS.items())


def clean_row(row: Row) -> Row:
    """Return `row` with every value replaced that no column can hold."""
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
    """Return the record of a row, in the order of COLUMNS."""
    values: dict[str, Any] = {
        name: _PARSERS[name](value) if name in _PARSERS else value
        for name, value in zip(COLUMNS, row, strict=True)
    }
    return Record(**values)
