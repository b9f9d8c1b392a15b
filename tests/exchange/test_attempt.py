"""One try on an endpoint by a clock of ours: when a stream that goes on counts as stalled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from bench.micro.path import NullTransport
from hoberproxy.config.reader import parse_config
from hoberproxy.errors import UpstreamError
from hoberproxy.exchange.attempt import Attempt, AttemptOwner
from hoberproxy.protocol.http_head import ResponseHead
from hoberproxy.request.parse_cache import ParseCache
from hoberproxy.routing.catalog import TimeLimits
from hoberproxy.routing.plan import Step
from hoberproxy.timer_wheel import Wheel
from hoberproxy.upstream.connection import UpstreamConnection
from hoberproxy.upstream.provider import make_upstreams
from tests.downstream.test_response import SSE, Sent
from tests.support.scripted import LAST_CHUNK, chunk, event, sse_head, stream_events

SLUG = "vendor/a-model"
CONFIG = """
[providers.acme]
base_url = "http://127.0.0.1:9/v1"
[[models]]
slug = "vendor/a-model"
endpoints = [{ provider = "acme", model = "m" }]
"""
REQUEST = b'{"model":"vendor/a-model","stream":true,"messages":[{"role":"user","content":"hi"}]}'
LIMITS = TimeLimits(connect=1.0, first_content=40.0, idle=100.0, total=1000.0)
EVENTS = stream_events(3)
SPACED = event({"choices": [{"index": 0, "delta": {"content": " more"}, "finish_reason": None}]})


def delta(**members: Any) -> bytes:
    """An event that has no content unless `members` has."""
    choices = [{"index": 0, "delta": members, "finish_reason": None}]
    return event({"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": choices})


class Transport(NullTransport):
    """A transport whose reading can be paused."""

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Exchange(AttemptOwner):
    """An attempt, its upstream's connection, and the time."""

    def __init__(self, limits: TimeLimits = LIMITS) -> None:
        loop = asyncio.get_running_loop()
        config = parse_config(CONFIG, environ={}, read_file=lambda path: "")
        self.wheel = Wheel(1000.0)
        upstream = make_upstreams(config, loop, self.wheel)["acme"]
        self.pool = upstream.pool
        self.connection = UpstreamConnection(self.pool)
        self.connection.connection_made(cast(Any, Transport()))
        self.pool.on_idle(self.connection, None)
        self.sent = Sent()
        self.errors: list[UpstreamError] = []
        self.is_finished = False
        endpoint = replace(config.models[0].endpoints[0], limits=limits)
        call = ParseCache().read(REQUEST, "")
        self.attempt = Attempt(self, call, Step(SLUG, endpoint), upstream, self.sent.answer)
        self.attempt.start()

    def wait(self, seconds: float) -> None:
        """Let time pass, and call `check_limits` whenever it is due."""
        end = self.now + seconds
        while not self.is_over and (due := max(self.attempt.due, self.now)) <= end:
            self.wheel.now = due
            self.attempt.check_limits(due)
            assert self.is_over or self.attempt.due > due, "it says when to ask again"
        self.wheel.now = end

    def receive(self, *data: bytes) -> None:
        for each in data:
            self.connection.data_received(each)

    @property
    def is_over(self) -> bool:
        return self.is_finished or bool(self.errors)

    # AttemptOwner

    @property
    def now(self) -> float:
        return self.wheel.now

    def open_answer(self, head: ResponseHead, *, is_stream: bool) -> None:
        self.sent.answer.start(200, SSE)

    def note_opened(self, *, is_stream: bool) -> None:
        pass

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        raise AssertionError("a stream was asked for")

    def seal(self, status: int, following: int = 0) -> None:
        pass

    def attempt_finished(self, attempt: Attempt) -> None:
        self.is_finished = True

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        self.errors.append(error)


def opened(limits: TimeLimits = LIMITS) -> Exchange:
    """A stream that has had its role and two texts, so that the next one may be taken."""
    exchange = Exchange(limits)
    exchange.receive(sse_head().data, *map(chunk, EVENTS[:3]))
    return exchange


# What may come for ever without anything in it.
EMPTY = {
    "comments": b": keep-alive\n\n",
    "comment lines": b": keep-alive\n",
    "empty lines": b"\n",
    "events without data": b"event: ping\n\n",
    "events of no chunk": b'event: ping\ndata: {"type":"ping"}\n\n',
    "events of no JSON": b"data: ping\n\n",
    "empty texts": EVENTS[1].replace(b" word0", b""),
    "empty deltas": delta(),
    "a role": delta(role="assistant", content=""),
    "nulls": delta(content=None, tool_calls=None),
    "no choices": event({"id": "c", "choices": [], "model": "m"}),
    "comments with CRLF": b": keep-alive\r\n\r\n",
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("every", [1.0, 10.0, 30.0])
async def test_a_stream_without_content_is_stalled_also_after_its_first(
    empty: bytes, every: float
) -> None:
    exchange = opened()
    start = exchange.now
    while not exchange.is_over and exchange.now < start + LIMITS.total:
        exchange.receive(chunk(empty))
        exchange.wait(every)
    (error,) = exchange.errors
    assert (error.status, error.code) == (504, "upstream_timeout")
    assert "comments or empty events" in error.message
    waited = exchange.now - start
    assert LIMITS.first_content < waited <= 1.25 * LIMITS.first_content + every
    assert not exchange.sent.answer.is_ended
    assert exchange.connection.is_closed


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("content", [SPACED, EVENTS[2]], ids=["another event", "a like event"])
@pytest.mark.parametrize("packed", [1, 3], ids=["a chunk each", "a chunk for all"])
async def test_content_now_and_then_keeps_it_going(
    empty: bytes, content: bytes, packed: int
) -> None:
    exchange = opened()
    pieces = [empty, empty, content] if empty.endswith(b"\n\n") else [content]
    joined = [b"".join(pieces)] if packed == 3 else pieces
    while not exchange.is_over and exchange.now < 1000.0 + 0.9 * LIMITS.total:
        for each in joined:
            exchange.receive(chunk(each))
            exchange.wait(35.0 / len(joined))
        assert not exchange.is_over
    exchange.receive(*map(chunk, EVENTS[-3:]), LAST_CHUNK)
    assert exchange.is_finished and not exchange.errors


async def test_a_role_and_a_text_alone_are_told_apart() -> None:
    exchange = opened()
    for _ in range(30):
        exchange.wait(30.0)
        exchange.receive(chunk(delta(role="assistant", content="x")))
    assert not exchange.is_over


@pytest.mark.parametrize(
    "content",
    [
        delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
        delta(reasoning_content="so"),
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        b"id: 7\r\nevent: message\r\n" + delta(content="x").replace(b"\n", b"\r\n"),
        b'data: {"choices":[{"delta":{"content":"' + b"x" * 40_000,
    ],
    ids=["a tool call", "reasoning", "a finish reason", "other lines", "a part of a long event"],
)
async def test_each_kind_of_content_counts(content: bytes) -> None:
    exchange = opened()
    exchange.wait(20.0)
    exchange.receive(chunk(b": keep-alive\n\n"))
    exchange.wait(20.0)
    exchange.receive(chunk(content))
    exchange.wait(30.0)
    exchange.receive(chunk(b"x"))
    exchange.wait(5.0)
    assert not exchange.is_over


async def test_silence_has_its_own_limit() -> None:
    exchange = opened()
    exchange.receive(chunk(b": keep-alive\n\n"))
    exchange.wait(99.0)
    assert not exchange.is_over
    exchange.wait(2.0)
    assert "between bytes" in exchange.errors[0].message


async def test_while_the_client_is_slow_no_time_passes() -> None:
    exchange = opened()
    exchange.wait(15.0)  # it is watched now
    exchange.receive(chunk(b": keep-alive\n\n"))
    exchange.attempt.pause()
    exchange.wait(500.0)
    exchange.attempt.resume()
    exchange.receive(chunk(b": keep-alive\n\n"))
    exchange.wait(39.0)
    assert not exchange.is_over
    exchange.receive(chunk(b": keep-alive\n\n"))
    exchange.wait(20.0)
    assert "comments" in exchange.errors[0].message


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
async def test_what_is_watched_passes_like_what_is_not(empty: bytes) -> None:
    watched, plain = opened(), opened()
    watched.wait(15.0)
    assert watched.attempt._is_watching
    for each in (watched, plain):
        each.receive(*map(chunk, [empty, *EVENTS[3:]]), LAST_CHUNK)
    assert watched.is_finished and plain.is_finished
    assert unchunked(watched) == unchunked(plain)


def unchunked(exchange: Exchange) -> bytes:
    out, rest = b"", exchange.sent.body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        out, rest = out + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return out


async def test_a_watched_stream_lets_chunks_be_taken_again_behind_its_next_content() -> None:
    exchange = opened()
    taker: Callable[[], Any] = lambda: exchange.connection._taker  # noqa: E731
    assert taker() is not None
    exchange.wait(15.0)
    assert taker() is None
    exchange.receive(chunk(EVENTS[2]))
    assert taker() is not None
