"""Prices and costs: exact to the picodollar."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.catalog import Prices, parse_prices
from hoberproxy.limits import PICO, format_dollars

price = st.decimals(0, 1000, places=12)
tokens = st.integers(0, 10**9)


@given(price, price, price, price, price, price, tokens, tokens, tokens, tokens, tokens)
def test_a_cost_is_what_decimal_arithmetic_says(
    prompt: Decimal,
    completion: Decimal,
    cached: Decimal,
    reasoning: Decimal,
    request: Decimal,
    cache_write: Decimal,
    fresh_in: int,
    cached_in: int,
    written_in: int,
    plain_out: int,
    reasoning_out: int,
) -> None:
    all_in, all_out = fresh_in + cached_in + written_in, plain_out + reasoning_out
    million = fresh_in * prompt + cached_in * cached + written_in * cache_write
    million += plain_out * completion + reasoning_out * reasoning
    expected = ((million / 10**6 + request) * PICO).to_integral_value(ROUND_HALF_UP)
    prices = Prices(prompt, completion, cached, reasoning, request, cache_write)
    assert prices.cost(all_in, all_out, cached_in, reasoning_out, written_in) == expected


@given(price, price, price, price, price, price, tokens, tokens, st.data())
def test_no_usage_within_the_bounds_costs_more_than_the_most(
    prompt: Decimal,
    completion: Decimal,
    cached: Decimal,
    reasoning: Decimal,
    request: Decimal,
    cache_write: Decimal,
    tokens_in: int,
    tokens_out: int,
    data: st.DataObject,
) -> None:
    prices = Prices(prompt, completion, cached, reasoning, request, cache_write)
    most = prices.most(tokens_in, tokens_out)
    used_in, used_out = (data.draw(st.integers(0, each)) for each in (tokens_in, tokens_out))
    cached_in, reasoned = (data.draw(st.integers(0, each)) for each in (used_in, used_out))
    written = data.draw(st.integers(0, used_in - cached_in))
    assert prices.cost(used_in, used_out, cached_in, reasoned, written) <= sum(most)
    assert min(most) >= 0
    plain = Prices(prompt, completion, request=request)
    assert sum(plain.most(tokens_in, tokens_out)) == plain.cost(tokens_in, tokens_out)


def test_without_prices_of_their_own_cached_and_reasoning_tokens_cost_as_the_others() -> None:
    prices = Prices(Decimal("0.14"), Decimal("0.28"))
    plain, detailed = prices.cost(1000, 100), prices.cost(1000, 100, 900, 50, 80)
    assert plain == detailed
    assert format_dollars(plain) == "0.000168"


def test_parts_greater_than_the_whole_do_not_make_a_negative_cost() -> None:
    assert Prices(Decimal(1), Decimal(1), Decimal(0), Decimal(0)).cost(10, 10, 99, 99) == 0
    writing = Prices(Decimal(1), cached=Decimal(0), cache_write=Decimal(2))
    assert writing.cost(10, 0, 4, 0, 99) == 12 * PICO // 10**6


@pytest.mark.parametrize(
    ("prices", "is_free"),
    [
        (Prices(), True),
        (Prices(request=Decimal("0.01")), False),
        (Prices(reasoning=Decimal(1)), False),
        (Prices(cache_write=Decimal(1)), False),
    ],
)
def test_free_is_what_costs_nothing_in_any_way(prices: Prices, is_free: bool) -> None:
    assert prices.is_free is is_free


def test_prices_write_themselves_for_the_record() -> None:
    assert Prices(Decimal("0.14"), Decimal("0.28")).text == "prompt=0.14 completion=0.28"
    five = Decimal(1), Decimal(0), Decimal("0.10"), Decimal(2), Decimal("0.005")
    full = Prices(*five, cache_write=Decimal("1.25"))
    text = "prompt=1 completion=0 cached=0.10 reasoning=2 request=0.005 cache_write=1.25"
    assert full.text == text
    assert parse_prices(full.text) == full
