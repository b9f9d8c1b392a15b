"""The sockets that clients connect to: bound here, or handed over by systemd.

Whoever has a copy of a listening socket keeps its waiting connections: workers come and go on the
supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import TypeVar

from .settings import Address

logger = logging.getLogger("hoberproxy.server")
Listening = TypeVar("Listening")

BACKLOG = 4096  # connections that wait to be accepted: a burst of clients that start together
FIRST_PASSED = 3  # systemd's first descriptor (sd_listen_fds(3))
# Seconds for processes of an earlier run to let go of an address: after a kill they notice it, and
# close their copies of its sockets, as soon as they come to it.
FREE_WITHIN = 10.0
FREE_AT_ONCE = 1.0  # seconds for the same if none of them seems to live: one is just ending
TRY_INTERVAL = 0.1
# Of an answer, in the system's hands and not yet on its way, for each client. By itself that grows
# to 4 MB for one who does not read, and some hundred of these take all memory that the system has
# for TCP: then it drops what others send and receive. What is on its way is not limited by this.
UNSENT_BYTES = 512 * 1024
METRICS_NAME = "metrics"  # FileDescriptorName= of a socket that is not for clients


class StartError(Exception):
    """The process cannot start; the message says what was in the way."""

    @property
    def problems(self) -> list[str]:
        """As ConfigError has them."""
        return str(self).split("\n")


@dataclass(slots=True)
class Listeners:
    """Listening sockets by what they are for. `is_passed`: systemd's, whatever the config says."""

    clients: dict[Address, list[socket.socket]] = field(default_factory=dict)
    metrics: list[socket.socket] = field(default_factory=list)
    is_passed: bool = False

    @property
    def addresses(self) -> list[Address]:
        """Where clients are really listened to, the port chosen where the config left it open."""
        return [name_of(sockets[0]) for sockets in self.clients.values()]

    def close(self) -> None:
        """Close our copies."""
        for each in (*flat(self.clients.values()), *self.metrics):
            each.close()


def flat(groups: Iterable[list[socket.socket]]) -> list[socket.socket]:
    """All sockets of all groups."""
    return [each for group in groups for each in group]


def name_of(listener: socket.socket) -> Address:
    """Where a socket is bound; of a Unix socket its path, with port 0."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return Address(name[0], name[1])
    return Address(os.fsdecode(name), 0)


def bind(address: Address) -> list[socket.socket]:
    """A listening socket for each address that the host's name leads to. Raises StartError."""
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, name in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            bound.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            limit_unsent(listener)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if address.port == 0 and len(bound) > 1:  # one port for all of them
                name = (name[0], bound[0].getsockname()[1], *name[2:])
            listener.bind(name)
            listener.listen(BACKLOG)
            listener.setblocking(False)
    except OSError as exc:
        for listener in bound:
            listener.close()
        raise StartError(f"cannot listen on {address}: {exc.strerror or exc}") from exc
    return bound


async def listen_when_free(
    listen: Callable[[], Awaitable[Listening]], has_predecessor: Callable[[], bool]
) -> Listening:
    """Return what `listen` returns, once nobody listens on its address any more.

    Waits for FREE_WITHIN seconds while `has_predecessor` says that processes of an earlier run are
    still there; an address that is another program's is an error. Raises what `listen` does.
    """
    begun = time.monotonic()
    is_told = False
    while True:
        try:
            return await listen()
        except (OSError, StartError) as exc:
            waited = time.monotonic() - begun
            if not _is_in_use(exc) or waited >= FREE_WITHIN:
                raise
            is_ending = has_predecessor()
            if not is_ending and waited >= FREE_AT_ONCE:
                raise
            if is_ending and not is_told:
                logger.warning(
                    "%s: processes of an earlier run are ending; trying for %g s", exc, FREE_WITHIN
                )
                is_told = True
        await asyncio.sleep(TRY_INTERVAL)


async def listen_for_clients(
    address: Address, has_predecessor: Callable[[], bool]
) -> list[socket.socket]:
    """`bind` for clients, once the address is free. Raises StartError."""
    try:
        return await _bind_when_free(address, has_predecessor)
    except StartError as error:
        raise StartError(f"{error}; choose another with --listen") from error


async def listen_for_metrics(
    address: Address, has_predecessor: Callable[[], bool]
) -> list[socket.socket]:
    """`bind` for scrapers, once the address is free. Raises StartError."""
    try:
        return await _bind_when_free(address, has_predecessor)
    except StartError as error:
        advice = 'choose another, or "off", as server.metrics_listen'
        raise StartError(f"metrics: {error}; {advice}") from error


async def _bind_when_free(
    address: Address, has_predecessor: Callable[[], bool]
) -> list[socket.socket]:
    async def listen() -> list[socket.socket]:
        return bind(address)

    return await listen_when_free(listen, has_predecessor)


def _is_in_use(error: BaseException | None) -> bool:
    if isinstance(error, StartError):
        return _is_in_use(error.__cause__)
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def limit_unsent(listener: socket.socket) -> None:
    """Give the connections that come of a listening socket their share of the system's memory."""
    with contextlib.suppress(AttributeError, OSError):  # a system without it; a Unix socket
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def passed_by_systemd(environ: MutableMapping[str, str]) -> Listeners | None:
    """What systemd opened for us (sd_listen_fds(3)), None without; children are not told."""
    pid = environ.pop("LISTEN_PID", None)
    count = environ.pop("LISTEN_FDS", None)
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or count is None or not count.isdecimal() or int(count) == 0:
        return None
    listeners = Listeners(is_passed=True)
    for index in range(int(count)):
        try:
            listener = socket.socket(fileno=FIRST_PASSED + index)
        except OSError as exc:
            raise StartError(f"descriptor {FIRST_PASSED + index} of systemd is no socket") from exc
        listener.set_inheritable(False)
        listener.setblocking(False)
        limit_unsent(listener)
        with contextlib.suppress(OSError):  # a longer queue than the unit's, if it may be
            listener.listen(BACKLOG)
        if index < len(names) and names[index] == METRICS_NAME:
            listeners.metrics.append(listener)
        else:
            listeners.clients[name_of(listener)] = [listener]
    if not listeners.clients:
        raise StartError("systemd handed over no socket for clients")
    return listeners
