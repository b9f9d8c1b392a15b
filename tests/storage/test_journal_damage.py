"""What a dead process's journal still gives when its file is damaged, wherever and however."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoberproxy.accounting import journal as journal_module
from hoberproxy.accounting.journal import ENTRY, MARK, MARK_PLACE, _Segment
from hoberproxy.storage.journal_reader import UNREADABLE, Journals
from tests.support.patience import TEST_LIMIT, examples, patient

EXAMPLES = examples(100)
SEGMENT = 64 * 1024  # small, so that a page is a part of it
PAGE = 4096


class Entry(NamedTuple):
    """One that was written, and where: its first byte, and the one behind its last."""

    kind: str
    values: list[Any]
    begin: int
    end: int


@dataclass
class Written:
    """A dead process's journal, as it was before the damage."""

    path: Path
    data: bytes = b""
    entries: list[Entry] = field(default_factory=list)
    end: int = 0
    stored: int = 0  # up to where the store has it


class File:
    """One that is damaged: each of its bytes still has its place in the whole one."""

    def __init__(self, data: bytes) -> None:
        self.bytes = bytearray(data)
        self.origin: list[int] = list(range(len(data)))  # -1: not as it was

    def put(self, place: int, data: bytes) -> None:
        for index, byte in enumerate(data, place):
            if self.bytes[index] != byte:
                self.bytes[index] = byte
                self.origin[index] = -1

    def insert(self, place: int, data: bytes, origins: list[int]) -> None:
        self.bytes[place:place] = data
        self.origin[place:place] = origins

    def cut(self, begin: int, end: int) -> None:
        del self.bytes[begin:end]
        del self.origin[begin:end]

    def has(self, begin: int, end: int) -> bool:
        """Whether these bytes of the whole file stand in this one, together and unchanged."""
        wanted = list(range(begin, end))
        for index in (i for i, origin in enumerate(self.origin) if origin == begin):
            if self.origin[index : index + len(wanted)] == wanted:
                return True
        return False


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Small files, and entries of three values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "SEGMENT_BYTES", SEGMENT)
        patch.setattr(journal_module, "_NAMES", b"n" + orjson.dumps([["id", "x", "y"]] * 3))
        yield


def write(folder: Path, rng: random.Random, count: int, *, is_used_again: bool) -> Written:
    """A dead owner's file with `count` entries; the store has some of them."""
    path = folder / "owner-1.segment"
    segment = _Segment(path)
    segment.begin(1)
    if is_used_again:
        while fill(segment, rng, "old") is not None:
            pass
        segment.begin(2)
    written = Written(path)
    for number in range(count):
        entry = fill(segment, rng, f"req_{number:05}")
        if entry is None:
            break
        written.entries.append(entry)
    if rng.random() < 0.5:
        (reader,) = (journals := Journals(folder)).refresh()
        reader.read(rng.randrange(1, count + 1))
        reader.mark()
        written.stored = reader._stored
        journals.close()
    written.end = segment.end
    segment.close()
    written.data = path.read_bytes()
    return written


def fill(segment: _Segment, rng: random.Random, name: str) -> Entry | None:
    """Append one more entry, if there is room."""
    text = "".join(rng.choices("abc\u20ac0 ", k=rng.choice([0, 5, 200, 300, 300, 300, 5000])))
    values = [name, rng.randrange(10**6), text]
    kind = rng.choice("occcra")
    payload = kind.encode() + orjson.dumps(values)
    if not segment.has_room(len(payload)):
        return None
    begin = segment.end
    segment.append(payload)
    return Entry(kind, values, begin, segment.end)


def zero_a_page(file: File, rng: random.Random, used: int) -> None:
    page = rng.randrange(0, used, PAGE)
    file.put(page, bytes(min(PAGE, len(file.bytes) - page)))


def zero_a_stretch(file: File, rng: random.Random, used: int) -> None:
    begin = rng.randrange(used)
    file.put(begin, bytes(min(rng.randrange(1, 700), len(file.bytes) - begin)))


def flip_bits(file: File, rng: random.Random, used: int) -> None:
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(min(used, len(file.bytes)))
        file.put(place, bytes([file.bytes[place] ^ 1 << rng.randrange(8)]))


def truncate(file: File, rng: random.Random, used: int) -> None:
    file.cut(rng.randrange(used), len(file.bytes))


def take_out(file: File, rng: random.Random, used: int) -> None:
    begin = rng.randrange(used)
    file.cut(begin, begin + rng.randrange(1, 700))


def insert_noise(file: File, rng: random.Random, used: int) -> None:
    noise = rng.randbytes(rng.randrange(1, 700))
    file.insert(rng.randrange(min(used, len(file.bytes))), noise, [-1] * len(noise))


def double(file: File, rng: random.Random, used: int) -> None:
    begin = rng.randrange(used)
    end = begin + rng.randrange(1, 2000)
    place = rng.choice([end, rng.randrange(used)])
    file.insert(place, bytes(file.bytes[begin:end]), file.origin[begin:end])


Damage = Callable[[File, random.Random, int], None]
DAMAGE: list[Damage] = [
    zero_a_page,
    zero_a_stretch,
    flip_bits,
    truncate,
    take_out,
    insert_noise,
    double,
]


def damaged(written: Written, rng: random.Random, damage: list[Damage]) -> File:
    file = File(written.data)
    for each in damage:
        each(file, rng, min(written.end + ENTRY.size, len(file.bytes)))
        if not file.bytes:
            break
    written.path.write_bytes(file.bytes)
    return file


@pytest.mark.timeout(TEST_LIMIT + patient(EXAMPLES))
@settings(max_examples=EXAMPLES)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 60),
    is_used_again=st.booleans(),
    damage=st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=3),
)
def test_every_entry_that_is_not_damaged_is_taken_once_and_no_other(
    seed: int, count: int, is_used_again: bool, damage: list[Damage]
) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder), rng, count, is_used_again=is_used_again)
        file = damaged(written, rng, damage)
        entries, taken, kept = take_over(Path(folder))
    whole = [entry for entry in written.entries if file.has(entry.begin, entry.end)]
    found = [entry for entry in entries if entry[1][0] != "old"]
    assert sorted(found) == sorted((entry.kind, entry.values) for entry in whole)
    # Of the use before, something is seen only if nothing of the last one is left.
    assert len(found) == len(entries) or not found
    # Unless the head says by a whole mark that the store has it, each goes there.
    mark = list(range(MARK_PLACE, MARK_PLACE + MARK.size))
    is_marked = file.origin[mark[0] : mark[-1] + 1] == mark
    wanted = [
        (entry.kind, entry.values)
        for entry in whole
        if entry.kind == "o" or entry.begin >= written.stored or not is_marked
    ]
    assert [entry for entry in wanted if entry not in taken] == []
    assert [entry for entry in taken if taken.count(entry) > 1] == []
    left = set(file.origin)
    for entry in written.entries:  # what is left of one that is damaged is kept
        rest = [written.data[place] for place in range(entry.begin, entry.end) if place in left]
        assert entry in whole or kept or not any(rest)


Read = list[tuple[str, list[Any]]]


def take_over(folder: Path) -> tuple[Read, Read, bool]:
    """What a writer finds: whole entries, what is to be stored, and whether a file is kept."""
    journals = Journals(folder)
    entries: Read = []
    taken: Read = []
    kept = 0
    for remains in journals.dead():
        (segment,) = remains.segments
        for _, payload in segment._entries() if segment.is_readable else ():
            if payload[:1] != b"n":
                entries.append((chr(payload[0]), orjson.loads(payload[1:])))
        for kind, found in (
            ("o", remains.opened.values()),
            ("c", remains.closed.values()),
            ("r", remains.revised.values()),
            ("a", remains.amended),
        ):
            taken += [(kind, list(values.values())) for values in found]
        kept += remains.remove()
    assert list(journals.dead()) == []
    journals.close()
    assert [path.suffix for path in folder.iterdir()] == [UNREADABLE] * kept
    return entries, taken, bool(kept)
