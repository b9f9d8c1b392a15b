"""Writes to a client's socket itself, past the transport, while the transport has nothing queued.

uvloop's own write touches a hundred cache lines more (bench/README). What the socket does not take
goes to the transport, which queues, pauses and reports a broken connection; until a write by the
transport leaves its queue empty, every further write goes there, so that nothing overtakes.
"""

from __future__ import annotations

import os
from typing import Final, Protocol

_write: Final = os.write


class Transport(Protocol):
    """The part of a transport that an answer needs."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def get_write_buffer_size(self) -> int: ...


class Sink:
    """The writer of one connection.

    `fd` is the descriptor of its non-blocking socket, or -1 where only the transport may write, as
    one that encrypts.

    The connection must call `shut` in `connection_lost`, and before it closes the transport itself.
    uvloop and asyncio close the socket only after `connection_lost` (a loop that is closed does at
    once, but then nothing writes any more); later its number may be another connection's.
    """

    __slots__ = ("_fd", "_is_clear", "_transport", "framed_bytes")

    def __init__(self, transport: Transport, fd: int = -1) -> None:
        self._transport = transport
        self._fd = fd
        self._is_clear = fd >= 0  # nothing waits in the transport
        # Payload of chunks that a relay has framed and counted: here, because each of them touches
        # this object anyway. Every answer begins at 0.
        self.framed_bytes = 0

    def write(self, data: bytes) -> None:
        """Send `data` after all that was written before."""
        if self._is_clear:
            try:
                sent = _write(self._fd, data)
            except OSError:  # no room; or a broken connection, which the transport reports
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        self.write_aside(data)

    def write_aside(self, data: bytes) -> None:
        """Send `data`, any buffer, by the transport."""
        self._is_clear = False
        self._transport.write(data)
        self._is_clear = self._fd >= 0 and not self._transport.get_write_buffer_size()

    def shut(self) -> None:
        """Write to the socket no more."""
        self._fd = -1
        self._is_clear = False

    def abort(self) -> None:
        """Cut the connection."""
        self.shut()
        self._transport.abort()
