"""An upgrade: the supervisor becomes the installed program, with all its sockets and children.

    is the installed code good? ─► channels held ─► state as JSON in a memfd ─► exec ─► it goes on

Members of the state that are not known are ignored, and those that are missing have defaults: the
two programs are of different versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterable, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..access.admission import STREAM_COUNTS_BYTES, StreamCounts
from ..config.settings import Address
from ..config.source import ConfigSource
from .child import Child, State, python_command
from .listeners import Listeners, flat

STATE_VARIABLE = "HOBERPROXY_SUCCESSION"  # number of the descriptor that the state is read from


@dataclass(slots=True)
class Handover:
    """The state that the next program goes on with. `ends`: of channels, with unread bytes."""

    source: ConfigSource
    generation: int
    upgrades: int
    started: float
    restarts: int
    listeners: Listeners
    children: list[Child]
    writers: list[Child] = field(default_factory=list)
    ends: dict[int, tuple[socket.socket, bytes]] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)  # counts of workers that are gone
    stream_counts: int = -1  # file of the counts that workers share
    reloads: dict[str, int] = field(default_factory=dict)  # by how they went


def save_handover(handover: Handover) -> int:
    """Write the state; return its descriptor, which outlives an exec."""
    listeners = handover.listeners
    state = {
        "source": asdict(handover.source),
        "generation": handover.generation,
        "upgrades": handover.upgrades,
        "started": handover.started,
        "restarts": handover.restarts,
        "is_passed": listeners.is_passed,
        "clients": [
            [address.host, address.port, [each.fileno() for each in sockets]]
            for address, sockets in listeners.clients.items()
        ],
        "metrics": [each.fileno() for each in listeners.metrics],
        "children": [_state_of(child) for child in handover.children],
        "writers": [_state_of(child) for child in handover.writers],
        "ended": handover.ended,
        "reloads": handover.reloads,
        "stream_counts": handover.stream_counts,
    }
    number = os.memfd_create("hoberproxy", 0)
    with os.fdopen(number, "wb", closefd=False) as file:
        file.write(json.dumps(state).encode())
    return number


def _state_of(child: Child) -> dict[str, Any]:
    assert child.end is not None, "attached when it was started"
    return {
        "pid": child.pid,
        "generation": child.generation,
        "slot": child.slot,
        "state": child.state.value,
        "started": child.started,
        "channel": child.end.fileno(),
        "unread": child.channel.unread.decode("latin-1"),
        "snapshot": child.snapshot,
    }


def set_inheritable(handover: Handover, inheritable: bool) -> None:
    """Let the descriptors that the state names outlive an exec, or no more if there was none."""
    listeners = handover.listeners
    ends = [child.end for child in (*handover.children, *handover.writers) if child.end]
    for each in (*flat(listeners.clients.values()), *listeners.metrics, *ends):
        each.set_inheritable(inheritable)
    os.set_inheritable(handover.stream_counts, inheritable)


def take_handover(environ: MutableMapping[str, str]) -> Handover | None:
    """Return what the program before this one has left; None if there was none."""
    number = environ.pop(STATE_VARIABLE, None)
    if number is None:
        return None
    with os.fdopen(int(number), "rb") as file:
        file.seek(0)
        state = json.loads(file.read())
    listeners = Listeners(is_passed=state["is_passed"])
    for host, port, numbers in state["clients"]:
        listeners.clients[Address(host, port)] = [_take(each) for each in numbers]
    listeners.metrics = [_take(each) for each in state["metrics"]]
    handover = Handover(
        source=ConfigSource(**state["source"]),
        generation=state["generation"],
        upgrades=state["upgrades"],
        started=state["started"],
        restarts=state.get("restarts", 0),
        listeners=listeners,
        children=[],
        ended=state.get("ended", {}),
        reloads=state.get("reloads", {}),
        stream_counts=state.get("stream_counts", -1),
    )
    if handover.stream_counts >= 0:
        os.set_inheritable(handover.stream_counts, False)
    for name, children in (("children", handover.children), ("writers", handover.writers)):
        for each in state.get(name, ()):
            child = _child_of(each)
            children.append(child)
            handover.ends[child.pid] = _take(each["channel"]), each["unread"].encode("latin-1")
    return handover


def _child_of(state: dict[str, Any]) -> Child:
    child = Child(
        state["pid"],
        generation=state["generation"],
        slot=state["slot"],
        state=State(state["state"]),
        started=state["started"],
    )
    child.snapshot = state["snapshot"]
    return child


def _take(number: int) -> socket.socket:
    taken = socket.socket(fileno=number)
    taken.set_inheritable(False)
    return taken


def open_stream_counts(number: int) -> tuple[int, StreamCounts]:
    """Return the file of the counts that workers share, a new one for -1, and the counts."""
    if number < 0:
        number = os.memfd_create("hoberproxy-counts")
        os.ftruncate(number, STREAM_COUNTS_BYTES)
    return number, StreamCounts(mmap.mmap(number, STREAM_COUNTS_BYTES), 0)


# The installed program


def installed_python() -> str:
    """Return the Python of the program that is now installed, which this program's script names.

    Each version may have a separate environment, and the script may be a link to the latest.
    """
    with contextlib.suppress(OSError), open(sys.argv[0], "rb") as script:
        mark, python = script.read(2), os.fsdecode(script.readline(1024)).strip()
        is_python = mark == b"#!" and Path(python).name.startswith("python")
        if is_python and os.access(python, os.X_OK):
            return python
    return sys.executable


async def try_installed(source: bytes, limit: float) -> str | None:
    """Return what is wrong with the installed code; None if it imports and takes `source`.

    Once it runs in our place it is too late: a config that it refuses would end all streams.
    """
    command = python_command("worker", "check", python=installed_python())
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


async def hold_channels(children: Iterable[Child], limit: float) -> bool:
    """Read no more of `children`'s messages; return whether all messages to them were sent."""
    deadline = time.monotonic() + limit
    while not all([child.channel.hold() for child in children]):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def replace_program(handover: Handover) -> str:
    """Run the installed program in this process; return only if that fails, with the problem.

    A signal must find either this program's handlers or the next one's: they are to be blocked.
    """
    number = save_handover(handover)
    set_inheritable(handover, True)
    os.environ[STATE_VARIABLE] = str(number)
    python = installed_python()
    try:
        os.execv(python, [python, *sys.orig_argv[1:]])
    except OSError as exc:
        del os.environ[STATE_VARIABLE]
        os.close(number)
        set_inheritable(handover, False)
        return f"{python}: {exc.strerror}"
