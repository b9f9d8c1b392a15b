"""Makes a new connection to a provider: looks up its name, reaches an address, does TLS.

All of this is within the connect limit; IPv6 and IPv4 are raced.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import aiohappyeyeballs

from ..errors import Phase, UpstreamError
from ..routing.catalog import Provider
from .tls import Tls

Connection = TypeVar("Connection")  # a protocol of asyncio, by its methods

logger = logging.getLogger("hoberproxy.upstream")

# How long an answer of the name service is used: short enough to follow a fail-over by DNS.
NAME_TTL = 30.0
# What the system may hold of an answer while its client is slower. By itself that grows to tens of
# MB on a fast network, and some hundred such streams take all memory that the system has for TCP. A
# model that writes 5 MB/s 100 ms away needs no more.
UNREAD_BYTES = 512 * 1024
HAPPY_EYEBALLS_DELAY = 0.25  # RFC 8305, section 8

AddressInfos = list[tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]]


class Connector:
    """Connects to one provider. All methods belong to the loop that made it."""

    def __init__(self, provider: Provider, loop: asyncio.AbstractEventLoop) -> None:
        self._provider = provider
        self._loop = loop
        self._tls = _tls_context(provider.ca_file) if provider.scheme == "https" else None
        self._addresses: AddressInfos = _literal_addresses(provider)
        self._addresses_until = float("inf") if self._addresses else 0.0
        self._lookup: asyncio.Task[AddressInfos] | None = None

    async def connect(self, limit: float, make: Callable[[], Connection]) -> Connection:
        """Return what `make` makes, connected within `limit` seconds.

        Raises UpstreamError (phase connect).
        """
        try:
            async with asyncio.timeout(limit):
                return await self._connect(make)
        except TimeoutError as exc:
            self._forget_addresses()
            raise UpstreamError(
                f"provider {self._provider.name}: no connection within {limit:g} s",
                phase=Phase.CONNECT,
                code="upstream_timeout",
                status=504,
            ) from exc
        except OSError as exc:  # ssl.SSLError and socket.gaierror among them
            self._forget_addresses()
            logger.info("provider %s: %s", self._provider.name, describe_os_error(exc))
            raise UpstreamError(
                f"provider {self._provider.name}: could not connect", phase=Phase.CONNECT
            ) from exc

    async def _connect(self, make: Callable[[], Connection]) -> Connection:
        addresses = await self._resolve()
        sock = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=HAPPY_EYEBALLS_DELAY, interleave=1, loop=self._loop
        )
        connection = make()
        protocol: Any = connection
        tls: Tls | None = None
        try:
            # Without it every second write may wait 40 ms (RFC 1122, 4.2.3.2).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES)
            if self._tls is not None:
                protocol = tls = Tls(connection, self._tls, self._provider.host, self._loop)
            await self._loop.create_connection(lambda: protocol, sock=sock)
        except BaseException:
            sock.close()
            # Cancelled in the turn that made it, uvloop closes it and calls no `connection_lost`.
            protocol.connection_lost(None)
            raise
        if tls is not None:
            try:
                await tls.opened()
            except BaseException:
                tls.abort()
                raise
        return connection

    # Names

    async def _resolve(self) -> AddressInfos:
        """Return the provider's addresses, looked up off the loop, one look-up at a time."""
        if self._loop.time() < self._addresses_until:
            return self._addresses
        if self._lookup is None:
            self._lookup = self._loop.create_task(self._look_up(), name="look up provider")
        lookup = self._lookup
        # Shielded: others may wait for the answer when this request gives up.
        return await asyncio.shield(lookup)

    async def _look_up(self) -> AddressInfos:
        try:
            infos = await self._loop.getaddrinfo(
                self._provider.host, self._provider.port, type=socket.SOCK_STREAM
            )
            self._addresses = infos  # type: ignore[assignment]
            self._addresses_until = self._loop.time() + NAME_TTL
            return self._addresses
        except UnicodeError as exc:  # an empty or overlong label, which is never sent
            raise socket.gaierror(socket.EAI_NONAME, "no possible host name") from exc
        finally:
            self._lookup = None

    def _forget_addresses(self) -> None:
        if self._addresses_until != float("inf"):
            self._addresses_until = 0.0

    async def aclose(self) -> None:
        """End a look-up under way."""
        if self._lookup is not None:
            self._lookup.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await self._lookup


def describe_os_error(exc: OSError) -> str:
    """Return the system's words for `exc`, without an address, a key or a text of the peer."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {exc.verify_message}"
    return (
        f"{type(exc).__name__}: {exc.strerror or exc.args[-1] if exc.args else 'no reason given'}"
    )


@cache
def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Return the context that trusts `ca_file`; kept, as reading the authorities takes 20 ms."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _literal_addresses(provider: Provider) -> AddressInfos:
    """Return the provider's host if it is an address, so that no name service is needed."""
    try:
        ipaddress.ip_address(provider.host)
    except ValueError:
        return []
    infos = socket.getaddrinfo(
        provider.host, provider.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )
    return infos  # type: ignore[return-value]
