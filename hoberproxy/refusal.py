"""An upstream's refusal: what it means for falling over, and what the client is told.

Only 400, 413, 422 and 429 reach a client as such, and of these all but 429 with their message; all
else becomes a 502 in our own words, so that no client reads that *our* key is wrong.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from .errors import Phase, UpstreamError

MAX_BODY_BYTES = 64 * 1024
MAX_MESSAGE_LENGTH = 2000
MAX_RETRY_AFTER = 24 * 3600.0

# What another endpoint of the same model may do better (api.md, "Routing fields").
_RETRYABLE_STATUSES = frozenset((401, 402, 403, 404, 408, 429))
_SHOWN_STATUSES = frozenset((400, 413, 422))
_SHOWN_CODES = {400: "invalid_value", 413: "body_too_large", 422: "invalid_value"}
_WHITE = re.compile(r"\s+")


def parse_refusal(
    provider: str,
    status: int,
    get_header: Callable[[bytes], bytes | None],
    body: bytes,
    now: float,
) -> UpstreamError:
    """The error for an answer other than 200. `now` is unix time, for dates in retry-after."""
    is_retryable = status in _RETRYABLE_STATUSES or status >= 500 or status < 400
    error = UpstreamError(
        f"provider {provider} answered with status {status}",
        phase=Phase.HEAD,
        upstream_status=status,
        is_retryable=is_retryable,
        is_refusal=not is_retryable,
    )
    if status == 429:
        error.status, error.type, error.code = 429, "rate_limit_error", "rate_limit_exceeded"
        error.message = f"provider {provider} has reached its rate limit; try again later"
    elif status in _SHOWN_STATUSES:
        error.status, error.type = status, "invalid_request_error"
        error.code = _SHOWN_CODES[status]
        _show(error, body)
    if status in (429, 503):
        error.retry_after = parse_retry_after(get_header, now)
    return error


def parse_retry_after(get_header: Callable[[bytes], bytes | None], now: float) -> float | None:
    """Seconds to wait as `retry-after-ms` or `retry-after` has them (RFC 9110, 10.2.3)."""
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


def _show(error: UpstreamError, body: bytes) -> None:
    """Give `error` the upstream's own message, param and code, whatever form they came in."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None  # HTML and plain text are an intermediary's, not the model server's
    found = _find_error(document)
    message = found.get("message")
    if isinstance(message, str) and message.strip():
        error.message = _WHITE.sub(" ", message).strip()[:MAX_MESSAGE_LENGTH]
    if isinstance(found.get("param"), str):
        error.param = found["param"][:128]
    if isinstance(found.get("code"), str) and found["code"]:
        error.code = found["code"][:64]


def _find_error(document: Any) -> dict[str, Any]:
    """The error object in the forms seen in the wild; empty if there is none."""
    if isinstance(document, list) and document:
        document = document[0]  # Gemini's OpenAI address answers with an array
    if not isinstance(document, dict):
        return {"message": document} if isinstance(document, str) else {}
    error = document.get("error", document)
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    if "message" not in error:
        # FastAPI: {"detail": "…"} or {"detail": [{"loc": […], "msg": "…"}]}
        detail = error.get("detail")
        if isinstance(detail, list) and detail and isinstance(detail[0], dict):
            detail = detail[0].get("msg")
        return {"message": detail}
    return error
