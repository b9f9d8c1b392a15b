"""What an endpoint's adaptation makes of a body on the wire, and how what it refuses is learnt."""

from __future__ import annotations

from typing import Any

import pytest

from hoberproxy.routing.catalog import Adaptation, Endpoint, Model
from tests.support.scripted import (
    AwaitRelease,
    Script,
    ScriptedUpstream,
    completion,
    json_response,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import QUESTION, SLUG, UPSTREAM_MODEL, Proxy, as_client_sees, chat

EVENTS = stream_events(2, usage=None)
STREAM = sse(*EVENTS)
BODY = json_response(200, completion())
OPTIONS = {"include_usage": True}


def adapted(*providers: str, **rules: Any) -> list[Model]:
    endpoints = (
        Endpoint(each, UPSTREAM_MODEL, adaptation=Adaptation(**rules)) for each in providers
    )
    return [Model(SLUG, tuple(endpoints))]


def options_of(upstream: ScriptedUpstream) -> list[Any]:
    """The stream_options of each request that arrived."""
    return [seen.json().get("stream_options") for seen in upstream.requests]


# On the wire


async def test_the_rules_are_seen_on_the_wire_and_nothing_else_has_changed(
    proxy_to: ProxyTo,
) -> None:
    models = adapted(
        "a",
        rename=(("max_tokens", "max_completion_tokens"),),
        drop=frozenset(("logit_bias",)),
        set=(("top_k", b"40"), ("temperature", b"1.0")),
        roles=(("developer", "system"),),
    )
    message = b'{"role": "developer", "content":"\\u00e9 developer"}'
    body = (
        b'{ "model":"%b", "max_tokens":5 ,"logit_bias":{"1":2},"temperature":0.10,'
        b'"messages": [%b,{"role":"user","content":"developer"}], "seed" : 1.0e3,"n":null}'
    ) % (SLUG.encode(), message)
    async with ScriptedUpstream(BODY) as upstream, proxy_to(upstream, models=models) as proxy:
        assert (await proxy.post(body)).status == 200
    assert upstream.requests[0].json() == {
        "model": UPSTREAM_MODEL,
        "max_completion_tokens": 5,
        "temperature": 1.0,
        "top_k": 40,
        "messages": [
            {"role": "system", "content": "é developer"},
            {"role": "user", "content": "developer"},
        ],
        "seed": 1000.0,
        "n": None,
    }
    assert b'"seed" : 1.0e3' in upstream.requests[0].body, "the client's own text stays"
    assert b'"\\u00e9 developer"' in upstream.requests[0].body


async def test_each_endpoint_gets_the_body_in_its_own_form(proxy_to: ProxyTo) -> None:
    rename = Adaptation(rename=(("max_tokens", "max_completion_tokens"),))
    endpoints = (Endpoint("a", UPSTREAM_MODEL, adaptation=rename), Endpoint("b", UPSTREAM_MODEL))
    async with (
        ScriptedUpstream(json_response(500, {})) as first,
        ScriptedUpstream(BODY) as second,
        proxy_to(first, second, models=[Model(SLUG, endpoints)]) as proxy,
    ):
        assert (await proxy.post(chat(max_tokens=5))).status == 200
    assert first.requests[0].json()["max_completion_tokens"] == 5
    assert second.requests[0].json()["max_tokens"] == 5
    assert "max_completion_tokens" not in second.requests[0].json()


# An option of ours is refused

DETAIL = [
    {
        "type": "extra_forbidden",
        "loc": ["body", "stream_options"],
        "msg": "Extra inputs are not permitted",
        "input": OPTIONS,
    }
]
UNKNOWN = {"message": "Unrecognized request argument supplied: stream_options", "param": None}
FORMS: dict[str, Script] = {
    "as OpenAI does": json_response(400, {"error": UNKNOWN}),
    "as FastAPI does": json_response(422, {"detail": DETAIL}),
    "as Mistral does": json_response(422, {"object": "error", "message": {"detail": DETAIL}}),
}
REFUSED = FORMS["as OpenAI does"]


@pytest.mark.parametrize("refusal", FORMS.values(), ids=FORMS)
async def test_an_option_of_ours_that_is_refused_is_left_out_unseen_and_from_then_on(
    proxy_to: ProxyTo, refusal: Script
) -> None:
    async with (
        ScriptedUpstream(refusal, STREAM, STREAM) as upstream,
        ScriptedUpstream() as other,
        proxy_to(upstream, other) as proxy,
    ):
        for count in (1, 2):
            reply = await proxy.post(chat(stream=True))
            record = await proxy.wait_for_record(count)
            assert reply.body == as_client_sees(EVENTS)
            assert reply.headers["x-hober-provider"] == "a"
            assert "x-hober-attempts" not in reply.headers
            assert (record.status, record.attempts, record.failures) == (200, 1, ())
    assert options_of(upstream) == [OPTIONS, None, None]


async def test_it_is_no_failure_of_the_endpoint(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(REFUSED, STREAM) as upstream, proxy_to(upstream) as proxy:
        await proxy.post(chat(stream=True))
        (health,) = proxy.context.health.snapshot(proxy.context.loop.time())
    assert (health.failures_in_a_row, health.failure_rate, health.is_cooling) == (0, 0.0, False)


async def test_two_options_are_learnt_one_after_the_other(proxy_to: ProxyTo) -> None:
    about_top_k = json_response(400, {"error": {"message": "unknown field", "param": "top_k"}})
    models = adapted("a", set=(("top_k", b"40"), ("min_p", b"0.1")))
    async with (
        ScriptedUpstream(REFUSED, about_top_k, STREAM, STREAM) as upstream,
        proxy_to(upstream, models=models) as proxy,
    ):
        for _ in range(2):
            assert (await proxy.post(chat(stream=True))).status == 200
    seen = [set(each.json()) & {"stream_options", "top_k", "min_p"} for each in upstream.requests]
    assert seen == [
        {"stream_options", "top_k", "min_p"},
        {"top_k", "min_p"},
        {"min_p"},
        {"min_p"},
    ]


@pytest.mark.parametrize(
    ("again", "status"),
    [(REFUSED, 400), (json_response(500, {}), 502)],
    ids=["with the same words", "with another failure"],
)
async def test_what_is_refused_without_the_option_too_is_told_and_nothing_learnt(
    proxy_to: ProxyTo, again: Script, status: int
) -> None:
    async with (
        ScriptedUpstream(REFUSED, again, STREAM) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
        await proxy.post(chat(stream=True))
    assert (reply.status, record.status) == (status, status)
    assert (record.attempts, len(record.failures)) == (1, 1)
    assert options_of(upstream) == [OPTIONS, None, OPTIONS]


async def test_after_a_failure_without_it_the_next_endpoint_gets_the_option(
    proxy_to: ProxyTo,
) -> None:
    async with (
        ScriptedUpstream(REFUSED, json_response(500, {})) as first,
        ScriptedUpstream(STREAM) as second,
        proxy_to(first, second) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (reply.headers["x-hober-provider"], reply.headers["x-hober-attempts"]) == ("b", "2")
    assert record.attempts == 2
    assert (options_of(first), options_of(second)) == ([OPTIONS, None], [OPTIONS])


async def test_what_one_endpoint_refuses_another_still_gets(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(REFUSED, STREAM) as first,
        ScriptedUpstream(STREAM) as second,
        proxy_to(first, second) as proxy,
    ):
        await proxy.post(chat(stream=True))
        await proxy.post(chat(stream=True, provider={"only": ["b"]}))
    assert options_of(second) == [OPTIONS]


@pytest.mark.parametrize(
    ("refusal", "fields"),
    [
        (json_response(400, {"error": {"message": "max_tokens is too large"}}), {}),
        (REFUSED, {"stream_options": OPTIONS}),
        (json_response(413, {"error": UNKNOWN}), {}),
    ],
    ids=["another fault", "an option the client sent itself", "another status"],
)
async def test_what_is_not_about_an_option_of_ours_goes_to_the_client(
    proxy_to: ProxyTo, refusal: Script, fields: dict[str, Any]
) -> None:
    async with ScriptedUpstream(refusal) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True, **fields))
    assert reply.status in (400, 413)
    assert len(upstream.requests) == 1
    assert not proxy.context.refused_options


async def learn(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    upstream.add(REFUSED, STREAM)
    assert (await proxy.post(chat(stream=True))).status == 200


async def test_an_answer_begun_before_the_lesson_does_not_undo_it(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream([AwaitRelease("go"), *BODY]) as upstream,
        proxy_to(upstream) as proxy,
        proxy.connect() as early,
    ):
        await early.ask(chat())
        await upstream.wait_for_requests()
        await learn(proxy, upstream)
        upstream.release("go")
        assert (await early.read_reply()).status == 200
        upstream.add(STREAM)
        await proxy.post(chat(stream=True))
    assert options_of(upstream) == [None, OPTIONS, None, None]


async def test_a_client_that_asks_for_it_itself_gets_it_sent_after_all(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream() as upstream, proxy_to(upstream) as proxy:
        await learn(proxy, upstream)
        upstream.add(STREAM)
        body = chat(stream=True, stream_options={"include_usage": False, "x": 1})
        assert (await proxy.post(body)).status == 200
    assert options_of(upstream)[-1] == {"include_usage": False, "x": 1}


async def test_an_upstream_without_stream_options_is_never_sent_them(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(STREAM) as upstream,
        proxy_to(upstream, stream_options=False) as proxy,
    ):
        await proxy.post(chat(stream=True, stream_options=OPTIONS))
    assert options_of(upstream) == [None]
    assert upstream.requests[0].json() == {
        "model": UPSTREAM_MODEL,
        "messages": QUESTION,
        "stream": True,
    }
