"""Bounds of one process, or of all together: streams, bytes of request bodies, connections."""

from __future__ import annotations

import logging
import math
from mmap import mmap
from operator import attrgetter
from typing import Any, Final, Protocol

from ..config.settings import ServerSettings
from ..errors import UnavailableError

logger = logging.getLogger("hoberproxy.server")

RETRY_AFTER: Final = 1.0  # seconds; a stream ends somewhere every moment on a proxy this busy
# All n connections are searched for waiting ones only after n/64 new ones have come.
LOOK_SHARE: Final = 64
WARN_INTERVAL: Final = 10.0  # seconds
ROOM_SHARE: Final = 8  # an eighth of the waiting connections is closed at a time
_WAITING_SINCE: Final = attrgetter("waiting_since")
MEMORY_SHARE: Final = 4  # a quarter of the machine's memory is for bodies
DEFAULT_BODY_MEMORY: Final = 512 * 1024 * 1024  # if the machine does not say how much it has
# Processes that share streams and limits: a reload or an upgrade has twice as many as workers.
MAX_PROCESSES: Final = 128
MAX_WORKERS: Final = MAX_PROCESSES // 2
# An integer for each process, and the number of those in use.
STREAM_COUNTS_BYTES: Final = 8 * (MAX_PROCESSES + 1)


class BodyMemory:
    """The bytes of request bodies that one process holds, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def hold(self, more: int) -> None:
        """Hold `more` bytes, or release some where it is negative.

        Raises UnavailableError where they are too many, and then holds none of them.
        """
        held = self.held + more
        if more > 0 and held > self.limit:
            raise UnavailableError(
                "this proxy holds as many bytes of request bodies as it may; try again",
                code="overloaded",
                retry_after=RETRY_AFTER,
            )
        self.held = held


class Connection(Protocol):
    """A client's connection, which may be waiting for a request or for the rest of a head."""

    @property
    def is_waiting(self) -> bool: ...

    @property
    def waiting_since(self) -> float: ...

    def abort(self) -> None: ...


class ConnectionRoom:
    """Makes room for new connections when more than `limit` clients are connected to a process.

    Without a free descriptor the system would drop new connections silently, and no model server
    could be reached.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._newcomers = 0  # since the last search
        self._closed = 0  # since the last line of the log
        self._warned_at = -math.inf  # loop time

    def make(self, connections: set[Any], newcomer: Connection, now: float) -> None:
        """Close those of `connections` that have waited longest, and remove them from the set.

        Raises UnavailableError if none but the `newcomer` waits, or if the last search was too few
        new connections ago. `now` is loop time.
        """
        waiting: list[Connection] = []
        self._newcomers += 1
        if self._newcomers * LOOK_SHARE >= len(connections):
            self._newcomers = 0
            waiting = [each for each in connections if each is not newcomer and each.is_waiting]
        if not waiting:
            raise UnavailableError(
                f"expected at most {self.limit} connections, got more; try again",
                code="overloaded",
                retry_after=RETRY_AFTER,
            )
        waiting.sort(key=_WAITING_SINCE)
        oldest = waiting[: 1 + len(waiting) // ROOM_SHARE]
        for each in oldest:
            connections.discard(each)
            each.abort()
        self._closed += len(oldest)
        self._warn(now)

    def _warn(self, now: float) -> None:
        if now - self._warned_at < WARN_INTERVAL:
            return
        logger.warning(
            "closed %d waiting connections: this process may have %d, by its limit of open files",
            self._closed,
            self.limit,
        )
        self._warned_at, self._closed = now, 0


def body_memory_limit(settings: ServerSettings, memory: int, workers: int) -> int:
    """Return the bytes of bodies that one of `workers` processes may hold, at least one body's.

    `memory` is that of the machine in bytes, 0 if it is not known.
    """
    all_workers = settings.max_body_memory or memory // MEMORY_SHARE or DEFAULT_BODY_MEMORY
    return max(all_workers // workers, settings.max_body_bytes)


# Streams


class StreamCounts:
    """The chat requests that run in each of several processes, in `memory` that all of them map.

    Each process writes the integer of its own `slot` alone, so that nothing is locked, and reads
    all; the supervisor clears that of a process that died.
    """

    def __init__(self, memory: mmap, slot: int) -> None:
        self._counts = memoryview(memory).cast("q")
        self._counts[MAX_PROCESSES] = max(self._counts[MAX_PROCESSES], slot + 1)
        self.slot = slot

    def set_own(self, count: int) -> None:
        """Note that `count` requests run in this process."""
        self._counts[self.slot] = count

    def total(self) -> int:
        """Return how many requests run in all processes."""
        return sum(self._counts[: self._counts[MAX_PROCESSES]])

    def clear(self, slot: int) -> None:
        """Forget the requests of the process that had `slot`."""
        self._counts[slot] = 0


class Admission:
    """Admits up to `max_streams` chat requests at a time, 0 for any number.

    They are counted over all processes by `counts`; None stands for a single process.
    """

    def __init__(self, max_streams: int, counts: StreamCounts | None = None) -> None:
        self._max_streams = max_streams
        self._counts = counts

    def admit(self, streams: int) -> None:
        """Admit a request as one of `streams` of this process, or raise UnavailableError."""
        limit, counts = self._max_streams, self._counts
        if not limit:
            return
        total = streams
        if counts is not None:
            counts.set_own(streams)
            total = counts.total()
        if total > limit:
            raise UnavailableError(
                f"this proxy serves {limit} requests at a time; try again",
                code="overloaded",
                retry_after=RETRY_AFTER,
            )

    def note_streams(self, streams: int) -> None:
        """Note that `streams` requests are left in this process."""
        if self._counts is not None:
            self._counts.set_own(streams)
