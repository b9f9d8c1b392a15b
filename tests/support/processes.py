"""Processes of this machine as Linux's /proc tells of them.

A process can end between the opening of its file and the reading: then open(2) says ENOENT or
read(2) says ESRCH. Both mean here that it is gone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether it runs: one that has ended and was not waited for does not."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return bool(fields) and fields[0] != "Z"


def children_of(pid: int, running: str = "") -> list[int]:
    """Process ids of what any of its threads started, with `running` in the command line."""
    children = []
    for task in _names(pid, "task"):
        children += map(int, _read(pid, f"task/{task}/children").split())
    return [child for child in children if running in _read(child, "cmdline")]


def all_below(pid: int) -> set[int]:
    """Its children and theirs, all the way down."""
    found = set()
    for child in children_of(pid):
        found |= {child, *all_below(child)}
    return found


def mapped_by(pid: int) -> str:
    """The files in its memory, among more."""
    return _read(pid, "maps")


def open_files(pid: int) -> set[str]:
    """What its descriptors lead to, as in `socket:[12345]`."""
    links = set()
    for name in _names(pid, "fd"):
        with suppress(FileNotFoundError, ProcessLookupError):
            links.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return links


def _names(pid: int, folder: str) -> list[str]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return os.listdir(f"/proc/{pid}/{folder}")
    return []


def _read(pid: int, file: str) -> str:
    """Its text, or none when the process is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/{file}").read_text()
    return ""
