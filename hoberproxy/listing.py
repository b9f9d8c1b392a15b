"""Ask a provider for the models it has (GET /models), over the connections of real requests."""

from __future__ import annotations

import asyncio
import time

import orjson

from .catalog import TimeLimits
from .errors import Phase, UpstreamError
from .gateway import Upstream
from .http11 import ResponseHead
from .refusal import parse_refusal
from .upstream import Loss, Receiver

MAX_BODY_BYTES = 4 * 1024 * 1024  # OpenRouter's has half a megabyte


async def list_models(upstream: Upstream, limits: TimeLimits) -> list[str]:
    """The ids of GET /models; none if the provider has no such page. Raises UpstreamError."""
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
    return listing.ids(upstream.provider.name)


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
            self._end()

    def on_end(self) -> None:
        self._end()

    def on_lost(self, loss: Loss) -> None:
        self._head = None  # a part of a list is none
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def ids(self, provider: str) -> list[str]:
        head = self._head
        if head is None:
            raise UpstreamError("no whole list of models", phase=Phase.HEAD)
        if head.status in (404, 405):
            return []
        if head.status != 200:
            raise parse_refusal(provider, head.status, head.get, b"", time.time())
        try:
            document = orjson.loads(self._body)
        except orjson.JSONDecodeError:
            return []
        entries = document.get("data") if isinstance(document, dict) else None
        if not isinstance(entries, list):
            return []
        ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        return [each for each in ids if isinstance(each, str)]
