"""Which pages and names may talk to the proxy: CORS fields, and the rules of a run without keys."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from hoberproxy.downstream.cors import check_local_request, cors_headers, is_local_host
from hoberproxy.errors import AccessError, RequestError
from hoberproxy.protocol.http_head import parse_request_head
from tests.conftest import QUESTION, StartProxy, chat, get
from tests.support.scripted import ScriptedUpstream, sse, stream_events

STREAMED = {**QUESTION, "stream": True}
CHUNKED = "transfer-encoding: chunked"


@pytest.mark.parametrize(
    ("allowed", "origin", "is_allowed"),
    [
        pytest.param((), b"https://a.example", False, id="none named"),
        pytest.param(("https://a.example",), None, False, id="no page asks"),
        pytest.param(("https://a.example",), b"https://a.example", True, id="named"),
        pytest.param(("https://a.example",), b"http://a.example", False, id="another scheme"),
        pytest.param(("https://a.example",), b"https://a.example:8443", False, id="another port"),
        pytest.param(("https://a.example",), b"https://a.example.evil", False, id="longer name"),
        pytest.param(("https://a.example",), b"null", False, id="a sandboxed page"),
        pytest.param(("*",), b"https://b.example", True, id="all"),
        pytest.param(("https://a.example",), b"\xff", False, id="not even text"),
    ],
)
def test_cors_fields_are_for_named_origins_only(
    allowed: tuple[str, ...], origin: bytes | None, is_allowed: bool
) -> None:
    fields = dict(cors_headers(allowed, origin))
    assert fields.get(b"access-control-allow-origin") == (origin if is_allowed else None)
    # A cache must not hand one page's answer to another.
    assert fields.get(b"vary") == (b"Origin" if is_allowed else None)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8080",
        "localhost",
        "LocalHost:8080",
        "localhost.:80",
        "[::1]",
        "[::1]:8080",
        "192.168.1.5:8080",
        pytest.param(socket.gethostname(), id="this machine's name"),
    ],
)
def test_addresses_and_names_of_this_machine_are_local(host: str) -> None:
    assert is_local_host(host.encode())


@pytest.mark.parametrize(
    "host",
    [
        None,
        b"",
        b"evil.example",
        b"evil.example:8080",
        b"localhost.evil.example",
        b"127.0.0.1.evil.example",
        b"localhost@evil.example",
        b"[evil]",
        b"1.2.3",
        b":8080",
        b"\xff",
    ],
)
def test_names_that_someone_else_can_point_here_are_not_local(host: bytes | None) -> None:
    assert not is_local_host(host)


def local_request(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in ("POST / HTTP/1.1", *lines, "")).encode()


@pytest.mark.parametrize(
    "media_type", ["application/json", "Application/JSON; charset=utf-8", "application/json ;x=y"]
)
def test_json_to_a_local_name_passes(media_type: str) -> None:
    request = local_request("host: localhost:8080", f"content-type: {media_type}")
    check_local_request(parse_request_head(request))


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param((), id="no type"),
        # What a page may send to another origin without asking (the Fetch standard's safelist).
        pytest.param(("content-type: text/plain",), id="text/plain"),
        pytest.param(("content-type: application/x-www-form-urlencoded",), id="a form"),
        pytest.param(("content-type: multipart/form-data",), id="a form with files"),
        pytest.param(("content-type: text/plain; x=application/json",), id="JSON as a parameter"),
        pytest.param(("content-type: application/ld+json",), id="another JSON"),
    ],
)
def test_what_a_page_could_send_unasked_is_refused(lines: tuple[str, ...]) -> None:
    head = parse_request_head(local_request("host: localhost", *lines))
    with pytest.raises(RequestError) as refused:
        check_local_request(head)
    assert (refused.value.status, refused.value.code) == (415, "unsupported_media_type")


def test_a_name_that_was_rebound_to_this_machine_is_refused() -> None:
    head = parse_request_head(local_request("host: evil.example", "content-type: application/json"))
    with pytest.raises(AccessError) as refused:
        check_local_request(head)
    assert refused.value.status == 403
    assert "evil" not in refused.value.message


async def test_a_proxy_without_keys_serves_local_json(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(keys_required=False)
    client = await proxy.connect()
    client.send(chat("hb_live_nonsense"))  # an SDK always sends some key
    assert (await client.read_answer()).status == 200
    assert proxy.records[0].key_label == "anonymous"


async def test_a_proxy_without_keys_refuses_a_page_before_any_upstream(
    start_proxy: StartProxy, upstream: object
) -> None:
    proxy = await start_proxy(keys_required=False)
    client = await proxy.connect()
    client.send(chat("").replace(b"application/json", b"text/plain"))
    assert (await client.read_answer()).status == 415
    client.send(chat("").replace(b"host: localhost", b"host: evil.example"))
    answer = await client.read_answer()
    assert (answer.status, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert upstream.requests == []  # type: ignore[attr-defined]


async def test_a_proxy_with_keys_may_be_called_by_any_name(start_proxy: StartProxy) -> None:
    proxy = await start_proxy()
    client = await proxy.connect()
    client.send(chat(proxy.key).replace(b"host: localhost", b"host: proxy.example"))
    assert (await client.read_answer()).status == 200
    client.send(get("/v1/models").replace(b"host: localhost", b"host: proxy.example"))
    assert (await client.read_answer()).status == 200


# What a page may read

ORIGIN = "https://page.example"
EXPOSED = {
    "x-request-id",
    "x-hober-provider",
    "x-hober-model",
    "x-hober-attempts",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
}


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        pytest.param(lambda key: chat(key, QUESTION, f"origin: {ORIGIN}"), 200, id="chat"),
        pytest.param(lambda key: chat(key, STREAMED, f"origin: {ORIGIN}"), 200, id="a stream"),
        pytest.param(lambda key: chat("x", QUESTION, f"origin: {ORIGIN}"), 401, id="no key"),
        pytest.param(
            lambda key: chat("x", b"", f"origin: {ORIGIN}", framing="content-length: 9"),
            401,
            id="no key and no body",
        ),
        pytest.param(lambda key: chat(key, b"{", f"origin: {ORIGIN}"), 400, id="a bad body"),
        pytest.param(
            lambda key: chat(key, b"z\r\n", f"origin: {ORIGIN}", framing=CHUNKED),
            400,
            id="a bad framing",
        ),
        pytest.param(lambda key: chat(key, b"x" * 2000, f"origin: {ORIGIN}"), 413, id="too large"),
        pytest.param(lambda key: get("/v1/models", f"origin: {ORIGIN}"), 200, id="models"),
        pytest.param(lambda key: get("/v1/key", f"origin: {ORIGIN}"), 401, id="the key's page"),
        pytest.param(lambda key: get("/nowhere", f"origin: {ORIGIN}"), 404, id="no path"),
        pytest.param(
            lambda key: get("/v1/chat/completions", f"origin: {ORIGIN}"), 405, id="no POST"
        ),
        pytest.param(
            lambda key: get("/v1/models", f"origin: {ORIGIN}", method="FOO"), 405, id="a method"
        ),
        pytest.param(
            lambda key: get("/v1/models", f"origin: {ORIGIN}", method="OPTIONS"), 204, id="OPTIONS"
        ),
    ],
)
async def test_every_answer_says_which_fields_a_page_may_read(
    start_proxy: StartProxy,
    upstream: ScriptedUpstream,
    request_of: Callable[[str], bytes],
    status: int,
) -> None:
    proxy = await start_proxy(cors_origins=(ORIGIN,), max_body_bytes=1024)
    if b'"stream": true' in request_of("x"):
        upstream.add(sse(*stream_events(1)))
    client = await proxy.connect()
    client.send(request_of(proxy.key))
    answer = await client.read_answer()
    assert answer.status == status
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    assert set(exposed) == EXPOSED and len(exposed) == len(EXPOSED)


async def test_nobody_else_reads_of_fields(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(cors_origins=(ORIGIN,))
    client = await proxy.connect()
    for request in (
        chat(proxy.key),
        chat(proxy.key, QUESTION, "origin: https://evil.example"),
        get("/v1/models", "origin: null"),
    ):
        client.send(request)
        answer = await client.read_answer()
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "origin", ["app://obsidian.md", "chrome-extension://abcdefghijklmnop", "vscode-webview://a-b_c"]
)
async def test_apps_and_extensions_may_ask_and_send_any_field_of_a_key(
    start_proxy: StartProxy, origin: str
) -> None:
    proxy = await start_proxy(cors_origins=(origin,))
    client = await proxy.connect()
    requested = "access-control-request-headers: x-api-key,api-key,authorization"
    client.send(get("/v1/chat/completions", f"origin: {origin}", requested, method="OPTIONS"))
    answer = await client.read_answer()
    assert answer.headers["access-control-allow-headers"] == "x-api-key,api-key,authorization"
    assert answer.headers["access-control-allow-origin"] == origin
