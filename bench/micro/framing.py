"""Heads and chunked bodies of HTTP/1.1."""

from __future__ import annotations

from collections.abc import Callable

from hoberproxy.protocol.http_body import ChunkedBody
from hoberproxy.protocol.http_head import parse_request_head, parse_response_head

from . import Case
from .streams import CONTENT, chunk

REQUEST_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAccept-Encoding: gzip, deflate"
    b"\r\nConnection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    b"User-Agent: OpenAI/Python 2.8.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Retry-Count: 0\r\n"
    b"Authorization: Bearer hb_test_0000000000000000000000000000000000000000\r\n"
    b"Content-Length: 313\r\n\r\n"
)
RESPONSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nopenai-processing-ms: 12\r\nx-request-id: req_1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def _feeding(piece: bytes) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        feed = ChunkedBody().feed
        return lambda: feed(piece)

    return make


CASES = (
    Case("a chunk in a piece", _feeding(chunk(CONTENT)), unit="chunk"),
    Case("64 chunks in a piece", _feeding(chunk(CONTENT) * 64), 64, "chunk"),
    Case("a request's head", lambda: lambda: parse_request_head(REQUEST_HEAD), unit="head"),
    Case("a response's head", lambda: lambda: parse_response_head(RESPONSE_HEAD), unit="head"),
)
