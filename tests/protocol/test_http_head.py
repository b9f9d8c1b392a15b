"""HTTP/1.1 heads on bytes: what is read, what is refused, what is written."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.protocol import http_head
from hoberproxy.protocol.http_head import (
    MAX_REQUEST_HEAD_BYTES,
    MAX_RESPONSE_HEAD_BYTES,
    FramingKind,
    HeadError,
    Headers,
    RequestHead,
    begin_response_head,
    check_response_head,
    find_head_end,
    parse_request_head,
    parse_response_head,
    serialize_request_head,
    skip_empty_line,
)

SDK_HEAD = (
    b"POST /v1/chat/completions?trace=1 HTTP/1.1\r\n"
    b"Host: 127.0.0.1:8080\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\n"
    b"Accept: application/json\r\n"
    b"Content-Type: application/json\r\n"
    b"User-Agent: OpenAI/Python 3.54.0\r\n"
    b"X-Stainless-Lang: python\r\n"
    b"X-Stainless-Package-Version: 3.54.0\r\n"
    b"X-Stainless-OS: Linux\r\n"
    b"X-Stainless-Arch: x64\r\n"
    b"X-Stainless-Runtime: CPython\r\n"
    b"X-Stainless-Runtime-Version: 3.11.7\r\n"
    b"Authorization: Bearer hb_test_secret\r\n"
    b"X-Stainless-Async: async:asyncio\r\n"
    b"x-stainless-retry-count: 0\r\n"
    b"Content-Length: 242\r\n"
    b"\r\n"
)

LLAMA_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
    b"X-Accel-Buffering: no\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"
)
LLAMA_EVENTS = [
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant",'
    b'"content":null}}],"created":1795391044,"id":"chatcmpl-1","model":"smollm2"}\n\n'
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"Hello"}}]}\n\n',
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" there"}}]}\n\n',
    b'data: {"choices":[{"finish_reason":"length","index":0,"delta":{}}],"timings":{}}\n\n',
    b"data: [DONE]\n\n",
]


def chunk(payload: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(payload), extension, payload)


LLAMA_BODY = b"".join(map(chunk, LLAMA_EVENTS)) + b"0\r\n\r\n"


def request(*lines: bytes, start: bytes = b"POST / HTTP/1.1", host: bool = True) -> bytes:
    return b"\r\n".join([start, *([b"Host: h"] if host else []), *lines, b"", b""])


def response(*lines: bytes, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([start, *lines, b"", b""])


# Request heads that are read


def test_an_sdk_head_is_read_in_full() -> None:
    head = parse_request_head(SDK_HEAD)
    assert (head.method, head.target) == (b"POST", b"/v1/chat/completions?trace=1")
    assert (head.path, head.query) == (b"/v1/chat/completions", b"trace=1")
    assert (head.kind, head.length, head.version_minor) == (FramingKind.LENGTH, 242, 1)
    assert head.keep_alive and not head.expects_continue
    assert len(head.headers) == 16
    assert head.headers[0] == (b"host", b"127.0.0.1:8080")
    assert head.get(b"x-stainless-async") == b"async:asyncio"
    assert head.get(b"cookie") is None


def test_the_same_head_reads_the_same_when_its_lines_are_known() -> None:
    assert parse_request_head(SDK_HEAD) == parse_request_head(SDK_HEAD)


def test_a_head_shows_no_secret_when_printed() -> None:
    head = parse_request_head(SDK_HEAD.replace(b"trace=1", b"api_key=hb_test_secret"))
    assert "secret" not in repr(head)
    assert "chat/completions" in repr(head)


def test_lines_with_secrets_are_not_kept_for_the_next_message() -> None:
    http_head._field_lines.clear()
    parse_request_head(request(b"Authorization: s3", b"X-Api-Key: s3", b"Cookie: s3", b"A: s3"))
    assert set(http_head._field_lines) == {b"Host: h", b"A: s3"}


def test_kept_lines_are_bounded_in_number_and_length() -> None:
    for number in range(3000):
        parse_request_head(request(b"X-Request-Id: %d" % number, b"X-Long: " + b"a" * 200))
    assert len(http_head._field_lines) <= http_head.MAX_KEPT_LINES
    assert max(map(len, http_head._field_lines)) <= http_head.MAX_KEPT_LINE_BYTES


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        pytest.param(b"/", b"/", b"", id="root"),
        pytest.param(b"/v1/models/a%2Fb", b"/v1/models/a%2Fb", b"", id="escapes stay raw"),
        pytest.param(b"/a?b?c", b"/a", b"b?c", id="second question mark is query"),
        pytest.param(b"//h/a?", b"/h/a", b"", id="two slashes are a path"),
        pytest.param(b"/v1//a///b", b"/v1/a/b", b"", id="doubled slashes are one"),
        pytest.param(b"/a/?b=//", b"/a", b"b=//", id="a slash at the end goes"),
        pytest.param(b"///", b"/", b"", id="slashes alone"),
        pytest.param(b"http://h//a/", b"/a", b"", id="absolute form with slashes"),
        pytest.param(b"/%76%31/%6dodel%73", b"/v1/models", b"", id="escaped letters"),
        pytest.param(b"/%2D%2e%5F%7e%30%39%41%7a", b"/-._~09Az", b"", id="all unreserved"),
        pytest.param(b"/%2f%25%41%3F%20%00%c3", b"/%2f%25A%3F%20%00%c3", b"", id="others stay"),
        pytest.param(b"/%2541", b"/%2541", b"", id="nothing is undone twice"),
        pytest.param(b"/a%2F/%2F", b"/a%2F/%2F", b"", id="an escaped slash is none"),
        pytest.param(b"/%zz%4", b"/%zz%4", b"", id="what is no escape stays"),
        pytest.param(b"http://h:1/a?b", b"/a", b"b", id="absolute form"),
        pytest.param(b"HTTPS://[::1]:80?b", b"/", b"b", id="absolute form without path"),
    ],
)
def test_the_target_is_cut_into_path_and_query(target: bytes, path: bytes, query: bytes) -> None:
    head = parse_request_head(request(start=b"GET %b HTTP/1.1" % target))
    assert (head.target, head.path, head.query) == (target, path, query)


def test_options_may_ask_for_the_whole_server() -> None:
    assert parse_request_head(request(start=b"OPTIONS * HTTP/1.1")).path == b"*"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        pytest.param(b"A: b", b"b", id="plain"),
        pytest.param(b"A:b", b"b", id="no space after the colon"),
        pytest.param(b"A:", b"", id="empty value"),
        pytest.param(b"A: \t b c\t ", b"b c", id="white space around the value"),
        pytest.param(b"a: b:c", b"b:c", id="colon in the value"),
        pytest.param(b"A: J\xc3\xb6rg", b"J\xc3\xb6rg", id="obs-text"),
    ],
)
def test_a_header_value_is_stripped_and_else_kept(line: bytes, value: bytes) -> None:
    assert parse_request_head(request(line)).get(b"a") == value
    assert parse_response_head(response(line)).get(b"a") == value


def test_get_returns_the_first_of_repeated_headers_and_all_are_kept() -> None:
    head = parse_request_head(request(b"A: 1", b"a: 2"))
    assert head.get(b"a") == b"1"
    assert head.headers == [(b"host", b"h"), (b"a", b"1"), (b"a", b"2")]


def test_get_works_on_a_head_built_by_hand() -> None:
    headers = [(b"a", b"1"), (b"a", b"2")]
    head = RequestHead(
        b"GET", b"/", b"/", b"", 1, headers, FramingKind.NONE, None, True, expects_continue=False
    )
    assert head.get(b"a") == b"1"


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        pytest.param(b"1.1", [], True, id="1.1 stays open"),
        pytest.param(b"1.1", [b"close"], False, id="1.1 closes when told"),
        pytest.param(b"1.1", [b"Upgrade, CLOSE"], False, id="close among other options"),
        pytest.param(b"1.1", [b"keep-alive, close"], False, id="close wins"),
        pytest.param(b"1.1", [b"keep-alive", b"close"], False, id="close in a second header"),
        pytest.param(b"1.1", [b"closed"], True, id="no half words"),
        pytest.param(b"1.0", [], False, id="1.0 closes"),
        pytest.param(b"1.0", [b"Keep-Alive"], True, id="1.0 stays open when asked"),
    ],
)
def test_keep_alive_follows_version_and_connection(
    version: bytes, connection: list[bytes], keep_alive: bool
) -> None:
    lines = [b"Connection: " + value for value in connection]
    assert (
        parse_request_head(request(*lines, start=b"GET / HTTP/" + version)).keep_alive is keep_alive
    )
    lines.append(b"Content-Length: 0")
    start = b"HTTP/%b 200 OK" % version
    assert parse_response_head(response(*lines, start=start)).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("lines", "kind", "length"),
    [
        pytest.param([], FramingKind.NONE, None, id="no body"),
        pytest.param([b"Content-Length: 0"], FramingKind.LENGTH, 0, id="empty body"),
        pytest.param([b"Content-Length: 007"], FramingKind.LENGTH, 7, id="leading zeros"),
        pytest.param([b"Content-Length: %d" % 2**53], FramingKind.LENGTH, 2**53, id="largest"),
        pytest.param([b"Transfer-Encoding:\tCHUNKED "], FramingKind.CHUNKED, None, id="chunked"),
        pytest.param([b"Upgrade: h2c"], FramingKind.NONE, None, id="upgrade is ignored"),
    ],
)
def test_the_framing_of_a_request(
    lines: list[bytes], kind: FramingKind, length: int | None
) -> None:
    head = parse_request_head(request(*lines))
    assert (head.kind, head.length) == (kind, length)


def test_a_client_may_expect_to_be_told_to_continue() -> None:
    lines = (b"Expect: 100-Continue", b"Content-Length: 5")
    assert parse_request_head(request(*lines)).expects_continue
    assert not parse_request_head(request(*lines, start=b"POST / HTTP/1.0")).expects_continue
    assert not parse_request_head(request(b"Expect: more")).expects_continue


def test_http_1_0_needs_no_host() -> None:
    assert parse_request_head(request(start=b"GET / HTTP/1.0", host=False)).version_minor == 0


@pytest.mark.parametrize("host", [b"h", b"H.example:8080", b"127.0.0.1", b"[::1]:8080", b"a_b:"])
def test_a_host_may_be_a_name_or_an_address(host: bytes) -> None:
    head = parse_request_head(request(b"Host: " + host, host=False))
    assert head.get(b"host") == host


# Request heads that are refused

LENGTH = b"Content-Length: 5"
CHUNKED = b"Transfer-Encoding: chunked"

SMUGGLING = {
    "length and chunked": [LENGTH, CHUNKED],
    "chunked and length": [CHUNKED, LENGTH],
    "two different lengths": [LENGTH, b"Content-Length: 6"],
    "two equal lengths": [LENGTH, b"content-length: 5"],
    "length as a list": [b"Content-Length: 5, 5"],
    "length with a plus sign": [b"Content-Length: +5"],
    "negative length": [b"Content-Length: -5"],
    "length with an underscore": [b"Content-Length: 5_0"],
    "length with a space inside": [b"Content-Length: 5 0"],
    "length in hex": [b"Content-Length: 0x5"],
    "length of Arabic digits": [b"Content-Length: \xd9\xa5"],
    "superscript length": [b"Content-Length: \xb2"],
    "empty length": [b"Content-Length:"],
    "length over 2**53": [b"Content-Length: %d" % (2**53 + 1)],
    "length of five thousand digits": [b"Content-Length: " + b"1" * 5000],
    "two chunked headers": [CHUNKED, CHUNKED],
    "chunked twice in one": [b"Transfer-Encoding: chunked, chunked"],
    "gzip before chunked": [b"Transfer-Encoding: gzip, chunked"],
    "chunked before gzip": [b"Transfer-Encoding: chunked, gzip"],
    "identity coding": [b"Transfer-Encoding: identity"],
    "empty coding": [b"Transfer-Encoding:"],
    "quoted coding": [b'Transfer-Encoding: "chunked"'],
    "coding with a parameter": [b"Transfer-Encoding: chunked;q=1"],
    "coding with a vertical tab": [b"Transfer-Encoding: \x0bchunked"],
    "coding with a trailing comma": [b"Transfer-Encoding: chunked,"],
    "space before the colon": [b"Transfer-Encoding : chunked"],
    "tab before the colon": [b"Content-Length\t: 5"],
    "folded coding": [b"Transfer-Encoding:", b" chunked"],
    "folded by a tab": [b"A: b", b"\tc"],
    "first line folded": [b" A: b"],
    "bare LF between headers": [b"A: b\nContent-Length: 5"],
    "bare CR between headers": [b"A: b\rContent-Length: 5"],
    "bare CR at a value's end": [b"A: b\r"],
    "bare LF at a value's beginning": [b"A:\nb"],
    "NUL in a value": [b"A: b\0c"],
    "control character in a value": [b"A: b\x01c"],
    "DEL in a value": [b"A: b\x7fc"],
    "control character around a value": [b"A: b\x0c"],
    "line without a colon": [b"Content-Length 5"],
    "empty name": [b": 5"],
    "name with a bracket": [b"A(b): c"],
    "name with a high byte": [b"A\xe9: c"],
    "name with a NUL": [b"A\0: c"],
    "an empty line and more": [b"", b"GET /other HTTP/1.1"],
}


@pytest.mark.parametrize("lines", SMUGGLING.values(), ids=SMUGGLING)
def test_a_head_that_two_parsers_may_read_differently_is_refused(lines: list[bytes]) -> None:
    for _ in range(2):  # a line must not pass because it was seen before
        with pytest.raises(HeadError) as caught:
            parse_request_head(request(*lines))
        assert caught.value.status == 400
    with pytest.raises(HeadError) as caught:
        parse_response_head(response(*lines))
    assert caught.value.status == 502


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(request(host=False), id="no host in 1.1"),
        pytest.param(request(b"Host: h"), id="two hosts"),
        pytest.param(request(b"Host: h", start=b"GET / HTTP/1.0"), id="two hosts in 1.0"),
        pytest.param(request(b"Host:", host=False), id="empty host"),
        pytest.param(request(b"Host: a b", host=False), id="host with a space"),
        pytest.param(request(b"Host: a,b", host=False), id="host as a list"),
        pytest.param(request(b"Host: a/b", host=False), id="host with a path"),
        pytest.param(request(b"Host: u@h", host=False), id="host with a user"),
        pytest.param(request(b"Host: h:port", host=False), id="port not a number"),
        pytest.param(request(b"Host: \xe9", host=False), id="host with a high byte"),
        pytest.param(request(CHUNKED, start=b"POST / HTTP/1.0"), id="chunked in 1.0"),
        pytest.param(request(start=b""), id="empty request line"),
        pytest.param(request(start=b"\r\nGET / HTTP/1.1"), id="empty line in front"),
        pytest.param(request(start=b"GET /"), id="HTTP/0.9"),
        pytest.param(request(start=b"GET  / HTTP/1.1"), id="two spaces"),
        pytest.param(request(start=b"GET / HTTP/1.1 "), id="space at the end"),
        pytest.param(request(start=b" GET / HTTP/1.1"), id="space at the beginning"),
        pytest.param(request(start=b"GET\t/ HTTP/1.1"), id="tab between"),
        pytest.param(request(start=b"G(T / HTTP/1.1"), id="method not a token"),
        pytest.param(request(start=b"GET /a b HTTP/1.1"), id="space in the target"),
        pytest.param(request(start=b"GET /a#b HTTP/1.1"), id="fragment in the target"),
        pytest.param(request(start=b"GET /\0 HTTP/1.1"), id="NUL in the target"),
        pytest.param(request(start=b"GET /\x7f HTTP/1.1"), id="DEL in the target"),
        pytest.param(request(start=b"GET /\xe9 HTTP/1.1"), id="high byte in the target"),
        pytest.param(request(start=b"GET /a\rb HTTP/1.1"), id="bare CR in the request line"),
        pytest.param(request(start=b"GET / HTTP/1.1\nA: b"), id="bare LF after the request line"),
        pytest.param(request(start=b"GET a HTTP/1.1"), id="target without a slash"),
        pytest.param(request(start=b"GET * HTTP/1.1"), id="asterisk for GET"),
        pytest.param(request(start=b"CONNECT h:80 HTTP/1.1"), id="authority form"),
        pytest.param(request(start=b"GET ftp://h/ HTTP/1.1"), id="another scheme"),
        pytest.param(request(start=b"GET http:///a HTTP/1.1"), id="absolute form without host"),
        pytest.param(request(start=b"GET http://u:p@h/ HTTP/1.1"), id="user in the target"),
        pytest.param(request(start=b"GET / http/1.1"), id="version in lower case"),
        pytest.param(request(start=b"GET / HTTP/11"), id="version without a dot"),
        pytest.param(request(start=b"GET / HTTP/01.1"), id="version of two digits"),
        pytest.param(request(b"A: bcdef")[:-4], id="no empty line at the end"),
        pytest.param(b"", id="no bytes"),
        pytest.param(b"\r\n\r\n", id="only empty lines"),
    ],
)
def test_a_request_head_out_of_shape_is_a_400(raw: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        parse_request_head(raw)
    assert caught.value.status == 400
    assert str(caught.value).startswith("expected ")


@pytest.mark.parametrize("version", [b"0.9", b"1.2", b"2.0", b"3.0"])
def test_another_version_is_a_505(version: bytes) -> None:
    with pytest.raises(HeadError, match=r"expected HTTP/1\.1 or") as caught:
        parse_request_head(request(start=b"GET / HTTP/" + version))
    assert caught.value.status == 505


def test_a_hundred_headers_pass_and_one_more_is_a_431() -> None:
    lines = [b"A: b"] * 99
    assert len(parse_request_head(request(*lines)).headers) == 100
    with pytest.raises(HeadError) as caught:
        parse_request_head(request(*lines, b"A: b"))
    assert caught.value.status == 431


def test_a_head_at_its_largest_passes_and_one_byte_more_is_a_431() -> None:
    room = MAX_REQUEST_HEAD_BYTES - len(request(b"A: "))
    assert parse_request_head(request(b"A: " + b"b" * room)).get(b"a") == b"b" * room
    with pytest.raises(HeadError) as caught:
        parse_request_head(request(b"A: b" + b"b" * room))
    assert caught.value.status == 431


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(request(b"Authorization: Bearer hb_secret\0"), id="control character"),
        pytest.param(request(b"Authorization: Bearer", b" hb_secret"), id="folded"),
        pytest.param(request(b"Bearer hb_secret"), id="without a colon"),
        pytest.param(request(b"A: b\nAuthorization: hb_secret"), id="bare LF"),
        pytest.param(request(start=b"GET /?key=hb_secret#f HTTP/1.1"), id="in the query"),
        pytest.param(request(start=b"GET http://u:hb_secret@h/ HTTP/1.1"), id="in the target"),
    ],
)
def test_no_message_shows_what_may_be_a_secret(raw: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        parse_request_head(raw)
    assert "secret" not in str(caught.value)


def test_a_message_shows_at_most_forty_characters_all_printable() -> None:
    with pytest.raises(HeadError) as caught:
        parse_request_head(request(b"Transfer-Encoding: " + b"\xff" * 500))
    assert str(caught.value).count("\\xff") == 10
    assert str(caught.value).isascii() and str(caught.value).isprintable()


# The bytes around a head


def test_one_empty_line_before_a_request_is_skipped() -> None:
    assert skip_empty_line(b"\r\nGET") == 2
    assert skip_empty_line(bytearray(b"\r\n\r\n")) == 2
    assert skip_empty_line(b"GET") == skip_empty_line(b"\r") == skip_empty_line(b"\n") == 0


@pytest.mark.parametrize("cut", range(len(LLAMA_HEAD)))
def test_the_end_of_a_head_is_found_wherever_the_search_stopped(cut: int) -> None:
    buffer = bytearray(LLAMA_HEAD[:cut])
    assert find_head_end(buffer) == -1
    buffer += LLAMA_HEAD[cut:] + LLAMA_BODY
    assert find_head_end(buffer, cut) == len(LLAMA_HEAD)


# Response heads


def test_the_head_of_llama_cpp_is_read() -> None:
    head = parse_response_head(LLAMA_HEAD)
    assert (head.status, head.kind, head.length) == (200, FramingKind.CHUNKED, None)
    assert head.keep_alive and head.keepalive_hint == 5.0
    assert head.get(b"access-control-allow-origin") == b""
    assert (head.content_type, head.content_encoding) == (b"text/event-stream", b"identity")


@pytest.mark.parametrize(
    ("raw", "kind", "length"),
    [
        pytest.param(response(LENGTH), FramingKind.LENGTH, 5, id="length"),
        pytest.param(response(CHUNKED), FramingKind.CHUNKED, None, id="chunked"),
        pytest.param(response(), FramingKind.UNTIL_EOF, None, id="neither"),
        pytest.param(response(start=b"HTTP/1.0 200"), FramingKind.UNTIL_EOF, None, id="bare 1.0"),
        pytest.param(response(start=b"HTTP/1.1 100 "), FramingKind.NONE, None, id="100"),
        pytest.param(
            response(b"Link: x", start=b"HTTP/1.1 103 Early Hints"),
            FramingKind.NONE,
            None,
            id="103",
        ),
        pytest.param(
            response(LENGTH, start=b"HTTP/1.1 204 No Content"),
            FramingKind.NONE,
            None,
            id="204 has no body whatever it says",
        ),
        pytest.param(
            response(LENGTH, start=b"HTTP/1.1 304"),
            FramingKind.NONE,
            None,
            id="304 tells the length it would have had",
        ),
        pytest.param(
            response(LENGTH, start=b"HTTP/1.1 529 \xc3\xbcberlastet\t!"),
            FramingKind.LENGTH,
            5,
            id="any phrase",
        ),
    ],
)
def test_the_framing_of_a_response(raw: bytes, kind: FramingKind, length: int | None) -> None:
    head = parse_response_head(raw)
    assert (head.kind, head.length) == (kind, length)


def test_a_body_until_the_end_of_the_connection_leaves_no_connection() -> None:
    assert not parse_response_head(response(b"Connection: keep-alive")).keep_alive


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols", id="101"),
        pytest.param(b"HTTP/1.1 099 Low", id="status under 100"),
        pytest.param(b"HTTP/1.1 600 High", id="status over 599"),
        pytest.param(b"HTTP/1.1 20 OK", id="two digits"),
        pytest.param(b"HTTP/1.1 2000", id="four digits"),
        pytest.param(b"HTTP/1.1 200OK", id="phrase without a space"),
        pytest.param(b"HTTP/1.1  200 OK", id="two spaces"),
        pytest.param(b"HTTP/2 200 OK", id="version 2"),
        pytest.param(b"HTTP/1.2 200 OK", id="version 1.2"),
        pytest.param(b"ICY 200 OK", id="another protocol"),
        pytest.param(b"HTTP/1.1 200 OK\nA: b", id="bare LF"),
        pytest.param(b"HTTP/1.1 200 O\rK", id="bare CR"),
        pytest.param(b"HTTP/1.1 200 O\0K", id="NUL"),
        pytest.param(b"\r\nHTTP/1.1 200 OK", id="empty line in front"),
    ],
)
def test_a_bad_status_line_is_a_502(start: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        parse_response_head(response(b"Content-Length: 0", start=start))
    assert caught.value.status == 502


def test_chunked_from_an_http_1_0_server_is_refused() -> None:
    with pytest.raises(HeadError, match=r"HTTP/1\.0"):
        parse_response_head(response(CHUNKED, start=b"HTTP/1.0 200 OK"))


def test_a_response_head_too_large_is_a_502() -> None:
    with pytest.raises(HeadError, match="at most 65536 bytes") as caught:
        parse_response_head(response(b"A: " + b"b" * MAX_RESPONSE_HEAD_BYTES))
    assert caught.value.status == 502


@pytest.mark.parametrize(
    "head",
    [
        LLAMA_HEAD,
        response(b"A:", b"Server:\tnginx/1.2 (\xe9)", b"Content-Length: 0"),
        response(start=b"HTTP/1.0 404"),
        response(start=b"HTTP/1.1 103 Early Hints"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_every_beginning_of_a_good_head_may_go_on(head: bytes, size: int) -> None:
    searched = 0
    for end in range(size, len(head), size):
        check_response_head(head[:end], searched)
        searched = max(0, end - 3)


# Each with the bytes at which no others can mend it.
HOPELESS = {
    "a status line ended by LF": (b"HTTP/1.1 200 OK\n", 16),
    "a later line ended by LF": (b"HTTP/1.1 200 OK\r\nA: b\nC: d\n\n", 22),
    "the empty line of LF alone": (b"HTTP/1.1 200 OK\r\nA: b\r\n\n", 24),
    "a line ended by CR": (b"HTTP/1.1 200 OK\rA", 17),
    "NUL": (b"HTTP/1.1 200 OK\r\nA: \0", 21),
    "a banner of SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", 1),
    "frames of HTTP/2": (b"\0\0\x12\4\0\0\0\0\0", 1),
    "an alert of TLS": (b"\x15\3\1\0\2\2\x50", 1),
    "a body without a head": (b'{"error": "no"}', 1),
    "another version": (b"HTTP/2 200", 6),
    "an empty line first": (b"\r\n", 1),
    "a status of letters": (b"HTTP/1.1 OK\r\n", 13),
    "a line without a colon": (b"HTTP/1.1 200 OK\r\nno colon\r\n", 27),
    "a line that goes on": (b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n", 27),
    "a name with a space": (b"HTTP/1.1 200 OK\r\nA : b\r\n", 24),
}


@pytest.mark.parametrize(("head", "enough"), HOPELESS.values(), ids=HOPELESS)
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_a_head_that_no_bytes_can_mend_fails_as_soon_as_it_shows(
    head: bytes, enough: int, size: int
) -> None:
    searched = end = 0
    while end < enough - (enough % size or size):
        end += size
        check_response_head(head[:end], searched)
        searched = max(0, end - 3)
    with pytest.raises(HeadError) as caught:
        check_response_head(head[: end + size], searched)
    assert caught.value.status == 502


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (b"timeout=5, max=100", 5.0),
        (b'max=1,Timeout="60"', 60.0),
        (b"max=100", None),
        (b"xtimeout=5", None),
        (b"timeout=-1", None),
        (b"timeout=" + b"9" * 500, None),
    ],
)
def test_the_keepalive_hint_is_a_number_of_seconds_or_none(
    value: bytes, hint: float | None
) -> None:
    assert parse_response_head(response(b"Keep-Alive: " + value)).keepalive_hint == hint


@pytest.mark.parametrize(
    ("lines", "media_type", "coding"),
    [
        pytest.param([], b"", b"identity", id="neither"),
        pytest.param(
            [b"Content-Type: Text/Event-Stream ; charset=UTF-8", b"Content-Encoding: GZIP"],
            b"text/event-stream",
            b"gzip",
            id="case and parameters",
        ),
        pytest.param(
            [b"Content-Encoding: identity", b"Content-Encoding: br"],
            b"",
            b"identity,br",
            id="a second coding is not overlooked",
        ),
    ],
)
def test_media_type_and_coding_of_a_response(
    lines: list[bytes], media_type: bytes, coding: bytes
) -> None:
    head = parse_response_head(response(*lines))
    assert (head.content_type, head.content_encoding) == (media_type, coding)


# What we send


def test_a_request_head_is_serialized_and_reads_back() -> None:
    headers = [(b"host", b"h:1"), (b"content-length", b"5"), (b"x", b"")]
    raw = serialize_request_head(b"POST", b"/v1/chat/completions?a=b", headers)
    assert raw == (
        b"POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: h:1\r\ncontent-length: 5\r\nx: \r\n\r\n"
    )
    assert parse_request_head(raw).headers == headers


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (200, b"HTTP/1.1 200 OK\r\n\r\n"),
        (429, b"HTTP/1.1 429 Too Many Requests\r\n\r\n"),
        (599, b"HTTP/1.1 599 \r\n\r\n"),
    ],
)
def test_a_response_head_has_its_status_line(status: int, line: bytes) -> None:
    assert begin_response_head(status, []) + b"\r\n" == line
    assert parse_response_head(line).status == status


@pytest.mark.parametrize("status", [0, 100, 199, 600])
def test_only_final_statuses_are_serialized(status: int) -> None:
    with pytest.raises(ValueError, match="status from 200 to 599"):
        begin_response_head(status, [])


@pytest.mark.parametrize(
    "header",
    [
        pytest.param((b"a", b"b\r\nc: d"), id="value with a whole header"),
        pytest.param((b"a", b"b\nc"), id="value with LF"),
        pytest.param((b"a", b"b\rc"), id="value with CR"),
        pytest.param((b"a", b"b\r\n"), id="value ending in CR LF"),
        pytest.param((b"a", b"b\0"), id="value with NUL"),
        pytest.param((b"a: b\r\nc", b"d"), id="name with a whole header"),
        pytest.param((b"a:", b"b"), id="name with a colon"),
        pytest.param((b"a b", b"c"), id="name with a space"),
        pytest.param((b"", b"b"), id="empty name"),
    ],
)
def test_no_header_can_be_injected(header: tuple[bytes, bytes]) -> None:
    headers = [(b"x-ok", b"secret"), header]
    with pytest.raises(ValueError, match=r"^expected a header (name|value)") as caught:
        begin_response_head(200, headers)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^expected a header (name|value)"):
        serialize_request_head(b"GET", b"/", headers)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        pytest.param(b"GET", b"/ HTTP/1.1\r\nA: b\r\n\r\n", id="a head in the target"),
        pytest.param(b"GET", b"/a b", id="space in the target"),
        pytest.param(b"GET", b"", id="no target"),
        pytest.param(b"GET /", b"/", id="space in the method"),
        pytest.param(b"", b"/", id="no method"),
    ],
)
def test_no_request_line_can_be_injected(method: bytes, target: bytes) -> None:
    with pytest.raises(ValueError, match="expected a method and a target"):
        serialize_request_head(method, target, [])


# Any bytes at all

TOKENS = st.text("abcXYZ09-_!", min_size=1, max_size=12).map(str.encode)
VALUES = st.binary(max_size=30).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F))
HEADERS = st.lists(st.tuples(TOKENS.map(bytes.lower), VALUES), max_size=12)


HEAD_SOUP = st.lists(
    st.sampled_from(
        [
            *(b"GET / HTTP/1.1", b"HTTP/1.1 200 OK", b"Host: h", b"http://", b"Connection: "),
            *(b"Content-Length: ", b"Transfer-Encoding: chunked", b"Keep-Alive: timeout="),
            *(b"\r\n", b"\r", b"\n", b":", b",", b" ", b"5", b"\xff", b"\0"),
        ]
    )
).map(b"".join)


@given(raw=st.binary(max_size=200) | HEAD_SOUP)
@example(raw=b"GET / HTTP/1.1\r\nHost: h")
def test_any_bytes_are_a_head_or_a_head_error(raw: bytes) -> None:
    for parse in (parse_request_head, parse_response_head):
        for data in (raw, raw + b"\r\n\r\n"):
            try:
                head = parse(data)
            except HeadError as error:
                assert str(error).isascii() and len(str(error)) < 160
            else:
                assert head.kind is not FramingKind.LENGTH or head.length is not None


@given(headers=HEADERS)
def test_what_we_send_reads_back_as_the_same_headers(headers: Headers) -> None:
    framing = {b"content-length", b"transfer-encoding"}
    headers = [(name, value) for name, value in headers if name not in framing]
    read_back = parse_response_head(begin_response_head(200, headers) + b"\r\n").headers
    assert read_back == [(name, value.strip(b" \t")) for name, value in headers]
