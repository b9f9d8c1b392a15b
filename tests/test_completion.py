"""Whole completions: what counts as one, its name for the model, and its form as a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hoberproxy.completion import (
    CompletionError,
    parse_completion,
    serialize_as_stream,
)
from hoberproxy.stream import StreamScanner
from hoberproxy.usage import Usage

SLUG = "vendor/catalog-name"
DOCUMENT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1763900000,
    "model": "upstream-name",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": 'Hi "model":"x"', "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    "system_fingerprint": "fp_1",
}


def body(**changes: Any) -> bytes:
    return json.dumps(DOCUMENT | changes).encode()


def events(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n")
    payloads = [raw.removeprefix(b"data: ") for raw in data[:-2].split(b"\n\n")]
    assert payloads.pop() == b"[DONE]"
    return [json.loads(payload) for payload in payloads]


def as_stream(wants_usage: bool = False, **changes: Any) -> list[Any]:
    completion = parse_completion(body(**changes), SLUG)
    return events(serialize_as_stream(completion, SLUG, wants_usage=wants_usage))


# Reading


def test_a_completion_tells_its_usage_finish_reason_and_names() -> None:
    completion = parse_completion(body(), SLUG)
    assert completion.usage == Usage(9, 3)
    assert completion.finish_reason == "stop"
    assert (completion.upstream_model, completion.upstream_id) == ("upstream-name", "chatcmpl-1")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(
            b' {"choices":[1.0,{"text":"x"}] ,\t"model" : "m" , "x":{"model":"m"}, "n":1e2}\n',
            b' {"choices":[1.0,{"text":"x"}] ,\t"model" : "%b" , "x":{"model":"m"}, "n":1e2}\n',
            id="all else byte for byte",
        ),
        pytest.param(
            b'{"m\\u006fdel":"m","choices":[{"text":"\\ud83d\\ude00"}]}',
            b'{"m\\u006fdel":"%b","choices":[{"text":"\\ud83d\\ude00"}]}',
            id="a name with escapes",
        ),
        pytest.param(
            b'{"model":null,"choices":[0,{"text":"x"}]}',
            b'{"model":null,"choices":[0,{"text":"x"}]}',
            id="null",
        ),
        pytest.param(b'{"choices":[{"text":1}]}', b'{"choices":[{"text":1}]}', id="no model"),
    ],
)
def test_only_the_models_name_is_replaced(raw: bytes, expected: bytes) -> None:
    assert parse_completion(raw, SLUG).body == expected.replace(b"%b", SLUG.encode())


@pytest.mark.parametrize(
    "end", [b"data: [DONE]\n\n", b"\n\ndata: [DONE]\n\n", b"\r\n\r\ndata:[DONE]\r\n\r\n"], ids=repr
)
def test_done_behind_a_completion_is_left_out(end: bytes) -> None:
    # decolua/9router#3492: a whole completion, labelled a stream, and [DONE].
    completion = parse_completion(body() + end, SLUG)
    assert completion.body == parse_completion(body(), SLUG).body
    with pytest.raises(CompletionError, match="a JSON body"):
        parse_completion(body()[:-1] + end, SLUG)
    with pytest.raises(CompletionError, match="a JSON body"):
        parse_completion(end, SLUG)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        pytest.param(b"", "a JSON body", id="nothing"),
        pytest.param(body()[:-1], "a part of one", id="a cut body"),
        pytest.param(b"<html>secret</html>", "a JSON body", id="HTML"),
        pytest.param(b'"secret"', "a JSON object", id="a string"),
        pytest.param(b"[]", "a JSON object", id="an array"),
        pytest.param(b"null", "a JSON object", id="null"),
        pytest.param(b"{}", "choices", id="no choices"),
        pytest.param(body(choices=[]), "choices", id="empty choices"),
        pytest.param(body(choices=None), "choices", id="null for choices"),
        pytest.param(body(choices={"0": "secret"}), "choices", id="choices of another type"),
    ],
)
def test_what_is_no_completion_is_refused_without_its_text(raw: bytes, words: str) -> None:
    with pytest.raises(CompletionError, match=words) as caught:
        parse_completion(raw, SLUG)
    assert not caught.value.is_error_body
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "raw", [body(error={"message": "secret"}), b'{"error":"secret"}', b'{"error":{"code":500}}']
)
def test_an_error_with_status_200_is_an_error(raw: bytes) -> None:
    with pytest.raises(CompletionError) as caught:
        parse_completion(raw, SLUG)
    assert caught.value.is_error_body
    assert "secret" not in str(caught.value)


def test_a_null_error_is_none() -> None:
    assert parse_completion(body(error=None), SLUG).finish_reason == "stop"


@pytest.mark.parametrize(
    "error", [{}, "", 0, {"message": None, "code": None}, {"code": 0}], ids=str
)
def test_an_error_that_says_nothing_is_none(error: Any) -> None:
    choice = DOCUMENT["choices"][0] | {"error": error}
    assert parse_completion(body(error=error, choices=[choice]), SLUG).finish_reason == "stop"
    (chunk,) = as_stream(error=error, choices=[choice])
    assert "error" not in chunk and "error" not in chunk["choices"][0]


STRANGE = [None, "text", [], {"finish_reason": None}, {}, {"message": None}, {"message": {}}]


@pytest.mark.parametrize("choice", STRANGE, ids=repr)
def test_a_strange_choice_has_no_finish_reason(choice: Any) -> None:
    answer = {"message": {"content": "x"}}
    assert parse_completion(body(choices=[choice, answer]), SLUG).finish_reason == ""
    (chunk,) = as_stream(choices=[choice, answer])
    assert chunk["choices"][-1]["delta"]["content"] == "x"
    others = chunk["choices"][:-1]
    if isinstance(choice, dict):
        assert others == [{"index": 0, "delta": {}, "finish_reason": None}]
    else:
        assert others == [], "no client reads anything but objects there"


@pytest.mark.parametrize(
    "choice", [*STRANGE, {"message": {"role": "assistant", "content": ""}}], ids=repr
)
def test_choices_without_an_answer_are_no_completion(choice: Any) -> None:
    with pytest.raises(CompletionError, match="expected an answer") as caught:
        parse_completion(body(choices=[choice]), SLUG)
    assert not caught.value.is_error_body


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": "x"}},
        {"message": {"content": None, "reasoning_content": "x"}},
        {"message": {"tool_calls": [{"id": "1"}]}},
        {"message": {"role": "assistant", "content": ""}, "finish_reason": "stop"},
        {"finish_reason": "content_filter"},
        {"delta": {"content": "x"}},
        {"text": "x"},
    ],
    ids=repr,
)
def test_an_answer_says_something_or_has_a_finish_reason(choice: dict[str, Any]) -> None:
    assert parse_completion(body(choices=[choice]), SLUG).document["choices"] == [choice]


def test_a_number_of_minimax_is_an_error_beside_an_answer_too() -> None:
    said = {"status_code": 1027, "status_msg": "output new_sensitive"}
    with pytest.raises(CompletionError) as caught:
        parse_completion(body(base_resp=said), SLUG)
    assert caught.value.is_error_body
    assert parse_completion(body(base_resp={"status_code": 0, "status_msg": ""}), SLUG).usage


# As a stream


def test_one_chunk_says_what_the_completion_said() -> None:
    (chunk,) = as_stream()
    expected = DOCUMENT | {
        "object": "chat.completion.chunk",
        "model": SLUG,
        "choices": [
            {
                "index": 0,
                "delta": DOCUMENT["choices"][0]["message"],
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    del expected["usage"]
    assert chunk == expected


def test_usage_comes_in_an_event_of_its_own_if_asked_for() -> None:
    chunk, last = as_stream(wants_usage=True)
    assert "usage" not in chunk
    assert (last["choices"], last["usage"]) == ([], DOCUMENT["usage"])
    assert (last["id"], last["model"]) == (chunk["id"], SLUG)


def test_usage_that_is_not_there_is_not_invented() -> None:
    assert len(as_stream(wants_usage=True, usage=None)) == 1


# What servers say in `index` of a whole answer's calls: sgl-project/sglang#13143 and #6715.
@pytest.mark.parametrize(
    "said", [{}, {"index": None}, {"index": 0}, {"index": 7}, {"index": "1"}], ids=repr
)
def test_tool_calls_are_numbered_whatever_the_server_says(said: dict[str, Any]) -> None:
    calls = [{"id": "a", "function": {"name": "f"}} | said, {"id": "b"} | said, None, said]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    (chunk,) = as_stream(choices=[{"index": 0, "message": message, "finish_reason": "tool_calls"}])
    delta = chunk["choices"][0]["delta"]
    assert delta == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"index": 0, "id": "a", "function": {"name": "f"}},
            {"index": 1, "id": "b"},
            {"index": 2},
        ],
    }
    assert type(delta["tool_calls"][0]["index"]) is int


def test_a_message_that_is_called_as_in_a_stream_is_passed_on() -> None:
    message = {"role": "assistant", "content": "x"}
    (chunk,) = as_stream(choices=[{"index": 0, "delta": message, "finish_reason": "stop"}])
    assert chunk["choices"] == [{"index": 0, "delta": message, "finish_reason": "stop"}]


def test_members_that_are_null_are_left_out_around_a_delta() -> None:
    answer = {"index": 0, "message": {"content": "x"}, "logprobs": None, "stop_reason": None}
    (chunk,) = as_stream(choices=[answer], service_tier=None, kv_transfer_params=None)
    assert "service_tier" not in chunk and "kv_transfer_params" not in chunk
    (choice,) = chunk["choices"]
    assert set(choice) == {"index", "delta", "logprobs", "finish_reason"}


def test_members_that_clients_refuse_as_null_are_left_out_of_a_delta() -> None:
    nulls = ("tool_calls", "function_call", "audio", "reasoning_content", "annotations")
    message = {"content": "x", "refusal": None, **dict.fromkeys(nulls)}
    (chunk,) = as_stream(choices=[{"index": 0, "message": message}], error=None)
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": "x", "refusal": None}
    assert "error" not in chunk and "usage" not in chunk


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([1, 0], [1, 0]),
        ([0, 0], [0, 1]),
        ([None, None], [0, 1]),
        ([True, 1], [0, 1]),
    ],
)
def test_choices_are_numbered_where_the_servers_numbers_do_not_tell_them_apart(
    said: list[Any], expected: list[int]
) -> None:
    choices = [{"index": index, "message": {"content": "x"}} for index in said]
    (chunk,) = as_stream(choices=choices)
    assert [choice["index"] for choice in chunk["choices"]] == expected


@pytest.mark.parametrize("wants_usage", [True, False])
def test_the_scanner_takes_it_for_a_finished_stream(wants_usage: bool) -> None:
    completion = parse_completion(body(), SLUG)
    data = serialize_as_stream(completion, SLUG, wants_usage=True)
    scanner = StreamScanner(SLUG, wants_usage=wants_usage)
    passed = scanner.feed(data) + scanner.feed_eof()
    assert passed == serialize_as_stream(completion, SLUG, wants_usage=wants_usage)
    assert (scanner.is_done, scanner.finish_reason, scanner.usage) == (True, "stop", Usage(9, 3))


@pytest.mark.parametrize("broken", [{"error": {"code": 502}}, {"finish_reason": "error"}], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_an_error_in_any_choice_is_an_error(broken: dict[str, Any], place: int) -> None:
    choices: list[Any] = [{"finish_reason": "stop", "message": {}}]
    choices.insert(place, broken)
    with pytest.raises(CompletionError) as caught:
        parse_completion(json.dumps({"choices": choices}).encode(), SLUG)
    assert caught.value.is_error_body
