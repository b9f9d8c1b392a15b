"""The scripted upstream keeps its promises, else tests that rest on it protect nothing."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import openai
import pytest

from tests.support.scripted import (
    LAST_CHUNK,
    WAIT,
    AwaitRelease,
    Close,
    Pause,
    Reset,
    Script,
    ScriptedUpstream,
    SeenRequest,
    Send,
    SendMany,
    Stall,
    chunk,
    completion,
    dribble,
    event,
    json_response,
    refused_port,
    sse,
    sse_head,
    stream_events,
)

REQUEST = (
    b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: 1\r\nContent-Length: 8\r\n\r\n{"a": 1}'
)
OK = json_response(200, {"fine": True})


class Client:
    """A raw connection whose reads have a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self) -> bytes:
        async with asyncio.timeout(WAIT):
            return await self.reader.read(1_000_000)

    async def read_to_end(self) -> bytes:
        async with asyncio.timeout(WAIT):
            return await self.reader.read()

    async def ask(self) -> bytes:
        self.writer.write(REQUEST)
        return await self.read()

    async def hang_up(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@asynccontextmanager
async def connect(
    upstream: ScriptedUpstream, context: ssl.SSLContext | None = None
) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port, ssl=context)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def ask_to_end(script: Script) -> bytes:
    async with ScriptedUpstream(script) as upstream, connect(upstream) as client:
        client.writer.write(REQUEST)
        return await client.read_to_end()


# What it saw


async def test_a_request_is_kept_as_it_came() -> None:
    async with ScriptedUpstream(OK) as upstream, connect(upstream) as client:
        await client.ask()
        seen = upstream.requests[0]
    assert seen.head + seen.body == REQUEST
    assert (seen.method, seen.path, seen.json()) == ("POST", "/v1/chat/completions", {"a": 1})
    assert (seen.headers["x-a"], seen.header_list[1]) == ("1", ("X-A", "1"))


async def test_a_request_that_comes_byte_by_byte_is_one_request() -> None:
    async with ScriptedUpstream(OK) as upstream, connect(upstream) as client:
        for at in range(len(REQUEST)):
            client.writer.write(REQUEST[at : at + 1])
            await asyncio.sleep(0)
        assert b'{"fine": true}' in await client.read()
        assert len(upstream.requests) == 1


async def test_requests_on_one_connection_get_the_scripts_in_order() -> None:
    scripts = [json_response(200, number) for number in range(3)]
    async with ScriptedUpstream(*scripts) as upstream, connect(upstream) as client:
        bodies = [(await client.ask())[-1:] for _ in range(3)]
        assert bodies == [b"0", b"1", b"2"]
        assert (upstream.connections, upstream.open_connections) == (1, 1)
        assert [seen.connection for seen in upstream.requests] == [0, 0, 0]


async def test_the_default_answers_when_the_scripts_are_used_up() -> None:
    upstream = ScriptedUpstream(OK, default=lambda seen: json_response(418, seen.path))
    async with upstream, connect(upstream) as client:
        assert b" 200 " in await client.ask()
        assert b" 418 " in await client.ask()
        assert b'"/v1/chat/completions"' in await client.ask()


async def test_a_request_without_a_script_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="script failed"):
        async with ScriptedUpstream() as upstream, connect(upstream) as client:
            assert b" 500 " in await client.ask()


async def test_an_error_in_a_script_fails_the_test() -> None:
    def broken(seen: SeenRequest) -> Script:
        raise ZeroDivisionError

    with pytest.raises(AssertionError, match="script failed"):
        async with ScriptedUpstream(broken) as upstream:
            async with connect(upstream) as client:
                assert await client.ask() == b""


# Steps


async def test_each_send_is_seen_on_its_own() -> None:
    script: Script = [Send(b"one"), AwaitRelease("two"), Send(b"two")]
    async with ScriptedUpstream(script) as upstream, connect(upstream) as client:
        assert await client.ask() == b"one"
        assert not upstream.requests[0].finished.is_set()
        upstream.release("two")
        assert await client.read() == b"two"


async def test_a_stall_lasts_until_the_peer_hangs_up_and_that_is_seen() -> None:
    async with ScriptedUpstream([Send(b"x"), Stall(), Send(b"y")]) as upstream:
        async with connect(upstream) as client:
            assert await client.ask() == b"x"
            assert upstream.open_connections == 1
            await client.hang_up()
            await upstream.wait_for_hangup()
        assert upstream.open_connections == 0
        assert not upstream.requests[0].finished.is_set()


async def test_a_hang_up_is_seen_in_the_midst_of_a_pause() -> None:
    async with ScriptedUpstream([Pause(3600)]) as upstream, connect(upstream) as client:
        client.writer.write(REQUEST)
        await upstream.wait_for_requests()
        await client.hang_up()
        await upstream.wait_for_hangup()


async def test_close_ends_after_all_that_was_written() -> None:
    big = b"x" * 5_000_000
    assert await ask_to_end([Send(big), Close(), Send(b"never")]) == big


async def test_reset_is_an_error_at_the_peer() -> None:
    async with ScriptedUpstream([Send(b"x"), Pause(0.05), Reset()]) as upstream:
        async with connect(upstream) as client:
            assert await client.ask() == b"x"
            with pytest.raises(ConnectionResetError):
                await client.read()


@pytest.mark.parametrize("step", [Close(), Reset()], ids=["closes", "resets"])
async def test_an_upstream_that_does_so_on_connect_has_seen_no_request(step: Close | Reset) -> None:
    async with ScriptedUpstream(on_connect=[step]) as upstream, connect(upstream) as client:
        try:
            assert await client.read() == b""
        except ConnectionResetError:
            assert step == Reset()
        assert (upstream.connections, upstream.requests) == (1, [])


async def test_a_black_hole_accepts_and_says_nothing() -> None:
    async with ScriptedUpstream(on_connect=[Stall()]) as upstream, connect(upstream) as client:
        client.writer.write(REQUEST)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.reader.read(1)
        assert upstream.requests == []


async def test_many_chunks_wait_for_a_peer_that_does_not_read() -> None:
    made = 0

    def chunks() -> Iterator[bytes]:
        nonlocal made
        for made in range(1, 1601):  # noqa: B007  # the count is read outside
            yield b"x" * 65_536

    script: Script = [SendMany(chunks()), Close()]
    async with ScriptedUpstream(script) as upstream, connect(upstream) as client:
        client.writer.write(REQUEST)
        await upstream.wait_for_requests()
        await asyncio.sleep(0.2)
        assert made < 400  # socket buffers hold some megabytes, not 100
        total = 0
        while data := await client.read():
            total += len(data)
        assert (made, total) == (1600, 1600 * 65_536)


# Answers


async def test_a_stream_is_one_chunk_an_event_and_the_connection_stays() -> None:
    events = stream_events(2)
    async with ScriptedUpstream(sse(*events)) as upstream, connect(upstream) as client:
        client.writer.write(REQUEST)
        async with asyncio.timeout(WAIT):
            raw = await client.reader.readuntil(LAST_CHUNK)
        assert raw.endswith(b"".join(map(chunk, events)) + LAST_CHUNK)
        assert upstream.open_connections == 1


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (sse(b"a", b"b", packed=2), [chunk(b"ab"), LAST_CHUNK]),
        (sse(b"a", b"b", per_write=2), [chunk(b"a") + chunk(b"b"), LAST_CHUNK]),
        (sse(b"a", b"b", per_write=9), [chunk(b"a") + chunk(b"b") + LAST_CHUNK]),
        (sse(b"a", complete=False), [chunk(b"a")]),
        (sse(b"a", close=True), [chunk(b"a"), LAST_CHUNK]),
        (sse(b"a", b"b", chunked=False), [b"a", b"b"]),
    ],
    ids=["packed", "two a write", "all in one write", "cut", "closes silently", "until eof"],
)
def test_a_stream_is_written_as(made: Script, wanted: list[bytes]) -> None:
    head, *frames = [step.data for step in made if isinstance(step, Send)]
    assert frames == wanted
    assert head.startswith(b"HTTP/1.1 200 \r\nContent-Type: text/event-stream\r\n")
    assert head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("script", "closes"),
    [
        (sse(b"a"), False),
        (sse(b"a", close=True), True),
        (sse(b"a", complete=False), True),
        (sse(b"a", chunked=False), True),
        (json_response(200, 1), False),
        (json_response(200, 1, close=True), True),
    ],
)
def test_an_answer_closes_only_when_it_must(script: Script, closes: bool) -> None:
    assert (script[-1] == Close()) is closes


async def test_dribbled_bytes_are_the_same_bytes() -> None:
    script = sse(*stream_events(2), close=True)
    assert await ask_to_end(dribble(script)) == await ask_to_end(script)
    assert all(len(step.data) == 1 for step in dribble(script) if isinstance(step, Send))


def test_a_pace_lies_between_the_writes() -> None:
    kinds = [type(step).__name__ for step in sse(b"a", b"b", pace=0.01)]
    assert kinds == ["Send", "Send", "Pause", "Send", "Pause", "Send"]


def test_events_come_in_openais_order() -> None:
    raw = stream_events(2, model="m", usage=(5, 2), null_usage=True)
    assert raw[-1] == b"data: [DONE]\n\n"
    events = [json.loads(one.removeprefix(b"data: ")) for one in raw[:-1]]
    assert [len(one["choices"]) for one in events] == [1, 1, 1, 1, 0]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert [one["usage"] for one in events[:-1]] == [None] * 4
    assert events[-1]["usage"]["total_tokens"] == 7
    assert {one["model"] for one in events} == {"m"}


def test_events_without_usage_or_done_lack_them() -> None:
    raw = b"".join(stream_events(1, usage=None, done=False))
    assert b"usage" not in raw
    assert b"DONE" not in raw


@pytest.mark.parametrize(
    "script",
    [sse(*stream_events(3)), dribble(sse(*stream_events(3)), 7)],
    ids=["whole", "dribbled"],
)
async def test_the_official_client_reads_a_stream(script: Script) -> None:
    async with (
        ScriptedUpstream(script) as upstream,
        openai.AsyncOpenAI(base_url=upstream.base_url, api_key="x", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert "".join(parts) == " word0 word1 word2"


async def test_the_official_client_reads_a_completion() -> None:
    async with (
        ScriptedUpstream(json_response(200, completion("hello"))) as upstream,
        openai.AsyncOpenAI(base_url=upstream.base_url, api_key="x", max_retries=0) as client,
    ):
        answer = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hello"}]
        )
    assert answer.choices[0].message.content == "hello"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10


# Addresses and certificates


async def test_https_is_trusted_with_its_authority_only() -> None:
    async with ScriptedUpstream(OK, tls=True) as upstream:
        assert upstream.base_url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=upstream.ca_file)
        async with connect(upstream, trusting) as client:
            assert b'{"fine": true}' in await client.ask()
            await client.hang_up()
            await upstream.wait_for_hangup()
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connect(upstream, ssl.create_default_context()):
                pass


async def test_a_refused_port_refuses() -> None:
    with refused_port() as port, pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_leaving_the_context_cuts_what_is_open() -> None:
    async with ScriptedUpstream([sse_head(), Send(chunk(event({}))), Stall()]) as upstream:
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
        writer.write(REQUEST)
        await upstream.wait_for_requests()
    async with asyncio.timeout(WAIT):
        await reader.read()  # the end of file comes
    writer.close()
