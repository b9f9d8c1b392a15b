"""What the requests of one process share, made once from the config.

Holds objects and decides nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from .access import Caller, Keyring
from .accesslog import AccessLog
from .accounting import Accounts
from .admission import Admission, BodyMemory, ConnectionRoom
from .catalog import Catalog
from .config import Config
from .deadlines import Wheel
from .frames import Frames
from .health import Health, Key
from .ledger import Ledger
from .limits import Lease
from .metrics import Metrics
from .provider import Upstream
from .record import Record

if TYPE_CHECKING:
    from .exchange import Exchange

UNBOUNDED: Final = 2**62  # bytes or connections, where no limit is set
MAX_LEARNT: Final = 4096  # endpoints, for clients name the models behind wildcards
_BYTE_DIGITS: Final = [f"{number:02x}" for number in range(256)]


@dataclass(slots=True)
class ServerContext:
    """One per process; every exchange has it."""

    config: Config
    loop: asyncio.AbstractEventLoop
    wheel: Wheel
    catalog: Catalog
    keyring: Keyring
    ledger: Ledger
    accounts: Accounts
    access_log: AccessLog | None
    metrics: Metrics
    upstreams: dict[str, Upstream]
    admission: Admission
    bodies: BodyMemory = field(default_factory=lambda: BodyMemory(UNBOUNDED))
    health: Health = field(default_factory=Health)
    frames: Frames = field(default_factory=Frames)
    draw: Callable[[], float] = random.random  # for weights and jitter; tests put theirs here
    exchanges: set[Exchange] = field(default_factory=set)
    is_draining: bool = False  # every connection ends with its next answer
    is_stopping: bool = False  # and nobody takes over: further requests are refused
    room: ConnectionRoom = field(default_factory=lambda: ConnectionRoom(UNBOUNDED))
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)  # provider → its models
    wait_for_models: Callable[[], Awaitable[None]] | None = None  # until these are known
    refused_options: dict[Key, frozenset[str]] = field(default_factory=dict)
    _id_prefix: str = field(default_factory=lambda: secrets.token_hex(8))
    _id_start: str = ""
    _last_id: int = 0
    _waits_of: Config | None = None
    _shortest_wait: float = 0.0

    def new_request_id(self) -> str:
        """Ours for one request: 64 random bits of this process and a count."""
        self._last_id = number = self._last_id + 1
        low = number & 0xFF
        if not low or not self._id_start:  # what goes before the last two digits
            self._id_start = f"req_{self._id_prefix}{number >> 8:06x}"
        return self._id_start + _BYTE_DIGITS[low]

    @property
    def shortest_wait(self) -> float:
        """Seconds in which no time limit of any request can pass, by the config of now."""
        config = self.config
        if self._waits_of is not config:
            settings = config.server
            waits = [settings.write_timeout, settings.comment_after or math.inf]
            waits += [each.provider.limits.shortest for each in self.upstreams.values()]
            waits += [
                endpoint.limits.shortest
                for model in config.models
                for endpoint in model.endpoints
                if endpoint.limits is not None
            ]
            self._shortest_wait = min(waits)
            self._waits_of = config
        return self._shortest_wait

    def learn_refused(self, endpoint: Key, options: frozenset[str]) -> None:
        """An endpoint answers without these members that we would put in: leave them out too."""
        known = self.refused_options.pop(endpoint, frozenset())
        if len(self.refused_options) >= MAX_LEARNT:
            del self.refused_options[next(iter(self.refused_options))]
        self.refused_options[endpoint] = known | options

    def close_record(self, record: Record, caller: Caller, lease: Lease | None) -> None:
        """Account for a request that has ended; nothing may change its record after this."""
        self.metrics.observe(record)
        self.accounts.close(record, caller, lease)
        if self.access_log is not None:
            self.access_log.write(record)
