"""Micro benchmarks of the pure core: ns and instructions per operation.

    python -m bench.micro                       all; minutes where valgrind counts
    python -m bench.micro scanner framing       some of them
    python -m bench.micro --no-instructions     the clock only, a few seconds

One module for each core module; each makes its CASES. What is fed looks as it does on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One operation. `make` prepares it and returns what is timed: a call is `count` of `unit`."""

    name: str
    make: Callable[[], Callable[[], object]]
    count: int = 1
    unit: str = "call"
