"""The writer's process: when its turns give way to others on the core."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from hoberproxy.process import writer_process
from hoberproxy.process.channel import read_first_message, serialize_message
from hoberproxy.process.writer_process import WriterProcess
from tests.support.patience import WAIT


class ScriptedWriter:
    """Its turns return these pauses; notes of each whether it gives way."""

    lost = unreadable = written = 0
    is_active = True
    gives_way = False

    def __init__(self, pauses: list[float], supervisor: socket.socket) -> None:
        self._pauses = pauses
        self._supervisor = supervisor
        self.gave_way: list[bool] = []
        self.is_finished = self.is_closed = False

    def turn(self) -> float:
        self.gave_way.append(self.gives_way)
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


def test_turns_give_way(ends: tuple[socket.socket, socket.socket]) -> None:
    assert run([0.001] * 3, ends).gave_way == [True] * 3


def test_a_writer_that_falls_behind_gives_way_to_none_until_it_is_level(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0  # at each turn, and once more at the end of one that is level
        return clock[0]

    monkeypatch.setattr(writer_process.time, "monotonic", tick)
    monkeypatch.setattr(writer_process, "BEHIND_AFTER", 2.5)
    writer = run([0.0, 0.0, 0.0, 0.0, 0.001, 0.001], ends)
    assert writer.gave_way == [True, True, False, False, False, True]
