"""Calls in flight together overrun a budget or the tokens of a minute by one answer at most.

What goes upstream is read here by a reader of its own: as many answers as `n` or `best_of` says,
each as long as the larger maximum, or as the endpoint's longest where there is none. That much is
what the limits have to hold; what they give back has to be exact.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoberproxy.access.keys import Caller
from hoberproxy.access.limits import (
    DAY_MS,
    DAY_REQUESTS,
    MINUTE_HELD,
    MINUTE_REQUESTS,
    MINUTE_START,
    MINUTE_TOKENS,
    PERIODS,
    TOTAL_SPENT,
    KeyLimits,
    Lease,
    spent_in,
)
from hoberproxy.access.shared_limits import SharedLimits
from hoberproxy.accounting.accounts import Accounts
from hoberproxy.accounting.journal import Journal
from hoberproxy.dialects.usage import Usage
from hoberproxy.errors import AccessError
from hoberproxy.request.call import Call
from hoberproxy.request.checks import parse_call
from hoberproxy.routing.catalog import NO_ADAPTATION, Adaptation, Endpoint, Prices
from hoberproxy.routing.plan import Plan, Step
from hoberproxy.upstream.body import make_upstream_body
from tests.support.patience import TEST_LIMIT, examples, patient

NOW = 1_700_000_000.0
EXAMPLES = examples(300)
ASSUMED = 300  # tokens of an answer that nothing limits
MAXIMA = ("max_tokens", "max_completion_tokens")
ADAPTATIONS = (
    NO_ADAPTATION,
    Adaptation(rename=(("max_tokens", "max_completion_tokens"),)),
    Adaptation(rename=(("max_completion_tokens", "max_tokens"),)),
    Adaptation(drop=frozenset(MAXIMA)),
    Adaptation(drop=frozenset(("n", "best_of"))),
    Adaptation(set=(("max_tokens", b"40"),)),
    Adaptation(set=(("max_completion_tokens", b"null"), ("n", b"3"))),
)


@dataclass
class Processes:
    """Three that share a limits file, and what one of them holds for a call."""

    folder: Path
    accounts: Accounts
    shared: list[SharedLimits] = field(default_factory=list)
    keys: int = 0

    def new_key(self, limits: KeyLimits) -> Caller:
        """One that has used nothing. The file has room for 8192: it is made again at times."""
        if self.keys % 4000 == 0:
            self.close()
            (self.folder / "limits").unlink(missing_ok=True)
            self.shared = [SharedLimits(self.folder / "limits") for _ in range(3)]
        self.keys += 1
        return Caller(f"key_{self.keys}", "x", "live", None, None, limits=limits)

    def close(self) -> None:
        for each in self.shared:
            each.close()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("limits")
    journal = Journal(folder / "store.db-requests")
    with closing(SharedLimits(folder / "of-accounts")) as shared:
        processes = Processes(folder, Accounts(journal, shared, ASSUMED))
        yield processes
    processes.close()
    journal.close()


def call_with(members: Mapping[str, object]) -> Call:
    """A call whose body has these members, too."""
    question = {"model": "a/b", "messages": [{"role": "user", "content": "x"}]}
    return parse_call(json.dumps(question | members).encode())


def longest_answer(call: Call, endpoint: Endpoint) -> tuple[int, int]:
    """Tokens of one answer, and answers, that an endpoint may write, by the body that it gets."""
    parts, _ = make_upstream_body(call, "m", stream_options=True, adaptation=endpoint.adaptation)
    body = json.loads(b"".join(parts))
    maxima = [body[name] for name in MAXIMA if body.get(name) is not None]
    longest = max(maxima) if maxima else endpoint.max_output or ASSUMED
    return longest, max(body.get("n") or 1, body.get("best_of") or 1)


# One call

SIZES = [None, 7, 90]


@pytest.mark.parametrize("adaptation", [NO_ADAPTATION, *ADAPTATIONS])
def test_held_tokens_are_those_that_the_upstream_body_permits(
    processes: Processes, adaptation: Adaptation
) -> None:
    endpoint = Endpoint("east", "m", max_output=50, adaptation=adaptation)
    plan = Plan((Step("a/b", endpoint),))
    for older, newer, n, best_of in product(SIZES, SIZES, SIZES, SIZES):
        sizes = {"max_tokens": older, "max_completion_tokens": newer, "n": n, "best_of": best_of}
        for members in (sizes, {name: size for name, size in sizes.items() if size}):
            call = call_with(members)
            longest, choices = longest_answer(call, endpoint)
            demand = processes.accounts._demand(plan, call.terms, 10)
            assert demand.answer_tokens >= longest * choices
            # In place of what we set the client's may go up, if the endpoint refuses ours.
            if not adaptation.set:
                assert (demand.answer_tokens, demand.choices) == (longest * choices, choices)


@pytest.mark.parametrize(
    ("members", "adaptation", "tokens"),
    [
        pytest.param({"max_tokens": 5}, {"rename": (("max_tokens", "limit"),)}, 5, id="any name"),
        pytest.param({"limit": 9}, {"rename": (("limit", "max_tokens"),)}, 50, id="not checked"),
        pytest.param({"max_tokens": 5}, {"set": (("max_tokens", b"9"),)}, 9, id="ours is larger"),
        pytest.param({"max_tokens": 9}, {"set": (("max_tokens", b"5"),)}, 9, id="it may refuse it"),
        pytest.param({"max_tokens": 9}, {"set": (("max_tokens", b'"x"'),)}, 50, id="no number"),
        pytest.param({}, {"set": (("n", b"4"),)}, 200, id="choices of ours"),
    ],
)
def test_rules_of_an_endpoint_count(
    processes: Processes, members: dict[str, int], adaptation: dict[str, Any], tokens: int
) -> None:
    endpoint = Endpoint("east", "m", max_output=50, adaptation=Adaptation(**adaptation))
    plan = Plan((Step("a/b", endpoint),))
    demand = processes.accounts._demand(plan, call_with(members).terms, 10)
    assert demand.answer_tokens == tokens


@pytest.mark.parametrize(
    ("lengths", "tokens"),
    [
        pytest.param({}, ASSUMED, id="nothing is known"),
        pytest.param({"max_output": 9000}, 9000, id="its longest answer"),
        pytest.param({"context_length": 200}, 200, id="its context is shorter"),
        pytest.param({"context_length": 90_000}, ASSUMED, id="its context is longer"),
    ],
)
def test_without_a_maximum_the_longest_answer_is_held(
    processes: Processes, lengths: dict[str, int], tokens: int
) -> None:
    plan = Plan((Step("a/b", Endpoint("east", "m", **lengths)),))
    demand = processes.accounts._demand(plan, call_with({"n": 2}).terms, 10)
    assert (demand.answer_tokens, demand.is_bounded) == (2 * tokens, False)


# Mixes of calls


def random_plan(order: Random) -> Plan:
    """One to three endpoints; mostly one that changes nothing in a body."""
    rates = [Decimal(order.choice(("0", "1", "1.5", "2"))) for _ in range(4)]
    rates[1] = max(rates[1], Decimal(1))
    steps = [
        Step(
            "a/b",
            Endpoint(
                f"provider-{number}",
                "m",
                max_output=order.choice((None, None, 200, ASSUMED)),
                prices=Prices(*rates) if order.random() < 0.9 else None,
                adaptation=order.choice(ADAPTATIONS) if order.random() < 0.3 else NO_ADAPTATION,
            ),
        )
        for number in range(order.choice((1, 1, 2, 3)))
    ]
    return Plan(tuple(steps))


def random_call(order: Random) -> Call:
    """As a rule without a maximum, or with a small one: what may leave little behind."""
    members: dict[str, int | None] = {}
    if order.random() < 0.4:
        members[order.choice(MAXIMA)] = order.randint(1, ASSUMED)
    if order.random() < 0.2:
        members |= {name: order.randint(1, ASSUMED) for name in MAXIMA}
    if order.random() < 0.3:
        members[order.choice(("n", "best_of"))] = order.choice((None, 1, 2, 4))
    return call_with(members)


def random_limits(order: Random) -> KeyLimits:
    """Of a few answers: with more nothing is ever short."""

    def either(low: int, high: int) -> int | None:
        return order.randint(low, high) if order.random() < 0.6 else None

    budget = either(0, 6 * ASSUMED)
    return KeyLimits(
        requests_per_minute=either(5, 200),
        tokens_per_minute=either(0, 6 * ASSUMED),
        requests_per_day=either(5, 200),
        concurrency=either(1, 20),
        budget=None if budget is None else budget * 10**6,
        budget_period=order.choice(PERIODS),
    )


@dataclass
class Mix:
    """A key's calls under way, at any of the processes, and what it has used as the test counts."""

    processes: Processes
    caller: Caller
    order: Random
    under_way: list[tuple[SharedLimits, Lease | None, Call, Plan, int]] = field(
        default_factory=list
    )
    waiting: list[tuple[SharedLimits, Lease, Call, Plan, int]] = field(default_factory=list)
    money: defaultdict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    tokens: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    answer: int = 0  # the longest that any call may get, in tokens
    cost: int = 0  # the dearest answer, in picodollars

    def begin(self, call: Call, plan: Plan, prompt: int, now: float) -> None:
        """A call comes: whole, or its head alone."""
        shared = self.order.choice(self.processes.shared)
        with suppress(AccessError):
            if self.order.random() < 0.5:
                lease = shared.enter(self.caller, now)
                self.waiting.append((shared, lease, call, plan, prompt))
            else:
                demand = self.processes.accounts._demand(plan, call.terms, prompt)
                lease_or_none = shared.admit(self.caller, now, demand)
                self._run(shared, lease_or_none, call, plan, prompt)

    def go_on(self, now: float) -> None:
        """One of those whose head has come: its body comes, or never does."""
        shared, lease, call, plan, prompt = self.waiting.pop(
            self.order.randrange(len(self.waiting))
        )
        if self.order.random() < 0.7:
            demand = self.processes.accounts._demand(plan, call.terms, prompt)
            with suppress(AccessError):
                held = shared.reserve(self.caller, now, demand, lease)
                self._run(shared, held, call, plan, prompt)
                return
        shared.leave(self.caller, lease)

    def _run(
        self, shared: SharedLimits, lease: Lease | None, call: Call, plan: Plan, prompt: int
    ) -> None:
        self.under_way.append((shared, lease, call, plan, prompt))
        for _, endpoint, _ in plan.steps:
            longest, _ = longest_answer(call, endpoint)
            self.answer = max(self.answer, longest)
            if endpoint.prices is not None:
                self.cost = max(self.cost, endpoint.prices.most(0, longest)[1] + 1)

    def end_one(self, shares: tuple[float, ...]) -> None:
        """Any of those under way gets its answer, from any endpoint of its plan."""
        shared, lease, call, plan, prompt = self.under_way.pop(
            self.order.randrange(len(self.under_way))
        )
        endpoint = self.order.choice(plan.steps).endpoint
        longest, choices = longest_answer(call, endpoint)
        share = self.order.choice(shares)
        usage = Usage(prompt, max(0, int(longest * choices * share)))
        cost = (
            endpoint.prices.cost(usage.prompt_tokens, usage.completion_tokens)
            if endpoint.prices is not None
            else 0
        )
        used = usage.prompt_tokens + usage.completion_tokens
        if share < 0:  # no endpoint answered
            used = cost = 0
        if lease is None:
            return
        self.tokens[lease.minute_start] += used
        for period, window in (("day", lease.day), ("month", lease.month), ("total", 0)):
            self.money[period, window] += cost
        shared.settle(self.caller, lease, tokens=used, spent=cost)

    def check(self, now: float) -> None:
        """Every process sees the same, and nothing over the limits but one answer."""
        views = [each.counters(self.caller, now) for each in self.processes.shared]
        assert views[0] == views[1] == views[2]
        assert min(views[0]) >= 0
        limits = self.caller.limits
        assert limits is not None
        if limits.budget is not None:
            assert spent_in(views[0], limits.budget_period) <= limits.budget + self.cost
            for (period, _), spent in self.money.items():
                assert period != limits.budget_period or spent <= limits.budget + self.cost
        if limits.tokens_per_minute is not None:
            assert views[0][MINUTE_TOKENS] <= limits.tokens_per_minute + self.answer
            assert all(
                used <= limits.tokens_per_minute + self.answer for used in self.tokens.values()
            )
        if limits.concurrency is not None:
            assert len(self.under_way) + len(self.waiting) <= limits.concurrency


@pytest.mark.timeout(TEST_LIMIT + patient(EXAMPLES))
@settings(max_examples=EXAMPLES)
@given(seed=st.integers(0, 2**64 - 1), steps=st.integers(10, 120))
def test_no_mix_of_calls_overruns_a_limit_by_more_than_one_answer(
    processes: Processes, seed: int, steps: int
) -> None:
    order, now = Random(seed), NOW
    limits = random_limits(order)
    caller = processes.new_key(limits)
    mix = Mix(processes, caller, order)
    plans, calls = [random_plan(order) for _ in range(2)], [random_call(order) for _ in range(4)]
    for _ in range(steps):
        now += order.choice((0,) * 40 + (0.5, 61, 86_400))
        kind = order.random()
        if kind < 0.5:
            mix.begin(order.choice(calls), order.choice(plans), order.randint(0, 20), now)
        elif kind < 0.75 and mix.waiting:
            mix.go_on(now)
        elif mix.under_way:
            mix.end_one((-1.0, 0.0, 0.1, order.random(), 1.0))
        mix.check(now)
    while mix.waiting:
        mix.go_on(now)
        mix.check(now)
    while mix.under_way:
        mix.end_one((1.0,))  # all that it may take, at the worst
        mix.check(now)
    # All is given back: what is left are the answers, to the last picodollar.
    cells = processes.shared[0].counters(caller, now)
    assert cells[MINUTE_HELD] == 0
    if limits.needs_settling:
        assert cells[TOTAL_SPENT] == mix.money["total", 0]
        assert cells[MINUTE_TOKENS] == mix.tokens[cells[MINUTE_START]]
        assert spent_in(cells, "day") == mix.money["day", int(now * 1000) // DAY_MS]
    for each in processes.shared:
        slot = each._slots[caller.key_id]
        assert each._sum_held(slot) == 0
        assert each._count_running(slot, KeyLimits(concurrency=1)) == 0


def test_calls_that_never_got_a_body_leave_no_trace(processes: Processes) -> None:
    limits = KeyLimits(1, 100, 1, 1, 10**9)
    caller = processes.new_key(limits)
    for each in [*processes.shared, *processes.shared]:
        lease = each.enter(caller, NOW)
        with pytest.raises(AccessError):
            processes.shared[0].enter(caller, NOW)
        each.leave(caller, lease)
    cells = processes.shared[0].counters(caller, NOW)
    assert (cells[MINUTE_REQUESTS], cells[DAY_REQUESTS], cells[MINUTE_TOKENS]) == (0, 0, 0)
