"""What the tests say of a process, also of one that ends while it is looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import all_below, children_of, is_alive, open_files

WAITING = (sys.executable, "-c", "print(flush=True); input()", "a-word-of-its-own")


def test_a_child_is_seen_while_it_runs_and_not_after_its_end() -> None:
    with subprocess.Popen(WAITING, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_alive(process.pid)
        assert any(link.startswith("pipe:[") for link in open_files(process.pid))
        assert children_of(os.getpid(), running="a-word-of-its-own") == [process.pid]
        assert process.pid in all_below(os.getpid())
        process.kill()
    assert not is_alive(process.pid)
    assert children_of(os.getpid(), running="a-word-of-its-own") == []
    assert open_files(process.pid) == set()


def test_one_that_ends_between_open_and_read_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended_meanwhile(file: Path) -> str:
        raise ProcessLookupError

    monkeypatch.setattr(Path, "read_text", ended_meanwhile)
    assert not is_alive(os.getpid())
    assert children_of(os.getpid(), running="python") == []
