"""A key's own limits are asked with a request's head, and given back however its body ends."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable

import pytest

from hoberproxy.access.keys import Caller
from hoberproxy.access.limits import (
    DAY_REQUESTS,
    MINUTE_HELD,
    MINUTE_REQUESTS,
    MINUTE_TOKENS,
    PICO,
    TOTAL_SPENT,
    KeyLimits,
)
from tests.api.test_account_routes import new_key
from tests.conftest import QUESTION, Proxy, RawClient, StartProxy, chat, wait_until
from tests.downstream.test_connection import chunked_chat
from tests.support.scripted import AwaitRelease, ScriptedUpstream, completion, json_response

EVERY_LIMIT = KeyLimits(10, 100_000, 50, 1, PICO)
ONE_PLACE = KeyLimits(concurrency=1)
BODY_BYTES = 5 * 1024 * 1024


def caller_of(proxy: Proxy, key: str) -> Caller:
    return proxy.context.keyring.authenticate(b"Bearer " + key.encode(), time.time())


def counted(proxy: Proxy, key: str) -> tuple[list[int], int]:
    """The counters that a request changes, and calls under way."""
    caller = caller_of(proxy, key)
    cells = proxy.context.accounts.counters(caller, time.time())
    shared = proxy.server._shared_limits
    running = shared._count_running(shared._slots[caller.key_id], KeyLimits(concurrency=10**6))
    places = (MINUTE_REQUESTS, DAY_REQUESTS, MINUTE_TOKENS, MINUTE_HELD, TOTAL_SPENT)
    return [cells[place] for place in places], running


NOTHING = ([0, 0, 0, 0, 0], 0)
ONE_HEAD = ([1, 1, 0, 0, 0], 1)


async def begin(proxy: Proxy, key: str, *headers: str) -> RawClient:
    """A client that has sent a head and a part of the body."""
    client = await proxy.connect()
    client.send(chat(key, QUESTION, *headers)[:-5])
    return client


# What is given back


async def leave(client: RawClient) -> None:
    await client.aclose()


async def send_end(client: RawClient) -> None:
    client.send_eof()
    await client.read_rest()


async def wait(client: RawClient) -> None:
    assert (await client.read_answer()).status == 408


def answer_to(more: bytes, status: int) -> Callable[[RawClient], Awaitable[None]]:
    async def send(client: RawClient) -> None:
        client.send(more)
        assert (await client.read_answer()).status == status

    return send


LENGTH = json.dumps(QUESTION).encode()


@pytest.mark.parametrize(
    ("request_of", "end", "record"),
    [
        pytest.param(lambda key: chat(key)[:-5], leave, (499, "client_closed"), id="it leaves"),
        pytest.param(
            lambda key: chat(key)[:-5], send_end, (499, "client_closed"), id="it ends its side"
        ),
        pytest.param(lambda key: chat(key)[:-5], wait, (408, "request_timeout"), id="it stops"),
        pytest.param(
            lambda key: chat(key, b"{" * 50)[:-5],
            answer_to(b"{" * 5, 400),
            (400, "invalid_json"),
            id="its body is no JSON",
        ),
        pytest.param(
            lambda key: chat(key, {**QUESTION, "model": "no/model"})[:-5],
            answer_to(chat(key="", body={**QUESTION, "model": "no/model"})[-5:], 404),
            (404, "model_not_found"),
            id="nobody serves its model",
        ),
        pytest.param(
            lambda key: chat(key, {**QUESTION, "max_tokens": 10**6})[:-5],
            answer_to(chat(key="", body={**QUESTION, "max_tokens": 10**6})[-5:], 429),
            (429, "rate_limit_exceeded"),
            id="it may take too many tokens",
        ),
        pytest.param(
            lambda key: chunked_chat(key, b"5\r\n{"),
            answer_to(b"    z\r\n", 400),
            (400, "invalid_request"),
            id="its framing breaks",
        ),
        pytest.param(
            lambda key: chunked_chat(key, b"5\r\n{"),
            answer_to(b"    \r\n800\r\n" + b"x" * 2048, 413),
            (413, "body_too_large"),
            id="it is too large",
        ),
        pytest.param(
            lambda key: chat(key, QUESTION, "expect: 100-continue")[: -len(LENGTH)],
            leave,
            (499, "client_closed"),
            id="it leaves after 100",
        ),
    ],
)
async def test_however_a_body_ends_its_place_is_given_back(
    start_proxy: StartProxy,
    request_of: Callable[[str], bytes],
    end: Callable[[RawClient], Awaitable[None]],
    record: tuple[int, str],
) -> None:
    is_timed = record[0] == 408
    proxy = await start_proxy(max_body_bytes=1024, body_timeout=0.2 if is_timed else 60.0)
    key = await new_key(proxy, limits=EVERY_LIMIT)
    client = await proxy.connect()
    client.send(request_of(key))
    await wait_until(lambda: proxy.context.exchanges)
    if not is_timed:
        assert counted(proxy, key) == ONE_HEAD
    await end(client)
    (only,) = await proxy.wait_for_records(1)
    assert (only.status, only.code) == record
    assert counted(proxy, key) == NOTHING
    again = await proxy.connect()
    again.send(chat(key))
    assert (await again.read_answer()).status == 200


@pytest.mark.parametrize("cut", [5, len(LENGTH), len(LENGTH) + 20])
async def test_a_call_counts_once_however_its_bytes_come(proxy: Proxy, cut: int) -> None:
    key = await new_key(proxy, limits=EVERY_LIMIT)
    client = await proxy.connect()
    request = chat(key)
    for number in range(1, 4):
        await client.send_each([request[:-cut], request[-cut:]])
        answer = await client.read_answer()
        assert answer.status == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == str(10 - number)
        assert counted(proxy, key)[0][:2] == [number, number]
        await wait_until(lambda: counted(proxy, key)[1] == 0)
    assert counted(proxy, key)[0][3] == 0


# What is refused


@pytest.mark.parametrize("expect", [[], ["expect: 100-continue"]], ids=["", "100-continue"])
async def test_a_key_with_one_place_is_refused_a_second_body(
    proxy: Proxy, expect: list[str]
) -> None:
    key = await new_key(proxy, limits=KeyLimits(10, concurrency=1))
    first = await begin(proxy, key)
    await wait_until(lambda: proxy.context.exchanges)
    second = await proxy.connect()
    second.send(chat(key, QUESTION, *expect)[: -len(LENGTH)])  # not a byte of its body comes
    answer = await second.read_answer()
    assert (answer.status, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert (answer.interim, answer.headers["retry-after"]) == (0, "1")
    assert answer.headers["x-ratelimit-remaining-requests"] == "9"
    assert answer.headers["connection"] == "close"
    (record,) = proxy.records
    assert (record.status, record.code, record.attempts) == (429, "rate_limit_exceeded", 0)
    first.send(chat(key)[-5:])
    assert (await first.read_answer()).status == 200
    assert counted(proxy, key)[0][:2] == [1, 1]  # a refused one counts nowhere


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        pytest.param(KeyLimits(requests_per_minute=1), 429, id="requests a minute"),
        pytest.param(KeyLimits(requests_per_day=1), 429, id="requests a day"),
        pytest.param(KeyLimits(tokens_per_minute=1), 429, id="tokens a minute"),
        pytest.param(KeyLimits(budget=1), 402, id="a budget"),
    ],
)
async def test_a_used_up_limit_rejects_before_the_body_comes(
    proxy: Proxy, limits: KeyLimits, status: int
) -> None:
    key = await new_key(proxy, limits=limits)
    caller = caller_of(proxy, key)
    shared = proxy.server._shared_limits
    lease = shared.enter(caller, time.time())
    lease.is_reserved = True
    shared.settle(caller, lease, tokens=5, spent=5)
    client = await begin(proxy, key)
    answer = await client.read_answer()
    assert answer.status == status
    assert await client.read_rest() == b""


async def test_a_client_that_goes_on_sending_still_reads_the_error(proxy: Proxy) -> None:
    key = await new_key(proxy, limits=ONE_PLACE)
    first = await begin(proxy, key)
    await wait_until(lambda: proxy.context.exchanges)
    second = await proxy.connect()
    await second.drain(chat(key, b"x" * BODY_BYTES))
    assert (await second.read_answer()).status == 429
    await first.aclose()


async def test_a_key_with_one_place_holds_one_body(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    key = await new_key(proxy, limits=ONE_PLACE)
    question = {"role": "user", "content": "x" * BODY_BYTES}
    body = {**QUESTION, "messages": [question]}
    requests = [chat(key, body, f"x-request-id: {number}") for number in range(120)]
    clients = [await proxy.connect() for _ in requests]
    for client, request in zip(clients, requests, strict=True):
        client.send(request[: 64 * 1024])
    await proxy.wait_for_records(119)
    assert len(proxy.context.exchanges) == 1
    kept = sum(len(piece) for each in proxy.server._connections for piece in each._pieces)
    assert kept <= 64 * 1024
    (served,) = set(range(120)) - {int(record.client_request_id) for record in proxy.records}
    await clients[served].drain(requests[served][64 * 1024 :])
    assert (await clients[served].read_answer()).status == 200
    assert {record.status for record in proxy.records} == {200, 429}
    assert len(upstream.requests) == 1


async def test_a_call_that_runs_keeps_its_place_until_it_ends(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    upstream._default = [AwaitRelease("go"), *json_response(200, completion())]
    key = await new_key(proxy, limits=ONE_PLACE)
    first = await begin(proxy, key)
    await wait_until(lambda: proxy.context.exchanges)
    first.send(chat(key)[-5:])
    await upstream.wait_for_requests(1)
    second = await begin(proxy, key)
    assert (await second.read_answer()).status == 429
    upstream.release("go")
    assert (await first.read_answer()).status == 200
    third = await begin(proxy, key)
    third.send(chat(key)[-5:])
    assert (await third.read_answer()).status == 200
