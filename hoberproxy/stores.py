"""Opens the store that a setting names: today a file of SQLite's."""

from __future__ import annotations

import os

from .sqlite_store import SqliteStore
from .store import Store

BUSY_TIMEOUT = 5.0  # seconds a call waits for another process's lock


def open_store(setting: str | os.PathLike[str], *, busy_timeout: float = BUSY_TIMEOUT) -> Store:
    """The store, made and brought to the current schema if need be; StoreError if it cannot be."""
    return SqliteStore(setting, busy_timeout=busy_timeout)
