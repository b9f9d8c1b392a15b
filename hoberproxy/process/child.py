"""A worker process as its supervisor sees it: started, heard of, told what to do, reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from .channel import Channel, Message
from .machine import malloc_variables

# What systemd says to its service is not for workers; the rest of the environment is.
_SUPERVISORS_OWN = frozenset(
    "NOTIFY_SOCKET WATCHDOG_USEC WATCHDOG_PID LISTEN_PID LISTEN_FDS LISTEN_FDNAMES".split()
)


WORKER = "hoberproxy.process.worker"  # the module that a worker runs
FIRST_BACK_OFF = 0.1
MAX_BACK_OFF = 30.0
STEADY = 60.0  # seconds a process must have lived for its death to be no failure to start


class State(Enum):
    """Where a worker is on its way."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    ENDED = "ended"


class Child:
    """One worker. `on_change` is called when it is ready, and when its process has ended."""

    def __init__(
        self, pid: int, *, generation: int, slot: int, state: State, started: float
    ) -> None:
        self.pid = pid
        self.generation = generation
        self.slot = slot
        self.state = state
        self.started = started  # unix seconds
        self.last_heard = time.monotonic()
        self.snapshot: dict[str, Any] = {}
        self.account: dict[str, Any] = {}
        self.problems: list[str] = []
        self.exit_code: int | None = None
        self.settled = asyncio.Event()  # ready, or ended without having been
        self.ended = asyncio.Event()
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._last_ask = 0
        self.channel = Channel(self._on_message, self._on_lost)
        self.end: socket.socket | None = None  # of the channel

    def take(self, end: socket.socket, unread: bytes = b"") -> None:
        """This is our end of its channel; `attach` follows."""
        end.setblocking(False)
        self.end = end
        self.channel.unread = unread

    async def attach(self) -> None:
        """Talk over the channel from now on, if the process has not ended meanwhile."""
        if self.end is None or self.ended.is_set():
            return
        loop = asyncio.get_running_loop()
        # A copy for the transport: ours lives on, for a successor to take over.
        await loop.create_connection(lambda: self.channel, sock=self.end.dup())

    def _on_message(self, message: Message) -> None:
        self.last_heard = time.monotonic()
        kind = message["kind"]
        if kind == "ready" and self.state is State.STARTING:
            self.state = State.SERVING
            self.settled.set()
        elif kind == "failed":
            self.problems = [str(problem) for problem in message.get("problems", ())]
        elif kind in ("snapshot", "bye", "account"):
            self.snapshot = message.get("snapshot", self.snapshot)
            self.account = message.get("account", self.account)
            waiter = self._asked.pop(message.get("id", 0), None)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _on_lost(self) -> None:
        for waiter in self._asked.values():
            waiter.cancel()
        self._asked.clear()

    async def refresh(self, what: str = "snapshot", limit: float = 2.0) -> None:
        """Ask for a new snapshot or account; after `limit` seconds the last one has to do."""
        if self.state is State.STARTING or self.ended.is_set():
            return
        self._last_ask += 1
        waiter = self._asked[self._last_ask] = asyncio.get_running_loop().create_future()
        number = self._last_ask
        self.channel.send(what, id=number)
        try:
            async with asyncio.timeout(limit):
                await waiter
        except (TimeoutError, asyncio.CancelledError):
            self._asked.pop(number, None)
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise

    def leave(self) -> None:
        """Others serve now: take no more connections and end with the last."""
        if self.state in (State.STARTING, State.SERVING):
            self.state = State.DRAINING
            self.channel.send("leave")

    def stop(self, *, at_once: bool = False) -> None:
        """The whole service ends."""
        if self.state is State.STARTING or not self.channel.is_open:
            self.signal(signal.SIGTERM)  # it does not hear what is said on its channel
        self.state = State.DRAINING
        self.channel.send("stop", at_once=at_once)

    def signal(self, number: int) -> None:
        """Send a signal, unless it has been reaped: then its id may be another's."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def was_killed(self) -> bool:
        """It was ended by a signal, and did not end by itself."""
        return self.exit_code is not None and self.exit_code < 0

    @property
    def how_it_ended(self) -> str:
        """Its exit code, or the name of the signal."""
        code = self.exit_code or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def reap(self) -> bool:
        """Look whether it has ended; True once."""
        if self.ended.is_set():
            return False
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid == 0:
            return False
        self._read_rest()
        self.exit_code = os.waitstatus_to_exitcode(status)
        self.ended.set()
        self.settled.set()
        return True

    def _read_rest(self) -> None:
        """Its last words: the news of its end may overtake them."""
        with contextlib.suppress(OSError):
            while self.end is not None and (data := self.end.recv(1 << 16)):
                self.channel.data_received(data)

    def close(self) -> None:
        """Let go of the channel."""
        self.channel.close()
        if self.end is not None:
            self.end.close()


def back_off(failures: int) -> float:
    """Seconds before another try, after so many that failed in a row."""
    return min(FIRST_BACK_OFF * 2 ** min(failures - 1, 20), MAX_BACK_OFF) if failures else 0.0


async def accounts_of(children: Iterable[Child]) -> list[dict[str, Any]]:
    """What `hoberproxy status` tells of each."""
    children = list(children)
    await asyncio.gather(*(child.refresh("account") for child in children))
    return [
        child.account
        | {
            "pid": child.pid,
            "state": child.state.value,
            "generation": child.generation,
            "started": child.started,
        }
        for child in children
    ]


def spawn(passed: list[int], module: str = WORKER) -> tuple[int, socket.socket]:
    """Start a process of `module` that inherits these; its id and our end of its channel.

    Spawned, not forked: a worker that is started with newly installed code runs that.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        # Onto itself: the one way to let it be inherited by this process alone.
        actions = [(os.POSIX_SPAWN_DUP2, number, number) for number in (theirs.fileno(), *passed)]
        environ = {
            name: value for name, value in os.environ.items() if name not in _SUPERVISORS_OWN
        }
        environ |= malloc_variables(os.environ)
        command = python_command(module, str(theirs.fileno()))
        pid = os.posix_spawn(command[0], command, environ, file_actions=actions, setsigmask=[])
    return pid, ours


def python_command(module: str, *arguments: str, python: str = "") -> list[str]:
    """How to run a module of this package in a new process, by this Python or another."""
    # As this process was started: only `python -m` looks for modules in the folder it is in.
    is_module = Path(sys.argv[0]).name == "__main__.py"
    return [python or sys.executable, *([] if is_module else ["-P"]), "-m", module, *arguments]


def installed_python() -> str:
    """The Python of what is installed by now: the one named by the script we were started as.

    Each version may have an environment of its own, and the script be a link to the latest.
    """
    with contextlib.suppress(OSError), open(sys.argv[0], "rb") as script:
        mark, python = script.read(2), os.fsdecode(script.readline(1024)).strip()
        is_python = mark == b"#!" and Path(python).name.startswith("python")
        if is_python and os.access(python, os.X_OK):
            return python
    return sys.executable


def problems_of(failed: list[Child]) -> str:
    """Why these do not serve, one problem a line."""
    problems = dict.fromkeys(problem for child in failed for problem in child.problems)
    return "\n".join(problems) or "\n".join(
        dict.fromkeys(
            f"a worker ended with {child.how_it_ended} before it served"
            if child.exit_code is not None
            else "a worker was not ready in time"
            for child in failed
        )
    )


def pids_of(children: Iterable[Child]) -> str:
    """Their process ids, for the log."""
    return ", ".join(str(child.pid) for child in children)


async def try_installed(source: bytes, limit: float) -> str | None:
    """What is wrong with the installed code, None if it imports and takes this config.

    Once it runs in our place it is too late: a config that it refuses would end all streams.
    """
    command = python_command(WORKER, "check", python=installed_python())
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(limit):
            _, errors = await process.communicate(source)
    except TimeoutError:
        process.kill()
        await process.wait()
        return "the installed code does not start in time"
    if process.returncode == 0:
        return None
    last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return f"the installed code cannot be run: {last}"
