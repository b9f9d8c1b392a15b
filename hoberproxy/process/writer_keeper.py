"""The writer of records as its supervisor keeps it: started, replaced when it dies, ended last.

There may be several for a moment: a new one waits for the lock until the one before has handed
over, or has another records file. Records wait in the journals while there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from ..accounting.exposition import Snapshot
from ..config.settings import Config
from .child import STEADY, Child, State, back_off, kill, reports_of, start_child
from .listeners import StartError

logger = logging.getLogger("hoberproxy.supervisor")

START_LIMIT = 30.0  # seconds for it to be ready
MAX_STARTS = 6  # of one that is killed each time
END_LIMIT = 10.0  # seconds after the last worker for the last records to be written


class Writers:
    """Keeps the writers of one supervisor. `on_ended` gets the last counts of each that is gone."""

    def __init__(self, on_ended: Callable[[Snapshot], None]) -> None:
        self._on_ended = on_ended
        self.all: list[Child] = []  # old ones, that leave, among them
        self._config: Config | None = None  # of the one that serves
        self._generation = 0
        self._failures = 0
        self._is_ending = False
        self._starting = asyncio.Lock()
        self._replacing: asyncio.Task[None] | None = None

    async def start(self, config: Config, generation: int) -> Child:
        """Start a writer for `config`. If it cannot start, end it and raise StartError."""
        async with self._starting:
            self._config, self._generation = config, generation
            return await self._start(config)

    async def _start(self, config: Config) -> Child:
        for tries in count(1):
            writer = await self._spawn(config)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(START_LIMIT):
                    await writer.settled.wait()
            if writer.state is State.SERVING:
                break
            is_final = not writer.was_killed or tries == MAX_STARTS or self._is_ending
            await kill([writer])
            if is_final:
                problems = "; ".join(writer.problems)
                raise StartError(problems or "the writer of records does not start")
            logger.error("the writer of records was killed while it started; another one starts")
            await asyncio.sleep(back_off(tries))
        return writer

    async def _spawn(self, config: Config) -> Child:
        writer = start_child("writer", generation=self._generation)
        self.all.append(writer)
        await writer.attach()
        writer.channel.send(
            "start",
            records=os.fspath(config.records.file),
            keep_days=config.records.keep_days,
            level=config.log.level.upper(),
        )
        return writer

    def adopt(self, writers: list[Child], config: Config) -> None:
        """Take over the writers that the program before this one has left."""
        self.all, self._config = writers, config

    def replace(self, old: Iterable[Child], before: Config) -> None:
        """End `old` writers, of the config `before`, in favour of the last one that has started."""
        assert self._config is not None, "started"
        for writer in old:
            if writer.state is State.DRAINING:
                continue
            if before.records.file == self._config.records.file:
                writer.stop()
            else:  # the workers that leave still write there
                writer.leave()

    def keep(self, old: Iterable[Child], config: Config) -> None:
        """Let `old` writers go on by `config` and end others: the new config is not used."""
        self._config = config
        for writer in set(self.all) - set(old):
            writer.stop()

    @property
    def _is_serving(self) -> bool:
        return any(writer.state is State.SERVING for writer in self.all)

    # Those that end

    def reap(self) -> None:
        """Forget writers that have ended, and replace one that should not have."""
        for writer in list(self.all):
            if writer.reap():
                self._forget(writer)

    def _forget(self, writer: Child) -> None:
        was_serving = writer.state is State.SERVING
        writer.state = State.ENDED
        self.all.remove(writer)
        self._on_ended(writer.snapshot)
        writer.close()
        if not was_serving or self._is_ending:
            return
        self._failures = 0 if time.time() - writer.started > STEADY else self._failures + 1
        logger.error("the writer of records ended with %s; another one starts", writer.how_it_ended)
        if self._replacing is None or self._replacing.done():
            loop = asyncio.get_running_loop()
            self._replacing = loop.create_task(self._replace(), name="replace the writer")

    async def _replace(self) -> None:
        while True:
            await asyncio.sleep(back_off(self._failures))
            async with self._starting:
                if self._is_ending or self._is_serving or self._config is None:
                    return  # a reload has brought one
                try:
                    writer = await self._start(self._config)
                except StartError as error:
                    self._failures += 1
                    logger.error("no new writer of records: %s", "; ".join(error.problems))
                else:
                    logger.info("process %d writes the records", writer.pid)
                    return

    async def end(self) -> None:
        """End all writers once the store has all records; the workers have ended before."""
        self._is_ending = True
        async with self._starting:  # one that is starting has to end, too
            with contextlib.suppress(StartError):
                if not self._is_serving and self._config is not None:  # it had died
                    await self._start(self._config)
        if self._replacing is not None:
            self._replacing.cancel()
        for writer in self.all:
            writer.stop()
        try:
            async with asyncio.timeout(END_LIMIT):
                for writer in list(self.all):
                    await writer.ended.wait()
        except TimeoutError:
            logger.error("the writer is killed; the next start writes what is in the journals")
            await kill(self.all)

    # Watching

    async def reports(self) -> list[dict[str, Any]]:
        """Return what `hoberproxy status` says of each writer."""
        serving = State.SERVING.value
        return [
            report | ({"state": "writer"} if report["state"] == serving else {})
            for report in await reports_of(self.all)
        ]
