"""The journal's files: what is read back, also when they were cut, and by whom."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hoberproxy import journal as journal_module
from hoberproxy.journal import (
    NOWHERE,
    UNFINISHED,
    UNFINISHED_FOR,
    Journal,
    read_entries,
    take_over,
)

WAIT = 30.0


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    yield journal
    journal.close()


def file_of(tmp_path: Path) -> Path:
    return next((tmp_path / "journal").iterdir())


def payloads(tmp_path: Path) -> list[bytes | None]:
    """All entries but the first, which names what is in the others."""
    return entries(file_of(tmp_path).read_bytes())


def entries(data: bytes) -> list[bytes | None]:
    first, *others = read_entries(data)
    assert first is not None and first.startswith(b"n[")
    return others


@pytest.fixture(autouse=True)
def short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of one or two values."""
    monkeypatch.setattr(journal_module, "_NAMES", b'n[["id","x"],["id","y"]]')


def row(number: int) -> tuple[Any, ...]:
    return (f"req_{number}", 1.5, "text \u20ac", None, True)


def test_entries_are_read_as_they_were_written(journal: Journal, tmp_path: Path) -> None:
    journal.open(["req_1", 2])
    journal.close_request(row(1))
    assert payloads(tmp_path) == [
        b'o["req_1",2]',
        'c["req_1",1.5,"text \u20ac",null,true]'.encode(),
    ]


def test_wherever_a_last_entry_is_torn_the_others_are_read(
    journal: Journal, tmp_path: Path
) -> None:
    journal.open(["req_1"])
    start = journal._current.end if journal._current else 0
    journal.open(["req_2"])
    end = journal._current.end if journal._current else 0
    data = file_of(tmp_path).read_bytes()
    for cut in range(start + 1, end):
        torn = data[:cut] + bytes(len(data) - cut)
        read = entries(torn)
        assert read == [b'o["req_1"]', None], f"cut at {cut}"
    assert entries(data[:start] + bytes(len(data) - start)) == [b'o["req_1"]']


def test_a_segment_used_again_shows_nothing_of_its_earlier_use(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 240)
    for number in range(40):
        found = journal.open([f"req_{number:04}"])
        assert found != NOWHERE
        journal.settle([found])
    assert len(list((tmp_path / "journal").iterdir())) == 1
    last = payloads(tmp_path)
    assert None not in last and last[-1] == b'o["req_0039"]'


def test_what_is_not_settled_is_not_overwritten(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 240)
    numbers = [journal.open([f"req_{number:04}"]) for number in range(12)]
    assert NOWHERE in numbers and journal.lost == numbers.count(NOWHERE)
    journal.prepare()
    assert journal.open(["req_next"]) != NOWHERE


def test_what_is_too_long_or_no_json_is_counted(journal: Journal) -> None:
    assert journal.open(["x" * 70_000]) == NOWHERE
    assert journal.close_request(("\ud800",)) == NOWHERE
    assert journal.lost == 2


def test_a_closed_journal_leaves_files_only_if_they_are_needed(tmp_path: Path) -> None:
    for is_settled in (True, False):
        journal = Journal(tmp_path / "journal")
        journal.prepare()
        number = journal.open(["req_1"])
        if is_settled:
            journal.settle([number])
        journal.close()
        assert bool(list((tmp_path / "journal").iterdir())) is not is_settled


def test_a_journal_whose_owner_lives_is_left_alone(journal: Journal, tmp_path: Path) -> None:
    journal.open(["req_1"])
    assert list(take_over(tmp_path / "journal")) == []


def test_who_takes_over_first_has_it_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    journal.open(["req_1", "a"])
    journal.open(["req_2", "b"])
    journal.close_request(("req_2", "c"))
    journal.close()
    (remains,) = take_over(tmp_path / "journal")
    assert list(take_over(tmp_path / "journal")) == []
    assert remains.opened == {"req_1": {"id": "req_1", "x": "a"}}
    assert remains.closed == {"req_2": {"id": "req_2", "y": "c"}}
    remains.release()
    (again,) = take_over(tmp_path / "journal")
    again.remove()
    assert not list((tmp_path / "journal").iterdir())


def test_files_of_another_kind_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "x-1.journal").write_bytes(b"something else entirely")
    (tmp_path / "y-1.journal").write_bytes(b"")
    for remains in take_over(tmp_path):
        assert not remains.opened and not remains.closed
        remains.release()


def test_a_journal_that_cannot_be_read_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    journal.open(["too", "many", "values"])
    journal.close()
    assert list(take_over(tmp_path / "journal")) == []
    assert [path.suffix for path in (tmp_path / "journal").iterdir()] == [".unreadable"]
    assert "no journal of this program" in caplog.text


def write_forever(path: Path, ready: Any) -> None:
    journal = Journal(path)
    journal.prepare()
    number = 0
    while True:
        number += 1
        journal.open([f"req_{number}", *[0] * 11])
        if number == 500:
            ready.set()
        if number >= 100_000:
            signal.pause()


def test_what_a_killed_process_appended_is_all_there(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    ready = processes.Event()
    writer = processes.Process(target=write_forever, args=(tmp_path / "journal", ready))
    writer.start()
    assert ready.wait(WAIT)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    (remains,) = take_over(tmp_path / "journal")
    assert len(remains.opened) >= 500
    assert list(remains.opened) == [f"req_{n + 1}" for n in range(len(remains.opened))]
    remains.remove()


def test_a_segment_that_is_being_made_is_not_taken_for_a_dead_process_s(tmp_path: Path) -> None:
    made, forgotten = tmp_path / f"a-1{UNFINISHED}", tmp_path / f"b-1{UNFINISHED}"
    for path in (made, forgotten):
        path.touch()
    long_ago = time.time() - UNFINISHED_FOR - 1
    os.utime(forgotten, (long_ago, long_ago))
    assert list(take_over(tmp_path)) == []
    assert made.exists()
    assert not forgotten.exists()


def test_others_never_see_a_segment_without_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def lock_late(descriptor: int, operation: int) -> None:
        assert not list(tmp_path.glob("*.journal"))
        lock(descriptor, operation)

    monkeypatch.setattr("hoberproxy.journal.fcntl.flock", lock_late)
    journal = Journal(tmp_path)
    journal.prepare()
    assert list(tmp_path.glob("*.journal"))
    monkeypatch.undo()
    journal.close()
