"""What an answer is its first bytes tell, whatever its content type says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.scripted import (
    DONE,
    LAST_CHUNK,
    AwaitRelease,
    Pause,
    Script,
    ScriptedUpstream,
    Send,
    Step,
    chunk,
    completion,
    dribble,
    event,
    serialize_head,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import SLUG, as_client_sees, chat, provider_for

EVENTS = stream_events(3)
WHOLE = completion("hello")
PAYLOAD = json.dumps(WHOLE).encode()
# Streams as JSON: openclaw/openclaw#96497 and #97454, xiaoliu10/claude-code-router-next#44.
LABELS = [
    "application/json",
    "application/json; charset=utf-8",
    "text/event-stream;charset=UTF-8",
    "text/plain",
    "text/html",
    "application/octet-stream",
    "application/x-ndjson",
    None,
]
CHUNKED = ("Transfer-Encoding", "chunked")


def head(label: str | None, *headers: tuple[str, str]) -> Send:
    fields = [("Content-Type", label)] if label is not None else []
    return Send(serialize_head(200, [*fields, *headers]))


def labelled(label: str | None, *pieces: bytes) -> list[Step]:
    """A chunked answer with each piece in a write of its own."""
    return [head(label, CHUNKED), *(Send(chunk(each)) for each in pieces), Send(LAST_CHUNK)]


def with_length(label: str | None, body: bytes) -> list[Step]:
    """An answer in one write."""
    return [Send(head(label, ("Content-Length", str(len(body)))).data + body)]


FORMS = {
    "an event a piece": EVENTS,
    "a comment first": [b": keep-alive\n\n", *EVENTS],
    "fields first": [b"id: 1\nevent: message\n" + EVENTS[0], *EVENTS[1:]],
    "an event's name first": [b"event: message\n" + EVENTS[0], *EVENTS[1:]],
    "a time to retry first": [b"retry: 3000\n\n", *EVENTS],
    "byte by byte": [bytes((byte,)) for byte in b"".join(EVENTS)],
}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("pieces", FORMS.values(), ids=FORMS)
async def test_a_stream_is_a_stream_under_any_label(
    proxy_to: ProxyTo, label: str | None, pieces: list[bytes]
) -> None:
    script = labelled(label, *pieces)
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    whole = pieces if len(pieces) < 20 else EVENTS
    kept = b"".join(whole).replace(b'"upstream-model"', b'"%b"' % SLUG.encode())
    usage = as_client_sees([EVENTS[-2]], usage=True)
    assert (reply.status, reply.body) == (200, kept.replace(usage, b""))
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (record.code, record.completion_tokens, record.finish_reason) == ("", 3, "stop")


@pytest.mark.parametrize("label", LABELS)
async def test_a_stream_under_any_label_passes_as_it_comes(
    proxy_to: ProxyTo, label: str | None
) -> None:
    steps = labelled(label, *EVENTS)
    script = [*steps[:3], AwaitRelease("more"), *steps[3:]]
    async with (
        ScriptedUpstream(script) as upstream,
        proxy_to(upstream) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat(stream=True))
        await client.read_head()
        assert await client.read_until(b"word0") == as_client_sees(EVENTS[:2])
        upstream.release("more")
        await client.read_until(DONE)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 1000])
@pytest.mark.parametrize("front", [b"\xef\xbb\xbf", b"\n", b"\r\n\r\n", b"\xef\xbb\xbf\n\n"])
@pytest.mark.parametrize("body", [b"".join(EVENTS), PAYLOAD], ids=["events", "JSON"])
async def test_white_space_and_a_byte_order_mark_in_front_are_left_out(
    proxy_to: ProxyTo, body: bytes, front: bytes, size: int
) -> None:
    data = front + body
    pieces = [data[at : at + size] for at in range(0, 10 * size, size)]
    pieces.append(data[len(b"".join(pieces)) :])
    script = labelled("text/event-stream", *filter(None, pieces))
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert reply.status == 200
    if body is PAYLOAD:
        document = json.loads(reply.body.split(b"\n\n")[0].removeprefix(b"data: "))
        assert document["choices"][0]["delta"]["content"] == "hello"
    else:
        assert reply.body == as_client_sees(EVENTS)


async def test_a_byte_order_mark_behind_a_comment_takes_no_event_along(proxy_to: ProxyTo) -> None:
    script = [Pause(0.3), *labelled("text/event-stream", b"\xef\xbb\xbf" + EVENTS[0], *EVENTS[1:])]
    settings = {"comment_after": 0.1}
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream, server=settings) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert b"\xef\xbb\xbf" not in reply.body
    assert reply.body.replace(b": HOBER PROCESSING\n", b"") == as_client_sees(EVENTS)


BODIES = {
    "in one write": lambda label: with_length(label, PAYLOAD),
    "in pieces": lambda label: labelled(label, *[PAYLOAD[at : at + 9] for at in range(0, 900, 9)]),
    "byte by byte": lambda label: dribble(with_length(label, PAYLOAD)),
    "behind white space": lambda label: with_length(label, b"\n\n \t" + PAYLOAD),
    "before [DONE]": lambda label: with_length(label, PAYLOAD + b"\n\n" + DONE),
}


@pytest.mark.parametrize("stream", [False, True], ids=["body asked", "stream asked"])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("made", BODIES.values(), ids=BODIES)
async def test_a_json_body_is_one_under_any_label(
    proxy_to: ProxyTo, label: str | None, made: Any, stream: bool
) -> None:
    script = made(label) if made is not BODIES["in pieces"] else trimmed(made(label))
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
    assert reply.status == 200
    if stream:
        assert reply.body.endswith(DONE)
        document = json.loads(reply.body.split(b"\n\n")[0].removeprefix(b"data: "))
        assert document["choices"][0]["delta"]["content"] == "hello"
    else:
        assert reply.json() == {**WHOLE, "model": SLUG}
        assert reply.headers["content-type"] == "application/json"
    assert (record.code, record.completion_tokens, record.finish_reason) == ("", 3, "stop")


@pytest.mark.parametrize("many", [3 << 19, 7 << 20])
async def test_a_body_with_an_image_is_made_into_a_stream(proxy_to: ProxyTo, many: int) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * many}"}}
    whole = completion("hello")
    whole["choices"][0]["message"]["images"] = [image]
    script = with_length("application/json", json.dumps(whole).encode())
    async with ScriptedUpstream(script) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert reply.body.endswith(DONE)
    document = json.loads(reply.body.split(b"\n\n")[0].removeprefix(b"data: "))
    assert document["choices"][0]["delta"]["images"] == [image]
    assert (record.code, record.completion_tokens) == ("", 3)


@pytest.mark.parametrize("framed", ["with its length", "in pieces"])
async def test_a_body_too_long_for_a_stream_falls_over(proxy_to: ProxyTo, framed: str) -> None:
    body = json.dumps(completion("x" * (9 << 20))).encode()
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    label = "application/json"
    long = with_length(label, body) if framed == "with its length" else labelled(label, *pieces)
    async with ScriptedUpstream(long) as first, ScriptedUpstream(sse(*EVENTS)) as second:
        async with proxy_to(first, second) as proxy:
            reply = await proxy.post(chat(stream=True))
    assert reply.body == as_client_sees(EVENTS)


def trimmed(script: list[Step]) -> list[Step]:
    """Without the chunks of no bytes, which would end the body."""
    return [*(each for each in script[:-1] if each != Send(LAST_CHUNK)), script[-1]]


ERROR = json.dumps({"error": {"message": "words of theirs", "code": 503}}).encode()
UNUSABLE: dict[str, tuple[bool, Script]] = {
    "an error as JSON, labelled a stream": (True, with_length("text/event-stream", ERROR)),
    "an error as JSON, labelled text": (False, with_length("text/plain", ERROR)),
    "an empty stream": (True, with_length("text/event-stream", b"")),
    "nothing but white space": (True, labelled("text/event-stream", b"\n", b"\n\n")),
    "white space as a body": (False, with_length("application/json", b"\n\n")),
    "white space as text": (False, with_length("text/plain", b"\n\n")),
    "half a byte order mark": (True, with_length("text/plain", b"\xef\xbb")),
    "a page": (True, with_length("text/html", b"<html>words of theirs</html>")),
    "a page in pieces": (True, labelled("text/html", b"<html>", b"words of theirs")),
    "a page, labelled a stream": (True, with_length("text/event-stream", b"<html></html>")),
    "a page, labelled JSON": (True, with_length("application/json", b"<html></html>")),
    "a stream nobody asked for": (False, sse(*EVENTS)),
    "a stream nobody asked for, labelled JSON": (False, labelled("application/json", *EVENTS)),
    "text in pieces": (False, labelled("text/plain", b"words ", b"of theirs")),
    "an error event, labelled JSON": (
        True,
        labelled("application/json", event({"error": {"message": "words of theirs"}})),
    ),
    "a large body of JSON that is none": (
        False,
        labelled("application/json", b'["' + b"x" * 600_000, b"x" * 600_000 + b'"]'),
    ),
    "a large stream nobody asked for": (
        False,
        labelled("application/json", b"data: " + b"x" * 600_000, b"x" * 600_000),
    ),
}


@pytest.mark.parametrize(("stream", "script"), UNUSABLE.values(), ids=UNUSABLE)
async def test_what_is_neither_fails_and_falls_over(
    proxy_to: ProxyTo, stream: bool, script: Script
) -> None:
    good = sse(*EVENTS) if stream else with_length("application/json", PAYLOAD)
    async with ScriptedUpstream(default=script) as first, ScriptedUpstream(good) as second:
        async with proxy_to(first, second) as proxy:
            reply = await proxy.post(chat(stream=stream))
            record = await proxy.wait_for_record()
        async with proxy_to(provider_for(first)) as proxy:
            alone = await proxy.post(chat(stream=stream))
    assert (reply.status, record.attempts, record.provider) == (200, 2, "b")
    assert (alone.status, alone.error["type"]) == (502, "upstream_error")
    assert b"words of theirs" not in alone.body
