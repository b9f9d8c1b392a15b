"""The answer to one client, framed for its version of HTTP.

Knows framing and counts bytes; what is said is the exchange's and the relay's. HTTP/1.1 gets
chunks, HTTP/1.0 a body until close (RFC 9112, 6.3).
"""

from __future__ import annotations

from .deadlines import Timed
from .http11_body import size_line
from .http11_head import Headers, begin_response_head
from .native import mypyc_attr
from .sink import Sink


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


class ResponseBody:
    """Takes the parts of one response's body."""

    def write(self, data: bytes) -> None:
        """Send a part of the body."""
        raise NotImplementedError

    def finish(self, data: bytes = b"", *, close: bool = False) -> None:
        """Send the last part of the body, possibly empty, and end it."""
        raise NotImplementedError

    def open_sink(self) -> Sink | None:
        """Return where chunks may be written that their writer frames and counts; None if nowhere.

        Such a writer may also `hold` chunks, and must `flush` then.
        """
        return None

    def hold(self, chunks: bytes) -> None:
        """Send chunks, framed and counted already, before whatever comes next."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send what is still held."""


class Answer(ResponseBody):
    """One response: `send` it whole, or `start`, `write` and `finish` it; or `abort` it.

    `prepared` are further lines of the head, of which it is known that they are well-formed.
    """

    status = 0  # sent status, 0 before
    is_ended = False
    _pending = b""  # the head, or what is held: goes with what is written next, in one segment
    _body_bytes = 0
    _open_sink: Sink | None = None  # to which chunks pass beside `write`

    def __init__(self, sink: Sink, client: Client, *, version_minor: int, keep_alive: bool) -> None:
        self._sink = sink
        self._client = client
        self._is_chunked = version_minor >= 1
        self._keep_alive = keep_alive

    @property
    def body_bytes(self) -> int:
        """Bytes of the body so far, without its framing."""
        framed = self._open_sink.framed_bytes if self._open_sink is not None else 0
        return self._body_bytes + framed

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
        """Send the whole response at once."""
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
        """Begin a response whose length is not known; its head goes out with the first `write`."""
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
        self._body_bytes += len(data)
        if self._is_chunked:
            data = b"".join((self._pending, size_line(len(data)), data, b"\r\n"))
        elif self._pending:
            data = self._pending + data
        self._pending = b""
        self._sink.write(data)

    def open_sink(self) -> Sink | None:
        if not self._is_chunked:
            return None
        self._sink.framed_bytes = 0
        self._open_sink = self._sink
        return self._sink

    def hold(self, chunks: bytes) -> None:
        self._pending += chunks

    def flush(self) -> None:
        if self._pending and not self.is_ended:
            self._sink.write(self._pending)
            self._pending = b""

    def finish(self, data: bytes = b"", *, close: bool = False) -> None:
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
        """Cut the connection: the client must see that the response is not complete."""
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


class KeptAnswer(ResponseBody):
    """A response's body whose bytes, up to `limit`, are kept on their way to `body`."""

    def __init__(self, body: ResponseBody, limit: int) -> None:
        self._body = body
        self._limit = limit
        self._pieces: list[bytes] = []
        self._kept_bytes = 0

    def write(self, data: bytes) -> None:
        self.keep(data)
        self._body.write(data)

    def finish(self, data: bytes = b"", *, close: bool = False) -> None:
        self.keep(data)
        self._body.finish(data, close=close)

    def keep(self, data: bytes) -> None:
        """Keep `data`, which is written elsewhere."""
        self._kept_bytes += len(data)
        if self._kept_bytes <= self._limit:
            self._pieces.append(data)

    @property
    def kept(self) -> bytes | None:
        """All that was written; None if it was more than the limit."""
        return b"".join(self._pieces) if self._kept_bytes <= self._limit else None
