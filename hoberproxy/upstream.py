"""One connection to a model server: sends a request, walks the framing of the answer.

What the bytes mean is the receiver's business (relay.py), who may use the connection next is the
pool's (pool.py). A chunk passes socket → `data_received` → receiver with no task switch.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Final

from .deadlines import Wheel
from .http11_body import BodyReader, FramingError, Parts, body_reader, whole_chunk
from .http11_head import (
    MAX_RESPONSE_HEAD_BYTES,
    HeadError,
    ResponseHead,
    check_response_head,
    find_head_end,
)
from .native import mypyc_attr
from .sink import Outlet, Shortcut, Sink
from .stencil import Stencil

if TYPE_CHECKING:
    from .pool import Pool

MAX_INTERIM_ANSWERS: Final = 16
# Chunks at the front of a body that are handed on one by one, until a stencil may take the rest:
# then none of it needs to be walked.
OPENING_CHUNKS: Final = 3
# Seconds in which the close of a kept connection that crossed our request arrives: a round trip.
STALE_WITHIN: Final = 5.0
MAX_UNWANTED_BYTES: Final = 64 * 1024  # behind an answer's end, within its framing


class State(Enum):
    """Where a connection is between requests and their answers."""

    IDLE = "idle"
    ACTIVE = "active"
    CLOSED = "closed"


# As globals: on Python 3.11 a look-up on the enum class costs 0.1 µs.
_IDLE: Final = State.IDLE
_ACTIVE: Final = State.ACTIVE


class Loss(Enum):
    """Why an answer will not be completed."""

    STALE = "the kept connection had been closed before it was used again"
    CUT = "the connection was closed before the answer was complete"
    MALFORMED = "the answer is not well-formed HTTP/1.1"


@mypyc_attr(allow_interpreted_subclasses=True)
class Receiver:
    """Takes the answer to one request; exactly one of `on_end` and `on_lost` comes last."""

    def on_head(self, head: ResponseHead) -> None:
        """The head of the final answer."""
        raise NotImplementedError

    def on_body(self, data: bytes) -> Shortcut | None:
        """The next piece of the body; returns by which way chunks may go past from now on."""
        raise NotImplementedError

    def on_last(self, data: bytes) -> None:
        """The last piece of the body; unless it fails the attempt, `on_end` follows at once."""
        self.on_body(data)

    def on_end(self) -> None:
        """The body is complete as far as its framing goes."""
        raise NotImplementedError

    def on_whole(self, data: bytes) -> None:
        """All of the body, which came with the head."""
        self.on_last(data)
        self.on_end()

    def on_lost(self, loss: Loss) -> None:
        """There will be no more."""
        raise NotImplementedError


class UpstreamConnection:
    """Reports to `receiver` while ACTIVE; in any other state bytes from the peer close it.

    An asyncio.Protocol by its methods: a class derived from Python's would not be compiled.
    """

    # First what a chunk touches: side by side, in two cache lines at the most.
    _wheel: Wheel
    heard_at: float  # loop time of the last bytes, as of the wheel's last turn
    _stencil: Stencil | None  # takes chunks before their framing is walked
    _sink: Sink
    _outlet: Outlet
    receiver: Receiver | None

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._wheel = pool.wheel
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
        self._stencil = None
        self.heard_at = 0.0
        self.idle_until = 0.0  # loop time; the pool's

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
        """Stop reading: the client is slower than the model server."""
        # Not once its answer has ended: it is the pool's, and the next one would never be read.
        if self.state is not _ACTIVE:
            return
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume_upstream(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()

    def drop_shortcut(self) -> None:
        """Let no chunk pass the receiver until it says anew that they may."""
        self._stencil = None

    def await_end(self) -> None:
        """Let the answer end, which has said all: soon, or the connection is closed (pool.py)."""
        if self.state is not _ACTIVE:
            return
        self.receiver = self._stencil = None
        self._unwanted_bytes = 0
        self.resume_upstream()  # the client may be slow: that is of no concern any more
        self._pool.await_end(self)

    def abort(self) -> None:
        """Close at once, without a word to the receiver."""
        self.receiver = self._stencil = None
        self._close()

    @property
    def is_closed(self) -> bool:
        """No request can be sent on it.

        The transport is not asked: what else it knows it tells within this turn of the loop, and a
        request sent till then is sent anew (Loss.STALE).
        """
        return self.state is State.CLOSED or self._transport is None or self._has_ended

    # What the loop does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._pool.open += 1

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._wheel.now
        stencil = self._stencil
        if stencil is not None:
            passed = stencil.pass_chunks(data)
            if passed is not None:
                if not stencil.rest:
                    self._sink.write(passed)
                    return
                outlet = self._outlet
                outlet.hold(passed)
                data, stencil.rest = stencil.rest, b""
                self._receive(data)
                outlet.flush()
                return
        self._receive(data)

    def _receive(self, data: bytes) -> None:
        """Any bytes: whatever the stencil does not know, or cannot."""
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
        shortcut = receiver.on_body(payload)
        if shortcut is not None and body.is_between_chunks:
            self._stencil, self._sink, self._outlet = shortcut
            self._opening_chunks = 0
        else:
            self._stencil = None

    def _drop(self, payload: bytes) -> None:
        self._unwanted_bytes += len(payload)
        if self._unwanted_bytes > MAX_UNWANTED_BYTES:
            self._close()

    def eof_received(self) -> bool:
        self._has_ended = True
        return False  # the transport closes

    def pause_writing(self) -> None:
        """Nobody writes on: a request is sent at once."""

    def resume_writing(self) -> None:
        """Nobody waits for it."""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is None:
            return  # never made, or told by the pool already
        was_active = self.state is _ACTIVE
        if self.state is _IDLE:
            self._pool.forget(self)
        self._pool.note_end(self)
        self.state = State.CLOSED
        self._pool.open -= 1
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
        # Later than that it was not closing when the request came: the upstream died over it.
        is_soon = self._wheel.now - self._sent_at < STALE_WITHIN
        is_stale = self.has_served and not self._has_answered and is_soon
        self._report(Loss.STALE if is_stale else Loss.CUT)

    # The answer

    def _receive_head(self, data: bytes) -> None:
        if self.state is not _ACTIVE:
            self._close()  # nobody asked: the peer is out of step, nothing on it can be trusted
            return
        self._has_answered = True
        heads = self._pool.heads
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
        """Wait for the rest of a head, if there can be one."""
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
        """The answer is complete."""
        assert self._body is not None
        receiver, self.receiver = self.receiver, None
        self._let_go(is_exact=not self._body.leftover)
        if receiver is not None:
            receiver.on_end()

    def _let_go(self, *, is_exact: bool) -> None:
        """Back to the pool if nothing is in doubt: no byte more came than the answer's."""
        head, transport = self._response, self._transport
        assert head is not None and transport is not None
        self._body = self._stencil = None
        self.has_served = True
        if (
            head.keep_alive
            and is_exact
            and not transport.is_closing()
            # An early answer while the request is still being sent: out of step.
            and not transport.get_write_buffer_size()
        ):
            self.state = _IDLE
            self.resume_upstream()
            self._pool.release(self, head.keepalive_hint)
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
        if self.state is _IDLE:
            self._pool.forget(self)
        self._pool.note_end(self)
        self.state = State.CLOSED
        if self._transport is not None:
            self._transport.abort()
