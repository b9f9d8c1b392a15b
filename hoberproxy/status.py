"""What is told of a running service: from its workers' accounts to one document, and to tables.

An account is what one process says of itself at a moment; two of them give the rates between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Account = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def combine(before: Sequence[Account], after: Sequence[Account], seconds: float) -> Account:
    """One document of all workers. `events` of an account counts tokens since its start."""
    earlier = {account["pid"]: account for account in before}
    workers = []
    keys: Counter[str] = Counter()
    for account in after:
        since = earlier.get(account["pid"], account)
        rate = max(account.get("events", 0) - since.get("events", 0), 0) / seconds
        keys.update(account.get("keys", {}))
        workers.append(
            {
                **{name: account.get(name) for name in _OF_A_WORKER},
                "tokens_per_second": round(rate, 1),
            }
        )
    return {
        "streams": sum(worker["streams"] or 0 for worker in workers),
        "tokens_per_second": round(sum(worker["tokens_per_second"] for worker in workers), 1),
        "workers": workers,
        "endpoints": _endpoints(after),
        "keys": [{"key": key, "streams": count} for key, count in sorted(keys.items())],
    }


_OF_A_WORKER = ("pid", "state", "generation", "started", "streams", "connections", "resident_bytes")


def _endpoints(accounts: Iterable[Account]) -> list[dict[str, Any]]:
    """What workers learnt of each endpoint, each for itself: means, and how many let it rest."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for account in accounts:
        if account.get("state") != "draining":  # what it knows is old
            for health in account.get("health", ()):
                groups.setdefault((health["provider"], health["model"]), []).append(health)
    return [
        {
            "provider": provider,
            "model": model,
            "cooling_in": sum(bool(each["is_cooling"]) for each in group),
            "known_in": len(group),
            "cooldown": max(each["cooldown"] for each in group),
            "failure_rate": _mean(group, "failure_rate"),
            "first_content": _mean(group, "first_content"),
            "throughput": _mean(group, "throughput"),
        }
        for (provider, model), group in sorted(groups.items())
    ]


def _mean(group: list[dict[str, Any]], name: str) -> float | None:
    known = [each[name] for each in group if each[name] is not None]
    return round(sum(known) / len(known), 4) if known else None


# For people


def headline(document: Account, now: float) -> str:
    """The first line."""
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


def worker_table(document: Account, now: float) -> Table:
    """A line a worker, and one for the writer of records."""
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


def endpoint_table(document: Account) -> Table:
    """A line an endpoint that was tried of late."""
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


def key_table(document: Account) -> Table:
    """A line a key that is in use, or was today."""
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
