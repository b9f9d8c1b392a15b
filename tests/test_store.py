"""The store on real files: schema, records exactly once, keys, sums, and files it must refuse."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hoberproxy import database as database_module
from hoberproxy.access import Caller, Keyring, hash_key, is_well_formed
from hoberproxy.database import MIGRATIONS
from hoberproxy.errors import AccessError, FailedAttempt
from hoberproxy.limits import PICO, History, KeyLimits
from hoberproxy.record import Record
from hoberproxy.sqlite_store import SqliteStore as Store
from hoberproxy.store import Amendment, StoreError, UsageRow

from .stores import write_records

DAY = 86_400.0
START = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, clock=lambda: START)
    yield store
    store.close()


def record(record_id: str = "req_1", **values: Any) -> Record:
    return Record(**{"id": record_id, "started": START, "status": 200} | values)


FULL = Record(
    id="req_full",
    started=START + 0.123456,
    key_id="key_1",
    key_label="team-a",
    path="/v1/chat/completions",
    requested=("a/b", "c/d"),
    slug="c/d",
    provider="east",
    upstream_model="d-2024",
    upstream_id="chatcmpl-9",
    client_request_id="theirs\\x0a",
    streamed=True,
    status=502,
    code="upstream_error",
    phase="content",
    finish_reason="stop",
    attempts=2,
    failures=(FailedAttempt("west", 503, "upstream_error", "head", 12),),
    prompt_tokens=1,
    completion_tokens=2,
    reasoning_tokens=3,
    cached_tokens=4,
    cache_write_tokens=9,
    has_usage=True,
    estimated=True,
    events=5,
    bytes_out=6,
    first_content=0.25,
    total=1.5,
)


# File


def test_a_new_store_is_readable_by_its_owner_only(store: Store, path: Path) -> None:
    write_records(store, [record()])
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["store.db", "store.db-shm", "store.db-wal"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_the_file_is_in_wal_mode_so_that_readers_do_not_wait(store: Store, path: Path) -> None:
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"directory .*nowhere to exist"):
        Store(tmp_path / "nowhere" / "store.db")


def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot open"):
        Store(tmp_path)


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"listen = 8080\n" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Store(path)
    assert path.read_bytes() == b"listen = 8080\n" * 100


def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE songs (title)")
    db.commit()
    with pytest.raises(StoreError, match="another program"):
        Store(path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("songs",)]
    db.close()


def test_a_second_close_does_nothing(path: Path) -> None:
    store = Store(path)
    store.close()
    store.close()


def test_many_threads_may_open_a_new_file_at_once(path: Path) -> None:
    failures: list[StoreError] = []
    gate = threading.Barrier(8)

    def open_and_close() -> None:
        gate.wait()
        try:
            Store(path).close()
        except StoreError as exc:
            failures.append(exc)

    threads = [threading.Thread(target=open_and_close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_opening_survives_the_lock_of_another_that_opens_the_new_file_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seen with four processes at once in 7 of 400 tries: SQLite answers without its own wait.
    busy = iter(range(3))

    class Contended(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if "journal_mode" in statement and next(busy, None) is not None:
                exc = sqlite3.OperationalError("database is locked")
                exc.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise exc
            return super().execute(statement, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **kw: connect(*a, factory=Contended, **kw))
    Store(path).close()
    assert next(busy, None) is None
    busy = iter(range(3))
    with pytest.raises(StoreError, match="locked") as caught:
        Store(path, busy_timeout=0.0)
    assert caught.value.is_transient


# Schema


def test_opening_again_keeps_what_is_there(path: Path) -> None:
    first = Store(path)
    write_records(first, [FULL])
    first.close()
    second = Store(path)
    assert second.find_record("req_full") == FULL
    second.close()


def test_an_older_file_is_brought_forward_with_its_data(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Store(path)
    write_records(old, [FULL])
    old.close()
    later = (("CREATE TABLE extras (x)",), ("INSERT INTO extras SELECT id FROM records",))
    monkeypatch.setattr(database_module, "MIGRATIONS", database_module.MIGRATIONS + later)
    for _ in range(2):  # the second time there is nothing left to do
        Store(path).close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT x FROM extras").fetchall() == [("req_full",)]
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 2,)
    db.close()


def test_a_migration_that_fails_leaves_the_old_version(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(path).close()
    broken = (("CREATE TABLE extras (x)", "INSERT INTO nowhere VALUES (1)"),)
    monkeypatch.setattr(database_module, "MIGRATIONS", database_module.MIGRATIONS + broken)
    with pytest.raises(StoreError, match="nowhere"):
        Store(path)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert db.execute("SELECT name FROM sqlite_master WHERE name = 'extras'").fetchall() == []
    db.close()


def test_a_newer_schema_is_refused(path: Path) -> None:
    Store(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="version 99; a newer hoberproxy"):
        Store(path)


def test_a_file_of_a_version_before_the_first_release_is_refused_and_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
    db.execute("INSERT INTO schema_version VALUES (1)")
    db.commit()
    with pytest.raises(StoreError, match="before the first release; export"):
        Store(path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("schema_version",)]
    db.close()


# Records


def test_a_record_comes_back_as_it_went_in(store: Store) -> None:
    write_records(store, [FULL])
    assert store.find_record("req_full") == FULL


def test_a_bare_record_comes_back_too(store: Store) -> None:
    write_records(store, [bare := record()])
    assert store.find_record("req_1") == bare


def test_an_unknown_record_is_none(store: Store) -> None:
    assert store.find_record("req_1") is None


def test_a_record_is_written_exactly_once(store: Store) -> None:
    assert write_records(store, [record(prompt_tokens=1)]) == 1
    assert write_records(store, [record(prompt_tokens=2), record("req_2")]) == 1
    found = store.find_record("req_1")
    assert found is not None and found.prompt_tokens == 1


@pytest.mark.parametrize("count", [0, 1, 249, 250, 251, 1000])
def test_a_batch_of_any_size_is_written_whole(store: Store, count: int) -> None:
    assert write_records(store, [record(f"req_{n}") for n in range(count)]) == count
    assert sum(row.requests for row in store.sum_usage("status")) == count


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"prompt_tokens": 10**30}, id="a number beyond 64 bits"),
        pytest.param({"upstream_id": "\ud800"}, id="half a surrogate pair"),
        pytest.param({"requested": ("\udfff",)}, id="half a surrogate pair in a list"),
        pytest.param({"total": math.nan}, id="not a number"),
        pytest.param(
            {"failures": (FailedAttempt("\ud800", 10**30, "", "", 1),)}, id="within a failure"
        ),
    ],
)
def test_a_value_no_column_holds_blocks_neither_its_record_nor_others(
    store: Store, values: dict[str, Any]
) -> None:
    assert write_records(store, [record("req_1"), record("bad", **values), FULL]) == 3
    assert store.find_record("bad") is not None
    assert store.find_record("req_full") == FULL


def test_long_text_of_others_is_cut(store: Store) -> None:
    write_records(
        store, [record(slug="s" * 999, requested=("r" * 999,) * 99, upstream_id="u" * 999)]
    )
    found = store.find_record("req_1")
    assert found is not None
    assert (len(found.slug), len(found.upstream_id)) == (256, 128)
    assert found.requested == ("r" * 256,) * 32


def test_a_full_disk_is_a_passing_failure_that_writes_nothing(store: Store) -> None:
    batch = [record(f"req_{n}", upstream_id="x" * 128) for n in range(2000)]
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(StoreError, match="full") as caught:
        write_records(store, batch)
    assert caught.value.is_transient
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert write_records(store, batch) == 2000


def test_a_lock_of_another_process_is_a_passing_failure(path: Path) -> None:
    store = Store(path, busy_timeout=0.0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked") as caught:
        write_records(store, [record()])
    assert caught.value.is_transient
    other.execute("ROLLBACK")
    assert write_records(store, [record()]) == 1
    other.close()
    store.close()


# Usage


def usage(rows: list[UsageRow]) -> dict[str, int]:
    return {row.name: row.requests for row in rows}


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("key", {"key_1": 2, "key_2": 1}),
        ("model", {"a/b": 2, "": 1}),
        ("provider", {"east": 2, "": 1}),
        ("day", {"2023-11-14": 2, "2023-11-15": 1}),
        ("status", {"200": 2, "404": 1}),
    ],
)
def test_usage_is_summed_by_what_was_asked(store: Store, by: str, names: dict[str, int]) -> None:
    write_records(
        store,
        [
            record("r1", key_id="key_1", slug="a/b", provider="east"),
            record("r2", key_id="key_1", slug="a/b", provider="east"),
            record("r3", key_id="key_2", status=404, code="x", started=START + DAY),
        ],
    )
    assert usage(store.sum_usage(by)) == names


def test_usage_adds_tokens_and_averages_the_time_to_first_content(store: Store) -> None:
    write_records(
        store,
        [
            record(
                "r1",
                prompt_tokens=10,
                completion_tokens=20,
                cached_tokens=5,
                cache_write_tokens=3,
                first_content=0.2,
            ),
            record("r2", prompt_tokens=1, completion_tokens=9, estimated=True, first_content=0.4),
            record("r3", status=502, code="upstream_error"),
        ],
    )
    (row,) = store.sum_usage("provider")
    assert (row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (11, 29, 5)
    assert row.cache_write_tokens == 3
    assert row.estimated_share == pytest.approx(10 / 40)
    assert row.first_content == pytest.approx(0.3)


def test_a_group_without_content_or_tokens_divides_by_nothing(store: Store) -> None:
    write_records(store, [record(status=404, code="model_not_found")])
    (row,) = store.sum_usage("status")
    assert (row.estimated_share, row.first_content) == (0.0, None)


def test_sums_beyond_64_bits_do_not_fail(store: Store) -> None:
    write_records(store, [record(f"r{n}", prompt_tokens=2**63 - 1) for n in range(3)])
    assert store.sum_usage("model")[0].prompt_tokens == 2**63 - 1


def test_failures_are_counted_as_the_record_counts_them(store: Store) -> None:
    outcomes = [(200, ""), (200, "upstream_error"), (404, "x"), (499, "client_closed"), (0, "")]
    records = [
        record(f"r{n}", status=status, code=code) for n, (status, code) in enumerate(outcomes)
    ]
    write_records(store, records)
    (row,) = store.sum_usage("model")
    assert row.failed == sum(one.is_failure for one in records) == 3


def test_the_span_takes_its_start_and_leaves_its_end(store: Store) -> None:
    write_records(store, [record(f"r{n}", started=START + n) for n in range(4)])
    assert usage(store.sum_usage("model", START + 1, START + 3)) == {"": 2}
    assert usage(store.sum_usage("model", since=START + 3)) == {"": 1}
    assert usage(store.sum_usage("model", until=START)) == {}


def test_most_used_comes_first_and_days_in_their_order(store: Store) -> None:
    write_records(
        store,
        [
            record("r1", slug="a", started=START + DAY),
            record("r2", slug="b", started=START),
            record("r3", slug="b", started=START + DAY),
        ],
    )
    assert [row.name for row in store.sum_usage("model")] == ["b", "a"]
    assert [row.name for row in store.sum_usage("day")] == ["2023-11-14", "2023-11-15"]


def test_a_key_is_shown_by_its_latest_label(store: Store) -> None:
    write_records(
        store,
        [
            record("r1", key_id="key_1", key_label="new", started=START + 2),
            record("r2", key_id="key_1", key_label="old", started=START),
        ],
    )
    assert store.sum_usage("key")[0].label == "new"


def test_usage_by_something_else_names_what_there_is(store: Store) -> None:
    with pytest.raises(StoreError, match="key, model, provider, day, status"):
        store.sum_usage("id; DROP TABLE records")


# Keys


def test_a_created_key_is_a_key_and_kept_as_a_hash_only(store: Store, path: Path) -> None:
    key, row = store.create_key("team-a", kind="test", expires=START + DAY)
    assert is_well_formed(key) and key.startswith("hb_test_")
    assert (row.label, row.kind, row.created, row.expires) == ("team-a", "test", START, START + DAY)
    caller = store.load_keys()[hash_key(key)]
    assert (caller.key_id, caller.label, caller.expires) == (row.key_id, "team-a", START + DAY)
    files = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"team-a" in files and key[8:-4].encode() not in files


def test_no_two_keys_are_the_same(store: Store) -> None:
    keys = [store.create_key("x") for _ in range(20)]
    assert len({key for key, _ in keys}) == len({row.key_id for _, row in keys}) == 20


@pytest.mark.parametrize("label", ["", "   ", "x" * 65, "a\nb", "a\x1b[31m"])
def test_a_label_that_would_spoil_a_log_is_refused(store: Store, label: str) -> None:
    with pytest.raises(StoreError, match="1 to 64 printable"):
        store.create_key(label)


def test_a_key_of_an_unknown_kind_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="live and test"):
        store.create_key("x", kind="prod")


@pytest.mark.parametrize("by", ["id", "hint", "the key itself"])
def test_a_key_is_revoked_by(store: Store, by: str) -> None:
    store.create_key("other")
    key, row = store.create_key("team-a")
    revoked = store.revoke_key({"id": row.key_id, "hint": row.hint, "the key itself": key}[by])
    assert (revoked.key_id, revoked.revoked) == (row.key_id, START)
    assert [one.revoked for one in store.list_keys() if one.label == "other"] == [None]
    ring = Keyring()
    ring.replace(store.load_keys())
    with pytest.raises(Exception, match="revoked"):
        ring.authenticate(b"Bearer " + key.encode(), START)


def test_revoking_again_keeps_the_first_time(path: Path) -> None:
    times = iter([START, START + 1, START + 2])
    store = Store(path, clock=lambda: next(times))
    _, row = store.create_key("x")
    assert store.revoke_key(row.key_id).revoked == START + 1
    assert store.revoke_key(row.key_id).revoked == START + 1
    store.close()


def test_a_hint_of_two_keys_revokes_neither(store: Store) -> None:
    rows = [store.create_key("x")[1] for _ in range(2)]
    store._db.execute("UPDATE keys SET hint = 'hb_live_...same'")
    with pytest.raises(StoreError) as caught:
        store.revoke_key("hb_live_...same")
    assert all(row.key_id in str(caught.value) for row in rows)
    assert [row.revoked for row in store.list_keys()] == [None, None]


def test_revoking_an_unknown_key_does_not_show_it(store: Store) -> None:
    with pytest.raises(StoreError) as caught:
        store.revoke_key("hb_live_secret")
    assert "secret" not in str(caught.value)


def test_another_connections_change_of_a_key_is_seen(store: Store, path: Path) -> None:
    other = Store(path)
    versions = store.data_version(), store.keys_version()
    write_records(other, [record()])
    assert store.data_version() != versions[0]
    assert store.keys_version() == versions[1]  # a record is no reason to load keys
    _, row = other.create_key("x")
    created = store.keys_version()
    other.revoke_key(row.key_id)
    assert versions[1] < created < store.keys_version()
    other.close()


def test_a_key_deleted_by_hand_counts_as_a_change(store: Store, path: Path) -> None:
    store.create_key("x")
    version = store.keys_version()
    db = sqlite3.connect(path)
    db.execute("DELETE FROM keys")
    db.commit()
    db.close()
    assert store.keys_version() > version


# Limits, rotation, last use


LIMITS = KeyLimits(10, 1000, 100, 4, 5 * PICO, "month")


def caller_of(store: Store, key: str) -> Caller:
    return store.load_keys()[hash_key(key)]


def test_limits_and_models_of_a_key_reach_its_caller(store: Store) -> None:
    key, row = store.create_key("x", limits=LIMITS, models=["deepseek/*"])
    caller = caller_of(store, key)
    assert (caller.limits, caller.models) == (LIMITS, ("deepseek/*",))
    assert caller.may_use("deepseek/chat") and not caller.may_use("openai/gpt")
    assert store.find_key(row.key_id) == row


def test_a_key_without_limits_has_none_to_look_at(store: Store) -> None:
    key, _ = store.create_key("x")
    assert caller_of(store, key).limits is None


def test_an_update_changes_what_it_names(store: Store) -> None:
    key, row = store.create_key("x", limits=LIMITS)
    changes = {"label": "y", "concurrency": None, "budget": 7, "expires": START + 1}
    changed = store.update_key(row.hint, changes)
    assert changed == store.find_key(row.key_id)
    assert changed.limits == replace(LIMITS, concurrency=None, budget=7)
    assert (changed.label, changed.expires) == ("y", START + 1)
    assert caller_of(store, key).label == "y"


@pytest.mark.parametrize(
    "changes",
    [
        {"requests_per_minute": 0},
        {"concurrency": -1},
        {"tokens_per_minute": 2**60},
        {"budget": -1},
        {"budget_period": "year"},
        {"models": ["a\nb"]},
        {"models": ["x"] * 65},
        {"label": ""},
    ],
)
def test_an_update_that_makes_no_sense_changes_nothing(
    store: Store, changes: dict[str, Any]
) -> None:
    _, row = store.create_key("x", limits=LIMITS)
    with pytest.raises(StoreError, match="expected"):
        store.update_key(row.key_id, changes)
    assert store.find_key(row.key_id) == row


def test_the_old_key_works_for_a_while_after_a_rotation(store: Store) -> None:
    old, row = store.create_key("x", limits=LIMITS)
    new, rotated = store.rotate_key(row.key_id, 60.0)
    ring = Keyring()
    ring.replace(store.load_keys())
    for key in (old, new):
        caller = ring.authenticate(b"Bearer " + key.encode(), START + 59)
        assert (caller.key_id, caller.limits) == (row.key_id, LIMITS)
    with pytest.raises(AccessError, match="expired"):
        ring.authenticate(b"Bearer " + old.encode(), START + 60)
    ring.authenticate(b"Bearer " + new.encode(), START + 60)
    assert rotated.hint != row.hint and rotated.old_until == START + 60
    store.rotate_key(row.key_id, 60.0)  # the oldest of three stops at once
    with pytest.raises(KeyError):
        caller_of(store, old)


def test_a_revoked_key_is_not_rotated(store: Store) -> None:
    _, row = store.create_key("x")
    store.revoke_key(row.key_id)
    with pytest.raises(StoreError, match="revoked"):
        store.rotate_key(row.key_id, 60.0)


def test_the_last_use_of_a_key_is_no_reason_to_load_keys(store: Store) -> None:
    _, row = store.create_key("x")
    version = store.keys_version()
    store.note_uses({row.key_id: START})
    store.note_uses({row.key_id: START - 5})
    assert store.find_key(row.key_id).last_used == START
    assert store.keys_version() == version


# History, days, retention


def spend(number: int, started: float, cost: int | None = 5, **values: Any) -> Record:
    values = values or {"key_id": "key_1", "attempts": 1}
    return record(f"req_{number}", started=started, cost=cost, **values)


def test_history_is_today_this_month_and_in_all(store: Store) -> None:
    write_records(
        store,
        [
            spend(1, START),
            spend(2, START, None),
            spend(3, START, 9, key_id="key_2", attempts=1),
            spend(4, START, 0, key_id="key_1"),  # refused: not tried anywhere
            spend(5, START - DAY),
            spend(6, START - 20 * DAY),
        ],
    )
    today = int(START // DAY)
    expected = History(today, day_requests=2, day_spent=5, month_spent=10, total_spent=15)
    assert store.sum_history("key_1") == expected
    store.sum_days(START)
    assert store.sum_history("key_1") == expected


def test_sums_stay_when_days_are_summed_and_their_records_deleted(store: Store) -> None:
    write_records(
        store,
        [
            record(
                f"req_{number}",
                started=START - number * DAY / 4,
                key_id=f"key_{number % 2}",
                slug=f"m{number % 3}",
                provider="east",
                status=(200, 502)[number % 2],
                cost=(None, 10**12)[number % 2],
                attempts=1,
                prompt_tokens=number,
                cache_write_tokens=number // 2,
                first_content=0.5,
            )
            for number in range(40)
        ],
    )
    before = {by: store.sum_usage(by) for by in ("key", "model", "provider", "day", "status")}
    store.sum_days(START)
    assert {by: store.sum_usage(by) for by in before} == before
    deleted = store.delete_records(START - 2 * DAY)
    assert 0 < deleted < 40 and store.delete_records(START - 2 * DAY) == 0
    assert {by: store.sum_usage(by) for by in before} == before
    since = START // DAY * DAY - 3 * DAY
    assert sum(row.requests for row in store.sum_usage("key", since)) == 16


def test_days_not_yet_summed_are_not_deleted(store: Store) -> None:
    write_records(store, [spend(1, START - 9 * DAY)])
    assert store.delete_records(START) == 0


def test_a_record_that_comes_late_is_summed_with_its_day(store: Store) -> None:
    write_records(store, [spend(1, START - DAY)])
    store.sum_days(START)
    write_records(store, [spend(2, START - DAY)])
    assert [row.requests for row in store.sum_usage("day")] == [2]
    store.sum_days(START)
    assert [row.requests for row in store.sum_usage("day")] == [2]


def test_a_record_that_comes_after_its_day_was_deleted_does_not_take_its_sum_away(
    store: Store,
) -> None:
    write_records(store, [spend(1, START - 9 * DAY), spend(2, START)])
    store.sum_days(START)
    assert store.delete_records(START - DAY) == 1
    write_records(store, [spend(3, START - 9 * DAY)])
    store.sum_days(START)
    assert [row.requests for row in store.sum_usage("day")] == [1, 1]


def test_costs_add_up_beyond_64_bits(store: Store) -> None:
    write_records(store, [spend(number, START, 2**62) for number in range(8)])
    assert store.sum_usage("key")[0].cost == 8 * 2**62


def test_the_history_of_a_key_is_summed_once_and_kept(store: Store) -> None:
    key, row = store.create_key("x", limits=KeyLimits(budget=100))
    write_records(store, [record("req_1", key_id=row.key_id, cost=7, attempts=1)])
    first = store.load_keys()
    assert first[hash_key(key)].history.total_spent == 7
    write_records(store, [record("req_2", key_id=row.key_id, cost=7, attempts=1)])
    again = store.load_keys(first)
    assert again[hash_key(key)].history is first[hash_key(key)].history
    store.update_key(row.key_id, {"budget": None})
    without = store.load_keys(again)
    store.update_key(row.key_id, {"budget": 50})
    assert store.load_keys(without)[hash_key(key)].history.total_spent == 14


# Single records


def test_export_has_every_record_once_in_order(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.sqlite_store.EXPORT_ROWS", 3)
    times = [START + number // 4 for number in range(20)]  # several at the same time
    write_records(store, [spend(number, time) for number, time in enumerate(times)])
    assert [one.id for one in store.export_records()] == [f"req_{n}" for n in range(20)]
    part = store.export_records(START + 1, START + 3)
    assert [one.id for one in part] == [f"req_{n}" for n in range(4, 12)]


def test_a_record_is_found_by_both_ids_and_by_its_own_key_alone(store: Store) -> None:
    write_records(store, [FULL])
    assert store.find_record("req_full", "key_1") == FULL
    assert store.find_record("req_full", "key_2") is None
    assert store.find_generation("chatcmpl-9", "key_1") == FULL
    assert store.find_generation("chatcmpl-9", "key_2") is None


def test_a_better_count_amends_an_estimate_only(store: Store) -> None:
    write_records(
        store,
        [
            record("req_1", estimated=True, completion_tokens=5),
            record("req_2", has_usage=True, completion_tokens=5),
        ],
    )
    store.write([], [], [Amendment(name, 1, 7, 3) for name in ("req_1", "req_2")])
    first, second = (store.find_record(name) for name in ("req_1", "req_2"))
    assert first is not None and second is not None
    assert (first.completion_tokens, first.cost, first.estimated) == (7, 3, False)
    assert (second.completion_tokens, second.cost) == (5, None)
