"""Fixtures of the tests of the whole proxy; the loop is the program's (tests/conftest.py)."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hoberproxy.routing.catalog import Model, Provider
from tests.support.scripted import ScriptedUpstream

from .harness import Proxy, make_config, provider_for, running

ProxyTo = Callable[..., AbstractAsyncContextManager[Proxy]]


@pytest.fixture
def proxy_to(tmp_path: Path) -> ProxyTo:
    """Start a proxy in front of upstreams, which become the providers a, b, c in that order."""

    @asynccontextmanager
    async def start(
        *upstreams: ScriptedUpstream | Provider | str,
        models: Iterable[Model] | None = None,
        server: dict[str, Any] | None = None,
        **changes: Any,
    ) -> AsyncIterator[Proxy]:
        providers = [
            each if isinstance(each, Provider) else provider_for(each, name, **changes)
            for name, each in zip("abcdefgh", upstreams, strict=False)
        ]
        config = make_config(tmp_path, *providers, models=models, **(server or {}))
        async with running(config) as proxy:
            yield proxy

    return start


@pytest.fixture(autouse=True)
def nothing_failed_unseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which a callback raised an exception, which only reaches the log."""
    yield
    failed = [each for each in caplog.get_records("call") if each.levelno >= logging.ERROR]
    assert not failed, [each.getMessage() for each in failed]
