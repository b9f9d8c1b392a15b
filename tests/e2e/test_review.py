"""What a hostile reading of the path found, each seen to go wrong before it was mended."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from hoberproxy.downstream.connection import MAX_PIPELINED_BYTES
from hoberproxy.exchange import attempt
from hoberproxy.exchange.attempt import Attempt
from hoberproxy.exchange.exchange import Exchange
from hoberproxy.routing.catalog import Endpoint, Model
from hoberproxy.upstream.connection import UpstreamConnection
from tests.conftest import pure_only
from tests.support.patience import WAIT, patient
from tests.support.scripted import (
    ScriptedUpstream,
    Stall,
    event,
    json_response,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import (
    CHAT,
    LIMITS,
    OTHER_SLUG,
    SLUG,
    UPSTREAM_MODEL,
    Client,
    Proxy,
    as_client_sees,
    chat,
    error_event_of,
    eventually,
    model_at,
    request_bytes,
)

EVENTS = stream_events(3)
ROLE, WORD = EVENTS[0], EVENTS[1]
THEIRS = "Text of an upstream"


def completion(text: str = "hello") -> dict[str, Any]:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return {"id": "x", "model": UPSTREAM_MODEL, "choices": [choice]}


LARGE = json_response(200, json.dumps(completion("x" * 900_000)).encode())


async def ask_without_reading(proxy: Proxy, client: Client) -> int:
    """Ask one by one until the proxy has more to write than goes out; return how often."""
    client.writer.transport.pause_reading()
    (connection,) = proxy.server._connections
    requests = 0
    while not connection.is_paused:
        await client.ask(chat())
        requests += 1
        await proxy.wait_for_record(requests)
        await asyncio.sleep(0)
    return requests


# A client that does not read


async def test_a_connection_kept_under_a_full_client_serves_the_next_one(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(default=LARGE) as upstream,
        proxy_to(upstream) as proxy,
        proxy.connect() as slow,
    ):
        await ask_without_reading(proxy, slow)
        assert proxy.pool_of("a").idle == 1
        async with asyncio.timeout(WAIT):
            assert (await proxy.post(chat())).status == 200
        assert upstream.connections == 1


async def test_answers_that_are_not_read_do_not_pile_up(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream() as upstream,
        proxy_to(upstream) as proxy,
        proxy.connect() as client,
    ):
        client.writer.transport.pause_reading()
        (connection,) = proxy.server._connections
        requests = request_bytes({"x": "y"}) * 200  # each is refused: 400
        most = 0
        async with asyncio.timeout(WAIT):
            while proxy.server._connections:  # who sends on and on is closed
                client.writer.write(requests)
                await asyncio.sleep(0.001)
                transport = connection._transport
                if transport is not None and not transport.is_closing():
                    most = max(most, transport.get_write_buffer_size())
                    assert most < 4 * MAX_PIPELINED_BYTES
                if connection._is_overrun:
                    break
        assert connection._buffer == b""


async def test_a_request_behind_unread_answers_is_sent_when_they_are_read(
    proxy_to: ProxyTo,
) -> None:
    limits = replace(LIMITS, first_content=patient(0.2))
    async with (
        ScriptedUpstream(default=LARGE) as upstream,
        proxy_to(upstream, limits=limits) as proxy,
        proxy.connect() as client,
    ):
        requests = await ask_without_reading(proxy, client)
        upstream.add(sse(*EVENTS))
        await client.ask(chat(stream=True))
        await asyncio.sleep(
            2 * limits.first_content
        )  # beyond the upstream's limit, which has had no request yet
        client.writer.transport.resume_reading()
        for _ in range(requests):
            await client.read_reply()
        assert (await client.read_reply()).body == as_client_sees(EVENTS)


async def test_who_does_not_read_what_a_handler_answers_is_cut(proxy_to: ProxyTo) -> None:
    models = [model_at(f"{SLUG}-{'x' * 60}-{number}", "a") for number in range(3000)]
    async with (
        ScriptedUpstream() as upstream,
        proxy_to(upstream, models=models, server={"write_timeout": 0.2}) as proxy,
        proxy.connect() as client,
    ):
        client.writer.transport.pause_reading()
        await client.send(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
        await eventually(lambda: any(each.is_paused for each in proxy.server._connections))
        await eventually(lambda: not proxy.server._connections)


# The end of a stream

BEGUN = {
    "a cut event": b'data: {"choices":[{"index":0,"delta":{"cont',
    "an event without its blank line": WORD[:-1],
}


@pytest.mark.parametrize("last", BEGUN.values(), ids=BEGUN)
async def test_an_unfinished_last_event_does_not_swallow_the_error_event(
    proxy_to: ProxyTo, last: bytes
) -> None:
    async with ScriptedUpstream(sse(ROLE, WORD, last)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert error_event_of(reply.body)["code"] == "upstream_error"
    assert reply.body.startswith(as_client_sees([ROLE, WORD]) + b'data: {"error"')


async def test_a_cut_event_too_long_to_be_held_does_not_swallow_the_error_event(
    proxy_to: ProxyTo,
) -> None:
    last = b'data: {"x":"' + b"y" * 40_000
    async with ScriptedUpstream(sse(ROLE, WORD, last)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert error_event_of(reply.body)["code"] == "upstream_error"


async def test_a_stream_that_ends_in_its_first_content_event_falls_over(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(sse(ROLE, WORD[:-1])) as upstream,
        ScriptedUpstream(sse(*EVENTS)) as other,
        proxy_to(upstream, other) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
    assert (reply.headers["x-hober-attempts"], reply.body) == ("2", as_client_sees(EVENTS))


async def test_an_answer_in_one_event_without_its_blank_line_is_whole(proxy_to: ProxyTo) -> None:
    choice = {"index": 0, "delta": {"content": "all"}, "finish_reason": "stop"}
    only = event({"model": UPSTREAM_MODEL, "choices": [choice]})[:-1]
    async with ScriptedUpstream(sse(only)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (reply.body, reply.is_complete) == (as_client_sees([only]), True)
    assert (record.status, record.code) == (200, "")


@pytest.mark.parametrize("beat", [b"data: \n\n", b"data:\n\n", b"event: ping\ndata:\n\n"])
async def test_an_event_without_data_is_no_fault(proxy_to: ProxyTo, beat: bytes) -> None:
    events = [beat, *EVENTS[:2], beat, *EVENTS[2:]]
    async with ScriptedUpstream(sse(*events)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert reply.body == b"".join(
        each if each == beat else as_client_sees([each]) for each in events
    )
    assert record.events == 3


async def test_a_client_that_leaves_at_done_was_answered(proxy_to: ProxyTo) -> None:
    script = [*sse(*EVENTS)[:-1], Stall()]  # all but the last chunk
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            await client.ask(chat(stream=True))
            await client.read_head()
            await client.read_until(b"data: [DONE]\n\n")
        record = await proxy.wait_for_record()
        await upstream.wait_for_hangup()
    assert (record.status, record.code, record.has_usage) == (200, "", True)


# Connections


@pure_only
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_a_connection_given_up_as_it_is_made_is_not_counted_for_ever(
    proxy_to: ProxyTo, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    connecting: list[asyncio.Task[UpstreamConnection]] = []
    made = UpstreamConnection.connection_made

    def cancel(self: UpstreamConnection, transport: asyncio.BaseTransport) -> None:
        made(self, transport)
        connecting[0].cancel()  # as by a client that leaves in this turn

    async with (
        ScriptedUpstream(default=[Stall()], tls=tls) as upstream,
        proxy_to(upstream) as proxy,
    ):
        pool = proxy.pool_of("a")
        monkeypatch.setattr(UpstreamConnection, "connection_made", cancel)
        connecting.append(asyncio.create_task(pool.connect(1.0)))
        with pytest.raises(asyncio.CancelledError):
            await connecting[0]
        await eventually(lambda: pool.open == 0)
        await eventually(lambda: upstream.connections == 1 and not upstream.open_connections)


# What is kept, and where


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


ENDS: dict[str, Any] = {
    "a body": ({}, json_response(200, completion())),
    "a stream": ({"stream": True}, sse(*EVENTS)),
    "a failure": ({}, json_response(500, {})),
    "a stream that breaks": ({"stream": True}, sse(*EVENTS[:2], complete=False)),
}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(("more", "script"), ENDS.values(), ids=ENDS)
async def test_nothing_of_a_request_waits_for_the_collector(
    proxy_to: ProxyTo, more: dict[str, Any], script: Any
) -> None:
    async with (
        ScriptedUpstream(json_response(503, {})) as first,
        ScriptedUpstream(script) as upstream,
        proxy_to(first, upstream) as proxy,
    ):
        await proxy.post(chat(**more))
        await proxy.wait_for_record()
        await eventually(
            lambda: not [x for x in gc.get_objects() if type(x) in (Exchange, Attempt)]
        )


async def test_a_body_in_tiny_chunks_costs_about_its_size(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream() as upstream,
        proxy_to(upstream) as proxy,
        proxy.connect() as client,
    ):
        head = request_bytes(b"", CHAT).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        await client.send(head + b"2\r\nab\r\n" * 30_000)
        (connection,) = proxy.server._connections
        await eventually(lambda: connection._body_bytes == 60_000)
        assert len(connection._pieces) < 100


@pytest.mark.parametrize("models", [[], [OTHER_SLUG]], ids=["reported", "failed over"])
async def test_an_upstreams_code_is_shown_to_the_client_and_not_recorded(
    proxy_to: ProxyTo, models: list[str]
) -> None:
    refusal = json_response(400, {"error": {"message": "too long", "code": THEIRS}})
    async with (
        ScriptedUpstream(refusal) as upstream,
        ScriptedUpstream(json_response(429, {})) as other,
        proxy_to(upstream, other, models=[model_at(SLUG, "a"), model_at(OTHER_SLUG, "b")]) as proxy,
    ):
        reply = await proxy.post(chat(models=models))
        record = await proxy.wait_for_record()
        metrics = proxy.context.metrics
    assert THEIRS not in repr(record)
    assert THEIRS not in repr(vars(metrics) if hasattr(metrics, "__dict__") else metrics)
    assert record.failures[0].code == "invalid_value"
    if models:
        assert THEIRS.encode() not in reply.body
    else:
        assert (reply.error["code"], record.code) == (THEIRS, "invalid_value")


@pytest.mark.parametrize("faulty", [0, 1], ids=["the first try", "the second try"])
@pure_only
async def test_a_fault_of_our_own_is_told_and_not_taken_for_a_client_that_left(
    proxy_to: ProxyTo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    faulty: int,
) -> None:
    calls = iter(range(9))
    real = attempt.make_upstream_body

    def build(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == faulty:
            raise RuntimeError("a fault")
        return real(*args, **kwargs)

    monkeypatch.setattr(attempt, "make_upstream_body", build)
    async with (
        ScriptedUpstream(json_response(500, {})) as first,
        ScriptedUpstream(json_response(200, {})) as second,
    ):
        models = [
            Model(SLUG, (Endpoint("a", UPSTREAM_MODEL), Endpoint("b", "another name for it"))),
        ]
        async with proxy_to(first, second, models=models) as proxy:
            reply = await proxy.post(chat())
            record = await proxy.wait_for_record()
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert (record.status, record.code) == (500, "internal_error")
    assert [each.message.split()[-1] for each in caplog.records] == ["failed"]
    caplog.clear()  # expected here, and nowhere else
