"""Every path but the chat POST, on aiohttp's own test server: answers, refusals, CORS, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient
from pytest_aiohttp import AiohttpClient

from hoberproxy.accounting.exposition import FAMILIES
from hoberproxy.api.routes import make_app
from hoberproxy.config.settings import LogSettings
from hoberproxy.exchange.context import ServerContext
from tests.conftest import Proxy, StartProxy, chat, pure_only, wait_until

Client = TestClient[web.Request, web.Application]
PREFIXES = pytest.mark.parametrize("prefix", ["/v1", "", "/api/v1"])


@pytest.fixture
async def context(proxy: Proxy) -> ServerContext:
    return proxy.context


@pytest.fixture
async def client(context: ServerContext, aiohttp_client: AiohttpClient) -> Client:
    return await aiohttp_client(make_app(context))


@pytest.fixture
def client_with_origins(
    start_proxy: StartProxy, aiohttp_client: AiohttpClient
) -> Callable[..., Awaitable[Client]]:
    async def make(*origins: str) -> Client:
        proxy = await start_proxy(cors_origins=origins)
        return await aiohttp_client(make_app(proxy.context))

    return make


async def error_of(response: ClientResponse) -> dict[str, Any]:
    document = await response.json()
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) - {"metadata"} == {"message", "type", "param", "code"}
    assert response.headers["X-Request-Id"].startswith("req_")
    return error


# Models


@PREFIXES
async def test_models_are_listed_as_openai_does(client: Client, prefix: str) -> None:
    response = await client.get(f"{prefix}/models")
    listing = await response.json()
    assert response.headers["Content-Type"].startswith("application/json")
    assert listing["object"] == "list"
    assert [entry["id"] for entry in listing["data"]] == ["test/model"]
    assert listing["data"][0]["object"] == "model"


@PREFIXES
@pytest.mark.parametrize("slug", ["test/model", "test%2Fmodel", "test%2fmodel", "t%65st/model"])
async def test_a_slug_may_have_its_slash_plain_or_escaped(
    client: Client, prefix: str, slug: str
) -> None:
    from yarl import URL

    response = await client.get(URL(f"{prefix}/models/{slug}", encoded=True))
    assert response.status == 200
    assert (await response.json())["id"] == "test/model"


async def test_a_model_that_a_wildcard_serves_is_shown_under_its_own_name(client: Client) -> None:
    response = await client.get("/v1/models/any/thing-4.1")
    assert (response.status, (await response.json())["id"]) == (200, "any/thing-4.1")


@pytest.mark.parametrize(
    "slug", ["unknown", "any/*", "any/%2A", "test", "test/model/more", "test/model:", "x" * 5000]
)
async def test_an_unknown_model_is_not_found(client: Client, slug: str) -> None:
    response = await client.get(f"/v1/models/{slug}")
    error = await error_of(response)
    assert (response.status, error["code"]) == (404, "model_not_found")
    assert len(error["message"]) < 300
    assert response.headers["X-Should-Retry"] == "false"


# What is not there


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/models", "/nowhere", "/v1/chat", "/metrics"])
async def test_an_unknown_path_names_the_paths_that_exist(client: Client, path: str) -> None:
    response = await client.get(path)
    error = await error_of(response)
    assert (response.status, error["code"]) == (404, "not_found")
    assert error["message"].startswith(f"no such path: {path};")
    for known in ("/v1/chat/completions", "/v1/models", "/healthz", "/readyz"):
        assert known in error["message"]


@PREFIXES
@pytest.mark.parametrize("path", ["/responses", "/completions", "/embeddings", "/responses/r_1"])
async def test_paths_of_openai_that_are_missing_are_said_to_be_not_served_yet(
    client: Client, prefix: str, path: str
) -> None:
    response = await client.post(prefix + path, json={})
    error = await error_of(response)
    assert response.status == 404
    assert f"{prefix}{path} is not served yet" in error["message"]


@pytest.mark.parametrize("path", ["/v1/responsesX", "/v1/v1/responses", "/api/api/v1/responses"])
async def test_what_only_looks_like_them_is_no_such_path(client: Client, path: str) -> None:
    assert "no such path" in (await error_of(await client.get(path)))["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/models/test/model", "GET, HEAD"),
        ("PUT", "/healthz", "GET, HEAD"),
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/chat/completions", "POST"),
        ("PUT", "/api/v1/chat/completions", "POST"),
    ],
)
async def test_a_wrong_method_is_told_which_ones_are_right(
    client: Client, method: str, path: str, allowed: str
) -> None:
    response = await client.request(method, path)
    error = await error_of(response)
    assert response.status == 405
    assert response.headers["Allow"] == allowed
    assert f"expected {allowed}" in error["message"]
    if not path.startswith("/api/"):
        assert error["code"] == "method_not_allowed"


async def test_under_api_v1_the_code_is_the_status(client: Client) -> None:
    error = await error_of(await client.get("/api/v1/models/unknown"))
    assert (error["code"], error["metadata"]) == (404, {"code": "model_not_found"})


@pure_only
async def test_a_fault_of_ours_has_the_form_of_an_error_and_no_details(
    client: Client, context: ServerContext, caplog: pytest.LogCaptureFixture
) -> None:
    context.catalog.describe = None  # type: ignore[assignment, method-assign]
    response = await client.get("/v1/models/test/model")
    error = await error_of(response)
    assert (response.status, error["type"], error["code"]) == (
        500,
        "server_error",
        "internal_error",
    )
    assert "NoneType" not in error["message"]
    assert "NoneType" in caplog.text


# Health


@pytest.mark.parametrize("path", ["/healthz", "/health", "/v1/healthz", "/api/v1/health"])
async def test_the_process_is_healthy_also_while_it_drains(
    client: Client, context: ServerContext, path: str
) -> None:
    assert (await client.get(path)).status == 200
    context.is_draining = context.is_stopping = True
    assert (await client.get(path)).status == 200


async def test_a_draining_process_takes_no_traffic(client: Client, context: ServerContext) -> None:
    assert (await client.get("/readyz")).status == 200
    context.is_draining = context.is_stopping = True
    response = await client.get("/readyz")
    assert (response.status, (await error_of(response))["code"]) == (503, "draining")
    assert response.headers["Retry-After"] == "1"
    assert "X-Should-Retry" not in response.headers


# CORS


PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def cors_fields(response: ClientResponse) -> set[str]:
    return {name for name in response.headers if name.startswith("Access-Control-")}


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/v1/chat/completions"])
async def test_without_named_origins_no_page_may_read(client: Client, path: str) -> None:
    assert not cors_fields(await client.get(path, headers={"Origin": PAGE}))
    assert not cors_fields(await client.options(path, headers=PREFLIGHT))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/api/v1/models"])
async def test_a_named_origin_may_ask_first_and_then_read(
    client_with_origins: Callable[..., Awaitable[Client]], path: str
) -> None:
    client = await client_with_origins("https://other.example", PAGE)
    response = await client.options(path, headers=PREFLIGHT)
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    response = await client.get(path, headers={"Origin": PAGE})
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert response.headers["Vary"] == "Origin"


async def test_errors_can_be_read_by_a_named_origin_too(
    client_with_origins: Callable[..., Awaitable[Client]],
) -> None:
    client = await client_with_origins(PAGE)
    response = await client.get("/nowhere", headers={"Origin": PAGE})
    assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (404, PAGE)


async def test_another_origin_stays_shut_out(
    client_with_origins: Callable[..., Awaitable[Client]],
) -> None:
    client = await client_with_origins(PAGE)
    headers = {**PREFLIGHT, "Origin": "https://evil.example"}
    assert not cors_fields(await client.get("/v1/models", headers=headers))
    assert not cors_fields(await client.options("/v1/models", headers=headers))


@pytest.mark.parametrize("key", ["the right key", "a wrong key"])
async def test_chat_answers_carry_the_origin_as_well(start_proxy: StartProxy, key: str) -> None:
    proxy = await start_proxy(cors_origins=(PAGE,))
    client = await proxy.connect()
    # A page reads why its request failed, or can only guess.
    headers = [f"origin: {PAGE}"]
    from tests.conftest import QUESTION

    client.send(chat(proxy.key if key == "the right key" else "wrong", QUESTION, *headers))
    answer = await client.read_answer()
    assert answer.headers["access-control-allow-origin"] == PAGE


# Metrics

GAUGES = {
    "requests_open": [[[], 0]],
    "connections_open": [[[], 1]],
    "records_queued": [[[], 0]],
    "records_lost": [[[], 6]],
    "journal_entries_lost": [[[], 8]],
    "journals_unreadable": [[[], 0]],
    "log_lines_lost": [[[], 7]],
    "body_bytes": [[[], 5]],
    "refused_connections": [[[], 9]],
    "upstream_connections": [[["scripted", "idle"], 1], [["scripted", "busy"], 0]],
}


async def test_bad_heads_and_connections_are_counted(proxy: Proxy) -> None:
    chatter = await proxy.connect()
    chatter.send(chat(proxy.key))
    await chatter.read_answer()
    chatter.send(b"nonsense\r\n\r\n")
    await chatter.read_answer()
    snapshot = proxy.server.snapshot()
    assert [count for _, count in snapshot["requests"]] == [1]
    assert snapshot["bad_heads"] == [[[], 1]]
    assert snapshot["connections_open"] == [[[], 1]]


async def test_a_server_s_snapshot_has_its_state_at_that_moment(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(change=lambda config: replace(config, log=LogSettings()))
    context, journal = proxy.context, proxy.server._journal
    (await proxy.connect()).send(chat(proxy.key))
    await proxy.wait_for_records(1)
    await wait_until(lambda: journal.depth == 0)
    assert context.access_log is not None
    context.access_log._failed, journal.lost, journal.records_lost = 7, 8, 6
    context.refused_connections, context.bodies.held = 9, 5
    snapshot = proxy.server.snapshot()
    assert {name: snapshot[name] for name in GAUGES} == GAUGES
    assert snapshot["resident_bytes"] > [[[], 1_000_000]]
    # The rest is the supervisor's.
    missing = {"build_info", "reloads", "worker_restarts", "workers"}
    assert set(snapshot) == {family.name for family in FAMILIES} - missing
