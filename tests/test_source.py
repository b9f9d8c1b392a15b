"""A config as it was read: a worker serves what was accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from hoberproxy.source import ConfigSource, read_source
from hoberproxy.values import ConfigError

TEXT = """\
[providers.a]
base_url = "http://127.0.0.1:1/v1"
api_key_file = "{key}"

[[models]]
slug = "a/*"
endpoints = [{{ provider = "a" }}]
"""


def write(folder: Path) -> str:
    (folder / "key").write_text("sk-first")
    config = folder / "config.toml"
    config.write_text(TEXT.format(key=folder / "key"))
    return str(config)


def test_a_source_gives_the_same_config_when_its_files_are_gone(tmp_path: Path) -> None:
    source, config = read_source(write(tmp_path))
    (tmp_path / "key").unlink()
    (tmp_path / "config.toml").write_text("nonsense")
    again = ConfigSource(source.text, dict(source.files), source.listen).parse()
    assert again == config
    assert again.providers["a"].api_key == "sk-first"


def test_listen_stands_over_the_config(tmp_path: Path) -> None:
    _, config = read_source(write(tmp_path), "127.0.0.1:7")
    assert [str(address) for address in config.server.listen] == ["127.0.0.1:7"]
    with pytest.raises(ConfigError, match="--listen"):
        read_source(write(tmp_path), "nowhere")


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable file"):
        read_source(str(tmp_path / "gone"))
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_source(str(tmp_path / "bytes"))
    with pytest.raises(ConfigError, match=r"providers\.a\.api_key_file"):
        ConfigSource(TEXT.format(key="never read")).parse()
