"""The running process: opens store and sockets, waits for its end, drains, closes in order.

What is served is wire.py's and app.py's; this module only owns what lives as long as the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

import uvloop
from aiohttp import web

from . import __version__
from .access import Keyring
from .accesslog import AccessLog
from .accounting import Accounts
from .admin import AdminSocket, admin_path
from .admission import Admission, BodyMemory, ConnectionRoom, StreamCounts, body_memory_limit
from .app import make_app, make_metrics_app
from .catalog import Catalog
from .channel import Message
from .context import ServerContext
from .deadlines import Ticker, Timed, Wheel
from .errors import UnavailableError
from .exchange import Exchange
from .exposition import resident_bytes
from .files import connections_limit, raise_file_limit
from .folder import count_living, journal_directory
from .http11_head import MAX_REQUEST_HEAD_BYTES
from .joining import release_signals
from .journal import Journal
from .key_loader import KeyLoader, start_thread
from .listeners import (
    BACKLOG,
    Listeners,
    StartError,
    flat,
    limit_unsent,
    listen_for_metrics,
    listen_when_free,
)
from .memory import collect_rarely, keep_freed_memory, machine_memory
from .metrics import Gauges, Metrics
from .notify import Notifier
from .provider import make_upstreams
from .settings import Address, Config
from .status import combine
from .tallies import Tallies
from .values import ConfigError
from .wire import LINGER, DownstreamConnection
from .writer import FINISH_LIMIT, Writer

logger = logging.getLogger("hoberproxy.server")

# Seconds in which an idle connection may still bring a request that was on its way.
IDLE_GRACE = 0.5
# Seconds for a connection that was accepted in the last turn to be told of.
ACCEPTED_GRACE = 0.1
SAMPLE = 1.0  # seconds over which rates are told
HEARTBEAT = 0.5  # seconds between signs of life of the loop
POOL_SWEEP = 1.0  # seconds between looks for idle upstream connections past their time
FRAMES_SWEEP = 600  # of these; what requests said around their messages goes if not said again


class Server(Timed):
    """One process on one loop: `start`, then `wait_closed`; `stop` from a signal."""

    def __init__(
        self,
        config: Config,
        listeners: Listeners | None = None,
        notifier: Notifier | None = None,
        counts: StreamCounts | None = None,
        has_writer: bool = True,
        workers: int = 1,
    ) -> None:
        self._workers = workers  # this one among them: they share the machine
        self._counts = counts
        self._config = config
        self._given = listeners
        self._notifier = notifier or Notifier({})
        self._admin: AdminSocket | None = None
        self._started = time.time()
        self._heartbeat: asyncio.TimerHandle | None = None
        self.on_beat: Callable[[], None] = notify_nobody
        self._watchdog: asyncio.TimerHandle | None = None
        self._listeners: list[asyncio.Server] = []
        self._runners: list[web.AppRunner] = []
        self._connections: set[DownstreamConnection] = set()
        self._leave = asyncio.Event()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._sweeps = 0
        self._gateway: ServerContext | None = None
        self._tallies: Tallies | None = None
        records = config.records
        self._journal = Journal(journal_directory(records.file))
        self._loader: KeyLoader | None = None
        self._writer: WriterThread | None = None  # else another process has to be one
        if has_writer:
            self._writer = WriterThread(Writer(records.file, keep_days=records.keep_days))
        self._ticker: Ticker | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._is_reload_due = False
        self.addresses: list[Address] = []  # where it really listens

    async def start(self) -> None:
        """Open the store, then listen. Raises StartError, StoreError or ConfigError."""
        given = self._given
        _check_keys(self._config, given.addresses if given else self._config.server.listen)
        self._gateway = gateway = self._build()
        if self._writer is not None:  # before the keys: what a dead process spent is spent
            self._writer.start()
        self._loader = KeyLoader(self._config.records.file, gateway.keyring, self._journal)
        self._loader.start()
        self._ticker = Ticker(gateway.wheel, gateway.loop)
        gateway.wheel.schedule(self, gateway.loop.time() + POOL_SWEEP)
        handlers = await self._handlers(make_app(gateway))
        begin = partial(Exchange, gateway)

        def connection() -> Any:  # a Protocol by its methods
            return DownstreamConnection(gateway, begin, handlers, self._connections)

        if given is not None:
            await self._listen_on(connection, given)
        else:
            for address in self._config.server.listen:
                listener = await self._listen(connection, address)
                self._listeners.append(listener)
                port = listener.sockets[0].getsockname()[1]
                self.addresses.append(Address(address.host, port))
        await self._listen_for_metrics(gateway, given.metrics if given else [])
        self._admin = AdminSocket(admin_path(self._config), self._answer_admin)
        await self._admin.start()
        gateway.model_lists.start()
        self._beat(gateway.loop.time())

    async def _listen_on(
        self, protocol: Callable[[], asyncio.Protocol], listeners: Listeners
    ) -> None:
        """Accept on sockets that are others' too: closing ours loses no waiting connection."""
        loop = asyncio.get_running_loop()
        self.addresses = listeners.addresses
        for each in flat(listeners.clients.values()):
            if each.family == socket.AF_UNIX:
                listener = await loop.create_unix_server(protocol, sock=each, backlog=BACKLOG)
            else:
                listener = await loop.create_server(protocol, sock=each, backlog=BACKLOG)
            self._listeners.append(listener)

    def _build(self) -> ServerContext:
        config, loop = self._config, asyncio.get_running_loop()
        wheel = Wheel(loop.time())
        upstreams = make_upstreams(config, loop, wheel)
        keyring = Keyring()
        catalog = Catalog(config.models)
        self._tallies = tallies = _open_tallies(config.records.file)
        return ServerContext(
            config=config,
            loop=loop,
            wheel=wheel,
            catalog=catalog,
            keyring=keyring,
            accounts=Accounts(self._journal, tallies, config.keys.assumed_output),
            access_log=(
                AccessLog(sys.stderr, config.log.format, sample=config.log.sample)
                if config.log.access
                else None
            ),
            metrics=Metrics(catalog.label),
            upstreams=upstreams,
            admission=self._make_admission(config),
            bodies=BodyMemory(self._body_memory_limit(config)),
            room=ConnectionRoom(connections_limit()),
        )

    def _body_memory_limit(self, config: Config) -> int:
        return body_memory_limit(config.server, machine_memory(), self._workers)

    def _make_admission(self, config: Config) -> Admission:
        return Admission(config.server.max_streams, self._counts)

    async def _handlers(self, app: web.Application) -> web.Server:
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            # The check in front of aiohttp has its own limits; here only it must not be stricter.
            max_line_size=MAX_REQUEST_HEAD_BYTES,
            max_field_size=MAX_REQUEST_HEAD_BYTES,
            # Seconds for the rest of a body that nobody needs; after these ours begin.
            lingering_time=LINGER,
        )
        await runner.setup()
        self._runners.append(runner)
        assert runner.server is not None, "set up above"
        return runner.server

    async def _listen(
        self, protocol: Callable[[], asyncio.Protocol], address: Address
    ) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        try:
            listener = await listen_when_free(
                lambda: loop.create_server(
                    protocol, address.host, address.port, backlog=BACKLOG, reuse_address=True
                ),
                self._has_predecessor,
            )
            for each in listener.sockets:
                # On a copy of the descriptor: uvloop's stand-in for a socket cannot set options.
                with socket.socket(fileno=os.dup(each.fileno())) as own:
                    limit_unsent(own)
            return listener
        except OSError as exc:
            advice = "choose another with --listen"
            raise StartError(f"{_explain(address, exc)}; {advice}") from exc

    async def _listen_for_metrics(self, gateway: ServerContext, given: list[socket.socket]) -> None:
        address = self._config.server.metrics_listen
        if address is None and not given:
            return
        app = make_metrics_app(lambda: gateway.metrics.render(self._gauges(gateway)))
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        self._runners.append(runner)
        for each in given:
            await web.SockSite(runner, each).start()
        if given or address is None:
            return
        for each in await listen_for_metrics(address, self._has_predecessor):
            await web.SockSite(runner, each).start()

    def _has_predecessor(self) -> bool:
        """Whether other processes still serve with our records file, as after a kill."""
        return count_living(self._config.records.file) > 1

    def announce(self) -> None:
        """Tell systemd that clients are served, and go on to tell it that the loop turns."""
        self._notifier.ready(f"one process, {__version__}")
        if self._notifier.watchdog is not None:
            self._feed_watchdog(self._notifier.watchdog / 4)

    def _feed_watchdog(self, interval: float) -> None:
        self._notifier.alive()
        loop = asyncio.get_running_loop()
        self._watchdog = loop.call_later(interval, self._feed_watchdog, interval)

    def reload(self, config: Config) -> None:
        """Serve by another config from now on; running requests end by theirs.

        What was learnt of the endpoints stays. Listeners, store and log stay as they are until the
        next start. Raises ConfigError, and then nothing has changed.
        """
        gateway = self._gateway
        assert gateway is not None, "started before"
        _check_keys(config, self.addresses)
        upstreams = make_upstreams(config, gateway.loop, gateway.wheel, gateway.upstreams)
        if (config.server.listen, config.server.metrics_listen, config.records.file) != (
            self._config.server.listen,
            self._config.server.metrics_listen,
            self._config.records.file,
        ):
            logger.warning("a changed listener or records file is used from the next start on")
        retired = [up for name, up in gateway.upstreams.items() if upstreams.get(name) is not up]
        self._config = config
        gateway.configure(config, upstreams)
        if self._writer is not None:
            self._writer.writer.keep_days = config.records.keep_days
        gateway.accounts.assume_output(config.keys.assumed_output)
        gateway.admission = self._make_admission(config)
        gateway.bodies.limit = self._body_memory_limit(config)
        if gateway.access_log is not None:
            gateway.access_log.sample = config.log.sample
        gateway.catalog = Catalog(config.models)
        gateway.metrics.label = gateway.catalog.label
        gateway.refused_options.clear()  # the new adaptations may have mended them
        for upstream in retired:
            upstream.pool.retire()

    def snapshot(self) -> dict[str, Any]:
        """The counts since the start and what is so now, for whoever watches all workers."""
        gateway = self._gateway
        assert gateway is not None, "started before"
        return gateway.metrics.snapshot(self._gauges(gateway))

    def _gauges(self, gateway: ServerContext) -> Gauges:
        log, journal = gateway.access_log, self._journal
        writer = self._writer.writer if self._writer is not None else None
        return Gauges(
            streams_open=len(gateway.exchanges),
            connections_open=len(self._connections),
            upstream_connections={
                name: (upstream.pool.idle, upstream.pool.open - upstream.pool.idle)
                for name, upstream in gateway.upstreams.items()
            },
            records_queued=journal.depth,
            records_lost=journal.records_lost + (writer.lost if writer is not None else 0),
            journal_lost=journal.lost,
            journals_unreadable=writer.unreadable if writer is not None else 0,
            log_lines_lost=log.lost if log is not None else 0,
            resident_bytes=resident_bytes(),
            body_bytes=gateway.bodies.held,
            bad_heads=gateway.bad_heads,
            refused_connections=gateway.refused_connections,
        )

    def account(self) -> dict[str, Any]:
        """What `hoberproxy status` tells of this process."""
        gateway = self._gateway
        assert gateway is not None, "started before"
        return {
            "streams": len(gateway.exchanges),
            "connections": len(self._connections),
            "resident_bytes": resident_bytes(),
            "events": gateway.metrics.events
            + sum(exchange.content_events for exchange in gateway.exchanges),
            "keys": Counter(exchange.key_label for exchange in gateway.exchanges),
            "health": [
                {
                    "provider": each.provider,
                    "model": each.upstream_model,
                    "is_cooling": each.is_cooling,
                    "cooldown": each.cooldown,
                    "failure_rate": each.failure_rate,
                    "first_content": each.first_content,
                    "throughput": each.throughput,
                }
                for each in gateway.health.snapshot(gateway.loop.time())
            ],
        }

    async def _answer_admin(self, question: Message) -> Message:
        own = {
            "pid": os.getpid(),
            "state": "draining" if self.is_leaving else "serving",
            "started": self._started,
        }
        if question["kind"] == "status":
            before, begun = self.account(), time.monotonic()
            await asyncio.sleep(SAMPLE)
            seconds = time.monotonic() - begun
            document = combine([before | own], [self.account() | own], seconds)
            return document | {"version": __version__, **own}
        return {"error": "only `serve --workers` can be upgraded while it runs: restart this one"}

    def _beat(self, due: float) -> None:
        """Twice a second: the loop turns, and so late."""
        assert self._gateway is not None, "started before"
        loop = self._gateway.loop
        self._gateway.metrics.observe_lag(loop.time() - due)
        self._journal.flush()
        self.on_beat()
        following = loop.time() + HEARTBEAT
        self._heartbeat = loop.call_at(following, self._beat, following)

    def on_deadline(self, now: float) -> float:
        """Sweep the pools, and now and then what was remembered of requests."""
        assert self._gateway is not None
        self._sweeps += 1
        if self._sweeps % FRAMES_SWEEP == 0:
            self._gateway.frames.forget_unused()
        for upstream in self._gateway.upstreams.values():
            upstream.pool.close_expired(now)
        return now + POOL_SWEEP

    # The end

    @property
    def is_leaving(self) -> bool:
        """The end has begun."""
        return self._leave.is_set()

    def stop(self, *, at_once: bool = False) -> None:
        """First call: take no more requests and let running ones end. Second: end them now."""
        if self._stop.is_set() or at_once:
            self._stop_now.set()
        self._stop.set()
        self._leave.set()

    def hand_over(self) -> None:
        """Others serve on the same sockets: take no more connections, and end with the last."""
        self._leave.set()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT stop; SIGUSR2 is for a supervisor, and must not end us."""
        loop = asyncio.get_running_loop()
        upgrade = "only `serve --workers` can be upgraded while it runs: restart this one"
        loop.add_signal_handler(signal.SIGUSR2, logger.warning, upgrade)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    def reload_on_signal(self, load: Callable[[], Config]) -> None:
        """SIGHUP reads the config again; a bad one changes nothing, and the log says why."""

        def begin() -> None:
            self._is_reload_due = True  # one under way may have read the file before it changed
            if self._reloading is None or self._reloading.done():
                self._reloading = loop.create_task(self._reload(load), name="reload")

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, begin)
        release_signals()

    async def _reload(self, load: Callable[[], Config]) -> None:
        while self._is_reload_due:
            self._is_reload_due = False
            self._notifier.reloading()
            try:
                self.reload(await asyncio.to_thread(load))
            except ConfigError as error:
                for problem in error.problems:
                    logger.error("config not reloaded: %s", problem)
            else:
                logger.info("config reloaded")
            self._notifier.ready(f"one process, {__version__}")

    async def wait_closed(self) -> None:
        """Serve until stopped, then drain and close everything that `start` opened."""
        await self._leave.wait()
        self._notifier.stopping()
        await self.drain_connections(is_handover=not self._stop.is_set())
        await self.aclose()

    async def drain_connections(self, *, is_handover: bool = False) -> None:
        """Let running requests end, for `drain_timeout` at most; then end them with an error.

        `is_handover`: others serve on the same sockets. Then each connection gets one more answer,
        however long it idles before; otherwise a refusal, and only for a moment.
        """
        gateway = self._gateway
        assert gateway is not None
        gateway.is_draining = True
        gateway.is_stopping = not is_handover
        gateway.model_lists.stop()
        for listener in self._listeners:
            listener.close()
        running = len(gateway.exchanges)
        if running:
            logger.info("draining: %d requests are running", running)
        await self._wait_for_connections(gateway)
        gateway.is_stopping = gateway.is_stopping or bool(self._connections)
        for exchange in list(gateway.exchanges):
            exchange.fail(
                UnavailableError(
                    "this process is shutting down and the answer took too long",
                    code="draining",
                    retry_after=1.0,
                ),
                close=True,
            )

    async def _wait_for_connections(self, gateway: ServerContext) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        deadline = begun + self._config.server.drain_timeout
        while (now := loop.time()) < deadline and not self._stop_now.is_set():
            if not gateway.is_stopping and self._stop.is_set():  # the successor ends too
                gateway.is_stopping, begun = True, now
            if gateway.is_stopping and now - begun >= IDLE_GRACE:
                for connection in list(self._connections):
                    connection.close_if_idle(now - IDLE_GRACE)
                if not gateway.exchanges:
                    return
            elif not self._connections and now - begun >= ACCEPTED_GRACE:
                return
            try:
                async with asyncio.timeout(gateway.wheel.tick):
                    await self._stop_now.wait()
            except TimeoutError:
                pass

    async def aclose(self) -> None:
        """Close what is open, the store last: it takes the last records."""
        for listener in self._listeners:
            listener.close()
        if self._reloading is not None:
            self._reloading.cancel()
        if self._admin is not None:
            self._admin.close()
        for timer in (self._watchdog, self._heartbeat):
            if timer is not None:
                timer.cancel()
        gateway = self._gateway
        if gateway is None:
            return
        await gateway.model_lists.aclose()
        await self._flush_connections(gateway)
        for runner in self._runners:
            await runner.cleanup()
        if self._ticker is not None:
            self._ticker.close()
        for upstream in gateway.upstreams.values():
            await upstream.pool.aclose()
        gateway.accounts.shut()
        await asyncio.to_thread(self._close_records)
        if self._tallies is not None:
            self._tallies.close()
        if gateway.access_log is not None:
            gateway.access_log.close()

    def _close_records(self) -> None:
        """Write what is left, or leave it to the writer's process."""
        self._journal.flush()
        if self._loader is not None:
            self._loader.close(FINISH_LIMIT)
        self._journal.end()
        if self._writer is not None:
            self._writer.close()
            if self._journal.depth:
                logger.error("%d records were not written in time", self._journal.depth)
        self._journal.close()

    async def _flush_connections(self, gateway: ServerContext) -> None:
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
    """Runs a writer on a thread of the process that serves, where no other process writes."""

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
        try:
            self.writer.open()
        except BaseException as exc:
            self.writer.close()
            opened.set_exception(exc)
            return
        opened.set_result(None)
        try:
            while not self._wake.wait(self.writer.turn()):
                pass
            self.writer.finish(self._limit)
        finally:
            self.writer.close()


def notify_nobody() -> None:
    """Nobody wants to know that the loop turns."""


def _check_keys(config: Config, addresses: Iterable[Address]) -> None:
    """Without keys only this machine is served, wherever the address has come from.

    The config was checked against its own `server.listen`; --listen stands over that, and after a
    reload the listeners are still those of the start. Raises ConfigError.
    """
    public = [str(address) for address in addresses if not address.is_loopback]
    if public and not config.keys.required:
        raise ConfigError(
            [
                "keys.required: expected true unless only this machine is served, got false while "
                f"listening on {', '.join(public)}; require keys, or start on 127.0.0.1 alone"
            ]
        )


def _open_tallies(records_file: str) -> Tallies:
    path = f"{os.path.realpath(records_file)}-limits"
    try:
        return Tallies(path)
    except FileNotFoundError as exc:
        raise StartError(
            f"expected the directory {os.path.dirname(path)} to exist, got none; create it or "
            "change records.file"
        ) from exc
    except OSError as exc:
        reason = exc.strerror or exc
        raise StartError(f"cannot use {path} for the limits of keys: {reason}") from exc


def _explain(address: Address, exc: OSError) -> str:
    return f"cannot listen on {address}: {exc.strerror or exc}"


def run(main: Callable[[], object]) -> None:
    """Run a coroutine function on uvloop, in a process of its own."""
    raise_file_limit()
    keep_freed_memory()
    collect_rarely()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())  # type: ignore[arg-type]
