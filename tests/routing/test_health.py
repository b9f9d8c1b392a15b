from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hoberproxy.routing.health import (
    ESTIMATE_LIFE,
    FIRST_COOLDOWN,
    JITTER,
    LONGEST_COOLDOWN,
    LONGEST_RETRY_AFTER,
    TRIAL,
    Health,
)

KEY = ("p", "m")
OTHER = ("q", "m")


def middle() -> float:
    """A draw that leaves a cooldown at its plain length."""
    return 0.5


def fail(health: Health, now: float, times: int = 1, *, retry_after: float | None = None) -> None:
    for _ in range(times):
        health.observe_failure(KEY, now, retry_after=retry_after, draw=middle)


def succeed(health: Health, now: float, times: int = 1) -> None:
    for _ in range(times):
        health.observe_success(KEY, now, 0.1)


def cooled(now: float = 0.0) -> Health:
    health = Health()
    fail(health, now, 3)
    assert health.is_cooling(KEY, now)
    return health


# When a cooldown begins


def test_an_endpoint_nobody_has_tried_is_not_cooling() -> None:
    health = Health()
    assert not health.is_cooling(KEY, 0.0)
    assert health.cooldown_ends(KEY) is None
    assert health.first_content(KEY, 0.0) is None
    assert health.throughput(KEY, 0.0) is None
    assert not health.is_tried(KEY, 0.0)


def test_two_failures_in_a_row_are_not_enough_and_three_are() -> None:
    health = Health()
    fail(health, 0.0, 2)
    assert not health.is_cooling(KEY, 0.0)
    fail(health, 0.0)
    assert health.is_cooling(KEY, 0.0)
    assert not health.is_cooling(OTHER, 0.0)


def test_a_success_between_failures_starts_the_row_anew() -> None:
    health = Health()
    fail(health, 0.0, 2)
    succeed(health, 0.0)
    fail(health, 0.0, 2)
    assert not health.is_cooling(KEY, 0.0)


def test_a_failure_rate_over_one_half_is_enough_once_there_are_eight_requests() -> None:
    health = Health()
    for outcome in "SFFSFF":
        (succeed if outcome == "S" else fail)(health, 0.0)
    succeed(health, 0.0)
    assert not health.is_cooling(KEY, 0.0)
    fail(health, 0.0)  # the eighth: five of eight
    assert health.is_cooling(KEY, 0.0)


def test_a_failure_rate_of_one_half_is_not_enough() -> None:
    health = Health()
    for _ in range(20):
        succeed(health, 0.0)
        fail(health, 0.0)
    assert not health.is_cooling(KEY, 0.0)


def test_failures_of_long_ago_do_not_add_up_with_one_of_now() -> None:
    health = Health()
    for outcome in "SFFSFF":
        (succeed if outcome == "S" else fail)(health, 0.0)
    later = 600.0
    succeed(health, later)
    fail(health, later)  # the eighth, but six are of ten minutes ago
    assert not health.is_cooling(KEY, later)


@pytest.mark.parametrize("seconds", [1.0, 30.0, LONGEST_RETRY_AFTER])
def test_what_an_upstream_asks_for_begins_at_once(seconds: float) -> None:
    health = Health()
    fail(health, 10.0, retry_after=seconds)
    assert health.is_cooling(KEY, 10.0 + seconds - 0.01)
    assert not health.is_cooling(KEY, 10.0 + seconds)


def test_what_an_upstream_asks_for_is_bounded() -> None:
    health = Health()
    fail(health, 0.0, retry_after=86_400.0)
    assert health.cooldown_ends(KEY) == LONGEST_RETRY_AFTER


def test_asking_for_more_prolongs_a_cooldown_and_asking_for_less_does_not_shorten_it() -> None:
    health = cooled()
    fail(health, 1.0, retry_after=60.0)
    fail(health, 2.0, retry_after=3.0)
    assert health.cooldown_ends(KEY) == 61.0


@pytest.mark.parametrize("retry_after", [None, 0.0, -1.0, math.nan])
def test_a_rate_limit_without_a_time_cools_at_once(retry_after: float | None) -> None:
    health = Health()
    health.observe_failure(KEY, 0.0, retry_after=retry_after, is_rate_limit=True, draw=middle)
    assert health.cooldown_ends(KEY) == FIRST_COOLDOWN


# How long it is, and how it ends


@given(draw=st.floats(0, 1, exclude_max=True))
def test_the_jitter_stays_within_a_fifth(draw: float) -> None:
    health = Health()
    for _ in range(3):
        health.observe_failure(KEY, 0.0, draw=lambda: draw)
    ends = health.cooldown_ends(KEY)
    assert ends is not None
    assert FIRST_COOLDOWN * (1 - JITTER) <= ends <= FIRST_COOLDOWN * (1 + JITTER)


def test_each_failed_trial_doubles_it_up_to_the_longest() -> None:
    health, now, lengths = cooled(), 0.0, []
    for _ in range(1100):  # without a bound the doublings would overflow a float
        ends = health.cooldown_ends(KEY)
        assert ends is not None
        lengths.append(ends - now)
        now = ends
        health.begin(KEY, now)
        fail(health, now)
    assert lengths[:8] == pytest.approx([5, 10, 20, 40, 80, 160, 300, 300])
    assert lengths[-1] == pytest.approx(LONGEST_COOLDOWN)


def test_late_failures_of_the_same_outage_do_not_double_it() -> None:
    health = cooled()
    fail(health, 1.0, 500)
    assert health.cooldown_ends(KEY) == FIRST_COOLDOWN


def test_a_success_of_the_trial_ends_it_and_forgets_the_doublings() -> None:
    health = cooled()
    health.begin(KEY, 5.0)
    fail(health, 5.0)
    health.begin(KEY, 15.0)
    succeed(health, 15.5)
    assert not health.is_cooling(KEY, 15.5)
    assert health.cooldown_ends(KEY) is None
    fail(health, 16.0, 3)
    assert health.cooldown_ends(KEY) == 16.0 + FIRST_COOLDOWN


def test_a_success_of_the_trial_forgets_the_failure_rate() -> None:
    health = Health()
    fail(health, 0.0, 20)
    health.begin(KEY, 5.0)
    succeed(health, 5.0)
    fail(health, 5.0)
    assert not health.is_cooling(KEY, 5.0)


def test_a_success_from_before_does_not_lift_a_rate_limit() -> None:
    health = Health()
    fail(health, 0.0, retry_after=30.0)
    succeed(health, 1.0)
    assert health.is_cooling(KEY, 29.9)


# The trial


def test_one_trial_passes_and_the_others_still_see_it_cooling() -> None:
    health = cooled()
    assert not health.is_cooling(KEY, 5.0)
    health.begin(KEY, 5.0)
    assert health.is_cooling(KEY, 5.0)
    assert health.is_tried(KEY, 5.0)


def test_a_trial_without_a_verdict_holds_the_others_off_for_a_minute() -> None:
    health = cooled()
    health.begin(KEY, 5.0)
    health.begin(KEY, 30.0)  # another attempt, for want of endpoints, does not prolong it
    assert health.is_cooling(KEY, 5.0 + TRIAL - 0.01)
    assert not health.is_cooling(KEY, 5.0 + TRIAL)


def test_an_abandoned_trial_lets_the_next_one_pass() -> None:
    health = cooled()
    health.begin(KEY, 5.0)
    health.abandon(KEY)
    assert not health.is_cooling(KEY, 5.0)
    health.abandon(OTHER)  # never begun: nothing happens
    assert not health.is_cooling(OTHER, 5.0)


# Sums of these are exact, so that a limit can be asserted to the last bit.
SECONDS = st.integers(1, 64_000).map(lambda count: count / 64)


class Attempts(RuleBasedStateMachine):
    """Requests that ask before they try, on a clock that only moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health()
        self.now = 1000.0
        self.running: list[float] = []  # when each began, while not known to be cooling

    @rule(seconds=SECONDS)
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def try_it_unless_cooling(self) -> None:
        if not self.health.is_cooling(KEY, self.now):
            if self.health.cooldown_ends(KEY) is not None:
                trials = [begun for begun in self.running if self.now - begun < TRIAL]
                assert not trials, "a second trial passed beside a running one"
                self.running.append(self.now)
            self.health.begin(KEY, self.now)

    @precondition(lambda self: self.running)
    @rule()
    def leave(self) -> None:
        self.running.clear()
        self.health.abandon(KEY)

    @rule(first_content=st.floats(0, 100) | st.none(), speed=st.floats(0, 1e4) | st.none())
    def succeed(self, first_content: float | None, speed: float | None) -> None:
        ends = self.health.cooldown_ends(KEY)
        self.running.clear()
        self.health.observe_success(KEY, self.now, first_content, speed)
        is_over = ends is None or ends <= self.now
        assert (self.health.cooldown_ends(KEY) is None) is is_over

    @rule(
        retry_after=st.none() | SECONDS | st.sampled_from([-1.0, 0.0, math.inf, math.nan]),
        is_rate_limit=st.booleans(),
        draw=st.floats(0, 1, exclude_max=True),
    )
    def fail(self, retry_after: float | None, is_rate_limit: bool, draw: float) -> None:
        before = self.health.cooldown_ends(KEY)
        self.running.clear()
        self.health.observe_failure(
            KEY,
            self.now,
            retry_after=retry_after,
            is_rate_limit=is_rate_limit,
            draw=lambda: draw,
        )
        after = self.health.cooldown_ends(KEY)
        assert before is None or (after is not None and after >= before)
        if is_rate_limit or before is not None:
            assert self.health.is_cooling(KEY, self.now)

    @invariant()
    def cooldowns_are_bounded(self) -> None:
        ends = self.health.cooldown_ends(KEY)
        assert ends is None or ends - self.now <= LONGEST_RETRY_AFTER
        assert not self.health.is_cooling(KEY, self.now + LONGEST_RETRY_AFTER + TRIAL)

    @invariant()
    def the_snapshot_says_the_same(self) -> None:
        for each in self.health.snapshot(self.now):
            assert each.is_cooling == self.health.is_cooling(KEY, self.now)
            assert each.is_cooling or each.cooldown == 0.0
            assert 0.0 <= each.failure_rate <= 1.0


TestAttempts = Attempts.TestCase


# Estimates


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=50))
def test_an_estimate_lies_between_the_least_and_the_most_seen(values: list[float]) -> None:
    health = Health()
    for now, value in enumerate(values):
        health.observe_success(KEY, now, value, value)
    for estimate in (
        health.first_content(KEY, len(values)),
        health.throughput(KEY, len(values)),
    ):
        assert estimate is not None
        assert min(values) * 0.999 <= estimate <= max(values) * 1.001


def test_the_first_observation_is_the_estimate_and_later_ones_outweigh_earlier_ones() -> None:
    health = Health()
    health.observe_success(KEY, 0.0, 1.0, 100.0)
    assert health.first_content(KEY, 0.0) == 1.0
    assert health.throughput(KEY, 0.0) == 100.0
    for now in range(1, 100):
        health.observe_success(KEY, float(now), 3.0, 50.0)
    for now in range(100, 110):
        health.observe_success(KEY, float(now), 1.0, 100.0)
    assert health.first_content(KEY, 110.0) == pytest.approx(2.0, abs=0.01)  # the half-life
    assert health.throughput(KEY, 110.0) == pytest.approx(75.0, abs=0.5)


def test_an_estimate_grows_stale_and_then_begins_anew() -> None:
    health = Health()
    health.observe_success(KEY, 0.0, 1.0, 100.0)
    assert health.first_content(KEY, ESTIMATE_LIFE) == 1.0
    later = ESTIMATE_LIFE + 1
    assert health.first_content(KEY, later) is None
    assert health.throughput(KEY, later) is None
    health.observe_success(KEY, later, 9.0)
    assert health.first_content(KEY, later) == 9.0
    assert health.throughput(KEY, later) is None


def test_a_speed_told_later_is_no_second_success() -> None:
    health = Health()
    health.observe_throughput(KEY, 0.0, 80.0)
    fail(health, 0.0, 2)
    health.observe_throughput(KEY, 0.0, 80.0)
    fail(health, 0.0)
    assert health.throughput(KEY, 0.0) == 80.0
    assert health.is_cooling(KEY, 0.0)


# What is kept


def test_the_least_recently_tried_endpoint_is_forgotten_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Health, "SIZE", 3)
    health = Health()
    for name in "abc":
        health.begin(("p", name), 0.0)
    health.begin(("p", "a"), 1.0)
    health.begin(("p", "d"), 1.0)
    assert [each.upstream_model for each in health.snapshot(1.0)] == ["c", "a", "d"]


def test_asking_keeps_nothing() -> None:
    health = Health()
    health.is_cooling(KEY, 0.0)
    health.first_content(KEY, 0.0)
    health.abandon(KEY)
    assert health.snapshot(0.0) == ()


def test_a_snapshot_tells_all_that_is_known_of_an_endpoint() -> None:
    health = Health()
    health.observe_success(KEY, 0.0, 0.5, 60.0)
    fail(health, 0.0, 3)
    (known,) = health.snapshot(1.0)
    assert (known.provider, known.upstream_model) == KEY
    assert (known.is_cooling, known.cooldown, known.failures_in_a_row) == (True, 4.0, 3)
    assert (known.failure_rate, known.first_content, known.throughput) == (0.75, 0.5, 60.0)
