"""Refusals of upstreams: what they mean for falling over, and what a client may read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.dialects.error_document import MAX_MESSAGE_LENGTH
from hoberproxy.errors import Phase, UpstreamError, serialize_error
from hoberproxy.upstream.error_response import (
    choose_error,
    judge_document,
    parse_error_response,
    parse_retry_after,
)

NOW = 1_700_000_000.0


def headers(**values: bytes) -> Callable[[bytes], bytes | None]:
    return {name.replace("_", "-").encode(): value for name, value in values.items()}.get


def refuse(status: int, body: bytes = b"", **values: bytes) -> UpstreamError:
    return parse_error_response("east", status, headers(**values), body, NOW)


# What reaches the client


@pytest.mark.parametrize(
    ("status", "client_status", "type", "code"),
    [
        (302, 502, "upstream_error", "upstream_error"),
        (400, 400, "invalid_request_error", "invalid_value"),
        (401, 502, "upstream_error", "upstream_error"),
        (402, 502, "upstream_error", "upstream_error"),
        (403, 502, "upstream_error", "upstream_error"),
        (404, 502, "upstream_error", "upstream_error"),
        (405, 502, "upstream_error", "upstream_error"),
        (408, 502, "upstream_error", "upstream_error"),
        (413, 413, "invalid_request_error", "body_too_large"),
        (415, 502, "upstream_error", "upstream_error"),
        (422, 422, "invalid_request_error", "invalid_value"),
        (429, 429, "rate_limit_error", "rate_limit_exceeded"),
        (500, 502, "upstream_error", "upstream_error"),
        (503, 502, "upstream_error", "upstream_error"),
        (529, 502, "upstream_error", "upstream_error"),
    ],
)
def test_the_status_that_a_client_gets(
    status: int, client_status: int, type: str, code: str
) -> None:
    error = refuse(status)
    assert (error.status, error.type, error.code, error.param) == (client_status, type, code, None)
    assert (error.upstream_status, error.phase) == (status, Phase.HEAD)
    assert "east" in error.message


@pytest.mark.parametrize("status", [301, 401, 402, 403, 404, 408, 429, 500, 502, 503, 504, 529])
def test_another_endpoint_may_do_better(status: int) -> None:
    error = refuse(status)
    assert (error.is_retryable, error.is_refusal) == (True, False)


@pytest.mark.parametrize("status", [400, 405, 409, 413, 415, 422, 451])
def test_only_another_model_may_do_better(status: int) -> None:
    error = refuse(status)
    assert (error.is_retryable, error.is_refusal) == (False, True)


SECRET = "Incorrect API key provided: sk-proj-1234"
SECRET_BODY = json.dumps(
    {"error": {"message": SECRET, "param": SECRET, "code": SECRET, "type": SECRET}}
).encode()


@pytest.mark.parametrize("body", [SECRET_BODY, SECRET.encode()], ids=["JSON", "plain text"])
@pytest.mark.parametrize("status", [301, 401, 402, 403, 404, 405, 408, 429, 500, 503, 529])
def test_the_upstreams_words_stay_here(status: int, body: bytes) -> None:
    error = refuse(status, body)
    for text in (error.message, str(error), error.code, str(error.param), error.type):
        assert "sk-" not in text


# Forms of a body

FORMS = [
    pytest.param({"error": {"message": "why"}}, id="OpenAI"),
    pytest.param({"error": {"message": "why", "code": 400, "type": "x"}}, id="numeric code"),
    pytest.param([{"error": {"code": 400, "message": "why", "status": "X"}}], id="Gemini's array"),
    pytest.param({"error": "why"}, id="a string for the error"),
    pytest.param({"object": "error", "message": "why", "code": 400}, id="vLLM"),
    pytest.param({"type": "error", "error": {"type": "x", "message": "why"}}, id="Anthropic"),
    pytest.param({"detail": "why"}, id="FastAPI"),
    pytest.param({"detail": [{"loc": ["body", 1], "msg": "why", "type": "x"}]}, id="pydantic"),
    pytest.param({"error": {"detail": "why"}}, id="a detail within"),
    pytest.param({"detail": {"msg": "why"}}, id="a detail that is an object"),
    pytest.param({"errors": [{"code": 5007, "message": "why"}]}, id="Cloudflare"),
    pytest.param(
        {"object": "error", "message": {"detail": [{"loc": ["body"], "msg": "why"}]}}, id="Mistral"
    ),
    pytest.param("why", id="a JSON string"),
    pytest.param({"error": {"message": "  why \n"}}, id="white space around"),
]


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("document", FORMS)
def test_the_message_is_found_in_every_form(document: object, status: int) -> None:
    error = refuse(status, json.dumps(document).encode())
    assert error.message == "why"
    assert error.code == refuse(status).code


@pytest.mark.parametrize(
    "document",
    [
        {"error": {"message": "why", "param": "messages[0].role"}},
        {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "why"}]},
        {"message": {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "why"}]}},
    ],
    ids=["OpenAI", "FastAPI", "Mistral"],
)
def test_the_field_at_fault_is_named_in_our_own_form(document: object) -> None:
    assert refuse(422, json.dumps(document).encode()).param == "messages[0].role"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><h1>400 Bad Request</h1></html>",
        b"Bad Request",
        b'{"error":{"message":"cut',
        b"null",
        b"[]",
        b"[[]]",
        b"7",
        b"data: [DONE]\n\n",
        b"{}",
        b'{"error":null}',
        b'{"error":[]}',
        b'{"error":{}}',
        b'{"error":{"message":""}}',
        b'{"error":{"message":" \\n"}}',
        b'{"error":{"message":{"text":"x"}}}',
        b'{"detail":[]}',
        b'{"detail":[7]}',
        b'{"message":7}',
        b"\xff\xfe",
    ],
)
def test_without_a_message_the_words_are_ours(body: bytes) -> None:
    error = refuse(400, body)
    assert error.message == "provider east answered with status 400"
    assert (error.code, error.param) == ("invalid_value", None)


def test_param_and_code_are_passed_on() -> None:
    body = {"message": "why", "param": "messages[0]", "code": "context_length_exceeded"}
    error = refuse(400, json.dumps({"error": body}).encode())
    assert (error.param, error.code) == ("messages[0]", "context_length_exceeded")


@pytest.mark.parametrize("value", [None, 7, [], {}, ""], ids=repr)
def test_a_code_or_param_of_another_type_is_left_out(value: object) -> None:
    error = refuse(400, json.dumps({"error": {"message": "why", "code": value}}).encode())
    assert error.code == "invalid_value"


def test_what_is_shown_is_one_line_of_bounded_length() -> None:
    body = {"message": "a\n\tb  " + "x" * 5000, "param": "p" * 500, "code": "c" * 500}
    error = refuse(422, json.dumps({"error": body}).encode())
    assert error.message.startswith("a b x")
    assert len(error.message) == MAX_MESSAGE_LENGTH
    assert (len(error.param or ""), len(error.code)) == (128, 64)


def test_half_a_surrogate_is_no_failure() -> None:
    error = refuse(400, rb'{"error":{"message":"why \ud83d","param":"p\ud83d","code":"c\ud83d"}}')
    assert (error.message, error.param, error.code) == ("why ?", "p?", "c?")
    assert serialize_error(error)


# What is ours, although the upstream says 400

KEY = "sk-proj-T3BlbkFJ9aQz0x7RwmKdUe4Yh2Lp8"
GEMINI = {  # https://github.com/cequence-io/openai-scala-client/issues/109
    "error": {
        "code": 400,
        "message": "API key not valid. Please pass a valid API key.",
        "status": "INVALID_ARGUMENT",
        "details": [{"reason": "API_KEY_INVALID", "domain": "googleapis.com"}],
    }
}
OURS = {
    "a bad key": GEMINI,
    "a bad key in an array": [GEMINI],
    "a bad key within": {"error": {"message": json.dumps(GEMINI), "code": 400}},
    "a bad key, shown": {"error": {"message": f"no such key: {KEY}"}},
    "a piece of the key": {"error": {"message": f"{KEY[:12]} may not do this"}},
    "a key behind a mask": {"error": f"key sk-pr***{KEY[-4:]} may not do this"},
    "a key elsewhere": {"error": {"message": "no"}, "request": {"headers": f"Bearer {KEY}"}},
    "a key as a code": {"error": {"message": "no", "code": KEY}},
    "a key as a param": {"error": {"message": "no", "param": KEY}},
    "no balance": {"error": {"message": "Your credit balance is too low to access the API."}},
}


@pytest.mark.parametrize("document", OURS.values(), ids=OURS)
@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("within", [False, True], ids=["a status", "within a 200"])
def test_what_speaks_of_our_key_goes_to_another_endpoint_and_stays_here(
    document: object, status: int, within: bool
) -> None:
    if within:
        error = broken()
        judge_document(error, "east", with_status(document, status), (KEY,))
    else:
        body = json.dumps(document).encode()
        error = parse_error_response("east", status, headers(), body, NOW, (KEY,))
    assert (error.is_retryable, error.is_refusal) == (True, False)
    assert (error.status, error.type, error.code) == (502, "upstream_error", "upstream_error")
    assert error.upstream_status == status
    texts = f"{error.message} {error} {error.param} {serialize_error(error).decode()}"
    assert not any(word in texts for word in ("API key", "sk-", KEY[-4:], "balance"))


def test_without_a_key_of_ours_nothing_is_taken_for_it() -> None:
    assert refuse(400, b'{"error":{"message":"sk-proj-T3BlbkFJ is too long"}}').status == 400


# An error within a 200


def broken(phase: Phase = Phase.OPENING) -> UpstreamError:
    return UpstreamError(
        "provider east: the upstream sent an error event",
        phase=phase,
        upstream_status=200,
        is_retryable=phase is not Phase.CONTENT,
    )


def with_status(document: object, status: int) -> object:
    """`document` with a status within, whatever it said."""
    if isinstance(document, list):
        return [with_status(document[0], status)]
    assert isinstance(document, dict)
    return document | {"code": status, "error": without_code(document["error"])}


def without_code(error: object) -> object:
    if isinstance(error, dict) and isinstance(error.get("code"), int):
        return {name: value for name, value in error.items() if name != "code"}
    return error


@pytest.mark.parametrize(
    ("status", "client_status", "is_retryable", "is_refusal"),
    [
        (400, 400, False, True),
        (401, 502, True, False),
        (402, 502, True, False),
        (403, 502, True, False),
        (404, 502, True, False),
        (408, 502, True, False),
        (413, 413, False, True),
        (422, 422, False, True),
        (429, 429, True, False),
        (451, 502, False, True),
        (500, 502, True, False),
        (503, 502, True, False),
        (529, 502, True, False),
        (None, 502, True, False),
    ],
)
def test_a_status_within_a_200_means_what_it_says(
    status: int | None, client_status: int, is_retryable: bool, is_refusal: bool
) -> None:
    error = broken()
    judge_document(error, "east", {"error": {"message": "why", "code": status}})
    assert error.status == client_status
    assert (error.is_retryable, error.is_refusal) == (is_retryable, is_refusal)
    assert error.upstream_status == (status or 200)
    assert ("why" in error.message) == (client_status in (400, 413, 422))


def test_after_the_first_content_only_the_record_is_told_the_status() -> None:
    error = broken(Phase.CONTENT)
    judge_document(error, "east", {"error": {"message": "why", "code": 400}})
    assert (error.status, error.code, error.upstream_status) == (502, "upstream_error", 400)
    assert not error.is_retryable
    assert "why" not in error.message


# A prompt that is too long


@pytest.mark.parametrize(
    ("status", "document"),
    [
        # https://github.com/oobabooga/textgen/issues/7257
        (400, {"error": {"code": 400, "message": "no", "type": "exceed_context_size_error"}}),
        # https://github.com/ggml-org/llama.cpp/pull/15780
        (500, {"error": {"code": 500, "message": "no", "type": "exceed_context_size_error"}}),
        # https://github.com/llm-d/llm-d-inference-sim/issues/82
        (
            400,
            {
                "object": "error",
                "message": "This model's maximum context length is 8 tokens. no",
                "type": "BadRequestError",
                "param": None,
                "code": 400,
            },
        ),
        # https://github.com/evalstate/fast-agent/issues/621
        (
            400,
            {
                "error": {
                    "message": "This model's maximum context length is 8 tokens. no",
                    "code": "invalid_request_error",
                }
            },
        ),
        (400, {"error": {"message": "no", "code": "context_length_exceeded", "param": "messages"}}),
    ],
)
def test_a_prompt_that_is_too_long_has_the_code_by_which_clients_compact(
    status: int, document: dict[str, object]
) -> None:
    within = broken()
    judge_document(within, "east", document)
    for error in (refuse(status, json.dumps(document).encode()), within):
        assert (error.status, error.type) == (400, "invalid_request_error")
        assert (error.code, error.param) == ("context_length_exceeded", "messages")
        assert error.recorded_code == "context_length_exceeded"
        assert error.message.endswith("no")
        assert (error.is_retryable, error.is_refusal) == (False, True)


def test_a_rate_limit_is_no_prompt_that_is_too_long() -> None:
    error = refuse(429, b'{"error":{"message":"prompt is too long","code":"rate_limit_exceeded"}}')
    assert (error.status, error.code) == (429, "rate_limit_exceeded")


# Of several errors


def of_status(status: int, name: str = "") -> UpstreamError:
    error = refuse(status)
    error.message = name
    return error


@pytest.mark.parametrize(
    ("statuses", "chosen"),
    [
        ([400], 0),
        ([503], 0),
        ([503, 500], 1),
        ([400, 503], 0),
        ([400, 401], 0),
        ([400, 404, 500], 0),
        ([500, 400, 503], 1),
        ([400, 422], 0),
        ([451, 413, 503], 1),
        ([503, 451], 1),
        ([400, 429], 1),
        ([429, 400], 1),
        ([429, 503], 1),
        ([400, 429, 503], 1),
        ([429, 400, 503], 1),
        ([400, 429, 400], 1),
    ],
    ids=str,
)
def test_which_of_several_errors_a_client_gets(statuses: list[int], chosen: int) -> None:
    errors = [of_status(status) for status in statuses]
    assert choose_error(errors) is errors[chosen]


def test_our_own_troubles_with_a_400_are_told_last() -> None:
    ours = parse_error_response("east", 400, headers(), json.dumps(GEMINI).encode(), NOW, (KEY,))
    theirs, down = of_status(400), of_status(503)
    assert choose_error([ours, theirs, down]) is theirs
    assert choose_error([ours, down]) is down


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["error", "message", "detail", "msg", "code", "param"]), inner
        )
    ),
    max_leaves=10,
)


@given(st.binary() | JSON.map(lambda document: json.dumps(document).encode()))
def test_no_body_is_too_strange(body: bytes) -> None:
    error = refuse(400, body)
    assert (error.status, error.is_refusal) == (400, True)
    assert error.message
    assert error.code


# When to come again


def http_date(seconds: float) -> bytes:
    return format_datetime(datetime.fromtimestamp(seconds, UTC), usegmt=True).encode()


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param({"retry_after": b"7"}, 7.0, id="seconds"),
        pytest.param({"retry_after": b" 7 "}, 7.0, id="white space"),
        pytest.param({"retry_after": b"0.5"}, 0.5, id="part of a second"),
        pytest.param({"retry_after": b"0"}, 0.0, id="at once"),
        pytest.param({"retry_after_ms": b"1500", "retry_after": b"7"}, 1.5, id="milliseconds"),
        pytest.param({"retry_after_ms": b"x", "retry_after": b"7"}, 7.0, id="bad milliseconds"),
        pytest.param({"retry_after": http_date(NOW + 90)}, 90.0, id="a date"),
        pytest.param({"retry_after": http_date(NOW - 90)}, None, id="a date that is over"),
        pytest.param({"retry_after": http_date(NOW + 90_000)}, None, id="a date too far"),
        pytest.param(
            {"retry_after": b"Mon, 01 Jan 99999999999999 00:00:00 GMT"}, None, id="no year at all"
        ),
        pytest.param({"retry_after": b"-1"}, None, id="negative"),
        pytest.param({"retry_after": b"86400"}, 86400.0, id="a day"),
        pytest.param({"retry_after": b"86401"}, None, id="more than a day"),
        pytest.param({"retry_after": b"nan"}, None, id="no number"),
        pytest.param({"retry_after": b"inf"}, None, id="endless"),
        pytest.param({"retry_after": b"soon"}, None, id="a word"),
        pytest.param({"retry_after": b"\xff"}, None, id="no ASCII"),
        pytest.param({"retry_after": b""}, None, id="empty"),
    ],
)
def test_when_to_come_again(values: dict[str, bytes], seconds: float | None) -> None:
    assert parse_retry_after(headers(**values), NOW) == seconds


DATES = st.from_regex(
    rb"[A-Z][a-z]{2}, [0-9]{1,20} (Jan|Feb) -?[0-9]{1,25} [0-9:]{1,9} ([+-][0-9]{1,9}|GMT)\Z"
)


@given(st.binary(max_size=40) | DATES)
def test_no_value_of_it_is_too_strange(value: bytes) -> None:
    seconds = parse_retry_after(headers(retry_after=value), NOW)
    assert seconds is None or 0 <= seconds <= 86400


@pytest.mark.parametrize(
    ("status", "seconds"), [(429, 7.0), (503, 7.0), (500, None), (400, None), (401, None)]
)
def test_only_a_full_or_busy_upstream_says_when(status: int, seconds: float | None) -> None:
    assert refuse(status, retry_after=b"7").retry_after == seconds
