"""First and last events that are as in earlier streams: they say what a parse would have said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hoberproxy.dialects.usage import Usage
from hoberproxy.relay.edge_templates import MAX_EVENTS, EdgeTemplates
from hoberproxy.relay.scanner import StreamScanner
from tests.relay.test_scanner import SLUG, scan

from .test_real_streams import EXPECTED, all_streams, asked_or_not, pass_as_received, read

UPSTREAM = "a-model-2025-01-01"


def event(delta: dict[str, Any] | None, number: int = 1, **members: Any) -> bytes:
    """An event of the stream with this number."""
    choices = [{"index": 0, "delta": delta, "finish_reason": members.pop("finish_reason", None)}]
    document = {
        "id": f"c-{number}",
        "created": 1_700_000_000 + number,
        "model": UPSTREAM,
        "choices": choices if delta is not None else [],
    }
    return b"data: %b\n\n" % json.dumps(document | members, separators=(",", ":")).encode()


def stream(number: int, text: str = "Hi") -> list[bytes]:
    usage = {"prompt_tokens": 10 + number, "completion_tokens": 5, "total_tokens": 15 + number}
    return [
        event({"role": "assistant", "content": ""}, number),
        event({"content": text}, number),
        event({"content": " more"}, number),
        event({}, number, finish_reason="stop"),
        event(None, number, usage=usage),
        b"data: [DONE]\n\n",
    ]


def unparsed(edges: EdgeTemplates, events: list[bytes], **options: Any) -> list[bool]:
    """Which of the events of a stream are known."""
    known = []
    has_content = False
    for each in events:
        found, end = edges.find(each, 0, is_opening=not has_content, **options)
        known.append(end == len(each))
        has_content = has_content or (found is not None and found.has_content)
    return known


def edges_of(*streams: list[bytes], wants_usage: bool = False) -> EdgeTemplates:
    edges = EdgeTemplates()
    for events in streams:
        scan(events, scanner=StreamScanner(SLUG, wants_usage=wants_usage, edges=edges))
    return edges


@asked_or_not
def test_events_around_the_content_are_known_in_the_next_stream(wants_usage: bool) -> None:
    edges = edges_of(stream(1), wants_usage=wants_usage)
    known = unparsed(edges, stream(2, "Other"), wants_usage=wants_usage)
    assert known == [True, True, False, True, True, False], "content is for its own template"
    assert not any(unparsed(edges, stream(2), wants_usage=not wants_usage))


@asked_or_not
def test_a_known_event_says_what_is_its_own(wants_usage: bool) -> None:
    edges = edges_of(stream(1), stream(2), wants_usage=wants_usage)
    scanner = StreamScanner(SLUG, wants_usage=wants_usage, edges=edges)
    seen = scan(stream(7, 'a "text"'), scanner=scanner)
    assert seen == scan(stream(7, 'a "text"'), wants_usage=wants_usage)
    assert (seen.upstream_id, seen.upstream_model) == ("c-7", UPSTREAM)
    assert (seen.usage, seen.finish_reason) == (Usage(17, 5), "stop")


def test_the_template_of_a_stream_is_that_of_the_one_before() -> None:
    edges = edges_of(stream(1))
    scanner = StreamScanner(SLUG, wants_usage=False, edges=edges)
    scanner.feed(stream(2)[0] + stream(2)[1])
    assert scanner.is_ready_for_template
    assert scanner.template.pass_events(stream(2)[2], 0) is not None
    assert scanner.template.pass_events(stream(1)[2].replace(b'"c-1"', b'"c-1",'), 0) is None


@pytest.mark.parametrize(
    "other",
    [
        event({"role": "assistant", "content": "x"}),
        event({"role": "assistant", "content": None}),
        event({"role": "assistant", "content": ""}, finish_reason="stop"),
        event({"role": "assistant", "content": ""}, error={"message": "no"}),
        event({"role": "assistant", "content": ""}, model="another"),
        event({"role": "assistant", "content": ""}, id="c-\\u0031").replace(b"\\\\", b"\\"),
        event({"role": "assistant", "content": ""}, id="c-1").replace(b"c-1", b"\xff"),
        event({"role": "assistant", "content": ""}).replace(b"\n", b"\r\n"),
        event({"role": "assistant", "content": ""})[:-1],
        event({"content": ""}),
        event({}, finish_reason="length"),
        event(None, usage=None),
        event(None, usage={}).replace(b'"usage":{}', b'"usage":{"a":}'),
    ],
)
def test_what_says_something_else_is_not_known(other: bytes) -> None:
    edges = edges_of(stream(1), stream(2))
    assert unparsed(edges, [other], wants_usage=False) == [False]


def test_an_event_before_content_is_not_known_behind_it() -> None:
    edges = edges_of(stream(1))
    role = stream(2)[0]
    assert edges.find(role, 0, wants_usage=False, is_opening=True)[1] == len(role)
    assert edges.find(role, 0, wants_usage=False, is_opening=False)[1] == 0


def test_a_server_whose_events_always_differ_is_not_learnt_from_for_long() -> None:
    edges = EdgeTemplates()
    learnt = 0
    for number in range(200):
        role = event({"role": "assistant", f"member-{number}": None})
        document = json.loads(role[6:])
        assert edges.find(role, 0, wants_usage=True, is_opening=True) == (None, 0)
        learnt += edges.learn_from(role, 6, [], document, wants_usage=True) is not None
    assert learnt == 8 + 3
    assert len(edges._events) == MAX_EVENTS


def test_no_text_of_an_answer_is_kept_for_others() -> None:
    edges = edges_of(
        stream(1, "a secret"),
        stream(2, "another secret"),
        stream(3, "a secret " * 4096),  # longer than what is known again
        [*stream(4, "a secret")[:1], event({"content": "a secret"}, 4, error={"message": "no"})],
        [*stream(5, "a secret")[:1], event({"content": "a secret"}, 5, service_tier="other")],
    )
    for known in edges._events:
        for template in (known.template, known.content):
            if template is not None:
                kept = [*template.literals, *template._literals, *template._known, *template.values]
                assert b"secret" not in b"".join(kept)


@all_streams
@asked_or_not
def test_a_providers_second_stream_says_what_its_first_did(name: str, wants_usage: bool) -> None:
    edges = EdgeTemplates()
    seen = []
    for _ in range(3):
        scanner = StreamScanner(SLUG, wants_usage=wants_usage, edges=edges)
        output = pass_as_received(scanner, read(name))
        facts = (scanner.usage, scanner.finish_reason, scanner.upstream_id, scanner.upstream_model)
        seen.append((output, *facts, scanner.content_events))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1] == EXPECTED[name].usage
