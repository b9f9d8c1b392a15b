"""Bounds of streams, request bodies and connections."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from mmap import mmap
from typing import Any

import pytest

from hoberproxy.access.admission import (
    DEFAULT_BODY_MEMORY,
    STREAM_COUNTS_BYTES,
    Admission,
    BodyMemory,
    ConnectionRoom,
    StreamCounts,
    body_memory_limit,
)
from hoberproxy.config.settings import Config, ServerSettings
from hoberproxy.errors import UnavailableError
from tests.conftest import QUESTION, Proxy, RawClient, StartProxy, chat, wait_until
from tests.support.scripted import (
    AwaitRelease,
    ScriptedUpstream,
    Stall,
    completion,
    json_response,
    sse,
    sse_head,
    stream_events,
)


def stream_counts(processes: int) -> list[StreamCounts]:
    memory = mmap(-1, STREAM_COUNTS_BYTES)
    return [StreamCounts(memory, slot) for slot in range(processes)]


def test_streams_count_over_all_processes() -> None:
    one, other = (Admission(3, counts) for counts in stream_counts(2))
    one.admit(2)
    other.admit(1)
    with pytest.raises(UnavailableError) as refused:
        other.admit(2)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.retry_after
    one.note_streams(0)
    other.admit(2)


def test_without_a_limit_any_number_is_admitted() -> None:
    Admission(0).admit(10**6)
    Admission(0, *stream_counts(1)).admit(10**6)


def test_a_single_process_counts_its_own_streams() -> None:
    single = Admission(2)
    single.admit(2)
    with pytest.raises(UnavailableError):
        single.admit(3)


def test_streams_of_a_process_that_died_do_not_count() -> None:
    first, second = stream_counts(2)
    dead, alive = Admission(3, first), Admission(3, second)
    dead.admit(3)
    second.clear(first.slot)
    alive.admit(3)


async def test_over_the_maximum_a_request_is_rejected_and_others_go_on(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([Stall()])
    proxy = await start_proxy(max_streams=1)
    running, late = await proxy.connect(), await proxy.connect()
    running.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    late.send(chat(proxy.key))
    answer = await late.read_answer()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert len(proxy.context.exchanges) == 1
    slow = await proxy.connect()
    slow.send(chat(proxy.key, framing="content-length: 5000"))  # only a part of it comes
    answer = await slow.read_answer()
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert len(proxy.context.exchanges) == 1
    await running.aclose()
    await wait_until(lambda: not proxy.context.exchanges)
    late.send(chat(proxy.key))
    assert (await late.read_answer()).status == 200


async def test_strangers_take_no_room_of_callers(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(max_streams=2)
    upstream.add([Stall()])
    running, caller = await proxy.connect(), await proxy.connect()
    running.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    strangers = [await proxy.connect() for _ in range(20)]
    for number, stranger in enumerate(strangers):
        key = proxy.key[:-1] + "!" if number % 2 else "none"
        stranger.send(chat(key, b"", framing="content-length: 1000000"))
    for stranger in strangers:
        assert (await stranger.read_answer()).status == 401
    for _ in range(3):
        caller.send(chat(proxy.key))
        assert (await caller.read_answer()).status == 200
    assert len(proxy.context.exchanges) == 1
    assert [record.status for record in proxy.records].count(401) == 20


async def test_the_record_of_a_rejected_request_names_its_caller(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([Stall()])
    proxy = await start_proxy(max_streams=1)
    running, late = await proxy.connect(), await proxy.connect()
    running.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    for _ in range(2):  # the second time it is known who sends this head
        late.send(chat(proxy.key))
        assert (await late.read_answer()).status == 503
    assert [(record.code, record.key_label) for record in proxy.records] == [
        ("overloaded", "test"),
        ("overloaded", "test"),
    ]


# Connections of a process


class Waiting:
    def __init__(self, since: float | None) -> None:
        self.is_waiting = since is not None
        self.waiting_since = since or 0.0
        self.was_cut = False

    def abort(self) -> None:
        self.was_cut = True


def test_an_eighth_of_the_waiting_connections_is_closed_the_oldest_first() -> None:
    waiting = [Waiting(float(number)) for number in range(1, 41)]
    busy = [Waiting(None) for _ in range(5)]
    newcomer = Waiting(0.5)
    connections = {*waiting, *busy, newcomer}
    ConnectionRoom(45).make(connections, newcomer, now=100.0)
    assert [each.was_cut for each in waiting] == [True] * 6 + [False] * 34
    assert connections == {*waiting[6:], *busy, newcomer}


def test_without_a_waiting_connection_there_is_no_room() -> None:
    newcomer = Waiting(1.0)
    with pytest.raises(UnavailableError):
        ConnectionRoom(1).make({newcomer, Waiting(None)}, newcomer, now=100.0)
    assert not newcomer.was_cut


def test_many_connections_are_not_searched_for_each_new_one() -> None:
    room, newcomer = ConnectionRoom(1000), Waiting(1.0)
    connections = {Waiting(None) for _ in range(1000)}
    late = Waiting(2.0)
    for number in range(40):
        if number == 20:
            connections.add(late)
        try:
            room.make(connections, newcomer, now=100.0)
        except UnavailableError:
            pass
        else:
            break
    assert late.was_cut
    assert number == 31, "the first look is after 16, the next after as many more"


def test_closed_connections_are_logged_from_time_to_time(caplog: pytest.LogCaptureFixture) -> None:
    room = ConnectionRoom(1)
    for now in (0.0, 1.0, 9.0, 11.0, 12.0):
        room.make({Waiting(1.0)}, Waiting(2.0), now)
    assert [record.args for record in caplog.records] == [(1, 1), (3, 1)]


# Bytes of bodies

MIB = 1024 * 1024


def test_bytes_are_held_up_to_the_limit_and_released() -> None:
    memory = BodyMemory(100)
    memory.hold(60)
    with pytest.raises(UnavailableError) as refused:
        memory.hold(41)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.retry_after
    assert memory.held == 60
    memory.hold(40)
    memory.hold(-30)
    memory.hold(-70)
    assert memory.held == 0


def test_bytes_can_be_released_also_over_a_lowered_limit() -> None:
    memory = BodyMemory(100)
    memory.hold(90)
    memory.limit = 50
    memory.hold(-10)
    assert memory.held == 80


@pytest.mark.parametrize(
    ("setting", "memory", "workers", "limit"),
    [
        pytest.param(0, 8 * 1024 * MIB, 1, 2 * 1024 * MIB, id="a quarter of the machine"),
        pytest.param(0, 8 * 1024 * MIB, 4, 512 * MIB, id="each worker a part"),
        pytest.param(0, 0, 1, DEFAULT_BODY_MEMORY, id="nobody knows the machine"),
        pytest.param(300 * MIB, 8 * 1024 * MIB, 1, 300 * MIB, id="set"),
        pytest.param(300 * MIB, 8 * 1024 * MIB, 3, 100 * MIB, id="set, each worker a part"),
        pytest.param(0, 64 * MIB, 16, 32 * MIB, id="at least a body"),
    ],
)
def test_a_process_has_its_share_of_the_machines_memory(
    setting: int, memory: int, workers: int, limit: int
) -> None:
    settings = ServerSettings(max_body_memory=setting)
    assert body_memory_limit(settings, memory, workers) == limit


async def begin(proxy: Proxy, size: int, announced: int = 1_000_000) -> RawClient:
    """A client that has sent so much of a body."""
    client = await proxy.connect()
    await client.drain(chat(proxy.key, b"", framing=f"content-length: {announced}") + b" " * size)
    return client


async def test_bodies_of_all_clients_have_a_bound_together(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(max_body_memory=2 * MIB, max_body_bytes=MIB)
    bodies = proxy.context.bodies
    await begin(proxy, 900_000)
    other = await begin(proxy, 900_000)
    # What counts is what has come, whatever a head announces.
    await wait_until(lambda: 1_800_000 <= bodies.held < 2 * MIB)
    late = await begin(proxy, 500_000)
    answer = await late.read_answer()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
    assert 1_800_000 <= bodies.held < 2 * MIB
    await other.aclose()
    await wait_until(lambda: bodies.held < MIB)
    small = await proxy.connect()
    small.send(chat(proxy.key))
    assert (await small.read_answer()).status == 200
    assert len(proxy.records) == 3
    assert bodies.held < MIB


async def test_a_whole_body_for_which_there_is_no_room_keeps_its_connection(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(max_body_memory=MIB, max_body_bytes=MIB)
    client = await proxy.connect()
    proxy.context.bodies.hold(MIB - 10)
    client.send(chat(proxy.key))
    answer = await client.read_answer()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    assert "connection" not in answer.headers
    assert proxy.context.bodies.held == MIB - 10
    proxy.context.bodies.hold(10 - MIB)
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    assert proxy.context.bodies.held == 0


async def test_a_body_is_held_until_the_first_content_and_no_longer(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy()
    events = [*sse(*stream_events(3))]
    upstream.add([AwaitRelease("first"), *events[:3], AwaitRelease("rest"), *events[3:]])
    request = chat(proxy.key, {**QUESTION, "stream": True})
    client = await proxy.connect()
    client.send(request)
    await upstream.wait_for_requests(1)
    size = len(request.partition(b"\r\n\r\n")[2])
    assert proxy.context.bodies.held == size
    upstream.release("first")
    await wait_until(lambda: proxy.context.bodies.held == 0)
    assert proxy.context.exchanges
    upstream.release("rest")
    assert (await client.read_answer()).body.endswith(b"data: [DONE]\n\n")
    assert proxy.context.bodies.held == 0


async def test_a_body_that_is_counted_afterwards_is_held_to_the_end(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    def count(config: Config) -> Config:
        (endpoint,) = config.models[0].endpoints
        counted = replace(config.models[0], endpoints=(replace(endpoint, usage="count"),))
        return replace(config, models=(counted,))

    proxy = await start_proxy(change=count)
    upstream.add([*sse(*stream_events(2))[:3], AwaitRelease("rest"), *sse(*stream_events(2))[3:]])
    client = await proxy.connect()
    client.send(chat(proxy.key, {**QUESTION, "stream": True}))
    assert await client.read_line() == b"HTTP/1.1 200 OK\r\n"
    assert proxy.context.bodies.held > 0
    upstream.release("rest")
    await proxy.wait_for_records(1)
    assert proxy.context.bodies.held == 0


async def leave(client: RawClient, upstream: ScriptedUpstream) -> None:
    await client.aclose()


async def wait_for_answer(client: RawClient, upstream: ScriptedUpstream) -> None:
    await client.read_answer()


ENDS: dict[str, tuple[Any, bytes, Callable[[RawClient, ScriptedUpstream], Awaitable[None]]]] = {
    "whole": (json_response(200, completion()), b"", wait_for_answer),
    "refused by the provider": (json_response(400, {}), b"", wait_for_answer),
    "failed": (json_response(500, {}), b"", wait_for_answer),
    "a stream": (sse(*stream_events(2)), b"stream", wait_for_answer),
    "a broken stream": (sse(*stream_events(2))[:3], b"stream", leave),
    "left while it waits": ([Stall()], b"", leave),
    "left in the stream": ([sse_head(), Stall()], b"stream", leave),
    "not JSON": (None, b"{", wait_for_answer),
    "too slow": (None, b"slow", wait_for_answer),
    "too large": (None, b"large", wait_for_answer),
    "broken chunks": (None, b"chunks", wait_for_answer),
    "left within the body": (None, b"leave", leave),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_bytes_are_released_however_a_request_ends(
    start_proxy: StartProxy,
    upstream: ScriptedUpstream,
    end: tuple[Any, bytes, Callable[[RawClient, ScriptedUpstream], Awaitable[None]]],
) -> None:
    script, kind, finish = end
    proxy = await start_proxy(max_body_bytes=10_000, body_timeout=0.2)
    client = await proxy.connect()
    if script is not None:
        upstream.add(script)
        client.send(chat(proxy.key, {**QUESTION, "stream": kind == b"stream"}))
        await upstream.wait_for_requests(1)
    elif kind == b"{":
        client.send(chat(proxy.key, b"{"))
    elif kind == b"chunks":
        chunks = b"5\r\nhello\r\nzz\r\n"
        client.send(chat(proxy.key, b"", framing="transfer-encoding: chunked"))
        await client.drain(chunks[:10])
        await wait_until(lambda: proxy.context.bodies.held > 0)
        client.send(chunks[10:])
    else:
        length = "content-length: 9000" if kind != b"large" else "transfer-encoding: chunked"
        client.send(chat(proxy.key, b"", framing=length))
        part = b"1388\r\n" + b" " * 5000 + b"\r\n" if kind == b"large" else b" " * 5000
        await client.drain(part)
        await wait_until(lambda: proxy.context.bodies.held > 0)
        client.send(b"ffff\r\n" + b" " * 9000 if kind == b"large" else b"")
    await finish(client, upstream)
    await proxy.wait_for_records(1)
    assert proxy.context.bodies.held == 0


async def test_a_body_of_single_bytes_takes_few_objects(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy()
    body = json.dumps(QUESTION).encode()
    client = await begin(proxy, 0, len(body))
    await wait_until(lambda: len(proxy.context.exchanges) == 1)
    (connection,) = proxy.server._connections
    for place in range(len(body) - 1):
        client.send(body[place : place + 1])
        await wait_until(lambda place=place: proxy.context.bodies.held == place + 1)  # type: ignore[misc]
        assert len(connection._pieces) == 1
    client.send(body[-1:])
    assert (await client.read_answer()).status == 200
    assert upstream.requests[0].json()["messages"] == QUESTION["messages"]


@pytest.mark.parametrize("framing", ["content-length: 65536", "transfer-encoding: chunked"])
async def test_a_body_as_large_as_all_bodies_may_be_passes(
    start_proxy: StartProxy, framing: str
) -> None:
    proxy = await start_proxy(max_body_memory=65536, max_body_bytes=65536)
    text = json.dumps({**QUESTION, "pad": ""}).encode()
    body = text[:-2] + b"x" * (65536 - len(text)) + text[-2:]
    pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
    client = await proxy.connect()
    client.send(chat(proxy.key, b"", framing=framing))
    if "chunked" in framing:
        pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]
    await client.send_each(pieces)
    assert (await client.read_answer()).status == 200
