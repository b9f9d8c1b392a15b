"""The processes of the proxy that tests of the store start, and the store's path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hoberproxy.access.keys import Keyring
from tests.support.recording import Process


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., Process]]:
    """Make a Process on `path` with short waits, and close it at the end of the test."""
    made: list[Process] = []

    def make(keyring: Keyring | None = None, **options: Any) -> Process:
        options = {"tick": 0.005, "reload_interval": 0.005} | options
        process = Process(path, keyring, **options)
        made.append(process)
        return process

    yield make
    for process in made:
        process.close()
