"""The bench's histograms err by at most 1 %, and merging them loses nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.histogram import PERCENTILES, Histogram

VALUES = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 100_000), min_size=1)


def histogram(values: list[int]) -> Histogram:
    result = Histogram()
    for value in values:
        result.record(value)
    return result


@given(VALUES)
def test_quantiles_are_within_one_percent_of_the_nearest_rank(values: list[int]) -> None:
    recorded, ordered = histogram(values), sorted(values)
    for percent in PERCENTILES:
        exact = ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]
        assert abs(recorded.percentile(percent) - exact) <= exact * 0.01


@given(VALUES)
def test_largest_mean_and_count_are_exact(values: list[int]) -> None:
    recorded = histogram(values)
    assert recorded.largest == max(values)
    assert recorded.count == len(values)
    assert recorded.mean() == pytest.approx(sum(values) / len(values))


@given(VALUES, VALUES)
def test_merging_is_the_same_as_recording_all_in_one(first: list[int], second: list[int]) -> None:
    merged, whole = histogram(first), histogram(first + second)
    merged.merge(histogram(second))
    assert merged.summary() == whole.summary()


@given(VALUES)
def test_recording_many_at_once_is_the_same_as_one_by_one(values: list[int]) -> None:
    at_once = Histogram()
    at_once.record_all(values)
    assert at_once.summary() == histogram(values).summary()


def test_a_value_can_be_recorded_several_times() -> None:
    repeated = Histogram()
    repeated.record(7, 3)
    assert repeated.summary() == histogram([7, 7, 7]).summary()


def test_a_value_outside_the_range_counts_as_the_nearest_within() -> None:
    assert histogram([-5]).largest == 0
    assert histogram([2**70]).largest == 2**63 - 1


def test_an_empty_one_has_no_quantiles() -> None:
    summary = Histogram().summary()
    assert summary.count == 0
    assert summary.p50 is None and summary.max is None and summary.mean is None


def test_a_summary_is_in_the_unit_asked_for() -> None:
    summary = histogram([2_000_000]).summary(1e6)
    assert summary.p50 == summary.max == summary.mean == 2.0
