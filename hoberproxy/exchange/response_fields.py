"""The header fields of the proxy's own in a response: its request, its attempts, its error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..downstream.cors import cors_headers
from ..errors import ProxyError, retry_headers
from ..protocol.http_head import Headers, RequestHead

_JSON: Final = (b"content-type", b"application/json")


def cors_fields(origins: Sequence[str], head: RequestHead) -> Headers:
    """Return the fields that let a page of one of the allowed `origins` read the response."""
    return cors_headers(origins, head.get(b"origin")) if origins else []


def attempts_fields(attempts: int) -> Headers:
    """Return the field that says how many endpoints were tried, where it was more than one."""
    return [(b"x-hober-attempts", b"%d" % attempts)] if attempts > 1 else []


def error_fields(error: ProxyError, attempts: int) -> Headers:
    """Return the fields of a response with `error` as its JSON body, after so many `attempts`."""
    fields = [_JSON, *retry_headers(error)]
    # The SDKs try 5xx three times by themselves, which would multiply our own tries.
    is_final = 400 <= error.status < 500 and error.status != 429
    is_tried = error.status in (502, 504) and attempts >= 2
    if is_final or is_tried:
        fields.append((b"x-should-retry", b"false"))
    return fields + attempts_fields(attempts)
