"""A worker: runs one Server on the supervisor's sockets, by messages over a channel.

    supervisor ── start (config, sockets), snapshot, leave, stop ──► worker
               ◄── ready or failed, alive, snapshot, bye ──

When the supervisor dies, its workers let running answers end and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import mmap
import os
import signal
import socket
import sys

from ..access.admission import STREAM_COUNTS_BYTES, StreamCounts
from ..config.settings import Config
from ..config.source import ConfigSource
from ..config.values import ConfigError
from ..storage.store import StoreError
from .channel import (
    EXIT_CANNOT_START,
    LOG_FORMAT,
    Channel,
    Message,
    read_first_message,
    send_failed,
    take_end,
)
from .listeners import Listeners, StartError, name_of
from .server import Server, run

logger = logging.getLogger("hoberproxy.server")

BYE_LIMIT = 2.0  # seconds for the last message to be read


class Worker:
    """Serve until the supervisor says *leave* or *stop*."""

    def __init__(self, server: Server, end: socket.socket) -> None:
        self._server = server
        self._end = end
        self._channel = Channel(self._on_message, self._on_lost)
        self._loop = asyncio.get_running_loop()
        self._lost = asyncio.Event()

    async def serve(self) -> None:
        """Serve from start to end. Raises what `Server.start` does."""
        try:
            await self._server.start()
        except BaseException:
            await self._server.aclose()
            raise
        self._loop.add_signal_handler(signal.SIGTERM, self._server.stop)
        await self._loop.create_connection(lambda: self._channel, sock=self._end)
        self._channel.send("ready")
        self._server.on_beat = lambda: self._channel.send("alive")
        await self._server.wait_closed()
        self._channel.send("bye", snapshot=self._server.snapshot())
        self._channel.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BYE_LIMIT):
                await self._lost.wait()

    def _on_message(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "snapshot":
            self._channel.send("snapshot", id=message.get("id"), snapshot=self._server.snapshot())
        elif kind == "report":
            self._channel.send("report", id=message.get("id"), report=self._server.report())
        elif kind == "leave":
            self._server.hand_over()
        elif kind == "stop":
            self._server.stop(at_once=bool(message.get("at_once")))

    def _on_lost(self) -> None:
        self._lost.set()
        if not self._server.is_leaving:
            logger.error("the supervisor is gone: draining")
        self._server.stop()


def check(source: bytes) -> int:
    """Import all that an upgrade needs, and parse a config; return 1, and say why, if it cannot be.

    A supervisor runs this before it becomes the installed program.
    """
    from . import supervisor, writer_process  # noqa: F401  # what there is beside this

    try:
        ConfigSource(**json.loads(source)).parse()
    except ConfigError as error:
        print("; ".join(error.problems), file=sys.stderr)
        return 1
    return 0


def main(channel: str) -> int:
    """Serve until the supervisor or its end says to stop; `channel` is the descriptor's number."""
    end = take_end(channel)
    try:
        start = read_first_message(end)
        config = ConfigSource(start["text"], start["files"], start["listen"]).parse()
        listeners = _listeners(start["sockets"])
        counts = StreamCounts(mmap.mmap(start["stream_counts"], STREAM_COUNTS_BYTES), start["slot"])
        os.close(start["stream_counts"])
        logging.basicConfig(level=config.log.level.upper(), format=LOG_FORMAT)
        end.setblocking(False)
        run(lambda: _serve(config, listeners, counts, start["workers"], end))
    except (StartError, StoreError) as error:
        return send_failed(end, [str(error)])
    except ConfigError as error:
        return send_failed(end, error.problems)
    except (EOFError, OSError):  # the supervisor has given up
        return EXIT_CANNOT_START
    return 0


def _listeners(numbers: list[int]) -> Listeners:
    listeners = Listeners()
    for number in numbers:
        listener = socket.socket(fileno=number)
        listener.set_inheritable(False)
        listeners.clients.setdefault(name_of(listener), []).append(listener)
    return listeners


async def _serve(
    config: Config, listeners: Listeners, counts: StreamCounts, workers: int, end: socket.socket
) -> None:
    server = Server(config, listeners, counts=counts, has_writer=False, workers=workers)
    await Worker(server, end).serve()
