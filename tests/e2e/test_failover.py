"""An endpoint fails: what is tried next, what the client gets, what is recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from tests.support.patience import WAIT, patient
from tests.support.scripted import (
    LAST_CHUNK,
    AwaitRelease,
    Close,
    Pause,
    Reset,
    Script,
    ScriptedUpstream,
    SeenRequest,
    Send,
    Stall,
    Step,
    chunk,
    completion,
    event,
    json_response,
    refused_port,
    serialize_head,
    sse,
    sse_head,
    stream_events,
)

from .conftest import ProxyTo
from .harness import (
    LIMITS,
    OTHER_SLUG,
    SLUG,
    SOON,
    as_client_sees,
    chat,
    error_event_of,
    eventually,
    model_at,
    provider_for,
)

EVENTS = stream_events(4)
ROLE, FIRST = EVENTS[0], EVENTS[1]
WHOLE = completion("hello")
GOOD: dict[bool, Script] = {True: sse(*EVENTS), False: json_response(200, WHOLE)}
THEIRS = "words of theirs with sk-upstr...cret"
COMMENT = b": HOBER PROCESSING\n"


def refusal(status: int, *headers: tuple[str, str]) -> Script:
    return json_response(status, {"error": {"message": THEIRS, "code": status}}, *headers)


def json_head(length: int) -> Send:
    head = [("Content-Type", "application/json"), ("Content-Length", str(length))]
    return Send(serialize_head(200, head))


# name → script, status, code, phase, the upstream's status; refused and black hole are made below
Case = tuple[Script, int, str, str, int | None]
EITHER_WAY: dict[str, Case] = {
    "silence after the request": ([Stall()], 504, "upstream_timeout", "head", None),
    "hang-up after the request": ([Close()], 502, "upstream_error", "head", None),
    "reset after the request": ([Reset()], 502, "upstream_error", "head", None),
    "half a head": (
        [Send(b"HTTP/1.1 200 OK\r\nContent-"), Close()],
        502,
        "upstream_error",
        "head",
        None,
    ),
    **{
        f"{name}, then silence": (
            [Send(head), Stall()],
            502,
            "upstream_invalid_response",
            "head",
            None,
        )
        for name, head in {
            "a head whose lines end in LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
            "a head whose last line ends in LF": b"HTTP/1.1 200 OK\r\nA: b\r\n\n",
            "a banner of another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
            "an interim head and a bad one": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\n",
        }.items()
    },
    **{
        f"status {status}": (refusal(status), 502, "upstream_error", "head", status)
        for status in (401, 402, 403, 404, 408, 500, 501, 502, 503, 504, 529)
    },
    "status 429": (refusal(429), 429, "rate_limit_exceeded", "head", 429),
    "a refusal that never ends": (
        [Send(serialize_head(500, [("Content-Length", "100")]) + b"{"), Stall()],
        502,
        "upstream_error",
        "head",
        500,
    ),
}
STREAMS: dict[str, Case] = {
    "200, then silence": ([sse_head(), Stall()], 504, "upstream_timeout", "opening", 200),
    "comments only": (
        [sse_head(), *[Send(chunk(b":\n\n")), Pause(0.03)] * 50, Stall()],
        504,
        "upstream_timeout",
        "opening",
        200,
    ),
    "a role, then silence": (
        [sse_head(), Send(chunk(ROLE)), Stall()],
        504,
        "upstream_timeout",
        "opening",
        200,
    ),
    "half an event, then silence": (
        [sse_head(), Send(chunk(FIRST[:-3])), Stall()],
        504,
        "upstream_timeout",
        "opening",
        200,
    ),
    "a broken chunk size": (
        [sse_head(), Send(chunk(ROLE) + b"zz\r\n"), Stall()],
        502,
        "upstream_invalid_response",
        "opening",
        200,
    ),
    "an empty stream": ([sse_head(), Send(LAST_CHUNK)], 502, "upstream_error", "opening", 200),
    "only [DONE]": (sse(EVENTS[-1]), 502, "upstream_error", "opening", 200),
    "an error event first": (
        sse(ROLE, event({"error": {"message": THEIRS, "code": 503}})),
        502,
        "upstream_error",
        "opening",
        503,
    ),
    "an event of type error": (
        sse(b'event: error\ndata: {"message": "words of theirs"}\n\n'),
        502,
        "upstream_error",
        "opening",
        200,
    ),
    "no JSON in an event": (
        sse(b"data: hello\n\n"),
        502,
        "upstream_invalid_response",
        "opening",
        200,
    ),
    "cut before content": (sse(ROLE, complete=False), 502, "upstream_error", "opening", 200),
    "an error as JSON": (
        json_response(200, {"error": {"message": THEIRS}}),
        502,
        "upstream_error",
        "opening",
        200,
    ),
}
BODIES: dict[str, Case] = {
    "200, then silence": ([json_head(10), Stall()], 504, "upstream_timeout", "body", 200),
    "half a body, then silence": (
        [json_head(10), Send(b'{"a"'), Stall()],
        504,
        "upstream_timeout",
        "body",
        200,
    ),
    "half a body, then a cut": (
        [json_head(10), Send(b'{"a"'), Close()],
        502,
        "upstream_error",
        "body",
        200,
    ),
    "a body cut at its close": (
        [Send(serialize_head(200, [("Content-Type", "application/json")]) + b'{"a"'), Close()],
        502,
        "upstream_invalid_response",
        "body",
        200,
    ),
    "a broken chunk size": (
        [
            Send(
                serialize_head(
                    200, [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")]
                )
            ),
            Send(b'4\r\n{"a"\r\n-1\r\n'),
            Stall(),
        ],
        502,
        "upstream_invalid_response",
        "body",
        200,
    ),
}
CASES = [
    *(pytest.param(True, *case, id=f"stream: {name}") for name, case in EITHER_WAY.items()),
    *(pytest.param(False, *case, id=f"body: {name}") for name, case in EITHER_WAY.items()),
    *(pytest.param(True, *case, id=f"stream: {name}") for name, case in STREAMS.items()),
    *(pytest.param(False, *case, id=f"body: {name}") for name, case in BODIES.items()),
]
FAILING = pytest.mark.parametrize(("stream", "script", "status", "code", "phase", "theirs"), CASES)


@FAILING
async def test_a_failure_without_a_fallback_is_told_in_our_words(
    proxy_to: ProxyTo,
    stream: bool,
    script: Script,
    status: int,
    code: str,
    phase: str,
    theirs: int | None,
) -> None:
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, limits=SOON) as proxy:
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
        assert len(upstream.requests) == 1
    assert (reply.status, reply.error["code"], reply.is_complete) == (status, code, True)
    assert b"theirs" not in reply.body
    assert "x-should-retry" not in reply.headers, "the client may well try again"
    assert "x-hober-attempts" not in reply.headers
    assert reply.error["metadata"] == {"provider": "a"}
    assert (record.status, record.code, record.phase) == (status, code, phase)
    assert (record.attempts, len(record.failures)) == (1, 1)
    assert (record.failures[0].status, record.failures[0].phase) == (theirs, phase)
    assert record.prompt_tokens == record.completion_tokens == 0
    assert record.is_failure


@FAILING
async def test_a_failure_before_content_falls_over_unseen(
    proxy_to: ProxyTo,
    stream: bool,
    script: Script,
    status: int,
    code: str,
    phase: str,
    theirs: int | None,
) -> None:
    async with ScriptedUpstream(script) as first, ScriptedUpstream(GOOD[stream]) as second:
        broken = provider_for(first, "a", limits=SOON)
        async with proxy_to(broken, provider_for(second, "b")) as proxy:
            reply = await proxy.post(chat(stream=stream))
            record = await proxy.wait_for_record()
        assert (len(first.requests), len(second.requests)) == (1, 1)
        assert first.requests[0].body == second.requests[0].body
    assert (reply.status, reply.is_complete) == (200, True)
    if stream:
        assert reply.body == as_client_sees(EVENTS)
    else:
        assert reply.json() == {**WHOLE, "model": SLUG}
    assert (reply.headers["x-hober-provider"], reply.headers["x-hober-attempts"]) == ("b", "2")
    assert (record.status, record.code, record.provider, record.attempts) == (200, "", "b", 2)
    (failure,) = record.failures
    assert (failure.provider, failure.status, failure.phase) == ("a", theirs, phase)
    assert failure.code == code
    assert (record.prompt_tokens, record.completion_tokens, record.has_usage) == (7, 3, True)
    assert not record.is_failure


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_a_refused_connection_falls_over(proxy_to: ProxyTo, stream: bool) -> None:
    async with ScriptedUpstream(GOOD[stream]) as second:
        with refused_port() as port:
            dead = provider_for(f"http://127.0.0.1:{port}/v1", "a")
            async with proxy_to(dead, provider_for(second, "b")) as proxy:
                reply = await proxy.post(chat(stream=stream))
                record = await proxy.wait_for_record()
    assert (reply.status, reply.headers["x-hober-attempts"]) == (200, "2")
    assert (record.failures[0].phase, record.failures[0].status) == ("connect", None)


async def test_a_refused_connection_alone_is_a_502(proxy_to: ProxyTo) -> None:
    with refused_port() as port:
        async with proxy_to(f"http://127.0.0.1:{port}/v1") as proxy:
            reply = await proxy.post(chat(stream=True))
            record = await proxy.wait_for_record()
    assert (reply.status, reply.error["code"], record.phase) == (502, "upstream_error", "connect")
    assert str(port) not in reply.body.decode(), "where our upstreams are is nobody's business"


async def test_an_upstream_that_hangs_up_on_connecting_falls_over(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(on_connect=[Close()]) as first,
        ScriptedUpstream(GOOD[True]) as second,
        proxy_to(first, second) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        assert first.connections == 1
    assert (reply.status, reply.headers["x-hober-provider"]) == (200, "b")


async def test_after_two_tries_a_client_is_told_not_to_try_again(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(refusal(500)) as first,
        ScriptedUpstream([Close()]) as second,
        ScriptedUpstream([Stall()]) as third,
    ):
        third_limited = provider_for(third, "c", limits=SOON)
        async with proxy_to(first, second, third_limited) as proxy:
            reply = await proxy.post(chat(stream=True))
            record = await proxy.wait_for_record()
    assert (reply.status, reply.headers["x-should-retry"]) == (504, "false")
    assert reply.error["metadata"]["provider"] == "c"
    previous = reply.error["metadata"]["previous_errors"]
    assert [(each["provider"], each["status"], each["phase"]) for each in previous] == [
        ("a", 500, "head"),
        ("b", None, "head"),
    ]
    assert all(each["milliseconds"] >= 0 for each in previous)
    assert record.attempts == len(record.failures) == 3


async def test_a_rate_limit_reaches_the_client_with_its_retry_after(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(refusal(429, ("Retry-After", "7"))) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat())
    assert (reply.status, reply.error["type"]) == (429, "rate_limit_error")
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("7", "7000")
    assert "x-should-retry" not in reply.headers


# Refusals that another endpoint would only repeat


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_refusal_of_the_request_goes_to_the_client_with_its_message(
    proxy_to: ProxyTo, status: int, stream: bool
) -> None:
    body = {"error": {"message": "too long", "code": status, "param": "messages"}}
    async with (
        ScriptedUpstream(json_response(status, body)) as first,
        ScriptedUpstream() as second,
        proxy_to(first, second) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
        assert not second.requests, "another endpoint of the model would say the same"
    assert (reply.status, reply.error["message"]) == (status, "too long")
    assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", "messages")
    assert reply.headers["x-should-retry"] == "false"
    assert (record.status, record.attempts) == (status, 1)


@pytest.mark.parametrize("status", [400, 409, 413, 422, 451])
async def test_a_refusal_of_the_request_goes_to_the_next_model(
    proxy_to: ProxyTo, status: int
) -> None:
    models = [model_at(SLUG, "a", "b"), model_at(OTHER_SLUG, "c")]
    async with (
        ScriptedUpstream(json_response(status, {"error": {"message": "no"}})) as first,
        ScriptedUpstream() as second,
        ScriptedUpstream(GOOD[True]) as third,
        proxy_to(first, second, third, models=models) as proxy,
    ):
        reply = await proxy.post(chat(stream=True, models=[OTHER_SLUG]))
        record = await proxy.wait_for_record()
        assert not second.requests
    assert (reply.status, reply.headers["x-hober-model"]) == (200, OTHER_SLUG)
    assert reply.body == as_client_sees(EVENTS, slug=OTHER_SLUG)
    assert (record.slug, record.requested) == (OTHER_SLUG, (SLUG, OTHER_SLUG))


async def test_a_refusal_that_is_not_the_clients_business_is_a_502(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(refusal(451)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat())
    assert reply.status == 502
    assert THEIRS.encode() not in reply.body


async def test_errors_under_api_v1_have_the_status_as_code(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(refusal(500)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(), path="/api/v1/chat/completions")
    assert (reply.status, reply.error["code"]) == (502, 502)
    assert reply.error["metadata"]["code"] == "upstream_error"


# Breaks after content

OPENED: list[Step] = [sse_head(), Send(chunk(ROLE)), Send(chunk(FIRST))]
BREAKS: dict[str, tuple[Script, str]] = {
    "cut": ([Close()], "upstream_error"),
    "cut in the middle of an event": ([Send(chunk(EVENTS[2][:40])), Close()], "upstream_error"),
    "cut in the middle of a chunk": ([Send(chunk(EVENTS[2])[:40]), Close()], "upstream_error"),
    "reset": ([Reset()], "upstream_error"),
    "silence": ([Stall()], "upstream_timeout"),
    "a broken chunk size": ([Send(b"nonsense\r\n"), Stall()], "upstream_invalid_response"),
    "an error event": (
        [Send(chunk(event({"error": {"message": THEIRS}}))), Stall()],
        "upstream_error",
    ),
    "an error event and more": (
        [Send(chunk(event({"error": {"message": THEIRS}}) + b"".join(EVENTS[2:])) + LAST_CHUNK)],
        "upstream_error",
    ),
    "an error as a field of the event": (
        [Send(chunk(b"error: %b\n\n" % THEIRS.encode() + b"".join(EVENTS[2:])) + LAST_CHUNK)],
        "upstream_error",
    ),
    "an error in a choice": (
        [
            Send(chunk(event({"choices": [{"delta": {}, "error": {"message": THEIRS}}]}))),
            Send(chunk(b"".join(EVENTS[2:])) + LAST_CHUNK),
        ],
        "upstream_error",
    ),
    "no JSON in a usage event": (
        [Send(chunk(b'data: {"usage":{\n\n') + LAST_CHUNK)],
        "upstream_invalid_response",
    ),
    "an end without finish reason": ([Send(LAST_CHUNK)], "upstream_error"),
    "events without end": (
        [*[Send(chunk(FIRST)), Pause(0.02)] * 500],
        "upstream_timeout",
    ),
}


@pytest.mark.parametrize(("rest", "code"), BREAKS.values(), ids=BREAKS)
async def test_a_stream_that_breaks_ends_with_one_error_event_and_a_close(
    proxy_to: ProxyTo, rest: Script, code: str
) -> None:
    async with ScriptedUpstream([*OPENED, *rest]) as first, ScriptedUpstream() as second:
        limited = provider_for(first, "a", limits=SOON)
        async with proxy_to(limited, provider_for(second, "b")) as proxy, proxy.connect() as client:
            await client.ask(chat(stream=True))
            reply = await client.read_reply()
            assert await client.is_closed_by_peer()
            record = await proxy.wait_for_record()
            pool = proxy.pool_of("a")
            await eventually(lambda: pool.open == pool.idle)
        assert not second.requests
    assert reply.status == 200
    assert reply.body.startswith(as_client_sees([ROLE, FIRST]))
    error = error_event_of(reply.body)
    assert (error["code"], error["type"]) == (code, "upstream_error")
    assert b"theirs" not in reply.body
    assert (record.status, record.code, record.phase) == (200, code, "content")
    assert record.is_failure and record.estimated and record.completion_tokens >= 1


@pytest.mark.parametrize(
    "end",
    [[Close()], [Reset()], [Stall()], [Send(b"garbage\r\n"), Stall()]],
    ids=["cut", "reset", "silence", "garbage"],
)
async def test_a_stream_is_finished_once_done_has_passed(proxy_to: ProxyTo, end: Script) -> None:
    script = [*sse(*EVENTS)[:-1], Pause(0.02), *end]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, limits=SOON) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (reply.body, reply.is_complete) == (as_client_sees(EVENTS), True)
    assert (record.status, record.code, record.has_usage) == (200, "", True)


async def test_bytes_keep_a_stream_alive_beyond_the_idle_limit(proxy_to: ProxyTo) -> None:
    limits = replace(LIMITS, idle=patient(0.5))
    script = [sse_head(), *[Send(chunk(FIRST)), Pause(0.06)] * 8, *sse(*EVENTS)[1:]]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, limits=limits) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert reply.body == as_client_sees([*[FIRST] * 8, *EVENTS])


@pytest.mark.parametrize(
    "empty",
    [b": ping\n\n", FIRST.replace(b" word0", b""), b"event: ping\ndata: {}\n\n"],
    ids=["comments", "empty texts", "pings"],
)
async def test_nothing_but_comments_or_empty_events_is_no_stream_for_ever(
    proxy_to: ProxyTo, empty: bytes
) -> None:
    limits = replace(LIMITS, first_content=patient(0.5))
    script = [*OPENED, *[Send(chunk(empty)), Pause(0.05)] * 400]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, limits=limits) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
        await upstream.wait_for_hangup()
    error = error_event_of(reply.body)
    assert (error["code"], record.code) == ("upstream_timeout", "upstream_timeout")
    assert f"within {limits.first_content:g} s but comments or empty events" in error["message"]
    assert (record.phase, record.status) == ("content", 200)


async def test_a_late_beginning_is_no_failure_within_the_limit(proxy_to: ProxyTo) -> None:
    limits = replace(LIMITS, idle=patient(0.5))  # idle counts from the first content on
    script = [sse_head(), Pause(2 * limits.idle), *sse(*EVENTS)[1:]]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, limits=limits) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert reply.body == as_client_sees(EVENTS)


# An abandoned attempt


@pytest.mark.parametrize(
    "script",
    [[Stall()], [sse_head(), Send(chunk(ROLE)), Stall()], [sse_head()]],
    ids=["before its head", "after its role", "idle after its head"],
)
async def test_an_abandoned_attempt_is_closed_before_the_next_starts(
    proxy_to: ProxyTo, script: Script
) -> None:
    was_lost: list[bool] = []

    def look(seen: SeenRequest) -> Script:
        was_lost.append(first.requests[0].lost.is_set())
        return GOOD[True]

    async with ScriptedUpstream(script) as first, ScriptedUpstream(look) as second:
        limited = provider_for(first, "a", limits=SOON)
        async with proxy_to(limited, provider_for(second, "b")) as proxy:
            reply = await proxy.post(chat(stream=True))
            await first.wait_for_hangup()
    assert reply.status == 200
    assert was_lost == [True]


# Comment lines while a stream waits

COMMENTING = {"comment_after": 0.1}


async def test_comments_flow_before_the_first_content_and_spend_the_status_line(
    proxy_to: ProxyTo,
) -> None:
    script = [AwaitRelease("go"), *GOOD[True]]
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream, server=COMMENTING) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat(stream=True))
        status, fields = await client.read_head()
        assert await client.read_chunk() == COMMENT
        assert await client.read_chunk() == COMMENT, "and again, for as long as it waits"
        upstream.release("go")
        rest = await client.read_until(b"[DONE]\n\n")
        assert await client.read_chunk() == b""
        record = await proxy.wait_for_record()
    assert status == 200
    assert not [name for name, _ in fields if name.startswith("x-hober")]
    assert dict(fields)["x-request-id"] == record.id
    assert rest.replace(COMMENT, b"") == as_client_sees(EVENTS)
    assert (record.status, record.code, record.provider) == (200, "", "a")


async def test_comments_flow_in_gaps_between_whole_events_only(proxy_to: ProxyTo) -> None:
    half = chunk(EVENTS[2][:50])
    script = [*OPENED, Send(half), AwaitRelease("go"), Send(chunk(EVENTS[2][50:]))]
    script += sse(*EVENTS[3:])[1:]
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream, server=COMMENTING) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat(stream=True))
        await client.read_head()
        begin = await client.read_until(COMMENT)
        upstream.release("go")
        rest = await client.read_until(b"[DONE]\n\n")
    assert begin == as_client_sees([ROLE, FIRST]) + COMMENT
    assert rest.replace(COMMENT, b"") == as_client_sees(EVENTS[2:])


async def test_no_comment_cuts_an_event_too_long_to_be_held(proxy_to: ProxyTo) -> None:
    long = event({"model": "upstream-model", "choices": [{"delta": {"content": "y" * 40_000}}]})
    script = [*OPENED, Send(chunk(long[:30_000])), Pause(0.35), Send(chunk(long[30_000:]))]
    script += sse(*EVENTS[2:])[1:]
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream, server=COMMENTING) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
    assert reply.body == as_client_sees([ROLE, FIRST, long, *EVENTS[2:]])


async def test_a_comment_follows_whole_events_of_crlf_lines_and_changes_none(
    proxy_to: ProxyTo,
) -> None:
    events = [each.replace(b"\n", b"\r\n") for each in EVENTS]
    script = [*sse(*events[:2])[:-1], AwaitRelease("go"), *sse(*events[2:])[1:]]
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream, server=COMMENTING) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat(stream=True))
        await client.read_head()
        begin = await client.read_until(COMMENT)
        upstream.release("go")
        rest = await client.read_until(b"[DONE]\r\n\r\n")
    assert begin == as_client_sees(EVENTS[:2]).replace(b"\n", b"\r\n") + COMMENT
    assert rest.replace(COMMENT, b"") == as_client_sees(EVENTS[2:]).replace(b"\n", b"\r\n")


async def test_no_comment_comes_between_the_cr_and_the_lf_of_an_empty_line(
    proxy_to: ProxyTo,
) -> None:
    # The LF behind the comment would be an empty line of its own.
    body = b"".join(each.replace(b"\n", b"\r\n") for each in EVENTS)
    cut = len(b"".join(EVENTS[:2])) + 4 - 1  # each of the two events has two LF
    script = [
        sse_head(),
        Send(chunk(body[:cut])),
        Pause(0.35),
        Send(chunk(body[cut:]) + LAST_CHUNK),
    ]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, server=COMMENTING) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert reply.body == as_client_sees(EVENTS).replace(b"\n", b"\r\n")


@pytest.mark.parametrize("fields", [b"", b"id: 7\n", b"event: message\nid: 7\n", b"retry: 9\n"])
async def test_a_comment_makes_no_client_dispatch_an_event(
    proxy_to: ProxyTo, fields: bytes
) -> None:
    # openai/openai-python#2722 (after an `id:`), openai/openai-go#651 (always, before 3.43).
    events = [fields + each for each in EVENTS]
    script = [*sse(*events[:2])[:-1], AwaitRelease("go"), *sse(*events[2:])[1:]]
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream, server=COMMENTING) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat(stream=True))
        await client.read_head()
        body = await client.read_until(COMMENT)
        upstream.release("go")
        body += await client.read_until(b"[DONE]\n\n")
    for block in body.removesuffix(b"\n\n").split(b"\n\n"):
        assert b"\ndata: " in b"\n" + block, "an empty line stands behind data alone"


async def test_a_body_gets_no_comments(proxy_to: ProxyTo) -> None:
    script = [Pause(0.3), *GOOD[False]]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, server=COMMENTING) as proxy:
        reply = await proxy.post(chat())
    assert reply.json() == {**WHOLE, "model": SLUG}


async def test_after_a_comment_falling_over_goes_on_unseen(proxy_to: ProxyTo) -> None:
    limits = replace(SOON, total=WAIT)
    async with ScriptedUpstream([Stall()]) as first, ScriptedUpstream(GOOD[True]) as second:
        limited = provider_for(first, "a", limits=limits)
        async with proxy_to(limited, provider_for(second, "b"), server=COMMENTING) as proxy:
            reply = await proxy.post(chat(stream=True))
            record = await proxy.wait_for_record()
    assert reply.body.startswith(COMMENT)
    assert reply.body.replace(COMMENT, b"") == as_client_sees(EVENTS)
    assert (record.attempts, record.provider, record.code) == (2, "b", "")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ([Pause(0.25), *refusal(500)], "upstream_error"),
        ([Pause(0.25), *refusal(429)], "rate_limit_exceeded"),
        ([Pause(0.25), *json_response(400, {"error": {"message": "no"}})], "invalid_value"),
        ([Stall()], "upstream_timeout"),
        ([Pause(0.25), *json_response(200, {"error": {"message": "no"}})], "upstream_error"),
    ],
    ids=["500", "429", "400", "a time limit", "an error as JSON"],
)
async def test_a_failure_after_a_comment_is_told_in_the_stream(
    proxy_to: ProxyTo, script: Script, code: str
) -> None:
    limits = replace(LIMITS, first_content=patient(1.5))
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream, limits=limits, server=COMMENTING) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat(stream=True))
        reply = await client.read_reply()
        assert await client.is_closed_by_peer()
        record = await proxy.wait_for_record()
    assert reply.status == 200
    assert reply.body.startswith(COMMENT)
    assert error_event_of(reply.body)["code"] == code
    assert (record.status, record.code, record.is_failure) == (200, code, True)
    assert record.completion_tokens == 0


async def test_a_completion_in_answer_to_a_stream_follows_its_comments(proxy_to: ProxyTo) -> None:
    script = [Pause(0.25), *GOOD[False]]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, server=COMMENTING) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert reply.body.startswith(COMMENT)
    first = reply.body.replace(COMMENT, b"").split(b"\n\n")[0]
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == "hello"


# Many at once


async def test_a_hundred_failovers_at_once_do_not_mix_their_answers(proxy_to: ProxyTo) -> None:
    def answer(seen: SeenRequest) -> Script:
        text = seen.json()["messages"][0]["content"]
        return sse(*stream_events(3, id=f"chatcmpl-{text}"))

    def fail(seen: SeenRequest) -> Script:
        kinds: list[Callable[[], Any]] = [
            lambda: [Close()],
            lambda: refusal(500),
            lambda: [Reset()],
        ]
        return kinds[len(first.requests) % 3]()  # type: ignore[no-any-return]

    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(ScriptedUpstream(default=fail))
        second = await stack.enter_async_context(ScriptedUpstream(default=answer))
        proxy = await stack.enter_async_context(proxy_to(first, second))
        bodies = [
            chat(stream=True) | {"messages": [{"role": "user", "content": f"n{number}"}]}
            for number in range(100)
        ]
        replies = await asyncio.gather(*map(proxy.post, bodies))
        await proxy.wait_for_record(100)
    for number, reply in enumerate(replies):
        assert reply.body == as_client_sees(stream_events(3, id=f"chatcmpl-n{number}"))
