"""`hoberproxy status` and `hoberproxy upgrade`: a running service, asked over its admin socket."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import status
from .admin import AdminError, admin_path, ask
from .config import Config
from .sqlite_store import open_store
from .store import StoreError

UPGRADE_LIMIT = 120.0  # seconds
DAY = 86400.0

PrintTable = Callable[[tuple[str, ...], list[tuple[str, ...]]], None]


def show_status(config: Config, print_table: PrintTable, *, as_json: bool) -> int:
    """Print how the service is; 1 if it does not answer."""
    document = _ask(config, "status")
    if document is None:
        return 1
    document.pop("kind", None)
    _add_usage(document, config)
    if as_json:
        print(json.dumps(document, indent=2))
        return 0
    now = time.time()
    print(status.headline(document, now))
    for problem in document.get("problems", ()):
        print(f"the last reload failed: {problem}")
    for head, rows in (
        status.worker_table(document, now),
        status.endpoint_table(document),
        status.key_table(document),
    ):
        if rows:
            print()
            print_table(head, rows)
    return 0


def _add_usage(document: dict[str, Any], config: Config) -> None:
    """What keys used today, which only the records know."""
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
    """Let the service become what is installed; 1 if it did not."""
    before = _ask(config, "upgrade")
    if before is None:
        return 1
    if "error" in before:
        print(f"hoberproxy: {before['error']}", file=sys.stderr)
        return 1
    deadline = time.monotonic() + UPGRADE_LIMIT
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _ask(config, "state")
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


def _ask(config: Config, kind: str) -> dict[str, Any] | None:
    path = admin_path(config)
    try:
        if path is None:
            raise AdminError('server.admin_socket is "off": nobody can be asked')
        return ask(path, kind)
    except AdminError as error:
        print(f"hoberproxy: {error}", file=sys.stderr)
        return None
