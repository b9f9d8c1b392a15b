"""Judges an upstream's error response: what it means for failover, and what the client gets.

Only 400, 413, 422 and 429 reach a client as such, and of these all but 429 with their message; any
other becomes a 502 in the proxy's words, so that no client reads that the *proxy's* key is wrong.
The same holds for an error that an answer of status 200 carries. The JSON of an error is read by
dialects/error_document.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final

from ..dialects.error_document import ErrorDocument, load_error, read_error
from ..errors import Phase, UpstreamError
from ..protocol.json_bytes import dump_json
from .credentials import concerns_account, holds_secret, may_be_quoted

MAX_BODY_BYTES: Final = 64 * 1024
MAX_RETRY_AFTER: Final = 24 * 3600.0

# What another endpoint of the same model may do better.
_RETRYABLE_STATUSES: Final = frozenset((401, 402, 403, 404, 408, 429))
_PASSED_STATUSES: Final = frozenset((400, 413, 422))
_PASSED_CODES: Final = {400: "invalid_value", 413: "body_too_large", 422: "invalid_value"}
_TOO_LONG: Final = "context_length_exceeded"
NO_SECRETS: Final[tuple[str, ...]] = ()


def parse_error_response(
    provider: str,
    status: int,
    get_header: Callable[[bytes], bytes | None],
    body: bytes,
    now: float,
    secrets: Sequence[str] = NO_SECRETS,
    sent: Callable[[], bytes] = bytes,
) -> UpstreamError:
    """Return the error that a `provider` answered with, by a `status` other than 200.

    `now` is unix time, for dates in retry-after; `secrets` are texts that no client may read, and
    `sent` returns the client's request, which an upstream may quote.
    """
    error = UpstreamError(
        f"provider {provider} answered with status {status}",
        phase=Phase.HEAD,
        upstream_status=status,
    )
    found = read_error(load_error(body))
    _judge(error, provider, _meant_status(status, found), found, body, secrets, sent)
    if status in (429, 503):
        error.retry_after = parse_retry_after(get_header, now)
    return error


def judge_document(
    error: UpstreamError,
    provider: str,
    document: Any,
    secrets: Sequence[str] = NO_SECRETS,
    sent: Callable[[], bytes] = bytes,
) -> None:
    """Give `error` the meaning of `document`, which an upstream sent within a 200.

    After the first content only the status for the record is taken from it.
    """
    found = read_error(document)
    status = _meant_status(found.status, found)
    error.upstream_status = status or error.upstream_status
    if error.phase is Phase.CONTENT:
        error.is_refusal = status in _PASSED_STATUSES  # which is no fault of the endpoint
    elif status is not None:
        _judge(error, provider, status, found, dump_json(document), secrets, sent)


def choose_error(errors: Sequence[UpstreamError]) -> UpstreamError:
    """Return the one of `errors`, those of all attempts in order, that the client is to get.

    That is the last, but for a model that refuses the request, which says more than the failures
    of others: then the first refusal, or a rate limit reached after it, for a rate limit passes.
    """
    chosen: UpstreamError | None = None
    for error in errors:
        if chosen is None:
            chosen = error if error.is_refusal and error.status in _PASSED_STATUSES else None
        elif error.status == 429:
            chosen = error
    return chosen or errors[-1]


def parse_retry_after(get_header: Callable[[bytes], bytes | None], now: float) -> float | None:
    """Return the seconds in `retry-after-ms` or `retry-after` (RFC 9110, 10.2.3)."""
    for name, unit in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        value = get_header(name)
        if value is None:
            continue
        with contextlib.suppress(ValueError):
            return _bounded(float(value) * unit)
        with contextlib.suppress(ValueError, OverflowError):  # the latter for the year 10**20
            return _bounded(parsedate_to_datetime(value.decode("latin-1")).timestamp() - now)
    return None


def _bounded(seconds: float) -> float | None:
    # NaN fails the comparison as well.
    return seconds if 0 <= seconds <= MAX_RETRY_AFTER else None


def _meant_status(status: int | None, found: ErrorDocument) -> int | None:
    """Return the status to go by: llama.cpp once sent 500 for a prompt that was too long."""
    if found.is_too_long and (status is None or (status >= 500 and found.names_length)):
        return 400
    return status


def _judge(
    error: UpstreamError,
    provider: str,
    status: int | None,
    found: ErrorDocument,
    body: bytes,
    secrets: Sequence[str],
    sent: Callable[[], bytes],
) -> None:
    assert status is not None
    if status in _PASSED_STATUSES:
        # An error about the proxy's account stays a 502: another endpoint may do better.
        if concerns_account(found.message, found.words):
            names_it = concerns_account("", found.words)
            error.is_doubtful = not names_it and may_be_quoted(found.message, sent())
            return
        if secrets and _holds_secret(found, body, secrets, sent):
            return
    error.is_retryable = status in _RETRYABLE_STATUSES or status >= 500 or status < 400
    error.is_refusal = not error.is_retryable
    if status == 429:
        error.status, error.type, error.code = 429, "rate_limit_error", "rate_limit_exceeded"
        error.message = f"provider {provider} has reached its rate limit; try again later"
    elif status in _PASSED_STATUSES:
        error.status, error.type = status, "invalid_request_error"
        error.code = _PASSED_CODES[status]
        _pass_on(error, found)


def _holds_secret(
    found: ErrorDocument, body: bytes, secrets: Sequence[str], sent: Callable[[], bytes]
) -> bool:
    texts = (found.message, found.param, found.code, body.decode("utf-8", "replace"))
    return holds_secret("\n".join(texts), secrets, sent)


def _pass_on(error: UpstreamError, found: ErrorDocument) -> None:
    """Give `error` the upstream's own message, param and code."""
    error.message = found.message or error.message
    error.param = found.param or None
    if found.is_too_long:  # the code by which clients know that they have to compact
        error.code = _TOO_LONG
        error.param = error.param or "messages"
    elif found.code:
        error.own_code, error.code = error.code, found.code
