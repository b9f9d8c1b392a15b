"""What systemd says to a service, and hears of it: over inherited sockets, without a systemd."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.scripted import WAIT, ScriptedUpstream, completion, json_response

from .harness import Program, chat, connected, eventually
from .test_workers import write_config

GOOD = json_response(200, completion())
# As systemd does it: the descriptor is 3, and the variable names the very process.
LAUNCH = """
import os, sys
number, *command = sys.argv[1:]
os.dup2(int(number), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(command[0], command)
"""


class Manager:
    """The socket that services notify."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.environ = {**os.environ, "NOTIFY_SOCKET": str(path)}

    async def hear(self) -> str:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WAIT):
            return (await loop.sock_recv(self.socket, 4096)).decode()

    async def hear_other_than(self, usual: str) -> str:
        while (heard := await self.hear()) == usual:
            pass
        return heard

    def hear_all(self) -> list[str]:
        heard = []
        while True:
            try:
                heard.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return heard


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    listening = Manager(tmp_path / "notify")
    yield listening
    listening.socket.close()


@asynccontextmanager
async def started(
    folder: Path, environ: dict[str, str], passed: socket.socket | None = None
) -> AsyncIterator[Program]:
    command = [sys.executable, "-m", "hoberproxy", "serve", "--workers", "2"]
    command += ["--config", str(folder / "hoberproxy.toml")]
    if passed is not None:
        command = [sys.executable, "-c", LAUNCH, str(passed.fileno()), *command]
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=[passed.fileno()] if passed is not None else [],
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT):
            line = await process.stdout.readline()
        yield Program(process, int(line.decode().rpartition(":")[2]), folder)
    finally:
        if process.returncode is None:
            process.kill()
        async with asyncio.timeout(WAIT):
            await process.communicate()


async def test_readiness_reloads_and_the_end_are_told(manager: Manager, tmp_path: Path) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream:
        write_config(tmp_path, upstream.base_url)
        async with started(tmp_path, manager.environ) as running:
            assert (await manager.hear()).startswith("READY=1\n")
            assert (await running.post(chat())).status == 200
            running.process.send_signal(signal.SIGHUP)
            assert (await manager.hear()).startswith("RELOADING=1\n")
            assert (await manager.hear()).startswith("READY=1\n")
            write_config(tmp_path, "ftp://nowhere")
            running.process.send_signal(signal.SIGHUP)
            assert (await manager.hear()).startswith("RELOADING=1\n")
            assert (await manager.hear()).startswith("READY=1\n"), "it goes on as it was"
            running.process.send_signal(signal.SIGTERM)
            assert (await manager.hear()).startswith("STOPPING=1\n")
            assert await running.wait() == 0


async def test_an_upgrade_is_a_reload_of_the_same_main_process(
    manager: Manager, tmp_path: Path
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream:
        write_config(tmp_path, upstream.base_url)
        async with started(tmp_path, manager.environ) as running:
            assert (await manager.hear()).startswith("READY=1\n")
            running.process.send_signal(signal.SIGUSR2)
            assert (await manager.hear()).startswith("RELOADING=1\n")
            heard = await manager.hear()
            while heard.startswith("RELOADING=1\n"):
                heard = await manager.hear()
            assert heard.startswith("READY=1\n")
            assert running.process.returncode is None
            assert (await running.post(chat())).status == 200


async def test_a_socket_of_systemd_is_served_and_stays_open_at_the_end(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with ScriptedUpstream(default=GOOD) as upstream:
            write_config(tmp_path, upstream.base_url)
            async with started(tmp_path, dict(os.environ), listener) as running:
                assert running.port == port
                assert (await running.post(chat())).status == 200
                running.process.send_signal(signal.SIGHUP)
                assert (await running.post(chat())).status == 200
                running.process.send_signal(signal.SIGTERM)
                assert await running.wait() == 0
            async with connected(port) as waiting:  # the next start will answer it
                await waiting.ask(chat())
                async with started(tmp_path, dict(os.environ), listener) as running:
                    assert (await waiting.read_reply()).status == 200


async def test_the_watchdog_hears_nothing_more_once_a_loop_is_stuck(
    manager: Manager, tmp_path: Path
) -> None:
    manager.environ["WATCHDOG_USEC"] = "1200000"
    async with ScriptedUpstream(default=GOOD) as upstream:
        write_config(tmp_path, upstream.base_url)
        async with started(tmp_path, manager.environ) as running:
            while await manager.hear() != "WATCHDOG=1":
                pass
            stuck = running.workers()[0]
            os.kill(stuck, signal.SIGSTOP)
            try:
                await asyncio.sleep(1.0)
                manager.hear_all()
                await asyncio.sleep(1.5)
                assert "WATCHDOG=1" not in manager.hear_all()
            finally:
                os.kill(stuck, signal.SIGCONT)
            await eventually(lambda: "WATCHDOG=1" in manager.hear_all())
