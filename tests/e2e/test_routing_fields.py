"""The routing fields of a request as a client sees them: which endpoints are tried, in which order.

Every upstream fails where the order is looked at: the error of the last then names all before it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest

from hoberproxy.config.settings import RoutingSettings
from hoberproxy.routing.catalog import Abilities, Endpoint, Model, Prices
from tests.support.scripted import (
    Answer,
    Close,
    Pause,
    Script,
    ScriptedUpstream,
    SeenRequest,
    completion,
    event,
    json_response,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import OTHER_SLUG, SLUG, UPSTREAM_MODEL, Proxy, Reply, chat

THEIRS = "words of theirs"
FAILING = json_response(500, {"error": {"message": THEIRS}})
GOOD = json_response(200, completion())
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def priced(provider: str, prompt: str, completion: str, **more: Any) -> Endpoint:
    prices = Prices(Decimal(prompt), Decimal(completion))
    return Endpoint(provider, UPSTREAM_MODEL, prices=prices, **more)


# a is the dearest and b the cheapest, which takes no tools; only c says what it supports.
MODELS = (
    Model(
        SLUG,
        (
            priced("a", "4", "8"),
            priced("b", "1", "1", abilities=Abilities(tools=False)),
            priced("c", "2", "3", abilities=Abilities(parameters=frozenset(("seed", "tools")))),
        ),
    ),
    Model(OTHER_SLUG, (priced("d", "2.5", "2"),)),
)


@dataclass(frozen=True, slots=True)
class Market:
    """A proxy, and its upstreams a to d."""

    proxy: Proxy
    upstreams: list[ScriptedUpstream]

    async def ask(self, path: str = "/v1/chat/completions", **fields: Any) -> Reply:
        return await self.proxy.post(chat(**fields), path)

    async def order(self, **fields: Any) -> str:
        """Return which providers were tried, as letters, by a request that all of them failed."""
        reply = await self.ask(**fields)
        assert reply.status == 502, reply.body
        metadata = reply.error["metadata"]
        names = [each["provider"] for each in metadata.get("previous_errors", ())]
        return "".join([*names, metadata["provider"]])

    @property
    def calls(self) -> list[int]:
        return [len(upstream.requests) for upstream in self.upstreams]


@pytest.fixture
def market(proxy_to: ProxyTo) -> Any:
    """Starts upstreams, which answer alike unless a test says otherwise, and a proxy for them."""

    @asynccontextmanager
    async def start(
        *answers: Answer, default: Answer = FAILING, models: Iterable[Model] = MODELS
    ) -> AsyncIterator[Market]:
        async with AsyncExitStack() as stack:
            given = [*answers, *[default] * (4 - len(answers))]
            upstreams = [
                await stack.enter_async_context(ScriptedUpstream(default=each)) for each in given
            ]
            proxy = await stack.enter_async_context(proxy_to(*upstreams, models=models))
            yield Market(proxy, upstreams)

    return start


# Which endpoints are tried, in which order

ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "without a preference by the config": ({}, "abc"),
    "only": ({"provider": {"only": ["c", "b"]}}, "bc"),
    "ignore": ({"provider": {"ignore": ["a"]}}, "bc"),
    "order puts to the front": ({"provider": {"order": ["c"]}}, "cab"),
    "order keeps its own order": ({"provider": {"order": ["c", "b", "nobody"]}}, "cba"),
    "no fallbacks": ({"provider": {"allow_fallbacks": False}}, "a"),
    "no fallbacks from an order": (
        {"provider": {"order": ["c", "b"], "allow_fallbacks": False}},
        "c",
    ),
    "no fallbacks to another model": (
        {"provider": {"allow_fallbacks": False}, "models": [OTHER_SLUG]},
        "a",
    ),
    "sort by price": ({"provider": {"sort": "price"}}, "bca"),
    "the floor suffix": ({"model": f"{SLUG}:floor"}, "bca"),
    "an order over a sort": ({"provider": {"sort": "price", "order": ["a"]}}, "abc"),
    "a sort over a suffix": ({"model": f"{SLUG}:nitro", "provider": {"sort": "price"}}, "bca"),
    "max price of completions": ({"provider": {"max_price": {"completion": 3}}}, "bc"),
    "max price as text": ({"provider": {"max_price": {"prompt": "1.5"}}}, "b"),
    "models after the model": ({"models": [OTHER_SLUG]}, "abcd"),
    "models alone": ({"model": None, "models": [OTHER_SLUG, SLUG]}, "dabc"),
    "a repeated model once": ({"models": [SLUG, OTHER_SLUG, SLUG]}, "abcd"),
    "a suffix in models": ({"model": OTHER_SLUG, "models": [f"{SLUG}:floor"]}, "dbca"),
    "an unknown model skipped": ({"model": "no/such", "models": ["nor/this", OTHER_SLUG]}, "d"),
    "filters on every model": ({"models": [OTHER_SLUG], "provider": {"only": ["b", "d"]}}, "bd"),
    "tools": ({"tools": TOOLS}, "ac"),
    "required parameters": ({"seed": 1, "provider": {"require_parameters": True}}, "c"),
    "auto by cost": ({"model": "hober/auto:cost"}, "bdca"),
    "auto by cost with tools": ({"model": "hober/auto:cost", "tools": TOOLS}, "dca"),
    "auto by speed, nothing measured": ({"model": "hober/auto:fast"}, "abcd"),
    "auto balanced, nothing measured": ({"model": "hober/auto"}, "bdca"),
    "auto as a fallback": ({"model": OTHER_SLUG, "models": ["hober/auto:cost"]}, "dbca"),
    "nulls and unknown preferences": (
        {"provider": {"only": None, "sort": None, "data_collection": "deny"}, "models": None},
        "abc",
    ),
}


@pytest.mark.parametrize(("fields", "order"), ORDERS.values(), ids=ORDERS)
async def test_endpoints_are_tried_in_the_order_that_is_asked_for(
    market: Any, fields: dict[str, Any], order: str
) -> None:
    async with market() as there:
        assert await there.order(**fields) == order
        assert there.calls == [order.count(name) for name in "abcd"]
        record = await there.proxy.wait_for_record()
        sent = next(upstream for upstream in there.upstreams if upstream.requests).requests[0]
    assert record.attempts == len(order)
    assert not {"models", "provider"} & set(sent.json()), "the router's own are never sent on"


async def test_the_answer_names_the_endpoint_and_the_model_without_suffix(market: Any) -> None:
    async with market(default=GOOD) as there:
        reply = await there.ask(model="hober/auto:cost", tools=TOOLS)
        floor = await there.ask(model=f"{SLUG}:floor")
        record = await there.proxy.wait_for_record(2)
    assert (reply.headers["x-hober-provider"], reply.headers["x-hober-model"]) == ("d", OTHER_SLUG)
    assert reply.json()["model"] == OTHER_SLUG
    assert (floor.headers["x-hober-provider"], floor.json()["model"]) == ("b", SLUG)
    assert (record.slug, record.requested) == (SLUG, (f"{SLUG}:floor",))


async def test_a_colon_that_is_no_suffix_belongs_to_the_slug(market: Any) -> None:
    models = [Model("llama3.2:3b", (priced("b", "1", "1"),)), *MODELS]
    async with market(default=GOOD, models=models) as there:
        reply = await there.ask(model="llama3.2:3b:nitro")
        unknown = await there.ask(model=f"{SLUG}:online")
    assert reply.headers["x-hober-model"] == "llama3.2:3b"
    assert unknown.error["code"] == "model_not_found"


# What is measured


def slow_then(script: Script, seconds: float) -> Script:
    return [Pause(seconds), *script]


async def providers_of(there: Market, count: int, **fields: Any) -> str:
    """Who answers `count` requests in turn."""
    replies = [await there.ask(stream=True, **fields) for _ in range(count)]
    return "".join(reply.headers["x-hober-provider"] for reply in replies)


async def test_sort_by_latency_explores_and_then_keeps_to_the_fastest(market: Any) -> None:
    quick = sse(*stream_events(2))
    answers = slow_then(quick, 0.2), slow_then(quick, 0.1), quick
    async with market(*answers) as there:
        assert await providers_of(there, 5, provider={"sort": "latency"}) == "abccc"
        assert await providers_of(there, 1, model=f"{SLUG}:nitro") == "c"
        assert await providers_of(there, 1) == "a", "nobody asked for the fastest"
        await there.ask(model=OTHER_SLUG)
        fields = {"model": "hober/auto:fast", "provider": {"ignore": ["c", "d"]}}
        assert await providers_of(there, 1, **fields) == "b"


async def test_sort_by_throughput_keeps_to_who_writes_the_most(market: Any) -> None:
    def writing(tokens: int) -> Script:
        return sse(*stream_events(4, usage=(7, tokens)), pace=0.03)

    async with market(writing(10), writing(1000), writing(100)) as there:
        assert await providers_of(there, 4, provider={"sort": "throughput"}) == "abcb"


async def test_a_slow_body_does_not_spoil_what_streams_have_measured(market: Any) -> None:
    def answer(seen: SeenRequest) -> Script:
        return quick if seen.json()["stream"] else slow_then(GOOD, 0.3)

    quick = sse(*stream_events(2))
    fields = {"provider": {"sort": "latency", "only": ["a", "b"]}}
    async with market(answer, slow_then(quick, 0.05)) as there:
        assert await providers_of(there, 3, **fields) == "aba"
        body = await there.ask(**fields)
        assert body.headers["x-hober-provider"] == "a"
        assert await providers_of(there, 1, **fields) == "a"


async def test_bodies_alone_are_measured_too(market: Any) -> None:
    async with market(slow_then(GOOD, 0.1), GOOD) as there:
        fields = {"provider": {"sort": "latency", "only": ["a", "b"]}}
        replies = [await there.ask(**fields) for _ in range(3)]
    assert [each.headers["x-hober-provider"] for each in replies] == ["a", "b", "b"]


# Weights


@pytest.mark.parametrize(
    ("draws", "order"),
    [((0.5, 0.5, 0.5), "bac"), ((0.1, 0.9, 0.5), "abc"), ((0.0, 0.0, 0.0), "abc")],
    ids=["an even draw goes by weight", "a lucky draw comes first", "the least draws are a tie"],
)
async def test_weights_share_the_requests_and_zero_is_for_falling_over_only(
    market: Any, draws: tuple[float, ...], order: str
) -> None:
    weights = {"a": 1.0, "b": 3.0, "c": 0.0}
    endpoints = tuple(replace(each, weight=weights[each.provider]) for each in MODELS[0].endpoints)
    async with market(models=[Model(SLUG, endpoints)]) as there:
        there.proxy.context.draw = iter([*draws, *[0.5] * 9]).__next__
        assert await there.order() == order


async def test_a_preference_stands_over_weights(market: Any) -> None:
    endpoints = tuple(replace(each, weight=1.0) for each in MODELS[0].endpoints)
    async with market(models=[Model(SLUG, endpoints)]) as there:
        assert await there.order(provider={"sort": "price"}) == "bca"


# How often


async def test_no_more_attempts_are_made_than_the_config_allows(market: Any) -> None:
    async with market() as there:
        config = there.proxy.context.config
        there.proxy.context.config = replace(config, routing=RoutingSettings(max_attempts=2))
        assert await there.order(models=[OTHER_SLUG]) == "ab"


async def test_no_attempt_begins_after_the_time_for_all_of_them(market: Any) -> None:
    async with market(slow_then(FAILING, 0.15)) as there:
        config = there.proxy.context.config
        there.proxy.context.config = replace(config, routing=RoutingSettings(attempts_timeout=0.1))
        assert await there.order() == "a"


# Nobody


async def test_no_endpoint_says_which_filter_removed_which_endpoint(market: Any) -> None:
    async with market() as there:
        fields = {"tools": TOOLS, "models": ["no/such"]}
        limits = {"ignore": ["a"], "max_price": {"prompt": 1.5}}
        reply = await there.ask(**fields, provider=limits)
        record = await there.proxy.wait_for_record()
        assert there.calls == [0, 0, 0, 0]
    error = reply.error
    assert (reply.status, error["type"], error["code"], error["param"]) == (
        *(404, "invalid_request_error", "no_endpoint"),
        None,
    )
    for words in (
        f"a of '{SLUG}' (provider.ignore names it)",
        f"b of '{SLUG}' (it takes no tools)",
        f"c of '{SLUG}' (its prompt price of 2 USD per million tokens is over 1.5)",
        "raise provider.max_price",
        "not in the catalog: 'no/such'",
    ):
        assert words in error["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert (record.status, record.code, record.attempts) == (404, "no_endpoint", 0)
    assert not record.failures


async def test_a_single_filter_is_named_as_the_field_at_fault(market: Any) -> None:
    async with market() as there:
        reply = await there.ask(provider={"only": ["nobody"]})
    assert (reply.error["code"], reply.error["param"]) == ("no_endpoint", "provider.only")


@pytest.mark.parametrize("fields", [{}, {"models": ["nor/this"]}], ids=["model", "models"])
async def test_an_unknown_model_is_named(market: Any, fields: dict[str, Any]) -> None:
    async with market() as there:
        reply = await there.ask(model="no/such", **fields)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (
        *(404, "model_not_found"),
        "model",
    )
    assert "'no/such'" in reply.error["message"]
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"model": "no/such"}, "model_not_found"), ({"provider": {"only": ["x"]}}, "no_endpoint")],
    ids=["model_not_found", "no_endpoint"],
)
async def test_under_api_v1_the_status_is_the_code(
    market: Any, fields: dict[str, Any], code: str
) -> None:
    async with market() as there:
        reply = await there.ask("/api/v1/chat/completions", **fields)
        record = await there.proxy.wait_for_record()
    assert (reply.error["code"], reply.error["metadata"]) == (404, {"code": code})
    assert record.code == code


async def test_a_wrong_preference_is_refused_before_anybody_is_asked(market: Any) -> None:
    async with market() as there:
        reply = await there.ask(provider={"sort": "beauty"})
        assert there.calls == [0, 0, 0, 0]
    assert (reply.status, reply.error["param"]) == (400, "provider.sort")


# What the client gets of those that failed

KINDS: list[Script] = [
    FAILING,
    json_response(429, {"error": {"message": THEIRS, "code": THEIRS}}),
    sse(event({"error": {"message": THEIRS, "code": THEIRS, "type": THEIRS}})),
    [Close()],
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/v1/chat/completions"])
async def test_previous_errors_hold_numbers_and_our_words_only(market: Any, path: str) -> None:
    async with market(*KINDS) as there:
        reply = await there.ask(path, stream=True, models=[OTHER_SLUG])
        record = await there.proxy.wait_for_record()
    assert THEIRS.encode() not in reply.body
    previous = reply.error["metadata"]["previous_errors"]
    assert all(type(each.pop("milliseconds")) is int for each in previous)
    assert previous == [
        {"provider": "a", "status": 500, "code": "upstream_error", "phase": "head"},
        {"provider": "b", "status": 429, "code": "rate_limit_exceeded", "phase": "head"},
        {"provider": "c", "status": 200, "code": "upstream_error", "phase": "opening"},
    ]
    assert reply.error["metadata"]["provider"] == "d"
    assert THEIRS not in repr(record)


# Values beyond the contract's

BEYOND: dict[str, tuple[dict[str, Any], str]] = {
    "tool_choice=any": ({"tool_choice": "any", "tools": TOOLS}, "tool_choice"),
    "response_format=regex": (
        {"response_format": {"type": "regex", "pattern": "a+"}},
        "response_format.type",
    ),
    "max_tokens=-1": ({"max_tokens": -1}, "max_tokens"),
    "content=null": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]},
        "messages[1].content",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
async def test_a_value_that_only_some_servers_take_reaches_those_as_it_is(
    proxy_to: ProxyTo, name: str
) -> None:
    sent, param = BEYOND[name]
    able = Endpoint("b", UPSTREAM_MODEL, abilities=Abilities(accepts=frozenset([name])))
    models = [Model(SLUG, (Endpoint("a", UPSTREAM_MODEL), able))]
    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream(GOOD, GOOD) as second,
        proxy_to(first, second, models=models) as proxy,
    ):
        for _ in range(2):  # the second as it was seen before
            reply = await proxy.post(chat() | sent)
            assert reply.status == 200
        for seen in second.requests:
            assert seen.json().items() >= sent.items()
    async with ScriptedUpstream() as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat() | sent)
        assert not upstream.requests
    assert (reply.status, reply.error["param"]) == (400, param)
