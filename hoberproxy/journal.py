"""What outlives a killed process: two entries a request, in files that are mapped into memory.

    segment:  magic │ generation │ entry, entry, entry, … │ eight zeros
    entry:    length │ CRC-32 of generation and payload │ payload: a letter and a JSON array

The first entry of a segment names what stands in the others, for another version may read them.

*Opened* is appended before the upstream is called, *closed*, the whole row of the record, before
the last byte goes to the client. Appending copies into memory: no system call, and what was copied
survives the process, for the page belongs to the kernel (a power cut may take the last seconds).
Segments are allocated on the disk in advance, by the ledger's thread, and used again once all they
tell of is in the store. Their owner holds a lock on each, which the kernel frees with the process:
`take_over` reads those that nobody holds.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import struct
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from .rows import COLUMNS, Row

logger = logging.getLogger("hoberproxy.ledger")

SEGMENT_BYTES = 4 * 1024 * 1024  # ten thousand requests
SPARES = 1  # segments ready beside the one in use
MAX_PAYLOAD_BYTES = 64 * 1024
_MAGIC = b"hbjrnl01"  # another form of entries gets another
_HEAD = struct.Struct("<8sQ")  # magic, generation
_ENTRY = struct.Struct("<II")  # length of the payload, checksum
_END = bytes(_ENTRY.size)  # behind the last entry: what is left of an earlier use follows it
# What is told of a request that is opened; of a closed one it is the row.
OPENED = (
    *("id", "started", "key_id", "key_label", "path", "requested", "streamed"),
    *("slug", "provider", "prompt_tokens", "completion_tokens", "price"),
)
_NAMES = b"n" + orjson.dumps([OPENED, COLUMNS])
Values = dict[str, Any]
UNFINISHED = ".new"  # the ending of a segment that is being made
UNFINISHED_FOR = 60.0  # seconds after which its maker must have died
NOWHERE = -1  # in place of a segment's number: the journal could not take the entry


class _Segment:
    """One file, locked and mapped."""

    __slots__ = ("_descriptor", "_map", "_path", "_seed", "end", "number", "pending")

    def __init__(self, path: Path, number: int) -> None:
        self._path = path
        self.number = number
        # Under its own name only once it is locked: else another process could take it for one that
        # a dead process left, and remove it.
        new = path.with_suffix(UNFINISHED)
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Allocated, or a full disk would end the process at a store to memory.
            os.posix_fallocate(self._descriptor, 0, SEGMENT_BYTES)
            self._map = mmap.mmap(self._descriptor, SEGMENT_BYTES)
            self.begin(number)
            new.rename(path)
        except BaseException:
            os.close(self._descriptor)
            new.unlink(missing_ok=True)
            raise

    def begin(self, number: int) -> None:
        """Forget what it holds; old entries do not fit the new generation's checksum."""
        self.number = number
        self.pending = 0  # requests told of here that are not in the store
        generation = secrets.token_bytes(8)
        self._seed = zlib.crc32(generation)
        self._map[: _HEAD.size] = _MAGIC + generation
        self.end = _HEAD.size
        self.append(_NAMES)

    def append(self, payload: bytes) -> None:
        entry = _ENTRY.pack(len(payload), zlib.crc32(payload, self._seed)) + payload + _END
        end = self.end
        self._map[end : end + len(entry)] = entry
        self.end = end + len(entry) - len(_END)

    def close(self, *, remove: bool) -> None:
        """Unmap, and free the lock; the file goes if nothing in it is needed."""
        if remove:
            self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._descriptor)


class Journal:
    """One process's journal in a directory; `open` and `close` belong to one thread.

    `prepare`, `settle` and `take_over` belong to another, which writes the store. `lost` counts
    entries that found no room: their requests go on, and are told of by the store alone.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._owner = secrets.token_hex(8)
        self._made = 0
        self._numbers = 0
        self._current: _Segment | None = None
        self._segments: dict[int, _Segment] = {}  # full ones that are still needed
        self._spares: deque[_Segment] = deque()
        self._settled: deque[Counter[int]] = deque()
        self._is_failing = False
        self._is_closed = False
        self.lost = 0

    # The path of a request

    def open(self, values: list[Any]) -> int:
        """Tell that a request is about to go upstream, in the order of OPENED.

        Returns the number of the segment that has it, as `close_request` does.
        """
        return self._append(b"o" + orjson.dumps(values))

    def close_request(self, row: Row) -> int:
        """Tell how a request ended."""
        try:
            payload = b"c" + orjson.dumps(row)
        except (TypeError, ValueError):  # what JSON cannot hold; the store has its own way with it
            self.lost += 1
            return NOWHERE
        return self._append(payload)

    def _append(self, payload: bytes) -> int:
        segment = self._current
        if segment is None or segment.end + len(payload) > SEGMENT_BYTES - 2 * _ENTRY.size:
            segment = self._turn()
        if segment is None or len(payload) > MAX_PAYLOAD_BYTES:
            self.lost += 1
            return NOWHERE
        segment.append(payload)
        segment.pending += 1
        return segment.number

    def _turn(self) -> _Segment | None:
        """Go on in another segment: a settled one, a prepared one, or else one made now."""
        self._collect()
        if self._current is not None:
            self._segments[self._current.number] = self._current
            self._current = None
        free = next((one for one in self._segments.values() if not one.pending), None)
        if free is not None:
            del self._segments[free.number]
            self._numbers += 1
            free.begin(self._numbers)
        elif self._spares:
            free = self._spares.popleft()
            self._numbers += 1
            free.begin(self._numbers)
        self._current = free
        return free

    def _collect(self) -> None:
        """Count off what is in the store by now."""
        while self._settled:
            for number, count in self._settled.popleft().items():
                segment = self._segments.get(number)
                if segment is None and self._current is not None and self._current.number == number:
                    segment = self._current
                if segment is not None:
                    segment.pending -= count

    # The thread of the store

    def prepare(self) -> None:
        """Have a segment ready; a full disk is told once, and tried again by the next call."""
        while len(self._spares) < SPARES and not self._is_closed:
            try:
                self._directory.mkdir(mode=0o700, exist_ok=True)
                self._made += 1
                path = self._directory / f"{self._owner}-{self._made}.journal"
                self._spares.append(_Segment(path, 0))
            except OSError as exc:
                if not self._is_failing:
                    reason = exc.strerror or type(exc).__name__
                    logger.error("no journal: a crash now would lose requests: %s", reason)
                self._is_failing = True
                return
            if self._is_failing:
                logger.warning("the journal is written again, %d entries were not", self.lost)
            self._is_failing = False

    def settle(self, numbers: Iterable[int]) -> None:
        """The requests behind these entries are in the store; numbers may come repeatedly."""
        self._settled.append(Counter(numbers))

    # The end

    def close(self) -> None:
        """Let go of all segments; they go too, unless a request is not in the store yet."""
        self._is_closed = True
        self._collect()
        segments = [*self._segments.values(), *self._spares]
        if self._current is not None:
            segments.append(self._current)
        is_settled = not any(segment.pending for segment in segments)
        for segment in segments:
            segment.close(remove=is_settled)
        self._segments.clear()
        self._spares.clear()
        self._current = None


# Taking over


@dataclass(slots=True)
class Remains:
    """What a dead process left: the rows of requests that ended, what is known of the others.

    By request id, and in each by name. The files stay locked until `remove`, `set_aside` or
    `release`.
    """

    closed: dict[str, Values] = field(default_factory=dict)
    opened: dict[str, Values] = field(default_factory=dict)
    _files: list[tuple[Path, int]] = field(default_factory=list)

    def remove(self) -> None:
        """All of it is in the store."""
        for path, _ in self._files:
            path.unlink(missing_ok=True)
        self.release()

    def set_aside(self) -> None:
        """No try will read them: leave the files to a person."""
        for path, _ in self._files:
            with suppress(OSError):
                path.rename(path.with_suffix(".unreadable"))
        self.release()

    def release(self) -> None:
        """Leave the files to the next try."""
        for _, descriptor in self._files:
            os.close(descriptor)
        self._files.clear()


def take_over(directory: str | os.PathLike[str]) -> Iterator[Remains]:
    """What each dead process left in the directory; whoever asks first gets it."""
    for path in Path(directory).glob(f"*{UNFINISHED}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > UNFINISHED_FOR:
                path.unlink()
    owners: dict[str, list[Path]] = {}
    for path in sorted(Path(directory).glob("*-*.journal")):
        owners.setdefault(path.name.partition("-")[0], []).append(path)
    for paths in owners.values():
        remains = _lock_all(paths)
        if remains is not None:
            yield remains


def _lock_all(paths: list[Path]) -> Remains | None:
    """All segments of one owner, or none: a request may be told of in two of them."""
    remains = Remains()
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # another process was faster
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            remains.release()
            return None
        remains._files.append((path, descriptor))
    try:
        for path, descriptor in remains._files:
            _read_segment(path, descriptor, remains)
    except (KeyError, TypeError, ValueError) as exc:
        logger.error("%s: no journal of this program: %s", paths[0].name, type(exc).__name__)
        remains.set_aside()
        return None
    for request_id in remains.closed:
        remains.opened.pop(request_id, None)
    return remains if remains._files else None


def _read_segment(path: Path, descriptor: int, remains: Remains) -> None:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        data = file.read()
    names: dict[bytes, list[str]] = {}
    for payload in read_entries(data):
        if payload is None:
            logger.warning("%s: the last entry is torn and left out: a crash does that", path.name)
            return
        kind, values = payload[:1], orjson.loads(payload[1:])
        if kind == b"n":
            names = dict(zip((b"o", b"c"), values, strict=True))
        else:
            found = dict(zip(names[kind], values, strict=True))
            (remains.opened if kind == b"o" else remains.closed)[found["id"]] = found


def read_entries(data: bytes) -> Iterator[bytes | None]:
    """The payloads of a segment; None in place of a last one that is not whole."""
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        return
    seed = zlib.crc32(data[len(_MAGIC) : _HEAD.size])
    place = _HEAD.size
    while place + _ENTRY.size <= len(data):
        length, checksum = _ENTRY.unpack_from(data, place)
        if not length:
            if checksum:
                yield None
            return
        payload = data[place + _ENTRY.size : place + _ENTRY.size + length]
        if len(payload) < length or zlib.crc32(payload, seed) != checksum:
            yield None
            return
        yield payload
        place += _ENTRY.size + length
