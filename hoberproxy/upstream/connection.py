"""One connection to a model server: sends a request, and walks the framing of the answer.

Leaves to others: what the bytes mean, to the receiver (relay/relay.py), and who uses the connection
next, to its owner (upstream/pool.py). A chunk passes socket → `data_received` → receiver with no
task switch.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import Final

from .._mypyc import mypyc_attr
from ..protocol.http_body import BodyReader, FramingError, Parts, body_reader, whole_chunk
from ..protocol.http_head import (
    MAX_RESPONSE_HEAD_BYTES,
    HeadError,
    ResponseHead,
    check_response_head,
    find_head_end,
)
from ..protocol.known_heads import ResponseHeads
from ..timer_wheel import Timed, Wheel

MAX_INTERIM_ANSWERS: Final = 16
# Chunks at the front of a body that are handed on one by one, until a ChunkTaker may have the rest:
# then none of it needs to be walked.
OPENING_CHUNKS: Final = 3
# Seconds in which the close of a kept connection that crossed our request arrives: a round trip.
STALE_WITHIN: Final = 5.0
MAX_UNWANTED_BYTES: Final = 64 * 1024  # after an answer's end, within its framing


class State(Enum):
    """Where a connection is between requests and their answers."""

    IDLE = "idle"
    ACTIVE = "active"
    CLOSED = "closed"


_IDLE: Final = State.IDLE
_ACTIVE: Final = State.ACTIVE


class Loss(Enum):
    """Why an answer will not be completed."""

    STALE = "the kept connection had been closed before it was used again"
    CUT = "the connection was closed before the answer was complete"
    MALFORMED = "the answer is not well-formed HTTP/1.1"


class ChunkTaker:
    """Takes the chunks of a body before their framing is walked, as they come from the socket."""

    __slots__ = ()

    def take(self, data: bytes) -> bytes:
        """Pass on whole chunks at the front of `data`; return the rest, b"" if there is none.

        The rest goes to the receiver, and then `flush` is called.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Send chunks that were held back to go together with what the receiver writes."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Receiver:
    """Takes the answer to one request; exactly one of `on_end` and `on_lost` comes last."""

    def on_head(self, head: ResponseHead) -> None:
        """Take the head of the final answer."""
        raise NotImplementedError

    def on_body(self, data: bytes) -> ChunkTaker | None:
        """Take the next piece of the body; return the taker of the chunks that follow, if any."""
        raise NotImplementedError

    def on_last(self, data: bytes) -> None:
        """Take the last piece of the body; `on_end` follows at once, unless the attempt fails."""
        self.on_body(data)

    def on_end(self) -> None:
        """Note that the framing of the body has ended."""
        raise NotImplementedError

    def on_whole(self, data: bytes) -> None:
        """Take all of a body, which came with the head."""
        self.on_last(data)
        self.on_end()

    def on_lost(self, loss: Loss) -> None:
        """Note that the answer will not be completed, because of `loss`."""
        raise NotImplementedError


class ConnectionOwner(Timed):
    """Lends connections, which report to it when they open, become idle, or close."""

    wheel: Wheel
    heads: ResponseHeads  # of the answers on all its connections

    def on_opened(self, connection: UpstreamConnection) -> None:
        """Count a connection that was made; `on_closed` follows, once."""
        raise NotImplementedError

    def on_idle(self, connection: UpstreamConnection, keepalive_hint: float | None) -> None:
        """Take back a connection whose answer ended exactly.

        `keepalive_hint` is the peer's `Keep-Alive: timeout=…` in seconds.
        """
        raise NotImplementedError

    def await_end(self, connection: UpstreamConnection) -> None:
        """Abort a connection unless its answer, which has no receiver any more, ends soon."""
        raise NotImplementedError

    def on_closed(self, connection: UpstreamConnection) -> None:
        """Forget a connection, idle or not, on which no request can be sent any more."""
        raise NotImplementedError


class UpstreamConnection:
    """Carries one request at a time, and gives the answer to a `receiver`.

    In any state but ACTIVE bytes from the peer close it. An asyncio.Protocol by its methods
    (docs/mypyc.md).
    """

    # First what each chunk touches, which lies side by side in two cache lines.
    _wheel: Wheel
    heard_at: float  # loop time of the last bytes, as of the wheel's last turn
    _taker: ChunkTaker | None
    receiver: Receiver | None

    def __init__(self, owner: ConnectionOwner) -> None:
        self._owner = owner
        self._wheel = owner.wheel
        self._transport: asyncio.Transport | None = None
        self.state = _IDLE
        self.receiver = None
        self._head = b""  # as far as it came
        self._head_searched = 0
        self._interim_answers = 0
        self._opening_chunks = 0
        self._response: ResponseHead | None = None
        self._body: BodyReader | None = None
        self.has_served = False  # an answer has ended on it: the peer may be about to close it
        self._has_answered = False  # a byte of the current answer has come
        self._has_ended = False  # the peer sends no more
        self._sent_at = 0.0
        self._unwanted_bytes = 0
        self._taker = None
        self.heard_at = 0.0
        self.idle_until = 0.0  # loop time; the owner's

    # What the attempt does

    def send(self, request: Parts, receiver: Receiver) -> None:
        """Send a whole request, its head and the parts of its body; `receiver` gets the answer."""
        assert self.state is _IDLE and self._transport is not None, "not ready for a request"
        self.state = _ACTIVE
        self.receiver = receiver
        self._body = None
        self._has_answered = False
        self._opening_chunks = OPENING_CHUNKS
        self._interim_answers = 0
        self._sent_at = self.heard_at = self._wheel.now
        for part in request:
            self._transport.write(part)

    def pause_upstream(self) -> None:
        """Read no more for now: the client is slower than the model server."""
        # Not once the answer has ended: the owner has it, and the next answer would not be read.
        if self.state is not _ACTIVE:
            return
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume_upstream(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()

    def drop_taker(self) -> None:
        """Give all chunks to the receiver until it returns a ChunkTaker again."""
        self._taker = None

    def await_end(self) -> None:
        """Drop the rest of an answer; the owner closes the connection unless it ends soon."""
        if self.state is not _ACTIVE:
            return
        self.receiver = self._taker = None
        self._unwanted_bytes = 0
        self.resume_upstream()  # whether the client is slow does not matter any more
        self._owner.await_end(self)

    def abort(self) -> None:
        """Close at once, and report nothing to the receiver."""
        self.receiver = self._taker = None
        self._close()

    @property
    def is_closed(self) -> bool:
        """Whether no request can be sent on it.

        The transport may know more: it reports that within this turn of the loop, and a request
        sent until then is sent again (Loss.STALE).
        """
        return self.state is State.CLOSED or self._transport is None or self._has_ended

    # What the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._owner.on_opened(self)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._wheel.now
        taker = self._taker
        if taker is None:
            self._receive(data)
        elif rest := taker.take(data):
            self._receive(rest)
            taker.flush()

    def _receive(self, data: bytes) -> None:
        """Take bytes without a ChunkTaker, or which it has left."""
        body = self._body
        if body is None:
            self._receive_head(data)
            return
        if self._opening_chunks and body.is_between_chunks:
            self._opening_chunks -= 1
            start, end = whole_chunk(data, 0)
            if end:
                self._hand_on(body, data[start:end])
                end += 2
                if end < len(data) and self._body is body:
                    self.data_received(data[end:])
                return
        self._receive_body(body, data)

    def _receive_body(self, body: BodyReader, data: bytes) -> None:
        try:
            pieces = body.feed(data)
        except FramingError:
            self._lose(Loss.MALFORMED)
            return
        if pieces:
            payload = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if not body.is_complete:
                self._hand_on(body, payload)
            elif self.receiver is not None:
                self.receiver.on_last(payload)
        if body.is_complete and self.state is _ACTIVE:
            self._end()

    def _hand_on(self, body: BodyReader, payload: bytes) -> None:
        receiver = self.receiver
        if receiver is None:
            self._drop(payload)
            return
        taker = receiver.on_body(payload)
        if taker is not None and body.is_between_chunks:
            self._taker = taker
            self._opening_chunks = 0
        else:
            self._taker = None

    def _drop(self, payload: bytes) -> None:
        self._unwanted_bytes += len(payload)
        if self._unwanted_bytes > MAX_UNWANTED_BYTES:
            self._close()

    def eof_received(self) -> bool:
        self._has_ended = True
        return False  # the transport closes

    def pause_writing(self) -> None:
        """Do nothing: a request is written at once."""

    def resume_writing(self) -> None:
        """Do nothing."""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is None:
            return  # it was never made
        was_active = self.state is _ACTIVE
        self._leave()
        self._transport = None
        if not was_active or self.receiver is None:
            return
        if exc is None and self._body is not None:
            try:
                self._body.feed_eof()
            except FramingError:
                pass
            else:  # a body until close ends like this
                receiver, self.receiver = self.receiver, None
                receiver.on_end()
                return
        # Later, the connection was not closing when the request came: the upstream died over it.
        is_soon = self._wheel.now - self._sent_at < STALE_WITHIN
        is_stale = self.has_served and not self._has_answered and is_soon
        self._report(Loss.STALE if is_stale else Loss.CUT)

    # The answer

    def _receive_head(self, data: bytes) -> None:
        if self.state is not _ACTIVE:
            self._close()  # no request was sent: the peer is out of step
            return
        self._has_answered = True
        heads = self._owner.heads
        if self._head:
            data, self._head = self._head + data, b""
        elif end := heads.find(data):
            assert heads.head is not None
            self._take_head(heads.head, data[end:])
            return
        while True:
            end = find_head_end(data, self._head_searched)
            if end < 0:
                self._keep_head(data)
                return
            self._head_searched = 0
            try:
                head = heads.parse(data[:end])
            except HeadError:
                self._lose(Loss.MALFORMED)
                return
            data = data[end:]
            if head.status >= 200:
                self._take_head(head, data)  # with which the next request may have been sent
                return
            # 100, 102, 103: the final answer is still to come (RFC 9110, 15.2).
            self._interim_answers += 1
            if self._interim_answers > MAX_INTERIM_ANSWERS:
                self._lose(Loss.MALFORMED)
                return

    def _keep_head(self, part: bytes) -> None:
        """Keep `part`, the beginning of a head, unless no rest can make it valid."""
        try:
            check_response_head(part, self._head_searched)
        except HeadError:
            self._lose(Loss.MALFORMED)
            return
        self._head, self._head_searched = part, max(0, len(part) - 3)
        if len(part) > MAX_RESPONSE_HEAD_BYTES:
            self._lose(Loss.MALFORMED)

    def _take_head(self, head: ResponseHead, rest: bytes) -> None:
        self._response = head
        if self.receiver is not None:
            self.receiver.on_head(head)
        if self.state is not _ACTIVE:
            return
        if head.length == len(rest):
            receiver, self.receiver = self.receiver, None
            self._let_go(is_exact=True)
            if receiver is not None:
                receiver.on_whole(rest)
            return
        self._body = body = body_reader(head)
        if rest:
            self._receive(rest)
        elif body.is_complete:
            self._end()

    def _end(self) -> None:
        """End a complete answer."""
        assert self._body is not None
        receiver, self.receiver = self.receiver, None
        self._let_go(is_exact=not self._body.leftover)
        if receiver is not None:
            receiver.on_end()

    def _let_go(self, *, is_exact: bool) -> None:
        """Go back to the owner if `is_exact`, so that no byte came after the answer; or close."""
        head, transport = self._response, self._transport
        assert head is not None and transport is not None
        self._body = self._taker = None
        self.has_served = True
        if (
            head.keep_alive
            and is_exact
            and not transport.is_closing()
            # Else an early answer came while the request is still being sent: out of step.
            and not transport.get_write_buffer_size()
        ):
            self.state = _IDLE
            self.resume_upstream()
            self._owner.on_idle(self, head.keepalive_hint)
        else:
            self._close()

    def _lose(self, loss: Loss) -> None:
        self._close()
        self._report(loss)

    def _report(self, loss: Loss) -> None:
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            receiver.on_lost(loss)

    def _close(self) -> None:
        transport = self._transport
        if transport is not None:
            self._leave()
            transport.abort()

    def _leave(self) -> None:
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            self._owner.on_closed(self)
