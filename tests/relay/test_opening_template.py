"""Openings: a stream that begins like another one is read as if it had been parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.relay.opening_template import Form, Known, Opening
from hoberproxy.relay.scanner import StreamScanner
from tests.relay.test_content_template import take
from tests.relay.test_scanner import DIALECTS, SLUG, Seen, all_dialects, scan
from tests.support.cuts import cut_at
from tests.support.scripted import chunk

UPSTREAM = "a-model-2025-01-01"


def event(
    delta: dict[str, Any],
    *,
    upstream_id: Any = "c-1",
    created: Any = 1_709_000_000,
    model: str | None = UPSTREAM,
    order: str = "icmx",
    compact: bool = True,
    finish_reason: str | None = None,
    **more: Any,
) -> bytes:
    """An event of a stream, its members in the order of their first letters, x the choices."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    members = {"i": ("id", upstream_id), "c": ("created", created), "m": ("model", model)}
    members["x"] = ("choices", [choice])
    document = dict(members[letter] for letter in order) | more
    separators = (",", ":") if compact else None
    return b"data: %b\n\n" % json.dumps(document, separators=separators).encode()


def role(**options: Any) -> bytes:
    return event({"role": "assistant", "content": ""}, **options)


def content(text: str, **options: Any) -> bytes:
    return event({"content": text}, **options)


def read(opening: Opening | None, pieces: list[bytes]) -> Seen:
    return scan(pieces, scanner=StreamScanner(SLUG, wants_usage=False, opening=opening))


def taught(*events: bytes) -> Opening:
    opening = Opening()
    read(opening, list(events))
    return opening


ORDERS = ["icmx", "xcim", "mxci", "cixm"]


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "spaced"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_next_stream_is_known_by_its_first_events(order: str, compact: bool) -> None:
    options: dict[str, Any] = {"order": order, "compact": compact}
    opening = taught(role(**options), content("Hi", **options))
    options |= {"upstream_id": "chatcmpl-another", "created": 1_709_000_123}
    pieces = [role(**options), content(" a longer text", **options), content("x", **options)]
    assert opening.find(0, pieces[0]) is not None
    assert opening.find(1, pieces[1]) is not None
    seen = read(opening, pieces)
    assert seen == read(None, pieces)
    assert seen.upstream_id == "chatcmpl-another"
    assert seen.upstream_model == UPSTREAM
    assert seen.output == b"".join(pieces).replace(UPSTREAM.encode(), SLUG.encode())
    assert seen.content_events == 2


@pytest.mark.parametrize("order", ORDERS)
def test_what_follows_a_known_beginning_passes_if_it_is_of_the_same_stream(order: str) -> None:
    opening = taught(role(order=order), content("Hi", order=order))
    options: dict[str, Any] = {"order": order, "upstream_id": "c-another", "created": 77}
    scanner = StreamScanner(SLUG, wants_usage=False, opening=opening)
    scanner.feed(role(**options))
    scanner.feed(content("Hi", **options))
    assert scanner.is_ready_for_stencil

    first, second = content("a", **options), content(" b", **options)
    passed = [each.replace(UPSTREAM.encode(), SLUG.encode()) for each in (first, second)]
    assert take(scanner.stencil, chunk(first)) == (chunk(passed[0]), b"")
    assert take(scanner.stencil, chunk(first) + chunk(second)) == (chunk(b"".join(passed)), b"")
    assert scanner.stencil.pass_events(first + second, 0) == b"".join(passed)
    assert scanner.stencil.events == 5
    for changed in ({"upstream_id": "c-1"}, {"created": 78}, {"model": "another"}):
        other = content("a", **options | changed)
        for data in (chunk(other), chunk(other) + chunk(first)):
            assert take(scanner.stencil, data) == (b"", data)
        assert scanner.stencil.pass_events(other, 0) is None


@pytest.mark.parametrize("order", ["icmx", "cimx", "imx", "cx"])
def test_streams_that_begin_alike_keep_what_is_alike_once(order: str) -> None:
    opening = taught(role(order=order), content("Hi", order=order))
    form = opening.find(1, content("a", order=order, upstream_id="c-2", created=5))
    assert form is not None
    pieces = [content(text, order=order, upstream_id="c-3", created=6) for text in ("a", "b")]
    assert form.is_like(pieces[0])
    lead, shape = form.shape_behind(pieces[0])
    assert pieces[0].startswith(lead)
    assert b"content" not in lead
    assert shape is form.shape


def test_nothing_is_released_before_content_of_a_known_stream_either() -> None:
    opening = taught(role(), content("Hi"))
    scanner = StreamScanner(SLUG, wants_usage=False, opening=opening)
    assert scanner.feed(role(upstream_id="other")) == b""
    assert not scanner.has_content
    assert scanner.feed(content("Hi", upstream_id="other"))
    assert scanner.is_ready_for_stencil


def test_a_first_event_may_have_content() -> None:
    options = {"role": "assistant"}
    opening = taught(event({**options, "content": "Hi"}))
    other = event({**options, "content": "another"}, upstream_id="c-2")
    assert opening.find(0, other) is not None
    assert read(opening, [other]) == read(None, [other])


def test_an_event_without_a_name_or_an_identifier_is_known_too() -> None:
    options: dict[str, Any] = {"order": "cx", "created": 5}
    opening = taught(role(**options), content("Hi", **options))
    pieces = [role(**options | {"created": 7}), content("b", **options | {"created": 7})]
    assert opening.find(1, pieces[1]) is not None
    assert read(opening, pieces) == read(None, pieces)
    assert b"".join(pieces) == read(opening, pieces).output


UNLIKE = {
    "a finish reason": content("x", finish_reason="stop"),
    "usage": content("x", usage={"prompt_tokens": 1, "completion_tokens": 2}),
    "one member more": content("x", system_fingerprint="fp_1"),
    "an error": content("x", error={"message": "no"}),
    "no text": content(""),
    "a quote in the text": content('a"b'),
    "a line end in the text": content("a\nb"),
    "a zero byte in the text": content("xyz").replace(b"xyz", b"x\0z"),
    "a tab in the text": content("xyz").replace(b"xyz", b"x\tz"),
    "no UTF-8 in the text": content("xyz").replace(b"xyz", b"\xff\xfe"),
    "half a character in the text": content("xyz").replace(b"xyz", b"\xe2\x82"),
    "half a character in two values": content("xyz", upstream_id="q")
    .replace(b"xyz", b"\x82")
    .replace(b'"q"', b'"\xc2"'),
    "a backslash in the identifier": content("x", upstream_id="a\\b"),
    "a quote in the identifier": content("x", upstream_id='a","error":{},"b":"'),
    "an identifier that is a number": content("x", upstream_id=7),
    "a time with a fraction": content("x", created=1.5),
    "a time below zero": content("x", created=-1),
    "a time of no digits": content("x").replace(b"1709000000", b""),
    "a time with a zero in front": content("x").replace(b"1709000000", b"01709000000"),
    "a time with a letter in it": content("x").replace(b"1709000000", b"17090e0000"),
    "another time of the same form, twice": content("x") * 2,
    "another model": content("x", model="another"),
    "a tool call": event({"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}),
    "other spaces": content("x", compact=False),
    "another order": content("x", order="xcim"),
    "other line ends": content("x").replace(b"\n", b"\r\n"),
    "a part": content("x")[:-1],
    "the end": b"data: [DONE]\n\n",
    "no JSON": b"data: no JSON\n\n",
    "nothing": b"",
}


@pytest.mark.parametrize("other", UNLIKE.values(), ids=UNLIKE.keys())
def test_what_differs_in_anything_else_is_parsed(other: bytes) -> None:
    opening = taught(role(), content("Hi"))
    assert opening.find(1, other) is None
    assert read(opening, [role(), other]) == read(None, [role(), other])


UNCLEAR = {
    "there are two identifiers": content("x", more={"id": "c-1"}),
    "there are two times": content("x", more={"created": 1_709_000_000}),
    "a name is written with escapes": content("x").replace(b'"id"', b'"i\\u0064"'),
    "a value is written with escapes": content("x").replace(b'"c-1"', b'"c\\u002d1"'),
    "other spaces than usual": content("x").replace(b'"id":', b'"id" :'),
    "the text once more as a token": content("x").replace(
        b'"finish_reason"', b'"logprobs":{"content":[{"token":"x"}]},"finish_reason"'
    ),
    "the text has escapes": content("\u00e9\n"),
    "the name stands there twice": content("x", more={"model": UPSTREAM}),
    "content without a text": event({"tool_calls": [{"index": 0}]}),
    "two choices": content("x", choices=[{"delta": {"content": "x"}}, {"delta": {}}]),
    "a long event": content("x" * 5000),
    "two data lines": content("x").replace(b'"choices"', b'\ndata: "choices"'),
}


@pytest.mark.parametrize("unclear", UNCLEAR.values(), ids=UNCLEAR.keys())
def test_nothing_is_learnt_from_what_is_not_clear(unclear: bytes) -> None:
    opening = taught(role(), unclear)
    assert opening.find(0, role()) is not None
    assert opening.find(1, unclear) is None


def test_a_server_that_writes_otherwise_now_is_learnt_anew() -> None:
    opening = taught(role(), content("Hi"))
    options: dict[str, Any] = {"order": "xcim", "compact": False}
    read(opening, [role(**options), content("Hi", **options)])
    assert opening.find(0, role(**options)) is not None
    assert opening.find(1, content("x", **options)) is not None
    assert opening.find(0, role()) is None


def test_openings_that_always_differ_are_learnt_from_now_and_then() -> None:
    opening, learnt = Opening(), 0
    for number in range(400):
        event_ = content("x", **{f"member_{number}": number})
        read(opening, [event_])
        learnt += opening.find(0, event_) is not None
        opening._unlike = number + 1  # to look has not taught it that it pays
    assert 8 <= learnt <= 8 + 400 / 64


def test_an_event_that_is_never_alike_does_not_stand_in_the_way_of_the_next() -> None:
    filters = event({}, choices=[], prompt_filter_results=[{"x": 1}])
    opening = taught(filters, role(), content("Hi"))
    assert opening.find(0, filters) is None
    assert opening.find(1, role()) is not None
    assert opening.find(2, content("another")) is not None
    pieces = [filters, role(upstream_id="c-2"), content("another", upstream_id="c-2")]
    assert read(opening, pieces) == read(None, pieces)


def test_an_identifier_may_contain_the_time() -> None:
    options: dict[str, Any] = {"upstream_id": "gen-1709000000-x"}
    assert taught(content("Hi", **options)).find(0, content("x", **options)) is not None


@all_dialects
def test_a_dialect_twice_reads_as_it_does_once(dialect: str) -> None:
    pieces = [each + b"\n\n" for each in DIALECTS[dialect].split(b"\n\n") if each]
    opening = taught(*pieces)
    assert read(opening, pieces) == read(None, pieces)
    assert read(opening, [b"".join(pieces)]) == read(None, [b"".join(pieces)])


STRINGS = st.text(max_size=6) | st.sampled_from(["c-1", "x", '"', "\\", "1709000000", UPSTREAM])
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"),
        "content": STRINGS | st.none(),
        "reasoning_content": STRINGS,
        "tool_calls": st.just([{"index": 0}]),
    },
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "upstream_id": STRINGS | st.integers(0, 9),
        "created": st.integers(-1, 2**63) | st.floats(0, 9),
        "model": st.sampled_from([UPSTREAM, SLUG, "other", None]),
        "order": st.sampled_from([*ORDERS, "x", "ix", "xm", "cx"]),
        "compact": st.booleans(),
        "finish_reason": st.sampled_from([None, "stop"]),
        "usage": st.none() | st.just({"prompt_tokens": 1, "completion_tokens": 2}),
        "more": STRINGS | st.integers(),
    },
)


@st.composite
def stream_starts(draw: st.DrawFn) -> list[bytes]:
    """A few events, mostly of the same options, as those of one server are."""
    options = draw(OPTIONS)
    events = []
    for _ in range(draw(st.integers(1, 4))):
        changed = options | draw(st.just({}) | OPTIONS)
        events.append(event(draw(DELTAS), **changed))
    return events


# The names of the answer and of the model stand on the last event alone.
NAMED_LAST = [
    b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n',
    b'data: {"id":"c-1","model":"m","choices":[{"index":0,"delta":{}}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
]


@given(
    earlier=st.lists(stream_starts(), max_size=3),
    later=stream_starts(),
    repeats=st.booleans(),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
)
@example([[role(), content("Hi")]], [role(), content('"')], False, [])
@example([], NAMED_LAST, True, [])
def test_the_scanner_says_the_same_with_an_opening(
    earlier: list[list[bytes]], later: list[bytes], repeats: bool, cuts: list[int]
) -> None:
    opening = Opening()
    for pieces in [*earlier, *([later] if repeats else [])]:
        read(opening, pieces)
    assert read(opening, later) == read(None, later)
    whole = b"".join(later)
    cut_pieces = cut_at(whole, cuts)
    assert read(opening, cut_pieces) == read(None, cut_pieces)


def test_a_form_says_where_the_text_is_of_the_event_it_saw_last() -> None:
    data = content("Hi")
    start = data.index(b"Hi")
    texts = [data[:start], data[start + 2 :]]
    form = Form(texts, texts, ["text"], Known("", b"", 0, [], False))
    longer = content("a longer one")
    assert form.is_like(longer)
    assert longer[form.text_start : form.text_end] == b"a longer one"
