"""Heads recognised by their bytes say what the parser reads in them, after any earlier heads."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.protocol.http_head import (
    MAX_RESPONSE_HEAD_BYTES,
    HeadError,
    ResponseHead,
    find_head_end,
    parse_request_head,
    parse_response_head,
)
from hoberproxy.protocol.known_heads import (
    LEARNT,
    UNKNOWN,
    RepeatedHead,
    ResponseHeads,
    repeated_head,
)
from tests.protocol.test_http_head import response

ANSWER = (
    b"HTTP/1.1 200 OK\r\nDate: Wed, 25 Nov 2026 10:00:00 GMT\r\nX-Request-ID: one\r\n"
    b"Content-Type: application/json\r\nContent-Length: 5\r\nKeep-Alive: timeout=7\r\n\r\n"
)


def read_head(heads: ResponseHeads, raw: bytes) -> ResponseHead:
    """As a connection does."""
    if heads.find(raw):
        assert heads.head is not None
        return heads.head
    return heads.parse(raw)


ANOTHER = (
    ANSWER.replace(b"10:00:00", b"10:00:07").replace(b"one", b"two").replace(b": 5", b": 1234")
)
TAUGHT = {"one head": [ANSWER], "two": [ANSWER, ANOTHER], "another one last": [ANOTHER, ANSWER]}
taught = pytest.mark.parametrize("earlier", TAUGHT.values(), ids=TAUGHT.keys())


def facts(head: ResponseHead) -> list[object]:
    own = [head.status, head.headers, head.kind, head.length, head.keep_alive, head.keepalive_hint]
    media = [head.content_type, head.content_encoding]
    return [*own, *media, *(head.get(name) for name, _ in head.headers)]


def assert_read_as_plainly(heads: ResponseHeads, raw: bytes) -> None:
    """With what is known of other heads as without it."""
    try:
        expected = facts(parse_response_head(raw))
    except HeadError as error:
        with pytest.raises(HeadError, match=re.escape(str(error))):
            read_head(heads, raw)
    else:
        assert facts(read_head(heads, raw)) == expected


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((b"", b""), id="nothing"),
        pytest.param((b": 5", b": 17"), id="its length"),
        pytest.param((b"one", b" \tanother "), id="a value"),
        pytest.param((b"one", b"another "), id="a value with a space behind it"),
        pytest.param((b"one", b""), id="a value that is gone"),
        pytest.param((b"X-Request-ID", b"X-REQUEST-ID"), id="the writing of a name"),
        pytest.param((b"X-Request-ID", b"Y"), id="a name"),
        pytest.param((b"200 OK", b"404 Not Found"), id="its status"),
        pytest.param((b"HTTP/1.1 200", b"HTTP/1.0 200"), id="its version"),
        pytest.param((b"timeout=7", b"timeout=3"), id="how long it is kept"),
        pytest.param((b"Keep-Alive: timeout=7", b"Connection: close"), id="that it closes"),
        pytest.param((b"Content-Length: 5", b"Transfer-Encoding: chunked"), id="its framing"),
        pytest.param((b"X-Request-ID: one\r\n", b""), id="a line less"),
        pytest.param((b"one", b"one\r\nX: y"), id="a line more"),
        pytest.param((b"json", b"json; charset=utf-8"), id="its type"),
    ],
)
@taught
def test_a_head_like_an_earlier_one_is_read_as_if_it_were_the_first(
    earlier: list[bytes], change: tuple[bytes, bytes]
) -> None:
    heads = ResponseHeads()
    for each in earlier:
        read_head(heads, each)
    first = read_head(heads, ANSWER)
    before = facts(first)
    other = ANSWER.replace(*change, 1)
    assert facts(read_head(heads, other)) == facts(parse_response_head(other))
    assert facts(first) == before == facts(read_head(heads, ANSWER))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((b": 5", b": 5, 5"), id="two lengths"),
        pytest.param((b": 5", b": +5"), id="a sign"),
        pytest.param((b"Content-Type: application/json", b"Content-Length: 5"), id="twice"),
        pytest.param((b"one", b"a\rb"), id="a bare CR"),
        pytest.param((b"one", b"a\nb"), id="a bare LF"),
        pytest.param((b"one", b"a\x00b"), id="NUL"),
        pytest.param((b"one", b"a\x7fb"), id="DEL"),
        pytest.param((b": 5", b": 9007199254740993"), id="more than 2**53 bytes"),
        pytest.param((b"X-Request-ID:", b"X-Request-ID :"), id="a space before the colon"),
        pytest.param((b"X-Request-ID: ", b" "), id="a folded line"),
        pytest.param((b"one", b"o" * MAX_RESPONSE_HEAD_BYTES), id="too long"),
    ],
)
@taught
def test_a_bad_head_is_refused_behind_a_good_one_too(
    earlier: list[bytes], change: tuple[bytes, bytes]
) -> None:
    heads = ResponseHeads()
    for each in earlier:
        read_head(heads, each)
    bad = ANSWER.replace(*change, 1)
    with pytest.raises(HeadError) as caught:
        read_head(heads, bad)
    assert caught.value.status == 502
    with pytest.raises(HeadError) as plain:
        parse_response_head(bad)
    assert str(caught.value) == str(plain.value)


STREAM = b"HTTP/1.1 200 OK\r\nx-request-id: one\r\ncontent-type: text/event-stream\r\n%b\r\n\r\n"


def test_heads_of_streams_and_of_bodies_are_known_by_turns() -> None:
    heads = ResponseHeads()
    streams = [
        STREAM.replace(b"one", b"s-%d" % n) % b"Transfer-Encoding: chunked" for n in range(9)
    ]
    bodies = [ANSWER.replace(b"one", b"b-%d" % n) for n in range(9)]
    for raw in (*streams[:2], *bodies[:2], *streams[:2]):
        read_head(heads, raw)
    for stream, body in zip(streams[3:], bodies[3:], strict=True):
        for raw in (stream, body):
            assert heads.find(raw + b"what follows") == len(raw)
            assert heads.head is not None
            assert facts(heads.head) == facts(parse_response_head(raw))


def test_what_has_varied_once_may_vary_again() -> None:
    heads = ResponseHeads()
    later = ANSWER.replace(b"10:00:00", b"10:00:07")
    for raw in (ANSWER, later, later.replace(b"one", b"two")):
        read_head(heads, raw)
    other = ANSWER.replace(b"10:00:00", b"10:01:00").replace(b"one", b"three")
    assert heads.find(other) == len(other)


@pytest.mark.parametrize("odd", [b"", b"a\tb", b"\xe9t\xe9"], ids=["empty", "tab", "not ASCII"])
def test_a_head_is_known_by_its_other_values_where_one_is_odd(odd: bytes) -> None:
    heads = ResponseHeads()
    answers = [
        ANSWER.replace(b"application/json\r\n", b"application/json\r\nX-Odd: %b\r\n" % odd).replace(
            b"one", b"%d" % number
        )
        for number in range(3)
    ]
    for raw in answers[:2]:
        read_head(heads, raw)
    assert heads.find(answers[2]) == len(answers[2])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (b"Transfer-Encoding", b"chunked Chunked CHUNKED gzip"),
        (b"Connection", b"keep-alive upgrade close"),
        (b"Keep-Alive", b"timeout=1 timeout=2 timeout=3"),
        (b"Content-Type", b"text/event-stream text/plain application/json"),
        (b"Content-Encoding", b"identity gzip br"),
    ],
)
def test_a_field_that_says_how_the_answer_is_read_is_read_each_time_it_changes(
    name: bytes, values: bytes
) -> None:
    heads = ResponseHeads()
    for value in values.split():
        assert_read_as_plainly(heads, response(b"X-Request-ID: one", name + b": " + value))


def test_of_a_name_that_stands_twice_each_value_is_kept() -> None:
    heads = ResponseHeads()
    for number in range(4):
        assert_read_as_plainly(heads, response(b"X: one", b"Y: two", b"X: %d" % number))


def test_a_known_head_is_found_when_all_of_it_is_there() -> None:
    heads = ResponseHeads()
    for raw in (ANSWER, ANOTHER):
        read_head(heads, raw)
    later = ANOTHER.replace(b"two", b"three").replace(b"1234", b"99")
    assert [heads.find(later[:size]) for size in range(len(later))] == [0] * len(later)
    assert heads.find(later) == len(later)
    assert heads.head is not None
    assert heads.head.length == 99
    assert heads.head.get(b"x-request-id") == b"three"


VALUES = st.sampled_from(
    [b"1", b"22", b"a b", b" a", b"a ", b"", b"a\tb", b":", b"\xe9", b"a\rb", b"\0"]
)
LINES = st.lists(
    st.tuples(
        st.sampled_from([b"A", b"a", b"B", b"Content-Length", b"Content-Type", b"Keep-Alive"]),
        st.sampled_from([b":", b": ", b" :"]),
        VALUES,
    ),
    max_size=4,
)


@given(st.lists(LINES, min_size=1, max_size=5), st.lists(VALUES, min_size=4, max_size=4))
def test_any_heads_are_read_as_by_the_plain_parser(
    sequence: list[list[tuple[bytes, bytes, bytes]]], others: list[bytes]
) -> None:
    heads = ResponseHeads()
    last = sequence[-1]
    # The last one also with other values, twice: once to be learnt from, once to be known.
    changed = [(name, colon, other) for (name, colon, _), other in zip(last, others, strict=False)]
    for lines in (*sequence, changed, last, changed):
        assert_read_as_plainly(heads, response(*(b"".join(line) for line in lines)))


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=6), st.integers(0, 5))
def test_any_change_of_a_head_is_read_as_by_the_plain_parser(
    values: list[bytes], place: int
) -> None:
    heads = ResponseHeads()
    lines = [b"Content-Length: 1", *(b"A%d: b" % i for i in range(len(values)))]
    read_head(heads, response(*lines))
    lines[min(place, len(lines) - 1)] += values[0]
    lines[-1] = b"A0:" + b"".join(values)
    assert_read_as_plainly(heads, response(*lines))


FIELDS = {
    b"X-One": b"one",
    b"Content-Length": b"5",
    b"Transfer-Encoding": None,
    b"Connection": b"keep-alive",
    b"Content-Type": b"application/json",
    b"Content-Encoding": None,
    b"Keep-Alive": b"timeout=7",
    b"X-Two": b"two",
}
CHUNKED = FIELDS | {b"Content-Length": None, b"Transfer-Encoding": b"chunked"}
PLAIN_ODD = b"1 17 007 -1 1,1 chunked Chunked gzip close text/html a:b :".split()
SPACED_ODD = [b"", b" ", b" a", b"a ", b"a\t", b"\ta", b"a\tb", b"1 2", b"a\r\n b"]
BROKEN_ODD = [b"a\rb", b"a\nb", b"\r", b"\n", b"\xe9", b"\0", b"\x7f", b"a\r\nX: y", b"a\r\n\r\n"]
LONG_ODD = [b"9" * digits for digits in (15, 16, 17)]
HOSTILE = st.sampled_from([*PLAIN_ODD, *SPACED_ODD, *BROKEN_ODD, *LONG_ODD]) | st.text(
    "ab1 \t\r\n:,", max_size=5
).map(str.encode)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(list(FIELDS)), st.none() | HOSTILE, max_size=3),
        min_size=2,
        max_size=8,
    ),
    st.sampled_from([FIELDS, CHUNKED]),
    st.sampled_from([b":", b": ", b":\t"]),
)
def test_heads_with_hostile_values_are_read_as_by_the_plain_parser_and_only_when_all_is_there(
    changes: list[dict[bytes, bytes | None]], usual: dict[bytes, bytes | None], colon: bytes
) -> None:
    heads = ResponseHeads()
    for change in changes:
        fields = usual | change
        lines = [name + colon + value for name, value in fields.items() if value is not None]
        raw = response(*lines)
        raw = raw[: find_head_end(raw)]
        assert_read_as_plainly(heads, raw)
        assert {heads.find(raw[:size]) for size in range(len(raw))} == {0}
        assert heads.find(raw + b"7\r\n\r\n") in (0, len(raw))


def test_of_a_server_that_sends_no_head_twice_few_are_learnt_from() -> None:
    heads = ResponseHeads()
    for number in range(UNKNOWN + 2):
        counted = ANSWER.replace(b"timeout=7", b"timeout=7, max=%d" % number)
        assert heads.find(counted) == 0
        heads.parse(counted)
        assert (heads.find(counted) > 0) is (number % UNKNOWN < LEARNT)


# A request's head on a kept connection

ASKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n"
    b"Authorization: Bearer s3\r\n\r\n"
)


def repeated(raw: bytes = ASKED) -> RepeatedHead:
    known = repeated_head(parse_request_head(raw), raw)
    assert known is not None
    return known


@pytest.mark.parametrize("length", [b"0", b"5", b"00017", b"123456789"])
def test_the_same_head_is_found_with_its_length_whatever_follows(length: bytes) -> None:
    known = repeated()
    again = ASKED.replace(b": 5", b": " + length)
    assert known.find(again + b"{}") == len(again)
    assert known.length == parse_request_head(again).length


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((b": 5", b": "), id="no length"),
        pytest.param((b": 5", b": +5"), id="a sign"),
        pytest.param((b": 5", b": 5, 5"), id="two lengths"),
        pytest.param((b": 5", b": 1234567890"), id="more digits than any body has"),
        pytest.param((b"s3", b"s4"), id="another key"),
        pytest.param((b"POST", b"post"), id="another method"),
        pytest.param((b"s3\r\n", b"s3\r\nX: y\r\n"), id="a line more"),
    ],
)
def test_another_head_is_not_the_same(change: tuple[bytes, bytes]) -> None:
    assert repeated().find(ASKED.replace(*change, 1)) == 0


def test_a_head_of_which_something_is_missing_is_not_found_yet() -> None:
    known = repeated()
    assert {known.find(ASKED[:size]) for size in range(len(ASKED))} == {0}


@pytest.mark.parametrize("line", [b"Transfer-Encoding: chunked\r\n", b""])
def test_a_head_without_a_length_is_not_kept(line: bytes) -> None:
    raw = ASKED.replace(b"Content-Length: 5\r\n", line)
    assert repeated_head(parse_request_head(raw), raw) is None


@given(HOSTILE, st.sampled_from([b":", b": ", b":\t"]))
def test_the_same_head_is_found_only_with_the_length_that_the_parser_reads(
    value: bytes, colon: bytes
) -> None:
    asked = ASKED.replace(b"Content-Length: ", b"content-length" + colon)
    known = repeated(asked)
    again = asked.replace(b"length" + colon + b"5", b"length" + colon + value)
    if end := known.find(again + b"{}"):
        assert (end, known.length) == (len(again), parse_request_head(again).length)
    assert {known.find(again[:size]) for size in range(len(again))} == {0}
