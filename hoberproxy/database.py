"""One SQLite file: opened, brought to the current schema, and spoken to in transactions.

What the tables hold is left to keytable.py and sqlite_store.py.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from .schema import MIGRATIONS
from .store import StoreError

_TRANSIENT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
}


class Database:
    """One connection to the file, made with mode 0600 when it is not there yet.

    To be used by one thread at a time. Every method raises StoreError.
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
            self._db = sqlite3.connect(
                self._path, isolation_level=None, timeout=busy_timeout, check_same_thread=False
            )
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
