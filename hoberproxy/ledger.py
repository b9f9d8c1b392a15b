"""Records into the store and keys out of it, on one thread: the loop never waits for a disk.

    put (loop) ─► queue ─► in hand, up to 500 ─► store, one transaction ─► written
                    └ full: lost              └ locked, disk full: kept, tried again

The thread also puts keys that were changed, by whichever process, into the keyring. What the tables
look like is left to the store. Records still queued when the process is killed are gone: a journal
will take their place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future

from .access import Keyring
from .record import Record
from .store import Store, StoreError

logger = logging.getLogger("hoberproxy.ledger")

CAPACITY = 100_000  # records; about 1 KB each, so 100 MB at the worst
BATCH_SIZE = 500
TICK = 0.2  # at most so long does a record wait
RELOAD_INTERVAL = 0.5  # a revoked key has to stop within a second
MAX_BACK_OFF = 5.0
# Short once started, for the same thread reloads keys, and the ledger tries again by itself.
BUSY_TIMEOUT = 0.25


class Ledger:
    """Takes each request's record once, and keeps `keyring` as the store has it.

    `start` before the first request, `close` or `aclose` after the last. `written` counts records
    that are in the store, `lost` those that will never be; `depth` those on their way.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keyring: Keyring,
        *,
        capacity: int = CAPACITY,
        batch_size: int = BATCH_SIZE,
        tick: float = TICK,
        reload_interval: float = RELOAD_INTERVAL,
    ) -> None:
        self._path = path
        self._keyring = keyring
        self._capacity = capacity
        self._batch_size = batch_size
        self._tick = tick
        self._reload_interval = reload_interval

        # Each count is added to by one thread only: += is no single step.
        self.written = 0
        self._taken = 0
        self._refused = 0
        self._spoilt = 0
        self._queue: deque[Record] = deque()
        self._in_hand: list[Record] = []

        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._deadline: float | None = None  # monotonic; set when closing
        self._retry_at = 0.0
        self._back_off = 0.0
        self._reload_at = 0.0
        self._data_version = -1
        self._keys_version = -1
        self._reload_fails = False

    # Called by the loop

    @property
    def depth(self) -> int:
        """Records taken and not yet in the store."""
        return self._taken - self.written - self._spoilt

    @property
    def lost(self) -> int:
        """Records given up: the queue was full, the ledger closed, or the record unfit."""
        return self._refused + self._spoilt

    def start(self) -> None:
        """Open the store and fill the keyring; StoreError when either cannot be done."""
        assert self._thread is None, "a ledger starts once"
        opened: Future[None] = Future()
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._run, args=(opened,), name="hoberproxy-ledger", daemon=True
        )
        self._thread.start()
        opened.result()

    def put(self, record: Record) -> None:
        """Take a finished record; never blocks. The caller changes the record no more."""
        queue = self._queue
        if self._deadline is not None or self.depth >= self._capacity:
            self._refused += 1
            return
        self._taken += 1
        queue.append(record)
        if len(queue) == self._batch_size:
            self._wake.set()

    def close(self, timeout: float = 5.0) -> int:
        """Write what is left, for at most `timeout` seconds; the number of records not written."""
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        if self.depth:
            logger.error("%d records were not written in the %.1f s given", self.depth, timeout)
        return self.depth

    async def aclose(self, timeout: float = 5.0) -> int:  # noqa: ASYNC109  # the thread's limit
        """`close` without holding up the loop."""
        return await asyncio.to_thread(self.close, timeout)

    # The thread

    def _run(self, opened: Future[None]) -> None:
        try:
            store = Store(self._path)
        except BaseException as exc:
            opened.set_exception(exc)
            return
        try:
            self._load_keys(store)
            store.set_busy_timeout(BUSY_TIMEOUT)
        except BaseException as exc:
            store.close()
            opened.set_exception(exc)
            return
        opened.set_result(None)
        try:
            self._work(store)
        finally:
            store.close()

    def _work(self, store: Store) -> None:
        while True:
            deadline = self._deadline  # before the flush: what was put before closing is flushed
            self._flush(store)
            if deadline is None:
                self._reload(store)
            elif not self.depth or time.monotonic() >= deadline:
                return
            has_more = deadline is not None or len(self._queue) >= self._batch_size
            if self._back_off or not has_more:
                self._wake.wait(self._tick)
                self._wake.clear()

    def _flush(self, store: Store) -> None:
        if time.monotonic() < self._retry_at and self._deadline is None:
            return
        while self._queue and len(self._in_hand) < self._batch_size:
            self._in_hand.append(self._queue.popleft())
        if not self._in_hand:
            return
        try:
            store.insert_records(self._in_hand)
        except StoreError as exc:
            self._keep_for_later(exc)
        except Exception as exc:  # a fault of ours must not hold up all that follow
            logger.error("%d records lost: %s", len(self._in_hand), type(exc).__name__)
            self._spoilt += len(self._in_hand)
            self._in_hand.clear()
        else:
            self._settle()

    def _keep_for_later(self, exc: StoreError) -> None:
        if not self._back_off:
            logger.warning("records wait, %d so far: %s", self.depth, exc)
        self._back_off = min(self._back_off * 2 or self._tick, MAX_BACK_OFF)
        self._retry_at = time.monotonic() + self._back_off

    def _settle(self) -> None:
        self.written += len(self._in_hand)
        self._in_hand.clear()
        if self._back_off:
            logger.warning("records are written again, %d to go", self.depth)
            self._back_off = self._retry_at = 0.0

    def _reload(self, store: Store) -> None:
        if time.monotonic() < self._reload_at:
            return
        try:
            self._load_keys(store)
        except StoreError as exc:  # the keys known so far stay in force
            if not self._reload_fails:
                logger.warning("keys cannot be reloaded: %s", exc)
            self._reload_fails = True
        else:
            self._reload_fails = False

    def _load_keys(self, store: Store) -> None:
        # Versions before the keys: a change in between is loaded twice rather than never. The
        # first also moves with every record another process writes; the second only with keys.
        data_version = store.data_version()
        if data_version == self._data_version:
            return
        self._reload_at = time.monotonic() + self._reload_interval
        keys_version = store.keys_version()
        if keys_version != self._keys_version:
            self._keyring.replace(store.load_keys())
        self._data_version = data_version
        self._keys_version = keys_version
