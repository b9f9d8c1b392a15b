"""The ledger on real files and threads: nothing lost, nothing twice, and the loop never waits."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from hoberproxy.access import Keyring
from hoberproxy.catalog import Endpoint, Prices
from hoberproxy.errors import AccessError
from hoberproxy.ledger import Ledger
from hoberproxy.record import Record, Row
from hoberproxy.sqlite_store import SqliteStore as Store
from hoberproxy.store import StoreError
from hoberproxy.writer import BUSY_TIMEOUT, Writer

from .patience import WAIT
from .stores import write_records

PATIENCE = WAIT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., Ledger]]:
    made: list[Ledger] = []

    def make(keyring: Keyring | None = None, **options: Any) -> Ledger:
        options = {"tick": 0.005, "reload_interval": 0.005} | options
        ledger = Ledger(path, keyring or Keyring(), **options)
        made.append(ledger)
        return ledger

    yield make
    for ledger in made:
        ledger.close()


def record(number: int) -> Record:
    return Record(id=f"req_{number}", started=float(number), status=200)


def stored(path: Path) -> int:
    db = sqlite3.connect(path)
    count: int = db.execute("SELECT COUNT(*) FROM records").fetchone()[0]
    db.close()
    return count


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)


class Lock:
    """Another process's write lock on the store."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_: object) -> None:
        self._db.execute("ROLLBACK")
        self._db.close()


def authenticates(keyring: Keyring, key: str) -> bool:
    try:
        keyring.authenticate(b"Bearer " + key.encode(), time.time())
    except AccessError:
        return False
    return True


# Records


def test_records_reach_the_store_by_themselves(make: Callable[..., Ledger], path: Path) -> None:
    ledger = make()
    ledger.start()
    for number in range(3):
        ledger.put(record(number))
    wait_until(lambda: ledger.written == 3)
    assert stored(path) == 3
    assert (ledger.depth, ledger.lost) == (0, 0)


def test_closing_writes_what_is_left(make: Callable[..., Ledger], path: Path) -> None:
    ledger = make(tick=10 * PATIENCE, batch_size=100)
    ledger.start()
    for number in range(1234):
        ledger.put(record(number))
    assert ledger.close(PATIENCE) == 0
    assert (stored(path), ledger.written, ledger.depth) == (1234, 1234, 0)


async def test_closing_from_the_loop_writes_what_is_left(
    make: Callable[..., Ledger], path: Path
) -> None:
    ledger = make(tick=10 * PATIENCE)
    ledger.start()
    ledger.put(record(1))
    assert await ledger.aclose(PATIENCE) == 0
    assert stored(path) == 1


def test_records_wait_while_the_store_is_locked_and_are_written_once(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = make(batch_size=10)
    ledger.start()
    with Lock(path):
        for number in range(35):
            ledger.put(record(number))
        wait_until(lambda: "records wait" in caplog.text)
        assert (ledger.written, ledger.depth, ledger.lost) == (0, 35, 0)
    wait_until(lambda: ledger.written == 35)
    assert (stored(path), ledger.depth, ledger.lost) == (35, 0, 0)
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
    make: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at_first(monkeypatch, 4)
    ledger = make()
    ledger.start()
    ledger.put(record(1))
    wait_until(lambda: "written again" in caplog.text)
    assert caplog.text.count("records wait") == 1
    assert (ledger.written, ledger.lost) == (1, 0)


def test_closing_does_not_sit_out_the_back_off(
    make: Callable[..., Ledger],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail_at_first(monkeypatch, 1)
    ledger = make(tick=0.5)
    ledger.start()
    ledger.put(record(1))
    wait_until(lambda: "records wait" in caplog.text)
    assert ledger.close(PATIENCE) == 0
    assert stored(path) == 1


def test_put_does_not_wait_for_a_locked_store(make: Callable[..., Ledger], path: Path) -> None:
    ledger = make()
    ledger.start()
    with Lock(path):
        for number in range(20_000):
            ledger.put(record(number))
        assert (ledger.written, ledger.depth) == (0, 20_000)  # all while the lock is held


def test_closing_on_a_locked_store_gives_up_in_time_and_says_how_many(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = make()
    ledger.start()
    with Lock(path):
        for number in range(7):
            ledger.put(record(number))
        assert ledger.close(0.05) == 7
        assert ledger._keys_thread is not None
        ledger._keys_thread.join(PATIENCE)
        assert not ledger._keys_thread.is_alive()
    assert "7 records were not written" in caplog.text


def test_closing_outlasts_a_short_lock(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = make()
    ledger.start()
    unwritten: list[int] = []
    closing = threading.Thread(target=lambda: unwritten.append(ledger.close(PATIENCE)))
    with Lock(path):
        ledger.put(record(1))
        closing.start()
        wait_until(lambda: "records wait" in caplog.text)
    closing.join()
    assert unwritten == [0]
    assert stored(path) == 1


def test_a_record_put_after_closing_is_counted_as_lost(make: Callable[..., Ledger]) -> None:
    ledger = make()
    ledger.start()
    ledger.close()
    ledger.put(record(1))
    assert (ledger.depth, ledger.lost) == (0, 1)


def test_a_backlog_is_written_without_waiting_for_ticks(
    make: Callable[..., Ledger], path: Path
) -> None:
    other = Ledger(path, Keyring(), has_writer=False)
    other.start()
    for number in range(35):
        other.put(record(number))
    make(tick=10 * PATIENCE, batch_size=10).start()
    wait_until(lambda: other.written == 35)
    other.close()


def test_what_no_table_takes_is_lost_alone(
    make: Callable[..., Ledger],
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
    ledger = make()
    ledger.start()
    for number in range(3):
        ledger.put(record(number))
    wait_until(lambda: ledger.lost == 1 and ledger.depth == 0)
    assert stored(path) == 2
    assert "1 records lost: RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_an_entry_that_makes_no_sense_is_lost_alone(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = make()
    ledger.start()
    ledger.journal._append(b'c["too few"]')
    ledger.journal._append(b"c{no json")
    ledger.journal._append(b"?[]")
    ledger.put(record(1))
    wait_until(lambda: stored(path) == 1)
    assert ledger.lost == 3
    assert "3 records lost: ValueError" in caplog.text


def test_a_journal_of_other_columns_is_read_while_its_owner_lives(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Ledger(path, Keyring(), has_writer=False)
    names = orjson.dumps([["id"], ["id", "started", "status", "from_the_future"], ["id", "cost"]])
    with monkeypatch.context() as patch:
        patch.setattr("hoberproxy.journal._NAMES", b"n" + names)
        other.journal.prepare()
        other.journal.close_request(("req_1", 5.0, 200, "?"))
    make().start()
    wait_until(lambda: stored(path) == 1)
    store = Store(path)
    assert store.find_record("req_1") == Record(id="req_1", started=5.0, status=200)
    store.close()
    other.close()


def test_amendments_reach_the_store_from_any_thread(
    make: Callable[..., Ledger], path: Path
) -> None:
    ledger = make()
    ledger.start()
    ledger.put(record(1))
    amending = threading.Thread(target=ledger.amend, args=("req_1", 7, 8, 9))
    amending.start()
    amending.join()
    ledger.tend()
    ledger.close(PATIENCE)
    store = Store(path)
    one = store.find_record("req_1")
    store.close()
    assert one is not None
    assert (one.prompt_tokens, one.completion_tokens, one.cost) == (7, 8, 9)


# One writer


def test_of_two_ledgers_one_writes_for_both(make: Callable[..., Ledger], path: Path) -> None:
    ledgers = [make(batch_size=20), make(batch_size=20)]
    for ledger in ledgers:
        ledger.start()
    for number in range(500):
        ledgers[number % 2].put(record(number))
    wait_until(lambda: sum(ledger.written for ledger in ledgers) == 500)
    assert stored(path) == 500
    writers = [ledger._writer for ledger in ledgers]
    assert [writer.written for writer in writers if writer is not None] == [500, 0]


def test_when_the_one_goes_the_other_writes(make: Callable[..., Ledger], path: Path) -> None:
    first, second = make(), make()
    first.start()
    second.start()
    second.put(record(1))
    wait_until(lambda: second.written == 1)
    first.put(record(2))
    assert first.close(PATIENCE) == 0
    second.put(record(3))
    wait_until(lambda: second.written == 2)
    assert stored(path) == 3


def test_both_may_end_at_once_and_nothing_stays_behind(
    make: Callable[..., Ledger], path: Path
) -> None:
    ledgers = [make(), make(), make()]
    for ledger in ledgers:
        ledger.start()
    for number in range(300):
        ledgers[number % 3].put(record(number))
    threads = [threading.Thread(target=ledger.close, args=(PATIENCE,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored(path) == 300
    assert not list(path.with_name("store.db-requests").iterdir())


def test_a_writer_that_died_before_it_noted_what_was_stored_doubles_nothing(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make(has_writer=False)
    ledger.start()
    for number in range(5):
        ledger.put(record(number))
    first = Writer(path)
    first.open()
    with monkeypatch.context() as patch:
        patch.setattr("hoberproxy.journals.Segment.mark", lambda segment: None)
        first.turn()
    first.close()
    assert (stored(path), ledger.depth) == (5, 5)
    second = Writer(path)
    second.open()
    second.turn()
    second.close()
    assert (stored(path), ledger.depth) == (5, 0)


def test_a_ledger_without_a_writer_leaves_its_records_to_another(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = make(has_writer=False)
    ledger.start()
    ledger.put(record(1))
    assert ledger.close() == 1
    make().start()
    assert stored(path) == 1
    assert not caplog.records  # it was not killed


# Start


def test_starting_on_a_missing_directory_says_so(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "nowhere" / "store.db", Keyring())
    with pytest.raises(StoreError, match="nowhere"):
        ledger.start()
    assert ledger.close() == 0


def test_starting_on_a_file_that_is_no_database_says_so(
    make: Callable[..., Ledger], path: Path
) -> None:
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        make().start()


def test_starting_waits_while_another_process_sets_the_store_up(
    make: Callable[..., Ledger], path: Path
) -> None:
    Store(path).close()
    ledger = make()
    starting = threading.Thread(target=ledger.start)
    with Lock(path):
        starting.start()
        time.sleep(2 * BUSY_TIMEOUT)
        assert starting.is_alive()
    starting.join()
    ledger.put(record(1))
    wait_until(lambda: ledger.written == 1)


def test_the_keys_are_known_as_soon_as_it_has_started(
    make: Callable[..., Ledger], path: Path
) -> None:
    store = Store(path)
    key, _ = store.create_key("x")
    store.close()
    keyring = Keyring()
    make(keyring).start()
    assert authenticates(keyring, key)


def test_a_ledger_never_started_closes_at_once(make: Callable[..., Ledger]) -> None:
    assert make().close() == 0


# Keys


def test_keys_made_and_revoked_elsewhere_take_effect(
    make: Callable[..., Ledger], path: Path
) -> None:
    keyring = Keyring()
    make(keyring).start()
    store = Store(path)
    key, row = store.create_key("x")
    wait_until(lambda: authenticates(keyring, key))
    store.revoke_key(row.key_id)
    wait_until(lambda: not authenticates(keyring, key))
    store.close()


def test_keys_are_reloaded_while_records_cannot_be_written(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: Store, *batch: list[Row]) -> int:
        raise StoreError("the disk is full", is_transient=True)

    monkeypatch.setattr(Store, "write", refuse)
    keyring = Keyring()
    ledger = make(keyring)
    ledger.start()
    ledger.put(record(1))
    store = Store(path)
    key, _ = store.create_key("x")
    store.close()
    wait_until(lambda: authenticates(keyring, key))
    assert ledger.depth == 1
    ledger.close(0.01)


def test_records_of_another_process_are_no_reason_to_load_keys(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    looks: list[int] = []
    load, look = Store.load_keys, Store.keys_version
    monkeypatch.setattr(Store, "load_keys", lambda store, _: loads.append(1) or load(store))
    monkeypatch.setattr(Store, "keys_version", lambda store: looks.append(1) or look(store))
    make().start()
    store = Store(path)
    for number in range(3):
        seen = len(looks)
        write_records(store, [record(number)])
        wait_until(lambda seen=seen: len(looks) > seen)
    store.close()
    time.sleep(0.05)  # several turns more
    assert len(loads) == 1
    assert len(looks) == 1 + 3  # and without a write there is not even a look


def test_keys_stay_in_force_while_they_cannot_be_reloaded(
    make: Callable[..., Ledger],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store(path)
    key, _ = store.create_key("x")
    keyring = Keyring()
    make(keyring).start()
    with monkeypatch.context() as patch:

        def fail(store: Store) -> int:
            raise StoreError("cannot read: disk I/O error", is_transient=True)

        patch.setattr(Store, "data_version", fail)
        wait_until(lambda: "keys cannot be reloaded" in caplog.text)
        time.sleep(0.05)  # several turns more
        assert authenticates(keyring, key)
    assert caplog.text.count("keys cannot be reloaded") == 1
    other, _ = store.create_key("y")
    wait_until(lambda: authenticates(keyring, other))
    store.close()


# What a killed process leaves


ENDPOINT = Endpoint("east", "m", prices=Prices(Decimal(1), Decimal(2)))


def die(ledger: Ledger) -> None:
    """Let go of the journal as a killed process does: nothing is written any more."""
    assert ledger._keys_thread is None, "a thread would use it"
    for segment in [*ledger.journal._in_use(), *ledger.journal._spares]:
        segment.close()


def test_what_a_killed_process_did_not_write_is_taken_over(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
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


def test_what_is_in_the_store_already_is_not_taken_over_again(
    make: Callable[..., Ledger], path: Path
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
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


def test_what_stands_around_a_hole_is_taken_over_once_and_the_file_is_kept(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
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
    ledger = make()
    ledger.start()
    kept = file.with_suffix(".unreadable")
    assert kept.read_bytes() == data
    assert ledger.unreadable == 1
    store = Store(path)
    ended = {one.id for one in store.export_records() if one.status == 200}
    lost = {one.id for one in store.export_records() if one.code == "lost"}
    # The last one before the hole may reach into it.
    assert {record(n).id for n in whole} - ended <= {record(max(whole - {*range(20, 60)})).id}
    assert len(ended | lost) == len(ended) + len(lost) < 60
    ledger.close()
    make().start()
    assert len(list(store.export_records())) == len(ended | lost)
    store.close()
    assert caplog.text.count("damaged; ") == 1
    assert [each.suffix for each in kept.parent.iterdir() if each.stem == kept.stem] == [
        ".unreadable"
    ]


def test_what_no_store_takes_keeps_no_other_request_of_the_journal_out(
    make: Callable[..., Ledger], path: Path
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
    dead.journal.prepare()
    dead.journal.open(["req_1", "no time", *[None] * 10])
    dead.journal.seal(record(2))
    dead.journal.open_record(record(3), "a/b", ENDPOINT, 1, 1)
    die(dead)
    ledger = make()
    ledger.start()
    store = Store(path)
    assert [one.id for one in store.export_records()] == [record(2).id, record(3).id]
    store.close()
    assert (ledger.lost, ledger.unreadable) == (1, 1)


def test_an_amendment_does_not_stand_for_an_end_that_is_damaged(
    make: Callable[..., Ledger], path: Path
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
    dead.journal.prepare()
    dead.journal.open_record(record(1), "a/b", ENDPOINT, 1, 1)
    dead.journal.amend([record(1).id, 5, 6, 7])
    die(dead)
    make().start()
    store = Store(path)
    (lost,) = store.export_records()
    assert (lost.code, lost.prompt_tokens, lost.completion_tokens) == ("lost", 5, 6)
    store.close()


def test_what_another_version_wrote_is_taken_over_as_far_as_it_is_known(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
    names = orjson.dumps([["id"], ["id", "started", "status", "from_the_future"]])
    monkeypatch.setattr("hoberproxy.journal._NAMES", b"n" + names)
    dead.journal.prepare()
    dead.journal.close_request(("req_1", 5.0, 200, "?"))
    die(dead)
    monkeypatch.undo()
    make().start()
    store = Store(path)
    assert list(store.export_records()) == [Record(id="req_1", started=5.0, status=200)]
    store.close()


def test_a_journal_that_makes_no_sense_is_set_aside_and_nothing_else_is_held_up(
    make: Callable[..., Ledger], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
    dead.journal.prepare()
    dead.journal.open(["req_1", "no time", *[None] * 10])
    die(dead)
    ledger = make()
    ledger.start()
    ledger.put(record(1))
    wait_until(lambda: ledger.written == 1)
    assert "a journal with 1 requests that no store takes is set aside" in caplog.text
    assert list(path.with_name("store.db-requests").glob("*.unreadable"))


def test_a_living_process_takes_over_what_another_leaves(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.writer.TAKE_OVER_INTERVAL", 0.01)
    make().start()
    dead = Ledger(path, Keyring(), has_writer=False)
    dead.journal.prepare()
    dead.journal.open_record(record(1), "a/b", ENDPOINT, 1, 1)
    time.sleep(0.05)
    assert stored(path) == 0  # it lives: its request may end otherwise
    die(dead)
    wait_until(lambda: stored(path) == 1)


@pytest.mark.parametrize("read", [0, 2], ids=["unread", "partly read"])
def test_what_the_store_did_not_take_over_is_taken_over_by_the_next_try(
    path: Path, read: int
) -> None:
    writer = Writer(path, batch_size=2)
    writer.open()
    dead = Ledger(path, Keyring(), has_writer=False)
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


def test_a_writer_starts_though_the_store_takes_nothing_of_the_dead_yet(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Store(path).close()
    dead = Ledger(path, Keyring(), has_writer=False)
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
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.journal.SEGMENT_BYTES", 4096)
    ledger = make(tick=0.001)
    ledger.start()
    longest = record(0)
    ledger.journal.open_record(longest, "a/b", ENDPOINT, 1, 1)
    for number in range(1, 200):
        one = record(number)
        ledger.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
        ledger.put(one)
        wait_until(lambda number=number: ledger.written == number)
        wait_until(lambda: bool(ledger.journal._spares))
    files = list(path.with_name("store.db-requests").iterdir())
    assert len(files) <= 4  # of the 30 or so that all entries would fill
    ledger.put(longest)
    ledger.close()
    assert stored(path) == 200
    assert not list(path.with_name("store.db-requests").iterdir())


def test_on_a_full_disk_the_loss_is_counted_and_told_and_the_journal_comes_back(
    make: Callable[..., Ledger],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = make()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        ledger.start()
        for number in range(10):
            one = record(number)
            ledger.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
            ledger.put(one)
        assert (ledger.journal_lost, ledger.lost, ledger.depth) == (20, 0, 10)
    wait_until(lambda: "has room again" in caplog.text)
    assert caplog.text.count("No space left") == 1
    ledger.tend()
    wait_until(lambda: ledger.written == 10)
    ledger.put(record(10))
    assert ledger.journal_lost == 20


def test_a_record_sealed_twice_is_kept_as_it_was_sealed_last(
    make: Callable[..., Ledger], path: Path
) -> None:
    dead = Ledger(path, Keyring(), has_writer=False)
    dead.journal.prepare()
    one = record(1)
    dead.journal.open_record(one, "a/b", ENDPOINT, 1, 1)
    dead.journal.seal(one)
    one.status, one.code = 499, "client_closed"
    dead.journal.seal(one)
    die(dead)
    ledger = make()
    ledger.start()
    two = record(2)
    ledger.journal.seal(two)
    ledger.journal.seal(two)
    ledger.put(two)
    wait_until(lambda: ledger.depth == 0)
    two.status = 499
    ledger.journal.seal(two)  # when the store has it already
    ledger.close()
    assert not list(path.with_name("store.db-requests").iterdir())  # nothing waits for the first
    store = Store(path)
    assert [one.status for one in store.export_records()] == [499, 499]
    store.close()


# Chores


def test_days_are_summed_and_old_records_deleted(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.sqlite_store.PURGE_ROWS", 2)
    monkeypatch.setattr("hoberproxy.writer.TIDY_INTERVAL", 0.01)
    ledger = make(keep_days=3)
    ledger.start()
    now = time.time()
    for number in range(10):
        ledger.put(Record(id=f"req_{number}", started=now - number * 86400.0, status=200))
    wait_until(lambda: stored(path) == 4)
    store = Store(path)
    assert sum(row.requests for row in store.sum_usage("day")) == 10
    store.close()


def test_the_last_use_of_a_key_is_written_down(
    make: Callable[..., Ledger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.writer.TIDY_INTERVAL", 0.01)
    store = Store(path)
    _, row = store.create_key("x")
    ledger = make()
    ledger.start()
    ledger.put(Record(id="req_1", started=123.0, key_id=row.key_id))
    wait_until(lambda: store.find_key(row.key_id).last_used == 123.0)
    store.close()
