"""Histograms of whole numbers, log-linear as HDR ones: at most 1 % error, whatever the range.

Each power of two is cut into 128 equal buckets; up to 256 each value has one of its own. Values
are times in ns here, but any number from 0 to 2**63 will do. Knows nothing of units or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

_BITS = 7
_SUB = (
    1 << _BITS
)  # buckets of a power of two: 1/128 wide, so a bucket's middle is 0.4 % off at most
_BUCKETS = (64 - _BITS) * _SUB
_LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Summary:
    """Quantiles, largest and mean of what was recorded; None where nothing was."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    max: float | None
    mean: float | None


class Histogram:
    """Counts of values. Recording takes the same short time however many there are."""

    __slots__ = ("_counts", "count", "largest", "total")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.total = 0
        self.largest = 0

    def record(self, value: int, times: int = 1) -> None:
        """Count `value`. One below zero counts as zero: two clocks may differ by a little."""
        if value < 0:
            value = 0
        elif value > _LARGEST:
            value = _LARGEST
        shift = value.bit_length() - _BITS - 1
        if shift < 0:
            shift = 0
        self._counts[(shift << _BITS) + (value >> shift)] += times
        self.count += times
        self.total += value * times
        if value > self.largest:
            self.largest = value

    def record_all(self, values: Iterable[int]) -> None:
        """Count each of many values, at half the cost of one call for each."""
        counts, total, largest, count = self._counts, 0, self.largest, 0
        for value in values:
            if not 0 <= value <= _LARGEST:
                value = min(max(value, 0), _LARGEST)
            shift = value.bit_length() - _BITS - 1
            if shift < 0:
                shift = 0
            counts[(shift << _BITS) + (value >> shift)] += 1
            total += value
            count += 1
            if value > largest:
                largest = value
        self.count += count
        self.total += total
        self.largest = largest

    def merge(self, other: Histogram) -> None:
        """Count all that the other one counted."""
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.count += other.count
        self.total += other.total
        self.largest = max(self.largest, other.largest)

    def percentile(self, percent: float) -> int:
        """The value at this rank (nearest rank), as its bucket's middle. 0 if there is none."""
        rank = max(1, math.ceil(self.count * percent / 100))
        if rank >= self.count:
            return self.largest
        seen = 0
        for index, times in enumerate(self._counts):
            seen += times
            if seen >= rank:
                return min(_middle(index), self.largest)
        raise AssertionError("the counts of the buckets do not add up to the count")

    def mean(self) -> float:
        """The exact mean; 0 if there is none."""
        return self.total / self.count if self.count else 0.0

    def summary(self, unit: float = 1.0) -> Summary:
        """All of it, divided by `unit`: 1e6 makes ms of ns."""
        if not self.count:
            return Summary(0, None, None, None, None, None, None)
        p50, p90, p99, p999 = (self.percentile(each) / unit for each in PERCENTILES)
        largest, mean = self.largest / unit, self.mean() / unit
        return Summary(self.count, p50, p90, p99, p999, largest, mean)


def _middle(index: int) -> int:
    if index < 2 * _SUB:
        return index
    shift = (index >> _BITS) - 1
    return ((index - (shift << _BITS)) << shift) + ((1 << shift) >> 1)
