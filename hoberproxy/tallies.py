"""The limits' counters in a file that all processes of one machine share, exact among them.

    limits file: head │ locks of the workers │ slot, slot, slot, …   one for each limited key
    slot:        key's number │ history read? │ lock │ cells │ calls under way │ money held

Every process maps the file. A key's cells change only under the lock in its slot, which the kernel
frees with its holder (locks.py). A worker holds the lock of its own number for as long as it lives:
whoever finds a number's lock free knows that the calls are over that are counted under it, in the
slots' last two rows, which have a place for each worker. What the cells are is limits.py's
business; a limiter for several machines would take the place of `Tallies`.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from contextlib import suppress
from typing import Any, Final

from .access import Caller
from .errors import UnavailableError
from .limits import (
    CELLS,
    Demand,
    History,
    Lease,
    admit,
    catch_up,
    enter,
    leave,
    limit_lines,
    reserve,
    restore,
    roll,
    settle,
    spent_in,
)
from .locks import MUTEX_BYTES, OWNER_DIED, FileLocks, Locks, MutexLocks
from .native import mypyc_attr
from .tally import PROCESSES

logger = logging.getLogger("hoberproxy.server")

MAGIC: Final = 0x34_4C_42_48  # "HBL4": another layout gets another number
SLOTS = 8192  # limited keys
LOCK_PATIENCE = 0.25  # seconds; a lock is held for microseconds, unless its holder was stopped

_HEAD: Final = 64  # integers of 8 bytes
_MAGIC: Final = 0  # places in it
_NUMBERS_USED: Final = 1
_SLOTS_USED: Final = 2
_LOCKS: Final = 3
_MUTEXES, _FILE_LOCKS = 1, 2  # what the slots' locks are
_NUMBER: Final = 0  # places in a slot
_HAS_HISTORY: Final = 1
_LOCK: Final = 2
_CELLS: Final = _LOCK + MUTEX_BYTES // 8
_RUNNING: Final = _CELLS + CELLS
_HELD: Final = _RUNNING + PROCESSES
_SLOT: Final = _HELD + PROCESSES
_SIZE: Final = 8 * (_HEAD + SLOTS * _SLOT)
_TABLE_LOCK: Final = 0  # the byte whose lock guards the giving out of slots
_WORKER_LOCKS: Final = 8 * _HEAD - PROCESSES  # bytes, one a worker, at the end of the head


@mypyc_attr(allow_interpreted_subclasses=True)
class Limiter:
    """What the path asks of whoever keeps the limits."""

    def admit(self, caller: Caller, now: float, demand: Demand) -> Lease | None:
        """Count a call in; None if nothing has to be settled. Raises AccessError."""
        raise NotImplementedError

    def enter(self, caller: Caller, now: float) -> Lease:
        """Count a call in whose body is still to come; `reserve` or `leave` takes the lease."""
        raise NotImplementedError

    def reserve(self, caller: Caller, now: float, demand: Demand, entered: Lease) -> Lease | None:
        """Hold what a call may take that has `entered`; returns what `admit` would.

        Raises AccessError, and then the lease of `enter` is still to be given back.
        """
        raise NotImplementedError

    def leave(self, caller: Caller, lease: Lease) -> None:
        """Count a call out again that has entered, and for which nothing was reserved."""
        raise NotImplementedError

    def settle(self, caller: Caller, lease: Lease, *, tokens: int, spent: int) -> None:
        """An admitted call is over, and used so much (tokens, picodollars)."""
        raise NotImplementedError

    def amend(self, caller: Caller, lease: Lease, *, tokens: int, spent: int) -> None:
        """A call that was settled used so much more, or less if negative."""
        raise NotImplementedError

    def lines(self, caller: Caller, now: float) -> bytes:
        """The x-ratelimit-* lines in the head of an answer to this caller, ready to be sent."""
        raise NotImplementedError

    def counters(self, caller: Caller, now: float) -> list[int]:
        """A copy of the key's counters as of `now`, by their places in limits.py."""
        raise NotImplementedError


class _Slot:
    """One key's part of the file."""

    __slots__ = ("base", "cells", "history", "lock", "read")

    def __init__(self, base: int, cells: memoryview[int], lock: Any) -> None:
        self.base = base
        self.cells = cells
        self.lock = lock
        self.read: list[int] = []  # what was in the cells when they were read last
        self.history: History | None = None  # the one that was looked at last


class Tallies(Limiter):
    """The limits file of one process. To be used on one thread; `close` frees what it holds."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError if the file cannot be made or mapped."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Allocated now: a disk that is full later would end the process at a store to memory.
            os.posix_fallocate(self._fd, 0, _SIZE)
            self._map = mmap.mmap(self._fd, _SIZE)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map).cast("q")
        self._files = FileLocks(self._fd)
        self._table = self._files.handle(_TABLE_LOCK)
        self._locks: Locks = self._files
        self._slots: dict[str, _Slot] = {}
        self._is_late = False
        self._worker = -1
        try:
            self._join()
        except BaseException:
            self.close()
            raise
        # Bound: a call in the bare saves as much as the lock costs.
        self._try_lock, self._unlock = self._locks.try_lock, self._locks.unlock

    def close(self) -> None:
        """Leave: the locks of this process go with its descriptor."""
        self._slots.clear()  # and with them the locks' hold on the map
        self._view.release()
        with suppress(BufferError):  # a traceback that has a slot: the map goes with that
            self._map.close()
        os.close(self._fd)

    # Workers

    def _join(self) -> None:
        """Take a worker's number, and clear what a dead one left under it."""
        view = self._view
        self._acquire(self._files, self._table)
        try:
            is_alone = not any(self._is_alive(worker) for worker in range(PROCESSES))
            if view[_MAGIC] not in (0, MAGIC):  # another version's
                if not is_alone:
                    raise OSError("processes of another version use it; stop those first")
                self._map[:] = bytes(_SIZE)
            self._choose_locks(is_alone)
            if is_alone:
                self._forget_processes()
            view[_MAGIC] = MAGIC
            self._worker = self._take_number()
            self._clear_running(self._worker)
        finally:
            self._files.unlock(self._table)

    def _choose_locks(self, is_alone: bool) -> None:
        """Mutexes where they work. All processes have to use the same: the first one says which."""
        view = self._view
        if not is_alone and view[_LOCKS] == _FILE_LOCKS:
            return
        try:
            self._locks = MutexLocks(self._map)
        except OSError:
            if not is_alone:
                raise
        view[_LOCKS] = _FILE_LOCKS if self._locks is self._files else _MUTEXES

    def _take_number(self) -> int:
        for worker in range(PROCESSES):
            if not self._files.try_lock(self._files.handle(_WORKER_LOCKS + worker)):
                self._view[_NUMBERS_USED] = max(self._view[_NUMBERS_USED], worker + 1)
                return worker
        raise OSError(f"expected up to {PROCESSES} processes to share the limits, got more")

    def _is_alive(self, worker: int) -> bool:
        """Whether another process holds that number."""
        if worker == self._worker:
            return True
        return self._files.is_taken(self._files.handle(_WORKER_LOCKS + worker))

    def _forget_processes(self) -> None:
        """All who counted here are gone: the records know better what they used."""
        view = self._view
        for base in self._used_slots():
            # Made anew: a machine that lost its power freed no lock.
            self._locks.make(self._locks.handle(8 * (base + _LOCK)))
            view[base + _HAS_HISTORY] = 0
        for worker in range(view[_NUMBERS_USED]):
            self._clear_running(worker)
        view[_NUMBERS_USED] = 0

    def _clear_running(self, worker: int) -> None:
        for base in self._used_slots():
            self._view[base + _RUNNING + worker] = self._view[base + _HELD + worker] = 0

    def _used_slots(self) -> list[int]:
        if not self._view[_SLOTS_USED]:  # looking would touch every page of the file
            return []
        bases = range(_HEAD, _HEAD + SLOTS * _SLOT, _SLOT)
        return [base for base in bases if self._view[base + _NUMBER]]

    # Locks

    def _acquire(self, locks: Locks, handle: Any) -> None:
        """Lock; at once, but for a holder that is just being scheduled away."""
        if told := locks.try_lock(handle):
            self._wait_for(locks, handle, told)

    def _wait_for(self, locks: Locks, handle: Any, told: int) -> None:
        """What is left to do when a lock could not be taken, or not from a living one."""
        if told != OWNER_DIED:
            told = locks.wait(handle, LOCK_PATIENCE)
        if told == OWNER_DIED:
            locks.recover(handle)
        elif told and not self._is_late:
            # A process stopped by a debugger must not stop all others: go on without it.
            logger.error("limits: another process holds a lock and does not run; counting goes on")
        self._is_late = told not in (0, OWNER_DIED)

    # Slots

    def _slot_of(self, caller: Caller, now_ms: int) -> _Slot:
        slot = self._slots.get(caller.key_id)
        if slot is None:
            slot = self._slots[caller.key_id] = self._find(caller.key_id)
        if slot.history is not caller.history:
            self._look_back(slot, caller.history, now_ms)
        return slot

    def _find(self, key_id: str) -> _Slot:
        """The slot of a key, or a free one that becomes its own."""
        digest = hashlib.sha256(key_id.encode()).digest()
        number = int.from_bytes(digest[:7], "big") + 1  # 0 is a free slot
        view = self._view
        self._acquire(self._files, self._table)
        try:
            for step in range(SLOTS):
                base = _HEAD + (number + step) % SLOTS * _SLOT
                found = view[base + _NUMBER]
                if found in (0, number):
                    lock = self._locks.handle(8 * (base + _LOCK))
                    if not found:
                        self._locks.make(lock)
                        view[_SLOTS_USED] += 1
                        view[base + _NUMBER] = number
                    return _Slot(base, view[base + _CELLS : base + _RUNNING], lock)
        finally:
            self._files.unlock(self._table)
        logger.error("limits: expected up to %d limited keys, got more", SLOTS)
        raise UnavailableError("there is no room for another key's limits", code="overloaded")

    def _look_back(self, slot: _Slot, history: History, now_ms: int) -> None:
        """Begin with what the records know of a key, or see that nothing of it is missing."""
        slot.history = history
        if told := self._try_lock(slot.lock):
            self._wait_for(self._locks, slot.lock, told)
        try:
            cells = self._read(slot)
            if self._view[slot.base + _HAS_HISTORY]:
                catch_up(cells, history, now_ms)
            else:
                restore(cells, history, now_ms)
            self._write(slot, cells)
            self._view[slot.base + _HAS_HISTORY] = 1
        finally:
            self._unlock(slot.lock)

    def _read(self, slot: _Slot) -> list[int]:
        # As a list: integers of a memoryview cost many times as much, each time.
        slot.read = cells = slot.cells.tolist()
        return cells.copy()

    def _write(self, slot: _Slot, cells: list[int]) -> None:
        """Write what was changed since `_read`, under the same lock."""
        shared, before = slot.cells, slot.read
        for place in range(CELLS):
            if cells[place] != before[place]:
                shared[place] = cells[place]

    # What the path asks for (Limiter)

    def admit(self, caller: Caller, now: float, demand: Demand) -> Lease | None:
        """Count a call in; None if nothing has to be settled. Raises AccessError."""
        limits = caller.limits
        assert limits is not None, "callers without limits are not asked here"
        now_ms = int(now * 1000)
        slot = self._slot_of(caller, now_ms)
        if told := self._try_lock(slot.lock):
            self._wait_for(self._locks, slot.lock, told)
        try:
            running = held = 0
            cells = self._read(slot)
            if limits.concurrency is not None:
                running = self._count_running(slot, limits.concurrency)
            if limits.budget is not None:
                cost = demand.prompt_cost + demand.answer_cost
                if spent_in(cells, limits.budget_period) + cost >= limits.budget:
                    held = self._sum_held(slot)
            lease = admit(cells, limits, now_ms, demand, running=running, held=held)
            self._write(slot, cells)
            if limits.concurrency is not None:
                self._view[slot.base + _RUNNING + self._worker] += 1
            if lease.cost:
                self._view[slot.base + _HELD + self._worker] += lease.cost
        finally:
            self._unlock(slot.lock)
        # Always, where calls at once are counted, whatever the limits are when it ends.
        return lease if limits.needs_settling else None

    def enter(self, caller: Caller, now: float) -> Lease:
        """Count a call in whose body is still to come; `reserve` or `leave` takes the lease."""
        limits = caller.limits
        assert limits is not None, "callers without limits are not asked here"
        now_ms = int(now * 1000)
        slot = self._slot_of(caller, now_ms)
        if told := self._try_lock(slot.lock):
            self._wait_for(self._locks, slot.lock, told)
        try:
            running = held = 0
            cells = self._read(slot)
            if limits.concurrency is not None:
                running = self._count_running(slot, limits.concurrency)
            if limits.budget is not None:
                roll(cells, now_ms)
                if spent_in(cells, limits.budget_period) >= limits.budget:
                    held = self._sum_held(slot)
            lease = enter(cells, limits, now_ms, running=running, held=held)
            self._write(slot, cells)
            if limits.concurrency is not None:
                self._view[slot.base + _RUNNING + self._worker] += 1
        finally:
            self._unlock(slot.lock)
        return lease

    def reserve(self, caller: Caller, now: float, demand: Demand, entered: Lease) -> Lease | None:
        """Hold what a call may take that has `entered`; returns what `admit` would.

        Raises AccessError, and then the lease of `enter` is still to be given back.
        """
        limits = caller.limits
        assert limits is not None, "it has entered under limits"
        if limits.budget is None and limits.tokens_per_minute is None:
            entered.is_reserved = True
            return entered if limits.needs_settling else None
        now_ms = int(now * 1000)
        slot = self._slot_of(caller, now_ms)
        if told := self._try_lock(slot.lock):
            self._wait_for(self._locks, slot.lock, told)
        try:
            held = 0
            cells = self._read(slot)
            if limits.budget is not None:
                cost = demand.prompt_cost + demand.answer_cost
                if spent_in(cells, limits.budget_period) + cost >= limits.budget:
                    held = self._sum_held(slot)
            lease = reserve(cells, limits, now_ms, demand, held=held)
            self._write(slot, cells)
            if lease.cost:
                self._view[slot.base + _HELD + self._worker] += lease.cost
        finally:
            self._unlock(slot.lock)
        return lease

    def leave(self, caller: Caller, lease: Lease) -> None:
        """Count a call out again that has entered, and for which nothing was reserved."""
        limits = caller.limits
        assert limits is not None, "a lease is given under limits"
        slot = self._slots[caller.key_id]
        if told := self._try_lock(slot.lock):
            self._wait_for(self._locks, slot.lock, told)
        try:
            cells = self._read(slot)
            leave(cells, lease)
            self._write(slot, cells)
            if limits.concurrency is not None:
                self._view[slot.base + _RUNNING + self._worker] -= 1
        finally:
            self._unlock(slot.lock)

    def settle(self, caller: Caller, lease: Lease, *, tokens: int, spent: int) -> None:
        """An admitted call is over, and used so much (tokens, picodollars)."""
        limits = caller.limits
        assert limits is not None, "a lease is given under limits"
        slot = self._slots[caller.key_id]
        if told := self._try_lock(slot.lock):
            self._wait_for(self._locks, slot.lock, told)
        try:
            cells = self._read(slot)
            settle(cells, lease, tokens=tokens, spent=spent)
            self._write(slot, cells)
            if limits.concurrency is not None:
                self._view[slot.base + _RUNNING + self._worker] -= 1
            if lease.cost:
                self._view[slot.base + _HELD + self._worker] -= lease.cost
        finally:
            self._unlock(slot.lock)

    def amend(self, caller: Caller, lease: Lease, *, tokens: int, spent: int) -> None:
        """A call that was settled used so much more, or less if negative."""
        slot = self._slots[caller.key_id]
        if told := self._try_lock(slot.lock):
            self._wait_for(self._locks, slot.lock, told)
        try:
            cells = self._read(slot)
            settle(cells, lease.settled(), tokens=tokens, spent=spent)
            self._write(slot, cells)
        finally:
            self._unlock(slot.lock)

    def _sum_held(self, slot: _Slot) -> int:
        """Picodollars held for calls under way. What a dead worker held is spent.

        Those that began in an earlier day or month are among them, so it is for what is told, and
        for calls that cost nothing.
        """
        start = slot.base + _HELD
        counts = self._view[start : start + self._view[_NUMBERS_USED]].tolist()
        return sum(held for worker, held in enumerate(counts) if held and self._is_alive(worker))

    def _count_running(self, slot: _Slot, limit: int) -> int:
        """Calls under way; dead workers are looked for only when it matters."""
        view, start, running = self._view, slot.base + _RUNNING, 0
        workers: int = view[_NUMBERS_USED]
        for worker in range(workers):
            running += view[start + worker]
        if running < limit:
            return running
        for worker in range(workers):
            place = start + worker
            if view[place] and not self._is_alive(worker):
                running -= view[place]
                view[place] = 0
        return running

    def lines(self, caller: Caller, now: float) -> bytes:
        """The x-ratelimit-* lines in the head of an answer to this caller, ready to be sent."""
        slot = self._slots.get(caller.key_id)
        if slot is None or caller.limits is None:
            return b""
        return limit_lines(self._read(slot), caller.limits, int(now * 1000))

    def counters(self, caller: Caller, now: float) -> list[int]:
        """A copy of the key's counters as of `now`, by their places in limits.py."""
        now_ms = int(now * 1000)
        cells = self._read(self._slot_of(caller, now_ms))
        roll(cells, now_ms)
        return cells
