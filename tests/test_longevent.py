"""JSON that is passed on as it comes: what passes, and the outline that is kept of it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.completion import read_completion
from hoberproxy.edits import apply_edits, scan_edits
from hoberproxy.longevent import LongEvent, LongObject
from hoberproxy.outline import clip

from .cuts import cut_at
from .test_members import Document, documents

SLUG = b'"vendor/slug"'


def read(pieces: list[bytes], *, wants_usage: bool = False) -> tuple[bytes, LongEvent]:
    long = LongEvent(SLUG, wants_usage=wants_usage)
    passed = b"".join([*map(long.feed, pieces), long.feed_eof()])
    return passed, long


def without_lines(event: bytes, end: bytes) -> bytes:
    """The event without white space, which stands in none of its texts, and as one line."""
    return b"".join(event.replace(end + b"data:", b"\n").split())


TEXTS = st.sampled_from(
    ["", "a", '"', "\\", "\\\\", '\\"', "{", "]}", '"model":"m"', ',"usage":null', "é", "\ud83d"]
)
NAMES = st.sampled_from(["model", "usage", "choices", "delta", "a", 'b"model', "", "n" * 300])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from([1.5, 2e9]) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=15,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=6)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")])
LINES = st.sampled_from([(None, b"\n"), (None, b"\r\n"), (1, b"\n"), (1, b"\r\n"), (1, b"\r")])


@example({"choices": None, "usage": None, "model": None}, (",", ":"), (1, b"\n"), [], False, False)
@given(
    OBJECTS,
    SEPARATORS,
    LINES,
    st.lists(st.integers(0, 600), max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_what_passes_is_what_a_whole_event_becomes(
    document: dict[str, Any],
    separators: tuple[str, str],
    lines: tuple[int | None, bytes],
    cuts: list[int],
    wants_usage: bool,
    ascii: bool,
) -> None:
    indent, end = lines
    raw = json.dumps(document, separators=separators, indent=indent).encode()
    if not ascii:
        raw = raw.replace(b"\\u00e9", "é".encode())
    edited = apply_edits(raw, scan_edits(raw, SLUG, wants_usage=wants_usage))

    def event(payload: bytes) -> bytes:
        return b"data: " + payload.replace(b"\n", end + b"data:") + end + end

    for pieces in ([event(raw)], cut_at(event(raw), cuts), cut_at(event(raw), range(999))):
        passed, long = read(pieces, wants_usage=wants_usage)
        if indent is None:
            assert passed == event(edited)
        else:  # a member that is taken out leaves its line's beginning, before a comma or behind it
            assert without_lines(passed, end) == without_lines(event(edited), end)
        model = document.get("model")
        if isinstance(model, str):
            assert json.loads(long.model) == model
        assert isinstance(long.document, dict)


@given(OBJECTS, st.lists(st.integers(0, 600), max_size=8))
def test_the_outline_of_little_is_all_of_it_but_for_arrays(
    document: dict[str, Any], cuts: list[int]
) -> None:
    def outline(value: Any, levels: int = 9) -> Any:
        if isinstance(value, dict):
            return {k: outline(v, levels - 1) for k, v in value.items() if len(k) < 300}
        if isinstance(value, list):
            return [outline(each, levels - 1) for each in value[:1]]
        return value

    plain = {name: value for name, value in document.items() if name not in ("choices", "usage")}
    if "usage" in json.dumps(plain):
        return
    data = b"data: %b\n\n" % json.dumps(plain).encode()
    _, long = read(cut_at(data, cuts))
    assert long.document == outline(plain)


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b'{"a":1',
        b'{"a":1}x',
        b'{"a" 1}',
        b'{"a":1]',
        b'{"a":[1}',
        b'{"a":}',
        b'{"model":"x',
        b'{"model":"x\ndata: y"}',
        b'{"a":1,"usage":nul',
        b"{1:2}",
        b"[1]",
        b'"model"',
        b"text",
        b"",
    ],
)
def test_what_is_no_object_passes_unharmed_and_says_nothing(payload: bytes) -> None:
    data = b"data: " + payload + b"\n\n"
    for pieces in ([data], cut_at(data, range(99))):
        passed, long = read(pieces)
        assert passed == data
        assert long.document is None


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({"a": "x" * 500_000}, id="a text"),
        pytest.param({"a": [[]] * 100_000}, id="an array"),
        pytest.param({"choices": [{"delta": {"content": "x"}}] * 20_000}, id="choices"),
        pytest.param({"usage": {f"n{n}": n for n in range(30_000)}}, id="members of usage"),
        pytest.param({f"usage{n}": {"a": [1] * 10} for n in range(9000)}, id="usages"),
        pytest.param({"error": {f"n{n}": "x" * 99 for n in range(3000)}}, id="an error"),
        pytest.param({"n" * 300_000: 1}, id="a name"),
        pytest.param({"model": "x" * 300_000}, id="a model"),
        pytest.param({"a": 10**300}, id="a number"),
    ],
)
def test_memory_stays_flat_whatever_is_long(document: dict[str, Any]) -> None:
    data = b"data: %b\n\n" % json.dumps(document | {"x": 1}, separators=(",", ":")).encode()
    pieces = [data[at : at + 1400] for at in range(0, len(data), 1400)]
    long = LongEvent(SLUG, wants_usage=False)
    tracemalloc.start()
    try:
        passed = sum(len(long.feed(piece)) for piece in pieces) + len(long.feed_eof())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000
    assert isinstance(long.document, dict)
    if "error" in document:
        assert passed == 0
    elif "model" in document:
        assert passed == len(data) - len(json.dumps(document["model"])) + len(SLUG)
    else:
        assert passed == len(data)


def test_usage_has_room_behind_anything() -> None:
    filling = {f"member_{number}": ["x" * 900] for number in range(200)}
    last = {"finish_reason": "stop", "usage": {"prompt_tokens": 3}}
    document = filling | {"choices": [last], "usage": {"prompt_tokens": 5}}
    _, long = read([b"data: %b\n\n" % json.dumps(document).encode()])
    assert long.document["choices"] == [last]
    assert long.document["usage"] == {"prompt_tokens": 5}


@pytest.mark.parametrize("size", [1, 5, 6, 9, 12, 14, 15, 16, 17, 18, 30, 99])
def test_a_clipped_string_is_a_string(size: int) -> None:
    text = 'é\\\\\\"\\u00e9\\ud83d\\ude00é\U0001f600\\\\'.encode()
    clipped = clip(text, size)
    assert len(clipped) <= size
    assert json.loads(b'"%b"' % text).startswith(json.loads(b'"%b"' % clipped)[:-1])


@pytest.mark.parametrize(
    ("document", "is_known"),
    [
        ({"error": {"code": 5}}, True),
        ({"error": "x"}, True),
        ({"error": [{"message": "x"}]}, True),
        ({"error": None}, False),
        ({"error": ""}, False),
        ({"error": {"code": None, "message": ""}}, False),
        ({"a": {"error": "x"}}, False),
        ({"errors": "x"}, False),
    ],
)
def test_nothing_more_passes_once_an_error_is_known(
    document: dict[str, Any], is_known: bool
) -> None:
    raw = json.dumps(document)[:-1].encode()
    passed, long = read([b"data: " + raw, b',"a":"secret"}\n\n'])
    assert long.has_error is is_known
    assert passed == (b"" if is_known else b"data: " + raw + b',"a":"secret"}\n\n')


# Bodies


def pass_on(pieces: Iterable[bytes]) -> tuple[bytes, LongObject]:
    out: list[bytes] = []
    long = LongObject(SLUG, out, wants_usage=True)
    for piece in pieces:
        long.feed(piece)
    long.feed_eof()
    return b"".join(out), long


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@given(documents(), st.lists(st.integers(0, 400), max_size=5))
def test_pieces_of_a_body_make_what_the_whole_makes(document: Document, cuts: list[int]) -> None:
    passed, long = pass_on(cut_at(document.data, cuts))
    assert passed == document.replaced("model", SLUG)
    assert long.model == document.raw("model", opening=b'"')
    assert long.is_complete
    assert pass_on(byte_by_byte(document.data))[0] == passed


BODY = (
    b'{"id":"\\\\\\"x","choices":[{"message":{"model":"inner","content":"\\"model\\":\\"no\\""}}],'
    b'"usage" : {"total_tokens":7,"d":{"e":"\\\\"}},"mo\\u0064el":\t"a-\\"1\\\\","n":-1.5}'
)
NAMED = b'"a-\\"1\\\\"'


@pytest.mark.parametrize("cut", range(len(BODY)))
def test_a_body_that_is_cut_loses_nothing_and_is_not_complete(cut: int) -> None:
    passed, long = pass_on([BODY[:cut]])
    assert passed == BODY[:cut].replace(NAMED, SLUG)
    assert (long.is_complete, long.document()) == (False, None)


@pytest.mark.parametrize("cut", range(len(BODY) + 1))
def test_of_a_body_only_the_name_of_its_model_is_held_back(cut: int) -> None:
    out: list[bytes] = []
    LongObject(SLUG, out, wants_usage=True).feed(BODY[:cut])
    start = BODY.index(NAMED)
    end = start + len(NAMED)
    expected = start if start <= cut < end else cut
    assert len(b"".join(out)) == expected + (len(SLUG) - len(NAMED)) * (cut >= end)


@pytest.mark.parametrize("behind", [b' {"model":"x"}', b"\n\ndata: [DONE]\n\n", b"}"])
def test_what_is_behind_the_object_passes_and_changes_nothing(behind: bytes) -> None:
    for pieces in ([BODY + behind], byte_by_byte(BODY + behind)):
        passed, long = pass_on(pieces)
        assert passed == BODY.replace(NAMED, SLUG) + behind
        assert long.is_complete and long.document()["id"] == '\\"x'


@pytest.mark.parametrize("value", [b"null", b"12", b"true", b'["a"]', b'{"model":"b"}'])
def test_a_model_that_is_no_string_stays(value: bytes) -> None:
    data = b'{"model":' + value + b',"z":0}'
    passed, long = pass_on(byte_by_byte(data))
    assert (passed, long.model, long.is_complete) == (data, None, True)


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("length", [4094, 4095, 9000])
def test_a_name_over_4_kb_is_replaced_and_not_kept(length: int, step: int) -> None:
    value = b'"' + b"v" * length + b'"'
    data = b'{"model":' + value + b',"n":1}'
    passed, long = pass_on(cut_at(data, range(0, len(data), step)))
    assert passed == data.replace(value, SLUG)
    assert long.model == (value if len(value) <= 4096 else None)


@given(st.binary(max_size=60) | st.text('{}[]":, \\model1', max_size=60).map(str.encode))
def test_what_is_no_json_never_raises_and_passes_but_for_a_replaced_string(data: bytes) -> None:
    passed, long = pass_on([data])
    in_bits, same = pass_on(byte_by_byte(data))
    assert (passed, long.is_complete) == (in_bits, same.is_complete)
    assert passed.replace(SLUG, b"") == data or long.model is not None


TOLD = {"prompt_tokens": 7, "completion_tokens": 5, "cached_tokens": 4}


@pytest.mark.parametrize("is_on_top", [True, False], ids=["on top", "in the choices"])
@pytest.mark.parametrize("choices", [1, 2, 64])
def test_the_outline_of_a_body_says_what_the_body_says(choices: int, is_on_top: bool) -> None:
    text = json.dumps({"usage": {"prompt_tokens": 1, "completion_tokens": 1}}) + "x" * 20_000
    choice: dict[str, Any] = {"message": {"content": text}, "logprobs": {"content": [{"a": 1}] * 9}}
    choice |= {"finish_reason": "length"} | ({} if is_on_top else {"usage": TOLD})
    body: dict[str, Any] = {"id": "c-1", "choices": [choice] * choices}
    body |= {"usage": TOLD} if is_on_top else {}
    expected = read_completion(body)
    assert expected[1:] == ("length", "c-1")
    data = json.dumps(body).encode()
    _, long = pass_on(cut_at(data, range(0, len(data), 60_000)))
    assert read_completion(long.document()) == expected
