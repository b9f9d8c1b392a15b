"""The limits of one key on a clock of the test's own."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.access.limits import (
    BUSY_WAIT,
    CELLS,
    DAY,
    DAY_MS,
    DAY_REQUESTS,
    DAY_SPENT,
    MINUTE_HELD,
    MINUTE_MS,
    MINUTE_REQUESTS,
    MINUTE_TOKENS,
    MONTH,
    MONTH_SPENT,
    PERIODS,
    PICO,
    TOTAL_SPENT,
    Demand,
    History,
    KeyLimits,
    Lease,
    admit,
    enter,
    format_dollars,
    format_wait,
    leave,
    limit_lines,
    month_of,
    month_start,
    reserve,
    restore,
    settle,
    spent_in,
)
from hoberproxy.errors import AccessError

NOW = 1_700_000_000_000  # 2023-11-14 22:13:20 UTC
MIDNIGHT = NOW // DAY_MS * DAY_MS + DAY_MS


def fresh() -> list[int]:
    return [0] * CELLS


def ask(
    cells: list[int],
    limits: KeyLimits,
    now: int = NOW,
    *,
    running: int = 0,
    held: int = 0,
    **demand: Any,
) -> Lease:
    usual: dict[str, Any] = {"prompt_tokens": 1, "answer_tokens": 1, "is_bounded": True}
    wish = Demand(**(usual | demand))
    return admit(cells, limits, now, wish, running=running, held=held)


def refusal(cells: list[int], limits: KeyLimits, now: int = NOW, **options: Any) -> AccessError:
    with pytest.raises(AccessError) as caught:
        ask(cells, limits, now, **options)
    return caught.value


# Requests


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


def test_the_seconds_to_wait_are_enough_and_not_too_many() -> None:
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


def test_a_rejected_request_counts_nowhere() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=9, requests_per_day=1)
    ask(cells, limits)
    before = list(cells)
    refusal(cells, limits)
    assert cells == before


def test_a_clock_that_is_set_back_does_not_stretch_a_minute() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=1)
    ask(cells, limits, NOW)
    ask(cells, limits, NOW - 3600_000)


def test_a_call_that_waited_for_the_lock_belongs_to_the_window_that_began_meanwhile() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=2, requests_per_day=3)
    ask(cells, limits, MIDNIGHT)
    ask(cells, limits, MIDNIGHT - 1)
    refusal(cells, limits, MIDNIGHT - 1)
    ask(cells, limits, MIDNIGHT + MINUTE_MS)
    assert refusal(cells, limits, MIDNIGHT - 1).status == 429
    assert cells[DAY_REQUESTS] == 3


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


def test_calls_in_flight_are_counted_by_the_caller_of_admit() -> None:
    cells, limits = fresh(), KeyLimits(concurrency=2)
    ask(cells, limits, running=1)
    assert refusal(cells, limits, running=2).retry_after == 1.0


# Tokens


def test_tokens_are_held_at_admission_and_settled_by_usage() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=1000)
    lease = ask(cells, limits, prompt_tokens=100, answer_tokens=800)
    assert cells[MINUTE_TOKENS] == 900
    refusal(cells, limits, prompt_tokens=100, answer_tokens=100)
    settle(cells, lease, tokens=150, spent=0)
    assert cells[MINUTE_TOKENS] == 150
    ask(cells, limits, prompt_tokens=50, answer_tokens=800)


def test_an_expected_answer_is_cut_to_a_tight_limit_and_a_requested_one_is_not() -> None:
    limits = KeyLimits(tokens_per_minute=300)
    cells = fresh()
    ask(cells, limits, prompt_tokens=100, answer_tokens=500, is_bounded=False)
    assert cells[MINUTE_TOKENS] == 300
    error = refusal(fresh(), limits, prompt_tokens=100, answer_tokens=500)
    assert error.retry_after is None and "max_tokens" in error.message  # waiting would not help
    assert refusal(fresh(), limits, prompt_tokens=301, is_bounded=False).retry_after is None


def test_an_expected_answer_is_cut_only_while_no_other_call_is_in_flight() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=1000)
    first = ask(cells, limits, prompt_tokens=10, answer_tokens=600, is_bounded=False)
    error = refusal(cells, limits, prompt_tokens=10, answer_tokens=600, is_bounded=False)
    assert error.retry_after == BUSY_WAIT  # not until the next minute: what is held comes back
    assert "wait for running calls to end, or give max_tokens" in error.message
    ask(cells, limits, prompt_tokens=10, answer_tokens=300)
    settle(cells, first, tokens=20, spent=0)
    assert cells[MINUTE_HELD] == 310
    ask(cells, limits, prompt_tokens=10, answer_tokens=600, is_bounded=False)


def test_once_the_tokens_are_used_the_next_minute_is_waited_for() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=1000)
    settle(cells, ask(cells, limits), tokens=1000, spent=0)
    later = refusal(cells, limits, NOW + 10_000, is_bounded=False)
    assert later.retry_after == 50 and "the next minute" in later.message


def test_of_several_choices_only_one_is_cut() -> None:
    limits = KeyLimits(tokens_per_minute=1000, budget=1000)
    guess: dict[str, Any] = {"prompt_cost": 10, "answer_cost": 1600, "is_bounded": False}
    ask(fresh(), limits, choices=2, answer_tokens=1600, **guess)  # one of them fits
    error = refusal(fresh(), limits, choices=4, answer_tokens=1600, **guess)
    assert error.status == 402 and "lower its n" in error.message
    error = refusal(fresh(), limits, choices=4, answer_tokens=1600, is_bounded=False)
    assert error.status == 429 and error.retry_after is None


def test_a_call_settled_late_does_not_change_the_next_minute() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=1000)
    lease = ask(cells, limits, prompt_tokens=900)
    ask(cells, limits, NOW + MINUTE_MS, prompt_tokens=100)
    held = cells[MINUTE_TOKENS]
    settle(cells, lease, tokens=5000, spent=0)
    assert cells[MINUTE_TOKENS] == held


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


# In two steps


@pytest.mark.parametrize(
    ("limits", "used", "running", "status"),
    [
        pytest.param(KeyLimits(requests_per_minute=1), {}, 0, 429, id="requests a minute"),
        pytest.param(KeyLimits(requests_per_day=1), {}, 0, 429, id="requests a day"),
        pytest.param(KeyLimits(concurrency=1), {}, 1, 429, id="calls at once"),
        pytest.param(KeyLimits(tokens_per_minute=9), {"tokens": 9}, 0, 429, id="tokens"),
        pytest.param(KeyLimits(budget=9), {"spent": 9}, 0, 402, id="a budget"),
    ],
)
def test_a_call_that_no_body_could_make_pass_is_rejected_at_its_head(
    limits: KeyLimits, used: dict[str, int], running: int, status: int
) -> None:
    cells = fresh()
    assert not enter(cells, limits, NOW).is_reserved
    settle(
        cells, reserve(cells, limits, NOW, Demand(0, 0, True)), **{"tokens": 0, "spent": 0, **used}
    )
    before = list(cells)
    with pytest.raises(AccessError) as caught:
        enter(cells, limits, NOW, running=running)
    assert caught.value.status == status
    assert cells == before


def test_tokens_and_money_that_are_only_held_reject_no_head() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=9, budget=9)
    ask(cells, limits, prompt_tokens=4, answer_tokens=5, prompt_cost=4, answer_cost=5)
    entered = enter(cells, limits, NOW, held=9)
    with pytest.raises(AccessError, match="wait for running calls"):
        reserve(cells, limits, NOW, Demand(1, 1, True, 1, 1), held=9)
    leave(cells, entered)
    assert (cells[MINUTE_REQUESTS], cells[DAY_REQUESTS]) == (1, 1)


def test_a_call_is_counted_with_its_head_and_held_for_with_its_body() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_day=9, tokens_per_minute=100, budget=100)
    enter(cells, limits, MIDNIGHT - 1)
    lease = reserve(cells, limits, MIDNIGHT + MINUTE_MS, Demand(4, 5, True, 4, 5))
    assert (cells[DAY_REQUESTS], cells[MINUTE_REQUESTS]) == (0, 0)  # those were of the day before
    assert (cells[MINUTE_HELD], cells[DAY_SPENT]) == (9, 9)
    settle(cells, lease, tokens=3, spent=2)
    assert (cells[MINUTE_TOKENS], cells[MINUTE_HELD], cells[DAY_SPENT]) == (3, 0, 2)


def test_a_call_that_leaves_after_its_minute_or_day_takes_nothing_from_the_next() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=9, requests_per_day=9)
    entered = enter(cells, limits, MIDNIGHT - 1)
    ask(cells, limits, MIDNIGHT + MINUTE_MS)
    leave(cells, entered)
    assert (cells[MINUTE_REQUESTS], cells[DAY_REQUESTS]) == (1, 1)


# Budgets


@pytest.mark.parametrize(
    ("period", "wait"),
    [
        pytest.param("day", (MIDNIGHT - NOW) / 1000, id="until midnight"),
        pytest.param("month", 1_701_388_800 - NOW / 1000, id="until the first of December"),
        pytest.param("total", None, id="for good"),
    ],
)
def test_a_spent_budget_rejects_with_the_seconds_to_wait(period: str, wait: float | None) -> None:
    cells, limits = fresh(), KeyLimits(budget=PICO, budget_period=period)
    lease = ask(cells, limits)
    settle(cells, lease, tokens=0, spent=PICO - 1)
    lease = ask(cells, limits)
    settle(cells, lease, tokens=0, spent=1)
    error = refusal(cells, limits)
    assert (error.status, error.type, error.code) == (402, "insufficient_quota", "budget_exceeded")
    assert error.retry_after == wait
    assert "1.00 USD" in error.message


def priced(prompt: int, answer: int, *, is_bounded: bool = True) -> dict[str, Any]:
    return {"prompt_cost": prompt, "answer_cost": answer, "is_bounded": is_bounded}


def test_the_possible_cost_of_a_call_is_held_until_its_cost_takes_its_place() -> None:
    cells, limits = fresh(), KeyLimits(budget=100)
    leases = [ask(cells, limits, **priced(10, 40)) for _ in range(2)]
    assert cells[TOTAL_SPENT] == 100
    error = refusal(cells, limits, held=100, **priced(1, 1))
    assert (error.status, error.code, error.retry_after) == (402, "budget_exceeded", BUSY_WAIT)
    assert "wait for running calls to end" in error.message
    settle(cells, leases[0], tokens=0, spent=13)
    settle(cells, leases[1], tokens=0, spent=60)  # an answer that keeps to no bound
    assert (cells[DAY_SPENT], cells[MONTH_SPENT], cells[TOTAL_SPENT]) == (73, 73, 73)
    ask(cells, limits, **priced(7, 20))
    assert "it is spent" in refusal(cells, limits, **priced(0, 1)).message


@pytest.mark.parametrize(
    ("wish", "advice", "waits"),
    [
        pytest.param(priced(10, 31), "lower its max_tokens", True, id="the answer is too long"),
        pytest.param(priced(41, 1), "shorten it", True, id="the prompt alone is too much"),
        pytest.param(priced(41, 500, is_bounded=False), "shorten it", True, id="without a bound"),
        pytest.param(priced(10, 91), "lower its max_tokens", False, id="more than a whole budget"),
    ],
)
def test_an_error_about_too_little_money_says_what_helps(
    wish: dict[str, Any], advice: str, waits: bool
) -> None:
    cells, limits = fresh(), KeyLimits(budget=100, budget_period="day")
    settle(cells, ask(cells, limits), tokens=0, spent=60)
    lease = ask(cells, limits, **priced(20, 0))
    error = refusal(cells, limits, held=20, **wish)
    assert error.status == 402 and advice in error.message
    assert error.retry_after == ((MIDNIGHT - NOW) / 1000 if waits else None)
    settle(cells, lease, tokens=0, spent=0)
    ask(cells, limits, **priced(10, 30))


def test_an_expected_cost_is_cut_to_the_money_that_is_left() -> None:
    cells, limits = fresh(), KeyLimits(budget=100)
    settle(cells, ask(cells, limits), tokens=0, spent=99)
    lease = ask(cells, limits, **priced(1, 500, is_bounded=False))
    assert cells[TOTAL_SPENT] == 100
    assert refusal(cells, limits, held=1, **priced(1, 500, is_bounded=False)).retry_after == 1.0
    settle(cells, lease, tokens=0, spent=0)
    ask(cells, limits, **priced(1, 500, is_bounded=False))


def test_a_free_call_is_rejected_only_once_the_budget_is_really_spent() -> None:
    cells, limits = fresh(), KeyLimits(budget=100)
    lease = ask(cells, limits, **priced(50, 50))
    assert ask(cells, limits, held=100).cost == 0
    settle(cells, lease, tokens=0, spent=100)
    assert refusal(cells, limits, held=0).status == 402


def test_without_a_budget_no_money_is_held() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_day=5)
    assert ask(cells, limits, **priced(10, 40)).cost == 0
    assert cells[TOTAL_SPENT] == 0


def test_a_call_that_ends_after_its_day_or_month_is_settled_where_it_began() -> None:
    last = (1_701_388_800 - 1) * 1000  # a second before December
    cells, limits = fresh(), KeyLimits(budget=100)
    lease = ask(cells, limits, last, **priced(10, 40))
    ask(cells, limits, last + 2000, **priced(5, 0))
    settle(cells, lease, tokens=0, spent=20)
    assert (cells[DAY_SPENT], cells[MONTH_SPENT], cells[TOTAL_SPENT]) == (5, 5, 25)


def test_a_clock_set_back_and_forth_leaves_nothing_below_zero() -> None:
    cells, limits = fresh(), KeyLimits(budget=100)
    lease = ask(cells, limits, **priced(10, 40))
    for now in (NOW - 40 * DAY_MS, NOW):
        ask(cells, limits, now)
    settle(cells, lease, tokens=0, spent=20)
    assert (cells[DAY_SPENT], cells[MONTH_SPENT], cells[TOTAL_SPENT]) == (0, 0, 20)


@given(
    calls=st.lists(
        st.tuples(
            st.integers(0, 400),  # of the prompt
            st.integers(0, 400),  # of the answer at most
            st.integers(0, 100),  # percent of it that it takes
            st.integers(0, 3 * DAY_MS // 4),  # until the next one
            st.integers(0, 5),  # how many of those under way end before
        ),
        max_size=60,
    ),
    period=st.sampled_from(PERIODS),
    order=st.randoms(use_true_random=False),
)
def test_bounded_calls_never_pass_the_budget_and_in_the_end_it_is_what_they_cost(
    calls: list[tuple[int, int, int, int, int]], period: str, order: Random
) -> None:
    cells, limits, now = fresh(), KeyLimits(budget=1000, budget_period=period), NOW
    under_way: list[tuple[Lease, int]] = []
    costs: dict[str, dict[int, int]] = {name: {} for name in PERIODS}  # by the window they began in

    def end_one() -> None:
        lease, cost = under_way.pop(order.randrange(len(under_way)))
        settle(cells, lease, tokens=0, spent=cost)
        for name, window in (("day", lease.day), ("month", lease.month), ("total", 0)):
            costs[name][window] = costs[name].get(window, 0) + cost

    for prompt, answer, share, gap, ends in calls:
        now += gap
        for _ in range(min(ends, len(under_way))):
            end_one()
        held = sum(lease.cost for lease, _ in under_way)
        try:
            lease = ask(cells, limits, now, held=held, **priced(prompt, answer))
        except AccessError:
            pass
        else:
            under_way.append((lease, prompt + answer * share // 100))
        assert 0 <= spent_in(cells, period) <= 1000
    while under_way:
        end_one()
        assert 0 <= spent_in(cells, period) <= 1000
    assert cells[TOTAL_SPENT] == costs["total"].get(0, 0)
    assert cells[DAY_SPENT] == costs["day"].get(cells[DAY], 0)
    assert cells[MONTH_SPENT] == costs["month"].get(cells[MONTH], 0)
    assert all(spent <= 1000 for spent in costs[period].values())


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


# Header lines


def limit_headers(cells: list[int], limits: KeyLimits, now_ms: int) -> list[tuple[bytes, bytes]]:
    lines = limit_lines(cells, limits, now_ms).splitlines()
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


def test_header_lines_are_about_the_minute_or_else_about_the_day() -> None:
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
    assert limit_lines(cells, KeyLimits(tokens_per_minute=500), NOW) == (
        b"x-ratelimit-limit-tokens: 500\r\nx-ratelimit-remaining-tokens: 400\r\n"
        b"x-ratelimit-reset-tokens: 1m0s\r\n"
    )
    assert limit_lines(cells, KeyLimits(budget=1), NOW) == b""
    daily = dict(limit_headers(cells, KeyLimits(requests_per_day=20), NOW))
    assert daily[b"x-ratelimit-remaining-requests"] == b"19"
    assert daily[b"x-ratelimit-reset-requests"] == b"1h46m40s"


def test_within_the_last_second_the_wait_is_in_milliseconds() -> None:
    cells, limits = fresh(), KeyLimits(tokens_per_minute=10)
    ask(cells, limits)
    for left, text in ((1001, b"2s"), (1000, b"1s"), (999, b"999ms"), (1, b"1ms"), (0, b"0ms")):
        fields = dict(limit_headers(cells, limits, NOW + MINUTE_MS - left))
        assert fields[b"x-ratelimit-reset-tokens"] == text


def test_after_the_minute_the_whole_limit_is_left() -> None:
    cells, limits = fresh(), KeyLimits(requests_per_minute=10)
    ask(cells, limits)
    later = dict(limit_headers(cells, limits, NOW + 2 * MINUTE_MS))
    assert later[b"x-ratelimit-remaining-requests"] == b"10"
    assert later[b"x-ratelimit-reset-requests"] == b"0ms"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0004, "1ms"),
        (0.25, "250ms"),
        (1.0, "1s"),
        (1.001, "2s"),
        (59.5, "1m0s"),
        (360.0, "6m0s"),
        (86340.0, "23h59m0s"),
    ],
)
def test_a_wait_is_written_as_openai_does(seconds: float, text: str) -> None:
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
