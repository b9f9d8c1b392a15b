"""What every store has to do, whatever it is made of; the writer's and the workers' part of it.

Another kind of store is one more line in STORES.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hoberproxy.access import hash_key
from hoberproxy.record import COLUMNS, Record, Row, make_row, parse_row
from hoberproxy.sqlite_store import open_store
from hoberproxy.store import DAY, Amendment, Keys, Records, Store, StoreError
from hoberproxy.writer import Writer

from .recording import Process
from .stores import MemoryRecords

START = 1_700_000_000.0


@dataclass
class Case:
    """A store, how to see what is in it, and how to lock it."""

    records: Records
    stored: Callable[[], dict[str, Record]]
    used: Callable[[str], float | None]
    locked: Callable[[], object]


def sqlite_case(path: Path) -> Case:
    store = open_store(path, busy_timeout=0.01)

    def used(key_id: str) -> float | None:
        with closing(sqlite3.connect(path)) as db:
            row = db.execute("SELECT last_used FROM key_uses WHERE key_id = ?", (key_id,))
            found = row.fetchone()
        return found[0] if found else None

    @contextmanager
    def locked() -> Iterator[None]:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield

    def stored() -> dict[str, Record]:
        with closing(sqlite3.connect(path)) as db:
            rows = db.execute(f"SELECT {', '.join(COLUMNS)} FROM records").fetchall()
        return {row[0]: parse_row(row) for row in rows}

    return Case(store, stored, used, locked)


def memory_case(path: Path) -> Case:
    store = MemoryRecords()

    @contextmanager
    def locked() -> Iterator[None]:
        store.is_locked = True
        yield
        store.is_locked = False

    def stored() -> dict[str, Record]:
        return {name: parse_row(row) for name, row in store.rows.items()}  # type: ignore[arg-type]

    return Case(store, stored, store.uses.get, locked)


STORES = {"sqlite": sqlite_case, "memory": memory_case}


@pytest.fixture(params=STORES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    case = STORES[request.param](tmp_path / "store.db")
    yield case
    case.records.close()


def row(name: str, **values: object) -> Row:
    return make_row(Record(**{"id": name, "started": START, "status": 200} | values))  # type: ignore[arg-type]


def test_a_batch_can_be_written_again(case: Case) -> None:
    batch = [row("req_1"), row("req_2", events=3)]
    assert case.records.write(batch) == 2
    assert case.records.write([*batch, row("req_3")]) == 1
    assert set(case.stored()) == {"req_1", "req_2", "req_3"}
    assert case.stored()["req_2"].events == 3


def test_the_first_row_of_an_id_stays_unless_it_is_revised(case: Case) -> None:
    case.records.write([row("req_1", status=200)])
    case.records.write([row("req_1", status=500)])
    assert case.stored()["req_1"].status == 200
    case.records.write([row("req_2")], [row("req_1", status=499), row("req_3", status=502)])
    assert {name: one.status for name, one in case.stored().items()} == {
        "req_1": 499,
        "req_2": 200,
        "req_3": 502,
    }


def test_an_amendment_stands_in_place_of_an_estimate_alone(case: Case) -> None:
    rows = [row("req_1", estimated=True), row("req_2", has_usage=True, prompt_tokens=5)]
    amendments = [Amendment(name, 7, 8, 9) for name in ("req_1", "req_2", "req_unknown")]
    case.records.write(rows, (), amendments)
    one, two = case.stored()["req_1"], case.stored()["req_2"]
    assert (one.prompt_tokens, one.completion_tokens, one.cost, one.estimated) == (7, 8, 9, False)
    assert (two.prompt_tokens, two.cost) == (5, None)


def test_nothing_is_changed_while_it_is_locked_and_the_error_says_that_it_may_pass(
    case: Case,
) -> None:
    case.records.write([row("req_0", estimated=True)])
    with case.locked():  # type: ignore[attr-defined]
        with pytest.raises(StoreError) as caught:
            case.records.write([row("req_1")], [row("req_2")], [Amendment("req_0", 1, 1, 1)])
        assert caught.value.is_transient
    assert list(case.stored()) == ["req_0"]
    assert case.stored()["req_0"].estimated


def test_the_latest_use_of_a_key_counts(case: Case) -> None:
    case.records.note_uses({"key_1": 5.0, "key_2": 1.0})
    case.records.note_uses({"key_1": 3.0})
    assert (case.used("key_1"), case.used("key_2"), case.used("key_3")) == (5.0, 1.0, None)


def test_only_records_of_summed_days_are_deleted(case: Case) -> None:
    case.records.write([row(f"req_{n}", started=START - n * DAY) for n in range(5)])
    assert case.records.delete_records(math.floor(START)) == 0
    case.records.sum_days(START - DAY)
    while case.records.delete_records(START):
        pass
    assert set(case.stored()) == {"req_0", "req_1"}


def test_the_writer_moves_records_into_any_of_them(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    process = Process(path, has_writer=False)
    process.start()
    for number in range(5):
        process.put(Record(id=f"req_{number}", started=START, key_id="key_1", estimated=True))
    process.journal.amend(["req_1", 1, 2, 3])
    writer = Writer(path, open_records=lambda _: case.records)
    writer.open()
    with case.locked():  # type: ignore[attr-defined]
        writer.turn()
        assert process.depth == 5
    writer.finish()
    assert process.depth == 0
    assert set(case.stored()) == {f"req_{number}" for number in range(5)}
    assert case.stored()["req_1"].cost == 3
    assert case.used("key_1") == START
    writer.close()
    process.close()


# The keys, which a store in memory has no use for


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "store.db")
    yield store
    store.close()


def test_others_writes_move_the_version_and_only_keys_that_of_keys(
    store: Store, tmp_path: Path
) -> None:
    keys: Keys = store
    before = keys.data_version(), keys.keys_version()
    other = open_store(tmp_path / "store.db")
    other.write([row("req_1")])
    after = keys.data_version(), keys.keys_version()
    assert after[0] != before[0] and after[1] == before[1]
    key, made = other.create_key("x")
    assert keys.keys_version() != before[1]
    assert replace(keys.load_keys()[hash_key(key)], label="y").key_id == made.key_id
    other.close()
