"""The rules of a chat request's body, and what a call says of it."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.errors import RequestError
from hoberproxy.protocol.json_bytes import scan_elements
from hoberproxy.request.call import ProviderPreferences, output_limits
from hoberproxy.request.checks import MAX_CHOICES, MEDIA_BYTES, parse_call

USER = {"role": "user", "content": "hello"}
SECRET = "do-not-tell"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def body(**members: Any) -> bytes:
    return orjson.dumps({"model": "a/b", "messages": [USER], **members})


def chat(*messages: Any) -> bytes:
    return body(messages=list(messages))


# Refusals: (body, param, code)

TYPE, VALUE = "invalid_type", "invalid_value"
MISSING, DUPLICATE = "missing_required_parameter", "duplicate_parameter"

BAD_FIELDS: dict[str, tuple[bytes, str | None, str]] = {
    "array as a body": (b"[]", None, TYPE),
    "string as a body": (b'"x"', None, TYPE),
    "no model": (b'{"messages":[{"role":"user","content":""}]}', "model", MISSING),
    "no model but an empty list": (b'{"models":[],"messages":[]}', "model", MISSING),
    "model null": (body(model=None), "model", TYPE),
    "model a number": (body(model=1), "model", TYPE),
    "model empty": (body(model=""), "model", VALUE),
    "models a string": (body(models="a"), "models", TYPE),
    "models of numbers": (body(models=["a", 1]), "models[1]", TYPE),
    "models with null": (body(models=[None]), "models[0]", TYPE),
    "models with an empty slug": (body(models=["a", ""]), "models[1]", VALUE),
    "no messages": (b'{"model":"a"}', "messages", MISSING),
    "messages null": (body(messages=None), "messages", TYPE),
    "messages an object": (body(messages={}), "messages", TYPE),
    "messages empty": (body(messages=[]), "messages", VALUE),
    "message a string": (chat(USER, "x"), "messages[1]", TYPE),
    "message null": (chat(None), "messages[0]", TYPE),
    "role missing": (chat(USER, USER, {"content": ""}), "messages[2].role", MISSING),
    "role null": (chat({"role": None, "content": ""}), "messages[0].role", TYPE),
    "role an array": (chat({"role": [], "content": ""}), "messages[0].role", TYPE),
    "role unknown": (chat({"role": SECRET, "content": ""}), "messages[0].role", VALUE),
    "role in capitals": (chat({"role": "User", "content": ""}), "messages[0].role", VALUE),
    "content missing": (chat({"role": "user"}), "messages[0].content", MISSING),
    "content null": (chat({"role": "user", "content": None}), "messages[0].content", TYPE),
    "content a number": (chat({"role": "user", "content": 1}), "messages[0].content", TYPE),
    "content an object": (chat({"role": "user", "content": {}}), "messages[0].content", TYPE),
    "content false": (
        chat({"role": "assistant", "content": False, "tool_calls": [{}]}),
        "messages[0].content",
        TYPE,
    ),
    "content absent beside no tool calls": (
        chat({"role": "assistant", "tool_calls": []}),
        "messages[0].content",
        MISSING,
    ),
    "content absent on a user's message with tool calls": (
        chat({"role": "user", "tool_calls": [{}]}),
        "messages[0].content",
        MISSING,
    ),
    "content part a string": (
        chat(USER, {"role": "user", "content": [{"type": "text"}, SECRET]}),
        "messages[1].content[1]",
        TYPE,
    ),
    "stream a string": (body(stream="true"), "stream", TYPE),
    "stream a number": (body(stream=1), "stream", TYPE),
    "temperature a boolean": (body(temperature=True), "temperature", TYPE),
    "temperature a string": (body(temperature="1"), "temperature", TYPE),
    "temperature over 2": (body(temperature=2.001), "temperature", VALUE),
    "temperature under 0": (body(temperature=-1), "temperature", VALUE),
    "top_p over 1": (body(top_p=2), "top_p", VALUE),
    "top_p a boolean": (body(top_p=False), "top_p", TYPE),
    "max_tokens 0": (body(max_tokens=0), "max_tokens", VALUE),
    "max_tokens 1.0": (body(max_tokens=1.0), "max_tokens", TYPE),
    "max_tokens a boolean": (body(max_tokens=True), "max_tokens", TYPE),
    "max_tokens beyond 64 bits": (
        b'{"model":"a","messages":[{"role":"user","content":""}],"max_tokens":98765432109876543210}',
        "max_tokens",
        TYPE,
    ),
    "max_completion_tokens -5": (body(max_completion_tokens=-5), "max_completion_tokens", VALUE),
    "max_completion_tokens a string": (
        body(max_completion_tokens="5"),
        "max_completion_tokens",
        TYPE,
    ),
    "tools an object": (body(tools={}), "tools", TYPE),
    "tool_choice a boolean": (body(tool_choice=True), "tool_choice", TYPE),
    "tool_choice unknown": (body(tool_choice=SECRET), "tool_choice", VALUE),
    "response_format a string": (body(response_format="json_object"), "response_format", TYPE),
    "response_format without type": (body(response_format={}), "response_format.type", MISSING),
    "response_format type null": (
        body(response_format={"type": None}),
        "response_format.type",
        TYPE,
    ),
    "response_format unknown": (
        body(response_format={"type": SECRET}),
        "response_format.type",
        VALUE,
    ),
    "stream_options an array": (body(stream_options=[]), "stream_options", TYPE),
    "include_usage a number": (
        body(stream_options={"include_usage": 1}),
        "stream_options.include_usage",
        TYPE,
    ),
    "usage a boolean": (body(usage=True), "usage", TYPE),
    "usage.include a string": (body(usage={"include": "true"}), "usage.include", TYPE),
    "provider a string": (body(provider="x"), "provider", TYPE),
    "provider.only a string": (body(provider={"only": "x"}), "provider.only", TYPE),
    "provider.only of numbers": (body(provider={"only": [1]}), "provider.only[0]", TYPE),
    "provider.ignore with null": (
        body(provider={"ignore": ["x", None]}),
        "provider.ignore[1]",
        TYPE,
    ),
    "provider.order empty name": (body(provider={"order": [""]}), "provider.order[0]", VALUE),
    "provider.allow_fallbacks a number": (
        body(provider={"allow_fallbacks": 0}),
        "provider.allow_fallbacks",
        TYPE,
    ),
    "provider.require_parameters a string": (
        body(provider={"require_parameters": "yes"}),
        "provider.require_parameters",
        TYPE,
    ),
    "provider.sort unknown": (body(provider={"sort": SECRET}), "provider.sort", VALUE),
    "provider.sort an object": (body(provider={"sort": {}}), "provider.sort", TYPE),
    "max_price a number": (body(provider={"max_price": 1}), "provider.max_price", TYPE),
    "max_price a boolean": (
        body(provider={"max_price": {"prompt": True}}),
        "provider.max_price.prompt",
        TYPE,
    ),
    "max_price below 0": (
        body(provider={"max_price": {"completion": -0.1}}),
        "provider.max_price.completion",
        VALUE,
    ),
    **{
        f"max_price as the text {text!r}": (
            body(provider={"max_price": {"prompt": text}}),
            "provider.max_price.prompt",
            VALUE,
        )
        for text in [
            "",
            "-1",
            "NaN",
            "Infinity",
            "1_000",
            " 1",
            "1\n",
            "0x1",
            "\u0661",
            "1e999",
            SECRET,
        ]
    },
}


@pytest.mark.parametrize(("data", "param", "code"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_wrong_body_is_refused_naming_the_field(data: bytes, param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_call(data)
    error = caught.value
    assert (error.param, error.code) == (param, code)
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert "expected" in error.message
    assert (param or "the body") in error.message
    assert SECRET not in error.message


NO_JSON = {
    "nothing": b"",
    "text": SECRET.encode(),
    "a string that does not end": b'{"model":"' + SECRET.encode(),
    "two documents": b"{}{}",
    "a comma too many": b'{"a":1,}',
    "no UTF-8": b'{"a":"' + SECRET.encode() + b'\xff"}',
    "a lone surrogate": b'{"a":"\\ud800"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "NaN": b'{"temperature":NaN}',
    "a number without bound": b'{"temperature":1e400}',
    "a raw newline in a string": b'{"a":"\n"}',
    "too deep nesting": b'{"a":' * 5000 + b"1" + b"}" * 5000,
}


@pytest.mark.parametrize("data", NO_JSON.values(), ids=NO_JSON.keys())
def test_what_is_no_json_is_refused_without_showing_it(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_call(data)
    assert (caught.value.param, caught.value.code) == (None, "invalid_json")
    assert SECRET not in caught.value.message
    assert caught.value.__cause__ is None


def test_the_place_of_the_json_error_is_told() -> None:
    with pytest.raises(RequestError, match="line 2, column 5"):
        parse_call(b'{"model":\n"a" "b"}')


@pytest.mark.parametrize(
    ("twice", "param"),
    [
        (b'"model":"x","model":"y"', "model"),
        (b'"model":"x","\\u006dodel":"y"', "model"),
        (b'"model":"x","seed":1,"seed":1', "seed"),
        (b'"model":"x","do not tell":1,"do not tell":1', None),
        (b'"model":null,"model":"x"', "model"),
    ],
    ids=["plain", "escaped", "unknown parameter", "no name of a parameter", "null first"],
)
def test_a_name_given_twice_is_refused(twice: bytes, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_call(b'{"messages":[{"role":"user","content":""}],' + twice + b"}")
    assert (caught.value.param, caught.value.code) == (param, DUPLICATE)
    assert "tell" not in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        "Model",
        "STREAM",
        "Max_Tokens",
        "PROVIDER",
        "\u017ftream",  # long s
        "tool\u017f",
        "max_to\u212aens",  # Kelvin sign
        "U\u017fage",
        "\ufb06ream",  # the ligature st
        "prov\u0131der",  # dotless i
        "prov\u0130der",  # capital I with a dot
    ],
)
def test_a_name_that_other_servers_take_for_a_parameter_is_refused(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_call(body(**{name: "x"}))
    assert (caught.value.param, caught.value.code) == (name, DUPLICATE)


def test_no_character_that_folds_to_a_plain_letter_gets_through() -> None:
    lookalikes = [
        (char, folded)
        for char in map(chr, range(0x80, 0x110000))
        for folded in {char.lower(), char.casefold(), char.upper().lower()}
        if folded.isascii() and folded in "model stream"
    ]
    assert {"\u017f", "\u212a", "\u0131"} & {char for char, _ in lookalikes}
    for char, folded in lookalikes:
        name = ("model" if folded in "model" else "stream").replace(folded, char)
        with pytest.raises(RequestError):
            parse_call(body(**{name: "x"}))


# What is accepted


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": ""},
        {"role": "developer", "content": "x"},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "function", "content": "x", "name": "f"},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f"}},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "audio": {"id": "1"}},
    ],
)
def test_every_form_of_a_message_is_accepted(message: dict[str, Any]) -> None:
    call = parse_call(chat(USER, message))
    assert call.prompt_bytes == len(orjson.dumps([USER, message]))
    assert not call.needs_images


def test_the_bounds_themselves_are_accepted() -> None:
    for members in (
        {"temperature": 0, "top_p": 0, "max_tokens": 1},
        {"temperature": 2, "top_p": 1, "max_completion_tokens": 2**63},
        {"temperature": 2.0, "top_p": 1.0},
    ):
        assert parse_call(body(**members)).terms.given == {"model", "messages", *members}


def test_null_is_absent_for_every_optional_parameter() -> None:
    optional = (
        "stream temperature top_p max_tokens max_completion_tokens tools tool_choice "
        "response_format stream_options usage models provider"
    ).split()
    call = parse_call(body(**dict.fromkeys(optional)))
    assert call.terms.given == {"model", "messages"}
    assert call.terms.provider == ProviderPreferences()
    assert (call.terms.stream, call.terms.wants_usage, call.terms.max_output) == (
        False,
        False,
        None,
    )
    assert not (call.terms.needs_tools or call.terms.json_format is not None or call.needs_images)


@pytest.mark.parametrize(
    ("members", "candidates"),
    [
        ({"model": "a:floor"}, ("a:floor",)),
        ({"model": "a", "models": []}, ("a",)),
        ({"model": "a", "models": ["b", "a", "c", "b"]}, ("a", "b", "c")),
        ({"model": None, "models": ["b", "a"]}, ("b", "a")),
    ],
)
def test_candidates_are_model_then_models_without_repeats(
    members: dict[str, Any], candidates: tuple[str, ...]
) -> None:
    assert parse_call(body(**members)).terms.candidates == candidates


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"stream_options": {"include_usage": True}}, True),
        ({"usage": {"include": True, "more": 1}}, True),
        ({"stream_options": {"include_usage": False}, "usage": {"include": True}}, True),
        ({"stream_options": {"include_usage": None, "other": 1}, "usage": {}}, False),
        ({}, False),
    ],
)
def test_usage_is_wanted_by_either_way_of_asking(members: dict[str, Any], expected: bool) -> None:
    assert parse_call(body(stream=True, **members)).terms.wants_usage is expected


@pytest.mark.parametrize(
    ("members", "needs"),
    [
        ({"tools": []}, set()),
        ({"tools": [{"type": "function"}]}, {"tools"}),
        ({"response_format": {"type": "text"}}, set()),
        ({"response_format": {"type": "json_object"}}, {"json"}),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, {"json"}),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, USER]},
            {"images"},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url"}]},
                    {"role": "user", "content": [{"type": "text"}, {"type": ["image_url"]}]},
                ]
            },
            {"images"},
        ),
    ],
)
def test_a_call_knows_what_its_model_must_be_able_to_do(
    members: dict[str, Any], needs: set[str]
) -> None:
    call = parse_call(body(**members))
    found = {
        "tools": call.terms.needs_tools,
        "json": call.terms.json_format is not None,
        "images": call.needs_images,
    }
    assert {name for name, needed in found.items() if needed} == needs


def test_the_newer_limit_of_the_output_wins() -> None:
    assert parse_call(body(max_tokens=5)).terms.max_output == 5
    assert parse_call(body(max_tokens=5, max_completion_tokens=7)).terms.max_output == 7
    assert parse_call(body(max_tokens=5, max_completion_tokens=None)).terms.max_output == 5
    assert parse_call(body(max_tokens=7, max_completion_tokens=5)).terms.max_output == 7
    assert parse_call(body(n=None)).terms.choices == 1
    assert parse_call(body(n=3)).terms.choices == 3
    assert parse_call(body(n=3, best_of=4)).terms.choices == 4


def test_a_maximum_that_is_none_limits_nothing() -> None:
    assert output_limits([("max_tokens", -1), ("max_completion_tokens", 5)]) == (None, 1)
    assert output_limits([("max_tokens", 0)]) == (None, 1)


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize("value", [0, -1, MAX_CHOICES + 1, 2**63, 1.0, "2", True, [1], {}])
def test_how_many_answers_is_a_small_number(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_call(body(**{name: value}))
    assert (caught.value.status, caught.value.param) == (400, name)
    assert parse_call(body(**{name: MAX_CHOICES})).terms.choices == MAX_CHOICES


def test_a_prompt_weighs_as_much_as_its_text() -> None:
    """Images and sounds at most MEDIA_BYTES each; tools and schemas as much as text."""
    text = {"role": "user", "content": [{"type": "text", "text": "x" * 900}]}
    tools = [{"type": "function", "function": {"name": "f", "description": "y" * 9000}}]
    plain = parse_call(chat(text))
    with_tools = parse_call(orjson.dumps({"model": "a/b", "messages": [text], "tools": tools}))
    assert 900 < plain.prompt_bytes < 1000
    assert 8500 < with_tools.prompt_bytes - plain.prompt_bytes < 9000
    base64 = "A" * 400_000
    for part in (
        {"type": "image_url", "image_url": {"url": base64, "detail": "low"}},
        {"type": "image_url", "image_url": base64},
        {"type": "input_audio", "input_audio": {"format": "wav", "data": base64}},
    ):
        message = {"role": "user", "content": [*text["content"], part, part]}
        weight = parse_call(chat(message)).prompt_bytes
        assert 2 * MEDIA_BYTES < weight - plain.prompt_bytes < 2 * MEDIA_BYTES + 300
    # What only says that it is one is text.
    odd = [{"type": "image_url"}, {"type": "image_url", "image_url": 1}, {"type": ["image_url"]}]
    odd += [{"type": "text", "image_url": base64}]
    message = {"role": "user", "content": odd}
    assert parse_call(chat(message)).prompt_bytes > 400_000


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        ({}, set()),
        ({"tool_choice": "required"}, set()),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, set()),
        ({"tool_choice": "any"}, {"tool_choice=any"}),
        ({"tool_choice": "REQUIRED"}, {"tool_choice=REQUIRED"}),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, set()),
        ({"response_format": {"type": "grammar", "grammar": "x"}}, {"response_format=grammar"}),
        ({"max_tokens": -1}, {"max_tokens=-1"}),
        ({"max_completion_tokens": -1}, {"max_completion_tokens=-1"}),
        ({"tool_choice": "any", "max_tokens": -1}, {"tool_choice=any", "max_tokens=-1"}),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # a set has no order
)
def test_values_that_only_some_servers_take_are_noted(
    sent: dict[str, Any], found: set[str]
) -> None:
    call = parse_call(body(**sent))
    assert call.terms.extensions == found
    assert call.terms.max_output is None
    assert call.terms.json_format in (None, "json_schema")
    assert call.place_without_content is None


def test_an_assistant_that_said_nothing_is_noted_with_its_place() -> None:
    empty = {"role": "assistant", "content": None}
    assert parse_call(chat(USER, empty, USER, empty)).place_without_content == 1
    assert parse_call(chat(USER, {**empty, "refusal": "no"})).place_without_content is None


def test_provider_preferences_are_read() -> None:
    provider = {
        "only": ["a", "b"],
        "ignore": [],
        "order": ["b"],
        "allow_fallbacks": False,
        "sort": "throughput",
        "max_price": {"prompt": 0.1, "completion": "2.50", "image": "much"},
        "require_parameters": True,
        "data_collection": {"what": "ever"},
    }
    assert parse_call(body(provider=provider)).terms.provider == ProviderPreferences(
        only=("a", "b"),
        ignore=None,
        order=("b",),
        allow_fallbacks=False,
        sort="throughput",
        max_price_prompt=Decimal("0.1"),
        max_price_completion=Decimal("2.50"),
        require_parameters=True,
    )


def test_null_in_provider_preferences_is_absent() -> None:
    fields = "only ignore order allow_fallbacks sort max_price require_parameters".split()
    call = parse_call(body(provider=dict.fromkeys(fields)))
    assert call.terms.provider == ProviderPreferences()
    call = parse_call(body(provider={"max_price": {"prompt": None}}))
    assert call.terms.provider == ProviderPreferences()


# Large bodies, which are not written again to see how they are written

LONG = "word " * 10_000


@pytest.mark.parametrize(
    "twice",
    [
        b'"model":"a/b","messages":[%b],"messages":[%b]',
        b'"messages":[%b],"model":"a/b","messages":[%b]',
        b'"model":"a/b","messages":[%b],"m\\u0065ssages":[%b]',
        b'"model":"a/b","messages":[%b],"stop":[%b],"stop":["x"]',
        b'"model":"a/b","model":"a/b","messages":[%b,%b]',
        b'"model":"a/b","messages":[%b,%b],"model":"a/b"',
        b'"model":"a/b","messages":[%b,%b],"n":1,"n":1',
        b'"model":"a/b","messages":0,"model":"a/b","messages":[%b,%b]',
        b'"messages":{},"model":"c/d","messages":[%b,%b],"model":"a/b"',
        b'"messages":null,"max_tokens":9,"messages":[%b,%b],"max_tokens":5,"model":"a/b"',
        b'"model":"a/b","messages":"x","m\\u0065ssages":[%b,%b]',
    ],
)
def test_a_name_given_twice_in_a_large_body_is_refused(twice: bytes) -> None:
    message = orjson.dumps({"role": "user", "content": LONG})
    with pytest.raises(RequestError) as caught:
        parse_call(b"{" + twice % (message, message) + b"}")
    assert caught.value.code == DUPLICATE


@pytest.mark.parametrize("messages", [b'"%b]"', b"null", b'{"a":"%b"}', b'"%b"'])
def test_messages_of_a_large_body_are_a_list(messages: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_call(b'{"messages":' + messages.replace(b"%b", LONG.encode()) + b',"model":"a/b"}')
    assert caught.value.param == "messages"


def test_the_messages_of_each_role_are_counted() -> None:
    messages = [{"role": "developer", "content": ""}, USER, USER]
    assert parse_call(body(messages=messages)).roles == {"developer": 1, "user": 2}


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.booleans())
def test_elements_of_an_array_are_found(
    elements: list[Any], indent: int | None, ascii_: bool
) -> None:
    data = json.dumps([elements, {}], indent=indent, ensure_ascii=ascii_).encode()
    spans = scan_elements(data, data.index(b"[", 1))
    assert [json.loads(data[start:end]) for start, end in spans] == elements


# Properties


@given(st.binary(max_size=40) | JSON.map(lambda value: orjson.dumps(value)))
def test_arbitrary_bytes_raise_nothing_but_request_errors(data: bytes) -> None:
    with pytest.raises(RequestError):
        parse_call(data)


@given(
    st.sampled_from(["messages", "provider", "response_format", "usage", "stream_options"]),
    st.dictionaries(
        st.sampled_from("role content tool_calls type only sort max_price include".split()), JSON
    ),
)
def test_any_members_of_a_known_object_are_refused_or_accepted(
    name: str, value: dict[str, Any]
) -> None:
    try:
        parse_call(body(**{name: [value] if name == "messages" else value}))
    except RequestError as error:
        assert error.param is not None
        assert error.param.startswith(name)


# Bounds


@pytest.mark.parametrize(
    ("members", "param", "expected", "got"),
    [
        ({"models": ["a"] * 33}, "models", "at most 32 models", "33"),
        ({"messages": [USER] * 50_001}, "messages", "at most 50000 messages", "50001"),
        ({"tools": [{}] * 4097}, "tools", "at most 4096 tools", "4097"),
        ({"provider": {"only": ["a"] * 257}}, "provider.only", "at most 256 names", "257"),
        ({"provider": {"ignore": ["a"] * 257}}, "provider.ignore", "at most 256 names", "257"),
        ({"provider": {"order": ["a"] * 257}}, "provider.order", "at most 256 names", "257"),
        ({"model": "a" * 513}, "model", "at most 512 characters", "513"),
        ({"models": ["a", "a" * 513]}, "models[1]", "at most 512 characters", "513"),
        ({"provider": {"order": ["a" * 513]}}, "provider.order[0]", "at most 512 char", "513"),
        ({"stream_options": {"x": "a" * 65_536}}, "stream_options", "at most 65536 bytes", "65544"),
        ({f"k{n}": 0 for n in range(255)}, None, "at most 256 members", "257"),
        ({"a" * 513: 0}, None, "names of members of at most 512 characters", "513"),
        ({"x": [[]] * 200_001}, None, "at most 200000 JSON values", "more"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_a_client_may_send_is_bounded(
    members: dict[str, Any], param: str | None, expected: str, got: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_call(body(**members))
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", param)
    assert expected in error.message
    assert error.message.endswith(f"got {got}") or f"of {got}" in error.message


def test_what_is_within_the_bounds_passes() -> None:
    members = {f"k{n}": 0 for n in range(248)}
    names = [f"{n:03}" + "a" * 509 for n in range(256)]
    call = parse_call(
        body(
            models=[f"a/{n}" for n in range(32)],
            messages=[USER] * 50_000,
            tools=[{}] * 4096,
            provider={"only": names, "ignore": names, "order": names},
            stream_options={"x": "a" * 65_000},
            **members,
            **{"a" * 512: 0},
        )
    )
    assert len(call.terms.candidates) == 33
    assert call.roles == {"user": 50_000}
