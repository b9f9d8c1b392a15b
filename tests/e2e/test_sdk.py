"""The official OpenAI client against the proxy: what works, what it raises, when it retries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from hoberproxy.settings import KeySettings
from hoberproxy.sqlite_store import SqliteStore as Store
from tests.scripted import (
    Close,
    Pause,
    Reset,
    Script,
    ScriptedUpstream,
    Stall,
    completion,
    event,
    json_response,
    sse,
    stream_events,
)

from .harness import QUESTION, SLUG, SOON, Proxy, make_config, provider_for, running

EVENTS = stream_events(3)
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}


@asynccontextmanager
async def keyed_proxy(
    folder: Path,
    *upstreams: ScriptedUpstream,
    server: dict[str, Any] | None = None,
    **changes: Any,
) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy that requires keys, and one."""
    named = zip("abc", upstreams, strict=False)
    providers = (provider_for(each, name, **changes) for name, each in named)
    config = make_config(folder, *providers, **(server or {}))
    store = Store(config.records.file)
    try:
        key, _ = store.create_key("sdk")
    finally:
        store.close()
    async with running(replace(config, keys=KeySettings(required=True))) as proxy:
        yield proxy, key


@asynccontextmanager
async def sdk(proxy: Proxy, key: str, path: str = "/v1", **options: Any) -> AsyncIterator[Any]:
    settings = {"max_retries": 0, **options}
    async with AsyncOpenAI(base_url=proxy.url + path, api_key=key, **settings) as client:
        yield client


async def ask(client: Any, **more: Any) -> Any:
    return await client.chat.completions.create(model=SLUG, messages=QUESTION, **more)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/api/v1"])
async def test_every_base_url_in_use_works(tmp_path: Path, path: str) -> None:
    async with (
        ScriptedUpstream(sse(*EVENTS), json_response(200, completion("hello"))) as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, key),
        sdk(proxy, key, path) as client,
    ):
        text = ""
        async for chunk in await ask(client, stream=True):
            text += chunk.choices[0].delta.content or ""  # breaks on a usage event nobody asked for
        whole = await ask(client)
        models = [model.id async for model in client.models.list()]
    assert text == " word0 word1 word2"
    assert (whole.choices[0].message.content, whole.model) == ("hello", SLUG)
    assert whole.usage.total_tokens == 10
    assert models == [SLUG]


async def test_the_synchronous_client_streams(tmp_path: Path) -> None:
    def run(url: str, key: str) -> tuple[str, Any]:
        with OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            stream = client.chat.completions.create(
                model=SLUG, messages=QUESTION, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(stream)
        text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
        return text, chunks[-1].usage

    async with (
        ScriptedUpstream(sse(*EVENTS)) as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, key),
    ):
        text, usage = await asyncio.to_thread(run, proxy.url, key)
    assert text == " word0 word1 word2"
    assert (usage.prompt_tokens, usage.completion_tokens) == (7, 3)


async def test_tools_pass_both_ways(tmp_path: Path) -> None:
    answer = completion("")
    answer["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    delta = event(
        {
            "id": "x",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "upstream-model",
            "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **CALL}]}}],
        }
    )
    async with (
        ScriptedUpstream(json_response(200, answer), sse(delta, *EVENTS[-3:])) as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, key),
        sdk(proxy, key) as client,
    ):
        whole = await ask(client, tools=TOOLS, tool_choice="required")
        stream = await ask(client, tools=TOOLS, tool_choice="required", stream=True)
        first = (await anext(aiter(stream))).choices[0].delta.tool_calls[0]
        await stream.close()
        sent = upstream.requests[0].json()
    assert whole.choices[0].message.tool_calls[0].function.name == "get_weather"
    assert first.function.name == "get_weather"
    assert (sent["tools"], sent["tool_choice"]) == (TOOLS, "required")


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        (400, openai.BadRequestError),
        (413, openai.APIStatusError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (401, openai.InternalServerError),
        (500, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["body", "stream"])
async def test_an_upstreams_refusal_raises_the_sdks_own_class(
    tmp_path: Path, status: int, raised: type[openai.APIStatusError], stream: bool
) -> None:
    refusal = json_response(status, {"error": {"message": "no", "code": status}})
    async with (
        ScriptedUpstream(refusal) as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, key),
        sdk(proxy, key) as client,
    ):
        with pytest.raises(raised) as caught:
            await ask(client, stream=stream)
        record = await proxy.wait_for_record()
    assert caught.value.request_id == record.id
    assert caught.value.code == record.code


async def test_a_wrong_key_raises_authentication_error_at_once(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream() as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, _),
        sdk(proxy, "sk-of-another-service", max_retries=2) as client,
    ):
        with pytest.raises(openai.AuthenticationError) as caught:
            await ask(client)
        await proxy.wait_for_record()
    assert caught.value.code == "invalid_api_key"
    assert "sk-of" not in str(caught.value)


async def test_an_unknown_model_raises_not_found(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream() as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, key),
        sdk(proxy, key) as client,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="no/such", messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("index", [None, 0])
async def test_a_stream_made_of_a_body_is_put_together_as_the_body_was(
    tmp_path: Path, index: int | None
) -> None:
    calls = [{"index": index, **CALL}, {"index": index, **CALL, "id": "call_2"}]
    answer = completion(finish_reason="tool_calls")
    answer["choices"][0]["message"] = {
        "role": "assistant",
        "content": "let me look",
        "tool_calls": calls,
        "function_call": None,
    }
    async with (
        ScriptedUpstream(json_response(200, answer)) as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, key),
        sdk(proxy, key) as client,
    ):
        async with client.chat.completions.stream(
            model=SLUG, messages=QUESTION, tools=TOOLS, stream_options={"include_usage": True}
        ) as stream:
            whole = await stream.get_final_completion()
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "let me look")
    assert [call.id for call in choice.message.tool_calls] == ["call_1", "call_2"]
    assert [call.function.arguments for call in choice.message.tool_calls] == ["{}", "{}"]
    assert (choice.finish_reason, whole.usage.completion_tokens) == ("tool_calls", 3)


@pytest.mark.parametrize("fields", [b"", b"id: 7\n"])
async def test_comment_lines_are_no_events(tmp_path: Path, fields: bytes) -> None:
    # openai/openai-python#2722: with an empty line behind it, one is, once an `id:` has come.
    events = [fields + each for each in EVENTS]
    script = [*sse(*events[:2])[:-1], Pause(0.3), *sse(*events[2:])[1:]]
    async with (
        ScriptedUpstream(script) as upstream,
        keyed_proxy(tmp_path, upstream, server={"comment_after": 0.1}) as (proxy, key),
        sdk(proxy, key) as client,
    ):
        text = ""
        async for chunk in await ask(client, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == " word0 word1 word2"


BREAKS: dict[str, Script] = {
    "a cut": [Close()],
    "a reset": [Reset()],
    "silence": [Stall()],
    "an error event": sse(event({"error": {"message": "no"}}))[1:],
}


@pytest.mark.parametrize("rest", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("path", ["/v1", "/api/v1"])
async def test_a_stream_that_breaks_raises(tmp_path: Path, rest: Script, path: str) -> None:
    script = [*sse(*EVENTS)[:3], *rest]
    async with (
        ScriptedUpstream(script) as upstream,
        keyed_proxy(tmp_path, upstream, limits=SOON) as (proxy, key),
        sdk(proxy, key, path) as client,
    ):
        stream = await ask(client, stream=True)
        text = ""
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
    assert text == " word0"
    assert caught.value.message


async def test_a_stream_cut_by_the_proxys_own_death_raises(tmp_path: Path) -> None:
    script = [*sse(*EVENTS)[:3], Stall()]
    async with (
        ScriptedUpstream(script) as upstream,
        keyed_proxy(tmp_path, upstream) as (proxy, key),
        sdk(proxy, key) as client,
    ):
        stream = await ask(client, stream=True)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                for connection in list(proxy.server._connections):
                    connection.abort()


async def count_calls(
    proxy: Proxy, key: str, upstreams: list[ScriptedUpstream]
) -> tuple[int, list[int]]:
    async with sdk(proxy, key, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await ask(client)
    return len(proxy.records), [len(upstream.requests) for upstream in upstreams]


async def test_the_sdk_does_not_multiply_our_own_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_wait: Callable[..., float] = lambda *_, **__: 0.0  # noqa: E731
    monkeypatch.setattr(AsyncOpenAI, "_calculate_retry_timeout", no_wait)
    failing = json_response(500, {"error": {"message": "no"}})
    async with (
        ScriptedUpstream(default=failing) as first,
        ScriptedUpstream(default=failing) as second,
    ):
        both = tmp_path / "both"
        alone = tmp_path / "alone"
        both.mkdir()
        alone.mkdir()
        async with keyed_proxy(both, first, second) as (proxy, key):
            assert await count_calls(proxy, key, [first, second]) == (1, [1, 1])
        async with keyed_proxy(alone, first) as (proxy, key):
            # We tried once: the SDK's own three tries are welcome.
            assert await count_calls(proxy, key, [first]) == (3, [1 + 3])
