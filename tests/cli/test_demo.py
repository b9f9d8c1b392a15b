"""The demo model: what it says (on values) and what it sends (over its real socket)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.cli.demo import (
    MODEL,
    DemoModel,
    SchemaFiller,
    answer,
    count_pieces,
    parse_body,
    split_pieces,
)
from hoberproxy.cli.quickstart import embedded_config
from hoberproxy.config.settings import ServerSettings
from hoberproxy.errors import RequestError
from tests.support.patience import WAIT

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer"},
            },
            "required": ["city", "unit"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tells the hour"}}


def reply_to(text: str, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
    return answer(parse_body(json.dumps(body).encode()), id="chatcmpl-demo000000000001", created=1)


def text_of(reply: Any) -> str:
    return "".join(reply.pieces)


# What it says


def test_counting_counts() -> None:
    assert text_of(reply_to("Count to 10")) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"


def test_counting_far_is_bounded_and_says_so() -> None:
    text = text_of(reply_to("please count to 999999999"))
    assert "999, 1000, and so on: 1000 is as far" in text


def test_an_answer_says_what_it_is_and_echoes_a_bounded_part() -> None:
    text = text_of(reply_to("hello " * 10_000))
    assert "demo model: I don't think" in text
    assert "“hello hello" in text
    assert len(text) < 500


def test_the_last_user_message_is_echoed_from_parts_too() -> None:
    body = {
        "messages": [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "said"},
            {"role": "user", "content": [{"type": "text", "text": "second"}]},
        ]
    }
    text = text_of(answer(body, id="x", created=1))
    assert "“second”" in text
    assert "first" not in text


def test_the_same_request_gets_the_same_answer() -> None:
    assert reply_to("hello", tools=[WEATHER]) == reply_to("hello", tools=[WEATHER])


@pytest.mark.parametrize(
    "text", ["", "a", " two  blanks ", "long" * 10, "tab\tnew\n\nline", "é“”🙂"]
)
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(split_pieces(text)) == text


def test_counting_the_tokens_of_a_huge_prompt_stays_cheap_and_near() -> None:
    text = "word " * 1_000_000
    started = time.process_time()
    counted = count_pieces(text)
    assert time.process_time() - started < 0.5
    assert 500_000 < counted < 2_000_000


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_over_the_limit_is_cut_and_says_length(name: str) -> None:
    reply = reply_to("Count to 10", **{name: 3})
    assert text_of(reply) == "1, 2, 3,"
    assert reply.finish_reason == "length"
    assert reply.usage["completion_tokens"] == 3


def test_an_answer_of_exactly_the_limit_is_not_called_cut() -> None:
    assert reply_to("Count to 3", max_tokens=3).finish_reason == "stop"


@pytest.mark.parametrize("stop", ["3", ["7", "3"]], ids=["a string", "the first of several"])
def test_a_stop_sequence_ends_the_answer_before_it(stop: Any) -> None:
    reply = reply_to("Count to 10", stop=stop)
    assert (text_of(reply), reply.finish_reason) == ("1, 2, ", "stop")


# Tools


@pytest.mark.parametrize(
    ("prompt", "choice", "called"),
    [
        ("What is the weather in Paris?", None, "get_weather"),
        ("What is the weather in Paris?", "none", None),
        ("Tell me a joke", "auto", None),
        ("Tell me a joke", "required", "clock"),
        ("Tell me a joke", {"function": {"name": "get_weather"}}, "get_weather"),
    ],
    ids=["asked for", "forbidden", "not asked for", "required", "named"],
)
def test_a_tool_is_called_when_it_is(prompt: str, choice: Any, called: str | None) -> None:
    reply = reply_to(prompt, tools=[CLOCK, WEATHER], tool_choice=choice)
    assert (reply.tool_call.name if reply.tool_call else None) == called
    assert reply.finish_reason == ("tool_calls" if called else "stop")


def test_arguments_are_the_required_ones_with_the_place_asked_for() -> None:
    reply = reply_to("What is the weather in Paris?", tools=[WEATHER])
    assert json.loads(text_of(reply)) == {"city": "Paris", "unit": "celsius"}


def test_after_a_tool_result_it_answers_in_text_even_when_a_tool_is_required() -> None:
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "tool_calls": []},
        {"role": "tool", "tool_call_id": "x", "content": "14 degrees"},
    ]
    body = {"messages": messages, "tools": [WEATHER], "tool_choice": "required"}
    reply = answer(body, id="x", created=1)
    assert text_of(reply) == "The tool answered: 14 degrees"
    assert reply.tool_call is None


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer", "minimum": 5}, 5),
        ({"type": "integer", "maximum": -3}, -3),
        ({"type": "integer", "exclusiveMinimum": 7, "maximum": 8}, 8),
        ({"type": "number", "exclusiveMaximum": 0}, -1),
        ({"type": ["null", "boolean"]}, True),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1, 1]),
        ({"type": "array", "maxItems": 0}, []),
        ({"type": "string", "maxLength": 3}, "exa"),
        ({"type": "string", "minLength": 9}, "examplexx"),
        ({"type": "string", "format": "date"}, "2025-01-31"),
        ({"const": "c"}, "c"),
        ({"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"enum": [4, 5]}}}, 4),
        ({"allOf": [{"type": "object"}, {"properties": {"a": {"type": "null"}}}]}, {"a": None}),
        ({"properties": {"a": {"default": 2}, "b": {}}, "required": ["a"]}, {"a": 2}),
        ({}, {}),
    ],
    ids=lambda part: json.dumps(part)[:40],
)
def test_a_made_up_value_fits_the_schema(schema: Any, value: Any) -> None:
    assert SchemaFiller(schema, "").fill_root() == value


def test_a_schema_that_refers_to_itself_ends_in_null() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    }
    assert json.dumps(SchemaFiller(node, "").fill_root()).endswith('{"next": null}}}}')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {str(n): {"$ref": "#"} for n in range(50)}},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 10**9},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"type": "string", "minLength": 10**12},
        {"type": "array", "items": {"default": "x" * 50_000}, "minItems": 1000},
    ],
    ids=[
        "wide and deep",
        "endless arrays",
        "itself",
        "itself twice",
        "a terabyte of text",
        "a large value repeated",
    ],
)
def test_a_hostile_schema_is_answered_in_bounded_size(schema: Any) -> None:
    assert len(json.dumps(SchemaFiller(schema, "").fill_root())) < 200_000


@pytest.mark.parametrize(
    "schema",
    [{"properties": 1}, {"anyOf": 3}, {"type": "array", "minItems": "x"}],
    ids=lambda schema: json.dumps(schema),
)
def test_a_broken_schema_is_the_clients_fault(schema: Any) -> None:
    with pytest.raises(RequestError):
        SchemaFiller(schema, "").fill_root()


KEYWORDS = (
    "type properties required items enum const default anyOf allOf $ref minItems minLength "
    "maxLength minimum exclusiveMaximum format json_schema schema function name "
    "description include_usage"
).split()
SCRAPS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**10)
    | st.sampled_from(["object", "array", "string", "integer", "#", "json_schema", "date", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = "messages tools tool_choice response_format stream_options stop max_tokens".split()


@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), SCRAPS),
    parameters=SCRAPS,
    choice=st.sampled_from(["auto", "required"]),
)
def test_any_body_is_answered_or_refused(fields: Any, parameters: Any, choice: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "tools": [tool]}
    raw = json.dumps({**body, "tool_choice": choice, **fields}).encode()
    try:
        reply = answer(parse_body(raw), id="chatcmpl-demo000000000001", created=1)
    except RequestError:
        return
    assert len(text_of(reply)) < 100_000


# JSON mode


def test_json_mode_answers_an_object() -> None:
    text = text_of(reply_to("hello", response_format={"type": "json_object"}))
    assert json.loads(text)["model"] == MODEL


def test_a_json_schema_is_fitted() -> None:
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    text = text_of(reply_to("the weather in Oslo", response_format=wanted))
    assert json.loads(text) == {"city": "Oslo", "unit": "celsius"}


# Bad bodies


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", "model"),
        (b'{"model":"m"}', "messages"),
        (b'{"model":"m","messages":[]}', "messages"),
        (b'{"model":"m","messages":[{"role":"user","content":"x"},1]}', "messages[1]"),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}],"n":2}', "n"),
        (
            b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":true}',
            "max_tokens",
        ),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}],"tools":{}}', "tools"),
    ],
)
def test_a_bad_body_is_refused_by_the_name_of_its_field(raw: bytes, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_body(raw)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "fields",
    [{"tools": [{"type": "x"}]}, {"tools": [CLOCK], "tool_choice": {"function": {"name": "y"}}}],
    ids=["a tool without a function", "a tool that is not there"],
)
def test_a_tool_it_cannot_call_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        reply_to("hello", **fields)


# Over the socket


@pytest.fixture
async def demo() -> AsyncIterator[DemoModel]:
    model = DemoModel(pace=0)
    yield model
    await model.aclose()


@pytest.fixture
async def base_url(demo: DemoModel) -> str:
    return f"http://127.0.0.1:{await demo.start()}"


async def post(url: str, raw: bytes) -> tuple[int, str, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", data=raw) as response,
    ):
        return response.status, response.headers["content-type"], await response.read()


def stream_body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "Count to 3"}]
    return json.dumps({"model": MODEL, "messages": messages, "stream": True, **fields}).encode()


def events_of(raw: bytes) -> list[Any]:
    lines = raw.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_a_stream_has_role_pieces_finish_and_done_in_this_order(base_url: str) -> None:
    status, content_type, raw = await post(base_url, stream_body())
    assert (status, content_type.split(";")[0]) == (200, "text/event-stream")
    events = events_of(raw)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:-1]] == ["1,", " 2,", " 3"]
    assert deltas[-1] == {}
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert {event["model"] for event in events} == {MODEL}
    assert not any("usage" in event for event in events)


async def test_usage_asked_for_is_on_the_last_event_alone(base_url: str) -> None:
    _, _, raw = await post(base_url, stream_body(stream_options={"include_usage": True}))
    *others, last = events_of(raw)
    assert not any("usage" in event for event in others)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 3
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["total_tokens"] == 6


def nulls_in(value: Any, place: str = "") -> set[str]:
    """The members that are null, by their places."""
    if isinstance(value, dict):
        return {each for name, one in value.items() for each in nulls_in(one, f"{place}.{name}")}
    if isinstance(value, list):
        return {each for one in value for each in nulls_in(one, place)}
    return {place} if value is None else set()


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "required"}])
async def test_nothing_is_null_but_the_finish_reason_that_strict_clients_demand(
    base_url: str, fields: dict[str, Any]
) -> None:
    usage = {"stream_options": {"include_usage": True}}
    _, _, raw = await post(base_url, stream_body(**usage, **fields))
    *events, finish, last = events_of(raw)
    assert [nulls_in(event) for event in events] == [{".choices.finish_reason"}] * len(events)
    assert nulls_in([finish, last]) == set()
    _, _, raw = await post(base_url, stream_body(**fields | {"stream": False}))
    assert nulls_in(json.loads(raw)) == set()
    assert json.loads(raw)["system_fingerprint"]


def test_its_context_is_long_enough_for_agents() -> None:
    config = embedded_config(8001, {}, ServerSettings())
    assert [model.context_length for model in config.models] == [131072]


async def test_a_tool_call_is_streamed_as_the_official_client_joins_it(base_url: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0)
    async with (
        client,
        client.chat.completions.stream(
            model=MODEL,
            messages=[{"role": "user", "content": "The weather in Paris?"}],
            tools=[WEATHER],  # type: ignore[list-item]
        ) as stream,
    ):
        choice = (await stream.get_final_completion()).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] == "Paris"


async def test_without_stream_the_official_client_gets_one_completion(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused") as client:
        completion = await client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "Count to 3"}]
        )
        models = await client.models.list()
    assert completion.choices[0].message.content == "1, 2, 3"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 3
    assert [model.id for model in models.data] == [MODEL]


async def test_a_refusal_has_openais_form(base_url: str) -> None:
    status, content_type, raw = await post(base_url, b"{}")
    assert (status, content_type.split(";")[0]) == (400, "application/json")
    assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}


async def test_an_unknown_path_has_openais_form_too(base_url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{base_url}/x") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"


async def test_a_client_that_hangs_up_ends_the_generation() -> None:
    demo = DemoModel(pace=0.01)  # counting to 1000 would take ten seconds
    url = f"http://127.0.0.1:{await demo.start()}/v1/chat/completions"
    messages = [{"role": "user", "content": "Count to 1000"}]
    body = {"model": MODEL, "messages": messages, "stream": True}
    async with aiohttp.ClientSession() as session:
        response = await session.post(url, json=body)
        await response.content.readline()
        assert demo.streaming == 1
        response.close()
        async with asyncio.timeout(WAIT):
            while demo.streaming:  # noqa: ASYNC110  # a plain counter has no event to wait for
                await asyncio.sleep(0.01)
    await demo.aclose()


async def test_pieces_come_one_by_one_in_time(base_url: str) -> None:
    demo = DemoModel(pace=0.02)
    url = f"http://127.0.0.1:{await demo.start()}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, data=stream_body()) as got:
        started = time.monotonic()
        await got.content.readline()
        first = time.monotonic() - started
        await got.read()
        assert time.monotonic() - started - first > 0.06  # four events after the first
    await demo.aclose()


async def test_closing_twice_or_before_the_start_does_no_harm() -> None:
    demo = DemoModel()
    await demo.aclose()
    await demo.start()
    await demo.aclose()
    await demo.aclose()
