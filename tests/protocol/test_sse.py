"""Single events: their ends, and what their lines say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.protocol.sse import BLANK_LINE, parse_event, serialize_event

LINE_ENDS = [b"\n", b"\r\n", b"\r"]


@pytest.mark.parametrize(
    ("data", "end"),
    [
        pytest.param(b"a\n\nb", 3, id="LF LF"),
        pytest.param(b"a\r\rb", 3, id="CR CR"),
        pytest.param(b"a\r\n\r\nb", 5, id="CRLF CRLF"),
        pytest.param(b"a\n\r\nb", 4, id="LF CRLF"),
        pytest.param(b"a\r\n\nb", 4, id="CRLF LF"),
        pytest.param(b"a\r\n\rb", 4, id="CRLF CR"),
        pytest.param(b"a\n\rb", 3, id="LF CR"),
        pytest.param(b"a\r\r\nb", 4, id="CR CRLF"),
        pytest.param(b"a\r\nb", None, id="one CRLF is one line end"),
        pytest.param(b"a\nb\rc", None, id="single line ends"),
        pytest.param(b"a\n \n", None, id="a line with a space is not blank"),
    ],
)
def test_a_blank_line_ends_an_event(data: bytes, end: int | None) -> None:
    found = BLANK_LINE.search(data)
    assert (found and found.end()) == end


@pytest.mark.parametrize("line_end", LINE_ENDS, ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize(
    ("lines", "payload"),
    [
        pytest.param([b"data: x"], b"x", id="one line"),
        pytest.param([b"data:x"], b"x", id="no space"),
        pytest.param([b"data:  x "], b" x ", id="one space is taken off, no more"),
        pytest.param([b"data:"], b"", id="empty"),
        pytest.param([b"data"], b"", id="a name without a colon"),
        pytest.param([b"data: a: b"], b"a: b", id="a colon in it"),
        pytest.param([b"data: a", b"data:b", b"data", b"data: "], b"a\nb\n\n", id="several lines"),
        pytest.param([b"id: 1", b"data: a", b": c", b"data: b", b"retry: 5"], b"a\nb", id="others"),
        pytest.param([b"", b"data: x"], b"x", id="a blank line before"),
        pytest.param([b"\xef\xbb\xbfdata: x"], b"x", id="a byte order mark"),
        pytest.param([b": comment"], None, id="a comment"),
        pytest.param([b"retry: 5", b"id"], None, id="no data"),
        pytest.param([b" data: x", b"Data: x", b"data : x"], None, id="names alike"),
        pytest.param([b""], None, id="nothing"),
    ],
)
def test_the_data_of_an_event(lines: list[bytes], payload: bytes | None, line_end: bytes) -> None:
    for ending in (line_end * 2, line_end, b""):
        found = parse_event(line_end.join(lines) + ending)
        assert (found and found.payload) == payload


def test_line_ends_may_differ_within_an_event() -> None:
    found = parse_event(b"data: a\rdata: b\n\n")
    assert found is not None
    assert found.payload == b"a\nb"


@pytest.mark.parametrize(
    ("event", "is_error"),
    [
        (b"event: error\ndata: x\n\n", True),
        (b"data: x\r\nevent:error\r\n\r\n", True),
        (b"event: errors\ndata: x\n\n", False),
        (b"event:  error\ndata: x\n\n", False),
        (b"event: message\ndata: error\n\n", False),
        (b": event: error\ndata: x\n\n", False),
        (b"data: event: error\n\n", False),
    ],
)
def test_only_an_event_of_that_name_is_an_error(event: bytes, is_error: bool) -> None:
    found = parse_event(event)
    assert found is not None
    assert found.is_error is is_error


VALUES = st.binary(max_size=6).filter(lambda value: not {*value} & {*b"\r\n"})


@given(
    st.lists(st.tuples(st.sampled_from([b"data:", b"data: ", b":", b"id: "]), VALUES), max_size=6),
    st.sampled_from(LINE_ENDS),
    st.booleans(),
)
def test_every_byte_of_the_data_is_where_the_event_has_it(
    lines: list[tuple[bytes, bytes]], line_end: bytes, has_mark: bool
) -> None:
    mark = b"\xef\xbb\xbf" if has_mark else b""
    event = mark + b"".join(name + value + line_end for name, value in lines) + line_end
    found = parse_event(event)
    if found is None:
        assert not any(name.startswith(b"data") for name, _ in lines)
        return
    for offset, byte in enumerate(found.payload):
        if byte != ord("\n"):
            assert event[found.place_of(offset)] == byte


@given(st.binary().map(lambda payload: payload.replace(b"\r", b"")))
def test_a_serialized_event_parses_to_its_payload(payload: bytes) -> None:
    event = serialize_event(payload)
    found = parse_event(event)
    assert found is not None
    assert found.payload == payload
    assert [match.end() for match in BLANK_LINE.finditer(event)] == [len(event)]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (b"error: no\n\n", b"no"),
        (b'error:{"code":500}\r\ndata: x\r\n\r\n', b'{"code":500}'),
        (b'{"error":"no"}\n\n', b'{"error":"no"}'),
        (b'data: {\n{"error": 1}\n\n', b'{"error": 1}'),
        (b": error: no\n\n", None),
        (b'data: {"error":"no"}\n\n', None),
        (b"errors: no\n\n", None),
    ],
)
def test_a_line_that_reports_an_error_is_no_data(event: bytes, line: bytes | None) -> None:
    found = parse_event(event)
    assert ((found and found.error_line) or None) == line
    if found is not None and b"data" not in event:
        assert (found.payload, found.starts) == (b"", ())


def test_an_event_of_that_name_is_an_error_without_data_too() -> None:
    found = parse_event(b"event: error\n\n")
    assert found is not None
    assert (found.is_error, found.payload) == (True, b"")
