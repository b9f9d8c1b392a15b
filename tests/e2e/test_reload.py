"""A reload of a running service: what is served by the new config, and what changes nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hoberproxy.config.settings import Address
from hoberproxy.config.values import ConfigError
from hoberproxy.process.listeners import Listeners
from hoberproxy.process.server import Server
from tests.support.scripted import ScriptedUpstream, completion, json_response

from .harness import OTHER_SLUG, chat, eventually, make_config, provider_for
from .test_workers import service, write_config

GOOD = json_response(200, completion())


class Public(Listeners):
    """Sockets that others than this machine reach."""

    @property
    def addresses(self) -> list[Address]:
        return [Address("192.0.2.1", 8080)]


async def test_a_start_without_keys_refuses_an_address_that_others_reach(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, provider_for("http://127.0.0.1:1/v1"), listen=(Address("192.0.2.1", 0),)
    )
    with pytest.raises(ConfigError, match=r"keys\.required"):
        await Server(config, Public()).start()


async def test_sighup_reads_the_config_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(default=GOOD) as upstream,
        service(tmp_path, upstream, workers=1) as running,
    ):

        async def is_served(slug: str) -> bool:
            return (await running.post(chat(model=slug))).status == 200

        write_config(tmp_path, upstream.base_url, slug=OTHER_SLUG)
        running.send(signal.SIGHUP)
        await running.logged("config reloaded")
        await eventually(lambda: len(running.workers()) == 1)
        assert await is_served(OTHER_SLUG)
        assert (await running.post(chat())).status == 404
        write_config(tmp_path, "ftp://nowhere", slug="no/such:floor")
        running.send(signal.SIGHUP)
        await running.logged("config not reloaded: models")
        await running.logged("config not reloaded: providers.a.base_url")  # all problems at once
        assert await is_served(OTHER_SLUG)
        config = write_config(tmp_path, upstream.base_url)
        providers = f'[providers.a]\nca_file = "{tmp_path}/gone.pem"'
        text = config.read_text().replace("http://", "https://")
        config.write_text(text.replace("[providers.a]", providers))
        running.send(signal.SIGHUP)
        await running.logged("config not reloaded: providers.a.ca_file")
        assert await is_served(OTHER_SLUG)
        config.unlink()
        running.send(signal.SIGHUP)
        await running.logged("hoberproxy.toml: expected a readable file")
        assert await is_served(OTHER_SLUG)


async def test_a_signal_during_a_reload_leads_to_another(tmp_path: Path) -> None:
    """The file may have been read before it was written the second time."""
    async with (
        ScriptedUpstream(default=GOOD) as upstream,
        service(tmp_path, upstream, workers=1) as running,
    ):
        before = set(running.workers())
        running.send(signal.SIGHUP)
        await eventually(lambda: set(running.workers()) - before)  # it has read the file
        write_config(tmp_path, upstream.base_url, slug=OTHER_SLUG)
        running.send(signal.SIGHUP)
        await running.logged("config reloaded", 2)
        await eventually(lambda: len(running.workers()) == 1)
        assert (await running.post(chat(model=OTHER_SLUG))).status == 200
