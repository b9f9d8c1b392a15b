"""The journals of all processes in a directory, as the writer reads them.

A living process's segments are read while entries are appended: an entry whose checksum does not
fit is half copied, and read the next time. A dead process's segments are read to their ends, with
the requests that were opened and never closed. There such an entry is damage, by a power cut or a
bad disk: all whole entries around it are read, and the file is renamed, for a person to look at.
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

from ..accounting.journal import (
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
from ..accounting.journal_directory import SEGMENT
from ..accounting.record import COLUMNS, Row, row_of
from .store import Amendment

logger = logging.getLogger("hoberproxy.ledger")

Values = dict[str, Any]
UNFINISHED_FOR = 60.0  # seconds after which the process that made a segment must have died
UNREADABLE = ".unreadable"
MAX_UNREADABLE = 64  # such files, of 4 MB at most; beyond that the oldest is removed
_END = bytes(ENTRY.size)
_SEARCHED = 64 * 1024  # bytes at a time
_OPENED, _CLOSED, _REVISED, _AMENDED, _NAMES = b"ocran"
_LIST_OF_COLUMNS = list(COLUMNS)


@dataclass(slots=True)
class Batch:
    """Records that go into the store in one transaction, in this order."""

    rows: list[Row] = field(default_factory=list)
    revised: list[Row] = field(default_factory=list)  # in place of a row with the same id
    amendments: list[Amendment] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.revised) + len(self.amendments)


class Segment:
    """One segment of any process, read from the entry after the last one that is stored."""

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
        self.is_known = True  # of a form that this version reads
        self.is_readable = False  # has a generation by which a dead owner's entries are found
        self.is_set_aside = False
        self._seed = 0
        self._start = HEAD_BYTES
        self._place = self._stored = HEAD_BYTES
        self._count = 0  # closed requests up to `_place`
        self._names: dict[int, list[str]] = {}

    @property
    def number(self) -> int:
        """The number of this use among those of its owner's segments."""
        return int.from_bytes(self.generation[4:], "little")

    def refresh(self) -> None:
        """Read the head; begin after the last stored entry if the segment is used again."""
        if not self.is_own or self._map is None:
            return
        generation, ended = HEAD.unpack_from(self._map, HEAD_PLACE)
        self.has_ended = bool(ended)
        if generation != self.generation:
            self._use(generation)

    def _use(self, generation: bytes) -> None:
        assert self._map is not None, "a caller has checked it"
        self.generation = generation
        self._seed = first_sum(generation)
        mark = parse_mark(self._map[MARK_PLACE : MARK_PLACE + MARK.size], generation)
        self._stored, self._count = mark if mark is not None else (HEAD_BYTES, 0)
        self._place = self._stored
        self._names = {}

    def read(self, limit: int) -> list[bytes]:
        """Return up to `limit` entries appended since the last call, but none of the letter o."""
        found: list[bytes] = []
        while len(found) < limit:
            entry = self._entry_at(self._place)
            if entry is None or entry[0] != self._place:  # an entry of elsewhere, copied here
                break
            payload = entry[1]
            self._place += ENTRY.size + len(payload)
            kind = payload[0]
            if kind != _OPENED and kind != _NAMES:
                found.append(payload)
                self._count += kind != _AMENDED
        return found

    def _entry_at(self, place: int) -> tuple[int, bytes] | None:
        """Return the whole entry at `place`: the place where it was written, and its payload."""
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
        """Yield every whole entry of a dead owner's segment once, whatever is damaged between."""
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
        """Return the next place from `place` on where an entry may begin, -1 if there is none.

        By slices: on Python 3.11.2, `find` of a map has ended the process by a segmentation fault.
        """
        data, mark = self._map, self.generation
        assert data is not None, "a caller has checked it"
        for start in range(place, self.size, _SEARCHED):
            found = data[start : start + _SEARCHED + len(mark) - 1].find(mark)
            if found >= 0:
                return start + found
        return -1

    def parse(self, payloads: list[bytes], batch: Batch) -> int:
        """Add `payloads` to the batch; return how many cannot be parsed."""
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
        """Return the names of the values in entries of each kind, from the first entry."""
        if not self._names:
            _, payload = self._entry_at(HEAD_BYTES) or (0, b"")
            if payload[:1] != b"n" and self._has_own_schema(self.generation):
                payload = own_names()  # the entry is damaged
            if payload[:1] == b"n":  # else damaged, and of another version
                self._names = dict(zip(b"oca", orjson.loads(payload[1:]), strict=False))
        return self._names

    def _has_own_schema(self, generation: bytes) -> bool:
        return generation[:4] == serialize_generation(own_names(), 0)[:4]

    def mark(self) -> None:
        """Note in the head that all entries read so far are stored."""
        if self._place != self._stored and self._map is not None:
            self._stored = self._place
            mark = serialize_mark(self.generation, self._place, self._count)
            self._map[MARK_PLACE : MARK_PLACE + MARK.size] = mark

    def examine(self) -> None:
        """Find the generation of a dead owner's segment, also if its head is damaged."""
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
        """Return the generation of the last use by the entries alone, None if there are none."""
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
        """Whether the file has zeros only: nothing was written, or a power cut has left nothing."""
        return not os.pread(self.descriptor, self.size, 0).strip(b"\0")

    def read_all(self, remains: Remains) -> None:
        """Add every entry of a dead owner's segment to `remains`."""
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
        """Lock the segment, and return whether it is locked: not while its owner lives."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def set_aside(self) -> str:
        """Rename the file so that no process reads it; return the words of the log about it."""
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
    """The entries of a dead process: requests closed, revised, amended, and opened but not closed.

    Each maps a request's id to values by their names. The files stay locked until `remove`,
    `set_aside` or `release`. `is_orderly` says that the process was not killed.
    """

    segments: list[Segment]
    closed: dict[str, Values] = field(default_factory=dict)
    revised: dict[str, Values] = field(default_factory=dict)
    amended: list[Values] = field(default_factory=list)
    opened: dict[str, Values] = field(default_factory=dict)
    is_orderly: bool = False
    _ended: set[str] = field(default_factory=set)

    def add(self, kind: int, values: Values, is_stored: bool) -> None:
        """Add an entry; call it for the segments, and the entries of each, in their order."""
        name = values["id"]
        if kind == _OPENED:
            self.opened[name] = values
            return
        if kind != _AMENDED:  # the entry that it amends may be damaged: that request is lost
            self._ended.add(name)
        if is_stored:
            return
        if kind == _AMENDED:
            self.amended.append(values)
        else:
            (self.closed if kind == _CLOSED else self.revised)[name] = values

    def finish(self) -> None:
        """Drop opened requests that were closed, once all entries are added."""
        for name in self._ended:
            self.opened.pop(name, None)
        self.is_orderly = all(each.has_ended for each in self.segments)

    @property
    def size(self) -> int:
        """The number of entries that are to be stored."""
        found = (self.closed, self.revised, self.amended, self.opened)
        return sum(map(len, found))

    def remove(self) -> int:
        """Remove the files of which all is stored; return how many are damaged and kept."""
        for each in self.segments:
            if each.holes:
                logger.error("%s: %s", each.path.name, each.set_aside())
            else:
                each.path.unlink(missing_ok=True)
            each.unlock()
        return sum(bool(each.holes) for each in self.segments)

    def set_aside(self) -> int:
        """Rename all files, for no try will store their entries; return how many."""
        for each in self.segments:
            each.set_aside()
            each.unlock()
        return len(self.segments)

    def release(self) -> None:
        """Unlock the files, for the next try."""
        for each in self.segments:
            each.unlock()


class Journals:
    """All segments in a directory; for the one writer, on one thread."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._segments: dict[str, Segment] = {}

    def refresh(self) -> list[Segment]:
        """Open new segments, close removed ones; return all, an owner's in their order of use."""
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
        return {name for name in names if name.endswith(SEGMENT)}

    def owners(self) -> dict[str, list[Segment]]:
        """Return the segments of each owner, as of now."""
        owners: dict[str, list[Segment]] = {}
        for segment in self.refresh():
            if not segment.is_set_aside:
                owners.setdefault(segment.owner, []).append(segment)
        return owners

    def living(self) -> set[str]:
        """Return the owners whose processes live."""
        return {name for name, segments in self.owners().items() if not self._is_dead(segments)}

    def has_dead(self) -> bool:
        """Whether a dead owner's segments are in the directory."""
        return any(self._is_dead(segments) for segments in self.owners().values())

    def _is_dead(self, segments: list[Segment]) -> bool:
        if not segments[0].lock():
            return False
        segments[0].unlock()
        return True

    def dead(self) -> Iterator[Remains]:
        """Yield the entries of each dead process; its files are locked, against other writers."""
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
        """Lock all segments of an owner, or none: a request's entries may be in two of them."""
        locked: list[Segment] = []
        for segment in segments:
            if not segment.lock():
                break
            locked.append(segment)
        # Checked again: a segment may have been made since, or these have been unlocked.
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
        """Unmap and close all segments."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
