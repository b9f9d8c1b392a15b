"""The writer of records as a process of its own, beside the workers of one supervisor.

    supervisor ── start (records file, days to keep), snapshot, account, leave, stop ──► writer
               ◄── ready or failed, snapshot, account, bye ──

*stop* ends it once all is in the store; *leave*, SIGTERM and the supervisor's death do so when the
processes that append to journals by then have ended. No asyncio here: it works, and waits for the
channel.
"""

from __future__ import annotations

import contextlib
import logging
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from .channel import Message, parse_message, read_first_message, serialize_message
from .exposition import resident_bytes
from .joining import EXIT_CANNOT_START, LOG_FORMAT, take_end, tell_failed
from .store import StoreError
from .writer import Writer

logger = logging.getLogger("hoberproxy.ledger")


class WriterProcess:
    """Writes until it is told to leave or to stop."""

    def __init__(self, writer: Writer, end: socket.socket) -> None:
        self._writer = writer
        self._end = end
        self._unread = b""
        self._is_open = True
        self._is_stopped = False
        self._is_leaving = False
        # Whose end is awaited then: others may come, and have a writer of another version.
        self._awaited: set[str] | None = None

    def run(self) -> None:
        """From the first turn to the last record."""
        signal.signal(signal.SIGTERM, lambda *_: self.leave())
        self._send("ready")
        self._writer.run(self._pause)
        self._send("bye", **self._state())

    def leave(self) -> None:
        """End with the last of the processes that have journals now."""
        self._is_leaving = True

    def _pause(self, seconds: float) -> bool:
        if self._is_open:
            readable, _, _ = select.select([self._end], [], [], seconds)
            if readable:
                self._receive()
        else:
            select.select([], [], [], seconds)
        return self._is_stopped or (self._is_leaving and not self._awaits_any())

    def _awaits_any(self) -> bool:
        living = self._writer.living()
        if self._awaited is None:
            self._awaited = living
        self._awaited &= living
        return bool(self._awaited)

    def _receive(self) -> None:
        try:
            data = self._end.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._is_open = False
            if not self._is_leaving:
                logger.error("the supervisor is gone: the last records are awaited")
            self.leave()
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._obey(parse_message(line))

    def _obey(self, message: Message) -> None:
        kind = message["kind"]
        if kind in ("snapshot", "account"):
            self._send(kind, id=message.get("id"), **self._state())
        elif kind == "leave":
            self.leave()
        elif kind == "stop":
            self._is_stopped = True

    def _state(self) -> dict[str, Any]:
        size = resident_bytes()
        return {
            "snapshot": {
                "records_lost": [[[], self._writer.lost]],
                "journals_unreadable": [[[], self._writer.unreadable]],
                "resident_bytes": [[[], size]],
            },
            "account": {
                "resident_bytes": size,
                "written": self._writer.written,
                "is_active": self._writer.is_active,
            },
        }

    def _send(self, kind: str, **members: Any) -> None:
        with contextlib.suppress(OSError):
            self._end.sendall(serialize_message(kind, **members))


def main(arguments: Sequence[str]) -> int:
    """`arguments`: the number of the channel's descriptor."""
    end = take_end(arguments[0])
    try:
        start = read_first_message(end)
    except (EOFError, OSError):  # the supervisor has given up
        return EXIT_CANNOT_START
    logging.basicConfig(level=start["level"], format=LOG_FORMAT)
    writer = Writer(start["records"], keep_days=start["keep_days"])
    try:
        writer.open()
    except StoreError as error:
        writer.close()
        return tell_failed(end, [str(error)])
    WriterProcess(writer, end).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
