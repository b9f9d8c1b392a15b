"""Whether there is room: streams in all, bytes of bodies, connections or requests of one address.

A connection counts for the address it comes from. One of a trusted proxy counts for nobody; each
chat request on it counts, while it runs, for the address that the proxy names.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from operator import attrgetter
from typing import Any, Final, Protocol

from .errors import UnavailableError
from .settings import ServerSettings
from .tally import Tally

logger = logging.getLogger("hoberproxy.server")

RETRY_AFTER: Final = 1.0  # seconds; a stream ends somewhere every moment on a proxy this busy
NO_GROUP: Final = -1
# A look at all connections is paid for by so many new ones: one part of so many of their number.
LOOK_SHARE: Final = 64
WARN_INTERVAL: Final = 10.0  # seconds
ROOM_SHARE: Final = 8  # of what waits, one part of so many is closed at a time
_WAITING_SINCE: Final = attrgetter("waiting_since")
MEMORY_SHARE: Final = 4  # one part of so many of the machine's memory is for bodies
DEFAULT_BODY_MEMORY: Final = 512 * 1024 * 1024  # where the machine does not say how much it has


class BodyMemory:
    """What one process holds of request bodies, at most `limit` bytes of them."""

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
    """The part of a client's connection that is looked at."""

    @property
    def is_waiting(self) -> bool: ...

    @property
    def waiting_since(self) -> float: ...

    def abort(self) -> None: ...


class ConnectionRoom:
    """What is done when more than `limit` clients are connected to one process.

    Without files left the system would close new connections without a word, and no model server
    could be reached.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._newcomers = 0  # since the last look at all
        self._closed = 0  # since the log said so
        self._warned_at = -math.inf  # loop time

    def make(self, connections: set[Any], newcomer: Connection, now: float) -> None:
        """Close those of `connections` that have waited longest, and take them out of the set.

        Raises UnavailableError if there is nothing to close but the `newcomer`. `now` is loop time.
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
    """Bytes of bodies for one of `workers` processes on a machine with `memory` bytes (0: unknown).

    Never less than one body may have.
    """
    all_workers = settings.max_body_memory or memory // MEMORY_SHARE or DEFAULT_BODY_MEMORY
    return max(all_workers // workers, settings.max_body_bytes)


class Head(Protocol):
    """The part of a request's head that is looked at."""

    def get(self, name: bytes, /) -> bytes | None: ...


class Admission:
    """One per process. Without limits nothing is counted. `tally` is None in a single process
    that limits no addresses."""

    def __init__(self, settings: ServerSettings, tally: Tally | None = None) -> None:
        self._tally = tally
        self._streams = settings.max_streams
        self._connections = settings.max_connections_per_address if tally is not None else 0
        self._trusted = [ipaddress.ip_network(text) for text in settings.trusted_proxies]

    # Connections

    def enter(self, address: str) -> int:
        """A connection has come: the group to `leave` when it goes. Raises UnavailableError."""
        if not self._connections or not address or self._is_trusted(address):
            return NO_GROUP
        return self._enter(address)

    def leave(self, group: int) -> None:
        """A connection or request has ended."""
        if group != NO_GROUP and self._tally is not None:
            self._tally.leave(group)

    def _enter(self, address: str) -> int:
        assert self._tally is not None
        group = self._tally.group_of(address)
        if self._tally.enter(group) > self._connections:
            self._tally.leave(group)
            raise UnavailableError(
                f"expected at most {self._connections} connections from one address, got more",
                code="overloaded",
                retry_after=RETRY_AFTER,
            )
        return group

    # Requests

    def admit(self, head: Head, streams: int, group: int) -> int:
        """A request has come, as one of `streams` of this process, on a connection of `group`.

        Returns a group to `leave` at its end. Raises UnavailableError.
        """
        if self._streams:
            total = streams if self._tally is None else self._tally.set_streams(streams)
            if total > self._streams:
                raise UnavailableError(
                    f"this proxy serves {self._streams} requests at a time; try again",
                    code="overloaded",
                    retry_after=RETRY_AFTER,
                )
        if not self._connections or group != NO_GROUP:
            return NO_GROUP
        address = self._client_of(head.get(b"x-forwarded-for"))
        return self._enter(address) if address else NO_GROUP

    def note_streams(self, streams: int) -> None:
        """So many are left in this process."""
        if self._tally is not None:
            self._tally.set_own_streams(streams)

    def _client_of(self, forwarded: bytes | None) -> str:
        """The last address that no trusted proxy has: what stands before it anybody can write."""
        for each in reversed((forwarded or b"").decode("latin-1").split(",")):
            address = each.strip()
            try:
                ipaddress.ip_address(address)
            except ValueError:
                return ""
            if not self._is_trusted(address):
                return address
        return ""

    def _is_trusted(self, address: str) -> bool:
        if not self._trusted:
            return False
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._trusted)
