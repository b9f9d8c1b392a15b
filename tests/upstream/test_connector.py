"""How one provider is reached."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from hoberproxy.errors import Phase, UpstreamError
from hoberproxy.routing.catalog import Provider
from hoberproxy.upstream.connector import Connector
from tests.conftest import WAIT
from tests.support.scripted import ScriptedUpstream

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Connection:
    """Records the calls of a connection, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_over = asyncio.Event()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.calls.append("made")

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")
        self.is_over.set()


def connector(port: int, ca_file: str | None = None) -> Connector:
    provider = Provider("tls", "https", "localhost", port, "/v1", ca_file=ca_file)
    return Connector(provider, asyncio.get_running_loop())


async def test_a_tls_connection_is_made_and_learns_of_its_end() -> None:
    connection = Connection()
    async with ScriptedUpstream(tls=True) as upstream:
        made = await connector(upstream.port, upstream.ca_file).connect(
            WAIT, cast(Any, lambda: connection)
        )
        assert cast(Any, made) is connection
        assert connection.calls == ["made"]
        connection.transport.abort()
        await asyncio.wait_for(connection.is_over.wait(), WAIT)
    assert connection.calls == ["made", "lost"]


async def refused(answer: Handler, limit: float = WAIT) -> UpstreamError:
    """Return the failure to reach a server that does no more than `answer`."""
    connection = Connection()
    server = await asyncio.start_server(answer, "127.0.0.1")
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UpstreamError) as caught:
            await connector(port).connect(limit, cast(Any, lambda: connection))
    assert "made" not in connection.calls
    return caught.value


async def test_a_handshake_without_an_answer_is_given_up_and_its_socket_closed() -> None:
    hung_up = asyncio.Event()

    async def listen_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            pass
        hung_up.set()
        writer.close()

    error = await refused(listen_only, limit=0.2)
    await asyncio.wait_for(hung_up.wait(), WAIT)
    assert (error.phase, error.status) == (Phase.CONNECT, 504)


async def test_a_hang_up_during_the_handshake_is_a_failure_to_connect() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    error = await refused(hang_up)
    assert (error.phase, error.status) == (Phase.CONNECT, 502)
