"""What a reader must know of the machine to make sense of a figure, and what it lets us use."""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("hoberproxy", "uvloop", "orjson", "aiohttp")
_SPARE_FILES = 200  # what a server has open besides its connections


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core each process is pinned to: the server under test has one for itself if it can."""

    server: int
    upstream: int
    load: int


def choose_cores(available: Iterable[int]) -> Cores:
    """The last for the server; the mock and the generator share the first if there are but two."""
    cores = sorted(available)
    return Cores(server=cores[-1], upstream=cores[0], load=cores[1 if len(cores) > 2 else 0])


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, kernel, versions, load average; no name of the machine and no path."""
    return {
        "cpu": _field("/proc/cpuinfo", r"model name\s*: (.*)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(_field("/proc/meminfo", r"MemTotal:\s+([0-9]+)") or 0) / 1e6, 1),
        "kernel": platform.release(),
        "versions": {"python": platform.python_version()} | package_versions(PACKAGES),
        "load_average": os.getloadavg(),
    }


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def raise_open_files() -> int:
    """Let this process and those it starts open as many files as they may; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def most_streams(open_files: int) -> int:
    """How many a server can relay, each with a connection on both sides."""
    return max(1, (open_files - _SPARE_FILES) // 2)


def _field(path: str, pattern: str) -> str | None:
    with suppress(OSError):
        if found := re.search(pattern, Path(path).read_text(encoding="utf-8")):
            return found[1].strip()
    return None
