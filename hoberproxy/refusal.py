"""An upstream's refusal: what it means for falling over, and what the client is told.

Only 400, 413, 422 and 429 reach a client as such, and of these all but 429 with their message; all
else becomes a 502 in our own words, so that no client reads that *our* key is wrong.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, Final

from .errors import Phase, UpstreamError
from .lenient import load_json

MAX_BODY_BYTES: Final = 64 * 1024
MAX_MESSAGE_LENGTH: Final = 2000
MAX_RETRY_AFTER: Final = 24 * 3600.0

# What another endpoint of the same model may do better (api.md, "Routing fields").
_RETRYABLE_STATUSES: Final = frozenset((401, 402, 403, 404, 408, 429))
_SHOWN_STATUSES: Final = frozenset((400, 413, 422))
_SHOWN_CODES: Final = {400: "invalid_value", 413: "body_too_large", 422: "invalid_value"}
_WHITE: Final = re.compile(r"\s+")


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
        document = load_json(body)
    except ValueError:
        document = None  # HTML and plain text are an intermediary's, not the model server's
    found = _find_error(document)
    message = _find_message(found)
    if message.strip():
        error.message = _WHITE.sub(" ", message).strip()[:MAX_MESSAGE_LENGTH]
    error.param = _find_param(found)[:128] or None
    if isinstance(found.get("code"), str) and found["code"]:
        error.own_code, error.code = error.code, found["code"][:64]


def _find_error(document: Any) -> dict[str, Any]:
    """The object that describes the error, in the forms seen in the wild; empty if none."""
    if isinstance(document, list) and document:
        document = document[0]  # Gemini's OpenAI address answers with an array
    if not isinstance(document, dict):
        return {"message": document}
    errors = document.get("errors")  # Cloudflare
    if isinstance(errors, list) and errors:
        document = {"error": errors[0]}
    error = document.get("error", document)
    return error if isinstance(error, dict) else {"message": error}


def _find_message(error: Any, levels: int = 4) -> str:
    """The first text under `message`, `detail` or `msg`; empty if there is none.

    FastAPI says {"detail": "…"} or {"detail": [{"loc": […], "msg": "…"}]}, Mistral has the latter
    within `message`.
    """
    if isinstance(error, str):
        return error
    if not levels:
        return ""
    if isinstance(error, list):
        return _find_message(error[0], levels - 1) if error else ""
    if isinstance(error, dict):
        found = (
            _find_message(error.get(name), levels - 1) for name in ("message", "detail", "msg")
        )
        return next(filter(None, found), "")
    return ""


def _find_param(error: Any, levels: int = 4) -> str:
    """The field at fault: `param`, or FastAPI's `loc` as a path; empty if none is named."""
    if isinstance(error, list) and error:
        error = error[0]
    if not isinstance(error, dict) or not levels:
        return ""
    param, place = error.get("param"), error.get("loc")
    if isinstance(param, str):
        return param
    if isinstance(place, list):
        return _path([part for part in place if part != "body"])
    found = (_find_param(error.get(name), levels - 1) for name in ("message", "detail"))
    return next(filter(None, found), "")


def _path(place: list[Any]) -> str:
    """["messages", 0, "role"] as messages[0].role, the form of our own errors."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).lstrip(".")
