"""Tables, bars, amounts and times, as they are printed and as users write them."""

from __future__ import annotations

import pytest

from hoberproxy.limits import PICO
from hoberproxy.printing import (
    BAR_WIDTH,
    bar,
    dollars,
    moment,
    parse_day,
    parse_dollars,
    parse_expiry,
    parse_since,
    parse_span,
    print_table,
)
from hoberproxy.store import StoreError

NOW = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


@pytest.mark.parametrize(
    ("part", "drawn"), [(0, ""), (1, "▏"), (500, "█" * 10), (1000, "█" * 20), (506, "█" * 10 + "▏")]
)
def test_a_bar_is_as_long_as_its_part_and_never_nothing_for_something(
    part: int, drawn: str
) -> None:
    assert bar(part, 1000) == drawn.ljust(BAR_WIDTH)


def test_of_nothing_there_is_no_bar() -> None:
    assert bar(0, 0) == ""


@pytest.mark.parametrize(
    ("pico", "text"),
    [
        (0, "0.0000"),
        (12_345 * PICO // 10, "1,234.5000"),
        (PICO // 10_000, "0.0001"),
        (3, "0.000000000003"),
    ],
)
def test_an_amount_has_four_decimals_and_more_where_it_would_be_zero(pico: int, text: str) -> None:
    assert dollars(pico) == text


def test_columns_stand_under_their_heads(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "count"), [("a", "1,000"), ("longer", "2")], right_from=1)
    assert capsys.readouterr().out == "name    count\na       1,000\nlonger      2\n"
    print_table(("name",), [])
    assert capsys.readouterr().out == "name\n"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000)]
)
def test_a_span_may_be_meant_back_or_forth(text: str, seconds: int) -> None:
    assert parse_span(text) == seconds
    assert parse_since(text, NOW) == NOW - seconds
    assert parse_expiry(text, NOW) == NOW + seconds


def test_a_day_begins_at_midnight_utc() -> None:
    assert moment(parse_day("2023-11-14")) == "2023-11-14 00:00"
    assert parse_since("2023-11-14", NOW) == parse_expiry("2023-11-14", NOW)
    assert moment(None, "never") == "never"


@pytest.mark.parametrize("text", ["", "5", "d", "-1d", "1.5h", "99999999d", "2023-13-01"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="expected"):
        parse_since(text, NOW)


def test_dollars_are_read_exactly() -> None:
    assert parse_dollars("5.00") == 5 * PICO
    assert parse_dollars("0.000000000001") == 1


@pytest.mark.parametrize("text", ["", "five", "-1", "1e-13", "NaN", "Infinity", "1,5"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="an amount in USD"):
        parse_dollars(text)
