"""Counts as a scraper reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hoberproxy.accounting.exposition import CONTENT_TYPE, FIRST_CONTENT_BUCKETS, render
from hoberproxy.accounting.metrics import Metrics
from hoberproxy.accounting.record import CLIENT_CLOSED, Record
from hoberproxy.errors import FailedAttempt
from hoberproxy.routing.catalog import Catalog, Endpoint, Model

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def record(**values: Any) -> Record:
    defaults: dict[str, Any] = {
        "id": "r",
        "started": 0.0,
        "slug": "a/b",
        "provider": "east",
        "status": 200,
    }
    return Record(**(defaults | values))


def metrics_of(*records: Record, label: Callable[[str], str] = str) -> Metrics:
    metrics = Metrics(label)
    for one in records:
        metrics.observe(one)
    return metrics


def scrape(metrics: Metrics) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(render(metrics.snapshot()).decode())
        for sample in family.samples
    }


def of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def named(samples: Samples, name: str) -> dict[frozenset[tuple[str, str]], float]:
    return {labels: value for (found, labels), value in samples.items() if found == name}


def test_the_content_type_is_that_of_the_text_format() -> None:
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


def test_every_family_has_a_type_and_a_text() -> None:
    metrics = metrics_of(record(first_content=1.0, prompt_tokens=1))
    families = list(text_string_to_metric_families(render(metrics.snapshot()).decode()))
    assert len(families) == len({family.name for family in families}) > 10
    for family in families:
        assert family.name.startswith("hoberproxy_")
        assert family.type in ("counter", "gauge", "histogram")
        assert family.documentation.endswith(".")


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"status": 200}, "2xx"),
        ({"status": 200, "code": "upstream_error"}, "broken"),
        ({"status": 404, "code": "model_not_found"}, "4xx"),
        ({"status": 502, "code": "upstream_error"}, "5xx"),
        ({"status": CLIENT_CLOSED, "code": "client_closed"}, "client_closed"),
    ],
)
def test_a_request_is_counted_by_how_it_ended(values: dict[str, Any], status: str) -> None:
    samples = scrape(metrics_of(record(**values), record(**values)))
    expected = of("hoberproxy_requests_total", model="a/b", provider="east", status=status)
    assert samples[expected] == 2
    assert len(named(samples, "hoberproxy_requests_total")) == 1


def test_tokens_add_up_by_kind() -> None:
    counted = record(
        prompt_tokens=10,
        completion_tokens=5,
        cached_tokens=4,
        reasoning_tokens=3,
        cache_write_tokens=2,
    )
    samples = scrape(metrics_of(counted, counted, record(estimated=True, prompt_tokens=1)))
    tokens = {
        kind: samples[of("hoberproxy_tokens_total", model="a/b", provider="east", kind=kind)]
        for kind in ("prompt", "completion", "cached", "reasoning", "cache_write")
    }
    assert tokens == {
        "prompt": 21,
        "completion": 10,
        "cached": 8,
        "reasoning": 6,
        "cache_write": 4,
    }
    assert samples[of("hoberproxy_estimated_requests_total")] == 1


def test_whole_answers_without_usage_are_counted_and_no_others() -> None:
    guessed: dict[str, Any] = {"estimated": True, "prompt_tokens": 9, "completion_tokens": 5}
    left = record(**guessed, status=CLIENT_CLOSED, code="client_closed")
    broken = record(**guessed, code="upstream_error")
    empty = record(**guessed | {"completion_tokens": 0})
    reported = record(prompt_tokens=9, completion_tokens=5, has_usage=True)
    samples = scrape(metrics_of(left, broken, empty, reported))
    assert not named(samples, "hoberproxy_usage_missing_total")
    samples = scrape(
        metrics_of(left, broken, empty, reported, record(**guessed), record(**guessed))
    )
    missing = of("hoberproxy_usage_missing_total", model="a/b", provider="east")
    assert samples[missing] == 2


def test_failed_attempts_are_counted_by_provider_and_phase() -> None:
    failures = (
        FailedAttempt("west", 503, "upstream_error", "head", 12),
        FailedAttempt("west", None, "upstream_timeout", "connect", 5000),
        FailedAttempt("west", 500, "upstream_error", "head", 3),
    )
    samples = scrape(metrics_of(record(failures=failures)))
    attempts = "hoberproxy_failed_attempts_total"
    assert samples[of(attempts, provider="west", phase="head")] == 2
    assert samples[of(attempts, provider="west", phase="connect")] == 1


def test_the_histogram_counts_each_time_in_its_bucket_and_all_above() -> None:
    times = [0.0, 0.05, 0.050001, 0.7, 300.0, 301.0]
    samples = scrape(metrics_of(*[record(first_content=time) for time in times]))
    name, labels = "hoberproxy_first_content_seconds", {"model": "a/b", "provider": "east"}
    buckets = {
        float(dict(found)["le"]): value for found, value in named(samples, name + "_bucket").items()
    }
    bounds = [*FIRST_CONTENT_BUCKETS, float("inf")]
    assert buckets == {bound: sum(time <= bound for time in times) for bound in bounds}
    assert samples[of(name + "_count", **labels)] == len(times)
    assert samples[of(name + "_sum", **labels)] == pytest.approx(sum(times))


def test_a_request_without_content_is_in_no_bucket() -> None:
    assert not named(scrape(metrics_of(record())), "hoberproxy_first_content_seconds_count")


def test_invented_slugs_share_labels() -> None:
    endpoint = (Endpoint("east", "m"),)
    catalog = Catalog([Model("a/b", endpoint), Model("open/*", (Endpoint("east", "*"),))])
    slugs = [f"made/up-{number}" for number in range(100)]
    slugs += [f"open/{number}" for number in range(100)]
    unknown = [record(slug="", provider="", requested=(slug,), status=404) for slug in slugs]
    served = [record(slug=slug, first_content=1.0, prompt_tokens=1) for slug in slugs]
    samples = scrape(
        metrics_of(*unknown, *served, record(slug="", requested=()), label=catalog.label)
    )
    models = {dict(labels)["model"] for _, labels in samples if "model" in dict(labels)}
    assert models == {"other", "open/*"}


def test_labels_are_escaped() -> None:
    samples = scrape(metrics_of(record(slug='a"b\\\n')))
    assert (
        of("hoberproxy_requests_total", model='a"b\\\n', provider="east", status="2xx") in samples
    )


def test_counters_never_fall_from_scrape_to_scrape() -> None:
    metrics = metrics_of(record(first_content=0.1, prompt_tokens=3))
    first = scrape(metrics)
    assert scrape(metrics) == first
    metrics.observe(record(first_content=0.1, prompt_tokens=3))
    second = scrape(metrics)
    assert all(second[key] >= value for key, value in first.items())
    assert second[of("hoberproxy_first_content_seconds_count", model="a/b", provider="east")] == 2


def test_failovers_are_failures_that_another_attempt_followed() -> None:
    failures = (
        FailedAttempt("east", 429, "upstream_error", "head", 1),
        FailedAttempt("west", None, "upstream_error", "connect", 1),
        FailedAttempt("north", None, "upstream_timeout", "opening", 1),
    )
    recovered = record(failures=failures[:2], attempts=3)
    in_vain = record(failures=failures, attempts=3, status=504, code="upstream_timeout")
    samples = scrape(metrics_of(recovered, in_vain))
    name = "hoberproxy_failovers_total"
    assert named(samples, name) == {
        frozenset({("provider", "east"), ("reason", "rate_limit")}): 2,
        frozenset({("provider", "west"), ("reason", "connect")}): 2,
    }
    assert samples[of("hoberproxy_attempts_total")] == 6
    assert samples[of("hoberproxy_errors_total", code="upstream_timeout")] == 1


def test_the_gaps_of_a_stream_are_counted_at_its_end() -> None:
    samples = scrape(metrics_of(record(first_content=1.0, total=2.0, events=11)))
    labels = {"model": "a/b", "provider": "east"}
    assert samples[of("hoberproxy_event_gap_seconds_count", **labels)] == 10
    assert samples[of("hoberproxy_event_gap_seconds_sum", **labels)] == 1.0
    assert samples[of("hoberproxy_event_gap_seconds_bucket", **labels, le="0.1")] == 10
    assert samples[of("hoberproxy_event_gap_seconds_bucket", **labels, le="0.05")] == 0
    assert samples[of("hoberproxy_request_seconds_sum", **labels)] == 2.0


def test_a_late_loop_is_counted() -> None:
    metrics = metrics_of()
    metrics.observe_lag(0.3)
    metrics.observe_lag(-0.001)  # a clock that was read a little earlier
    samples = scrape(metrics)
    assert samples[of("hoberproxy_loop_lag_seconds_count")] == 2
    assert samples[of("hoberproxy_loop_lag_seconds_sum")] == 0.3
