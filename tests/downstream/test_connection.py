"""A client's connection on real sockets: where requests begin and end, however their bytes come.

Chat requests and those that aiohttp answers go through the same tests where both must do the same.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest

from hoberproxy.downstream import connection as connection_module
from hoberproxy.downstream.connection import MAX_PIPELINED_BYTES, DownstreamConnection, State
from hoberproxy.process import server
from hoberproxy.process.listeners import UNSENT_BYTES
from hoberproxy.protocol.http_head import MAX_REQUEST_HEAD_BYTES
from hoberproxy.upstream.connector import UNREAD_BYTES
from tests.conftest import (
    QUESTION,
    SLUG,
    ClientAnswer,
    Proxy,
    RawClient,
    StartProxy,
    chat,
    get,
    wait_until,
)
from tests.downstream.test_response import FakeTransport
from tests.support.scripted import (
    AwaitRelease,
    ScriptedUpstream,
    Send,
    SendMany,
    Stall,
    completion,
    json_response,
    serialize_head,
    sse,
    sse_head,
    stream_events,
)

both_loops = pytest.mark.asyncio(loop_factories=["uvloop", "asyncio"])

STREAMED = {**QUESTION, "stream": True}
BODY = json.dumps(QUESTION).encode()


def chunked(data: bytes, size: int = 7, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    chunks = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join(chunks) + b"0%b\r\n%b\r\n" % (extension, trailer)


def chunked_chat(key: str, body: bytes) -> bytes:
    return chat(key, b"", framing="transfer-encoding: chunked") + body


def request_bytes(
    request: str, key: str, *headers: str, body: bytes = b"", framing: str = ""
) -> bytes:
    """A chat request or one that aiohttp answers, its framing as the test says."""
    if request == "chat":
        return chat(key, body, *headers, framing=framing or "x: y")
    return get("/v1/models", *([framing] if framing else []), *headers) + body


both_handlers = pytest.mark.parametrize("request_to", ["chat", "models"])


def connection_of(proxy: Proxy) -> DownstreamConnection:
    (connection,) = proxy.server._connections
    return connection


def assert_refused(answer: ClientAnswer, status: int = 400, code: str = "invalid_request") -> None:
    """In the contract's form, and the connection ends."""
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (status, code)
    assert list(error) == ["message", "type", "param", "code"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"].startswith("req_")


def assert_method_refused(answer: ClientAnswer, allowed: str) -> None:
    assert (answer.status, answer.headers["allow"]) == (405, allowed)


# Bytes as sockets cut them


@both_loops
@pytest.mark.parametrize("body", [QUESTION, STREAMED], ids=["json", "stream"])
async def test_a_request_in_one_piece_is_answered(
    proxy: Proxy, upstream: ScriptedUpstream, body: Any
) -> None:
    if body is STREAMED:
        upstream.add(sse(*stream_events(3)))
    client = await proxy.connect()
    client.send(chat(proxy.key, body))
    answer = await client.read_answer()
    assert answer.status == 200
    assert b"test/model" in answer.body
    assert len(proxy.records) == 1
    assert await client.is_open()


@both_loops
@pytest.mark.parametrize("framing", ["content-length", "chunked"])
async def test_a_request_may_come_byte_by_byte(
    proxy: Proxy, upstream: ScriptedUpstream, framing: str
) -> None:
    request = chat(proxy.key)
    if framing == "chunked":
        request = chunked_chat(proxy.key, chunked(BODY, extension=b";a=b", trailer=b"x: y\r\n"))
    client = await proxy.connect()
    await client.send_each([request[at : at + 1] for at in range(len(request))])
    assert (await client.read_answer()).status == 200
    assert upstream.requests[0].json()["messages"] == QUESTION["messages"]
    assert await client.is_open()


@pytest.mark.parametrize("kind", ["chat", "chunked chat", "models"])
async def test_a_request_cut_in_two_anywhere_is_the_same_request(proxy: Proxy, kind: str) -> None:
    request = {
        "chat": chat(proxy.key),
        "chunked chat": chunked_chat(proxy.key, chunked(BODY, size=40, extension=b";x")),
        "models": get("/v1/models"),
    }[kind]
    client = await proxy.connect()
    answers = set()
    for cut in range(1, len(request)):
        await client.send_each([request[:cut], request[cut:]])
        answers.add((await client.read_answer()).body)
    assert len(answers) == 1
    assert b"error" not in answers.pop()


async def test_a_head_in_many_pieces_with_a_large_body_arrives_whole(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    question = {**QUESTION, "messages": [{"role": "user", "content": "é" * 300_000}]}
    request = chat(proxy.key, question)
    client = await proxy.connect()
    await client.send_each([request[at : at + 17] for at in range(0, 340, 17)])
    await client.drain(request[340:])
    assert (await client.read_answer()).status == 200
    assert upstream.requests[0].json()["messages"] == question["messages"]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param(chunked(BODY), "plain", id="plain"),
        pytest.param(chunked(BODY, size=1), "one byte a chunk", id="one byte a chunk"),
        pytest.param(chunked(BODY, extension=b' ; a="b;c"'), "extensions", id="extensions"),
        pytest.param(chunked(BODY, trailer=b"x: y\r\nz:\r\n"), "trailers", id="trailers"),
        pytest.param(chunked(BODY).replace(b"7\r\n", b"007\r\n"), "zeros", id="leading zeros"),
        pytest.param(chunked(BODY, size=31).replace(b"1f\r\n", b"1F\r\n"), "hex", id="capital hex"),
    ],
)
async def test_chunked_bodies_are_read_and_sent_on_with_a_length(
    proxy: Proxy, upstream: ScriptedUpstream, body: bytes, what: str
) -> None:
    client = await proxy.connect()
    client.send(chunked_chat(proxy.key, body))
    assert (await client.read_answer()).status == 200
    assert upstream.requests[0].json()["messages"] == QUESTION["messages"]
    assert "content-length" in upstream.requests[0].headers
    assert await client.is_open()


# Expect: 100-continue


@both_loops
async def test_a_client_that_may_go_on_gets_100_and_then_its_answer(proxy: Proxy) -> None:
    head, body = chat(proxy.key, QUESTION, "expect: 100-Continue").split(b"\r\n\r\n")
    client = await proxy.connect()
    client.send(head + b"\r\n\r\n")
    assert await client.read_line() == b"HTTP/1.1 100 Continue\r\n"
    assert await client.read_line() == b"\r\n"
    client.send(body)
    answer = await client.read_answer()
    assert (answer.status, answer.interim) == (200, 0)
    assert await client.is_open()


async def test_a_client_that_may_not_go_on_is_told_so_at_once(proxy: Proxy) -> None:
    head, _ = chat("hb_live_wrong", QUESTION, "expect: 100-continue").split(b"\r\n\r\n")
    client = await proxy.connect()
    client.send(head + b"\r\n\r\n")
    answer = await client.read_answer()
    assert (answer.status, answer.interim) == (401, 0)
    # Whether the body still comes is not known (RFC 9110, 10.1.1): no next request is found after.
    assert answer.headers["connection"] == "close"
    assert await client.read_rest() == b""


async def test_no_100_is_sent_to_who_has_begun_its_body(proxy: Proxy) -> None:
    client = await proxy.connect()
    client.send(chat(proxy.key, QUESTION, "expect: 100-continue"))
    assert (await client.read_answer()).interim == 0


async def test_too_long_a_body_is_refused_before_it_is_sent(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(max_body_bytes=1024)
    client = await proxy.connect()
    client.send(chat(proxy.key, b"", "expect: 100-continue", framing="content-length: 1025"))
    answer = await client.read_answer()
    assert_refused(answer, 413, "body_too_large")
    assert answer.interim == 0


@pytest.mark.parametrize("expectation", ["expect: 200-ok", "Expect:"])
@both_handlers
async def test_other_expectations_are_ignored(
    proxy: Proxy, request_to: str, expectation: str
) -> None:
    client = await proxy.connect()
    framing = f"content-length: {len(BODY)}"
    client.send(request_bytes(request_to, proxy.key, expectation, body=BODY, framing=framing))
    answer = await client.read_answer()
    assert (answer.status, answer.interim) == (200, 0)


async def test_the_other_door_continues_a_body_too(proxy: Proxy) -> None:
    client = await proxy.connect()
    client.send(get("/v1/embeddings", "content-length: 2", "expect: 100-continue", method="POST"))
    assert await client.read_line() == b"HTTP/1.1 100 Continue\r\n"
    assert await client.read_line() == b"\r\n"
    client.send(b"{}")
    answer = await client.read_answer()
    assert (answer.status, answer.interim) == (404, 0)
    assert await client.is_open()


# One connection, many requests


@both_loops
@pytest.mark.parametrize(
    "order", ["GG", "GP", "PG", "PP", "SP", "PGSGPG"], ids=lambda order: " then ".join(order)
)
async def test_pipelined_requests_are_answered_in_order(
    proxy: Proxy, upstream: ScriptedUpstream, order: str
) -> None:
    upstream.add(
        *(
            sse(*stream_events(1, id=f"answer-{number}"))
            if kind == "S"
            else json_response(200, completion(id=f"answer-{number}"))
            for number, kind in enumerate(order)
            if kind != "G"
        )
    )
    requests = {"G": get("/v1/models/test/model"), "P": chat(proxy.key)}
    requests["S"] = chat(proxy.key, STREAMED)
    client = await proxy.connect()
    client.send(b"".join(requests[kind] for kind in order))
    for number, kind in enumerate(order):
        answer = await client.read_answer()
        expected = b'"object":"model"' if kind == "G" else b"answer-%d" % number
        assert expected in answer.body
    assert await client.is_open()


async def test_a_pipelined_request_waits_until_the_stream_before_it_has_ended(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    events = stream_events(2)
    upstream.add([*sse(*events)[:3], AwaitRelease("rest"), *sse(*events)[3:]])
    client = await proxy.connect()
    client.send(chat(proxy.key, STREAMED) + chat(proxy.key))
    await upstream.wait_for_requests(1)
    await wait_until(lambda: proxy.context.exchanges != set())
    assert len(upstream.requests) == 1
    upstream.release("rest")
    assert (await client.read_answer()).body.endswith(b"data: [DONE]\n\n")
    assert (await client.read_answer()).status == 200
    assert len(upstream.requests) == 2


async def test_requests_that_begin_while_the_client_is_behind_with_reading_are_served(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(write_timeout=5.0)
    upstream.add(*[json_response(200, completion("x" * 1_000_000))] * 20)
    client = await proxy.connect(limit=2**16)
    client.send(chat(proxy.key) * 20)
    # An answer was written over the watermark, and the next request waits.
    await wait_until(lambda: connection_of(proxy).is_paused and connection_of(proxy)._buffer)
    await asyncio.sleep(4 * proxy.context.wheel.tick)  # the stall limit must not count from zero
    for _ in range(20):
        answer = await client.read_answer()
        assert (answer.status, len(answer.body) > 1_000_000) == (200, True)


async def test_who_pipelines_more_than_is_kept_gets_its_answer_and_is_closed(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([AwaitRelease("answer"), *json_response(200, completion())])
    client = await proxy.connect()
    client.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    await client.drain(get("/v1/models", "x: " + "y" * 1000), 2 + MAX_PIPELINED_BYTES // 1000)
    await wait_until(lambda: connection_of(proxy)._is_overrun)
    upstream.release("answer")
    assert (await client.read_answer()).status == 200
    assert await client.read_rest() == b""


async def test_what_is_kept_of_pipelined_bytes_is_bounded(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([Stall()])
    client = await proxy.connect()
    client.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    await client.flood(8 * 1024 * 1024)  # is taken: reading never pauses
    connection = connection_of(proxy)
    assert len(connection._buffer) <= MAX_PIPELINED_BYTES
    assert connection._transport is not None
    assert connection._transport.is_reading()


async def test_a_client_that_leaves_after_pipelining_too_much_is_still_seen_to_leave(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([Stall()])
    client = await proxy.connect()
    client.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    await client.flood(1024 * 1024)
    await client.aclose()
    await upstream.wait_for_hangup()
    (record,) = await proxy.wait_for_records(1)
    assert record.status == 499


@both_loops
async def test_a_connection_lasts_over_many_requests_to_both_handlers(proxy: Proxy) -> None:
    client = await proxy.connect()
    ids = set()
    for number in range(100):
        client.send(
            chat(proxy.key) if number % 2 else get(("/v1/models", "/nowhere")[number % 4 // 2])
        )
        answer = await client.read_answer()
        assert answer.status == (200 if number % 4 != 2 else 404)
        ids.add(answer.headers["x-request-id"])
    assert len(ids) == 100
    assert len(proxy.server._connections) == 1
    assert len(proxy.records) == 50


# Versions, targets, headers


@both_handlers
@pytest.mark.parametrize(
    ("version", "connection", "stays_open"),
    [
        pytest.param("1.0", None, False, id="1.0 closes"),
        pytest.param("1.0", "keep-alive", True, id="1.0 keeps if asked"),
        pytest.param("1.1", None, True, id="1.1 keeps"),
        pytest.param("1.1", "close", False, id="1.1 closes if asked"),
        pytest.param("1.1", "Keep-Alive, Close", False, id="1.1 close wins"),
    ],
)
async def test_the_connection_lives_as_version_and_header_say(
    proxy: Proxy, request_to: str, version: str, connection: str | None, stays_open: bool
) -> None:
    headers = [f"connection: {connection}"] if connection else []
    request = (
        chat(proxy.key, QUESTION, *headers, version=version)
        if request_to == "chat"
        else get("/v1/models", *headers, version=version)
    )
    client = await proxy.connect()
    client.send(request)
    answer = await client.read_answer()
    assert answer.status == 200
    assert "content-length" in answer.headers
    if stays_open:
        assert answer.headers.get("connection") == ("keep-alive" if version == "1.0" else None)
        assert await client.is_open()
    else:
        assert answer.headers["connection"] == "close"
        assert await client.read_rest() == b""


async def test_a_stream_to_http_1_0_has_no_chunks_and_ends_with_the_connection(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    events = stream_events(3, model="test/model", usage=None)
    upstream.add(sse(*events))
    client = await proxy.connect()
    client.send(chat(proxy.key, STREAMED, "connection: keep-alive", version="1.0"))
    answer = await client.read_answer()
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert answer.body == b"".join(events)


@pytest.mark.parametrize("host", ["localhost", "other.example:81", "[::1]:8080"])
async def test_an_absolute_target_is_its_path(proxy: Proxy, host: str) -> None:
    client = await proxy.connect()
    client.send(chat(proxy.key, path=f"http://{host}/v1/chat/completions?x=y"))
    assert (await client.read_answer()).status == 200
    client.send(get(f"HTTP://{host}/v1/models/test%2Fmodel"))
    assert (await client.read_answer()).json()["id"] == "test/model"


@pytest.mark.parametrize(
    "path",
    [
        "/v1//chat/completions",
        "//v1/chat/completions",
        "/v1/chat/completions/",
        "//chat//completions//",
        "/api/v1/chat/completions/",
        "/%76%31/chat/completions",
        "/v1/ch%61t/completion%73",
        "/v1/chat/completions?api-version=2024-10-21",
        "/v1/chat/completions/?x=//y",
        "http://other.example//v1/chat/completions/",
    ],
)
async def test_slashes_and_escapes_too_many_are_forgiven_of_a_chat_path(
    proxy: Proxy, path: str
) -> None:
    client = await proxy.connect()
    for _ in range(2):
        client.send(chat(proxy.key, path=path))
        assert (await client.read_answer()).status == 200
    assert {record.path for record in proxy.records} <= {
        "/v1/chat/completions",
        "/chat/completions",
        "/api/v1/chat/completions",
    }
    client.send(get(path))
    assert_method_refused(await client.read_answer(), "POST")


@pytest.mark.parametrize(
    ("path", "id"),
    [
        ("//v1/models", None),
        ("/v1/models/", None),
        ("/models/?x=y", None),
        ("/v1/%6dodels", None),
        ("/v1//models/test/model", SLUG),
        ("/v1/models//test//model/", SLUG),
        ("/v1/models/test%2Fmodel/", SLUG),
        ("/%76%31/models/t%65st/model", SLUG),
    ],
)
async def test_slashes_and_escapes_too_many_are_forgiven_elsewhere_too(
    proxy: Proxy, path: str, id: str | None
) -> None:
    client = await proxy.connect()
    client.send(get(path))
    answer = await client.read_answer()
    assert (answer.status, answer.json().get("id")) == (200, id)


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/v1/chat/completions", "set the base URL to this proxy's address without /v1"),
        ("//v1//v1/models", "without /v1"),
        ("/v1/v1", "without /v1"),
        ("/api/v1/v1/chat/completions", "without /v1"),
        ("/v1/api/v1/chat/completions", "without /v1"),
        ("/v1/chat/completions/chat/completions", "end the base URL with /v1"),
        ("/v1/chat/completions/models", "end the base URL with /v1"),
        ("/v1/chat%2Fcompletions", "no such path: /v1/chat%2Fcompletions; this proxy serves"),
        ("/v1/chat/completions%20", "no such path: /v1/chat/completions%20; this proxy serves"),
        ("/v1/chat/completions;x", "no such path: /v1/chat/completions;x; this proxy serves"),
        ("/v1/./chat/completions", "no such path"),
        ("/V1/chat/completions", "no such path: /V1/chat/completions; this proxy serves"),
        ("/v1/" + "x" * 20_000, "no such path: /v1/xxx"),
    ],
)
async def test_a_path_that_does_not_exist_is_named_as_it_came(
    proxy: Proxy, method: str, path: str, words: str
) -> None:
    client = await proxy.connect()
    client.send(get(path, "content-length: 0", method=method))
    answer = await client.read_answer()
    message = answer.json()["error"]["message"]
    assert answer.status == 404
    assert words in message
    assert len(message) < 500
    assert await client.is_open()


@both_handlers
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(("upgrade: websocket", "connection: Upgrade"), id="upgrade to websocket"),
        pytest.param(("upgrade: h2c", "connection: upgrade, http2-settings"), id="upgrade to h2c"),
        pytest.param(("sec-websocket-key1: x",), id="a field that aiohttp refuses"),
        pytest.param(("x-title: é",), id="latin-1 in a value"),
        pytest.param((f"x-long: {'v' * 20_000}",), id="a long value"),
        pytest.param((f"{'n' * 20_000}: v",), id="a long name"),
        pytest.param(tuple(f"x{n}: y" for n in range(90)), id="ninety more fields"),
        pytest.param(("X-EMPTY:", "cOOKIE:"), id="odd case and empty values"),
        pytest.param(("x:\t y\tz \t",), id="white space around a value"),
    ],
)
async def test_harmless_fields_make_no_difference(
    proxy: Proxy, request_to: str, headers: tuple[str, ...]
) -> None:
    client = await proxy.connect()
    client.send(
        chat(proxy.key, QUESTION, *headers) if request_to == "chat" else get("/v1/models", *headers)
    )
    answer = await client.read_answer()
    assert answer.status == 200
    assert await client.is_open()


@both_handlers
async def test_names_of_fields_come_in_any_case(proxy: Proxy, request_to: str) -> None:
    request = chat(proxy.key) if request_to == "chat" else get("/v1/models", "connection: close")
    head, empty_line, body = request.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    fields = [name.upper() + b":" + value for name, _, value in (f.partition(b":") for f in fields)]
    client = await proxy.connect()
    client.send(b"\r\n".join([line, *fields]) + empty_line + body)
    assert (await client.read_answer()).status == 200


@both_handlers
async def test_one_empty_line_before_a_request_is_skipped(proxy: Proxy, request_to: str) -> None:
    request = chat(proxy.key) if request_to == "chat" else get()
    client = await proxy.connect()
    client.send(request, b"\r\n", request)
    assert (await client.read_answer()).status == 200
    assert (await client.read_answer()).status == 200


@pytest.mark.parametrize(
    "method", ["FOO", "get", "post", "CONNECT", "PRI", "M-SEARCH", "!", "A" * 100]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
async def test_unknown_methods_are_refused_in_our_form(
    proxy: Proxy, method: str, path: str
) -> None:
    client = await proxy.connect()
    client.send(get(path, method=method))
    answer = await client.read_answer()
    assert_refused(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


TARGETS = (
    *(
        "/",
        "//evil/x",
        "/%zz",
        "/[x]",
        '/a"b',
        "/\\",
        "/.",
        "/@",
        "/:80",
        "/;x",
        "/{}|^`",
        "/?x=%ff",
    ),
    *("/v1/models/%00", "/v1/models/%ff", "http://x?y", "http://x:99999/y", "/" + "a" * 20_000),
)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target[:20])
async def test_any_target_that_passes_the_check_gets_an_answer_in_our_form(
    proxy: Proxy, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await proxy.connect()
    client.send(get(target))
    answer = await client.read_answer()
    assert answer.status == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.body) < 1000
    assert await client.is_open()
    assert not caplog.records


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/nowhere", "/healthz"])
async def test_no_answer_names_the_server_software(proxy: Proxy, path: str) -> None:
    client = await proxy.connect()
    client.send(chat(proxy.key, path=path) if "chat" in path else get(path))
    assert "server" not in (await client.read_answer()).headers


async def test_every_answer_has_a_request_id_of_its_own(proxy: Proxy) -> None:
    client = await proxy.connect()
    requests = [
        chat(proxy.key),
        chat("wrong"),
        chat(proxy.key, b"{"),
        get("/v1/models"),
        get("/nowhere"),
        get("/v1/models", method="DELETE"),
        get("/healthz", method="OPTIONS"),
        get("/healthz", method="HEAD"),
        b"nonsense\r\n\r\n",
    ]
    ids = []
    for request in requests:
        client.send(request)
        answer = await client.read_answer(request.split(b" ")[0].decode())
        ids.append(answer.headers["x-request-id"])
    assert len(set(ids)) == len(requests)
    assert {record.id for record in proxy.records} == set(ids[:3])


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        pytest.param(
            chat("wrong", path="/api/v1/chat/completions"), 401, "invalid_api_key", id="key"
        ),
        pytest.param(get("/api/v1/models/x"), 404, "model_not_found", id="model"),
        pytest.param(get("/api/v1/nowhere"), 404, "not_found", id="path"),
        pytest.param(get("/api/v1/models", method="PUT"), 405, "method_not_allowed", id="method"),
    ],
)
async def test_errors_under_api_v1_have_the_status_as_code(
    proxy: Proxy, request_: bytes, status: int, code: str
) -> None:
    client = await proxy.connect()
    client.send(request_)
    error = (await client.read_answer()).json()["error"]
    assert (error["code"], error["metadata"]["code"]) == (status, code)


# Shapes that two parsers could read in two ways


BAD_HEADS = {
    "length and chunked": b"content-length: 3\r\ntransfer-encoding: chunked\r\n",
    "chunked and length": b"transfer-encoding: chunked\r\ncontent-length: 3\r\n",
    "two lengths": b"content-length: 3\r\ncontent-length: 4\r\n",
    "two equal lengths": b"content-length: 3\r\ncontent-length: 3\r\n",
    "a list of lengths": b"content-length: 3, 3\r\n",
    "a signed length": b"content-length: +3\r\n",
    "a length in hex": b"content-length: 0x3\r\n",
    "an empty length": b"content-length:\r\n",
    "gzip, chunked": b"transfer-encoding: gzip, chunked\r\n",
    "chunked twice": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
    "identity": b"transfer-encoding: identity\r\n",
    "chunked in quotes": b'transfer-encoding: "chunked"\r\n',
    "vertical tab before chunked": b"transfer-encoding: \x0bchunked\r\n",
    "a folded line": b"x: a\r\n b\r\n",
    "a folded coding": b"transfer-encoding:\r\n chunked\r\n",
    "a bare LF": b"x: a\ncontent-length: 3\r\n",
    "a bare CR": b"x: a\rcontent-length: 3\r\n",
    "space before the colon": b"content-length : 3\r\n",
    "tab before the colon": b"transfer-encoding\t: chunked\r\n",
    "no colon": b"content-length\r\n",
    "no name": b": 3\r\n",
    "NUL in a value": b"x: \x00\r\n",
    "two hosts": b"host: other\r\n",
}


@both_handlers
@pytest.mark.parametrize("fields", BAD_HEADS.values(), ids=BAD_HEADS)
async def test_an_ambiguous_head_is_answered_400_and_goes_nowhere(
    proxy: Proxy,
    upstream: ScriptedUpstream,
    request_to: str,
    fields: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "Handler", None)  # nothing may come to aiohttp
    first_line = b"POST /v1/chat/completions" if request_to == "chat" else b"GET /v1/models"
    head = first_line + b" HTTP/1.1\r\nhost: localhost\r\n" + fields
    head += b"authorization: Bearer %b\r\n\r\n" % proxy.key.encode()
    client = await proxy.connect()
    client.send(head + b"abc" + get("/smuggled"))
    assert_refused(await client.read_answer())
    assert await client.read_rest() == b""
    assert upstream.requests == []
    assert proxy.context.bad_heads == 1


@both_handlers
async def test_a_transfer_coding_in_http_1_0_is_refused(proxy: Proxy, request_to: str) -> None:
    framing = "transfer-encoding: chunked"
    request = request_bytes(request_to, proxy.key, body=chunked(BODY), framing=framing)
    client = await proxy.connect()
    client.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert_refused(await client.read_answer())


@pytest.mark.parametrize(
    ("head", "status"),
    [
        pytest.param(b"GET /healthz HTTP/1.1\nhost: x\n\n", 400, id="all lines end in bare LF"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nhost: x\n\n", 400, id="the last two lines do"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nhost: x\n\r\n", 400, id="the last but one does"),
        pytest.param(b"GET /healthz HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(b"\r\n\r\n", 400, id="two empty lines"),
        pytest.param(b"GET  /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 400, id="two spaces"),
        pytest.param(b"GET /healthz\r\n\r\n", 400, id="HTTP/0.9"),
        pytest.param(b"GET /healthz HTTP/3.0\r\nhost: x\r\n\r\n", 505, id="HTTP/3.0"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, id="the preface of HTTP/2"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="TLS"),
        pytest.param(b"GET /" + b"x" * MAX_REQUEST_HEAD_BYTES, 431, id="a head without an end"),
    ],
)
async def test_what_is_no_request_is_refused_without_waiting_for_more(
    proxy: Proxy, head: bytes, status: int
) -> None:
    client = await proxy.connect()
    client.send(head)
    assert_refused(await client.read_answer(), status)
    assert await client.read_rest() == b""


@pytest.mark.parametrize(
    ("path", "code"),
    [
        pytest.param(b"/api/v1/chat/completions", 400, id="OpenRouter's"),
        pytest.param(b"/v1/chat/completions", "invalid_request", id="OpenAI's"),
    ],
)
@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b" HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b" HTTP/1.1\nhost: x\n\n", id="bare LF"),
        pytest.param(b" HTTP/1.1\r\nhost: x\r\nx y: z\r\n\r\n", id="a wrong name"),
    ],
)
async def test_a_bad_head_is_refused_in_the_form_of_its_path(
    proxy: Proxy, path: bytes, code: object, rest: bytes
) -> None:
    client = await proxy.connect()
    client.send(b"POST " + path + rest)
    answer = await client.read_answer()
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, code)


BAD_CHUNKS = {
    "size with a sign": b"+3\r\nabc\r\n0\r\n\r\n",
    "size with 0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "size with a space before": b" 3\r\nabc\r\n0\r\n\r\n",
    "size with an underscore": b"0_3\r\nabc\r\n0\r\n\r\n",
    "no size": b"\r\nabc\r\n0\r\n\r\n",
    "size too large": b"fffffffffffffffff\r\nabc",
    "negative size": b"-1\r\nabc\r\n",
    "size line ends in bare LF": b"3\nabc\r\n0\r\n\r\n",
    "bare LF in an extension": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "bare CR in an extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "data longer than its size": b"3\r\nabcdef\r\n0\r\n\r\n",
    "data ends in bare LF": b"3\r\nabc\n0\r\n\r\n",
    "folded trailer": b"3\r\nabc\r\n0\r\nx: a\r\n b\r\n\r\n",
    "trailer with bare LF": b"3\r\nabc\r\n0\r\nx: a\nb\r\n\r\n",
}


@both_handlers
@pytest.mark.parametrize("in_pieces", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
async def test_a_body_that_breaks_its_framing_ends_the_connection(
    proxy: Proxy,
    upstream: ScriptedUpstream,
    request_to: str,
    in_pieces: bool,
    body: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = request_bytes(request_to, proxy.key, framing="transfer-encoding: chunked")
    body += get("/smuggled")
    client = await proxy.connect()
    if in_pieces and request_to == "chat":
        await client.send_each([head, *(body[at : at + 1] for at in range(len(body)))])
    else:
        client.send(head + body)
    assert_refused(await client.read_answer())
    assert await client.read_rest() == b""
    assert upstream.requests == []
    assert not caplog.records


async def test_a_broken_body_after_the_other_door_has_answered_cuts_the_connection(
    proxy: Proxy,
) -> None:
    client = await proxy.connect()
    client.send(get("/v1/models", "transfer-encoding: chunked"))
    assert (await client.read_answer()).status == 200
    client.send(b"nonsense\r\n" + get("/smuggled"))
    assert await client.read_rest() == b""


# Time limits


@both_loops
@pytest.mark.parametrize("sent", [b"G", b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"\r\n"])
async def test_a_slow_head_is_cut(start_proxy: StartProxy, sent: bytes) -> None:
    proxy = await start_proxy(head_timeout=0.1)
    client = await proxy.connect()
    client.send(sent)
    assert await client.read_rest() == b""


async def test_a_head_cannot_be_kept_alive_by_a_byte_now_and_then(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(head_timeout=0.2)
    client = await proxy.connect()
    with pytest.raises(ConnectionError):
        for byte in b"GET /" + b"x" * 1000:
            await asyncio.sleep(0.03)
            await client.drain(bytes([byte]))


@both_loops
async def test_a_body_that_stops_coming_is_answered_408(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(body_timeout=0.1)
    client = await proxy.connect()
    client.send(chat(proxy.key)[:-5])
    assert_refused(await client.read_answer(), 408, "request_timeout")
    assert await client.read_rest() == b""
    (record,) = proxy.records
    assert (record.status, record.code) == (408, "request_timeout")


async def test_a_body_cannot_be_kept_coming_by_a_byte_now_and_then(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(body_timeout=0.2)
    client = await proxy.connect()
    request = chat(proxy.key, json.dumps({"pad": "x" * 1000}).encode())
    client.send(request[:-1000])
    answer = asyncio.create_task(client.read_answer())
    for position in range(len(request) - 1000, len(request)):
        if answer.done():
            break
        client.send(request[position : position + 1])
        await asyncio.sleep(0.02)
    assert_refused(await answer, 408, "request_timeout")


async def test_an_idle_connection_is_closed_without_a_word(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(keepalive_timeout=0.1)
    fresh, used = await proxy.connect(), await proxy.connect()
    used.send(get("/healthz"))
    assert (await used.read_answer()).status == 200
    assert await fresh.read_rest() == b""
    assert await used.read_rest() == b""


async def test_the_limits_of_reading_stand_still_while_an_answer_is_under_way(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(head_timeout=0.05, body_timeout=0.05, keepalive_timeout=0.05)
    upstream.add([AwaitRelease("answer"), *json_response(200, completion())])
    client = await proxy.connect()
    client.send(chat(proxy.key))
    await asyncio.sleep(0.25)
    upstream.release("answer")
    assert (await client.read_answer()).status == 200


# Sizes


@both_loops
async def test_a_length_over_the_limit_is_refused_while_the_client_goes_on_sending(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(max_body_bytes=1024)
    client = await proxy.connect()
    client.send(chat(proxy.key, b"", framing="content-length: 20000000"))
    await client.flood(8 * 1024 * 1024)
    assert_refused(await client.read_answer(), 413, "body_too_large")
    assert await client.read_rest() == b""
    assert upstream.requests == []
    assert [record.status for record in proxy.records] == [413]


@both_loops
async def test_a_chunked_body_over_the_limit_is_refused_as_soon_as_it_is(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(max_body_bytes=1024)
    client = await proxy.connect()
    client.send(chunked_chat(proxy.key, b"ffffff\r\n" + b"x" * 2000))
    assert_refused(await client.read_answer(), 413, "body_too_large")


async def test_a_body_of_exactly_the_limit_passes(start_proxy: StartProxy) -> None:
    body = BODY + b" " * (1024 - len(BODY))
    proxy = await start_proxy(max_body_bytes=1024)
    client = await proxy.connect()
    client.send(chat(proxy.key, body))
    assert (await client.read_answer()).status == 200
    client.send(chat(proxy.key, body + b" "))
    assert (await client.read_answer()).status == 413


@pytest.mark.parametrize("limit", [1024, 10_000_000], ids=["over the limit", "under the limit"])
async def test_a_bad_head_is_answered_though_the_client_goes_on_sending(
    start_proxy: StartProxy, limit: int
) -> None:
    proxy = await start_proxy(max_body_bytes=limit)
    client = await proxy.connect()
    client.send(chat(proxy.key, b"", "content-length: 9000000", framing="content-length: 9000000"))
    await client.flood(8 * 1024 * 1024)
    assert_refused(await client.read_answer())


async def test_who_floods_a_refused_connection_is_cut(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "LINGER_MAX_BYTES", 256 * 1024)
    client = await proxy.connect()
    client.send(b"nonsense\r\n\r\n")
    with pytest.raises(ConnectionError):
        await client.flood(64 * 1024 * 1024)


async def test_a_refused_connection_does_not_linger_for_ever(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "LINGER", 0.1)
    client = await proxy.connect()
    client.send(b"nonsense\r\n\r\n")
    assert_refused(await client.read_answer())
    await wait_until(lambda: not proxy.server._connections)  # although the client stays


# Who is refused by the head alone


async def test_a_wrong_key_with_its_whole_body_keeps_the_connection(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    for request in (
        chat("hb_live_wrong"),
        chunked_chat("hb_live_wrong", chunked(BODY)),
        chat("hb_live_wrong", b"", framing="x: y"),
    ):
        client.send(request + get("/healthz"))
        answer = await client.read_answer()
        assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "connection" not in answer.headers
        assert (await client.read_answer()).status == 200
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    assert len(upstream.requests) == 1


REFUSED_AT_HEAD = {
    "a wrong key": ("hb_live_wrong", (), 401, "invalid_api_key"),
    "no key": (None, (), 401, "invalid_api_key"),
    "a coding": ("right", ("content-encoding: gzip",), 415, "unsupported_media_type"),
}
INCOMPLETE = {
    "nothing of a length": ("content-length: 5000000", b""),
    "a part of a length": ("content-length: 5000", b'{"model": '),
    "nothing of chunks": ("transfer-encoding: chunked", b""),
    "a part of chunks": ("transfer-encoding: chunked", b'a\r\n{"model": '),
    "no chunk": ("transfer-encoding: chunked", b"zz\r\n"),
}


@both_loops
@pytest.mark.parametrize("refused", REFUSED_AT_HEAD.values(), ids=REFUSED_AT_HEAD)
@pytest.mark.parametrize("framing, part", INCOMPLETE.values(), ids=INCOMPLETE)
async def test_who_is_refused_by_the_head_is_not_waited_for(
    proxy: Proxy,
    upstream: ScriptedUpstream,
    refused: tuple[str | None, tuple[str, ...], int, str],
    framing: str,
    part: bytes,
) -> None:
    key, headers, status, code = refused
    request = chat(proxy.key if key == "right" else str(key), b"", *headers, framing=framing)
    if key is None:
        request = request.replace(b"authorization: Bearer None\r\n", b"")
    client = await proxy.connect()
    client.send(request + part)
    assert_refused(await client.read_answer(), status, code)
    assert not proxy.context.exchanges
    assert connection_of(proxy)._pieces == []
    assert await client.read_rest() == b""
    (record,) = proxy.records
    assert (record.status, record.code) == (status, code)
    assert upstream.requests == []


async def test_a_local_request_that_is_refused_is_not_waited_for(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(keys_required=False)
    for request, status in (
        (chat("", b"", framing="content-length: 5000").replace(b"/json", b"/x"), 415),
        (chat("", b"", framing="content-length: 5000").replace(b"localhost", b"evil.test"), 403),
    ):
        client = await proxy.connect()
        client.send(request)
        answer = await client.read_answer()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert not proxy.context.exchanges
    assert len(proxy.records) == 2


async def test_a_request_that_comes_while_draining_is_not_waited_for(proxy: Proxy) -> None:
    client = await proxy.connect()
    assert await client.is_open()
    proxy.context.is_draining = proxy.context.is_stopping = True
    client.send(chat(proxy.key, b"", framing="content-length: 5000"))
    assert_refused(await client.read_answer(), 503, "draining")


async def test_a_stranger_that_goes_on_sending_reads_its_refusal(proxy: Proxy) -> None:
    client = await proxy.connect()
    client.send(chat("hb_live_wrong", b"", framing="content-length: 20000000"))
    await client.flood(8 * 1024 * 1024)
    assert_refused(await client.read_answer(), 401, "invalid_api_key")
    assert len(proxy.records) == 1


@both_handlers
async def test_a_stranger_with_an_endless_body_is_gone_after_a_bounded_time(
    start_proxy: StartProxy, request_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "LINGER", 0.1)
    monkeypatch.setattr(server, "LINGER", 0.1)
    proxy = await start_proxy()
    client = await proxy.connect()
    client.send(request_bytes(request_to, "hb_live_wrong", framing="transfer-encoding: chunked"))
    answer = await client.read_answer()
    assert (answer.status, answer.headers.get("connection")) == (
        (401, "close") if request_to == "chat" else (200, None)
    )
    await wait_until(lambda: not proxy.server._connections)  # although the client stays
    assert not proxy.context.exchanges


# More connections than files


async def test_connections_that_wait_longest_make_room_for_new_ones(
    proxy: Proxy, upstream: ScriptedUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.add([sse_head(), Stall()])
    proxy.context.room.limit = 6
    running = await proxy.connect()
    running.send(chat(proxy.key, STREAMED))
    await upstream.wait_for_requests(1)
    clients: list[RawClient] = []
    for number in range(5):
        clients.append(await proxy.connect())
        if number == 1:
            clients[1].send(b"GET /v1/mo")  # a part of a head is no request either
        await wait_until(lambda number=number: len(proxy.server._connections) == number + 2)  # type: ignore[misc]
        await asyncio.sleep(2 * proxy.context.wheel.tick)  # by which the waits are distinguished
    new = await proxy.connect()
    assert await clients[0].read_rest() == b""
    assert await new.is_open()
    newer = await proxy.connect()
    assert await clients[1].read_rest() == b""
    assert all([await client.is_open() for client in (*clients[2:], new, newer)])
    assert len(proxy.context.exchanges) == 1
    assert caplog.text.count("closed 1 waiting connections") == 1  # and no more for a while


async def test_a_burst_of_connections_that_say_nothing_leaves_room(proxy: Proxy) -> None:
    proxy.context.room.limit = 20
    most = 0
    for _ in range(100):
        await proxy.connect()
        most = max(most, len(proxy.server._connections))
    client = await proxy.connect()
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    assert most <= 21


async def test_where_all_connections_are_busy_a_new_one_is_refused(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([Stall()])
    proxy.context.room.limit = 1
    running = await proxy.connect()
    running.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    late = await proxy.connect()
    answer = await late.read_answer()
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert answer.json()["error"]["code"] == "overloaded"
    assert await late.read_rest() == b""
    assert proxy.context.refused_connections == 1
    assert len(proxy.context.exchanges) == 1


# A client that leaves


@both_loops
@pytest.mark.parametrize("leave", [RawClient.send_eof, RawClient.aclose], ids=["half", "whole"])
async def test_a_client_that_closes_its_side_has_left(
    proxy: Proxy, upstream: ScriptedUpstream, leave: Callable[[RawClient], Any]
) -> None:
    upstream.add([sse_head(), Stall()])
    client = await proxy.connect()
    client.send(chat(proxy.key, STREAMED))
    await upstream.wait_for_requests(1)
    if (left := leave(client)) is not None:
        await left
    await upstream.wait_for_hangup()
    (record,) = await proxy.wait_for_records(1)
    assert (record.status, record.code) == (499, "client_closed")
    await wait_until(lambda: not proxy.server._connections)


@pytest.mark.parametrize("cut", [20, 250], ids=["in the head", "in the body"])
async def test_a_client_that_leaves_before_its_request_is_whole_costs_nothing(
    proxy: Proxy, upstream: ScriptedUpstream, cut: int
) -> None:
    client = await proxy.connect()
    client.send(chat(proxy.key)[:cut])
    await wait_until(lambda: len(proxy.server._connections) == 1)
    client.send_eof()
    assert await client.read_rest() == b""
    await wait_until(lambda: not proxy.server._connections)
    assert not proxy.context.exchanges
    assert upstream.requests == []


async def test_a_client_that_leaves_the_other_door_is_forgotten(proxy: Proxy) -> None:
    client = await proxy.connect()
    client.send(get("/v1/models", "content-length: 10"))
    await wait_until(lambda: len(proxy.server._connections) == 1)
    await client.aclose()
    await wait_until(lambda: not proxy.server._connections)


# Every chat request ends in one record


async def test_every_chat_request_ends_in_one_record_and_nothing_else_does(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(max_body_bytes=1024, body_timeout=0.1)
    upstream.add(json_response(200, completion()), json_response(500, {}), [Stall()])
    requests: list[tuple[bytes, int]] = [
        (chat(proxy.key), 200),
        (chat(proxy.key), 502),
        (chat(proxy.key), 499),
        (chat("wrong"), 401),
        (chat(proxy.key, b"{"), 400),
        (chat(proxy.key, {**QUESTION, "model": "unknown"}), 404),
        (chat(proxy.key, QUESTION, "content-encoding: gzip"), 415),
        (chat(proxy.key, b"x" * 2000), 413),
        (chat(proxy.key)[:-1], 408),
        (chunked_chat(proxy.key, b"z\r\n"), 400),
    ]
    for number, (request, status) in enumerate(requests):
        client = await proxy.connect()
        client.send(get("/v1/models") + request)
        assert (await client.read_answer()).status == 200
        if status == 499:
            await upstream.wait_for_requests(3)
            await client.aclose()
        else:
            answer = await client.read_answer()
            assert answer.status == status
        record = (await proxy.wait_for_records(number + 1))[number]
        assert record.status == status
        assert record.is_failure is (status not in (200, 499))
        assert (record.key_id == "") is (status == 401), "whose key it was stands in all others"
    assert len({record.id for record in proxy.records}) == len(requests)
    assert not proxy.context.exchanges


# Sockets


def no_delay(stand_in: Any) -> int:
    return int(stand_in.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


@both_loops
async def test_no_segment_waits_for_another_on_either_leg(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    downstream = connection_of(proxy)._transport
    (kept,) = proxy.context.upstreams["scripted"].pool._idle
    assert downstream is not None
    assert kept._transport is not None
    assert no_delay(downstream.get_extra_info("socket"))
    assert no_delay(kept._transport.get_extra_info("socket"))


@both_loops
async def test_what_the_system_holds_of_an_unread_stream_is_bounded_on_either_leg(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    client = await proxy.connect()
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    downstream = connection_of(proxy)._transport
    (kept,) = proxy.context.upstreams["scripted"].pool._idle
    assert downstream is not None
    assert kept._transport is not None
    unsent = downstream.get_extra_info("socket")
    unread = kept._transport.get_extra_info("socket")
    assert unsent.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT_BYTES
    # Linux doubles the size it is given, and keeps to its own maximum.
    assert unread.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) <= 2 * UNREAD_BYTES


async def test_reading_the_client_goes_on_while_it_reads_nothing_itself(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    events = (b"data: " + b"x" * 65536 + b"\n\n" for _ in range(2000))
    first = Send(serialize_head(200, [("content-type", "text/event-stream")]))
    upstream.add([first, *(Send(event) for event in stream_events(1)[:2]), SendMany(events)])
    client = await proxy.connect(limit=1024)
    client.send(chat(proxy.key, STREAMED))
    await wait_until(lambda: any(c.is_paused for c in proxy.server._connections))
    connection = connection_of(proxy)
    assert connection._state is State.ANSWERING
    assert connection._transport is not None
    assert connection._transport.is_reading()
    await client.aclose()  # and so its leaving is seen
    await upstream.wait_for_hangup()
    (record,) = await proxy.wait_for_records(1)
    assert record.status == 499


async def test_nothing_of_a_request_shows_in_the_log_at_its_finest(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hoberproxy")
    client = await proxy.connect()
    for request in (
        chat(proxy.key),
        chat(proxy.key + "x"),
        get("/x", "authorization: " + "s" * 9000),
    ):
        client.send(request)
        await client.read_answer()
    client.send(b"secret secret\r\n\r\n")
    await client.read_answer()
    assert proxy.key not in caplog.text
    assert "secret" not in caplog.text
    assert "ssss" not in caplog.text


class SocketTransport(FakeTransport):
    """As much of a transport as a connection asks for; what is written to it goes nowhere."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._extra = {"socket": sock, "peername": ("127.0.0.1", 1)}

    def get_extra_info(self, name: str) -> Any:
        return self._extra[name]


async def test_nothing_is_written_to_a_lost_connections_socket_whose_number_may_be_anothers(
    proxy: Proxy,
) -> None:
    await proxy.connect()
    await wait_until(lambda: len(proxy.server._connections) == 1)
    other = connection_of(proxy)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport: Any = SocketTransport(ours)
        connection = DownstreamConnection(other._context, other._begin, other._handlers, set())
        connection.connection_made(transport)
        sink = connection._sink
        assert sink is not None
        sink.write(b"in time")
        assert theirs.recv(100) == b"in time"
        connection.connection_lost(None)
        sink.write(b"late")
        assert transport.writes == [b"late"]
        assert connection._sink is None
