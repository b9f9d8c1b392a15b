"""The aiohttp application for every path but the chat POST, on the same port.

It serves models, health and CORS, and answers other paths with an error that names those that
exist.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from urllib.parse import unquote

import orjson
from aiohttp import web

from ..downstream.cors import cors_headers
from ..errors import (
    ProxyError,
    RequestError,
    RouteError,
    UnavailableError,
    retry_headers,
    serialize_error,
)
from ..exchange.context import ServerContext
from ..protocol.http_head import Headers
from .account_routes import AccountPages, json_response

logger = logging.getLogger("hoberproxy.server")


class ModelsPage:
    """The body of GET /v1/models, kept until a list of models changes."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._made_of: object = None
        self._body = b""

    def body(self) -> bytes:
        """Return the list as JSON."""
        listed = self._context.model_lists.listed
        if self._made_of is not listed:
            data = self._context.catalog.listing(listed)
            self._body = orjson.dumps({"object": "list", "data": data})
            self._made_of = listed
        return self._body


CONTEXT: web.AppKey[ServerContext] = web.AppKey("context", ServerContext)
MODELS_PAGE: web.AppKey[ModelsPage] = web.AppKey("models_page", ModelsPage)
PREFIXES = ("/v1", "", "/api/v1")
_NOT_SERVED = frozenset(
    ("/responses", "/completions", "/embeddings", "/messages", "/audio", "/images", "/moderations")
)
_PATHS = (
    "POST /v1/chat/completions, GET /v1/models, GET /v1/models/{slug}, GET /v1/generation?id=, "
    "GET /v1/key, GET /healthz, GET /readyz"
)
_VERSION_TWICE = re.compile(r"(?:/api)?/v1(?:/api)?/v1(?:/|$)")
_CALL_TWICE = re.compile(r".*/chat/completions/(?:v1/)?(?:chat/completions|models)(?:/|$)")
_CORS_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Max-Age": "600",
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(context: ServerContext) -> web.Application:
    """Make the application for every request that is no chat POST."""
    app = web.Application(middlewares=[_in_the_contracts_form])
    app[CONTEXT] = context
    app[MODELS_PAGE] = ModelsPage(context)
    app.on_response_prepare.append(_finish_head)
    pages = AccountPages(context)
    app.on_cleanup.append(pages.aclose)
    for prefix in PREFIXES:
        pages.add_to(app, prefix)
        app.router.add_get(prefix + "/models", _list_models)
        app.router.add_get(prefix + "/models/{slug:.+}", _show_model)
        app.router.add_route("*", prefix + "/chat/completions", _post_only)
        app.router.add_get(prefix + "/healthz", _health)
        app.router.add_get(prefix + "/health", _health)
        app.router.add_get(prefix + "/readyz", _ready)
    return app


# The paths


async def _list_models(request: web.Request) -> web.Response:
    await request.app[CONTEXT].model_lists.wait()
    body = request.app[MODELS_PAGE].body()
    return web.Response(body=body, content_type="application/json")


async def _show_model(request: web.Request) -> web.Response:
    # A slug contains a slash, which clients send plain or as %2F.
    slug = unquote(request.match_info["slug"])
    entry = request.app[CONTEXT].catalog.describe(slug)
    if entry is None:
        raise RouteError(
            f"no model {slug[:128]!r} in the catalog; GET /v1/models lists what there is",
            code="model_not_found",
            param="model",
        )
    return json_response(entry)


async def _health(request: web.Request) -> web.Response:
    return json_response({"status": "ok"})


async def _ready(request: web.Request) -> web.Response:
    # A worker that drains for its successor is part of a service that is ready.
    if request.app[CONTEXT].is_stopping:
        raise UnavailableError("shutting down", code="draining", retry_after=1.0)
    return json_response({"status": "ready"})


async def _post_only(request: web.Request) -> web.Response:
    raise web.HTTPMethodNotAllowed(request.method, ("POST",))


def _preflight(request: web.Request) -> web.Response:
    response = web.Response(status=204, headers={"Allow": "GET, POST, OPTIONS"})
    if _cors(request):
        response.headers.update(_CORS_PREFLIGHT)
        wanted = request.headers.get("Access-Control-Request-Headers")
        if wanted is not None:
            response.headers["Access-Control-Allow-Headers"] = wanted
    return response


# Around them


@web.middleware
async def _in_the_contracts_form(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer every error, aiohttp's own among them, with the contract's JSON."""
    try:
        if request.method == "OPTIONS":
            return _preflight(request)
        return await handler(request)
    except ProxyError as error:
        return _error_response(request, error)
    except web.HTTPNotFound:
        return _error_response(request, _unknown_path(_path_as_sent(request)))
    except web.HTTPMethodNotAllowed as exc:
        allowed = ", ".join(sorted(exc.allowed_methods))
        wrong = RequestError(
            f"expected {allowed} on {_path_as_sent(request)[:128]}, got {request.method}",
            code="method_not_allowed",
            status=405,
        )
        response = _error_response(request, wrong)
        response.headers["Allow"] = allowed
        return response
    except Exception:
        logger.exception("a handler failed")  # a fault of the proxy
        return _error_response(
            request, ProxyError("an error in the proxy itself", code="internal_error")
        )


def _path_as_sent(request: web.Request) -> str:
    """Return the path with its escapes: without, `/v1%2Fmodels` reads as a path that exists."""
    return request.raw_path.partition("?")[0]


def _unknown_path(path: str) -> RequestError:
    tail = path.removeprefix("/api").removeprefix("/v1")
    if any(tail == known or tail.startswith(known + "/") for known in _NOT_SERVED):
        message = f"{path[:128]} is not served yet; this proxy serves {_PATHS}"
    elif _VERSION_TWICE.match(path):
        message = (
            f"no such path: {path[:128]}; the client's base URL ends with /v1 and the client adds "
            "/v1 once more: set the base URL to this proxy's address without /v1"
        )
    elif _CALL_TWICE.match(path):
        message = (
            f"no such path: {path[:128]}; the client's base URL ends with the path of a call, and "
            "the client adds that once more: end the base URL with /v1"
        )
    else:
        message = f"no such path: {path[:128]}; this proxy serves {_PATHS}"
    return RequestError(message, code="not_found", status=404)


def _error_response(request: web.Request, error: ProxyError) -> web.Response:
    body = serialize_error(error, numeric_code=request.path.startswith("/api/"))
    response = web.Response(status=error.status, body=body, content_type="application/json")
    response.headers.update(_decoded(retry_headers(error)))
    if error.retry_after is None and error.status < 500:
        response.headers["X-Should-Retry"] = "false"
    return response


async def _finish_head(request: web.Request, response: web.StreamResponse) -> None:
    """Add the headers of every answer, and end aiohttp's handler with its answer.

    Whether the client's connection goes on is passed to downstream/aiohttp_bridge.py.
    """
    del response.headers["Server"]
    response.headers["X-Request-Id"] = request.app[CONTEXT].new_request_id()
    response.headers.update(_cors(request))
    transport = request.transport
    if transport is not None and hasattr(transport, "wants_keep_alive"):
        is_open = transport.wants_keep_alive and not request.app[CONTEXT].is_draining
        transport.keep_alive = is_open  # type: ignore[attr-defined]
        if not is_open:
            response.headers["Connection"] = "close"
        response.force_close()


def _cors(request: web.Request) -> dict[str, str]:
    origins = request.app[CONTEXT].settings.cors_origins
    origin = request.headers.get("Origin")
    if not origins or origin is None:
        return {}
    return _decoded(cors_headers(origins, origin.encode("latin-1", "replace")))


def _decoded(fields: Headers) -> dict[str, str]:
    return {name.decode(): value.decode("latin-1") for name, value in fields}
