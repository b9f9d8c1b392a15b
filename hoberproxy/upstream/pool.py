"""Keeps connections to one provider alive, and lends the one used last.

New connections are made by upstream/connector.py. Only a connection whose stream has ended, and
whose framing has not, is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Final

from ..protocol.known_heads import ResponseHeads
from ..routing.catalog import Provider
from ..timer_wheel import Wheel
from .connection import ConnectionOwner, UpstreamConnection
from .connector import Connector

END_WAIT: Final = 2.0  # seconds for the framing of an answer to end after its [DONE]


class Pool(ConnectionOwner):
    """The connections of one provider. All methods belong to the loop that made it."""

    def __init__(self, provider: Provider, loop: asyncio.AbstractEventLoop, wheel: Wheel) -> None:
        self.provider = provider
        self.wheel = wheel
        self._connector = Connector(provider, loop)
        self._idle: list[UpstreamConnection] = []
        self._ending: dict[UpstreamConnection, float] = {}  # until when, in order
        self.end_wait = END_WAIT
        self.open = 0  # connections that exist, idle and busy
        self.heads = ResponseHeads()

    @property
    def idle(self) -> int:
        """How many connections wait to be used again."""
        return len(self._idle)

    # Lending

    def acquire(self) -> UpstreamConnection | None:
        """Return the idle connection used last; None if a new one must be made."""
        now = self.wheel.now
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed and now < connection.idle_until:
                return connection
            connection.abort()
        return None

    def on_opened(self, connection: UpstreamConnection) -> None:
        self.open += 1

    def on_idle(self, connection: UpstreamConnection, keepalive_hint: float | None) -> None:
        self._ending.pop(connection, None)
        keep = self.provider.keepalive
        if keepalive_hint is not None:
            # A second early, lest a request and the peer's close cross on the way.
            keep = min(keep, keepalive_hint - 1.0)
        if keep <= 0 or len(self._idle) >= self.provider.max_idle_connections:
            connection.abort()
            return
        connection.idle_until = self.wheel.now + keep
        self._idle.append(connection)

    def on_closed(self, connection: UpstreamConnection) -> None:
        self.open -= 1
        self._ending.pop(connection, None)
        with contextlib.suppress(ValueError):  # it was busy
            self._idle.remove(connection)

    def await_end(self, connection: UpstreamConnection) -> None:
        due = self.wheel.now + self.end_wait
        self._ending[connection] = due
        self.wheel.hasten(self, due)

    def on_deadline(self, now: float) -> float | None:
        """Close the connections whose answers have not ended in time."""
        for connection, due in list(self._ending.items()):
            if due > now:
                return due
            connection.abort()
        return None

    def close_expired(self, now: float) -> None:
        """Close connections that have been idle for too long at `now` (loop time)."""
        keep = [connection for connection in self._idle if now < connection.idle_until]
        expired = [connection for connection in self._idle if now >= connection.idle_until]
        self._idle = keep
        for connection in expired:
            connection.abort()

    def connect(self, limit: float) -> Coroutine[Any, Any, UpstreamConnection]:
        """Make a connection within `limit` seconds. Raises UpstreamError (phase connect)."""
        return self._connector.connect(limit, lambda: UpstreamConnection(self))

    def aclose(self) -> Coroutine[Any, Any, None]:
        """Close all connections, of which none may be lent any more; end a look-up under way."""
        self.wheel.cancel(self)
        for connection in (*self._idle, *self._ending):
            connection.abort()
        return self._connector.aclose()
