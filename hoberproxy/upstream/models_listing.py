"""Fetches the list of a provider's models (GET /models), over the connections of its pool."""

from __future__ import annotations

import asyncio
import time

import orjson

from ..errors import Phase, UpstreamError
from ..protocol.http_head import ResponseHead
from ..routing.catalog import TimeLimits
from .connection import Loss, Receiver
from .error_response import parse_error_response
from .provider import Upstream

MAX_BODY_BYTES = 4 * 1024 * 1024  # OpenRouter's has half a megabyte


async def list_models(upstream: Upstream, limits: TimeLimits) -> list[str] | None:
    """Return the names in GET /models, None without such a page. Raises UpstreamError."""
    connection = await upstream.pool.connect(limits.connect)
    listing = _Listing()
    try:
        async with asyncio.timeout(limits.total):
            connection.send([upstream.serialize_listing_request()], listing)
            await listing.ended
    except TimeoutError as exc:
        message = "no list of models in time"
        raise UpstreamError(message, phase=Phase.HEAD, code="upstream_timeout") from exc
    finally:
        if connection.receiver is listing:
            connection.abort()
    return listing.names(upstream.provider.name)


class _Listing(Receiver):
    """The receiver of a list of models."""

    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._head: ResponseHead | None = None
        self._body = bytearray()

    def on_head(self, head: ResponseHead) -> None:
        self._head = head

    def on_body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > MAX_BODY_BYTES:
            self.on_end()

    def on_lost(self, loss: Loss) -> None:
        self._head = None  # a part of a list is none
        self.on_end()

    def on_end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def names(self, provider: str) -> list[str] | None:
        head = self._head
        if head is None:
            raise UpstreamError("no whole list of models", phase=Phase.HEAD)
        if head.status in (404, 405):
            return None
        if head.status != 200:
            raise parse_error_response(provider, head.status, head.get, b"", time.time())
        return parse_listing(bytes(self._body))


def parse_listing(body: bytes) -> list[str] | None:
    """Return the models in `body`, of GET /models, each once; None if it has no list of them.

    OpenAI's form is {"data": [{"id": …}]}. Together sends the array alone, and Cohere (and Ollama's
    own API) have {"models": [{"name": …}]}.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    entries = document
    if isinstance(document, dict):
        entries = document.get("data", document.get("models"))
    if not isinstance(entries, list):
        return None
    dicts = [entry for entry in entries if isinstance(entry, dict)]
    names = [entry.get("id", entry.get("name")) for entry in dicts]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))
