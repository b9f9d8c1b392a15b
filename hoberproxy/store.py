"""Keys and records in one SQLite file: the schema, its migrations, and every statement.

Calls block, so they belong on a thread or in a command of the shell, never on the event loop. When
and how often to write, and what to do while the file is locked, is left to the ledger.
"""

from __future__ import annotations

import math
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain

import orjson

from .access import RANDOM_BYTES, Caller, display_hint, generate_key, hash_key
from .errors import FailedAttempt
from .record import CLIENT_CLOSED, Record, clip_text

MAX_LABEL = 64  # characters

# One tuple of statements for each version; a released one is never edited, a new one is added.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            digest BLOB NOT NULL UNIQUE,
            label TEXT NOT NULL,
            kind TEXT NOT NULL,
            hint TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL,
            revoked REAL
        )""",
        # Counted by triggers, so that a change made by hand with the sqlite3 shell counts too.
        "CREATE TABLE keys_version (version INTEGER NOT NULL)",
        "INSERT INTO keys_version VALUES (0)",
        *(
            f"CREATE TRIGGER keys_{event.lower()} AFTER {event} ON keys "
            "BEGIN UPDATE keys_version SET version = version + 1; END"
            for event in ("INSERT", "UPDATE", "DELETE")
        ),
        """CREATE TABLE records (
            id TEXT PRIMARY KEY,
            started REAL NOT NULL,
            key_id TEXT NOT NULL,
            key_label TEXT NOT NULL,
            path TEXT NOT NULL,
            requested TEXT NOT NULL,
            slug TEXT NOT NULL,
            provider TEXT NOT NULL,
            upstream_model TEXT NOT NULL,
            upstream_id TEXT NOT NULL,
            client_request_id TEXT NOT NULL,
            streamed INTEGER NOT NULL,
            status INTEGER NOT NULL,
            code TEXT NOT NULL,
            phase TEXT NOT NULL,
            finish_reason TEXT NOT NULL,
            attempts INTEGER NOT NULL,
            failures TEXT NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            reasoning_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            has_usage INTEGER NOT NULL,
            estimated INTEGER NOT NULL,
            events INTEGER NOT NULL,
            bytes_out INTEGER NOT NULL,
            first_content REAL,
            total REAL NOT NULL
        )""",
        # The only second index: each one on a random value costs a record a third more time.
        "CREATE INDEX records_started ON records (started)",
    ),
)

Row = tuple[str | int | float | None, ...]

_COLUMNS = tuple(field.name for field in fields(Record))
_ROW_MARKS = f"({', '.join('?' * len(_COLUMNS))})"
# SQLite takes 32,766 values a statement from 3.32 on.
_ROWS_PER_STATEMENT = 250

_TRANSIENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
}

# What a value that no column can hold raises, in orjson, in the binding and in the table.
_BAD_VALUE = (
    ArithmeticError,
    TypeError,
    ValueError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)

_GROUPS = {
    "key": "key_id",
    "model": "slug",
    "provider": "provider",
    "day": "date(started, 'unixepoch')",
    "status": "CAST(status AS TEXT)",
}


class StoreError(Exception):
    """The store could not do what was asked; the message says why and what to do.

    `is_transient`: the file is locked or the disk full, and the same call may do later.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key as the store knows it: all but the key itself. Times are unix seconds."""

    key_id: str
    label: str
    kind: str
    hint: str
    created: float
    expires: float | None
    revoked: float | None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over one group of records.

    `failed` counts refusals and failures, not clients that went away. `estimated_share` is the part
    of the tokens (0 to 1) whose number is ours; `first_content` the mean in seconds, None when no
    request of the group had content.
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


class Store:
    """One connection to the file, made with mode 0600 when it is not there yet.

    To be used on the thread that opened it, and closed there. Every method raises StoreError.
    `busy_timeout` (seconds) is how long a call waits for another process's lock.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_timeout: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = os.path.realpath(path)
        self._clock = clock
        _create_private(self._path)
        with self._mapped("open"):
            self._db = sqlite3.connect(self._path, isolation_level=None, timeout=busy_timeout)
        try:
            with self._mapped("open"):
                self._set_up(busy_timeout)
        except BaseException:
            self._db.close()
            raise

    def set_busy_timeout(self, seconds: float) -> None:
        """From now on wait so long for another process's lock."""
        with self._mapped("set up"):
            self._db.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def close(self) -> None:
        """Close the connection; a second time does nothing."""
        with self._mapped("close"):
            self._db.close()

    # Set-up

    def _set_up(self, busy_timeout: float) -> None:
        # Two processes that turn a new file to WAL at once get "locked" without the wait that
        # busy_timeout promises: SQLite sees a deadlock coming.
        deadline = time.monotonic() + busy_timeout
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as exc:
                if not _is_transient(exc) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        # In WAL mode this survives a crash of the process; a power cut may take the last moments.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._migrate()

    def _migrate(self) -> None:
        # The write lock is taken even with nothing to do, so that a read-only file is found now.
        with self._transaction():
            version = self._schema_version()
            if version > len(MIGRATIONS):
                raise StoreError(
                    f"expected {self._path} to have a schema up to version {len(MIGRATIONS)}, got "
                    f"version {version}; a newer hoberproxy wrote it, use that or another file"
                )
            for statement in chain.from_iterable(MIGRATIONS[version:]):
                self._db.execute(statement)
            if version < len(MIGRATIONS):  # nothing written moves no other's data_version
                self._db.execute("UPDATE schema_version SET version = ?", (len(MIGRATIONS),))

    def _schema_version(self) -> int:
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
        if not tables:
            self._db.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
            self._db.execute("INSERT INTO schema_version VALUES (0)")
        elif "schema_version" not in tables:
            raise StoreError(
                f"expected {self._path} to be new or a store of hoberproxy, got another program's "
                "database; name another file"
            )
        return int(self._value("SELECT version FROM schema_version"))

    # Records

    def insert_records(self, records: Iterable[Record]) -> int:
        """Write records in one transaction, all or none; the number that was new.

        A record whose id is there already is left alone, so a batch can be tried again.
        """
        batch = list(records)
        with self._mapped("write records to"):
            try:
                return self._insert_rows([_row(record) for record in batch])
            except _BAD_VALUE:
                # A number beyond 64 bits or half a surrogate pair must not block the others.
                return self._insert_rows([_clean_row(record) for record in batch])

    def _insert_rows(self, rows: Sequence[Row]) -> int:
        before = self._db.total_changes
        with self._transaction():
            for start in range(0, len(rows), _ROWS_PER_STATEMENT):
                part = rows[start : start + _ROWS_PER_STATEMENT]
                # Not executemany: that lets go of the GIL for each row, and beside a busy event
                # loop may wait 5 ms to have it back (measured: 450 µs a record instead of 70).
                self._db.execute(
                    f"INSERT INTO records ({', '.join(_COLUMNS)}) "
                    f"VALUES {', '.join([_ROW_MARKS] * len(part))} ON CONFLICT (id) DO NOTHING",
                    list(chain.from_iterable(part)),
                )
        return self._db.total_changes - before

    def find_record(self, record_id: str) -> Record | None:
        """The record with our request id, None when there is none."""
        with self._mapped("read a record from"):
            row = self._db.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM records WHERE id = ?", (record_id,)
            ).fetchone()
        return None if row is None else _parse_record(row)

    def sum_usage(
        self, by: str, since: float | None = None, until: float | None = None
    ) -> list[UsageRow]:
        """Usage by "key", "model", "provider", "day" (UTC) or "status".

        Over records started from `since` up to, but not at, `until` (unix seconds, None: no bound).
        Days and statuses come in their order, the rest by most requests.
        """
        if by not in _GROUPS:
            raise StoreError(f"expected usage by one of {', '.join(_GROUPS)}, got {by!r}")
        order = "name" if by in ("day", "status") else "requests DESC, name"
        # With a single MAX, SQLite takes the bare column key_label from the row that has it.
        label = "key_label" if by == "key" else "''"
        with self._mapped("read usage from"):
            rows = self._db.execute(
                f"""SELECT {_GROUPS[by]} AS name, {label}, COUNT(*) AS requests,
                    SUM(status != {CLIENT_CLOSED}
                        AND (code != '' OR status < 200 OR status >= 400)),
                    CAST(TOTAL(prompt_tokens) AS INTEGER),
                    CAST(TOTAL(completion_tokens) AS INTEGER),
                    CAST(TOTAL(cached_tokens) AS INTEGER),
                    TOTAL((prompt_tokens + completion_tokens) * estimated)
                        / MAX(TOTAL(prompt_tokens + completion_tokens), 1.0),
                    AVG(first_content), MAX(started)
                FROM records WHERE started >= ? AND started < ?
                GROUP BY 1 ORDER BY {order}""",
                (-math.inf if since is None else since, math.inf if until is None else until),
            ).fetchall()
        return [UsageRow(*row[:-1]) for row in rows]

    # Keys

    def create_key(
        self, label: str, *, kind: str = "live", expires: float | None = None
    ) -> tuple[str, KeyRow]:
        """Make and store a key: the key itself, which is never seen again, and what is kept.

        `label` is what records and logs show: 1 to 64 printable characters. `kind` is "live" or
        "test"; `expires` unix seconds.
        """
        label = label.strip()
        if not label or len(label) > MAX_LABEL or not label.isprintable():
            raise StoreError(f"expected a label of 1 to {MAX_LABEL} printable characters")
        try:
            key = generate_key(kind, secrets.token_bytes(RANDOM_BYTES))
        except ValueError as exc:
            raise StoreError(str(exc)) from exc
        key_id = f"key_{secrets.token_hex(6)}"
        row = KeyRow(key_id, label, kind, display_hint(key), self._clock(), expires, None)
        with self._mapped("write a key to"):
            self._db.execute(
                "INSERT INTO keys (id, label, kind, hint, created, expires, revoked, digest) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*(getattr(row, field.name) for field in fields(KeyRow)), hash_key(key)),
            )
        return key, row

    def list_keys(self) -> list[KeyRow]:
        """All keys, revoked and expired ones too, oldest first."""
        return self._select_keys("1 ORDER BY created, id", ())

    def revoke_key(self, id_or_hint: str) -> KeyRow:
        """Revoke the key with this id or hint, or this very key, for good.

        A key revoked before keeps its time. StoreError when no key or more than one is meant.
        """
        where = "? IN (id, hint) OR digest = ?"
        found = self._select_keys(where, (id_or_hint, hash_key(id_or_hint)))
        if not found:  # the argument is not shown: it may be a key
            raise StoreError("expected the id or hint of a key, got neither; list the keys")
        if len(found) > 1:
            ids = ", ".join(row.key_id for row in found)
            raise StoreError(f"expected one key, got a hint of several; use one of the ids {ids}")
        key_id = found[0].key_id
        with self._mapped("revoke a key in"):
            self._db.execute(
                "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL",
                (self._clock(), key_id),
            )
        return self._select_keys("id = ?", (key_id,))[0]

    def load_keys(self) -> dict[bytes, Caller]:
        """Every key's digest and caller, for the keyring."""
        with self._mapped("read keys from"):
            rows = self._db.execute(
                "SELECT digest, id, label, kind, expires, revoked FROM keys"
            ).fetchall()
        return {digest: Caller(*rest) for digest, *rest in rows}

    def keys_version(self) -> int:
        """A number that grows with every change of a key, by whichever process."""
        with self._mapped("read keys from"):
            return int(self._value("SELECT version FROM keys_version"))

    def data_version(self) -> int:
        """A number that changes when *another* connection has written anything; costs 2 µs."""
        with self._mapped("read"):
            return int(self._value("PRAGMA data_version"))

    def _select_keys(self, where: str, values: tuple[str | bytes, ...]) -> list[KeyRow]:
        with self._mapped("read keys from"):
            rows = self._db.execute(
                f"SELECT id, label, kind, hint, created, expires, revoked FROM keys WHERE {where}",
                values,
            ).fetchall()
        return [KeyRow(*row) for row in rows]

    # Statements

    def _value(self, statement: str) -> str | int | float:
        value: str | int | float = self._db.execute(statement).fetchone()[0]
        return value

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE: a lock asked for at the first write of a read transaction is not waited for.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk may have rolled back already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _mapped(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            # SQLite's messages name tables and columns, never values.
            raise StoreError(
                f"cannot {doing} {self._path}: {exc}", is_transient=_is_transient(exc)
            ) from exc


def _is_transient(exc: sqlite3.Error) -> bool:
    # The low byte is the primary code; errors of the Python module itself carry none.
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF in _TRANSIENT


def _create_private(path: str) -> None:
    """Make an empty file that only its owner reads; SQLite gives -wal and -shm the same mode."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        # Not opened and closed again: closing any descriptor of a file drops this process's locks.
        return
    except FileNotFoundError as exc:
        raise StoreError(
            f"expected the directory {os.path.dirname(path)} to exist, got none; create it or "
            "name another file"
        ) from exc
    except OSError as exc:
        raise StoreError(f"cannot create {path}: {exc.strerror}; name another file") from exc


# Records to rows and back


def _row(record: Record) -> Row:
    # Cut here once more: a wildcard's slug and the list of models are the client's text.
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
        orjson.dumps(record.failures).decode(),
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
    )


def _clean_row(record: Record) -> Row:
    """The row with whatever no column can hold replaced."""
    values = asdict(record)
    values["requested"] = _dump([clip_text(slug, 256) for slug in record.requested[:32]])
    values["failures"] = _dump(
        [{name: _clean(value) for name, value in failure.items()} for failure in values["failures"]]
    )
    return tuple(_clean(values[name]) for name in _COLUMNS)


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


_PARSERS: dict[str, Callable[[str], object]] = {
    "requested": lambda text: tuple(orjson.loads(text)),
    "failures": lambda text: [FailedAttempt(**failure) for failure in orjson.loads(text)],
    "streamed": bool,
    "has_usage": bool,
    "estimated": bool,
}


def _parse_record(row: Sequence[str]) -> Record:
    values = {
        name: _PARSERS[name](value) if name in _PARSERS else value
        for name, value in zip(_COLUMNS, row, strict=True)
    }
    return Record(**values)  # type: ignore[arg-type]  # the columns are the fields
