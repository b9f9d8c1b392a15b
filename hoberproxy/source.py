"""A config file as it was read, with the files it names: enough to serve it again.

A worker that replaces another must serve what was accepted, not what the file says by now.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from .reader import parse_config
from .settings import Address, Config
from .values import ConfigError, InvalidValue, parse_host_and_port


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """`listen` stands over the config's own, if it is given."""

    text: str
    files: dict[str, str] = field(default_factory=dict)
    listen: str | None = None

    def serialize(self) -> bytes:
        """For another process: keys of providers are among the files."""
        return json.dumps(dataclasses.asdict(self)).encode()

    def parse(self) -> Config:
        """The config, with the environment as it is. Raises ConfigError."""
        return self._parse(self._read_again)

    def _read_again(self, name: str) -> str:
        if name not in self.files:
            raise FileNotFoundError
        return self.files[name]

    def _parse(self, read_file: Callable[[str], str]) -> Config:
        config = parse_config(self.text, environ=os.environ, read_file=read_file)
        if self.listen is None:
            return config
        server = dataclasses.replace(config.server, listen=(parse_listen(self.listen),))
        return dataclasses.replace(config, server=server)


def read_source(path: str, listen: str | None = None) -> tuple[ConfigSource, Config]:
    """Read and check a config file. Raises ConfigError with all that is wrong."""
    source = ConfigSource(read_text(path), {}, listen)

    def read_file(name: str) -> str:
        text = source.files[name] = Path(name).read_text(encoding="utf-8")
        return text

    return source, source._parse(read_file)


def read_text(path: str) -> str:
    """The text of a config file. Raises ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError([f"{path}: cannot be read: {exc.strerror}"]) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError([f"{path}: expected UTF-8, got other bytes"]) from exc


def read_example() -> str:
    """Return the commented config that `hoberproxy config --example` prints."""
    return resources.files(__package__).joinpath("example.toml").read_text(encoding="utf-8")


def parse_listen(text: str) -> Address:
    """The address of --listen. Raises ConfigError."""
    try:
        return Address(*parse_host_and_port(text))
    except InvalidValue as error:
        raise ConfigError([f"--listen: {error}"]) from None
