"""How many files and sockets this process may have open."""

from __future__ import annotations

import contextlib
import resource

RESERVED = 64  # of them for the store, journals, listeners and the log


def raise_file_limit() -> None:
    """Use all that the system lets us have: the limit at a start is that of a shell's tools."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_limit() -> int:
    """How many clients may be connected: half of the sockets are for model servers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 2**31
    return max((soft - RESERVED) // 2, 1)
