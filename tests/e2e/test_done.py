"""[DONE] is the end of a client's answer; its upstream's framing may end later, or never."""

from __future__ import annotations

import pytest

from tests.support.scripted import (
    DONE,
    LAST_CHUNK,
    WAIT,
    AwaitRelease,
    Close,
    Reset,
    Script,
    ScriptedUpstream,
    Send,
    SendMany,
    Stall,
    Step,
    chunk,
    event,
    serialize_head,
    sse,
    sse_head,
    stream_events,
)

from .conftest import ProxyTo
from .harness import Proxy, as_client_sees, chat, eventually

EVENTS = stream_events(3)
ROLE = EVENTS[0]
HEAD = ("Content-Type", "text/event-stream")


def chunked(*events: bytes) -> list[Step]:
    return [sse_head(), *(Send(chunk(each)) for each in events)]


def plain(framing: tuple[str, str]) -> list[Step]:
    return [Send(serialize_head(200, [HEAD, framing])), *map(Send, EVENTS)]


HELD_OPEN: dict[str, list[Step]] = {
    "an event a chunk": chunked(*EVENTS),
    "all events in one chunk": chunked(b"".join(EVENTS)),
    "all in one write": [Send(sse_head().data + chunk(b"".join(EVENTS)))],
    "a chunk that is not whole": [
        *chunked(*EVENTS[:-1]),
        Send(b"%x\r\n%b" % (len(DONE) + 9, DONE)),
    ],
    "half of the last chunk": [*chunked(*EVENTS), Send(b"0\r\n")],
    "trailers without end": [*chunked(*EVENTS), Send(b"0\r\nX-A: b\r\n")],
    "a longer length": plain(("Content-Length", "100000")),
    "until close": plain(("Connection", "close")),
}


async def is_over(proxy: Proxy) -> bool:
    """The upstream has no connection any more, nor one that is waited for."""
    pool = proxy.pool_of("a")
    await eventually(lambda: pool.open == 0)
    return not pool._ending and not pool.idle


@pytest.mark.parametrize("script", HELD_OPEN.values(), ids=HELD_OPEN)
async def test_the_answer_ends_at_done_and_the_connection_takes_the_next_request(
    proxy_to: ProxyTo, script: Script
) -> None:
    async with (
        ScriptedUpstream([*script, Stall()], sse(*EVENTS)) as upstream,
        proxy_to(upstream) as proxy,
        proxy.connect() as client,
    ):
        proxy.pool_of("a").end_wait = 0.1
        await client.ask(chat(stream=True))
        reply = await client.read_reply()
        record = await proxy.wait_for_record()
        assert (reply.body, reply.is_complete) == (as_client_sees(EVENTS), True)
        assert (record.status, record.code, record.finish_reason) == (200, "", "stop")
        assert record.bytes_out == len(reply.body)
        await client.ask(chat(stream=True))
        assert (await client.read_reply()).body == as_client_sees(EVENTS)
        await upstream.wait_for_hangup()
        assert not proxy.pool_of("a")._ending
    assert not record.is_failure


async def test_an_upstream_that_ends_in_time_is_used_again(proxy_to: ProxyTo) -> None:
    script = [*chunked(*EVENTS), AwaitRelease("end"), Send(LAST_CHUNK)]
    async with ScriptedUpstream(script, sse(*EVENTS)) as upstream, proxy_to(upstream) as proxy:
        pool = proxy.pool_of("a")
        pool.end_wait = WAIT
        assert (await proxy.post(chat(stream=True))).is_complete
        assert (pool.open, pool.idle) == (1, 0)
        upstream.release("end")
        await eventually(lambda: pool.idle == 1)
        assert (await proxy.post(chat(stream=True))).is_complete
        assert upstream.connections == 1


NOISE = event({"choices": [{"index": 0, "delta": {"content": "never"}}], "model": "m"})
LATER: dict[str, list[Step]] = {
    "in the same write": [Send(chunk(b"".join(EVENTS) + NOISE) + LAST_CHUNK)],
    "in the same write, in chunks": [
        Send(b"".join(map(chunk, [*EVENTS, NOISE, b": never\n\n", DONE])) + LAST_CHUNK)
    ],
    "in writes of their own": [Send(chunk(each)) for each in [*EVENTS, NOISE, DONE]],
    "as an error": [
        Send(chunk(each)) for each in [*EVENTS, event({"error": {"message": "no", "code": 500}})]
    ],
    "without framing": [*(Send(chunk(each)) for each in EVENTS), Send(b"no chunk\r\n")],
    "without end": [
        *(Send(chunk(each)) for each in EVENTS),
        SendMany([chunk(b": never\n\n" * 100)] * 10_000),
        Stall(),
    ],
}


@pytest.mark.parametrize("rest", LATER.values(), ids=LATER)
async def test_what_follows_done_is_not_passed_on(proxy_to: ProxyTo, rest: list[Step]) -> None:
    async with (
        ScriptedUpstream([sse_head(), *rest, Close()]) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
        await upstream.wait_for_hangup()
        assert await is_over(proxy)
    assert (reply.body, reply.is_complete) == (as_client_sees(EVENTS), True)
    assert (record.status, record.code, record.completion_tokens) == (200, "", 3)


@pytest.mark.parametrize("end", [Close(), Reset()], ids=["a close", "a reset"])
async def test_a_connection_lost_behind_done_is_no_failure(proxy_to: ProxyTo, end: Step) -> None:
    async with (
        ScriptedUpstream([*chunked(*EVENTS), AwaitRelease("go"), end]) as upstream,
        proxy_to(upstream) as proxy,
    ):
        proxy.pool_of("a").end_wait = WAIT
        assert (await proxy.post(chat(stream=True))).is_complete
        upstream.release("go")
        assert await is_over(proxy)
        assert proxy.context.health.is_calm


@pytest.mark.parametrize("before", [[], [ROLE], [b": a comment\n\n"]], ids=["", "role", "comment"])
async def test_done_without_content_falls_over_at_once(
    proxy_to: ProxyTo, before: list[bytes]
) -> None:
    async with (
        ScriptedUpstream([*chunked(*before, DONE), Stall()]) as first,
        ScriptedUpstream(sse(*EVENTS)) as second,
        proxy_to(first, second) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert reply.body == as_client_sees(EVENTS)
    assert (record.provider, record.failures[0].code) == ("b", "upstream_error")


async def test_done_without_its_empty_line_counts_when_a_limit_has_passed(
    proxy_to: ProxyTo,
) -> None:
    script = [*chunked(*EVENTS[:-1], DONE[:-1]), Close()]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (reply.body, record.code) == (as_client_sees(EVENTS)[:-1], "")


async def test_nothing_is_waited_for_at_the_end_of_the_process(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream([*chunked(*EVENTS), Stall()]) as upstream:
        async with proxy_to(upstream) as proxy:
            proxy.pool_of("a").end_wait = WAIT
            await proxy.post(chat(stream=True))
            assert proxy.pool_of("a").open == 1
        await upstream.wait_for_hangup()
