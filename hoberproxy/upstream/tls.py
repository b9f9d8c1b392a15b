"""Does TLS between a socket and the connection to a model server.

Carries bytes to OpenSSL and back, by the standard library's `ssl.SSLObject`. It replaces the loop's
own TLS, which allocates 256 KB for each connection and for each read, and takes an event through
three more layers.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import Any, Final

MAX_RECORD_BYTES: Final = 16_384  # of plain text (RFC 8446, section 5.1)
# What is encrypted at a time: a long prompt should not lie in memory once more as a whole.
WRITE_BYTES: Final = 16 * MAX_RECORD_BYTES


class Tls:
    """The protocol of a socket's transport, and the transport of `connection`.

    `connection` gets no call before the handshake is done: wait for `opened`, and call `abort` if
    that raises.
    """

    def __init__(
        self,
        connection: Any,  # any protocol: to find its method costs nothing beside decryption
        context: ssl.SSLContext,
        host: str,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._connection = connection
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._transport: asyncio.Transport | None = None
        self._is_open = False  # the handshake is done
        self._has_part = False  # of a record, which OpenSSL keeps until the rest has come
        self._failure: Exception | None = None
        self._shaken: asyncio.Future[None] = loop.create_future()  # done, or failed

    async def opened(self) -> None:
        """Wait for the end of the handshake. Raises OSError, such as ssl.SSLError, if it failed."""
        await self._shaken
        if self._failure is not None:
            raise self._failure

    # What the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._shake_hands()

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        if self._is_open:
            self._read(len(data))
        else:
            self._shake_hands()

    def eof_received(self) -> bool:
        if self._is_open:
            self._connection.eof_received()
        return False  # the transport closes

    def pause_writing(self) -> None:
        """Do nothing: a request is written at once."""

    def resume_writing(self) -> None:
        """Do nothing."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._is_open:
            self._connection.connection_lost(self._failure or exc)
        else:
            self._end_handshake(exc or ConnectionResetError("closed during the handshake"))

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as exc:
            self._flush()  # the alert that says what is wrong
            self._end_handshake(exc)
            return
        self._flush()
        self._is_open = True
        self._connection.connection_made(self)
        self._end_handshake(None)
        if self._incoming.pending:
            self._read(MAX_RECORD_BYTES)

    def _end_handshake(self, failure: Exception | None) -> None:
        """End the wait for the handshake, with its `failure` if there is one."""
        if not self._shaken.done():
            self._failure = failure
            self._shaken.set_result(None)

    def _read(self, size: int) -> None:
        """Decrypt and pass on what has come, `size` bytes of which are new."""
        incoming, read = self._incoming, self._tls.read
        # A record is shorter once decrypted: a record that came whole fits into `size`.
        if self._has_part:
            self._has_part = False
            size = MAX_RECORD_BYTES
        pieces: list[bytes] = []
        has_ended = False
        try:
            while incoming.pending and not has_ended:
                if piece := read(size):
                    pieces.append(piece)
                else:
                    has_ended = True
        except ssl.SSLWantReadError:
            self._has_part = True
        except ssl.SSLError as exc:
            self._failure = exc
        self._flush()  # an answer to a change of keys
        if pieces:
            self._connection.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._failure is not None:
            self.abort()
        elif has_ended:
            self._end()

    def _end(self) -> None:
        """Close after the peer's alert that it sends no more (RFC 8446, section 6.1)."""
        self._connection.eof_received()
        with suppress(ssl.SSLError):
            self._tls.unwrap()  # the same alert in return
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        if self._outgoing.pending and self._transport is not None:
            self._transport.write(self._outgoing.read())

    # What the connection calls

    def write(self, data: bytes | memoryview) -> None:
        """Encrypt and send `data`, unless the connection is lost."""
        if self._transport is None or self._failure is not None:
            return
        try:
            for start in range(0, len(data), WRITE_BYTES):
                self._tls.write(data[start : start + WRITE_BYTES])
                self._flush()
        except ssl.SSLError as exc:
            self._failure = exc
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def is_closing(self) -> bool:
        """Return whether no more can be sent."""
        return self._transport is None or self._transport.is_closing()

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes that the peer has yet to take."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def is_reading(self) -> bool:
        """Return whether more is read."""
        return self._transport is not None and self._transport.is_reading()

    def pause_reading(self) -> None:
        """Read no more for now. The connection has all that was read."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self._transport is not None:
            self._transport.resume_reading()
