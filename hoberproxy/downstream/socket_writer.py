"""Bytes for a client: straight to its socket, past the transport, while that has nothing waiting.

uvloop's own write reaches the socket too, by a hundred cache lines more (bench/README). Who reads
slowly is left to the transport, which queues, pauses and tells of a broken connection; until a
write by it leaves its queue empty everything goes that way, so that nothing overtakes.
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
    """One connection's. `fd` is its socket's, which does not block; -1: the transport's alone.

    The socket takes the bytes as they are: a transport that encrypts has none for us.

    Duty of the owner: `shut` it in `connection_lost`, and before it closes the transport itself.
    uvloop and asyncio close the socket only after `connection_lost` (a loop that is closed does at
    once, but then nothing writes any more); later its number may be another connection's.
    """

    __slots__ = ("_fd", "_is_clear", "_transport", "framed_bytes")

    def __init__(self, transport: Transport, fd: int = -1) -> None:
        self._transport = transport
        self._fd = fd
        self._is_clear = fd >= 0  # nothing waits in the transport
        # Payload of the chunks that their writer has framed, counted by it: side by side with what
        # each of them touches anyway. The answer of the moment begins at 0.
        self.framed_bytes = 0

    def write(self, data: bytes) -> None:
        """Send it, behind all that was written before."""
        if self._is_clear:
            try:
                sent = _write(self._fd, data)
            except OSError:  # no room; or broken, of which the transport tells the owner
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        self.write_aside(data)

    def write_aside(self, data: bytes) -> None:
        """The same by the transport, which takes any buffer."""
        self._is_clear = False
        self._transport.write(data)
        self._is_clear = self._fd >= 0 and not self._transport.get_write_buffer_size()

    def shut(self) -> None:
        """Leave the socket alone from now on."""
        self._fd = -1
        self._is_clear = False

    def abort(self) -> None:
        """Cut the connection."""
        self.shut()
        self._transport.abort()
