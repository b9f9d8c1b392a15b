"""The header fields of the proxy's own in a response."""

from __future__ import annotations

import pytest

from hoberproxy.errors import ProxyError, UnavailableError
from hoberproxy.exchange.response_fields import attempts_fields, cors_fields, error_fields
from hoberproxy.protocol.http_head import RequestHead, parse_request_head

NO_RETRY = (b"x-should-retry", b"false")


def head(*fields: bytes) -> RequestHead:
    lines = b"".join(field + b"\r\n" for field in fields)
    return parse_request_head(b"POST /v1 HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")


def test_a_page_reads_a_response_only_where_the_config_names_its_origin() -> None:
    request = head(b"origin: https://a.example")
    fields = dict(cors_fields(["https://a.example"], request))
    assert fields[b"access-control-allow-origin"] == b"https://a.example"
    assert not cors_fields(["https://b.example"], request)
    assert not cors_fields([], request)
    assert not cors_fields(["*"], head())


@pytest.mark.parametrize(("attempts", "value"), [(0, None), (1, None), (2, b"2"), (11, b"11")])
def test_the_number_of_attempts_is_said_where_it_is_more_than_one(
    attempts: int, value: bytes | None
) -> None:
    assert dict(attempts_fields(attempts)).get(b"x-hober-attempts") == value


@pytest.mark.parametrize(
    ("status", "attempts", "is_final"),
    [
        (400, 0, True),
        (404, 1, True),
        (429, 0, False),
        (500, 2, False),
        (502, 1, False),
        (502, 2, True),
        (503, 2, False),
        (504, 2, True),
    ],
)
def test_a_client_tries_again_only_where_it_may_help(
    status: int, attempts: int, is_final: bool
) -> None:
    error = ProxyError("no", code="some_code", status=status)
    fields = error_fields(error, attempts)
    assert (NO_RETRY in fields) is is_final
    assert fields[0] == (b"content-type", b"application/json")


def test_an_error_says_when_to_try_again() -> None:
    error = UnavailableError("later", code="draining", retry_after=1.5)
    fields = dict(error_fields(error, 0))
    assert (fields[b"retry-after"], fields[b"retry-after-ms"]) == (b"2", b"1500")
