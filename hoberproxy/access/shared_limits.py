"""The limits' counters in a file that all processes of one machine share, exact among them.

    limits file: head │ key numbers, one a slot │ slot, slot, slot, …   one for each limited key
    slot:        history read? │ cells │ calls in flight │ money held

Every process maps the file. A slot changes only under its lock. Each process has a number, whose
lock it holds for as long as it lives: if that lock is free, the calls in flight and the money held
in the number's column of a slot are void. What the cells mean is left to access/limits.py.

Locks are those of an open file (OFD) on one byte each. The kernel frees them with their holder.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import mmap
import os
import struct
import time
from contextlib import suppress
from typing import Any, Final

from ..errors import UnavailableError
from .admission import MAX_PROCESSES
from .keys import Caller
from .limits import (
    CELLS,
    Demand,
    History,
    KeyLimits,
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

logger = logging.getLogger("hoberproxy.server")

MAGIC: Final = 0x34_4C_42_48  # "HBL4": another layout gets another number
SLOTS = 8192  # limited keys
LOCK_PATIENCE = 0.25  # seconds; a lock is held for microseconds, unless its holder was stopped

_MAGIC: Final = 0  # places in the head, of integers of 8 bytes
_PROCESSES_USED: Final = 1
_NUMBERS: Final = 8
_SLOTS: Final = _NUMBERS + SLOTS
_HAS_HISTORY: Final = 0  # places in a slot
_CELLS: Final = 1
_RUNNING: Final = _CELLS + CELLS
_HELD: Final = _RUNNING + MAX_PROCESSES
_SLOT: Final = _HELD + MAX_PROCESSES
_SIZE: Final = 8 * (_SLOTS + SLOTS * _SLOT)

# Locks


def _find_fcntl() -> Any:
    """Return the C library's `fcntl`, or a function like it if there is no ctypes.

    Python's own lets the GIL go, and waits up to 5 ms to have it back while another thread runs.
    """
    try:
        import ctypes

        if ctypes.sizeof(ctypes.c_void_p) == 8:  # the struct below is that of 64 bits
            return ctypes.PyDLL(None).fcntl
    except (ImportError, MemoryError, AttributeError, OSError):
        pass  # Python can be built without it, and memory be kept from being code
    return _python_fcntl


def _python_fcntl(fd: int, command: int, lock: bytes) -> int:
    try:
        fcntl.fcntl(fd, command, lock)
    except OSError:
        return -1
    return 0


_SET_LOCK: Final = fcntl.F_OFD_SETLK
_GET_LOCK: Final = fcntl.F_OFD_GETLK
_PAUSE: Final = 0.0001  # seconds between two tries while another process holds a lock
_fcntl = _find_fcntl()


def _pack_lock(kind: int, place: int) -> bytes:
    """Return a struct flock for the byte at `place`; l_whence and l_pid are 0."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0)


class FileLock:
    """The lock on the byte at `place` of the open file `fd`."""

    def __init__(self, fd: int, place: int) -> None:
        self._fd = fd
        self._locked = _pack_lock(fcntl.F_WRLCK, place)
        self._unlocked = _pack_lock(fcntl.F_UNLCK, place)

    def try_lock(self) -> bool:
        """Lock at once if no other open file has the lock, and return whether it is locked."""
        return bool(_fcntl(self._fd, _SET_LOCK, self._locked) == 0)

    def wait(self, seconds: float) -> bool:
        """Like `try_lock`, but wait up to `seconds` while another open file has the lock.

        Raises OSError if the file system has no locks.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.fcntl(self._fd, _SET_LOCK, self._locked)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_PAUSE)
            else:
                return True

    def unlock(self) -> None:
        """Free the lock, unless another open file has it."""
        _fcntl(self._fd, _SET_LOCK, self._unlocked)

    def is_held_elsewhere(self) -> bool:
        """Whether another open file has the lock."""
        answer = fcntl.fcntl(self._fd, _GET_LOCK, self._locked)
        kind: int = struct.unpack_from("h", answer)[0]
        return kind != fcntl.F_UNLCK


# Limits


class _Slot:
    """The part of the file of one key."""

    def __init__(self, base: int, cells: memoryview[int], lock: FileLock) -> None:
        self.base = base
        self.cells = cells
        self.lock = lock
        self.read: list[int] = []  # the cells when they were read last
        self.history: History | None = None  # the one that was compared last


class SharedLimits:
    """Keeps the limits of keys in the file, as one process uses it, on one thread.

    Times are unix seconds, money is in picodollars. Callers without limits are not passed to it.
    `close` frees what it holds.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or make the file at `path`. Raises OSError if that, or its locks, cannot be had."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Allocated now: a disk that is full later would end the process at a store to memory.
            os.posix_fallocate(self._fd, 0, _SIZE)
            self._map = mmap.mmap(self._fd, _SIZE)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map).cast("q")
        self._table_lock = FileLock(self._fd, 0)
        self._slots: dict[str, _Slot] = {}
        self._is_late = False
        self._number = -1
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, and with it free the locks of this process."""
        self._slots.clear()  # and with them their parts of the map
        self._view.release()
        with suppress(BufferError):  # a traceback has a slot, and closes the map with it
            self._map.close()
        os.close(self._fd)

    # Processes

    def _join(self) -> None:
        """Take a number, and clear its column of what a dead process left."""
        view = self._view
        self._lock(self._table_lock)
        try:
            is_alone = not any(self._is_alive(number) for number in range(MAX_PROCESSES))
            if view[_MAGIC] not in (0, MAGIC):  # another version's
                if not is_alone:
                    raise OSError("processes of another version use it; stop those first")
                self._map[:] = bytes(_SIZE)
            if is_alone:
                self._forget_processes()
            view[_MAGIC] = MAGIC
            self._number = self._take_number()
            self._clear_column(self._number)
        finally:
            self._table_lock.unlock()

    def _take_number(self) -> int:
        for number in range(MAX_PROCESSES):
            if self._process_lock(number).try_lock():
                self._view[_PROCESSES_USED] = max(self._view[_PROCESSES_USED], number + 1)
                return number
        raise OSError(f"expected up to {MAX_PROCESSES} processes to share the limits, got more")

    def _process_lock(self, number: int) -> FileLock:
        return FileLock(self._fd, _SIZE + number)  # beyond the end, where nothing else is locked

    def _is_alive(self, number: int) -> bool:
        """Whether a process has that number."""
        return number == self._number or self._process_lock(number).is_held_elsewhere()

    def _forget_processes(self) -> None:
        """Have every key's history read from the records again, since no other process lives."""
        for base in self._used_slots():
            self._view[base + _HAS_HISTORY] = 0
        for number in range(self._view[_PROCESSES_USED]):
            self._clear_column(number)
        self._view[_PROCESSES_USED] = 0

    def _clear_column(self, number: int) -> None:
        for base in self._used_slots():
            self._view[base + _RUNNING + number] = self._view[base + _HELD + number] = 0

    def _used_slots(self) -> list[int]:
        numbers = self._view[_NUMBERS:_SLOTS].tolist()
        return [_SLOTS + place * _SLOT for place, number in enumerate(numbers) if number]

    # Slots

    def _lock(self, lock: FileLock) -> None:
        """Lock; while another process holds the lock, wait for it, but not for long."""
        if lock.try_lock():
            return
        is_locked = lock.wait(LOCK_PATIENCE)
        if not is_locked and not self._is_late:
            # A process stopped by a debugger must not stop all others: go on without the lock.
            logger.error("limits: another process holds a lock and does not run; counting goes on")
        self._is_late = not is_locked

    def _lock_slot(self, slot: _Slot) -> list[int]:
        """Lock a slot, and return a copy of its cells."""
        self._lock(slot.lock)
        return self._read(slot)

    def _read(self, slot: _Slot) -> list[int]:
        # As a list: integers of a memoryview cost many times as much, each time.
        slot.read = cells = slot.cells.tolist()
        return cells.copy()

    def _write(self, slot: _Slot, cells: list[int]) -> None:
        """Write the cells that were changed since `_read`, under the same lock."""
        shared, before = slot.cells, slot.read
        for place in range(CELLS):
            if cells[place] != before[place]:
                shared[place] = cells[place]

    def _add(self, slot: _Slot, limits: KeyLimits, calls: int, cost: int) -> None:
        """Add to the calls in flight of this process, and to the money held for them."""
        if calls and limits.concurrency is not None:
            self._view[slot.base + _RUNNING + self._number] += calls
        if cost:
            self._view[slot.base + _HELD + self._number] += cost

    def _slot_of(self, caller: Caller, now_ms: int) -> _Slot:
        slot = self._slots.get(caller.key_id)
        if slot is None:
            slot = self._slots[caller.key_id] = self._find(caller.key_id)
        if slot.history is not caller.history:
            self._compare_history(slot, caller.history, now_ms)
        return slot

    def _find(self, key_id: str) -> _Slot:
        """Return the slot of a key, a free one if the key had none."""
        digest = hashlib.sha256(key_id.encode()).digest()
        number = int.from_bytes(digest[:7], "big") + 1  # 0 is a free slot
        view = self._view
        self._lock(self._table_lock)
        try:
            for step in range(SLOTS):
                place = (number + step) % SLOTS
                found = view[_NUMBERS + place]
                if found in (0, number):
                    view[_NUMBERS + place] = number
                    base = _SLOTS + place * _SLOT
                    cells = view[base + _CELLS : base + _RUNNING]
                    return _Slot(base, cells, FileLock(self._fd, 8 * base))
        finally:
            self._table_lock.unlock()
        logger.error("limits: expected up to %d limited keys, got more", SLOTS)
        raise UnavailableError("there is no room for another key's limits", code="overloaded")

    def _compare_history(self, slot: _Slot, history: History, now_ms: int) -> None:
        """Begin with a key's usage by the records, or raise the cells to it."""
        slot.history = history
        cells = self._lock_slot(slot)
        try:
            if self._view[slot.base + _HAS_HISTORY]:
                catch_up(cells, history, now_ms)
            else:
                restore(cells, history, now_ms)
            self._write(slot, cells)
            self._view[slot.base + _HAS_HISTORY] = 1
        finally:
            slot.lock.unlock()

    def _count_running(self, slot: _Slot, limits: KeyLimits) -> int:
        """Return the calls in flight, 0 without a limit; dead processes' are forgotten."""
        limit = limits.concurrency
        if limit is None:
            return 0
        view, start, running = self._view, slot.base + _RUNNING, 0
        processes: int = view[_PROCESSES_USED]
        for number in range(processes):
            running += view[start + number]
        if running < limit:  # whatever the dead have left in it
            return running
        for number in range(processes):
            place = start + number
            if view[place] and not self._is_alive(number):
                running -= view[place]
                view[place] = 0
        return running

    def _held_for(self, slot: _Slot, cells: list[int], limits: KeyLimits, cost: int) -> int:
        """Return the money held for calls in flight, 0 if a call of `cost` fits the budget."""
        if limits.budget is None or spent_in(cells, limits.budget_period) + cost < limits.budget:
            return 0
        return self._sum_held(slot)

    def _sum_held(self, slot: _Slot) -> int:
        """Return the picodollars held for calls in flight; what a dead process held is spent.

        Calls that began in an earlier day or month are among them: this is for messages, and for
        calls that cost nothing.
        """
        start = slot.base + _HELD
        columns = self._view[start : start + self._view[_PROCESSES_USED]].tolist()
        return sum(held for number, held in enumerate(columns) if held and self._is_alive(number))

    # Calls

    def admit(self, caller: Caller, now: float, demand: Demand) -> Lease | None:
        """Admit a call, or raise AccessError; return None if nothing is to be settled."""
        lease = self._count_in(caller, now, demand)
        # Always, where calls in flight are counted, whatever the limits are when it ends.
        return lease if _limits_of(caller).needs_settling else None

    def enter(self, caller: Caller, now: float) -> Lease:
        """Count a call whose body is still to come; pass the lease to `reserve` or `leave`.

        Raises AccessError if no body could make it pass.
        """
        return self._count_in(caller, now, None)

    def _count_in(self, caller: Caller, now: float, demand: Demand | None) -> Lease:
        """Count a call, and hold what it may take if its `demand` is known."""
        limits = _limits_of(caller)
        now_ms = int(now * 1000)
        slot = self._slot_of(caller, now_ms)
        cells = self._lock_slot(slot)
        try:
            running = self._count_running(slot, limits)
            if demand is None:
                held = self._held_for(slot, cells, limits, 0)
                lease = enter(cells, limits, now_ms, running=running, held=held)
            else:
                held = self._held_for(slot, cells, limits, demand.prompt_cost + demand.answer_cost)
                lease = admit(cells, limits, now_ms, demand, running=running, held=held)
            self._write(slot, cells)
            self._add(slot, limits, 1, lease.cost)
        finally:
            slot.lock.unlock()
        return lease

    def reserve(self, caller: Caller, now: float, demand: Demand, entered: Lease) -> Lease | None:
        """Hold what a call of `enter` may take; return what `admit` would.

        Raises AccessError, and then `entered` is still to be given back by `leave`.
        """
        limits = _limits_of(caller)
        if limits.budget is None and limits.tokens_per_minute is None:
            entered.is_reserved = True
            return entered if limits.needs_settling else None
        now_ms = int(now * 1000)
        slot = self._slot_of(caller, now_ms)
        cells = self._lock_slot(slot)
        try:
            held = self._held_for(slot, cells, limits, demand.prompt_cost + demand.answer_cost)
            lease = reserve(cells, limits, now_ms, demand, held=held)
            self._write(slot, cells)
            self._add(slot, limits, 0, lease.cost)
        finally:
            slot.lock.unlock()
        return lease

    def leave(self, caller: Caller, lease: Lease) -> None:
        """Take back the count of a call of `enter` for which nothing was reserved."""
        slot = self._slots[caller.key_id]
        cells = self._lock_slot(slot)
        try:
            leave(cells, lease)
            self._write(slot, cells)
            self._add(slot, _limits_of(caller), -1, 0)
        finally:
            slot.lock.unlock()

    def settle(self, caller: Caller, lease: Lease, *, tokens: int, spent: int) -> None:
        """End an admitted call, which took `tokens` and cost `spent`."""
        self._settle(caller, lease, tokens, spent, -1)

    def amend(self, caller: Caller, lease: Lease, *, tokens: int, spent: int) -> None:
        """Add `tokens` and `spent`, which may be negative, to those of a settled call."""
        self._settle(caller, lease.settled(), tokens, spent, 0)

    def _settle(self, caller: Caller, lease: Lease, tokens: int, spent: int, calls: int) -> None:
        slot = self._slots[caller.key_id]
        cells = self._lock_slot(slot)
        try:
            settle(cells, lease, tokens=tokens, spent=spent)
            self._write(slot, cells)
            self._add(slot, _limits_of(caller), calls, -lease.cost)
        finally:
            slot.lock.unlock()

    # What a key has left

    def lines(self, caller: Caller, now: float) -> bytes:
        """Return the x-ratelimit-* header lines of an answer to `caller`."""
        slot = self._slots.get(caller.key_id)
        if slot is None or caller.limits is None:
            return b""
        return limit_lines(self._read(slot), caller.limits, int(now * 1000))

    def counters(self, caller: Caller, now: float) -> list[int]:
        """Return a copy of the key's cells as of `now`, by their places in access/limits.py."""
        now_ms = int(now * 1000)
        cells = self._read(self._slot_of(caller, now_ms))
        roll(cells, now_ms)
        return cells


def _limits_of(caller: Caller) -> KeyLimits:
    limits = caller.limits
    assert limits is not None, "a caller without limits is not passed to a limiter"
    return limits
