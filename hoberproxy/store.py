"""What a store of keys and records can do, whatever it is made of.

Who uses one imports this, and `open_store` of stores.py. Calls block, so they belong on a thread or
in a command of the shell, never on the event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .access import Caller
from .limits import History, KeyLimits
from .record import Record
from .rows import Row

DAY = 86_400.0
UNLIMITED = KeyLimits()


class StoreError(Exception):
    """The store could not do what was asked; the message says why and what to do.

    `is_transient`: the file is locked or the disk full, and the same call may do later.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key as the store knows it: all but the key itself. Times are unix seconds.

    `old_until` is when the key before the last rotation stops, None where there was none.
    """

    key_id: str
    label: str
    kind: str
    hint: str
    created: float
    expires: float | None
    revoked: float | None
    old_until: float | None = None
    models: tuple[str, ...] = ()
    limits: KeyLimits = UNLIMITED
    last_used: float | None = None


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """What a key used: requests that an upstream was asked for, tokens, picodollars."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over one group of records.

    `failed` counts refusals and failures, not clients that went away. `estimated_share` is the part
    of the tokens (0 to 1) whose number is ours; `first_content` the mean in seconds, None when no
    request of the group had content. `cost` is in picodollars, without the `unpriced` requests.
    """

    name: str
    label: str  # of the key, latest used; empty for other groups
    requests: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    estimated_share: float
    first_content: float | None
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0
    cost: int = 0
    unpriced: int = 0


@dataclass(frozen=True, slots=True)
class Amendment:
    """A better count for a record than its estimate."""

    id: str
    prompt_tokens: int
    completion_tokens: int
    cost: int | None


class Records(Protocol):
    """What the one writer needs. Every method raises StoreError, and then nothing is changed."""

    def write(
        self,
        rows: Sequence[Row],
        revised: Sequence[Row] = (),
        amendments: Sequence[Amendment] = (),
    ) -> int:
        """All or none, in this order: rows whose id is there already stay as they are.

        `revised` stand in place of those with their ids; an amendment leaves what the upstream
        counted. So a batch can be written again. The number of rows that were new.
        """

    def note_uses(self, uses: Mapping[str, float]) -> None:
        """When keys were used last, by id; an earlier time changes nothing."""

    def sum_days(self, until: float) -> None:
        """Sum up the whole days (UTC) before `until` (unix seconds) that are not yet."""

    def delete_records(self, before: float) -> int:
        """Delete some records of the summed days before then (unix seconds); how many it were."""

    def set_busy_timeout(self, seconds: float) -> None:
        """From now on wait so long for another process."""

    def close(self) -> None:
        """The last call; a second time does nothing."""


class Keys(Protocol):
    """What a worker needs to know who is asking."""

    def data_version(self) -> int:
        """A number that changes when others have written anything; cheap to ask."""

    def keys_version(self) -> int:
        """A number that grows with every change of a key, by whichever process."""

    def load_keys(self, known: Mapping[bytes, Caller] | None = None) -> dict[bytes, Caller]:
        """Every key's digest and caller; `known` are those loaded before."""


class Store(Records, Keys, Protocol):
    """All of it: what the commands and the pages need as well.

    To be used on the thread that opened it, and closed there. Every method raises StoreError.
    """

    def create_key(
        self,
        label: str,
        *,
        kind: str = "live",
        expires: float | None = None,
        limits: KeyLimits = UNLIMITED,
        models: Iterable[str] = (),
    ) -> tuple[str, KeyRow]:
        """Make and store a key: the key itself, which is never seen again, and what is kept."""

    def list_keys(self) -> list[KeyRow]:
        """All keys, the newest last."""

    def find_key(self, id_or_hint: str) -> KeyRow:
        """The key with this id or hint, or this very key. StoreError unless it is just one."""

    def revoke_key(self, id_or_hint: str) -> KeyRow:
        """Let a key work no more."""

    def update_key(self, id_or_hint: str, changes: Mapping[str, Any]) -> KeyRow:
        """Change what is named."""

    def rotate_key(self, id_or_hint: str, grace: float) -> tuple[str, KeyRow]:
        """A new key in place of the old, which works for `grace` seconds more."""

    def sum_history(self, key_id: str, since: float = 0.0) -> History:
        """What the records say that a key has used; there are none from before `since`."""

    def sum_key(self, key_id: str, since: float = 0.0) -> dict[str, KeyUsage]:
        """A key's usage by period: "day" and "month" (UTC), and "total"."""

    def insert_records(self, records: Iterable[Record]) -> int:
        """`write` of records."""

    def find_record(self, record_id: str, key_id: str | None = None) -> Record | None:
        """The record with our request id, None when there is none; `key_id`: only of this key."""

    def find_generation(self, upstream_id: str, key_id: str) -> Record | None:
        """A key's latest record with the id that stands in an upstream's body."""

    def export_records(
        self, since: float | None = None, until: float | None = None
    ) -> Iterator[Record]:
        """All records in the order of their times, in constant memory."""

    def sum_usage(
        self, by: str, since: float | None = None, until: float | None = None
    ) -> list[UsageRow]:
        """Usage by "key", "model", "provider", "day" (UTC) or "status"."""
