"""Endings: a stream that ends like another one is read as if its end had been parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.dialects.usage import Usage
from hoberproxy.relay.ending_template import Ending, read_number
from hoberproxy.relay.opening_template import Opening
from hoberproxy.relay.scanner import StreamScanner
from tests.relay.test_opening_template import UPSTREAM, content, event, role
from tests.relay.test_scanner import DIALECTS, SLUG, Seen, all_dialects, asked_or_not, scan
from tests.support.cuts import cut_at

DONE = b"data: [DONE]\n\n"


def finish(reason: str = "stop", **options: Any) -> bytes:
    return event({}, finish_reason=reason, **options)


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **more,
    }


def counted(prompt: int, completion: int, *, of_usage: Any = None, **options: Any) -> bytes:
    """The event that `include_usage` adds."""
    document = usage(prompt, completion, **(of_usage or {}))
    return event({}, choices=[], usage=document, **options)


def stream(*last: bytes, **options: Any) -> list[bytes]:
    return [role(**options), content("Hi", **options), content(" you", **options), *last]


def read(opening: Opening | None, pieces: list[bytes], *, wants_usage: bool = False) -> Seen:
    return scan(pieces, scanner=StreamScanner(SLUG, wants_usage=wants_usage, opening=opening))


def taught(*streams: list[bytes]) -> Opening:
    """By these; before them by one that has made their beginning known.

    Whoever asked for usage learns by itself, since it sees other bytes.
    """
    opening = Opening()
    for wants_usage in (True, False):
        for pieces in (streams[0], *streams):
            read(opening, pieces, wants_usage=wants_usage)
    return opening


def known(opening: Opening, pieces: list[bytes], last: bytes, *, wants_usage: bool = True) -> bytes:
    """As much of `last` as is known behind these pieces."""
    scanner = StreamScanner(SLUG, wants_usage=wants_usage, opening=opening)
    for piece in pieces:
        scanner.feed(piece)
    assert scanner.stencil.ending is not None
    return last[: scanner._pass_ending(last, 0, [])]


def usual(number: int, **options: Any) -> list[bytes]:
    """A stream, all that differs from one to the next taken from `number`."""
    options |= {"upstream_id": f"c-{number}", "created": 1_709_000_000 + number}
    details = {"prompt_tokens_details": {"cached_tokens": number % 3}}
    counting = {name: value for name, value in options.items() if name != "usage"}
    last = counted(10 + number, 3 * number, of_usage=details, **counting)
    return [*stream(**options), finish(**options), last, DONE]


@asked_or_not
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "spaced"])
@pytest.mark.parametrize("order", ["icmx", "cimx", "imx"])
def test_the_next_stream_is_known_by_its_last_events(
    order: str, compact: bool, wants_usage: bool
) -> None:
    options: dict[str, Any] = {"order": order, "compact": compact}
    opening = taught(usual(1, **options))
    pieces = usual(8, **options)
    last = b"".join(pieces[3:])
    assert known(opening, pieces[:3], last) == last
    seen = read(opening, pieces, wants_usage=wants_usage)
    assert seen == read(None, pieces, wants_usage=wants_usage)
    assert seen == read(opening, [*pieces[:3], last], wants_usage=wants_usage)
    assert seen.usage == Usage(18, 24, 2, 0)
    assert (seen.finish_reason, seen.is_done) == ("stop", True)
    assert UPSTREAM.encode() not in seen.output


@pytest.mark.parametrize("null", [True, False], ids=["usage null before", "no usage before"])
def test_who_asked_for_usage_and_who_did_not_see_what_each_is_to_see(null: bool) -> None:
    more: dict[str, Any] = {"usage": None} if null else {}
    for first, second in ((True, False), (False, True)):
        opening = Opening()
        for number in range(1, 4):
            read(opening, usual(number, **more), wants_usage=first)
        for number in range(4, 8):
            pieces = usual(number, **more)
            expected = read(None, pieces, wants_usage=second)
            assert read(opening, pieces, wants_usage=second) == expected
            assert (b"usage" in expected.output) is second
        last = b"".join(pieces[3:])
        for each in (first, second):
            assert known(opening, pieces[:3], last, wants_usage=each) == last


def test_usage_may_come_with_the_finish_reason() -> None:
    opening = taught(stream(finish(usage=usage(5, 6)), DONE))
    pieces = stream(finish(usage=usage(7, 0)), DONE)
    assert known(opening, pieces[:3], pieces[3]) == pieces[3]
    seen = read(opening, pieces)
    assert seen == read(None, pieces)
    assert (seen.usage, seen.finish_reason) == (Usage(7, 0), "stop")


def test_each_finish_reason_is_known() -> None:
    reasons = ["stop", "length", "tool_calls"]
    opening = taught(*(stream(finish(reason), DONE) for reason in reasons))
    for reason in reasons:
        pieces = stream(finish(reason), DONE)
        assert known(opening, pieces[:3], pieces[3]) == pieces[3]
        assert read(opening, pieces).finish_reason == reason


def test_two_names_of_the_cached_tokens_are_read_as_ever() -> None:
    """One of them counts only where the other one is 0: not a matter of its place."""

    def last(details: int, older: int) -> list[bytes]:
        more = {"prompt_tokens_details": {"cached_tokens": details}}
        more |= {"prompt_cache_hit_tokens": older}  # type: ignore[dict-item]
        return stream(finish(), counted(90, 1, of_usage=more), DONE)

    opening = taught(last(5, 5))
    for details, older in ((0, 7), (8, 7), (0, 0)):
        pieces = last(details, older)
        assert known(opening, pieces[:3], pieces[4]) == pieces[4]
        assert read(opening, pieces) == read(None, pieces)


LAST = counted(10, 20)
UNLIKE = {
    "a number with a fraction": LAST.replace(b":20", b":20.5"),
    "a number with an exponent": LAST.replace(b":20", b":2e1"),
    "a number below zero": LAST.replace(b":20", b":-20"),
    "a number with a zero in front": LAST.replace(b":20", b":020"),
    "a number of sixteen digits": LAST.replace(b":20", b":2000000000000000"),
    "no number": LAST.replace(b":20", b":null"),
    "nothing in place of a number": LAST.replace(b":20", b":"),
    "a text in place of a number": LAST.replace(b":20", b':"20"'),
    "one member more": counted(10, 20, of_usage={"cost": 3}),
    "another model": counted(10, 20, model="another"),
    "another time": counted(10, 20, created=7),
    "another time of as many digits": counted(10, 20, created=1_709_000_001),
    "another identifier": counted(10, 20, upstream_id="c-2"),
    "an error": counted(10, 20, error={"message": "no"}),
    "another finish reason": finish("length"),
    "a text": content("x", finish_reason="stop"),
    "a part": LAST[:-1],
    "other line ends": LAST.replace(b"\n", b"\r\n"),
    "no JSON": b"data: no JSON\n\n",
    "the end without its line": DONE[:-1],
    "nothing": b"",
}


@asked_or_not
@pytest.mark.parametrize("other", UNLIKE.values(), ids=UNLIKE.keys())
def test_what_differs_in_anything_else_is_parsed(other: bytes, wants_usage: bool) -> None:
    opening = taught(stream(finish(), LAST, DONE))
    assert known(opening, stream(), other) == b""
    for last in ([other], [finish(), other], [finish() + other], [finish(), other, DONE]):
        pieces = stream(*last)
        expected = read(None, pieces, wants_usage=wants_usage)
        assert read(opening, pieces, wants_usage=wants_usage) == expected


UNCLEAR = {
    "a text with a number in it": counted(1, 2, of_usage={"note": "a, 12, b"}),
    "a name is written with escapes": LAST.replace(b'"model"', b'"mod\\u0065l"'),
    "lines end in CR": LAST.replace(b"\n", b"\r"),
    "lines end in CR LF": LAST.replace(b"\n", b"\r\n"),
    "a number stands there twice": LAST.replace(b'{"prompt', b'{"total_tokens":4,"prompt'),
    "the model stands behind the usage": counted(1, 2, order="ic", **{"model": None}).replace(
        b"}\n\n", b',"model":"%b"}\n\n' % UPSTREAM.encode()
    ),
    "the model stands there twice": counted(1, 2, more={"model": UPSTREAM}),
    "a long event": counted(1, 2, more="x" * 5000),
    "two data lines": LAST.replace(b'"choices"', b'\ndata: "choices"'),
    "content": content("once", finish_reason="stop"),
}


@pytest.mark.parametrize("unclear", UNCLEAR.values(), ids=UNCLEAR.keys())
def test_nothing_is_learnt_from_what_is_not_clear(unclear: bytes) -> None:
    pieces = stream(unclear, DONE)
    opening = taught(pieces)
    assert known(opening, pieces[:3], unclear) == b""
    assert read(opening, pieces) == read(None, pieces)


def test_values_of_all_kinds_may_stand_in_a_usage() -> None:
    more = {"x": [1, {"y": 2}, True, None, -4, 1.5, "z"], "empty": {}}
    opening = taught(stream(counted(1, 2, of_usage=more)))
    changed = {"x": [7, {"y": 0}, True, None, -4, 1.5, "z"], "empty": {}}
    last = counted(3, 4, of_usage=changed)
    assert known(opening, stream(), last) == last


def test_an_ending_belongs_to_its_beginning() -> None:
    """With another one the same bytes behind it need not close the same braces."""
    opening = taught(usual(1))
    options: dict[str, Any] = {"order": "cimx"}
    for _ in range(2):
        read(opening, stream(**options), wants_usage=True)
    pieces = [*stream(**options), finish()]
    assert known(opening, pieces[:3], pieces[3]) == b""
    assert read(opening, pieces) == read(None, pieces)


def test_endings_that_always_differ_are_learnt_from_now_and_then() -> None:
    ending, learnt = Ending(), 0
    for number in range(400):
        more: dict[str, Any] = {f"member_{number}": number}
        last = finish(order="icx", **more)
        before = list(ending.events)
        ending.learn(last, json.loads(last[6:]), b"data: ", [])
        learnt += ending.events != before
    assert len(ending.events) == 4
    assert learnt == 8 + 400 // 64


@all_dialects
@asked_or_not
def test_a_dialect_again_and_again_reads_as_it_does_once(dialect: str, wants_usage: bool) -> None:
    pieces = [each + b"\n\n" for each in DIALECTS[dialect].split(b"\n\n") if each]
    opening = Opening()
    for _ in range(3):
        seen = read(opening, pieces, wants_usage=wants_usage)
        assert seen == read(None, pieces, wants_usage=wants_usage)
        seen = read(opening, [b"".join(pieces)], wants_usage=wants_usage)
        assert seen == read(None, [b"".join(pieces)], wants_usage=wants_usage)


@pytest.mark.parametrize("text", ["0", "7", "10", "999999999999999"])
def test_a_number_is_read_as_json_has_it(text: str) -> None:
    for before in (b"", b'{"x":'):
        data = before + text.encode()
        assert read_number(data, len(before)) == (int(text), len(data))
        assert read_number(data + b"}", len(before)) == (int(text), len(data))


@pytest.mark.parametrize("text", ["", "x", "-1", "+1", " 1", "00", "01", "1000000000000000"])
def test_what_is_no_such_number_ends_where_it_begins(text: str) -> None:
    data = b"12" + text.encode()
    assert read_number(data, 2) == (0, 2)


COUNTS = st.integers(0, 12) | st.sampled_from([-1, 1.5, 2**40, 2**63, None, "7", True])
USAGES = st.fixed_dictionaries(
    {"prompt_tokens": COUNTS, "completion_tokens": COUNTS},
    optional={
        "total_tokens": COUNTS,
        "prompt_cache_hit_tokens": COUNTS,
        "prompt_tokens_details": st.none() | st.fixed_dictionaries({"cached_tokens": COUNTS}),
        "note": st.sampled_from(["a, 1, b", "{", '"', "\\"]),
        "list": st.lists(COUNTS, max_size=3),
    },
)
LASTS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "usage": st.none() | USAGES,
        "choices": st.just([]),
        "finish_reason": st.sampled_from([None, "stop", "length"]),
        "model": st.sampled_from([UPSTREAM, SLUG, None]),
        "x_groq": st.fixed_dictionaries({"usage": USAGES}),
        "error": st.none() | st.just({"code": 500}),
    },
)
BEGINNINGS = st.fixed_dictionaries(
    {"upstream_id": st.sampled_from(["c-1", "c-22"]), "created": st.integers(1, 12)},
    optional={"order": st.sampled_from(["icmx", "cimx", "imx"]), "compact": st.booleans()},
)


@st.composite
def endings(draw: st.DrawFn) -> list[dict[str, Any]]:
    return draw(st.lists(LASTS, min_size=1, max_size=3))


@given(
    earlier=st.lists(st.tuples(BEGINNINGS, endings()), max_size=3),
    later=st.tuples(BEGINNINGS, endings()),
    repeats=st.booleans(),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
    wants_usage=st.booleans(),
    is_done=st.booleans(),
)
@example([], ({"upstream_id": "a", "created": 1}, [{"usage": {}}]), True, [], False, True)
def test_the_scanner_says_the_same_with_an_ending(
    earlier: list[tuple[Any, Any]],
    later: tuple[Any, Any],
    repeats: bool,
    cuts: list[int],
    wants_usage: bool,
    is_done: bool,
) -> None:
    def pieces(options: Any, lasts: Any) -> list[bytes]:
        made = stream(*(event({}, **{**options, **last}) for last in lasts), **options)
        return [*made, DONE] if is_done else made

    opening = Opening()
    for each in earlier:
        read(opening, pieces(*each), wants_usage=not wants_usage)
    options, lasts = later
    if repeats:
        for _ in range(2):
            read(opening, pieces(options | {"created": 9}, lasts))
    now = pieces(options, lasts)
    assert read(opening, now, wants_usage=wants_usage) == read(None, now, wants_usage=wants_usage)
    cut = cut_at(b"".join(now), cuts)
    assert read(opening, cut, wants_usage=wants_usage) == read(None, cut, wants_usage=wants_usage)
