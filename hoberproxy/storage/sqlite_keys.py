"""The table of keys: made, changed, rotated, revoked, and loaded for the keyring.

Only a key's digest is stored. Methods that `storage/store.py` describes are not described again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import orjson

from ..access.keys import NO_HISTORY, RANDOM_BYTES, Caller, display_hint, generate_key, hash_key
from ..access.limits import PERIODS, History, KeyLimits, day_of, month_of, month_start
from .sqlite_file import Database
from .store import UNLIMITED, KeyRow, KeyUsage, StoreError

MAX_LABEL = 64  # characters
MAX_PATTERNS = 64
MAX_LIMIT = 2**53
MAX_BUDGET = 10**18  # picodollars: a million dollars, far from the end of 64 bits

_LIMITS = tuple(each.name for each in fields(KeyLimits))
_COLUMNS = ("id", "label", "kind", "hint", "created", "expires", "revoked", "old_until", "models")


class KeyTable(Database):
    """The statements about keys."""

    def create_key(
        self,
        label: str,
        *,
        kind: str = "live",
        expires: float | None = None,
        limits: KeyLimits = UNLIMITED,
        models: Iterable[str] = (),
    ) -> tuple[str, KeyRow]:
        key = _new_key(kind)
        row = KeyRow(
            key_id=f"key_{secrets.token_hex(6)}",
            label=_checked_label(label),
            kind=kind,
            hint=display_hint(key),
            created=self._clock(),
            expires=expires,
            revoked=None,
            models=_checked_models(models),
            limits=_checked_limits(limits),
        )
        values = _values(row) | {"digest": hash_key(key)}
        with self._mapped("write a key to"):
            self._db.execute(
                f"INSERT INTO keys ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                tuple(values.values()),
            )
        return key, row

    def list_keys(self) -> list[KeyRow]:
        return self._select_keys("1 ORDER BY created, id", ())

    def find_key(self, id_or_hint: str) -> KeyRow:
        where = "? IN (id, hint) OR digest = ?"
        found = self._select_keys(where, (id_or_hint, hash_key(id_or_hint)))
        if not found:  # the message leaves the argument out: it may be a key
            raise StoreError("expected the id or hint of a key, got neither; list the keys")
        if len(found) > 1:
            ids = ", ".join(row.key_id for row in found)
            raise StoreError(f"expected one key, got a hint of several; use one of the ids {ids}")
        return found[0]

    def revoke_key(self, id_or_hint: str) -> KeyRow:
        key_id = self.find_key(id_or_hint).key_id
        with self._mapped("revoke a key in"):
            self._db.execute(
                "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL",
                (self._clock(), key_id),
            )
        return self._select_keys("id = ?", (key_id,))[0]

    def update_key(self, id_or_hint: str, changes: Mapping[str, Any]) -> KeyRow:
        row = self.find_key(id_or_hint)
        limits = {name: value for name, value in changes.items() if name in _LIMITS}
        others = {name: value for name, value in changes.items() if name not in _LIMITS}
        changed = replace(row, **others, limits=replace(row.limits, **limits))
        changed = replace(
            changed,
            label=_checked_label(changed.label),
            models=_checked_models(changed.models),
            limits=_checked_limits(changed.limits),
        )
        self._update(row.key_id, _values(changed))
        return changed

    def rotate_key(self, id_or_hint: str, grace: float) -> tuple[str, KeyRow]:
        row = self.find_key(id_or_hint)
        if row.revoked is not None:
            raise StoreError("expected a key that works, got a revoked one; create another")
        key = _new_key(row.kind)
        row = replace(row, hint=display_hint(key), old_until=self._clock() + grace)
        with self._mapped("write a key to"), self._transaction():
            self._db.execute("UPDATE keys SET old_digest = digest WHERE id = ?", (row.key_id,))
            self._db.execute(
                "UPDATE keys SET digest = ?, hint = ?, old_until = ? WHERE id = ?",
                (hash_key(key), row.hint, row.old_until, row.key_id),
            )
        return key, row

    def _update(self, key_id: str, values: Mapping[str, Any]) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._mapped("write a key to"):
            self._db.execute(f"UPDATE keys SET {columns} WHERE id = ?", (*values.values(), key_id))

    def _select_keys(self, where: str, values: tuple[str | bytes, ...]) -> list[KeyRow]:
        with self._mapped("read keys from"):
            rows = self._db.execute(
                f"SELECT {', '.join((*_COLUMNS, *_LIMITS))}, last_used FROM keys "
                f"LEFT JOIN key_uses ON key_id = id WHERE {where}",
                values,
            ).fetchall()
        return [_parse_key(row) for row in rows]

    def note_uses(self, uses: Mapping[str, float]) -> None:
        with self._mapped("write the use of keys to"), self._transaction():
            self._db.executemany(
                "INSERT INTO key_uses VALUES (?, ?) ON CONFLICT (key_id) DO UPDATE "
                "SET last_used = MAX(last_used, excluded.last_used)",
                uses.items(),
            )

    # For the keyring

    def load_keys(self, known: Mapping[bytes, Caller] | None = None) -> dict[bytes, Caller]:
        # What limits have counted since `known` was loaded is in the shared limits: the history of
        # those callers is not summed up again.
        with self._mapped("read keys from"):
            rows = self._db.execute(
                "SELECT digest, old_digest, old_until, created, id, label, kind, expires, revoked, "
                f"models, {', '.join(_LIMITS)} FROM keys"
            ).fetchall()
        counted = {
            caller.key_id: caller.history
            for caller in (known or {}).values()
            if caller.limits is not None and caller.limits.needs_history
        }
        callers: dict[bytes, Caller] = {}
        for digest, old_digest, old_until, created, *rest in rows:
            caller = self._make_caller(rest, created, counted)
            callers[digest] = caller
            if old_digest is not None and old_until is not None:
                until = old_until if caller.expires is None else min(old_until, caller.expires)
                callers[old_digest] = replace(caller, expires=until)
        return callers

    def _make_caller(
        self, values: list[Any], created: float, counted: Mapping[str, History]
    ) -> Caller:
        key_id, label, kind, expires, revoked, models, *numbers = values
        limits = KeyLimits(*numbers)
        history = NO_HISTORY
        if limits.needs_history and revoked is None:
            history = counted.get(key_id) or self.sum_history(key_id, created)
        return Caller(
            key_id=key_id,
            label=label,
            kind=kind,
            expires=expires,
            revoked=revoked,
            models=tuple(orjson.loads(models)),
            limits=None if limits.is_unlimited else limits,
            history=history,
        )

    def sum_history(self, key_id: str, since: float = 0.0) -> History:
        sums = self.sum_key(key_id, since)
        return History(
            day=day_of(int(self._clock() * 1000)),
            day_requests=sums["day"].requests,
            day_spent=sums["day"].cost,
            month_spent=sums["month"].cost,
            total_spent=sums["total"].cost,
        )

    def sum_key(self, key_id: str, since: float = 0.0) -> dict[str, KeyUsage]:
        today = day_of(int(self._clock() * 1000))
        first = int(month_start(month_of(today)) // 86400)
        with self._mapped("read usage from"):
            # Whole days first, then what is not summed yet, along the index of times.
            until = int(self._value("SELECT until FROM summed"))
            rows = self._db.execute(
                """SELECT day, SUM(tried), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost)
                FROM days WHERE key_id = ? AND day < ? GROUP BY day""",
                (key_id, until),
            ).fetchall()
            rows += self._db.execute(
                """SELECT CAST(started / 86400 AS INTEGER), SUM(attempts > 0), SUM(prompt_tokens),
                    SUM(completion_tokens), SUM(IFNULL(cost, 0))
                FROM records WHERE started >= ? AND key_id = ? GROUP BY 1""",
                (max(until * 86400.0, since - 1), key_id),
            ).fetchall()
        starts = {"day": today, "month": first, "total": 0}
        return {
            period: KeyUsage(*_add_up([sums for day, *sums in rows if day >= start]))
            for period, start in starts.items()
        }

    def keys_version(self) -> int:
        with self._mapped("read keys from"):
            return int(self._value("SELECT version FROM keys_version"))


def _add_up(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _new_key(kind: str) -> str:
    try:
        return generate_key(kind, secrets.token_bytes(RANDOM_BYTES))
    except ValueError as exc:
        raise StoreError(str(exc)) from exc


def _checked_label(label: str) -> str:
    label = label.strip()
    if not label or len(label) > MAX_LABEL or not label.isprintable():
        raise StoreError(f"expected a label of 1 to {MAX_LABEL} printable characters")
    return label


def _checked_models(models: Iterable[str]) -> tuple[str, ...]:
    patterns = tuple(models)
    if len(patterns) > MAX_PATTERNS or not all(
        0 < len(each) <= 256 and each.isprintable() for each in patterns
    ):
        raise StoreError(f"expected up to {MAX_PATTERNS} patterns of slugs, like 'deepseek/*'")
    return patterns


def _checked_limits(limits: KeyLimits) -> KeyLimits:
    for name in ("requests_per_minute", "tokens_per_minute", "requests_per_day", "concurrency"):
        value = getattr(limits, name)
        if value is not None and not 0 < value <= MAX_LIMIT:
            raise StoreError(f"expected a limit from 1 to {MAX_LIMIT}, got {value}")
    if limits.budget is not None and not 0 <= limits.budget <= MAX_BUDGET:
        raise StoreError("expected a budget from 0 to 1000000 USD, got another")
    if limits.budget_period not in PERIODS:
        raise StoreError(f"expected a budget period out of {', '.join(PERIODS)}")
    return limits


def _values(row: KeyRow) -> dict[str, Any]:
    """Return the columns of `row` that a new or a changed key sets, but for its digest."""
    return {
        "id": row.key_id,
        "label": row.label,
        "kind": row.kind,
        "hint": row.hint,
        "created": row.created,
        "expires": row.expires,
        "models": orjson.dumps(row.models).decode(),
        **{name: getattr(row.limits, name) for name in _LIMITS},
    }


def _parse_key(row: tuple[Any, ...]) -> KeyRow:
    """Return the row of the columns in _COLUMNS, the limits, and the last use."""
    values = dict(zip(_COLUMNS[1:], row[1:], strict=False))
    values["models"] = tuple(orjson.loads(values["models"]))
    limits = KeyLimits(*row[len(_COLUMNS) : -1])
    return KeyRow(key_id=row[0], **values, limits=limits, last_used=row[-1])
