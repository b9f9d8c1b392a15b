"""Counting texts: what of a request and an answer is counted, and how the count gets to the record.

The tokenizer is a stand-in that takes every word for a token.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from decimal import Decimal
from queue import Queue
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from hoberproxy.access.limits import DAY_SPENT, MINUTE_TOKENS, PICO, TOTAL_SPENT, KeyLimits
from hoberproxy.accounting import tokenizer as tokenizer_module
from hoberproxy.accounting.record import Record
from hoberproxy.accounting.tokenizer import (
    TOKENS_PER_MESSAGE,
    TOKENS_PER_REPLY,
    TokenCounter,
    count_answer,
    count_prompt,
)
from hoberproxy.config.settings import Config
from hoberproxy.routing.catalog import Endpoint, Model, Prices
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.conftest import SLUG, Proxy, StartProxy, chat, wait_until
from tests.support.patience import WAIT
from tests.support.scripted import ScriptedUpstream, completion, json_response, sse, stream_events


def words(text: str) -> list[int]:
    return [0] * len(text.split())


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = SimpleNamespace(encode_ordinary=words)
    module = SimpleNamespace(get_encoding=lambda name: encoding)
    monkeypatch.setitem(sys.modules, "bpe_openai", module)


def stream(*deltas: dict[str, Any]) -> bytes:
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events) + b"data: [DONE]\n\n"


def test_a_prompts_texts_are_counted_and_its_framing() -> None:
    body = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one two three"}, {"a": 1}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        ]
    }
    framing = 3 * TOKENS_PER_MESSAGE + TOKENS_PER_REPLY
    assert count_prompt(orjson.dumps(body), words) == 2 + 3 + 1 + framing


def test_words_cut_by_a_deltas_end_are_one() -> None:
    answer = stream({"content": "one tw"}, {"content": "o three"}, {"reasoning": "four"}, {})
    assert count_answer(answer, words) == 3 + 1
    assert count_answer(answer.replace(b"\n", b"\r\n"), words) == 3 + 1


def test_calls_of_tools_are_counted_each_for_itself() -> None:
    calls = [{"index": 0, "function": {"name": "get", "arguments": "{ a"}}, {"index": 1}]
    more = [{"index": 0, "function": {"arguments": "b }"}}]
    assert count_answer(stream({"tool_calls": calls}, {"tool_calls": more}), words) == 1 + 3


def test_a_body_is_counted_by_its_message() -> None:
    assert count_answer(orjson.dumps(completion("one two")), words) == 2


@pytest.mark.parametrize("answer", [b"", b": only a comment\n\n", b'{"choices": null}'])
def test_an_answer_that_says_nothing_has_no_tokens(answer: bytes) -> None:
    assert count_answer(answer, words) == 0


def test_without_the_tokenizer_it_is_said_once_and_estimates_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bpe_openai", None)  # an ImportError
    counter = TokenCounter(lambda deliver: None)
    for _ in range(3):
        counter.count(b"{}", b"", lambda *_: pytest.fail("there is nothing to count with"))
    counter._executor.shutdown(wait=True)
    counter.close()
    assert caplog.text.count("hoberproxy[count]") == 1


def test_a_text_that_cannot_be_read_does_not_end_the_counting(
    tokenizer: None, caplog: pytest.LogCaptureFixture
) -> None:
    counter, counted = TokenCounter(lambda deliver: None), list[tuple[int, int]]()
    body = orjson.dumps({"messages": []})
    for answer in (b"{broken secret", b""):
        counter.count(body, answer, lambda *numbers: counted.append(numbers))
    counter._executor.shutdown(wait=True)
    counter.close()
    assert counted == [(TOKENS_PER_REPLY, 0)]
    assert "could not be counted" in caplog.text and "secret" not in caplog.text


def test_what_is_counted_and_not_delivered_is_bounded(
    tokenizer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_WAITING", 3)
    body, counted, deliveries = orjson.dumps({"messages": []}), list[tuple[int, int]](), Queue()
    counter = TokenCounter(deliveries.put)

    def count() -> None:
        counter.count(body, b"", lambda *numbers: counted.append(numbers))

    for _ in range(5):
        count()
    for _ in range(3):
        deliver = deliveries.get(timeout=WAIT)
    assert counted == []  # not on the thread
    deliver()
    assert len(counted) == 3
    count()
    deliveries.get(timeout=WAIT)()
    assert len(counted) == 4
    counter.close()
    assert deliveries.empty() and len(counted) == 4


# Through the proxy


def to_be_counted(config: Config) -> Config:
    endpoint = Endpoint(
        "scripted", "upstream-model", prices=Prices(Decimal(1), Decimal(1)), usage="count"
    )
    return replace(config, models=(Model(SLUG, (endpoint,)),))


async def counted(proxy: Proxy, body: dict[str, Any], key: str = "") -> Record:
    client = await proxy.connect()
    client.send(chat(key or proxy.key, body))
    assert (await client.read_answer()).status == 200
    store = Store(proxy.context.config.records.file)
    found: list[Record] = []

    def is_amended() -> bool:
        found[:] = store.export_records()
        return bool(found) and not found[0].estimated

    await wait_until(is_amended)
    store.close()
    return found[0]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_count_takes_the_place_of_an_estimate(
    tokenizer: None, start_proxy: StartProxy, upstream: ScriptedUpstream, is_stream: bool
) -> None:
    events = stream_events(3, usage=None)
    upstream.add(sse(*events) if is_stream else json_response(200, completion("a b c", usage=None)))
    messages = [{"role": "user", "content": "one two three four"}]
    record = await counted(
        await start_proxy(change=to_be_counted),
        {"model": SLUG, "stream": is_stream, "messages": messages},
    )
    assert not record.has_usage
    assert record.prompt_tokens == 4 + TOKENS_PER_MESSAGE + TOKENS_PER_REPLY
    assert record.completion_tokens == (3 if not is_stream else record.completion_tokens)
    assert record.cost == (record.prompt_tokens + record.completion_tokens) * 10**6


async def test_reported_usage_wins(
    tokenizer: None, start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    upstream.add(json_response(200, completion("a b c", usage=(50, 60))))
    messages = [{"role": "user", "content": "one"}]
    record = await counted(
        await start_proxy(change=to_be_counted), {"model": SLUG, "messages": messages}
    )
    assert (record.prompt_tokens, record.completion_tokens, record.has_usage) == (50, 60, True)


@pytest.mark.parametrize("words_in", [1, 400], ids=["fewer than estimated", "more"])
async def test_a_count_amends_what_the_key_has_used_in_the_windows_of_the_call(
    tokenizer: None, start_proxy: StartProxy, upstream: ScriptedUpstream, words_in: int
) -> None:
    proxy = await start_proxy(change=to_be_counted)
    store = Store(proxy.context.config.records.file)
    limits = KeyLimits(tokens_per_minute=100_000, budget=PICO, concurrency=2)
    key, _ = store.create_key("x", limits=limits)
    store.close()
    await wait_until(lambda: proxy.context.keyring.count > 1)
    caller = proxy.context.keyring.authenticate(b"Bearer " + key.encode(), 0.0)
    upstream.add(json_response(200, completion("a b c", usage=None)))
    messages = [{"role": "user", "content": "x " * words_in}]
    record = await counted(proxy, {"model": SLUG, "messages": messages, "max_tokens": 9}, key)
    used = record.prompt_tokens + record.completion_tokens
    assert used == words_in + TOKENS_PER_MESSAGE + TOKENS_PER_REPLY + 3

    def cells(later: float) -> list[int]:
        return proxy.context.accounts.counters(caller, record.started + later)

    await wait_until(lambda: cells(0)[MINUTE_TOKENS] == used)
    assert cells(0)[TOTAL_SPENT] == cells(0)[DAY_SPENT] == used * 10**6
    assert cells(120)[MINUTE_TOKENS] == 0
