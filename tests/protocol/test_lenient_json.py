"""What upstreams write beyond the strict form is read; what is no JSON is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.protocol.lenient_json import dump_json, load_json
from hoberproxy.relay.completion import parse_completion, serialize_as_stream
from hoberproxy.relay.scanner import StreamScanner

HALF_AN_EMOJI = b'{"id":"1","model":"m","choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}'


@pytest.mark.parametrize(
    ("data", "value"),
    [
        pytest.param(b'"\\ud83d"', "\ud83d", id="a lone surrogate"),
        pytest.param(b"[Infinity]", [float("inf")], id="infinity"),
        pytest.param(b'{"a":1}', {"a": 1}, id="strict JSON"),
    ],
)
def test_is_read(data: bytes, value: Any) -> None:
    assert load_json(data) == value


@pytest.mark.parametrize("data", [b"", b"{", b"<html>", b"\xff", b"[" * 100_000], ids=repr)
def test_is_refused_without_being_quoted(data: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        load_json(data)
    assert not hasattr(caught.value, "doc")


@given(st.text(st.characters(categories=None, exclude_categories=())))
def test_every_text_can_be_written(text: str) -> None:
    assert json.loads(dump_json(text)) == text


def test_half_an_emoji_is_content_and_passes_as_it_came() -> None:
    scanner = StreamScanner("a/b", wants_usage=False)
    event = b"data: %b\n\n" % HALF_AN_EMOJI
    assert scanner.feed(event) == event.replace(b'"m"', b'"a/b"')
    assert scanner.failure is None and scanner.has_content


def test_half_an_emoji_in_a_body_survives_its_way_into_a_stream() -> None:
    body = HALF_AN_EMOJI.replace(b"delta", b"message")
    completion = parse_completion(body, "a/b")
    assert completion.body == body.replace(b'"m"', b'"a/b"')
    event = serialize_as_stream(completion, "a/b", wants_usage=False).split(b"\n\n")[0]
    choice = json.loads(event.removeprefix(b"data: "))["choices"][0]
    assert choice["delta"]["content"] == "\ud83d"
