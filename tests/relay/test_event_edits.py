"""Edits of an event's JSON: which spans are found, and that what proves them is never wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.protocol.sse import parse_event
from hoberproxy.relay.event_edits import (
    apply_edits,
    cut_member,
    find_model,
    find_null_usage,
    may_escape_names,
    place_edits,
    scan_edits,
)

SLUG = b'"vendor/slug"'
TEXTS = st.sampled_from(
    ["", "a", '"', "\\", '\\"', "{", "]}", '"model":"m"', ',"usage":null', "usage", "é"]
)
VALUES = st.recursive(
    st.none() | st.integers(0, 9) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "usage", "a", 'b"model']), inner, max_size=3)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(
    st.sampled_from(["model", "usage", "a", "b", 'c"model', "d\\usage"]), VALUES, max_size=5
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")])


def test_edits_are_made_in_order() -> None:
    assert apply_edits(b"abcdef", [(0, 1, b"A"), (3, 5, b"")]) == b"Abcf"
    assert apply_edits(b"abc", []) == b"abc"


@given(OBJECTS, SEPARATORS, st.booleans(), st.booleans())
def test_a_scan_edits_the_members_of_the_object_itself(
    document: dict[str, Any], separators: tuple[str, str], wants_usage: bool, ascii: bool
) -> None:
    raw = json.dumps(document, separators=separators, ensure_ascii=ascii).encode()
    edited = json.loads(apply_edits(raw, scan_edits(raw, SLUG, wants_usage=wants_usage)))
    expected = dict(document)
    if isinstance(document.get("model"), str):
        expected["model"] = "vendor/slug"
    if not wants_usage and document.get("usage", 0) is None:
        del expected["usage"]
    assert edited == expected
    assert list(edited) == list(expected)


@given(OBJECTS, SEPARATORS)
def test_a_search_finds_what_a_scan_finds(
    document: dict[str, Any], separators: tuple[str, str]
) -> None:
    raw = json.dumps(document, separators=separators, ensure_ascii=False).encode()
    start, end = find_model(raw, document)
    if end:
        assert (start, end, SLUG) in scan_edits(raw, SLUG, wants_usage=True)
    start, end = find_null_usage(raw)
    if end and document.get("usage", 0) is None:
        cut = apply_edits(raw, cut_member(raw, start, end))
        assert cut == apply_edits(
            raw, [e for e in scan_edits(raw, SLUG, wants_usage=False) if not e[2]]
        )


@pytest.mark.parametrize(
    ("payload", "may"),
    [
        (rb'{"m\u006fdel":1}', True),
        (rb'{"\u0075sage":1}', True),
        (rb'{"finish\u005freason":1}', True),
        (rb'{"finish\u005Freason":1}', True),
        (rb'{"a":"caf\u00e9 \u65e5\u672c \ud83d\ude00"}', False),
        (rb'{"a":"\n\t\""}', False),
        (b"{}", False),
    ],
)
def test_only_escapes_of_letters_can_hide_a_name(payload: bytes, may: bool) -> None:
    assert may_escape_names(payload) is may


def test_an_edit_over_several_lines_leaves_their_beginnings() -> None:
    event = b'id: 1\ndata: {"a":1,\r\ndata:"usage"\ndata: :null}\n\n'
    data = parse_event(event)
    assert data is not None
    edits = scan_edits(data.payload, SLUG, wants_usage=False)
    edited = apply_edits(event, place_edits(data, edits))
    assert edited == b'id: 1\ndata: {"a":1\r\ndata:\ndata: }\n\n'
