"""GET /v1/generation and GET /v1/key, through a proxy that listens."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import orjson
import pytest

from hoberproxy.access.limits import PICO, KeyLimits, format_dollars
from hoberproxy.dialects.usage import BYTES_PER_TOKEN
from hoberproxy.request.checks import parse_call
from hoberproxy.routing.catalog import Endpoint, Model, Prices
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.conftest import QUESTION, SLUG, ClientAnswer, Proxy, StartProxy, chat, get, wait_until
from tests.support.scripted import AwaitRelease, ScriptedUpstream, completion, json_response

PRICES = Prices(Decimal(1), Decimal(2))
USAGE = (1000, 500)  # tokens of prompt and answer


@pytest.fixture
async def proxy(start_proxy: StartProxy, upstream: ScriptedUpstream) -> Proxy:
    """One whose answers cost 0.002 USD."""
    upstream._default = json_response(200, completion(usage=USAGE))
    return await start_priced(start_proxy, PRICES)


async def start_priced(start_proxy: StartProxy, prices: Prices) -> Proxy:
    model = Model(SLUG, (Endpoint("scripted", "upstream-model", prices=prices),))
    return await start_proxy(change=lambda config: replace(config, models=(model,)))


async def ask(proxy: Proxy, key: str | None = None) -> ClientAnswer:
    client = await proxy.connect()
    client.send(chat(key or proxy.key))
    return await client.read_answer()


async def fetch(proxy: Proxy, path: str, key: str | None = None) -> ClientAnswer:
    client = await proxy.connect()
    client.send(get(path, f"authorization: Bearer {key or proxy.key}"))
    return await client.read_answer("GET")


async def new_key(proxy: Proxy, **options: Any) -> str:
    store = Store(proxy.context.config.records.file)
    key, _ = store.create_key("another", **options)
    store.close()
    count = proxy.context.keyring.count
    await wait_until(lambda: proxy.context.keyring.count > count)
    return key


# One request


@pytest.mark.parametrize("prefix", ["/v1", "", "/api/v1"])
async def test_a_request_is_found_as_soon_as_its_answer_is_there(proxy: Proxy, prefix: str) -> None:
    answer = await ask(proxy)
    found = await fetch(proxy, f"{prefix}/generation?id={answer.headers['x-request-id']}")
    data = found.json()["data"]
    assert (data["model"], data["provider_name"], data["finish_reason"]) == (
        SLUG,
        "scripted",
        "stop",
    )
    assert (data["tokens_prompt"], data["tokens_completion"]) == (1000, 500)
    assert (data["cost"], data["total_cost"]) == ("0.002", 0.002)
    assert data["latency"] is not None and not data["cancelled"]


async def test_it_says_what_came_from_a_cache_and_what_went_into_one(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    details = {"cached_tokens": 600, "cache_write_tokens": 300}
    answer = completion(usage=USAGE)
    answer["usage"]["prompt_tokens_details"] = details
    upstream._default = json_response(200, answer)
    prices = replace(PRICES, cached=Decimal("0.1"), cache_write=Decimal("1.25"))
    proxy = await start_priced(start_proxy, prices)
    found = await fetch(proxy, f"/v1/generation?id={(await ask(proxy)).headers['x-request-id']}")
    data = found.json()["data"]
    assert (data["native_tokens_cached"], data["native_tokens_cache_write"]) == (600, 300)
    assert data["cost"] == "0.001535"  # 100, 60, 375 and 1000 millionths
    assert data["price"] == "prompt=1 completion=2 cached=0.1 cache_write=1.25"


async def test_it_is_found_by_the_id_in_the_body(proxy: Proxy) -> None:
    answer = await ask(proxy)
    found = await fetch(proxy, f"/v1/generation?id={answer.json()['id']}")
    assert found.json()["data"]["id"] == answer.headers["x-request-id"]


async def test_another_key_does_not_see_it(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hoberproxy.api.account_routes.WAITS", (0.0, 0.0))
    other = await new_key(proxy)
    answer = await ask(proxy)
    await wait_until(lambda: proxy.server._journal.stored == 1)
    for name in (answer.headers["x-request-id"], answer.json()["id"]):
        assert (await fetch(proxy, f"/v1/generation?id={name}")).status == 200
        refused = await fetch(proxy, f"/v1/generation?id={name}", other)
        assert (refused.status, refused.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("query", ["", "?id=", "?id=" + "x" * 257])
async def test_an_id_is_needed(proxy: Proxy, query: str) -> None:
    refused = await fetch(proxy, "/v1/generation" + query)
    assert (refused.status, refused.json()["error"]["param"]) == (400, "id")


@pytest.mark.parametrize("path", ["/v1/generation?id=x", "/v1/key"])
async def test_without_a_good_key_nothing_is_told(proxy: Proxy, path: str) -> None:
    refused = await fetch(proxy, path, "hb_live_wrong")
    assert (refused.status, refused.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_without_keys_only_this_machine_is_told(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(keys_required=False)
    client = await proxy.connect()
    client.send(get("/v1/key"))
    assert (await client.read_answer("GET")).status == 200
    client.send(b"GET /v1/key HTTP/1.1\r\nhost: evil.example\r\n\r\n")
    assert (await client.read_answer("GET")).status == 403


# A key


async def test_a_key_reads_its_limits_and_what_is_left(proxy: Proxy) -> None:
    limits = KeyLimits(10, 100_000, 50, 3, PICO // 100, "month")
    key = await new_key(proxy, limits=limits, models=["test/*"])
    await ask(proxy, key)
    await wait_until(lambda: proxy.server._journal.depth == 0)
    data = (await fetch(proxy, "/v1/key", key)).json()["data"]
    assert (data["label"], data["kind"], data["models"]) == ("another", "live", ["test/*"])
    assert (data["limit"], data["limit_remaining"], data["limit_reset"]) == (
        "0.01",
        "0.008",
        "month",
    )
    assert data["limits"] == {
        "requests_per_minute": {"limit": 10, "remaining": 9},
        "tokens_per_minute": {"limit": 100_000, "remaining": 98_500},
        "requests_per_day": {"limit": 50, "remaining": 49},
        "concurrency": 3,
    }
    used = {"requests": 1, "tokens_prompt": 1000, "tokens_completion": 500, "cost": "0.002"}
    assert data["usage"] == {"day": used, "month": used, "total": used}


async def test_a_key_without_limits_reads_its_usage(proxy: Proxy) -> None:
    data = (await fetch(proxy, "/v1/key")).json()["data"]
    assert data["limit"] is None and data["usage"]["total"]["requests"] == 0


# Limits, as a client meets them


async def test_answers_and_refusals_tell_what_is_left(proxy: Proxy) -> None:
    key = await new_key(proxy, limits=KeyLimits(requests_per_minute=2))
    answers = [await ask(proxy, key) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["1", "0", "0"]
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert "x-should-retry" not in refused.headers
    assert [record.attempts for record in await proxy.wait_for_records(3)] == [1, 1, 0]


async def test_a_key_that_has_spent_its_budget_is_told_so(proxy: Proxy) -> None:
    key = await new_key(proxy, limits=KeyLimits(budget=PICO // 1000))
    assert (await ask(proxy, key)).status == 200
    refused = await ask(proxy, key)
    assert (refused.status, refused.json()["error"]["type"]) == (402, "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"


async def test_of_calls_at_once_as_many_pass_as_the_budget_has_room_for(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    upstream._default = [AwaitRelease("go"), *json_response(200, completion(usage=(5, 1)))]
    wish = orjson.dumps(QUESTION | {"max_tokens": 100})
    prompt = parse_call(wish).prompt_bytes / BYTES_PER_TOKEN
    budget = 3 * (round(prompt) + 200) * 10**6
    key = await new_key(proxy, limits=KeyLimits(budget=budget))
    clients = [await proxy.connect() for _ in range(8)]
    for client in clients[:3]:
        client.send(chat(key, wish))
    await wait_until(lambda: len(upstream.requests) == 3)
    for client in clients[3:]:
        client.send(chat(key, wish))
    refused = [await client.read_answer() for client in clients[3:]]
    assert [answer.status for answer in refused] == [402] * 5
    assert "wait for running calls" in refused[0].json()["error"]["message"]
    assert refused[0].headers["retry-after"] == "1"
    data = (await fetch(proxy, "/v1/key", key)).json()["data"]
    assert (data["limit_remaining"], data["usage"]["total"]["cost"]) == ("0.00", "0.00")
    upstream.release("go")
    assert [(await client.read_answer()).status for client in clients[:3]] == [200] * 3
    data = (await fetch(proxy, "/v1/key", key)).json()["data"]
    assert data["limit_remaining"] == format_dollars(budget - 3 * 7 * 10**6)
    assert (await ask(proxy, key)).status == 200
    assert len(upstream.requests) == 4


async def test_a_key_may_use_its_models_alone(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    key = await new_key(proxy, models=["other/*"])
    refused = await ask(proxy, key)
    assert (refused.status, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert not upstream.requests


async def test_a_call_that_ends_makes_room_for_another(proxy: Proxy) -> None:
    key = await new_key(proxy, limits=KeyLimits(concurrency=1))
    assert [(await ask(proxy, key)).status for _ in range(3)] == [200] * 3


async def test_tokens_are_settled_by_what_was_used(proxy: Proxy) -> None:
    key = await new_key(proxy, limits=KeyLimits(tokens_per_minute=2000))
    client = await proxy.connect()
    client.send(chat(key, QUESTION | {"max_tokens": 1900}))
    held = (await client.read_answer()).headers["x-ratelimit-remaining-tokens"]
    assert int(held) < 100
    await proxy.wait_for_records(1)
    client.send(chat(key, QUESTION | {"max_tokens": 100}))
    assert int((await client.read_answer()).headers["x-ratelimit-remaining-tokens"]) > 350
