"""The objects that the requests of one process share, made once from the config."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Final

from ..access.admission import Admission, BodyMemory, ConnectionRoom
from ..access.keys import Caller, Keyring
from ..access.limits import Lease
from ..accounting.access_log import AccessLog
from ..accounting.accounts import Accounts
from ..accounting.metrics import Metrics
from ..accounting.record import Record
from ..config.settings import Config
from ..downstream.request_handler import UNBOUNDED, ConnectionContext, RequestHandler
from ..relay.edge_templates import MAX_SERVERS, EdgeTemplates
from ..request.parse_cache import ParseCache
from ..routing.catalog import Catalog
from ..routing.health import Health, Key
from ..timer_wheel import Wheel
from ..upstream.model_lists import ModelLists
from ..upstream.provider import Upstream

MAX_LEARNT: Final = 4096  # endpoints, for clients name the models behind wildcards


class ServerContext(ConnectionContext):
    """The state that all exchanges of one process share."""

    is_stopping = False  # no other process takes over: further requests fail

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        wheel: Wheel,
        catalog: Catalog,
        keyring: Keyring,
        accounts: Accounts,
        access_log: AccessLog | None,
        metrics: Metrics,
        upstreams: dict[str, Upstream],
        admission: Admission,
        bodies: BodyMemory | None = None,
        room: ConnectionRoom | None = None,
    ) -> None:
        super().__init__(config.server, loop, wheel, admission, room)
        self.catalog = catalog
        self.keyring = keyring
        self.accounts = accounts
        self.access_log = access_log
        self.metrics = metrics
        self.bodies = bodies or BodyMemory(UNBOUNDED)
        self.health = Health()
        self.parse_cache = ParseCache()
        self.draw: Callable[[], float] = random.random  # for weights and jitter
        self.on_closed: Callable[[Record], None] | None = None  # gets each record; for tests
        self.exchanges: set[RequestHandler] = set()
        self._edges: dict[tuple[str, str], EdgeTemplates] = {}  # by provider and slug
        self.refused_options: dict[Key, frozenset[str]] = {}
        self.config = config
        self.settings = config.server
        self.upstreams = upstreams
        self.shortest_wait = shortest_wait_of(config)
        self.model_lists = ModelLists(
            _behind_wildcards(config, upstreams), config.server.models_refresh
        )

    def learn_refused(self, endpoint: Key, options: frozenset[str]) -> None:
        """Leave `options`, members that the proxy puts in, out of what `endpoint` gets next."""
        known = self.refused_options.get(endpoint, frozenset())
        if options <= known:
            return
        self.refused_options.pop(endpoint, None)
        if len(self.refused_options) >= MAX_LEARNT:
            del self.refused_options[next(iter(self.refused_options))]
        self.refused_options[endpoint] = known | options

    def edges(self, provider: str, slug: str) -> EdgeTemplates:
        """Return what is known of how this provider's streams under `slug` begin and end."""
        edges = self._edges.get((provider, slug))
        if edges is None:
            if len(self._edges) >= MAX_SERVERS:
                self._edges.clear()
            edges = self._edges[provider, slug] = EdgeTemplates()
        return edges

    def close_record(self, record: Record, caller: Caller, lease: Lease | None) -> None:
        """Account for a request that has ended; nothing may change its record after this."""
        self.metrics.observe(record)
        self.accounts.close(record, caller, lease)
        if self.access_log is not None:
            self.access_log.write(record)
        if self.on_closed is not None:
            self.on_closed(record)


def shortest_wait_of(config: Config) -> float:
    """Return the seconds in which no time limit of any request can pass."""
    settings = config.server
    waits = [settings.write_timeout, settings.comment_after or math.inf]
    waits += [provider.limits.shortest for provider in config.providers.values()]
    waits += [
        endpoint.limits.shortest
        for model in config.models
        for endpoint in model.endpoints
        if endpoint.limits is not None
    ]
    return min(waits)


def _behind_wildcards(config: Config, upstreams: dict[str, Upstream]) -> dict[str, Upstream]:
    """Return the upstreams that a wildcard names; none if their models are not to be listed."""
    if not config.server.models_refresh:
        return {}
    wild = [
        endpoint for model in config.models if model.is_wildcard for endpoint in model.endpoints
    ]
    return {endpoint.provider: upstreams[endpoint.provider] for endpoint in wild}
