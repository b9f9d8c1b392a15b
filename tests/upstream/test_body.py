"""The body that goes upstream is the body that was checked, but for the changes of an endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.errors import RequestError
from hoberproxy.protocol.json_bytes import Member, scan_elements, scan_members
from hoberproxy.request.call import ROLES, Call
from hoberproxy.request.checks import parse_call
from hoberproxy.routing.catalog import NO_ADAPTATION, Adaptation
from hoberproxy.upstream.body import make_upstream_body, named_option
from tests.conftest import pure_only
from tests.request.test_checks import JSON, LONG, USER, body, chat


def upstream(
    call: Call,
    adaptation: Adaptation = NO_ADAPTATION,
    *,
    stream_options: bool = True,
    without: Iterable[str] = (),
) -> bytes:
    def serialize(adaptation: Adaptation) -> bytes:
        parts, _ = make_upstream_body(
            call,
            "up",
            stream_options=stream_options,
            adaptation=adaptation,
            without=frozenset(without),
        )
        return b"".join(parts)

    sent = serialize(adaptation)
    if adaptation is NO_ADAPTATION:  # only this very one is spliced in without a scan
        assert serialize(Adaptation()) == sent, "both ways lead to the same"
    return sent


@pytest.mark.parametrize("name", ["seed", "", "123", "X-Extra", "modèle", "modell", "mo del", "元"])
def test_names_that_are_no_parameter_pass(name: str) -> None:
    call = parse_call(body(**{name: 1}))
    assert name in call.terms.given
    assert json.loads(upstream(call))[name] == 1


def test_untouched_members_keep_their_bytes_and_order() -> None:
    data = (
        b' {"seed" : 12345678901234567890123, "mo\\u0064el" :"a",\n"t\\u006fp_k":1.0,'
        b'"messages":[ {"role":"user","content":"\\u0041\\/"} ],"models":["b"],"x":1.50E+3,'
        b'"provider":{"sort":"price"},"usage":{"include":true},"y":-0.0,"z":null} '
    )
    assert upstream(parse_call(data)) == (
        b'{"seed" : 12345678901234567890123,"mo\\u0064el" :"up","t\\u006fp_k":1.0,'
        b'"messages":[ {"role":"user","content":"\\u0041\\/"} ],"x":1.50E+3,"y":-0.0,"z":null}'
    )


def test_the_model_is_appended_where_the_client_gave_only_a_list() -> None:
    data = b'{"models":["a"],"messages":[{"role":"user","content":""}]}'
    assert upstream(parse_call(data)) == (
        b'{"messages":[{"role":"user","content":""}],"model":"up"}'
    )


def test_a_name_of_a_model_is_escaped() -> None:
    sent, _ = make_upstream_body(parse_call(body()), 'q"\\ü', stream_options=True)
    assert json.loads(b"".join(sent))["model"] == 'q"\\ü'


TEXTS = {"plain": LONG, "with brackets": LONG + "],[" + LONG, "escaped": LONG + '\n"\\é' + LONG}


TURN = {"role": "user", "content": [{"type": "text", "text": "and this"}], "name": "n"}


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model first": ({"model": "a/b"}, {"stream": True, "stop": ["a", "b"]}),
    "model last": ({}, {"model": "a/b"}),
    "model after others": ({"temperature": 0.5, "model": "a/b"}, {}),
    "model between others": ({"user": "u"}, {"tools": [{"x": {"model": "a/b"}}], "model": "a/b"}),
    "a model within another": ({"metadata": {"model": "a/b"}, "model": "a/b"}, {"stream": True}),
}


@pytest.mark.parametrize("more", [[], [TURN]], ids=["one message", "two messages"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize(("before", "after"), OTHERS.values(), ids=OTHERS.keys())
def test_a_large_body_goes_up_as_a_small_one_does(
    before: dict[str, Any], after: dict[str, Any], text: str, more: list[Any]
) -> None:
    messages = [{"role": "user", "content": text}, *more]
    data = orjson.dumps({**before, "messages": messages, **after})
    call = parse_call(data)
    assert call.prompt_bytes == len(orjson.dumps(messages))
    expected = json.loads(data) | {"model": "up"}
    if after.get("stream"):
        expected["stream_options"] = {"include_usage": True}
    sent = upstream(call)
    assert json.loads(sent) == expected
    assert list(json.loads(sent)) == list(expected), "in the client's order"


def test_messages_of_a_large_body_keep_their_bytes() -> None:
    data = (
        b'{"model":"a/b","messages":[ {"role":"user","content":"\\u0041' + b"x" * 40_000 + b'"} ]}'
    )
    assert upstream(parse_call(data)) == data.replace(b"a/b", b"up")


STREAM_OPTIONS = {
    "absent": (b"", b',"stream_options":{"include_usage":true}'),
    "null": (b',"stream_options":null', b',"stream_options":{"include_usage":true}'),
    "true already": (
        b',"stream_options":{ "x":1.0, "include_usage":true}',
        b',"stream_options":{ "x":1.0, "include_usage":true}',
    ),
    "false": (
        b',"stream_options": {"include_usage":false,"x":[1]}',
        b',"stream_options": {"include_usage":true,"x":[1]}',
    ),
    "other members": (
        b',"stream_options":{"continuous_usage_stats":true}',
        b',"stream_options":{"continuous_usage_stats":true,"include_usage":true}',
    ),
}


STREAMED = b'{"model":%b,"messages":[{"role":"user","content":""}],"stream":%b%b}'


@pytest.mark.parametrize(("given_", "sent"), STREAM_OPTIONS.values(), ids=STREAM_OPTIONS.keys())
def test_a_stream_always_asks_for_usage_where_that_is_understood(
    given_: bytes, sent: bytes
) -> None:
    call = parse_call(STREAMED % (b'"a"', b"true", given_))
    assert upstream(call) == STREAMED % (b'"up"', b"true", sent)
    assert upstream(call, stream_options=False) == STREAMED % (b'"up"', b"true", b"")


def test_stream_options_without_a_stream_pass_where_they_are_understood() -> None:
    options = b',"stream_options":{"include_usage":false}'
    call = parse_call(STREAMED % (b'"a"', b"false", options))
    assert upstream(call) == STREAMED % (b'"up"', b"false", options)
    assert upstream(call, stream_options=False) == STREAMED % (b'"up"', b"false", b"")


def adapted(extra: bytes, adaptation: Adaptation, without: Iterable[str] = ()) -> bytes:
    """What becomes of the members `extra` there."""
    frame = b'{"model":"up","messages":[{"role":"user","content":""}]%b}'
    sent = upstream(parse_call(frame % extra), adaptation, without=without)
    start, end = frame.split(b"%b")
    assert sent.startswith(start)
    return sent[len(start) : -len(end)]


RENAMED = Adaptation(rename=(("max_tokens", "max_completion_tokens"),))


RENAMES = {
    "in its place, the value's bytes as they were": (
        b',"a":1,"max_tokens" :  7,"b":2',
        b',"a":1,"max_completion_tokens":7,"b":2',
    ),
    "written with escapes": (b',"max_\\u0074okens":7', b',"max_completion_tokens":7'),
    "not sent": (b',"seed":7', b',"seed":7'),
    "both sent": (
        b',"max_tokens":7,"max_completion_tokens": 8',
        b',"max_completion_tokens": 8',
    ),
    "both sent the other way round": (
        b',"max_completion_tokens": 8,"max_tokens":7',
        b',"max_completion_tokens": 8',
    ),
    "null under the new name": (
        b',"max_completion_tokens":null,"max_tokens":7',
        b',"max_completion_tokens":7',
    ),
    "null under the old name": (
        b',"max_tokens":null,"max_completion_tokens":8',
        b',"max_completion_tokens":8',
    ),
    "null under both": (
        b',"max_tokens":null,"max_completion_tokens":null',
        b',"max_completion_tokens":null',
    ),
}


@pytest.mark.parametrize(("given_", "sent"), RENAMES.values(), ids=RENAMES.keys())
def test_a_member_is_renamed_unless_the_client_gave_the_new_name(
    given_: bytes, sent: bytes
) -> None:
    assert adapted(given_, RENAMED) == sent


def test_dropped_members_are_taken_out() -> None:
    dropping = Adaptation(drop=frozenset(("user", "logit_bias")))
    assert adapted(b',"user":"x","a":1,"logit_bias":null', dropping) == b',"a":1'


def test_set_members_replace_what_the_client_sent_or_come_last() -> None:
    setting = Adaptation(set=(("top_k", b"1.50"), ("a b", b'{"x":[]}')))
    assert adapted(b',"top_k" : 3,"b":2', setting) == b',"top_k" : 1.50,"b":2,"a b":{"x":[]}'


DEVELOPER = Adaptation(roles=(("developer", "system"), ("function", "tool")))


def test_roles_are_replaced_where_they_map_and_nowhere_else() -> None:
    messages = (
        b'[ {"role" : "developer","content":"\\"role\\":\\"developer\\""},\n'
        b'{"content":[{"type":"text","role":"developer"}],"r\\u006fle":"\\u0064eveloper"},'
        b'{"role":"user","content":"developer"},{"role":"function","content":"","n":1.0} ]'
    )
    expected = (
        b'[ {"role" : "system","content":"\\"role\\":\\"developer\\""},\n'
        b'{"content":[{"type":"text","role":"developer"}],"r\\u006fle":"system"},'
        b'{"role":"user","content":"developer"},{"role":"tool","content":"","n":1.0} ]'
    )
    sent = upstream(parse_call(b'{"model":"a","messages":' + messages + b"}"), DEVELOPER)
    assert sent == b'{"model":"up","messages":' + expected + b"}"


def test_a_role_given_twice_is_replaced_in_both_places() -> None:
    data = (
        b'{"model":"a","messages":[{"role":{},"role":"developer","role":"developer","content":""}]}'
    )
    assert upstream(parse_call(data), DEVELOPER) == data.replace(b'"a"', b'"up"').replace(
        b"developer", b"system"
    )


@pytest.mark.parametrize("depth", [1, 5, 9, 40])
def test_messages_of_any_depth_are_told_apart(depth: int) -> None:
    deep = b"[" * depth + b'"]}",{"role":"developer"}' + b"]" * depth
    one = b'{"x":%b,"role":"developer","content":""}' % deep
    data = b'{"model":"a","messages":[%b , %b]}' % (one, one)
    (member,) = [each for each in scan_members(data) if each.name == "messages"]
    spans = scan_elements(data, member.value_start)
    assert [data[start:end] for start, end in spans] == [one, one]
    assert (
        json.loads(upstream(parse_call(data), DEVELOPER))["messages"]
        == [{**json.loads(one), "role": "system"}] * 2
    )


@pure_only
def test_messages_behind_the_last_role_that_changes_are_not_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = []

    def scan(data: bytes) -> list[Member]:
        read.append(data)
        return scan_members(data)

    call = parse_call(chat(USER, {"role": "developer", "content": ""}, USER, USER))
    assert call.members  # read before: a call reads them when they are asked for
    monkeypatch.setattr("hoberproxy.upstream.body.scan_members", scan)
    assert json.loads(upstream(call, DEVELOPER))["messages"][1]["role"] == "system"
    assert len(read) == 2


def test_messages_without_a_role_that_changes_are_not_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = parse_call(body())
    monkeypatch.setattr("hoberproxy.upstream.body.scan_elements", None)
    assert upstream(call, DEVELOPER) == upstream(call)


PUT_IN = Adaptation(set=(("top_k", b"40"), ("seed", b"1")))


def test_a_refused_option_goes_up_only_as_the_client_sent_it() -> None:
    assert adapted(b',"seed": 5', PUT_IN) == b',"seed": 1,"top_k":40'
    assert adapted(b',"seed": 5', PUT_IN, ["top_k"]) == b',"seed": 1'
    assert adapted(b',"seed": 5', PUT_IN, ["top_k", "seed"]) == b',"seed": 5'
    assert adapted(b',"seed":null', PUT_IN, ["top_k", "seed"]) == b""


@pytest.mark.parametrize(
    ("given_", "sent"),
    [
        (b"", b""),
        (b',"stream_options":null', b""),
        (b',"stream_options":{ }', b',"stream_options":{ }'),
        (b',"stream_options":{"x":1.0}', b',"stream_options":{"x":1.0}'),
    ],
    ids=["absent", "null", "empty", "of-the-client"],
)
def test_refused_stream_options_are_the_clients_or_none(given_: bytes, sent: bytes) -> None:
    call = parse_call(STREAMED % (b'"a"', b"true", given_))
    assert upstream(call, without=["stream_options"]) == STREAMED % (b'"up"', b"true", sent)


@pytest.mark.parametrize(
    ("members", "stream_options", "injected"),
    [
        ({}, True, {"top_k", "seed"}),
        ({"stream": True}, True, {"top_k", "seed", "stream_options"}),
        ({"stream": True, "stream_options": None}, True, {"top_k", "seed", "stream_options"}),
        ({"stream": True, "stream_options": {}}, True, {"top_k", "seed"}),
        ({"stream": True}, False, {"top_k", "seed"}),
        ({"top_k": 1, "seed": None, "max_tokens": 1}, True, {"seed"}),
    ],
    ids=["set", "stream", "null", "stream-options-sent", "not-understood", "sent"],
)
def test_options_put_in_are_those_that_the_client_did_not_send(
    members: dict[str, Any], stream_options: bool, injected: set[str]
) -> None:
    adaptation = Adaptation(rename=RENAMED.rename, set=PUT_IN.set)
    call = parse_call(body(**members))
    _, put_in = make_upstream_body(call, "up", stream_options=stream_options, adaptation=adaptation)
    assert put_in == injected


REFUSALS = [
    ("Unrecognized request argument supplied: stream_options", "stream_options"),
    ("Unsupported parameter: 'top_k' is not supported with this model.", "top_k"),
    ("Unknown parameter: 'stream_options.include_usage'.", "stream_options"),
    ("body.stream_options: Extra inputs are not permitted", "stream_options"),
    ("1 validation error for ChatRequest\nstream_options\n  extra fields not permitted",
     "stream_options"),
    ("[{'type': 'extra_forbidden', 'loc': ('body', 'top_k'), 'msg': 'Extra inputs are not "
     "permitted', 'input': 40}]", "top_k"),
    ('{"object":"error","message":{"detail":[{"type":"extra_forbidden","loc":["body",'
     '"stream_options"],"msg":"Extra inputs are not permitted"}]},"code":null}', "stream_options"),
    ('Invalid JSON payload received. Unknown name "stream_options": Cannot find field.',
     "stream_options"),
    ("json: unknown field \"top_k\"", "top_k"),
    ("property 'stream_options' is unsupported", "stream_options"),
    ("stream_options", "stream_options"),
    ("top_k is not supported together with stream_options", "top_k"),
    ("Top_K", None),
    ("top_k_return is not supported", None),
    ("mystream_options is not supported", None),
    ("stream_options2", None),
    ("estream_options", None),
    ("max_tokens is too large: 100000", None),
    ("messages: array too short", None),
    ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "named"), REFUSALS)
def test_a_refusal_names_an_option_by_the_whole_word(text: str, named: str | None) -> None:
    assert named_option(text, frozenset(("stream_options", "top_k"))) == named


def test_a_refusal_names_nothing_where_nothing_was_put_in() -> None:
    assert named_option("stream_options", frozenset()) is None


@given(st.text(), st.frozensets(st.text(min_size=1, max_size=5), max_size=3))
def test_any_text_names_one_of_the_options_or_none(text: str, injected: frozenset[str]) -> None:
    named = named_option(text, injected)
    assert named is None or (named in injected and named in text)


FIELDS = st.fixed_dictionaries(
    {"messages": st.just([USER])},
    optional={
        "model": st.text(min_size=1, max_size=5),
        "models": st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=3),
        "provider": st.fixed_dictionaries({}, optional={"sort": st.just("price"), "x": JSON}),
        "usage": st.fixed_dictionaries({}, optional={"include": st.booleans()}),
        "stream": st.booleans() | st.none(),
        "stream_options": st.none()
        | st.fixed_dictionaries({}, optional={"include_usage": st.booleans(), "x": JSON}),
        "seed": JSON,
        "metadata": JSON,
    },
)


def expected_upstream(
    members: dict[str, Any], stream_options: bool, without: Iterable[str] = ()
) -> dict[str, Any]:
    expected: dict[str, Any] = {
        name: "up" if name == "model" else value
        for name, value in members.items()
        if name not in ("models", "provider", "usage")
    }
    expected.setdefault("model", "up")
    if not stream_options:
        expected.pop("stream_options", None)
    elif "stream_options" in without:
        if expected.get("stream_options") is None:
            expected.pop("stream_options", None)
    elif members.get("stream"):
        options = expected.get("stream_options") or {}
        expected["stream_options"] = {**options, "include_usage": True}
    return expected


@given(FIELDS, st.booleans(), st.sampled_from([None, 1]), st.booleans(), st.randoms())
def test_the_body_sent_is_the_body_checked_but_for_our_changes(
    members: dict[str, Any], stream_options: bool, indent: int | None, ascii_: bool, random: Any
) -> None:
    if not members.keys() & {"model", "models"}:
        members["model"] = "a"
    names = list(members)
    random.shuffle(names)
    members = {name: members[name] for name in names}
    call = parse_call(json.dumps(members, indent=indent, ensure_ascii=ascii_).encode())
    sent = upstream(call, stream_options=stream_options)
    expected = expected_upstream(members, stream_options)
    assert json.loads(sent) == expected
    assert list(json.loads(sent)) == list(expected)


@st.composite
def adaptations(draw: st.DrawFn) -> Adaptation:
    """Any that the config would take."""
    names = draw(st.permutations(["seed", "metadata", "max_tokens", "max_completion_tokens", "x"]))
    renamed = 2 * draw(st.integers(0, 2))
    rest = names[renamed:]
    return Adaptation(
        rename=tuple((names[i], names[i + 1]) for i in range(0, renamed, 2)),
        drop=frozenset(draw(st.sets(st.sampled_from(rest[:1])))),
        set=tuple((name, orjson.dumps(draw(JSON))) for name in rest[1:] if draw(st.booleans())),
        roles=tuple(draw(st.dictionaries(st.sampled_from(sorted(ROLES)), st.just("tool"))).items()),
    )


def expected_adaptation(
    members: dict[str, Any], adaptation: Adaptation, without: Iterable[str]
) -> dict[str, Any]:
    """The rules on values instead of bytes."""
    for old, new in adaptation.rename:
        if members.get(old) is None or members.get(new) is not None:
            members.pop(old, None)
        else:
            members.pop(new, None)
            members = {new if name == old else name: members[name] for name in members}
    members = {name: members[name] for name in members if name not in adaptation.drop}
    for name, text in adaptation.set:
        if name not in without:
            members[name] = json.loads(text)
        elif members.get(name) is None:
            members.pop(name, None)
    roles = dict(adaptation.roles)
    members["messages"] = [
        message | {"role": roles.get(message["role"], message["role"])}
        for message in members["messages"]
    ]
    return members


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(sorted(ROLES)), "content": st.text()}, optional={"x": JSON}
    ),
    min_size=1,
    max_size=4,
)


LIMITS = st.none() | st.integers(1, 9)


ADAPTED_FIELDS = st.fixed_dictionaries(
    {"model": st.just("a"), "messages": MESSAGES},
    optional={
        "stream": st.booleans(),
        "stream_options": st.none() | st.fixed_dictionaries({}, optional={"x": JSON}),
        "seed": JSON,
        "metadata": JSON,
        "max_tokens": LIMITS,
        "max_completion_tokens": LIMITS,
    },
)


@given(
    ADAPTED_FIELDS,
    adaptations(),
    st.frozensets(st.sampled_from(["stream_options", "seed", "metadata", "x"])),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.randoms(),
)
def test_an_adapted_body_is_what_the_rules_say_and_keeps_all_else(
    members: dict[str, Any],
    adaptation: Adaptation,
    without: frozenset[str],
    indent: int | None,
    ascii_: bool,
    random: Any,
) -> None:
    names = list(members)
    random.shuffle(names)
    members = {name: members[name] for name in names}
    call = parse_call(json.dumps(members, indent=indent, ensure_ascii=ascii_).encode())
    sent = upstream(call, adaptation, without=without)
    expected = expected_upstream(members, True, without)
    expected = expected_adaptation(expected, adaptation, without)
    assert json.loads(sent) == expected
    assert list(json.loads(sent)) == list(expected)
    # Where nothing of ours was to be done, not a byte is another.
    texts = {m.name: call.body[m.start : m.end] for m in call.members}
    touched = {"model", "stream_options", *(name for name, _ in adaptation.set)}
    touched |= {new for _, new in adaptation.rename}
    if call.roles.keys() & dict(adaptation.roles):
        touched.add("messages")
    for member in scan_members(sent):
        if member.name not in touched:
            assert sent[member.start : member.end] == texts[member.name]


NUMBERS = st.from_regex(
    r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,2})?", fullmatch=True
)


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_numbers_keep_every_digit(numbers: list[str]) -> None:
    data = body()[:-1] + f',"logit_bias":[{",".join(numbers)}],"z":{numbers[0]}}}'.encode()
    texts = re.findall(rb"(?<=[\[,:])-?[0-9][^,\]}]*", upstream(parse_call(data)))
    assert [text.decode() for text in texts] == [*numbers, numbers[0]]


NAMES = st.sampled_from(
    "model messages stream temperature top_p max_tokens max_completion_tokens tools tool_choice "
    "response_format stream_options usage models provider".split()
)


@given(NAMES, JSON)
def test_any_value_of_a_parameter_is_refused_or_goes_up_as_json(name: str, value: Any) -> None:
    try:
        call = parse_call(body(**{name: value}))
    except RequestError as error:
        assert error.param is not None
        assert error.param.startswith(name)
    else:
        assert parse_call(upstream(call)).terms.candidates == ("up",)


@pytest.mark.parametrize(
    ("adaptation", "copies"),
    [
        (Adaptation(), 1),
        (Adaptation(rename=(("seed", "x"),), drop=frozenset("y"), set=(("z", b"1"),)), 1),
        (Adaptation(roles=(("developer", "system"),)), 1),
        (Adaptation(roles=(("user", "tool"),)), 3),
    ],
    ids=["unadapted", "members", "no-such-role", "roles"],
)
def test_a_large_body_is_copied_as_seldom_as_can_be(adaptation: Adaptation, copies: int) -> None:
    import tracemalloc

    call = parse_call(chat({"role": "user", "content": "x" * 4_000_000}))
    tracemalloc.start()
    try:
        upstream(call, adaptation)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < copies * 4_000_000 + 1_000_000


LONG_TEXT = 'a\\"role":"developer"' * 4000


@pytest.mark.parametrize(
    "text",
    ["x" * 40_000, LONG_TEXT, '"role":"developer"' * 3000],
    ids=["plain", "slashes", "quotes"],
)
@pytest.mark.parametrize("more", [0, 40], ids=["one", "many"])
@pytest.mark.parametrize(
    "other", [{}, {"x": {"role": "developer"}}, {"\u00e9": "\u0001"}], ids=["", "nested", "escapes"]
)
def test_roles_in_long_messages_are_replaced_where_they_are_and_nowhere_else(
    text: str, more: int, other: dict[str, Any]
) -> None:
    developer = {"role": "developer", "content": text}
    messages = [developer | other, *[{"content": "hi", "role": "developer"}] * more, USER | other]
    for separators in ((",", ":"), (", ", ": ")):
        data = json.dumps({"model": "a", "messages": messages}, separators=separators)
        sent = json.loads(upstream(parse_call(data.encode()), DEVELOPER))
        assert sent["messages"] == [
            message | {"role": "system" if message["role"] == "developer" else "user"}
            for message in messages
        ]


def test_a_role_that_escapes_hide_is_refused_where_to_find_it_would_take_too_long() -> None:
    hidden = b'{"rol\\u0065":"developer","content":"%b"},{"x":{"role":"developer"},' % (
        b"a" * 2**20
    )
    call = parse_call(b'{"model":"a","messages":[%b"role":"user","content":""}]}' % hidden)
    with pytest.raises(RequestError) as caught:
        upstream(call, DEVELOPER)
    assert caught.value.param == "messages"
