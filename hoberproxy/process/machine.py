"""The process and its machine: open files, the bound of memory, the allocator, the collector."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Mapping
from typing import Final

RESERVED_FILES: Final = 64  # for the store, journals, listeners and the log

# Collections of middle age that pass before a full one; CPython's own number is 10.
FULL_COLLECTION_AFTER: Final = 100

# glibc returns freed memory at once, and gets it again page by page: half of the CPU time to take
# apart a prompt of 100 KB while others are in flight (as measured: 84 µs in place of 190).
_MALLOC: Final = {
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024 * 1024),  # bytes kept, mostly never touched
    # To parse a body, orjson allocates twelve times its size.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024),
}


def raise_file_limit() -> None:
    """Raise the limit of open files to the system's own: that of a start is for a shell's tools."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_limit() -> int:
    """Return how many clients may be connected: half of the sockets are for model servers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 2**31
    return max((soft - RESERVED_FILES) // 2, 1)


def machine_memory(root: str = "/") -> int:
    """Return the bytes of memory that this process may use, by the machine and by its cgroups.

    `root` is the folder of the system's files. 0 means that the system does not say.
    """
    try:
        least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
    for path in _limit_files(root):
        try:
            with open(path, "rb") as file:
                least = min(least, int(file.read()))
        except (OSError, ValueError):  # "max", or not there
            continue
    return least


def _limit_files(root: str) -> list[str]:
    """Return the files with the limits of this process's cgroup and of those around it."""
    try:
        with open(f"{root}/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    files = []
    for number, controllers, path in [line for line in lines if len(line) == 3]:
        if number == "0":  # version 2
            mount, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):  # a container may see its own as the root
            files.append("/".join((root, mount, *parts[:depth], name)))
    return files


def malloc_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which a worker's C library keeps freed memory for later requests.

    None, if an operator has set such variables in `environ`.
    """
    is_set = any(name in environ for name in ("GLIBC_TUNABLES", *_MALLOC))
    return {} if is_set else dict(_MALLOC)


def collect_rarely() -> None:
    """Exclude all objects that exist now from garbage collection, and make full ones rare.

    A request's objects are freed without the collector, so a full collection finds next to nothing,
    and meanwhile no stream moves: 200 ms with 10,000 of them open, of which as many would be opened
    between two. Call it when all is imported and nobody is served yet.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTION_AFTER)
