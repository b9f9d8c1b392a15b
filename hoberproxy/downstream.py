"""The answer to one client, framed for its version of HTTP.

Knows framing and counts bytes; what is said is the exchange's and the relay's. HTTP/1.1 gets
chunks, HTTP/1.0 a body until close (RFC 9112, 6.3).
"""

from __future__ import annotations

from .deadlines import Timed
from .http11 import Headers, begin_response_head, size_line
from .native import mypyc_attr
from .sink import Shortcut, Sink
from .stencil import Stencil


@mypyc_attr(allow_interpreted_subclasses=True)
class Client(Timed):
    """The connection of a client, as its answers and their exchange see it."""

    is_paused = False  # the client reads slower than we write

    @property
    def unread_bytes(self) -> int:
        """What waits for the client to read it, here and in the system."""
        raise NotImplementedError

    def hasten(self, when: float) -> None:
        """Ask `on_deadline` by `when` (loop time)."""
        raise NotImplementedError

    def on_answer_end(self, *, keep_alive: bool) -> None:
        """The last byte was written; the connection may go on if `keep_alive`."""
        raise NotImplementedError


class Answer:
    """One response: `send` it whole, or `start`, `write` and `finish` it; or `abort` it.

    `prepared` are further lines of the head, of which it is known that they are well-formed.
    """

    status = 0  # sent status, 0 before
    is_ended = False
    _pending = b""  # the head, or what is held: goes with what is written next, in one segment
    _body_bytes = 0
    _stencil: Stencil | None = None  # whose chunks pass beside us

    def __init__(self, sink: Sink, client: Client, *, version_minor: int, keep_alive: bool) -> None:
        self._sink = sink
        self._client = client
        self._is_chunked = version_minor >= 1
        self._keep_alive = keep_alive

    @property
    def body_bytes(self) -> int:
        """Of the body so far, without its framing."""
        beside = self._stencil.framed_bytes if self._stencil is not None else 0
        return self._body_bytes + beside

    @property
    def is_started(self) -> bool:
        """The status line is spent."""
        return self.status != 0

    def send(
        self,
        status: int,
        headers: Headers,
        body: bytes,
        *,
        close: bool = False,
        prepared: bytes = b"",
    ) -> None:
        """The whole answer at once."""
        assert not self.is_started, "one answer per request"
        self.status = status
        self._body_bytes = len(body)
        if close:
            self._keep_alive = False
        start = begin_response_head(status, headers)
        length = b"%d\r\n" % len(body)
        ending = self._connection()
        self._sink.write(
            b"".join((start, prepared, b"content-length: ", length, ending, b"\r\n", body))
        )
        self._end()

    def start(self, status: int, headers: Headers, prepared: bytes = b"") -> None:
        """The head of an answer whose length is not known; goes out with the first `write`."""
        assert not self.is_started, "one answer per request"
        self.status = status
        if self._is_chunked:
            framing = b"transfer-encoding: chunked\r\n"
        else:
            framing = b""
            self._keep_alive = False
        start = begin_response_head(status, headers)
        self._pending = b"".join((start, prepared, framing, self._connection(), b"\r\n"))

    def write(self, data: bytes) -> None:
        """A part of the body."""
        self._body_bytes += len(data)
        if self._is_chunked:
            data = b"".join((self._pending, size_line(len(data)), data, b"\r\n"))
        elif self._pending:
            data = self._pending + data
        self._pending = b""
        self._sink.write(data)

    def open_shortcut(self, stencil: Stencil) -> Shortcut | None:
        """The way by which chunks that `stencil` has framed pass beside us; None without chunks."""
        if not self._is_chunked:
            return None
        self._stencil = stencil
        return stencil, self._sink, self

    def hold(self, chunks: bytes) -> None:
        """Send these, framed already and counted by the stencil, before whatever comes next."""
        self._pending += chunks

    def flush(self) -> None:
        """Send what is still held."""
        if self._pending and not self.is_ended:
            self._sink.write(self._pending)
            self._pending = b""

    def finish(self, data: bytes = b"", *, close: bool = False) -> None:
        """The last part of the body, possibly empty, and its end."""
        self._body_bytes += len(data)
        if close:
            self._keep_alive = False
        if self._is_chunked:
            end = b"0\r\n\r\n"
            data = b"".join((size_line(len(data)), data, b"\r\n", end)) if data else end
        if self._pending or data:
            self._sink.write(self._pending + data)
            self._pending = b""
        self._end()

    def abort(self) -> None:
        """Cut the connection: the client must see that the answer is not complete."""
        if not self.is_ended:
            self.is_ended = True
            self._sink.abort()

    def _end(self) -> None:
        self.is_ended = True
        self._client.on_answer_end(keep_alive=self._keep_alive)

    def _connection(self) -> bytes:
        """The line that says whether the connection goes on; none where the version says it."""
        if not self._keep_alive:
            return b"connection: close\r\n"
        return b"" if self._is_chunked else b"connection: keep-alive\r\n"
