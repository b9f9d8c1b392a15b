"""Messages between supervisor and child: one JSON object a line, over a socket pair.

Readers ignore members and kinds they do not know: after an upgrade the two ends are of different
versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Any

MAX_LINE_BYTES = 64 * 1024 * 1024  # a config with the files it names; a snapshot is kilobytes

FIRST_LIMIT = 300.0  # seconds to wait for the first message: a worker waits while the writer starts
EXIT_CANNOT_START = 3
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"

Message = dict[str, Any]


class Channel(asyncio.Protocol):
    """One end of a channel. `on_message` gets each message, `on_lost` is called at the end."""

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self.unread = b""  # of a message that has not come to its end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self._on_message(parse_message(line))
        if len(self.unread) > MAX_LINE_BYTES:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    @property
    def is_open(self) -> bool:
        """Whether the peer may still read what is sent."""
        return self._transport is not None

    def send(self, kind: str, **members: Any) -> None:
        """Send a message, unless the peer is gone."""
        if self._transport is not None:
            self._transport.write(serialize_message(kind, **members))

    def close(self) -> None:
        """Send nothing more; what is in the buffer still goes out."""
        if self._transport is not None:
            self._transport.close()

    def hold(self) -> bool:
        """Stop reading, so that another program can go on here; return whether all was sent."""
        if self._transport is None:
            return True
        self._transport.pause_reading()
        return self._transport.get_write_buffer_size() == 0

    def go_on(self) -> None:
        """Read again: no other program has taken over."""
        if self._transport is not None:
            self._transport.resume_reading()


def serialize_message(kind: str, **members: Any) -> bytes:
    """Return a message as one line."""
    return json.dumps({"kind": kind, **members}, separators=(",", ":")).encode() + b"\n"


def parse_message(line: bytes) -> Message:
    """Return the message of a line; a line that is none gives the kind ""."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        return {"kind": ""}
    return message


def read_first_message(end: socket.socket) -> Message:
    """Wait for the first line, before there is a loop; what follows it stays unread.

    Raises EOFError when the peer has gone, TimeoutError as the socket says.
    """
    line = bytearray()
    while True:
        ahead = end.recv(1 << 20, socket.MSG_PEEK)
        if not ahead:
            raise EOFError("the peer has gone")
        line += end.recv(ahead.find(b"\n") + 1 or len(ahead))
        if line.endswith(b"\n"):
            return parse_message(bytes(line[:-1]))


# How a child begins


def take_end(number: str) -> socket.socket:
    """Return this process's end of the channel, by the number of its descriptor.

    It waits FIRST_LIMIT at most. Signals that a terminal or an operator sends to all processes are
    ignored from now on: the supervisor says what is to happen.
    """
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    end = socket.socket(fileno=int(number))
    end.set_inheritable(False)
    end.settimeout(FIRST_LIMIT)
    return end


def send_failed(end: socket.socket, problems: Iterable[str]) -> int:
    """Send why this process cannot start; return its exit code."""
    with contextlib.suppress(OSError):
        end.setblocking(True)
        end.sendall(serialize_message("failed", problems=list(problems)))
    return EXIT_CANNOT_START
