"""What a request's body may cost: CPU time of this thread, as a multiple of what orjson takes for
the same bytes, measured side by side; for each the least of several runs."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoberproxy.accounting.record import CLIENT_CLOSED
from hoberproxy.errors import RequestError
from hoberproxy.request.body_scan import MAX_VALUES
from hoberproxy.request.call import Call
from hoberproxy.request.parse_cache import STEPPED_BYTES, ParseCache
from hoberproxy.routing.catalog import Adaptation
from hoberproxy.upstream.body import make_upstream_body
from tests.conftest import QUESTION, Proxy, chat, pure_only, wait_until
from tests.support.scripted import WAIT, ScriptedUpstream

KB = 1024
MB = 1024 * KB
MOST = 3.0  # times what orjson takes
FIXED = 0.001  # seconds, of any request
EACH_MEMBER = 0.000015  # seconds, of the 256 that there may be on the top level
MISTAKEN = 2.0  # as much more where a body begins and ends as a known one and is another
USER = b'{"role":"user","content":"hi"}'
DEVELOPER = Adaptation(roles=(("developer", "system"),), drop=frozenset(("seed",)))


def member(value: bytes) -> bytes:
    """A body with a member that nobody looks into."""
    return b'{"model":"a/b","messages":[%b],"x":%b,"stream":true}' % (USER, value)


def content(value: bytes) -> bytes:
    """A body with such a content of a message."""
    message = b'{"role":"user","content":%b}' % value
    return b'{"model":"a/b","messages":[%b,%b,%b],"stream":true}' % (USER, message, USER)


def array(unit: bytes) -> Callable[[int], bytes]:
    return lambda size: b"[" + (unit + b",") * (size // (len(unit) + 1)) + b"0]"


def string(unit: bytes) -> Callable[[int], bytes]:
    return lambda size: b'"' + unit * (size // len(unit)) + b'"'


def nested(opening: bytes, closing: bytes, levels: int) -> Callable[[int], bytes]:
    return array(opening * levels + b"0" + closing * levels)


VALUES: dict[str, Callable[[int], bytes]] = {
    "empty arrays": array(b"[]"),
    "empty objects": array(b"{}"),
    "objects": array(b'{"":0}'),
    "objects in objects": array(b'{"a":{}}'),
    "empty strings": array(b'""'),
    "short strings": array(b'"ab"'),
    "strings of one escape": array(b'"\\""'),
    "strings of two escapes": array(b'"\\\\"'),
    "strings of a line": array(b'"' + b"abcdef" * 10 + b'"'),
    "strings of a page": array(b'"' + b"abcdef" * 300 + b'"'),
    "integers": array(b"0"),
    "floats": array(b"1e-5"),
    "long integers": array(b"1" * 300 + b".0"),
    "literals": array(b"null"),
    "arrays, 60 deep": nested(b"[", b"]", 60),
    "arrays, 1000 deep": nested(b"[", b"]", 1000),
    "objects, 60 deep": nested(b'{"a":', b"}", 60),
    "objects, 400 deep": nested(b'{"a":', b"}", 400),
    "names of the top level": array(b'{"stream":0,"model":"x"}'),
    "names of the top level as strings": array(b'"stream"'),
    "members": lambda size: (
        b"{" + b",".join([b'"k%d":0' % number for number in range(size // 10)]) + b"}"
    ),
    "one name": lambda size: b"{" + b'"stream":0,' * (size // 11) + b'"":0}',
    "space": lambda size: b"[" + b" " * size + b"]",
    "spaced": array(b"   [   ]   "),
    "tools": array(
        b'{"type":"function","function":{"name":"get","description":"Gets the weather in a place.",'
        b'"parameters":{"type":"object","properties":{"place":{"type":"string"}}}}}'
    ),
    "text": string(b"The quick brown fox jumps over the lazy dog. "),
    "one letter": string(b"a"),
    "line feeds": string(b"\\n"),
    "escaped quotes": string(b'\\"'),
    "escaped backslashes": string(b"\\\\"),
    "escaped letters": string(b"\\u00e9"),
    "surrogates": string(b"\\ud83d\\ude00"),
    "NUL": string(b"\\u0000"),
    "letters of two bytes": string("é".encode()),
    "letters of four bytes": string("\U0001f600".encode()),
    "brackets in a string": string(b"[{,"),
    "names in a string": string(b'\\"stream\\":'),
}
BODIES: dict[str, Callable[[int], bytes]] = {
    **{
        f"{name}, in a member": lambda n, make=make: member(make(n))
        for name, make in VALUES.items()
    },
    **{
        f"{name}, as content": lambda n, make=make: content(make(n))
        for name, make in VALUES.items()
    },
    "messages": lambda size: b'{"model":"a/b","messages":[%b]}' % b",".join([USER] * (size // 31)),
    "parts": lambda size: content(array(b'{"type":"text","text":"a"}')(size)[:-3] + b"]"),
    "images": lambda size: content(
        array(b'{"type":"image_url","image_url":{"url":"a"}}')(size)[:-3] + b"]"
    ),
    "sounds": lambda size: content(
        array(b'{"type":"input_audio","input_audio":"a"}')(size)[:-3] + b"]"
    ),
    "parts of nothing": lambda size: content(array(b"{}")(size)[:-3] + b"]"),
    "top-level members": lambda size: member(
        b"0," + b",".join([b'"k%d":0' % number for number in range(size // 10)])
    ),
    "one top-level name": lambda size: member(b"0" + b',"x":0' * (size // 6)),
    "250 members of strings": lambda size: member(
        b"0" + b"".join([b',"k%d":%b' % (n, array(b'""')(size // 250)) for n in range(250)])
    ),
    "250 members of text": lambda size: member(
        b"0" + b"".join([b',"k%d":["%b"]' % (n, b"a" * (size // 250)) for n in range(250)])
    ),
    "space on the top level": lambda size: member(b"0" + b" " * size),
    "a name without end": lambda size: member(b'0,"%b":0' % (b"a" * size)),
    "models": lambda size: (
        b'{"models":%b,"messages":[%b]}' % (array(b'"a/b"')(size)[:-3] + b"]", USER)
    ),
    "a long slug": lambda size: b'{"model":"%b","messages":[%b]}' % (b"a" * size, USER),
    "providers": lambda size: member(b'0,"provider":{"only":%b}' % array(b'"a"')(size)),
    "stream options": lambda size: member(b'0,"stream_options":{"x":%b}' % array(b'""')(size)),
    "no end": lambda size: member(array(b"[]")(size))[:-1],
}
# Costs as much again: the role is written again.
ROLES: dict[str, Callable[[int], bytes]] = {
    "developers": lambda size: (
        b'{"model":"a/b","messages":[%b]}'
        % b",".join([b'{"role":"developer","content":"abc"}'] * (size // 40))
    ),
    "a long developer": lambda size: (
        b'{"model":"a/b","messages":[{"content":%b,"role":"developer"}]}' % string(b"\\\\")(size)
    ),
}


def measured(*functions: Callable[[], object], runs: int = 4) -> list[float]:
    """The least seconds of each, taken in turns."""
    best = [float("inf")] * len(functions)
    gc.collect()
    gc.disable()  # or it falls to one or the other
    try:
        for _ in range(runs):
            for place, function in enumerate(functions):
                started = time.thread_time()
                function()
                best[place] = min(best[place], time.thread_time() - started)
    finally:
        gc.enable()
    return best


def loads(body: bytes) -> None:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        pass


def serve(cache: ParseCache, body: bytes) -> None:
    """All that is done to a body on its way, but for copying it to the socket."""
    try:
        call = cache.read(body, "key")
        make_upstream_body(call, "up", stream_options=True, adaptation=DEVELOPER)
    except RequestError:
        pass


def assert_cheap(body: bytes, most: float = MOST) -> None:
    known = ParseCache()
    known.read(b'{"model":"a/b","messages":[%b],"stream":true}' % USER, "key")
    for _ in range(4):  # a neighbour on the same core, once in a while
        by_orjson, unknown, framed = measured(
            lambda: loads(body), lambda: serve(ParseCache(), body), lambda: serve(known, body)
        )
        limit = most * by_orjson + FIXED + EACH_MEMBER * min(body.count(b',"k'), 256)
        if unknown <= limit and framed <= limit + MISTAKEN * by_orjson:
            return
    shares = unknown / by_orjson, framed / by_orjson
    pytest.fail(f"{len(body)} bytes: {shares[0]:.1f} and {shares[1]:.1f} times what orjson takes")


@pytest.mark.parametrize("size", [20 * KB, 2 * MB], ids=["20 KB", "2 MB"])
@pytest.mark.parametrize("make", BODIES.values(), ids=BODIES.keys())
def test_a_body_of_the_worst_kind_costs_at_most_three_times_its_parse(
    make: Callable[[int], bytes], size: int
) -> None:
    assert_cheap(make(size))


@pytest.mark.parametrize("size", [20 * KB, 300 * KB, 2 * MB])
@pytest.mark.parametrize("make", ROLES.values(), ids=ROLES.keys())
def test_roles_that_are_replaced_cost_at_most_twice_as_much(
    make: Callable[[int], bytes], size: int
) -> None:
    assert_cheap(make(size), most=2 * MOST)


UNITS = st.sampled_from(
    [
        b"[]",
        b"{}",
        b'""',
        b'"a"',
        b"0",
        b"1.5e3",
        b"null",
        b'"\\""',
        b'"\\\\"',
        b'"\\u00e9"',
        b" 1 ",
    ]
) | st.binary(min_size=1, max_size=40).map(lambda raw: b'"%b"' % raw.hex().encode())


def containers(children: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    lists = st.lists(children, min_size=1, max_size=4)
    return lists.map(lambda units: b"[" + b",".join(units) + b"]") | lists.map(
        lambda units: b'{"stream":' + b',"a":'.join(units) + b"}"
    )


@settings(max_examples=25)
@given(st.recursive(UNITS, containers, max_leaves=8), st.sampled_from([member, content]))
def test_so_does_whatever_is_repeated(unit: bytes, put: Callable[[bytes], bytes]) -> None:
    assert_cheap(put(array(unit)(300 * KB)))


def test_text_with_escapes_and_many_commas_costs_at_most_six_times() -> None:
    # To tell its commas from those between values takes three times as long as to parse it: only a
    # text of megabytes has so many of them.
    assert_cheap(content(string(b'f(a, b):\\n  return {\\"a\\": [a, b]}')(6 * MB)), most=6)


# Steps


def steps(body: bytes) -> Iterator[float]:
    """The seconds of each step in which a large body is read."""
    reading, call = ParseCache().read_in_steps(body, "key"), None
    while True:
        started = time.thread_time()
        try:
            next(reading)
        except (StopIteration, RequestError) as end:
            call = getattr(end, "value", None)
            if isinstance(call, Call):
                make_upstream_body(call, "up", stream_options=True)
            yield time.thread_time() - started
            return
        yield time.thread_time() - started


LONGEST = [name for name in BODIES if name.endswith("as content") and "deep" not in name]


@pytest.mark.parametrize("name", [*LONGEST, "messages", "parts", "top-level members", "no end"])
def test_a_large_body_is_read_in_steps_none_longer_than_a_parse(name: str) -> None:
    body = BODIES[name](4 * MB)
    assert len(body) > STEPPED_BYTES
    for _ in range(4):
        (by_orjson,) = measured(lambda: loads(body), runs=2)
        taken = list(steps(body))
        if max(taken) <= 1.6 * by_orjson + 0.01:
            return
    pytest.fail(f"{max(taken):.3f} s at a stretch, {by_orjson:.3f} for the parse")


@pytest.mark.parametrize("size", [20 * KB, 3 * MB])
@pytest.mark.parametrize(
    "name", ["messages", "text, as content", "models", "no end", "tools, as content"]
)
def test_what_is_read_in_steps_says_the_same(name: str, size: int) -> None:
    body = BODIES[name](size)

    def result_of(read: Callable[[], Call]) -> object:
        try:
            call = read()
        except RequestError as error:
            return error.code, error.param, error.message
        return call.terms.candidates, call.members, call.roles, bytes(call.raw_messages)

    def in_steps() -> Call:
        reading = ParseCache().read_in_steps(body, "key")
        while True:
            try:
                next(reading)
            except StopIteration as end:
                call: Call = end.value
                return call

    assert result_of(in_steps) == result_of(lambda: ParseCache().read(body, "key"))


async def test_a_large_body_arrives_as_it_was_sent(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    text = "a\\n\u00e9" * 1_000_000
    client = await proxy.connect()
    client.send(chat(proxy.key, {**QUESTION, "messages": [{"role": "user", "content": text}]}))
    assert (await client.read_answer()).status == 200
    assert upstream.requests[0].json()["messages"][0]["content"] == text


async def test_what_is_wrong_with_a_large_body_is_told(proxy: Proxy) -> None:
    client = await proxy.connect()
    client.send(chat(proxy.key, {**QUESTION, "x": "a" * STEPPED_BYTES, "seed": [[]] * MAX_VALUES}))
    answer = await client.read_answer()
    assert (answer.status, b"at most 200000 JSON values" in answer.body) == (400, True)
    client.send(chat(proxy.key))
    assert (await client.read_answer()).status == 200


@pure_only
async def test_others_are_served_between_steps_and_none_is_taken_for_who_has_left(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, taken = asyncio.Event(), 0

    def endless(body: bytes, key_id: str) -> Iterator[None]:
        nonlocal taken
        while True:
            begun.set()
            taken += 1
            yield

    monkeypatch.setattr(proxy.context.parse_cache, "read_in_steps", endless)
    client, other = await proxy.connect(), await proxy.connect()
    client.send(chat(proxy.key, {**QUESTION, "x": "a" * STEPPED_BYTES}))
    await asyncio.wait_for(begun.wait(), WAIT)
    other.send(chat(proxy.key))
    assert (await other.read_answer()).status == 200
    client.send_eof()
    await wait_until(lambda: len(proxy.records) == 2)
    assert CLIENT_CLOSED in [record.status for record in proxy.records]
    before = taken
    other.send(chat(proxy.key))
    assert (await other.read_answer()).status == 200
    assert taken == before
