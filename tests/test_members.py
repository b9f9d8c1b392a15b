"""Spans of top-level members, against documents put together by hand."""

from __future__ import annotations

from dataclasses import dataclass

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.members import (
    Member,
    find_member,
    replace_member,
    scan_members,
)

SLUG = b'"vendor/slug-1"'


def nested(levels: int, core: bytes = b'"a]}\\"{["') -> bytes:
    return b'{"k":[' * levels + core + b"]}" * levels


# Documents are drawn as text, not made by a serializer, so that whitespace, escapes and repeated
# names are all there, and the spans are known without a scanner.

NAMES = st.sampled_from(["model", "usage", "models", "mode", "", 'a"b', "\\", "é", "\U0001f600"])
NAMES |= st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SPACES = st.sampled_from([b"", b"", b" ", b"\n\t", b"\r\n  "])


@st.composite
def raw_string(draw: st.DrawFn, text: str) -> bytes:
    """`text` as JSON, each character plain or as \\uXXXX by chance."""
    pieces = [
        "".join(f"\\u{unit:04x}" for unit in _utf16(char))
        if draw(st.integers(0, 4)) == 0
        else orjson.dumps(char).decode()[1:-1]
        for char in text
    ]
    return f'"{"".join(pieces)}"'.encode()


def _utf16(char: str) -> list[int]:
    data = char.encode("utf-16-be")
    return [int.from_bytes(data[i : i + 2]) for i in range(0, len(data), 2)]


@st.composite
def raw_container(draw: st.DrawFn, children: st.SearchStrategy[bytes]) -> bytes:
    space = draw(SPACES)
    values = draw(st.lists(children, max_size=4))
    if draw(st.booleans()):
        return b"[" + space + (b"," + space).join(values) + space + b"]"
    names = [draw(raw_string(draw(NAMES))) for _ in values]
    pairs = [n + space + b":" + v for n, v in zip(names, values, strict=True)]
    return b"{" + space + (space + b",").join(pairs) + b"}"


SCALARS = st.sampled_from([b"1", b"-1.50e+3", b"true", b"null", b'"{"', b'"\\\\"', b'"\\"}]"'])
SCALARS |= st.text(st.characters(exclude_categories=["Cs"]), max_size=8).flatmap(raw_string)
VALUES = st.recursive(SCALARS, raw_container, max_leaves=12)
VALUES |= st.sampled_from([nested(4), nested(5), nested(12), b"[[],{}," + nested(9) + b"]"])


@dataclass(frozen=True)
class Document:
    data: bytes
    members: list[Member]

    def replaced(self, name: str, value: bytes) -> bytes:
        """The whole document with the string value of each member called `name` replaced."""
        data = self.data
        for member in reversed(self.members):
            if member.name == name and data[member.value_start] == ord('"'):
                data = data[: member.value_start] + value + data[member.end :]
        return data

    def raw(self, name: str, opening: bytes = b"") -> bytes | None:
        raws = [self.data[m.value_start : m.end] for m in self.members if m.name == name]
        return next((r for r in reversed(raws) if r.startswith(opening)), None)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    data = draw(SPACES) + b"{" + draw(SPACES)
    members = []
    for index in range(draw(st.integers(0, 5))):
        if index:
            data += draw(SPACES) + b"," + draw(SPACES)
        name, start = draw(NAMES), len(data)
        data += draw(raw_string(name)) + draw(SPACES) + b":" + draw(SPACES)
        value_start = len(data)
        data += draw(VALUES)
        members.append(Member(name, start, value_start, len(data)))
    return Document(data + draw(SPACES) + b"}" + draw(SPACES), members)


# scan_members


@given(documents())
def test_spans_are_those_the_document_was_put_together_from(document: Document) -> None:
    orjson.loads(document.data)
    assert scan_members(document.data) == document.members


@pytest.mark.parametrize("levels", [1, 3, 4, 5, 8, 9, 20, 400])
def test_a_value_is_one_span_however_deep_it_is_nested(levels: int) -> None:
    value = nested(levels)
    data = b'{"a":' + value + b',"b":1}'
    assert [data[m.value_start : m.end] for m in scan_members(data)] == [value, b"1"]


@pytest.mark.parametrize(
    "value",
    [b'"\\\\"', b'"\\\\\\""', b'"\\\\\\\\"', b'"a\\\\\\"}"', b'["\\\\",{"\\"":"\\\\\\\\\\""}]'],
)
def test_runs_of_backslashes_do_not_hide_the_end_of_a_string(value: bytes) -> None:
    data = b'{"a":' + value + b',"b":' + value + b"}"
    assert [(m.name, data[m.value_start : m.end]) for m in scan_members(data)] == [
        ("a", value),
        ("b", value),
    ]


def test_a_name_is_decoded_and_a_repeated_one_listed_twice() -> None:
    data = b'{"\\u006dodel":1, "model":2}'
    assert [member.name for member in scan_members(data)] == ["model", "model"]


@pytest.mark.parametrize("data", [b"{}", b" { \n} ", b"\t{\r\n}"])
def test_an_empty_object_has_no_members(data: bytes) -> None:
    assert scan_members(data) == []


def test_a_member_found_is_the_last_of_its_name_as_in_orjson() -> None:
    data = b'{"model":"first","x":{"model":"deeper"},"model":"last"}'
    member = find_member(data, "model")
    assert member is not None
    assert data[member.value_start : member.end] == b'"last"'
    assert orjson.loads(data)["model"] == "last"


def test_a_name_of_a_deeper_level_is_not_found() -> None:
    assert find_member(b'{"x":{"model":"deeper"},"y":"model"}', "model") is None


@given(documents(), st.data())
def test_replacing_a_member_changes_its_value_and_nothing_else(
    document: Document, data: st.DataObject
) -> None:
    if not document.members:
        return
    member = data.draw(st.sampled_from(document.members))
    replaced = replace_member(document.data, member, SLUG)
    assert replaced[: member.value_start] == document.data[: member.value_start]
    assert replaced[member.value_start :].startswith(SLUG)
    assert replaced[member.value_start + len(SLUG) :] == document.data[member.end :]
