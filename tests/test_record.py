"""Records: what counts as a failure, and foreign text made harmless."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.record import CLIENT_CLOSED, COLUMNS, Record, clip_text, escape_client_text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        pytest.param(b"req-42", "req-42", id="printable ASCII stays"),
        pytest.param(b"a b", "a b", id="a space stays"),
        pytest.param(b"a\r\nb", "a\\x0d\\x0ab", id="line ends are escaped"),
        pytest.param(b"\x00\x7f\xff", "\\x00\\x7f\\xff", id="NUL, DEL and high bytes are escaped"),
        pytest.param(b"\\x0a", "\\x5cx0a", id="a backslash cannot fake an escape"),
        pytest.param(b"", "", id="nothing stays nothing"),
    ],
)
def test_client_text_becomes_printable_ascii(raw: bytes, text: str) -> None:
    assert escape_client_text(raw) == text


@pytest.mark.parametrize("length", [125, 126, 127, 128])
def test_client_text_is_never_cut_inside_an_escape(length: int) -> None:
    text = escape_client_text(b"a" * length + b"\n" * 5)
    whole = (128 - length) // 4
    assert text == "a" * length + "\\x0a" * whole


@given(st.binary(max_size=300), st.integers(min_value=0, max_value=200))
def test_escaped_client_text_tells_the_bytes_it_came_from(raw: bytes, limit: int) -> None:
    text = escape_client_text(raw, limit)
    assert len(text) <= limit
    assert re.fullmatch(r"[ -~]*", text)
    back = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), text.encode())
    assert raw.startswith(back)


def test_upstream_text_is_cut_at_its_limit() -> None:
    assert clip_text("x" * 200) == "x" * 128


def test_half_a_surrogate_pair_does_not_survive_clipping() -> None:
    assert clip_text("a\ud800b") == "a?b"


@pytest.mark.parametrize(
    ("status", "code", "failed"),
    [
        pytest.param(200, "", False, id="a finished request is none"),
        pytest.param(200, "upstream_error", True, id="a stream that broke after its 200 is one"),
        pytest.param(404, "model_not_found", True, id="a refusal is one"),
        pytest.param(CLIENT_CLOSED, "client_closed", False, id="a client that left is none"),
        pytest.param(0, "", True, id="a request without an outcome is one"),
    ],
)
def test_a_failure_is_what_failed_the_client(status: int, code: str, failed: bool) -> None:
    assert Record(id="r", started=0.0, status=status, code=code).is_failure is failed


def test_a_record_has_a_value_in_every_field_from_the_beginning() -> None:
    record = Record("a", 1.0)
    assert [record.id, record.started] == [getattr(record, name) for name in COLUMNS[:2]]
    assert not any(getattr(record, name) for name in COLUMNS[2:])


def test_a_field_that_no_record_has_is_refused() -> None:
    with pytest.raises(TypeError, match="got prompt"):
        Record("a", 0.0, prompt="secret")


def test_records_are_equal_if_all_that_is_stored_is() -> None:
    one, other = Record("a", 0.0, cost=3), Record("a", 0.0, cost=3)
    other.is_sealed = True
    assert one == other
    other.overhead = 0.1
    assert one != other
