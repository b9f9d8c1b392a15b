"""Plain counters on the request's path; exposition.py makes Prometheus' text form of them.

A counter of the client library with labels costs 3 µs, a histogram 4: integers in dictionaries
cost a tenth. Nothing is counted for each chunk: gaps between events come from a stream's times and
the number of its events.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import FailedAttempt
from .exposition import (
    CONTENT_TYPE,
    FIRST_CONTENT_BUCKETS,
    GAP_BUCKETS,
    LAG_BUCKETS,
    REQUEST_BUCKETS,
    empty_histogram,
    render,
)
from .limits import PICO
from .record import CLIENT_CLOSED, Record

__all__ = ["CONTENT_TYPE", "FIRST_CONTENT_BUCKETS", "Gauges", "Metrics"]

TOKEN_KINDS = ("prompt", "completion", "cached", "reasoning")

_Histograms = dict[tuple[str, str], list[float]]


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
    resident_bytes: int = 0


class Metrics:
    """Counts of one process since its start. `label` maps a slug to one of the catalog's."""

    def __init__(self, label: Callable[[str], str]) -> None:
        self.label = label
        self.bad_heads = 0
        self.refused_connections = 0
        self.events = 0  # of all streams that have ended
        self._requests: dict[tuple[str, str, str], int] = defaultdict(int)
        self._errors: dict[str, int] = defaultdict(int)
        self._tokens: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self._cost: dict[tuple[str, str], int] = defaultdict(int)  # in PICO
        self._attempts = 0
        self._failed_attempts: dict[tuple[str, str], int] = defaultdict(int)
        self._failovers: dict[tuple[str, str], int] = defaultdict(int)
        self._estimated = 0
        self._first_content: _Histograms = {}
        self._request: _Histograms = {}
        self._gap: _Histograms = {}
        self._lag = empty_histogram(LAG_BUCKETS)

    def observe(self, record: Record) -> None:
        """Count a request that has ended."""
        model = self.label(record.slug or (record.requested[0] if record.requested else ""))
        provider = record.provider
        is_plain = record.status == 200 and not record.code
        self._requests[model, provider, "2xx" if is_plain else _status_class(record)] += 1
        self._attempts += record.attempts
        if not is_plain:
            self._errors[record.code] += 1
        if record.failures:
            self._observe_failures(record)
        if record.prompt_tokens or record.completion_tokens:
            counts = self._tokens[model, provider]
            counts[0] += record.prompt_tokens
            counts[1] += record.completion_tokens
            counts[2] += record.cached_tokens
            counts[3] += record.reasoning_tokens
        self._estimated += record.estimated
        self.events += record.events
        key = model, provider
        if record.cost:
            self._cost[key] += record.cost
        _observe(self._request, key, REQUEST_BUCKETS, record.total)
        first = record.first_content
        if first is not None:
            _observe(self._first_content, key, FIRST_CONTENT_BUCKETS, first)
            if record.events > 1:
                gaps = record.events - 1
                mean = (record.total - first) / gaps
                _observe(self._gap, key, GAP_BUCKETS, mean, gaps)

    def _observe_failures(self, record: Record) -> None:
        for failure in record.failures:
            self._failed_attempts[failure.provider, failure.phase] += 1
        # As many tries followed as there were, but for the first.
        for failure in record.failures[: record.attempts - 1]:
            self._failovers[failure.provider, _reason(failure)] += 1

    def observe_lag(self, seconds: float) -> None:
        """The loop came so late to a timer."""
        seconds = max(seconds, 0.0)
        self._lag[bisect_left(LAG_BUCKETS, seconds)] += 1
        self._lag[-1] += seconds

    def snapshot(self, gauges: Gauges) -> dict[str, list[Any]]:
        """All counts and gauges, as JSON can have them."""
        return {
            "requests": _samples(self._requests),
            "errors": [[[code], count] for code, count in self._errors.items()],
            "tokens": [
                [[*labels, kind], count]
                for labels, counts in self._tokens.items()
                for kind, count in zip(TOKEN_KINDS, counts, strict=True)
            ],
            "cost_dollars": [[list(key), cost / PICO] for key, cost in self._cost.items()],
            "attempts": [[[], self._attempts]],
            "failed_attempts": _samples(self._failed_attempts),
            "failovers": _samples(self._failovers),
            "first_content_seconds": _samples(self._first_content),
            "request_seconds": _samples(self._request),
            "event_gap_seconds": _samples(self._gap),
            "loop_lag_seconds": [[[], list(self._lag)]],
            "bad_heads": [[[], self.bad_heads]],
            "refused_connections": [[[], self.refused_connections]],
            "estimated_requests": [[[], self._estimated]],
            "records_lost": [[[], gauges.records_lost]],
            "journal_entries_lost": [[[], gauges.journal_lost]],
            "log_lines_lost": [[[], gauges.log_lines_lost]],
            "requests_open": [[[], gauges.streams_open]],
            "connections_open": [[[], gauges.connections_open]],
            "records_queued": [[[], gauges.records_queued]],
            "resident_bytes": [[[], gauges.resident_bytes]],
            "upstream_connections": [
                [[provider, state], count]
                for provider, counts in gauges.upstream_connections.items()
                for state, count in zip(("idle", "busy"), counts, strict=True)
            ],
        }

    def render(self, gauges: Gauges) -> bytes:
        """All of it in the text format, version 0.0.4."""
        return render(self.snapshot(gauges))


def _samples(counts: Mapping[Any, Any]) -> list[Any]:
    return [
        [list(labels), list(value) if isinstance(value, list) else value]
        for labels, value in counts.items()
    ]


def _observe(
    histograms: _Histograms,
    key: tuple[str, str],
    buckets: tuple[float, ...],
    seconds: float,
    times: int = 1,
) -> None:
    counts = histograms.get(key)
    if counts is None:
        counts = histograms[key] = empty_histogram(buckets)
    counts[bisect_left(buckets, seconds)] += times
    counts[-1] += seconds * times


def _status_class(record: Record) -> str:
    """2xx, 4xx, 5xx; a client that went away and a stream that broke have words of their own."""
    if record.status == CLIENT_CLOSED:
        return "client_closed"
    if record.status == 200 and record.is_failure:
        return "broken"
    return f"{record.status // 100}xx"


def _reason(failure: FailedAttempt) -> str:
    """Why a try failed, in few words: a label."""
    if failure.code == "upstream_timeout":
        return "timeout"
    if failure.status is None:
        return failure.phase if failure.phase == "connect" else "broken"
    if failure.status == 429:
        return "rate_limit"
    return f"{failure.status // 100}xx" if failure.status >= 400 else "broken"
