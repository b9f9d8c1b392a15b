"""The counters on a request's path; exposition.py makes Prometheus' text form of them.

A counter of the client library with labels costs 3 µs, a histogram 4: integers in dictionaries
cost a tenth. Nothing is counted for each chunk: gaps between events are computed from a stream's
times and the number of its events.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..access.limits import PICO
from ..errors import FailedAttempt
from .exposition import (
    FIRST_CONTENT_BUCKETS,
    GAP_BUCKETS,
    LAG_BUCKETS,
    REQUEST_BUCKETS,
    unlabelled,
)
from .record import CLIENT_CLOSED, Record

TOKEN_KINDS: Final = ("prompt", "completion", "cached", "reasoning", "cache_write")

_place: Final = bisect_left


class _Histogram:
    """A count a bucket, one for values over the last bucket, and the sum."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[_place(self._bounds, seconds)] += times
        self.total += seconds * times

    @property
    def values(self) -> list[float]:
        """The value of a histogram in a snapshot, as exposition.py describes it."""
        return [*self.counts, self.total]


class _Series:
    """The counts of one model and provider."""

    def __init__(self) -> None:
        self.succeeded = 0
        self.others: dict[str, int] = {}  # by how they ended
        self.has_tokens = False
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self.cache_write_tokens = 0
        self.without_usage = 0  # whole answers
        self.cost = 0  # in PICO
        self.request = _Histogram(REQUEST_BUCKETS)
        self.first_content: _Histogram | None = None  # with the first content
        self.gap: _Histogram | None = None

    @property
    def requests(self) -> dict[str, int]:
        plain = self.succeeded + self.others.get("2xx", 0)
        return self.others | ({"2xx": plain} if plain else {})

    @property
    def tokens(self) -> tuple[int, ...]:
        """The counts in the order of TOKEN_KINDS, empty if no upstream gave any."""
        if not self.has_tokens:
            return ()
        return (
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
            self.cache_write_tokens,
        )


class Metrics:
    """The counts of one process since its start. `label` maps a slug to one of the catalog's."""

    def __init__(self, label: Callable[[str], str]) -> None:
        self.label = label
        self.events = 0  # of all streams that have ended
        self._series: dict[tuple[str, str], _Series] = {}
        self._errors: dict[str, int] = defaultdict(int)
        self._attempts = 0
        self._failed_attempts: dict[tuple[str, str], int] = defaultdict(int)
        self._failovers: dict[tuple[str, str], int] = defaultdict(int)
        self._estimated = 0
        self._lag = _Histogram(LAG_BUCKETS)

    def observe(self, record: Record) -> None:
        """Count a request that has ended."""
        slug = record.slug or (record.requested[0] if record.requested else "")
        key = self.label(slug), record.provider
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series()
        if record.status == 200 and not record.code:
            series.succeeded += 1
            if record.estimated and record.completion_tokens:
                series.without_usage += 1
        else:
            self._observe_failure(record, series)
        self._attempts += record.attempts
        if record.failures:
            self._observe_failed_attempts(record)
        if record.prompt_tokens or record.completion_tokens:
            series.has_tokens = True
            series.prompt_tokens += record.prompt_tokens
            series.completion_tokens += record.completion_tokens
            series.cached_tokens += record.cached_tokens
            series.reasoning_tokens += record.reasoning_tokens
            series.cache_write_tokens += record.cache_write_tokens
        self._estimated += record.estimated
        self.events += record.events
        if (cost := record.cost) is not None:
            series.cost += cost
        series.request.observe(record.total)
        if (first := record.first_content) is not None:
            self._observe_content(record, series, first)

    def _observe_content(self, record: Record, series: _Series, first: float) -> None:
        if series.first_content is None:
            series.first_content = _Histogram(FIRST_CONTENT_BUCKETS)
        series.first_content.observe(first)
        if record.events > 1:
            if series.gap is None:
                series.gap = _Histogram(GAP_BUCKETS)
            gaps = record.events - 1
            series.gap.observe((record.total - first) / gaps, gaps)

    def _observe_failure(self, record: Record, series: _Series) -> None:
        self._errors[record.code] += 1
        status = _status_class(record)
        series.others[status] = series.others.get(status, 0) + 1

    def _observe_failed_attempts(self, record: Record) -> None:
        for failure in record.failures:
            self._failed_attempts[failure.provider, failure.phase] += 1
        # As many tries followed as there were, but for the first.
        for failure in record.failures[: record.attempts - 1]:
            self._failovers[failure.provider, _reason(failure)] += 1

    def observe_lag(self, seconds: float) -> None:
        """Count that the loop was late for a timer by `seconds`."""
        self._lag.observe(max(seconds, 0.0))

    def snapshot(self) -> dict[str, list[Any]]:
        """Return all counts as a snapshot (see exposition.py)."""
        return {
            "requests": [
                [[*key, status], count]
                for key, series in self._series.items()
                for status, count in series.requests.items()
            ],
            "errors": [[[code], count] for code, count in self._errors.items()],
            "tokens": [
                [[*key, kind], count]
                for key, series in self._series.items()
                for kind, count in zip(TOKEN_KINDS, series.tokens, strict=False)
            ],
            "cost_dollars": [
                [list(key), series.cost / PICO]
                for key, series in self._series.items()
                if series.cost
            ],
            "failed_attempts": _samples(self._failed_attempts),
            "failovers": _samples(self._failovers),
            "first_content_seconds": self._histograms(lambda series: series.first_content),
            "request_seconds": self._histograms(lambda series: series.request),
            "event_gap_seconds": self._histograms(lambda series: series.gap),
            "loop_lag_seconds": [[[], self._lag.values]],
            "usage_missing": [
                [list(key), series.without_usage]
                for key, series in self._series.items()
                if series.without_usage
            ],
            **unlabelled({"attempts": self._attempts, "estimated_requests": self._estimated}),
        }

    def _histograms(self, of: Callable[[_Series], _Histogram | None]) -> list[Any]:
        return [
            [list(key), histogram.values]
            for key, series in self._series.items()
            if (histogram := of(series)) is not None
        ]


def _samples(counts: Mapping[Any, int]) -> list[Any]:
    return [[list(labels), count] for labels, count in counts.items()]


def _status_class(record: Record) -> str:
    """Return 2xx, 4xx or 5xx, or a word for a client that went away or a broken stream."""
    if record.status == CLIENT_CLOSED:
        return "client_closed"
    if record.status == 200 and record.is_failure:
        return "broken"
    return f"{record.status // 100}xx"


def _reason(failure: FailedAttempt) -> str:
    """Return why an attempt failed, as a label."""
    if failure.code == "upstream_timeout":
        return "timeout"
    if failure.status is None:
        return failure.phase if failure.phase == "connect" else "broken"
    if failure.status == 429:
        return "rate_limit"
    return f"{failure.status // 100}xx" if failure.status >= 400 else "broken"
