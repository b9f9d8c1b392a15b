"""The journals of all processes in a directory, as the writer of the store reads them.

Those of living processes are read while they are appended to: a checksum that does not fit is an
entry that is half copied, and fits at the next look. What a dead one left is read to its end, with
the requests that were opened and never closed; there it is a torn entry, and the last.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from .journal import (
    ENTRY,
    HEAD,
    HEAD_BYTES,
    HEAD_PLACE,
    MAGIC,
    MARK,
    MARK_PLACE,
    SEGMENT,
    UNFINISHED,
    first_sum,
)
from .rows import COLUMNS, Row, row_of
from .store import Amendment

logger = logging.getLogger("hoberproxy.ledger")

Values = dict[str, Any]
UNFINISHED_FOR = 60.0  # seconds after which a segment's maker must have died
_UNKNOWN, _OLD, _OWN = range(3)
# The oldest is of dead owners, and under another name, for programs of that time remove what they
# do not know.
_OLD_MAGIC = b"hbjrnl01"
_OLD_SEGMENT = ".journal"
_OLD_HEAD_BYTES = 16
# The form, the checksum of its entries, and what that begins with.
_Form = tuple[int, Callable[[bytes, int], int], Callable[[bytes], int]]
_FORMS: dict[bytes, _Form] = {
    MAGIC: (_OWN, zlib.adler32, first_sum),
    b"hbjrnl02": (_OWN, zlib.crc32, zlib.crc32),
    _OLD_MAGIC: (_OLD, zlib.crc32, zlib.crc32),
}
_NO_FORM: _Form = (_UNKNOWN, zlib.crc32, zlib.crc32)
_OPENED, _CLOSED, _REVISED, _AMENDED, _NAMES = b"ocran"
_LIST_OF_COLUMNS = list(COLUMNS)


@dataclass(slots=True)
class Batch:
    """What goes into the store together. Applied in this order."""

    rows: list[Row] = field(default_factory=list)
    revised: list[Row] = field(default_factory=list)  # in place of a row with the same id
    amendments: list[Amendment] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.revised) + len(self.amendments)


class Segment:
    """One segment, whoever's: read from where the store's knowledge of it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = path.name.partition("-")[0]
        self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.size = os.fstat(self.descriptor).st_size
            self._map = mmap.mmap(self.descriptor, self.size) if self.size >= HEAD_BYTES else None
        except BaseException:
            os.close(self.descriptor)
            raise
        magic = os.pread(self.descriptor, len(MAGIC), 0)
        self.form, self._sum, self._first_sum = _FORMS.get(magic, _NO_FORM)
        self.is_empty = not magic.strip(b"\0")
        self.generation = b""
        self.number = 0
        self.has_ended = False
        self._start = HEAD_BYTES if self.form is _OWN else _OLD_HEAD_BYTES
        self._seed = 0
        self._place = self._start
        self._stored = self._start
        self._count = 0  # closed requests up to `_place`
        self._before = (self._place, 0)  # both, as they were before `read_all`
        self._names: dict[int, list[str]] = {}

    def refresh(self) -> None:
        """See whether it is used anew, and go on where the store is."""
        if self.form is not _OWN or self._map is None:
            return
        generation, self.number, ended = HEAD.unpack_from(self._map, HEAD_PLACE)
        self.has_ended = bool(ended)
        if generation == self.generation:
            return
        self.generation = generation
        self._seed = self._first_sum(generation)
        marked, place, count = MARK.unpack_from(self._map, MARK_PLACE)
        if marked != generation:
            # The generation last: until then the owner takes the mark for one of an earlier use.
            place, count = HEAD_BYTES, 0
            self._map[MARK_PLACE + 8 : MARK_PLACE + MARK.size] = MARK.pack(b"", place, count)[8:]
            self._map[MARK_PLACE : MARK_PLACE + 8] = generation
        self._place = self._stored = place
        self._count = count
        self._names = {}

    def read(self, limit: int) -> list[bytes]:
        """Up to `limit` entries that were appended since, but for those of opened requests."""
        # As `_entries`, which costs half as much again: this is most of what the writer does itself
        # (bench.micro account).
        found: list[bytes] = []
        data, seed, place, end = self._map, self._seed, self._place, self.size - ENTRY.size
        unpack_from, sum_of = ENTRY.unpack_from, self._sum
        while data is not None and place <= end:
            length, checksum = unpack_from(data, place)
            if not length:
                break
            following = place + 8 + length
            payload = data[place + 8 : following]
            if sum_of(payload, seed) != checksum or following > self.size:
                break
            place = following
            kind = payload[0]
            if kind == _OPENED or kind == _NAMES:
                continue
            found.append(payload)
            self._count += kind != _AMENDED
            if len(found) == limit:
                break
        self._place = place
        return found

    def _entries(self, place: int) -> Iterator[bytes]:
        """All whole entries from there on; moves `_place` behind each."""
        data, seed, end = self._map, self._seed, self.size - ENTRY.size
        if data is None:
            return
        while place <= end:
            length, checksum = ENTRY.unpack_from(data, place)
            if not length:
                return
            start = place + ENTRY.size
            place = start + length
            payload = data[start:place]
            if len(payload) < length or self._sum(payload, seed) != checksum:
                return
            self._place = place
            yield payload

    def skip(self) -> None:
        """Take all that was appended for stored."""
        while self.read(1000):
            pass
        self.mark()

    def parse(self, payloads: list[bytes], batch: Batch) -> int:
        """Put them into the batch; the number of those that make no sense."""
        names = self.names()
        is_own = names.get(_CLOSED) == _LIST_OF_COLUMNS
        loads, bad = orjson.loads, 0
        for payload in payloads:
            kind = payload[0]
            try:
                values = loads(payload[1:])
                if kind == _AMENDED:
                    found = dict(zip(names[_AMENDED], values, strict=True))
                    batch.amendments.append(Amendment(**found))
                    continue
                if not is_own or len(values) != len(COLUMNS):
                    values = row_of(dict(zip(names[_CLOSED], values, strict=True)))
                (batch.rows if kind == _CLOSED else batch.revised).append(tuple(values))
            except (KeyError, TypeError, ValueError):
                bad += 1
        return bad

    def names(self) -> dict[int, list[str]]:
        """What stands in entries of each kind, as the first entry says."""
        if not self._names:
            place = self._place
            payload = next(self._entries(self._start), b"n[]")
            self._place = place
            if payload[0] == _NAMES:
                self._names = dict(zip(b"oca", orjson.loads(payload[1:]), strict=False))
        return self._names

    def mark(self) -> None:
        """The store has all that was read."""
        if self._place != self._stored and self.form is _OWN and self._map is not None:
            self._stored = self._place
            mark = MARK.pack(self.generation, self._place, self._count)
            self._map[MARK_PLACE : MARK_PLACE + MARK.size] = mark

    def read_all(self, remains: Remains) -> None:
        """Of a dead owner: what is not in the store, and what was opened, from the start on."""
        if self._map is None or self.form is _UNKNOWN:
            return
        if self.form is _OLD:
            self._seed = self._first_sum(self._map[len(_OLD_MAGIC) : _OLD_HEAD_BYTES])
        stored, names = self._stored, self.names()
        self._before = (self._place, self._count)
        self._place, self._count = self._start, 0
        for payload in self._entries(self._start):
            kind = payload[0]
            if kind == _NAMES:
                continue
            self._count += kind in (_CLOSED, _REVISED)
            is_stored = self.form is _OWN and self._place <= stored
            column = _CLOSED if kind == _REVISED else kind
            found = dict(zip(names[column], orjson.loads(payload[1:]), strict=True))
            remains.add(kind, found, is_stored)
        if self._place <= self.size - ENTRY.size:
            length, checksum = ENTRY.unpack_from(self._map, self._place)
            if length or checksum:
                logger.warning(
                    "%s: the last entry is torn and left out: a crash does that", self.path.name
                )

    def go_back(self) -> None:
        """The store did not take what `read_all` found: what was not read before is still to be."""
        self._place, self._count = self._before

    def lock(self) -> bool:
        """Whether the owner is dead; then nobody else has it until `unlock`."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        os.close(self.descriptor)


@dataclass(slots=True)
class Remains:
    """What a dead process left: requests that ended, how others had ended, and those that did not.

    By request id, and in each by name. The files stay locked until `remove`, `set_aside` or
    `release`. `is_orderly`: its owner ended by itself.
    """

    segments: list[Segment]
    closed: dict[str, Values] = field(default_factory=dict)
    revised: dict[str, Values] = field(default_factory=dict)
    amended: list[Values] = field(default_factory=list)
    opened: dict[str, Values] = field(default_factory=dict)
    is_orderly: bool = False
    _ended: set[str] = field(default_factory=set)

    def add(self, kind: int, values: Values, is_stored: bool) -> None:
        """Another entry; those of one segment in their order, segments in theirs."""
        name = values["id"]
        if kind == _OPENED:
            self.opened[name] = values
            return
        self._ended.add(name)
        if is_stored:
            return
        if kind == _AMENDED:
            self.amended.append(values)
        else:
            (self.closed if kind == _CLOSED else self.revised)[name] = values

    def finish(self) -> None:
        """All is read."""
        for name in self._ended:
            self.opened.pop(name, None)
        self.is_orderly = all(each.has_ended for each in self.segments)

    def remove(self) -> None:
        """All of it is in the store."""
        for each in self.segments:
            each.mark()
            each.path.unlink(missing_ok=True)
            each.unlock()

    def set_aside(self) -> None:
        """No try will read them: leave the files to a person."""
        for each in self.segments:
            with suppress(OSError):
                each.path.rename(each.path.with_suffix(".unreadable"))
            each.unlock()

    def release(self) -> None:
        """Leave the files to the next try."""
        for each in self.segments:
            each.go_back()
            each.unlock()


class Journals:
    """All segments in a directory; to be used by the one writer, on one thread."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._segments: dict[str, Segment] = {}

    def refresh(self) -> list[Segment]:
        """Find new segments, forget those that are gone; all, an owner's in the order of use."""
        names = self._names()
        for name in self._segments.keys() - names:
            self._segments.pop(name).close()
        for name in names - self._segments.keys():
            with suppress(FileNotFoundError):
                self._segments[name] = Segment(self._directory / name)
        segments = list(self._segments.values())
        for segment in segments:
            segment.refresh()
        segments.sort(key=lambda each: (each.owner, each.number))
        return segments

    def _names(self) -> set[str]:
        try:
            with os.scandir(self._directory) as entries:
                names = {entry.name for entry in entries}
        except FileNotFoundError:
            return set()
        return {name for name in names if name.endswith((SEGMENT, _OLD_SEGMENT))}

    def owners(self) -> dict[str, list[Segment]]:
        """The segments of each owner, as of now."""
        owners: dict[str, list[Segment]] = {}
        for segment in self.refresh():
            owners.setdefault(segment.owner, []).append(segment)
        return owners

    def living(self) -> set[str]:
        """The owners that live."""
        return {name for name, segments in self.owners().items() if not self._is_dead(segments)}

    def has_dead(self) -> bool:
        """Whether any owner has left something."""
        return any(self._is_dead(segments) for segments in self.owners().values())

    def _is_dead(self, segments: list[Segment]) -> bool:
        if not segments[0].lock():
            return False
        segments[0].unlock()
        return True

    def dead(self) -> Iterator[Remains]:
        """What each dead process left; locked meanwhile, against programs of another version."""
        self._forget_unfinished()
        for owner, segments in self.owners().items():
            if not self._lock_all(owner, segments):
                continue
            remains = self._read(segments)
            if remains is not None:
                yield remains

    def _forget_unfinished(self) -> None:
        for path in self._directory.glob(f"*{UNFINISHED}"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > UNFINISHED_FOR:
                    path.unlink()

    def _lock_all(self, owner: str, segments: list[Segment]) -> bool:
        """All segments of an owner, or none: a request may be told of in two of them."""
        locked: list[Segment] = []
        for segment in segments:
            if not segment.lock():
                break
            locked.append(segment)
        # Once more: another may have been made since, or this one have been let go of.
        names = {name for name in self._names() if name.partition("-")[0] == owner}
        if len(locked) == len(segments) and names == {each.path.name for each in segments}:
            return True
        for segment in locked:
            segment.unlock()
        return False

    def _read(self, segments: list[Segment]) -> Remains | None:
        remains = Remains(segments)
        try:
            for segment in segments:
                segment.refresh()
                if segment.form is _UNKNOWN and not segment.is_empty:
                    raise ValueError("another form")
                segment.read_all(remains)
        except (KeyError, TypeError, ValueError) as exc:
            name = segments[0].path.name
            logger.error("%s: no journal of this program: %s", name, type(exc).__name__)
            remains.set_aside()
            return None
        remains.finish()
        return remains

    def close(self) -> None:
        """Unmap all."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
