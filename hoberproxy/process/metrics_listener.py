"""Serves GET /metrics in the supervisor, with as much HTTP as a scraper needs and no library.

Every answer closes its connection. The metrics are collected for each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from ..accounting.exposition import CONTENT_TYPE

HEAD_LIMIT = 5.0  # seconds
MAX_HEAD_BYTES = 16 * 1024
MAX_SCRAPERS = 16  # at a time; a scraper is one, and one more looks by hand

Collect = Callable[[], Awaitable[bytes]]


class MetricsListener:
    """Serves on a copy of one listening socket."""

    def __init__(self, collect: Collect) -> None:
        self._collect = collect
        self._running = 0
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        """Answer on a copy of `listener` from now on."""
        self._server = await asyncio.start_server(
            self._answer, sock=listener.dup(), limit=MAX_HEAD_BYTES
        )

    def close(self) -> None:
        """Accept no more."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._running += 1
        try:
            if self._running <= MAX_SCRAPERS:
                async with asyncio.timeout(HEAD_LIMIT * 2):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(await self._respond(head.partition(b"\r\n")[0]))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._running -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _respond(self, line: bytes) -> bytes:
        method, _, rest = line.partition(b" ")
        target = rest.partition(b" ")[0].partition(b"?")[0]
        if target != b"/metrics":
            return _response(b"404 Not Found", "text/plain", b"/metrics is all there is here\n")
        if method not in (b"GET", b"HEAD"):
            return _response(b"405 Method Not Allowed", "text/plain", b"GET it\n")
        body = await self._collect()
        response = _response(b"200 OK", CONTENT_TYPE, body)
        return response if method == b"GET" else response[: -len(body)]


_RESPONSE = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"


def _response(status: bytes, kind: str, body: bytes) -> bytes:
    return _RESPONSE % (status, kind.encode(), len(body), body)
