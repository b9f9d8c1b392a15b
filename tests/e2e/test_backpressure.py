"""Slow clients, endless streams and endless lines: memory stays flat, and nobody else waits."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.patience import WAIT, patient
from tests.support.scripted import (
    LAST_CHUNK,
    Script,
    ScriptedUpstream,
    SeenRequest,
    Send,
    SendMany,
    chunk,
    sse,
    sse_head,
    stream_events,
)

from .conftest import ProxyTo
from .harness import (
    LIMITS,
    Client,
    Program,
    as_client_sees,
    chat,
    eventually,
    provider_for,
    request_bytes,
    running_program,
)

MB = 1024 * 1024
EVENTS = stream_events(3)
ROLE, WORD = EVENTS[0], EVENTS[1]
# What the kernel's buffers of both legs take, and the proxy's own watermarks.
IN_FLIGHT = 24 * MB
# Allocators keep some of what they had: a leak of what passes through would be ten times as much.
GROWTH = 24 * MB


class Counted:
    """A hundred megabytes of events, and how many of their bytes were asked for."""

    def __init__(self, total: int = 100 * MB) -> None:
        self.sent = 0
        self._total = total

    def __iter__(self) -> Iterator[bytes]:
        piece = chunk(WORD * 100)
        while self.sent < self._total:
            self.sent += len(piece)
            yield piece


async def is_standing_still(counted: Counted) -> None:
    """Wait until the upstream cannot send any more."""
    before = -1
    async with asyncio.timeout(WAIT):
        while counted.sent != before:
            before = counted.sent
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("reads", [False, True], ids=["reads nothing", "reads a kilobyte at times"])
async def test_a_slow_client_stops_its_own_upstream_and_nothing_else(
    tmp_path: Path, reads: bool
) -> None:
    counted = Counted()

    def answer(seen: SeenRequest) -> Script:
        return [sse_head(), SendMany(counted)] if seen is upstream.requests[0] else sse(*EVENTS)

    async with (
        ScriptedUpstream(default=answer) as upstream,
        running_program(tmp_path, upstream) as program,
        program.connect() as slow,
    ):
        await program_is_warm(program, upstream)
        before = program.resident_bytes()
        await slow.ask(chat(stream=True))
        slow.writer.transport.pause_reading()
        await is_standing_still(counted)
        if reads:
            await read_slowly(slow)
        assert counted.sent < IN_FLIGHT, "what the client does not read is not asked for"
        for _ in range(5):
            assert (await program.post(chat(stream=True))).body == as_client_sees(EVENTS)
        assert program.resident_bytes() - before < GROWTH


async def program_is_warm(program: Program, upstream: ScriptedUpstream) -> None:
    """Let the first requests' own memory not count; the script of request 0 is left alone."""
    async with program.connect() as client:
        await client.send(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert (await client.read_reply()).status == 200
    assert not upstream.requests


async def read_slowly(client: Client) -> None:
    for _ in range(5):
        client.writer.transport.resume_reading()
        await client.reader.read(1024)
        client.writer.transport.pause_reading()
        await asyncio.sleep(0.02)


async def test_a_client_that_catches_up_gets_all_of_it(proxy_to: ProxyTo) -> None:
    total = 40 * MB
    counted = Counted(total)
    script = [sse_head(), SendMany(counted), *sse(*EVENTS[1:])[1:]]
    async with ScriptedUpstream(script) as upstream:
        async with proxy_to(upstream) as proxy, proxy.connect() as client:
            client.writer.transport.pause_reading()
            await client.ask(chat(stream=True))
            await eventually(lambda: any(each.is_paused for each in proxy.server._connections))
            client.writer.transport.resume_reading()
            reply = await client.read_reply()
            record = await proxy.wait_for_record()
    words = reply.body.count(b" word0")
    assert reply.is_complete
    assert reply.body.endswith(as_client_sees(EVENTS[1:]))
    assert record.events == words + 2
    assert (record.status, record.code, record.bytes_out) == (200, "", len(reply.body))


async def test_the_idle_limit_stands_still_while_the_client_is_the_slower_one(
    proxy_to: ProxyTo,
) -> None:
    limits = replace(LIMITS, idle=patient(1.0))
    script = [sse_head(), SendMany(Counted(20 * MB)), *sse(*EVENTS)[1:]]
    async with ScriptedUpstream(script) as upstream:
        limited = provider_for(upstream, limits=limits)
        async with proxy_to(limited) as proxy, proxy.connect() as client:
            client.writer.transport.pause_reading()
            await client.ask(chat(stream=True))
            await eventually(lambda: any(each.is_paused for each in proxy.server._connections))
            await asyncio.sleep(2 * limits.idle)
            client.writer.transport.resume_reading()
            reply = await client.read_reply()
    assert reply.body.endswith(as_client_sees(EVENTS))


async def test_a_client_that_reads_nothing_is_cut_after_the_write_limit(
    proxy_to: ProxyTo,
) -> None:
    counted = Counted()
    async with (
        ScriptedUpstream([sse_head(), SendMany(counted)]) as upstream,
        proxy_to(upstream, server={"write_timeout": 0.2}) as proxy,
        proxy.connect() as client,
    ):
        client.writer.transport.pause_reading()
        await client.ask(chat(stream=True))
        await upstream.wait_for_hangup()
        record = await proxy.wait_for_record()
        await eventually(lambda: not proxy.server._connections)
    assert (record.status, record.code) == (499, "client_closed")
    assert counted.sent < 100 * MB


async def test_a_client_that_reads_slowly_but_steadily_is_not_cut(proxy_to: ProxyTo) -> None:
    counted = Counted()
    loop = asyncio.get_running_loop()
    limit = patient(1.0)
    async with (
        ScriptedUpstream([sse_head(), SendMany(counted)]) as upstream,
        proxy_to(upstream, server={"write_timeout": limit}) as proxy,
    ):
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
            slow.setblocking(False)
            await loop.sock_connect(slow, ("127.0.0.1", proxy.port))
            await loop.sock_sendall(slow, request_bytes(chat(stream=True)))
            await eventually(lambda: any(each.is_paused for each in proxy.server._connections))
            until = loop.time() + 3 * limit
            while loop.time() < until:
                assert await loop.sock_recv(slow, 16 * 1024)
                await asyncio.sleep(0.02)
            assert proxy.records == []
        await proxy.wait_for_record()
    assert counted.sent < 100 * MB


# Endless events, and one endless event


async def drain(client: Client) -> tuple[int, bytes]:
    """Read a chunked body to its end without keeping it: its length and its last bytes."""
    total, tail = 0, b""
    while piece := await client.read_chunk():
        total += len(piece)
        tail = (tail + piece)[-2000:]
    return total, tail


async def test_two_hundred_thousand_events_pass_in_flat_memory(tmp_path: Path) -> None:
    short = b'data: {"model":"upstream-model","choices":[{"delta":{"content":"a"}}]}\n\n'
    many = [chunk(short * 500)] * 400
    script = [sse_head(), SendMany(many), *sse(*EVENTS[1:])[1:]]
    async with (
        ScriptedUpstream(script) as upstream,
        running_program(tmp_path, upstream) as program,
        program.connect() as client,
    ):
        await program_is_warm(program, upstream)
        before = program.resident_bytes()
        await client.ask(chat(stream=True))
        await client.read_head()
        total, tail = await drain(client)
        assert program.resident_bytes() - before < GROWTH
        stored = await eventually(program.stored)
    renamed = short.replace(b"upstream-model", b"test/model")
    assert total == 200_000 * len(renamed) + len(as_client_sees(EVENTS[1:]))
    assert tail.endswith(as_client_sees(EVENTS[-3:]))
    assert stored == [(200, "", 3, 200_000 + 3)]


async def test_one_line_of_fifty_megabytes_passes_in_flat_memory(tmp_path: Path) -> None:
    head = b'data: {"id":"x","choices":[{"delta":{"content":"'
    tail = b'"}}],"model":"upstream-model"}\n\n'
    filling = [chunk(b"y" * 50_000)] * 1000
    script = [sse_head(), Send(chunk(ROLE + WORD + head)), SendMany(filling), Send(chunk(tail))]
    script += sse(*EVENTS[2:])[1:]
    assert script[-1] == Send(LAST_CHUNK)
    async with (
        ScriptedUpstream(script) as upstream,
        running_program(tmp_path, upstream) as program,
        program.connect() as client,
    ):
        await program_is_warm(program, upstream)
        before = program.resident_bytes()
        await client.ask(chat(stream=True))
        await client.read_head()
        total, end = await drain(client)
        assert program.resident_bytes() - before < GROWTH
    rest = tail.replace(b"upstream-model", b"test/model") + as_client_sees(EVENTS[2:])
    assert end.endswith(rest), "the model's name is replaced behind the long text as well"
    assert total == len(as_client_sees([ROLE, WORD])) + len(head) + 50_000_000 + len(rest)
