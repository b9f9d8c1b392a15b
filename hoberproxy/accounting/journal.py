"""The journal of one process: records on their way into the store, which survive a kill.

    segment:  head │ entry, entry, entry, … │ eight zeros
    head:     magic │ generation │ ended │ mark: generation, place, count, CRC │ zeros, to 64 bytes
    entry:    generation │ length │ place │ checksum │ payload: a letter and a JSON array

    n  names of the values in the others, for other versions    o  a request is opened
    c  a request is closed: its row    r  its row is revised    a  its counts are amended

*Opened* is appended before the upstream is called, *closed* before the last byte goes to the
client. Appending copies into memory: no system call, and the copy survives the process, for the
page belongs to the kernel (a power cut may take the last seconds). The writer, in whichever
process, reads the segments of all (storage/journal_reader.py) and notes in a head up to which
place, and how many closed requests, the store has of this generation; then the segment can be used
again. The owner holds a lock on each of its segments, which the kernel frees with the process.

Each entry begins with its segment's *generation*, eight bytes that no payload can contain, so a
reader finds the next whole entry after a damaged one. The place where it was written is in it too:
bytes that were moved or copied are recognised. The checksum is Adler-32, begun with the
generation's own sum, for it needs no table: that of CRC-32 is 6 KB, which at a low load are in no
cache when a request comes.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import struct
import zlib
from collections import deque
from pathlib import Path
from typing import Any, Final

import orjson

from ..routing.catalog import Endpoint
from .journal_directory import SEGMENT
from .record import COLUMNS, Record, Row, clean_row, make_row

logger = logging.getLogger("hoberproxy.ledger")

SEGMENT_BYTES = 4 * 1024 * 1024  # seven thousand requests
# 512 MB, about 900,000 requests, that wait in one process for a store that cannot be written.
MAX_SEGMENTS = 128
SPARES = 1  # segments ready beside the one in use
KEPT = 2  # used segments that stay for the next use; the others go
MAX_PAYLOAD_BYTES: Final = 256 * 1024
MAX_WAITING = 10_000  # closed requests kept in memory while there is no room, 10 MB or so
MAGIC = b"hbjrnl04"  # another form of entries gets another
HEAD_BYTES = 64
HEAD = struct.Struct("<8sQ")  # generation, whether the owner has ended
HEAD_PLACE = len(MAGIC)
# What is stored: generation, place after it, number of closed requests, CRC-32 of these.
MARK = struct.Struct("<8sIII")
MARK_PLACE = 32
ENTRY = struct.Struct("<8sIII")  # generation, length of the payload, place, checksum
ENTRY_BYTES: Final = 20
# No UTF-8 has this byte, so no payload holds a generation.
GENERATION_BEGINS = b"\xff"
_dumps: Final = orjson.dumps
_adler32: Final = zlib.adler32
_END: Final = bytes(ENTRY_BYTES)  # after the last entry: what is left of an earlier use follows it
# The values of an entry *opened*; those of *closed* are the row's.
OPENED = (
    *("id", "started", "key_id", "key_label", "path", "requested", "streamed"),
    *("slug", "provider", "prompt_tokens", "completion_tokens", "price"),
)
AMENDED = ("id", "prompt_tokens", "completion_tokens", "cost")
_NAMES = b"n" + orjson.dumps([OPENED, COLUMNS, AMENDED])
AMENDMENT = ord("a")
UNFINISHED = ".new"  # the suffix of a segment that is being made
NOWHERE = -1  # in place of a segment's number: the journal could not take the entry


def own_names() -> bytes:
    """Return the payload with the names of the values in this version's entries."""
    return _NAMES


def serialize_generation(names: bytes, number: int) -> bytes:
    """Return the generation of the `number`-th use of a segment, with entries of these `names`.

    No two uses of a file have the same one. If a segment's head is damaged, a reader knows by the
    generation which names apply, and which use is the last.
    """
    schema = zlib.crc32(names, zlib.crc32(MAGIC)).to_bytes(4, "little")[:3]
    return GENERATION_BEGINS + schema + number.to_bytes(4, "little")


def first_sum(generation: bytes) -> int:
    """Return the sum with which the checksums of a segment's entries begin.

    Unlike Adler-32 of eight bytes it is spread over all bits. Both halves are below 65521, as in
    every sum of Adler-32: from others the library may go on as it likes.
    """
    return zlib.crc32(generation) & 0x7FFF7FFF


def serialize_mark(generation: bytes, place: int, count: int) -> bytes:
    """Return the mark in a segment's head: up to `place`, `count` closed requests are stored."""
    fields = MARK.pack(generation, place, count, 0)[:-4]
    return fields + zlib.crc32(fields).to_bytes(4, "little")


def parse_mark(data: bytes, generation: bytes) -> tuple[int, int] | None:
    """Return place and count of a mark, None if it is of another use, damaged or half written."""
    marked, place, count, _ = MARK.unpack(data)
    is_whole = marked == generation and serialize_mark(generation, place, count) == data
    return (place, count) if is_whole else None


class _Segment:
    """One file of the journal, locked and mapped."""

    __slots__ = (
        "_descriptor",
        "_generation",
        "_map",
        "_path",
        "_seed",
        "_seen",
        "closed",
        "end",
        "number",
        "running",
    )

    def __init__(self, path: Path) -> None:
        self._path = path
        # Under its own name only once it is locked: else another process could take it for one that
        # a dead process left, and remove it.
        new = path.with_suffix(UNFINISHED)
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Allocated, or a full disk would end the process at a store to memory.
            os.posix_fallocate(self._descriptor, 0, SEGMENT_BYTES)
            self._map = mmap.mmap(self._descriptor, SEGMENT_BYTES)
            self.begin(0)
            new.rename(path)
        except BaseException:
            os.close(self._descriptor)
            new.unlink(missing_ok=True)
            raise

    def begin(self, number: int) -> None:
        """Begin the `number`-th use; entries of earlier ones have another generation."""
        self.number = number
        self.running = 0  # requests opened here that are not closed
        self.closed = 0  # entries of the letters c and r
        self._seen = (0, 0)
        self._generation = serialize_generation(_NAMES, number)
        self._seed = first_sum(self._generation)
        head = MAGIC + HEAD.pack(self._generation, 0)
        self._map[0 : len(head)] = head
        self.end = HEAD_BYTES
        self.append(_NAMES)

    def has_room(self, length: int) -> bool:
        """Whether a payload of `length` bytes fits, and the zeros after it."""
        return self.end + length <= SEGMENT_BYTES - 2 * ENTRY_BYTES

    def append(self, payload: bytes) -> None:
        length, checksum, end = len(payload), int(_adler32(payload, self._seed)), self.end
        # As ENTRY, which would be packed by a module of its own. The checksum covers the place.
        head = (
            self._generation
            + (end << 32 | length).to_bytes(8, "little")
            + (checksum ^ end).to_bytes(4, "little")
        )
        start = end + ENTRY_BYTES
        place = start + length
        # The head last, in place of zeros: no reader, and no kill, finds an entry half written.
        self._map[start : place + ENTRY_BYTES] = payload + _END
        self._map[end:start] = head
        self.end = place

    def _mark(self) -> tuple[int, int]:
        """Return up to which place this use is stored, and how many closed requests."""
        mark = parse_mark(self._map[MARK_PLACE : MARK_PLACE + MARK.size], self._generation)
        if mark is not None:  # else the writer is just writing it
            self._seen = mark
        return self._seen

    def stored(self) -> int:
        """Return how many closed requests of this use are stored."""
        return self._mark()[1]

    def is_free(self) -> bool:
        """Whether all entries are stored, and no request that was opened here still runs."""
        return not self.running and self._mark()[0] >= self.end

    def let_go(self) -> None:
        """Note that the owner ended without a crash, and free the lock."""
        head = HEAD.pack(self._generation, 1)
        self._map[HEAD_PLACE : HEAD_PLACE + HEAD.size] = head
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self, *, remove: bool = False) -> None:
        """Unmap, and free the lock."""
        if remove:  # first, so that no process finds the file without its lock
            self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._descriptor)


class Journal:
    """The journal of one process, in a directory; all but `prepare` belongs to the loop's thread.

    `prepare` allocates on the disk, so it belongs to another thread. `lost` counts entries for
    which there was no room: a crash would lose them. Entries of closed requests wait in memory for
    room; `records_lost` counts those that could not.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._owner = secrets.token_hex(8)
        self._made = 0
        self._numbers = 0
        self._current: _Segment | None = None
        self._segments: dict[int, _Segment] = {}  # full ones, by number
        self._spares: deque[_Segment] = deque()
        self._retired: deque[_Segment] = deque()  # to be removed by the thread
        self._waiting: deque[bytes] = deque()
        self._is_failing = False
        self._is_closed = False
        self._closed = 0  # entries of closed requests in segments used again or closed since
        self._left = 0  # those of them that the store had not
        self.lost = 0
        self.records_lost = 0

    # The path of a request

    def open_record(
        self, record: Record, slug: str, endpoint: Endpoint, prompt_tokens: int, answer_tokens: int
    ) -> None:
        """Append that a request goes upstream; the numbers of tokens are estimates."""
        prices = endpoint.prices
        record.opened_in = self.open(
            [
                record.id,
                record.started,
                record.key_id,
                record.key_label,
                record.path,
                record.requested,
                record.streamed,
                slug,
                endpoint.provider,
                prompt_tokens,
                answer_tokens,
                prices.text if prices is not None else None,
            ]
        )

    def seal(self, record: Record) -> None:
        """Append the record's row, before the client gets the last byte of the answer."""
        if record.is_sealed:  # it ended otherwise than it seemed: the later row counts
            self.revise(make_row(record))
        else:
            record.is_sealed = True
            self.close_request(make_row(record), record.opened_in)

    def open(self, values: list[Any]) -> int:
        """Append that a request goes upstream, with `values` in the order of OPENED.

        Return the number of the segment with the entry, for `close_request`.
        """
        segment = self._append(b"o" + _dumps(values))
        if segment is None:
            return NOWHERE
        segment.running += 1
        return segment.number

    def close_request(self, row: Row, opened_in: int = NOWHERE) -> None:
        """Append the row of a request that has ended."""
        self._close(b"c", row)
        segment = self._current
        if segment is None or segment.number != opened_in:
            segment = self._segments.get(opened_in)
        if segment is not None:
            segment.running -= 1

    def revise(self, row: Row) -> None:
        """Append another row of a request that was closed before."""
        self._close(b"r", row)

    def amend(self, values: list[Any]) -> None:
        """Append better counts of a closed request, in the order of AMENDED."""
        payload = b"a" + orjson.dumps(values)
        if self._waiting or self._append(payload) is None:
            self._wait(payload)

    def _close(self, kind: bytes, row: Row) -> None:
        try:
            payload = kind + _dumps(row)
        except (TypeError, ValueError):  # half a surrogate pair, or a number beyond 64 bits
            payload = kind + orjson.dumps(clean_row(row))
        if self._waiting:
            self.flush()
        if self._waiting:  # not before those
            self.lost += 1
            self._wait(payload)
            return
        segment = self._append(payload)
        if segment is not None:
            segment.closed += 1
        else:
            self._wait(payload)

    def _append(self, payload: bytes) -> _Segment | None:
        segment = self._current
        if segment is None or not segment.has_room(len(payload)):
            segment = self._turn()
        if segment is None or len(payload) > MAX_PAYLOAD_BYTES:
            self.lost += 1
            return None
        segment.append(payload)
        return segment

    def _turn(self) -> _Segment | None:
        """Go on in another segment, a free one or a prepared one; None if there is neither."""
        current = self._current
        if current is not None:
            self._segments[current.number] = current
            self._current = None
        free = [one for one in self._segments.values() if one.is_free()]
        for one in free:
            if one is free[0] or len(self._segments) > KEPT:
                del self._segments[one.number]
                self._closed += one.closed
                if one is not free[0]:
                    self._retired.append(one)
        following = free[0] if free else None
        if following is None and self._spares:
            following = self._spares.popleft()
        if following is not None:
            self._numbers += 1
            following.begin(self._numbers)
        self._current = following
        return following

    def _wait(self, payload: bytes) -> None:
        is_fit = len(payload) <= MAX_PAYLOAD_BYTES and not self._is_closed
        if is_fit and len(self._waiting) < MAX_WAITING:
            self._waiting.append(payload)
            return
        if payload[0] == AMENDMENT:  # the estimate stays
            return
        if not self.records_lost:
            logger.error("a record is lost: the journal has no room and neither has memory")
        self.records_lost += 1

    def flush(self) -> None:
        """Append the entries that wait in memory, as far as there is room."""
        while self._waiting and self._has_room(len(self._waiting[0])):
            payload = self._waiting.popleft()
            segment = self._append(payload)
            if segment is not None and payload[0] != AMENDMENT:
                segment.closed += 1

    def _has_room(self, length: int) -> bool:
        segment = self._current
        if segment is not None and segment.has_room(length):
            return True
        return bool(self._spares) or any(one.is_free() for one in self._segments.values())

    # Counts

    @property
    def closed(self) -> int:
        """The number of requests closed so far, also of those that wait in memory."""
        return self._closed + sum(one.closed for one in self._in_use()) + len(self._waiting)

    @property
    def stored(self) -> int:
        """The number of them that are stored."""
        stored = sum(one.stored() for one in self._in_use())
        return self._closed - self._left + stored

    def _in_use(self) -> list[_Segment]:
        segments = list(self._segments.values())
        if self._current is not None:
            segments.append(self._current)
        return segments

    @property
    def depth(self) -> int:
        """Closed requests that are not yet in the store."""
        return self.closed - self.stored

    # The other thread

    def prepare(self) -> None:
        """Make a spare segment; a full disk is logged once, and tried again by the next call."""
        while self._retired:
            self._retired.popleft().close(remove=True)
        while len(self._spares) < SPARES and not self._is_closed:
            problem = self._make()
            if problem is None:
                if self._is_failing:
                    logger.warning("the journal has room again, %d entries found none", self.lost)
                self._is_failing = False
                continue
            if not self._is_failing:
                logger.error("no journal: a crash now would lose requests: %s", problem)
            self._is_failing = True
            return

    def _make(self) -> str | None:
        """Make one more spare; return what is wrong if that fails."""
        if len(self._segments) >= MAX_SEGMENTS:
            return f"{MAX_SEGMENTS} segments wait for the store"
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._made += 1
            self._spares.append(_Segment(self._directory / f"{self._owner}-{self._made}{SEGMENT}"))
        except OSError as exc:
            return exc.strerror or type(exc).__name__
        return None

    # The end

    def end(self) -> None:
        """End the journal after the last request; nothing is unmapped yet."""
        self.flush()
        self._is_closed = True
        if self._waiting:
            logger.error("%d records are lost: the journal has no room", len(self._waiting))
            self.records_lost += len(self._waiting)
            self._waiting.clear()
        while self._spares:
            self._spares.popleft().close(remove=True)
        for segment in self._in_use():
            segment.let_go()

    def close(self) -> None:
        """End the journal, and close all segments."""
        if not self._is_closed:
            self.end()
        for segment in self._in_use():
            self._closed += segment.closed
            self._left += segment.closed - segment.stored()
            segment.close()
        while self._retired:
            self._retired.popleft().close(remove=True)
        self._segments.clear()
        self._current = None
