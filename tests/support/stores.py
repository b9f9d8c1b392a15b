"""A store of records in memory, and a way to write records into any store, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from hoberproxy.accounting.record import COLUMNS, STARTED, Record, Row, make_row
from hoberproxy.storage.store import DAY, Amendment, Records, StoreError

AMENDED = [COLUMNS.index(name) for name in ("prompt_tokens", "completion_tokens", "cost")]
HAS_USAGE, ESTIMATED = COLUMNS.index("has_usage"), COLUMNS.index("estimated")


class MemoryRecords:
    """A `store.Records` in memory. While `is_locked` every write fails, as by another's lock."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.uses: dict[str, float] = {}
        self.summed_until = 0
        self.is_locked = False
        self.transactions = 0

    def write(
        self,
        rows: Sequence[Row],
        revised: Sequence[Row] = (),
        amendments: Sequence[Amendment] = (),
        give_way: Callable[[], object] | None = None,
    ) -> int:
        self._check()
        self.transactions += 1
        new = 0
        for row in rows:
            new += str(row[0]) not in self.rows
            self.rows.setdefault(str(row[0]), tuple(row))
        self.rows.update((str(row[0]), tuple(row)) for row in revised)
        for each in amendments:
            row = self.rows.get(each.id)
            if row is not None and not row[HAS_USAGE]:
                values = list(row)
                counts = (each.prompt_tokens, each.completion_tokens, each.cost)
                for place, value in zip(AMENDED, counts, strict=True):
                    values[place] = value
                values[ESTIMATED] = False
                self.rows[each.id] = tuple(values)
        return new

    def note_uses(self, uses: Mapping[str, float]) -> None:
        self._check()
        for key_id, used in uses.items():
            self.uses[key_id] = max(used, self.uses.get(key_id, used))

    def sum_days(self, until: float) -> None:
        self._check()
        self.summed_until = max(self.summed_until, int(until // DAY))

    def delete_records(self, before: float) -> int:
        self._check()
        bound = min(before // DAY, self.summed_until) * DAY
        old = [name for name, row in self.rows.items() if float(row[STARTED] or 0) < bound]
        for name in old:
            del self.rows[name]
        return len(old)

    def set_busy_timeout(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass

    def _check(self) -> None:
        if self.is_locked:
            raise StoreError("the store is locked", is_transient=True)


def write_records(store: Records, records: Iterable[Record]) -> int:
    """Write records in one transaction; return how many were new."""
    return store.write([make_row(record) for record in records])
