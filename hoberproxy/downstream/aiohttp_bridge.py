"""Has aiohttp answer one request on a connection that downstream/connection.py keeps.

aiohttp gets a separate transport, the checked head, and the body as it comes.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from aiohttp import web

from ..protocol.http_body import BodyReader, FramingError
from ..protocol.http_head import RequestHead
from .socket_writer import Sink

# The fields that aiohttp sees: those that its handlers read, and the framing. With some others its
# parser is stricter than ours, and writes them into its log.
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
    """A client's connection, as a handler's transport sees it."""

    @property
    def max_body_bytes(self) -> int:
        """The limit of a request's body."""

    def refuse_handler(self, error: FramingError) -> None:
        """Answer a request whose body breaks its own framing."""

    def handler_ended(self, *, keep_alive: bool, is_request_complete: bool) -> None:
        """Go on after the last byte of the answer."""

    def abort(self) -> None:
        """Cut the connection."""


def _head_for_handler(head: RequestHead) -> bytes:
    """Return `head` for aiohttp's parser, of parts that passed the proxy's own."""
    target = b"%b?%b" % (head.path, head.query) if head.query else head.path
    fields = [b"%b: %b\r\n" % item for item in head.headers if item[0] in HANDLER_FIELDS]
    line = b"%b %b HTTP/1.%d\r\n" % (head.method, target, head.version_minor)
    return b"%b%b\r\n" % (line, b"".join(fields))


class Handler(asyncio.Transport):
    """One request that aiohttp answers, and the transport that aiohttp sees.

    Its `close` ends the answer and not the connection: a hook (api/routes.py) makes every handler
    close after one answer.
    """

    def __init__(
        self,
        connection: HandlerConnection,
        transport: asyncio.Transport,
        sink: Sink,
        protocol: web.RequestHandler,
        head: RequestHead,
        body: BodyReader,
        keep_alive: bool,
    ) -> None:
        super().__init__()
        self._connection = connection
        self._transport = transport
        self._sink = sink
        self.protocol = protocol
        self.head = head
        self._body = body
        self.wants_keep_alive = keep_alive
        self.keep_alive = False  # set by the hook that sees the response
        self.is_answering = False  # a byte of the answer is out
        self._is_ended = False
        self._body_bytes = 0

    def start(self) -> None:
        """Give aiohttp the head."""
        self.protocol.connection_made(self)
        self.protocol.data_received(_head_for_handler(self.head))

    def feed(self, data: bytes) -> bytes:
        """Give aiohttp what `data` has of the body; return what belongs to the next request."""
        if self._body.is_complete:
            return data
        try:
            self._body.feed(data)
        except FramingError as error:
            # What the proxy's parser refuses never reaches aiohttp's.
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
        """End the handler of a client that has gone."""
        self._is_ended = True
        # In a later turn: the task that aiohttp made in `start` fails unless it has begun.
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, exc)

    # The transport of aiohttp

    def write(self, data: Any) -> None:
        if not self._is_ended:
            self.is_answering = True
            self._sink.write_aside(data)

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
        return self._is_ended or self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        # Of a socket that is lost, uvloop's raises OSError.
        return default if self._is_ended else self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Do nothing: a body is bounded, and that the client leaves must be seen."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def is_reading(self) -> bool:
        return True

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()
