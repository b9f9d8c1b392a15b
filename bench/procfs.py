"""CPU time and memory of processes of this machine with all their children, from Linux's /proc.

A process that has ended counts with what was last seen of it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class ProcessTree:
    """Processes and their children, present and to come."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._roots = tuple(pids)
        self._cpu: dict[int, float] = {}
        self._roles: dict[int, str] = {}
        for pid in self._roots:
            if not Path(f"/proc/{pid}/stat").exists():
                raise ProcessLookupError(f"expected a running process, got {pid}, which is none")

    def pids(self) -> set[int]:
        """All that live now."""
        return {pid for root in self._roots for pid in _descendants(root)}

    def cpu_seconds(self) -> float:
        """User and system time so far, of all threads, exact to well under a millisecond."""
        for pid in self.pids():
            with suppress(OSError):
                self._cpu[pid] = _cpu_seconds(pid)
        return sum(self._cpu.values())

    def cpu_by_role(self) -> dict[str, float]:
        """The same by what a process does, as its command line says, processes that ended too."""
        for pid in self.pids():
            self._roles[pid] = _role(pid)  # a child copies its parent until it executes
        self.cpu_seconds()
        roles: dict[str, float] = {}
        for pid, seconds in self._cpu.items():
            role = self._roles.get(pid, "other")
            roles[role] = roles.get(role, 0.0) + seconds
        return roles

    def compiled_modules(self, package: str = "hoberproxy") -> set[Path]:
        """Files of compiled modules of `package` that these processes have mapped."""
        found = set()
        for pid in self.pids():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    if line.endswith(".so") and f"-packages/{package}/" in line:
                        found.add(Path(line.split(maxsplit=5)[5]))
        return found

    def reset_peak(self) -> None:
        """Reset the peak where the kernel permits it (proc(5), clear_refs)."""
        for pid in self.pids():
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def memory_bytes(self) -> tuple[int, int]:
        """Resident memory now and at its peak, summed: pages they share count for each."""
        now = peak = 0
        for pid in self.pids():
            with suppress(OSError):
                fields = _status(pid)
                now += fields.get("VmRSS", 0)
                peak += fields.get("VmHWM", 0)
        return now, peak


def core_seconds(core: int) -> tuple[float, float] | None:
    """Return busy and all seconds of a core since boot; None where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name == f"cpu{core}":
                ticks = [int(value) for value in values[:8]]  # guests are in user already
                idle = ticks[3] + ticks[4]
                return (sum(ticks) - idle) * _TICK, sum(ticks) * _TICK
    return None


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        yield pid
        for task in tasks:
            with suppress(OSError):
                for child in (task / "children").read_text().split():
                    yield from _descendants(int(child))


# As arguments: `worker`, or a module of that name, and nginx's title.
_ROLE = re.compile(rb"(?:hoberproxy\.(?:\w+\.)*|nginx: )?(worker|writer)(?:[ _]process)?")


def _role(pid: int) -> str:
    """What a process does: a worker's or a writer's work, or "main", which starts these."""
    with suppress(OSError):
        for argument in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            if found := _ROLE.fullmatch(argument):
                return found[1].decode()
    return "main"


def _cpu_seconds(pid: int) -> float:
    # The process's own CPU clock (clock_getcpuclockid(3)): ns, where stat counts ticks of 10 ms.
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK


def _status(pid: int) -> dict[str, int]:
    """The lines of /proc/PID/status that are in kB, as bytes."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value[:-3]) * 1024
    return fields
