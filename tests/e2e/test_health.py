"""An endpoint that has failed is tried last, but still tried; what is no failure does not count."""

from __future__ import annotations

import asyncio

import pytest

from hoberproxy.routing import health
from hoberproxy.routing.health import EndpointHealth
from tests.support.scripted import (
    AwaitRelease,
    Close,
    Script,
    ScriptedUpstream,
    Stall,
    completion,
    json_response,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import UPSTREAM_MODEL, Proxy, Reply, chat, error_event_of, eventually

GOOD = json_response(200, completion())
FAILING = json_response(500, {})
CUT = sse(*stream_events(2)[:2], complete=False)
A = ("a", UPSTREAM_MODEL)


@pytest.fixture
def short_cooldown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "FIRST_COOLDOWN", 0.15)


async def providers_of(proxy: Proxy, count: int) -> str:
    """Who answers `count` requests in turn."""
    replies = [await proxy.post(chat()) for _ in range(count)]
    return "".join(reply.headers.get("x-hober-provider", "-") for reply in replies)


def health_of(proxy: Proxy, provider: str = "a") -> EndpointHealth:
    states = proxy.context.health.snapshot(proxy.context.loop.time())
    return next(state for state in states if state.provider == provider)


async def until_cooled(proxy: Proxy, provider: str = "a") -> None:
    assert health_of(proxy, provider).is_cooling
    await eventually(lambda: not health_of(proxy, provider).is_cooling)


# Cooldown


async def test_after_three_failures_an_endpoint_is_asked_last(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(default=FAILING) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        assert await providers_of(proxy, 3) == "bbb"
        reply = await proxy.post(chat())
        assert len(first.requests) == 3, "the fourth request goes to the other at once"
        second.add(json_response(500, {}))
        last = await proxy.post(chat())
        assert len(first.requests) == 4, "last, and not gone"
    assert "x-hober-attempts" not in reply.headers
    assert last.error["metadata"]["provider"] == "a"


async def test_an_endpoint_whose_streams_all_break_is_asked_last(proxy_to: ProxyTo) -> None:
    """Each of them had begun well."""
    async with (
        ScriptedUpstream(default=CUT) as first,
        ScriptedUpstream(default=sse(*stream_events(2))) as second,
        proxy_to(first, second) as proxy,
    ):
        replies = [await proxy.post(chat(stream=True)) for _ in range(4)]
        assert len(first.requests) == 3
    assert [reply.headers["x-hober-provider"] for reply in replies] == [*"aaab"]
    assert error_event_of(replies[2].body)["code"] == "upstream_error"


@pytest.mark.parametrize(
    ("refusal", "least"),
    [
        (json_response(429, {}), 3.0),
        (json_response(429, {}, ("Retry-After", "30")), 29.0),
        (json_response(503, {}, ("retry-after-ms", "30000")), 29.0),
    ],
    ids=["429", "429 with retry-after", "503 with retry-after-ms"],
)
async def test_who_asks_to_be_left_alone_is_at_once(
    proxy_to: ProxyTo, refusal: Script, least: float
) -> None:
    async with (
        ScriptedUpstream(refusal) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        assert await providers_of(proxy, 2) == "bb"
        assert len(first.requests) == 1
        assert health_of(proxy).cooldown >= least


async def test_a_time_to_wait_in_milliseconds_ends_in_time(proxy_to: ProxyTo) -> None:
    refusal = json_response(429, {}, ("Retry-After", "60"), ("retry-after-ms", "150"))
    async with (
        ScriptedUpstream(refusal, default=GOOD) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        assert await providers_of(proxy, 2) == "bb"
        await until_cooled(proxy)
        assert await providers_of(proxy, 2) == "aa"


# All of them cooling


def check_nobody_healthy(reply: Reply) -> None:
    assert (reply.status, reply.error["code"]) == (503, "no_healthy_upstream")
    assert 1 <= int(reply.headers["retry-after"]) <= 6
    assert 1000 <= int(reply.headers["retry-after-ms"]) <= 6000
    assert "x-should-retry" not in reply.headers, "it is worth coming back then"
    previous = reply.error["metadata"]["previous_errors"]
    assert sorted(each["provider"] for each in previous) == ["a", "b"]


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_with_all_cooling_all_are_tried_and_then_it_is_a_503(
    proxy_to: ProxyTo, stream: bool
) -> None:
    async with (
        ScriptedUpstream(default=FAILING) as first,
        ScriptedUpstream(default=FAILING) as second,
        proxy_to(first, second) as proxy,
    ):
        for _ in range(3):
            assert (await proxy.post(chat(stream=stream))).status == 502
        check_nobody_healthy(await proxy.post(chat(stream=stream)))
        record = await proxy.wait_for_record(4)
        assert (len(first.requests), len(second.requests)) == (4, 4)
    assert (record.status, record.code, record.attempts) == (503, "no_healthy_upstream", 2)
    assert [each.code for each in record.failures] == ["upstream_error"] * 2


async def test_a_cooling_endpoint_that_answers_serves(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(FAILING, FAILING, FAILING, GOOD) as upstream,
        proxy_to(upstream) as proxy,
    ):
        assert await providers_of(proxy, 4) == "---a"


async def test_the_one_that_cools_the_shortest_is_tried_first(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(json_response(429, {}, ("Retry-After", "60")), default=GOOD) as first,
        ScriptedUpstream(json_response(429, {}, ("Retry-After", "30")), default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        assert await providers_of(proxy, 2) == "-b"


async def test_a_rate_limit_stays_one_while_all_are_cooling(proxy_to: ProxyTo) -> None:
    refusal = json_response(429, {}, ("Retry-After", "30"))
    async with ScriptedUpstream(default=refusal) as upstream, proxy_to(upstream) as proxy:
        replies = [await proxy.post(chat()) for _ in range(2)]
    assert [each.status for each in replies] == [429, 429]
    assert replies[1].headers["retry-after"] == "30"


# The trial


@pytest.mark.usefixtures("short_cooldown")
async def test_after_its_cooldown_one_request_tries_an_endpoint(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(FAILING, FAILING, FAILING, default=GOOD) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
        proxy.connect() as client,
    ):
        assert await providers_of(proxy, 3) == "bbb"
        await until_cooled(proxy)
        first.add([AwaitRelease("verdict"), *GOOD])
        await client.ask(chat())
        await first.wait_for_requests(4)
        assert await providers_of(proxy, 2) == "bb", "the trial's verdict is awaited"
        first.release("verdict")
        assert (await client.read_reply()).headers["x-hober-provider"] == "a"
        assert await providers_of(proxy, 2) == "aa"


@pytest.mark.usefixtures("short_cooldown")
async def test_a_failed_trial_is_unseen_and_cools_for_longer(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(default=FAILING) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        proxy.context.draw = lambda: 0.5  # no jitter
        assert await providers_of(proxy, 3) == "bbb"
        await until_cooled(proxy)
        assert await providers_of(proxy, 2) == "bb"
        assert len(first.requests) == 4
        ends = proxy.context.health.cooldown_ends(A)
        assert ends is not None and ends - proxy.context.loop.time() > 0.15


@pytest.mark.usefixtures("short_cooldown")
async def test_a_trial_whose_client_left_lets_the_next_request_try(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(FAILING, FAILING, FAILING, [Stall()], default=GOOD) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        assert await providers_of(proxy, 3) == "bbb"
        await until_cooled(proxy)
        async with proxy.connect() as client:
            await client.ask(chat())
            await first.wait_for_requests(4)
            client.abort()
            await proxy.wait_for_record(4)
        assert await providers_of(proxy, 1) == "a"


# What is no failure


async def test_a_kept_connection_that_was_closed_is_no_failure(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(GOOD, [Close()], GOOD) as upstream, proxy_to(upstream) as proxy:
        assert await providers_of(proxy, 2) == "aa"
        record = await proxy.wait_for_record(2)
        assert upstream.connections == 2
        assert health_of(proxy).failure_rate == 0
    assert (record.attempts, record.failures) == (1, ())


@pytest.mark.parametrize(
    "script",
    [[Stall()], [*sse(*stream_events(2))[:3], Stall()]],
    ids=["before an answer", "amid a stream"],
)
async def test_a_client_that_leaves_is_no_failure(proxy_to: ProxyTo, script: Script) -> None:
    async with ScriptedUpstream(default=script) as upstream, proxy_to(upstream) as proxy:
        for count in range(1, 5):
            async with proxy.connect() as client:
                await client.ask(chat(stream=True))
                await upstream.wait_for_requests(count)
                if len(script) > 1:
                    await client.read_head()
                client.abort()
                await proxy.wait_for_record(count)
        state = health_of(proxy)
    assert (state.failures_in_a_row, state.failure_rate, state.is_cooling) == (0, 0.0, False)


async def test_refusing_what_was_asked_is_no_failure(proxy_to: ProxyTo) -> None:
    refusal = json_response(400, {"error": {"message": "no"}})
    async with ScriptedUpstream(default=refusal) as upstream, proxy_to(upstream) as proxy:
        for _ in range(4):
            assert (await proxy.post(chat())).status == 400
        state = health_of(proxy)
    assert (state.failures_in_a_row, state.failure_rate, state.is_cooling) == (0, 0.0, False)


async def test_many_failures_at_once_are_one_outage(proxy_to: ProxyTo) -> None:
    waiting = [AwaitRelease("fail"), *FAILING]
    async with (
        ScriptedUpstream(default=waiting) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        requests = [asyncio.ensure_future(proxy.post(chat())) for _ in range(20)]
        await first.wait_for_requests(20)
        first.release("fail")
        replies = await asyncio.gather(*requests)
        assert health_of(proxy).cooldown <= health.FIRST_COOLDOWN * (1 + health.JITTER)
    assert {reply.status for reply in replies} == {200}
