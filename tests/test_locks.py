"""Both kinds of lock: one holder at a time, and none that is dead."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

import pytest

from hoberproxy import locks as locks_module
from hoberproxy.locks import MUTEX_BYTES, OWNER_DIED, FileLocks, Locks, MutexLocks

from .patience import WAIT

PROCESSES = multiprocessing.get_context("spawn")
PLACE = MUTEX_BYTES
KINDS = ("mutexes", "file locks")


@contextmanager
def opened(path: Path, kind: str) -> Iterator[Locks]:
    """The locks of one more who uses the file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 4096)
    memory = mmap(fd, 4096)
    try:
        yield FileLocks(fd) if kind == "file locks" else MutexLocks(memory)
    finally:
        os.close(fd)  # the map goes with the last handle on it


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_two_has_it(tmp_path: Path, kind: str) -> None:
    with opened(tmp_path / "locks", kind) as one, opened(tmp_path / "locks", kind) as other:
        mine, theirs = one.handle(PLACE), other.handle(PLACE)
        beside = one.handle(2 * PLACE)
        for handle in (mine, beside):
            one.make(handle)
        assert one.try_lock(mine) == 0
        assert other.try_lock(theirs) in (errno.EBUSY, errno.EAGAIN)
        assert other.try_lock(other.handle(2 * PLACE)) == 0
        one.unlock(mine)
        assert other.try_lock(theirs) == 0
        for handle in (theirs, other.handle(2 * PLACE)):
            other.unlock(handle)


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_it_not_cannot_free_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "locks"
    with opened(path, kind) as one, opened(path, kind) as other:
        mine = one.handle(PLACE)
        one.make(mine)
        assert one.try_lock(mine) == 0
        process = PROCESSES.Process(target=free, args=(path, kind))
        process.start()
        process.join(WAIT)
        assert process.exitcode == 0
        assert other.try_lock(other.handle(PLACE)) != 0
        one.unlock(mine)


def free(path: Path, kind: str) -> None:
    with opened(path, kind) as locks:
        locks.unlock(locks.handle(PLACE))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_holder_has_it_no_more(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "locks"
    with opened(path, kind) as one, opened(path, kind) as other:
        mine = one.handle(PLACE)
        one.make(mine)
        process = PROCESSES.Process(target=die, args=(path, kind))
        process.start()
        process.join(WAIT)
        assert process.exitcode == 7  # it had it
        told = one.try_lock(mine)
        assert told == (OWNER_DIED if kind == "mutexes" else 0)
        one.recover(mine)
        assert other.try_lock(other.handle(PLACE)) != 0
        one.unlock(mine)
        assert other.try_lock(other.handle(PLACE)) == 0
        other.unlock(other.handle(PLACE))


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_held_is_waited_for_so_long(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "locks"
    with opened(path, kind) as one, opened(path, kind) as other:
        mine, theirs = one.handle(PLACE), other.handle(PLACE)
        one.make(mine)
        assert one.try_lock(mine) == 0
        began = time.monotonic()
        assert other.wait(theirs, 0.05) not in (0, OWNER_DIED)
        assert time.monotonic() - began >= 0.05
        process = PROCESSES.Process(target=wait, args=(path, kind))
        process.start()
        time.sleep(0.5)  # by then it waits, or soon will
        one.unlock(mine)
        process.join(WAIT)
        assert process.exitcode == 7
        assert other.wait(theirs, WAIT) == (OWNER_DIED if kind == "mutexes" else 0)
        other.recover(theirs)
        other.unlock(theirs)


def wait(path: Path, kind: str) -> None:
    with opened(path, kind) as locks:
        if locks.wait(locks.handle(PLACE), WAIT) == 0:
            os._exit(7)


def die(path: Path, kind: str) -> None:
    with opened(path, kind) as locks:
        if locks.try_lock(locks.handle(PLACE)) == 0:
            os._exit(7)


def test_without_ctypes_there_are_no_mutexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks_module, "ctypes", None)
    with pytest.raises(OSError), opened(tmp_path / "locks", "mutexes"):
        pass
