"""Text of others made harmless: bounded, printable, and quoted only where it can be no prompt."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.text import clip_text, escape_client_text, is_parameter_name


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
    ("name", "is_one"),
    [
        pytest.param("max_tokens", True, id="small letters and underscores"),
        pytest.param("a" * 40, True, id="the longest"),
        pytest.param("a" * 41, False, id="a longer one"),
        pytest.param("", False, id="nothing"),
        pytest.param("Tell me", False, id="words of a prompt"),
        pytest.param("seed\n", False, id="a line end behind it"),
        pytest.param("topK", False, id="a capital"),
        pytest.param("größe", False, id="a letter beyond ASCII"),
    ],
)
def test_a_name_is_a_parameters_only_in_their_spelling(name: str, is_one: bool) -> None:
    assert is_parameter_name(name) is is_one
