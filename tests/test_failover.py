"""Which step follows a failure, and which error the client gets: on values alone."""

from __future__ import annotations

from typing import Any

import pytest

from hoberproxy.catalog import Endpoint
from hoberproxy.errors import Phase, UpstreamError
from hoberproxy.failover import Failover
from hoberproxy.health import Health
from hoberproxy.routing import Plan, Step
from hoberproxy.settings import RoutingSettings


def failover(*slugs: str, reason: str = "config", **settings: Any) -> Failover:
    """One whose steps are `slugs` at providers p0, p1, …"""
    steps = [Step(slug, Endpoint(f"p{i}", "m"), reason) for i, slug in enumerate(slugs)]
    return Failover(Plan(tuple(steps)), RoutingSettings(**settings))


def broken(upstream_status: int = 500, **options: Any) -> UpstreamError:
    """A failure that another endpoint may not have."""
    options = {"phase": Phase.HEAD} | options
    return UpstreamError("broken", upstream_status=upstream_status, **options)


def refused(status: int = 400) -> UpstreamError:
    """A request that the upstream has read and does not take."""
    return broken(status, status=status, is_refusal=True, is_retryable=False)


def conclude(tried: Failover, *, has_begun: bool = False) -> UpstreamError:
    return tried.conclude(has_begun=has_begun, health=Health(), now=100.0)


def test_each_step_is_tried_once_and_in_order() -> None:
    tried = failover("a", "a", "b")
    providers = [tried.step.endpoint.provider]
    for _ in range(2):
        tried.note(broken(), 0.1)
        assert tried.advance(1.0)
        providers.append(tried.step.endpoint.provider)
    tried.note(broken(), 0.1)
    assert not tried.advance(1.0)
    assert providers == ["p0", "p1", "p2"]


def test_a_model_that_refuses_the_request_is_not_asked_at_another_endpoint() -> None:
    tried = failover("a", "a", "b", "a", "b")
    tried.note(refused(), 0.1)
    assert tried.advance(1.0)
    assert tried.step.slug == "b"
    tried.note(broken(), 0.1)
    assert tried.advance(1.0)
    assert tried.step.endpoint.provider == "p4", "also not behind another model's failure"


def test_what_another_endpoint_cannot_mend_is_the_end() -> None:
    tried = failover("a", "b")
    tried.note(broken(is_retryable=False, phase=Phase.CONTENT), 0.1)
    assert not tried.advance(1.0)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_attempts_are_made_than_the_settings_allow(most: int) -> None:
    tried, attempts = failover("a", "b", "c", "d", max_attempts=most), 1
    tried.note(broken(), 0.1)
    while tried.advance(1.0):
        attempts += 1
        tried.note(broken(), 0.1)
    assert attempts == most


@pytest.mark.parametrize(("elapsed", "goes_on"), [(9.9, True), (10.0, False)])
def test_no_attempt_is_begun_too_late(elapsed: float, goes_on: bool) -> None:
    tried = failover("a", "b", attempts_timeout=10.0)
    tried.note(broken(), 0.1)
    assert tried.advance(elapsed) is goes_on


def test_a_failure_is_kept_in_our_own_words() -> None:
    tried = failover("a")
    tried.note(broken(502, code="theirs", phase=Phase.OPENING), 1.2345)
    (failure,) = tried.failures
    assert (failure.provider, failure.status, failure.phase) == ("p0", 502, "opening")
    assert failure.milliseconds == 1234


def test_the_client_gets_the_last_error_and_in_it_those_before() -> None:
    tried = failover("a", "a", "a")
    for status in (500, 501):
        tried.note(broken(status), 0.1)
        tried.advance(1.0)
    last = broken(502)
    tried.note(last, 0.1)
    assert conclude(tried) is last
    assert last.metadata["provider"] == "p2"
    assert [each["status"] for each in last.metadata["previous_errors"]] == [500, 501]


def test_an_error_alone_has_no_others_in_it() -> None:
    tried = failover("a")
    tried.note(broken(), 0.1)
    assert "previous_errors" not in conclude(tried).metadata


def test_a_refusal_says_more_than_what_failed_after_it_and_all_are_in_it() -> None:
    tried, refusal = failover("a", "b"), refused()
    tried.note(refusal, 0.1)
    tried.advance(1.0)
    tried.note(broken(), 0.1)
    assert conclude(tried) is refusal
    assert [each["status"] for each in refusal.metadata["previous_errors"]] == [400, 500]


def test_an_answer_that_has_begun_ends_with_its_own_error() -> None:
    tried, last = failover("a", "b"), broken(phase=Phase.CONTENT, is_retryable=False)
    tried.note(refused(), 0.1)
    tried.advance(1.0)
    tried.note(last, 0.1)
    assert conclude(tried, has_begun=True) is last


def cooled(ends: dict[str, float]) -> Health:
    """Health in which endpoints cool until these times, set at 100."""
    health = Health()
    for provider, end in ends.items():
        health.observe_failure((provider, "m"), 100.0, retry_after=end - 100.0, draw=lambda: 0.5)
    return health


def test_where_all_had_been_failing_before_the_client_hears_when_to_come_back() -> None:
    tried, last = failover("a", "a", reason="cooldown"), broken()
    tried.note(broken(), 0.1)
    tried.advance(1.0)
    tried.note(last, 0.1)
    health = cooled({"p0": 130.0, "p1": 120.0})
    assert tried.conclude(has_begun=False, health=health, now=100.0) is last
    assert (last.status, last.code, last.retry_after) == (503, "no_healthy_upstream", 20.0)
    assert len(last.metadata["previous_errors"]) == 2


@pytest.mark.parametrize("now", [100.0, 119.5, 500.0])
def test_to_come_back_takes_a_second_at_least(now: float) -> None:
    tried, last = failover("a", reason="cooldown"), broken()
    tried.note(last, 0.1)
    tried.conclude(has_begun=False, health=cooled({"p0": 120.0}), now=now)
    assert last.retry_after == max(120.0 - now, 1.0)


@pytest.mark.parametrize(
    ("reason", "error"),
    [("config", broken()), ("cooldown", refused())],
    ids=["one was thought well", "a refusal"],
)
def test_otherwise_an_error_keeps_its_status(reason: str, error: UpstreamError) -> None:
    tried, status = failover("a", reason=reason), error.status
    tried.note(error, 0.1)
    assert conclude(tried).status == status
    assert error.retry_after is None


def test_an_answer_that_has_begun_keeps_its_status() -> None:
    tried, last = failover("a", reason="cooldown"), broken(is_retryable=False)
    tried.note(last, 0.1)
    assert conclude(tried, has_begun=True).status == 502
