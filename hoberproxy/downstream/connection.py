"""A client's connection: checks every request's head and gives the request to a handler.

The body of a chat request is read here, for a RequestHandler; every other request goes, with its
head checked, to aiohttp (downstream/aiohttp_bridge.py). The connection knows where requests begin
and end and which handler answers; handlers decide what is answered.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import re
import sys
import termios
from enum import Enum
from typing import Any, Final, cast

from aiohttp import web

from ..errors import ProxyError, RequestError, UnavailableError, retry_headers, serialize_error
from ..protocol.http_body import BodyReader, FramingError, LengthBody, body_reader
from ..protocol.http_head import (
    CONTINUE,
    MAX_REQUEST_HEAD_BYTES,
    HeadError,
    RequestHead,
    find_head_end,
    parse_request_head,
    skip_empty_line,
)
from ..protocol.known_heads import RepeatedHead, repeated_head
from .aiohttp_bridge import Handler
from .cors import cors_headers
from .request_handler import Admitted, BeginHandler, ConnectionContext, RequestHandler
from .response import Answer, Client
from .socket_writer import Sink

CHAT_PATHS: Final = frozenset(
    (b"/v1/chat/completions", b"/chat/completions", b"/api/v1/chat/completions")
)
# Bytes of following requests that are kept while one is answered. Reading never pauses, or the
# client's leaving would go unseen; whoever sends more is closed after the answer.
MAX_PIPELINED_BYTES: Final = 64 * 1024
SMALL_PIECE_BYTES: Final = 4096  # of a body; smaller ones are joined, or objects outweigh bytes
LINGER = 5.0  # seconds to read on after an early answer, so that no reset overtakes it
LINGER_MAX_BYTES = 64 * 1024 * 1024
# An empty line, but not one that ends a head.
_find_bare_end: Final = re.compile(rb"\n\r?\n").search
# aiohttp's parser would answer other methods with an error in another form.
METHODS: Final = (b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT", b"TRACE")


class State(Enum):
    """What the next bytes of the client are."""

    HEAD = "head"
    BODY = "body"  # of a chat request
    ANSWERING = "answering"  # a chat request is answered; bytes belong to the next request
    HANDLER = "handler"  # aiohttp answers; bytes are the rest of its request, then the next one's
    LINGERING = "lingering"  # the last answer is out, what comes is thrown away
    CLOSED = "closed"


_HEAD: Final = State.HEAD
_BODY: Final = State.BODY
_ANSWERING: Final = State.ANSWERING
_HANDLER: Final = State.HANDLER
_LINGERING: Final = State.LINGERING
_CLOSED: Final = State.CLOSED


class DownstreamConnection(Client):
    """One socket of a client, with any number of requests one after the other.

    An asyncio.Protocol by its methods (docs/mypyc.md).
    """

    def __init__(
        self,
        context: ConnectionContext,
        begin: BeginHandler,
        handlers: web.Server,
        connections: set[Any],
    ) -> None:
        """Use `begin` to make handlers of chat requests, and `handlers` for all other requests.

        The connection keeps itself in `connections` while it is open.
        """
        self._context = context
        self._begin = begin
        self._handlers = handlers
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._state = _HEAD
        self._buffer = b""  # bytes that belong to a request not yet begun
        self._searched = 0
        self._repeated: RepeatedHead | None = None  # the last chat request's
        self._admitted: Admitted | None = None  # the sender of the last chat request
        self._body: BodyReader | None = None
        self._pieces: list[bytes] = []
        self._body_bytes = 0
        self._handler: RequestHandler | None = None
        self._bridge: Handler | None = None
        self._is_overrun = False  # more was pipelined than we keep
        self._waiting_since = 0.0
        self._discarded_bytes = 0

    # What the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        socket = transport.get_extra_info("socket")
        self._transport = made = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._sink = Sink(made, -1 if socket is None else socket.fileno())
        self._connections.add(self)
        try:
            room = self._context.room
            if len(self._connections) > room.limit:
                room.make(self._connections, self, self._context.loop.time())
        except UnavailableError as error:
            self._context.refused_connections += 1
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
            assert self._bridge is not None
            self._hold(self._bridge.feed(data))
        elif state is _ANSWERING:
            self._hold(data)
        elif state is _LINGERING:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > LINGER_MAX_BYTES:
                self.abort()

    def eof_received(self) -> bool:
        # A client that closes its sending side has gone, as far as HTTP clients go: its upstream
        # is closed in this turn. Answers already written are still flushed by the closing.
        if self._handler is not None:
            self.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSED
        self._shut()
        self._transport = self._sink = None
        self._connections.discard(self)
        self._context.wheel.cancel(self)
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.abandon()
        if self._bridge is not None:
            self._bridge.lose(exc)
            self._bridge = None

    def pause_writing(self) -> None:
        self.is_paused = True
        if self._handler is not None:
            self._handler.pause()
        elif self._bridge is not None:
            self._bridge.protocol.pause_writing()
            self._wait()

    def resume_writing(self) -> None:
        self.is_paused = False
        if self._handler is not None:
            self._handler.resume()
        elif self._bridge is not None:
            self._bridge.protocol.resume_writing()
        elif self._state is _HEAD:
            self._await_request()

    # The head

    def _await_request(self) -> None:
        """Take the next bytes as a head: no request is under way."""
        self._state = _HEAD
        self._searched = 0
        self._is_overrun = False
        context = self._context
        # Also while draining: a request may be on its way already, and closing would reset it. Its
        # answer says that the connection closes.
        if self._buffer or self.is_paused:
            if not self.is_paused:
                # In a later turn: an answer may just be ending in the caller.
                context.loop.call_soon(self._read_head)
            self._wait()
        else:
            self._waiting_since = now = context.wheel.now
            context.wheel.hasten(self, now + context.settings.keepalive_timeout)

    def _wait(self) -> None:
        """Begin the time limit of the connection's state."""
        wheel = self._context.wheel
        self._waiting_since = wheel.now
        wheel.hasten(self, self._due())

    def _read_head(self) -> None:
        # A client that does not read earlier answers gets no further requests into memory.
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
            self._begin_bridge(head, buffer[end:])
        else:
            methods = b", ".join(METHODS).decode()
            unknown = HeadError(f"expected a method out of {methods}, got another", 405)
            self._refuse_head(unknown, head)

    def _check_unfinished(self, buffer: bytes) -> None:
        """Refuse an unfinished head in `buffer` that no further bytes can make valid."""
        if len(buffer) > MAX_REQUEST_HEAD_BYTES:
            too_large = f"expected a head of at most {MAX_REQUEST_HEAD_BYTES} bytes, got more"
            self._refuse_head(HeadError(too_large, 431))
        elif _find_bare_end(buffer, max(0, self._searched - 2)) is not None:
            # A line ends in bare LF: the head's end would be waited for until the time limit.
            self._refuse_head(HeadError("expected lines that end with CR LF, got a bare LF"))

    def _refuse_head(self, error: HeadError, head: RequestHead | None = None) -> None:
        """Answer 400 to what is no request, or could be read as two (RFC 9112, 11.2), and close.

        `head` is the request's, where it could be parsed.
        """
        self._context.bad_heads += 1
        status = error.status if error.status != 501 else 400
        code = "method_not_allowed" if status == 405 else "invalid_request"
        self._refuse(status, RequestError(str(error), code=code, status=status), head)

    def _refuse(self, status: int, error: ProxyError, head: RequestHead | None = None) -> None:
        """Answer with `error` in place of a request, and close."""
        origins = self._context.settings.cors_origins
        origin = head.get(b"origin") if head is not None else None
        # Without a head: what stands where a request has its target.
        path = head.path if head is not None else self._buffer[:64].lstrip().partition(b" ")[2]
        self._buffer = b""
        self._answer_early()
        answer = self._answer(version_minor=1, keep_alive=False)
        answer.send(
            status,
            [
                (b"content-type", b"application/json"),
                (b"x-request-id", self._context.new_request_id().encode()),
                *(retry_headers(error) or [(b"x-should-retry", b"false")]),
                *([(b"allow", b", ".join(METHODS))] if status == 405 else []),
                *cors_headers(origins, origin),
            ],
            serialize_error(error, numeric_code=path.startswith(b"/api/")),
        )

    def _answer(self, *, version_minor: int, keep_alive: bool) -> Answer:
        assert self._sink is not None
        return Answer(self._sink, self, version_minor=version_minor, keep_alive=keep_alive)

    # Chat requests

    def _begin_chat(self, head: RequestHead, length: int | None, rest: bytes) -> None:
        """Begin a chat request with a body of `length` bytes (None: chunked, or without a body)."""
        context = self._context
        assert self._sink is not None
        answer = Answer(
            self._sink,
            self,
            version_minor=head.version_minor,
            keep_alive=head.keep_alive and not context.is_draining,
        )
        self._handler = handler = self._begin(self, head, answer)
        self._admitted = handler.admit(self._admitted)
        if length == len(rest) and length <= context.settings.max_body_bytes:
            self._state = _ANSWERING
            handler.run(rest)
        elif self._admitted is None:
            self._refuse_at_head(head, length, rest)
        elif length is not None and length > context.settings.max_body_bytes:
            self._refuse_body()
        elif not handler.enter():
            self._refuse_at_head(head, length, rest)
        else:
            self._begin_body(head, length, rest)

    def _begin_body(self, head: RequestHead, length: int | None, rest: bytes) -> None:
        """Begin to read a body of which `rest` has come."""
        self._body = body = body_reader(head) if length is None else LengthBody(length)
        self._body_bytes = 0
        self._state = _BODY
        if head.expects_continue and not rest and not body.is_complete:
            self._write_continue()
        if rest or body.is_complete:
            self._read_body(rest)
        if self._state is _BODY:
            self._wait()

    def _refuse_at_head(self, head: RequestHead, length: int | None, rest: bytes) -> None:
        """Refuse a request by its head alone, without waiting for a stranger's body.

        Where the whole body came along, the next request is found after it, and the connection
        goes on.
        """
        handler = self._handler
        assert handler is not None
        body = body_reader(head) if length is None else LengthBody(length)
        try:
            body.feed(rest)
            is_whole = body.is_complete
        except FramingError:
            is_whole = False
        if is_whole:
            self._state = _ANSWERING
            self._buffer = body.leftover
        else:
            self._answer_early()
        handler.run(b"", close=not is_whole)

    def _write_continue(self) -> None:
        assert self._sink is not None
        self._sink.write(CONTINUE)

    def _read_body(self, data: bytes) -> None:
        body, handler = self._body, self._handler
        assert body is not None and handler is not None
        try:
            pieces = body.feed(data)
        except FramingError as error:
            self._answer_early()
            handler.fail(
                RequestError(f"the body's framing: {error}", code="invalid_request"), close=True
            )
            return
        self._body_bytes += sum(map(len, pieces))
        if self._body_bytes > self.max_body_bytes:
            self._refuse_body()
            return
        # At most one object a read: chunks of a byte or two would cost twenty times their size.
        if self._pieces and len(self._pieces[-1]) < SMALL_PIECE_BYTES:
            pieces.insert(0, self._pieces.pop())
        if pieces:
            self._pieces.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        try:
            handler.hold_body(self._body_bytes)
        except UnavailableError as full:
            self._answer_early()
            handler.fail(full, close=True)
            return
        if body.is_complete:
            whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces = []
            self._body = None
            self._state = _ANSWERING
            self._buffer = body.leftover
            handler.run(whole)

    def _refuse_body(self) -> None:
        assert self._handler is not None
        self._answer_early()
        self._handler.fail(
            RequestError(
                f"expected a body of at most {self.max_body_bytes} bytes, got more",
                code="body_too_large",
                status=413,
            ),
            close=True,
        )

    def _answer_early(self) -> None:
        """Note that an answer comes before the request's end, whose rest cannot be trusted."""
        self._pieces = []
        self._state = _ANSWERING
        self._is_overrun = True

    def on_answer_end(self, *, keep_alive: bool) -> None:
        """Go on after the last byte of an answer to a chat request."""
        self._handler = None
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

    # Other requests, which aiohttp answers

    def _begin_bridge(self, head: RequestHead, rest: bytes) -> None:
        transport, sink = self._transport, self._sink
        assert transport is not None and sink is not None
        self._state = _HANDLER
        keep_alive = head.keep_alive and not self._context.is_draining
        body = body_reader(head)
        if head.expects_continue and not rest and not body.is_complete:
            self._write_continue()
        self._bridge = Handler(self, transport, sink, self._handlers(), head, body, keep_alive)
        self._bridge.start()
        self._hold(self._bridge.feed(rest))

    def refuse_handler(self, error: FramingError) -> None:
        """Answer a request whose body breaks its framing with 400, if nothing was sent yet."""
        handler, self._bridge = self._bridge, None
        assert handler is not None
        handler.lose(None)
        if handler.is_answering:
            self.abort()
        else:
            self._refuse_head(HeadError(f"the body's framing: {error}"), handler.head)

    def handler_ended(self, *, keep_alive: bool, is_request_complete: bool) -> None:
        """Go on after the last byte of an answer by aiohttp."""
        self._bridge = None
        if self._state is _HANDLER:
            self._is_overrun = self._is_overrun or not is_request_complete
            self._after_answer(keep_alive=keep_alive)

    @property
    def max_body_bytes(self) -> int:
        """The limit of any request's body."""
        return self._context.settings.max_body_bytes

    @property
    def unread_bytes(self) -> int:
        """Bytes that the client has yet to read: in the transport's buffer and in the system's."""
        transport = self._transport
        if transport is None:
            return 0
        sock = transport.get_extra_info("socket")
        # The transport's buffer alone may not change for minutes: the system takes megabytes of it
        # at once.
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    # Closing and deadlines

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way, but for a head that is not whole."""
        return self._state is _HEAD or self._state is _LINGERING

    @property
    def waiting_since(self) -> float:
        """Loop time since which `is_waiting` holds."""
        return self._waiting_since

    @property
    def is_idle(self) -> bool:
        """Whether no byte of a request has come."""
        return self._state is _HEAD and not self._buffer

    def close_if_idle(self, since: float = math.inf) -> None:
        """Close unless a request is under way, or one ended after `since` (loop time)."""
        if self.is_idle and self._waiting_since <= since:
            self._close()

    def abort(self) -> None:
        """Cut the connection; abandon a running request now, not in a later turn."""
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.abandon()
        if self._sink is not None:
            self._sink.abort()

    def _shut(self) -> None:
        """Write by the transport alone from now on: it discards what comes after its close."""
        if self._sink is not None:
            self._sink.shut()

    def _close(self) -> None:
        """Close once all is flushed; cut a client that does not read it in time."""
        self._state = _CLOSED
        self._shut()
        if self._transport is not None:
            self._transport.close()
            self._wait()

    def _linger(self) -> None:
        """End the sending side and read on: a close with bytes unread would reset the answer."""
        self._state = _LINGERING
        self._buffer = b""
        self._discarded_bytes = 0
        self._shut()
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        self._wait()

    def hasten(self, when: float) -> None:
        """Call the handler's `on_deadline` by `when` (loop time)."""
        self._context.wheel.hasten(self, when)

    def _due(self) -> float:
        settings, state, since = self._context.settings, self._state, self._waiting_since
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
        """Pass the time on to the handler, or end a client that has been silent for too long."""
        handler = self._handler
        if self._state is _ANSWERING and handler is not None:
            due = handler.on_deadline(now)
            if self._handler is handler:  # it has not ended with that
                return due
        due = self._due()
        if now < due:
            return due if due < math.inf else None
        if self._state is _BODY and self._handler is not None:
            self._answer_early()
            self._handler.fail(
                RequestError(
                    "expected the whole body within "
                    f"{self._context.settings.body_timeout:g} s, got a part of it",
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
