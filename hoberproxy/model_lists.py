"""The models behind wildcards, for GET /v1/models: their providers are asked now and then.

In the background, one task a process, which begins when the list is wanted for the first time, or
a while after the start: many a process serves no list in its life. A provider that does not answer,
or with no list of models, keeps the one that it gave before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Mapping
from typing import Final

from .catalog import TimeLimits
from .errors import UpstreamError
from .listing import list_models
from .provider import Upstream

logger = logging.getLogger("hoberproxy.upstream")

LIMITS: Final = TimeLimits(connect=5.0, first_content=10.0, idle=10.0, total=10.0)
BEGIN_AFTER: Final = 15.0  # seconds from the start, if nobody wants a list before
FIRST_WAIT: Final = 3.0  # seconds that an answer waits for the providers' first answers
FIRST_RETRY: Final = 15.0  # seconds, doubled with each failure in a row
MAX_MODELS: Final = 2000  # of one provider; the longest list known has some 500
JITTER: Final = 0.2  # part of a wait, more or less: workers do not ask in step


class ModelLists:
    """`start` it when clients are served, `stop` it before the end and `aclose` it last.

    `listed` maps a provider to its models; it is another object after each change.
    """

    def __init__(self) -> None:
        self.listed: dict[str, tuple[str, ...]] = {}
        self._upstreams: Mapping[str, Upstream] = {}
        self._interval = 0.0
        self._asked: dict[str, Upstream] = {}  # who was asked last under a provider's name
        self._due: dict[str, float] = {}  # loop time
        self._failures: dict[str, int] = {}  # in a row
        self._woken = asyncio.Event()
        self._is_wanted = asyncio.Event()
        self._has_asked = asyncio.Event()  # all providers, once
        self._task: asyncio.Task[None] | None = None

    def configure(self, upstreams: Mapping[str, Upstream], interval: float) -> None:
        """Ask these every `interval` seconds; forget the lists of others."""
        self._upstreams, self._interval = upstreams, interval
        for name in [name for name, each in self._asked.items() if upstreams.get(name) is not each]:
            for known in (self._asked, self._due, self._failures):
                known.pop(name, None)
            self._publish(name, ())
        self._woken.set()

    def start(self) -> None:
        """Ask from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="list models")

    async def wait(self) -> None:
        """Wait until all providers were asked once, FIRST_WAIT seconds at most."""
        self._is_wanted.set()
        if not self._has_asked.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_WAIT):
                    await self._has_asked.wait()

    def stop(self) -> None:
        """Ask no more; the lists stay as they are."""
        self._has_asked.set()
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
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_vary(BEGIN_AFTER) if self._upstreams else 0.0):
                await self._is_wanted.wait()
        while True:
            self._woken.clear()
            now = loop.time()
            due = [name for name in self._upstreams if self._due.get(name, now) <= now]
            await asyncio.gather(*(self._ask(name) for name in due))
            self._has_asked.set()
            following = min(self._due.values(), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(following):
                    await self._woken.wait()

    async def _ask(self, name: str) -> None:
        """Ask one provider; never raises."""
        upstream = self._upstreams.get(name)
        if upstream is None:
            return  # a reload came first
        self._asked[name] = upstream
        names: list[str] | None = None
        reason = "no list of models in its answer"
        try:
            names = await list_models(upstream, LIMITS)
        except UpstreamError as error:
            reason = error.recorded_code
        except Exception:
            logger.exception("listing the models of provider %s failed", name)
        if self._upstreams.get(name) is not upstream:
            return  # a reload came meanwhile
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
