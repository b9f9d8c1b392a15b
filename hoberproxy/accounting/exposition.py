"""Sums the counts of several processes, and renders the sum in Prometheus' text form.

A snapshot is plain JSON: for each family a list of [label values, value]. The value of a histogram
is one count a bucket, one for values over the last bucket, and the sum. The client library is only
imported by the first scrape.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Value = float | list[float]
Snapshot = Mapping[str, list[Any]]  # family → [[label values], Value]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric; the text form adds `_total` to the name of a counter."""

    name: str
    kind: str  # counter, gauge, histogram
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Seconds: from a local model's first token to a long prompt on a busy server.
FIRST_CONTENT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

_ENDPOINT = ("model", "provider")

FAMILIES = (
    Family("requests", "counter", "Chat requests that have ended.", (*_ENDPOINT, "status")),
    Family(
        "errors",
        "counter",
        "Chat requests that ended with an error, limits and clients that left among them.",
        ("code",),
    ),
    Family(
        "tokens",
        "counter",
        "Tokens counted; cached and cache_write are part of prompt, reasoning of completion.",
        (*_ENDPOINT, "kind"),
    ),
    Family("cost_dollars", "counter", "What requests cost, where prices are known.", _ENDPOINT),
    Family("attempts", "counter", "Tries on an endpoint, failed or not."),
    Family(
        "failed_attempts",
        "counter",
        "Tries on an endpoint that failed, by how far they had come.",
        ("provider", "phase"),
    ),
    Family(
        "failovers",
        "counter",
        "Failed tries after which another endpoint was tried.",
        ("provider", "reason"),
    ),
    Family(
        "first_content_seconds",
        "histogram",
        "Time from a request's head to its first content.",
        _ENDPOINT,
        FIRST_CONTENT_BUCKETS,
    ),
    Family(
        "request_seconds",
        "histogram",
        "Time from a request's head to the end of its answer.",
        _ENDPOINT,
        REQUEST_BUCKETS,
    ),
    Family(
        "event_gap_seconds",
        "histogram",
        "Time between content events: for each gap of a stream the mean of that stream.",
        _ENDPOINT,
        GAP_BUCKETS,
    ),
    Family(
        "loop_lag_seconds",
        "histogram",
        "How late the loop came to a timer, twice a second in each worker.",
        (),
        LAG_BUCKETS,
    ),
    Family("bad_heads", "counter", "Requests rejected for a malformed head."),
    Family(
        "refused_connections",
        "counter",
        "Connections over the limit of open files.",
    ),
    Family(
        "usage_missing",
        "counter",
        "Whole answers without a usage that can be read.",
        _ENDPOINT,
    ),
    Family("estimated_requests", "counter", "Requests counted by estimate."),
    Family("records_lost", "counter", "Records that could not be kept."),
    Family(
        "journal_entries_lost",
        "counter",
        "Entries the journal had no room for: a crash would lose them.",
    ),
    Family(
        "journals_unreadable",
        "counter",
        "Files of dead processes' journals that are damaged and kept.",
    ),
    Family("log_lines_lost", "counter", "Log lines dropped."),
    Family("worker_restarts", "counter", "Workers that died and were replaced."),
    Family("reloads", "counter", "Reloads and upgrades, by how they went.", ("result",)),
    Family("requests_open", "gauge", "Chat requests under way."),
    Family("connections_open", "gauge", "Connections of clients."),
    Family("body_bytes", "gauge", "Bytes of request bodies that are held."),
    Family("records_queued", "gauge", "Records that are not stored yet."),
    Family("upstream_connections", "gauge", "Connections to providers.", ("provider", "state")),
    Family("workers", "gauge", "Worker processes, by what they do.", ("state",)),
    Family("resident_bytes", "gauge", "Physical memory of all processes."),
    Family("build_info", "gauge", "The version that runs.", ("version",)),
)


def resident_bytes() -> int:
    """Return the bytes of physical memory of this process, 0 if the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def unlabelled(values: Mapping[str, float]) -> dict[str, list[Any]]:
    """Return the part of a snapshot for families without labels, of one value each."""
    return {name: [[[], value]] for name, value in values.items()}


def merge(snapshots: Iterable[Snapshot], *, ended: bool = False) -> dict[str, list[Any]]:
    """Return the sum of all `snapshots`, without gauges if their processes have `ended`."""
    sums: dict[str, dict[tuple[str, ...], Value]] = {}
    wanted = {family.name for family in FAMILIES if not ended or family.kind != "gauge"}
    for snapshot in snapshots:
        for name, samples in snapshot.items():
            if name in wanted:  # another version may have others
                group = sums.setdefault(name, {})
                for labels, value in samples:
                    key = tuple(labels)
                    group[key] = _add(group[key], value) if key in group else value
    return {
        name: [[list(labels), value] for labels, value in group.items()]
        for name, group in sums.items()
    }


def _add(one: Value, other: Value) -> Value:
    if isinstance(one, list) and isinstance(other, list):
        # Two versions with different buckets cannot be added; the newer worker's are kept.
        if len(one) != len(other):
            return other
        return [a + b for a, b in zip(one, other, strict=True)]
    assert not isinstance(one, list) and not isinstance(other, list), "a family has one kind"
    return one + other


def render(snapshot: Snapshot) -> bytes:
    """Return `snapshot` in the text format, version 0.0.4."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot))
    return generate_latest(registry)


class _Collector:
    """A collector of the client library that yields one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            if family.name in self._snapshot:
                yield _metric(family, self._snapshot[family.name])


def _metric(family: Family, samples: list[Any]) -> Metric:
    from prometheus_client import core

    name = f"hoberproxy_{family.name}"
    if family.kind == "histogram":
        histogram = core.HistogramMetricFamily(name, family.text, labels=family.labels)
        for labels, counts in samples:
            buckets = _cumulated(counts, family.buckets)
            histogram.add_metric(labels, buckets, sum_value=counts[-1])
        return histogram
    make = core.CounterMetricFamily if family.kind == "counter" else core.GaugeMetricFamily
    metric = make(name, family.text, labels=family.labels)
    for labels, value in samples:
        metric.add_metric(labels, value)
    return metric


def _cumulated(counts: list[float], bounds: tuple[float, ...]) -> list[tuple[str, Any]]:
    buckets: list[tuple[str, Any]] = []
    total = 0.0
    for bound, count in zip((*bounds, "+Inf"), counts, strict=False):
        total += count
        buckets.append((str(bound), total))
    return buckets
