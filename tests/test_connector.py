"""How one provider is reached."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from hoberproxy import connector
from hoberproxy.catalog import Provider


async def test_buffers_are_mapped_while_a_tls_connection_is_begun_not_until_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    @contextmanager
    def mapped_buffers() -> Iterator[None]:
        told.append("mapped")
        yield
        told.append("as before")

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        told.append("hello came")
        writer.close()

    class Connection:
        def connection_lost(self, exc: Exception | None) -> None: ...

    monkeypatch.setattr(connector, "mapped_buffers", mapped_buffers)
    server = await asyncio.start_server(hang_up, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        provider = Provider("hangs up", "https", "127.0.0.1", port, "/v1")
        make: Any = Connection
        with suppress(connector.UpstreamError):
            await connector.Connector(provider, asyncio.get_running_loop()).connect(5.0, make)
    assert told == ["mapped", "as before", "hello came"]
