"""What an upstream's error means, wherever it stands, and what the client reads of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hoberproxy.routing.catalog import TimeLimits
from tests.support.patience import WAIT
from tests.support.scripted import (
    LAST_CHUNK,
    Close,
    Script,
    ScriptedUpstream,
    Send,
    Stall,
    chunk,
    completion,
    event,
    json_response,
    serialize_head,
    sse,
    sse_head,
    stream_events,
)

from .conftest import ProxyTo
from .harness import (
    OTHER_SLUG,
    SLUG,
    UPSTREAM_KEY,
    as_client_sees,
    chat,
    error_event_of,
    model_at,
    provider_for,
)

EVENTS = stream_events(4)
ROLE, FIRST = EVENTS[0], EVENTS[1]
GOOD: dict[bool, Script] = {True: sse(*EVENTS), False: json_response(200, completion("hello"))}
EITHER = pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
WHY = "at most 1 image per prompt"


def failing(code: Any, message: str = WHY) -> dict[str, Any]:
    return {"error": {"message": message, "code": code}}


def within(document: Any, *, stream: bool) -> Script:
    """An answer of status 200 that is an error."""
    return sse(event(document), EVENTS[-1]) if stream else json_response(200, document)


def response(status: int, content_type: str, body: bytes) -> Script:
    head = [("Content-Type", content_type), ("Content-Length", str(len(body)))]
    return [Send(serialize_head(status, head) + body)]


# An error with its status inside a 200


@EITHER
@pytest.mark.parametrize("code", [400, "400", 400.0, "INVALID_ARGUMENT", "invalid_request_error"])
async def test_a_400_within_a_200_is_the_client_s(
    proxy_to: ProxyTo, code: Any, stream: bool
) -> None:
    script = within(failing(code), stream=stream)
    async with (
        ScriptedUpstream(script) as first,
        ScriptedUpstream() as second,
        proxy_to(first, second) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
        assert not second.requests, "another endpoint of the model would say the same"
    assert (reply.status, reply.error["message"]) == (400, WHY)
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["x-should-retry"] == "false"
    assert (record.status, record.attempts, record.failures[0].status) == (400, 1, 400)


@EITHER
async def test_a_400_within_a_200_goes_to_the_next_model(proxy_to: ProxyTo, stream: bool) -> None:
    models = [model_at(SLUG, "a", "b"), model_at(OTHER_SLUG, "c")]
    async with (
        ScriptedUpstream(within(failing(400), stream=stream)) as first,
        ScriptedUpstream() as second,
        ScriptedUpstream(GOOD[stream]) as third,
        proxy_to(first, second, third, models=models) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream, models=[OTHER_SLUG]))
        assert not second.requests
    assert (reply.status, reply.headers["x-hober-model"]) == (200, OTHER_SLUG)


@EITHER
async def test_a_429_within_a_200_cools_falls_over_and_is_told(
    proxy_to: ProxyTo, stream: bool
) -> None:
    script = within(failing(429), stream=stream)
    async with (
        ScriptedUpstream(script, script) as first,
        ScriptedUpstream(GOOD[stream], script) as second,
        proxy_to(first, second) as proxy,
    ):
        served = await proxy.post(chat(stream=stream))
        await proxy.wait_for_record()
        cooled = [
            each.is_cooling for each in proxy.context.health.snapshot(proxy.context.loop.time())
        ]
        refused = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record(2)
    assert (served.status, served.headers["x-hober-provider"]) == (200, "b")
    assert cooled == [True, False]
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    assert WHY.encode() not in refused.body
    assert [failure.status for failure in record.failures] == [429, 429]


@EITHER
async def test_a_429_within_a_200_says_when_to_come_again_by_its_head(
    proxy_to: ProxyTo, stream: bool
) -> None:
    script = json_response(200, failing(429), ("Retry-After", "7"))
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=stream))
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")


@EITHER
@pytest.mark.parametrize("code", [401, 402, 403, 404, 500, 503, "UNAVAILABLE", None, "odd"])
async def test_any_other_error_within_a_200_falls_over_and_is_a_502(
    proxy_to: ProxyTo, code: Any, stream: bool
) -> None:
    script = within(failing(code), stream=stream)
    async with (
        ScriptedUpstream(script, script) as first,
        ScriptedUpstream(GOOD[stream], script) as second,
        proxy_to(first, second) as proxy,
    ):
        served = await proxy.post(chat(stream=stream))
        refused = await proxy.post(chat(stream=stream))
    assert (served.status, served.headers["x-hober-provider"]) == (200, "b")
    assert (refused.status, refused.error["code"]) == (502, "upstream_error")
    assert WHY.encode() not in refused.body


@pytest.mark.parametrize(
    ("document", "status"),
    [
        ({"object": "error", "message": WHY, "code": 400}, 400),
        ([{"error": {"message": WHY, "code": 400}}], 400),
        ({"error": {"message": WHY}, "status": 400}, 400),
        ({"error": WHY, "status_code": "400"}, 400),
        ({"detail": [{"loc": ["body", "n"], "msg": WHY}]}, 422),
        ({"detail": WHY}, 502),
        ({"errors": [{"message": WHY, "code": 429}]}, 429),
        ({"choices": [{"finish_reason": "error", "error": {"code": 400, "message": WHY}}]}, 400),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "error"}]}, 502),
        ({"choices": [], "error": {"code": 400, "message": WHY}}, 400),
    ],
    ids=str,
)
@EITHER
async def test_an_error_in_a_json_body_of_status_200_means_what_it_says(
    proxy_to: ProxyTo, document: Any, status: int, stream: bool
) -> None:
    async with (
        ScriptedUpstream(json_response(200, document)) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream))
    assert reply.status == status
    assert (WHY.encode() in reply.body) == (status in (400, 422))


async def test_the_meaning_does_not_depend_on_where_the_network_cuts(proxy_to: ProxyTo) -> None:
    data = event(failing(400)) + EVENTS[-1]
    whole = json.dumps(failing(400)).encode()
    head = serialize_head(
        200, [("Content-Type", "application/json"), ("Content-Length", str(len(whole)))]
    )
    refused = serialize_head(
        400, [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    )
    cuts = range(1, len(data), 7)
    scripts: list[Script] = []
    for cut in cuts:
        pieces = [Send(chunk(data[:cut])), Send(chunk(data[cut:]) + LAST_CHUNK)]
        scripts += [[sse_head(), *pieces], [Send(refused), *pieces]]
        scripts += [[Send(head + whole[: cut % len(whole)]), Send(whole[cut % len(whole) :])]]
    async with ScriptedUpstream(*scripts) as upstream, proxy_to(upstream) as proxy:
        for stream in [True, True, False] * len(cuts):
            reply = await proxy.post(chat(stream=stream))
            assert (reply.status, reply.error["message"]) == (400, WHY)


async def test_after_the_first_content_an_error_is_an_event_and_its_status_recorded(
    proxy_to: ProxyTo,
) -> None:
    script = [sse_head(), Send(chunk(ROLE)), Send(chunk(FIRST)), Send(chunk(event(failing("429"))))]
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert reply.body.startswith(as_client_sees([ROLE, FIRST]))
    assert error_event_of(reply.body)["code"] == "upstream_error"
    assert WHY.encode() not in reply.body
    assert (record.phase, record.failures[0].status) == ("content", 429)


@EITHER
async def test_an_option_of_ours_that_is_refused_within_a_200_is_left_out(
    proxy_to: ProxyTo, stream: bool
) -> None:
    refused = within(failing(400, "unknown field stream_options"), stream=True)
    scripts = [refused, GOOD[True]] if stream else [GOOD[False]]
    async with ScriptedUpstream(*scripts) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=stream))
    assert reply.status == 200


# What the client reads


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/plain; charset=utf-8", WHY.encode()),
        ("text/event-stream", json.dumps(failing(400)).encode()),
        ("text/event-stream", event(failing(400)) + EVENTS[-1]),
        ("application/problem+json", json.dumps({"title": "x", "detail": WHY}).encode()),
        ("text/html", json.dumps({"error": WHY}).encode()),
        (
            "application/json",
            json.dumps(
                {
                    "error": {
                        "message": "Provider returned error",
                        "code": 400,
                        "metadata": {"raw": json.dumps(failing("invalid"))},
                    }
                }
            ).encode(),
        ),
    ],
)
@pytest.mark.parametrize("status", [400, 413, 422])
@EITHER
async def test_a_refusal_shows_its_reason(
    proxy_to: ProxyTo, content_type: str, body: bytes, status: int, stream: bool
) -> None:
    async with (
        ScriptedUpstream(response(status, content_type, body)) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream))
    assert (reply.status, reply.error["message"]) == (status, WHY)


async def test_a_refusal_that_breaks_off_shows_what_has_come(proxy_to: ProxyTo) -> None:
    body = json.dumps({"detail": [{"msg": WHY, "input": "x" * 100}]}).encode()
    head = serialize_head(422, [("Content-Length", str(len(body)))])
    async with (
        ScriptedUpstream([Send(head + body[:-60]), Close()]) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat())
    assert (reply.status, reply.error["message"]) == (422, WHY)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"], ids=["LF", "CR LF"])
async def test_a_refusal_as_an_event_is_not_waited_for_any_longer(
    proxy_to: ProxyTo, end: bytes
) -> None:
    data = b"event: error%bdata: %b%b" % (
        end[: len(end) // 2],
        json.dumps(failing(400)).encode(),
        end,
    )
    head = serialize_head(400, [("Content-Type", "text/event-stream")])
    async with (
        ScriptedUpstream(
            [Send(head), *[Send(data[at : at + 9]) for at in range(0, 200, 9)], Stall()]
        ) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        await upstream.wait_for_hangup()
    assert (reply.status, reply.error["message"]) == (400, WHY)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body", [json.dumps(failing(400)).encode(), WHY.encode()], ids=["JSON", "a text"]
)
async def test_a_refusal_whose_body_is_left_open_is_told_soon(
    proxy_to: ProxyTo, body: bytes, stream: bool
) -> None:
    """Not after `total`, the only limit of a call that is no stream and has no answer yet."""
    head = serialize_head(400, [("Content-Type", "application/json")])
    limits = TimeLimits(connect=WAIT, first_content=10 * WAIT, idle=1, total=10 * WAIT)
    async with ScriptedUpstream([Send(head), Send(body), Stall()]) as upstream:
        async with proxy_to(provider_for(upstream, limits=limits)) as proxy:
            reply = await proxy.post(chat(stream=stream))
        await upstream.wait_for_hangup()
    assert (reply.status, reply.error["message"]) == (400, WHY)


async def test_a_page_is_hidden(proxy_to: ProxyTo) -> None:
    page = response(400, "text/html", b"<html><h1>400 Bad Request</h1>nginx</html>")
    async with ScriptedUpstream(page) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat())
    assert (reply.status, reply.error["message"]) == (400, "provider a answered with status 400")


# Our key

GEMINI = [
    {
        "error": {
            "code": 400,
            "message": "API key not valid. Please pass a valid API key.",
            "status": "INVALID_ARGUMENT",
        }
    }
]
ABOUT_US = {
    "Gemini's bad key": GEMINI,
    "the key": failing(400, f"unknown key {UPSTREAM_KEY}"),
    "its ends": failing(400, f"unknown key {UPSTREAM_KEY[:5]}***{UPSTREAM_KEY[-4:]}"),
    "a piece of it": failing(400, f"unknown key {UPSTREAM_KEY[:9]}"),
    "a header": failing(400, f"bad header 'Bearer {UPSTREAM_KEY}'"),
}


@EITHER
@pytest.mark.parametrize("is_inside", [False, True], ids=["a status", "within a 200"])
@pytest.mark.parametrize("document", ABOUT_US.values(), ids=ABOUT_US)
async def test_a_400_about_our_key_goes_to_the_other_endpoint_and_is_a_502(
    proxy_to: ProxyTo, document: Any, is_inside: bool, stream: bool
) -> None:
    script = within(document, stream=stream) if is_inside else json_response(400, document)
    if is_inside and stream and isinstance(document, list):
        script = json_response(200, document)
    async with (
        ScriptedUpstream(script, script) as first,
        ScriptedUpstream(GOOD[stream], script) as second,
        proxy_to(first, second) as proxy,
    ):
        served = await proxy.post(chat(stream=stream))
        refused = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record(2)
    assert (served.status, served.headers["x-hober-provider"]) == (200, "b")
    assert (refused.status, refused.error["code"]) == (502, "upstream_error")
    for word in (b"API key", b"unknown key", b"cret", b"Bearer"):
        assert word not in refused.body
    assert [failure.status for failure in record.failures] == [400, 400]


async def test_a_key_in_a_header_of_the_config_is_ours_too(proxy_to: ProxyTo) -> None:
    script = json_response(400, failing(400, "no such account: 0123456789abcdef"))
    async with ScriptedUpstream(script) as upstream:
        keyed = provider_for(upstream, api_key=None, headers=(("x-api-key", "0123456789abcdef"),))
        async with proxy_to(keyed) as proxy:
            reply = await proxy.post(chat())
    assert reply.status == 502
    assert b"0123456789" not in reply.body


async def test_a_client_that_guesses_at_the_key_reads_what_it_would_without(
    proxy_to: ProxyTo,
) -> None:
    guess = UPSTREAM_KEY[:9]
    script = json_response(400, failing(400, f"user: expected another, got {guess}"))
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(user=guess))
    assert reply.status == 400
    assert guess.encode() in reply.body


async def test_a_client_can_not_have_an_endpoint_cooled_by_words_that_are_quoted(
    proxy_to: ProxyTo,
) -> None:
    words = "the API key is not valid"
    script = json_response(400, failing(400, f"user: {words}"))
    async with ScriptedUpstream(default=script) as upstream, proxy_to(upstream) as proxy:
        for quoted, is_cooling in ((words, False), ("me", True)):
            for _ in range(4):
                reply = await proxy.post(chat(user=quoted))
                assert reply.status in (502, 503)
            (health,) = proxy.context.health.snapshot(proxy.context.loop.time())
            assert health.is_cooling is is_cooling


# Of several models


@EITHER
async def test_the_first_refusal_is_told_if_the_other_models_failed(
    proxy_to: ProxyTo, stream: bool
) -> None:
    models = [model_at(SLUG, "a"), model_at(OTHER_SLUG, "b")]
    async with (
        ScriptedUpstream(json_response(400, failing(400))) as first,
        ScriptedUpstream(json_response(503, failing(503, "down"))) as second,
        proxy_to(first, second, models=models) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream, models=[OTHER_SLUG]))
        record = await proxy.wait_for_record()
    assert (reply.status, reply.error["message"]) == (400, WHY)
    assert reply.headers["x-should-retry"] == "false"
    metadata = reply.error["metadata"]
    assert metadata["provider"] == "a"
    previous = [(each["provider"], each["status"]) for each in metadata["previous_errors"]]
    assert previous == [("a", 400), ("b", 503)]
    assert (record.status, record.attempts) == (400, 2)


async def test_a_stream_that_breaks_is_told_itself_whatever_came_before(proxy_to: ProxyTo) -> None:
    models = [model_at(SLUG, "a"), model_at(OTHER_SLUG, "b")]
    breaking = [sse_head(), Send(chunk(ROLE)), Send(chunk(FIRST)), Close()]
    async with (
        ScriptedUpstream(json_response(400, failing(400))) as first,
        ScriptedUpstream(breaking) as second,
        proxy_to(first, second, models=models) as proxy,
    ):
        reply = await proxy.post(chat(stream=True, models=[OTHER_SLUG]))
    error = error_event_of(reply.body)
    assert (error["code"], error["metadata"]["provider"]) == ("upstream_error", "b")
    assert WHY not in error["message"]


@EITHER
async def test_a_prompt_that_is_too_long_upstream_has_the_code_that_clients_know(
    proxy_to: ProxyTo, stream: bool
) -> None:
    document = {"error": {"code": 400, "message": "n_ctx", "type": "exceed_context_size_error"}}
    scripts = [json_response(400, document), within(document, stream=stream)]
    async with ScriptedUpstream(*scripts) as upstream, proxy_to(upstream) as proxy:
        for number in (1, 2):
            reply = await proxy.post(chat(stream=stream))
            record = await proxy.wait_for_record(number)
            assert reply.status == 400
            assert reply.error["code"] == record.code == "context_length_exceeded"
            assert (reply.error["param"], reply.error["message"]) == ("messages", "n_ctx")


@EITHER
async def test_a_prompt_that_is_too_long_for_the_config_is_told_before_any_upstream_is_called(
    proxy_to: ProxyTo, stream: bool
) -> None:
    models = [replace(model_at(SLUG, "a"), context_length=100)]
    async with ScriptedUpstream() as upstream, proxy_to(upstream, models=models) as proxy:
        reply = await proxy.post(chat(stream=stream, max_tokens=200))
        assert not upstream.requests
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", "messages")
    assert "maximum context length is 100 tokens" in reply.error["message"]
    assert reply.headers["x-should-retry"] == "false"
