"""Every error that the proxy answers with, and their one JSON form.

    ProxyError
    ├── RequestError      the client's request is wrong (4xx)
    ├── AccessError       the caller may not do it (401, 402, 403, 429)
    ├── RouteError        no endpoint of the catalog serves it (404)
    ├── UnavailableError  this proxy does not take it now (503)
    └── UpstreamError     a model server answered badly, late or not at all

Messages never hold a key, a prompt or an answer: they reach logs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson


class ProxyError(Exception):
    """A failure with its place in the contract's table of errors.

    `message` says what was expected, what came and what to do. `param` is the dotted path of the
    field at fault. `retry_after` is in seconds.
    """

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        if status is not None:
            self.status = status
        if type is not None:
            self.type = type
        self.metadata: dict[str, Any] = {}

    @property
    def recorded_code(self) -> str:
        """The code as records, logs and lists of failures have it: always one of the proxy's."""
        return self.code


class RequestError(ProxyError):
    """The request is at fault: wrong head, body, path or field."""

    status = 400
    type = "invalid_request_error"


class AccessError(ProxyError):
    """The key is missing, wrong, spent, or may not do this."""

    status = 401
    type = "authentication_error"


class RouteError(ProxyError):
    """No model or endpoint of the catalog serves the request."""

    status = 404
    type = "invalid_request_error"


class UnavailableError(ProxyError):
    """This proxy does not take the request now: draining or overloaded."""

    status = 503
    type = "upstream_error"


class Phase(Enum):
    """How far an attempt had come when it failed."""

    CONNECT = "connect"
    HEAD = "head"  # request sent, no response head yet
    OPENING = "opening"  # head seen, no content yet
    CONTENT = "content"  # content has reached the client: nothing is retried
    BODY = "body"  # a non-streaming body


class UpstreamError(ProxyError):
    """An attempt on an endpoint failed.

    `upstream_status` is the status that the upstream sent, None without one. `is_retryable` says
    that another endpoint may do better; `is_refusal` that the upstream has read the request and
    refuses it (another 4xx), which only another model may change.
    """

    status = 502
    type = "upstream_error"

    def __init__(
        self,
        message: str,
        *,
        phase: Phase,
        code: str = "upstream_error",
        upstream_status: int | None = None,
        is_retryable: bool = True,
        is_refusal: bool = False,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(
            message, code=code, status=status, type=type, param=param, retry_after=retry_after
        )
        self.phase = phase
        self.upstream_status = upstream_status
        self.is_retryable = is_retryable
        self.is_refusal = is_refusal
        self.refused_option: str | None = None  # a member that the proxy put in, not the client
        self.is_doubtful = False  # judged by words that may be the client's own
        self.own_code: str | None = None  # for records, where `code` is the upstream's

    @property
    def recorded_code(self) -> str:
        """The proxy's own code, also where `code` is the upstream's text."""
        return self.own_code or self.code


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A failed attempt for records and clients: numbers and codes, no text of the upstream."""

    provider: str
    status: int | None
    code: str
    phase: str
    milliseconds: int


def error_object(error: ProxyError, *, numeric_code: bool = False) -> dict[str, Any]:
    """Return the contract's error object; `numeric_code`: in OpenRouter's form (/api/v1)."""
    metadata = dict(error.metadata)
    code: str | int = error.code
    if numeric_code:
        metadata["code"] = error.code
        code = error.status
    body: dict[str, Any] = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": code,
    }
    if metadata:
        body["metadata"] = metadata
    return {"error": body}


def serialize_error(error: ProxyError, *, numeric_code: bool = False) -> bytes:
    """Return the JSON body of a response with `error`."""
    return orjson.dumps(error_object(error, numeric_code=numeric_code))


def serialize_error_event(error: ProxyError, *, numeric_code: bool = False) -> bytes:
    """Return the last event of a failed stream; no SDK takes it for an end without `choices`."""
    return b"data: %b\n\n" % serialize_error(error, numeric_code=numeric_code)


def retry_headers(error: ProxyError) -> list[tuple[bytes, bytes]]:
    """Return the fields that say when to try again, as the SDKs read them; none without a time."""
    if error.retry_after is None:
        return []
    return [
        (b"retry-after", b"%d" % math.ceil(error.retry_after)),
        (b"retry-after-ms", b"%d" % math.ceil(error.retry_after * 1000)),
    ]
