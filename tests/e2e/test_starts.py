"""Starts and stops that meet: after a kill, while something is killed, and signals on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import all_below, children_of, is_alive
from tests.support.scripted import ScriptedUpstream

from .harness import WORKER, WRITER, Program, chat, connected
from .test_records import KILLS
from .test_status import command
from .test_workers import GOOD, PATIENCE, WAITING, begin_stream, finish_stream, write_config

STARTS = max(8, KILLS)


async def until(holds: Callable[[], Any]) -> Any:
    """Wait until a condition holds, on a busy machine too; returns its value."""
    async with asyncio.timeout(PATIENCE):
        while not (value := holds()):  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.002)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Run:
    """Starts of one service, whose ports do not change."""

    def __init__(self, folder: Path, url: str) -> None:
        self.port, self.folder = free_port(), folder
        self.config = write_config(folder, url, metrics=f"127.0.0.1:{free_port()}")
        text = self.config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{self.port}")
        self.config.write_text(text)
        self.errors = folder / "stderr.txt"
        self.started: dict[Process, int] = {}
        self.below: set[int] = set()

    async def begin(self) -> Process:
        """Start it, and do not wait."""
        with self.errors.open("ab") as errors, self.out(len(self.started)).open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "hoberproxy", "serve", "--config", str(self.config)),
                *("--workers", "2"),
                stdout=out,
                stderr=errors,
            )
        self.started[process] = len(self.started)
        return process

    def out(self, number: int) -> Path:
        return self.folder / f"stdout-{number}.txt"

    async def serves(self, process: Process) -> Program:
        """Wait until it does."""
        out = self.out(self.started[process])
        await until(lambda: " listens on " in out.read_text() or process.returncode is not None)
        assert process.returncode is None, self.log()
        self.below |= all_below(process.pid)
        return Program(process, self.port, self.folder)

    def log(self) -> str:
        return self.errors.read_text()

    async def logged(self, text: str) -> None:
        await until(lambda: text in self.log())


@asynccontextmanager
async def run(folder: Path, upstream: ScriptedUpstream) -> AsyncIterator[Run]:
    """Nothing that was started is left behind."""
    starts = Run(folder, upstream.base_url)
    try:
        yield starts
    finally:
        for process in starts.started:
            starts.below |= {process.pid, *all_below(process.pid)}
        for pid in starts.below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in starts.started:
            await process.wait()


async def child(process: Process, module: str) -> int:
    """The first that runs this module."""
    return (await until(lambda: children_of(process.pid, running=module)))[0]


async def kill(process: Process) -> None:
    process.kill()
    await process.wait()


# After a kill


@pytest.mark.timeout(300)
async def test_each_start_right_after_a_kill_of_the_supervisor_serves(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(*[WAITING] * STARTS, default=GOOD) as upstream,
        run(tmp_path, upstream) as starts,
        AsyncExitStack() as stack,
    ):
        clients = []
        for _ in range(STARTS):
            process = await starts.begin()
            await starts.serves(process)
            client = await stack.enter_async_context(connected(starts.port))
            await begin_stream(client)
            clients.append(client)
            await kill(process)
        running = await starts.serves(await starts.begin())
        assert (await running.post(chat())).status == 200
        code, out, _ = await command(tmp_path, "status")  # over a socket whose file was left behind
        assert code == 0, out
        upstream.release("go")
        for client in clients:  # the workers whose supervisors were killed end them
            await finish_stream(client)
        running.process.terminate()
        assert await running.process.wait() == 0


async def test_a_start_waits_for_a_worker_that_is_slow_to_see_its_supervisor_s_death(
    tmp_path: Path,
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, run(tmp_path, upstream) as starts:
        first = await starts.begin()
        await starts.serves(first)
        slow = children_of(first.pid, running=WORKER)
        for pid in slow:
            os.kill(pid, signal.SIGSTOP)
        await kill(first)
        second = await starts.begin()
        await starts.logged("processes of an earlier run are ending")
        for pid in slow:
            os.kill(pid, signal.SIGCONT)
        running = await starts.serves(second)
        assert (await running.post(chat())).status == 200
        await until(lambda: not any(is_alive(pid) for pid in slow))
        second.terminate()
        assert await second.wait() == 0


async def test_a_start_that_waits_for_an_address_ends_when_it_is_told_to(tmp_path: Path) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, run(tmp_path, upstream) as starts:
        await starts.serves(await starts.begin())
        second = await starts.begin()
        await starts.logged("processes of an earlier run are ending")
        second.terminate()
        assert await second.wait() == 0


# What is killed while it starts


@pytest.mark.parametrize("module", [WORKER, WRITER], ids=["a worker", "the writer"])
async def test_what_is_killed_while_the_service_starts_is_started_again(
    tmp_path: Path, module: str
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, run(tmp_path, upstream) as starts:
        process = await starts.begin()
        killed = await child(process, module)
        os.kill(killed, signal.SIGKILL)
        running = await starts.serves(process)
        assert "while it started" in starts.log()
        assert len(children_of(process.pid, running=WORKER)) == 2
        assert (await running.post(chat())).status == 200
        process.terminate()
        assert await process.wait() == 0
        assert len(running.stored()) == 1


# Signals on the way


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("module", [WORKER, WRITER], ids=["a worker", "the writer"])
async def test_a_stop_while_the_service_starts_ends_all_of_it(
    tmp_path: Path, module: str, times: int
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, run(tmp_path, upstream) as starts:
        process = await starts.begin()
        started = await child(process, module)
        for _ in range(times):
            process.terminate()
            await asyncio.sleep(0.05)  # two that are pending are one
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0, starts.log()
        assert not is_alive(started)
        assert "Traceback" not in starts.log()
        assert not (tmp_path / "records.sock").exists()


async def test_a_reload_while_the_service_starts_follows_the_start(
    tmp_path: Path,
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, run(tmp_path, upstream) as starts:
        process = await starts.begin()
        await child(process, WRITER)
        process.send_signal(signal.SIGHUP)
        running = await starts.serves(process)
        await starts.logged("config reloaded")
        assert (await running.post(chat())).status == 200
        process.terminate()
        assert await process.wait() == 0


async def test_a_stop_right_behind_reloads_ends_all_of_it(
    tmp_path: Path,
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, run(tmp_path, upstream) as starts:
        process = await starts.begin()
        running = await starts.serves(process)
        assert (await running.post(chat())).status == 200
        below = all_below(process.pid)
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.02)  # two that are pending are one
        await until(lambda: all_below(process.pid) - below)  # those of the new config start
        below |= all_below(process.pid)
        process.terminate()
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0, starts.log()
        await until(lambda: not any(is_alive(pid) for pid in below))
        assert "Traceback" not in starts.log()
        assert len(running.stored()) == 1


@pytest.mark.parametrize("module", [WORKER, WRITER], ids=["a worker", "the writer"])
async def test_what_is_killed_while_a_reload_starts_it_is_started_again(
    tmp_path: Path, module: str
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, run(tmp_path, upstream) as starts:
        process = await starts.begin()
        running = await starts.serves(process)
        before = set(children_of(process.pid, running=module))
        process.send_signal(signal.SIGHUP)
        new = await until(lambda: set(children_of(process.pid, running=module)) - before)
        os.kill(new.pop(), signal.SIGKILL)
        await starts.logged("config reloaded")
        assert "while it started" in starts.log()
        assert (await running.post(chat())).status == 200
        process.terminate()
        assert await process.wait() == 0
