"""Start a server or the generator on one core, wait for it, and end it: by its id, no other.

Each is the leader of a process group of its own, so that its workers go with it even when it does
not see to that itself.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .procfs import ProcessTree

START_TIMEOUT = 60.0  # seconds; some peers import for half a minute
STOP_TIMEOUT = 5.0
QUIET = 0.5  # seconds in which processes that have started …
QUIET_CPU = 0.02  # … take less than so many of CPU


class StartError(Exception):
    """A program did not come up; the message ends with what it said last."""


def own_module(name: str, *arguments: str) -> list[str]:
    """The command for a module beside this one, whichever name the package goes by."""
    return [sys.executable, "-m", f"{__package__}.{name}", *arguments]


def as_installed() -> dict[str, str]:
    """Variables for a server of the package that its Python has, not of the one beside `bench`."""
    return {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}


def environment(**variables: str) -> dict[str, str]:
    """Ours, `variables`, and the way to this package for `python -m`."""
    parent = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (parent, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | variables


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    core: int | None = None,
    *,
    tells: bool = False,
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A program on one core with its output in `log`; ended with the block.

    `tells`: its standard output can be read, and must be if it is more than a few lines.
    """

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if tells else errors,
            stderr=errors,
            env=environment(**(variables or {})),
            start_new_session=True,
            preexec_fn=pin,  # before the program's first thread; this process has one
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate `process`, so that it can end its workers, then kill what is left of it."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    with suppress(ProcessLookupError):  # the group lives as long as a member does
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def read_line(process: subprocess.Popen[bytes], log: Path) -> bytes:
    """The first line that a program prints, by which it says that it is ready."""
    assert process.stdout is not None, "started with `tells`"
    ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
    line = process.stdout.readline() if ready else b""
    if not line:
        raise StartError(_last_words(process, log))
    return bytes(line)


def wait_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until a connection to the port is taken. Raises StartError."""
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.02)
    raise StartError(_last_words(process, log))


def wait_quiet(tree: ProcessTree, processes: int = 1) -> None:
    """Until there are so many processes and they take next to no CPU. Raises StartError.

    A supervisor listens before its workers run; their memory, too, is still growing then.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        spent = tree.cpu_seconds()
        time.sleep(QUIET)
        if len(tree.pids()) >= processes and tree.cpu_seconds() - spent < QUIET_CPU:
            return
    raise StartError(f"expected {processes} processes to be idle within {START_TIMEOUT:.0f} s")


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def dead_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else can take for as long."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def _last_words(process: subprocess.Popen[bytes], log: Path) -> str:
    command = shlex.join(map(str, process.args))  # type: ignore[arg-type]  # a list, as given
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return f"expected a server that listens, got none from: {command}\n{text[-2000:]}"
