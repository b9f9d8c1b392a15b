"""The models behind wildcards, for GET /v1/models: their providers are asked now and then.

In the background, one task a process, which begins when the list is wanted for the first time, or
a while after the start: many a process serves no list in its life. A provider that does not answer,
or with no list of models, keeps the one that it gave before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

import orjson

from .catalog import TimeLimits
from .errors import UpstreamError
from .gateway import Gateway
from .listing import list_models

logger = logging.getLogger("hoberproxy.upstream")

LIMITS: Final = TimeLimits(connect=5.0, first_content=10.0, idle=10.0, total=10.0)
BEGIN_AFTER: Final = 15.0  # seconds from the start, if nobody wants a list before
FIRST_WAIT: Final = 3.0  # seconds that an answer waits for the providers' first answers
FIRST_RETRY: Final = 15.0  # seconds, doubled with each failure in a row
MAX_MODELS: Final = 2000  # of one provider; the longest list known has some 500
JITTER: Final = 0.2  # part of a wait, more or less: workers do not ask in step


class ModelLists:
    """`start` it when clients are served, `aclose` it last."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._due: dict[str, float] = {}  # loop time
        self._failures: dict[str, int] = {}  # in a row
        self._is_wanted = asyncio.Event()
        self._has_asked = asyncio.Event()  # all providers, once
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ask providers for their models from now on."""
        self._task = self._gateway.loop.create_task(self._run(), name="list models")

    async def wait(self) -> None:
        """Wait until all providers were asked once, FIRST_WAIT seconds at most."""
        self._is_wanted.set()
        if not self._has_asked.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_WAIT):
                    await self._has_asked.wait()

    async def aclose(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        wanted, loop = self._wanted(), self._gateway.loop
        if wanted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._vary(BEGIN_AFTER)):
                    await self._is_wanted.wait()
        while wanted and not self._gateway.is_draining:
            now = loop.time()
            due = [name for name in wanted if self._due.get(name, now) <= now]
            await asyncio.gather(*(self._ask(name) for name in due))
            self._has_asked.set()
            await asyncio.sleep(min(self._due.values()) - loop.time())
        self._has_asked.set()

    def _wanted(self) -> list[str]:
        """Return the providers that a wildcard names."""
        if not self._gateway.config.server.models_refresh:
            return []
        models = self._gateway.config.models
        wild = [endpoint for model in models if model.is_wildcard for endpoint in model.endpoints]
        return list(dict.fromkeys(endpoint.provider for endpoint in wild))

    async def _ask(self, name: str) -> None:
        """Ask one provider; never raises."""
        upstream = self._gateway.upstreams[name]
        names: list[str] | None = None
        reason = "no list of models in its answer"
        try:
            names = await list_models(upstream, LIMITS)
        except UpstreamError as error:
            reason = error.recorded_code
        except Exception:
            logger.exception("listing the models of provider %s failed", name)
        if names is not None:
            self._failures[name] = 0
            self._publish(name, tuple(names[:MAX_MODELS]))
        else:
            self._failures[name] = failures = self._failures.get(name, 0) + 1
            if failures == 1:
                logger.info("provider %s: its models are not known: %s", name, reason)
        self._due[name] = self._gateway.loop.time() + self._wait(name)

    def _wait(self, name: str) -> float:
        wait = self._gateway.config.server.models_refresh
        if failures := self._failures[name]:
            wait = min(wait, FIRST_RETRY * 2.0 ** min(failures - 1, 20))
        return self._vary(wait)

    def _vary(self, wait: float) -> float:
        return wait * (1 - JITTER + 2 * JITTER * self._gateway.draw())

    def _publish(self, name: str, models: tuple[str, ...]) -> None:
        gateway = self._gateway
        if gateway.listed.get(name, ()) != models:
            gateway.listed = {**gateway.listed, name: models}  # another object: see ModelsPage


class ModelsPage:
    """The body of GET /v1/models, made anew only when a list of models has changed."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._made_of: dict[str, tuple[str, ...]] | None = None
        self._body = b""

    def body(self) -> bytes:
        """The list as JSON."""
        listed = self._gateway.listed
        if self._made_of is not listed:
            data = self._gateway.catalog.listing(listed)
            self._body = orjson.dumps({"object": "list", "data": data})
            self._made_of = listed
        return self._body
