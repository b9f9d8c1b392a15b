"""Records into the store and keys out of it, on one thread: the loop never waits for a disk.

    open (loop) ─► journal
    seal ────────► journal
    put ─► queue ─► in hand, up to 500 ─► store, one transaction ─► written, settled in the journal
             └ full: lost              └ locked, disk full: kept, tried again

The thread also puts keys that were changed, by whichever process, into the keyring, takes over the
journals of processes that were killed, sums up days and deletes records that are too old. What the
tables look like is left to the store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from itertools import chain

from .access import Caller, Keyring
from .catalog import Endpoint
from .journal import NOWHERE, Journal, Remains, Values, take_over
from .prices import parse_prices
from .record import LOST, Record
from .rows import COLUMNS, KEY_ID, STARTED, Row, make_row, row_of
from .store import DAY, Store, StoreError
from .usage import Usage

logger = logging.getLogger("hoberproxy.ledger")

CAPACITY = 100_000  # records; about 1 KB each, so 100 MB at the worst
BATCH_SIZE = 500
TICK = 0.2  # at most so long does a record wait
RELOAD_INTERVAL = 0.5  # a revoked key has to stop within a second
MAX_BACK_OFF = 5.0
# Short once started, for the same thread reloads keys, and the ledger tries again by itself.
BUSY_TIMEOUT = 0.25
TAKE_OVER_INTERVAL = 2.0
TIDY_INTERVAL = 60.0  # between looks for a day to sum up, records to delete, uses to write down
SUM_DELAY = 3600.0  # after midnight: by then nearly all that began before it has ended

Entry = tuple[Row, int, int]  # a record's row, and the journal's segments that tell of it


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
        keep_days: int = 0,
    ) -> None:
        self._path = path
        self.keep_days = keep_days  # 0: for good; a reload of the config may change it
        # Not "-journal": SQLite has a file of that name.
        self._journal_path = f"{os.path.realpath(path)}-requests"
        self._journal = Journal(self._journal_path)
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
        self._queue: deque[Entry] = deque()
        self._in_hand: list[Entry] = []
        # Each with the number of records taken before it, which have to be written first.
        self._amendments: deque[tuple[int, tuple[str, int, int, int | None]]] = deque()

        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._deadline: float | None = None  # monotonic; set when closing
        self._retry_at = 0.0
        self._back_off = 0.0
        self._reload_at = 0.0
        self._data_version = -1
        self._keys_version = -1
        self._reload_fails = False
        self._take_over_at = 0.0
        self._tidy_at = 0.0
        self._keys: dict[bytes, Caller] = {}
        # Of requests that were lost with another process: key id, start, picodollars. The limits
        # have to learn of them, on the loop's thread.
        self.lost_costs: deque[tuple[str, float, int]] = deque()
        self._uses: dict[str, float] = {}  # key id → when it was used last

    # Called by the loop

    @property
    def depth(self) -> int:
        """Records taken and not yet in the store."""
        return self._taken - self.written - self._spoilt

    @property
    def lost(self) -> int:
        """Records given up: the queue was full, the ledger closed, or the record unfit.

        One that the journal has is not: it is found by the next process to start.
        """
        return self._refused + self._spoilt

    @property
    def journal_lost(self) -> int:
        """Entries that found no room in the journal: the disk is full."""
        return self._journal.lost

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

    def open(
        self, record: Record, slug: str, endpoint: Endpoint, prompt_tokens: int, answer_tokens: int
    ) -> None:
        """Tell the journal that a request goes upstream; the tokens are estimates of both parts."""
        prices = endpoint.prices
        record.opened_in = self._journal.open(
            [  # in the order of journal.OPENED
                record.id,
                record.started,
                record.key_id,
                record.key_label,
                record.path,
                record.requested,
                record.streamed,
                slug,
                endpoint.provider,
                prompt_tokens,
                answer_tokens,
                prices.text if prices is not None else None,
            ]
        )

    def seal(self, record: Record) -> None:
        """Tell the journal what the record says now, before its client sees the answer's end."""
        if record.sealed is not None:  # it ended otherwise than it seemed: the later entry counts
            self._journal.settle((record.closed_in,))
        record.sealed = row = make_row(record)
        record.closed_in = self._journal.close_request(row)

    def put(self, record: Record) -> None:
        """Take a finished record; never blocks. The caller changes the record no more."""
        if record.sealed is None:
            self.seal(record)
        queue = self._queue
        if self._deadline is not None or self.depth >= self._capacity:
            if record.closed_in == NOWHERE:
                self._refused += 1
            return
        self._taken += 1
        queue.append((record.sealed, record.opened_in, record.closed_in))  # type: ignore[arg-type]
        if len(queue) == self._batch_size:
            self._wake.set()

    def amend(
        self, record_id: str, prompt_tokens: int, completion_tokens: int, cost: int | None
    ) -> None:
        """Put a better count in place of a record's estimate; from any thread, after its `put`."""
        amendment = record_id, prompt_tokens, completion_tokens, cost
        self._amendments.append((self._taken, amendment))

    def close(self, timeout: float = 5.0) -> int:
        """Write what is left, for at most `timeout` seconds; the number of records not written."""
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        if self.depth:
            logger.error("%d records were not written in the %.1f s given", self.depth, timeout)
        if self._thread is None or not self._thread.is_alive():
            self._journal.close()
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
            self._journal.prepare()
            self._take_over(store)  # before the keys: what a dead process spent is spent
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
                self._journal.prepare()
                self._reload(store)
                self._do_chores(store)
            elif not self.depth or time.monotonic() >= deadline:
                self._finish(store)
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
            store.insert_rows([row for row, _, _ in self._in_hand])
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
        self._journal.settle(chain.from_iterable(entry[1:] for entry in self._in_hand))
        self._uses.update((row[KEY_ID], row[STARTED]) for row, _, _ in self._in_hand)  # type: ignore[misc]
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
            self._keys = store.load_keys(self._keys)
            self._keyring.replace(self._keys)
        self._data_version = data_version
        self._keys_version = keys_version

    # Now and then, and at the end

    def _finish(self, store: Store) -> None:
        uses, self._uses = self._uses, {}
        uses.pop("", None)
        try:
            self._amend(store)
            if uses:
                store.note_uses(uses)
        except StoreError as exc:
            logger.warning("the store is not tidied up: %s", exc)

    def _do_chores(self, store: Store) -> None:
        """What can wait; a store that cannot be written now is asked again later."""
        now = time.monotonic()
        try:
            self._amend(store)
            if now >= self._take_over_at:
                self._take_over_at = now + TAKE_OVER_INTERVAL
                self._take_over(store)
            if now >= self._tidy_at:
                self._tidy_at = now + TIDY_INTERVAL
                self._tidy(store, time.time())
        except StoreError as exc:
            if not exc.is_transient:  # a lock or a full disk is told of where records wait
                logger.warning("the store is not tidied up: %s", exc)

    def _amend(self, store: Store) -> None:
        done = self.written + self._spoilt
        while self._amendments and self._amendments[0][0] <= done:
            store.amend_usage(*self._amendments[0][1])
            self._amendments.popleft()

    def _tidy(self, store: Store, now: float) -> None:
        uses, self._uses = self._uses, {}
        uses.pop("", None)  # requests without a key
        if uses:
            store.note_uses(uses)
        store.sum_days(now - SUM_DELAY)
        if self.keep_days and store.delete_records(now // DAY * DAY - self.keep_days * DAY):
            self._tidy_at = 0.0  # there may be more; records come first

    def _take_over(self, store: Store) -> None:
        for remains in take_over(self._journal_path):
            try:
                self._store_remains(store, remains)
            except StoreError as exc:
                if exc.is_transient:
                    remains.release()
                    raise
                self._set_aside(remains, exc)
            except Exception as exc:  # what another version wrote must not end this thread
                self._set_aside(remains, exc)
            else:
                remains.remove()

    def _set_aside(self, remains: Remains, exc: Exception) -> None:
        count = len(remains.closed) + len(remains.opened)
        logger.error("a journal with %d requests is set aside: %s", count, type(exc).__name__)
        remains.set_aside()

    def _store_remains(self, store: Store, remains: Remains) -> None:
        """Requests that ended as they ended, the others as lost; those in the store stay."""
        ended = [row_of(values) for values in remains.closed.values()]
        records = [_lost_record(values) for values in remains.opened.values()]
        lost = [record for record in records if store.find_record(record.id) is None]
        new = store.insert_rows(ended)
        new_lost = store.insert_records(lost)
        if self._data_version >= 0:  # else the keys' history is read after this, and has it
            self.lost_costs.extend(
                (record.key_id, record.started, record.cost) for record in lost if record.cost
            )
        if new or new_lost:
            logger.warning(
                "a process was killed: %d records taken over from its journal, "
                "and %d requests whose end is not known",
                new,
                new_lost,
            )


def _lost_record(values: Values) -> Record:
    """The record of a request of which only the beginning is known."""
    price = values["price"]
    usage = Usage(values["prompt_tokens"], values["completion_tokens"], is_estimated=True)
    return Record(
        **{name: value for name, value in values.items() if name in COLUMNS}
        | {
            "requested": tuple(values["requested"]),
            "code": LOST,
            "attempts": 1,
            "estimated": True,
            "price": price or "",
            "cost": parse_prices(price).cost(usage) if price is not None else None,
        }
    )
