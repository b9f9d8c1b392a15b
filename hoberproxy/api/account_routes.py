"""Serves GET /v1/generation, what a request cost, and GET /v1/key, what a key has left.

The names are those of OpenRouter's API, which clients know. The store is read on a thread of its
own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
from aiohttp import web

from ..access.keys import ANONYMOUS, Caller
from ..access.limits import (
    DAY_REQUESTS,
    MINUTE_REQUESTS,
    MINUTE_TOKENS,
    PICO,
    KeyLimits,
    format_dollars,
    spent_in,
)
from ..accounting.record import CLIENT_CLOSED, Record
from ..downstream.cors import check_local_host
from ..errors import RequestError, UnavailableError
from ..exchange.context import ServerContext
from ..storage.sqlite_records import open_store
from ..storage.store import KeyUsage, Store, StoreError

T = TypeVar("T")

MAX_ID = 256  # characters
# Seconds between looks for a record: it may still be on its way, from another worker too.
WAITS = (0.0, 0.1, 0.3, 0.6)
BUSY_TIMEOUT = 1.0


class AccountPages:
    """The handlers of the two paths, for every prefix of the API. `aclose` ends their thread."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._store: Store | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hoberproxy-reader")

    def add_to(self, app: web.Application, prefix: str) -> None:
        """Serve both paths under `prefix`."""
        app.router.add_get(prefix + "/generation", self.show_generation)
        app.router.add_get(prefix + "/key", self.show_key)

    async def aclose(self, app: web.Application) -> None:
        """Close the store and end the thread."""
        if self._store is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
        self._thread.shutdown(wait=False)

    async def show_generation(self, request: web.Request) -> web.Response:
        """Answer with a finished request of the calling key, by its id or its answer's."""
        caller = self._authenticate(request)
        name = request.query.get("id", "")
        if not 0 < len(name) <= MAX_ID:
            raise RequestError(
                "id is missing: expected ?id= and a request's id, of its x-request-id or its body",
                code="missing_required_parameter",
                param="id",
            )
        for wait in WAITS:
            await asyncio.sleep(wait)
            record = await self._read(lambda store: _find(store, name, caller.key_id))
            if record is not None:
                return json_response({"data": generation_document(record)})
        raise RequestError(
            "no finished request of this key has this id; it may still be running, or be too old",
            code="not_found",
            status=404,
            param="id",
        )

    async def show_key(self, request: web.Request) -> web.Response:
        """Answer with the calling key's limits, what is left of them, and its usage."""
        caller = self._authenticate(request)
        usage = await self._read(lambda store: store.sum_key(caller.key_id))
        counters = None
        if caller.limits is not None:
            counters = self._context.accounts.counters(caller, time.time())
        return json_response({"data": key_document(caller, usage, counters)})

    def _authenticate(self, request: web.Request) -> Caller:
        if self._context.config.keys.required:
            return self._context.keyring.authenticate_head(_Fields(request), time.time())
        check_local_host(request.headers.get("Host", "").encode("latin-1", "replace"))
        return ANONYMOUS

    async def _read(self, read: Callable[[Store], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: read(self._open())
            )
        except StoreError as exc:
            raise UnavailableError(
                "the records cannot be read now; try again", code="overloaded", retry_after=1.0
            ) from exc

    def _open(self) -> Store:
        if self._store is None:
            path = self._context.config.records.file
            self._store = open_store(path, busy_timeout=BUSY_TIMEOUT)
        return self._store


class _Fields:
    """The header fields of an aiohttp request as the bytes that came."""

    def __init__(self, request: web.Request) -> None:
        self._headers = request.headers

    def get(self, name: bytes, /) -> bytes | None:
        value = self._headers.get(name.decode())
        return None if value is None else value.encode("utf-8", "surrogateescape")


def _find(store: Store, name: str, key_id: str) -> Record | None:
    found = store.find_record(name, key_id)
    if found is None and not name.startswith("req_"):
        found = store.find_generation(name, key_id)
    return found


def json_response(document: Any) -> web.Response:
    """Return a response with `document` as JSON, by orjson."""
    return web.Response(body=orjson.dumps(document), content_type="application/json")


def generation_document(record: Record) -> dict[str, Any]:
    """Return `record` in the form of OpenRouter's generations, with further members."""
    first, total = record.first_content, record.total
    return {
        "id": record.id,
        "upstream_id": record.upstream_id or None,
        "created_at": record.started,
        "model": record.slug or None,
        "requested_models": record.requested,
        "provider_name": record.provider or None,
        "streamed": record.streamed,
        "cancelled": record.status == CLIENT_CLOSED,
        "status": record.status,
        "error": record.code or None,
        "finish_reason": record.finish_reason or None,
        "attempts": record.attempts,
        "previous_errors": record.failures,
        "tokens_prompt": record.prompt_tokens,
        "tokens_completion": record.completion_tokens,
        "native_tokens_prompt": record.prompt_tokens,
        "native_tokens_completion": record.completion_tokens,
        "native_tokens_reasoning": record.reasoning_tokens,
        "native_tokens_cached": record.cached_tokens,
        "native_tokens_cache_write": record.cache_write_tokens,
        "estimated": record.estimated,
        # OpenRouter's clients expect a number here; the exact amount is in `cost`.
        "total_cost": record.cost / PICO if record.cost is not None else 0,
        "cost": format_dollars(record.cost) if record.cost is not None else None,
        "price": record.price or None,
        "latency": round(first * 1000) if first is not None else None,
        "generation_time": round((total - first) * 1000) if first is not None else None,
        "total_ms": round(total * 1000),
        "overhead_ms": round(record.overhead * 1000, 3),
        "tokens_per_second": record.tokens_per_second,
    }


def key_document(
    caller: Caller, usage: dict[str, KeyUsage], counters: list[int] | None
) -> dict[str, Any]:
    """Return what a key may know of itself, with amounts as strings in USD.

    What is left is for further calls: what is held for calls in flight is not in it.
    """
    limits = caller.limits or KeyLimits()
    left = None
    if limits.budget is not None and counters is not None:
        left = max(0, limits.budget - spent_in(counters, limits.budget_period))
    return {
        "id": caller.key_id or None,
        "label": caller.label,
        "kind": caller.kind or None,
        "expires_at": caller.expires,
        "models": list(caller.models) or None,
        "limit": format_dollars(limits.budget) if limits.budget is not None else None,
        "limit_reset": limits.budget_period if limits.budget is not None else None,
        "limit_remaining": format_dollars(left) if left is not None else None,
        "limits": {
            "requests_per_minute": _limit(limits.requests_per_minute, counters, MINUTE_REQUESTS),
            "tokens_per_minute": _limit(limits.tokens_per_minute, counters, MINUTE_TOKENS),
            "requests_per_day": _limit(limits.requests_per_day, counters, DAY_REQUESTS),
            "concurrency": limits.concurrency,
        },
        "usage": {
            period: {
                "requests": each.requests,
                "tokens_prompt": each.prompt_tokens,
                "tokens_completion": each.completion_tokens,
                "cost": format_dollars(each.cost),
            }
            for period, each in usage.items()
        },
    }


def _limit(limit: int | None, counters: list[int] | None, place: int) -> dict[str, int] | None:
    if limit is None or counters is None:
        return None
    return {"limit": limit, "remaining": max(0, limit - counters[place])}
