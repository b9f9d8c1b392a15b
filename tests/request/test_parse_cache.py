"""The parse cache: a body that is known by its template says what it says when parsed."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.errors import RequestError
from hoberproxy.request import parse_cache
from hoberproxy.request.call import Call
from hoberproxy.request.checks import parse_call
from hoberproxy.request.parse_cache import KEPT, MAX_TEMPLATE_BYTES, ParseCache
from hoberproxy.routing.catalog import Adaptation
from hoberproxy.upstream.body import make_upstream_body
from tests.conftest import StartProxy, chat, pure_only, wait_until

USER = {"role": "user", "content": "hello"}
KEY = "key_1"
DEVELOPER = Adaptation(roles=(("developer", "system"),), set=(("top_k", b"1"),))


def said(read: Any, *args: Any) -> Any:
    """All that a body says, or why it is refused."""
    try:
        call: Call = read(*args)
    except RequestError as error:
        return error.code, error.param, error.message
    terms = {
        name: getattr(call.terms, name)
        for name in (
            "candidates requested stream given wants_usage provider "
            "needs_tools json_format max_output"
        ).split()
    }
    bodies = [
        (b"".join(parts), injected)
        for adaptation in (Adaptation(), DEVELOPER)
        for parts, injected in [
            make_upstream_body(call, "up", stream_options=True, adaptation=adaptation)
        ]
    ]
    return terms, call.body, bytes(call.raw_messages), call.roles, call.needs_images, bodies


def taught(*bodies: bytes) -> ParseCache:
    cache = ParseCache()
    for body in bodies:
        said(cache.read, body, KEY)
    return cache


def is_known(cache: ParseCache, body: bytes, key: str = KEY) -> bool:
    """Whether it would be read by its template."""
    return any(each.fits(body) for each in cache._templates.get(key, []))


FORMS = {
    "as the official client writes it": b'{"messages":%b,"model":"a/b","stream":true}',
    "messages last": b'{"model":"a/b","temperature":0.5,"messages":%b}',
    "spaced": b'{"model": "a/b", "messages": %b, "max_tokens": 9}',
    "on several lines": b'{\n  "model": "a/b",\n  "messages":\n %b\n,\n "stream": false\n}\n',
    "with tools": b'{"model":"a/b","messages":%b,"tools":[{"type":"function","x":"]}"}]}',
    "with escapes": b'{"mod\\u0065l":"a\\/b","m\\u0065ssages":%b,"user":"\\u00e9\\"messages\\":"}',
    "with what is ours": b'{"models":["a","b"],"messages":%b,"usage":{"include":true}}',
}
MESSAGES = {
    "one": b'[{"role":"user","content":"hello"}]',
    "two, with brackets and quotes": b'[{"role":"developer","content":"[{\\"a\\":1}],"},'
    b'{"role":"user","content":"\\\\"}]',
    "an image": b'[ {"role":"user","content":[{"type":"image_url"}]} ]',
    "text that looks like the rest": b'[{"role":"user","content":"],\\"model\\":\\"c\\"}"}]',
    "long": b'[{"role":"user","content":"%b"}]' % (b"word " * 10_000),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES.keys())
def test_the_next_body_of_an_app_says_the_same_by_its_frame(form: bytes, messages: bytes) -> None:
    cache = taught(form % MESSAGES["one"])
    body = form % messages
    assert is_known(cache, body)
    assert said(cache.read, body, KEY) == said(parse_call, body)


@pure_only
def test_only_the_messages_of_a_known_body_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = FORMS["with tools"] % MESSAGES["one"]
    cache = taught(body)
    monkeypatch.setattr(parse_cache, "parse_call", None)
    assert cache.read(body, KEY).terms.needs_tools


WRONG = {
    "no list": b"{}",
    "null": b"null",
    "a number": b"1",
    "empty": b"[]",
    "no JSON": b"[",
    "nothing": b"",
    "a space": b" ",
    "two values": b"[],[]",
    "another member": b'[{"role":"user","content":""}],"seed":1',
    "the model again": b'[{"role":"user","content":""}],"model":"c"',
    "the messages again": b'[{"role":"user","content":""}],"messages":[]',
    "a bracket too many": b'[{"role":"user","content":""}]]',
    "the object's end": b'[{"role":"user","content":""}]}{"x":[]',
    "a string that goes on": b'"],"x":"',
    "a role nobody has": b'[{"role":"boss","content":""}]',
    "no UTF-8": b'[{"role":"user","content":"\xff"}]',
    "a lone surrogate": b'[{"role":"user","content":"\\ud800"}]',
    "a comment": b"[]/**/",
    "NaN": b"[NaN]",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("messages", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_told_as_of_any_body(form: bytes, messages: bytes) -> None:
    cache = taught(form % MESSAGES["one"])
    assert said(cache.read, form % messages, KEY) == said(parse_call, form % messages)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
NAMES = st.sampled_from(
    "model messages stream models user tools stop seed max_tokens stream_options".split()
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "developer"]), "content": st.text(max_size=5)}
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    members: dict[str, Any] = draw(st.dictionaries(NAMES, JSON, max_size=3))
    members |= {"model": "a/b", "messages": draw(st.lists(MESSAGE, min_size=1, max_size=2))}
    names = draw(st.permutations(list(members)))
    indent, is_ascii = draw(st.sampled_from([None, 1])), draw(st.booleans())
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,", " :")]))
    text = json.dumps(
        {name: members[name] for name in names},
        indent=indent,
        ensure_ascii=is_ascii,
        separators=separators,
    )
    return text.encode("utf-8", "surrogatepass")


@st.composite
def edited(draw: st.DrawFn, body: bytes) -> bytes:
    """A body with parts of itself and signs of JSON put in, or taken out."""
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 12)))
        other = draw(st.integers(0, len(body)))
        part = body[other : other + draw(st.integers(0, 24))]
        signs = draw(st.sampled_from([b"", b'"', b"[", b"]", b"{", b"}", b",", b":", b"\\", b"1"]))
        body = body[:start] + draw(st.sampled_from([part, signs])) + body[end:]
    return body


@given(data=st.data(), known=st.lists(bodies(), min_size=1, max_size=3))
def test_whatever_comes_is_read_as_if_nothing_were_known(
    data: st.DataObject, known: list[bytes]
) -> None:
    cache = taught(*known)
    for body in known:
        later = data.draw(edited(body))
        assert said(cache.read, later, KEY) == said(parse_call, later)


@given(first=st.lists(MESSAGE, min_size=1), second=st.lists(MESSAGE, min_size=1))
@example([USER], [USER, USER])
def test_calls_of_one_template_share_what_they_say(first: list[Any], second: list[Any]) -> None:
    cache = ParseCache()
    calls = [
        cache.read(orjson.dumps({"model": "a/b", "messages": messages, "seed": 1}), KEY)
        for messages in (first, second)
    ]
    assert calls[0].terms is calls[1].terms
    assert [orjson.loads(call.raw_messages) for call in calls] == [first, second]


# Bounds


def numbered(number: int, size: int = 0) -> bytes:
    user = f"user-{number}" + "x" * size
    return orjson.dumps({"model": "a/b", "messages": [USER], "user": user})


def test_the_newest_templates_of_a_key_are_kept() -> None:
    cache = taught(*map(numbered, range(KEPT + 3)))
    known = [is_known(cache, numbered(number)) for number in range(KEPT + 3)]
    assert known == [False] * 3 + [True] * KEPT


def test_a_template_in_use_outlives_those_that_are_not() -> None:
    cache = taught(numbered(0))
    for number in range(1, 3 * KEPT):
        cache.read(numbered(0), KEY)
        cache.read(numbered(number), KEY)
    assert is_known(cache, numbered(0))
    assert not is_known(cache, numbered(1))


def test_of_two_templates_that_fit_the_one_that_says_more_is_meant() -> None:
    plain, tools = FORMS["messages last"], FORMS["messages last"][:-1] + b',"tools":[{"x":[]}]}'
    cache = taught(tools % MESSAGES["one"], plain % MESSAGES["one"])
    for form in (plain, tools):
        body = form % MESSAGES["two, with brackets and quotes"]
        assert said(cache.read, body, KEY) == said(parse_call, body)
    assert len(cache._templates[KEY]) == 2, "neither was learnt again"


def test_what_is_not_asked_for_again_is_forgotten() -> None:
    cache = taught(numbered(1), numbered(2))
    cache.read(numbered(1), KEY)
    cache.forget_unused()
    assert is_known(cache, numbered(1))
    assert not is_known(cache, numbered(2))
    cache.forget_unused()
    assert not cache._templates
    assert not cache._bytes


async def test_a_proxy_forgets_what_is_not_asked_for_again(
    start_proxy: StartProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hoberproxy.process.server.POOL_SWEEP", 0.02)
    monkeypatch.setattr("hoberproxy.process.server.PARSE_CACHE_SWEEP", 2)
    proxy = await start_proxy()
    cache = proxy.context.parse_cache
    client = await proxy.connect()
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200
    assert cache._learnt == 1
    await wait_until(lambda: not cache._templates)


def test_no_text_is_kept_but_in_what_describes_a_tool() -> None:
    said_before = {"prediction": {"type": "content", "content": "the answer"}}
    cache = taught(orjson.dumps({"model": "a/b", "messages": [USER], **said_before}))
    assert not cache._templates


def test_a_long_list_of_models_is_not_kept() -> None:
    models = [f"m{number}" for number in range(17)]
    cache = taught(orjson.dumps({"models": models, "messages": [USER]}))
    assert not cache._templates


def test_no_key_knows_another_ones_templates() -> None:
    cache = taught(numbered(1))
    assert is_known(cache, numbered(1))
    cache.read(numbered(2), "")
    assert is_known(cache, numbered(2), "")
    assert not is_known(cache, numbered(1), "")
    assert not is_known(cache, numbered(2))


def test_a_large_template_is_not_kept() -> None:
    cache = taught(numbered(1, MAX_TEMPLATE_BYTES))
    assert not cache._templates.get(KEY)
    assert said(cache.read, numbered(2, MAX_TEMPLATE_BYTES), KEY)


def test_templates_of_all_keys_have_a_bound_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, size = ParseCache(), 60_000
    for number in range(400):
        cache.read(numbered(number, size), f"key_{number}")
    kept = [each.size for each_key in cache._templates.values() for each in each_key]
    assert sum(kept) == cache._bytes <= parse_cache.MAX_BYTES
    assert len(kept) > 100
    assert is_known(cache, numbered(399, size), "key_399"), "the newest stay"
    assert not is_known(cache, numbered(0, size), "key_0")
