"""The thread that keeps the keyring up to date with the store, and prepares a journal's segments.

The loop never waits for a disk: this thread puts into the keyring each key that any process has
changed, and allocates the segments to which the loop's thread appends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing

from ..access.keys import Caller, Keyring
from ..accounting.journal import Journal
from .sqlite_records import open_store
from .store import Keys, StoreError
from .writer import BUSY_TIMEOUT, TICK

logger = logging.getLogger("hoberproxy.ledger")

RELOAD_INTERVAL = 0.5  # a revoked key has to stop within a second


class KeyLoader:
    """Loads keys from `start` to `close`; both are called on another thread than its own."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        keyring: Keyring,
        journal: Journal,
        *,
        tick: float = TICK,
        reload_interval: float = RELOAD_INTERVAL,
    ) -> None:
        self._path = path
        self._keyring = keyring
        self._journal = journal
        self._tick = tick
        self._reload_interval = reload_interval
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._reload_at = 0.0
        self._data_version = -1
        self._keys_version = -1
        self._reload_fails = False
        self._keys: dict[bytes, Caller] = {}

    def start(self) -> None:
        """Open the store and fill the keyring. Raises StoreError."""
        assert self._thread is None, "a loader starts once"
        self._thread = start_thread(self._run, "hoberproxy-keys")

    def close(self, timeout: float) -> None:
        """End the thread; wait for it for `timeout` seconds."""
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    # The thread

    def _run(self, opened: Future[None]) -> None:
        with closing(open_store(self._path)) as store:
            self._journal.prepare()
            self._load(store)
            store.set_busy_timeout(BUSY_TIMEOUT)
            opened.set_result(None)
            while not self._wake.wait(self._tick):
                self._journal.prepare()
                self._reload(store)

    def _reload(self, store: Keys) -> None:
        if time.monotonic() < self._reload_at:
            return
        try:
            self._load(store)
        except StoreError as exc:  # the keys known so far stay in force
            if not self._reload_fails:
                logger.warning("keys cannot be reloaded: %s", exc)
            self._reload_fails = True
        else:
            self._reload_fails = False

    def _load(self, store: Keys) -> None:
        # Versions before the keys: a change in between is loaded twice rather than never. The
        # first also moves with every record another process writes; the second only with keys.
        data_version = store.data_version()
        if data_version == self._data_version:
            return
        self._reload_at = time.monotonic() + self._reload_interval
        keys_version = store.keys_version()
        if keys_version != self._keys_version:
            self._keys = store.load_keys(self._keys)
            self._keyring.replace(self._keys)
        self._data_version = data_version
        self._keys_version = keys_version


def start_thread(run: Callable[[Future[None]], None], name: str) -> threading.Thread:
    """Start a thread and wait until `run` has set its future; raise what it raises before."""
    opened: Future[None] = Future()

    def report() -> None:
        try:
            run(opened)
        except BaseException as exc:
            if opened.done():
                raise
            opened.set_exception(exc)

    # A daemon: a disk that hangs must not keep the process from ending.
    thread = threading.Thread(target=report, name=name, daemon=True)
    thread.start()
    opened.result()
    return thread
