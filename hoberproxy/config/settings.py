"""Hold the settings of a config file as frozen values with their defaults.

Each object of the program receives its own part of `Config`. `config/reader.py` parses a file into
them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from ..routing.catalog import Model, Provider, bracketed


@dataclass(frozen=True, slots=True)
class Address:
    """An address to listen on; with port 0 the system chooses the port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name; what it resolves to is not known here
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and addresses of the downstream side. Times in seconds."""

    listen: tuple[Address, ...] = (Address("127.0.0.1", 8080),)
    metrics_listen: Address | None = Address("127.0.0.1", 9464)
    admin_socket: str = ""  # a path, or "off"; empty: beside the records file
    max_body_bytes: int = 32 * 1024 * 1024  # a few images as data URLs; a body is held in memory
    max_body_memory: int = 0  # of all bodies in flight; 0: a quarter of the machine's memory
    head_timeout: float = 10.0  # a head is a segment or two; a slower one only holds a socket
    body_timeout: float = 60.0  # max_body_bytes at 4.5 Mbit/s
    keepalive_timeout: float = 75.0  # over the 60 s of common balancers: they close first, safely
    write_timeout: float = 300.0  # a client that reads nothing for so long is cut
    drain_timeout: float = 600.0  # most answers end within; orchestrators often allow less
    comment_after: float = 10.0  # well under the 60 s after which balancers cut; 0 is never
    cors_origins: tuple[str, ...] = ()
    max_streams: int = 10_000  # of all workers; two sockets each, and memory; 0 is no limit
    models_refresh: float = 600.0  # between reads of the lists of wildcards' providers; 0: never


@dataclass(frozen=True, slots=True)
class KeySettings:
    """Rules for the keys of clients and their limits."""

    required: bool = True
    # Tokens held for an answer that neither its request nor its endpoint's max_output limits.
    # Without a limit in the request most servers stop at 4,096 to 16,384.
    assumed_output: int = 8192


@dataclass(frozen=True, slots=True)
class RecordSettings:
    """The file of keys and records, and how long records are kept."""

    file: str = "hoberproxy.db"
    keep_days: int = 0  # of single records; 0: for ever. Sums of days are always kept


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """Limits of one request's attempts, over all its endpoints and models."""

    # Catalogs have two or three endpoints a model; for more attempts no client waits.
    max_attempts: int = 6
    # Seconds after which no further attempt begins; SDKs give up after ten minutes by default.
    attempts_timeout: float = 900.0


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Level, form and share of the log's lines."""

    level: str = "info"
    access: bool = True
    format: str = "auto"  # human on a terminal, JSON elsewhere
    sample: float = 1.0  # share of requests without a failure that get a line


@dataclass(frozen=True, slots=True)
class Config:
    """A whole config. Each object of the program receives its own part, never all of it."""

    server: ServerSettings
    keys: KeySettings
    records: RecordSettings
    log: LogSettings
    providers: Mapping[str, Provider]
    models: tuple[Model, ...]
    routing: RoutingSettings = RoutingSettings()
