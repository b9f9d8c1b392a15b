"""The members of a body by orjson's own errors, and how many values it has, against bodies put
together by hand."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.protocol.json_bytes import Member
from hoberproxy.request import body_scan as spans
from hoberproxy.request.body_scan import (
    MAX_VALUES,
    RepeatedName,
    Survey,
    TangledMembers,
    find_members,
)
from tests.conftest import IS_COMPILED
from tests.protocol.test_json_bytes import NAMES, SPACES, VALUES, nested, raw_string

# Long enough not to be found by the scan of short values.
LONG = [
    b'["' + b"a" * 600 + b'"]',
    b"[" + b'"",' * 300 + b"{}]",
    b"[" + b'"\\\\",' * 200 + b'"\\""]',
    b'"' + b'\\"' * 300 + b'"',
    b'"' + b"\\\\" * 301 + b'"',
    b'"' + "é\U0001f600".encode() * 200 + b'"',
    b"[" + b" " * 700 + b"]",
    b"1" * 300 + b".5e-7",
    nested(150),
    b'{"model":"b","messages":[]' + b',"x":{"":[{}],"model":0}' * 40 + b"}",
]


def members_of(data: bytes, known: dict[int, int] | None = None) -> list[Member]:
    return find_members(data, list(orjson.loads(data)), known or {}, surveyed(data))


def surveyed(data: bytes) -> Survey:
    survey = Survey(data)
    while survey.step():
        pass
    return survey


def searched(data: bytes, *, is_dense: bool) -> list[Member]:
    """As `members_of`, also where the scan would have been taken."""
    return spans._Search(data, list(orjson.loads(data)), {}, is_dense).members()


@st.composite
def documents(draw: st.DrawFn) -> tuple[bytes, list[Member]]:
    data, members = draw(SPACES) + b"{" + draw(SPACES), list[Member]()
    for index in range(draw(st.integers(0, 6))):
        if index:
            data += draw(SPACES) + b"," + draw(SPACES)
        name, start = draw(NAMES), len(data)
        data += draw(raw_string(name)) + draw(SPACES) + b":" + draw(SPACES)
        value_start = len(data)
        data += draw(VALUES | st.sampled_from(LONG))
        members.append(Member(name, start, value_start, len(data)))
    return data + draw(SPACES) + b"}" + draw(SPACES), members


@pytest.mark.parametrize("is_dense", [False, True])
@given(documents())
def test_members_are_those_the_document_was_put_together_from(
    is_dense: bool, document: tuple[bytes, list[Member]]
) -> None:
    data, members = document
    names = [member.name for member in members]
    again = [m for place, m in enumerate(members) if m.name in names[:place]]
    if again:
        with pytest.raises(RepeatedName) as caught:
            searched(data, is_dense=is_dense)
        assert (caught.value.name, caught.value.start) == (again[0].name, again[0].start)
    else:
        assert searched(data, is_dense=is_dense) == members
        assert members_of(data) == members


@pytest.mark.parametrize("value", LONG, ids=range(len(LONG)))
@pytest.mark.parametrize("space", [b"", b" \n", b" " * 900], ids=["no", "some", "much"])
@pytest.mark.parametrize("name", ["model", "é", "a/b", ""])
def test_a_long_value_ends_where_the_next_member_begins(
    value: bytes, space: bytes, name: str
) -> None:
    written = orjson.dumps(name).replace(b"/", b"\\/")
    data = b'{"x":' + value + space + b"," + space + written + b":" + value + space + b"}"
    for is_dense in (False, True):
        found = searched(data, is_dense=is_dense)
        assert [data[m.value_start : m.end] for m in found] == [value, value]


@pytest.mark.parametrize("value", LONG, ids=range(len(LONG)))
def test_another_orjson_with_other_words_is_only_slower(
    value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b'{"x":' + value + b',"y":' + value + b"}"
    expected = searched(data, is_dense=True)

    def loads(data: Any) -> Any:
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError as exc:
            raise orjson.JSONDecodeError("something else", exc.doc, exc.pos) from None

    if not IS_COMPILED:
        monkeypatch.setattr(spans, "_loads", loads)
    assert searched(data, is_dense=True) == expected


def test_a_name_below_the_top_level_is_not_taken_for_the_next_member() -> None:
    inner = b'[{"y":1,"z":"\\"y\\":"},' + b'"y",' * 300 + b'{"y":[]}]'
    data = b'{"x":' + inner + b',"y":' + inner + b',"z":{"y":0,"x":' + inner + b"}}"
    for is_dense in (False, True):
        found = searched(data, is_dense=is_dense)
        assert [(m.name, data[m.value_start : m.end]) for m in found[:2]] == [
            ("x", inner),
            ("y", inner),
        ]


def test_names_that_hide_the_ends_of_members_again_and_again_are_refused() -> None:
    names = [f"n{number}" for number in range(100)]
    hidden = b",".join(b'{"%b":0}' % name.encode() for name in names)
    value = b"[" + hidden + b',"%b"]' % (b"a" * 20_000)
    data = b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name in names) + b"}"
    with pytest.raises(TangledMembers):
        searched(data, is_dense=False)


def test_an_end_that_is_known_is_not_searched_for() -> None:
    value = b"[" + b'"",' * 500 + b"0]"
    data = b'{"x":' + value + b',"y":1}'
    assert members_of(data, {5: 5 + len(value)}) == searched(data, is_dense=True)


# How many values


def exact(value: Any) -> int:
    """Commas and opening brackets of a value; it holds at most one value more."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    return 1 + max(len(value) - 1, 0) + sum(map(exact, value))


PAD = 2 * MAX_VALUES + 1000  # bytes; a shorter body is not counted


@given(st.lists(VALUES, min_size=1, max_size=6), st.sampled_from([b"x", b"\\n", b",", b'\\"[,']))
@example([b'"\\\\"', b'"\\\\\\""', b"[[],[]]"], b"\\\\")
def test_values_are_counted_at_least(values: list[bytes], pad: bytes) -> None:
    text = pad * (PAD // len(pad))
    data = b"[" + b",".join(values) + b',"' + text + b'"]'
    count = surveyed(data).values
    assert count >= exact(orjson.loads(data))
    if pad in (b",", b'\\"[,'):
        assert count < 1000, "what stands in a string is none"


@pytest.mark.parametrize("cut", range(24))
def test_the_count_does_not_depend_on_where_a_long_body_is_cut(
    cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = b'["\\\\\\"\\\\",[{"a\\\\":"\\",["}]],'
    data = b"[" + b" " * cut + piece * 20_000 + b'"' + b'[,\\"' * 200_000 + b'"]'
    orjson.loads(data)
    whole = surveyed(data).values
    if not IS_COMPILED:
        monkeypatch.setattr(spans, "_COUNTED_BYTES", 100_003)
    assert surveyed(data).values == whole == exact(orjson.loads(data))


@pytest.mark.parametrize("unit", [b"[]", b"{}", b"0", b'""', b'"a"', b'{"a":[]}', b"[[[]]]"])
def test_a_body_of_too_many_values_is_known_before_it_is_parsed(unit: bytes) -> None:
    for text in (b"", b'"\\"",', b'"' + b"\\\\,[" * 300_000 + b'",'):
        few, many = (b"[" + text + (unit + b",") * n + b"0]" for n in (9, MAX_VALUES + 1))
        assert not surveyed(few).has_too_many
        assert surveyed(many).has_too_many


@given(st.binary(max_size=60))
def test_bytes_that_are_no_json_are_counted_without_harm(data: bytes) -> None:
    surveyed(data * (PAD // max(len(data), 1)))


def test_the_count_of_an_ordinary_body_is_far_from_the_bound() -> None:
    messages = [{"role": "user", "content": 'a, [b], {c}: "d"\\ ' * 20}] * 2000
    data = json.dumps({"model": "m", "messages": messages}).encode()
    assert surveyed(data).values < MAX_VALUES
