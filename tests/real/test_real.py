"""The official SDK, the proxy as a process, and a real model server that is no fake of ours."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI

from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.support.patience import WAIT

from .demo_model import PROVIDER, SLUG, RunningProxy, run_command
from .model_server import UPSTREAM_MODEL

pytestmark = pytest.mark.real

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
# What makes two answers of the model equal: the greedy choice, and no reuse of an earlier prompt,
# which is computed in other batches and so rounds otherwise.
REPEATABLE: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 40}
NO_CACHE = {"cache_prompt": False}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def wait_until(holds: Callable[[], Any]) -> Any:
    """Poll a condition until it holds; returns its value."""
    deadline = time.monotonic() + WAIT
    while not (value := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def post(base: str, body: dict[str, Any], key: str = "") -> tuple[http.client.HTTPMessage, bytes]:
    """One request without any SDK: the response's headers and its body, only un-chunked."""
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=WAIT)
    try:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200, response.status
        return response.headers, response.read()
    finally:
        connection.close()


def busy_slots(direct_url: str) -> int:
    with urllib.request.urlopen(f"{direct_url}/slots", timeout=WAIT) as response:
        return sum(slot["is_processing"] for slot in json.load(response))


def find_record(proxy: RunningProxy, id: str) -> Any:
    store = Store(proxy.records_file)
    try:
        return store.find_record(id)
    finally:
        store.close()


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


# The official SDK


def test_a_first_program_works_with_a_base_url_without_v1(
    proxy: RunningProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    client = OpenAI(base_url=proxy.url, api_key=proxy.key)  # no /v1
    stream = client.chat.completions.create(
        model=SLUG,
        messages=[{"role": "user", "content": "Count to 10"}],
        stream=True,
        max_tokens=24,
    )
    for chunk in stream:
        if chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="")
    client.close()
    # The program sets no seed, and the model may well stop after a number or two.
    assert capsys.readouterr().out.strip()


def test_openrouters_base_url_works(proxy: RunningProxy) -> None:
    with OpenAI(base_url=f"{proxy.url}/api/v1", api_key=proxy.key) as client:
        answer = client.chat.completions.create(model=SLUG, messages=QUESTION, max_tokens=8)
        assert answer.choices[0].message.content
        assert SLUG in [model.id for model in client.models.list()]


def test_a_stream_and_a_whole_answer_say_the_same(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=SLUG, messages=QUESTION, stream=True, **REPEATABLE, extra_body=NO_CACHE
    )
    whole = client.chat.completions.create(
        model=SLUG, messages=QUESTION, **REPEATABLE, extra_body=NO_CACHE
    )
    text = text_of(stream)
    assert "Paris" in text
    assert whole.choices[0].message.content == text
    assert whole.usage is not None


async def test_the_async_client_streams(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(
        model=SLUG, messages=QUESTION, stream=True, **REPEATABLE
    )
    assert "Paris" in "".join([c.choices[0].delta.content or "" async for c in stream])


async def test_the_async_client_gets_a_whole_answer(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model=SLUG, messages=QUESTION, **REPEATABLE)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_usage_that_was_asked_for_comes_last_and_is_exact(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=SLUG,
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
            **REPEATABLE,
        )
    )
    whole = client.chat.completions.create(model=SLUG, messages=QUESTION, **REPEATABLE)
    assert [len(chunk.choices) for chunk in chunks] == [1] * (len(chunks) - 1) + [0]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 0
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0


def test_usage_that_was_not_asked_for_does_not_come(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=SLUG, messages=QUESTION, stream=True, **REPEATABLE
    )
    chunks = list(stream)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert {chunk.model for chunk in chunks} == {SLUG}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_called(client: OpenAI, streamed: bool) -> None:
    options: dict[str, Any] = {
        "model": SLUG,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "temperature": 0,
        "max_tokens": 60,
    }
    if streamed:
        with client.chat.completions.stream(**options) as stream:
            choice: Any = stream.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0].function
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_json_mode_answers_json(client: OpenAI, streamed: bool) -> None:
    answer: Any = client.chat.completions.create(
        model=SLUG,
        messages=[{"role": "user", "content": "Describe a cat as JSON with name and age"}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=120,
        stream=streamed,
    )
    text = text_of(answer) if streamed else answer.choices[0].message.content
    assert isinstance(json.loads(text), dict)


def test_a_wrong_key_raises_an_authentication_error(proxy: RunningProxy) -> None:
    wrong = proxy.key[:-1] + ("a" if proxy.key[-1] != "a" else "b")
    with (
        OpenAI(base_url=f"{proxy.url}/v1", api_key=wrong) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model=SLUG, messages=QUESTION)
    assert caught.value.code == "invalid_api_key"
    assert wrong not in str(caught.value)


def test_an_unknown_model_raises_a_not_found_error(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody/nothing", messages=QUESTION)
    assert caught.value.code == "model_not_found"


def test_a_prompt_too_long_is_refused_with_the_upstreams_status(client: OpenAI) -> None:
    # 4,500 tokens for a context of 4,096: too near for the proxy's estimate to be sure.
    long: list[Any] = [{"role": "user", "content": "word " * 4500}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=SLUG, messages=long, stream=True)


def test_a_prompt_far_too_long_is_refused_before_the_upstream(client: OpenAI) -> None:
    endless: list[Any] = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(openai.BadRequestError, match="context length is 4096 tokens") as caught:
        client.chat.completions.create(model=SLUG, messages=endless, stream=True)
    assert caught.value.code == "context_length_exceeded"


# Hang-ups


def test_a_client_that_stops_in_mid_stream_ends_the_generation(
    client: OpenAI, direct_url: str, proxy: RunningProxy
) -> None:
    stream = client.chat.completions.create(
        model=SLUG,
        messages=QUESTION,
        stream=True,
        max_tokens=3000,  # a minute's worth
        extra_body={"ignore_eos": True},
    )
    for _ in range(3):
        next(stream)
    assert busy_slots(direct_url) == 1
    stream.close()
    assert wait_until(lambda: busy_slots(direct_url) == 0)
    record = wait_until(lambda: find_record(proxy, stream.response.headers["x-request-id"]))
    assert (record.code, record.estimated) == ("client_closed", True)


# Bytes

VOLATILE = [
    (re.compile(rb'"id":"[^"]*"'), b'"id":"-"'),
    (re.compile(rb'"created":\d+'), b'"created":0'),
    (re.compile(rb'"timings":\{[^}]*\}'), b'"timings":{}'),
    (re.compile(rb'"model":"(?:%b|%b)"' % (SLUG.encode(), UPSTREAM_MODEL.encode())), b'"model":""'),
]


def events_of(raw: bytes) -> list[bytes]:
    """The events without what differs from run to run, the model's name and comments."""
    assert raw.endswith(b"data: [DONE]\n\n")
    for pattern, constant in VOLATILE:
        raw = pattern.sub(constant, raw)
    return [event for event in raw.split(b"\n\n") if not event.startswith(b":")]


TOOL_BODY = {"messages": [{"role": "user", "content": "The weather in Paris?"}], "tools": [WEATHER]}
BODIES = {"text": {"messages": QUESTION}, "a tool call": TOOL_BODY}


@pytest.mark.parametrize("wants_usage", [True, False], ids=["usage asked", "usage not asked"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_the_streams_bytes_are_the_model_servers(
    proxy: RunningProxy, direct_url: str, body: dict[str, Any], wants_usage: bool
) -> None:
    body = {**body, **REPEATABLE, **NO_CACHE, "stream": True}
    with_usage = {**body, "stream_options": {"include_usage": True}}
    _, direct = post(direct_url, {**with_usage, "model": UPSTREAM_MODEL})
    headers, relayed = post(
        proxy.url, {**(with_usage if wants_usage else body), "model": SLUG}, proxy.key
    )
    wanted = events_of(direct)
    if not wants_usage:
        wanted = [event for event in wanted if b'"choices":[]' not in event]
    assert len(wanted) > 5
    assert events_of(relayed) == wanted
    assert relayed.count(b'"model":"%b"' % SLUG.encode()) == len(wanted) - 2  # [DONE], last ""
    assert (headers["x-hober-provider"], headers["x-hober-model"]) == (PROVIDER, SLUG)


# Records


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_the_record_has_the_model_servers_own_usage(
    proxy: RunningProxy, direct_url: str, streamed: bool
) -> None:
    body = {"messages": QUESTION, **REPEATABLE, **NO_CACHE}
    usage = json.loads(post(direct_url, body)[1])["usage"]
    headers, _ = post(proxy.url, {**body, "model": SLUG, "stream": streamed}, proxy.key)
    record = wait_until(lambda: find_record(proxy, headers["x-request-id"]))
    assert record is not None
    assert (record.status, record.slug, record.provider) == (200, SLUG, PROVIDER)
    assert record.prompt_tokens == usage["prompt_tokens"]
    assert record.completion_tokens == usage["completion_tokens"]
    assert not record.estimated


def test_the_usage_command_counts_the_requests(proxy: RunningProxy) -> None:
    def counted() -> str:
        return run_command("usage", "--config", str(proxy.config_file), "--by", "model")

    post(proxy.url, {"model": SLUG, "messages": QUESTION, "max_tokens": 4}, proxy.key)
    assert wait_until(lambda: SLUG in counted())
