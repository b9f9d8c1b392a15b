"""A client that goes away takes its upstream along, wherever the request is: tokens are money."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import pytest

from tests.support.scripted import (
    Script,
    ScriptedUpstream,
    Send,
    SendMany,
    Stall,
    chunk,
    completion,
    serialize_head,
    sse,
    sse_head,
    stream_events,
)

from .conftest import ProxyTo
from .harness import SOON, Client, chat, eventually, request_bytes

EVENTS = stream_events(3)
JSON_HEAD = Send(
    serialize_head(200, [("Content-Type", "application/json"), ("Content-Length", "100")])
)
LEAVING = pytest.mark.parametrize("leave", ["close", "reset", "half-close"])

# name → stream, script, whether the client sees anything before it leaves
PHASES: dict[str, tuple[bool, Script, bytes]] = {
    "before the head": (True, [Stall()], b""),
    "between head and content": (True, [sse_head(), Stall()], b""),
    "after the role": (True, [sse_head(), Send(chunk(EVENTS[0])), Stall()], b""),
    "in the middle of the stream": (
        True,
        [sse_head(), Send(chunk(EVENTS[0]) + chunk(EVENTS[1])), Stall()],
        b"word0",
    ),
    "before the head of a body": (False, [Stall()], b""),
    "in the middle of a body": (False, [JSON_HEAD, Send(b'{"a"'), Stall()], b""),
}


async def leave_by(client: Client, way: str) -> None:
    if way == "half-close":
        client.writer.write_eof()
    elif way == "reset":
        client.abort()
    else:
        client.close()


@LEAVING
@pytest.mark.parametrize(("stream", "script", "seen"), PHASES.values(), ids=PHASES)
async def test_the_upstream_is_closed_and_one_record_says_499(
    proxy_to: ProxyTo, stream: bool, script: Script, seen: bytes, leave: str
) -> None:
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            await client.ask(chat(stream=stream))
            await upstream.wait_for_requests()
            if seen:
                await client.read_head()
                await client.read_until(seen)
            else:
                await asyncio.sleep(0.03)  # what the upstream sent has been read
            await leave_by(client, leave)
            await upstream.wait_for_hangup()
            record = await proxy.wait_for_record()
        await eventually(lambda: not proxy.server._connections)
    assert (record.status, record.code) == (499, "client_closed")
    assert not record.is_failure
    assert record.attempts == 1 and not record.failures
    assert record.estimated and record.prompt_tokens > 0, "the upstream has read the prompt"
    assert record.completion_tokens == (1 if seen else 0)


@LEAVING
async def test_leaving_during_the_upload_calls_no_upstream(proxy_to: ProxyTo, leave: str) -> None:
    async with ScriptedUpstream() as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            await client.send(request_bytes(chat(stream=True))[:-10])
            await eventually(lambda: proxy.context.exchanges)
            await leave_by(client, leave)
            record = await proxy.wait_for_record()
        assert upstream.connections == 0
    assert (record.status, record.attempts, record.prompt_tokens) == (499, 0, 0)


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port whose connections are never established: its queue is full, further SYNs are lost."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port: int = listening.getsockname()[1]
        waiting = []
        try:
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
                waiting.append(filler)
            yield port
        finally:
            for filler in waiting:
                filler.close()


@LEAVING
async def test_leaving_before_the_upstream_is_connected_ends_the_connecting(
    proxy_to: ProxyTo, black_hole: int, leave: str
) -> None:
    async with proxy_to(f"http://127.0.0.1:{black_hole}/v1") as proxy:
        async with proxy.connect() as client:
            await client.ask(chat(stream=True))
            await eventually(
                lambda: any(task.get_name() == "connect a" for task in asyncio.all_tasks())
            )
            await leave_by(client, leave)
            record = await proxy.wait_for_record()
        await eventually(
            lambda: not any(task.get_name() == "connect a" for task in asyncio.all_tasks())
        )
    assert (record.status, record.attempts, record.prompt_tokens) == (499, 1, 0)


async def test_a_black_hole_is_a_504_within_the_connect_limit(
    proxy_to: ProxyTo, black_hole: int
) -> None:
    async with proxy_to(f"http://127.0.0.1:{black_hole}/v1", limits=SOON) as proxy:
        reply = await proxy.post(chat())
        record = await proxy.wait_for_record()
    assert (reply.status, reply.error["code"]) == (504, "upstream_timeout")
    assert (record.phase, record.failures[0].status) == ("connect", None)


@LEAVING
async def test_leaving_while_paused_by_backpressure_is_seen(proxy_to: ProxyTo, leave: str) -> None:
    endless = [sse_head(), SendMany(chunk(EVENTS[1]) * 100 for _ in range(100_000))]
    async with ScriptedUpstream(endless) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            client.writer.transport.pause_reading()
            await client.ask(chat(stream=True))
            await eventually(lambda: any(each.is_paused for each in proxy.server._connections))
            if leave == "reset":
                client.abort()
            else:
                client.writer.write_eof()  # a close that reads nothing would be a reset
            await upstream.wait_for_hangup()
            record = await proxy.wait_for_record()
    assert (record.status, record.estimated) == (499, True)
    assert record.completion_tokens > 100


async def test_leaving_after_the_answer_is_no_499(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(sse(*EVENTS)) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            await client.ask(chat(stream=True))
            await client.read_reply()
        await eventually(lambda: not proxy.server._connections)
        record = await proxy.wait_for_record()
    assert record.status == 200


async def test_one_client_leaving_disturbs_no_other(proxy_to: ProxyTo) -> None:
    def answer(seen: object) -> Script:
        return sse(*stream_events(20), pace=0.01)

    async with ScriptedUpstream(default=answer) as upstream, proxy_to(upstream) as proxy:

        async def stay() -> bytes:
            return (await proxy.post(chat(stream=True))).body

        async def go() -> None:
            async with proxy.connect() as client:
                await client.ask(chat(stream=True))
                await client.read_head()
                await client.read_until(b"word3")

        results = await asyncio.gather(*[stay() for _ in range(10)], *[go() for _ in range(10)])
        await proxy.wait_for_record(20)
    assert len(set(results[:10])) == 1 and results[0].endswith(b"data: [DONE]\n\n")
    statuses = sorted(record.status for record in proxy.records)
    assert statuses == [200] * 10 + [499] * 10


async def test_a_client_that_leaves_after_a_failover_closes_the_second_upstream(
    proxy_to: ProxyTo,
) -> None:
    failing = [Send(serialize_head(500, [("Content-Length", "0")]))]
    async with (
        ScriptedUpstream(failing) as first,
        ScriptedUpstream([Stall()]) as second,
        proxy_to(first, second) as proxy,
    ):
        async with proxy.connect() as client:
            await client.ask(chat())
            await second.wait_for_requests()
        await second.wait_for_hangup()
        record = await proxy.wait_for_record()
    assert (record.status, record.provider, record.attempts) == (499, "b", 2)
    assert [failure.provider for failure in record.failures] == ["a"]


async def test_a_kept_connection_goes_on_after_another_left(proxy_to: ProxyTo) -> None:
    whole = json.dumps(completion()).encode()
    answer = [
        Send(serialize_head(200, [("Content-Type", "application/json")])[:-2]),
        Send(b"Content-Length: %d\r\n\r\n%b" % (len(whole), whole)),
    ]
    async with ScriptedUpstream(answer, [Stall()], answer) as upstream, proxy_to(upstream) as proxy:
        assert (await proxy.post(chat())).status == 200
        async with proxy.connect() as client:
            await client.ask(chat())
            await upstream.wait_for_requests(2)
        await upstream.wait_for_hangup(1)
        assert (await proxy.post(chat())).status == 200
        assert upstream.connections == 2, "the connection of the client that left is not used again"
