"""Combine the accounts of all workers into the one document that `hoberproxy status` prints.

An account is what one process reports of itself at a moment; two of them give the rates between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Account = dict[str, Any]


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
