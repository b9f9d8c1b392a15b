"""The limits of one key on a clock of the test's own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoberproxy.errors import AccessError
from hoberproxy.limits import (
    CELLS,
    DAY_MS,
    DAY_REQUESTS,
    MINUTE_MS,
    MINUTE_TOKENS,
    PICO,
    TOTAL_SPENT,
    History,
    KeyLimits,
    Lease,
    admit,
    format_dollars,
    format_wait,
    limit_headers,
    month_of,
    month_start,
    restore,
    settle,
)

NOW = 1_700_000_000_000  # 2023-11-14 22:13:20 UTC
MIDNIGHT = NOW // DAY_MS * DAY_MS + DAY_MS


def fresh() -> list[int]:
    return [0] * CELLS


def ask(
    cells: list[int], limits: KeyLimits, now: int = NOW, *, running: int = 0, **tokens: Any
) -> Lease:
    demand: dict[str, Any] = {"prompt_tokens": 1, "answer_tokens": 1, "is_bounded": True} | tokens
    return admit(cells, limits, now, running=running, **demand)


def refusal(cells: list[int], limits: KeyLimits, now: int = NOW, **options: Any) -> AccessError:
    with pytest.raises(AccessError) as caught:
        ask(cells, limits, now, **options)
    return caught.value


# Requests


@settings(deadline=None)
@given(
    limit=st.integers(1, 20),
    gaps=st.lists(st.integers(0, 20_000), min_size=1, max_size=120),
)
def test_in_each_minute_exactly_the_limit_passes(limit: int, gaps: list[int]) -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=limit)
    now, start, passed = NOW, NOW - MINUTE_MS, 0
    for gap in gaps:
        now += gap
        if now >= start + MINUTE_MS:  # the first request after the last minute begins another
            start, passed = now, 0
        try:
            ask(cells, limits, now)
        except AccessError as error:
            assert passed == limit
            assert error.retry_after == (start + MINUTE_MS - now) / 1000
        else:
            passed += 1
            assert passed <= limit


def test_the_wait_that_is_told_is_enough_and_not_too_long() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=1)
    ask(cells, limits)
    error = refusal(cells, limits, NOW + 12_345)
    assert (error.status, error.type, error.code) == (
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
    )
    assert error.retry_after == 47.655
    refusal(cells, limits, NOW + MINUTE_MS - 1)
    ask(cells, limits, NOW + MINUTE_MS)


def test_a_day_ends_at_midnight_utc() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_day=2)
    ask(cells, limits, MIDNIGHT - 3000)
    ask(cells, limits, MIDNIGHT - 2000)
    assert refusal(cells, limits, MIDNIGHT - 1500).retry_after == 1.5
    ask(cells, limits, MIDNIGHT)


def test_a_refused_request_counts_nowhere() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=9, requests_per_day=1)
    ask(cells, limits)
    before = list(cells)
    refusal(cells, limits)
    assert cells == before


def test_a_clock_that_is_set_back_does_not_stretch_a_minute() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=1)
    ask(cells, limits, NOW)
    ask(cells, limits, NOW - 3600_000)


def test_who_waited_for_the_lock_belongs_to_the_window_that_began_meanwhile() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=2, requests_per_day=3)
    ask(cells, limits, MIDNIGHT)
    ask(cells, limits, MIDNIGHT - 1)
    refusal(cells, limits, MIDNIGHT - 1)
    ask(cells, limits, MIDNIGHT + MINUTE_MS)
    assert refusal(cells, limits, MIDNIGHT - 1).status == 429
    assert cells[DAY_REQUESTS] == 3


@settings(deadline=None)
@given(
    limit=st.integers(1, 10),
    moments=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 300)), max_size=150),
)
def test_exactly_the_limit_passes_also_when_clocks_are_read_out_of_order(
    limit: int, moments: list[tuple[int, int]]
) -> None:
    cells, limits, now = fresh(), KeyLimits(requests_per_minute=limit), NOW
    passed: dict[int, int] = {}  # by the start of their minute
    for gap, lag in moments:
        now += gap
        try:
            start = ask(cells, limits, now - lag).minute_start
        except AccessError:
            assert passed[cells[0]] == limit
        else:
            passed[start] = passed.get(start, 0) + 1
    assert all(count <= limit for count in passed.values())
    assert all(later - start >= MINUTE_MS for start, later in pairwise(passed))


# Calls at once


def test_calls_at_once_are_counted_by_whoever_knows_them() -> None:
    cells, limits = fresh(), KeyLimits(concurrency=2)
    ask(cells, limits, running=1)
    assert refusal(cells, limits, running=2).retry_after == 1.0


# Tokens


def test_tokens_are_held_at_admission_and_settled_by_what_was_used() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=1000)
    lease = ask(cells, limits, prompt_tokens=100, answer_tokens=800)
    assert cells[MINUTE_TOKENS] == 900
    refusal(cells, limits, prompt_tokens=100, answer_tokens=100)
    settle(cells, lease, tokens=150, spent=0)
    assert cells[MINUTE_TOKENS] == 150
    ask(cells, limits, prompt_tokens=50, answer_tokens=800)


def test_a_guessed_answer_gives_way_to_a_tight_limit_but_a_wish_does_not() -> None:
    limits = KeyLimits(tokens_per_minute=300)
    cells = fresh()
    ask(cells, limits, prompt_tokens=100, answer_tokens=500, is_bounded=False)
    assert cells[MINUTE_TOKENS] == 300
    error = refusal(fresh(), limits, prompt_tokens=100, answer_tokens=500)
    assert error.retry_after is None and "max_tokens" in error.message  # waiting would not help
    assert refusal(fresh(), limits, prompt_tokens=301, is_bounded=False).retry_after is None


def test_what_is_settled_late_does_not_touch_the_next_minute() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=1000)
    lease = ask(cells, limits, prompt_tokens=900)
    ask(cells, limits, NOW + MINUTE_MS, prompt_tokens=100)
    held = cells[MINUTE_TOKENS]
    settle(cells, lease, tokens=5000, spent=0)
    assert cells[MINUTE_TOKENS] == held


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30_000), st.integers(1, 400), st.integers(1, 400), st.integers(0, 400)
        ),
        max_size=60,
    )
)
def test_held_and_used_tokens_never_pass_the_limit_while_answers_keep_to_theirs(
    calls: list[tuple[int, int, int, int]],
) -> None:
    cells, limits, now = fresh(), KeyLimits(tokens_per_minute=1000), NOW
    for gap, prompt, answer, used in calls:
        now += gap
        try:
            lease = ask(cells, limits, now, prompt_tokens=prompt, answer_tokens=answer)
        except AccessError:
            pass
        else:
            assert cells[MINUTE_TOKENS] <= 1000
            settle(cells, lease, tokens=min(used, prompt + answer), spent=0)
        assert 0 <= cells[MINUTE_TOKENS] <= 1000


# Budgets


@pytest.mark.parametrize(
    ("period", "wait"),
    [
        pytest.param("day", (MIDNIGHT - NOW) / 1000, id="until midnight"),
        pytest.param("month", 1_701_388_800 - NOW / 1000, id="until the first of December"),
        pytest.param("total", None, id="for good"),
    ],
)
def test_a_spent_budget_refuses_with_the_wait(period: str, wait: float | None) -> None:
    cells, limits = fresh(), KeyLimits(budget=PICO, budget_period=period)
    lease = ask(cells, limits)
    settle(cells, lease, tokens=0, spent=PICO - 1)
    lease = ask(cells, limits)
    settle(cells, lease, tokens=0, spent=1)
    error = refusal(cells, limits)
    assert (error.status, error.type, error.code) == (402, "insufficient_quota", "budget_exceeded")
    assert error.retry_after == wait
    assert "1.00 USD" in error.message


def test_a_new_day_has_a_new_budget_and_the_total_goes_on() -> None:
    cells, limits = fresh(), KeyLimits(budget=10, budget_period="day")
    settle(cells, ask(cells, limits), tokens=0, spent=10)
    refusal(cells, limits)
    ask(cells, limits, MIDNIGHT)
    refusal(cells, KeyLimits(budget=10, budget_period="month"), MIDNIGHT)
    assert cells[TOTAL_SPENT] == 10


def test_history_takes_the_place_of_counters_that_outlive_a_process() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_day=5, budget=100, budget_period="month")
    restore(cells, History(day_requests=4, day_spent=1, month_spent=99, total_spent=99), NOW)
    settle(cells, ask(cells, limits), tokens=0, spent=1)
    assert cells[DAY_REQUESTS] == 5
    assert refusal(cells, limits).status == 429
    assert refusal(cells, limits, MIDNIGHT).status == 402


def test_the_history_of_an_earlier_day_is_of_that_day() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_day=5)
    yesterday = NOW // DAY_MS - 1
    restore(cells, History(yesterday, day_requests=5, day_spent=3, total_spent=4), NOW)
    ask(cells, limits)
    assert (cells[DAY_REQUESTS], cells[TOTAL_SPENT]) == (1, 4)


# What is told


def test_headers_tell_of_the_minute_or_else_of_the_day() -> None:
    cells = fresh()
    limits = KeyLimits(requests_per_minute=10, requests_per_day=20, tokens_per_minute=500)
    ask(cells, limits, prompt_tokens=40, answer_tokens=60)
    assert dict(limit_headers(cells, limits, NOW + 500)) == {
        b"x-ratelimit-limit-requests": b"10",
        b"x-ratelimit-remaining-requests": b"9",
        b"x-ratelimit-reset-requests": b"1m0s",
        b"x-ratelimit-limit-tokens": b"500",
        b"x-ratelimit-remaining-tokens": b"400",
        b"x-ratelimit-reset-tokens": b"1m0s",
    }
    daily = dict(limit_headers(cells, KeyLimits(requests_per_day=20), NOW))
    assert daily[b"x-ratelimit-remaining-requests"] == b"19"
    assert daily[b"x-ratelimit-reset-requests"] == b"1h46m40s"


def test_after_the_minute_everything_is_left() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=10)
    ask(cells, limits)
    later = dict(limit_headers(cells, limits, NOW + 2 * MINUTE_MS))
    assert later[b"x-ratelimit-remaining-requests"] == b"10"
    assert later[b"x-ratelimit-reset-requests"] == b"0ms"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, b"0ms"),
        (0.0004, b"1ms"),
        (0.25, b"250ms"),
        (1.0, b"1s"),
        (1.001, b"2s"),
        (59.5, b"1m0s"),
        (360.0, b"6m0s"),
        (86340.0, b"23h59m0s"),
    ],
)
def test_a_wait_is_written_as_openai_does(seconds: float, text: bytes) -> None:
    assert format_wait(seconds) == text


@pytest.mark.parametrize(
    ("pico", "text"),
    [(0, "0.00"), (5 * PICO, "5.00"), (1, "0.000000000001"), (-PICO // 2, "-0.50")],
)
def test_dollars_are_exact(pico: int, text: str) -> None:
    assert format_dollars(pico) == text


def test_months_follow_each_other() -> None:
    december = month_of(MIDNIGHT // DAY_MS) + 1
    assert month_start(december) == 1_701_388_800
    assert month_of(int(month_start(december + 1)) // 86400) == december + 1
