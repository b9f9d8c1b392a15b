"""The counts of several processes as one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hoberproxy.accounting.exposition import FAMILIES, LAG_BUCKETS, merge, render, resident_bytes

COUNTS = st.lists(
    st.tuples(
        st.tuples(*[st.sampled_from(["a", "b"])] * 3),
        st.integers(0, 10**6),
    ),
    unique_by=lambda sample: sample[0],
).map(lambda samples: {"requests": [[list(labels), value] for labels, value in samples]})


def lag(*values: float) -> dict[str, Any]:
    return {"loop_lag_seconds": [[[], list(values)]]}


@given(st.lists(COUNTS, max_size=5))
def test_a_sum_has_each_count_once(snapshots: list[dict[str, Any]]) -> None:
    merged = merge(snapshots)
    total = sum(value for each in snapshots for _, value in each["requests"])
    assert sum(value for _, value in merged.get("requests", [])) == total
    assert merge([merged]) == merged


def test_histograms_are_added_place_by_place() -> None:
    counts = [1.0] * (len(LAG_BUCKETS) + 2)
    assert merge([lag(*counts), lag(*counts)]) == lag(*[2.0] * len(counts))


def test_of_processes_that_have_ended_only_counters_stay() -> None:
    snapshot = {"requests_open": [[[], 3]], "attempts": [[[], 4]]}
    assert merge([snapshot], ended=True) == {"attempts": [[[], 4]]}


def test_metrics_of_another_version_are_left_out() -> None:
    assert merge([{"of_tomorrow": [[[], 1]]}]) == {}
    assert merge([lag(1.0, 2.0), lag(1.0, 2.0, 3.0)]) == lag(1.0, 2.0, 3.0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_family_has_its_name_in_the_text_form(family: Any) -> None:
    labels = ["x"] * len(family.labels)
    value: Any = [1.0] * (len(family.buckets) + 2) if family.buckets else 1
    text = render({family.name: [[labels, value]]}).decode()
    (metric,) = text_string_to_metric_families(text)
    assert metric.name == f"hoberproxy_{family.name}"
    assert metric.type == family.kind
    names = {sample.name for sample in metric.samples}
    if family.kind == "histogram":
        counts = [s.value for s in metric.samples if s.name.endswith("_bucket")]
        assert counts == sorted(counts) and counts[-1] == len(family.buckets) + 1
    elif family.kind == "counter":
        assert names == {f"hoberproxy_{family.name}_total"}


def test_resident_memory_is_in_bytes() -> None:
    assert 1_000_000 < resident_bytes() < 10**10
