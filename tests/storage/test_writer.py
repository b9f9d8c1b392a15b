"""Journals and their writer on real files and threads: nothing lost, nothing twice, no waiting."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from hoberproxy.accounting.record import Record, Row
from hoberproxy.routing.catalog import Endpoint, Prices
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from hoberproxy.storage.store import StoreError
from hoberproxy.storage.writer import BUSY_TIMEOUT, PART_SIZE, Writer
from tests.support.patience import WAIT, wait_until
from tests.support.recording import Process, record
from tests.support.stores import write_records

PATIENCE = WAIT


def stored(path: Path) -> int:
    db = sqlite3.connect(path)
    count: int = db.execute("SELECT COUNT(*) FROM records").fetchone()[0]
    db.close()
    return count


class Lock:
    """Another process's write lock on the store."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_: object) -> None:
        self._db.execute("ROLLBACK")
        self._db.close()


# Records


def test_records_reach_the_store_by_themselves(make: Callable[..., Process], path: Path) -> None:
    process = make()
    process.start()
    for number in range(3):
        process.put(record(number))
    wait_until(lambda: process.written == 3)
    assert stored(path) == 3
    assert (process.depth, process.lost) == (0, 0)


def test_closing_writes_what_is_left(make: Callable[..., Process], path: Path) -> None:
    process = make(tick=10 * PATIENCE, batch_size=100)
    process.start()
    for number in range(1234):
        process.put(record(number))
    process.close(PATIENCE)
    assert stored(path) == 1234


@pytest.mark.parametrize("gives_way", [True, False])
def test_others_get_the_core_after_each_part_of_a_batch(
    path: Path, monkeypatch: pytest.MonkeyPatch, gives_way: bool
) -> None:
    yields: list[int] = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append(1))
    living = Process(path, has_writer=False)
    living.journal.prepare()
    for number in range(10 * PART_SIZE):
        living.journal.seal(record(number))
    writer = Writer(path)
    writer.gives_way = gives_way
    writer.open()
    writer.turn()
    assert stored(path) == 10 * PART_SIZE
    assert len(yields) == (20 if gives_way else 0), "ten parts are read, and ten written"
    writer.close()
    living.close()


def test_records_wait_while_the_store_is_locked_and_are_written_once(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = make(batch_size=10)
    process.start()
    with Lock(path):
        for number in range(35):
            process.put(record(number))
        wait_until(lambda: "records wait" in caplog.text)
        assert (process.written, process.depth, process.lost) == (0, 35, 0)
    wait_until(lambda: process.written == 35)
    assert (stored(path), process.depth, process.lost) == (35, 0, 0)
    assert [one.message.split(",")[0] for one in caplog.records] == [
        "records wait in the journals",
        "records are written again",
    ]


def fail_at_first(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Make the next `times` writes fail as on a full disk."""
    write = Store.write
    failures = iter(range(times))

    def write_or_fail(store: Store, *batch: list[Row]) -> int:
        if next(failures, None) is not None:
            raise StoreError("the disk is full", is_transient=True)
        return write(store, *batch)

    monkeypatch.setattr(Store, "write", write_or_fail)


def test_an_outage_is_logged_once_however_often_it_is_tried(
    make: Callable[..., Process], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at_first(monkeypatch, 4)
    process = make()
    process.start()
    process.put(record(1))
    wait_until(lambda: "written again" in caplog.text)
    assert caplog.text.count("records wait") == 1
    assert (process.written, process.lost) == (1, 0)


def test_closing_does_not_wait_for_the_back_off(
    make: Callable[..., Process],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_at_first(monkeypatch, 1)
    process = make(tick=0.5)
    process.start()
    process.put(record(1))
    wait_until(lambda: "records wait" in caplog.text)
    process.close(PATIENCE)
    assert stored(path) == 1


def test_put_does_not_wait_for_a_locked_store(make: Callable[..., Process], path: Path) -> None:
    process = make()
    process.start()
    with Lock(path):
        for number in range(20_000):
            process.put(record(number))
        assert (process.written, process.depth) == (0, 20_000)  # all while the lock is held


def test_closing_on_a_locked_store_gives_up_in_time_and_says_how_many(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = make()
    process.start()
    with Lock(path):
        for number in range(7):
            process.put(record(number))
        process.close(0.05)
        assert process.depth == 7
        assert process.loader._thread is not None
        process.loader._thread.join(PATIENCE)
        assert not process.loader._thread.is_alive()
    assert "records stay in the journals" in caplog.text


def test_closing_waits_for_a_short_lock(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = make()
    process.start()
    closing = threading.Thread(target=process.close, args=(PATIENCE,))
    with Lock(path):
        process.put(record(1))
        closing.start()
        wait_until(lambda: "records wait" in caplog.text)
    closing.join()
    assert stored(path) == 1


def test_a_record_after_closing_is_counted_as_lost(make: Callable[..., Process]) -> None:
    process = make()
    process.start()
    process.close()
    process.put(record(1))
    assert (process.depth, process.lost) == (0, 1)


def test_a_backlog_is_written_without_waiting_for_ticks(
    make: Callable[..., Process], path: Path
) -> None:
    other = Process(path, has_writer=False)
    other.start()
    for number in range(35):
        other.put(record(number))
    make(tick=10 * PATIENCE, batch_size=10).start()
    wait_until(lambda: other.written == 35)
    other.close()


def test_a_record_that_no_table_takes_is_lost_alone(
    make: Callable[..., Process],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write = Store.write

    def stumble(store: Store, rows: list[Row], *others: list[Row]) -> int:
        if any(row[0] == "req_1" for row in rows):
            raise RuntimeError("text that may be a secret")
        return write(store, rows, *others)

    monkeypatch.setattr(Store, "write", stumble)
    process = make()
    process.start()
    for number in range(3):
        process.put(record(number))
    wait_until(lambda: process.lost == 1 and process.depth == 0)
    assert stored(path) == 2
    assert "1 records lost: RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_an_entry_that_makes_no_sense_is_lost_alone(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = make()
    process.start()
    process.journal._append(b'c["too few"]')
    process.journal._append(b"c{no json")
    process.journal._append(b"?[]")
    process.put(record(1))
    wait_until(lambda: stored(path) == 1)
    assert process.lost == 3
    assert "3 records lost: ValueError" in caplog.text


def test_a_journal_of_other_columns_is_read_while_its_owner_lives(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Process(path, has_writer=False)
    names = orjson.dumps([["id"], ["id", "started", "status", "from_the_future"], ["id", "cost"]])
    with monkeypatch.context() as patch:
        patch.setattr("hoberproxy.accounting.journal._NAMES", b"n" + names)
        other.journal.prepare()
        other.journal.close_request(("req_1", 5.0, 200, "?"))
    make().start()
    wait_until(lambda: stored(path) == 1)
    store = Store(path)
    assert store.find_record("req_1") == Record(id="req_1", started=5.0, status=200)
    store.close()
    other.close()


def test_amendments_reach_the_store(make: Callable[..., Process], path: Path) -> None:
    process = make()
    process.start()
    process.put(record(1))
    process.journal.amend(["req_1", 7, 8, 9])
    process.close(PATIENCE)
    store = Store(path)
    one = store.find_record("req_1")
    store.close()
    assert one is not None
    assert (one.prompt_tokens, one.completion_tokens, one.cost) == (7, 8, 9)


# One writer


def test_of_two_processes_one_writes_for_both(make: Callable[..., Process], path: Path) -> None:
    processes = [make(batch_size=20), make(batch_size=20)]
    for process in processes:
        process.start()
    for number in range(500):
        processes[number % 2].put(record(number))
    wait_until(lambda: sum(process.written for process in processes) == 500)
    assert stored(path) == 500
    writers = [process.writer for process in processes]
    assert [writer.written for writer in writers] == [500, 0]


def test_when_one_writer_ends_the_other_writes(make: Callable[..., Process], path: Path) -> None:
    first, second = make(), make()
    first.start()
    second.start()
    second.put(record(1))
    wait_until(lambda: second.written == 1)
    first.put(record(2))
    first.close(PATIENCE)
    second.put(record(3))
    wait_until(lambda: second.written == 2)
    assert stored(path) == 3


def test_both_may_end_at_once_and_nothing_stays_behind(
    make: Callable[..., Process], path: Path
) -> None:
    processes = [make(), make(), make()]
    for process in processes:
        process.start()
    for number in range(300):
        processes[number % 3].put(record(number))
    threads = [threading.Thread(target=process.close, args=(PATIENCE,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored(path) == 300
    assert not list(path.with_name("store.db-requests").iterdir())


def test_a_writer_that_died_before_it_noted_what_was_stored_doubles_nothing(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make(has_writer=False)
    process.start()
    for number in range(5):
        process.put(record(number))
    first = Writer(path)
    first.open()
    with monkeypatch.context() as patch:
        patch.setattr("hoberproxy.storage.journal_reader.Segment.mark", lambda segment: None)
        first.turn()
    first.close()
    assert (stored(path), process.depth) == (5, 5)
    second = Writer(path)
    second.open()
    second.turn()
    second.close()
    assert (stored(path), process.depth) == (5, 0)


def test_a_process_without_a_writer_leaves_its_records_to_another(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = make(has_writer=False)
    process.start()
    process.put(record(1))
    process.close()
    assert process.depth == 1
    make().start()
    assert stored(path) == 1
    assert not caplog.records  # it was not killed


# Start


def test_starting_on_a_missing_directory_says_so(tmp_path: Path) -> None:
    process = Process(tmp_path / "nowhere" / "store.db")
    with pytest.raises(StoreError, match="nowhere"):
        process.start()
    process.close()


def test_starting_on_a_file_that_is_no_database_says_so(
    make: Callable[..., Process], path: Path
) -> None:
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        make().start()


def test_starting_waits_while_another_process_sets_the_store_up(
    make: Callable[..., Process], path: Path
) -> None:
    Store(path).close()
    process = make()
    starting = threading.Thread(target=process.start)
    with Lock(path):
        starting.start()
        time.sleep(2 * BUSY_TIMEOUT)
        assert starting.is_alive()
    starting.join()
    process.put(record(1))
    wait_until(lambda: process.written == 1)


def test_a_process_never_started_closes_at_once(make: Callable[..., Process]) -> None:
    make().close()


# What a killed process leaves


ENDPOINT = Endpoint("east", "m", prices=Prices(Decimal(1), Decimal(2)))


def die(process: Process) -> None:
    """Let go of the journal as a killed process does: nothing is written any more."""
    assert process.loader._thread is None, "a thread would use it"
    for segment in [*process.journal._in_use(), *process.journal._spares]:
        segment.close()


def test_records_that_a_killed_process_did_not_store_are_stored(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    for number in range(3):
        one = record(number)
        dead.journal.open_record(one, "a/b", ENDPOINT, 1000, 500)
        if number:
            dead.journal.seal(one)
    die(dead)
    make().start()
    store = Store(path)
    lost, *ended = store.export_records()
    assert [one.status for one in ended] == [200, 200]
    assert (lost.status, lost.code, lost.slug, lost.provider) == (0, "lost", "a/b", "east")
    assert (lost.prompt_tokens, lost.completion_tokens, lost.estimated) == (1000, 500, True)
    assert lost.cost == 2 * 10**9  # 1000 at 1 USD and 500 at 2 USD a million
    assert [row.name for row in store.sum_usage("status")] == ["200", "lost"]
    store.close()
    assert not list(path.with_name("store.db-requests").glob(f"{dead.journal._owner}*"))
    assert "2 records taken over" in caplog.text


def test_records_of_a_killed_process_are_not_stored_twice(
    make: Callable[..., Process], path: Path
) -> None:
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    for number in range(2):
        one = record(number)
        dead.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
        if number:
            dead.journal.seal(one)
    die(dead)
    store = Store(path)
    write_records(store, [record(0), record(1)])
    make().start()
    assert [one.status for one in store.export_records()] == [200, 200]
    store.close()


def test_entries_around_damage_are_stored_once_and_the_file_is_kept(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    for number in range(60):
        one = record(number)
        dead.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
        dead.journal.seal(one)
    die(dead)
    (file,) = path.with_name("store.db-requests").glob("*.segment")
    data = bytearray(file.read_bytes())
    data[4096:8192] = bytes(4096)
    file.write_bytes(data)
    whole = {n for n in range(60) if b'c["%s"' % record(n).id.encode() in data}
    assert {0, 59} < whole < set(range(60))
    process = make()
    process.start()
    kept = file.with_suffix(".unreadable")
    assert kept.read_bytes() == data
    assert process.writer.unreadable == 1
    store = Store(path)
    ended = {one.id for one in store.export_records() if one.status == 200}
    lost = {one.id for one in store.export_records() if one.code == "lost"}
    # The last one before the hole may reach into it.
    assert {record(n).id for n in whole} - ended <= {record(max(whole - {*range(20, 60)})).id}
    assert len(ended | lost) == len(ended) + len(lost) < 60
    process.close()
    make().start()
    assert len(list(store.export_records())) == len(ended | lost)
    store.close()
    assert caplog.text.count("damaged; ") == 1
    assert [each.suffix for each in kept.parent.iterdir() if each.stem == kept.stem] == [
        ".unreadable"
    ]


def test_an_entry_that_no_store_takes_keeps_no_other_out(
    make: Callable[..., Process], path: Path
) -> None:
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    dead.journal.open(["req_1", "no time", *[None] * 10])
    dead.journal.seal(record(2))
    dead.journal.open_record(record(3), "a/b", ENDPOINT, 1, 1)
    die(dead)
    process = make()
    process.start()
    store = Store(path)
    assert [one.id for one in store.export_records()] == [record(2).id, record(3).id]
    store.close()
    assert (process.lost, process.writer.unreadable) == (1, 1)


def test_an_amendment_does_not_replace_a_damaged_end(
    make: Callable[..., Process], path: Path
) -> None:
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    dead.journal.open_record(record(1), "a/b", ENDPOINT, 1, 1)
    dead.journal.amend([record(1).id, 5, 6, 7])
    die(dead)
    make().start()
    store = Store(path)
    (lost,) = store.export_records()
    assert (lost.code, lost.prompt_tokens, lost.completion_tokens) == ("lost", 5, 6)
    store.close()


def test_entries_of_another_version_are_stored_as_far_as_their_names_are_known(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Process(path, has_writer=False)
    names = orjson.dumps([["id"], ["id", "started", "status", "from_the_future"]])
    monkeypatch.setattr("hoberproxy.accounting.journal._NAMES", b"n" + names)
    dead.journal.prepare()
    dead.journal.close_request(("req_1", 5.0, 200, "?"))
    die(dead)
    monkeypatch.undo()
    make().start()
    store = Store(path)
    assert list(store.export_records()) == [Record(id="req_1", started=5.0, status=200)]
    store.close()


def test_a_journal_that_makes_no_sense_is_set_aside_and_nothing_else_is_held_up(
    make: Callable[..., Process], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    dead.journal.open(["req_1", "no time", *[None] * 10])
    die(dead)
    process = make()
    process.start()
    process.put(record(1))
    wait_until(lambda: process.written == 1)
    assert "a journal with 1 requests that no store takes is set aside" in caplog.text
    assert list(path.with_name("store.db-requests").glob("*.unreadable"))


def test_a_living_process_stores_the_records_of_a_dead_one(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.storage.writer.TAKE_OVER_INTERVAL", 0.01)
    make().start()
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    dead.journal.open_record(record(1), "a/b", ENDPOINT, 1, 1)
    time.sleep(0.05)
    assert stored(path) == 0  # it lives: its request may end otherwise
    die(dead)
    wait_until(lambda: stored(path) == 1)


@pytest.mark.parametrize("read", [0, 2], ids=["unread", "partly read"])
def test_records_of_the_dead_that_could_not_be_stored_are_stored_by_the_next_try(
    path: Path, read: int
) -> None:
    writer = Writer(path, batch_size=2)
    writer.open()
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    for number in range(5):
        dead.journal.open_record(record(number), "a/b", ENDPOINT, 1, 1)
        if number < 4:
            dead.journal.seal(record(number))
    with Lock(path):
        if read:
            writer.turn()
        die(dead)
        assert not writer.finish(0.0)
    assert writer.finish()
    writer.close()
    store = Store(path)
    assert [one.status for one in store.export_records()] == [200] * 4 + [0]
    store.close()
    assert not list(path.with_name("store.db-requests").iterdir())


def test_a_writer_starts_while_the_store_takes_no_records_of_the_dead(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Store(path).close()
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    dead.journal.seal(record(1))
    die(dead)
    problems = [StoreError("the disk is full", is_transient=True)] * 2

    class Full(Store):
        def write(self, *batch: Any) -> int:
            if problems:
                raise problems.pop()
            return super().write(*batch)

    writer = Writer(path, tick=0.001, open_records=Full)
    writer.open()
    assert "records wait in the journals, the disk is full" in caplog.text
    writer.turn()
    assert "records are written again" not in caplog.text
    wait_until(lambda: bool(writer.turn() and "records are written again" in caplog.text))
    assert writer.finish()
    writer.close()
    assert stored(path) == 1


def test_a_request_that_still_runs_keeps_its_journal_and_nothing_else_does(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.accounting.journal.SEGMENT_BYTES", 4096)
    process = make(tick=0.001)
    process.start()
    longest = record(0)
    process.journal.open_record(longest, "a/b", ENDPOINT, 1, 1)
    for number in range(1, 200):
        one = record(number)
        process.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
        process.put(one)
        wait_until(lambda number=number: process.written == number)
        wait_until(lambda: bool(process.journal._spares))
    files = list(path.with_name("store.db-requests").iterdir())
    assert len(files) <= 4  # of the 30 or so that all entries would fill
    process.put(longest)
    process.close()
    assert stored(path) == 200
    assert not list(path.with_name("store.db-requests").iterdir())


def test_on_a_full_disk_losses_are_counted_and_logged_and_the_journal_recovers(
    make: Callable[..., Process],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    process = make()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        process.start()
        for number in range(10):
            one = record(number)
            process.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
            process.put(one)
        assert (process.journal.lost, process.lost, process.depth) == (20, 0, 10)
    wait_until(lambda: "has room again" in caplog.text)
    assert caplog.text.count("No space left") == 1
    process.journal.flush()
    wait_until(lambda: process.written == 10)
    process.put(record(10))
    assert process.journal.lost == 20


def test_a_record_sealed_twice_is_kept_as_it_was_sealed_last(
    make: Callable[..., Process], path: Path
) -> None:
    dead = Process(path, has_writer=False)
    dead.journal.prepare()
    one = record(1)
    dead.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
    dead.journal.seal(one)
    one.status, one.code = 499, "client_closed"
    dead.journal.seal(one)
    die(dead)
    process = make()
    process.start()
    two = record(2)
    process.journal.seal(two)
    process.journal.seal(two)
    process.put(two)
    wait_until(lambda: process.depth == 0)
    two.status = 499
    process.journal.seal(two)  # when the store has it already
    process.close()
    assert not list(path.with_name("store.db-requests").iterdir())  # nothing waits for the first
    store = Store(path)
    assert [one.status for one in store.export_records()] == [499, 499]
    store.close()


# Chores


def test_days_are_summed_and_old_records_deleted(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.storage.sqlite_records.PURGE_ROWS", 2)
    monkeypatch.setattr("hoberproxy.storage.writer.TIDY_INTERVAL", 0.01)
    process = make(keep_days=3)
    process.start()
    now = time.time()
    for number in range(10):
        process.put(Record(id=f"req_{number}", started=now - number * 86400.0, status=200))
    wait_until(lambda: stored(path) == 4)
    store = Store(path)
    assert sum(row.requests for row in store.sum_usage("day")) == 10
    store.close()


def test_the_last_use_of_a_key_is_written_down(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.storage.writer.TIDY_INTERVAL", 0.01)
    store = Store(path)
    _, row = store.create_key("x")
    process = make()
    process.start()
    process.put(Record(id="req_1", started=123.0, key_id=row.key_id))
    wait_until(lambda: store.find_key(row.key_id).last_used == 123.0)
    store.close()
