"""`serve --workers`: the supervisor put together, from a first start or from the one before it."""

from __future__ import annotations

import asyncio
import logging
import os

from .admission import MAX_WORKERS
from .joining import LOG_FORMAT
from .listeners import passed_by_systemd
from .notify import Notifier
from .settings import Config
from .source import ConfigSource, read_source
from .succession import take_legacy
from .supervisor import Supervisor


def serve_with_workers(path: str, listen: str | None, count: int) -> None:
    """Serve until stopped; `count` 0 is one worker for each core.

    Raises ConfigError or StartError if the start cannot succeed.
    """

    def load() -> tuple[ConfigSource, Config]:
        return read_source(path, listen)

    legacy = take_legacy(os.environ)
    # What was served until now is good, whatever the file says by now.
    source, config = load() if legacy is None else (legacy.source, legacy.source.parse())
    logging.basicConfig(level=config.log.level.upper(), format=LOG_FORMAT)
    passed = passed_by_systemd(os.environ) if legacy is None else None

    async def serve() -> None:
        supervisor = Supervisor(
            load,
            source,
            config,
            count or min(count_cores(), MAX_WORKERS),
            Notifier(os.environ),
            passed,
            legacy,
        )
        await supervisor.run()

    asyncio.run(serve())


def count_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))
