"""A stream on its way: what is written when, on a transport that only remembers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from bench.micro.path import NullTransport
from hoberproxy.config.reader import parse_config
from hoberproxy.errors import Phase, UpstreamError
from hoberproxy.protocol.http_head import ResponseHead
from hoberproxy.relay.relay import Reporter, StreamRelay
from hoberproxy.relay.scanner import StreamScanner
from hoberproxy.timer_wheel import Wheel
from hoberproxy.upstream.connection import Receiver, UpstreamConnection
from hoberproxy.upstream.pool import Pool
from hoberproxy.upstream.provider import make_upstreams
from tests.downstream.test_response import SSE, FakeTransport, Sent
from tests.support.cuts import cut_at
from tests.support.scripted import DONE, LAST_CHUNK, chunk, event, sse_head, stream_events

from .test_content_template import unframed

SLUG = "vendor/a-model"
CONFIG = """
[providers.acme]
base_url = "http://127.0.0.1:9/v1"
[[models]]
slug = "vendor/a-model"
endpoints = [{ provider = "acme", model = "m" }]
"""
HEAD = sse_head().data


class Attempt(Reporter):
    """Keeps the reports of a relay, each with the number of writes before it."""

    def __init__(self, sent: Sent) -> None:
        self._sent = sent
        self.connection: UpstreamConnection | None = None
        self.reports: list[tuple[str, int]] = []
        self.sealed: list[int] = []  # bytes that were to follow

    def _report(self, what: str) -> None:
        self.reports.append((what, len(self._sent.transport.writes)))

    def open_answer(self, *, is_stream: bool) -> None:
        assert is_stream
        self._report("open")
        self._sent.answer.start(200, SSE)

    def note_opened(self, *, is_stream: bool) -> None:
        self._report("opened")

    def seal(self, following: int) -> None:
        self._report("seal")
        self.sealed.append(following)

    def finish(self) -> None:
        self._report("finish")
        if self.connection is not None and self.connection.receiver is not None:
            self.connection.await_end()  # as attempts do

    def fail(self, error: UpstreamError) -> None:
        self._report(f"fail: {error}")

    def broken(self, message: str, *, is_invalid: bool = False) -> UpstreamError:
        return UpstreamError(
            message,
            phase=Phase.CONTENT,
            code="upstream_error",
            upstream_status=200,
            is_retryable=False,
        )

    def reported(self, message: str, document: object) -> UpstreamError:
        return self.broken(message)


class Relayed:
    """A relay, and both of its ends."""

    def __init__(self, *, wants_usage: bool = False) -> None:
        self.sent = Sent()
        self.attempt = Attempt(self.sent)
        scanner = StreamScanner(SLUG, wants_usage=wants_usage)
        self.relay = StreamRelay(self.attempt, self.sent.answer, scanner)

    @property
    def is_over(self) -> bool:
        """Return whether the relay has reported how it ended."""
        return bool(self.attempt.reports) and self.attempt.reports[-1][0].startswith(
            ("finish", "fail")
        )

    @property
    def transport(self) -> FakeTransport:
        return self.sent.transport

    @property
    def payload(self) -> bytes:
        return unframed(self.sent.body)


def as_seen(events: list[bytes]) -> bytes:
    """What the client is to get of these."""
    relayed = Relayed()
    for each in events:
        relayed.relay.on_body(each)
    return relayed.payload


OPENING = stream_events(2, done=False)[:2]  # the role, and a first content
REST = stream_events(2)[2:]  # more content, a finish reason, [DONE]


def test_the_last_piece_of_a_stream_and_its_end_are_one_write() -> None:
    relayed = Relayed()
    relayed.relay.on_body(b"".join(OPENING))
    relayed.relay.on_last(b"".join(REST))
    relayed.relay.on_end()
    last = as_seen(OPENING + REST)[len(as_seen(OPENING)) :]
    assert last.endswith(DONE)
    assert relayed.transport.writes[1:] == [chunk(last) + LAST_CHUNK]
    assert relayed.attempt.reports == [("open", 0), ("opened", 1), ("seal", 1), ("finish", 2)]
    assert relayed.attempt.sealed == [len(last)]
    assert relayed.sent.client.ends == [True]


def test_a_stream_that_comes_whole_leaves_whole() -> None:
    relayed = Relayed()
    relayed.relay.on_whole(b"".join(OPENING + REST))
    assert len(relayed.transport.writes) == 1
    assert relayed.payload == as_seen(OPENING + REST)
    assert relayed.attempt.reports == [("open", 0), ("seal", 0), ("opened", 1), ("finish", 1)]


def test_wherever_the_last_piece_begins_the_client_gets_the_same() -> None:
    whole = b"".join(OPENING + REST)
    for cut in range(len(whole)):
        relayed = Relayed()
        first, last = cut_at(whole, [cut])
        relayed.relay.on_body(first)
        relayed.relay.on_last(last)
        relayed.relay.on_end()
        assert relayed.payload == as_seen(OPENING + REST), cut
        assert relayed.attempt.reports[-1][0] == "finish", cut
        assert relayed.sent.body.endswith(LAST_CHUNK), cut


def test_a_last_event_without_its_blank_line_goes_with_the_end_as_well() -> None:
    relayed = Relayed()
    relayed.relay.on_body(b"".join(OPENING))
    relayed.relay.on_last(b"".join(REST)[:-1])
    relayed.relay.on_end()
    assert len(relayed.transport.writes) == 2
    assert relayed.payload == as_seen(OPENING + REST)[:-1]


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (event({"error": {"message": "no", "code": 500}}), "the upstream sent an error event"),
        (b"", "the stream ended in the middle of its answer"),
        (b'data: {"cut', "the stream ended in the middle of its answer"),
    ],
    ids=["an error event", "nothing more", "half an event"],
)
def test_what_came_before_a_failure_in_the_last_piece_goes_out_first(last: bytes, why: str) -> None:
    relayed = Relayed()
    relayed.relay.on_body(b"".join(OPENING))
    relayed.relay.on_last(REST[0] + last)
    if not relayed.attempt.reports[-1][0].startswith("fail"):
        relayed.relay.on_end()
    assert relayed.payload == as_seen([*OPENING, REST[0]])
    assert relayed.attempt.reports[2:] == [(f"fail: {why}", 2)]
    assert not relayed.sent.answer.is_ended


def test_half_an_event_behind_the_finish_reason_is_a_broken_answer() -> None:
    relayed = Relayed()
    whole = [*OPENING, *REST[:-1]]
    relayed.relay.on_body(b"".join([*whole, b'data: {"cut']))
    relayed.relay.on_end()
    assert relayed.attempt.reports[-1][0] == "fail: the stream ended in the middle of its answer"
    assert relayed.payload == as_seen(whole)


def test_a_stream_whose_only_piece_breaks_off_after_content_has_been_answered() -> None:
    relayed = Relayed()
    relayed.relay.on_last(b"".join(OPENING))
    relayed.relay.on_end()
    assert relayed.payload == as_seen(OPENING)
    why = "fail: the stream ended in the middle of its answer"
    assert relayed.attempt.reports == [("open", 0), ("opened", 1), (why, 1)]


class Chooser(Receiver):
    """Puts a relay in its place once the head has come, as an attempt does."""

    def __init__(self, connection: UpstreamConnection, relay: StreamRelay) -> None:
        self._connection = connection
        self._relay = relay

    def on_head(self, head: ResponseHead) -> None:
        self._connection.receiver = self._relay


def connected(relay: StreamRelay) -> tuple[UpstreamConnection, Pool]:
    """A connection whose next answer is the relay's."""
    config = parse_config(CONFIG, environ={}, read_file=lambda path: "")
    loop = asyncio.get_running_loop()
    pool = make_upstreams(config, loop, Wheel(loop.time()))["acme"].pool
    connection = UpstreamConnection(pool)
    connection.connection_made(cast(Any, NullTransport()))
    connection.send([b"a request"], Chooser(connection, relay))
    cast(Attempt, relay._attempt).connection = connection
    return connection, pool


async def test_what_is_read_at_once_is_written_at_once() -> None:
    relayed = Relayed()
    connection, pool = connected(relayed.relay)
    events = stream_events(4)

    connection.data_received(HEAD + b"".join(map(chunk, events[:2])))
    connection.data_received(chunk(events[2]))
    connection.data_received(b"".join(map(chunk, events[3:])) + LAST_CHUNK)

    assert relayed.payload == as_seen(events)
    opening, second, rest = relayed.transport.writes
    seen = [as_seen(events[:count]) for count in (2, 3, 5)]
    assert opening.endswith(chunk(seen[0]))
    assert second == chunk(seen[1][len(seen[0]) :])
    texts, end = seen[2][len(seen[1]) :], as_seen(events)[len(seen[2]) :]
    assert rest == chunk(texts) + chunk(end) + LAST_CHUNK
    assert pool.idle == 1


async def test_whole_events_do_not_wait_for_the_rest_of_the_next_one() -> None:
    events = stream_events(4)
    body = b"".join(map(chunk, events)) + LAST_CHUNK
    start, end = len(b"".join(map(chunk, events[:2]))), len(b"".join(map(chunk, events[:4])))
    for cut in range(end, end + len(chunk(events[4]))):
        relayed = Relayed()
        connection, pool = connected(relayed.relay)
        connection.data_received(HEAD + body[:start])
        connection.data_received(body[start:cut])
        assert relayed.payload.startswith(as_seen(events[:4])), cut
        connection.data_received(body[cut:])
        assert relayed.payload == as_seen(events), cut
        assert pool.idle == 1


async def test_done_ends_the_answer_wherever_the_rest_of_the_framing_is_cut() -> None:
    events = stream_events(4)
    body = b"".join(map(chunk, events)) + LAST_CHUNK
    for cut in range(len(body)):
        relayed = Relayed()
        connection, pool = connected(relayed.relay)
        connection.data_received(HEAD + body[:cut])
        has_done = cut >= len(body) - len(LAST_CHUNK) - 2  # of its chunk, the data is all there
        assert relayed.sent.answer.is_ended == has_done, cut
        assert (pool.open, pool.idle) == (1, 0), cut
        connection.data_received(body[cut:])
        assert relayed.payload == as_seen(events), cut
        assert [what for what, _ in relayed.attempt.reports].count("finish") == 1, cut
        assert relayed.sent.body.endswith(LAST_CHUNK), cut
        assert relayed.sent.body.count(LAST_CHUNK) == 1, cut
        assert pool.idle == 1, cut


async def test_what_is_held_goes_before_a_failure_that_was_read_with_it() -> None:
    relayed = Relayed()
    connection, pool = connected(relayed.relay)
    events = stream_events(4)
    connection.data_received(HEAD + b"".join(map(chunk, events[:2])))
    connection.data_received(b"".join(map(chunk, events[2:4])) + b"no chunk\r\n")
    assert relayed.payload == as_seen(events[:4])
    assert relayed.attempt.reports[-1][0].startswith("fail")
    assert pool.idle == 0
