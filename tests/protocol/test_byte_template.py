"""Templates of bytes: what matches, where values end, what is learnt from a difference."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.protocol.byte_template import (
    COUNT,
    FIELD,
    NUMBER,
    NUMBERS,
    OBJECT,
    STRING,
    TEXT,
    ByteTemplate,
    Value,
    make_template,
    value_end,
)


def span(specimen: bytes, value: bytes, kind: int, is_hole: bool = True) -> Value:
    start = specimen.index(value)
    return start, start + len(value), kind, is_hole


def passed(template: ByteTemplate) -> bytes:
    parts: list[bytes] = []
    template.put_together(parts)
    return b"".join(parts)


SPECIMEN = b'{"id":"c-1","n":7,"text":"Hi"}\n'
VALUES = [
    span(SPECIMEN, b"c-1", STRING, is_hole=False),
    span(SPECIMEN, b"7", COUNT, is_hole=False),
    span(SPECIMEN, b"Hi", TEXT),
]
LONG = b"x" * 1000


@pytest.mark.parametrize(
    ("kind", "value", "behind"),
    [
        (TEXT, b"", b'"'),
        (TEXT, b"two words", b'"'),
        (TEXT, "é日本😀".encode(), b'"'),
        (TEXT, rb"\"\\\n\u00e9", b'"'),
        (TEXT, LONG, b'"'),
        (TEXT, LONG + rb"\"" + LONG, b'"'),
        (TEXT, b"a", b"\n"),
        (TEXT, b"a", rb"\x"),
        (TEXT, b"a", b"\t"),
        (NUMBER, b"0", b","),
        (NUMBER, b"-0.0", b"}"),
        (NUMBER, b"-1.25e-07", b"]"),
        (NUMBER, b"1E+21", b" "),
        (NUMBER, b"0", b"1"),
        (NUMBER, b"9" * 40, b","),
        (COUNT, b"12", b","),
        (COUNT, b"12", b".5"),
        (COUNT, b"9" * 15, b"}"),
        (NUMBERS, b"", b"]"),
        (NUMBERS, b"1", b"]"),
        (NUMBERS, b"1, 2,3", b"]"),
        (NUMBERS, b"-1.5,2e3", b"]"),
        (FIELD, b"a b", b"\r\n"),
        (OBJECT, b'{"a":{"b":"}\\""},"c":[{}]}', b","),
        (OBJECT, b"{}", b"}"),
    ],
)
def test_a_value_ends_where_its_kind_ends_it(kind: int, value: bytes, behind: bytes) -> None:
    assert value_end(b"<" + value + behind, 1, kind) == 1 + len(value)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (NUMBER, b"-,"),
        (NUMBER, b"true"),
        (NUMBER, b'"7"'),
        (COUNT, b"-1,"),
        (COUNT, b"01,"),
        (COUNT, b"9" * 16 + b","),
        (COUNT, b","),
        (FIELD, b" a\r\n"),
        (FIELD, b"a \r\n"),
        (FIELD, b"\r\n"),
        (FIELD, "é\r\n".encode()),
        (FIELD, b"no end"),
        (OBJECT, b'{"a":1'),
        (OBJECT, b'{"a":\n1}'),
        (OBJECT, b"[{}]"),
    ],
)
def test_what_is_no_value_of_its_kind_has_no_end(kind: int, data: bytes) -> None:
    assert value_end(data, 0, kind) < 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda values: st.lists(values) | st.dictionaries(st.text(), values),
        max_leaves=8,
    )
)
def test_values_of_json_end_where_json_ends_them(value: Any) -> None:
    raw = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    if isinstance(value, dict):
        assert value_end(raw + b",", 0, OBJECT) == len(raw)
    elif isinstance(value, str):
        assert value_end(raw, 1, TEXT) == len(raw) - 1
    elif type(value) in (int, float) and "inf" not in repr(value).lower():
        assert value_end(raw + b",", 0, NUMBER) == len(raw)


def test_a_specimen_matches_itself_at_any_place() -> None:
    template = make_template(SPECIMEN, VALUES)
    assert template.match(b"before" + SPECIMEN + b"behind", 6) == 6 + len(SPECIMEN)
    assert (template.values, passed(template)) == ([b"Hi"], SPECIMEN)


def test_only_the_values_of_holes_may_differ() -> None:
    template = make_template(SPECIMEN, VALUES)
    other = SPECIMEN.replace(b"Hi", b"a longer text")
    assert template.match(other, 0) == len(other)
    assert passed(template) == other
    for old, new in ((b"c-1", b"c-2"), (b"7", b"8"), (b'"n"', b'"m"'), (b"}", b"]")):
        assert template.match(SPECIMEN.replace(old, new), 0) == 0


@pytest.mark.parametrize("end", range(len(SPECIMEN)))
def test_a_part_does_not_match(end: int) -> None:
    template = make_template(SPECIMEN, VALUES)
    assert template.match(SPECIMEN[:end], 0) == 0
    assert template.learn_from(SPECIMEN[:end], 0) == 0


def test_a_value_that_differs_is_a_hole_from_then_on() -> None:
    template = make_template(SPECIMEN, VALUES)
    for number in range(2, 5):
        other = SPECIMEN.replace(b"c-1", b"c-%d" % number)
        assert (template.match(other, 0) == 0) is (number == 2)
        if number == 2:
            assert template.learn_from(other, 0) == len(other)
        assert passed(template) == other
    assert template.kinds == bytes((STRING, TEXT))


def test_a_value_that_may_stay_for_a_while_is_no_hole_but_the_new_value() -> None:
    template = make_template(SPECIMEN, VALUES)
    other = SPECIMEN.replace(b"c-1", b"another")
    assert template.learn_from(other, 0, widen=False) == len(other)
    assert template.kinds == bytes((TEXT,))
    assert template.match(other, 0) == len(other)
    assert template.match(SPECIMEN, 0) == 0


def test_a_count_that_differs_is_a_hole_in_any_case() -> None:
    template = make_template(SPECIMEN, VALUES)
    other = SPECIMEN.replace(b"7", b"8")
    assert template.learn_from(other, 0, widen=False) == len(other)
    assert template.kinds == bytes((COUNT, TEXT))


def test_what_differs_elsewhere_is_not_learnt_from() -> None:
    template = make_template(SPECIMEN, VALUES)
    assert template.learn_from(SPECIMEN.replace(b'"n":7', b'"n":null'), 0) == 0
    assert template.match(SPECIMEN, 0) == len(SPECIMEN)


def test_edits_are_made_in_all_that_matches() -> None:
    start = SPECIMEN.index(b'"n"')
    edits = [(0, 1, b"<"), (start, start + 3, b'"number"')]
    template = make_template(SPECIMEN, VALUES, edits)
    other = SPECIMEN.replace(b"c-1", b"c-22").replace(b"Hi", b"Ho ho")
    assert template.learn_from(other, 0) == len(other)
    assert passed(template) == b"<" + other[1:].replace(b'"n"', b'"number"')


def test_a_copy_has_values_of_its_own_and_holes_in_common() -> None:
    template = make_template(SPECIMEN, VALUES)
    other = SPECIMEN.replace(b"c-1", b"c-2")
    copy = template.copy_for(other)
    assert copy is not None
    assert copy.match(other, 0) == len(other)
    assert copy.match(SPECIMEN, 0) == 0
    assert copy.learn_from(SPECIMEN.replace(b"7", b"9"), 0) > 0
    third = template.copy_for(SPECIMEN)
    assert third is not None
    assert third.match(other.replace(b"7", b"8"), 0) > 0
    assert template.copy_for(SPECIMEN + b" ") is None


def test_a_template_that_has_forgotten_its_values_can_be_copied() -> None:
    template = make_template(SPECIMEN, VALUES)
    template.forget_values()
    assert template.match(SPECIMEN, 0) == 0
    copy = template.copy_for(SPECIMEN)
    assert copy is not None
    assert copy.match(SPECIMEN, 0) == len(SPECIMEN)
