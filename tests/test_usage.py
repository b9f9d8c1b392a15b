"""Token counts in the dialects seen on the wire, and estimates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.usage import Usage, parse_usage, read_usage

PLAIN = {"prompt_tokens": 7, "completion_tokens": 5}


@pytest.mark.parametrize(
    ("document", "usage"),
    [
        pytest.param({"usage": PLAIN}, Usage(7, 5), id="OpenAI"),
        pytest.param({"x_groq": {"id": "r", "usage": PLAIN}}, Usage(7, 5), id="Groq"),
        pytest.param({"usage": None, "x_groq": {"usage": PLAIN}}, Usage(7, 5), id="Groq and null"),
        pytest.param({"usage": PLAIN, "x_groq": {"usage": {}}}, Usage(7, 5), id="on top first"),
        pytest.param({"usage": None}, None, id="null"),
        pytest.param({"usage": []}, None, id="an array"),
        pytest.param({"usage": {}}, None, id="empty"),
        pytest.param({"x_groq": None}, None, id="Groq's null"),
        pytest.param({"x_groq": {"id": "r"}}, None, id="Groq's first event"),
        pytest.param({}, None, id="nothing"),
    ],
)
def test_usage_is_read_from_its_place(document: dict[str, Any], usage: Usage | None) -> None:
    assert read_usage(document) == usage


@pytest.mark.parametrize(
    ("more", "usage"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 4}}, Usage(7, 5, cached_tokens=4)),
        ({"prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 3}, Usage(7, 5, 4)),
        (
            {"prompt_tokens_details": {"cached_tokens": 3}, "prompt_cache_hit_tokens": 4},
            Usage(7, 5, cached_tokens=3),
        ),
        (
            {"prompt_tokens_details": {"cached_tokens": None}, "prompt_cache_hit_tokens": 4},
            Usage(7, 5, cached_tokens=4),
        ),
        ({"completion_tokens_details": {"reasoning_tokens": 2}}, Usage(7, 5, reasoning_tokens=2)),
        ({"prompt_tokens_details": None, "completion_tokens_details": []}, Usage(7, 5)),
        ({"total_tokens": 999, "cost": 0.1}, Usage(7, 5)),
    ],
    ids=["cached", "DeepSeek's", "both", "null in one", "reasoning", "no details", "others"],
)
def test_details_are_read_where_they_are(more: dict[str, Any], usage: Usage) -> None:
    assert parse_usage(PLAIN | more) == usage


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (0, 0),
        (12, 12),
        (12.0, 12),
        (12.5, None),
        (-1, None),
        (None, None),
        ("12", None),
        (True, None),
        (float("inf"), None),
        (2**40, 2**40),
        (2**40 + 1, None),  # a database's integers end somewhere
        (1e300, None),
    ],
)
def test_a_count_is_a_whole_number_from_zero_to_what_can_be(value: Any, count: int | None) -> None:
    expected = None if count is None else Usage(completion_tokens=count)
    assert parse_usage({"completion_tokens": value}) == expected


def test_one_of_the_two_counts_is_enough() -> None:
    assert parse_usage({"prompt_tokens": 7}) == Usage(7, 0)
    assert parse_usage({"completion_tokens": 5}) == Usage(0, 5)
    assert parse_usage({"total_tokens": 12, "prompt_tokens": "7"}) is None


def test_zero_counts_are_counts() -> None:
    assert parse_usage({"prompt_tokens": 0, "completion_tokens": 0}) == Usage(0, 0)


NAMES = st.sampled_from(
    """usage x_groq prompt_tokens completion_tokens prompt_tokens_details cached_tokens
    completion_tokens_details reasoning_tokens prompt_cache_hit_tokens""".split()
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(NAMES, JSON, max_size=4))
def test_no_form_of_usage_is_too_strange_to_read(document: dict[str, Any]) -> None:
    usage = read_usage(document)
    if usage is not None:
        counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        assert all(type(count) is int and 0 <= count <= 2**40 for count in counts)
        assert not usage.is_estimated
