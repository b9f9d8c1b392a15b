"""A client's connection and the handler of its chat requests, with nothing behind the two."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from hoberproxy.access.admission import Admission
from hoberproxy.access.keys import ANONYMOUS
from hoberproxy.config.settings import Config, ServerSettings
from hoberproxy.downstream.connection import DownstreamConnection
from hoberproxy.downstream.request_handler import Admitted, ConnectionContext, RequestHandler
from hoberproxy.downstream.response import Answer, Client
from hoberproxy.errors import ProxyError, UnavailableError
from hoberproxy.protocol.http_head import RequestHead
from hoberproxy.timer_wheel import Wheel
from tests.downstream.test_response import FakeTransport

ADMITTED = Admitted(ANONYMOUS, 1, cast(Config, None))
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
SETTINGS = ServerSettings(max_body_bytes=100, keepalive_timeout=1000.0, body_timeout=20.0)


def head(length: int = 5, path: str = "/v1/chat/completions") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    return lines.encode()


class Transport(FakeTransport):
    """As much of a transport as a connection asks for."""

    is_closed = False

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else None

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True


class FakeHandler(RequestHandler):
    """Notes each call; refuses heads, entries and bodies if its fields say so."""

    def __init__(self, client: Client, head: RequestHead, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []
        self.admits = self.enters = True
        self.holds = 100

    def admit(self, known: Admitted | None = None) -> Admitted | None:
        self.calls.append(("admit", known))
        return ADMITTED if self.admits else None

    def enter(self) -> bool:
        self.calls.append(("enter",))
        return self.enters

    def hold_body(self, size: int) -> None:
        self.calls.append(("hold", size))
        if size > self.holds:
            raise UnavailableError("full", code="overloaded")

    def run(self, body: bytes, *, close: bool = False) -> None:
        self.calls.append(("run", body, close))

    def fail(self, error: ProxyError, *, close: bool = False) -> None:
        self.calls.append(("fail", error.code, close))
        self.answer.send(error.status, [], b"", close=close)

    def abandon(self) -> None:
        self.calls.append(("abandon",))

    def pause(self) -> None:
        self.calls.append(("pause",))

    def resume(self) -> None:
        self.calls.append(("resume",))

    def on_deadline(self, now: float) -> float | None:
        self.calls.append(("deadline", now))
        return now + 5.0


class Connected:
    """A connection whose handlers are fakes."""

    def __init__(self, **options: Any) -> None:
        loop = asyncio.get_running_loop()
        self.wheel = Wheel(1000.0)
        self.context = ConnectionContext(
            SETTINGS, loop, self.wheel, Admission(SETTINGS.max_streams)
        )
        self.handlers: list[FakeHandler] = []
        self.options = options
        self.connection = DownstreamConnection(
            self.context, self.begin, cast(Any, self.no_handlers), set()
        )
        self.transport = Transport()
        self.connection.connection_made(cast(Any, self.transport))

    def begin(self, client: Client, head: RequestHead, answer: Answer) -> RequestHandler:
        handler = FakeHandler(client, head, answer)
        for name, value in self.options.items():
            setattr(handler, name, value)
        self.handlers.append(handler)
        return handler

    def no_handlers(self) -> None:
        raise AssertionError("no request is aiohttp's")

    def receive(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.connection.data_received(piece)

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        (handler,) = self.handlers
        return handler.calls


async def test_a_whole_request_is_admitted_and_run() -> None:
    connected = Connected()
    connected.receive(head() + b"hello")
    assert connected.calls == [("admit", None), ("run", b"hello", False)]


async def test_a_body_in_pieces_is_entered_held_and_run_whole() -> None:
    connected = Connected()
    connected.receive(head(), b"he", b"llo")
    assert connected.calls == [
        ("admit", None),
        ("enter",),
        ("hold", 2),
        ("hold", 5),
        ("run", b"hello", False),
    ]


async def test_an_equal_head_comes_with_what_was_known_of_it_and_another_without() -> None:
    connected = Connected()
    for path in ("/v1/chat/completions", "/v1/chat/completions", "/chat/completions"):
        connected.receive(head(path=path) + b"hello")
        connected.handlers[-1].answer.send(200, [], b"")
    known = [handler.calls[0][1] for handler in connected.handlers]
    assert known == [None, ADMITTED, None]


@pytest.mark.parametrize("options", [{"admits": False}, {"enters": False}], ids=["admit", "enter"])
async def test_a_refused_request_is_run_without_waiting_for_its_body(
    options: dict[str, Any],
) -> None:
    connected = Connected(**options)
    connected.receive(head())
    assert connected.calls[-1] == ("run", b"", True)


@pytest.mark.parametrize(
    ("pieces", "code"),
    [
        ([head(101), b"x"], "body_too_large"),
        ([head(90), b"x" * 60], "overloaded"),
        ([CHUNKED, b"?"], "invalid_request"),
    ],
    ids=["too large", "too many bytes in all", "bad framing"],
)
async def test_a_bad_body_fails_the_request_and_ends_the_connection(
    pieces: list[bytes], code: str
) -> None:
    connected = Connected(holds=50)
    connected.receive(*pieces)
    assert connected.calls[-1] == ("fail", code, True)
    assert b"connection: close" in connected.transport.writes[0]


async def test_a_slow_client_pauses_its_request_and_deadlines_are_its_own() -> None:
    connected = Connected()
    connected.receive(head() + b"hello")
    connected.connection.pause_writing()
    connected.connection.resume_writing()
    assert connected.connection.on_deadline(1234.0) == 1239.0
    assert connected.calls[2:] == [("pause",), ("resume",), ("deadline", 1234.0)]


async def test_a_body_that_does_not_come_in_time_fails_its_request() -> None:
    connected = Connected()
    connected.receive(head(), b"he")
    assert connected.connection.on_deadline(1010.0) == 1020.0
    assert connected.connection.on_deadline(1020.0) is None
    assert connected.calls[-1] == ("fail", "request_timeout", True)


@pytest.mark.parametrize("how", ["lost", "eof"])
async def test_a_client_that_leaves_abandons_its_request_once(how: str) -> None:
    connected = Connected()
    connected.receive(head() + b"hello")
    if how == "eof":
        connected.connection.eof_received()
    connected.connection.connection_lost(None)
    assert connected.calls[2:] == [("abandon",)]


async def test_heads_that_are_no_request_are_counted_and_answered_under_an_id() -> None:
    connected = Connected()
    connected.receive(b"nonsense\r\n\r\n")
    assert connected.context.bad_heads == 1 and not connected.handlers
    assert b"x-request-id: req_" in connected.transport.writes[0]
