"""The parts that keep records in a process of the proxy: journal, loader of keys, and writer."""

from __future__ import annotations

import os

from hoberproxy.access.keys import Keyring
from hoberproxy.accounting.journal import Journal
from hoberproxy.accounting.journal_directory import journal_directory
from hoberproxy.accounting.record import Record
from hoberproxy.process.server import WriterThread
from hoberproxy.storage.key_loader import KeyLoader
from hoberproxy.storage.writer import FINISH_LIMIT, TICK, Writer


def record(number: int) -> Record:
    """Make the record of a request that was served, with an identifier of this `number`."""
    return Record(id=f"req_{number}", started=float(number), status=200)


class Process:
    """Starts and ends these parts in the order of process/server.py.

    With `has_writer` the writer runs on a thread; else the test has to run another.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keyring: Keyring | None = None,
        *,
        has_writer: bool = True,
        tick: float = TICK,
        reload_interval: float = 0.5,
        **options: int,
    ) -> None:
        self.journal = Journal(journal_directory(path))
        self.loader = KeyLoader(
            path, keyring or Keyring(), self.journal, tick=tick, reload_interval=reload_interval
        )
        self.thread = WriterThread(Writer(path, tick=tick, **options)) if has_writer else None
        self._is_closed = False

    @property
    def written(self) -> int:
        """The number of the process's records that are in the store."""
        return self.journal.stored

    @property
    def depth(self) -> int:
        """The number of the process's records that are not yet in the store."""
        return self.journal.depth

    @property
    def writer(self) -> Writer:
        assert self.thread is not None, "made with one"
        return self.thread.writer

    @property
    def lost(self) -> int:
        """The number of records that the journal or the writer has given up."""
        return self.journal.records_lost + self.writer.lost

    def start(self) -> None:
        if self.thread is not None:
            self.thread.start()
        self.loader.start()

    def put(self, record: Record) -> None:
        if not record.is_sealed:
            self.journal.seal(record)

    def close(self, timeout: float = FINISH_LIMIT) -> None:
        """End loader, journal and writer."""
        if not self._is_closed:
            self._is_closed = True
            self.journal.flush()
            self.loader.close(timeout)
            self.journal.end()
            if self.thread is not None:
                self.thread.close(timeout)
            self.journal.close()
