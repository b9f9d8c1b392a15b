"""Token counts in the dialects seen on the wire; usage_forms.py has an example of each."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.access.limits import format_dollars
from hoberproxy.accounting.accounts import cost_of
from hoberproxy.config.presets import PRESETS
from hoberproxy.dialects.usage import (
    MAX_COUNTED_CHOICES,
    MAX_TOKENS,
    MAX_UNLISTED,
    Usage,
    newest_usage,
    parse_usage,
    read_usage,
)
from hoberproxy.relay.completion import parse_completion
from hoberproxy.relay.scanner import StreamScanner
from tests.support.scripted import completion, event
from tests.support.usage_forms import (
    FORMS,
    PRICES,
    Form,
    as_timings,
    in_a_choice,
    in_x_groq,
    on_top,
)

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
        ({"total_tokens": 12, "cost": 0.1}, Usage(7, 5)),
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


# The forms of all servers


every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def usage_of(form: Form) -> Usage:
    return Usage(*form.counts)


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": choices}


def stream_of(form: Form) -> bytes:
    """Text, and the form where its server has it: with the last choice, or an event of its own."""
    text, stop = event(chunk({"content": "hello"})), chunk({}, "stop")
    if form.place is on_top:
        last = event(stop) + event(form.place(chunk({}) | {"choices": []}, form.usage))
    else:
        last = event(form.place(stop, form.usage))
    return text + last + b"data: [DONE]\n\n"


def test_every_preset_has_a_form() -> None:
    assert not set(PRESETS) - {server for form in FORMS for server in form.servers}


@every_form
def test_a_form_is_read_in_a_body(form: Form) -> None:
    body = form.place(completion(usage=None), form.usage)
    parsed = parse_completion(json.dumps(body).encode(), "a/b")
    assert parsed.usage == usage_of(form)


@every_form
@pytest.mark.parametrize("size", [1, 7, 10_000], ids=["byte by byte", "in sevens", "at once"])
def test_a_form_is_read_in_a_stream(form: Form, size: int) -> None:
    data = stream_of(form)
    scanner = StreamScanner("a/b", wants_usage=False)
    for start in range(0, len(data), size):
        scanner.feed(data[start : start + size])
    assert (scanner.usage, scanner.is_done) == (usage_of(form), True)


@every_form
def test_a_form_costs_what_its_parts_cost(form: Form) -> None:
    assert format_dollars(cost_of(usage_of(form), PRICES)) == form.cost


# What zeros mean

ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("place", [on_top, in_x_groq, in_a_choice])
def test_zeros_do_not_take_the_place_of_numbers(place: Any) -> None:
    real, zeros = (place(chunk({}), usage) for usage in (PLAIN, ZEROS))
    for events in ([zeros, real], [real, zeros], [zeros, real, zeros, chunk({})]):
        usage = None
        for each in events:
            usage = newest_usage(usage, each)
        assert usage == Usage(7, 5)
    prompt = newest_usage(None, place(chunk({}), {"prompt_tokens": 7, "completion_tokens": 0}))
    assert newest_usage(prompt, zeros) == Usage(7, 0)


@pytest.mark.parametrize(
    "parts",
    [
        {"prompt_tokens_details": {"cached_tokens": 4}},
        {"completion_tokens_details": {"reasoning_tokens": 3}},
        {"cache_creation_input_tokens": 2},
    ],
    ids=str,
)
def test_the_same_counts_without_their_parts_take_no_place(parts: dict[str, Any]) -> None:
    """A server's last two events may both tell usage, one of them no more than the counts."""
    whole, bare, other = (
        on_top(chunk({}), usage) for usage in (PLAIN | parts, PLAIN, PLAIN | {"prompt_tokens": 8})
    )
    for events in ([whole, bare], [bare, whole], [other, whole, bare]):
        usage = None
        for each in events:
            usage = newest_usage(usage, each)
        assert usage == parse_usage(PLAIN | parts)
    assert newest_usage(read_usage(whole), other) == read_usage(other)


def test_zeros_on_top_hide_no_usage_elsewhere() -> None:
    assert read_usage(in_a_choice(chunk({}), PLAIN) | {"usage": ZEROS}) == Usage(7, 5)
    timings = {"prompt_n": 3, "cache_n": 4, "predicted_n": 5}
    assert read_usage(as_timings(chunk({}), timings) | {"usage": ZEROS}) == Usage(7, 5, 4)


def choice_with(index: int, completion_tokens: int, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": completion_tokens, **more}
    return {"index": index, "delta": {}, "finish_reason": "stop", "usage": usage}


def test_of_choices_that_tell_their_own_all_answers_count_and_one_prompt() -> None:
    """As Moonshot's guide to streams without an SDK keeps them: one usage for each index."""
    choices = [choice_with(0, 5, cached_tokens=4), choice_with(1, 9, reasoning_tokens=3)]
    whole = Usage(7, 14, 4, 3)
    assert read_usage({"choices": [None, {"usage": None}, *choices]}) == whole
    usage = None
    for choice in [*choices, choices[0]]:  # the last once more: what it reported before is replaced
        usage = newest_usage(usage, {"choices": [choice]})
    assert usage == whole
    assert newest_usage(usage, {"choices": [], "usage": PLAIN | {"completion_tokens": 20}}) == (
        Usage(7, 20)
    )


def test_the_choices_that_are_added_up_are_bounded() -> None:
    usage = None
    for index in range(3 * MAX_COUNTED_CHOICES):
        usage = newest_usage(usage, {"choices": [choice_with(index, 1)]})
    assert usage == Usage(7, MAX_COUNTED_CHOICES)
    assert usage.choices is not None and len(usage.choices) == MAX_COUNTED_CHOICES


@pytest.mark.parametrize(
    ("usage", "events", "has_gaps"),
    [
        (Usage(7, 5), 3, False),
        (Usage(0, 0), 3, True),
        (Usage(0, 0), 0, False),  # nothing was asked for, or a filter said no
        (Usage(7, 0), 3, True),
        (Usage(7, 0), 0, False),
        (Usage(0, 5), 3, True),
        (Usage(0, 5), 0, True),
    ],
)
def test_a_count_of_zero_is_a_gap_where_it_cannot_be(
    usage: Usage, events: int, has_gaps: bool
) -> None:
    assert usage.has_gaps(events) is has_gaps


@pytest.mark.parametrize(
    ("message", "has_gaps"),
    [
        ({"role": "assistant", "content": "hello"}, True),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "call_1"}]}, True),
        ({"role": "assistant", "content": "", "reasoning_details": [{"text": "hm"}]}, True),
        ({"role": "assistant", "content": "", "refusal": None, "tool_calls": []}, False),
        ({"role": "assistant"}, False),
        (None, False),
    ],
)
def test_the_text_of_a_body_makes_zeros_a_gap(message: Any, has_gaps: bool) -> None:
    for usage in (ZEROS, PLAIN | {"completion_tokens": 0}):
        read = read_usage({"choices": [None, {"message": message}], "usage": usage})
        assert read is not None
        assert read.has_gaps(0) is has_gaps


def test_the_timings_of_an_older_server_leave_the_prompt_open() -> None:
    assert read_usage({"timings": {"prompt_n": 3, "predicted_n": 5}}) == Usage(0, 5)
    assert read_usage({"timings": {"prompt_n": 3, "prompt_ms": 1.5}}) is None


# Parts and wholes


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param(PLAIN | {"total_tokens": 5}, Usage(7, 5), id="a total that is too low"),
        pytest.param(PLAIN | {"total_tokens": 0}, Usage(7, 5), id="a total of zero"),
        pytest.param(
            PLAIN | {"total_tokens": 13 + MAX_UNLISTED}, Usage(7, 5), id="an absurd total"
        ),
        pytest.param(PLAIN | {"total_tokens": 20}, Usage(7, 13), id="output that is not listed"),
        pytest.param(
            PLAIN | {"total_tokens": 20, "reasoning_tokens": 3},
            Usage(7, 13, reasoning_tokens=3),
            id="more output than the reasoning listed",
        ),
        pytest.param({"completion_tokens": 5, "total_tokens": 12}, Usage(7, 5), id="no prompt"),
        pytest.param({"prompt_tokens": 7, "total_tokens": 12}, Usage(7, 5), id="no completion"),
        pytest.param(
            PLAIN | {"completion_tokens_details": {"reasoning_tokens": 9}},
            Usage(7, 14, reasoning_tokens=9),
            id="more reasoning than answer, and no total",
        ),
        pytest.param(
            PLAIN | {"total_tokens": 12, "completion_tokens_details": {"reasoning_tokens": 9}},
            Usage(7, 5, reasoning_tokens=5),
            id="more reasoning than answer, against the total",
        ),
        pytest.param(
            PLAIN | {"total_tokens": 12, "cached_tokens": 9},
            Usage(7, 5, 7),
            id="more cached than prompt, against the total",
        ),
        pytest.param(
            PLAIN | {"prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 5}},
            Usage(7, 5, 5, 0, 2),
            id="more cached and written than prompt",
        ),
        pytest.param(
            PLAIN | {"total_tokens": 41, "reasoning_tokens": 9, "cache_read_input_tokens": 20},
            Usage(27, 14, 20, 9),
            id="both beside their wholes",
        ),
        pytest.param(
            {"prompt_tokens": 2**40, "completion_tokens": 5, "total_tokens": 2**40},
            Usage(2**40, 5),
            id="as many as can be",
        ),
    ],
)
def test_parts_and_wholes_fit(usage: dict[str, Any], expected: Usage) -> None:
    assert parse_usage(usage) == expected


COUNTS = st.none() | st.integers(0, 50) | st.integers(0, MAX_TOKENS)
SMALL = st.integers(0, 5000)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: COUNTS
            for name in (
                *("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"),
                *("input_tokens", "output_tokens", "reasoning_tokens", "cache_write_tokens"),
                *("cache_read_input_tokens", "cache_creation_input_tokens"),
            )
        }
        | {
            name: st.fixed_dictionaries({}, optional=dict.fromkeys(parts, COUNTS))
            for name, parts in {
                "prompt_tokens_details": ("cached_tokens", "cache_write_tokens"),
                "completion_tokens_details": ("reasoning_tokens",),
            }.items()
        },
    )
)
def test_whatever_is_told_no_part_is_more_than_its_whole(usage: dict[str, Any]) -> None:
    read = parse_usage(usage)
    if read is not None:
        assert 0 <= read.cached_tokens + read.cache_write_tokens <= read.prompt_tokens
        assert 0 <= read.reasoning_tokens <= read.completion_tokens
        assert max(read.prompt_tokens, read.completion_tokens) <= MAX_TOKENS
        assert min(read.cached_tokens, read.cache_write_tokens) >= 0
        assert read.prompt_tokens >= (usage.get("prompt_tokens") or 0)
        assert read.completion_tokens >= (usage.get("completion_tokens") or 0)
        assert cost_of(read, PRICES) >= 0


@given(SMALL, SMALL, SMALL, SMALL, SMALL, st.booleans(), st.booleans())
def test_wherever_the_parts_are_counted_the_same_comes_out(
    fresh: int, cached: int, written: int, plain: int, reasoned: int, in_prompt: bool, in_text: bool
) -> None:
    """One answer reported in four ways: parts in their wholes or beside them."""
    aside = cached + written
    usage = {
        "prompt_tokens": fresh + aside * in_prompt,
        "completion_tokens": plain + reasoned * in_text,
        "total_tokens": fresh + aside + plain + reasoned,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "completion_tokens_details": {"reasoning_tokens": reasoned},
    }
    expected = Usage(fresh + aside, plain + reasoned, cached, reasoned, written)
    if not in_prompt and aside == reasoned and in_text:
        return  # the rest may be either; it is taken for reasoning, the dearer
    assert parse_usage(usage) == expected


@given(SMALL, SMALL, st.integers(0, 3 * MAX_UNLISTED), SMALL, SMALL)
def test_what_a_total_holds_is_counted(
    prompt: int, completion: int, total: int, cached: int, reasoned: int
) -> None:
    usage = PLAIN | {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
    }
    usage |= {"cached_tokens": cached, "completion_tokens_details": {"reasoning_tokens": reasoned}}
    read = parse_usage(usage)
    assert read is not None
    if 0 < total - prompt - completion <= MAX_UNLISTED:
        assert read.prompt_tokens + read.completion_tokens == total


# Any input

NAMES = st.sampled_from(
    """usage x_groq prompt_tokens completion_tokens prompt_tokens_details cached_tokens
    completion_tokens_details reasoning_tokens prompt_cache_hit_tokens choices timings
    cache_creation total_tokens input_tokens predicted_n message""".split()
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
