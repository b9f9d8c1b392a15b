"""A provider as the proxy's upstream: its pool, and the heads of requests to it."""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

from .. import __version__
from ..config.settings import Config
from ..config.values import ConfigError
from ..protocol.http_body import LARGE_BYTES, Parts
from ..protocol.http_head import (
    Headers,
    RequestHead,
    ResponseHead,
    serialize_fields,
    serialize_request_head,
)
from ..routing.catalog import Provider
from ..timer_wheel import Wheel
from .pool import Pool

_TRACE_HEADERS: Final = (b"traceparent", b"tracestate")  # W3C Trace Context
MAX_HEADS: Final = 4096  # of answers, for clients name the models behind wildcards
SSE_TYPE: Final = b"text/event-stream; charset=utf-8"
USER_AGENT: Final = f"hoberproxy/{__version__}"


class Upstream:
    """One provider, its pool, and the heads of requests to it."""

    def __init__(self, provider: Provider, loop: asyncio.AbstractEventLoop, wheel: Wheel) -> None:
        self.provider = provider
        self.pool = Pool(provider, loop, wheel)
        chat = b"POST", provider.chat_path
        self._stream_head = _request_head(provider, *chat, accept=b"text/event-stream")
        self._json_head = _request_head(provider, *chat, accept=b"application/json")
        self._answer_fields: dict[tuple[str, bool], bytes] = {}

    def forwarded_headers(self, head: RequestHead) -> Headers:
        """Return the fields of a client's head that are passed on to this provider."""
        forwarded: Headers = []
        if head.get(b"traceparent") is not None:
            # `tracestate` is a list that may come in several lines, in order.
            forwarded = [item for item in head.headers if item[0] in _TRACE_HEADERS]
        for text in self.provider.forward_headers:
            name = text.encode()
            if (value := head.get(name)) is not None and name not in _TRACE_HEADERS:
                forwarded.append((name, value))
        return forwarded

    def passed_headers(self, head: ResponseHead) -> Headers:
        """Return the fields of this provider's response that are passed on to the client."""
        passed: Headers = []
        for text in self.provider.response_headers:
            name = text.encode()
            if (value := head.get(name)) is not None:
                passed.append((name, value))
        return passed

    def serialize_request(
        self, body: Parts, extra: list[tuple[bytes, bytes]], *, stream: bool
    ) -> Parts:
        """Return the whole request, a small one in one part.

        `extra` are fields of the client's head.
        """
        head = self._stream_head if stream else self._json_head
        fields = b"".join([b"%b: %b\r\n" % field for field in extra]) if extra else b""
        length = 0
        for part in body:
            length += len(part)
        digits = str(length).encode()  # half of what `%d` touches
        parts = [head, fields, b"content-length: ", digits, b"\r\n\r\n", *body]
        if length < LARGE_BYTES:
            return [b"".join(parts)]
        return [b"".join(parts[: -len(body)]), *body]

    def answer_fields(self, slug: str, is_stream: bool) -> bytes:
        """Return the header lines that every answer of this provider under `slug` has."""
        fields = self._answer_fields.get((slug, is_stream))
        if fields is None:
            if len(self._answer_fields) >= MAX_HEADS:
                self._answer_fields.clear()
            fields = self._answer_fields[slug, is_stream] = serialize_fields(
                [
                    (b"content-type", SSE_TYPE if is_stream else b"application/json"),
                    (b"x-hober-provider", self.provider.name.encode()),
                    (b"x-hober-model", slug.encode()),
                ]
            )
        return fields

    def serialize_listing_request(self) -> bytes:
        """Return a request GET /models, with the key and the headers of all requests."""
        path = self.provider.path + "/models"
        head = _request_head(self.provider, b"GET", path, accept=b"application/json")
        return head + b"content-length: 0\r\n\r\n"


def _request_head(provider: Provider, method: bytes, path: str, *, accept: bytes) -> bytes:
    """Return the constant part of a head, without content-length and the empty line."""
    headers = [
        (b"host", provider.authority.encode()),
        (b"content-type", b"application/json"),
        (b"accept", accept),
        (b"accept-encoding", b"identity"),
        (b"user-agent", USER_AGENT.encode()),
    ]
    if provider.api_key is not None:
        headers.append((b"authorization", b"Bearer " + provider.api_key.encode()))
    added = {name.lower().encode(): value.encode() for name, value in provider.headers}
    # Of these the config may only replace the user agent (config/values.py).
    headers = [(name, value) for name, value in headers if name not in added]
    headers += added.items()
    return serialize_request_head(method, path.encode(), headers)[:-2]


def make_upstreams(
    config: Config, loop: asyncio.AbstractEventLoop, wheel: Wheel
) -> dict[str, Upstream]:
    """Return one for each provider. Raise ConfigError if a certificate file cannot be used."""
    upstreams: dict[str, Upstream] = {}
    problems: list[str] = []
    for name, provider in config.providers.items():
        try:
            upstreams[name] = Upstream(provider, loop, wheel)
        except (OSError, ssl.SSLError):
            problems.append(
                f"providers.{name}.ca_file: expected a readable file of PEM certificates, "
                f"got {provider.ca_file!r}; check the path and the file"
            )
    if problems:
        raise ConfigError(problems)
    return upstreams
