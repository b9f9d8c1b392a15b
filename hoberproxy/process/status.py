"""Combine the reports of all workers into the one document that `hoberproxy status` prints.

A report is what one process reports of itself at a moment; two of them give the rates between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Report = dict[str, Any]


def combine(before: Sequence[Report], after: Sequence[Report], seconds: float) -> Report:
    """Return one document of all workers. `events` of a report counts tokens since its start."""
    earlier = {report["pid"]: report for report in before}
    workers = []
    keys: Counter[str] = Counter()
    for report in after:
        since = earlier.get(report["pid"], report)
        rate = max(report.get("events", 0) - since.get("events", 0), 0) / seconds
        keys.update(report.get("keys", {}))
        workers.append(
            {
                **{name: report.get(name) for name in _OF_A_WORKER},
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


def _endpoints(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """Return for each endpoint the means over the workers, and in how many of them it cools."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        if report.get("state") != "draining":  # what it knows is old
            for health in report.get("health", ()):
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
