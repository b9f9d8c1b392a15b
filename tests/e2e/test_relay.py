"""What passes through: bodies byte for byte, usage, the model's name, headers, every framing."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from tests.support.scripted import (
    DONE,
    LAST_CHUNK,
    AwaitRelease,
    Close,
    Pause,
    Reset,
    Script,
    ScriptedUpstream,
    Send,
    SendMany,
    chunk,
    completion,
    dribble,
    event,
    json_response,
    serialize_head,
    sse,
    sse_head,
    stream_events,
)

from .conftest import ProxyTo
from .harness import (
    CHAT,
    OTHER_SLUG,
    SLUG,
    SOON,
    UPSTREAM_KEY,
    UPSTREAM_MODEL,
    as_client_sees,
    chat,
    error_event_of,
    model_at,
)

EVENTS = stream_events(5)
ODD = [
    b": a comment\n\n",
    *stream_events(2, done=False, extra={"system_fingerprint": "fp \u00e9 \U0001f600"}),
    b"event: message\nid: 7\nretry: 10\n" + stream_events(1)[1],
    event({"choices": [], "model": UPSTREAM_MODEL, "prompt_filter_results": []}),
    DONE,
]
WITH_USAGE = {"stream_options": {"include_usage": True}}


# Streams, however they are cut

CUTS = {
    "an event a chunk": sse(*EVENTS),
    "all events in one chunk": sse(*EVENTS, packed=100),
    "three events a chunk": sse(*EVENTS, packed=3),
    "all chunks in one segment": sse(*EVENTS, per_write=100),
    "byte by byte": dribble(sse(*EVENTS)),
    "in segments of seven bytes": dribble(sse(*EVENTS, packed=2), 7),
    "chunks of one byte": sse(*[bytes((byte,)) for byte in b"".join(EVENTS)], per_write=50),
    "chunks of thirteen bytes": sse(
        *[b"".join(EVENTS)[at : at + 13] for at in range(0, len(b"".join(EVENTS)), 13)]
    ),
    "head and body in one segment": [
        Send(sse_head().data + b"".join(chunk(each) for each in EVENTS) + LAST_CHUNK)
    ],
    "until close": sse(*EVENTS, chunked=False),
    "with a length": [
        Send(
            serialize_head(
                200,
                [
                    ("Content-Type", "text/event-stream"),
                    ("Content-Length", str(len(b"".join(EVENTS)))),
                ],
            )
        ),
        *(Send(each) for each in EVENTS),
    ],
    "closed after its end unannounced": sse(*EVENTS, close=True),
    "upper-case sizes and extensions": [
        sse_head(),
        *(Send(b"0%X;name=value\r\n%b\r\n" % (len(each), each)) for each in EVENTS),
        Send(b"000;last\r\n\r\n"),
    ],
    "with trailers": [
        sse_head(),
        *(Send(chunk(each)) for each in EVENTS),
        Send(b"0\r\nX-Checksum: 1\r\nX-Model-Server: a\r\n\r\n"),
    ],
    "after interim answers": [
        Send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
        *sse(*EVENTS),
    ],
}


@pytest.mark.parametrize("wants_usage", [False, True], ids=["usage unasked", "usage asked"])
@pytest.mark.parametrize("script", CUTS.values(), ids=CUTS)
async def test_a_stream_passes_byte_for_byte_however_it_is_cut(
    proxy_to: ProxyTo, script: Script, wants_usage: bool
) -> None:
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True, **(WITH_USAGE if wants_usage else {})))
        record = await proxy.wait_for_record()
    assert (reply.status, reply.is_complete) == (200, True)
    assert reply.body == as_client_sees(EVENTS, usage=wants_usage)
    assert (record.prompt_tokens, record.completion_tokens) == (7, 3)
    assert (record.has_usage, record.estimated, record.status, record.code) == (
        True,
        False,
        200,
        "",
    )
    assert (record.finish_reason, record.upstream_model) == ("stop", UPSTREAM_MODEL)
    assert record.bytes_out == len(reply.body)


@pytest.mark.parametrize("size", [1, 5, 1000], ids="in segments of {}".format)
async def test_comments_fields_and_events_without_choices_stay_as_they_are(
    proxy_to: ProxyTo, size: int
) -> None:
    script = dribble(sse(*ODD), size)
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
    odd = b"".join(ODD).replace(b'"model":"upstream-model"', b'"model":"test/model"')
    usage = next(each for each in ODD if b'"usage":{' in each)
    assert reply.body == odd.replace(as_client_sees([usage], usage=True), b"")


async def test_crlf_line_ends_stay(proxy_to: ProxyTo) -> None:
    events = [each.replace(b"\n", b"\r\n") for each in EVENTS]
    async with ScriptedUpstream(dribble(sse(*events), 3)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert reply.body == as_client_sees(EVENTS).replace(b"\n", b"\r\n")


async def test_openrouters_way_to_ask_for_usage_works(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(sse(*EVENTS)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True, usage={"include": True}))
        sent = upstream.requests[0].json()
    assert reply.body == as_client_sees(EVENTS, usage=True)
    assert "usage" not in sent
    assert sent["stream_options"] == {"include_usage": True}


async def test_usage_that_the_upstream_does_not_tell_is_estimated(proxy_to: ProxyTo) -> None:
    events = stream_events(4, usage=None)
    async with ScriptedUpstream(sse(*events)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert reply.body == as_client_sees(events)
    assert (record.has_usage, record.estimated, record.completion_tokens) == (False, True, 4)
    assert record.prompt_tokens > 0


async def test_a_stream_without_done_ends_in_order_after_its_finish_reason(
    proxy_to: ProxyTo,
) -> None:
    events = stream_events(2, done=False)
    async with ScriptedUpstream(sse(*events)) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (reply.body, reply.is_complete) == (as_client_sees(events), True)
    assert (record.code, record.status) == ("", 200)


@pytest.mark.parametrize("size", [20_000, 90_000], ids=["20 KB", "90 KB"])
async def test_a_stream_may_end_by_one_event_too_long_to_be_held(
    proxy_to: ProxyTo, size: int
) -> None:
    """As of MiniMax, whose last event holds all of the text, and which need not say [DONE]."""
    usage = {"prompt_tokens": 7, "completion_tokens": 5000, "total_tokens": 5007}
    message = {"index": 0, "finish_reason": "stop", "message": {"content": "x" * size}}
    last = event({"id": "c", "model": UPSTREAM_MODEL, "choices": [message], "usage": usage})
    pieces = [last[at : at + 1400] for at in range(0, len(last), 1400)]
    script = sse(*EVENTS[:2], *pieces)
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (reply.body, reply.is_complete) == (as_client_sees([*EVENTS[:2], last]), True)
    assert (record.prompt_tokens, record.completion_tokens) == (7, 5000)
    assert (record.finish_reason, record.estimated, record.code) == ("stop", False, "")


async def test_a_usage_of_null_is_for_who_asked_for_usage(proxy_to: ProxyTo) -> None:
    null = [each.replace(b"}\n\n", b',"usage":null}\n\n') for each in EVENTS[:-2]]
    stream = [*null, *EVENTS[-2:]]
    async with ScriptedUpstream(default=sse(*stream)) as upstream, proxy_to(upstream) as proxy:
        plain = await proxy.post(chat(stream=True))
        reply = await proxy.post(chat(stream=True, stream_options={"include_usage": True}))
    assert plain.body == as_client_sees(EVENTS)
    assert reply.body == as_client_sees(stream, usage=True)


async def test_events_pass_as_they_come(proxy_to: ProxyTo) -> None:
    head, *rest = sse(*EVENTS)
    steps = [head, *rest[:2], AwaitRelease("more"), *rest[2:]]
    async with ScriptedUpstream(steps) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            await client.ask(chat(stream=True))
            await client.read_head()
            first = await client.read_until(b"word0")
            assert first == as_client_sees(EVENTS[:2])
            upstream.release("more")
            await client.read_until(DONE)


async def test_an_http_1_0_client_gets_a_body_until_close(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(sse(*EVENTS)) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            payload = json.dumps(chat(stream=True)).encode()
            await client.send(
                b"POST %b HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(payload), payload)
            )
            reply = await client.read_reply()
    assert "transfer-encoding" not in reply.headers
    assert reply.body == as_client_sees(EVENTS)


# Bodies

WHOLE = completion("hello", extra={"system_fingerprint": None, "kept": [1.0, 12345678901234567890]})


def json_head(*headers: tuple[str, str]) -> bytes:
    return serialize_head(200, [("Content-Type", "application/json; charset=utf-8"), *headers])


PAYLOAD = json.dumps(WHOLE, indent=1).encode()
BODIES: dict[str, Script] = {
    "with a length": json_response(200, PAYLOAD),
    "byte by byte": dribble(json_response(200, PAYLOAD)),
    "chunked": [
        Send(json_head(("Transfer-Encoding", "chunked"))),
        *(Send(chunk(PAYLOAD[at : at + 50])) for at in range(0, len(PAYLOAD), 50)),
        Send(LAST_CHUNK),
    ],
    "until close": [Send(json_head(("Connection", "close"))), Send(PAYLOAD), Close()],
}


@pytest.mark.parametrize("script", BODIES.values(), ids=BODIES)
async def test_a_body_passes_with_its_own_length_and_only_the_model_replaced(
    proxy_to: ProxyTo, script: Script
) -> None:
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat())
        record = await proxy.wait_for_record()
    assert reply.status == 200
    assert reply.body == PAYLOAD.replace(b'"upstream-model"', b'"test/model"')
    assert reply.headers["content-length"] == str(len(reply.body))
    assert reply.headers["content-type"] == "application/json"
    assert (record.prompt_tokens, record.completion_tokens, record.has_usage) == (7, 3, True)
    assert (record.streamed, record.finish_reason, record.slug) == (False, "stop", SLUG)


async def test_no_usage_is_invented_in_a_body(proxy_to: ProxyTo) -> None:
    script = json_response(200, completion("x" * 400, usage=None))
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat())
        record = await proxy.wait_for_record()
    assert "usage" not in reply.json()
    assert record.estimated and record.completion_tokens >= 100


LARGE = completion("x" * 3_000_000, extra={"big": [0] * 5})
LARGE_PAYLOAD = json.dumps(LARGE).encode()


def large(complete: bool = True, end: Any = None) -> Script:
    pieces = [LARGE_PAYLOAD[at : at + 60_000] for at in range(0, len(LARGE_PAYLOAD), 60_000)]
    steps: list[Any] = [Send(json_head(("Transfer-Encoding", "chunked")))]
    steps.append(SendMany([chunk(each) for each in pieces[: None if complete else -5]]))
    return [*steps, Send(LAST_CHUNK) if complete else end]


async def test_a_body_over_a_mebibyte_passes_chunked_with_model_and_usage(
    proxy_to: ProxyTo,
) -> None:
    async with ScriptedUpstream(large()) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat())
        record = await proxy.wait_for_record()
    assert reply.headers["transfer-encoding"] == "chunked" and reply.is_complete
    assert reply.body == LARGE_PAYLOAD.replace(b'"upstream-model"', b'"test/model"')
    assert (record.prompt_tokens, record.completion_tokens, record.has_usage) == (7, 3, True)
    assert record.upstream_model == UPSTREAM_MODEL
    assert (record.finish_reason, record.upstream_id) == ("stop", LARGE["id"])


@pytest.mark.parametrize(
    "script",
    [large(False, Close()), large(False, Reset()), large(False, Send(LAST_CHUNK))],
    ids=["cut", "reset", "ended in the middle of its JSON"],
)
async def test_a_large_body_that_breaks_never_looks_complete(
    proxy_to: ProxyTo, script: Script
) -> None:
    async with (
        ScriptedUpstream(script) as first,
        ScriptedUpstream() as second,
        proxy_to(first, second) as proxy,
    ):
        reply = await proxy.post(chat())
        record = await proxy.wait_for_record()
    assert (reply.status, reply.is_complete) == (200, False)
    assert not second.requests, "nothing is tried again once the client has seen an answer"
    assert record.code in ("upstream_error", "upstream_invalid_response")
    assert record.phase == "content" and record.is_failure


# Answers of another kind than was asked for


async def test_a_completion_in_answer_to_a_stream_becomes_a_stream(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(default=json_response(200, WHOLE)) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        with_usage = await proxy.post(chat(stream=True, **WITH_USAGE))
        record = await proxy.wait_for_record(2)
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, done, rest = reply.body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    document = json.loads(first.removeprefix(b"data: "))
    assert document["object"] == "chat.completion.chunk"
    assert document["model"] == SLUG
    assert document["choices"][0]["delta"]["content"] == "hello"
    assert document["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in document
    assert json.loads(with_usage.body.split(b"\n\n")[1][6:])["usage"] == WHOLE["usage"]
    assert (record.prompt_tokens, record.streamed) == (7, True)


GZIPPED = gzip.compress(b"".join(EVENTS))
HTML = b"<html><body>please log in</body></html>"
UNUSABLE: dict[str, tuple[Script, str]] = {
    "compressed unasked": (
        [sse_head(("Content-Encoding", "gzip")), Send(chunk(GZIPPED) + LAST_CHUNK)],
        "upstream_invalid_response",
    ),
    "another protocol": (
        [Send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")],
        "upstream_invalid_response",
    ),
    "a redirect": (
        [Send(serialize_head(307, [("Location", "http://127.0.0.1/"), ("Content-Length", "0")]))],
        "upstream_error",
    ),
    "a web page": (
        [
            Send(
                serialize_head(200, [("Content-Type", "text/html"), ("Content-Length", "39")])
                + HTML
            )
        ],
        "upstream_invalid_response",
    ),
    "an empty body": (
        [
            Send(
                serialize_head(200, [("Content-Type", "application/json"), ("Content-Length", "0")])
            )
        ],
        "upstream_invalid_response",
    ),
    "an empty answer without a type": (
        [Send(serialize_head(200, [("Content-Length", "0")]))],
        "",
    ),
    "no content": ([Send(b"HTTP/1.1 204 No Content\r\n\r\n")], "upstream_error"),
    "not HTTP": ([Send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")], "upstream_invalid_response"),
    "two lengths": (
        [Send(json_head(("Content-Length", "2"), ("Content-Length", "3")) + b"{} ")],
        "upstream_invalid_response",
    ),
    "length and chunks": (
        [
            Send(json_head(("Content-Length", "2"), ("Transfer-Encoding", "chunked"))),
            Send(chunk(b"{}") + LAST_CHUNK),
        ],
        "upstream_invalid_response",
    ),
    "an endless head": (
        [Send(b"HTTP/1.1 200 OK\r\n"), SendMany([b"x-a: %b\r\n" % (b"b" * 1000)] * 200)],
        "upstream_invalid_response",
    ),
    "interim answers without end": (
        [SendMany([b"HTTP/1.1 102 Processing\r\n\r\n"] * 50)],
        "upstream_invalid_response",
    ),
    "JSON that is no object": (json_response(200, [1, 2]), "upstream_invalid_response"),
    "half a JSON object": (json_response(200, PAYLOAD[:-9]), "upstream_invalid_response"),
    "no choices": (json_response(200, {"id": "x"}), "upstream_invalid_response"),
    "an error with status 200": (
        json_response(200, {"error": {"message": "secret words of theirs", "code": 500}}),
        "upstream_error",
    ),
    "a header with NUL": (
        [Send(b"HTTP/1.1 200 OK\r\nX-A: a\0b\r\nContent-Length: 2\r\n\r\n{}")],
        "upstream_invalid_response",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["body asked", "stream asked"])
@pytest.mark.parametrize(("script", "code"), UNUSABLE.values(), ids=UNUSABLE)
async def test_an_answer_that_cannot_be_used_is_a_502_in_our_own_words(
    proxy_to: ProxyTo, script: Script, code: str, stream: bool
) -> None:
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
        await upstream.wait_for_requests()
    assert (reply.status, record.status) == (502, 502)
    assert reply.error["type"] == "upstream_error"
    assert reply.error["code"] == record.code
    if code:
        assert record.code == code
    assert reply.error["metadata"]["provider"] == "a"
    assert b"log in" not in reply.body and b"secret words" not in reply.body
    assert record.prompt_tokens == record.completion_tokens == 0


async def test_a_connection_that_got_an_unusable_answer_is_not_used_again(
    proxy_to: ProxyTo,
) -> None:
    html = UNUSABLE["a web page"][0]
    async with (
        ScriptedUpstream(html, json_response(200, WHOLE)) as upstream,
        proxy_to(upstream) as proxy,
    ):
        await proxy.post(chat())
        reply = await proxy.post(chat())
        assert reply.status == 200
        assert upstream.connections == 2


# Upstream heads in pieces


async def test_a_head_that_comes_byte_by_byte_is_read(proxy_to: ProxyTo) -> None:
    head, *rest = sse(*EVENTS)
    async with (
        ScriptedUpstream([*dribble([head], 1), Pause(0.02), *rest]) as upstream,
        proxy_to(upstream) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
    assert reply.body == as_client_sees(EVENTS)


# Headers

TRACE = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CLIENT_HEADERS = [
    "Authorization: Bearer hb_live_of_the_client",
    "Cookie: session=1",
    "X-Forwarded-For: 10.0.0.1",
    "Forwarded: for=10.0.0.1",
    "X-Real-IP: 10.0.0.1",
    "OpenAI-Organization: org-1",
    "OpenAI-Project: p-1",
    "X-Api-Key: k",
    "X-Stainless-Lang: python",
    "X-Title: my program",
    "HTTP-Referer: http://127.0.0.1/",
    "Accept: */*",
    "Accept-Encoding: gzip, deflate",
    "User-Agent: theirs/1",
    "X-Request-ID: mine",
    TRACE,
    "tracestate: vendor=1",
]


async def test_upstream_gets_our_own_headers_and_no_others(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(default=json_response(200, WHOLE)) as upstream,
        proxy_to(upstream, headers=(("X-Added", "by the config"),)) as proxy,
    ):
        await proxy.post(chat(), headers=CLIENT_HEADERS)
        record = await proxy.wait_for_record()
        seen = upstream.requests[0]
    assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
    headers = dict(seen.headers)
    assert headers.pop("user-agent").startswith("hoberproxy/")
    assert headers == {
        "host": f"127.0.0.1:{upstream.port}",
        "authorization": f"Bearer {UPSTREAM_KEY}",
        "content-type": "application/json",
        "content-length": str(len(seen.body)),
        "accept": "application/json",
        "accept-encoding": "identity",
        "traceparent": TRACE.partition(": ")[2],
        "tracestate": "vendor=1",
        "x-added": "by the config",
    }
    assert len(seen.header_list) == len(seen.headers), "no header twice"
    assert record.client_request_id == "mine"


async def test_forward_headers_names_what_else_passes(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(json_response(200, WHOLE)) as upstream,
        proxy_to(upstream, forward_headers=("x-title",)) as proxy,
    ):
        await proxy.post(chat(), headers=CLIENT_HEADERS)
        headers = upstream.requests[0].headers
    assert headers["x-title"] == "my program"
    assert "http-referer" not in headers and "cookie" not in headers


async def test_a_provider_without_a_key_gets_no_authorization(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(json_response(200, WHOLE)) as upstream,
        proxy_to(upstream, api_key=None) as proxy,
    ):
        await proxy.post(chat(), headers=CLIENT_HEADERS)
        assert "authorization" not in upstream.requests[0].headers


UPSTREAM_HEADERS = [
    ("Server", "llama.cpp"),
    ("Set-Cookie", "a=b"),
    ("X-Request-Id", "theirs"),
    ("X-RateLimit-Remaining-Requests", "3"),
    ("Access-Control-Allow-Origin", "*"),
    ("X-Region", "eu"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_only_named_headers_of_an_upstream_reach_the_client(
    proxy_to: ProxyTo, stream: bool
) -> None:
    script = (
        sse(*EVENTS, headers=UPSTREAM_HEADERS)
        if stream
        else json_response(200, WHOLE, *UPSTREAM_HEADERS)
    )
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream, response_headers=("x-region",)) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
    framing = "transfer-encoding" if stream else "content-length"
    assert set(reply.headers) == {
        "content-type",
        "x-request-id",
        "x-hober-provider",
        "x-hober-model",
        "x-region",
        framing,
    }
    assert reply.headers["x-request-id"] == record.id
    assert (reply.headers["x-hober-provider"], reply.headers["x-hober-model"]) == ("a", SLUG)
    assert reply.headers["x-region"] == "eu"


# The request's body

AWKWARD = (
    b'{ "temperature":1.0,"seed":9223372036854775807,'
    b' "metadata" : {"b":1,"a":[1e5,-0.0,"\\u00e9"]},"model":"test/model",\n '
    b'"messages":[{"role":"user","content":"h\\u0069 \xc3\xa9 \\ud83d\\ude00"}],'
    b'"top_p":0.10,"provider":{"sort":"price"},"stream":%b,"models":["test/other"],'
    b'"usage":{"include":false},"max_tokens":5,"x":{"model":"inner","usage":1} }'
)


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_a_requests_body_goes_upstream_byte_for_byte_but_for_our_changes(
    proxy_to: ProxyTo, stream: bool
) -> None:
    answer = sse(*EVENTS) if stream else json_response(200, WHOLE)
    sent = AWKWARD % (b"true" if stream else b"false")
    async with ScriptedUpstream(answer) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(sent)
        got = upstream.requests[0].body
    assert reply.status == 200
    for kept in (
        b'"temperature":1.0',
        b'"seed":9223372036854775807',
        b'{"b":1,"a":[1e5,-0.0,"\\u00e9"]}',
        b'[{"role":"user","content":"h\\u0069 \xc3\xa9 \\ud83d\\ude00"}]',
        b'"top_p":0.10',
        b'"x":{"model":"inner","usage":1}',
    ):
        assert kept in got
    document = json.loads(got)
    order = ["temperature", "seed", "metadata", "model", "messages", "top_p", "stream"]
    tail = ["max_tokens", "x"] + (["stream_options"] if stream else [])
    assert list(document) == order + tail
    assert document["model"] == UPSTREAM_MODEL
    if stream:
        assert document["stream_options"] == {"include_usage": True}


async def test_stream_options_are_not_sent_where_they_are_not_understood(
    proxy_to: ProxyTo,
) -> None:
    async with (
        ScriptedUpstream(sse(*EVENTS)) as upstream,
        proxy_to(upstream, stream_options=False) as proxy,
    ):
        await proxy.post(chat(stream=True, stream_options={"include_usage": True}))
        assert "stream_options" not in upstream.requests[0].json()


async def test_two_models_have_their_own_names_in_their_answers(proxy_to: ProxyTo) -> None:
    models = [model_at(SLUG, "a"), model_at(OTHER_SLUG, "a")]
    async with (
        ScriptedUpstream(default=sse(*EVENTS)) as upstream,
        proxy_to(upstream, models=models) as proxy,
    ):
        first, second = await asyncio.gather(
            proxy.post(chat(stream=True)), proxy.post(chat(stream=True, model=OTHER_SLUG))
        )
    assert first.body == as_client_sees(EVENTS)
    assert second.body == as_client_sees(EVENTS, slug=OTHER_SLUG)


# What comes pipelined behind an answer that the client has not read


async def test_a_request_pipelined_behind_an_unread_answer_is_not_cut(proxy_to: ProxyTo) -> None:
    body = json.dumps(completion("x" * 900_000)).encode()
    async with (
        ScriptedUpstream(default=json_response(200, body)) as upstream,
        proxy_to(upstream, server={"write_timeout": 5.0}) as proxy,
        proxy.connect() as client,
    ):
        client.writer.transport.pause_reading()
        (connection,) = proxy.server._connections
        requests = 0
        while not connection.is_paused:  # the sockets' buffers take some megabytes
            await client.ask(chat())
            requests += 1
            await proxy.wait_for_record(requests)
            await asyncio.sleep(0)
        await client.ask(chat())
        await asyncio.sleep(0.15)  # some turns of the wheel, far fewer than the limit
        client.writer.transport.resume_reading()
        for _ in range(requests + 1):
            reply = await client.read_reply()
            assert len(reply.body) == len(body) - len(UPSTREAM_MODEL) + len(SLUG)


async def test_a_broken_large_event_is_reported_after_a_blank_line(proxy_to: ProxyTo) -> None:
    steps = [*sse(*EVENTS[:3])[:-1], Send(chunk(b'data: {"x":"' + b"y" * 40_000)), Close()]
    async with ScriptedUpstream(steps) as upstream, proxy_to(upstream, limits=SOON) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert error_event_of(reply.body)["code"] == "upstream_error"
