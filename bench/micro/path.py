"""The whole path in one process: a request and its answer, an event, on transports that only count.

What sockets and the loop cost on top is the same for every design; side_by_side.py measures it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from hoberproxy.access.admission import Admission
from hoberproxy.access.keys import Caller, Keyring, generate_key, hash_key
from hoberproxy.accounting.metrics import Metrics
from hoberproxy.config.reader import parse_config
from hoberproxy.downstream.connection import DownstreamConnection
from hoberproxy.exchange.context import ServerContext
from hoberproxy.exchange.exchange import Exchange
from hoberproxy.routing.catalog import Catalog, Endpoint, Model
from hoberproxy.timer_wheel import Wheel
from hoberproxy.upstream.connection import UpstreamConnection
from hoberproxy.upstream.provider import make_upstreams

from . import Case
from .account import accounts_in, temporary_folder
from .streams import CONTENT, FINISH, MODEL, OPENING, SLUG, chunk, pad, request_body

_CONFIG = f"""
[providers.upstream]
base_url = "http://127.0.0.1:9/v1"
[[models]]
slug = "{SLUG}"
endpoints = [{{ provider = "upstream", model = "{MODEL.decode()}" }}]
"""
_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n"
    b"Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nAccept: application/json\r\n"
    b"Content-Type: application/json\r\nUser-Agent: OpenAI/Python 2.8.0\r\n"
    b"X-Stainless-Lang: python\r\nX-Stainless-Package-Version: 2.8.0\r\nX-Stainless-OS: Linux\r\n"
    b"X-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
    b"X-Stainless-Runtime-Version: 3.11.7\r\nX-Stainless-Async: false\r\n"
    b"x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
    b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n"
)
_ANSWER_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nopenai-processing-ms: 12\r\n"
    b"x-request-id: req_%032d\r\nContent-Length: %d\r\n\r\n"
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"openai-processing-ms: 12\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_COMPLETION = (
    b'{"id":"chatcmpl-bench0001","object":"chat.completion","created":1709000000,"model":"%b",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"%b","refusal":null},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":64,'
    b'"total_tokens":73,"prompt_tokens_details":{"cached_tokens":0}}}'
) % (MODEL, b"the quick brown fox jumps over it " * 6)
_KEY = generate_key("test", bytes(24))


def _read_nothing(path: str) -> str:
    raise AssertionError("the config names no file")


class _NullSocket:
    """Takes what goes past a transport, at the price of a system call."""

    def __init__(self) -> None:
        self._fd = os.open(os.devnull, os.O_WRONLY)

    def fileno(self) -> int:
        return self._fd


class NullTransport:
    """Takes everything, sends nothing."""

    socket = _NullSocket()

    def write(self, data: bytes) -> None:
        """Dropped."""

    def get_extra_info(self, name: str) -> _NullSocket | None:
        return self.socket if name == "socket" else None

    def abort(self) -> None:
        """Nothing is left to cut."""

    def is_closing(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0


class _Path:
    """A client's connection and its upstream's, with nothing but the proxy's code between."""

    def __init__(self) -> None:
        loop = asyncio.new_event_loop()
        loop.close()  # only its clock is wanted
        config = parse_config(_CONFIG, environ={}, read_file=_read_nothing)
        keyring = Keyring()
        caller = Caller("key_1", "bench", "test", None, None)
        keyring.replace({hash_key(_KEY): caller})
        catalog = Catalog([Model(SLUG, (Endpoint("upstream", MODEL.decode()),))])
        accounts, self.drain = accounts_in(temporary_folder())
        wheel = Wheel(loop.time())
        self._context = context = ServerContext(
            config=config,
            loop=loop,
            wheel=wheel,
            catalog=catalog,
            keyring=keyring,
            accounts=accounts,
            admission=Admission(config.server.max_streams),
            access_log=None,
            metrics=Metrics(catalog.label),
            upstreams=make_upstreams(config, loop, wheel),
        )
        self.client = self.connect()
        transport: Any = NullTransport()
        pool = context.upstreams["upstream"].pool
        self.upstream = UpstreamConnection(pool)
        self.upstream.connection_made(transport)
        pool.on_idle(self.upstream, None)

    def connect(self) -> DownstreamConnection:
        """Another client."""
        handlers: Any = None
        make_exchange = partial(Exchange, self._context)
        client = DownstreamConnection(self._context, make_exchange, handlers, set())
        transport: Any = NullTransport()
        client.connection_made(transport)
        return client


def _request(prompt_bytes: int, **members: object) -> bytes:
    body = request_body(prompt_bytes, **members)
    return _HEAD % (_KEY.encode(), len(body)) + body


def _small() -> Callable[[], object]:
    path = _Path()
    requests = [_request(1000 + size, stream=False) for size in range(10)]
    answers = [_ANSWER_HEAD % (number, len(_COMPLETION)) + _COMPLETION for number in range(10)]

    def exchange() -> None:
        ask, answer = path.client.data_received, path.upstream.data_received
        for request, reply in zip(requests, answers, strict=True):
            ask(request)
            answer(reply)
        path.drain.take(len(requests))

    return exchange


def _new_connection() -> Callable[[], object]:
    """As `_small`, but no head is repeated on its connection: each client comes and goes."""
    path = _Path()
    requests = [_request(1000 + size, stream=False) for size in range(10)]
    answers = [_ANSWER_HEAD % (number, len(_COMPLETION)) + _COMPLETION for number in range(10)]

    def exchange() -> None:
        for request, reply in zip(requests, answers, strict=True):
            client = path.connect()
            client.data_received(request)
            path.upstream.data_received(reply)
            client.connection_lost(None)
        path.drain.take(len(requests))

    return exchange


def _streaming(events: int, *, padded: bool = False) -> Callable[[], object]:
    path = _Path()
    request = _request(1000)
    opening = _STREAM_HEAD + chunk(OPENING)
    # Several texts, lest one cached size line serve all.
    contents = [
        chunk(CONTENT.replace(b" token", b" token" + b"s" * (i % 7))) for i in range(events)
    ]
    if padded:
        contents = [chunk(pad(CONTENT, number)) for number in range(events)]
    end = chunk(FINISH) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def exchange() -> None:
        path.client.data_received(request)
        receive = path.upstream.data_received
        receive(opening)
        for each in contents:
            receive(each)
        receive(end)
        path.drain.take()

    return exchange


def _block(events: int) -> Callable[[], object]:
    path = _Path()
    request = _request(1000)
    contents = b"".join(
        chunk(CONTENT.replace(b" token", b" token" + b"s" * (i % 7))) for i in range(events)
    )
    end = chunk(FINISH) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    whole = _STREAM_HEAD + chunk(OPENING) + contents + end

    def exchange() -> None:
        path.client.data_received(request)
        path.upstream.data_received(whole)
        path.drain.take()

    return exchange


CASES = (
    Case("a small request", _small, 10, "request"),
    Case("a stream without content", lambda: _streaming(0), unit="stream"),
    Case("a small request on a new connection", _new_connection, 10, "request"),
    Case("1,000 events with padding", lambda: _streaming(1000, padded=True), 1000, "event"),
    Case("a stream of 1,000 events, each alone", lambda: _streaming(1000), 1000, "event"),
    Case("a stream of 64 events in one block", lambda: _block(64), unit="stream"),
)
