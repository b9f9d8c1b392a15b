"""The heads that go to a provider, and what passes between it and a client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hoberproxy.catalog import Provider
from hoberproxy.deadlines import Wheel
from hoberproxy.http11_head import (
    RequestHead,
    ResponseHead,
    parse_request_head,
    parse_response_head,
)
from hoberproxy.provider import MAX_HEADS, Upstream, make_upstreams
from hoberproxy.settings import Config
from hoberproxy.values import ConfigError

from .conftest import make_config


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One that never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def upstream(loop: asyncio.AbstractEventLoop, **options: Any) -> Upstream:
    provider = Provider("acme", "http", "127.0.0.1", 9, "/v1", **options)
    return Upstream(provider, loop, Wheel(0.0))


def request_head(*lines: bytes) -> RequestHead:
    first = b"POST /v1/chat/completions HTTP/1.1"
    return parse_request_head(
        b"".join(b"%b\r\n" % line for line in (first, b"host: x", *lines, b""))
    )


def response_head(*lines: bytes) -> ResponseHead:
    first = b"HTTP/1.1 200 OK"
    return parse_response_head(b"".join(b"%b\r\n" % line for line in (first, *lines, b"")))


def test_only_headers_that_the_config_names_are_forwarded(loop: asyncio.AbstractEventLoop) -> None:
    head = request_head(b"x-a: 1", b"x-b: 2", b"authorization: Bearer secret")
    assert upstream(loop).forwarded_headers(head) == []
    named = upstream(loop, forward_headers=("x-b", "x-c"))
    assert named.forwarded_headers(head) == [(b"x-b", b"2")]


def test_a_trace_is_forwarded_whole_and_once(loop: asyncio.AbstractEventLoop) -> None:
    trace = [b"traceparent: 00-1-2-01", b"tracestate: a=1", b"tracestate: b=2"]
    named = upstream(loop, forward_headers=("tracestate", "x-a"))
    names = [name for name, _ in named.forwarded_headers(request_head(*trace, b"x-a: 1"))]
    assert names == [b"traceparent", b"tracestate", b"tracestate", b"x-a"]
    assert named.forwarded_headers(request_head(*trace[1:])) == [], "a state without its parent"


def test_only_headers_that_the_config_names_pass_to_the_client(
    loop: asyncio.AbstractEventLoop,
) -> None:
    head = response_head(b"x-a: 1", b"set-cookie: secret", b"content-length: 0")
    assert upstream(loop).passed_headers(head) == []
    named = upstream(loop, response_headers=("x-b", "x-a"))
    assert named.passed_headers(head) == [(b"x-a", b"1")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parts", [[b"{}"], [b'{"a":', b"1}"], [b"x" * 100_000, b"y" * 100_000]])
def test_a_request_has_the_length_of_its_body_and_the_extra_fields(
    loop: asyncio.AbstractEventLoop, parts: list[bytes], stream: bool
) -> None:
    sender = upstream(loop, api_key="secret")
    request = b"".join(sender.serialize_request(parts, [(b"x-a", b"1")], stream=stream))
    raw, _, body = request.partition(b"\r\n\r\n")
    head = parse_request_head(raw + b"\r\n\r\n")
    assert body == b"".join(parts) and head.length == len(body)
    assert (head.path, head.get(b"x-a")) == (b"/v1/chat/completions", b"1")
    assert head.get(b"authorization") == b"Bearer secret"
    assert head.get(b"accept") == (b"text/event-stream" if stream else b"application/json")


def test_the_fields_of_answers_do_not_pile_up(loop: asyncio.AbstractEventLoop) -> None:
    answering = upstream(loop)
    for number in range(MAX_HEADS + 10):
        fields = answering.answer_fields(f"any/{number}", is_stream=True)
        assert fields.endswith(b"x-hober-model: any/%d\r\n" % number)
    assert len(answering._answer_fields) <= MAX_HEADS


def test_a_certificate_that_cannot_be_read_is_named(
    loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    config: Config = make_config(tmp_path / "records.db", 9)
    bad = Provider("bad", "https", "127.0.0.1", 9, "/v1", ca_file=str(tmp_path / "none.pem"))
    config.providers["bad"] = bad
    with pytest.raises(ConfigError) as error:
        make_upstreams(config, loop, Wheel(0.0))
    (problem,) = error.value.problems
    assert problem.startswith("providers.bad.ca_file: ")
