"""Run `hoberproxy keys`: create, list, show, update, rotate, revoke."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Protocol

from .limits import PERIODS, KeyLimits, format_dollars
from .printing import moment, parse_dollars, parse_expiry, parse_span, print_table
from .store import KeyRow, Store, StoreError

Commands = argparse._SubParsersAction  # argparse has no public name for it
GRACE = "24h"
_NUMBERS = {
    "rpm": ("requests_per_minute", "requests a minute"),
    "tpm": ("tokens_per_minute", "tokens a minute, of prompts and answers"),
    "rpd": ("requests_per_day", "requests a day (UTC)"),
    "concurrency": ("concurrency", "requests at once"),
}


class OpenStore(Protocol):
    """Open the store that the arguments name; with `create`, make it if it does not exist."""

    def __call__(self, arguments: argparse.Namespace, *, create: bool = False) -> Store: ...


def add_keys(
    commands: Commands[argparse.ArgumentParser],
    config_option: argparse.ArgumentParser,
    open_store: OpenStore,
) -> None:
    """Add the command `keys` and its actions to `commands`."""
    keys = commands.add_parser("keys", help="create, change, rotate and revoke keys")
    actions = keys.add_subparsers(title="actions", required=True, metavar="ACTION")

    def add(
        name: str, run: Callable[[argparse.Namespace, Store], None], text: str, key: bool = True
    ) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, parents=[config_option], help=text)
        if key:
            parser.add_argument("key", metavar="ID", help="the key's id or hint, from `keys list`")

        def run_with_store(arguments: argparse.Namespace) -> int:
            with closing(open_store(arguments, create=name == "create")) as store:
                run(arguments, store)
            return 0

        parser.set_defaults(run=run_with_store)
        return parser

    create = add(
        "create", _create, "create a key and print it; it cannot be printed again", key=False
    )
    create.add_argument("--label", required=True, help="the key's name in records and logs")
    create.add_argument(
        "--test", action="store_true", help="make an hb_test_ key instead of an hb_live_ one"
    )
    _add_settings(create, none="")
    add("list", _list, "list all keys", key=False)
    add("show", _show, "show a key's limits, spending and last use")
    update = add("update", _update, "change a key; the proxy applies it within a second")
    update.add_argument("--label", help="new name of the key")
    _add_settings(update, none='; "none" removes it')
    rotate = add(
        "rotate", _rotate, "replace a key and print the new one; it cannot be printed again"
    )
    rotate.add_argument(
        "--grace",
        metavar="SPAN",
        default=GRACE,
        help=f"how long the old key still works; default: {GRACE}",
    )
    add("revoke", _revoke, "disable a key for good; the proxy applies it within a second")


def _add_settings(parser: argparse.ArgumentParser, none: str) -> None:
    parser.add_argument(
        "--expires",
        metavar="WHEN",
        help=f"day (YYYY-MM-DD, UTC) or time from now (12h, 30d) at which the key expires{none}",
    )
    for option, (_, text) in _NUMBERS.items():
        parser.add_argument(f"--{option}", metavar="COUNT", help=f"limit of {text}{none}")
    parser.add_argument(
        "--budget", metavar="USD", help=f"amount that the key may spend, like 5.00{none}"
    )
    parser.add_argument(
        "--budget-period",
        choices=PERIODS,
        help="day or month (UTC) of the budget, or total; default: total",
    )
    parser.add_argument(
        "--models",
        metavar="PATTERN",
        action="append",
        help=f"models that the key may use, like 'deepseek/*'; repeatable{none}",
    )


def _changes(arguments: argparse.Namespace, now: float) -> dict[str, Any]:
    """Return what the options change, by the names in KeyRow and KeyLimits."""
    changes: dict[str, Any] = {}
    for option, (field, _) in _NUMBERS.items():
        if (text := getattr(arguments, option)) is not None:
            changes[field] = _unless_none(text, _parse_count)
    if (text := arguments.budget) is not None:
        changes["budget"] = _unless_none(text, parse_dollars)
    if arguments.budget_period is not None:
        changes["budget_period"] = arguments.budget_period
    if (text := arguments.expires) is not None:
        changes["expires"] = _unless_none(text, lambda value: parse_expiry(value, now))
    if arguments.models is not None:
        patterns = [each.strip() for text in arguments.models for each in text.split(",")]
        changes["models"] = () if patterns == ["none"] else tuple(patterns)
    if arguments.label is not None:
        changes["label"] = arguments.label
    return changes


def _unless_none(text: str, parse: Callable[[str], Any]) -> Any:
    return None if text == "none" else parse(text)


def _parse_count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise StoreError(f"expected a whole number, got {text!r}")
    return int(text)


def _create(arguments: argparse.Namespace, store: Store) -> None:
    changes = _changes(arguments, time.time())
    label, expires = changes.pop("label"), changes.pop("expires", None)
    models = changes.pop("models", ())
    key, row = store.create_key(
        label,
        kind="test" if arguments.test else "live",
        expires=expires,
        limits=KeyLimits(**changes),
        models=models,
    )
    print(f"{row.key_id} ({row.label}); the key is printed only this once:", file=sys.stderr)
    print(key)


def _list(arguments: argparse.Namespace, store: Store) -> None:
    now = time.time()
    print_table(
        ("id", "label", "key", "created", "last used", "expires", "limits", "state"),
        [
            (
                row.key_id,
                row.label,
                row.hint,
                moment(row.created),
                moment(row.last_used),
                moment(row.expires, "never"),
                _describe(row) or "-",
                key_state(row, now),
            )
            for row in store.list_keys()
        ],
    )


def _show(arguments: argparse.Namespace, store: Store) -> None:
    row = store.find_key(arguments.key)
    history = store.sum_history(row.key_id, row.created)
    now = time.time()
    lines = {
        "id": row.key_id,
        "label": row.label,
        "key": row.hint,
        "state": key_state(row, now),
        "created": moment(row.created),
        "last used": moment(row.last_used),
        "expires": moment(row.expires, "never"),
        "limits": _describe(row) or "none",
        "spent": f"{format_dollars(history.day_spent)} USD today, "
        f"{format_dollars(history.month_spent)} this month, "
        f"{format_dollars(history.total_spent)} in all",
    }
    if row.old_until is not None and row.old_until > now:
        lines["old key"] = f"works until {moment(row.old_until)}"
    for name, text in lines.items():
        print(f"{name:<10} {text}")


def _update(arguments: argparse.Namespace, store: Store) -> None:
    changes = _changes(arguments, time.time())
    if not changes:
        raise StoreError("expected something to change, got nothing; see `keys update --help`")
    row = store.update_key(arguments.key, changes)
    print(f"updated {row.key_id} ({row.label}): {_describe(row) or 'no limits'}")


def _rotate(arguments: argparse.Namespace, store: Store) -> None:
    key, row = store.rotate_key(arguments.key, parse_span(arguments.grace))
    until = moment(row.old_until)
    print(
        f"{row.key_id} ({row.label}); the old key works until {until}, "
        "the new one is printed only this once:",
        file=sys.stderr,
    )
    print(key)


def _revoke(arguments: argparse.Namespace, store: Store) -> None:
    row = store.revoke_key(arguments.key)
    print(f"revoked {row.key_id} ({row.label})")


def key_state(row: KeyRow, now: float) -> str:
    """Return "active", "expired" or "revoked"."""
    if row.revoked is not None:
        return "revoked"
    if row.expires is not None and row.expires <= now:
        return "expired"
    return "active"


def _describe(row: KeyRow) -> str:
    """Return the limits of `row`, in the words of the options."""
    limits = row.limits
    numbers = {option: getattr(limits, field) for option, (field, _) in _NUMBERS.items()}
    parts = [f"{option} {number}" for option, number in numbers.items() if number is not None]
    if limits.budget is not None:
        period = "in all" if limits.budget_period == "total" else f"a {limits.budget_period}"
        parts.append(f"{format_dollars(limits.budget)} USD {period}")
    if row.models:
        parts.append("models " + " ".join(row.models))
    return ", ".join(parts)
