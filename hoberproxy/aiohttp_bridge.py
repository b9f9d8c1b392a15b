"""One request in aiohttp's hands, on a connection that is wire.py's.

aiohttp sees a transport of its own, a head that was checked, and the body as it comes.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from aiohttp import web

from .http11_body import BodyReader, FramingError
from .http11_head import RequestHead
from .sink import Sink

# What aiohttp sees of a head: what its handlers read, and the framing. It is stricter than we are
# with some other fields, and shows them in its log.
HANDLER_FIELDS: Final = frozenset(
    (
        b"host",
        b"connection",
        b"content-length",
        b"transfer-encoding",
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"origin",
        b"access-control-request-method",
        b"access-control-request-headers",
    )
)


class HandlerConnection(Protocol):
    """The client's connection, as a handler's transport sees it."""

    @property
    def sink(self) -> Sink | None:
        """Where answers go, None once the socket is lost."""

    @property
    def transport(self) -> asyncio.Transport | None:
        """The socket's, None once it is lost."""

    @property
    def max_body_bytes(self) -> int:
        """The limit of a request's body."""

    def refuse_handler(self, error: FramingError) -> None:
        """The request breaks its own framing."""

    def handler_ended(self, *, keep_alive: bool, is_request_complete: bool) -> None:
        """The last byte of the answer was written."""

    def abort(self) -> None:
        """Cut the connection."""


def _head_for_handler(head: RequestHead) -> bytes:
    """A head for aiohttp's parser, of parts that passed ours."""
    target = b"%b?%b" % (head.path, head.query) if head.query else head.path
    fields = [b"%b: %b\r\n" % item for item in head.headers if item[0] in HANDLER_FIELDS]
    line = b"%b %b HTTP/1.%d\r\n" % (head.method, target, head.version_minor)
    return b"%b%b\r\n" % (line, b"".join(fields))


class Handler(asyncio.Transport):
    """One request in aiohttp's hands, and the transport it sees: ours, except that its closing
    only ends the answer. A response hook (app.py) makes every handler close after one answer."""

    def __init__(
        self,
        connection: HandlerConnection,
        protocol: web.RequestHandler,
        head: RequestHead,
        body: BodyReader,
        keep_alive: bool,
    ) -> None:
        super().__init__()
        self._connection = connection
        self.protocol = protocol
        self.head = head
        self._body = body
        self.wants_keep_alive = keep_alive
        self.keep_alive = False  # the hook's word, once it has seen the response
        self.is_answering = False  # a byte of the answer is out
        self._is_ended = False
        self._body_bytes = 0

    def start(self) -> None:
        """Give aiohttp its head."""
        self.protocol.connection_made(self)
        self.protocol.data_received(_head_for_handler(self.head))

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
