"""Another config while requests run: what is served by it, what ends by the old one, what stays."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hoberproxy.catalog import Provider
from hoberproxy.connector import Connector
from hoberproxy.server import Server
from hoberproxy.settings import Address, Config, KeySettings
from hoberproxy.values import ConfigError
from tests.scripted import (
    AwaitRelease,
    Script,
    ScriptedUpstream,
    completion,
    json_response,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import (
    OTHER_SLUG,
    PROGRAM_CONFIG,
    SLUG,
    UPSTREAM_MODEL,
    WAIT,
    Program,
    Proxy,
    as_client_sees,
    chat,
    eventually,
    make_config,
    model_at,
    provider_for,
)

GOOD = json_response(200, completion())
EVENTS = stream_events(3)
WAITING: Script = [*sse(*EVENTS)[:3], AwaitRelease("go"), *sse(*EVENTS)[3:]]


def config_for(folder: Path, *providers: Provider, slug: str = SLUG) -> Config:
    return make_config(folder, *providers, models=[model_at(slug, *(p.name for p in providers))])


# What is served


async def test_the_next_request_is_served_by_the_new_config(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(GOOD) as first,
        ScriptedUpstream(GOOD) as second,
        proxy_to(first) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat())
        assert (await client.read_reply()).headers["x-hober-provider"] == "a"
        proxy.server.reload(config_for(tmp_path, provider_for(second, "b"), slug=OTHER_SLUG))
        await client.ask(chat(model=OTHER_SLUG))
        assert (await client.read_reply()).headers["x-hober-provider"] == "b"
        await client.ask(chat())
        gone = await client.read_reply()
        await client.send(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        listed = await client.read_reply()
    assert gone.error["code"] == "model_not_found"
    assert [model["id"] for model in listed.json()["data"]] == [OTHER_SLUG]


async def test_a_new_key_is_used_from_the_next_request_on(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, proxy_to(upstream) as proxy:
        await proxy.post(chat())
        changed = provider_for(upstream, "a", api_key="sk-another")
        proxy.server.reload(config_for(tmp_path, changed))
        await proxy.post(chat())
        assert upstream.requests[1].headers["authorization"] == "Bearer sk-another"
        assert upstream.connections == 2, "what one key has opened does not serve another"


# What runs


async def test_a_running_stream_ends_unharmed_and_takes_its_connection_along(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(WAITING) as retired,
        ScriptedUpstream() as other,
        proxy_to(retired) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat(stream=True))
        await client.read_head()
        first = await client.read_until(b"word0")
        proxy.server.reload(config_for(tmp_path, provider_for(other, "b")))
        retired.release("go")
        rest = await client.read_until(b"[DONE]\n\n")
        await eventually(lambda: retired.open_connections == 0)
        record = await proxy.wait_for_record()
    assert first + rest == as_client_sees(EVENTS)
    assert (record.status, record.code, record.provider) == (200, "", "a")


async def test_a_request_falls_over_by_the_plan_it_began_with(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    failing = [AwaitRelease("go"), *json_response(500, {})]
    async with (
        ScriptedUpstream(failing) as first,
        ScriptedUpstream(GOOD) as second,
        ScriptedUpstream() as other,
        proxy_to(first, second) as proxy,
        proxy.connect() as client,
    ):
        await client.ask(chat())
        await first.wait_for_requests()
        proxy.server.reload(config_for(tmp_path, provider_for(other, "c")))
        first.release("go")
        reply = await client.read_reply()
        await eventually(lambda: first.open_connections + second.open_connections == 0)
    assert (reply.status, reply.headers["x-hober-provider"]) == (200, "b")


async def test_a_request_that_waits_for_a_name_is_not_forgotten(
    proxy_to: ProxyTo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, go = asyncio.Event(), asyncio.Event()
    look_up = Connector._look_up

    async def look_up_slowly(connector: Connector) -> Any:
        looking.set()
        await go.wait()
        return await look_up(connector)

    monkeypatch.setattr(Connector, "_look_up", look_up_slowly)
    async with ScriptedUpstream(GOOD) as upstream, ScriptedUpstream() as other:
        named = provider_for(f"http://localhost:{upstream.port}/v1", "a")
        async with proxy_to(named) as proxy, proxy.connect() as client:
            await client.ask(chat())
            await looking.wait()
            proxy.server.reload(config_for(tmp_path, provider_for(other, "b")))
            go.set()
            assert (await client.read_reply()).status == 200


async def test_idle_connections_of_a_retired_provider_are_closed_and_others_kept(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(default=GOOD) as retired,
        ScriptedUpstream(default=GOOD) as kept,
        proxy_to(retired, kept) as proxy,
    ):
        await proxy.post(chat())
        await proxy.post(chat(provider={"only": ["b"]}))
        proxy.server.reload(config_for(tmp_path, provider_for(kept, "b")))
        await eventually(lambda: retired.open_connections == 0)
        await proxy.post(chat())
        assert [seen.connection for seen in kept.requests] == [0, 0]


# What stays, what goes


async def test_what_was_learnt_of_an_endpoints_health_stays(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    async with (
        ScriptedUpstream(json_response(429, {}, ("Retry-After", "60"))) as first,
        ScriptedUpstream(default=GOOD) as second,
        proxy_to(first, second) as proxy,
    ):
        await proxy.post(chat())
        changed = provider_for(first, "a", keepalive=1.0)
        proxy.server.reload(config_for(tmp_path, changed, provider_for(second, "b")))
        reply = await proxy.post(chat())
    assert reply.headers["x-hober-provider"] == "b"
    assert "x-hober-attempts" not in reply.headers


async def test_what_an_endpoint_refused_is_offered_once_more(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    refused = json_response(400, {"error": {"message": "unknown: stream_options"}})
    stream = sse(*EVENTS)
    async with (
        ScriptedUpstream(refused, stream, stream) as upstream,
        proxy_to(upstream) as proxy,
    ):
        await proxy.post(chat(stream=True))
        proxy.server.reload(config_for(tmp_path, provider_for(upstream)))
        await proxy.post(chat(stream=True))
        assert ["stream_options" in seen.json() for seen in upstream.requests] == [
            *(True, False),
            True,
        ]


# A config that cannot be served


async def check_unchanged(proxy: Proxy, config: Config, problem: str) -> None:
    before = proxy.gateway.config
    with pytest.raises(ConfigError, match=problem):
        proxy.server.reload(config)
    assert proxy.gateway.config is before
    reply = await proxy.post(chat())
    assert (reply.status, reply.headers["x-hober-provider"]) == (200, "a")


async def test_a_certificate_that_is_gone_changes_nothing(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    async with ScriptedUpstream(GOOD) as upstream, proxy_to(upstream) as proxy:
        secure = provider_for("https://127.0.0.1:1/v1", "b", ca_file=str(tmp_path / "gone.pem"))
        await check_unchanged(proxy, config_for(tmp_path, secure), "providers.b.ca_file")


async def test_keys_cannot_be_turned_off_while_others_than_this_machine_are_served(
    proxy_to: ProxyTo, tmp_path: Path
) -> None:
    """The new config listens on loopback, but the listeners are those of the start."""
    async with ScriptedUpstream(GOOD) as upstream, proxy_to(upstream) as proxy:
        proxy.server.addresses = [Address("192.0.2.1", 8080)]
        config = config_for(tmp_path, provider_for(upstream))
        assert not config.keys.required
        await check_unchanged(proxy, config, r"keys\.required: .* 192\.0\.2\.1:8080")
        proxy.server.reload(replace(config, keys=KeySettings(required=True)))


async def test_a_start_without_keys_refuses_an_address_that_others_reach(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, provider_for("http://127.0.0.1:1/v1"), listen=(Address("192.0.2.1", 0),)
    )
    with pytest.raises(ConfigError, match=r"keys\.required"):
        await Server(config).start()


# By signal


def write_config(folder: Path, url: str, slug: str) -> None:
    text = PROGRAM_CONFIG.format(
        server="", folder=folder, url=url, slug=slug, upstream_model=UPSTREAM_MODEL
    )
    text = text.replace('"warning"', '"info"').replace("127.0.0.1:0", "127.0.0.1:1")
    (folder / "hoberproxy.toml").write_text(text)  # --listen stands over that port


@asynccontextmanager
async def logging_program(folder: Path) -> AsyncIterator[tuple[Program, Callable[[], str]]]:
    """`hoberproxy serve` with the config in `folder`, and what it has logged so far."""
    log = folder / "stderr.txt"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hoberproxy", "serve"),
            *("--config", str(folder / "hoberproxy.toml"), "--listen", "127.0.0.1:0"),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT):
            line = await process.stdout.readline()
        yield Program(process, int(line.decode().rpartition(":")[2]), folder), log.read_text
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_sighup_reads_the_config_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream:
        write_config(tmp_path, upstream.base_url, SLUG)
        async with logging_program(tmp_path) as (program, log):
            write_config(tmp_path, upstream.base_url, OTHER_SLUG)
            program.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "config reloaded" in log())
            assert (await program.post(chat(model=OTHER_SLUG))).status == 200
            assert (await program.post(chat())).status == 404
            write_config(tmp_path, "ftp://nowhere", "no/such:floor")
            program.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "config not reloaded: models" in log())
            assert "config not reloaded: providers.a.base_url" in log(), "all problems at once"
            assert (await program.post(chat(model=OTHER_SLUG))).status == 200
            (tmp_path / "hoberproxy.toml").unlink()
            program.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "expected a readable file" in log())
            assert (await program.post(chat(model=OTHER_SLUG))).status == 200
            assert "changed listener" not in log(), "--listen has not changed"


async def test_a_signal_during_a_reload_leads_to_another(proxy_to: ProxyTo, tmp_path: Path) -> None:
    """The file may have been read before it was written the second time."""
    async with ScriptedUpstream() as upstream, proxy_to(upstream) as proxy:
        slugs = [OTHER_SLUG, "test/last"]
        reading, go = threading.Event(), threading.Event()

        def load() -> Config:
            slug = slugs.pop(0)
            reading.set()
            assert go.wait(WAIT)
            return config_for(tmp_path, provider_for(upstream), slug=slug)

        proxy.server.reload_on_signal(load)
        signal.raise_signal(signal.SIGHUP)
        await eventually(reading.is_set)
        signal.raise_signal(signal.SIGHUP)
        await asyncio.sleep(0.02)  # for the signal to reach the loop
        go.set()
        await eventually(lambda: proxy.gateway.catalog.find("test/last"))
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
