"""Checks of a request's body, and the body that goes upstream."""

from __future__ import annotations

from collections.abc import Callable

from hoberproxy.request.checks import parse_call
from hoberproxy.request.parse_cache import ParseCache
from hoberproxy.upstream.body import make_upstream_body

from . import Case
from .streams import request_body

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def _parsing(body: bytes) -> Callable[[], Callable[[], object]]:
    return lambda: lambda: parse_call(body)


def _reading(body: bytes) -> Callable[[], Callable[[], object]]:
    """A body of which all but the messages is known."""

    def make() -> Callable[[], object]:
        cache = ParseCache()
        cache.read(body, "key")
        return lambda: cache.read(body, "key")

    return make


def _splicing(body: bytes) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        call = parse_call(body)
        return lambda: make_upstream_body(call, "gpt-4o-mini", stream_options=True)

    return make


CASES = (
    Case("check a prompt of 100 bytes", _parsing(request_body(100)), unit="body"),
    Case("check a prompt of 10 KB", _parsing(request_body(10_000)), unit="body"),
    Case("check a prompt of 1 MB", _parsing(request_body(1_000_000)), 1_000, "KB"),
    Case("check tools and options", _parsing(request_body(100, tools=[_TOOL] * 4)), unit="body"),
    Case("read 100 bytes in a known template", _reading(request_body(100)), unit="body"),
    Case("read 10 KB in a known template", _reading(request_body(10_000)), unit="body"),
    Case("read 1 MB in a known template", _reading(request_body(1_000_000)), 1_000, "KB"),
    Case(
        "read tools in a known template",
        _reading(request_body(100, tools=[_TOOL] * 4)),
        unit="body",
    ),
    Case("splice a prompt of 100 bytes", _splicing(request_body(100)), unit="body"),
    Case("splice a prompt of 1 MB", _splicing(request_body(1_000_000)), 1_000, "KB"),
)
