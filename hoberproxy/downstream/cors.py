"""Checks which web pages and host names may use the proxy: CORS, Host, and media types."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from functools import cache
from typing import Final

from ..errors import AccessError, RequestError
from ..protocol.http_head import Headers, RequestHead

# The fields that a page may read, each by its name: no wildcard holds for a part of a name.
_EXPOSED: Final = b", ".join(
    (
        b"x-request-id",
        b"x-hober-provider",
        b"x-hober-model",
        b"x-hober-attempts",
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
        b"retry-after",
        b"retry-after-ms",
        b"x-should-retry",
    )
)


def cors_headers(allowed: Sequence[str], origin: bytes | None) -> Headers:
    """Return the fields that let a page of `origin` read an answer, if `origin` is `allowed`."""
    if origin is None or (origin.decode("latin-1") not in allowed and "*" not in allowed):
        return []
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", _EXPOSED),
        (b"vary", b"Origin"),
    ]


def check_local_request(head: RequestHead) -> None:
    """Refuse what any web page could send to a proxy without keys on its reader's machine.

    A page may post text/plain anywhere without a preflight, and anything under a name of its own
    that resolves to 127.0.0.1 (DNS rebinding): so JSON is required, and a Host of this machine.
    """
    if head.content_type != b"application/json":
        raise RequestError(
            "this proxy runs without keys and takes content-type application/json only",
            code="unsupported_media_type",
            status=415,
        )
    check_local_host(head.get(b"host"))


def check_local_host(host: bytes | None) -> None:
    """Refuse a Host field that is not of this machine, where there are no keys."""
    if not is_local_host(host):
        raise AccessError(
            "this proxy runs without keys and answers only under an address or the name of its "
            "own machine; use http://127.0.0.1 or turn keys on",
            code="host_not_allowed",
            status=403,
            type="permission_error",
        )


def check_media_type(head: RequestHead) -> None:
    """Refuse a body that does not say to be JSON, or that is compressed."""
    coding = head.get(b"content-encoding")
    if coding is not None and coding.lower() != b"identity":
        raise RequestError(
            "expected a request body without content-encoding; send it uncompressed",
            code="unsupported_media_type",
            status=415,
        )
    if head.get(b"content-type") is not None:
        media_type = head.content_type
        if media_type != b"application/json" and not media_type.endswith(b"+json"):
            raise RequestError(
                "expected content-type application/json; "
                "with curl add -H 'content-type: application/json'",
                code="unsupported_media_type",
                status=415,
            )


def is_local_host(host: bytes | None) -> bool:
    """Return whether `host`, a Host field, is an IP address, localhost or this machine's name."""
    if not host:
        return False
    text = host.decode("latin-1").lower()
    name = text[1 : text.find("]")] if text.startswith("[") else text.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.rstrip(".") in _own_names()
    return True


@cache
def _own_names() -> frozenset[str]:
    return frozenset(("localhost", socket.gethostname().lower()))
