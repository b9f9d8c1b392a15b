"""Fetches the lists of models of providers behind wildcards, for GET /v1/models.

One task a process does so, from when a list is wanted for the first time, or from a while after the
start: many a process serves no list in its life. A provider that does not answer, or sends no list
of models, keeps its last list.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Mapping
from typing import Final

from ..errors import UpstreamError
from ..routing.catalog import TimeLimits
from .models_listing import list_models
from .provider import Upstream

logger = logging.getLogger("hoberproxy.upstream")

LIMITS: Final = TimeLimits(connect=5.0, first_content=10.0, idle=10.0, total=10.0)
BEGIN_AFTER: Final = 15.0  # seconds from the start, if no list is wanted before
FIRST_WAIT: Final = 3.0  # seconds that an answer waits for the providers' first answers
FIRST_RETRY: Final = 15.0  # seconds, doubled with each failure in a row
MAX_MODELS: Final = 2000  # of one provider; the longest list known has some 500
JITTER: Final = 0.2  # part of a wait, more or less: workers do not fetch in step


class ModelLists:
    """The last list of each provider, fetched in the background.

    Call `start` when clients are served, `stop` before the end and `aclose` last. `listed` maps a
    provider to its models; it is another object after each change.
    """

    def __init__(self, upstreams: Mapping[str, Upstream], interval: float) -> None:
        """Fetch the list of each of `upstreams` every `interval` seconds."""
        self.listed: dict[str, tuple[str, ...]] = {}
        self._upstreams = upstreams
        self._interval = interval
        self._due: dict[str, float] = {}  # loop time
        self._failures: dict[str, int] = {}  # in a row
        self._is_wanted = asyncio.Event()
        self._has_fetched = asyncio.Event()  # all providers, once
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Fetch lists from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="list models")

    async def wait(self) -> None:
        """Wait until every list was fetched or failed once, FIRST_WAIT seconds at most."""
        self._is_wanted.set()
        if not self._has_fetched.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_WAIT):
                    await self._has_fetched.wait()

    def stop(self) -> None:
        """Fetch no more; the lists stay as they are."""
        self._has_fetched.set()
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """End the task."""
        self.stop()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        if self._upstreams:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_vary(BEGIN_AFTER)):
                    await self._is_wanted.wait()
        while self._upstreams:
            now = loop.time()
            due = [each for each in self._upstreams.items() if self._due.get(each[0], now) <= now]
            await asyncio.gather(*(self._fetch(*each) for each in due))
            self._has_fetched.set()
            await asyncio.sleep(min(self._due.values()) - loop.time())
        self._has_fetched.set()

    async def _fetch(self, name: str, upstream: Upstream) -> None:
        """Fetch the list of one provider; never raises."""
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
        self._due[name] = asyncio.get_running_loop().time() + self._wait(name)

    def _wait(self, name: str) -> float:
        wait = self._interval
        if failures := self._failures[name]:
            wait = min(wait, FIRST_RETRY * 2.0 ** min(failures - 1, 20))
        return _vary(wait)

    def _publish(self, name: str, models: tuple[str, ...]) -> None:
        if self.listed.get(name, ()) != models:
            self.listed = {**self.listed, name: models}


def _vary(wait: float) -> float:
    return wait * (1 - JITTER + 2 * JITTER * random.random())
