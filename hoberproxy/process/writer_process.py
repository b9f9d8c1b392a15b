"""The writer of records as a separate process, beside the workers of one supervisor.

    supervisor ── start (records file, days to keep), snapshot, report, leave, stop ──► writer
               ◄── ready or failed, snapshot, report, bye ──

*stop* ends it once all is in the store; *leave*, SIGTERM and the supervisor's death do so when the
processes that append to journals by then have ended. No asyncio here: it works, and waits for the
channel.

On a core that it shares with a worker, all streams there wait while it works. So it works in parts
of half a millisecond and gives way after each: at saturation the p99 of small requests is 3 ms in
place of 6. A low priority would be dearer: at nice 15 a worker interrupts it at each wake, and a
small request costs 16 % more CPU at two thirds of the load. While records pile up in the journals,
it does not give way.
"""

from __future__ import annotations

import contextlib
import logging
import select
import signal
import socket
import time
from typing import Any

from ..accounting.exposition import resident_bytes, unlabelled
from ..storage.store import StoreError
from ..storage.writer import Writer
from .channel import (
    EXIT_CANNOT_START,
    LOG_FORMAT,
    Message,
    parse_message,
    read_first_message,
    send_failed,
    serialize_message,
    take_end,
)

logger = logging.getLogger("hoberproxy.ledger")


BEHIND_AFTER = 10.0  # seconds with more in the journals than a turn writes: some 50 MB at most


class WriterProcess:
    """Write records until the supervisor says *leave* or *stop*."""

    def __init__(self, writer: Writer, end: socket.socket) -> None:
        self._writer = writer
        self._end = end
        self._unread = b""
        self._level_at = time.monotonic()  # when all that was in the journals was stored
        self._is_open = True
        self._is_stopped = False
        self._is_leaving = False
        # Whose end is awaited then: others may come, and have a writer of another version.
        self._awaited: set[str] | None = None

    def run(self) -> None:
        """Write until the end has come, then what is left."""
        signal.signal(signal.SIGTERM, lambda *_: self.leave())
        self._send("ready")
        try:
            while not self._pause(self._turn()):
                pass
            self._writer.finish()
        finally:
            self._writer.close()
        self._send("bye", **self._state())

    def _turn(self) -> float:
        """Do one turn of the writer; return in how many seconds the next one is due."""
        self._writer.gives_way = time.monotonic() - self._level_at <= BEHIND_AFTER
        pause = self._writer.turn()
        if pause:
            self._level_at = time.monotonic()
        return pause

    def leave(self) -> None:
        """End when all processes that have journals now have ended."""
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
        if kind in ("snapshot", "report"):
            self._send(kind, id=message.get("id"), **self._state())
        elif kind == "leave":
            self.leave()
        elif kind == "stop":
            self._is_stopped = True

    def _state(self) -> dict[str, Any]:
        size = resident_bytes()
        return {
            "snapshot": unlabelled(
                {
                    "records_lost": self._writer.lost,
                    "journals_unreadable": self._writer.unreadable,
                    "resident_bytes": size,
                }
            ),
            "report": {
                "resident_bytes": size,
                "written": self._writer.written,
                "is_active": self._writer.is_active,
            },
        }

    def _send(self, kind: str, **members: Any) -> None:
        with contextlib.suppress(OSError):
            self._end.sendall(serialize_message(kind, **members))


def main(channel: str) -> int:
    """Write until the supervisor or its end says to stop; `channel` is the descriptor's number."""
    end = take_end(channel)
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
        return send_failed(end, [str(error)])
    WriterProcess(writer, end).run()
    return 0
