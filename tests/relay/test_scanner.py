"""The stream scanner against a slow reading of the same bytes, wherever they are cut.

`tests/data` holds a stream of each dialect, shortened after what those servers send.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.dialects.error_document import read_error
from hoberproxy.dialects.usage import Usage
from hoberproxy.relay import scanner as stream_module
from hoberproxy.relay.scanner import OPENING_LIMIT_BYTES, StreamScanner
from tests.conftest import pure_only
from tests.support.cuts import cut_at
from tests.support.plain_reader import Reading, read_plainly
from tests.support.scripted import chunk as chunked

from .test_content_template import take

SLUG = "vendor/catalog-name"
DIALECTS = {
    path.stem: path.read_bytes() for path in (Path(__file__).parents[1] / "data").glob("*.sse")
}
LINE_ENDS = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}

ends_of_lines = pytest.mark.parametrize(
    "line_end", [pytest.param(end, id=name) for name, end in LINE_ENDS.items()]
)
all_dialects = pytest.mark.parametrize("dialect", sorted(DIALECTS))
asked_or_not = pytest.mark.parametrize(
    "wants_usage", [pytest.param(True, id="usage asked"), pytest.param(False, id="usage not asked")]
)


# What a scanner made of a stream


@dataclass(frozen=True)
class Seen:
    """All that a scanner has passed on and reports after a whole stream."""

    output: bytes
    failure: tuple[bool, int | None] | None
    has_content: bool
    is_done: bool
    is_finished: bool
    content_events: int
    usage: Usage | None
    finish_reason: str
    upstream_model: str
    upstream_id: str


def scan(pieces: Iterable[bytes], *, wants_usage: bool = False, scanner: Any = None) -> Seen:
    scanner = scanner or StreamScanner(SLUG, wants_usage=wants_usage)
    out = []
    for piece in pieces:
        out.append(scanner.feed(piece))
        if scanner.failure is not None:
            break
    else:
        out.append(scanner.feed_eof())
    failure = scanner.failure
    return Seen(
        output=b"".join(out),
        failure=failure and (failure.is_error_event, read_error(failure.document).status),
        has_content=scanner.has_content,
        is_done=scanner.is_done,
        is_finished=scanner.is_finished,
        content_events=scanner.content_events,
        usage=scanner.usage,
        finish_reason=scanner.finish_reason,
        upstream_model=scanner.upstream_model,
        upstream_id=scanner.upstream_id,
    )


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def read_slowly(data: bytes, *, wants_usage: bool) -> Reading:
    return read_plainly(data, slug=SLUG, wants_usage=wants_usage)


def agree(seen: Seen, expected: Reading) -> None:
    assert seen.output == expected.output
    assert seen.failure is None
    assert seen.is_done is expected.is_done
    assert seen.finish_reason == expected.finish_reason
    assert seen.upstream_model == expected.model
    assert seen.upstream_id == expected.upstream_id
    assert seen.usage == expected.usage


# Variants of a stream


def with_line_ends(data: bytes, line_end: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\n", line_end)


def chunk(delta: Any = None, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason}
    return {"id": "c-1", "model": "upstream-name", "choices": [choice]} | more


def event(document: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(document, separators=(",", ":")).encode()


def text(content: str, **more: Any) -> bytes:
    return event(chunk({"content": content}, **more))


USAGE = {"prompt_tokens": 3, "completion_tokens": 5}
USAGE_EVENT = event(chunk(choices=[], usage=USAGE))
DONE = b"data: [DONE]\n\n"
ROLE = event(chunk({"role": "assistant", "content": ""}))
STOP = event(chunk(finish_reason="stop"))


def renamed(data: bytes) -> bytes:
    return data.replace(b'"model":"upstream-name"', b'"model":"%b"' % SLUG.encode())


def without_null(data: bytes) -> bytes:
    return re.sub(rb', ?"usage": ?null(?=[,}])', b"", data)


def in_several_lines(payload: bytes) -> bytes:
    return b"\n".join(
        b"data:" + line for line in json.dumps(json.loads(payload), indent=1).encode().split(b"\n")
    )


def decorate(data: bytes, style: str) -> bytes:
    """`data`, which has LF, with more lines in each event, as the standard allows them."""
    events = data.replace(b"\r\n", b"\n").removesuffix(b"\n\n").split(b"\n\n")
    dressed = []
    for number, raw in enumerate(events):
        if style == "id, event and retry":
            raw = b"id: %d\nevent: message\n%b\nretry: 10" % (number, raw)
        elif style == "several data lines" and raw.startswith(b"data: {"):
            raw = b": {\n" + in_several_lines(raw.removeprefix(b"data: "))
        elif style == "comments":
            raw = b":\n\n: ping %d\n%b\n:" % (number, raw)
        elif style == "no space":
            raw = raw.replace(b"data: ", b"data:", 1)
        elif style == "blank lines":
            raw = b"\n" * (number % 3) + raw
        dressed.append(raw + b"\n\n")
    return b"".join(dressed)


STYLES = [
    "plain",
    "id, event and retry",
    "several data lines",
    "comments",
    "no space",
    "blank lines",
]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    data = DIALECTS[draw(st.sampled_from(sorted(DIALECTS)))]
    data = decorate(data, draw(st.sampled_from(STYLES)))
    if draw(st.booleans()):
        data = data.removesuffix(b"\n" if draw(st.booleans()) else b"\n\n")
    data = with_line_ends(data, draw(st.sampled_from(sorted(LINE_ENDS.values()))))
    return (b"\xef\xbb\xbf" if draw(st.booleans()) else b"") + data


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream and pieces of it: cuts between events, next to them, and anywhere."""
    data = draw(streams())
    boundaries = [m.end() for m in re.finditer(rb"\r\n\r\n|\n\n|\r\r", data)]
    near = st.sampled_from(boundaries).flatmap(lambda end: st.integers(end - 3, end + 3))
    anywhere = st.integers(0, len(data))
    cuts = draw(st.lists(st.sampled_from(boundaries) | near | anywhere, max_size=30))
    return data, cut_at(data, cuts)


# Nothing depends on where the bytes were cut


@asked_or_not
@ends_of_lines
@all_dialects
def test_every_dialect_reads_as_the_slow_reading_has_it(
    dialect: str, line_end: bytes, wants_usage: bool
) -> None:
    data = with_line_ends(DIALECTS[dialect], line_end)
    expected = read_slowly(data, wants_usage=wants_usage)
    agree(scan([data], wants_usage=wants_usage), expected)
    assert SLUG.encode() in expected.output
    assert expected.model
    assert expected.finish_reason


@ends_of_lines
@all_dialects
def test_a_cut_at_any_place_changes_nothing(dialect: str, line_end: bytes) -> None:
    data = with_line_ends(DIALECTS[dialect], line_end)
    whole = scan([data])
    for cut in range(len(data) + 1):
        assert scan([data[:cut], data[cut:]]) == whole, cut


SHORT = (
    b'data:{"model":"m","choices":[{"finish_reason":"x"}]}\n\n'
    b':\n\ndata:{"model":"m","choices":[],"usage":{"prompt_tokens":1}}\n\n'
)


@ends_of_lines
def test_any_two_cuts_change_nothing(line_end: bytes) -> None:
    data = with_line_ends(SHORT, line_end)
    whole = scan([data])
    assert whole.usage == Usage(prompt_tokens=1)
    for cuts in itertools.combinations(range(1, len(data)), 2):
        assert scan(cut_at(data, cuts)) == whole, cuts


@ends_of_lines
@pytest.mark.parametrize("style", STYLES)
@all_dialects
def test_byte_by_byte_changes_nothing(dialect: str, style: str, line_end: bytes) -> None:
    data = with_line_ends(decorate(DIALECTS[dialect], style), line_end)
    seen = scan(byte_by_byte(data))
    agree(seen, read_slowly(data, wants_usage=False))
    assert seen == scan([data])


@given(cut_streams(), st.booleans())
def test_random_cuts_and_packings_change_nothing(
    drawn: tuple[bytes, list[bytes]], wants_usage: bool
) -> None:
    data, pieces = drawn
    seen = scan(pieces, wants_usage=wants_usage)
    agree(seen, read_slowly(data, wants_usage=wants_usage))
    assert seen == scan([data], wants_usage=wants_usage)


ENDS_OF_EVENTS = [
    first + second
    for first in LINE_ENDS.values()
    for second in LINE_ENDS.values()
    if (first, second) != (b"\r", b"\n")  # that is one line end
]


@given(
    st.lists(st.sampled_from(ENDS_OF_EVENTS), min_size=7, max_size=7),
    st.lists(st.integers(0, 500), max_size=12),
)
def test_line_ends_may_differ_from_line_to_line(ends: list[bytes], cuts: list[int]) -> None:
    events = [text("a"), text("b"), ROLE, USAGE_EVENT, text("c"), STOP, DONE]
    data = b"".join(raw[:-2] + end for raw, end in zip(events, ends, strict=True))
    seen = scan(cut_at(data, cuts))
    agree(seen, read_slowly(data, wants_usage=False))
    assert seen == scan([data])


@asked_or_not
def test_a_late_lf_of_a_dropped_event_goes_with_it(wants_usage: bool) -> None:
    data = with_line_ends(text("a") + USAGE_EVENT + DONE, b"\r\n")
    place = data.index(b"\r\ndata: [DONE]") + 1
    seen = scan([data[:place], b"", data[place : place + 1], data[place + 1 :]])
    assert seen.output == with_line_ends(renamed(text("a")) + DONE, b"\r\n")


def test_an_event_ending_in_cr_does_not_wait_for_the_next_byte() -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    data = with_line_ends(text("a"), b"\r")
    assert scanner.feed(data) == renamed(data)


@ends_of_lines
def test_nothing_passes_behind_done_at_any_cut(line_end: bytes) -> None:
    whole = with_line_ends(ROLE + text("a") + STOP + DONE, line_end)
    data = whole + with_line_ends(text("never") + USAGE_EVENT + b": never\n\n" + DONE, line_end)
    expected = read_slowly(whole, wants_usage=True).output
    for cut in range(len(data) + 1):
        seen = scan([data[:cut], data[cut:]], wants_usage=True)
        assert (seen.output, seen.is_done, seen.failure) == (expected, True, None), cut
        assert seen.usage is None, cut
    assert scan(byte_by_byte(data)).output == expected


def test_a_whole_event_behind_others_is_not_held_for_its_other_line_ends() -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    data = text("a") + text("b").replace(b"\n", b"\r")
    scanner.feed(text("first"))
    assert scanner.feed(data) == renamed(data)


@ends_of_lines
def test_a_stream_without_its_last_blank_line_is_whole_at_its_end(line_end: bytes) -> None:
    data = with_line_ends(text("a") + STOP + b"data: [DONE]", line_end)
    seen = scan([data])
    assert seen.is_done
    assert seen.output == renamed(data)
    assert scan([with_line_ends(text("a") + USAGE_EVENT[:-1], line_end)]).output == renamed(
        with_line_ends(text("a"), line_end)
    )


# The model's name


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param({"meta": {"model": "upstream-name"}}, id="an object before it"),
        pytest.param({"note": '"model":"upstream-name"'}, id="a string"),
        pytest.param({"kind": "model"}, id="a value of that word"),
        pytest.param({"models": ["model"], "Model": "x"}, id="other names"),
    ],
)
@pytest.mark.parametrize("before", [b"", text("first")], ids=["first event", "later event"])
def test_only_the_top_level_model_is_replaced(payload: dict[str, Any], before: bytes) -> None:
    document = payload | chunk({"content": '{"model":"upstream-name"}', "model": "upstream-name"})
    seen = scan([before + event(document)])
    assert seen.output == renamed(before) + event(document | {"model": SLUG})


@pytest.mark.parametrize("before", [b"", text("first")], ids=["first event", "later event"])
@pytest.mark.parametrize(
    ("member", "replaced"),
    [
        pytest.param('"model": "x"', f'"model": "{SLUG}"', id="a space"),
        pytest.param('"model"\t:\t"x"', f'"model"\t:\t"{SLUG}"', id="tabs"),
        pytest.param('"m\\u006fdel":"x"', f'"m\\u006fdel":"{SLUG}"', id="escapes in the name"),
        pytest.param('"model":"\\"\\u00e9\\\\"', f'"model":"{SLUG}"', id="escapes in the value"),
        pytest.param('"model":""', f'"model":"{SLUG}"', id="empty"),
        pytest.param('"model":null', '"model":null', id="null"),
        pytest.param('"model":{"model":"x"}', '"model":{"model":"x"}', id="an object"),
        pytest.param('"x":1', '"x":1', id="absent"),
    ],
)
def test_the_model_is_replaced_however_it_is_written(
    member: str, replaced: str, before: bytes
) -> None:
    template = 'data: {%s,"choices":[{"delta":{"content":"a"}}]}\n\n'
    data = (template % member).encode()
    assert scan([before, data, data]).output == (
        renamed(before) + 2 * (template % replaced).encode()
    )


def test_a_name_that_changes_on_the_way_is_replaced_all_the_same() -> None:
    data = b"".join(
        text(str(number), model=name) for number, name in enumerate(["m", "m", "m-2", "", "m", "n"])
    )
    expected = b"".join(text(str(number), model=SLUG) for number in range(6))
    for pieces in ([data], byte_by_byte(data), cut_at(data, range(0, 999, 7))):
        seen = scan(pieces)
        assert (seen.output, seen.upstream_model) == (expected, "m")


NESTED = {
    "in a member before it": {"meta": {"model": "upstream-name"}, "model": "upstream-name"},
    "in a member behind it": {"model": "upstream-name", "meta": {"model": "upstream-name"}},
    "alone": {"meta": {"model": "upstream-name"}},
    "beside one that is null": {"meta": {"model": "upstream-name"}, "model": None},
    "beside another one": {"meta": {"model": "upstream-name"}, "model": "changed"},
    "in an array": {"route": [{"model": "upstream-name"}]},
    "on top, behind a bracket in a text": {"note": "{[", "model": "upstream-name"},
    "on top, with a bracket in a text behind it": {"model": "upstream-name", "note": "]}"},
}


@pytest.mark.parametrize("members", NESTED.values(), ids=NESTED.keys())
@pytest.mark.parametrize("is_last", [False, True], ids=["before the choices", "behind them"])
def test_a_name_on_another_level_is_never_replaced_and_one_on_top_always(
    members: dict[str, Any], is_last: bool
) -> None:
    """Also where the name on top was known from events before, or is missing, or another one."""
    choices = {"choices": [{"index": 0, "delta": {"content": "a"}}]}
    document = choices | members if is_last else members | choices
    expected = event(document | ({"model": SLUG} if document.get("model") else {}))
    pieces = [text("first"), *3 * [event(document)], text("b"), event(document)]
    wanted = renamed(text("first")) + 3 * expected + renamed(text("b")) + expected
    data = b"".join(pieces)
    for cut in (pieces, [data], [pieces[0], data[len(pieces[0]) :]], byte_by_byte(data)):
        assert scan(cut).output == wanted


def test_the_catalogs_own_name_passes_as_it_is() -> None:
    data = text("a", model=SLUG) + text("b", model=SLUG) + DONE
    assert scan([data]).output == data
    assert scan(byte_by_byte(data)).output == data


def test_a_slug_is_written_as_json() -> None:
    scanner = StreamScanner('a/"é\\', wants_usage=False)
    (line,) = scanner.feed(text("a")).strip().splitlines()
    assert json.loads(line.removeprefix(b"data: "))["model"] == 'a/"é\\'


@pytest.mark.parametrize("before", [b"", text("first")], ids=["first event", "later event"])
def test_an_event_in_several_lines_keeps_all_but_the_name(before: bytes) -> None:
    template = (
        ': c\r\nid: 7\ndata: {"model":\r\ndata:"%s",\rretry: 1\n'
        'data:  "choices":[{"delta":{"content":"a"}}]}\r\r'
    )
    data = (template % "upstream-name").encode()
    expected = renamed(before) + 2 * (template % SLUG).encode()
    assert scan([before + data + data]).output == expected
    assert scan(byte_by_byte(before + data + data)).output == expected


@pytest.mark.parametrize(
    "payload",
    [
        b'{"model":"x","k":' + b"[" * 12,
        b'{"model":"x"',
        b'{"model":',
        b'{"\\u006dodel":"x',
        b'{"model":"\xff"}',
        b'"model"',
        b"model",
        b"\\u",
        b"",
    ],
)
def test_what_is_no_json_passes_unharmed_after_content(payload: bytes) -> None:
    data = b"data: " + payload + b"\n\n"
    seen = scan([text("a"), data, text("b")])
    assert seen.output == renamed(text("a") + data + text("b"))


# Usage


@all_dialects
def test_only_what_is_there_for_usage_depends_on_who_asked(dialect: str) -> None:
    data = DIALECTS[dialect]
    with_usage, without_usage = (scan([data], wants_usage=wants) for wants in (True, False))
    assert replace(with_usage, output=b"") == replace(without_usage, output=b"")
    left = re.sub(rb'data: [^\n]*"choices":\[\][^\n]*"usage":\{[^\n]*\n\n', b"", with_usage.output)
    assert without_usage.output == without_null(left)


@pytest.mark.parametrize(
    ("dialect", "usage"),
    [
        ("openai", Usage(9, 3)),
        ("llama-cpp", Usage(31, 2, cached_tokens=30)),
        ("deepseek", Usage(1100, 40, cached_tokens=1024, reasoning_tokens=25)),
        ("groq", Usage(18, 12)),
        ("openrouter", Usage(50, 16)),
        ("gemini", Usage(7, 8)),
        ("azure", Usage(11, 2)),
        ("crlf", None),
        ("no-done", Usage(4, 2)),
    ],
)
def test_usage_is_found_wherever_a_dialect_puts_it(dialect: str, usage: Usage | None) -> None:
    assert scan([DIALECTS[dialect]]).usage == usage
    assert scan(byte_by_byte(DIALECTS[dialect])).usage == usage


def test_of_usage_that_grows_the_last_counts() -> None:
    data = b"".join(
        text("a", usage={"prompt_tokens": 7, "completion_tokens": count}) for count in range(1, 30)
    )
    for pieces in ([data], byte_by_byte(data)):
        assert scan([*pieces, text("b", usage=None), text("c", usage={})]).usage == Usage(7, 29)


@pytest.mark.parametrize("null", [b'"usage":null', b'"usage": null'])
@pytest.mark.parametrize("packing", [1, 100, 3000], ids=["event by event", "packed", "in pieces"])
def test_usage_null_on_every_event_costs_no_parse(
    null: bytes, packing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = text("a", usage=None).replace(b'"usage":null', null)
    data = ROLE + one * 1000
    size = len(one) * packing if packing < 1000 else 999
    parsed = 0

    def count(raw: bytes) -> Any:
        nonlocal parsed
        parsed += 1
        return json.loads(raw)

    monkeypatch.setattr(orjson, "loads", count)
    pieces = [ROLE + one, *(data[i : i + size] for i in range(len(ROLE + one), len(data), size))]
    assert scan(pieces).content_events == 1000
    assert 2 <= parsed <= 8


def test_usage_beside_a_null_of_that_name_is_found() -> None:
    nested = event(chunk({"content": "b"}, usage=None, x_groq={"usage": USAGE}))
    for pieces in ([text("a") + nested], [text("a"), nested], byte_by_byte(text("a") + nested)):
        assert scan(pieces).usage == Usage(3, 5)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(chunk(choices=[], usage=None), id="usage is null"),
        pytest.param(chunk(choices=[]), id="no usage"),
        pytest.param(chunk(choices=[], prompt_filter_results=[]), id="content filter results"),
        pytest.param(chunk({"content": ""}, usage=USAGE), id="usage beside a choice"),
        pytest.param({"usage": [1]}, id="usage of another form"),
    ],
)
@pytest.mark.parametrize("place", ["before content", "after content"])
def test_no_other_event_is_left_out(document: dict[str, Any], place: str) -> None:
    parts = (
        [event(document), text("a")] if place == "before content" else [text("a"), event(document)]
    )
    assert scan([b"".join(parts)]).output == without_null(renamed(b"".join(parts)))
    assert scan(parts, wants_usage=True).output == renamed(b"".join(parts))


# ModelScope (pydantic/pydantic-ai#5165), ROCm/ATOM#1711: https://github.com/ROCm/ATOM/issues/1711
USAGE_EVENTS = {
    "choices are empty": USAGE_EVENT,
    "choices are null": event(chunk(choices=None, usage=USAGE)),
    "choices are absent": event({"id": "c-1", "model": "upstream-name", "usage": USAGE}),
}


@pytest.mark.parametrize("counted", USAGE_EVENTS.values(), ids=USAGE_EVENTS.keys())
@pytest.mark.parametrize("place", ["first", "before content", "last"])
def test_the_usage_event_is_left_out_for_who_did_not_ask(counted: bytes, place: str) -> None:
    events = [ROLE, text("a"), text("b"), STOP, DONE]
    events.insert({"first": 0, "before content": 1, "last": 4}[place], counted)
    data = b"".join(events)
    for pieces in ([data], events, byte_by_byte(data)):
        seen = scan(pieces)
        assert seen.output == renamed(data.replace(counted, b""))
        assert seen.usage == Usage(3, 5)
        assert scan(pieces, wants_usage=True).output == renamed(data)


NULLS = {
    "the last": ('{"model":"m","choices":[%s],"usage":null}', '{"model":"m","choices":[%s]}'),
    "spaced": ('{"model": "m", "choices": [%s], "usage": null}', '{"model": "m", "choices": [%s]}'),
    "spaced otherwise": (
        '{ "model" : "m" , "choices" : [%s] ,\t"usage" : null }',
        '{ "model" : "m" , "choices" : [%s]  }',
    ),
    "the first": ('{"usage":null,"choices":[%s]}', '{"choices":[%s]}'),
    "the first, spaced": ('{ "usage": null , "choices":[%s]}', '{   "choices":[%s]}'),
    "before the choices": ('{"x":1,"usage":null,"choices":[%s]}', '{"x":1,"choices":[%s]}'),
    "escaped": ('{"choices":[%s],"\\u0075sage":null}', '{"choices":[%s]}'),
    "twice": ('{"usage":null,"choices":[%s],"usage":null}', '{"choices":[%s]}'),
    "behind a bracket in a text": (
        '{"usage":null,"x":"]}","choices":[%s]}',
        '{"x":"]}","choices":[%s]}',
    ),
    "one more, within an object": (
        '{"x":{"usage":null},"choices":[%s],"usage":null}',
        '{"x":{"usage":null},"choices":[%s]}',
    ),
    "within an object alone": (
        '{"x":{"usage":null},"choices":[%s]}',
        '{"x":{"usage":null},"choices":[%s]}',
    ),
    "in the choice": (
        '{"choices":[{"usage":null,"delta":{}},%s],"usage":null}',
        '{"choices":[{"usage":null,"delta":{}},%s]}',
    ),
}


@pytest.mark.parametrize(("given_", "left"), NULLS.values(), ids=NULLS.keys())
@pytest.mark.parametrize("size", [1, 20_000, 70_000], ids=["short", "long", "very long"])
def test_a_usage_of_null_is_taken_out_for_who_did_not_ask(
    given_: str, left: str, size: int
) -> None:
    choice = '{"index":0,"delta":{"content":"%s"},"finish_reason":null}'

    def events(form: str) -> list[bytes]:
        texts = ["", "a", "b" * size, '\\"usage\\":null', "c"]
        made = ["data: %s\n\n" % (form % (choice % text_)) for text_ in texts]
        return [each.encode().replace(b'"m"', b'"%b"' % SLUG.encode()) for each in made]

    pieces = events(given_)
    data, expected = b"".join(pieces), b"".join(events(left))
    for cut in (pieces, [data], cut_at(data, range(0, len(data), 1400))):
        assert scan(cut).output == expected
        assert scan(cut, wants_usage=True).output == data


def test_a_usage_of_null_is_taken_out_on_the_fast_way_too() -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(ROLE + text("first", usage=None))
    assert scanner.is_ready_for_template
    data = text("a", usage=None)
    assert take(scanner.template, chunked(data)) == (chunked(without_null(renamed(data))), b"")


def test_a_usage_of_null_in_several_lines_is_taken_out() -> None:
    data = b'data: {"choices":[{"delta":{"content":"a"}}]\ndata: ,"usage"\ndata: :null\ndata: }\n\n'
    expected = b'data: {"choices":[{"delta":{"content":"a"}}]\ndata: \ndata: \ndata: }\n\n'
    assert scan([data]).output == expected
    assert scan(byte_by_byte(text("x") + data)).output == renamed(text("x")) + expected


def test_an_empty_answer_loses_its_usage_event_too() -> None:
    seen = scan([ROLE + USAGE_EVENT + STOP + DONE])
    assert seen.output == renamed(ROLE + STOP + DONE)
    assert seen.usage == Usage(3, 5)


WORDS = [
    "model",
    "usage",
    "error",
    "finish_reason",
    "[DONE]",
    "data: [DONE]",
    '"usage":{}',
    "\\",
    "",
]


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), min_size=1), st.booleans())
def test_words_of_the_protocol_in_an_answer_are_only_words(words: list[str], ascii: bool) -> None:
    documents = [chunk({"content": word}, usage=None) for word in ("first", *words)]
    data = b"".join(
        b"data: %b\n\n" % json.dumps(document, separators=(",", ":"), ensure_ascii=ascii).encode()
        for document in documents
        if not _has_surrogate(document)
    )
    seen = scan([data])
    assert seen == scan(byte_by_byte(data))
    assert seen.output == without_null(renamed(data))
    assert (seen.failure, seen.is_finished, seen.usage) == (None, False, None)
    assert scan([data], wants_usage=True).output == renamed(data)


def _has_surrogate(document: dict[str, Any]) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in document["choices"][0]["delta"]["content"])


# Content, and what comes before it


CALLS = [{"index": 0, "function": {"name": "f"}}]

# What is no text is there for what comes, whoever the model is of: `images` of OpenRouter,
# `reasoning_details` of MiniMax (https://platform.minimax.io/docs/api-reference/text-openai-api),
# `extra_content` of Gemini (https://ai.google.dev/gemini-api/docs/openai).
DELTAS: list[dict[str, Any]] = [
    {"content": "a"},
    {"content": " "},
    {"reasoning_content": "a"},
    {"reasoning": "a"},
    {"refusal": "a"},
    {"tool_calls": CALLS},
    {"function_call": {"name": "f"}},
    {"audio": {"id": "a"}},
    {"role": "assistant", "content": None, "reasoning": "a"},
    {"content": "", "reasoning_details": [{"type": "reasoning.text", "text": "a"}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}]},
    {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}]},
    {"extra_content": {"google": {"thought_signature": "a"}}},
    {"role": "assistant", "content": "", "a_member_of_tomorrow": "a"},
]


@pytest.mark.parametrize("delta", DELTAS, ids=lambda delta: ", ".join(delta))
def test_a_delta_with_any_of_these_is_content(delta: dict[str, Any]) -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    assert scanner.feed(ROLE) == b""
    assert scanner.feed(event(chunk(delta))) == renamed(ROLE + event(chunk(delta)))
    assert (scanner.has_content, scanner.content_events) == (True, 1)
    assert not scanner.is_finished


@pytest.mark.parametrize(
    "member", [{"message": {"role": "assistant", "content": "a"}}, {"text": "a"}], ids=str
)
def test_what_servers_have_in_place_of_a_delta_is_content(member: dict[str, Any]) -> None:
    seen = scan([ROLE, event(chunk(choices=[{"index": 0} | member]))])
    assert (seen.has_content, seen.content_events) == (True, 1)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(chunk({"role": "assistant"}), id="role only"),
        pytest.param(chunk({"role": "assistant", "content": None}), id="null"),
        pytest.param(chunk({"content": "", "refusal": "", "reasoning": ""}), id="empty strings"),
        pytest.param(chunk({"tool_calls": [], "audio": {}}), id="empty containers"),
        pytest.param(
            chunk({"role": "assistant", "content": "", "reasoning_details": [], "annotations": []}),
            id="OpenRouter's first",
        ),
        pytest.param(
            chunk(
                {
                    "provider_specific_fields": {"citations": None, "thinking_blocks": [{}]},
                    "function_call": None,
                    "audio": None,
                }
            ),
            id="LiteLLM's first",
        ),
        pytest.param(
            chunk({"role": "assistant", "name": "MiniMax AI", "content": "", "audio_content": ""}),
            id="MiniMax' first",
        ),
        pytest.param(
            chunk({"id": "m-1", "index": 0, "type": "message"}), id="what it is a part of"
        ),
        pytest.param(chunk(choices=[{"message": {"content": ""}}, {"text": ""}]), id="other forms"),
        pytest.param(chunk(finish_reason=""), id="an empty finish reason"),
        pytest.param(chunk(choices=[], prompt_filter_results=[{}]), id="filter results"),
        pytest.param(chunk(choices=[], usage=USAGE), id="usage"),
        pytest.param(chunk(choices=None), id="no choices"),
        pytest.param(chunk(choices=["a", None, {"delta": "text"}]), id="choices of no known form"),
        pytest.param({}, id="an empty object"),
        pytest.param({"type": "ping"}, id="a ping"),
        pytest.param({"status": "processing", "message": "place 3"}, id="a place in a queue"),
        *(pytest.param(odd, id=repr(odd)) for odd in ("ping", None, [], [1], 7, True)),
    ],
)
def test_nothing_is_released_before_content(document: Any) -> None:
    scanner = StreamScanner(SLUG, wants_usage=True)
    held = b": hello\n\nretry: 5\n\n" + event(document)
    assert scanner.feed(held) == b""
    assert (scanner.has_content, scanner.content_events) == (False, 0)
    assert scanner.feed(text("a")) == renamed(held + text("a"))


ODD = [b"ping", b"ok", b"null", b"[]", b'"text"', b"<html>", b'{"choices":[', b"[1]"]


@pytest.mark.parametrize("payload", ODD)
def test_data_that_is_no_object_is_held_like_any_other(payload: bytes) -> None:
    odd = b"data: %b\n\n" % payload
    for pieces in ([odd + ROLE + text("a") + odd + DONE], [odd, ROLE, text("a"), odd, DONE]):
        seen = scan(pieces)
        assert seen.output == renamed(odd + ROLE + text("a") + odd + DONE)
        assert (seen.failure, seen.is_done) == (None, True)


@pytest.mark.parametrize("payload", ODD)
@pytest.mark.parametrize("end", [b"", DONE, ROLE + DONE], ids=["no end", "[DONE]", "a role"])
def test_a_stream_of_nothing_else_is_a_broken_one(payload: bytes, end: bytes) -> None:
    seen = scan([b"data: %b\n\n" % payload + end])
    assert (seen.output, seen.failure, seen.has_content) == (b"", (False, None), False)


def test_a_finish_reason_alone_is_content() -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    assert scanner.feed(ROLE + STOP) == renamed(ROLE + STOP)
    assert (scanner.has_content, scanner.is_finished, scanner.content_events) == (True, True, 0)


def test_content_of_a_later_choice_counts() -> None:
    choices = [{"index": 0, "delta": {}}, {"index": 1, "delta": {"content": "a"}}]
    assert scan([event(chunk(choices=choices))]).has_content


@pytest.mark.parametrize(
    ("data", "is_finished"),
    [
        pytest.param(text("a"), False, id="neither"),
        pytest.param(text("a") + STOP, True, id="finish reason"),
        pytest.param(text("a") + DONE, True, id="[DONE]"),
        pytest.param(
            text("a") + text("[DONE]") + text('"finish_reason":"stop"'), False, id="words"
        ),
        pytest.param(text("a") + DONE[:-3] + b"\n\n", False, id="half of [DONE]"),
        pytest.param(text("a") + STOP[:-9], False, id="half of a finish reason's event"),
    ],
)
def test_a_stream_is_finished_when_it_says_so(data: bytes, is_finished: bool) -> None:
    assert scan([data]).is_finished is is_finished


@pytest.mark.parametrize("filling", [b": ping\n\n", ROLE, b": %b\n\n" % (b"x" * 9000)])
def test_up_to_64_kb_are_held_and_more_flows(filling: bytes) -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    held = (renamed(filling)) * (64 * 1024 // len(renamed(filling)))
    for _ in range(len(held) // len(renamed(filling))):
        assert scanner.feed(filling) == b""
    assert not scanner.has_content
    assert scanner.feed(filling) == held + renamed(filling)
    assert scanner.has_content
    assert scanner.feed(filling) == renamed(filling)


def test_one_event_of_more_than_64_kb_flows_before_it_ends() -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    whole = event(chunk({"content": "x" * 100_000}))
    out = scanner.feed(whole[:60_000])
    assert out == b""
    out = scanner.feed(whole[60_000:80_000])
    assert len(out) > 79_000
    assert not scanner.is_at_boundary
    out += scanner.feed(whole[80_000:])
    assert out == renamed(whole)
    assert scanner.is_at_boundary
    assert scanner.upstream_model == "upstream-name"


# Failures reported in the stream


FAILURES = {
    "an error object": (
        event({"error": {"message": "secret", "type": "server_error", "code": 502}}),
        (True, 502),
    ),
    "an error with a word for its code": (
        event({"error": {"message": "secret", "code": "rate_limit_exceeded"}}),
        (True, 429),
    ),
    "an error that is a string": (event({"error": "secret"}), (True, None)),
    "a status beside the message": (
        event({"error": {"message": "secret", "status": 429}}),
        (True, 429),
    ),
    "an event of that name": (
        b'event: error\ndata: {"message":"secret","status_code":503}\n\n',
        (True, 503),
    ),
    "an event of that name with the model's": (
        b'event: error\ndata: {"model":"upstream-name","message":"secret"}\n\n',
        (True, None),
    ),
    "an event of that name without a space": (b'event:error\ndata:{"code":true}\n\n', (True, None)),
    "an event of that name that is plain text": (b"event: error\ndata: secret\n\n", (True, None)),
    "OpenRouter's chunk": (
        event(
            chunk({"content": ""}, "error", error={"code": "server_error", "message": "secret"}),
        ),
        (True, 500),
    ),
    "an error beside content": (text("b", error={"code": 500}), (True, 500)),
    "spaced otherwise": (b'data: { "error" : { "code" : 500 } }\n\n', (True, 500)),
    "a name with escapes": (b'data: {"\\u0065rror":{"code":500}}\n\n', (True, 500)),
    "a status as a string": (event({"error": {"message": "secret", "code": "429"}}), (True, 429)),
    "a status beside the error": (event({"error": "secret", "status": 503}), (True, 503)),
    "a field of that name": (b"error: secret\n\n", (True, None)),
    # llama.cpp before https://github.com/ggml-org/llama.cpp/pull/16104
    "llama.cpp's field": (b'error: {"code":500,"message":"secret"}\n\n', (True, 500)),
    "a field without a space": (b'error:{"code":500}\ndata: {}\n\n', (True, 500)),
    "an event of that name without data": (b"event: error\n\n", (True, None)),
    "JSON that lacks its field": (b'{"error":{"code":502,"message":"secret"}}\n\n', (True, 502)),
    # https://github.com/vllm-project/vllm/blob/main/vllm/entrypoints/openai/protocol.py
    "vLLM's object": (event({"object": "error", "message": "secret", "code": 400}), (True, 400)),
    "Anthropic's object": (
        event({"type": "error", "error": {"type": "overloaded_error", "message": "secret"}}),
        (True, 503),
    ),
    "a type alone": (event({"type": "error", "message": "secret"}), (True, None)),
    "an error in a choice": (
        event(chunk(choices=[{"index": 0, "delta": {}, "error": {"code": 502}}])),
        (True, 502),
    ),
    "an error in a later choice": (
        event(chunk(choices=[{"delta": {"content": "x"}}, {"error": {"message": "secret"}}])),
        (True, None),
    ),
    "an error in a delta": (event(chunk({"error": "secret"})), (True, None)),
    "a finish reason": (event(chunk({"content": "x"}, "error")), (True, None)),
    "a finish reason, spaced": (
        event(chunk({}, "error")).replace(b'reason":"', b'reason" : "'),
        (True, None),
    ),
    "Zhipu's finish reason": (event(chunk({}, "network_error")), (True, None)),
    "FastAPI's": (event({"detail": "secret"}), (True, None)),
    "FastAPI's list": (event({"detail": [{"msg": "secret"}], "status": 422}), (True, 422)),
    "DashScope's": (
        event({"code": "InvalidParameter", "message": "secret", "request_id": "r"}),
        (True, 400),
    ),
    "a code and a message": (event({"code": 503, "msg": "secret", "data": None}), (True, 503)),
    "a status and a message": (event({"statusCode": 500, "message": "secret"}), (True, 500)),
    "no success": (event({"success": False, "message": "secret"}), (True, None)),
    # https://platform.minimax.io/docs/api-reference/errorcode
    "MiniMax'": (
        event({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "secret"}}),
        (True, 429),
    ),
    "Gemini's array": (event([{"error": {"code": 503, "message": "secret"}}]), (True, 503)),
    "an error that is no JSON": (b'data: {"error": "say "secret" twice"}\n\n', (True, None)),
}
ERROR = FAILURES["an error object"][0]
failures = pytest.mark.parametrize(
    ("failing", "failure"), [pytest.param(*case, id=name) for name, case in FAILURES.items()]
)


@ends_of_lines
@failures
def test_an_error_after_content_ends_the_stream_at_any_cut(
    failing: bytes, failure: tuple[bool, int | None], line_end: bytes
) -> None:
    before = with_line_ends(ROLE + text("a") + text("b"), line_end)
    data = before + with_line_ends(failing + text("never") + DONE, line_end)
    for cut in range(len(data) + 1):
        seen = scan([data[:cut], data[cut:]])
        assert (seen.output, seen.failure) == (renamed(before), failure), cut
        assert not seen.is_done
    seen = scan(byte_by_byte(data))
    assert (seen.output, seen.failure) == (renamed(before), failure)


@failures
def test_an_error_before_content_releases_nothing(
    failing: bytes, failure: tuple[bool, int | None]
) -> None:
    data = b": ping\n\n" + ROLE + failing + text("never")
    for cut in range(len(data) + 1):
        seen = scan([data[:cut], data[cut:]])
        assert (seen.output, seen.failure, seen.has_content) == (b"", failure, False), cut


@failures
def test_an_error_that_ends_the_body_needs_no_blank_line(
    failing: bytes, failure: tuple[bool, int | None]
) -> None:
    seen = scan([text("a") + failing.rstrip(b"\n")])
    assert (seen.output, seen.failure) == (renamed(text("a")), failure)


@failures
def test_what_is_told_of_an_error_has_no_text_of_the_upstream(
    failing: bytes, failure: tuple[bool, int | None]
) -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(failing)
    assert "secret" not in str(scanner.failure)


def test_an_error_behind_a_long_opening_releases_nothing() -> None:
    seen = scan([ROLE * (OPENING_LIMIT_BYTES // len(renamed(ROLE)) - 10) + ERROR])
    assert (seen.output, seen.failure) == (b"", (True, 502))


def test_where_the_opening_is_too_long_to_be_held_depends_on_no_cut() -> None:
    data = ROLE * 1000 + ERROR
    whole = scan([data])
    assert whole.output == renamed(ROLE * 1000)
    assert (whole.failure, whole.has_content) == ((True, 502), True)
    for size in (1, 100, 5000, 65_536, 66_000):
        assert scan(cut_at(data, range(0, len(data), size))) == whole, size


@failures
def test_what_follows_an_error_makes_it_no_success(
    failing: bytes, failure: tuple[bool, int | None]
) -> None:
    following = STOP + USAGE_EVENT + DONE
    for before in (b"", ROLE, text("a"), text("a") + STOP):
        for pieces in ([before + failing + following], [before, failing, following]):
            seen = scan(pieces)
            assert seen.failure == failure
            assert not seen.is_done
            assert seen.usage is None


@failures
@pytest.mark.parametrize("before", [b"", text("a")], ids=["before content", "after content"])
def test_a_failure_holds_what_the_upstream_sent(
    failing: bytes, failure: tuple[bool, int | None], before: bytes
) -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(before + failing)
    assert scanner.failure is not None
    assert "secret" not in str(scanner.failure)
    held = json.dumps(scanner.failure.document)
    assert ("secret" in held) is (b"secret" in failing)


@pytest.mark.parametrize("nothing", [None, {}, "", [], {"message": None}], ids=repr)
def test_an_empty_error_is_none(nothing: Any) -> None:
    data = text("a", error=nothing) + text("b", error=nothing) + DONE
    for pieces in ([data], byte_by_byte(data)):
        seen = scan(pieces)
        assert (seen.output, seen.failure) == (renamed(data), None)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"error:\n\n", id="an empty field"),
        pytest.param(b"error: null\n\n", id="a field that is null"),
        pytest.param(b": error: no\n\n", id="a comment"),
        pytest.param(b"event: errors\ndata: {}\n\n", id="an event of another name"),
        pytest.param(event({"status": "ok", "message": "fine"}), id="a status that is fine"),
        pytest.param(event({"code": 0, "message": "fine"}), id="a code that is fine"),
        pytest.param(event(chunk(base_resp={"status_code": 0, "status_msg": ""})), id="MiniMax'"),
        pytest.param(event(chunk({"content": "error"})), id="a text of that word"),
        pytest.param(event(chunk({"tool_calls": [{"error": "x"}]})), id="a name in a tool call"),
    ],
)
def test_what_looks_like_an_error_is_none(data: bytes) -> None:
    for before in (ROLE, text("a")):
        seen = scan([before, data, text("b"), DONE])
        assert seen.failure is None
        assert seen.output == renamed(before + data + text("b") + DONE)


def test_an_error_of_null_on_every_event_costs_no_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [{"index": 0, "function": {"arguments": "x"}}]  # known to no template
    data = event(chunk({"tool_calls": calls}, error=None, usage=None)) * 100
    first = ROLE + text("a", error=None) * 3
    parsed = 0

    def count(raw: bytes) -> Any:
        nonlocal parsed
        parsed += 1
        return json.loads(raw)

    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(first)
    monkeypatch.setattr(orjson, "loads", count)
    for piece in (data, *[data[:-1], data[-1:]] * 3):
        scanner.feed(piece)
    assert scanner.content_events >= 400
    assert parsed <= 8


@pytest.mark.parametrize(
    "payload", [b'{"usage":{', b'{"choices":[{"finish_reason":"st', b'["usage"]']
)
def test_a_usage_or_finish_reason_that_can_not_be_read_is_a_failure(payload: bytes) -> None:
    seen = scan([text("a"), b"data: %b\n\n" % payload, DONE])
    assert (seen.output, seen.failure) == (renamed(text("a")), (False, None))


def test_a_body_that_is_no_stream_at_all_has_no_content() -> None:
    seen = scan([b"<html>\n<body>\n\nsorry\n\n</html>"])
    assert (seen.output, seen.failure, seen.has_content) == (b"", None, False)


# Memory


def held_bytes(scanner: StreamScanner) -> int:
    return len(scanner._tail) + sum(map(len, scanner._held)) + len(scanner._long_end)


@pytest.mark.parametrize("size", [10, 100, 1400, 16_000])
def test_an_unfinished_event_is_held_up_to_16_kb_and_then_flows(size: int) -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(text("first"))
    whole = event(chunk({"content": "x" * 40_000}))
    taken = 0
    out = b""
    while not out:
        out = scanner.feed(whole[taken : taken + size])
        taken += size
        assert held_bytes(scanner) <= 16 * 1024
    assert 16 * 1024 < taken <= 16 * 1024 + size
    assert not scanner.is_at_boundary
    assert out + scanner.feed(whole[taken:]) == renamed(whole)
    assert scanner.is_at_boundary
    assert scanner.content_events == 2


@ends_of_lines
@pytest.mark.parametrize("place", ["first", "last"])
def test_cuts_do_not_matter_to_a_long_event_either(
    place: str, line_end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "HOLD_LIMIT_BYTES", 150)
    document = chunk({"content": 'x"model":"upstream-name"' * 20})
    if place == "last":
        document["model"] = document.pop("model")
    events = text("a") + event(document) + USAGE_EVENT + text("b") + event(document) + DONE
    data = with_line_ends(events, line_end)
    whole = scan([data])
    agree(whole, read_slowly(data, wants_usage=False))
    for cut in range(len(data) + 1):
        assert scan([data[:cut], data[cut:]]) == whole, cut
    assert scan(byte_by_byte(data)) == whole


# What long events say

FILLING = "word " * 5000
LONG = {
    # https://platform.minimax.io/docs/api-reference/text-post: the last event holds all of it
    "MiniMax' last event": chunk(
        choices=[
            {
                "finish_reason": "stop",
                "index": 0,
                "message": {"content": FILLING, "role": "assistant", "name": "MiniMax AI"},
            }
        ],
        usage={"total_tokens": 8, "total_characters": 0, **USAGE},
        base_resp={"status_code": 0, "status_msg": ""},
    ),
    "Mistral's tool call": chunk(
        {
            "content": "",
            "tool_calls": [
                {"id": "D681PevKs", "function": {"name": "f", "arguments": f'{{"x":"{FILLING}"}}'}}
            ],
        },
        "tool_calls",
        usage=USAGE,
    ),
    "an image": chunk(
        {"images": [{"image_url": {"url": "data:image/png;base64," + "iVBO" * 30_000}}]},
        "stop",
        usage=USAGE,
    ),
    "usage before the text": {"usage": USAGE, **chunk({"content": FILLING}, "length")},
    "usage of Groq": chunk({"content": FILLING}, "stop", x_groq={"id": "r", "usage": USAGE}),
    "many small values": chunk(
        {"content": "x"}, "stop", logprobs=[{"a": [1, None, {}]}] * 900, usage=USAGE
    ),
    "many members": chunk(
        {"content": "x"}, "stop", **{f"m{n}": n for n in range(1500)}, usage=USAGE
    ),
    "many choices": chunk(
        choices=[{"index": n, "delta": {"content": "word"}} for n in range(100)]
        + [{"finish_reason": "stop", "delta": {"content": FILLING}}],
        usage=USAGE,
    ),
    "deep nesting": chunk(
        {"content": "x"}, "stop", x=json.loads("[" * 300 + "]" * 300), y=FILLING, usage=USAGE
    ),
}


@pytest.mark.parametrize("document", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize("style", ["plain", "several data lines", "no space"])
@pytest.mark.parametrize("before", [ROLE, text("a")], ids=["first", "later"])
def test_what_a_long_event_says_is_read(
    document: dict[str, Any], style: str, before: bytes
) -> None:
    long = decorate(event(document), style)
    data = before + long
    whole = scan([data])
    assert whole == replace(scan([data], wants_usage=True), output=whole.output)
    expected = read_slowly(data, wants_usage=False)
    agree(whole, expected)
    assert whole.usage == Usage(3, 5)
    assert whole.finish_reason == document["choices"][-1]["finish_reason"]
    assert whole.is_finished
    for size in (7, 1400, 16_384, 60_000):
        assert scan(cut_at(data, range(0, len(data), size))) == whole


@pytest.mark.parametrize(
    ("document", "status"),
    [
        pytest.param({"error": {"message": "secret" * 4000, "code": 502}}, 502, id="first"),
        pytest.param(chunk({"content": FILLING}, error={"code": 503}), 503, id="last"),
        pytest.param(chunk({"content": FILLING}, "error"), None, id="finish reason"),
        pytest.param(
            chunk(choices=[{"delta": {"content": FILLING}, "error": {"code": 500}}]),
            500,
            id="inside",
        ),
        pytest.param({"detail": "secret" * 4000}, None, id="FastAPI's"),
    ],
)
def test_an_error_in_a_long_event_is_a_failure(
    document: dict[str, Any], status: int | None
) -> None:
    data = text("a") + event(document) + STOP + DONE
    for size in (700, 5000, 100_000):
        scanner = StreamScanner(SLUG, wants_usage=False)
        seen = scan(cut_at(data, range(0, len(data), size)), scanner=scanner)
        assert (seen.failure, seen.is_done, seen.finish_reason) == ((True, status), False, "")
        passed = seen.output.removeprefix(renamed(text("a")))
        assert renamed(event(document)).startswith(passed)
        assert len(passed) < len(event(document))
        assert scanner.is_at_boundary is not passed
        if "error" in document and status == 502:
            assert b"secret" not in seen.output  # it was known before any of it was passed


def test_an_error_of_other_lines_of_a_long_event_is_a_failure() -> None:
    for lines in (b"event: error\n%b", b"error: no\n%b", b"%berror: no\n\n"):
        long = text(FILLING)
        data = text("a") + lines % (long[:-1] if lines.startswith(b"%b") else long)
        for size in (700, 100_000):
            assert scan(cut_at(data, range(0, len(data), size))).failure == (True, None)


def test_an_error_of_null_in_a_long_event_is_none() -> None:
    data = text("a") + text(FILLING, error=None) + text(FILLING, error={"message": ""}) + DONE
    for size in (700, 100_000):
        seen = scan(cut_at(data, range(0, len(data), size)))
        assert (seen.failure, seen.output) == (None, renamed(data))


def test_a_usage_event_longer_than_we_hold_is_not_left_out() -> None:
    """Its beginning is with the client before its end is here."""
    data = text("a") + event(chunk(choices=[], usage=USAGE, note=FILLING)) + DONE
    for size in (700, 100_000):
        seen = scan(cut_at(data, range(0, len(data), size)))
        assert (seen.output, seen.usage) == (renamed(data), Usage(3, 5))
    held = event(chunk(choices=[], usage=USAGE, note="x" * 16_000))
    assert scan([text("a") + held + DONE]).output == renamed(text("a") + DONE)


def test_done_among_long_comments_is_the_end() -> None:
    data = text("a") + b": %b\n" % FILLING.encode() + DONE + text("never")
    for size in (700, 100_000):
        seen = scan(cut_at(data, range(0, len(data), size)))
        assert seen.is_done
        assert b"never" not in seen.output


def test_what_comes_behind_done_is_dropped() -> None:
    data = text("a") + DONE
    for behind in (text("b"), b": comment\n\n", ERROR, b"\n\n", b"x"):
        for pieces in ([data + behind], [data, behind], byte_by_byte(data + behind)):
            seen = scan(pieces)
            assert (seen.output, seen.failure, seen.is_done) == (renamed(data), None, True)


@ends_of_lines
def test_a_stream_may_end_within_a_long_event(line_end: bytes) -> None:
    data = with_line_ends(text("a") + event(chunk({"content": "x" * 20_000})), line_end)
    for left_out in range(1, 40):
        seen = scan(cut_at(data[:-left_out], [500, 19_000]))
        assert seen.output == renamed(data[:-left_out])
        assert not seen.is_finished


def test_a_line_of_50_mb_passes_in_flat_memory_with_its_model_replaced() -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(text("first"))
    piece = b"x" * 65_536
    head, tail = b'data: {"choices":[{"delta":{"content":"', b'"}}],"model":"upstream-name"}\n\n'
    tracemalloc.start()
    try:
        passed = len(scanner.feed(head))
        for _ in range(800):
            passed += len(scanner.feed(piece))
            assert held_bytes(scanner) <= 16 * 1024
        end = scanner.feed(tail + STOP)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert passed + len(end) == len(head) + 800 * len(piece) + len(renamed(tail + STOP))
    assert end.endswith(renamed(tail + STOP))
    assert peak < 1_000_000
    assert (scanner.is_finished, scanner.content_events) == (True, 2)


@pytest.mark.parametrize("wants_usage", [True, False])
def test_memory_stays_flat_over_200_000_events(wants_usage: bool) -> None:
    scanner = StreamScanner(SLUG, wants_usage=wants_usage)
    scanner.feed(ROLE + text("first"))
    data = text("some words") * 1000
    pieces = [data[i : i + 1460] for i in range(0, len(data), 1460)]
    counted = StreamScanner.feed  # bound once: tracemalloc makes each call dear
    tracemalloc.start()
    try:
        start, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            for piece in pieces:
                counted(scanner, piece)
        end, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert scanner.content_events == 200_001
    assert end - start < 20_000
    assert peak - start < 100_000


def test_an_open_stream_holds_little_memory() -> None:
    """10,000 of them are open at a time: what orjson writes keeps its first 4 KB for good."""
    opening = ROLE + text("first")
    StreamScanner(SLUG, wants_usage=True).feed(opening)  # what all share is made
    tracemalloc.start()
    try:
        start, _ = tracemalloc.get_traced_memory()
        scanners = [StreamScanner(SLUG, wants_usage=True) for _ in range(100)]
        for scanner in scanners:
            scanner.feed(opening)
        end, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (end - start) / len(scanners) < 2500


# Work


def knowing() -> StreamScanner:
    """A scanner in mid-stream that knows texts."""
    scanner = StreamScanner(SLUG, wants_usage=False)
    scanner.feed(ROLE)
    scanner.feed(text("a"))
    assert scanner.is_ready_for_template
    return scanner


OTHERS = {
    "the usage event": USAGE_EVENT,
    "usage beside a choice": text("b", usage=USAGE),
    "a tool call": event(chunk({"tool_calls": CALLS})),
    "a text and a member more": event(chunk({"content": "b", "other": "c"})),
}
others = pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())


@others
def test_texts_and_others_in_turn_are_read_in_one_piece(other: bytes) -> None:
    pair = text("a") + other
    scanner = knowing()
    passed = scanner.feed(pair * 5000)
    assert scanner.failure is None
    assert passed == renamed(pair.replace(USAGE_EVENT, b"")) * 5000
    assert scanner.content_events == 1 + 5000 * (1 + (other != USAGE_EVENT))


@pure_only
@others
def test_the_work_grows_with_the_bytes_and_no_faster(other: bytes) -> None:
    def calls(pairs: int) -> int:
        counted = 0

        def count(frame: Any, kind: str, argument: Any) -> None:
            nonlocal counted
            counted += kind in ("call", "c_call")

        scanner = knowing()
        sys.setprofile(count)
        try:
            scanner.feed((text("a") + other) * pairs)
        finally:
            sys.setprofile(None)
        return counted

    # Of events in turn, which of them passes by comparison changes every 16 events.
    assert calls(800) < 8.5 * calls(100)


@pure_only
@others
def test_what_is_copied_grows_with_the_bytes_and_no_faster(other: bytes) -> None:
    copied = 0

    class Counted(bytes):
        """Counts what is sliced off, and stays countable in the longer slices."""

        def __getitem__(self, key: Any) -> Any:
            nonlocal copied
            found = super().__getitem__(key)
            if not isinstance(found, bytes):
                return found
            copied += len(found)
            return Counted(found) if len(found) > 1000 else found

    data = Counted((text("a") + other) * 200)
    scanner = knowing()
    scanner.feed(data)
    assert copied < 10 * len(data)


@pytest.mark.parametrize("before", [b"", text("a"), text("a") + STOP], ids=["", "text", "finish"])
def test_a_body_that_ends_in_the_middle_of_an_event_is_broken(before: bytes) -> None:
    for end in range(len(b"data: {"), len(USAGE_EVENT) - 3):
        scanner = StreamScanner(SLUG, wants_usage=True)
        seen = scanner.feed(ROLE + before + USAGE_EVENT[:end]) + scanner.feed_eof()
        assert seen == (renamed(ROLE + before) if before else b""), end
        assert scanner.failure is not None or not scanner.is_finished, end


@pytest.mark.parametrize("line", [b"event: error\ndata: ", b"error: "])
def test_an_error_in_a_choice_of_an_error_event_is_found(line: bytes) -> None:
    chunk = b'{"choices":[{"index":0,"delta":{},"error":{"message":"x","code":400}}]}'
    seen = scan([ROLE + line + chunk + b"\n\n"])
    assert seen.failure == (True, 400)
