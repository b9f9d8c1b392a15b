"""A client's connection: one strict check of every head, then one of two doors.

Chat requests are read straight off the wire and go to an Exchange; every other request is handed,
whole and checked, to aiohttp, one handler a request. Knows where requests begin and end and who
answers now; what is answered is the exchange's and app.py's.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import sys
import termios
from enum import Enum
from typing import Any, Final

from aiohttp import web

from .downstream import Answer, Client
from .errors import ProxyError, RequestError, UnavailableError, serialize_error
from .exchange import Admitted, Exchange
from .gateway import Gateway
from .http11 import (
    CONTINUE,
    MAX_REQUEST_HEAD_BYTES,
    BodyReader,
    FramingError,
    HeadError,
    LengthBody,
    RepeatedHead,
    RequestHead,
    body_reader,
    find_head_end,
    parse_request_head,
    repeated_head,
    skip_empty_line,
)
from .sink import Sink

CHAT_PATHS: Final = frozenset(
    (b"/v1/chat/completions", b"/chat/completions", b"/api/v1/chat/completions")
)
# Bytes of following requests that are kept while one is answered. Reading never pauses, or the
# client's leaving would go unseen; whoever sends more is closed after the answer.
MAX_PIPELINED_BYTES: Final = 64 * 1024
LINGER = 5.0  # seconds to read on after an early answer, lest a reset overtakes it
LINGER_MAX_BYTES = 64 * 1024 * 1024
# aiohttp's parser refuses other methods in a form of its own.
METHODS: Final = (b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT", b"TRACE")
# What aiohttp sees of a head: what its handlers read, and the framing. It is stricter than we are
# with some other fields, and shows them in its log.
_HANDLER_FIELDS: Final = frozenset(
    (
        b"host",
        b"connection",
        b"content-length",
        b"transfer-encoding",
        b"authorization",
        b"origin",
        b"access-control-request-method",
        b"access-control-request-headers",
    )
)


class State(Enum):
    """What the next bytes of the client are."""

    HEAD = "head"
    BODY = "body"  # of a chat request
    ANSWERING = "answering"  # an exchange answers; bytes belong to the next request
    HANDLER = "handler"  # aiohttp answers; bytes are the rest of its request, then the next one's
    LINGERING = "lingering"  # the last answer is out, what comes is thrown away
    CLOSED = "closed"


# As globals: on Python 3.11 a look-up on the enum class costs 0.1 µs.
_HEAD: Final = State.HEAD
_BODY: Final = State.BODY
_ANSWERING: Final = State.ANSWERING
_HANDLER: Final = State.HANDLER
_LINGERING: Final = State.LINGERING
_CLOSED: Final = State.CLOSED


class DownstreamConnection(Client):
    """One socket of a client, any number of requests one after the other.

    An asyncio.Protocol by its methods: a class derived from Python's would not be compiled.
    """

    def __init__(self, gateway: Gateway, handlers: web.Server, connections: set[Any]) -> None:
        self._gateway = gateway
        self._handlers = handlers
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._state = _HEAD
        self._buffer = b""  # bytes that belong to a request not yet begun
        self._searched = 0
        self._repeated: RepeatedHead | None = None  # the last chat request's
        self._admitted: Admitted | None = None  # … and who sent it
        self._body: BodyReader | None = None
        self._pieces: list[bytes] = []
        self._body_bytes = 0
        self._exchange: Exchange | None = None
        self._handler: _Handler | None = None
        self._is_overrun = False  # more was pipelined than we keep
        self._waiting_since = 0.0
        self._discarded_bytes = 0

    # What the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        ours: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        socket = transport.get_extra_info("socket")
        self._transport = ours
        self._sink = Sink(ours, -1 if socket is None else socket.fileno())
        self._connections.add(self)
        try:
            peer = transport.get_extra_info("peername")
            address = peer[0] if isinstance(peer, tuple) else ""
            self.address_group = self._gateway.admission.enter(address)
        except UnavailableError as error:
            self._gateway.metrics.refused_connections += 1
            self._refuse(error.status, error)
        else:
            self._await_request()

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state is _HEAD and not self.is_paused:
            if self._buffer:
                data = self._buffer + data
            elif self._repeated is not None and (end := self._repeated.find(data)):
                self._begin_chat(self._repeated.head, self._repeated.length, data[end:])
                return
            self._buffer = data
            self._read_head()
        elif state is _HEAD:
            self._hold(data)
            if self._is_overrun:
                self._linger()
        elif state is _BODY:
            self._read_body(data)
        elif state is _HANDLER:
            assert self._handler is not None
            self._hold(self._handler.feed(data))
        elif state is _ANSWERING:
            self._hold(data)
        elif state is _LINGERING:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > LINGER_MAX_BYTES:
                self.abort()

    def eof_received(self) -> bool:
        # A client that closes its sending side has gone, as far as HTTP clients go: its upstream
        # is closed in this turn. Answers already written are still flushed by the closing.
        if self._exchange is not None:
            self.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        self._shut()
        self._transport = self._sink = None
        self._connections.discard(self)
        self._gateway.admission.leave(self.address_group)
        self._gateway.wheel.cancel(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.abandon()
        if self._handler is not None:
            self._handler.lose(exc)
            self._handler = None

    def pause_writing(self) -> None:
        self.is_paused = True
        if self._exchange is not None:
            self._exchange.pause()
        elif self._handler is not None:
            self._handler.protocol.pause_writing()
            self._wait()

    def resume_writing(self) -> None:
        self.is_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        elif self._handler is not None:
            self._handler.protocol.resume_writing()
        elif self._state is _HEAD:
            self._await_request()

    # The head

    def _await_request(self) -> None:
        """Nothing is under way: the next bytes are a head."""
        self._state = _HEAD
        self._searched = 0
        self._is_overrun = False
        gateway = self._gateway
        # Also while draining: one more answer, which tells the client to connect anew. A request
        # may be on its way already, and closing would reset it.
        if self._buffer or self.is_paused:
            if not self.is_paused:
                # Not from here: an answer may just be ending in the caller.
                gateway.loop.call_soon(self._read_head)
            self._wait()
        else:
            self._waiting_since = now = gateway.wheel.now
            gateway.wheel.hasten(self, now + gateway.config.server.keepalive_timeout)

    def _wait(self) -> None:
        """From now on the client has to do something, within the limit of the state we are in."""
        wheel = self._gateway.wheel
        self._waiting_since = wheel.now
        wheel.hasten(self, self._due())

    def _read_head(self) -> None:
        # Who does not read the answers to earlier requests gets no further ones into memory.
        if self._state is not _HEAD or not self._buffer or self.is_paused:
            return
        buffer = self._buffer
        end = find_head_end(buffer, self._searched)
        if end < 0:
            if not self._searched:  # the first bytes of a request: its head has a limit now
                self._wait()
            self._check_unfinished(buffer)
            self._searched = len(buffer)
            return
        raw = buffer[skip_empty_line(buffer) : end]
        try:
            head = parse_request_head(raw)
        except HeadError as error:
            self._refuse_head(error)
            return
        self._buffer = b""
        if head.path in CHAT_PATHS and head.method == b"POST":
            self._repeated, self._admitted = repeated_head(head, raw), None
            self._begin_chat(head, head.length, buffer[end:])
        elif head.method in METHODS:
            self._begin_handler(head, buffer[end:])
        else:
            methods = b", ".join(METHODS).decode()
            self._refuse_head(HeadError(f"expected a method out of {methods}, got another", 405))

    def _check_unfinished(self, buffer: bytes) -> None:
        """Refuse a head now that no more bytes can mend."""
        if len(buffer) > MAX_REQUEST_HEAD_BYTES:
            too_large = f"expected a head of at most {MAX_REQUEST_HEAD_BYTES} bytes, got more"
            self._refuse_head(HeadError(too_large, 431))
        elif buffer.find(b"\n\n", max(0, self._searched - 1)) >= 0:
            # Its empty line ends in bare LF: we would wait for another one until the time limit.
            self._refuse_head(HeadError("expected lines that end with CR LF, got a bare LF"))

    def _refuse_head(self, error: HeadError) -> None:
        """What is no request, or could be read as two: 400 and close (RFC 9112, 11.2)."""
        self._gateway.metrics.bad_heads += 1
        status = error.status if error.status != 501 else 400
        code = "method_not_allowed" if status == 405 else "invalid_request"
        self._refuse(status, RequestError(str(error), code=code, status=status))

    def _refuse(self, status: int, refusal: ProxyError) -> None:
        """Answer before there is a request, and close."""
        retry_after = refusal.retry_after
        self._buffer = b""
        self._answer_early()
        answer = self._answer(version_minor=1, keep_alive=False)
        answer.send(
            status,
            [
                (b"content-type", b"application/json"),
                (b"x-request-id", self._gateway.new_request_id().encode()),
                (b"x-should-retry", b"false")
                if retry_after is None
                else (b"retry-after", b"%d" % math.ceil(retry_after)),
                *([(b"allow", b", ".join(METHODS))] if status == 405 else []),
            ],
            serialize_error(refusal),
        )

    def _answer(self, *, version_minor: int, keep_alive: bool) -> Answer:
        assert self._sink is not None
        return Answer(self._sink, self, version_minor=version_minor, keep_alive=keep_alive)

    # The chat door

    def _begin_chat(self, head: RequestHead, length: int | None, rest: bytes) -> None:
        """A chat request's head has come, with `length` (None: chunked, or without a body)."""
        gateway = self._gateway
        assert self._sink is not None
        answer = Answer(
            self._sink,
            self,
            version_minor=head.version_minor,
            keep_alive=head.keep_alive and not gateway.is_draining,
        )
        self._exchange = exchange = Exchange(gateway, self, head, answer)
        self._admitted = admitted = exchange.admit(self._admitted)
        if length is not None and length > gateway.config.server.max_body_bytes:
            self._refuse_body()
        elif length == len(rest):
            self._state = _ANSWERING
            exchange.run(rest)
        else:
            self._begin_body(head, length, rest, is_admitted=admitted is not None)

    def _begin_body(
        self, head: RequestHead, length: int | None, rest: bytes, *, is_admitted: bool
    ) -> None:
        """The body is still to come, but for `rest`."""
        exchange = self._exchange
        assert exchange is not None
        self._body = body = body_reader(head) if length is None else LengthBody(length)
        self._body_bytes = 0
        self._state = _BODY
        exchange.enter()  # the place of its key is taken before the room for its body
        if exchange.is_refused_at_head:
            self._answer_early()  # the rest of its body would take room all the same
            exchange.run(b"", close=True)
            return
        if head.expects_continue and not rest and not body.is_complete:
            if not is_admitted:  # the client waits for our word and need not send its body
                self._answer_early()
                exchange.run(b"", close=True)
                return
            self._write_continue()
        if rest or body.is_complete:
            self._read_body(rest)
        if self._state is _BODY:
            self._wait()

    def _write_continue(self) -> None:
        assert self._sink is not None
        self._sink.write(CONTINUE)

    def _read_body(self, data: bytes) -> None:
        body, exchange = self._body, self._exchange
        assert body is not None and exchange is not None
        try:
            pieces = body.feed(data)
        except FramingError as error:
            self._answer_early()
            exchange.refuse(
                RequestError(f"the body's framing: {error}", code="invalid_request"), close=True
            )
            return
        self._body_bytes += sum(map(len, pieces))
        if self._body_bytes > self.max_body_bytes:
            self._refuse_body()
            return
        if exchange.is_admitted:  # who was not admitted is read to the end, and not kept
            # One object a read: chunks of a byte or two would cost twenty times their size.
            pieces = pieces if len(pieces) < 2 else [b"".join(pieces)]
            self._pieces += pieces
        if body.is_complete:
            whole = pieces[0] if len(self._pieces) == 1 == len(pieces) else b"".join(self._pieces)
            self._pieces = []
            self._body = None
            self._state = _ANSWERING
            self._buffer = body.leftover
            exchange.run(whole)

    def _refuse_body(self) -> None:
        assert self._exchange is not None
        self._answer_early()
        self._exchange.refuse(
            RequestError(
                f"expected a body of at most {self.max_body_bytes} bytes, got more",
                code="body_too_large",
                status=413,
            ),
            close=True,
        )

    def _answer_early(self) -> None:
        """An answer comes before the request's end: what still comes of it can't be trusted."""
        self._pieces = []
        self._state = _ANSWERING
        self._is_overrun = True

    def on_answer_end(self, *, keep_alive: bool) -> None:
        """The exchange has written its last byte."""
        self._exchange = None
        self._after_answer(keep_alive=keep_alive)

    def _after_answer(self, *, keep_alive: bool) -> None:
        if self._is_overrun or (not keep_alive and self._buffer):
            self._linger()
        elif keep_alive:
            self._await_request()
        else:
            self._close()

    def _hold(self, data: bytes) -> None:
        """Keep the beginning of the next request, within bounds."""
        if self._is_overrun or len(self._buffer) + len(data) > MAX_PIPELINED_BYTES:
            self._is_overrun = True
        elif data:
            self._buffer += data

    # The aiohttp door

    def _begin_handler(self, head: RequestHead, rest: bytes) -> None:
        self._state = _HANDLER
        keep_alive = head.keep_alive and not self._gateway.is_draining
        body = body_reader(head)
        if head.expects_continue and not rest and not body.is_complete:
            self._write_continue()
        self._handler = _Handler(self, self._handlers(), body, keep_alive)
        self._handler.start(_head_for_handler(head))
        self._hold(self._handler.feed(rest))

    def refuse_handler(self, error: FramingError) -> None:
        """Its request breaks its own framing: 400, if that can still be said."""
        handler, self._handler = self._handler, None
        assert handler is not None
        handler.lose(None)
        if handler.is_answering:
            self.abort()
        else:
            self._refuse_head(HeadError(f"the body's framing: {error}"))

    def handler_ended(self, *, keep_alive: bool, is_request_complete: bool) -> None:
        """aiohttp has written its last byte."""
        self._handler = None
        if self._state is _HANDLER:
            self._is_overrun = self._is_overrun or not is_request_complete
            self._after_answer(keep_alive=keep_alive)

    @property
    def max_body_bytes(self) -> int:
        """The limit of any request's body."""
        return self._gateway.config.server.max_body_bytes

    @property
    def transport(self) -> asyncio.Transport | None:
        """The socket's, None once it is lost."""
        return self._transport

    @property
    def sink(self) -> Sink | None:
        """Where answers go, None once the socket is lost."""
        return self._sink

    @property
    def unread_bytes(self) -> int:
        """What waits for the client to read it: in our buffer, and in the system's."""
        transport = self._transport
        if transport is None:
            return 0
        sock = transport.get_extra_info("socket")
        # The buffer alone stands still for minutes: the system takes from it in lumps of megabytes.
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    # Closing and deadlines

    @property
    def is_idle(self) -> bool:
        """No request has begun on it."""
        return self._state is _HEAD and not self._buffer

    def close_if_idle(self, since: float = math.inf) -> None:
        """Close unless a request is under way, or one ended after `since`, in loop time."""
        if self.is_idle and self._waiting_since <= since:
            self._close()

    def abort(self) -> None:
        """Cut the connection; a running exchange learns it now, not in a later turn."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.abandon()
        if self._sink is not None:
            self._sink.abort()

    def _shut(self) -> None:
        """Nothing goes past the transport any more: it drops what comes after its end."""
        if self._sink is not None:
            self._sink.shut()

    def _close(self) -> None:
        """Flush what is written and close; who does not read it in time is cut."""
        self._state = _CLOSED
        self._shut()
        if self._transport is not None:
            self._transport.close()
            self._wait()

    def _linger(self) -> None:
        """Send our end and read on: closing over unread bytes would reset the answer away."""
        self._state = _LINGERING
        self._buffer = b""
        self._discarded_bytes = 0
        self._shut()
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        self._wait()

    def hasten(self, when: float) -> None:
        """The exchange wants to be asked by `when` (loop time)."""
        self._gateway.wheel.hasten(self, when)

    def _due(self) -> float:
        settings, state, since = self._gateway.config.server, self._state, self._waiting_since
        if self.is_paused and (state is _HEAD or state is _HANDLER):
            return since + settings.write_timeout
        if state is _HEAD:
            return since + (settings.head_timeout if self._buffer else settings.keepalive_timeout)
        if state is _BODY:
            return since + settings.body_timeout
        if state is _LINGERING:
            return since + LINGER
        return since + settings.write_timeout if state is _CLOSED else math.inf

    def on_deadline(self, now: float) -> float | None:
        """A limit of the answer has passed, or the client has been silent for too long."""
        exchange = self._exchange
        if self._state is _ANSWERING and exchange is not None:
            due = exchange.on_deadline(now)
            if self._exchange is exchange:  # it has not ended with that
                return due
        due = self._due()
        if now < due:
            return due if due < math.inf else None
        if self._state is _BODY and self._exchange is not None:
            self._answer_early()
            self._exchange.refuse(
                RequestError(
                    "expected the whole body within "
                    f"{self._gateway.config.server.body_timeout:g} s, got a part of it",
                    code="request_timeout",
                    status=408,
                ),
                close=True,
            )
        elif self._state is _HEAD and not self._buffer and not self.is_paused:
            self._close()
        else:
            self.abort()
        return None


def _head_for_handler(head: RequestHead) -> bytes:
    """A head for aiohttp's parser, of parts that passed ours."""
    target = b"%b?%b" % (head.path, head.query) if head.query else head.path
    fields = [b"%b: %b\r\n" % item for item in head.headers if item[0] in _HANDLER_FIELDS]
    line = b"%b %b HTTP/1.%d\r\n" % (head.method, target, head.version_minor)
    return b"%b%b\r\n" % (line, b"".join(fields))


class _Handler(asyncio.Transport):
    """One request in aiohttp's hands, and the transport it sees: ours, except that its closing
    only ends the answer. A response hook (app.py) makes every handler close after one answer."""

    def __init__(
        self,
        connection: DownstreamConnection,
        protocol: web.RequestHandler,
        body: BodyReader,
        keep_alive: bool,
    ) -> None:
        super().__init__()
        self._connection = connection
        self.protocol = protocol
        self._body = body
        self.wants_keep_alive = keep_alive
        self.keep_alive = False  # the hook's word, once it has seen the response
        self.is_answering = False  # a byte of the answer is out
        self._is_ended = False
        self._body_bytes = 0

    def start(self, raw_head: bytes) -> None:
        """Give aiohttp its head."""
        self.protocol.connection_made(self)
        self.protocol.data_received(raw_head)

    def feed(self, data: bytes) -> bytes:
        """Give aiohttp its part of the body; returns what belongs to the next request."""
        if self._body.is_complete:
            return data
        try:
            self._body.feed(data)
        except FramingError as error:
            # aiohttp's parser is not trusted with what ours refuses: the request ends here.
            self._connection.refuse_handler(error)
            return b""
        leftover = self._body.leftover
        part = data[: len(data) - len(leftover)]
        self._body_bytes += len(part)
        if self._body_bytes > self._connection.max_body_bytes:
            self._connection.abort()  # none of these requests has a use for a body
            return b""
        if part:
            self.protocol.data_received(part)
        return leftover

    def lose(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._is_ended = True
        # Not now: the task that aiohttp started with `start` must have begun, or it fails.
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, exc)

    # What aiohttp asks of a transport

    def write(self, data: Any) -> None:
        if not self._is_ended and (sink := self._connection.sink) is not None:
            self.is_answering = True
            sink.write_aside(data)

    def close(self) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)
        self._connection.handler_ended(
            keep_alive=self.keep_alive, is_request_complete=self._body.is_complete
        )

    def abort(self) -> None:
        self._connection.abort()

    def is_closing(self) -> bool:
        transport = self._connection.transport
        return self._is_ended or transport is None or transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        transport = self._connection.transport
        return default if transport is None else transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Never: a request's body is bounded, and the client's leaving must be seen."""

    def resume_reading(self) -> None:
        """Nothing to resume."""

    def is_reading(self) -> bool:
        return True

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        transport = self._connection.transport
        return 0 if transport is None else transport.get_write_buffer_size()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol
