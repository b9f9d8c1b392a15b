"""One connection of the load generator, as a raw protocol: sends a request, times its answer.

What is sent when is load.py's; whether an answer is right is checks.py's. Times are monotonic ns.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import cast

from .checks import Answer, AnswerError
from .histogram import Histogram

PORTS_PER_ADDRESS = 20_000  # of one source address to one server; Linux has 28,000 by default
SOURCE_ADDRESSES = 250  # 127.0.0.1 and on
IP_BIND_ADDRESS_NO_PORT = 24  # ip(7): take the port at connect, so it need only differ per server
SLOW_BUFFER_BYTES = 16_384  # of a slow reader's socket, so that the server feels it soon


@dataclass(slots=True)
class Results:
    """What came of the requests of one phase. Times of answers that were whole and right only."""

    sent: int = 0
    complete: int = 0
    events: int = 0
    received_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_content_ns: Histogram = field(default_factory=Histogram)
    event_delay_ns: Histogram = field(default_factory=Histogram)
    gap_ns: Histogram = field(default_factory=Histogram)
    total_ns: Histogram = field(default_factory=Histogram)
    rate_milli: Histogram = field(default_factory=Histogram)  # tokens per 1,000 s of a stream

    @property
    def failed(self) -> int:
        return self.errors.total()


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect; the name is resolved already."""

    family: socket.AddressFamily
    address: tuple[str, int]
    tls: ssl.SSLContext | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is sent on all connections, and what must come back (see `checks.Answer`)."""

    request: bytes
    is_stream: bool
    events: int | None
    answer_bytes: int | None
    read_rate: float | None = None  # bytes per second and connection


class Client(asyncio.Protocol):
    """One connection. `begin` a request when it is idle; `on_end` is called when that has ended.

    Theory of operation: `_answer` is what is waited for, None while idle. All that an answer adds
    to the results is kept here until it has proved right, so that no error gets into a latency.
    """

    __slots__ = (
        "_answer",
        "_batches",
        "_delays",
        "_due",
        "_exchange",
        "_first",
        "_gaps",
        "_is_fresh",
        "_last",
        "_loop",
        "_on_end",
        "_received",
        "_results",
        "_transport",
        "began",
    )

    def __init__(self, exchange: Exchange, on_end: Callable[[Client], None]) -> None:
        self._exchange = exchange
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._is_fresh = True  # no answer has come on it yet
        self.began = 0  # when the request was written

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class

    @property
    def is_idle(self) -> bool:
        """Whether it can take a request."""
        return self._answer is None and self._transport is not None

    @property
    def is_closed(self) -> bool:
        return self._transport is None

    def begin(self, results: Results, due: int) -> None:
        """Send the request; times count from `due`, which may be in the past."""
        assert self._transport is not None, "the caller asks is_idle first"
        exchange = self._exchange
        self._results = results
        self._answer = Answer(exchange.is_stream, exchange.events, exchange.answer_bytes)
        self._due = due
        self._first = self._last = self._received = 0
        self._delays: list[int] = []
        self._batches: list[tuple[int, int]] = []
        self._gaps: list[int] = []
        self.began = monotonic_ns()
        self._transport.write(exchange.request)

    def fail(self, kind: str) -> None:
        """End the request as an error of this class, and the connection with it."""
        if self._answer is not None:
            self._answer = None
            self._results.errors[kind] += 1
            self.close()
            self._on_end(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # Protocol callbacks

    def data_received(self, data: bytes) -> None:
        now = monotonic_ns()
        answer = self._answer
        if answer is None:  # an answer that nobody asked for, or the rest of one that failed
            self.close()
            return
        self._received += len(data)
        try:
            count = answer.feed(data)
            if count:
                self._note_events(now, count, answer.sent)
            if answer.is_complete:
                answer.finish()
                self._succeed(now, answer)
                return
        except AnswerError as exc:
            self.fail(exc.kind)
            return
        if self._exchange.read_rate:
            self._slow_down(len(data) / self._exchange.read_rate)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        answer = self._answer
        if answer is None:
            return
        try:
            answer.feed_eof()
            answer.finish()
        except AnswerError as error:
            self.fail(self._why_lost(error, exc))
        else:
            self._succeed(monotonic_ns(), answer)

    def _why_lost(self, error: AnswerError, exc: Exception | None) -> str:
        if error.kind == "cut" and not self._received and not self._is_fresh:
            return "stale_connection"  # the server closed it while it was idle
        return "reset" if isinstance(exc, ConnectionError) else error.kind

    # Times

    def _note_events(self, now: int, count: int, sent: list[int]) -> None:
        if not self._first:
            self._first = now
        else:
            self._gaps.append(now - self._last)
        self._last = now
        if not sent:
            return
        if sent[0] == sent[-1]:
            if count == 1:
                self._delays.append(now - sent[0])
            else:
                self._batches.append((now - sent[0], count))
        else:
            self._delays += [now - each for each in sent]

    def _succeed(self, now: int, answer: Answer) -> None:
        results = self._results
        results.complete += 1
        results.events += answer.events
        results.received_bytes += self._received
        results.total_ns.record(now - self._due)
        if self._first:
            self._record_stream(answer)
        self._answer = None
        self._is_fresh = False
        if not answer.can_reuse:
            self.close()
        self._on_end(self)

    def _record_stream(self, answer: Answer) -> None:
        results = self._results
        results.first_content_ns.record(self._first - self._due)
        results.event_delay_ns.record_all(self._delays)
        for delay, times in self._batches:
            results.event_delay_ns.record(delay, times)
        results.gap_ns.record_all(self._gaps)
        if together := answer.events - 1 - len(self._gaps):
            results.gap_ns.record(0, together)  # came with the one before, in one read
        tokens = answer.completion_tokens or answer.events
        if self._last > self._first and tokens > 1:
            results.rate_milli.record(round((tokens - 1) * 1e12 / (self._last - self._first)))

    def _slow_down(self, seconds: float) -> None:
        if self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_later(seconds, self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()


async def connect(
    target: Target, exchange: Exchange, number: int, on_end: Callable[[Client], None]
) -> Client:
    """Open connection number `number` of this process. Raises OSError."""
    loop = asyncio.get_running_loop()
    plain = socket.socket(target.family, socket.SOCK_STREAM)
    try:
        plain.setblocking(False)
        if exchange.read_rate:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
        _bind_source(plain, target, number)
        if plain.connect_ex(target.address) != 0:  # on loopback it is done at once
            with _connected_meanwhile():
                await loop.sock_connect(plain, target.address)
        _, client = await loop.create_connection(
            lambda: Client(exchange, on_end),
            sock=plain,
            ssl=target.tls,
            server_hostname=target.server_name,
        )
    except BaseException:
        plain.close()
        raise
    return client


@contextmanager
def _connected_meanwhile() -> Iterator[None]:
    """For a connect that ends between two calls for it."""
    try:
        yield
    except OSError as exc:
        if exc.errno != errno.EISCONN:
            raise


def _bind_source(plain: socket.socket, target: Target, number: int) -> None:
    """Take another address of loopback where the ports of one would not be enough."""
    block = number // PORTS_PER_ADDRESS % SOURCE_ADDRESSES
    if block and target.address[0].startswith("127."):
        plain.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        plain.bind((f"127.0.0.{block + 1}", 0))
