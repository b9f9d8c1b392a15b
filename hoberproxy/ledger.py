"""One process's part of the account: each request's record into the journal, keys out of the store.

    accounting (loop) ─► journal ─► the writer, in whichever process (writer.py) ─► store

One thread puts keys that were changed, by whichever process, into the keyring, and allocates the
journal's segments: the loop never waits for a disk. A process that serves alone has the writer as
well, on a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from .access import Caller, Keyring
from .folder import journal_directory
from .journal import Journal
from .record import Record
from .sqlite_store import open_store
from .store import Keys, StoreError
from .writer import BATCH_SIZE, BUSY_TIMEOUT, FINISH_LIMIT, TICK, Writer

logger = logging.getLogger("hoberproxy.ledger")

RELOAD_INTERVAL = 0.5  # a revoked key has to stop within a second
MAX_AMENDMENTS = 10_000


class Ledger:
    """Takes each request's record once, and keeps `keyring` as the store has it.

    `start` before the first request, `tend` now and then, `close` or `aclose` after the last.
    `has_writer`: on a thread of this process; otherwise there has to be one in another.
    `journal` takes what is told of a request on its way. `written` counts records that are in the
    store, `lost` those that will never be; `depth` those on their way.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keyring: Keyring,
        *,
        has_writer: bool = True,
        batch_size: int = BATCH_SIZE,
        tick: float = TICK,
        reload_interval: float = RELOAD_INTERVAL,
        keep_days: int = 0,
    ) -> None:
        self._path = path
        self.journal = Journal(journal_directory(path))
        self._keyring = keyring
        self._tick = tick
        self._reload_interval = reload_interval
        self._writer: Writer | None = None
        if has_writer:
            self._writer = Writer(path, keep_days=keep_days, batch_size=batch_size, tick=tick)
        self._amendments: deque[list[str | int | None]] = deque(maxlen=MAX_AMENDMENTS)

        self._keys_thread: threading.Thread | None = None
        self._writer_thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._writer_wake = threading.Event()
        self._is_closed = False
        self._limit = FINISH_LIMIT
        self._reload_at = 0.0
        self._data_version = -1
        self._keys_version = -1
        self._reload_fails = False
        self._keys: dict[bytes, Caller] = {}

    # Called by the loop

    @property
    def keep_days(self) -> int:
        """For how many days this process's writer keeps records; 0: for good."""
        return self._writer.keep_days if self._writer is not None else 0

    @keep_days.setter
    def keep_days(self, days: int) -> None:
        if self._writer is not None:
            self._writer.keep_days = days

    @property
    def written(self) -> int:
        """This process's records that are in the store."""
        return self.journal.stored

    @property
    def depth(self) -> int:
        """Records taken and not yet in the store."""
        return self.journal.closed - self.journal.stored

    @property
    def lost(self) -> int:
        """Records given up: no room on the disk nor in memory, or unfit for the store."""
        return self.journal.records_lost + (self._writer.lost if self._writer is not None else 0)

    @property
    def unreadable(self) -> int:
        """Files that this process's writer kept for what it could not read of others' journals."""
        return self._writer.unreadable if self._writer is not None else 0

    @property
    def journal_lost(self) -> int:
        """Entries that found no room in the journal: the disk is full."""
        return self.journal.lost

    def start(self) -> None:
        """Open the store and fill the keyring; StoreError when either cannot be done."""
        assert self._keys_thread is None, "a ledger starts once"
        if self._writer is not None:  # before the keys: what a dead process spent is spent
            self._writer_thread = _start(self._run_writer, "hoberproxy-writer")
        self._keys_thread = _start(self._run, "hoberproxy-keys")

    def put(self, record: Record) -> None:
        """Take a finished record; never blocks. The caller changes the record no more."""
        if not record.is_sealed:
            self.journal.seal(record)

    def amend(
        self, record_id: str, prompt_tokens: int, completion_tokens: int, cost: int | None
    ) -> None:
        """Put a better count in place of a record's estimate; from any thread, after its `put`."""
        self._amendments.append([record_id, prompt_tokens, completion_tokens, cost])

    def tend(self) -> None:
        """Tell the journal what had to wait, for the loop or for room."""
        while self._amendments:
            self.journal.amend(self._amendments.popleft())
        self.journal.flush()

    def close(self, timeout: float = FINISH_LIMIT) -> int:
        """Write what is left, for about `timeout` seconds; the number of records not written.

        Without a writer here they are left to the other process's.
        """
        if not self._is_closed:
            self._is_closed = True
            self.tend()
            self._wake.set()
            if self._keys_thread is not None:
                self._keys_thread.join(timeout)
            self.journal.end()
            self._finish_writing(timeout)
        return self.depth

    async def aclose(self, timeout: float = FINISH_LIMIT) -> int:  # noqa: ASYNC109  # the thread's
        """`close` without holding up the loop."""
        return await asyncio.to_thread(self.close, timeout)

    def _finish_writing(self, timeout: float) -> None:
        self._limit = timeout
        self._writer_wake.set()
        if self._writer_thread is not None:
            self._writer_thread.join(timeout + 1.0)
        if self.depth and self._writer is not None:
            logger.error("%d records were not written in the %.1f s given", self.depth, timeout)
        self.journal.close()

    # The thread of the writer

    def _run_writer(self, opened: Future[None]) -> None:
        writer = self._writer
        assert writer is not None, "started for it"
        try:
            writer.open()
        except BaseException as exc:
            writer.close()
            opened.set_exception(exc)
            return
        opened.set_result(None)
        try:
            while not self._writer_wake.wait(writer.turn()):
                pass
            writer.finish(self._limit)
        finally:
            writer.close()

    # The thread of the keys and of the disk

    def _run(self, opened: Future[None]) -> None:
        try:
            store = open_store(self._path)
        except BaseException as exc:
            opened.set_exception(exc)
            return
        try:
            self.journal.prepare()
            self._load_keys(store)
            store.set_busy_timeout(BUSY_TIMEOUT)
        except BaseException as exc:
            store.close()
            opened.set_exception(exc)
            return
        opened.set_result(None)
        try:
            while not self._wake.wait(self._tick):
                self.journal.prepare()
                self._reload(store)
        finally:
            store.close()

    def _reload(self, store: Keys) -> None:
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

    def _load_keys(self, store: Keys) -> None:
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


def _start(run: Callable[[Future[None]], None], name: str) -> threading.Thread:
    """A thread, once it says that it has begun; raises what it could not do."""
    opened: Future[None] = Future()
    # A daemon: a disk that hangs must not keep the process from ending.
    thread = threading.Thread(target=run, args=(opened,), name=name, daemon=True)
    thread.start()
    opened.result()
    return thread
