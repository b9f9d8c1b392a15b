"""Locks among the processes of one machine, which the kernel frees with their holder.

`MutexLocks` are robust mutexes of the C library in memory that the processes share: to take one
and to free it are two atomic instructions, no system call, and who takes one after its holder's
death is told so. `FileLocks` are locks on a byte of an open file, for two system calls.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from mmap import mmap
from typing import Any, Protocol

try:
    import ctypes
except (ImportError, MemoryError):  # Python can be built without it; memory be kept from being code
    ctypes = None  # type: ignore[assignment]

MUTEX_BYTES = 64  # room for a pthread_mutex_t: 40 bytes, 48 on ARM
OWNER_DIED = errno.EOWNERDEAD

PAUSE = 0.0001  # seconds between two looks at a file's lock
TRIES = 20  # for a mutex, before the kernel is asked to wait: as long as it is held, as a rule

_PROCESS_SHARED = 1  # PTHREAD_PROCESS_SHARED and PTHREAD_MUTEX_ROBUST, in glibc and musl alike
_ROBUST = 1
_ATTRIBUTES_BYTES = 64
_SETLK = fcntl.F_OFD_SETLK  # locks of the open file: not lost when another descriptor is closed


class Locks(Protocol):
    """A kind of lock. Places are bytes from the start of the file, or of the memory mapped to it.

    A lock is freed by the thread that took it, and before the memory goes: the C library keeps a
    list of the mutexes that a thread holds, within these.
    """

    def handle(self, place: int) -> Any:
        """What the other methods want of the lock at this place."""

    def make(self, handle: Any) -> None:
        """Before the lock's first use, and when all who could hold it are known to be gone."""

    def try_lock(self, handle: Any) -> int:
        """0: it is taken. OWNER_DIED: too, once `recover` is called. Else it is another's."""

    def wait(self, handle: Any, seconds: float) -> int:
        """The same for one that is another's, which may be waited for."""

    def unlock(self, handle: Any) -> object:
        """Free it; without effect on one that is another's."""

    def recover(self, handle: Any) -> None:
        """Take over from an owner that died."""


class FileLocks:
    """Locks on bytes of an open file, by `fcntl`: it lets the GIL go, and may wait for it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def handle(self, place: int) -> tuple[bytes, bytes]:
        return _file_lock(fcntl.F_WRLCK, place), _file_lock(fcntl.F_UNLCK, place)

    def make(self, handle: tuple[bytes, bytes]) -> None:
        pass

    def try_lock(self, handle: tuple[bytes, bytes]) -> int:
        try:
            fcntl.fcntl(self._fd, _SETLK, handle[0])
        except BlockingIOError:
            return errno.EAGAIN
        return 0

    def wait(self, handle: tuple[bytes, bytes], seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (told := self.try_lock(handle)) and time.monotonic() < deadline:
            time.sleep(PAUSE)
        return told

    def unlock(self, handle: tuple[bytes, bytes]) -> None:
        fcntl.fcntl(self._fd, _SETLK, handle[1])

    def recover(self, handle: tuple[bytes, bytes]) -> None:
        pass

    def is_taken(self, handle: tuple[bytes, bytes]) -> bool:
        """Whether another open file has it."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, handle[0])
        kind: int = struct.unpack_from("h", answer)[0]
        return kind != fcntl.F_UNLCK


def _file_lock(kind: int, start: int) -> bytes:
    """A struct flock for one byte: whence is the file's start, l_pid has to be 0."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, 1, 0)


class MutexLocks:
    """Robust mutexes within `memory`, which has to be shared. OSError where there are none."""

    def __init__(self, memory: mmap) -> None:
        self._memory = memory
        if ctypes is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError(errno.ENOSYS, "this Python has no way to the C library's mutexes")
        # PyDLL and not CDLL: a call lets the GIL go with the latter, and while another thread is
        # at work it takes up to 5 ms to have it back.
        library = ctypes.PyDLL(None)
        try:
            self._init = library.pthread_mutex_init
            self.recover = library.pthread_mutex_consistent
            # The functions themselves: a method around them would cost as much as they do.
            self.try_lock = library.pthread_mutex_trylock
            self.unlock = library.pthread_mutex_unlock
            self._wait = library.pthread_mutex_timedlock
            self._attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
            failed = (
                library.pthread_mutexattr_init(self._attributes)
                or library.pthread_mutexattr_setpshared(self._attributes, _PROCESS_SHARED)
                or library.pthread_mutexattr_setrobust(self._attributes, _ROBUST)
            )
        except AttributeError as exc:
            raise OSError(errno.ENOSYS, "the C library has no robust mutexes") from exc
        if failed or not self._do_work():
            raise OSError(errno.ENOSYS, "the C library's robust mutexes do not work here")

    def handle(self, place: int) -> Any:
        buffer = (ctypes.c_char * MUTEX_BYTES).from_buffer(self._memory, place)
        return ctypes.byref(buffer)  # keeps the buffer, and that the memory

    def make(self, handle: Any) -> None:
        if problem := self._init(handle, self._attributes):
            raise OSError(problem, os.strerror(problem))

    def wait(self, handle: Any, seconds: float) -> int:
        for _ in range(TRIES):
            if (told := int(self.try_lock(handle))) != errno.EBUSY:
                return told
        # Its holder was scheduled away: to go on asking would take its core.
        # By the wall clock, the only one that every C library can wait by.
        until = time.time_ns() + round(seconds * 1e9)
        deadline = struct.pack("qq", *divmod(until, 10**9))  # a struct timespec
        return int(self._wait(handle, deadline))

    def _do_work(self) -> bool:
        """Try one out: another C library may mean something else by our constants."""
        probe = ctypes.byref(ctypes.create_string_buffer(MUTEX_BYTES))
        self.make(probe)
        told = [self.try_lock(probe), self.try_lock(probe), self.unlock(probe), self.unlock(probe)]
        return told == [0, errno.EBUSY, 0, errno.EPERM]
