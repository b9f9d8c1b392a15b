"""What is kept of one request: the record every request ends in, however it went.

The record holds numbers, names and our own words, never a prompt, an answer or a key. It leaves
writing to the ledger and the access log, and deciding what goes in to the modules of the path.
"""

from __future__ import annotations

from typing import Any, Final

from .errors import FailedAttempt

LOST: Final = "lost"  # the code of a request whose end nobody saw: its process was killed
CLIENT_CLOSED: Final = 499  # nginx's number for a client that went away; never sent, only recorded

# What is stored of a record, in this order.
FIELDS: Final = (
    *("id", "started", "key_id", "key_label", "path", "requested", "slug", "provider"),
    *("upstream_model", "upstream_id", "client_request_id", "streamed", "status", "code", "phase"),
    *("finish_reason", "attempts", "failures", "prompt_tokens", "completion_tokens"),
    *("reasoning_tokens", "cached_tokens", "has_usage", "estimated", "events", "bytes_out"),
    *("first_content", "total", "price", "cost", "overhead"),
    "cache_write_tokens",
)


class Record:  # no dataclass, whose making is not compiled
    """The one mutable thing of a request: each step of the path adds what it learnt.

    `started` is in unix seconds; `first_content` and `total` are seconds from there. Whoever hands
    a record to the ledger or the access log changes it no more: other threads read it.
    """

    id: str
    started: float
    key_id: str = ""
    key_label: str = ""
    path: str = ""
    requested: tuple[str, ...] = ()  # slugs asked for, in order
    slug: str = ""  # the one that answered
    provider: str = ""
    upstream_model: str = ""  # upstream's own values, through `clip_text`
    upstream_id: str = ""
    client_request_id: str = ""  # through `escape_client_text`
    streamed: bool = False
    status: int = 0  # HTTP status; CLIENT_CLOSED when the client went away
    code: str = ""  # of the error, also of one told within a stream
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
    # Of the ledger, not stored: whether its row is told to the journal, and where its opening was.
    is_sealed: bool = False
    opened_in: int = -1

    def __init__(self, id: str, started: float, path: str = "", **values: Any) -> None:
        """`values` by their names in FIELDS, for all but the path of a request."""
        self.id = id
        self.started = started
        self.path = path
        for name, value in values.items():
            if name not in FIELDS:
                raise TypeError(f"expected a field of a record, got {name}")
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in FIELDS)

    def __repr__(self) -> str:
        values = ", ".join([f"{name}={getattr(self, name)!r}" for name in FIELDS])
        return f"Record({values})"

    @property
    def tokens_per_second(self) -> float | None:
        """How fast the answer was written, from its first content on; None where that was at once.

        A body has its first content with its last: only a stream can be measured.
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
