"""The response to one request, framed for the client's version of HTTP.

Frames and counts bytes that the exchange and its relay choose. HTTP/1.1 gets chunks, HTTP/1.0 a
body until the connection closes (RFC 9112, 6.3).
"""

from __future__ import annotations

from .._mypyc import mypyc_attr
from ..protocol.http_body import size_line
from ..protocol.http_head import Headers, begin_response_head
from ..timer_wheel import Timed
from .socket_writer import Sink


@mypyc_attr(allow_interpreted_subclasses=True)
class Client(Timed):
    """A client's connection, as its answers and their exchange see it."""

    is_paused = False  # the client reads more slowly than is written

    @property
    def unread_bytes(self) -> int:
        """Bytes that the client has yet to read, here and in the system."""
        raise NotImplementedError

    def hasten(self, when: float) -> None:
        """Call `on_deadline` by `when` (loop time)."""
        raise NotImplementedError

    def on_answer_end(self, *, keep_alive: bool) -> None:
        """Take note that the last byte was written; the connection goes on if `keep_alive`."""
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
        """Return where the caller may write chunks that it has framed and counted; None if nowhere.

        The caller may also `hold` such chunks, and must `flush` then.
        """
        return None

    def hold(self, chunks: bytes) -> None:
        """Send `chunks`, framed and counted already, together with whatever comes next."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send what is still held."""


class Answer(ResponseBody):
    """One response: `send` it whole, or `start`, `write` and `finish` it; or `abort` it.

    `prepared` are further lines of the head, which are known to be well-formed.
    """

    status = 0  # sent status, 0 before
    is_ended = False
    _pending = b""  # the head, or what is held: goes with what is written next, in one segment
    _body_bytes = 0
    _open_sink: Sink | None = None  # to which chunks go beside `write`

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
        """Whether the status is chosen."""
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
        """Begin a response of unknown length; its head goes out with the first `write`."""
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
        """Return the field that says whether the connection goes on, where the version does not."""
        if not self._keep_alive:
            return b"connection: close\r\n"
        return b"" if self._is_chunked else b"connection: keep-alive\r\n"


class KeptAnswer(ResponseBody):
    """Passes a response on to `body`, and keeps its bytes if they are `limit` at most."""

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
        """Keep `data`, which the caller writes elsewhere."""
        self._kept_bytes += len(data)
        if self._kept_bytes <= self._limit:
            self._pieces.append(data)

    @property
    def kept(self) -> bytes | None:
        """All bytes of the response; None if they are more than the limit."""
        return b"".join(self._pieces) if self._kept_bytes <= self._limit else None
