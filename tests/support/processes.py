"""Facts about the processes of this machine, from Linux's /proc.

A process can end between the opening of its file and the reading: then open(2) says ENOENT or
read(2) says ESRCH. Both mean here that it is gone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return bool(fields) and fields[0] != "Z"


def children_of(pid: int, running: str = "") -> list[int]:
    """Return the ids of the children of a process, those with `running` in the command line."""
    children = []
    for task in _names(pid, "task"):
        children += map(int, _read(pid, f"task/{task}/children").split())
    return [child for child in children if running in _read(child, "cmdline")]


def all_below(pid: int) -> set[int]:
    """Return the ids of the children of a process, of their children, and so on."""
    found = set()
    for child in children_of(pid):
        found |= {child, *all_below(child)}
    return found


def mapped_by(pid: int) -> str:
    """Return the text of /proc/PID/maps, which names the files that a process has mapped."""
    return _read(pid, "maps")


def open_files(pid: int) -> set[str]:
    """Return what the descriptors of a process lead to, such as `socket:[12345]`."""
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
    """Return the text of a file in /proc/PID, "" if the process is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/{file}").read_text()
    return ""
