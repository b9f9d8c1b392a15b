"""Every way an upstream can fail, for streams and bodies, with and without another way, as a table.

A row says what the client sees, what is recorded and how many calls were made. The same failure is
given to the official client, which must raise.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from hoberproxy.accounting.record import Record
from hoberproxy.routing.catalog import Provider, TimeLimits
from hoberproxy.routing.health import Health
from tests.support.patience import patient
from tests.support.scripted import (
    LAST_CHUNK,
    Close,
    Pause,
    Reset,
    Script,
    ScriptedUpstream,
    SeenRequest,
    Send,
    Stall,
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
    QUESTION,
    SLUG,
    Proxy,
    Reply,
    as_client_sees,
    chat,
    error_event_of,
    provider_for,
)

EVENTS = stream_events(3)
WHOLE = completion("hello")
GOOD: dict[bool, Script] = {True: sse(*EVENTS), False: json_response(200, WHOLE)}
THEIRS = "words of theirs"
PAGE = f"<html><h1>{THEIRS}</h1></html>".encode()


@dataclass(frozen=True, slots=True)
class Row:
    """What an upstream does (None: it does not listen), and what becomes of it."""

    script: Script | None
    status: int = 502  # of the answer where nothing else is left to try
    code: str = "upstream_error"
    phase: str = "head"
    theirs: int | None = None  # the upstream's status, as recorded
    retry_after_ms: tuple[int, int] | None = None  # from, to
    falls_over: bool = True
    is_slow: bool = False

    def limits(self, stream: bool) -> TimeLimits:
        """Only the one that is to run out is short: the machine may be busy."""
        if not self.is_slow:
            return LIMITS
        if self.phase in ("content", "body"):
            return replace(LIMITS, idle=patient(0.3))
        return (
            replace(LIMITS, first_content=patient(0.3))
            if stream
            else replace(LIMITS, total=patient(0.3))
        )

    @property
    def is_final(self) -> bool:
        """Whether `x-should-retry: false` is sent although only one endpoint was tried."""
        return 400 <= self.status < 500 and self.status != 429


def status(number: int, *headers: tuple[str, str], body: Any = None, **expected: Any) -> Row:
    if body is None:
        body = {"error": {"message": THEIRS, "code": number}}
    return Row(json_response(number, body, *headers), theirs=number, **expected)


def limited(*headers: tuple[str, str], wait: tuple[int, int] | None = None) -> Row:
    expected: dict[str, Any] = {"status": 429, "code": "rate_limit_exceeded"}
    return status(429, *headers, retry_after_ms=wait, **expected)


def page(number: int) -> Script:
    head = [("Content-Type", "text/html"), ("Content-Length", str(len(PAGE)))]
    return [Send(serialize_head(number, head) + PAGE)]


def empty(*headers: tuple[str, str]) -> Script:
    return [Send(serialize_head(200, [*headers, ("Content-Length", "0")]))]


# Before an answer has begun: the same for streams and bodies

INVALID = "upstream_invalid_response"
REFUSED: dict[str, Any] = {"code": "invalid_value", "falls_over": False}
EITHER: dict[str, Row] = {
    "refuses the connection": Row(None, phase="connect"),
    "resets": Row([Reset()]),
    "hangs up": Row([Close()]),
    "delays its head": Row(
        [Pause(patient(1.0)), *GOOD[True]], 504, "upstream_timeout", is_slow=True
    ),
    "answers 302": status(302, ("Location", "http://127.0.0.1:1/")),
    "answers 401": status(401),
    "answers 404": status(404),
    "answers 400": status(400, status=400, **REFUSED),
    "answers 409": status(409, falls_over=False),
    "answers 422 as FastAPI does": status(
        422, body={"detail": [{"loc": ["body"], "msg": "no"}]}, status=422, **REFUSED
    ),
    "answers 413 with a page": Row(page(413), 413, "body_too_large", theirs=413, falls_over=False),
    "answers 502 with a page": Row(page(502), theirs=502),
    "answers 500": status(500),
    "answers 503 with retry-after": status(503, ("Retry-After", "3"), retry_after_ms=(3000, 3000)),
    "answers 429": limited(),
    "answers 429 with seconds": limited(("Retry-After", "7"), wait=(7000, 7000)),
    "answers 429 with milliseconds": limited(
        ("Retry-After", "9"), ("retry-after-ms", "1500"), wait=(1500, 1500)
    ),
    "answers 429 with a date": limited(
        ("Retry-After", formatdate(4_102_444_800, usegmt=True))  # in 2100: further than we believe
    ),
    "answers 429 with nonsense": limited(("Retry-After", "soon")),
    "answers 200 with a page": Row(page(200), code=INVALID, theirs=200),
    "answers an empty 200": Row(
        empty(("Content-Type", "application/json")), code=INVALID, phase="body", theirs=200
    ),
    "answers 200 with an error": Row(
        json_response(200, {"error": {"message": THEIRS}}), phase="body", theirs=200
    ),
}

# A stream that fails before and after its first content

OPENING: dict[str, Any] = {"phase": "opening", "theirs": 200}
CONTENT: dict[str, Any] = {"phase": "content", "theirs": 200, "falls_over": False, "status": 200}
LATE: dict[str, Any] = {"code": "upstream_timeout", "is_slow": True}


def opened(count: int, *rest: Any) -> Script:
    """A stream's head, `count` events (the second is the first with content), and the rest."""
    return [sse_head(), *(Send(chunk(each)) for each in EVENTS[:count]), *rest]


STREAMS: dict[str, Row] = {
    "stalls after 0 events": Row(opened(0, Stall()), **{**OPENING, **LATE, "status": 504}),
    "stalls after its role": Row(opened(1, Stall()), **{**OPENING, **LATE, "status": 504}),
    "stalls after 2 events": Row(opened(2, Stall()), **{**CONTENT, **LATE}),
    "cuts after 0 bytes": Row(opened(0, Close()), **OPENING),
    "cuts in its role": Row(opened(0, Send(chunk(EVENTS[0])[:60]), Close()), **OPENING),
    "cuts after its first content": Row(opened(2, Close()), **CONTENT),
    "cuts before its last chunk, without [DONE]": Row(opened(4, Close()), **CONTENT),
    "resets after its first content": Row(opened(2, Reset()), **CONTENT),
    "breaks a chunk's size before content": Row(
        opened(1, Send(b"zz\r\n"), Stall()), **OPENING, code=INVALID
    ),
    "breaks a chunk's size after content": Row(
        opened(2, Send(b"zz\r\n"), Stall()), **CONTENT, code=INVALID
    ),
    "sends an error event first": Row(
        opened(0, Send(chunk(event({"error": {"message": THEIRS}})) + LAST_CHUNK)), **OPENING
    ),
    "sends an error event after content": Row(
        opened(2, Send(chunk(event({"error": {"message": THEIRS}})) + LAST_CHUNK)), **CONTENT
    ),
    "sends an empty stream": Row(opened(0, Send(LAST_CHUNK)), **OPENING),
    "answers an empty 200 of no type": Row(empty(), **OPENING),
}

# A body that fails; nothing of it is passed on before its end


def body_of(
    data: bytes, *rest: Any, framing: tuple[str, str] = ("Content-Length", "999")
) -> Script:
    return [
        Send(serialize_head(200, [("Content-Type", "application/json"), framing]) + data),
        *rest,
    ]


BODY: dict[str, Any] = {"phase": "body", "theirs": 200}
CHUNKED = ("Transfer-Encoding", "chunked")
BODIES: dict[str, Row] = {
    "stalls after 0 bytes": Row(body_of(b"", Stall()), 504, **BODY, **LATE),
    "stalls after 4 bytes": Row(body_of(b'{"a"', Stall()), 504, **BODY, **LATE),
    "cuts after 4 bytes": Row(body_of(b'{"a"', Close()), **BODY),
    "resets after 4 bytes": Row(body_of(b'{"a"', Reset()), **BODY),
    "breaks a chunk's size": Row(
        body_of(b'4\r\n{"a"\r\nzz\r\n', Stall(), framing=CHUNKED), **BODY, code=INVALID
    ),
    "answers an empty 200 of no type": Row(empty(), code=INVALID, theirs=200),
    "answers without choices": Row(json_response(200, {"id": "x"}), **BODY, code=INVALID),
}

TABLE = [
    *(pytest.param(row, False, id=f"a body's upstream {does}") for does, row in EITHER.items()),
    *(pytest.param(row, False, id=f"a body's upstream {does}") for does, row in BODIES.items()),
    *(
        # What answers a stream with JSON has begun it.
        pytest.param(
            replace(row, phase="opening") if row.phase == "body" else row,
            True,
            id=f"a stream's upstream {does}",
        )
        for does, row in EITHER.items()
    ),
    *(pytest.param(row, True, id=f"a stream's upstream {does}") for does, row in STREAMS.items()),
]
EACH = pytest.mark.parametrize(("row", "stream"), TABLE)


# What is looked at


@asynccontextmanager
async def failing(row: Row, stream: bool) -> AsyncIterator[tuple[Provider, list[SeenRequest]]]:
    """The row's upstream as provider "a", and the requests that reached it."""
    limits = row.limits(stream)
    if row.script is None:
        with refused_port() as port:
            yield provider_for(f"http://127.0.0.1:{port}/v1", "a", limits=limits), []
        return
    async with ScriptedUpstream(default=row.script) as upstream:
        yield provider_for(upstream, "a", limits=limits), upstream.requests


def check_told(row: Row, stream: bool, reply: Reply) -> None:
    """The failure as the client sees it."""
    assert (reply.status, reply.is_complete) == (row.status, True)
    assert "x-hober-attempts" not in reply.headers, "there was one attempt"
    assert reply.headers.get("x-should-retry") == ("false" if row.is_final else None)
    assert THEIRS.encode() not in reply.body or row.status == 400
    if row.status == 200:
        assert reply.body.startswith(as_client_sees(EVENTS[:2]))
        error = error_event_of(reply.body)
    else:
        error = reply.error
    assert (error["code"], error["metadata"]) == (row.code, {"provider": "a"})
    check_retry_after(row, reply)


def check_retry_after(row: Row, reply: Reply) -> None:
    given = reply.headers.get("retry-after"), reply.headers.get("retry-after-ms")
    if row.retry_after_ms is None:
        assert given == (None, None)
        return
    seconds, milliseconds = (int(each or -1) for each in given)
    low, high = row.retry_after_ms
    assert low <= milliseconds <= high
    assert seconds == -(-milliseconds // 1000), "a client that reads seconds must not be early"


def check_recorded(row: Row, record: Record) -> None:
    assert (record.status, record.code, record.phase) == (row.status, row.code, row.phase)
    assert (record.provider, record.attempts) == ("a", 1)
    check_failure(row, record)
    assert record.is_failure


def check_failure(row: Row, record: Record) -> None:
    (failure,) = record.failures
    found = failure.provider, failure.status, failure.code, failure.phase
    assert found == ("a", row.theirs, row.code, row.phase)
    assert failure.milliseconds >= 0


async def ask_by_sdk(proxy: Proxy, *, stream: bool) -> str:
    """The answer's text through the official client, which tries once."""
    async with AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
        answer: Any = await client.chat.completions.create(
            model=SLUG,
            messages=QUESTION,
            stream=stream,  # type: ignore[call-overload]
        )
        if not stream:
            return answer.choices[0].message.content or ""
        return "".join([each.choices[0].delta.content or "" async for each in answer])


# The table


@EACH
async def test_with_nothing_else_to_try_the_client_is_told_and_the_sdk_raises(
    proxy_to: ProxyTo, row: Row, stream: bool
) -> None:
    async with failing(row, stream) as (provider, seen), proxy_to(provider) as proxy:
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
        assert len(seen) == (row.script is not None)
        proxy.context.health = Health()  # what it has learnt is test_health.py's
        with pytest.raises(openai.APIError) as caught:
            await ask_by_sdk(proxy, stream=stream)
        await proxy.wait_for_record(2)
    check_told(row, stream, reply)
    check_recorded(row, record)
    assert caught.value.code == row.code
    if isinstance(caught.value, openai.APIStatusError):
        assert caught.value.status_code == row.status
    else:
        assert row.status == 200, "only a stream that has begun is reported without a status"


@EACH
async def test_with_another_endpoint_left_only_what_it_may_mend_is_tried_there(
    proxy_to: ProxyTo, row: Row, stream: bool
) -> None:
    async with (
        failing(row, stream) as (provider, seen),
        ScriptedUpstream(GOOD[stream]) as second,
        proxy_to(provider, provider_for(second, "b")) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
        assert len(seen) == (row.script is not None)
        assert len(second.requests) == row.falls_over
    if not row.falls_over:
        check_told(row, stream, reply)
        check_recorded(row, record)
        return
    assert (reply.status, reply.is_complete) == (200, True)
    assert reply.headers["x-hober-attempts"] == "2"
    assert not {"x-should-retry", "retry-after", "retry-after-ms"} & set(reply.headers)
    assert reply.body == as_client_sees(EVENTS) if stream else reply.json()["model"] == SLUG
    assert (record.status, record.code, record.phase) == (200, "", "")
    assert (record.provider, record.attempts, record.is_failure) == ("b", 2, False)
    check_failure(row, record)


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
@pytest.mark.parametrize(
    ("last", "status", "retry"),
    [([Close()], 502, "false"), (json_response(429, {}, ("Retry-After", "2")), 429, None)],
    ids=["a hang-up stops the SDKs' own tries", "a rate limit leaves them be"],
)
async def test_when_every_way_has_failed_the_last_one_is_told_and_how_many_there_were(
    proxy_to: ProxyTo, last: Script, status: int, retry: str | None, stream: bool
) -> None:
    async with (
        ScriptedUpstream(json_response(500, {})) as first,
        ScriptedUpstream(last) as second,
        proxy_to(first, second) as proxy,
    ):
        reply = await proxy.post(chat(stream=stream))
        record = await proxy.wait_for_record()
    assert (reply.status, reply.headers["x-hober-attempts"]) == (status, "2")
    assert reply.headers.get("x-should-retry") == retry
    assert [each["provider"] for each in reply.error["metadata"]["previous_errors"]] == ["a"]
    assert (record.attempts, [each.provider for each in record.failures]) == (2, ["a", "b"])


@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_the_sdk_sees_nothing_of_a_failure_that_was_mended(
    proxy_to: ProxyTo, stream: bool
) -> None:
    async with (
        ScriptedUpstream([Reset()]) as first,
        ScriptedUpstream(GOOD[stream]) as second,
        proxy_to(first, second) as proxy,
    ):
        text = await ask_by_sdk(proxy, stream=stream)
        record = await proxy.wait_for_record()
    assert text == (" word0 word1 word2" if stream else "hello")
    assert record.attempts == 2


async def test_a_date_in_retry_after_is_told_in_seconds(proxy_to: ProxyTo) -> None:
    def refuse(seen: SeenRequest) -> Script:
        soon = formatdate(time.time() + 30, usegmt=True)
        return json_response(429, {}, ("Retry-After", soon))

    async with ScriptedUpstream(refuse) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat())
    check_retry_after(limited(wait=(25_000, 30_000)), reply)
