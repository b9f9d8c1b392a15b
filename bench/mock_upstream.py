"""A model server to measure against: OpenAI's answers from prebuilt bytes, on time, stamped.

    python -m bench.mock_upstream --port 9100     prints {"port":9100} once it listens

A request's `bench` object says how it is answered (`Settings`). The text of each content event
carries its number and CLOCK_MONOTONIC in ns, read just before the write, so that it comes through
gateways that write events anew: `~000012@0000004766123456789~`. One timer drives all streams; how
late their writes were is told by GET /bench/stats, with ?reset=1 to begin anew.
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
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import lru_cache
from time import monotonic_ns
from typing import Any, cast

import orjson
import uvloop

from .histogram import Histogram

MODEL = "bench-1-2025"  # not the slug, so that a gateway has a name to replace

TICK_NS = 1_000_000  # writes are due on whole ms
MAX_HEAD_BYTES = 65_536
MAX_STREAM_BYTES = 256_000_000  # all of a stream is prebuilt
BLOCKED_NS = 5 * TICK_NS  # until a reader that did not keep up is looked at again

# Same length as what replaces them, so chunk sizes are prebuilt; bytes that no JSON has are found
# fastest.
_ID = b"\x01" * 8
_STAMP = b"\x02" * 19


class SettingsError(ValueError):
    """The `bench` object is wrong; the message says where."""


class Fault(Enum):
    """What goes wrong. With `:K`, after K content events (bytes of a body); else no answer."""

    NONE = ""
    STATUS = "status"  # an error with this status, e.g. status:503
    STALL = "stall"  # silence until the client leaves
    CUT = "cut"  # the connection ends in good order, the answer does not
    RESET = "reset"  # the connection is reset
    ERROR = "error"  # an event that tells of an error, and a good end
    SLOW_HEAD = "slow-head"  # seconds before the answer's head, e.g. slow-head:1.5


@dataclass(frozen=True, slots=True)
class Settings:
    """How a request is answered. Times in seconds; sizes of a stream and of a plain answer."""

    events: int = 64  # with content; role, finish, usage and [DONE] come on top
    event_bytes: int = 200  # of one of them with `data: ` and empty line; at least what it needs
    pace: float = 0.0  # between writes, in whole ms
    first_delay: float = 0.0  # until the first content
    events_per_write: int = 1
    block_bytes: int = (
        65_536  # that a stream without a pace hands over at once; 0: each write alone
    )
    answer_bytes: int = 200  # text of an answer that is not streamed
    logprobs: bool = False
    fault: str = ""

    @property
    def fault_kind(self) -> Fault:
        return Fault(self.fault.partition(":")[0])

    @property
    def fault_value(self) -> float | None:
        _, colon, value = self.fault.partition(":")
        return float(value) if colon else None


def parse_settings(value: Any) -> Settings:
    """Check a request's `bench` object; None means the defaults. Raises SettingsError."""
    if not isinstance(value, dict | None):
        raise SettingsError("expected bench to be an object, got another type")
    known = {field.name: type(field.default) for field in fields(Settings)}
    for name, given in (value or {}).items():
        expected = known.get(name)
        if expected is None:
            raise SettingsError(f"expected bench to have {', '.join(known)}, got another name")
        if type(given) is not expected and not (expected is float and type(given) is int):
            raise SettingsError(f"expected bench.{name} to be {expected.__name__}, got another")
    settings = Settings(**(value or {}))
    _check_ranges(settings)
    return settings


def _check_ranges(settings: Settings) -> None:
    if not 1 <= settings.events <= 999_999 or settings.events_per_write < 1:
        raise SettingsError("expected 1 to 999,999 events and one or more a write, got others")
    size = max(settings.event_bytes, 300) * settings.events
    if size > MAX_STREAM_BYTES or not 1 <= settings.answer_bytes <= MAX_STREAM_BYTES:
        raise SettingsError(f"expected answers of at most {MAX_STREAM_BYTES} bytes, got more")
    if not (0 <= settings.pace <= 3600 and 0 <= settings.first_delay <= 3600):
        raise SettingsError("expected a pace and a first delay of 0 to 3600 s, got others")
    try:
        kind, value = settings.fault_kind, settings.fault_value
    except ValueError:
        names = ", ".join(each.value for each in Fault if each is not Fault.NONE)
        raise SettingsError(f"expected a fault of {names}, with or without :number") from None
    if kind in (Fault.STATUS, Fault.SLOW_HEAD) and value is None:
        raise SettingsError(f"expected a number after {kind.value}:, got none")
    if value is not None and not 0 <= value < 1e6:
        raise SettingsError("expected a fault's number from 0 on, got another")
    if kind is Fault.STATUS and value is not None and not 400 <= value <= 599:
        raise SettingsError("expected a status of 400 to 599 after status:, got another")


# Answers as bytes


class Ending(Enum):
    """What follows the last write."""

    NEXT = "next"  # the connection is ready for another request
    STALL = "stall"
    CUT = "cut"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Script:
    """An answer, ready but for identifier and stamps. Times in ns.

    `head` goes out after `head_delay`, `writes` from `first_delay` on, one each `pace`; without a
    pace each is a block of many events. `events` counts the content events of each write.
    """

    head: bytes
    writes: tuple[bytes, ...]
    events: tuple[int, ...]
    head_delay: int = 0
    first_delay: int = 0
    pace: int = 0
    ending: Ending = Ending.NEXT


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nopenai-processing-ms: 12\r\nx-request-id: req_%b\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
) % _ID
_JSON_HEAD = (
    b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\n"
    b"openai-processing-ms: 12\r\nx-request-id: req_%b\r\nContent-Length: %d\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":1709000000,'
    b'"model":"%b","choices":[%%b]%%b}\n\n'
) % (_ID, MODEL.encode())
_CHOICE = b'{"index":0,"delta":{%b},"logprobs":%b,"finish_reason":%b}'
_LOGPROBS = (
    b'{"content":[{"token":" the","logprob":-0.0214,"bytes":[32,116,104,101],'
    b'"top_logprobs":[]}],"refusal":null}'
)
_FILLER = b" the quick brown fox jumps over the lazy dog and on"
_USAGE = (
    b'{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d,'
    b'"prompt_tokens_details":{"cached_tokens":0}}'
)
_PLAIN = (
    b'{"id":"chatcmpl-%b","object":"chat.completion","created":1709000000,"model":"%b",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"%%b","refusal":null},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":%%b}'
) % (_ID, MODEL.encode())
_LAST_CHUNK = b"0\r\n\r\n"
_ERROR = {"message": "the bench asked for this", "type": "server_error", "param": None}


@lru_cache(maxsize=64)
def make_script(settings: Settings, is_stream: bool, include_usage: bool) -> Script:
    """The answer to a request; the same object for the same settings."""
    kind, value = settings.fault_kind, settings.fault_value
    if kind is Fault.STATUS and value is not None:
        return error_script(int(value), _ERROR["message"] or "")
    if kind is Fault.SLOW_HEAD and value is not None:
        script = make_script(replace(settings, fault=""), is_stream, include_usage)
        return replace(script, head_delay=round(value * 1e9))
    if value is None and kind not in (Fault.NONE, Fault.ERROR):
        return Script(b"", (), (), ending=Ending[kind.name])
    return _stream(settings, include_usage) if is_stream else _plain(settings)


def error_script(status: int, message: str) -> Script:
    """A refusal in OpenAI's form."""
    body = orjson.dumps({"error": {**_ERROR, "message": message, "code": f"bench_{status}"}})
    head = _JSON_HEAD % (status, b"Refused", _ID, len(body))
    return Script(head, (body,), (0,))


def _plain(settings: Settings) -> Script:
    text = _filler(settings.answer_bytes)
    body = _PLAIN % (text, _USAGE % (settings.events, settings.events + 9))
    head, ending = _JSON_HEAD % (200, b"OK", _ID, len(body)), Ending.NEXT
    if settings.fault_kind is not Fault.NONE:
        body, ending = body[: int(settings.fault_value or 0)], _ending(settings)
    return Script(head, (body,), (0,), first_delay=round(settings.first_delay * 1e9), ending=ending)


def _stream(settings: Settings, include_usage: bool) -> Script:
    usage = b',"usage":null' if include_usage else b""
    count = settings.events
    if settings.fault_kind is not Fault.NONE:
        count = min(count, int(settings.fault_value or 0))
    sizes = [
        min(settings.events_per_write, count - start)
        for start in range(0, count, settings.events_per_write)
    ]
    writes, number = [], 0
    for size in sizes:
        events = (_content_event(number + at, settings, usage) for at in range(size))
        writes.append(_chunk(b"".join(events)))
        number += size
    opening = _choice_event(b'"role":"assistant","content":"","refusal":null', b"null", usage)
    writes[:1] = [_chunk(opening) + b"".join(writes[:1])]
    writes[-1] += _end_of_stream(settings, include_usage, usage)
    sizes = sizes or [0]
    if settings.pace == 0:
        writes, sizes = _join(writes, sizes, settings.block_bytes)
    return Script(
        _STREAM_HEAD,
        tuple(writes),
        tuple(sizes),
        first_delay=round(settings.first_delay * 1e9),
        pace=round(settings.pace * 1e9),
        ending=_ending(settings),
    )


def _ending(settings: Settings) -> Ending:
    return Ending.__members__.get(settings.fault_kind.name, Ending.NEXT)


def _end_of_stream(settings: Settings, include_usage: bool, usage: bytes) -> bytes:
    """What comes with the last content, as model servers send it."""
    if settings.fault_kind is Fault.ERROR:
        return _chunk(b"data: %b\n\n" % orjson.dumps({"error": _ERROR})) + _LAST_CHUNK
    if settings.fault_kind is not Fault.NONE:
        return b""
    end = _chunk(_choice_event(b"", b'"stop"', usage))
    if include_usage:
        counted = _USAGE % (settings.events, settings.events + 9)
        end += _chunk(_EVENT % (b"", b',"usage":' + counted))
    return end + _chunk(b"data: [DONE]\n\n") + _LAST_CHUNK


def _content_event(number: int, settings: Settings, usage: bytes) -> bytes:
    logprobs = _LOGPROBS if settings.logprobs else b"null"
    text = b"~%06d@%b~" % (number, _STAMP)
    bare = _choice_event(b'"content":"%b"' % text, b"null", usage, logprobs)
    text += _filler(settings.event_bytes - len(bare))
    return _choice_event(b'"content":"%b"' % text, b"null", usage, logprobs)


def _choice_event(delta: bytes, finish: bytes, usage: bytes, logprobs: bytes = b"null") -> bytes:
    return _EVENT % (_CHOICE % (delta, logprobs, finish), usage)


def _filler(size: int) -> bytes:
    return (_FILLER * (max(size, 0) // len(_FILLER) + 1))[: max(size, 0)]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _join(
    writes: Sequence[bytes], sizes: Sequence[int], limit: int
) -> tuple[list[bytes], list[int]]:
    """Put neighbours together up to a block's size: nobody waits between them."""
    blocks, counts, size = [[writes[0]]], [sizes[0]], len(writes[0])
    for write, count in zip(writes[1:], sizes[1:], strict=True):
        if size + len(write) > limit:
            blocks.append([])
            counts.append(0)
            size = 0
        blocks[-1].append(write)
        counts[-1] += count
        size += len(write)
    return [b"".join(block) for block in blocks], counts


# The shell: one timer, and connections that are asked when something is due


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
        """Stop; whoever waits is not asked any more."""
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
        self._next = -1
        self._due = monotonic_ns() + script.head_delay
        self._is_counted = script.head is _STREAM_HEAD
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
        return make_script(settings, request.get("stream") is True, include_usage)

    def _answer_stats(self, query: bytes, is_closing: bool) -> None:
        assert self._transport is not None, "a request was read from it just now"
        body = self._stats.serialize()
        self._transport.write(_JSON_HEAD % (200, b"OK", b"stats", len(body)) + body)
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
                    self._send(script.head)
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
        """Whether an earlier write waits for the reader; then we are not late, but asked again."""
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
            data = script.head + data
        self._next += 1
        now = self._send(data)
        stats = self._stats
        stats.events += script.events[at]
        if script.pace or at == 0:
            stats.late_ns.record(now - self._due)

    def _send(self, template: bytes) -> int:
        """Fill in identifier and stamps, write at once; returns the stamp.

        The loop would gather writes until the end of its turn, long after the stamp when many
        streams are due: so the kernel is asked first, and the loop gets what it does not take.
        """
        data = template.replace(_ID, self._id)
        now = monotonic_ns()
        data = data.replace(_STAMP, b"%019d" % now)
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
    return Script(_JSON_HEAD % (200, b"OK", _ID, len(body)), (body,), (0,))


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
