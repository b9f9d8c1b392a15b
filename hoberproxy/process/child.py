"""A worker or the writer of records, for its supervisor: start, message, end, reap the process."""

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


FIRST_BACK_OFF = 0.1
MAX_BACK_OFF = 30.0
STEADY = 60.0  # seconds a process must have lived for its death to be no failure to start


class State(Enum):
    """The stages of a child's life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    ENDED = "ended"


class Child:
    """A child process. `settled` is set when it is ready or has ended, `ended` if it has ended."""

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
        self.report: dict[str, Any] = {}
        self.problems: list[str] = []
        self.exit_code: int | None = None
        self.settled = asyncio.Event()  # ready, or ended without having been
        self.ended = asyncio.Event()
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._last_ask = 0
        self.channel = Channel(self._on_message, self._on_lost)
        self.end: socket.socket | None = None  # of the channel

    def take(self, end: socket.socket, unread: bytes = b"") -> None:
        """Take the supervisor's end of the channel; `attach` follows."""
        end.setblocking(False)
        self.end = end
        self.channel.unread = unread

    async def attach(self) -> None:
        """Read and write the channel from now on, unless the process has ended."""
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
        elif kind in ("snapshot", "bye", "report"):
            self.snapshot = message.get("snapshot", self.snapshot)
            self.report = message.get("report", self.report)
            waiter = self._asked.pop(message.get("id", 0), None)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _on_lost(self) -> None:
        for waiter in self._asked.values():
            waiter.cancel()
        self._asked.clear()

    async def refresh(self, what: str = "snapshot", limit: float = 2.0) -> None:
        """Request a new snapshot or report; without an answer in `limit` seconds the last stays."""
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
        """Let the child take no more connections and end with the last: others serve now."""
        if self.state in (State.STARTING, State.SERVING):
            self.state = State.DRAINING
            self.channel.send("leave")

    def stop(self, *, at_once: bool = False) -> None:
        """Let the child end its answers and itself: the whole service ends."""
        if self.state is State.STARTING or not self.channel.is_open:
            self.signal(signal.SIGTERM)  # it does not read its channel
        self.state = State.DRAINING
        self.channel.send("stop", at_once=at_once)

    def signal(self, number: int) -> None:
        """Send a signal, unless it has been reaped: then its id may be another's."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def was_killed(self) -> bool:
        """Whether a signal has ended it."""
        return self.exit_code is not None and self.exit_code < 0

    @property
    def how_it_ended(self) -> str:
        """Its exit code, or the name of the signal."""
        code = self.exit_code or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def reap(self) -> bool:
        """Return True once when the process has ended."""
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
        """Read what it has sent last: SIGCHLD may have come before that."""
        with contextlib.suppress(OSError):
            while self.end is not None and (data := self.end.recv(1 << 16)):
                self.channel.data_received(data)

    def close(self) -> None:
        """Close both copies of the channel's end."""
        self.channel.close()
        if self.end is not None:
            self.end.close()


async def kill(children: Iterable[Child]) -> None:
    """Kill `children` and wait for their ends."""
    children = list(children)
    for child in children:
        child.state = State.DRAINING
        child.signal(signal.SIGKILL)
    for child in children:
        await child.ended.wait()


def back_off(failures: int) -> float:
    """Return seconds to wait before another try after `failures` in a row."""
    return min(FIRST_BACK_OFF * 2 ** min(failures - 1, 20), MAX_BACK_OFF) if failures else 0.0


async def reports_of(children: Iterable[Child]) -> list[dict[str, Any]]:
    """Return what `hoberproxy status` says of each of `children`."""
    children = list(children)
    await asyncio.gather(*(child.refresh("report") for child in children))
    return [
        child.report
        | {
            "pid": child.pid,
            "state": child.state.value,
            "generation": child.generation,
            "started": child.started,
        }
        for child in children
    ]


def start_child(
    command: str, passed: Iterable[int] = (), *, generation: int, slot: int = -1
) -> Child:
    """Start `python -m hoberproxy COMMAND` with a channel and these descriptors; `attach` follows.

    Spawned, not forked: a child that is started with newly installed code runs that.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        # Onto itself: the one way to let it be inherited by this process alone.
        actions = [(os.POSIX_SPAWN_DUP2, number, number) for number in (theirs.fileno(), *passed)]
        environ = {
            name: value for name, value in os.environ.items() if name not in _SUPERVISORS_OWN
        }
        environ |= malloc_variables(os.environ)
        words = python_command(command, str(theirs.fileno()))
        pid = os.posix_spawn(words[0], words, environ, file_actions=actions, setsigmask=[])
    child = Child(pid, generation=generation, slot=slot, state=State.STARTING, started=time.time())
    child.take(ours)
    return child


def python_command(*arguments: str, python: str = "") -> list[str]:
    """Return the words that run a command of this package, by this Python or another.

    By the package's name alone: an upgrade may have moved everything within it.
    """
    # As this process was started: only `python -m` looks for modules in the folder it is in.
    is_module = Path(sys.argv[0]).name == "__main__.py"
    options = [] if is_module else ["-P"]
    return [python or sys.executable, *options, "-m", "hoberproxy", *arguments]


def problems_of(failed: list[Child]) -> str:
    """Return why `failed` workers do not serve, one problem a line."""
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
    """Return the process ids of `children`, for the log."""
    return ", ".join(str(child.pid) for child in children)
