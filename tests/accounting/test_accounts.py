"""A request's account: what the key may use, what the journal gets, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from hoberproxy.access.keys import Caller
from hoberproxy.access.limits import MINUTE_TOKENS, PICO, TOTAL_SPENT, Demand, KeyLimits
from hoberproxy.access.shared_limits import SharedLimits
from hoberproxy.accounting import accounts as accounts_module
from hoberproxy.accounting.accounts import Accounts
from hoberproxy.accounting.journal import Journal
from hoberproxy.accounting.record import CLIENT_CLOSED, Record
from hoberproxy.dialects.outcome import Outcome
from hoberproxy.dialects.usage import BYTES_PER_TOKEN, Usage
from hoberproxy.errors import AccessError
from hoberproxy.request.checks import parse_call
from hoberproxy.routing.catalog import Endpoint, Prices
from hoberproxy.routing.plan import Plan, Step
from hoberproxy.storage.journal_reader import Journals

NOW = 1_700_000_000.0
ASSUMED = 8000  # tokens of an answer that nothing limits
ENDPOINT = Endpoint("east", "m", prices=Prices(Decimal(1), Decimal(2)))
PLAN = Plan((Step("a/b", ENDPOINT), Step("c/d", replace(ENDPOINT, provider="west"))))
CALL = parse_call(b'{"model": "a/b", "messages": [{"role": "user", "content": "hi"}]}')
LIMITED = Caller("key_1", "x", "live", None, None, limits=KeyLimits(tokens_per_minute=10_000))


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedLimits]:
    shared = SharedLimits(tmp_path / "limits")
    yield shared
    shared.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "store.db-requests")
    journal.prepare()
    yield journal
    journal.close()


@pytest.fixture
def accounts(journal: Journal, shared: SharedLimits) -> Accounts:
    return Accounts(journal, shared, ASSUMED)


def record(**values: object) -> Record:
    return Record(**({"id": "req_1", "started": NOW} | values))  # type: ignore[arg-type]


def fill(
    accounts: Accounts,
    one: Record,
    usage: Usage | None,
    endpoint: Endpoint = ENDPOINT,
    *,
    body_bytes: int = 0,
    is_answered: bool = True,
) -> None:
    """Fill in what an answer of as many events as the record has says."""
    outcome = Outcome(usage, content_events=one.events, content_bytes=body_bytes)
    accounts.fill(one, Step("a/b", endpoint), outcome, prompt_bytes=400, is_answered=is_answered)


# From opening to closing


def test_what_is_held_is_settled_by_what_was_used(accounts: Accounts, shared: SharedLimits) -> None:
    one = record(status=200, events=10)
    lease = accounts.open(one, LIMITED, CALL, PLAN, NOW)
    assert shared.counters(LIMITED, NOW)[MINUTE_TOKENS] > 500  # the usual answer
    fill(accounts, one, Usage(100, 20))
    accounts.seal(one)
    accounts.close(one, LIMITED, lease)
    counters = shared.counters(LIMITED, NOW)
    assert (counters[MINUTE_TOKENS], counters[TOTAL_SPENT]) == (120, 140 * 10**6)


def test_a_wish_for_a_short_answer_holds_as_much(accounts: Accounts, shared: SharedLimits) -> None:
    call = parse_call(CALL.body[:-1] + b', "max_tokens": 7}')
    accounts.open(record(), LIMITED, call, PLAN, NOW)
    assert 7 < shared.counters(LIMITED, NOW)[MINUTE_TOKENS] < 30


def test_a_refused_request_is_not_in_the_journal(
    accounts: Accounts, journal: Journal, tmp_path: Path
) -> None:
    strict = replace(LIMITED, limits=KeyLimits(concurrency=1))
    accounts.open(record(), strict, CALL, PLAN, NOW)
    with pytest.raises(AccessError):
        accounts.open(record(id="req_2"), strict, CALL, PLAN, NOW)
    journal.close()
    journals = Journals(tmp_path / "store.db-requests")
    (remains,) = journals.dead()
    assert list(remains.opened) == ["req_1"]
    remains.release()
    journals.close()


# Budgets

RICH = replace(LIMITED, limits=KeyLimits(budget=PICO))
BOUNDED = parse_call(CALL.body[:-1] + b', "max_tokens": 100}')


def held(shared: SharedLimits) -> int:
    return shared.counters(RICH, NOW)[TOTAL_SPENT]


def plan_of(*prices: Prices | None) -> Plan:
    endpoints = [Endpoint(f"provider-{n}", "m", prices=each) for n, each in enumerate(prices)]
    return Plan(tuple(Step("a/b", endpoint) for endpoint in endpoints))


def test_a_call_holds_what_it_costs_by_the_dearest_endpoint_that_may_serve_it(
    accounts: Accounts, shared: SharedLimits
) -> None:
    dear_prompt, dear_answer = Prices(Decimal(90)), Prices(completion=Decimal(3))
    plan = plan_of(Prices(Decimal(1), Decimal(2)), None, dear_prompt, dear_answer)
    for _ in range(2):  # the second time by what is remembered of the plan
        lease = accounts.open(record(), RICH, BOUNDED, plan, NOW)
        prompt = round(BOUNDED.prompt_bytes / BYTES_PER_TOKEN)
        assert lease is not None
        assert lease.cost == held(shared) == max(prompt * 90, 300, prompt + 200) * 10**6
        shared.settle(RICH, lease, tokens=0, spent=0)


def test_what_is_held_gives_way_to_what_it_cost(accounts: Accounts, shared: SharedLimits) -> None:
    one = record(status=200)
    lease = accounts.open(one, RICH, BOUNDED, PLAN, NOW)
    assert held(shared) > 200 * 10**6
    fill(accounts, one, Usage(10, 20))
    accounts.close(one, RICH, lease)
    assert held(shared) == 50 * 10**6


def test_what_no_upstream_answered_is_given_back(accounts: Accounts, shared: SharedLimits) -> None:
    one = record(status=502, code="upstream_error")
    lease = accounts.open(one, RICH, BOUNDED, PLAN, NOW)
    fill(accounts, one, None, is_answered=False)
    accounts.close(one, RICH, lease)
    assert held(shared) == 0


@pytest.mark.parametrize("prices", [None, Prices()], ids=["without a price", "free"])
def test_what_costs_nothing_holds_nothing(
    accounts: Accounts, shared: SharedLimits, prices: Prices | None
) -> None:
    accounts.open(record(), RICH, BOUNDED, plan_of(prices), NOW)
    assert held(shared) == 0


def test_what_is_assumed_of_answers_without_a_limit_is_a_setting(
    journal: Journal, shared: SharedLimits
) -> None:
    prompt = round(CALL.prompt_bytes / BYTES_PER_TOKEN)
    for accounts, tokens in (
        (Accounts(journal, shared, ASSUMED), ASSUMED),
        (Accounts(journal, shared, 50), 50),
    ):
        lease = accounts.open(record(), RICH, CALL, PLAN, NOW)
        assert lease is not None and lease.cost == (prompt + 2 * tokens) * 10**6
        shared.settle(RICH, lease, tokens=0, spent=0)


def test_prices_are_remembered_of_so_many_plans_and_of_none_that_is_gone(
    accounts: Accounts, shared: SharedLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_module, "MAX_PLANS", 3)
    for number in range(1, 20):
        plan = plan_of(Prices(request=Decimal(number) / 1000))
        accounts.open(record(), RICH, BOUNDED, plan, NOW)
        assert len(accounts._offers) <= 3
    assert held(shared) == sum(range(1, 20)) * PICO // 1000


def test_what_is_counted_later_changes_the_windows_in_which_the_call_began(
    shared: SharedLimits,
) -> None:
    rich = replace(RICH, limits=KeyLimits(budget=PICO, tokens_per_minute=1000, concurrency=1))
    lease = shared.admit(rich, NOW, Demand(1, 1, True, 5, 5))
    assert lease is not None
    shared.settle(rich, lease, tokens=100, spent=50)
    shared.amend(rich, lease, tokens=-30, spent=20)
    counters = shared.counters(rich, NOW)
    assert (counters[MINUTE_TOKENS], counters[TOTAL_SPENT]) == (70, 70)
    later = shared.admit(rich, NOW + 90, Demand(1, 1, True, 5, 5))  # one at once: it had ended
    assert later is not None
    shared.amend(rich, lease, tokens=-30, spent=20)
    counters = shared.counters(rich, NOW + 90)
    assert (counters[MINUTE_TOKENS], counters[TOTAL_SPENT]) == (2, 100)


# Usage and cost


def test_what_an_answer_says_of_itself_is_recorded_in_bounds(accounts: Accounts) -> None:
    one = record(status=200)
    outcome = Outcome(Usage(1, 1), "stop", "m" * 10_000, "chatcmpl-1", content_events=7)
    accounts.fill(one, Step("a/b", ENDPOINT), outcome, prompt_bytes=4, is_answered=True)
    assert (one.slug, one.provider, one.finish_reason) == ("a/b", "east", "stop")
    assert (one.upstream_id, one.events) == ("chatcmpl-1", 7)
    assert one.upstream_model.startswith("mmm") and len(one.upstream_model) < 1000


def test_reported_usage_is_priced(accounts: Accounts) -> None:
    one = record(status=200)
    fill(accounts, one, Usage(1000, 500))
    assert (one.has_usage, one.estimated) == (True, False)
    assert (one.cost, one.price) == (2 * 10**9, "prompt=1 completion=2")


def test_without_usage_an_answer_is_estimated_and_priced(accounts: Accounts) -> None:
    one = record(status=CLIENT_CLOSED, events=30)
    fill(accounts, one, None)
    assert (one.prompt_tokens, one.completion_tokens, one.estimated) == (100, 30, True)
    assert one.cost == 160 * 10**6


def test_what_no_upstream_answered_costs_nothing(accounts: Accounts) -> None:
    one = record(status=502, code="upstream_error")
    fill(accounts, one, None, is_answered=False)
    assert (one.cost, one.prompt_tokens, one.estimated) == (0, 0, False)


def test_without_a_price_the_cost_is_not_known(accounts: Accounts) -> None:
    one = record(status=200)
    fill(accounts, one, Usage(1, 1), Endpoint("east", "m"))
    assert (one.cost, one.price) == (None, "")


def test_answers_that_broke_teach_nothing(accounts: Accounts) -> None:
    broken = record(status=200, code="upstream_error", events=1)
    fill(accounts, broken, Usage(1000, 500))
    one = record(status=CLIENT_CLOSED, events=30)
    fill(accounts, one, None)
    assert one.completion_tokens == 30


@pytest.mark.parametrize(
    ("reported", "counted"),
    [
        pytest.param(Usage(0, 0), (100, 30), id="nothing but zeros"),
        pytest.param(Usage(80, 0, 64, 0, 8), (80, 30), id="no tokens of a text"),
        pytest.param(Usage(0, 12), (100, 12), id="no tokens of a prompt"),
    ],
)
def test_a_count_that_cannot_be_is_estimated_and_the_other_kept(
    accounts: Accounts, reported: Usage, counted: tuple[int, int]
) -> None:
    one = record(status=200, events=30)
    fill(accounts, one, reported)
    assert (one.prompt_tokens, one.completion_tokens) == counted
    assert (one.has_usage, one.estimated) == (False, True)
    assert (one.cached_tokens, one.cache_write_tokens) == (
        reported.cached_tokens,
        reported.cache_write_tokens,
    )
    assert one.cost == (counted[0] + 2 * counted[1]) * 10**6


def test_zeros_of_an_answer_without_text_are_believed(accounts: Accounts) -> None:
    one = record(status=200)
    fill(accounts, one, Usage(0, 0))
    assert (one.has_usage, one.estimated, one.cost) == (True, False, 0)


def test_counts_with_gaps_teach_nothing(accounts: Accounts) -> None:
    fill(accounts, record(status=200, events=1), Usage(0, 5000))
    one = record(status=200, events=30)
    fill(accounts, one, None)
    assert one.completion_tokens == 30


# Answers without usage


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "hoberproxy.upstream"]


def test_of_each_endpoint_that_tells_no_usage_the_log_says_so_once(
    accounts: Accounts, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        fill(accounts, record(status=200, events=30), None)
        other = replace(ENDPOINT, upstream_model="other")
        fill(accounts, record(status=200), Usage(0, 0), other)
        fill(accounts, record(status=200), None, other, body_bytes=40)
    first, second = warnings_of(caplog)
    assert "provider east, model m:" in first
    assert "provider east, model other:" in second
    assert 'usage = "count"' in first
    assert "stream_options" in first


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"status": CLIENT_CLOSED, "code": "client_closed", "events": 9}, id="left"),
        pytest.param({"status": 200, "code": "upstream_error", "events": 9}, id="broken"),
        pytest.param({"status": 200, "events": 0}, id="without a text"),
    ],
)
def test_an_answer_that_is_not_whole_is_no_reason_to_say_so(
    accounts: Accounts, caplog: pytest.LogCaptureFixture, values: dict[str, object]
) -> None:
    fill(accounts, record(**values), None)
    assert not warnings_of(caplog)


def test_nothing_is_said_of_tokens_that_are_counted_nor_of_too_many_endpoints(
    accounts: Accounts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts_module, "MAX_SILENT", 5)
    endpoints = [replace(ENDPOINT, upstream_model=str(number)) for number in range(20)]
    for endpoint in [replace(ENDPOINT, usage="count"), *endpoints]:
        one = record(status=200, events=3)
        fill(accounts, one, None, endpoint)
    assert [text.split(":")[0] for text in warnings_of(caplog)] == [
        f"provider east, model {number}" for number in range(5)
    ]
