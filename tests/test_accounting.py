"""A request's account: what the key may use, what is told to whom, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from hoberproxy.access import ANONYMOUS, Caller, Keyring
from hoberproxy.accounting import Accounts, permitted
from hoberproxy.catalog import Endpoint
from hoberproxy.errors import AccessError
from hoberproxy.journals import Journals
from hoberproxy.ledger import Ledger
from hoberproxy.limits import MINUTE_TOKENS, TOTAL_SPENT, KeyLimits
from hoberproxy.prices import Prices
from hoberproxy.record import CLIENT_CLOSED, Record
from hoberproxy.request import parse_call
from hoberproxy.routing import Plan, Step
from hoberproxy.tallies import Tallies
from hoberproxy.usage import Usage

NOW = 1_700_000_000.0
ENDPOINT = Endpoint("east", "m", prices=Prices(Decimal(1), Decimal(2)))
PLAN = Plan((Step("a/b", ENDPOINT), Step("c/d", replace(ENDPOINT, provider="west"))))
CALL = parse_call(b'{"model": "a/b", "messages": [{"role": "user", "content": "hi"}]}')
LIMITED = Caller("key_1", "x", "live", None, None, limits=KeyLimits(tokens_per_minute=10_000))


@pytest.fixture
def tallies(tmp_path: Path) -> Iterator[Tallies]:
    tallies = Tallies(tmp_path / "limits")
    yield tallies
    tallies.close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "store.db", Keyring(), has_writer=False)
    ledger._journal.prepare()
    yield ledger
    ledger.close()


@pytest.fixture
def accounts(ledger: Ledger, tallies: Tallies) -> Accounts:
    return Accounts(ledger, tallies)


def record(**values: object) -> Record:
    return Record(id="req_1", started=NOW, **values)  # type: ignore[arg-type]


def fill(accounts: Accounts, one: Record, usage: Usage | None, *, is_answered: bool = True) -> None:
    accounts.fill(one, ENDPOINT, usage, prompt_bytes=400, body_bytes=0, is_answered=is_answered)


# Models


def test_a_plan_keeps_the_models_that_a_key_may_use() -> None:
    caller = replace(LIMITED, models=("c/*",))
    assert [step.slug for step in permitted(PLAN, caller).steps] == ["c/d"]
    assert permitted(PLAN, ANONYMOUS) is PLAN


def test_if_none_is_left_the_refusal_says_which_there_are() -> None:
    with pytest.raises(AccessError, match=r"e/\*.*a/b, c/d") as caught:
        permitted(PLAN, replace(LIMITED, models=("e/*",)))
    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")


# From opening to closing


def test_what_is_held_is_settled_by_what_was_used(accounts: Accounts, tallies: Tallies) -> None:
    one = record(status=200, events=10)
    lease = accounts.open(one, LIMITED, CALL, PLAN, NOW)
    assert tallies.counters(LIMITED, NOW)[MINUTE_TOKENS] > 500  # the usual answer
    fill(accounts, one, Usage(100, 20))
    accounts.seal(one)
    accounts.close(one, LIMITED, lease)
    counters = tallies.counters(LIMITED, NOW)
    assert (counters[MINUTE_TOKENS], counters[TOTAL_SPENT]) == (120, 140 * 10**6)


def test_a_wish_for_a_short_answer_holds_as_much(accounts: Accounts, tallies: Tallies) -> None:
    call = parse_call(CALL.body[:-1] + b', "max_tokens": 7}')
    accounts.open(record(), LIMITED, call, PLAN, NOW)
    assert 7 < tallies.counters(LIMITED, NOW)[MINUTE_TOKENS] < 30


def test_a_refused_request_is_not_in_the_journal(
    accounts: Accounts, ledger: Ledger, tmp_path: Path
) -> None:
    strict = replace(LIMITED, limits=KeyLimits(concurrency=1))
    accounts.open(record(), strict, CALL, PLAN, NOW)
    with pytest.raises(AccessError):
        accounts.open(replace(record(), id="req_2"), strict, CALL, PLAN, NOW)
    ledger.close()
    journals = Journals(tmp_path / "store.db-requests")
    (remains,) = journals.dead()
    assert list(remains.opened) == ["req_1"]
    remains.release()
    journals.close()


# Usage and cost


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
    accounts.fill(
        one,
        Endpoint("east", "m"),
        Usage(1, 1),
        prompt_bytes=4,
        body_bytes=0,
        is_answered=True,
    )
    assert (one.cost, one.price) == (None, "")


def test_answers_that_broke_teach_nothing(accounts: Accounts) -> None:
    broken = record(status=200, code="upstream_error", events=1)
    fill(accounts, broken, Usage(1000, 500))
    one = record(status=CLIENT_CLOSED, events=30)
    fill(accounts, one, None)
    assert one.completion_tokens == 30
