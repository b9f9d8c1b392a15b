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

from hoberproxy.accounting import journal as journal_module
from hoberproxy.accounting.journal import ENTRY, NOWHERE, UNFINISHED, Journal
from hoberproxy.storage.journal_reader import (
    MAX_UNREADABLE,
    UNFINISHED_FOR,
    UNREADABLE,
    Journals,
    Remains,
)
from tests.support.patience import WAIT


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    yield journal
    journal.close()


@pytest.fixture
def journals(tmp_path: Path) -> Iterator[Journals]:
    """As the writer sees them."""
    journals = Journals(tmp_path / "journal")
    yield journals
    journals.close()


def file_of(tmp_path: Path) -> Path:
    return next((tmp_path / "journal").iterdir())


def read(journals: Journals) -> list[bytes]:
    """What is new in all of them."""
    return [payload for segment in journals.refresh() for payload in segment.read(1000)]


def store_all(journals: Journals) -> None:
    """As the writer does when the store has it."""
    for segment in journals.refresh():
        while segment.read(1000):
            pass
        segment.mark()


@pytest.fixture(autouse=True)
def short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of one or two values."""
    monkeypatch.setattr(journal_module, "_NAMES", b'n[["id","x"],["id","y"],["id","z"]]')


def row(number: int) -> tuple[Any, ...]:
    return (f"req_{number}", 1.5, "text \u20ac", None, True)


def die(journal: Journal) -> None:
    """Let go of all as a killed process does: nothing is said any more."""
    for segment in [*journal._in_use(), *journal._spares]:
        segment.close()
    journal._segments.clear()
    journal._spares.clear()
    journal._current = None


# Read while it is written


def test_entries_are_read_as_they_were_written(journal: Journal, journals: Journals) -> None:
    journal.open(["req_1", 2])
    journal.close_request(row(1))
    assert read(journals) == ['c["req_1",1.5,"text \u20ac",null,true]'.encode()]
    assert read(journals) == []
    journal.revise(row(2))
    journal.amend(["req_1", 5])
    assert [payload[:1] for payload in read(journals)] == [b"r", b"a"]


def test_a_half_copied_entry_is_read_once_it_is_whole(journal: Journal, journals: Journals) -> None:
    journal.close_request(("req_1", 1))
    segment = journal._current
    assert segment is not None
    start = segment.end
    journal.close_request(("req_2", 2))
    whole = bytes(segment._map[start : segment.end])
    for cut in range(1, len(whole)):
        segment._map[start : segment.end] = whole[:cut] + bytes(len(whole) - cut)
        fresh = Journals(file_of_folder(journal))
        assert read(fresh) == [b'c["req_1",1]'], f"cut at {cut}"
        segment._map[start : segment.end] = whole
        assert read(fresh) == [b'c["req_2",2]'], f"cut at {cut}"
        fresh.close()


def file_of_folder(journal: Journal) -> Path:
    return journal._directory


def test_another_writer_goes_on_behind_the_last_stored_entry(
    journal: Journal, journals: Journals, tmp_path: Path
) -> None:
    journal.close_request(("req_1", 1))
    store_all(journals)
    journal.close_request(("req_2", 2))
    assert read(journals) == [b'c["req_2",2]']  # and dies before the store has it
    other = Journals(tmp_path / "journal")
    assert read(other) == [b'c["req_2",2]']
    other.close()
    assert (journal.closed, journal.stored) == (2, 1)
    store_all(journals)
    assert (journal.closed, journal.stored) == (2, 2)


# Used again


def test_a_segment_used_again_shows_nothing_of_its_earlier_use(
    journal: Journal, journals: Journals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 420)
    seen: list[bytes] = []
    for number in range(60):
        found = journal.open([f"req_{number:04}"])
        assert found != NOWHERE
        journal.close_request((f"req_{number:04}", 0), found)
        seen += read(journals)
        store_all(journals)
    assert len(list((tmp_path / "journal").iterdir())) == 1
    assert seen == [f'c["req_{number:04}",0]'.encode() for number in range(60)]
    assert (journal.closed, journal.stored) == (60, 60)


def test_entries_that_are_not_stored_are_not_overwritten(
    journal: Journal, journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 400)
    seen: list[bytes] = []
    for number in range(60):  # a writer that lags: nothing is stored until the end
        journal.prepare()
        journal.close_request((f"req_{number:04}", 0))
    assert (journal.lost, journal.records_lost) == (0, 0)
    seen += read(journals)
    assert sorted(seen) == [f'c["req_{number:04}",0]'.encode() for number in range(60)]
    store_all(journals)
    assert journal.stored == 60


def test_a_request_that_runs_keeps_its_segment(
    journal: Journal, journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 400)
    opened_in = journal.open(["req_long", 0])
    for number in range(40):
        journal.prepare()
        journal.close_request((f"req_{number:04}", 0), journal.open([f"req_{number:04}", 0]))
        store_all(journals)
    assert opened_in in journal._segments
    die(journal)
    (remains,) = journals.dead()
    assert "req_long" in remains.opened  # and another whose end is in the store alone
    remains.release()


def test_after_an_outage_the_segments_it_took_are_given_back(
    journal: Journal, journals: Journals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 400)
    for number in range(100):
        journal.prepare()
        journal.close_request((f"req_{number:04}", 0))
    assert len(list((tmp_path / "journal").iterdir())) > 8
    for number in range(100):
        store_all(journals)
        journal.prepare()
        journal.close_request((f"req_{number:04}", 0))
    journal.prepare()
    assert len(list((tmp_path / "journal").iterdir())) <= 4
    store_all(journals)
    assert journal.closed == journal.stored == 200


# No room


def test_without_room_closed_requests_wait_in_memory_and_follow_later(
    tmp_path: Path, journals: Journals, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal")  # nothing is prepared
    assert journal.open(["req_1"]) == NOWHERE
    for number in range(3):
        journal.close_request((f"req_{number}", 0))
    assert (journal.lost, journal.records_lost, journal.closed, journal.stored) == (4, 0, 3, 0)
    journal.flush()
    assert journal.lost == 4
    journal.prepare()
    journal.close_request(("req_3", 0))
    assert read(journals) == [f'c["req_{number}",0]'.encode() for number in range(4)]
    store_all(journals)
    assert (journal.closed, journal.stored) == (4, 4)
    journal.close()


def test_beyond_a_bound_closed_requests_are_lost_counted_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "MAX_WAITING", 2)
    journal = Journal(tmp_path / "journal")
    for number in range(5):
        journal.close_request((f"req_{number}", 0))
    assert journal.records_lost == 3
    journal.amend(["req_1", 1])  # the estimate stays, which is no loss of a record
    assert journal.records_lost == 3
    assert caplog.text.count("a record is lost") == 1
    journal.close()
    assert journal.records_lost == 5
    assert "2 records are lost" in caplog.text


def test_segments_are_bounded_and_the_rest_waits(
    journal: Journal,
    journals: Journals,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 400)
    monkeypatch.setattr(journal_module, "MAX_SEGMENTS", 3)
    for number in range(100):
        journal.prepare()
        journal.close_request((f"req_{number:04}", 0))
    assert len(journal._segments) <= 4
    assert journal._waiting and journal.records_lost == 0
    assert caplog.text.count("3 segments wait for the store") == 1
    seen: list[bytes] = []
    for _ in range(20):
        seen += read(journals)
        store_all(journals)
        journal.prepare()
        journal.flush()
    assert sorted(seen) == [f'c["req_{number:04}",0]'.encode() for number in range(100)]
    assert "has room again" in caplog.text


def test_a_row_that_is_too_long_is_counted_and_one_that_is_no_json_is_cleaned(
    journal: Journal, journals: Journals
) -> None:
    assert journal.open(["x" * 300_000]) == NOWHERE
    journal.close_request(("x" * 300_000, 0))
    assert (journal.lost, journal.records_lost) == (2, 1)
    journal.close_request(("\ud800", 2**70))
    assert read(journals) == [b'c["?",9007199254740992]']


# Whose it is


def test_a_closed_journal_counts_as_ended_without_a_crash(
    tmp_path: Path, journals: Journals
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    journal.close_request(("req_1", 1), journal.open(["req_1", 1]))
    journal.close()
    (remains,) = journals.dead()
    assert remains.is_orderly
    assert (list(remains.closed), list(remains.opened)) == (["req_1"], [])
    remains.remove()
    assert not list((tmp_path / "journal").iterdir())


def test_a_journal_whose_owner_lives_is_left_alone(journal: Journal, journals: Journals) -> None:
    journal.open(["req_1"])
    assert list(journals.dead()) == []
    assert len(journals.living()) == 1 and not journals.has_dead()


def test_one_writer_alone_takes_a_dead_owners_segments(tmp_path: Path, journals: Journals) -> None:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    journal.open(["req_1", "a"])
    journal.open(["req_2", "b"])
    journal.close_request(("req_2", "c"))
    die(journal)
    (remains,) = journals.dead()
    other = Journals(tmp_path / "journal")
    assert list(other.dead()) == []
    other.close()
    assert not remains.is_orderly
    assert remains.opened == {"req_1": {"id": "req_1", "x": "a"}}
    assert remains.closed == {"req_2": {"id": "req_2", "y": "c"}}
    remains.release()
    (again,) = journals.dead()
    again.remove()
    assert not list((tmp_path / "journal").iterdir())


def test_stored_entries_of_a_dead_owner_are_not_read_again(
    tmp_path: Path, journals: Journals
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    for name in ("req_1", "req_2"):
        journal.open([name, 0])
    journal.close_request(("req_1", 1))
    store_all(journals)
    journal.close_request(("req_2", 2))
    journal.revise(("req_1", 3))
    die(journal)
    (remains,) = journals.dead()
    assert remains.opened == {}
    assert list(remains.closed) == ["req_2"]
    assert remains.revised == {"req_1": {"id": "req_1", "y": 3}}
    remains.release()


def test_an_unlocked_segment_of_a_living_owner_is_not_taken(
    journal: Journal, journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a request that was opened there may be in another one."""
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 4096)
    journal.open(["req_1", 0])
    first = journal._current
    assert first is not None
    journal.prepare()
    journal._turn()
    journal.prepare()
    assert len(journals.refresh()) == 3
    fcntl.flock(first._descriptor, fcntl.LOCK_UN)
    assert list(journals.dead()) == []


def remains_of(path: Path) -> list[Remains]:
    journals = Journals(path)
    found = list(journals.dead())
    journals.close()
    return found


def test_files_of_another_kind_are_set_aside_and_empty_ones_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "w-1.segment").write_bytes(b"hbjrnl01" + bytes(100))
    (tmp_path / "x-1.segment").write_bytes(b"something else entirely")
    (tmp_path / "y-1.segment").write_bytes(b"")
    (tmp_path / "z-1.segment").write_bytes(bytes(4096))
    journals = Journals(tmp_path)
    kept = 0
    for remains in journals.dead():
        assert not remains.opened and not remains.closed
        kept += remains.remove()
    journals.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w-1.unreadable", "x-1.unreadable"]
    assert kept == 2
    assert caplog.text.count("no journal of this version") == 2


def test_a_file_with_an_entry_that_fits_no_names_is_kept_and_logged(
    tmp_path: Path, journals: Journals, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    journal.open(["too", "many", "values"])
    journal.open(["req_1", 2])
    die(journal)
    (remains,) = journals.dead()
    assert list(remains.opened) == ["req_1"]
    assert remains.remove() == 1
    assert [path.suffix for path in (tmp_path / "journal").iterdir()] == [UNREADABLE]
    assert caplog.text.count("damaged; ") == 1


@pytest.mark.parametrize("cut", range(1, ENTRY.size + 12))
def test_a_torn_last_entry_of_a_dead_owner_is_not_read_and_its_file_kept(
    tmp_path: Path, journals: Journals, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.prepare()
    journal.close_request(("req_1", 1))
    segment = journal._current
    assert segment is not None
    start = segment.end
    journal.close_request(("req_2", 2))
    end = segment.end
    assert start + cut < end
    segment._map[start + cut : end] = bytes(end - start - cut)
    die(journal)
    (remains,) = journals.dead()
    assert list(remains.closed) == ["req_1"]
    assert remains.remove() == 1
    assert caplog.text.count("damaged; ") == 1


def test_files_that_are_kept_are_bounded_and_the_oldest_is_removed(
    tmp_path: Path, journals: Journals, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    for number in range(MAX_UNREADABLE + 2):
        path = folder / f"{number}-1{UNREADABLE}"
        path.touch()
        os.utime(path, (number, number))
    assert list(journals.dead()) == []
    assert len(list(folder.iterdir())) == MAX_UNREADABLE
    assert not (folder / f"1-1{UNREADABLE}").exists()
    assert (folder / f"2-1{UNREADABLE}").exists()
    assert caplog.text.count("is removed") == 2


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
    journals = Journals(tmp_path / "journal")
    (remains,) = journals.dead()
    assert len(remains.opened) >= 500
    assert list(remains.opened) == [f"req_{n + 1}" for n in range(len(remains.opened))]
    remains.remove()
    journals.close()


def test_a_segment_that_is_being_made_is_not_taken_for_a_dead_process_s(tmp_path: Path) -> None:
    made, forgotten = tmp_path / f"a-1{UNFINISHED}", tmp_path / f"b-1{UNFINISHED}"
    for path in (made, forgotten):
        path.touch()
    long_ago = time.time() - UNFINISHED_FOR - 1
    os.utime(forgotten, (long_ago, long_ago))
    assert remains_of(tmp_path) == []
    assert made.exists()
    assert not forgotten.exists()


def test_no_other_process_sees_a_segment_without_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def lock_late(descriptor: int, operation: int) -> None:
        assert not list(tmp_path.glob("*.segment"))
        lock(descriptor, operation)

    monkeypatch.setattr("hoberproxy.accounting.journal.fcntl.flock", lock_late)
    journal = Journal(tmp_path)
    journal.prepare()
    assert list(tmp_path.glob("*.segment"))
    monkeypatch.undo()
    journal.close()
