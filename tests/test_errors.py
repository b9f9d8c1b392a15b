"""The one form of every error."""

from __future__ import annotations

import json

import pytest

from hoberproxy.errors import (
    AccessError,
    Phase,
    ProxyError,
    RequestError,
    RouteError,
    UnavailableError,
    UpstreamError,
    serialize_error,
    serialize_error_event,
)


@pytest.mark.parametrize(
    ("error", "status", "type"),
    [
        (RequestError("m", code="c"), 400, "invalid_request_error"),
        (AccessError("m", code="c"), 401, "authentication_error"),
        (RouteError("m", code="c"), 404, "invalid_request_error"),
        (UnavailableError("m", code="c"), 503, "upstream_error"),
        (UpstreamError("m", phase=Phase.HEAD), 502, "upstream_error"),
        (ProxyError("m", code="c"), 500, "server_error"),
        (AccessError("m", code="c", status=429, type="rate_limit_error"), 429, "rate_limit_error"),
    ],
)
def test_each_kind_has_its_place_in_the_table(error: ProxyError, status: int, type: str) -> None:
    assert (error.status, error.type) == (status, type)
    assert str(error) == "m"


def test_one_errors_status_is_not_anothers() -> None:
    AccessError("m", code="c", status=403, type="permission_error")
    assert (AccessError("m", code="c").status, AccessError.type) == (401, "authentication_error")


def test_all_four_members_are_always_there() -> None:
    body = json.loads(serialize_error(RequestError("m", code="c")))
    assert body == {
        "error": {"message": "m", "type": "invalid_request_error", "param": None, "code": "c"}
    }


def test_the_field_at_fault_and_metadata_are_told() -> None:
    error = RequestError("m", code="c", param="messages[2].role")
    error.metadata["provider"] = "east"
    body = json.loads(serialize_error(error))["error"]
    assert (body["param"], body["metadata"]) == ("messages[2].role", {"provider": "east"})


def test_openrouters_form_has_the_status_for_a_code() -> None:
    error = RequestError("m", code="c")
    body = json.loads(serialize_error(error, numeric_code=True))["error"]
    assert (body["code"], body["metadata"]) == (400, {"code": "c"})
    assert error.metadata == {}, "rendering leaves the error as it was"


@pytest.mark.parametrize("numeric_code", [True, False])
def test_an_error_event_is_one_line_without_choices(numeric_code: bool) -> None:
    error = UpstreamError("line\nline\r\n\n", phase=Phase.CONTENT)
    event = serialize_error_event(error, numeric_code=numeric_code)
    assert event.startswith(b"data: {") and event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2 and b"\r" not in event
    document = json.loads(event.removeprefix(b"data: "))
    assert list(document) == ["error"]
    assert document == json.loads(serialize_error(error, numeric_code=numeric_code))
