"""The writer: it moves records from the journals of all processes into the store.

    journals ─► batch, up to 500 ─► store, one transaction ─► noted in the segments' heads
                   └ locked, disk full: kept and tried again; later ones wait in the journals

The process with the lock beside the records file is the one that writes. The kernel frees the lock
with its process, and another goes on from the marks in the segments' heads. Records that were
stored and not noted are written twice and kept once, by their ids. The writer also stores the
journals of dead processes, sums up days, deletes old records and notes when keys were used.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from ..accounting.journal_directory import journal_directory
from ..accounting.record import COLUMNS, KEY_ID, LOST, STARTED, Record, Row, make_row, row_of
from ..routing.catalog import parse_prices
from .journal_reader import Batch, Journals, Remains, Segment, Values
from .sqlite_records import open_store
from .store import DAY, Amendment, Records, StoreError

logger = logging.getLogger("hoberproxy.ledger")

Made = TypeVar("Made")

BATCH_SIZE = 500
PART_SIZE = 50  # records that are read without a break: some 0.2 ms
TICK = 0.2  # seconds that a record waits at most
MAX_BACK_OFF = 5.0
# Short, for the writer tries again by itself, and must notice that it is to end.
BUSY_TIMEOUT = 0.25
LOCK_INTERVAL = 0.25  # between two tries to get the lock
TAKE_OVER_INTERVAL = 0.5
TIDY_INTERVAL = 60.0  # between two times of summing up days, deleting records, noting uses
SUM_DELAY = 3600.0  # after midnight: by then nearly all that began before it has ended
FINISH_LIMIT = 5.0


class WriterLock:
    """The lock of the one writer, held by one process at a time, or by one thread of it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = f"{os.path.realpath(path)}-writer"
        self._descriptor = -1

    def acquire(self) -> bool:
        """Take the lock if it is free, and return whether this writer holds it."""
        if self._descriptor >= 0:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Free the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Writer:
    """The writer of one records file, for one thread at a time. `open` raises StoreError.

    `written` counts records that it stored, `lost` those that no store takes, and `unreadable` the
    files of dead processes' journals that are damaged and kept.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep_days: int = 0,
        batch_size: int = BATCH_SIZE,
        tick: float = TICK,
        open_records: Callable[[str | os.PathLike[str]], Records] = open_store,
    ) -> None:
        self._path = path
        # Whether others that wait for the core get it after each part of a batch.
        self.gives_way = False
        self.keep_days = keep_days  # 0: forever
        self._batch_size = batch_size
        self._tick = tick
        self._open_records = open_records
        self._lock = WriterLock(path)
        self._journals = Journals(journal_directory(path))
        self._store: Records | None = None
        self._batch = Batch()
        self._back_off = 0.0
        self._retry_at = 0.0
        self._take_over_at = 0.0
        self._tidy_at = 0.0
        self._uses: dict[str, float] = {}  # key id → when it was used last
        self.written = 0
        self.lost = 0
        self.unreadable = 0
        self.is_active = False  # has the lock

    def open(self) -> None:
        """Open the store; with the lock, store the journals of dead processes.

        Records that a full disk or another process's lock keeps out are stored later.
        """
        self._store = self._open_records(self._path)
        if self._acquire():
            try:
                self._take_over(self._store)
            except StoreError as exc:
                self._keep_for_later(exc)
        self._store.set_busy_timeout(BUSY_TIMEOUT)

    def close(self) -> None:
        """Close journals and store, and free the lock last."""
        self._journals.close()
        if self._store is not None:
            self._store.close()
        self._lock.release()

    def living(self) -> set[str]:
        """Return the owners of journals whose processes live."""
        return self._journals.living()

    # A turn

    def turn(self) -> float:
        """Write a batch if this writer has the lock; return the seconds until the next turn."""
        try:
            if not self._acquire():
                return LOCK_INTERVAL
            is_full = self._flush()
            self._do_chores()
        except Exception as exc:  # no error may end the writer
            logger.error("the writer of records stumbled: %s", type(exc).__name__)
            return 1.0
        return 0.0 if is_full else self._tick

    def _acquire(self) -> bool:
        if not self.is_active and self._lock.acquire():
            self.is_active = True
            self._take_over_at = 0.0
        return self.is_active

    @property
    def _records(self) -> Records:
        assert self._store is not None, "opened before"
        return self._store

    def _flush(self, *, at_once: bool = False) -> bool:
        """Write one batch; return whether it was full, so that another may follow at once."""
        if not at_once and time.monotonic() < self._retry_at:
            return False
        segments = self._journals.refresh()
        for segment in segments if not self._batch.size else ():
            room = self._batch_size - self._batch.size
            if room <= 0:
                break
            self._read(segment, room)
        is_full = self._batch.size >= self._batch_size
        if self._batch.size:
            try:
                self._write(self._batch)
            except StoreError as exc:
                self._keep_for_later(exc)
                return False
            self._batch = Batch()
        for segment in segments:
            segment.mark()
        if self._back_off:
            try:
                self._take_over(self._records)  # a start may have had no more to write than that
            except StoreError as exc:
                self._keep_for_later(exc)
                return False
            logger.warning("records are written again")
            self._back_off = self._retry_at = 0.0
        return is_full

    def _read(self, segment: Segment, limit: int) -> None:
        while limit > 0 and (payloads := segment.read(min(limit, PART_SIZE))):
            self._lose(segment.parse(payloads, self._batch), "ValueError")
            limit -= len(payloads)
            self._give_way()

    def _give_way(self) -> None:
        if self.gives_way:
            os.sched_yield()

    def _lose(self, count: int, reason: str) -> None:
        if count:
            logger.error("%d records lost: %s", count, reason)
            self.lost += count

    def _write(self, batch: Batch) -> None:
        try:
            self._records.write(batch.rows, batch.revised, batch.amendments, self._give_way)
            self.written += len(batch.rows)
        except StoreError:
            raise
        except Exception:  # a fault in one record must not keep the others out
            self._write_singly(batch)
        self._uses.update((row[KEY_ID], row[STARTED]) for row in batch.rows)  # type: ignore[misc]

    def _write_singly(self, batch: Batch) -> int:
        """Write the records one by one; return how many the store does not take."""
        parts = [
            *(([row], [], []) for row in batch.rows),
            *(([], [row], []) for row in batch.revised),
            *(([], [], [each]) for each in batch.amendments),
        ]
        before = self.lost
        for part in parts:
            try:
                self._records.write(*part)
            except StoreError:
                raise
            except Exception as exc:
                self._lose(1, type(exc).__name__)
            else:
                self.written += len(part[0])
        return self.lost - before

    def _keep_for_later(self, exc: StoreError) -> None:
        if not self._back_off:
            logger.warning("records wait in the journals, %s", exc)
        self._back_off = min(self._back_off * 2 or self._tick, MAX_BACK_OFF)
        self._retry_at = time.monotonic() + self._back_off

    # Chores, and the end

    def _do_chores(self) -> None:
        """Do what is due of the rest; if the store cannot be written now, it is due again later."""
        now = time.monotonic()
        if self._back_off:
            return
        try:
            if now >= self._take_over_at:
                self._take_over_at = now + TAKE_OVER_INTERVAL
                self._take_over(self._records)
            if now >= self._tidy_at:
                self._tidy_at = now + TIDY_INTERVAL
                self._tidy(self._records, time.time())
        except StoreError as exc:
            if not exc.is_transient:  # a lock or a full disk is logged when records wait
                logger.warning("the store is not tidied up: %s", exc)

    def _tidy(self, store: Records, now: float) -> None:
        self._note_uses(store)
        store.sum_days(now - SUM_DELAY)
        if self.keep_days and store.delete_records(now // DAY * DAY - self.keep_days * DAY):
            self._tidy_at = 0.0  # there may be more, after the next batch

    def _note_uses(self, store: Records) -> None:
        self._uses.pop("", None)  # requests without a key
        if self._uses:
            store.note_uses(self._uses)
            self._uses = {}

    def finish(self, limit: float = FINISH_LIMIT) -> bool:
        """Write the rest, for at most `limit` seconds; return whether nothing is left."""
        deadline = time.monotonic() + limit
        while True:
            try:
                if self._acquire():
                    while self._flush(at_once=True):
                        pass
                    if not self._batch.size:  # else newer records would come before those
                        self._take_over(self._records)
                    self._note_uses(self._records)
                if not self._journals.has_dead() and not self._batch.size:
                    return True
            except StoreError as exc:
                if not exc.is_transient:
                    logger.warning("the store is not tidied up: %s", exc)
            except Exception as exc:
                logger.error("the writer of records stumbled: %s", type(exc).__name__)
                return False
            if time.monotonic() >= deadline:
                logger.error("records stay in the journals: the store took none for %.1f s", limit)
                return False
            time.sleep(0.05)

    # Journals of dead processes

    def _take_over(self, store: Records) -> None:
        for remains in self._journals.dead():
            try:
                failed = self._store_remains(store, remains)
            except StoreError as exc:
                if exc.is_transient:
                    remains.release()
                    raise
                failed = remains.size
                logger.error("records of a dead process are not taken: %s", exc)
            if failed:
                logger.error("a journal with %d requests that no store takes is set aside", failed)
                self.unreadable += remains.set_aside()
            else:
                self.unreadable += remains.remove()

    def _store_remains(self, store: Records, remains: Remains) -> int:
        """Store the requests of a dead process: ended ones as they ended, the others as lost.

        Return how many no store takes: entries of another version must neither end the writer nor
        keep the others out. Requests that are stored stay as they are.
        """
        ended = [row_of(values) for values in remains.closed.values()]
        revised = [row_of(values) for values in remains.revised.values()]
        amendments, unfit = _each(lambda values: Amendment(**values), remains.amended)
        lost, more_unfit = _each(_make_lost_row, remains.opened.values())
        failed = unfit + more_unfit
        self._lose(failed, "ValueError")
        try:
            new = store.write(ended, revised)
            new_lost = store.write(lost, (), amendments)
        except StoreError:
            raise
        except Exception:
            return failed + self._write_singly(Batch([*ended, *lost], revised, amendments))
        self.written += new + new_lost
        self._uses.update((row[KEY_ID], row[STARTED]) for row in ended)  # type: ignore[misc]
        if (new or new_lost) and not remains.is_orderly:
            logger.warning(
                "a process was killed: %d records taken over from its journal, "
                "and %d requests whose end is not known",
                new,
                new_lost,
            )
        return failed


def _each(make: Callable[[Values], Made], found: Iterable[Values]) -> tuple[list[Made], int]:
    """Return the results of `make` for `found`, and for how many of them it failed."""
    made: list[Made] = []
    unfit = 0
    for values in found:
        try:
            made.append(make(values))
        except Exception:
            unfit += 1
    return made, unfit


def _make_lost_row(values: Values) -> Row:
    """Return the row of a request of which only the beginning is known."""
    price = values["price"]
    tokens = values["prompt_tokens"], values["completion_tokens"]
    record = Record(
        **{name: value for name, value in values.items() if name in COLUMNS}
        | {
            "requested": tuple(values["requested"]),
            "code": LOST,
            "attempts": 1,
            "estimated": True,
            "price": price or "",
            "cost": parse_prices(price).cost(*tokens) if price is not None else None,
        }
    )
    return make_row(record)
