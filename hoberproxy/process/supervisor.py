"""The supervisor: owns the listening sockets, keeps workers on them, replaces them and itself.

    SIGHUP   read and check the config; start workers with it; when they serve, the old ones leave
    SIGUSR2  the same, after this process has become the installed program (process/upgrade.py)
    SIGTERM  let all workers drain; a second one ends them at once

A listening socket is never closed while the service runs, so no connection is refused or reset:
what no worker accepts waits in the queue. No request passes through here, and neither the server's
libraries nor uvloop are imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from asyncio import FIRST_COMPLETED
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from .. import __version__
from .._mypyc import describe_build
from ..access.admission import MAX_PROCESSES, MAX_WORKERS
from ..accounting.exposition import Snapshot, merge, render, resident_bytes, unlabelled
from ..accounting.journal_directory import count_living
from ..config.settings import Config
from ..config.source import ConfigSource, read_source
from ..config.values import ConfigError
from .admin_socket import AdminSocket, admin_path, combine
from .channel import LOG_FORMAT, Message
from .child import (
    STEADY,
    Child,
    State,
    back_off,
    kill,
    pids_of,
    problems_of,
    reports_of,
    start_child,
)
from .listeners import Listeners, StartError, bind_when_free, flat, name_of
from .metrics_listener import MetricsListener
from .systemd import Notifier, passed_by_systemd
from .upgrade import (
    Handover,
    hold_channels,
    open_stream_counts,
    replace_program,
    take_handover,
    try_installed,
)
from .writer_keeper import Writers

logger = logging.getLogger("hoberproxy.supervisor")

START_LIMIT = 30.0  # seconds for a worker to be ready
STOP_MARGIN = 15.0  # seconds over the drain limit before a worker is killed
SAMPLE = 1.0  # seconds between two reports of which rates are computed
POLL_INTERVAL = 5.0  # seconds between snapshots: what a crash may take of the counts
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)

Load = Callable[[], tuple[ConfigSource, Config]]


class Supervisor:
    """Supervises one service. `run` returns when all its processes have ended."""

    def __init__(
        self,
        load: Load,
        source: ConfigSource,
        config: Config,
        count: int,
        notifier: Notifier,
        passed: Listeners | None = None,
        handover: Handover | None = None,
    ) -> None:
        self._load = load
        self._source = source
        self._config = config
        self._count = count
        self._notifier = notifier
        self._listeners = passed or Listeners()
        self._left = handover
        self._children: list[Child] = []
        self._writers = Writers(self._count_ended)
        self.generation = handover.generation if handover else 0
        self.upgrades = handover.upgrades + 1 if handover else 0
        self.started = handover.started if handover else time.time()
        self.problems: list[str] = []  # of the last reload or upgrade
        self.restarts = 0
        self._failures = 0
        self._starting = asyncio.Lock()  # one start of workers at a time
        self._due: set[str] = set()  # "reload", "upgrade"
        self._changing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: Snapshot = handover.ended if handover else {}  # of workers that are gone
        self._stream_counts_file, self._stream_counts = open_stream_counts(
            handover.stream_counts if handover else -1
        )
        self._reloads = {"ok": 0, "failed": 0}
        self._admin: AdminSocket | None = None
        self._metrics: list[MetricsListener] = []
        self._is_stopping = False
        self._is_cut = False
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Serve until stopped. Raises StartError or ConfigError if the start cannot succeed."""
        self._handle_signals()
        if self._left is not None:
            await self._adopt(self._left)
        else:
            await self._start()
        if not self._is_stopping:
            await self._begin()
        await self._stopped.wait()
        await self._end()

    async def _begin(self) -> None:
        """Answer scrapers and the admin socket, and announce that clients are served."""
        for each in self._listeners.metrics:
            metrics = MetricsListener(self.render_metrics)
            await metrics.start(each)
            self._metrics.append(metrics)
            logger.info("metrics of all workers are at http://%s/metrics", name_of(each))
        self._admin = AdminSocket(admin_path(self._config), self._answer_admin)
        await self._admin.start()
        if self._left is None:
            self._send_ready()
            for address in self._listeners.addresses:
                print(f"{describe_build()} listens on http://{address}", flush=True)
        self._start_task(self._poll(), "poll")
        if self._notifier.watchdog is not None:
            self._start_task(self._feed_watchdog(self._notifier.watchdog), "watchdog")

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number, act in (
            (signal.SIGTERM, self.stop),
            (signal.SIGINT, self.stop),
            (signal.SIGHUP, self.reload),
            (signal.SIGUSR2, self.upgrade),
            (signal.SIGCHLD, self._reap),
        ):
            loop.add_signal_handler(number, act)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held back across an upgrade

    def _start_task(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

    # Start

    async def _start(self) -> None:
        async with self._starting:  # a reload that is asked for meanwhile follows
            try:
                await self._listeners.listen(self._config.server.listen, self._has_predecessor)
                await self._bind_metrics()
                await self._start_generation()
            except BaseException as error:
                await kill(self._everyone)
                self._listeners.close()
                # If it is to stop, it is no failure that it has not begun.
                if not (self._is_stopping and isinstance(error, StartError)):
                    raise

    def _has_predecessor(self) -> bool:
        """Return whether processes of an earlier run still serve, as after a kill."""
        return not self._is_stopping and count_living(self._config.records.file) > 0

    async def _bind_metrics(self) -> None:
        address = self._config.server.metrics_listen
        if address is None or self._listeners.metrics:
            return
        self._listeners.metrics = await bind_when_free(
            address,
            self._has_predecessor,
            'metrics: {}; choose another, or "off", as server.metrics_listen',
        )

    async def _start_generation(self) -> None:
        """Start a writer and new workers; kill these and raise StartError if one cannot start.

        Workers load their code while the writer starts, but serve only behind it: it reads what
        dead processes have spent.
        """
        if len(self._children) + self._count > MAX_PROCESSES:
            raise StartError(
                f"expected at most {MAX_PROCESSES} workers at a time, got {self._count} beside "
                f"{len(self._children)} that end; try again later, or end them by a restart"
            )
        self.generation += 1
        children = [await self._spawn() for _ in range(self._count)]
        try:
            await self._writers.start(self._config, self.generation)
        except BaseException:
            await kill(children)
            raise
        await self._have_serving(children)

    async def _have_serving(self, children: list[Child]) -> None:
        """Let `children` serve, others for those that are killed; else do as _start_generation."""
        for child in children:
            self._let_serve(child)
        deadline = time.monotonic() + START_LIMIT
        for tries in count(1):
            await self._settle(children, deadline)
            failed = [child for child in children if child.state is not State.SERVING]
            if not failed:
                break
            is_late = time.monotonic() >= deadline
            if is_late or self._is_stopping or not all(child.was_killed for child in failed):
                await kill(children)
                raise StartError(problems_of(failed))
            logger.error(
                "killed while it started, another one starts: worker %s, by %s",
                pids_of(failed),
                failed[0].how_it_ended,
            )
            await asyncio.sleep(back_off(tries))
            others = [await self._spawn() for _ in failed]
            for child in others:
                self._let_serve(child)
            children = [*(child for child in children if child not in failed), *others]

    async def _settle(self, children: list[Child], deadline: float) -> None:
        """Wait until all `children` serve or have ended, or the service is to stop."""
        waits = asyncio.gather(*(child.settled.wait() for child in children))
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            limit = max(0.0, deadline - time.monotonic())
            await asyncio.wait((waits, stopped), timeout=limit, return_when=FIRST_COMPLETED)
        finally:
            waits.cancel()
            stopped.cancel()
            await asyncio.gather(waits, stopped, return_exceptions=True)

    async def _spawn(self) -> Child:
        """Start a process that loads a worker's code and waits for `_let_serve`."""
        slot = min(set(range(MAX_PROCESSES)) - {child.slot for child in self._children})
        passed = [*self._listening(), self._stream_counts_file]
        child = start_child("worker", passed, generation=self.generation, slot=slot)
        self._children.append(child)
        await child.attach()
        return child

    def _listening(self) -> list[int]:
        """Return the descriptors of the sockets that the config listens on."""
        groups = self._listeners.clients
        wanted = groups if self._listeners.is_passed else self._config.server.listen
        return [each.fileno() for each in flat(groups[address] for address in wanted)]

    def _let_serve(self, child: Child) -> None:
        child.channel.send(
            "start",
            text=self._source.text,
            files=self._source.files,
            listen=self._source.listen,
            sockets=self._listening(),
            stream_counts=self._stream_counts_file,
            slot=child.slot,
            workers=self._count,
        )

    def _send_ready(self) -> None:
        number = len(self._serving)
        self._notifier.ready(f"{number} {'worker' if number == 1 else 'workers'}, {__version__}")

    # Workers that end

    def _reap(self) -> None:
        for child in list(self._children):
            if child.reap():
                self._forget(child)
        self._writers.reap()

    def _forget(self, child: Child) -> None:
        was_serving = child.state is State.SERVING
        child.state = State.ENDED
        self._children.remove(child)
        self._stream_counts.clear(child.slot)
        self._count_ended(child.snapshot)
        child.close()
        if was_serving and not self._is_stopping:
            lived = time.time() - child.started
            self._failures = 0 if lived > STEADY else self._failures + 1
            self.restarts += 1
            delay = back_off(self._failures)
            logger.error(
                "worker %d ended with %s after %.0f s; another one starts in %.1f s",
                child.pid,
                child.how_it_ended,
                lived,
                delay,
            )
            self._start_task(self._replace(delay), "replace a worker")

    def _count_ended(self, snapshot: Snapshot) -> None:
        """Add the last snapshot of a process that is gone to the counts of all."""
        self._ended = merge([self._ended, snapshot], ended=True)

    async def _replace(self, delay: float) -> None:
        while not self._is_stopping:
            await asyncio.sleep(delay)
            async with self._starting:
                if self._is_stopping or len(self._serving) >= self._count:
                    return  # a reload has brought new ones
                child = await self._spawn()
                self._let_serve(child)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(START_LIMIT):
                        await child.settled.wait()
                if child.state is State.SERVING:
                    logger.info("worker %d serves", child.pid)
                    return
                await kill([child])
            self._failures += 1
            delay = back_off(self._failures + 1)
            logger.error("no new worker: %s; again in %.1f s", problems_of([child]), delay)

    # Reload, upgrade

    def reload(self) -> None:
        """Read the config again and serve by it, if it is good."""
        self._change("reload")

    def upgrade(self) -> None:
        """Become the program that is now installed, and do as `reload`."""
        self._change("upgrade")

    def _change(self, what: str) -> None:
        if self._is_stopping:
            return
        self._due.add(what)
        if self._changing is None or self._changing.done():
            self._changing = self._start_task(self._make_changes(), "reload")

    async def _make_changes(self) -> None:
        while self._due and not self._is_stopping:
            # One that comes meanwhile leads to another: the file may have been read before.
            is_upgrade = "upgrade" in self._due
            self._due.clear()
            self.problems = []
            try:
                async with self._starting:
                    self._notifier.reloading()
                    if is_upgrade:
                        await self._exec()  # returns only if it cannot be done
                    else:
                        await self._reload()
            finally:
                self._send_ready()

    @property
    def _serving(self) -> list[Child]:
        return [child for child in self._children if child.state is State.SERVING]

    @property
    def _everyone(self) -> list[Child]:
        return [*self._children, *self._writers.all]

    async def _reload(self) -> None:
        before = self._source, self._config
        old, old_writers = list(self._children), list(self._writers.all)
        try:
            source, config = await asyncio.to_thread(self._load)
            await self._listeners.listen(config.server.listen, lambda: False)
            self._source, self._config = source, config
            await self._start_generation()
        except (ConfigError, StartError) as error:
            self._source, self._config = before
            self._writers.keep(old_writers, self._config)
            self._listeners.keep(self._config.server.listen)
            self._note_problems("config not reloaded", error.problems)
            return
        self._reloads["ok"] += 1
        old_settings = before[1].server
        if (config.server.metrics_listen, admin_path(config)) != (
            old_settings.metrics_listen,
            admin_path(before[1]),
        ):
            logger.warning(
                "a changed metrics_listen or admin_socket is used from the next start on"
            )
        for child in old:
            child.leave()
        self._writers.replace(old_writers, before[1])
        self._listeners.keep(self._config.server.listen)
        logging.getLogger("hoberproxy").setLevel(self._config.log.level.upper())
        logger.info("config reloaded; generation %d serves", self.generation)

    def _note_problems(self, what: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        self._reloads["failed"] += 1
        for problem in problems:
            logger.error("%s: %s", what, problem)

    async def _exec(self) -> None:
        """Run the installed code in this very process; returns only if it cannot be run."""
        try:
            await asyncio.to_thread(self._load)
        except ConfigError as error:
            self._note_problems("not upgraded", error.problems)
            return
        problem = await try_installed(self._source.serialize(), START_LIMIT)
        if problem is not None:
            self._note_problems("not upgraded", [problem])
            return
        if await hold_channels(self._everyone, START_LIMIT):
            logger.info("upgrading: process %d goes on with the installed code", os.getpid())
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            problem = replace_program(self._handover())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        else:
            problem = "a worker does not read what it is told"
        self._note_problems("not upgraded", [problem])
        for child in self._everyone:
            child.channel.go_on()

    def _handover(self) -> Handover:
        return Handover(
            source=self._source,
            generation=self.generation,
            upgrades=self.upgrades,
            started=self.started,
            restarts=self.restarts,
            listeners=self._listeners,
            children=self._children,
            writers=self._writers.all,
            ended=dict(self._ended),
            reloads=self._reloads,
            stream_counts=self._stream_counts_file,
        )

    async def _adopt(self, handover: Handover) -> None:
        """Go on where the program before this one stopped, then reload."""
        self._listeners = handover.listeners
        self.restarts = handover.restarts
        self._reloads.update(handover.reloads)
        self._children = handover.children
        self._writers.adopt(handover.writers, self._config)
        for child in self._everyone:  # before any of them can be found to have ended
            child.take(*handover.ends[child.pid])
        async with self._starting:
            for child in self._everyone:
                await child.attach()
        self._reap()  # who ended before there was a handler for it
        logger.info("upgraded to %s", __version__)
        self.reload()

    # Watching

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            await self.refresh()

    async def refresh(self) -> None:
        """Ask all children for new snapshots."""
        await asyncio.gather(*(child.refresh() for child in self._everyone))

    async def _answer_admin(self, question: Message) -> Message:
        kind = question["kind"]
        if kind == "status":
            before, begun = await reports_of(self._children), time.monotonic()
            await asyncio.sleep(SAMPLE)
            after = await reports_of(self._children)
            writers = {"writers": await self._writers.reports()}
            return combine(before, after, time.monotonic() - begun) | writers | self._state()
        if kind == "upgrade":
            self.problems = []
            state = self._state()
            asyncio.get_running_loop().call_later(0.05, self.upgrade)  # the answer goes first
            return state
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": self.started,
            "generation": self.generation,
            "upgrades": self.upgrades,
            "restarts": self.restarts,
            "problems": self.problems,
            "is_changing": bool(self._due)
            or (self._changing is not None and not self._changing.done()),
        }

    async def render_metrics(self) -> bytes:
        """Return the sums over all workers, gone ones among them, as Prometheus' text."""
        await self.refresh()
        return render(self.snapshot())

    def snapshot(self) -> Snapshot:
        """Return the sums by the children's last snapshots."""
        states = Counter(child.state.value for child in self._children)
        own = {
            "workers": [
                [[state.value], states[state.value]] for state in State if state is not State.ENDED
            ],
            "reloads": [[[result], count] for result, count in self._reloads.items()],
            "build_info": [[[__version__], 1]],
            **unlabelled({"worker_restarts": self.restarts, "resident_bytes": resident_bytes()}),
        }
        return merge([self._ended, *(child.snapshot for child in self._everyone), own])

    async def _feed_watchdog(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval / 4)
            oldest = time.monotonic() - interval / 2
            stuck = [
                child
                for child in self._children
                if child.state is not State.STARTING and child.last_heard < oldest
            ]
            if stuck:
                logger.error("workers that do not answer: %s", pids_of(stuck))
            else:
                self._notifier.alive()

    # The end

    def stop(self) -> None:
        """Let running answers end and stop; at the second call end them now."""
        if self._is_stopping:
            self._is_cut = True
            for child in self._children:
                child.stop(at_once=True)
            return
        self._is_stopping = True
        self._notifier.stopping()
        if self._children:
            logger.info("stopping: workers %s drain", pids_of(self._children))
        self._stopped.set()

    async def _end(self) -> None:
        self._listeners.close()
        for metrics in self._metrics:
            metrics.close()
        if self._admin is not None:
            self._admin.close()
        if self._changing is not None:
            self._changing.cancel()
        for child in self._children:
            child.stop(at_once=self._is_cut)
        try:
            async with asyncio.timeout(self._config.server.drain_timeout + STOP_MARGIN):
                for child in list(self._children):
                    await child.ended.wait()
        except TimeoutError:
            logger.error("workers that did not end are killed: %s", pids_of(self._children))
            await kill(self._children)
        await self._writers.end()
        for task in list(self._tasks):
            task.cancel()


def serve(path: str, listen: str | None, count: int) -> None:
    """Serve by the config file at `path` until stopped; `count` 0 is one worker for each core.

    Raises ConfigError or StartError if the start cannot succeed.
    """

    def load() -> tuple[ConfigSource, Config]:
        return read_source(path, listen)

    handover = take_handover(os.environ)
    # What was served until now is good, whatever the file says by now.
    source, config = load() if handover is None else (handover.source, handover.source.parse())
    logging.basicConfig(level=config.log.level.upper(), format=LOG_FORMAT)
    passed = passed_by_systemd(os.environ) if handover is None else None

    async def run() -> None:
        notifier = Notifier(os.environ)
        workers = count or count_cores()
        await Supervisor(load, source, config, workers, notifier, passed, handover).run()

    asyncio.run(run())


def count_cores() -> int:
    """Return on how many cores this process may run, MAX_WORKERS at most."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
