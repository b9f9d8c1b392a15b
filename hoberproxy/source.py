"""Read a config file and keep its text with that of the files it names.

A worker that replaces another must serve the config that was accepted, not what the file says by
now.
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
    """The text of a config and of the files it names; `listen` replaces the config's own."""

    text: str
    files: dict[str, str] = field(default_factory=dict)
    listen: str | None = None

    def serialize(self) -> bytes:
        """Return the source as bytes for another process; they hold providers' keys."""
        return json.dumps(dataclasses.asdict(self)).encode()

    def parse(self) -> Config:
        """Parse the config again, with the environment as it is now. Raises ConfigError."""
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
    """Read and parse the config file at `path`. Raises ConfigError with all its problems."""
    source = ConfigSource(_read_text(path), {}, listen)

    def read_file(name: str) -> str:
        text = source.files[name] = Path(name).read_text(encoding="utf-8")
        return text

    return source, source._parse(read_file)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        problem = InvalidValue("a readable file", reason, "mend the path or its permissions")
    except UnicodeDecodeError:
        problem = InvalidValue("UTF-8", "other bytes", "save the file as UTF-8")
    raise ConfigError([f"{path}: {problem}"])


def read_example() -> str:
    """Return the commented config that `hoberproxy config --example` prints."""
    return resources.files(__package__).joinpath("example.toml").read_text(encoding="utf-8")


def parse_listen(text: str) -> Address:
    """Parse `text` of the option --listen. Raises ConfigError."""
    try:
        return Address(*parse_host_and_port(text))
    except InvalidValue as error:
        raise ConfigError([f"--listen: {error}"]) from None
