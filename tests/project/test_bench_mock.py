"""The bench's mock upstream answers as model servers do, and fails as a request says.

Nothing here asserts on speed.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme

from bench import mock_answers as answers
from bench import mock_upstream as mock
from bench.checks import Chunks
from tests.support.patience import WAIT

DEADLINE = WAIT


@pytest.fixture
async def port() -> AsyncIterator[int]:
    wheel = mock.Wheel(asyncio.get_running_loop())
    server = await mock.serve(wheel)
    yield server.sockets[0].getsockname()[1]
    server.close()
    wheel.close()


def request(bench: dict[str, Any] | None = None, *, path: str = "/v1/chat/completions",
            **body: Any) -> bytes:  # fmt: skip
    data = orjson.dumps({"model": "m", "messages": [], **body, "bench": bench})
    return b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data)


@asynccontextmanager
async def connected(
    port: int, **options: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
        try:
            yield reader, writer
        finally:
            writer.close()  # uvloop does not close while a failed test's frames hold it open
            with suppress(ConnectionError):
                await writer.wait_closed()


async def exchange(port: int, raw: bytes, **options: Any) -> bytes:
    """All bytes that come until the mock closes, by request."""
    async with connected(port, **options) as (reader, writer):
        writer.write(raw.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        return await reader.read()


def payload(answer: bytes) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    chunks = Chunks()
    result = chunks.feed(body)
    assert chunks.is_complete
    return result


def parse(body: bytes) -> list[Any]:
    events = body.split(b"\n\n")
    assert events.pop() == b""
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"
    return [orjson.loads(event[6:]) for event in events[:-1]]


async def stats(port: int, query: str = "") -> Any:
    raw = await exchange(port, b"GET /bench/stats%b HTTP/1.1\r\n\r\n" % query.encode())
    return orjson.loads(raw.partition(b"\r\n\r\n")[2])


ASKED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("pace", [0.0, 0.002], ids=["without a pace", "with a pace"])
async def test_a_stream_looks_like_a_real_one(port: int, pace: float) -> None:
    answer = await exchange(port, request({"events": 5, "pace": pace}, **ASKED))
    role, *content, finish, usage = parse(payload(answer))
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert len(content) == 5
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5
    assert all(event["usage"] is None for event in [role, *content, finish])
    assert {event["model"] for event in [role, *content, finish, usage]} == {answers.MODEL}
    assert len({event["id"] for event in [role, *content, finish, usage]}) == 1


PADDING = re.compile(r"[A-Za-z0-9]{1,16}")


async def test_a_stream_has_what_openai_adds_to_each_event(port: int) -> None:
    events = parse(payload(await exchange(port, request({"events": 20}, **ASKED))))
    for event in events:
        assert list(event)[:6] == [
            *("id", "object", "created", "model", "service_tier", "system_fingerprint")
        ]
        assert list(event)[6:] == ["choices", "usage", "obfuscation"]
        assert PADDING.fullmatch(event["obfuscation"])
        assert abs(event["created"] - time.time()) < DEADLINE
    assert len({event["obfuscation"] for event in events}) > 10
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_answers_differ_from_one_another_in_padding_identifier_and_head(port: int) -> None:
    raw = [await exchange(port, request({"events": 5}, stream=True)) for _ in range(3)]
    streams = [parse(payload(answer)) for answer in raw]
    assert len({events[0]["id"] for events in streams}) == 3
    assert len({tuple(event["obfuscation"] for event in events) for events in streams}) == 3
    heads = {answer.partition(b"\r\n\r\n")[0] for answer in raw}
    assert len(heads) == 3
    for head in heads:
        assert re.search(rb"\r\nDate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", head)
        assert re.search(rb"\r\nx-ratelimit-remaining-tokens: 199[1-9]\d\d\r\n", head)


async def test_plain_events_have_none_of_it(port: int) -> None:
    events = parse(payload(await exchange(port, request({"plain_events": True}, **ASKED))))
    for event in events:
        assert list(event) == ["id", "object", "created", "model", "choices", "usage"]
    bare = [len(orjson.dumps(event | {"id": ""})) for event in events[1:-2]]
    assert len(set(bare)) == 1


async def test_usage_is_told_only_when_asked_for(port: int) -> None:
    events = parse(payload(await exchange(port, request({"events": 2}, stream=True))))
    assert not any("usage" in event for event in events)
    assert len(events) == 4


async def test_content_carries_its_number_and_the_time_of_its_write(port: int) -> None:
    before = time.monotonic_ns()
    body = payload(await exchange(port, request({"events": 4, "pace": 0.002}, **ASKED)))
    marks = re.findall(rb"~(\d{6})@(\d{19})~", body)
    assert [int(number) for number, _ in marks] == [0, 1, 2, 3]
    sent = [int(stamp) for _, stamp in marks]
    assert sent == sorted(sent)
    assert before < sent[0] and sent[-1] < time.monotonic_ns()
    assert sent[-1] - sent[0] >= 4_000_000, "three gaps of 2 ms, less what the first was late"


async def test_events_have_the_size_asked_for(port: int) -> None:
    body = payload(await exchange(port, request({"events": 9, "event_bytes": 400}, **ASKED)))
    assert [len(event) + 2 for event in body.split(b"\n\n") if b"~" in event] == [400] * 9


async def test_several_events_share_a_chunk(port: int) -> None:
    answer = await exchange(port, request({"events": 5, "events_per_write": 2}, **ASKED))
    chunks = re.split(rb"\r\n[0-9a-f]+\r\n", answer.partition(b"\r\n\r\n")[2])
    assert [chunk.count(b"~") // 2 for chunk in chunks if b"~" in chunk] == [2, 2, 1]


@pytest.mark.parametrize(
    ("block_bytes", "writes"), [(0, 5), (950, 4), (65_536, 1)],
    ids=["each alone", "as many as fit", "all at once"],
)  # fmt: skip
def test_a_stream_without_a_pace_is_handed_over_in_blocks(block_bytes: int, writes: int) -> None:
    settings = answers.Settings(events=5, block_bytes=block_bytes)
    script = answers.make_script(settings, is_stream=True, include_usage=False)
    assert len(script.writes) == len(script.events) == writes
    assert sum(script.events) == 5


async def test_logprobs_come_when_asked_for(port: int) -> None:
    answer = await exchange(port, request({"events": 1, "logprobs": True}, stream=True))
    choice = parse(payload(answer))[1]["choices"][0]
    assert choice["logprobs"]["content"][0]["bytes"] == [32, 116, 104, 101]


async def test_an_answer_that_is_not_streamed_has_the_size_asked_for(port: int) -> None:
    answer = await exchange(port, request({"answer_bytes": 1234, "events": 7}))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(body) in head
    parsed = orjson.loads(body)
    assert len(parsed["choices"][0]["message"]["content"]) == 1234
    assert parsed["usage"]["completion_tokens"] == 7


async def test_the_head_comes_before_a_delayed_content(port: int) -> None:
    async with connected(port) as (reader, writer):
        writer.write(request({"events": 1, "first_delay": 0.05}, stream=True))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        before = time.monotonic_ns()
        sent = int(re.findall(rb"@(\d{19})", await reader.readuntil(b"0\r\n\r\n"))[0])
    assert sent > before, "the content was written after the head had been read"


async def test_a_connection_takes_requests_in_pieces_and_one_after_the_other(port: int) -> None:
    async with connected(port) as (reader, writer):
        raw = request({"events": 2, "pace": 0.001}, stream=True) * 2  # the second one pipelined
        for at in range(0, len(raw), 50):
            writer.write(raw[at : at + 50])
            await writer.drain()
        for _ in range(2):
            assert b"[DONE]" in await reader.readuntil(b"\r\n0\r\n\r\n")


# Faults


async def test_a_refusal_has_the_status_asked_for(port: int) -> None:
    answer = await exchange(port, request({"fault": "status:429"}, stream=True))
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "bench_429"


@pytest.mark.parametrize(
    ("fault", "events"), [("cut", None), ("cut:0", 0), ("cut:2", 2)],
    ids=["before the head", "before content", "after content"],
)  # fmt: skip
async def test_a_cut_ends_the_connection_without_a_last_chunk(
    port: int, fault: str, events: int | None
) -> None:
    answer = await exchange(port, request({"fault": fault, "pace": 0.001}, stream=True))
    assert not answer.endswith(b"0\r\n\r\n")
    assert answer.count(b"@") == (events or 0)
    assert answer.startswith(b"HTTP/1.1 200 ") is (events is not None)


@pytest.mark.parametrize("fault", ["reset", "reset:2"], ids=["before the head", "after content"])
async def test_a_reset_is_one(port: int, fault: str) -> None:
    with pytest.raises(ConnectionResetError):
        await exchange(port, request({"fault": fault, "pace": 0.001}, stream=True))


async def test_a_stall_is_silent_until_the_client_leaves(port: int) -> None:
    async with connected(port) as (reader, writer):
        writer.write(request({"fault": "stall:1"}, stream=True))
        await reader.readuntil(b"@")
        assert (await stats(port))["streams_open"] == 1
        writer.close()
        while (await stats(port))["streams_open"]:  # noqa: ASYNC110  # reported over HTTP only
            await asyncio.sleep(0.001)


async def test_an_error_event_ends_a_stream_without_done(port: int) -> None:
    body = payload(await exchange(port, request({"fault": "error:2"}, stream=True)))
    *_, last, rest = body.split(b"\n\n")
    assert rest == b"" and b"[DONE]" not in body
    assert orjson.loads(last[6:])["error"]["message"] == "the bench asked for this"


async def test_a_slow_head_is_followed_by_the_whole_answer(port: int) -> None:
    started = time.monotonic()
    answer = await exchange(port, request({"fault": "slow-head:0.05", "events": 2}, **ASKED))
    assert time.monotonic() - started >= 0.05
    assert len(parse(payload(answer))) == 5


@pytest.mark.parametrize(
    ("bench", "named"),
    [
        ({"evnts": 1}, "another name"),
        ({"events": "1"}, "bench.events"),
        ({"events": 0}, "events"),
        ({"pace": -1}, "pace"),
        ({"fault": "explode"}, "fault"),
        ({"fault": "status"}, "number"),
        ({"fault": "status:200"}, "400 to 599"),
        ({"events": 999_999, "event_bytes": 9_999}, "bytes"),
        ([1], "object"),
    ],
    ids=lambda value: None if isinstance(value, str) else orjson.dumps(value).decode(),
)
async def test_wrong_settings_are_refused_by_name(port: int, bench: Any, named: str) -> None:
    answer = await exchange(port, request(bench))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert named in orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_another_path_is_not_found(port: int) -> None:
    answer = await exchange(port, request(path="/v1/embeddings"))
    assert answer.startswith(b"HTTP/1.1 404 ")


# Figures


async def test_stats_count_and_begin_anew_when_asked(port: int) -> None:
    for _ in range(2):
        await exchange(port, request({"events": 3, "pace": 0.001}, stream=True))
    reported = await stats(port, "?reset=1")
    counts = {name: reported[name] for name in ("requests", "streams_open", "events")}
    assert counts == {"requests": 2, "streams_open": 0, "events": 6}
    assert reported["late_us"]["count"] == 6 and reported["late_us"]["max"] > 0
    assert (await stats(port))["events"] == 0


async def test_a_busy_loop_shows_as_lateness(port: int) -> None:
    async with connected(port) as (reader, writer):
        writer.write(request({"events": 2, "pace": 0.02}, stream=True))
        await reader.readuntil(b"@")
        time.sleep(0.06)  # noqa: ASYNC251  # the mock is on this loop: it cannot write meanwhile
        await reader.readuntil(b"0\r\n\r\n")
    assert (await stats(port))["late_us"]["max"] >= 30_000


async def test_a_reader_that_stops_holds_its_stream_up_and_no_other(port: int) -> None:
    async with connected(port, limit=2**14) as (reader, writer):
        writer.write(request({"events": 40_000, "event_bytes": 400}, stream=True))
        while not (await stats(port))["blocked"]:  # noqa: ASYNC110  # reported over HTTP only
            await asyncio.sleep(0.001)
        other = await exchange(port, request({"events": 2}, stream=True))
        assert other.endswith(b"0\r\n\r\n")
        chunks, count = Chunks(), 0
        await reader.readuntil(b"\r\n\r\n")
        while not chunks.is_complete:
            count += chunks.feed(await reader.read(2**20)).count(b"@")
    assert count == 40_000


async def test_it_speaks_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    wheel = mock.Wheel(asyncio.get_running_loop())
    server = await mock.serve(wheel, tls=server_side)
    port = server.sockets[0].getsockname()[1]
    answer = await exchange(port, request({"events": 3, "pace": 0.001}, **ASKED), ssl=client_side)
    assert len(parse(payload(answer))) == 6
    server.close()
    wheel.close()
