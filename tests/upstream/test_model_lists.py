"""What providers behind wildcards have, as GET /v1/models shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hoberproxy.api.routes import ModelsPage
from hoberproxy.upstream import model_lists, models_listing
from hoberproxy.upstream.models_listing import parse_listing
from tests.conftest import SLUG, Proxy, StartProxy, chat, get, wait_until
from tests.support.patience import WAIT
from tests.support.scripted import (
    AwaitRelease,
    Close,
    Reset,
    Script,
    ScriptedUpstream,
    Send,
    Stall,
    completion,
    json_response,
    serialize_head,
)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        # https://platform.openai.com/docs/api-reference/models/list
        pytest.param({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}, ["a", "b"], id="data"),
        # https://docs.together.ai/reference/models
        pytest.param([{"id": "a", "type": "chat"}], ["a"], id="an array alone"),
        # https://docs.cohere.com/reference/list-models
        pytest.param({"models": [{"name": "a"}, {"name": "b"}]}, ["a", "b"], id="models by name"),
        # llama.cpp has both: https://github.com/ggml-org/llama.cpp/tree/master/tools/server
        pytest.param({"models": [{"name": "x"}], "data": [{"id": "a"}]}, ["a"], id="data first"),
        pytest.param({"data": []}, [], id="none at all"),
        pytest.param({"data": [{"id": "a"}, {"id": "a"}]}, ["a"], id="one twice"),
        pytest.param({"data": [{"id": 1}, "a", None, {}, {"id": ""}]}, [], id="no names"),
        pytest.param({"data": None}, None, id="null"),
        pytest.param({"error": {"message": "no"}}, None, id="an error"),
        pytest.param("text", None, id="a string"),
        pytest.param(3, None, id="a number"),
    ],
)
def test_names_are_found_in_every_form_that_servers_send(
    document: Any, names: list[str] | None
) -> None:
    assert parse_listing(json.dumps(document).encode()) == names


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b'{"data":[{"id":"a"}', b"[" * 9999])
def test_what_is_no_json_has_no_names(body: bytes) -> None:
    assert parse_listing(body) is None


# A running proxy


def models(*names: str) -> Script:
    return json_response(200, {"object": "list", "data": [{"id": name} for name in names]})


async def start(start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Proxy:
    """A proxy that asks at its start, and asks again in a moment."""
    monkeypatch.setattr(model_lists, "BEGIN_AFTER", 0.0)
    monkeypatch.setattr(model_lists, "FIRST_RETRY", 0.02)
    return await start_proxy(**({"models_refresh": 0.05} | settings))


async def slugs(proxy: Proxy) -> list[str]:
    client = await proxy.connect()
    client.send(get("/v1/models"))
    answer = await client.read_answer()
    await client.aclose()
    return [entry["id"] for entry in answer.json()["data"]]


def listed(proxy: Proxy, *names: str) -> Callable[[], bool]:
    return lambda: proxy.context.model_lists.listed.get("scripted") == names


async def test_models_behind_a_wildcard_are_listed_and_served(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream._default = models("m-1", "org/m-2", SLUG)
    proxy = await start(start_proxy, monkeypatch, models_refresh=600.0)
    await wait_until(listed(proxy, "m-1", "org/m-2", SLUG))
    assert await slugs(proxy) == [SLUG, "any/m-1", "any/org/m-2", f"any/{SLUG}"]
    (seen,) = upstream.requests
    assert (seen.method, seen.path) == ("GET", "/v1/models")
    client = await proxy.connect()
    client.send(get("/v1/models/any/org%2Fm-2"))
    assert (await client.read_answer()).json()["id"] == "any/org/m-2"
    upstream._default = json_response(200, completion())
    client.send(chat(proxy.key, {"model": "any/org/m-2", "messages": [{"role": "user"}]}))
    client.send(chat(proxy.key, {"model": "any/org/m-2", "messages": MESSAGES}))
    assert (await client.read_answer()).status == 400
    assert (await client.read_answer()).status == 200
    assert upstream.requests[-1].json()["model"] == "org/m-2"


MESSAGES = [{"role": "user", "content": "hi"}]


async def test_the_first_who_wants_the_list_gets_all_of_it_and_nobody_is_asked_before(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lists, "BEGIN_AFTER", 3600.0)
    monkeypatch.setattr(model_lists, "FIRST_WAIT", WAIT)
    proxy = await start_proxy(models_refresh=600.0)
    client = await proxy.connect()
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    assert [seen.method for seen in upstream.requests] == ["POST"]
    upstream._default = models("m-1")
    assert await slugs(proxy) == [SLUG, "any/m-1"]
    upstream._default = models("m-2")
    assert await slugs(proxy) == [SLUG, "any/m-1"], "the next look is in ten minutes"


async def test_the_virtual_models_choose_among_named_ones_alone(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream._default = models("m-1")
    proxy = await start(start_proxy, monkeypatch, models_refresh=600.0)
    await wait_until(listed(proxy, "m-1"))
    upstream._default = json_response(200, completion())
    client = await proxy.connect()
    client.send(chat(proxy.key, {"model": "hober/auto", "messages": MESSAGES}))
    assert (await client.read_answer()).headers["x-hober-model"] == SLUG


async def test_a_provider_is_asked_again_and_its_new_list_shown(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream._default = models("new")
    upstream.add(models("old", "gone"))
    proxy = await start(start_proxy, monkeypatch)
    await wait_until(listed(proxy, "new"))
    assert await slugs(proxy) == [SLUG, "any/new"]


BAD: dict[str, Script] = {
    "an error": json_response(500, {"error": {"message": "broken"}}),
    "our key is wrong": json_response(401, {"error": {"message": "bad key"}}),
    "no such page": json_response(404, {}),
    "a page elsewhere": [Send(serialize_head(302, [("location", "/x"), ("content-length", "0")]))],
    "another document": json_response(200, {"data": {"id": "x"}}),
    "no JSON": [Send(serialize_head(200, [("content-length", "6")]) + b"<html>")],
    "a part": [Send(serialize_head(200, [("content-length", "60")]) + b'{"data":['), Close()],
    "a reset": [Reset()],
    "no HTTP": [Send(b"nonsense\r\n\r\n"), Close()],
    "nothing": [Close()],
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_a_list_is_kept_while_its_provider_has_none_to_give_and_then_replaced(
    start_proxy: StartProxy,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    bad: Script,
) -> None:
    upstream._default = [AwaitRelease("end"), *models("late")]
    upstream.add(models("kept"), bad, bad)
    proxy = await start(start_proxy, monkeypatch)
    await upstream.wait_for_requests(4)
    assert proxy.context.model_lists.listed == {"scripted": ("kept",)}
    assert await slugs(proxy) == [SLUG, "any/kept"]
    upstream.release("end")
    await wait_until(listed(proxy, "late"))


async def test_an_empty_list_is_a_list(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream._default = models()
    upstream.add(models("m"))
    proxy = await start(start_proxy, monkeypatch)
    await wait_until(lambda: len(upstream.requests) > 2)
    assert await slugs(proxy) == [SLUG]


async def test_a_provider_that_hangs_delays_neither_start_nor_requests_nor_the_end(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lists, "FIRST_WAIT", 0.05)
    upstream.add([Stall()])
    proxy = await start(start_proxy, monkeypatch, models_refresh=600.0)
    await upstream.wait_for_requests(1)
    assert await slugs(proxy) == [SLUG]
    client = await proxy.connect()
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    await proxy.context.model_lists.aclose()
    await upstream.wait_for_hangup()


async def test_a_provider_that_hangs_is_given_up_and_asked_again(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lists, "LIMITS", replace(model_lists.LIMITS, total=0.1))
    upstream._default = models("m")
    half = Send(serialize_head(200, [("transfer-encoding", "chunked")]) + b"1\r\n[\r\n")
    upstream.add([Stall()], [half, Stall()])
    proxy = await start(start_proxy, monkeypatch)
    await wait_until(listed(proxy, "m"))
    await upstream.wait_for_hangup(0)
    await upstream.wait_for_hangup(1)


async def test_a_list_is_bounded_in_bytes_and_in_models(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_listing, "MAX_BODY_BYTES", 10_000)
    monkeypatch.setattr(model_lists, "MAX_MODELS", 3)
    upstream._default = models("a", "b", "c", "d", "e")
    upstream.add(models(*(f"long-name-{number}" for number in range(1000))))
    proxy = await start(start_proxy, monkeypatch)
    await wait_until(listed(proxy, "a", "b", "c"))


async def test_nobody_is_asked_without_need(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = await start(start_proxy, monkeypatch, models_refresh=0.0)
    assert await slugs(off) == [SLUG]
    proxy = await start_proxy(
        models_refresh=0.01, change=lambda config: replace(config, models=config.models[:1])
    )
    client = await proxy.connect()
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    assert [seen.method for seen in upstream.requests] == ["POST"]


async def test_the_page_is_made_once_for_many_who_ask(
    start_proxy: StartProxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream._default = models("m")
    proxy = await start(start_proxy, monkeypatch, models_refresh=600.0)
    await wait_until(listed(proxy, "m"))
    page = ModelsPage(proxy.context)
    assert page.body() is page.body()
    assert json.loads(page.body())["data"][1]["id"] == "any/m"
    proxy.context.model_lists.listed = {}
    assert len(json.loads(page.body())["data"]) == 1
