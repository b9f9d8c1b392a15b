"""What attempts say of the health of their endpoints."""

from __future__ import annotations

from typing import Any

import pytest

from hoberproxy.accounting.record import Record
from hoberproxy.errors import Phase, UpstreamError
from hoberproxy.exchange.observations import (
    SHORTEST_MEASURED,
    observe_failure,
    observe_success,
    observe_throughput,
)
from hoberproxy.routing.health import Health

KEY = ("acme", "m")
NOW = 100.0


def record(**values: Any) -> Record:
    made = Record("req_1", 0.0, "/v1/chat/completions")
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_a_streams_first_content_is_timed_from_the_request_if_one_attempt_was_made() -> None:
    health = Health()
    first = record(attempts=1, first_content=0.25)
    observe_success(health, KEY, first, NOW, NOW - 9.0, is_stream=True)
    assert health.first_content(KEY, NOW) == 0.25


def test_after_a_failover_it_is_timed_from_the_start_of_the_attempt() -> None:
    health = Health()
    second = record(attempts=2, first_content=30.0)
    observe_success(health, KEY, second, NOW, NOW - 2.0, is_stream=True)
    assert health.first_content(KEY, NOW) == 2.0


def test_a_body_is_timed_only_where_no_stream_was() -> None:
    health = Health()
    observe_success(health, KEY, record(attempts=1, first_content=8.0), NOW, NOW, is_stream=False)
    assert health.first_content(KEY, NOW) == 8.0
    observe_success(health, KEY, record(attempts=1, first_content=1.0), NOW, NOW, is_stream=False)
    assert health.first_content(KEY, NOW) == 8.0


STREAMED = {"has_usage": True, "first_content": 1.0, "total": 3.0, "completion_tokens": 100}


def test_throughput_is_the_tokens_of_a_stream_over_the_time_that_it_was_written() -> None:
    health = Health()
    observe_throughput(health, KEY, record(**STREAMED), NOW)
    assert health.throughput(KEY, NOW) == 50.0


@pytest.mark.parametrize(
    "change",
    [
        {"has_usage": False},
        {"first_content": None},
        {"completion_tokens": 1},
        {"total": 1.0 + SHORTEST_MEASURED / 2},
    ],
    ids=["tokens are estimated", "no content", "one token", "too quick"],
)
def test_other_answers_have_no_throughput(change: dict[str, Any]) -> None:
    health = Health()
    observe_throughput(health, KEY, record(**STREAMED | change), NOW)
    assert health.throughput(KEY, NOW) is None


def broken(**options: Any) -> UpstreamError:
    made = UpstreamError("broken", phase=options.pop("phase", Phase.HEAD), code="upstream_error")
    for name, value in options.items():
        setattr(made, name, value)
    return made


def cools_after(error: UpstreamError, *, is_client_slow: bool = False) -> float | None:
    """Return when the cooldown of an endpoint with this `error` three times ends."""
    health = Health()
    for _ in range(3):
        observe_failure(health, KEY, error, NOW, is_client_slow=is_client_slow, draw=lambda: 0.5)
    return health.cooldown_ends(KEY)


def test_a_failure_counts_against_its_endpoint() -> None:
    assert cools_after(broken()) is not None


def test_an_endpoint_that_says_when_to_come_back_rests_until_then() -> None:
    assert cools_after(broken(upstream_status=429, retry_after=30.0)) == NOW + 30.0


@pytest.mark.parametrize("name", ["is_refusal", "is_doubtful"])
def test_a_wrong_request_does_not_count(name: str) -> None:
    assert cools_after(broken(**{name: True})) is None


@pytest.mark.parametrize("is_client_slow", [True, False])
def test_a_timeout_counts_unless_the_client_was_slow(is_client_slow: bool) -> None:
    ends = cools_after(broken(code="upstream_timeout"), is_client_slow=is_client_slow)
    assert (ends is None) is is_client_slow
