"""One process that serves clients: opens sockets and limits, waits for its end, drains, closes.

What is served is downstream/connection.py's and api/routes.py's; this module owns what lives as
long as the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

import uvloop
from aiohttp import web

from ..access.admission import (
    Admission,
    BodyMemory,
    ConnectionRoom,
    StreamCounts,
    body_memory_limit,
)
from ..access.keys import Keyring
from ..access.shared_limits import SharedLimits
from ..accounting.access_log import AccessLog
from ..accounting.accounts import Accounts
from ..accounting.exposition import resident_bytes, unlabelled
from ..accounting.journal import Journal
from ..accounting.journal_directory import journal_directory
from ..accounting.metrics import Metrics
from ..api.routes import make_app
from ..config.settings import Address, Config
from ..config.values import ConfigError
from ..downstream.connection import LINGER, DownstreamConnection
from ..errors import UnavailableError
from ..exchange.context import ServerContext
from ..exchange.exchange import Exchange
from ..protocol.http_head import MAX_REQUEST_HEAD_BYTES
from ..routing.catalog import Catalog
from ..storage.key_loader import KeyLoader, start_thread
from ..storage.writer import FINISH_LIMIT, Writer
from ..timer_wheel import Ticker, Timed, Wheel
from ..upstream.provider import make_upstreams
from .listeners import BACKLOG, Listeners, StartError, flat
from .machine import collect_rarely, connections_limit, machine_memory, raise_file_limit

logger = logging.getLogger("hoberproxy.server")

# Seconds in which an idle connection may still bring a request that was on its way.
IDLE_GRACE = 0.5
# Seconds in which the loop calls `connection_made` for a connection that it has just accepted.
ACCEPTED_GRACE = 0.1
HEARTBEAT = 0.5  # seconds between signs of life of the loop
POOL_SWEEP = 1.0  # seconds between looks for idle upstream connections past their time
PARSE_CACHE_SWEEP = 600  # of these; templates that were not used since the last go


class Server(Timed):
    """One process on one loop: `start`, then `wait_closed`; `stop` from a signal.

    Make it on its loop. If `start` raises, call `aclose`.
    """

    def __init__(
        self,
        config: Config,
        listeners: Listeners,
        *,
        counts: StreamCounts | None = None,
        has_writer: bool = True,
        workers: int = 1,
    ) -> None:
        """Serve by `config` on the sockets in `listeners`.

        With `has_writer` a thread of this process writes the records; else another process must.
        `workers` is how many processes share the machine's memory, this one among them. Raises
        StartError or ConfigError.
        """
        _check_keys(config, listeners.addresses)
        self._config = config
        self._given = listeners
        self._heartbeat: asyncio.TimerHandle | None = None
        self.on_beat: Callable[[], None] = lambda: None  # called twice a second while it runs
        self._listeners: list[asyncio.Server] = []
        self._connections: set[DownstreamConnection] = set()
        self._leave = asyncio.Event()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._sweeps = 0
        records = config.records
        self._journal = Journal(journal_directory(records.file))
        self._writer: WriterThread | None = None
        if has_writer:
            self._writer = WriterThread(Writer(records.file, keep_days=records.keep_days))
        self._context = context = self._build(counts, workers)
        self._loader = KeyLoader(records.file, context.keyring, self._journal)
        self._ticker = Ticker(context.wheel, context.loop)
        self._runner = web.AppRunner(
            make_app(context),
            access_log=None,
            handle_signals=False,
            # The check in front of aiohttp has its own limits; here only it must not be stricter.
            max_line_size=MAX_REQUEST_HEAD_BYTES,
            max_field_size=MAX_REQUEST_HEAD_BYTES,
            # Seconds for the rest of a body that nobody needs; after these ours begin.
            lingering_time=LINGER,
        )

    @property
    def addresses(self) -> list[Address]:
        """The addresses of the listening sockets, with the ports that the system chose."""
        return self._given.addresses

    async def start(self) -> None:
        """Open the store, then accept. Raises StoreError."""
        context, runner = self._context, self._runner
        await runner.setup()
        handlers = runner.server
        assert handlers is not None, "set up above"
        if self._writer is not None:  # before the keys: what a dead process spent is spent
            self._writer.start()
        self._loader.start()
        context.wheel.schedule(self, context.loop.time() + POOL_SWEEP)
        begin = partial(Exchange, context)

        def connection() -> Any:  # a Protocol by its methods
            return DownstreamConnection(context, begin, handlers, self._connections)

        await self._accept(connection)
        context.model_lists.start()
        self._beat(context.loop.time())

    async def _accept(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Accept on the listening sockets; a supervisor has copies, so closing ours is no cut."""
        loop = asyncio.get_running_loop()
        for each in flat(self._given.clients.values()):
            if each.family == socket.AF_UNIX:
                listener = await loop.create_unix_server(protocol, sock=each, backlog=BACKLOG)
            else:
                listener = await loop.create_server(protocol, sock=each, backlog=BACKLOG)
            self._listeners.append(listener)

    def _build(self, counts: StreamCounts | None, workers: int) -> ServerContext:
        config, loop = self._config, asyncio.get_running_loop()
        wheel = Wheel(loop.time())
        upstreams = make_upstreams(config, loop, wheel)
        catalog = Catalog(config.models)
        self._shared_limits = shared_limits = _open_shared_limits(config.records.file)
        return ServerContext(
            config=config,
            loop=loop,
            wheel=wheel,
            catalog=catalog,
            keyring=Keyring(),
            accounts=Accounts(self._journal, shared_limits, config.keys.assumed_output),
            access_log=(
                AccessLog(sys.stderr, config.log.format, sample=config.log.sample)
                if config.log.access
                else None
            ),
            metrics=Metrics(catalog.label),
            upstreams=upstreams,
            admission=Admission(config.server.max_streams, counts),
            bodies=BodyMemory(body_memory_limit(config.server, machine_memory(), workers)),
            room=ConnectionRoom(connections_limit()),
        )

    def snapshot(self) -> dict[str, Any]:
        """Return the counts since the start and the gauges of now, as exposition.py merges them."""
        context, journal, log = self._context, self._journal, self._context.access_log
        writer = self._writer.writer if self._writer is not None else None
        values = {
            "requests_open": len(context.exchanges),
            "connections_open": len(self._connections),
            "records_queued": journal.depth,
            "records_lost": journal.records_lost + (writer.lost if writer is not None else 0),
            "journal_entries_lost": journal.lost,
            "journals_unreadable": writer.unreadable if writer is not None else 0,
            "log_lines_lost": log.lost if log is not None else 0,
            "resident_bytes": resident_bytes(),
            "body_bytes": context.bodies.held,
            "bad_heads": context.bad_heads,
            "refused_connections": context.refused_connections,
        }
        connections = []
        for name, upstream in context.upstreams.items():
            idle, known = upstream.pool.idle, upstream.pool.open
            connections += [[[name, "idle"], idle], [[name, "busy"], known - idle]]
        return {
            **context.metrics.snapshot(),
            **unlabelled(values),
            "upstream_connections": connections,
        }

    def report(self) -> dict[str, Any]:
        """Return what `hoberproxy status` says of this process."""
        context = self._context
        return {
            "streams": len(context.exchanges),
            "connections": len(self._connections),
            "resident_bytes": resident_bytes(),
            "events": context.metrics.events
            + sum(exchange.content_events for exchange in context.exchanges),
            "keys": Counter(exchange.key_label for exchange in context.exchanges),
            "health": [asdict(each) for each in context.health.snapshot(context.loop.time())],
        }

    def _beat(self, due: float) -> None:
        """Measure how late the loop is, flush the journal, give a sign of life; twice a second."""
        loop = self._context.loop
        self._context.metrics.observe_lag(loop.time() - due)
        self._journal.flush()
        self.on_beat()
        following = loop.time() + HEARTBEAT
        self._heartbeat = loop.call_at(following, self._beat, following)

    def on_deadline(self, now: float) -> float:
        """Sweep the pools, and now and then the parse cache of requests."""
        self._sweeps += 1
        if self._sweeps % PARSE_CACHE_SWEEP == 0:
            self._context.parse_cache.forget_unused()
        for upstream in self._context.upstreams.values():
            upstream.pool.close_expired(now)
        return now + POOL_SWEEP

    # The end

    @property
    def is_leaving(self) -> bool:
        """Whether `stop` or `hand_over` was called."""
        return self._leave.is_set()

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more requests and let running ones end; at the second call end them now."""
        if self._stop.is_set() or at_once:
            self._stop_now.set()
        self._stop.set()
        self._leave.set()

    def hand_over(self) -> None:
        """Take no more connections and end with the last: other workers serve on these sockets."""
        self._leave.set()

    def stop_on_signals(self) -> None:
        """Let SIGTERM and SIGINT stop this process; SIGUSR2, meant for a supervisor, is logged."""
        loop = asyncio.get_running_loop()
        upgrade = "only `serve` with a config can be upgraded while it runs: restart this one"
        loop.add_signal_handler(signal.SIGUSR2, logger.warning, upgrade)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    async def wait_closed(self) -> None:
        """Serve until stopped, then drain and close everything that `start` opened."""
        await self._leave.wait()
        await self.drain_connections(is_handover=not self._stop.is_set())
        await self.aclose()

    async def drain_connections(self, *, is_handover: bool = False) -> None:
        """Let running requests end, for `drain_timeout` at most; then end them with an error.

        `is_handover`: others serve on the same sockets. Then each connection gets one more answer,
        however long it idles before; otherwise a refusal, and only for a moment.
        """
        context = self._context
        context.is_draining = True
        context.is_stopping = not is_handover
        context.model_lists.stop()
        for listener in self._listeners:
            listener.close()
        running = len(context.exchanges)
        if running:
            logger.info("draining: %d requests are running", running)
        await self._wait_for_connections()
        context.is_stopping = context.is_stopping or bool(self._connections)
        for exchange in list(context.exchanges):
            exchange.fail(
                UnavailableError(
                    "this process is shutting down and the answer took too long",
                    code="draining",
                    retry_after=1.0,
                ),
                close=True,
            )

    async def _wait_for_connections(self) -> None:
        context, loop = self._context, self._context.loop
        begun = loop.time()
        deadline = begun + self._config.server.drain_timeout
        while (now := loop.time()) < deadline and not self._stop_now.is_set():
            if not context.is_stopping and self._stop.is_set():  # the successor ends too
                context.is_stopping, begun = True, now
            if context.is_stopping and now - begun >= IDLE_GRACE:
                for connection in list(self._connections):
                    connection.close_if_idle(now - IDLE_GRACE)
                if not context.exchanges:
                    return
            elif not self._connections and now - begun >= ACCEPTED_GRACE:
                return
            try:
                async with asyncio.timeout(context.wheel.tick):
                    await self._stop_now.wait()
            except TimeoutError:
                pass

    async def aclose(self) -> None:
        """Close what is open, the store last: it takes the last records."""
        for listener in self._listeners:
            listener.close()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        context = self._context
        await context.model_lists.aclose()
        await self._flush_connections()
        await self._runner.cleanup()
        self._ticker.close()
        for upstream in context.upstreams.values():
            await upstream.pool.aclose()
        context.accounts.shut()
        await asyncio.to_thread(self._close_records)
        self._shared_limits.close()
        if context.access_log is not None:
            context.access_log.close()

    def _close_records(self) -> None:
        """Write what is left, or leave it to the writer's process."""
        self._journal.flush()
        self._loader.close(FINISH_LIMIT)
        self._journal.end()
        if self._writer is not None:
            self._writer.close()
        self._journal.close()

    async def _flush_connections(self) -> None:
        """Give the last answers a moment to reach their clients."""
        for connection in list(self._connections):
            connection.close_if_idle()
        for _ in range(100):
            if not self._connections:
                break
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.abort()


class WriterThread:
    """Run a writer of records on a thread, in a process that serves without a writer process."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._limit = FINISH_LIMIT

    def start(self) -> None:
        """Open the store and take over what dead processes left. Raises StoreError."""
        self._thread = start_thread(self._run, "hoberproxy-writer")

    def close(self, limit: float = FINISH_LIMIT) -> None:
        """Write what is left, for at most `limit` seconds, and end the thread."""
        self._limit = limit
        self._wake.set()
        if self._thread is not None:
            self._thread.join(limit + 1.0)

    def _run(self, opened: Future[None]) -> None:
        with closing(self.writer) as writer:
            writer.open()
            opened.set_result(None)
            while not self._wake.wait(writer.turn()):
                pass
            writer.finish(self._limit)


def _check_keys(config: Config, addresses: Iterable[Address]) -> None:
    """Raise ConfigError if others than this machine would be served without keys.

    The config was checked against its own `server.listen`; --listen stands over that, and so do
    the sockets that systemd has opened.
    """
    public = [str(address) for address in addresses if not address.is_loopback]
    if public and not config.keys.required:
        raise ConfigError(
            [
                "keys.required: expected true unless only this machine is served, got false while "
                f"listening on {', '.join(public)}; require keys, or start on 127.0.0.1 alone"
            ]
        )


def _open_shared_limits(records_file: str) -> SharedLimits:
    path = f"{os.path.realpath(records_file)}-limits"
    try:
        return SharedLimits(path)
    except FileNotFoundError as exc:
        raise StartError(
            f"expected the directory {os.path.dirname(path)} to exist, got none; create it or "
            "change records.file"
        ) from exc
    except OSError as exc:
        reason = exc.strerror or exc
        raise StartError(f"cannot use {path} for the limits of keys: {reason}") from exc


def run(main: Callable[[], object]) -> None:
    """Run a coroutine function on uvloop, as all that this process does."""
    raise_file_limit()
    collect_rarely()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())  # type: ignore[arg-type]
