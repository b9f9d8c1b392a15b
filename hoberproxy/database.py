"""One SQLite file: its schema, and its statements in transactions.

The file's header says whose it is (`application_id`) and which schema it has (`user_version`). What
the tables mean is left to keytable.py and sqlite_store.py.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Final

from .store import StoreError

APPLICATION_ID: Final = int.from_bytes(b"hobe", "big")

# The steps from an empty file to the current schema, a tuple of statements for each version. The
# step of a released version is never edited; another one follows it.
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
            revoked REAL,
            requests_per_minute INTEGER,
            tokens_per_minute INTEGER,
            requests_per_day INTEGER,
            concurrency INTEGER,
            -- Money is in picodollars (1e-12 USD): whole numbers add up exactly.
            budget INTEGER,
            budget_period TEXT NOT NULL DEFAULT 'total',
            models TEXT NOT NULL DEFAULT '[]',
            -- The key before the last rotation, and until when it works.
            old_digest BLOB,
            old_until REAL
        )""",
        # Counted by triggers, so that a change made by hand with the sqlite3 shell counts too.
        "CREATE TABLE keys_version (version INTEGER NOT NULL)",
        "INSERT INTO keys_version VALUES (0)",
        *(
            f"CREATE TRIGGER keys_{event.lower()} AFTER {event} ON keys "
            "BEGIN UPDATE keys_version SET version = version + 1; END"
            for event in ("INSERT", "UPDATE", "DELETE")
        ),
        # Apart from the keys, whose every change makes all processes read them again.
        "CREATE TABLE key_uses (key_id TEXT PRIMARY KEY, last_used REAL NOT NULL)",
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
            total REAL NOT NULL,
            price TEXT NOT NULL,
            cost INTEGER,
            overhead REAL NOT NULL,
            cache_write_tokens INTEGER NOT NULL
        )""",
        # The only second index: one on a random value makes a record three times as expensive.
        "CREATE INDEX records_started ON records (started)",
        # Sums of whole days (UTC), kept when the records are deleted.
        """CREATE TABLE days (
            day INTEGER NOT NULL,
            key_id TEXT NOT NULL,
            key_label TEXT NOT NULL,
            slug TEXT NOT NULL,
            provider TEXT NOT NULL,
            status TEXT NOT NULL,
            requests INTEGER NOT NULL,
            tried INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            reasoning_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            cache_write_tokens INTEGER NOT NULL,
            estimated_tokens INTEGER NOT NULL,
            cost INTEGER NOT NULL,
            unpriced INTEGER NOT NULL,
            first_content_sum REAL NOT NULL,
            first_content_count INTEGER NOT NULL,
            PRIMARY KEY (day, key_id, slug, provider, status)
        ) WITHOUT ROWID""",
        # Days before `until` are in `days`, and are read from there alone; of those before
        # `deleted`, records have been deleted.
        "CREATE TABLE summed (until INTEGER NOT NULL, deleted INTEGER NOT NULL)",
        "INSERT INTO summed VALUES (0, 0)",
    ),
)

_TRANSIENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
}


class Database:
    """One connection to the file at `path`, which is made with mode 0600 if it does not exist.

    Use and close it on the thread that opened it. Every method raises StoreError. `busy_timeout`
    (seconds) is how long a call waits for another process's lock.
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
        """Wait up to `seconds` for another process's lock from now on."""
        with self._mapped("set up"):
            self._db.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
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
        # 16 MB of log between checkpoints, not 4: a page of the index is copied less often, and a
        # record costs a tenth less.
        self._db.execute("PRAGMA wal_autocheckpoint = 4000")
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
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _schema_version(self) -> int:
        """Return the version of the file's schema, 0 for an empty file; StoreError if not ours."""
        if self._value("PRAGMA application_id") == APPLICATION_ID:
            return int(self._value("PRAGMA user_version"))
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
        if "schema_version" in tables:
            raise StoreError(
                f"expected {self._path} to be a store of a released hoberproxy, got one of a "
                "version before the first release; export its records with that version, and "
                "name another file"
            )
        if tables:
            raise StoreError(
                f"expected {self._path} to be new or a store of hoberproxy, got another program's "
                "database; name another file"
            )
        return 0

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
    """Create an empty file of mode 0600; SQLite gives -wal and -shm the same mode."""
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
