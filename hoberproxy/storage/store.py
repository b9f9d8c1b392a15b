"""The interface of a store of keys and records, whatever it is made of.

`open_store` of storage/sqlite_records.py opens one. Calls block, so they belong on a thread or in a
command of the shell, never on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..access.keys import Caller
from ..access.limits import History, KeyLimits
from ..accounting.record import Record, Row

DAY = 86_400.0
UNLIMITED = KeyLimits()


class StoreError(Exception):
    """A call of the store failed; the message says why and what to do.

    `is_transient`: the file is locked or the disk full, and the same call may succeed later.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key in the store: everything but the key itself. Times are unix seconds.

    `old_until` is when the key before the last rotation stops working, None without a rotation.
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
    """A key's usage: requests that went to an upstream, tokens, and the cost in picodollars."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over one group of records.

    `failed` counts rejections and failures, not clients that went away. `estimated_share` is the
    part of the tokens (0 to 1) that was estimated; `first_content` the mean in seconds, None if no
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
    """Exact token counts, and the cost in picodollars, for the record `id` with estimated ones."""

    id: str
    prompt_tokens: int
    completion_tokens: int
    cost: int | None


class Records(Protocol):
    """The methods that the writer calls. Each raises StoreError, and then nothing is changed."""

    def write(
        self,
        rows: Sequence[Row],
        revised: Sequence[Row] = (),
        amendments: Sequence[Amendment] = (),
        give_way: Callable[[], object] | None = None,
    ) -> int:
        """Write all or none, in this order; return how many of `rows` were new.

        `give_way` is called after each part of `rows`, which takes about half a millisecond.

        A row whose id is there already is left alone, each of `revised` replaces the row with its
        id, and an amendment leaves an upstream's own counts alone: a batch can be written twice.
        """

    def note_uses(self, uses: Mapping[str, float]) -> None:
        """Note when keys were used last (unix seconds, by id); an earlier time changes nothing."""

    def sum_days(self, until: float) -> None:
        """Sum up the whole days (UTC) before `until` (unix seconds) that are not summed yet."""

    def delete_records(self, before: float) -> int:
        """Delete some records of summed days before `before` (unix seconds); return how many."""

    def set_busy_timeout(self, seconds: float) -> None:
        """Wait up to `seconds` for another process's lock from now on."""

    def close(self) -> None:
        """Close the store; a second call does nothing."""


class Keys(Protocol):
    """The methods by which a worker loads the keys. Each raises StoreError."""

    def data_version(self) -> int:
        """Return a number that changes when another connection has written anything; cheap."""

    def keys_version(self) -> int:
        """Return a number that grows with every change of a key, by whichever process."""

    def load_keys(self, known: Mapping[bytes, Caller] | None = None) -> dict[bytes, Caller]:
        """Return the caller of every key by its digest; `known` are those loaded before."""


class Store(Records, Keys, Protocol):
    """The whole store, as the commands and the account pages use it.

    Use and close it on the thread that opened it. Every method raises StoreError.
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
        """Make and store a key; return the key itself, which is not stored, and its row.

        `label` has 1 to 64 printable characters; `kind` is "live" or "test"; `expires` is in unix
        seconds; `models` are patterns of slugs, none for all models.
        """

    def list_keys(self) -> list[KeyRow]:
        """Return all keys, also revoked and expired ones, the newest last."""

    def find_key(self, id_or_hint: str) -> KeyRow:
        """Return the key with this id or hint, or this very key; StoreError unless it is one."""

    def revoke_key(self, id_or_hint: str) -> KeyRow:
        """Revoke a key permanently; one revoked before keeps its time."""

    def update_key(self, id_or_hint: str, changes: Mapping[str, Any]) -> KeyRow:
        """Change a key's `label`, `expires`, `models`, or limits by their names in KeyLimits."""

    def rotate_key(self, id_or_hint: str, grace: float) -> tuple[str, KeyRow]:
        """Replace a key; the old one works for `grace` seconds more.

        Return the new key and its row. Id, label, limits and usage stay.
        """

    def sum_history(self, key_id: str, since: float = 0.0) -> History:
        """Return a key's usage by the records; there are none before `since` (unix seconds)."""

    def sum_key(self, key_id: str, since: float = 0.0) -> dict[str, KeyUsage]:
        """Return a key's usage by period: "day" and "month" (UTC), and "total"."""

    def find_record(self, record_id: str, key_id: str | None = None) -> Record | None:
        """Return the record with our request id (if given, only of the key `key_id`), or None."""

    def find_generation(self, upstream_id: str, key_id: str) -> Record | None:
        """Return a key's latest record with the id that an upstream gave its answer, or None."""

    def export_records(
        self, since: float | None = None, until: float | None = None
    ) -> Iterator[Record]:
        """Yield the records started from `since` up to before `until`, in order of their times."""

    def sum_usage(
        self, by: str, since: float | None = None, until: float | None = None
    ) -> list[UsageRow]:
        """Return usage by "key", "model", "provider", "day" (UTC) or "status".

        Over records started from `since` up to before `until` (unix seconds, None: no bound); days
        whose records are deleted count as a whole. Days and statuses come in their own order, the
        rest by most requests.
        """
