"""What a supervisor leaves to the program it becomes: descriptors, workers and counts.

    state as JSON ─► memfd ─► exec ─► the installed program reads it, and goes on

Members that are not known are ignored, and those that are missing have defaults: the two programs
are of different versions.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from .admission import STREAM_COUNTS_BYTES, StreamCounts
from .child import Child, State
from .listeners import Listeners, flat
from .settings import Address
from .source import ConfigSource

STATE_VARIABLE = "HOBERPROXY_SUCCESSION"  # number of the descriptor that the state is read from


@dataclass(slots=True)
class Legacy:
    """All that goes over. `ends`: of each worker's channel, with bytes of it that were read."""

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


def leave_legacy(legacy: Legacy) -> int:
    """Write it down, and let what it names outlive an exec; the number to put in the variable."""
    listeners = legacy.listeners
    state = {
        "source": {
            "text": legacy.source.text,
            "files": legacy.source.files,
            "listen": legacy.source.listen,
        },
        "generation": legacy.generation,
        "upgrades": legacy.upgrades,
        "started": legacy.started,
        "restarts": legacy.restarts,
        "is_passed": listeners.is_passed,
        "clients": [
            [address.host, address.port, [_keep(each) for each in sockets]]
            for address, sockets in listeners.clients.items()
        ],
        "metrics": [_keep(each) for each in listeners.metrics],
        "children": [_state_of(child) for child in legacy.children],
        "writers": [_state_of(child) for child in legacy.writers],
        "ended": legacy.ended,
        "reloads": legacy.reloads,
        "stream_counts": legacy.stream_counts,
    }
    os.set_inheritable(legacy.stream_counts, True)
    number = os.memfd_create("hoberproxy", 0)
    with os.fdopen(os.dup(number), "wb") as file:
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
        "channel": _keep(child.end),
        "unread": child.channel.unread.decode("latin-1"),
        "snapshot": child.snapshot,
    }


def _keep(each: socket.socket) -> int:
    each.set_inheritable(True)
    return each.fileno()


def keep_legacy(legacy: Legacy) -> None:
    """There was no exec: nothing of it is for other programs."""
    listeners = legacy.listeners
    ends = [child.end for child in (*legacy.children, *legacy.writers) if child.end]
    for each in (*flat(listeners.clients.values()), *listeners.metrics, *ends):
        each.set_inheritable(False)
    os.set_inheritable(legacy.stream_counts, False)


def take_legacy(environ: MutableMapping[str, str]) -> Legacy | None:
    """What the program before left; None if there was none."""
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
    legacy = Legacy(
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
    if legacy.stream_counts >= 0:
        os.set_inheritable(legacy.stream_counts, False)
    for name, children in (("children", legacy.children), ("writers", legacy.writers)):
        for each in state.get(name, ()):
            child = _child_of(each)
            children.append(child)
            legacy.ends[child.pid] = _take(each["channel"]), each["unread"].encode("latin-1")
    return legacy


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
