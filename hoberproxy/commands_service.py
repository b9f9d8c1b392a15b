"""`hoberproxy status` and `hoberproxy upgrade`: a running service, asked over its admin socket."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .admin import PATIENCE, AdminError, admin_path, ask
from .config import Config
from .store import StoreError
from .stores import open_store

UPGRADE_LIMIT = 120.0  # seconds
EXEC_LIMIT = 20.0  # seconds of it in which the service may be silent: it becomes another program
DAY = 86400.0

Document = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
PrintTable = Callable[[tuple[str, ...], list[tuple[str, ...]]], None]


def show_status(config: Config, print_table: PrintTable, *, as_json: bool) -> int:
    """Print the status of the service; return 1 if it does not answer."""
    document = _ask(config, "status")
    if document is None:
        return 1
    document.pop("kind", None)
    _add_usage(document, config)
    if as_json:
        print(json.dumps(document, indent=2))
        return 0
    now = time.time()
    print(_headline(document, now))
    for problem in document.get("problems", ()):
        print(f"the last reload failed: {problem}")
    for head, rows in (
        _worker_table(document, now),
        _endpoint_table(document),
        _key_table(document),
    ):
        if rows:
            print()
            print_table(head, rows)
    return 0


def _add_usage(document: dict[str, Any], config: Config) -> None:
    """Add what keys have used today, by the records."""
    if not Path(config.records.file).exists():
        return
    today = time.time() // DAY * DAY
    try:
        store = open_store(config.records.file)
        try:
            rows = store.sum_usage("key", today, None)
        finally:
            store.close()
    except StoreError:
        return  # another's file, or a busy one: the rest is worth showing
    keys = {each["key"]: each for each in document["keys"]}
    for row in rows:
        name = row.label or row.name or "anonymous"
        each = keys.setdefault(name, {"key": name, "streams": 0})
        each["requests"] = each.get("requests", 0) + row.requests
        tokens = row.prompt_tokens + row.completion_tokens
        each["tokens"] = each.get("tokens", 0) + tokens
    document["keys"] = [keys[name] for name in sorted(keys)]


def upgrade(config: Config) -> int:
    """Let the service become what is installed; return 1 if it did not."""
    before = _ask(config, "upgrade")
    if before is None:
        return 1
    if "error" in before:
        print(f"hoberproxy: {before['error']}", file=sys.stderr)
        return 1
    deadline = time.monotonic() + UPGRADE_LIMIT
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _ask(config, "state", EXEC_LIMIT)
        if now is None:
            return 1
        if now["problems"]:
            for problem in now["problems"]:
                print(f"hoberproxy: not upgraded: {problem}", file=sys.stderr)
            return 1
        if now["upgrades"] > before["upgrades"] and not now["is_changing"]:
            print(f"{before['version']} → {now['version']}, generation {now['generation']} serves")
            return 0
    print(f"hoberproxy: not upgraded within {UPGRADE_LIMIT:g} s; see the log", file=sys.stderr)
    return 1


def _ask(config: Config, kind: str, patience: float = PATIENCE) -> dict[str, Any] | None:
    path = admin_path(config)
    try:
        if path is None:
            raise AdminError('server.admin_socket is "off": nobody can be asked')
        return ask(path, kind, patience)
    except AdminError as error:
        print(f"hoberproxy: {error}", file=sys.stderr)
        return None


# Tables


def _headline(document: Document, now: float) -> str:
    """Return the first line of the status."""
    line = (
        f"hoberproxy {document['version']}, process {document['pid']}, "
        f"up {_duration(now - document['started'])}: {document['streams']} streams, "
        f"{document['tokens_per_second']:g} tokens/s"
    )
    if document.get("generation"):
        line += (
            f"; generation {document['generation']}, {document['upgrades']} upgrades, "
            f"{document['restarts']} workers replaced"
        )
    return line


def _worker_table(document: Document, now: float) -> Table:
    """Return a line for each worker and for the writer of records."""
    return (
        "worker",
        "state",
        "generation",
        "up",
        "streams",
        "connections",
        "tokens/s",
        "memory",
    ), [
        (
            str(each["pid"]),
            each["state"],
            str(each["generation"] or "-"),
            _duration(now - each["started"]),
            _number(each["streams"]),
            _number(each["connections"]),
            f"{each['tokens_per_second']:g}",
            "-" if each["resident_bytes"] is None else f"{each['resident_bytes'] / 2**20:.0f} MB",
        )
        for each in document["workers"]
    ] + [
        (
            str(each["pid"]),
            each["state"],
            str(each["generation"] or "-"),
            _duration(now - each["started"]),
            "-",
            "-",
            "-",
            f"{each.get('resident_bytes', 0) / 2**20:.0f} MB",
        )
        for each in document.get("writers", ())
    ]


def _endpoint_table(document: Document) -> Table:
    """Return a line for each endpoint that was tried of late."""
    return ("provider", "model", "state", "failures", "first content", "tokens/s"), [
        (
            each["provider"],
            each["model"],
            _endpoint_state(each),
            f"{each['failure_rate'] or 0:.0%}",
            "-" if each["first_content"] is None else f"{each['first_content'] * 1000:.0f} ms",
            "-" if each["throughput"] is None else f"{each['throughput']:.0f}",
        )
        for each in document["endpoints"]
    ]


def _endpoint_state(each: dict[str, Any]) -> str:
    if not each["cooling_in"]:
        return "ok"
    return f"cools {each['cooldown']:.0f} s in {each['cooling_in']} of {each['known_in']}"


def _key_table(document: Document) -> Table:
    """Return a line for each key that is in use, or was today."""
    return ("key", "streams", "requests today", "tokens today"), [
        (
            each["key"] or "-",
            str(each["streams"]),
            _number(each.get("requests")),
            _number(each.get("tokens")),
        )
        for each in document["keys"]
    ]


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
