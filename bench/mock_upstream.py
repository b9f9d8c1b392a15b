"""A model server to measure against: OpenAI's answers from prebuilt bytes, on time, stamped.

    python -m bench.mock_upstream --port 9100     prints {"port":9100} once it listens

A request's `bench` object says how it is answered (mock_answers.py's `Settings`). The text of each
content event carries its number and CLOCK_MONOTONIC in ns, read just before the write, so that it
survives gateways that rewrite events: `~000012@0000004766123456789~`. One timer drives all
streams; GET /bench/stats returns how late their writes were, and ?reset=1 clears that.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import itertools
import os
import re
import resource
import socket
import ssl
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from functools import lru_cache
from time import monotonic_ns
from typing import cast

import orjson
import uvloop

from .histogram import Histogram
from .mock_answers import (
    COUNT,
    CREATED,
    DATE,
    ID,
    JSON_HEAD,
    MODEL,
    PLAIN_STREAM_HEAD,
    STAMP,
    STREAM_HEAD,
    Ending,
    Script,
    SettingsError,
    choose_padding,
    error_script,
    make_script,
    parse_settings,
)

TICK_NS = 1_000_000  # writes are due on whole ms
MAX_HEAD_BYTES = 65_536
BLOCKED_NS = 5 * TICK_NS  # until a reader that did not keep up is looked at again


# The shell: one timer, and connections that it calls when they are due


class Wheel:
    """Connections by the tick at which they are due: one timer, which rests when none waits.

    The timer is the kernel's (timerfd_create(2)): the loop's own knows whole ms counted from when
    it is asked, and comes 1 to 2 ms late.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._slots: dict[int, list[Connection]] = {}
        self._turned = 0
        self._is_turning = False
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "expected a timer of the kernel, got none")
        loop.add_reader(self._timer, self._turn)
        self._loop = loop

    def schedule(self, connection: Connection, due: int) -> None:
        """Ask it at the first tick not before `due` (monotonic ns)."""
        if not self._is_turning:
            self._is_turning = True
            self._turned = monotonic_ns() // TICK_NS
            self._set_timer(TICK_NS, (self._turned + 1) * TICK_NS)
        slot = max(-(-due // TICK_NS), self._turned + 1)
        self._slots.setdefault(slot, []).append(connection)

    def close(self) -> None:
        """Stop; connections that wait are not called any more."""
        self._loop.remove_reader(self._timer)
        os.close(self._timer)

    def _turn(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._timer, 8)
        for slot in range(self._turned + 1, monotonic_ns() // TICK_NS + 1):
            self._turned = slot
            for connection in self._slots.pop(slot, ()):
                connection.on_due()
        if not self._slots:
            self._is_turning = False
            self._set_timer(0, 0)

    def _set_timer(self, interval: int, first: int) -> None:
        """Come each `interval` from `first` on; zeros stop it."""
        times = (*divmod(interval, 10**9), *divmod(first, 10**9))
        is_absolute = 1  # TFD_TIMER_ABSTIME
        self._libc.timerfd_settime(self._timer, is_absolute, (ctypes.c_long * 4)(*times), None)


class Stats:
    """What all connections have done since the last reset, and how late."""

    def __init__(self) -> None:
        self.streams_open = 0
        self.reset()

    def reset(self) -> None:
        self.late_ns = Histogram()
        self.requests = 0
        self.events = 0
        self.blocked = 0

    def serialize(self) -> bytes:
        report = {
            "late_us": self.late_ns.summary(1e3),
            "requests": self.requests,
            "streams_open": self.streams_open,
            "events": self.events,
            "blocked": self.blocked,  # writes put off because the reader did not keep up
        }
        return orjson.dumps(report)


_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+) *\r\n")
_CLOSE = re.compile(rb"(?i)\r\nconnection: *close *\r\n")
_EXPECT = re.compile(rb"(?i)\r\nexpect: *100-continue *\r\n")
_NUMBERS = itertools.count(1)


class Connection(asyncio.Protocol):
    """One client: reads a request, plays its script, reads the next.

    Theory of operation: `_script` is the answer being played, None while a request is read;
    `_next` is the write that comes next, -1 for the head; `_due` is when it is due. All moves are
    in `_play`, called by the arrival of a request and by the wheel.
    """

    def __init__(self, wheel: Wheel, stats: Stats) -> None:
        self._wheel = wheel
        self._stats = stats
        self._transport: asyncio.Transport | None = None
        self._descriptor = -1
        self._buffer = bytearray()
        self._head = b""
        self._length = 0
        self._script: Script | None = None
        self._id = b""
        self._created = b""
        self._next = -1
        self._due = 0
        self._is_counted = False  # as an open stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class
        if transport.get_extra_info("ssl_object") is None:
            self._descriptor = transport.get_extra_info("socket").fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None  # also breaks the cycle: the collector is off
        self._end_script()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._script is None:
            self._read_requests()

    def on_due(self) -> None:
        """The wheel's call."""
        if self._script is not None:
            self._play(self._script)
            self._read_requests()

    # Requests

    def _read_requests(self) -> None:
        while self._script is None and self._transport is not None and self._buffer:
            if not self._head and not self._read_head():
                return
            if len(self._buffer) < self._length:
                return
            head, body = self._head, bytes(self._buffer[: self._length])
            del self._buffer[: self._length]
            self._head = b""
            self._begin(head, body)

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end == 3:
            if len(self._buffer) > MAX_HEAD_BYTES:
                self._abort()
            return False
        self._head = bytes(self._buffer[:end])
        del self._buffer[:end]
        length = _LENGTH.search(self._head)
        self._length = int(length[1]) if length else 0
        if _EXPECT.search(self._head) and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _begin(self, head: bytes, body: bytes) -> None:
        method, target = head.split(b" ", 2)[:2]
        path, _, query = target.partition(b"?")
        if path == b"/bench/stats":
            self._answer_stats(query, is_closing=_CLOSE.search(head) is not None)
            return
        self._stats.requests += 1
        self._script = script = self._choose(method, path, head, body)
        self._id = b"%08x" % (next(_NUMBERS) & 0xFFFFFFFF)
        self._created = b"%010d" % time.time()
        self._next = -1
        self._due = monotonic_ns() + script.head_delay
        self._is_counted = script.head in (STREAM_HEAD, PLAIN_STREAM_HEAD)
        self._stats.streams_open += self._is_counted
        if _CLOSE.search(head) and script.ending is Ending.NEXT:
            self._script = script = _closing(script)
        if script.head_delay:
            self._wheel.schedule(self, self._due)
        else:
            self._play(script)

    def _choose(self, method: bytes, path: bytes, head: bytes, body: bytes) -> Script:
        if method == b"GET" and path in (b"/v1/models", b"/health"):
            return _MODELS
        if method != b"POST" or not path.endswith(b"/chat/completions"):
            return error_script(404, "expected POST /v1/chat/completions, got another path")
        try:
            request = orjson.loads(body)
            settings = parse_settings(request.get("bench"))
        except (orjson.JSONDecodeError, AttributeError):
            hint = "" if _LENGTH.search(head) else " (a content-length is needed)"
            return error_script(400, f"expected a JSON object, got another body{hint}")
        except SettingsError as exc:
            return error_script(400, str(exc))
        options = request.get("stream_options") or {}
        include_usage = bool(options.get("include_usage"))
        padding = choose_padding(settings, self._stats.requests)
        return make_script(settings, request.get("stream") is True, include_usage, padding)

    def _answer_stats(self, query: bytes, is_closing: bool) -> None:
        assert self._transport is not None, "a request was read from it just now"
        body = self._stats.serialize()
        self._transport.write(JSON_HEAD % (200, b"OK", b"stats", len(body)) + body)
        if query == b"reset=1":
            self._stats.reset()
        if is_closing:
            self._transport.close()

    # Answers

    def _play(self, script: Script) -> None:
        """Write what is due; leave a note on the wheel for the rest."""
        if self._next < 0:
            self._next = 0
            if script.first_delay:
                self._due = _next_tick(self._due + script.first_delay)
            if script.first_delay or not script.writes:
                if script.head:
                    self._send(self._fill_head(script.head))
                if script.writes:
                    self._wheel.schedule(self, self._due)
                    return
        while self._next < len(script.writes):
            if self._is_blocked():
                return
            self._send_next(script)
            if script.pace and self._next < len(script.writes):
                self._due = _next_tick(self._due + script.pace)
                self._wheel.schedule(self, self._due)
                return
        self._finish(script.ending)

    def _is_blocked(self) -> bool:
        """Return whether an earlier write waits for the reader; then try again later."""
        if self._transport is not None and self._transport.get_write_buffer_size() == 0:
            return False
        self._stats.blocked += 1
        self._due = monotonic_ns() + BLOCKED_NS
        self._wheel.schedule(self, self._due)
        return True

    def _send_next(self, script: Script) -> None:
        at = self._next
        data = script.writes[at]
        if at == 0 and not script.first_delay:
            data = self._fill_head(script.head) + data
        self._next += 1
        now = self._send(data)
        stats = self._stats
        stats.events += script.events[at]
        if script.pace or at == 0:
            stats.late_ns.record(now - self._due)

    def _fill_head(self, template: bytes) -> bytes:
        """The head with what it alone has: a date and counts that change."""
        date = formatdate(int(self._created), usegmt=True).encode()
        return template.replace(DATE, date).replace(COUNT, b"%d" % (100 + int(self._id, 16) % 900))

    def _send(self, template: bytes) -> int:
        """Fill in identifier, second and stamps, write at once; returns the stamp.

        The loop would gather writes until the end of its turn, long after the stamp when many
        streams are due: so the kernel is asked first, and the loop gets what it does not take.
        """
        data = template.replace(ID, self._id).replace(CREATED, self._created)
        now = monotonic_ns()
        data = data.replace(STAMP, b"%019d" % now)
        transport = self._transport
        if transport is None or transport.is_closing():
            return now
        sent = 0
        if self._descriptor >= 0 and transport.get_write_buffer_size() == 0:
            with suppress(BlockingIOError, ConnectionError):  # the loop's own write meets it again
                sent = os.write(self._descriptor, data)
        if sent < len(data):
            transport.write(data[sent:])
        return now

    def _finish(self, ending: Ending) -> None:
        if ending is Ending.STALL:
            return  # until connection_lost
        if ending is Ending.RESET:
            self._abort()
        elif ending is Ending.CUT and self._transport is not None:
            self._transport.close()
        self._end_script()

    def _end_script(self) -> None:
        self._stats.streams_open -= self._is_counted
        self._is_counted = False
        self._script = None

    def _abort(self) -> None:
        """Close with RST, not FIN."""
        if self._transport is not None:
            peer = self._transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()


def _next_tick(when: int) -> int:
    return -(-when // TICK_NS) * TICK_NS


@lru_cache(maxsize=64)
def _closing(script: Script) -> Script:
    """The same for a client that wants its connection closed."""
    head = script.head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    return replace(script, head=head, ending=Ending.CUT)


def _models() -> Script:
    models = [{"id": MODEL, "object": "model", "created": 1709000000, "owned_by": "bench"}]
    body = orjson.dumps({"object": "list", "data": models})
    return Script(JSON_HEAD % (200, b"OK", ID, len(body)), (body,), (0,))


_MODELS = _models()


async def serve(wheel: Wheel, port: int = 0, tls: ssl.SSLContext | None = None) -> asyncio.Server:
    """Listen on 127.0.0.1; port 0 takes a free one. The caller closes server and wheel."""
    loop = asyncio.get_running_loop()
    stats = Stats()
    return await loop.create_server(
        lambda: Connection(wheel, stats), "127.0.0.1", port, ssl=tls, backlog=4096
    )


def raise_file_limit() -> int:
    """As many open files as we may have without asking root; returns that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mock_upstream", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (a free one)")
    parser.add_argument("--cpu", type=int, metavar="N", help="run on this core only")
    parser.add_argument("--tls-cert", metavar="FILE", help="speak https with this certificate")
    parser.add_argument("--tls-key", metavar="FILE", help="and this key")
    options = parser.parse_args(argv)
    if (options.tls_cert is None) != (options.tls_key is None):
        parser.error("expected both --tls-cert and --tls-key, got one of them")
    return options


async def run(options: argparse.Namespace) -> None:
    tls = None
    if options.tls_cert is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(options.tls_cert, options.tls_key)
    server = await serve(Wheel(asyncio.get_running_loop()), options.port, tls)
    gc.collect()
    gc.freeze()
    gc.disable()  # a full collection over 10,000 streams makes all of them late
    print(orjson.dumps({"port": server.sockets[0].getsockname()[1]}).decode(), flush=True)
    await server.serve_forever()


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    raise_file_limit()
    try:
        with suppress(KeyboardInterrupt):
            uvloop.run(run(options))
    except OSError as exc:
        print(f"cannot start: {exc.strerror or exc}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
