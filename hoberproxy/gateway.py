"""All that the requests of one process share, built once from the config.

Holds, does not decide: the exchange walks the path, the door owns the sockets.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from . import __version__
from .access import Caller, Keyring
from .accesslog import AccessLog
from .accounting import Accounts
from .admission import Admission, BodyMemory, ConnectionRoom
from .catalog import Catalog, Provider
from .config import Config, ConfigError
from .deadlines import Wheel
from .frames import Frames
from .health import Health, Key
from .http11 import LARGE_BYTES, Parts, serialize_fields, serialize_request_head
from .ledger import Ledger
from .limits import Lease
from .metrics import Metrics
from .pool import Pool
from .record import Record

if TYPE_CHECKING:
    from .exchange import Exchange

UNBOUNDED: Final = 2**62  # bytes or connections, of a process that has not been told
MAX_LEARNT: Final = 4096  # endpoints behind wildcards are named by clients
_time: Final = time.time
_BYTE_DIGITS: Final = [f"{number:02x}" for number in range(256)]
SSE_TYPE: Final = b"text/event-stream; charset=utf-8"
USER_AGENT: Final = f"hoberproxy/{__version__}"


class Upstream:
    """A provider ready to be asked: its pool, and the head that every request to it begins with."""

    def __init__(self, provider: Provider, loop: asyncio.AbstractEventLoop, wheel: Wheel) -> None:
        self.provider = provider
        self.pool = Pool(provider, loop, wheel)
        chat = b"POST", provider.chat_path
        self._stream_head = _request_head(provider, *chat, accept=b"text/event-stream")
        self._json_head = _request_head(provider, *chat, accept=b"application/json")
        self._answer_fields: dict[tuple[str, bool], bytes] = {}

    def serialize_request(
        self, body: Parts, extra: list[tuple[bytes, bytes]], *, stream: bool
    ) -> Parts:
        """The whole request, a small one in one part; `extra` are fields of the client's head."""
        head = self._stream_head if stream else self._json_head
        fields = b"".join([b"%b: %b\r\n" % field for field in extra]) if extra else b""
        length = 0
        for part in body:
            length += len(part)
        digits = str(length).encode()  # half of what `%d` touches
        parts = [head, fields, b"content-length: ", digits, b"\r\n\r\n", *body]
        if length < LARGE_BYTES:
            return [b"".join(parts)]
        return [b"".join(parts[: -len(body)]), *body]

    def answer_fields(self, slug: str, is_stream: bool) -> bytes:
        """The header lines that every answer of this provider under this slug has."""
        fields = self._answer_fields.get((slug, is_stream))
        if fields is None:
            if len(self._answer_fields) >= MAX_LEARNT:
                self._answer_fields.clear()
            fields = self._answer_fields[slug, is_stream] = serialize_fields(
                [
                    (b"content-type", SSE_TYPE if is_stream else b"application/json"),
                    (b"x-hober-provider", self.provider.name.encode()),
                    (b"x-hober-model", slug.encode()),
                ]
            )
        return fields

    def serialize_listing_request(self) -> bytes:
        """GET /models, with the key and the headers of all requests."""
        path = self.provider.path + "/models"
        head = _request_head(self.provider, b"GET", path, accept=b"application/json")
        return head + b"content-length: 0\r\n\r\n"


def _request_head(provider: Provider, method: bytes, path: str, *, accept: bytes) -> bytes:
    """The head's constant part: without content-length, without the empty line."""
    headers = [
        (b"host", provider.authority.encode()),
        (b"content-type", b"application/json"),
        (b"accept", accept),
        (b"accept-encoding", b"identity"),
        (b"user-agent", USER_AGENT.encode()),
    ]
    if provider.api_key is not None:
        headers.append((b"authorization", b"Bearer " + provider.api_key.encode()))
    added = {name.lower().encode(): value.encode() for name, value in provider.headers}
    # The config may name another user agent; the rest of ours it can't (catalog.py refuses it).
    headers = [(name, value) for name, value in headers if name not in added]
    headers += added.items()
    return serialize_request_head(method, path.encode(), headers)[:-2]


@dataclass(slots=True)
class Gateway:
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


def make_upstreams(
    config: Config,
    loop: asyncio.AbstractEventLoop,
    wheel: Wheel,
    existing: Mapping[str, Upstream] = MappingProxyType({}),
) -> dict[str, Upstream]:
    """One for each provider; an `existing` one that has not changed goes on, with its pool.

    Raises ConfigError if a certificate file cannot be used.
    """
    upstreams: dict[str, Upstream] = {}
    problems: list[str] = []
    for name, provider in config.providers.items():
        if name in existing and existing[name].provider == provider:
            upstreams[name] = existing[name]
            continue
        try:
            upstreams[name] = Upstream(provider, loop, wheel)
        except (OSError, ssl.SSLError):
            problems.append(
                f"providers.{name}.ca_file: expected a readable file of PEM certificates, "
                f"got {provider.ca_file!r}; check the path and the file"
            )
    if problems:
        raise ConfigError(problems)
    return upstreams


def unix_time() -> float:
    """The one wall clock of the request path."""
    return _time()
