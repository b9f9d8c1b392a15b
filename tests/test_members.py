"""Spans of top-level members, and the rewriter, against documents put together by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.members import (
    Member,
    MemberRewriter,
    find_member,
    replace_member,
    scan_members,
)

from .cuts import cut_at

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


def feed_all(rewriter: MemberRewriter, pieces: Iterable[bytes]) -> bytes:
    return b"".join([rewriter.feed(piece) for piece in pieces]) + rewriter.feed_eof()


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


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


# MemberRewriter


@given(documents(), st.lists(st.integers(0, 400), max_size=5), st.sampled_from([b"", b"data: "]))
def test_pieces_make_what_the_whole_document_makes(
    document: Document, cuts: list[int], prefix: bytes
) -> None:
    rewriter = MemberRewriter(b"model", SLUG, capture=b"usage")
    made = feed_all(rewriter, cut_at(prefix + document.data, cuts))
    assert made == prefix + document.replaced("model", SLUG)
    assert rewriter.original == document.raw("model", opening=b'"')
    assert rewriter.captured == document.raw("usage")
    assert rewriter.is_complete


@given(documents(), st.sampled_from(["", "é", 'a"b', "\\", "\U0001f600"]))
def test_single_bytes_make_what_the_whole_document_makes(document: Document, name: str) -> None:
    rewriter = MemberRewriter(name.encode(), SLUG, capture=b"model")
    made = feed_all(rewriter, byte_by_byte(document.data))
    assert made == document.replaced(name, SLUG)
    assert rewriter.captured == document.raw("model")
    assert rewriter.is_complete


EVENT = (
    b'data: {"id":"\\\\\\"x","choices":[{"delta":{"model":"inner","t":"\\"model\\":\\"no\\""}}],'
    b'"usage" : {"total_tokens":7,"d":{"e":"\\\\"}},"mo\\u0064el":\t"a-\\"1\\\\","n":-1.5}\n\n'
)


@pytest.mark.parametrize("cut", range(len(EVENT) + 1))
def test_an_event_does_not_depend_on_where_it_was_cut(cut: int) -> None:
    rewriter = MemberRewriter(b"model", SLUG, capture=b"usage")
    made = feed_all(rewriter, [EVENT[:cut], EVENT[cut:]])
    assert made == EVENT.replace(b'"a-\\"1\\\\"', SLUG)
    assert rewriter.original == b'"a-\\"1\\\\"'
    assert rewriter.captured == b'{"total_tokens":7,"d":{"e":"\\\\"}}'


@pytest.mark.parametrize("cut", range(len(EVENT) + 1))
def test_only_the_value_being_replaced_is_held_back(cut: int) -> None:
    rewriter = MemberRewriter(b"model", SLUG)
    start, end = EVENT.index(b'"a-'), EVENT.index(b',"n"')
    expected = start if start <= cut < end else cut
    assert len(rewriter.feed(EVENT[:cut])) == expected + (len(SLUG) - (end - start)) * (cut >= end)


@pytest.mark.parametrize("cut", range(len(EVENT)))
def test_a_document_that_is_cut_loses_nothing(cut: int) -> None:
    rewriter = MemberRewriter(b"model", SLUG)
    made = feed_all(rewriter, [EVENT[:cut]])
    assert made == EVENT[:cut].replace(b'"a-\\"1\\\\"', SLUG)
    assert rewriter.is_complete is (cut >= len(EVENT) - 2)


@pytest.mark.parametrize("value", [b"null", b"12", b"true", b'["a"]', b'{"model":"b"}'])
def test_a_value_that_is_no_string_stays(value: bytes) -> None:
    data = b'{"model":' + value + b',"z":0}'
    rewriter = MemberRewriter(b"model", SLUG)
    assert feed_all(rewriter, byte_by_byte(data)) == data
    assert rewriter.original is None


@given(st.binary(max_size=60) | st.text('{}[]":, \\ma1', max_size=60).map(str.encode))
def test_what_is_no_json_never_raises_and_passes_but_for_a_replaced_string(data: bytes) -> None:
    whole, bits = MemberRewriter(b"m", SLUG, capture=b"a"), MemberRewriter(b"m", SLUG, capture=b"a")
    made = feed_all(whole, [data])
    assert made == feed_all(bits, byte_by_byte(data))
    assert made.replace(SLUG, b"") == data or whole.original is not None


def test_bytes_that_are_passed_on_whole_are_not_copied() -> None:
    rewriter = MemberRewriter(b"model", SLUG)
    rewriter.feed(b'{"x":"')
    piece = b"y" * 1000
    assert rewriter.feed(piece) is piece


def test_a_member_after_the_object_is_left_alone() -> None:
    rewriter = MemberRewriter(b"model", SLUG)
    assert rewriter.feed(b'{} {"model":"x"}') == b'{} {"model":"x"}'
    assert rewriter.is_complete


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("length", [4094, 4095, 9000])
def test_a_value_over_4_kb_is_replaced_and_not_kept(length: int, step: int) -> None:
    value = b'"' + b"v" * length + b'"'
    data = b'{"model":' + value + b',"n":1}'
    rewriter = MemberRewriter(b"model", SLUG)
    assert feed_all(rewriter, cut_at(data, range(0, len(data), step))) == data.replace(value, SLUG)
    assert rewriter.original == (value if len(value) <= 4096 else None)


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize(("limit", "is_kept"), [(21, False), (22, True)], ids=["over", "at"])
def test_a_captured_value_is_kept_up_to_its_limit(limit: int, is_kept: bool, step: int) -> None:
    value = b'{"a":["\\"}",1,2,3,45]}'
    assert len(value) == 22
    data = b'{"usage":' + value + b',"b":1}'
    rewriter = MemberRewriter(b"model", SLUG, capture=b"usage", capture_limit_bytes=limit)
    assert feed_all(rewriter, cut_at(data, range(0, len(data), step))) == data
    assert rewriter.captured == (value if is_kept else None)


def test_a_name_without_end_is_not_kept() -> None:
    rewriter = MemberRewriter(b"model", SLUG)
    rewriter.feed(b'{"')
    for _ in range(100):
        rewriter.feed(b"model" * 1000)
    assert len(rewriter._name) < 100
    assert rewriter.feed(b'":"x"}') == b'":"x"}'
