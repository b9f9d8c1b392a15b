"""The stream scanner against a slow reading of the same bytes, wherever they are cut.

`tests/data` holds a stream of each dialect, shortened after what those servers send.
"""

from __future__ import annotations

import itertools
import json
import re
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy import stream as stream_module
from hoberproxy.stream import StreamScanner
from hoberproxy.usage import Usage

from .cuts import cut_at

SLUG = "vendor/catalog-name"
DIALECTS = {path.stem: path.read_bytes() for path in (Path(__file__).parent / "data").glob("*.sse")}
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
    """All that can be told from outside after a whole stream."""

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
        failure=failure and (failure.is_error_event, failure.upstream_status),
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


# The slow reading: lines, json, spans put together anew

_decode_json = json.JSONDecoder(strict=False).raw_decode


def split_events(data: bytes) -> Iterator[list[bytes]]:
    """Events as lists of lines, each with its line end; a blank line ends an event."""
    lines: list[bytes] = []
    for line in re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", data):
        is_blank = line in (b"\r\n", b"\r", b"\n")
        lines.append(line)
        if is_blank and len(lines) > 1:
            yield lines
            lines = []
    if lines:
        yield lines


def data_bytes(lines: list[bytes]) -> list[tuple[int, int]] | None:
    """The data of an event as pairs: a byte, and its place in the event (-1 for a joint)."""
    pairs: list[tuple[int, int]] = []
    found, offset = False, 0
    for line in lines:
        text = line.rstrip(b"\r\n")
        start = 3 if offset == 0 and text.startswith(b"\xef\xbb\xbf") else 0
        if text[start:].startswith(b"data:"):
            if found:
                pairs.append((ord("\n"), -1))
            found = True
            start += 6 if text[start + 5 : start + 6] == b" " else 5
            pairs += [(text[place], offset + place) for place in range(start, len(text))]
        offset += len(line)
    return pairs if found else None


def top_level(text: str) -> Iterator[tuple[str, int, int]]:
    """Names of the top-level members and the spans of their values."""
    position = text.index("{") + 1
    while match := re.compile(r'[\s,]*(?=")').match(text, position):
        name, position = _decode_json(text, match.end())
        position = re.compile(r"[\s:]*").match(text, position).end()  # type: ignore[union-attr]
        start = position
        _, position = _decode_json(text, position)
        yield name, start, position


@dataclass
class Expected:
    output: bytes = b""
    is_done: bool = False
    counts: tuple[int, int] | None = None
    finish_reason: str = ""
    upstream_model: str = ""
    upstream_id: str = ""


def read_slowly(data: bytes, *, wants_usage: bool) -> Expected:
    expected = Expected()
    for lines in split_events(data):
        expected.output += _read_event(b"".join(lines), data_bytes(lines), expected, wants_usage)
        if expected.is_done:
            expected.output += b"\n" if lines[-1] == b"\r" else b""
            break
    return expected


def _read_event(
    event: bytes, pairs: list[tuple[int, int]] | None, expected: Expected, wants_usage: bool
) -> bytes:
    payload = bytes(byte for byte, _ in pairs or ())
    if payload == b"[DONE]":
        expected.is_done = True
    if pairs is None or not payload.startswith(b"{"):
        return event
    document = json.loads(payload)
    usage = document.get("usage") or document.get("x_groq", {}).get("usage")
    if usage:
        expected.counts = (usage["prompt_tokens"], usage["completion_tokens"])
    for choice in document["choices"]:
        expected.finish_reason = choice.get("finish_reason") or expected.finish_reason
    expected.upstream_id = expected.upstream_id or document.get("id", "")
    if document["choices"] == [] and isinstance(document.get("usage"), dict) and not wants_usage:
        return b""
    return _rename(event, payload, pairs, expected)


def _rename(
    event: bytes, payload: bytes, pairs: list[tuple[int, int]], expected: Expected
) -> bytes:
    for name, start, end in top_level(payload.decode("latin-1")):  # one character a byte
        if name == "model" and payload[start : start + 1] == b'"':
            original = json.loads(payload[start:end])
            expected.upstream_model = expected.upstream_model or original
            first, last = pairs[start][1], pairs[end - 1][1]
            return event[:first] + orjson.dumps(SLUG) + event[last + 1 :]
    return event


def agree(seen: Seen, expected: Expected) -> None:
    assert seen.output == expected.output
    assert seen.failure is None
    assert seen.is_done is expected.is_done
    assert seen.finish_reason == expected.finish_reason
    assert seen.upstream_model == expected.upstream_model
    assert seen.upstream_id == expected.upstream_id
    counts = seen.usage and (seen.usage.prompt_tokens, seen.usage.completion_tokens)
    assert counts == expected.counts


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
    assert expected.upstream_model
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
def test_only_the_usage_event_depends_on_who_asked(dialect: str) -> None:
    asked, not_asked = (scan([DIALECTS[dialect]], wants_usage=wants) for wants in (True, False))
    assert replace(asked, output=b"") == replace(not_asked, output=b"")
    has_event = re.search(rb'data: [^\n]*"choices":\[\][^\n]*"usage":\{', DIALECTS[dialect])
    assert (asked.output != not_asked.output) is (has_event is not None)
    assert asked.output.count(b"\n\n") - not_asked.output.count(b"\n\n") == bool(has_event)


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
        pytest.param(chunk(choices=None, usage=USAGE), id="choices is null"),
    ],
)
@pytest.mark.parametrize("place", ["before content", "after content"])
def test_no_other_event_is_left_out(document: dict[str, Any], place: str) -> None:
    parts = (
        [event(document), text("a")] if place == "before content" else [text("a"), event(document)]
    )
    assert scan([b"".join(parts)]).output == renamed(b"".join(parts))


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
    assert seen.output == data.replace(b'"model":"upstream-name"', b'"model":"%b"' % SLUG.encode())
    assert (seen.failure, seen.is_finished, seen.usage) == (None, False, None)


def _has_surrogate(document: dict[str, Any]) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in document["choices"][0]["delta"]["content"])


# Content, and what comes before it


CALLS = [{"index": 0, "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"content": " "},
        {"reasoning_content": "a"},
        {"reasoning": "a"},
        {"refusal": "a"},
        {"tool_calls": CALLS},
        {"function_call": {"name": "f"}},
        {"audio": {"id": "a"}},
        {"role": "assistant", "content": None, "reasoning": "a"},
    ],
    ids=lambda delta: ", ".join(delta),
)
def test_a_delta_with_any_of_these_is_content(delta: dict[str, Any]) -> None:
    scanner = StreamScanner(SLUG, wants_usage=False)
    assert scanner.feed(ROLE) == b""
    assert scanner.feed(event(chunk(delta))) == renamed(ROLE + event(chunk(delta)))
    assert (scanner.has_content, scanner.content_events) == (True, 1)
    assert not scanner.is_finished


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(chunk({"role": "assistant"}), id="role only"),
        pytest.param(chunk({"role": "assistant", "content": None}), id="null"),
        pytest.param(chunk({"content": "", "refusal": "", "reasoning": ""}), id="empty strings"),
        pytest.param(chunk({"tool_calls": [], "audio": {}}), id="empty containers"),
        pytest.param(chunk(finish_reason=""), id="an empty finish reason"),
        pytest.param(chunk(choices=[], prompt_filter_results=[{}]), id="filter results"),
        pytest.param(chunk(choices=[], usage=USAGE), id="usage"),
        pytest.param(chunk(choices=None), id="no choices"),
        pytest.param(chunk(choices=["a", None, {"delta": "text"}]), id="choices of no known form"),
        pytest.param({}, id="an empty object"),
    ],
)
def test_nothing_is_released_before_content(document: dict[str, Any]) -> None:
    scanner = StreamScanner(SLUG, wants_usage=True)
    held = b": hello\n\nretry: 5\n\n" + event(document)
    assert scanner.feed(held) == b""
    assert (scanner.has_content, scanner.content_events) == (False, 0)
    assert scanner.feed(text("a")) == renamed(held + text("a"))


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


# Failures told in the stream


FAILURES = {
    "an error object": (
        event({"error": {"message": "secret", "type": "server_error", "code": 502}}),
        (True, 502),
    ),
    "an error with a word for its code": (
        event({"error": {"message": "secret", "code": "rate_limit_exceeded"}}),
        (True, None),
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
        (True, None),
    ),
    "an error beside content": (text("b", error={"code": 500}), (True, 500)),
}
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
    seen = scan([ROLE * 1000 + FAILURES["an error object"][0]])
    assert (seen.output, seen.failure) == (b"", (True, 502))


@pytest.mark.parametrize("nothing", [None, {}, "", []], ids=repr)
def test_an_empty_error_is_none(nothing: Any) -> None:
    data = text("a", error=nothing) + text("b", error=nothing) + DONE
    seen = scan([data])
    assert (seen.output, seen.failure) == (renamed(data), None)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"data: <html>\n\n", id="HTML"),
        pytest.param(b"data: [1]\n\n", id="an array"),
        pytest.param(b'data: "text"\n\n', id="a string"),
        pytest.param(b'data: {"choices":[\n\n', id="a part of an object"),
    ],
)
def test_what_opens_as_no_completion_chunk_is_a_failure(data: bytes) -> None:
    seen = scan([ROLE + data])
    assert (seen.output, seen.failure) == (b"", (False, None))


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
