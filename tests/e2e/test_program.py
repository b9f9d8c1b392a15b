"""`hoberproxy serve` as a process: how it starts, how it ends, what it leaves behind."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tests.support.patience import WAIT
from tests.support.scripted import (
    AwaitRelease,
    Script,
    ScriptedUpstream,
    Stall,
    completion,
    json_response,
    sse,
    stream_events,
)

from .harness import (
    Client,
    Program,
    as_client_sees,
    chat,
    error_event_of,
    eventually,
    running_program,
)

EVENTS = stream_events(3)
WAITING: Script = [*sse(*EVENTS)[:3], AwaitRelease("go"), *sse(*EVENTS)[3:]]
STALLING: Script = [*sse(*EVENTS)[:3], Stall()]


async def begin_stream(client: Client) -> bytes:
    await client.ask(chat(stream=True))
    await client.read_head()
    return await client.read_until(b"word0")


async def is_refused(program: Program) -> bool:
    try:
        async with program.connect():
            return False
    except ConnectionError:  # reset, if it was still in the queue of the socket that closed
        return True


async def wait_until_refused(program: Program) -> None:
    async with asyncio.timeout(WAIT):
        while not await is_refused(program):  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(0.01)


async def test_sigterm_lets_a_stream_finish_and_takes_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    async with (
        ScriptedUpstream(json_response(200, completion()), WAITING) as upstream,
        running_program(tmp_path, upstream) as program,
    ):
        assert (await program.post(chat())).status == 200
        with capsys.disabled():
            print(f"[start to first answer: {time.monotonic() - begun:.2f} s]", end=" ")
        async with program.connect() as idle, program.connect() as client:
            first = await begin_stream(client)
            program.process.send_signal(signal.SIGTERM)
            await wait_until_refused(program)
            assert await idle.is_closed_by_peer()
            assert program.process.returncode is None
            upstream.release("go")
            rest = await client.read_until(b"[DONE]\n\n")
            assert await client.read_chunk() == b""
            assert await client.is_closed_by_peer()
        assert await program.wait() == 0
        assert first + rest == as_client_sees(EVENTS)
        assert sorted(program.stored()) == [(200, "", 3, 0), (200, "", 3, 3)]


async def test_a_request_on_a_kept_connection_while_draining_is_refused_or_unseen(
    tmp_path: Path,
) -> None:
    """A client whose connection was idle sees it close; it never gets half an answer."""
    async with (
        ScriptedUpstream(WAITING, default=json_response(200, completion())) as upstream,
        running_program(tmp_path, upstream) as program,
        program.connect() as client,
        program.connect() as late,
    ):
        await begin_stream(client)
        await late.send(b"POST /v1/chat/comp")  # has begun: it is not idle
        await asyncio.sleep(0.05)
        program.process.send_signal(signal.SIGTERM)
        await wait_until_refused(program)
        await late.send(
            b"letions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        )
        await late.send(b"Content-Length: 2\r\n\r\n{}")
        reply = await late.read_reply()
        upstream.release("go")
        await client.read_until(b"[DONE]\n\n")
        assert await program.wait() == 0
    assert (reply.status, reply.error["code"]) == (503, "draining")
    assert reply.headers["retry-after"] == "1"


async def test_a_second_signal_ends_running_streams_at_once(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(STALLING) as upstream,
        running_program(tmp_path, upstream) as program,
        program.connect() as client,
    ):
        await begin_stream(client)
        program.process.send_signal(signal.SIGTERM)
        await wait_until_refused(program)
        program.process.send_signal(signal.SIGTERM)
        rest = b""
        while piece := await client.read_chunk():
            rest += piece
        assert error_event_of(rest)["code"] == "draining"
        assert await program.wait() == 0
        await upstream.wait_for_hangup()
        (record,) = program.stored()
    assert record == (200, "draining", 1, 1)


async def test_the_drain_limit_ends_streams_with_an_error_event(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(STALLING, [Stall()]) as upstream,
        running_program(tmp_path, upstream, "drain_timeout = 0.2") as program,
        program.connect() as client,
        program.connect() as waiting,
    ):
        await begin_stream(client)
        await waiting.ask(chat())
        await upstream.wait_for_requests(2)
        program.process.send_signal(signal.SIGTERM)
        rest = b""
        while piece := await client.read_chunk():
            rest += piece
        refused = await waiting.read_reply()
        assert await client.is_closed_by_peer()
        assert await program.wait() == 0
        codes = [code for _, code, *_ in program.stored()]
    assert error_event_of(rest)["code"] == "draining"
    assert (refused.status, refused.error["code"]) == (503, "draining")
    assert codes == ["draining", "draining"]


async def test_killed_processes_leave_a_readable_store(tmp_path: Path) -> None:
    async with ScriptedUpstream(sse(*EVENTS), STALLING) as upstream:
        async with running_program(tmp_path, upstream) as program:
            await program.post(chat(stream=True))
            await eventually(program.stored)
            async with program.connect() as client:
                await begin_stream(client)
                await program.kill()
                await upstream.wait_for_hangup(1)
        assert [status for status, *_ in program.stored()] == [200]
        upstream.add(sse(*EVENTS))
        async with running_program(tmp_path, upstream) as again:
            assert (await again.post(chat(stream=True))).is_complete
            again.process.send_signal(signal.SIGTERM)
            assert await again.wait() == 0
        # The stream that was cut is in the journal, and recorded as lost.
        assert sorted(status for status, *_ in again.stored()) == [0, 200, 200]
