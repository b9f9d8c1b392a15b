"""How servers report usage, from their bytes to the record, its cost, the metrics and the log."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hoberproxy.access.limits import format_dollars
from hoberproxy.accounting.record import CLIENT_CLOSED, Record
from hoberproxy.routing.catalog import Endpoint, Model
from tests.support.scripted import (
    AwaitRelease,
    Script,
    ScriptedUpstream,
    completion,
    event,
    json_response,
    sse,
    stream_events,
)
from tests.support.usage_forms import FORMS, PRICES, Document, Form, in_a_choice, in_x_groq, on_top

from .conftest import ProxyTo
from .harness import SLUG, UPSTREAM_MODEL, Proxy, chat

PRICED = Model(SLUG, (Endpoint("a", UPSTREAM_MODEL, prices=PRICES),))
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
USAGE = {"prompt_tokens": 70, "completion_tokens": 5, "total_tokens": 75}


def stream_with(*before: Document, usage: Document | None = None, place: Any = on_top) -> Script:
    """Make a stream that reports usage `before` its first text and behind its last."""
    role, *texts, stop, done = stream_events(3, usage=None)
    finish = json.loads(stop.removeprefix(b"data: "))
    early = [event(finish | {"choices": [], "usage": usage}) for usage in before]
    if usage is None:
        late = [stop]
    elif place is on_top:
        late = [stop, event(on_top(finish | {"choices": []}, usage))]
    else:
        late = [event(place(finish, usage))]
    return sse(role, *early, *texts, *late, done)


def body_with(usage: Document | None, place: Any = on_top) -> Script:
    body = completion(usage=None)
    return json_response(200, body if usage is None else place(body, usage))


def counts_of(record: Record) -> tuple[int, ...]:
    return (
        record.prompt_tokens,
        record.completion_tokens,
        record.cached_tokens,
        record.reasoning_tokens,
        record.cache_write_tokens,
    )


def usage_missing(proxy: Proxy) -> list[Any]:
    return proxy.server.snapshot()["usage_missing"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS, ids=str)
async def test_every_form_of_usage_is_recorded_and_priced(proxy_to: ProxyTo, form: Form) -> None:
    scripts = stream_with(usage=form.usage, place=form.place), body_with(form.usage, form.place)
    async with ScriptedUpstream(*scripts) as upstream, proxy_to(upstream, models=[PRICED]) as proxy:
        for stream in (True, False):
            reply = await proxy.post(chat(stream=stream))
            assert (reply.status, reply.is_complete) == (200, True)
        await proxy.wait_for_record(2)
        assert not usage_missing(proxy)
    for record in proxy.records:
        assert counts_of(record) == form.counts
        assert (record.has_usage, record.estimated) == (True, False)
        assert record.cost is not None and format_dollars(record.cost) == form.cost


@pytest.mark.parametrize(
    ("before", "usage"),
    [
        pytest.param([ZEROS], USAGE, id="zeros first"),
        pytest.param([USAGE | {"completion_tokens": 0}], USAGE, id="the prompt first"),
        pytest.param([USAGE], ZEROS, id="zeros last"),
    ],
)
async def test_zeros_beside_numbers_change_nothing(
    proxy_to: ProxyTo, before: list[Document], usage: Document
) -> None:
    script = stream_with(*before, usage=usage)
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, models=[PRICED]) as proxy:
        await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (counts_of(record)[:2], record.has_usage) == ((70, 5), True)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "body"])
@pytest.mark.parametrize(
    "usage",
    [
        pytest.param(None, id="none"),
        pytest.param(ZEROS, id="zeros"),
        pytest.param({"total_tokens": 0, "total_characters": 0}, id="another form of zeros"),
        pytest.param({"total_tokens": 75}, id="a total alone"),
        pytest.param(USAGE | {"completion_tokens": 0, "total_tokens": 70}, id="none of the text"),
    ],
)
async def test_usage_that_cannot_be_is_estimated_counted_and_said_once(
    proxy_to: ProxyTo, caplog: pytest.LogCaptureFixture, usage: Document | None, stream: bool
) -> None:
    script = stream_with(usage=usage) if stream else body_with(usage)
    async with (
        ScriptedUpstream(script, script) as upstream,
        proxy_to(upstream, models=[PRICED]) as proxy,
    ):
        for number in (1, 2):
            await proxy.post(chat(stream=stream))
            record = await proxy.wait_for_record(number)
            assert (record.has_usage, record.estimated) == (False, True)
            assert record.prompt_tokens > 0 and record.completion_tokens > 0
            assert record.cost is not None and record.cost > 0
        assert usage_missing(proxy) == [[[SLUG, "a"], 2]]
    said = [each.getMessage() for each in caplog.records if "expected usage" in each.getMessage()]
    assert len(said) == 1 and 'usage = "count"' in said[0]


async def test_a_client_that_left_early_is_no_answer_without_usage(
    proxy_to: ProxyTo, caplog: pytest.LogCaptureFixture
) -> None:
    script: Script = [*sse(*stream_events(3))[:3], AwaitRelease("never")]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, models=[PRICED]) as proxy:
        async with proxy.connect() as client:
            await client.ask(chat(stream=True))
            await client.read_head()
            await client.read_until(b"word0")
            client.abort()
            record = await proxy.wait_for_record()
        assert not usage_missing(proxy)
        upstream.failures.clear()
    assert (record.status, record.estimated) == (CLIENT_CLOSED, True)
    assert "expected usage" not in caplog.text


async def test_zeros_of_an_answer_without_text_are_its_usage(proxy_to: ProxyTo) -> None:
    role, *_, stop, _, done = stream_events(0)
    finish = json.loads(stop.removeprefix(b"data: "))
    empty = completion("")
    scripts: list[Script] = [
        sse(role, event(in_a_choice(finish, ZEROS)), done),
        json_response(200, empty | {"usage": ZEROS}),
    ]
    async with ScriptedUpstream(*scripts) as upstream, proxy_to(upstream, models=[PRICED]) as proxy:
        for stream in (True, False):
            await proxy.post(chat(stream=stream))
        await proxy.wait_for_record(2)
        assert not usage_missing(proxy)
    for record in proxy.records:
        assert (record.has_usage, record.estimated, record.cost) == (True, False, 0)


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        pytest.param(USAGE | {"cached_tokens": 60}, (70, 5, 60), id="reported"),
        pytest.param(ZEROS, None, id="zeros"),
    ],
)
async def test_a_body_too_long_to_be_collected_is_no_different(
    proxy_to: ProxyTo, usage: Document, counts: tuple[int, ...] | None
) -> None:
    body = completion("x" * 1_200_000, usage=None) | {"usage": usage}
    script = json_response(200, body)
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, models=[PRICED]) as proxy:
        await proxy.post(chat())
        record = await proxy.wait_for_record()
        assert bool(usage_missing(proxy)) is (counts is None)
    assert (record.has_usage, record.estimated) == (counts is not None, counts is None)
    assert record.completion_tokens > 0
    if counts is not None:
        assert counts_of(record)[:3] == counts


@pytest.mark.parametrize("place", [in_a_choice, in_x_groq])
@pytest.mark.parametrize("indent", [None, 1])
async def test_usage_elsewhere_in_a_body_too_long_to_be_collected_is_found(
    proxy_to: ProxyTo, place: Any, indent: int | None
) -> None:
    text = 'x "usage":{"prompt_tokens":1,"completion_tokens":1} ' * 30_000
    document = place(completion(text, usage=None), USAGE | {"cached_tokens": 60})
    script = json_response(200, json.dumps(document, indent=indent).encode())
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, models=[PRICED]) as proxy:
        reply = await proxy.post(chat())
        record = await proxy.wait_for_record()
    assert reply.is_complete and len(reply.body) > 1 << 20
    assert counts_of(record)[:3] == (70, 5, 60)
    assert (record.estimated, record.finish_reason) == (False, "stop")
