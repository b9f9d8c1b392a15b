"""Model servers behind TLS: trusted, refused, and streamed through."""

from __future__ import annotations

import ssl
from dataclasses import replace

import pytest

from hoberproxy.routing.catalog import Provider
from tests.support.patience import patient
from tests.support.scripted import (
    Close,
    ScriptedUpstream,
    Send,
    SendMany,
    Stall,
    chunk,
    completion,
    dribble,
    json_response,
    sse,
    sse_head,
    stream_events,
)

from .conftest import ProxyTo
from .harness import LIMITS, SLUG, as_client_sees, chat, error_event_of, eventually, provider_for

EVENTS = stream_events(5)


def by_name(upstream: ScriptedUpstream, host: str = "localhost", **changes: object) -> Provider:
    return provider_for(upstream, host=host, **changes)


@pytest.mark.parametrize("size", [3, 100_000], ids=["in small segments", "whole"])
async def test_a_stream_over_tls_passes_byte_for_byte(proxy_to: ProxyTo, size: int) -> None:
    script = dribble(sse(*EVENTS), size)
    async with (
        ScriptedUpstream(script, tls=True) as upstream,
        proxy_to(by_name(upstream)) as proxy,
    ):
        reply = await proxy.post(chat(stream=True))
        record = await proxy.wait_for_record()
    assert (reply.status, reply.body) == (200, as_client_sees(EVENTS))
    assert (record.completion_tokens, record.has_usage) == (3, True)


async def test_a_connection_over_tls_is_kept(proxy_to: ProxyTo) -> None:
    answer = json_response(200, completion())
    async with ScriptedUpstream(default=answer, tls=True) as upstream:
        async with proxy_to(upstream) as proxy:
            for _ in range(3):
                assert (await proxy.post(chat())).json()["model"] == SLUG
            assert upstream.connections == 1


async def test_a_body_until_close_over_tls_is_complete(proxy_to: ProxyTo) -> None:
    script = sse(*EVENTS, chunked=False)
    async with ScriptedUpstream(script, tls=True) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert (reply.body, reply.is_complete) == (as_client_sees(EVENTS), True)


async def test_a_cut_over_tls_is_told(proxy_to: ProxyTo) -> None:
    script = [*sse(*EVENTS)[:3], Close()]
    async with ScriptedUpstream(script, tls=True) as upstream, proxy_to(upstream) as proxy:
        reply = await proxy.post(chat(stream=True))
    assert error_event_of(reply.body)["code"] == "upstream_error"


@pytest.mark.parametrize(
    ("host", "ca_file", "reason"),
    [
        ("localhost", None, "certificate not accepted: "),
        ("127.0.0.2", "given", "certificate not accepted: "),
    ],
    ids=["by an unknown authority", "for another name"],
)
async def test_a_certificate_that_proves_nothing_is_refused(
    proxy_to: ProxyTo,
    host: str,
    ca_file: str | None,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "hoberproxy.upstream")
    # All of 127/8 is this machine: the upstream is reached, but under a name it cannot prove.
    async with ScriptedUpstream(tls=True, host="0.0.0.0") as upstream:
        provider = by_name(upstream, host, ca_file=ca_file and upstream.ca_file)
        async with proxy_to(provider) as proxy:
            reply = await proxy.post(chat())
            record = await proxy.wait_for_record()
        assert not upstream.requests, "no prompt and no key for a server that is not ours"
    assert (reply.status, reply.error["code"]) == (502, "upstream_error")
    assert record.phase == "connect"
    assert reason in caplog.text


async def test_the_name_is_sent_for_the_server_to_choose_by(
    proxy_to: ProxyTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    async with ScriptedUpstream(json_response(200, completion()), tls=True) as upstream:
        from tests.support import scripted

        context: ssl.SSLContext = scripted._certificates()[0]
        context.sni_callback = lambda _socket, name, _context: asked.append(name)
        try:
            async with proxy_to(by_name(upstream)) as proxy:
                assert (await proxy.post(chat())).status == 200
        finally:
            context.sni_callback = None
    assert asked == ["localhost"]


async def test_plain_http_where_tls_is_expected_is_a_502(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(default=json_response(200, completion())) as upstream:
        limits = replace(LIMITS, connect=patient(1.0))
        secure = provider_for(upstream.base_url.replace("http:", "https:"), limits=limits)
        async with proxy_to(secure) as proxy:
            # What TLS sends is no request: the scripted upstream waits, so the limit ends it.
            reply = await proxy.post(chat())
    assert reply.status in (502, 504)


@pytest.mark.parametrize("flowing", [False, True], ids=["silent", "paused by backpressure"])
async def test_a_client_that_leaves_closes_its_upstream(proxy_to: ProxyTo, flowing: bool) -> None:
    rest = SendMany(chunk(EVENTS[1]) * 100 for _ in range(100_000)) if flowing else Stall()
    script = [sse_head(), Send(chunk(EVENTS[1])), rest]
    async with ScriptedUpstream(script, tls=True) as upstream, proxy_to(upstream) as proxy:
        async with proxy.connect() as client:
            await client.ask(chat(stream=True))
            await client.read_head()
            if flowing:
                client.writer.transport.pause_reading()
                await eventually(lambda: any(each.is_paused for each in proxy.server._connections))
        await upstream.wait_for_hangup()
        assert (await proxy.wait_for_record()).status == 499
