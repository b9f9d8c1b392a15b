"""Connections to model servers: kept and used again when that is safe, and found by name."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import orjson
import pytest

from tests.support.scripted import (
    Close,
    Pause,
    Reset,
    Script,
    ScriptedUpstream,
    SeenRequest,
    Send,
    completion,
    json_response,
    serialize_head,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import (
    LIMITS,
    SOON,
    UPSTREAM_MODEL,
    Proxy,
    as_client_sees,
    chat,
    eventually,
    provider_for,
)

EVENTS = stream_events(2)
WHOLE = json_response(200, completion())
STREAM = sse(*EVENTS)


async def idle_is(proxy: Proxy, count: int) -> None:
    pool = proxy.pool_of("a")
    await eventually(lambda: (pool.idle, pool.open) == (count, count))


@pytest.mark.parametrize(
    "answer",
    [WHOLE, STREAM, json_response(500, {}), json_response(400, {})],
    ids=["a body", "a stream", "a 500", "a 400"],
)
async def test_a_connection_is_kept_after_an_answer_that_ended_exactly(
    proxy_to: ProxyTo, answer: Script
) -> None:
    async with ScriptedUpstream(default=answer) as upstream, proxy_to(upstream) as proxy:
        for _ in range(5):
            await proxy.post(chat(stream=answer is STREAM))
            await idle_is(proxy, 1)  # a stream's framing may end behind its [DONE]
        assert upstream.connections == 1


async def test_the_connection_used_last_is_lent_first(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(default=[Pause(0.03), *WHOLE]) as upstream:
        async with proxy_to(upstream) as proxy:
            await asyncio.gather(*[proxy.post(chat()) for _ in range(3)])
            assert upstream.connections == 3
            for _ in range(4):
                await proxy.post(chat())
            used = {seen.connection for seen in upstream.requests[3:]}
    assert upstream.connections == 3
    assert len(used) == 1, "the others may grow old and be closed"


NOT_KEPT: dict[str, tuple[bool, Script]] = {
    "bytes after its end": (False, [Send(WHOLE[0].data + b"HTTP/1.1 200 OK\r\n")]),  # type: ignore[union-attr]
    "connection: close": (False, json_response(200, completion(), ("Connection", "close"))),
    "a body until close": (True, sse(*EVENTS, chunked=False)),
    "HTTP/1.0": (
        False,
        [Send(WHOLE[0].data.replace(b"HTTP/1.1", b"HTTP/1.0"))],  # type: ignore[union-attr]
    ),
    "a keep-alive of one second": (
        False,
        json_response(200, completion(), ("Keep-Alive", "timeout=1")),
    ),
}


@pytest.mark.parametrize(("stream", "answer"), NOT_KEPT.values(), ids=NOT_KEPT)
async def test_a_connection_in_doubt_is_not_used_again(
    proxy_to: ProxyTo, stream: bool, answer: Script
) -> None:
    async with ScriptedUpstream(default=answer) as upstream, proxy_to(upstream) as proxy:
        for _ in range(3):
            assert (await proxy.post(chat(stream=stream))).status == 200
        assert upstream.connections == 3
        await idle_is(proxy, 0)


async def test_bytes_on_an_idle_connection_end_it(proxy_to: ProxyTo) -> None:
    late = [*WHOLE, Pause(0.05), Send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")]
    async with ScriptedUpstream(late, WHOLE) as upstream, proxy_to(upstream) as proxy:
        assert (await proxy.post(chat())).status == 200
        await upstream.wait_for_hangup()
        assert (await proxy.post(chat())).status == 200
        assert upstream.connections == 2


async def test_a_connection_closed_while_idle_is_noticed(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream([*WHOLE, Pause(0.02), Close()], WHOLE) as upstream:
        async with proxy_to(upstream) as proxy:
            await proxy.post(chat())
            await idle_is(proxy, 0)
            await proxy.post(chat())
            record = await proxy.wait_for_record(2)
    assert (record.status, record.attempts, record.failures) == (200, 1, ())


@pytest.mark.parametrize("stream", [False, True], ids=["bodies", "streams"])
async def test_no_request_fails_when_the_upstream_closes_after_each_answer(
    proxy_to: ProxyTo, stream: bool
) -> None:
    answer = [*(STREAM if stream else WHOLE), Close()]
    async with ScriptedUpstream(default=answer) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            for _ in range(200):
                await client.ask(chat(stream=stream))
                reply = await client.read_reply()
                assert (reply.status, reply.is_complete) == (200, True)
        await proxy.wait_for_record(200)
    assert all(record.attempts == 1 and not record.failures for record in proxy.records)


@pytest.mark.parametrize("end", [Close(), Reset()], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_a_kept_connection_closed_under_the_request_is_replaced_unseen(
    proxy_to: ProxyTo, stream: bool, end: Any
) -> None:
    answer = STREAM if stream else WHOLE
    async with ScriptedUpstream(answer, [end], answer) as upstream, proxy_to(upstream) as proxy:
        assert (await proxy.post(chat(stream=stream))).status == 200
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record(2)
        assert [seen.connection for seen in upstream.requests] == [0, 0, 1]
    assert (reply.status, reply.is_complete) == (200, True)
    assert "x-hober-attempts" not in reply.headers
    assert (record.attempts, record.failures, record.status) == (1, (), 200)


async def test_many_stale_connections_cost_one_replacement_a_request(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(default=[Pause(0.03), *WHOLE]) as upstream:
        async with proxy_to(upstream) as proxy:
            await asyncio.gather(*[proxy.post(chat()) for _ in range(3)])
            upstream.add([Close()], WHOLE)
            assert (await proxy.post(chat())).status == 200
            assert len(upstream.requests) == 5


async def test_a_byte_of_an_answer_makes_a_cut_a_failure(proxy_to: ProxyTo) -> None:
    cut = [Send(b"H"), Pause(0.02), Close()]
    async with ScriptedUpstream(WHOLE, cut) as upstream, proxy_to(upstream) as proxy:
        await proxy.post(chat())
        reply = await proxy.post(chat())
    assert reply.status == 502


async def test_a_new_connection_that_is_closed_is_a_failure(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(WHOLE, [Close()], [Close()]) as upstream:
        async with proxy_to(upstream) as proxy:
            await proxy.post(chat())
            reply = await proxy.post(chat())
            assert len(upstream.requests) == 3, "the stale one is replaced once, no more"
    assert reply.status == 502


async def test_idle_connections_are_closed_after_their_time(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(default=WHOLE) as upstream:
        async with proxy_to(upstream, keepalive=0.1) as proxy:
            await proxy.post(chat())
            await upstream.wait_for_hangup()  # the pools are swept once a second
            await proxy.post(chat())
            assert upstream.connections == 2


async def test_an_upstreams_hint_shortens_the_time(proxy_to: ProxyTo) -> None:
    answer = json_response(200, completion(), ("Keep-Alive", "timeout=5, max=100"))
    async with ScriptedUpstream(default=answer) as upstream, proxy_to(upstream) as proxy:
        await proxy.post(chat())
        (connection,) = proxy.pool_of("a")._idle
        left = connection.idle_until - asyncio.get_running_loop().time()
    assert 3.0 < left <= 4.0, "a second early, lest request and close cross"


async def test_no_more_connections_are_kept_than_the_config_says(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(default=[Pause(0.03), *WHOLE]) as upstream:
        async with proxy_to(upstream, max_idle_connections=2) as proxy:
            await asyncio.gather(*[proxy.post(chat()) for _ in range(5)])
            await idle_is(proxy, 2)


async def test_an_answer_before_the_whole_request_was_taken_is_passed_on(
    proxy_to: ProxyTo,
) -> None:
    """An upstream that refuses a large prompt while it is still being sent."""
    refusal = json_response(413, {"error": {"message": "too long"}}, close=True)

    is_over = asyncio.Event()

    class Refusing(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            transport.set_write_buffer_limits(0)

        def data_received(self, data: bytes) -> None:
            self.transport.pause_reading()
            self.transport.write(refusal[0].data)  # type: ignore[union-attr]
            asyncio.get_running_loop().call_later(0.1, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            is_over.set()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Refusing, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with proxy_to(f"http://127.0.0.1:{port}/v1") as proxy:
            large = chat(messages=[{"role": "user", "content": "x" * 20_000_000}])
            reply = await proxy.post(large)
        await is_over.wait()
    assert (reply.status, reply.error["message"]) == (413, "too long")


# Addresses and names


async def test_an_ipv6_address_is_reached(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(STREAM, host="::1") as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        assert upstream.requests[0].headers["host"] == f"[::1]:{upstream.port}"
    assert reply.body == as_client_sees(EVENTS)


async def test_a_name_is_looked_up(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(default=STREAM) as upstream:
        async with proxy_to(f"http://localhost:{upstream.port}/v1") as proxy:
            replies = await asyncio.gather(*[proxy.post(chat(stream=True)) for _ in range(5)])
            assert upstream.requests[0].headers["host"] == f"localhost:{upstream.port}"
    assert all(reply.body == as_client_sees(EVENTS) for reply in replies)


class NameService:
    """A loop whose look-ups of names give `answer`, or never end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Any) -> None:
        self._loop = loop
        self._answer = answer
        self.lookups = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
        self.lookups += 1
        if self._answer is None:
            await asyncio.sleep(3600)
        raise self._answer


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 502),
        (UnicodeError("label empty or too long"), 502),
        (None, 504),
    ],
    ids=["unknown", "no possible name", "no answer in time"],
)
async def test_a_name_that_is_not_found_is_a_failure_to_connect(
    proxy_to: ProxyTo, answer: Any, status: int
) -> None:
    provider = provider_for("http://model-server.invalid/v1", limits=SOON)
    async with proxy_to(provider) as proxy:
        names = NameService(asyncio.get_running_loop(), answer)
        proxy.pool_of("a")._connector._loop = names
        replies = await asyncio.gather(*[proxy.post(chat()) for _ in range(3)])
        await proxy.wait_for_record(3)
        if answer is None:
            assert names.lookups == 1, "one look-up at a time"
    assert [reply.status for reply in replies] == [status] * 3
    assert {record.phase for record in proxy.records} == {"connect"}
    assert b"model-server" not in replies[0].body


async def test_a_name_that_is_not_found_falls_over(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(STREAM) as second:
        lost = provider_for("http://model-server.invalid/v1", "a", limits=SOON)
        async with proxy_to(lost, provider_for(second, "b", limits=LIMITS)) as proxy:
            proxy.pool_of("a")._connector._loop = NameService(
                asyncio.get_running_loop(), socket.gaierror(socket.EAI_AGAIN, "try again")
            )
            reply = await proxy.post(chat(stream=True))
    assert reply.headers["x-hober-provider"] == "b"


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_a_large_request_arrives_whole(proxy_to: ProxyTo, stream: bool, tls: bool) -> None:
    text = "a prompt of some megabytes " * 200_000
    seen: list[SeenRequest] = []

    def answer(request: SeenRequest) -> Script:
        seen.append(request)
        return [Send(serialize_head(200, [("Content-Length", "0")]))]

    async with ScriptedUpstream(answer, tls=tls) as upstream, proxy_to(upstream) as proxy:
        body = chat(messages=[{"role": "user", "content": text}], stream=stream)
        await proxy.post(orjson.dumps(body))  # without a space, as most clients write it
    sent = seen[0].json()
    assert sent["messages"][0]["content"] == text
    assert sent["model"] == UPSTREAM_MODEL
    assert ("stream_options" in sent) is stream
    assert int(seen[0].headers["content-length"]) == len(seen[0].body)
