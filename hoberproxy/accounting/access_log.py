"""The access log: one line a request, at its end, for people or for programs.

A thread makes and writes the lines: if the stream blocks, lines are lost and no request waits. The
thread makes a few lines at a time, since the loop cannot run meanwhile; one at a time would cost
more, for code and data would be in no CPU cache. No control character of a record gets into a line.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any

import orjson

from ..errors import FailedAttempt
from .record import Record

CAPACITY = 10_000  # lines; about 700 bytes each
FLUSH_INTERVAL = 0.2
SLICE = 16  # lines that are made without a pause, in less than 0.1 ms
PAUSE = 0.0005  # seconds for the loop after a slice
MAX_TEXT = 128  # characters of one value
# One write of so many bytes to a pipe is not mixed with other workers' (POSIX).
ATOMIC_BYTES = 4096


# Text of clients and upstreams


_PLAIN = re.compile(rf"[!#-\[\]-~]{{1,{MAX_TEXT}}}")  # no space, quote or backslash


def _word(text: str) -> str:
    """Return one word of a human line: `text` as it is if harmless, else quoted and escaped."""
    if _PLAIN.fullmatch(text):
        return text
    if not text:
        return "-"
    return f'"{"".join(map(_escape, text[:MAX_TEXT]))}"'


def _escape(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    # Not printable: control characters, line and paragraph separators, bidirectional overrides.
    if char.isprintable():
        return char
    code = ord(char)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


# Lines


@lru_cache(maxsize=16)
def _format_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _format_time(seconds: float) -> str:
    milliseconds = int(seconds * 1000)
    return f"{_format_second(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


def _milliseconds(seconds: float | None) -> int | None:
    # Not `round`, which takes ten times as long.
    return None if seconds is None else int(seconds * 1000 + 0.5)


def _model(record: Record) -> str:
    """Return the slug that answered, or the first requested one if none did."""
    return record.slug or (record.requested[0] if record.requested else "")


def format_human(record: Record) -> str:
    """Return the line `time status model=… provider=… …`, without a newline.

    Words with a space are quoted. The time is that of the request's end, in UTC. `~` marks token
    counts that are estimated.
    """
    in_tokens = out_tokens = "-"
    if record.has_usage or record.estimated:
        mark = "~" if record.estimated else ""
        in_tokens, out_tokens = f"{mark}{record.prompt_tokens}", f"{mark}{record.completion_tokens}"
    first = "-" if record.first_content is None else f"{record.first_content * 1000:.0f}ms"
    line = (
        f"{_format_time(record.started + record.total)} {record.status} "
        f"model={_word(_model(record))} provider={_word(record.provider)} "
        f"key={_word(record.key_label)} in={in_tokens} out={out_tokens} first={first} "
        f"total={record.total * 1000:.0f}ms bytes={record.bytes_out} "
        f"tries={record.attempts} id={_word(record.id)}"
    )
    if record.code:
        line += f" code={_word(record.code)} phase={_word(record.phase)}"
    if record.failures:
        line += f" failed={','.join(map(_format_failure, record.failures))}"
    return line


def _format_failure(failure: FailedAttempt) -> str:
    status = "-" if failure.status is None else failure.status
    return (
        f"{_word(failure.provider)}:{status}:{_word(failure.code)}:{_word(failure.phase)}:"
        f"{failure.milliseconds}ms"
    )


def format_json(record: Record) -> bytes:
    """Return the line as one JSON object in ASCII, without a newline.

    `time` is that of the request's end, in UTC. Members named `_ms` are milliseconds.
    """
    return _serialize_line(
        {
            "time": _format_time(record.started + record.total),
            "id": record.id,
            "client_request_id": record.client_request_id[:MAX_TEXT],
            "key_id": record.key_id,
            "key": record.key_label[:MAX_TEXT],
            "path": record.path[:MAX_TEXT],
            "model": _model(record)[:MAX_TEXT],
            "provider": record.provider,
            "status": record.status,
            "code": record.code,
            "phase": record.phase,
            "attempts": record.attempts,
            "failures": record.failures,
            "streamed": record.streamed,
            "finish_reason": record.finish_reason[:MAX_TEXT],
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "cached_tokens": record.cached_tokens,
            "cache_write_tokens": record.cache_write_tokens,
            "estimated": record.estimated,
            "first_content_ms": _milliseconds(record.first_content),
            "total_ms": _milliseconds(record.total),
            "bytes": record.bytes_out,
        }
    )


def _serialize_line(members: dict[str, Any]) -> bytes:
    try:
        line = orjson.dumps(members)
        if line.isascii() and 0x7F not in line:
            return line
    except TypeError:  # half a surrogate pair, or a number beyond 64 bits
        pass
    # orjson leaves DEL, C1 controls and line separators as they are; this escapes them.
    return json.dumps(members, default=_as_object, separators=(",", ":")).encode("ascii")


def _as_object(value: object) -> dict[str, Any]:
    assert isinstance(value, FailedAttempt), "the only object in a line"
    return {name: getattr(value, name) for name in FailedAttempt.__slots__}


def _human_line(record: Record) -> bytes:
    return format_human(record).encode("utf-8") + b"\n"


def _json_line(record: Record) -> bytes:
    return format_json(record) + b"\n"


def _human_loss(now: float, lost: int) -> bytes:
    return f"{_format_time(now)} lost={lost} lines of this log: its sink was too slow\n".encode()


def _json_loss(now: float, lost: int) -> bytes:
    return orjson.dumps({"time": _format_time(now), "lost_lines": lost}) + b"\n"


# The log


class AccessLog:
    """Writes lines to a descriptor, or a stream's descriptor, which the caller closes.

    `format` is "human", "json", or "auto": human on a terminal. One thread starts at once; `close`
    ends it.
    """

    def __init__(
        self,
        sink: IO[Any] | int,
        format: str = "auto",
        *,
        sample: float = 1.0,
        draw: Callable[[], float] = random.random,
        capacity: int = CAPACITY,
        flush_interval: float = FLUSH_INTERVAL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._fd = sink if isinstance(sink, int) else sink.fileno()
        if format == "auto":
            format = "human" if os.isatty(self._fd) else "json"
        if format not in ("human", "json"):
            raise ValueError(f"expected a format out of auto, human and json, got {format!r}")
        self._line = _human_line if format == "human" else _json_line
        self._loss = _human_loss if format == "human" else _json_loss
        self.sample = sample  # the share of requests without a failure that get a line
        self._draw = draw
        self._capacity = capacity
        self._interval = flush_interval
        self._clock = clock

        self._queue: deque[Record] = deque()
        # Each count is added to by one thread only: += is no single step.
        self._taken = 0
        self._settled = 0  # of those taken, written or failed
        self._refused = 0
        self._failed = 0
        self._noted = 0  # losses that the log has a line about
        self._is_torn = False  # the last write ended inside a line
        self._is_abandoned = False
        self._stop = threading.Event()
        # A daemon: a pipe that nobody reads must not keep the process from ending.
        self._writer = threading.Thread(target=self._run, name="hoberproxy-accesslog", daemon=True)
        self._writer.start()

    @property
    def lost(self) -> int:
        """The number of lines not written: queue full, log closed, or descriptor failed."""
        return self._refused + self._failed

    @property
    def depth(self) -> int:
        """The number of lines taken and not yet written."""
        return self._taken - self._settled

    def write(self, record: Record) -> None:
        """Take a finished record, which must not change any more; never blocks.

        Failures always get a line, whatever `sample` is.
        """
        if self.sample < 1.0 and not record.is_failure and self._draw() >= self.sample:
            return
        if self._stop.is_set() or self.depth >= self._capacity:
            self._refused += 1
            return
        self._taken += 1
        self._queue.append(record)

    def close(self, timeout: float = 1.0) -> int:
        """Write the rest, for at most `timeout` seconds; return the number of lines not written."""
        self._stop.set()
        self._writer.join(timeout)
        # From here on the descriptor may be closed, and its number be another file's.
        self._is_abandoned = True
        return self.depth

    # The thread

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines = []
        taken = len(self._queue)
        for number in range(1, taken + 1):
            try:
                lines.append(self._line(self._queue.popleft()))
            except Exception:  # one broken record must not lose the lines of others
                self._failed += 1
            if number % SLICE == 0 and not self._stop.is_set():
                time.sleep(PAUSE)
        lost = self.lost
        notice = self._loss(self._clock(), lost - self._noted) if lost > self._noted else b""
        start = b"\n" if self._is_torn else b""
        if lines or notice:
            unwritten = self._write_all(start + notice + b"".join(lines))
            self._is_torn = unwritten > 0
            self._failed += min(unwritten, len(lines))  # the notice is no loss
            if not unwritten:
                self._noted = lost
        self._settled += taken

    def _write_all(self, data: bytes) -> int:
        """Write, however long it takes; return the number of lines that could not be written."""
        view = memoryview(data)
        position = 0
        while position < len(data) and not self._is_abandoned:
            end = data.rfind(b"\n", position, position + ATOMIC_BYTES) + 1
            end = end or data.find(b"\n", position) + 1 or len(data)
            try:
                position += os.write(self._fd, view[position:end])
            except OSError as exc:
                if exc.errno != errno.EAGAIN:
                    break
                self._wait_writable()
        return data.count(b"\n", position)

    def _wait_writable(self) -> None:
        """Wait a little for a non-blocking descriptor, such as a terminal shared with others."""
        poller = select.poll()  # select() takes no descriptor beyond 1023
        poller.register(self._fd, select.POLLOUT)
        poller.poll(self._interval * 1000)
