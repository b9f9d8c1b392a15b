"""The template and the scanner with it: what passes by comparison is what passes by parsing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.dialects.usage import Usage
from hoberproxy.protocol.http_body import ChunkedBody
from hoberproxy.relay.content_template import (
    FIRST_SPECIMENS,
    MAX_USAGES,
    WORTH_A_SPECIMEN,
    ContentTemplate,
)
from hoberproxy.relay.scanner import StreamScanner
from tests.downstream.test_response import SSE, Sent
from tests.support.cuts import cut_at
from tests.support.scripted import chunk

SLUG = "vendor/a-model"
UPSTREAM = "a-model-2025-01-01"


def event(text: str, *, model: str = UPSTREAM, compact: bool = True, **members: Any) -> bytes:
    """A content event as a model server writes it."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    document = {"id": "c-1", "model": model, "choices": [choice], **members}
    separators = (",", ":") if compact else None
    return b"data: %b\n\n" % json.dumps(document, separators=separators).encode()


def learn(template: ContentTemplate, specimen: bytes) -> None:
    """Have a template learn from an event whose model is renamed."""
    payload = specimen[6:].rstrip()
    start = specimen.find(b'"%b"' % UPSTREAM.encode())
    edits = [(start, start + len(UPSTREAM) + 2, b'"%b"' % SLUG.encode())] if start > 0 else []
    template.learn_from(specimen, 6, edits, json.loads(payload))


def having_learnt(**options: Any) -> ContentTemplate:
    template = ContentTemplate()
    learn(template, event("Hi", **options))
    assert template.is_learnt
    return template


class Passing:
    """A template that is open, and what it has passed on."""

    def __init__(self, template: ContentTemplate) -> None:
        self.template = template
        self.sent = Sent()
        self.sent.answer.start(200, SSE)
        self.sent.answer.write(b"")
        sink = self.sent.answer.open_sink()
        assert sink is not None
        self.template.open(sink, self.sent.answer)
        self.sent.transport.writes.clear()

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """What it passes on of `data`, and what is left."""
        rest = self.template.take(data)
        self.template.flush()
        writes = list(self.sent.transport.writes)
        self.sent.transport.writes.clear()
        assert len(writes) == (rest != data), "one write, if anything passes"
        return b"".join(writes), rest


def pass_events(template: ContentTemplate, events: list[bytes]) -> bytes:
    """Pass events as the scanner does: they match, or the template learns from one and goes on."""
    data, at = b"".join(events), 0
    passed = b""
    while at < len(data):
        some = template.pass_events(data, at)
        passed += some or b""
        at = template.end
        if at < len(data):
            event = data[at : data.index(b"\n\n", at) + 2]
            learnt = template.learn_like(event)
            if learnt is None:
                break
            passed += learnt
            at += len(event)
    return passed


def take(template: ContentTemplate, data: bytes) -> tuple[bytes, bytes]:
    """What a template passes on of `data`, and what is left."""
    return Passing(template).take(data)


def unframed(chunks: bytes) -> bytes:
    return b"".join(ChunkedBody().feed(chunks))


TEXTS = ["a", " two words", "\u00e9\u4e16\U0001f600", 'a "quoted" one', "C:\\new\nline", "\\"]


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "spaced"])
@pytest.mark.parametrize("text", TEXTS)
def test_an_event_passes_with_the_catalogs_name(text: str, compact: bool) -> None:
    template = having_learnt(compact=compact)
    passing = Passing(template)
    passed, rest = passing.take(chunk(event(text, compact=compact)))
    assert passed == chunk(event(text, model=SLUG, compact=compact))
    assert (template.events, rest) == (1, b"")
    assert passing.sent.answer.body_bytes == len(unframed(passed))


def test_several_chunks_pass_as_one() -> None:
    template = having_learnt()
    passing = Passing(template)
    passed, rest = passing.take(b"".join(chunk(event(text)) for text in TEXTS))
    assert unframed(passed) == b"".join(event(text, model=SLUG) for text in TEXTS)
    assert (template.events, rest) == (len(TEXTS), b"")
    assert passing.sent.answer.body_bytes == len(unframed(passed))


def test_what_was_taken_goes_with_what_the_receiver_makes_of_the_rest() -> None:
    passing = Passing(having_learnt())
    assert passing.template.take(chunk(event("a")) + b"rest") == b"rest"
    passing.sent.answer.write(b"the rest")
    passing.template.flush()
    written = chunk(event("a", model=SLUG)) + chunk(b"the rest")
    assert passing.sent.transport.writes == [written]
    assert passing.sent.answer.body_bytes == len(unframed(written))


@pytest.mark.parametrize(
    "other",
    [
        chunk(event("x", usage={"prompt_tokens": 1})),
        chunk(b"data: [DONE]\n\n"),
        b"0\r\n\r\n",
        chunk(event("x"))[:-1],
        b"5\r\ndata:",
        b"zz\r\n",
    ],
    ids=["usage", "done", "the last chunk", "cut", "a part", "no size"],
)
def test_what_is_different_is_left_for_the_long_way(other: bytes) -> None:
    template = having_learnt()
    assert take(template, other) == (b"", other)
    assert take(template, chunk(event("a")) + other) == (chunk(event("a", model=SLUG)), other)


@pytest.mark.parametrize(
    "text",
    [
        b'","x":"',
        b'"',
        b"\\",
        b'\\\\"',
        b"\n",
        b"a\r\rdata: [DONE]\r\rb",
        b"\n\ndata: [DONE]\n\ndata: x",
        b"\\\n",
        event("y") * 2,
    ],
)
def test_a_text_that_is_no_inside_of_a_string_does_not_pass(text: bytes) -> None:
    odd = event("@").replace(b"@", text)
    assert take(having_learnt(), chunk(odd)) == (b"", chunk(odd))
    passed = chunk(event("a", model=SLUG))
    assert take(having_learnt(), chunk(event("a")) + chunk(odd)) == (passed, chunk(odd))
    assert having_learnt().pass_events(odd, 0) is None
    template = having_learnt()
    data = event("a") + odd + event("b")
    passed = template.pass_events(data, 0)
    assert passed is None or data[template.end :].startswith(odd)


def test_events_of_a_payload_pass_up_to_the_first_other() -> None:
    template = having_learnt()
    last = event("x", usage={"prompt_tokens": 1})
    data = last + b"".join(map(event, TEXTS)) + last
    passed = template.pass_events(data, len(last))
    assert passed == b"".join(event(text, model=SLUG) for text in TEXTS)
    assert data[template.end :] == last


def test_an_unfinished_event_is_left_over() -> None:
    whole, template = event("a") + event("b"), having_learnt()
    for cut in range(len(event("a")), len(whole)):
        assert template.pass_events(whole[:cut], 0) == event("a", model=SLUG)
        assert template.end == len(event("a"))


@pytest.mark.parametrize("delta", [{}, {"content": ""}, {"content": None}, {"tool_calls": [{}]}])
def test_nothing_is_learnt_from_an_event_without_a_text(delta: dict[str, object]) -> None:
    template = ContentTemplate()
    learn(template, event("Hi").replace(b'{"content":"Hi"}', json.dumps(delta).encode()))
    assert not template.is_learnt


def test_who_changes_all_the_time_is_asked_a_few_times_only() -> None:
    template = ContentTemplate()
    for _ in range(FIRST_SPECIMENS):
        assert template.wants_specimen
        learn(template, b"data: {}\n\n")
    assert not template.wants_specimen


def test_after_many_passed_another_specimen_is_worth_it() -> None:
    template = having_learnt()
    another = having_learnt()
    for _ in range(FIRST_SPECIMENS):
        learn(template, event("Hi"))
    assert not template.wants_specimen
    for _ in range(WORTH_A_SPECIMEN):
        assert take(template, chunk(event("x")))[1] == b""
    assert template.wants_specimen
    assert another.wants_specimen


# Values beside the text


def openai(number: int, text: str, **members: Any) -> bytes:
    """An event as OpenAI writes it: its padding differs each time."""
    padding = "aZ09"[number % 4] * (number % 13 + 1)
    return event(text, **{"usage": None, "obfuscation": padding} | members)


VARYING = {
    "padding": openai,
    "an escaped padding": lambda number, text: openai(number, text, obfuscation='"\\' * number),
    "a time": lambda number, text: event(text, created=1_700_000_000 + number),
    "a time now and then": lambda number, text: event(text, created=1_700_000_000 + number // 4),
    "an identifier": lambda number, text: event(text, id=f"c-{number}"),
    "a usage": lambda number, text: event(
        text, usage={"prompt_tokens": 7, "completion_tokens": 1 + 9 * number}
    ),
    "timings": lambda number, text: event(
        text, timings={"prompt_n": 3, "predicted_n": 1 + number, "predicted_ms": number * 1.75}
    ),
    "padding, time and usage": lambda number, text: openai(
        number, text, created=number, usage={"completion_tokens": number + 1}
    ),
}


def logprobs(number: int, text: str) -> bytes:
    best = [{"token": str(number), "logprob": -number / 7, "bytes": None}]
    token = {"token": text, "logprob": -number, "bytes": list(text.encode()), "top_logprobs": best}
    raw = event(text)
    return raw.replace(
        b'"finish_reason"', b'"logprobs":%b,"finish_reason"' % json.dumps([token]).encode()
    )


def with_delta(text: str, delta: dict[str, Any]) -> bytes:
    raw = event("@").replace(b'{"content":"@"}', json.dumps(delta, separators=(",", ":")).encode())
    assert b"@" not in raw
    return raw


VARYING |= {
    "logprobs": logprobs,
    "two texts": lambda number, text: with_delta(
        text, {"reasoning": text, "reasoning_details": [{"type": "text", "text": text * 2}]}
    ),
    "arguments": lambda number, text: with_delta(
        text, {"tool_calls": [{"index": number // 5, "function": {"arguments": text}}]}
    ),
}


MOST_LEARNT = 8  # of 29 events: a value now and then another one, as a time, is learnt each time


@pytest.mark.parametrize("together", [1, 7], ids=["alone", "together"])
@pytest.mark.parametrize("varying", VARYING.values(), ids=VARYING.keys())
def test_events_that_differ_in_values_pass(varying: Any, together: int) -> None:
    events = [varying(number, TEXTS[number % len(TEXTS)]) for number in range(1, 30)]
    template = ContentTemplate()
    learn(template, varying(0, "Hi"))
    passing = Passing(template)
    learnt = 0
    for place in range(0, len(events), together):
        some = events[place : place + together]
        expected = b"".join(some).replace(b'"%b"' % UPSTREAM.encode(), b'"%b"' % SLUG.encode())
        passed, rest = passing.take(b"".join(map(chunk, some)))
        left = some[template.events - place :]
        assert rest == b"".join(map(chunk, left))
        learnt += bool(left)
        assert unframed(passed) + pass_events(template, left) == expected
    assert template.events == len(events)
    assert learnt <= MOST_LEARNT
    again = ContentTemplate()
    learn(again, varying(0, "Hi"))
    assert pass_events(again, events) == b"".join(events).replace(
        b'"%b"' % UPSTREAM.encode(), b'"%b"' % SLUG.encode()
    )


@pytest.mark.parametrize(
    "member",
    ["model", "object", "type", "error", "base_resp", "x_groq"],
)
def test_a_member_that_is_read_may_not_differ(member: str) -> None:
    template = ContentTemplate()
    learn(template, event("Hi", **{member: "a"}))
    other = chunk(event("x", **{member: "b"}))
    assert take(template, chunk(event("x", **{member: "a"}))) != (b"", chunk(event("x")))
    assert take(template, other) == (b"", other)


def test_an_event_without_a_text_does_not_pass() -> None:
    empty = chunk(event(""))
    assert take(having_learnt(), empty) == (b"", empty)


def usage(completion: int, **details: int) -> dict[str, Any]:
    return {"completion_tokens": completion, "prompt_tokens": 7, "details": details}


def test_of_a_usage_that_grows_the_first_and_last_are_kept() -> None:
    template = ContentTemplate()
    learn(template, event("a", usage=usage(1)))
    events = [event("a", usage=usage(count)) for count in (2, 9, 10, 100)]
    assert pass_events(template, events)
    assert template.take_usages() == [events[0], events[-1]]
    assert template.take_usages() == []


def test_a_usage_that_falls_does_not_take_the_place_of_the_one_before() -> None:
    template = ContentTemplate()
    learn(template, event("a", usage=usage(1, cached=5)))
    events = [event("a", usage=usage(count, cached=9)) for count in (2, 20, 3, 4)]
    assert pass_events(template, events)
    assert template.take_usages() == events


def test_usages_that_wait_are_bounded() -> None:
    template = ContentTemplate()
    learn(template, event("a", usage=usage(90)))
    events = [event("a", usage=usage(count)) for count in range(80, 60, -1)]
    passed = pass_events(template, events)
    assert template.take_usages() == events[:MAX_USAGES]
    assert len(passed) == len(
        b"".join(event("a", model=SLUG, usage=usage(80)) for _ in range(MAX_USAGES))
    )


def test_a_usage_without_tokens_of_a_completion_may_not_differ() -> None:
    template = ContentTemplate()
    learn(template, event("a", usage=usage(0)))
    assert take(template, chunk(event("b", usage=usage(0))))[1] == b""
    other = chunk(event("b", usage=usage(1)))
    assert take(template, other) == (b"", other)


def test_lines_may_end_in_cr_lf() -> None:
    template = ContentTemplate()
    learn(template, event("a").replace(b"\n", b"\r\n"))
    other = event("b").replace(b"\n", b"\r\n")
    passed, rest = take(template, chunk(other))
    assert unframed(passed) == other.replace(UPSTREAM.encode(), SLUG.encode())
    assert rest == b""


# The scanner with and without it


def usage_of(completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 7,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def scan(pieces: list[bytes], *, wants_usage: bool, with_template: bool) -> tuple[bytes, Any]:
    scanner = StreamScanner(SLUG, wants_usage=wants_usage)
    if not with_template:
        scanner.template._specimens = scanner.template._events_before = 1 << 30
    out = b""
    for piece in pieces:
        if scanner.failure is None:
            out += scanner.feed(piece)
    if scanner.failure is None:
        out += scanner.feed_eof()
    learnt = (scanner.usage, scanner.finish_reason, scanner.is_done, scanner.upstream_model)
    return out, (*learnt, scanner.content_events, str(scanner.failure))


def test_counts_that_fall_and_rise_again_are_those_of_the_last_event() -> None:
    # The third looks like the first without its parts, but there was another one between.
    counts = [usage_of(716, 5), usage_of(715, 0), usage_of(716, 0)]
    events = [event("a", usage=each) for each in (*counts[:1], *counts)]
    _, said = scan([b"".join(events)], wants_usage=False, with_template=True)
    assert said[0] == Usage(7, 716)
    assert said == scan([b"".join(events)], wants_usage=False, with_template=False)[1]


EVENTS = st.one_of(
    st.text(max_size=8).map(event),
    st.builds(
        lambda completion, cached: event("x", usage=usage_of(completion, cached)),
        st.integers(1, 4),
        st.sampled_from([0, 5]),
    ),
    st.text(max_size=8).map(lambda text: event(text, usage=None)),
    st.sampled_from(
        [
            event("x", usage={"prompt_tokens": 1, "completion_tokens": 2}),
            event("x", model="another"),
            event("x", compact=False),
            event("x").replace(b"\n", b"\r\n"),
            b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
            event("x").replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
            b": comment\n\n",
            b'data: {"error":{"message":"no"}}\n\n',
            b"data: [DONE]\n\n",
            b'event: error\ndata: {"code":503}\n\n',
            b"data: no JSON\n\n",
        ]
    ),
)


@given(
    events=st.lists(EVENTS, min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    wants_usage=st.booleans(),
)
@example([event("a"), event("b"), event('"'), event("c")], [], False)
def test_the_scanner_says_the_same_with_a_template(
    events: list[bytes], cuts: list[int], wants_usage: bool
) -> None:
    whole = event("first") + b"".join(events)
    pieces = cut_at(whole, cuts)
    given_pieces = scan(pieces, wants_usage=wants_usage, with_template=True)
    assert given_pieces == scan(pieces, wants_usage=wants_usage, with_template=False)
