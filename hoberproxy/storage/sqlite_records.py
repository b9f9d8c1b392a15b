"""The store in one SQLite file: the statements about records, and their sums.

Methods that `storage/store.py` describes are not described again. When and how often to write, and
what to do while the file is locked, is left to the writer.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from ..accounting.record import CLIENT_CLOSED, COLUMNS, STARTED, Record, Row, clean_row, parse_row
from .sqlite_keys import KeyTable
from .store import DAY, Amendment, Store, StoreError, UsageRow

BUSY_TIMEOUT = 5.0  # seconds a call waits for another process's lock

_ROW_MARKS = f"({', '.join('?' * len(COLUMNS))})"
# SQLite takes 32,766 values a statement from 3.32 on. A few sizes only, so that every statement is
# found prepared: preparing one of 37 rows costs as much as writing ten.
_ROWS_PER_STATEMENT = (50, 10, 1)
EXPORT_ROWS = 1000
PURGE_ROWS = 2000  # a transaction of some milliseconds
# How many of the newest records are searched for an upstream's id: an index on it would cost every
# record three times what it costs now.
SEARCHED_RECORDS = 50_000

# What a value that no column can hold raises, in the binding and in the table.
_BAD_VALUE = (
    ArithmeticError,
    TypeError,
    ValueError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)

_STATUS = "CASE code WHEN 'lost' THEN code ELSE CAST(status AS TEXT) END"
_FAILED = f"(status != {CLIENT_CLOSED} AND (code != '' OR status < 200 OR status >= 400))"
_GROUPS = {
    "key": "key_id",
    "model": "slug",
    "provider": "provider",
    "day": "date(last, 'unixepoch')",
    "status": "status",
}
# Whole days where they are summed, single records where they are not: the same columns of both.
_SOURCES = f"""
    SELECT day * 86400 AS last, key_id, key_label, slug, provider, status, requests, failed,
        prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, estimated_tokens,
        cost, unpriced, first_content_sum, first_content_count, cache_write_tokens
    FROM days WHERE day < :summed AND day * 86400 >= :since AND day * 86400 < :until
    UNION ALL
    SELECT started, key_id, key_label, slug, provider, {_STATUS}, 1, {_FAILED},
        prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens,
        (prompt_tokens + completion_tokens) * estimated,
        IFNULL(cost, 0), cost IS NULL AND attempts > 0,
        IFNULL(first_content, 0), first_content IS NOT NULL, cache_write_tokens
    FROM records WHERE started >= MAX(:since, :summed * 86400.0) AND started < :until
"""


def _parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Yield all `rows` in parts of the sizes that a statement may have."""
    start = 0
    for size in _ROWS_PER_STATEMENT:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def open_store(path: str | os.PathLike[str], *, busy_timeout: float = BUSY_TIMEOUT) -> Store:
    """Open the store at `path`, made and brought to the current schema if need be.

    Raises StoreError.
    """
    return SqliteStore(path, busy_timeout=busy_timeout)


class SqliteStore(KeyTable):
    """The store on one connection to its file."""

    # Records

    def write(
        self,
        rows: Sequence[Row],
        revised: Sequence[Row] = (),
        amendments: Sequence[Amendment] = (),
        give_way: Callable[[], object] | None = None,
    ) -> int:
        with self._mapped("write records to"):
            try:
                return self._write(rows, revised, amendments, give_way)
            except _BAD_VALUE:
                # A number beyond 64 bits or half a surrogate pair must not keep the others out.
                return self._write(
                    [clean_row(row) for row in rows],
                    [clean_row(row) for row in revised],
                    amendments,
                    give_way,
                )

    def _write(
        self,
        rows: Sequence[Row],
        revised: Sequence[Row],
        amendments: Sequence[Amendment],
        give_way: Callable[[], object] | None,
    ) -> int:
        before = self._db.total_changes
        with self._transaction():
            for part in _parts(rows):
                self._insert(part, "INSERT", "ON CONFLICT (id) DO NOTHING")
                if give_way is not None:
                    give_way()
            new = self._db.total_changes - before
            for part in _parts(revised):
                self._insert(part, "INSERT OR REPLACE")
            for each in amendments:
                self._amend(each)
            self._reopen_days([*rows, *revised])
        return new

    def _insert(self, rows: Sequence[Row], verb: str, otherwise: str = "") -> None:
        # Not executemany: that lets go of the GIL for each row, and beside a busy event loop may
        # wait 5 ms to have it back (measured: 450 µs a record instead of 70).
        self._db.execute(
            f"{verb} INTO records ({', '.join(COLUMNS)}) "
            f"VALUES {', '.join([_ROW_MARKS] * len(rows))} {otherwise}",
            list(chain.from_iterable(rows)),
        )

    def _amend(self, amendment: Amendment) -> None:
        self._db.execute(
            "UPDATE records SET prompt_tokens = ?, completion_tokens = ?, cost = ?, "
            "estimated = 0 WHERE id = ? AND NOT has_usage",
            (
                amendment.prompt_tokens,
                amendment.completion_tokens,
                amendment.cost,
                amendment.id,
            ),
        )

    def find_record(self, record_id: str, key_id: str | None = None) -> Record | None:
        return self._select_record(
            "id = :id AND key_id = IFNULL(:key_id, key_id)", {"id": record_id, "key_id": key_id}
        )

    def find_generation(self, upstream_id: str, key_id: str) -> Record | None:
        """Search the newest 50,000 records of all keys."""
        with self._mapped("read a record from"):
            oldest = self._db.execute(
                "SELECT started FROM records ORDER BY started DESC LIMIT 1 OFFSET ?",
                (SEARCHED_RECORDS,),
            ).fetchone()
        return self._select_record(
            "started >= :oldest AND upstream_id = :id AND key_id = :key_id "
            "ORDER BY started DESC LIMIT 1",
            {"oldest": oldest[0] if oldest else 0.0, "id": upstream_id, "key_id": key_id},
        )

    def _select_record(self, where: str, values: dict[str, Any]) -> Record | None:
        with self._mapped("read a record from"):
            row = self._db.execute(
                f"SELECT {', '.join(COLUMNS)} FROM records WHERE {where}", values
            ).fetchone()
        return None if row is None else parse_row(row)

    def export_records(
        self, since: float | None = None, until: float | None = None
    ) -> Iterator[Record]:
        # By pages: one long read would keep SQLite from reusing its log while it lasts.
        place = (-math.inf if since is None else since, -1)
        while True:
            with self._mapped("read records from"):
                rows = self._db.execute(
                    f"SELECT {', '.join(COLUMNS)}, rowid FROM records "
                    "WHERE (started, rowid) > (?, ?) AND started < ? "
                    "ORDER BY started, rowid LIMIT ?",
                    (*place, math.inf if until is None else until, EXPORT_ROWS),
                ).fetchall()
            for *row, _ in rows:
                yield parse_row(row)
            if len(rows) < EXPORT_ROWS:
                return
            place = (rows[-1][STARTED], rows[-1][-1])

    # Sums

    def sum_usage(
        self, by: str, since: float | None = None, until: float | None = None
    ) -> list[UsageRow]:
        if by not in _GROUPS:
            raise StoreError(f"expected usage by one of {', '.join(_GROUPS)}, got {by!r}")
        order = "name" if by in ("day", "status") else "requests DESC, name"
        # With a single MAX, SQLite takes the bare column key_label from the row that has it.
        label = "key_label" if by == "key" else "''"
        with self._mapped("read usage from"):
            rows = self._db.execute(
                f"""SELECT {_GROUPS[by]} AS name, {label}, SUM(requests) AS requests, SUM(failed),
                    CAST(TOTAL(prompt_tokens) AS INTEGER),
                    CAST(TOTAL(completion_tokens) AS INTEGER),
                    CAST(TOTAL(cached_tokens) AS INTEGER),
                    TOTAL(estimated_tokens)
                        / MAX(TOTAL(prompt_tokens + completion_tokens), 1.0),
                    SUM(first_content_sum) / NULLIF(SUM(first_content_count), 0),
                    CAST(TOTAL(reasoning_tokens) AS INTEGER),
                    CAST(TOTAL(cache_write_tokens) AS INTEGER),
                    SUM(cost / 1000000), SUM(cost % 1000000), SUM(unpriced), MAX(last)
                FROM ({_SOURCES}) GROUP BY 1 ORDER BY {order}""",
                {
                    "since": -math.inf if since is None else since,
                    "until": math.inf if until is None else until,
                    "summed": self._summed_until(),
                },
            ).fetchall()
        # In two parts, for the sum of all costs could be longer than 64 bits.
        return [
            UsageRow(*(*sums, high * 1_000_000 + low, unpriced))
            for *sums, high, low, unpriced, _ in rows
        ]

    def _summed_until(self) -> int:
        return int(self._value("SELECT until FROM summed"))

    def sum_days(self, until: float) -> None:
        last = int(until // DAY)
        with self._mapped("sum up days in"), self._transaction():
            first = self._summed_until()
            if last <= first:
                return
            self._db.execute("DELETE FROM days WHERE day >= ? AND day < ?", (first, last))
            self._db.execute(
                f"""INSERT INTO days
                SELECT CAST(started / 86400 AS INTEGER), key_id, key_label, slug, provider,
                    {_STATUS}, COUNT(*), SUM(attempts > 0), SUM({_FAILED}), SUM(prompt_tokens),
                    SUM(completion_tokens), SUM(reasoning_tokens), SUM(cached_tokens),
                    SUM(cache_write_tokens), SUM((prompt_tokens + completion_tokens) * estimated),
                    SUM(IFNULL(cost, 0)), SUM(cost IS NULL AND attempts > 0),
                    TOTAL(first_content), COUNT(first_content)
                FROM records WHERE started >= ? AND started < ? GROUP BY 1, 2, 4, 5, 6""",
                (first * DAY, last * DAY),
            )
            self._db.execute("UPDATE summed SET until = ?", (last,))

    def _reopen_days(self, rows: Sequence[Row]) -> None:
        """Have summed days summed up again to which one of `rows` was added."""
        if not rows:
            return
        first = int(min(map(itemgetter(STARTED), rows)) // DAY)
        if first < self._summed_until():
            # Not a day whose records are being deleted: its sum could not be made again.
            self._db.execute(
                "UPDATE summed SET until = ? WHERE until > ? AND deleted <= ?",
                (first, first, first),
            )

    def delete_records(self, before: float) -> int:
        with self._mapped("delete records from"), self._transaction():
            last = min(int(before // DAY), self._summed_until())
            count = self._db.execute(
                "DELETE FROM records WHERE rowid IN (SELECT rowid FROM records "
                "WHERE started < ? ORDER BY started LIMIT ?)",
                (last * DAY, PURGE_ROWS),
            ).rowcount
            if count:
                self._db.execute("UPDATE summed SET deleted = MAX(deleted, ?)", (last,))
            return count

    # Changes

    def data_version(self) -> int:
        with self._mapped("read"):
            return int(self._value("PRAGMA data_version"))
