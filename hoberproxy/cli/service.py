"""Run `hoberproxy status` and `hoberproxy upgrade` on a running service, over its admin socket."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from ..config.settings import Config
from ..process.admin_socket import PATIENCE, AdminError, admin_path, ask
from ..storage.sqlite_records import open_store
from ..storage.store import StoreError
from .printing import print_table

UPGRADE_LIMIT = 120.0  # seconds
EXEC_LIMIT = 20.0  # seconds of it in which the service may be silent: it becomes another program
DAY = 86400.0

Document = dict[str, Any]  # the service's report, see `combine` of process/admin_socket.py
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def show_status(config: Config, *, as_json: bool) -> int:
    """Print the status of the service of `config`; return 1 if it does not answer."""
    document = _ask(config, "status")
    if document is None:
        return 1
    document.pop("kind", None)
    _add_usage(document, config)
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        _print_status(document, time.time())
    return 0


def _add_usage(document: Document, config: Config) -> None:
    """Add what each key used today, which only the records hold."""
    if not Path(config.records.file).exists():
        return
    today = time.time() // DAY * DAY
    try:
        with closing(open_store(config.records.file)) as store:
            rows = store.sum_usage("key", today, None)
    except StoreError:
        return  # no permission, or the file is locked: print the rest
    keys = {each["key"]: each for each in document["keys"]}
    for row in rows:
        name = row.label or row.name or "anonymous"
        each = keys.setdefault(name, {"key": name, "streams": 0})
        each["requests"] = each.get("requests", 0) + row.requests
        tokens = row.prompt_tokens + row.completion_tokens
        each["tokens"] = each.get("tokens", 0) + tokens
    document["keys"] = [keys[name] for name in sorted(keys)]


def upgrade(config: Config) -> int:
    """Let the service of `config` upgrade to the installed version; return 1 if it did not."""
    before = _ask(config, "upgrade")
    if before is None:
        return 1
    if "error" in before:
        return _fail(before["error"])
    deadline = time.monotonic() + UPGRADE_LIMIT
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _ask(config, "state", EXEC_LIMIT)
        if now is None:
            return 1
        if now["problems"]:
            return _fail(*(f"not upgraded: {problem}" for problem in now["problems"]))
        if now["upgrades"] > before["upgrades"] and not now["is_changing"]:
            print(f"{before['version']} → {now['version']}, generation {now['generation']} serves")
            return 0
    return _fail(f"not upgraded within {UPGRADE_LIMIT:g} s; see the log")


def _ask(config: Config, kind: str, patience: float = PATIENCE) -> Document | None:
    path = admin_path(config)
    if path is None:
        _fail('expected an admin socket, got server.admin_socket = "off"; set a path and restart')
        return None
    try:
        return ask(path, kind, patience)
    except AdminError as error:
        _fail(str(error))
        return None


def _fail(*problems: str) -> int:
    for problem in problems:
        print(f"hoberproxy: {problem}", file=sys.stderr)
    return 1


# The status as text


def _print_status(document: Document, now: float) -> None:
    print(_headline(document, now))
    for problem in document.get("problems", ()):
        print(f"the last reload failed: {problem}")
    tables = (_worker_table(document, now), _endpoint_table(document), _key_table(document))
    for head, rows in tables:
        if rows:
            print()
            print_table(head, rows)


def _headline(document: Document, now: float) -> str:
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
    """Return a row for each worker and for the writer of records."""
    head = "worker state generation up streams connections tokens/s memory".split()
    return tuple(head), [
        (
            str(each["pid"]),
            each["state"],
            str(each["generation"] or "-"),
            _duration(now - each["started"]),
            _cell("{:,}", each.get("streams")),
            _cell("{:,}", each.get("connections")),
            _cell("{:g}", each.get("tokens_per_second")),
            _cell("{:.0f} MB", each.get("resident_bytes"), 2**-20),
        )
        for each in (*document["workers"], *document.get("writers", ()))
    ]


def _endpoint_table(document: Document) -> Table:
    """Return a row for each endpoint with recent attempts."""
    return ("provider", "model", "state", "failures", "first content", "tokens/s"), [
        (
            each["provider"],
            each["model"],
            _endpoint_state(each),
            f"{each['failure_rate'] or 0:.0%}",
            _cell("{:.0f} ms", each["first_content"], 1000),
            _cell("{:.0f}", each["throughput"]),
        )
        for each in document["endpoints"]
    ]


def _endpoint_state(each: Document) -> str:
    if not each["cooling_in"]:
        return "ok"
    return f"cools {each['cooldown']:.0f} s in {each['cooling_in']} of {each['known_in']}"


def _key_table(document: Document) -> Table:
    """Return a row for each key that is in use or was used today."""
    return ("key", "streams", "requests today", "tokens today"), [
        (
            each["key"] or "-",
            str(each["streams"]),
            _cell("{:,}", each.get("requests")),
            _cell("{:,}", each.get("tokens")),
        )
        for each in document["keys"]
    ]


def _cell(form: str, value: float | None, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
