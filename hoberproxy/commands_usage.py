"""Run `hoberproxy usage`, sums over records, and `hoberproxy export`, the records themselves."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import orjson

from .commands_keys import Commands, OpenStore
from .limits import format_dollars
from .printing import bar, dollars, parse_day, parse_since, print_table
from .record import COLUMNS, Record
from .store import UsageRow

GROUPS = ("key", "model", "provider", "day", "status")
FORMATS = ("table", "csv", "json")


def add_usage(
    commands: Commands[argparse.ArgumentParser],
    config_option: argparse.ArgumentParser,
    open_store: OpenStore,
) -> None:
    """Add the commands `usage` and `export` to `commands`."""
    usage = commands.add_parser(
        "usage", parents=[config_option], help="sum requests, tokens and cost from the records"
    )
    usage.add_argument(
        "--by", choices=GROUPS, default="model", help="group by this; default: model"
    )
    usage.add_argument("--format", choices=FORMATS, default="table", help="default: table")
    _add_bounds(usage)
    usage.set_defaults(run=lambda arguments: _usage(arguments, open_store))

    export = commands.add_parser(
        "export", parents=[config_option], help="write the records as JSON lines or CSV"
    )
    export.add_argument(
        "--format", choices=("jsonl", "csv"), default="jsonl", help="default: jsonl"
    )
    _add_bounds(export)
    export.set_defaults(run=lambda arguments: _export(arguments, open_store))


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since", metavar="WHEN", help="first day (YYYY-MM-DD, UTC), or time before now (12h, 30d)"
    )
    parser.add_argument("--until", metavar="DATE", help="last day (YYYY-MM-DD, UTC)")


def _bounds(arguments: argparse.Namespace) -> tuple[float | None, float | None]:
    since = parse_since(arguments.since, time.time()) if arguments.since else None
    return since, parse_day(arguments.until) + 86400 if arguments.until else None


# usage


def _usage(arguments: argparse.Namespace, open_store: OpenStore) -> int:
    bounds = _bounds(arguments)
    with closing(open_store(arguments)) as store:
        rows = store.sum_usage(arguments.by, *bounds)
    {"table": _print_usage, "csv": _write_usage_csv, "json": _write_usage_json}[arguments.format](
        arguments.by, rows
    )
    return 0


def _print_usage(by: str, rows: list[UsageRow]) -> None:
    # The bars compare cost, or tokens if nothing cost anything.
    has_cost = any(row.cost for row in rows)
    sizes = [row.cost if has_cost else row.prompt_tokens + row.completion_tokens for row in rows]
    columns: dict[str, list[str]] = {
        by: [f"{row.label} ({row.name})" if row.label else row.name or "-" for row in rows],
        "requests": [f"{row.requests:,}" for row in rows],
        "failed": [f"{row.failed:,}" for row in rows],
        "prompt": [f"{_mark(row)}{row.prompt_tokens:,}" for row in rows],
        "completion": [f"{_mark(row)}{row.completion_tokens:,}" for row in rows],
        "cached": [f"{row.cached_tokens:,}" for row in rows],
    }
    if any(row.cache_write_tokens for row in rows):  # few providers charge for them
        columns["cache write"] = [f"{row.cache_write_tokens:,}" for row in rows]
    if has_cost:
        columns["USD"] = [dollars(row.cost) + ("+" if row.unpriced else "") for row in rows]
    columns["first content"] = [
        f"{row.first_content * 1000:,.0f} ms" if row.first_content is not None else "-"
        for row in rows
    ]
    if len(rows) > 1 and any(sizes):
        columns[""] = [bar(size, max(sizes)) for size in sizes]
    print_table(tuple(columns), list(zip(*columns.values(), strict=True)), right_from=1)
    if any(row.estimated_share for row in rows):
        print("~ includes estimates: an upstream reported no usage")
    if has_cost and any(row.unpriced for row in rows):
        print("+ excludes requests of endpoints without a price in the config")


def _mark(row: UsageRow) -> str:
    return "~" if row.estimated_share else ""


def _usage_document(by: str, row: UsageRow) -> dict[str, Any]:
    document = {by: row.name, **({"label": row.label} if by == "key" else {})}
    values = dataclasses.asdict(row)
    del values["name"], values["label"]
    # A string: a number in JSON or a spreadsheet would be a float.
    return document | values | {"cost": format_dollars(row.cost)}


def _write_usage_csv(by: str, rows: list[UsageRow]) -> None:
    _write_csv(_usage_document(by, row) for row in rows)


def _write_usage_json(by: str, rows: list[UsageRow]) -> None:
    documents = [_usage_document(by, row) for row in rows]
    print(orjson.dumps(documents, option=orjson.OPT_INDENT_2).decode())


# export


def _export(arguments: argparse.Namespace, open_store: OpenStore) -> int:
    with closing(open_store(arguments)) as store:
        documents = map(record_document, store.export_records(*_bounds(arguments)))
        if arguments.format == "csv":
            _write_csv(_flat(document) for document in documents)
        else:
            for document in documents:
                sys.stdout.write(orjson.dumps(document).decode() + "\n")
    return 0


def record_document(record: Record) -> dict[str, Any]:
    """Return `record` as an object for JSON, with the cost in USD and tokens per second."""
    document: dict[str, Any] = {name: getattr(record, name) for name in COLUMNS}
    document["failures"] = [dataclasses.asdict(failure) for failure in record.failures]
    document["cost"] = None if record.cost is None else format_dollars(record.cost)
    document["tokens_per_second"] = record.tokens_per_second
    return document


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    lists = {
        name: orjson.dumps(value).decode()
        for name, value in document.items()
        if isinstance(value, list | tuple)
    }
    return document | lists


def _write_csv(documents: Iterator[dict[str, Any]]) -> None:
    writer = None
    for document in documents:
        if writer is None:
            writer = csv.DictWriter(sys.stdout, document, lineterminator="\n")
            writer.writeheader()
        writer.writerow(document)
