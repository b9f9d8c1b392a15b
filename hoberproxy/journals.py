"""The journals of all processes in a directory, as the writer of the store reads them.

Those of living processes are read while they are appended to: a checksum that does not fit is an
entry that is half copied, and fits at the next look. What a dead one left is read to its end, with
the requests that were opened and never closed; there it is damage, by a power cut or a bad disk.
Every whole entry around it is taken, and the file kept for a person, under a name of which no
process reads.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from .folder import SEGMENT
from .journal import (
    ENTRY,
    HEAD,
    HEAD_BYTES,
    HEAD_PLACE,
    MAGIC,
    MARK,
    MARK_PLACE,
    UNFINISHED,
    first_sum,
    own_names,
    parse_mark,
    serialize_generation,
    serialize_mark,
)
from .record import COLUMNS, Row, row_of
from .store import Amendment

logger = logging.getLogger("hoberproxy.ledger")

Values = dict[str, Any]
UNFINISHED_FOR = 60.0  # seconds after which a segment's maker must have died
UNREADABLE = ".unreadable"
MAX_UNREADABLE = 64  # such files, of 4 MB at most; beyond that the oldest goes
_OLD_SEGMENT = ".journal"  # of versions before the first release
_END = bytes(ENTRY.size)
_SEARCHED = 64 * 1024  # bytes at a time
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
        self.is_own = os.pread(self.descriptor, len(MAGIC), 0) == MAGIC
        self.generation = b""
        self.has_ended = False
        self.holes = 0  # places where a dead owner's segment cannot be read
        self.is_known = True  # of a form that is read here
        self.is_readable = False  # has a generation by which a dead owner's entries are found
        self.is_set_aside = False
        self._seed = 0
        self._start = HEAD_BYTES
        self._place = self._stored = HEAD_BYTES
        self._count = 0  # closed requests up to `_place`
        self._names: dict[int, list[str]] = {}

    @property
    def number(self) -> int:
        """Its place in its owner's order of use."""
        return int.from_bytes(self.generation[4:], "little")

    def refresh(self) -> None:
        """See whether it is used anew, and go on where the store is."""
        if not self.is_own or self._map is None:
            return
        generation, ended = HEAD.unpack_from(self._map, HEAD_PLACE)
        self.has_ended = bool(ended)
        if generation != self.generation:
            self._use(generation)

    def _use(self, generation: bytes) -> None:
        assert self._map is not None, "asked before"
        self.generation = generation
        self._seed = first_sum(generation)
        mark = parse_mark(self._map[MARK_PLACE : MARK_PLACE + MARK.size], generation)
        self._stored, self._count = mark if mark is not None else (HEAD_BYTES, 0)
        self._place = self._stored
        self._names = {}

    def read(self, limit: int) -> list[bytes]:
        """Up to `limit` entries that were appended since, but for those of opened requests."""
        # As `_entry_at`, which costs half as much again: this is most of what the writer itself
        # does (bench.micro account).
        found: list[bytes] = []
        data, seed, place, end = self._map, self._seed, self._place, self.size - ENTRY.size
        unpack_from, sum_of, generation = ENTRY.unpack_from, zlib.adler32, self.generation
        while data is not None and self.is_own and place <= end:
            marked, length, where, checksum = unpack_from(data, place)
            if marked != generation or where != place:
                break
            start = place + 20
            following = start + length
            payload = data[start:following]
            if sum_of(payload, seed) ^ place != checksum or following > self.size:
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

    def _entry_at(self, place: int) -> tuple[int, bytes] | None:
        """The whole entry that begins there: its place when it was written, and its payload."""
        data = self._map
        if data is None or place + ENTRY.size > self.size:
            return None
        generation, length, where, checksum = ENTRY.unpack_from(data, place)
        start = place + ENTRY.size
        if generation != self.generation or not 0 < length <= self.size - start:
            return None
        payload = data[start : start + length]
        is_whole = zlib.adler32(payload, self._seed) ^ where == checksum
        return (where, payload) if is_whole else None

    def _entries(self) -> Iterator[tuple[int, bytes]]:
        """Every whole entry of a dead owner's segment once, around all that is damaged."""
        data, place = self._map, self._start
        seen: set[int] = set()
        while data is not None:
            entry = self._entry_at(place)
            if entry is None:
                following = self._find_entry(place + 1)
                # Behind the last entry there are zeros, unless it is torn or the file cut.
                self.holes += following >= 0 or data[place : place + ENTRY.size] != _END
                if following < 0:
                    return
                place = following
                continue
            place += ENTRY.size + len(entry[1])
            if entry[0] not in seen:
                seen.add(entry[0])
                yield entry

    def _find_entry(self, place: int) -> int:
        """Return where the next entry's head may begin, from `place` on; -1 if there is none.

        By slices: on Python 3.11.2, `find` of a map has ended the process by a segmentation fault.
        """
        data, mark = self._map, self.generation
        assert data is not None, "asked before"
        for start in range(place, self.size, _SEARCHED):
            found = data[start : start + _SEARCHED + len(mark) - 1].find(mark)
            if found >= 0:
                return start + found
        return -1

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
            _, payload = self._entry_at(HEAD_BYTES) or (0, b"")
            if payload[:1] != b"n" and self._has_own_schema(self.generation):
                payload = own_names()  # damaged
            if payload[:1] == b"n":  # else of a version that is not known, and its names are lost
                self._names = dict(zip(b"oca", orjson.loads(payload[1:]), strict=False))
        return self._names

    def _has_own_schema(self, generation: bytes) -> bool:
        return generation[:4] == serialize_generation(own_names(), 0)[:4]

    def mark(self) -> None:
        """The store has all that was read."""
        if self._place != self._stored and self.is_own and self._map is not None:
            self._stored = self._place
            mark = serialize_mark(self.generation, self._place, self._count)
            self._map[MARK_PLACE : MARK_PLACE + MARK.size] = mark

    def examine(self) -> None:
        """Find out by which generation a dead owner's segment is to be read."""
        self.holes, self._start = 0, HEAD_BYTES
        self.refresh()
        self.is_readable = self.is_own and self._entry_at(HEAD_BYTES) is not None
        if self.is_readable:
            return
        found = self._last_generation()
        if found is None and self.is_blank():
            return
        self.holes += 1  # in its head
        self._start = 0  # which may be missing
        self.is_known = self.is_readable = found is not None
        if found is not None and found != self.generation:
            self._use(found)

    def _last_generation(self) -> bytes | None:
        """Without a head that can be read: the generation of the last use, by the entries."""
        data, before = self._map, (self.generation, self._seed)
        found: set[bytes] = set()
        schema = serialize_generation(own_names(), 0)[:4]
        place = data.find(schema) if data is not None else -1
        while data is not None and place >= 0:
            self.generation = data[place : place + 8]
            self._seed = first_sum(self.generation)
            if self.generation not in found and self._entry_at(place) is not None:
                found.add(self.generation)
            place = data.find(schema, place + 1)
        self.generation, self._seed = before
        return max(found, key=lambda each: int.from_bytes(each[4:], "little"), default=None)

    def is_blank(self) -> bool:
        """Nothing was ever written, or a power cut has left nothing."""
        return not os.pread(self.descriptor, self.size, 0).strip(b"\0")

    def read_all(self, remains: Remains) -> None:
        """Of a dead owner: what is not in the store, and what was opened, from the start on."""
        names = self.names() if self.is_readable else {}
        for place, payload in self._entries() if self.is_readable else ():
            kind = payload[0]
            if kind == _NAMES:
                continue
            column = _CLOSED if kind == _REVISED else kind
            try:
                found = dict(zip(names[column], orjson.loads(payload[1:]), strict=True))
                remains.add(kind, found, place < self._stored)
            except (KeyError, TypeError, ValueError):  # of a version that has other entries
                self.holes += 1

    def lock(self) -> bool:
        """Whether the owner is dead; then nobody else has it until `unlock`."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def set_aside(self) -> str:
        """Give the file a name of which no process reads; what the log is to say of it."""
        kept = self.path.with_suffix(UNREADABLE)
        self.is_set_aside = True  # also if it cannot be renamed: it is not read again and again
        with suppress(OSError):
            self.path.rename(kept)
        if not self.is_known:
            return f"no journal of this version; kept as {kept.name}"
        return (
            "damaged; the whole entries around the damage are stored, "
            f"and the file is kept as {kept.name}"
        )

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
        if kind != _AMENDED:  # what it amends may be damaged; then the request is as good as lost
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

    @property
    def size(self) -> int:
        """How many entries are to be stored."""
        found = (self.closed, self.revised, self.amended, self.opened)
        return sum(map(len, found))

    def remove(self) -> int:
        """All that could be read is in the store; the number of files kept for what could not."""
        for each in self.segments:
            if each.holes:
                logger.error("%s: %s", each.path.name, each.set_aside())
            else:
                each.path.unlink(missing_ok=True)
            each.unlock()
        return sum(bool(each.holes) for each in self.segments)

    def set_aside(self) -> int:
        """Leave the files to a person, for no try will store what is in them; how many it are."""
        for each in self.segments:
            each.set_aside()
            each.unlock()
        return len(self.segments)

    def release(self) -> None:
        """Leave the files to the next try."""
        for each in self.segments:
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
            if not segment.is_set_aside:
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
            yield self._read(segments)
        self._bound_unreadable()

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

    def _bound_unreadable(self) -> None:
        kept: list[tuple[float, Path]] = []
        for path in self._directory.glob(f"*{UNREADABLE}"):
            with suppress(OSError):  # a person has removed it meanwhile
                kept.append((path.stat().st_mtime, path))
        for _, path in sorted(kept)[:-MAX_UNREADABLE]:
            logger.error("%s is removed: there are %d newer ones", path.name, MAX_UNREADABLE)
            path.unlink(missing_ok=True)

    def _read(self, segments: list[Segment]) -> Remains:
        for segment in segments:
            segment.examine()
        remains = Remains(sorted(segments, key=lambda each: each.number))
        for segment in remains.segments:
            segment.read_all(remains)
        remains.finish()
        return remains

    def close(self) -> None:
        """Unmap all."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
