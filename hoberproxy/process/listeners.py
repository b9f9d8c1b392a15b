"""The listening sockets for clients and scrapers, bound here or handed over by systemd.

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..config.settings import Address

logger = logging.getLogger("hoberproxy.server")

BACKLOG = 4096  # connections that wait to be accepted: a burst of clients that start together
# Seconds for processes of an earlier run to let go of an address: after a kill they notice it, and
# close their copies of its sockets, as soon as they come to it.
FREE_WITHIN = 10.0
FREE_AT_ONCE = 1.0  # seconds for the same if none of them seems to live: one is just ending
TRY_INTERVAL = 0.1
# Of an answer, in the system's hands and not yet on its way, for each client. By itself that grows
# to 4 MB for one who does not read, and some hundred of these take all memory that the system has
# for TCP: then it drops what others send and receive. What is on its way is not limited by this.
UNSENT_BYTES = 512 * 1024


class StartError(Exception):
    """A process cannot start; the message says why."""

    @property
    def problems(self) -> list[str]:
        """The lines of the message, as ConfigError has them."""
        return str(self).split("\n")


@dataclass(slots=True)
class Listeners:
    """Listening sockets by what they are for. `is_passed`: systemd's, whatever the config says."""

    clients: dict[Address, list[socket.socket]] = field(default_factory=dict)
    metrics: list[socket.socket] = field(default_factory=list)
    is_passed: bool = False

    @property
    def addresses(self) -> list[Address]:
        """The addresses of the sockets for clients, with the ports that the system chose."""
        return [name_of(sockets[0]) for sockets in self.clients.values()]

    async def listen(
        self, addresses: Iterable[Address], has_predecessor: Callable[[], bool]
    ) -> None:
        """Listen for clients at those of `addresses` that are not listened at. Raises StartError.

        What systemd has opened takes the place of all of them. `has_predecessor`: as in
        `bind_when_free`.
        """
        if self.is_passed:
            return
        for address in addresses:
            if address not in self.clients:
                self.clients[address] = await bind_when_free(
                    address, has_predecessor, "{}; choose another with --listen"
                )

    def keep(self, addresses: Iterable[Address]) -> None:
        """Close the sockets for clients that are of no address of these."""
        if self.is_passed:
            return
        for address in self.clients.keys() - set(addresses):
            for each in self.clients.pop(address):
                each.close()

    def close(self) -> None:
        """Close this process's copies of all sockets."""
        for each in (*flat(self.clients.values()), *self.metrics):
            each.close()


def flat(groups: Iterable[list[socket.socket]]) -> list[socket.socket]:
    """Return the sockets of all groups in one list."""
    return [each for group in groups for each in group]


def name_of(listener: socket.socket) -> Address:
    """Return where a socket is bound; of a Unix socket its path, with port 0."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return Address(name[0], name[1])
    return Address(os.fsdecode(name), 0)


def bind(address: Address) -> list[socket.socket]:
    """Listen at each address that the host's name leads to. Raises StartError."""
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


async def bind_when_free(
    address: Address, has_predecessor: Callable[[], bool], words: str
) -> list[socket.socket]:
    """Call `bind` once nobody listens at the address any more.

    Waits for FREE_WITHIN seconds while `has_predecessor` says that processes of an earlier run are
    still there; an address that is another program's is an error. Raises StartError, whose message
    is `words` with the problem in place of "{}".
    """
    begun = time.monotonic()
    is_logged = False
    while True:
        try:
            return bind(address)
        except StartError as error:
            waited = time.monotonic() - begun
            may_wait = _is_in_use(error) and waited < FREE_WITHIN
            is_ending = may_wait and has_predecessor()
            if not may_wait or (not is_ending and waited >= FREE_AT_ONCE):
                raise StartError(words.format(error)) from error
            if is_ending and not is_logged:
                logger.warning(
                    "%s: processes of an earlier run are ending; trying for %g s",
                    error,
                    FREE_WITHIN,
                )
                is_logged = True
        await asyncio.sleep(TRY_INTERVAL)


def _is_in_use(error: StartError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE


def limit_unsent(listener: socket.socket) -> None:
    """Limit the unsent bytes that the system keeps for each connection of a listening socket."""
    with contextlib.suppress(AttributeError, OSError):  # a system without it; a Unix socket
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
