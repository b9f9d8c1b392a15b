"""What systemd reads on its notification socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hoberproxy.process.systemd import Notifier
from tests.support.patience import WAIT


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(WAIT)
        yield end


def test_each_state_is_one_datagram(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready("2 workers")
    notifier.reloading()
    notifier.stopping()
    notifier.alive()
    assert manager.recv(4096) == b"READY=1\nSTATUS=2 workers"
    state, _, stamp = manager.recv(4096).partition(b"\nMONOTONIC_USEC=")
    assert state == b"RELOADING=1" and int(stamp) > 0
    assert manager.recv(4096).startswith(b"STOPPING=1\n")
    assert manager.recv(4096) == b"WATCHDOG=1"


def test_an_address_in_the_abstract_namespace_begins_with_an_at() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0hoberproxy-test-{os.getpid()}")
        end.settimeout(WAIT)
        Notifier({"NOTIFY_SOCKET": f"@hoberproxy-test-{os.getpid()}"}).alive()
        assert end.recv(4096) == b"WATCHDOG=1"


def test_a_manager_that_is_gone_or_was_never_there_is_no_failure(tmp_path: Path) -> None:
    Notifier({}).ready("alone")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("alone")


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "never"}, None),
    ],
    ids=["none", "for whoever it is", "for us", "for another process", "no number"],
)
def test_the_watchdog_is_ours_if_it_names_our_process(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/nowhere", **environ}).watchdog == seconds
