"""Counts that several processes share: streams in all, and connections by address.

    slot of a process: [streams] [one count for each of 65,536 groups of addresses]

Each process writes its own slot alone, so that nothing is locked, and reads all; the supervisor
clears the slot of one that died. Addresses are put into groups by a keyed hash: two that fall into
the same one share a limit, which nobody can bring about on purpose.
"""

from __future__ import annotations

import hashlib
import mmap
from typing import Final

# Processes that serve at a time: the workers of now, and those of earlier configs that end.
PROCESSES: Final = 128
MAX_WORKERS: Final = PROCESSES // 2  # of one config: a reload starts as many beside them
GROUPS = 65536
_STREAM_BYTES = 8
_SLOT_BYTES = _STREAM_BYTES + 4 * GROUPS
_KEY_BYTES = 16
TALLY_BYTES = _KEY_BYTES + 8 + PROCESSES * _SLOT_BYTES  # 32 MB of addresses; memory is what is used


class Tally:
    """A slot of `memory`; the first process makes it with `new_tally_memory`."""

    def __init__(self, memory: mmap.mmap, slot: int) -> None:
        view = memoryview(memory)
        self._memory = memory
        self._key = bytes(view[:_KEY_BYTES])
        self._used = view[_KEY_BYTES : _KEY_BYTES + 8].cast("q")
        start = _KEY_BYTES + 8
        slots = [
            view[start + number * _SLOT_BYTES : start + (number + 1) * _SLOT_BYTES]
            for number in range(PROCESSES)
        ]
        self._streams = [each[:_STREAM_BYTES].cast("q") for each in slots]
        self._groups = [each[_STREAM_BYTES:].cast("i") for each in slots]
        self.slot = slot
        self._used[0] = max(self._used[0], slot + 1)
        self._own_streams = self._streams[slot]
        self._own_groups = self._groups[slot]

    def set_streams(self, count: int) -> int:
        """This process has so many; returns how many all have."""
        self._own_streams[0] = count
        return sum(streams[0] for streams in self._streams[: self._used[0]])

    def set_own_streams(self, count: int) -> None:
        """This process has so many."""
        self._own_streams[0] = count

    def group_of(self, address: str) -> int:
        """Where an address is counted. IPv6 by its /64, of which a host has as many as it likes."""
        if ":" in address:
            address = address.partition("%")[0]
            address = ":".join(_expanded(address)[:4])
        digest = hashlib.blake2b(address.encode(), digest_size=2, key=self._key).digest()
        return int.from_bytes(digest, "big")

    def enter(self, group: int) -> int:
        """One more there; returns how many all have."""
        self._own_groups[group] += 1
        return sum(groups[group] for groups in self._groups[: self._used[0]])

    def leave(self, group: int) -> None:
        """One less."""
        self._own_groups[group] -= 1

    def clear(self, slot: int) -> None:
        """The process of that slot is gone."""
        self._streams[slot][0] = 0
        groups = self._groups[slot].cast("B")
        groups[:] = bytes(len(groups))


def new_tally_memory(number: int, key: bytes) -> mmap.mmap:
    """Memory in an empty file, which others map too; number -1 is for one process alone."""
    memory = mmap.mmap(number, TALLY_BYTES)
    memory[:_KEY_BYTES] = key
    return memory


def _expanded(address: str) -> list[str]:
    head, double, tail = address.partition("::")
    first = head.split(":") if head else []
    last = tail.split(":") if tail else []
    middle = ["0"] * (8 - len(first) - len(last)) if double else []
    return [each.lstrip("0") or "0" for each in (*first, *middle, *last)]
