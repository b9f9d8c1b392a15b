"""What the supervisor decides before it starts a process, and what it has to be able to do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from hoberproxy.access.admission import MAX_PROCESSES, MAX_WORKERS
from hoberproxy.cli import main as cli
from hoberproxy.config.source import read_source
from hoberproxy.process import supervisor, writer_process
from hoberproxy.process.child import Child, State
from hoberproxy.process.listeners import Listeners, StartError
from hoberproxy.process.supervisor import Supervisor
from hoberproxy.process.systemd import Notifier
from tests.support.patience import WAIT

CONFIG = """
[providers.a]
base_url = "http://127.0.0.1:1/v1"

[[models]]
slug = "a/b"
endpoints = [{ provider = "a" }]
"""


def child(slot: int) -> Child:
    return Child(1, generation=1, slot=slot, state=State.DRAINING, started=time.time())


async def test_no_worker_starts_that_would_find_no_room_in_what_workers_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hoberproxy.toml"
    file.write_text(CONFIG)
    source, config = read_source(str(file))
    supervising = Supervisor(
        lambda: (source, config),
        source,
        config,
        MAX_WORKERS,
        Notifier({}),
        Listeners(is_passed=True),
    )
    supervising._children = [child(slot) for slot in range(MAX_WORKERS + 1)]
    started: list[str] = []

    def start(command: str, *_: object, **__: object) -> None:
        started.append(command)
        raise StartError("begun")

    monkeypatch.setattr(supervisor, "start_child", start)
    with pytest.raises(
        StartError, match=f"at most {MAX_PROCESSES} workers at a time, got 64 beside 65"
    ):
        await supervising._start_generation()
    assert not started
    del supervising._children[-1]
    with pytest.raises(StartError, match="begun"):
        await supervising._start_generation()
    assert started == ["worker"]


@pytest.mark.parametrize("module", [supervisor, writer_process], ids=["supervisor", "writer"])
def test_neither_supervisor_nor_writer_loads_what_serves(module: ModuleType) -> None:
    """They are there all the time beside the workers."""
    script = f"import sys, {cli.__name__}, {module.__name__}; print(*sys.modules)"
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=WAIT)
    loaded = set(out.stdout.split())
    assert module.__name__ in loaded
    assert not loaded & {"aiohttp", "uvloop", "ctypes", "prometheus_client"}
