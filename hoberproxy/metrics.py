"""Plain counters on the request's path, turned into Prometheus' text form when scraped.

A counter of the client library with labels costs 3 µs, a histogram 4: integers in dictionaries
cost a tenth, and the library is only imported by the first scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .record import CLIENT_CLOSED, Record

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds: from a local model's first token to a long prompt on a busy server.
FIRST_CONTENT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_KINDS = ("prompt", "completion", "cached", "reasoning")


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is so at the moment of a scrape."""

    streams_open: int
    connections_open: int
    upstream_connections: Mapping[str, tuple[int, int]]  # provider → idle, busy
    records_queued: int
    records_lost: int
    journal_lost: int
    log_lines_lost: int


class Metrics:
    """Counts of one process since its start. `label` maps a slug to one of the catalog's."""

    def __init__(self, label: Callable[[str], str]) -> None:
        self.label = label
        self.bad_heads = 0
        self._requests: dict[tuple[str, str, str], int] = defaultdict(int)
        self._tokens: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self._failed_attempts: dict[tuple[str, str], int] = defaultdict(int)
        self._estimated = 0
        self._first_content: dict[tuple[str, str], list[float]] = {}

    def observe(self, record: Record) -> None:
        """Count a request that has ended."""
        model = self.label(record.slug or (record.requested[0] if record.requested else ""))
        provider = record.provider
        is_plain = record.status == 200 and not record.code
        self._requests[model, provider, "2xx" if is_plain else _status_class(record)] += 1
        for failure in record.failures:
            self._failed_attempts[failure.provider, failure.phase] += 1
        if record.prompt_tokens or record.completion_tokens:
            counts = self._tokens[model, provider]
            counts[0] += record.prompt_tokens
            counts[1] += record.completion_tokens
            counts[2] += record.cached_tokens
            counts[3] += record.reasoning_tokens
        self._estimated += record.estimated
        if record.first_content is not None:
            self._observe_first_content((model, provider), record.first_content)

    def _observe_first_content(self, key: tuple[str, str], seconds: float) -> None:
        counts = self._first_content.get(key)
        if counts is None:
            # One count a bucket, one for what is over the last, and the sum.
            counts = self._first_content[key] = [0.0] * (len(FIRST_CONTENT_BUCKETS) + 2)
        counts[bisect_left(FIRST_CONTENT_BUCKETS, seconds)] += 1
        counts[-1] += seconds

    def render(self, gauges: Gauges) -> bytes:
        """All of it in the text format, version 0.0.4."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(self._families(gauges)))
        return generate_latest(registry)

    def _families(self, gauges: Gauges) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        yield _counter(
            "hoberproxy_requests",
            "Chat requests that have ended.",
            ("model", "provider", "status"),
            self._requests,
        )
        yield _counter(
            "hoberproxy_tokens",
            "Tokens counted; cached are part of prompt, reasoning of completion.",
            ("model", "provider", "kind"),
            {
                (*labels, kind): count
                for labels, counts in self._tokens.items()
                for kind, count in zip(TOKEN_KINDS, counts, strict=True)
            },
        )
        yield _counter(
            "hoberproxy_failed_attempts",
            "Tries on an endpoint that failed, by how far they had come.",
            ("provider", "phase"),
            self._failed_attempts,
        )
        first_content = HistogramMetricFamily(
            "hoberproxy_first_content_seconds",
            "Time from a request's head to its first content.",
            labels=("model", "provider"),
        )
        for labels, counts in self._first_content.items():
            first_content.add_metric(labels, _cumulated(counts), sum_value=counts[-1])
        yield first_content
        yield from _plain_counters(
            hoberproxy_bad_heads=("Requests refused before they were one.", self.bad_heads),
            hoberproxy_estimated_requests=("Requests counted by estimate.", self._estimated),
            hoberproxy_records_lost=("Records that could not be kept.", gauges.records_lost),
            hoberproxy_journal_entries_lost=(
                "Entries the journal had no room for: a crash would lose them.",
                gauges.journal_lost,
            ),
            hoberproxy_log_lines_lost=("Log lines dropped.", gauges.log_lines_lost),
        )
        yield from _plain_gauges(
            hoberproxy_requests_open=("Chat requests under way.", gauges.streams_open),
            hoberproxy_connections_open=("Connections of clients.", gauges.connections_open),
            hoberproxy_records_queued=("Records on their way.", gauges.records_queued),
        )
        yield _pools(gauges.upstream_connections)


class _Snapshot:
    """A collector in the client library's sense."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _status_class(record: Record) -> str:
    """2xx, 4xx, 5xx; a client that went away and a stream that broke have words of their own."""
    if record.status == CLIENT_CLOSED:
        return "client_closed"
    if record.status == 200 and record.is_failure:
        return "broken"
    return f"{record.status // 100}xx"


def _counter(name: str, text: str, labels: tuple[str, ...], counts: Mapping[Any, int]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def _plain_counters(**counts: tuple[str, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    for name, (text, value) in counts.items():
        yield CounterMetricFamily(name, text, value=value)


def _plain_gauges(**values: tuple[str, int]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    for name, (text, value) in values.items():
        yield GaugeMetricFamily(name, text, value=value)


def _pools(connections: Mapping[str, tuple[int, int]]) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(
        "hoberproxy_upstream_connections", "Connections to providers.", labels=("provider", "state")
    )
    for provider, (idle, busy) in connections.items():
        family.add_metric((provider, "idle"), idle)
        family.add_metric((provider, "busy"), busy)
    return family


def _cumulated(counts: list[float]) -> list[tuple[str, Any]]:
    buckets: list[tuple[str, Any]] = []
    total = 0.0
    for bound, count in zip((*FIRST_CONTENT_BUCKETS, "+Inf"), counts, strict=False):
        total += count
        buckets.append((str(bound), total))
    return buckets
