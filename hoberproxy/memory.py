"""How much of the machine's memory this process takes, and what it keeps of what it frees."""

from __future__ import annotations

import gc
import os

KEPT_BYTES = 64 * 1024 * 1024  # of what is free, most of which was never touched:
LARGEST_KEPT_BYTES = 32 * 1024 * 1024  # to parse, orjson sets aside twelve times a body's size

# Collections of middle age that pass before one looks at all objects; CPython's own number is 10.
FULL_COLLECTION_AFTER = 100

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_OPERATORS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def machine_memory(root: str = "/") -> int:
    """Bytes of memory that this process may come to use, by the machine and by its cgroups.

    `root` is where the system's files are. 0 where the system does not say.
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
    """The files with the limits of this process' cgroup and of those around it."""
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


def collect_rarely() -> None:
    """Take what there is now for good, and look through all the rest for cycles seldom.

    What a request makes is freed without the collector, so a full collection finds next to
    nothing, and meanwhile no stream moves: 200 ms with 10,000 of them open, of which as many
    would be opened between two. Call it when all is imported and nobody is served yet.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTION_AFTER)


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next request; whether it will.

    As it is, glibc gives it back to the system at once and takes it anew page by page: a quarter
    of what a prompt of 1 MB cost. Who has set one of its variables is left alone.
    """
    if any(name in os.environ for name in _OPERATORS):
        return False
    try:
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
    except (ImportError, MemoryError, AttributeError, OSError):  # another Python, or C library
        return False
    return bool(
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    )
