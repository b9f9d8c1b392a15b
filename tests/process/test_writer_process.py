"""The writer's process: at which priority its turns run."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hoberproxy.process import writer_process
from hoberproxy.process.channel import read_first_message, serialize_message
from hoberproxy.process.writer_process import NICENESS, WriterProcess
from tests.support.patience import WAIT


class ScriptedWriter:
    """Its turns ask for these pauses; notes the priority at which each has run."""

    lost = unreadable = written = 0
    is_active = True

    def __init__(self, pauses: list[float], supervisor: socket.socket) -> None:
        self._pauses = pauses
        self._supervisor = supervisor
        self.niceness: list[int] = []
        self.is_finished = self.is_closed = False

    def turn(self) -> float:
        self.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        if len(self._pauses) == 1:
            self._supervisor.sendall(serialize_message("stop"))
        return self._pauses.pop(0)

    def finish(self) -> bool:
        self.is_finished = True
        return True

    def close(self) -> None:
        self.is_closed = True

    def living(self) -> set[str]:
        return set()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    supervisor, writer = socket.socketpair()
    with supervisor, writer:
        supervisor.settimeout(WAIT)
        yield supervisor, writer


def run(pauses: list[float], ends: tuple[socket.socket, socket.socket]) -> ScriptedWriter:
    writer: Any = ScriptedWriter(pauses, ends[0])
    WriterProcess(writer, ends[1]).run()
    assert writer.is_finished and writer.is_closed
    assert [read_first_message(ends[0])["kind"] for _ in range(2)] == ["ready", "bye"]
    return writer  # type: ignore[no-any-return]


def test_turns_run_at_low_priority(ends: tuple[socket.socket, socket.socket]) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    writer = run([0.001] * 3, ends)
    assert writer.niceness == [min(usual + NICENESS, 19)] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == usual, "another thread's"


def test_a_writer_that_falls_behind_runs_at_normal_priority_until_it_is_level(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0  # at each turn, and once more at the end of one that is level
        return clock[0]

    monkeypatch.setattr(writer_process.time, "monotonic", tick)
    monkeypatch.setattr(writer_process, "BEHIND_AFTER", 2.5)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    writer = run([0.0, 0.0, 0.0, 0.0, 0.001, 0.001], ends)
    low = min(usual + NICENESS, 19)
    assert writer.niceness == [low, low, usual, usual, usual, low]
