"""Nothing is lost and nothing counted twice: processes that are killed, locked out, or many."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import time
from collections import Counter
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hoberproxy.access.limits import KeyLimits
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.support.patience import WAIT
from tests.support.scripted import (
    AwaitRelease,
    Script,
    ScriptedUpstream,
    SeenRequest,
    completion,
    json_response,
    sse,
    stream_events,
)

from .harness import Client, Program, chat, connected, eventually, running_program

EVENTS = stream_events(3)
WAITING: Script = [*sse(*EVENTS)[:3], AwaitRelease("go"), *sse(*EVENTS)[3:]]
# `kill -9` at so many random moments; 50 where there is time.
KILLS = int(os.environ.get("HOBERPROXY_TEST_KILLS", "5"))
# For so many seconds the store is locked; 60 where there is time.
LOCKED = float(os.environ.get("HOBERPROXY_TEST_LOCKED", "2"))


def answer(seen: SeenRequest) -> Script:
    """A stream or a body, as was asked."""
    return sse(*EVENTS) if seen.json()["stream"] else json_response(200, completion())


def ids_in(folder: Path) -> Counter[str]:
    with closing(sqlite3.connect(folder / "records.db")) as database:
        return Counter(name for (name,) in database.execute("SELECT id FROM records"))


@dataclass
class Seen:
    """What clients saw, by the ids of their requests."""

    begun: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)

    async def load(self, port: int, stream: bool) -> None:
        """One request after the other on one connection, until that is cut."""
        try:
            async with connected(port) as client:
                while True:
                    await self._ask(client, stream)
        except (OSError, EOFError):
            pass

    async def load_once(self, port: int) -> None:
        """One request on a connection of its own, which must not fail."""
        async with connected(port) as client:
            await self._ask(client, True)

    async def ask_once(self, client: Client, stream: bool) -> None:
        await self._ask(client, stream)

    async def _ask(self, client: Client, stream: bool) -> None:
        await client.ask(chat(stream=stream))
        status, headers = await client.read_head()
        assert status == 200
        fields = dict(headers)
        name = fields["x-request-id"]
        self.begun.add(name)
        if stream:
            await client.read_until(b"[DONE]\n\n")  # as SDKs do, which leave there
            self.whole.add(name)
            await client.read_chunk()
        else:
            await client._read_exactly(int(fields["content-length"]))
            self.whole.add(name)


@pytest.mark.parametrize("kill", range(KILLS))
async def test_whenever_the_process_is_killed_each_request_has_one_record(
    tmp_path: Path, kill: int
) -> None:
    seen = Seen()
    async with ScriptedUpstream(default=answer) as upstream:
        async with running_program(tmp_path, upstream) as program:
            loads = [asyncio.create_task(seen.load(program.port, n % 2 == 0)) for n in range(6)]
            await eventually(lambda: len(seen.whole) > 5)
            await asyncio.sleep(random.random() * 0.5)
            await program.kill()
            await asyncio.gather(*loads)
        async with running_program(tmp_path, upstream):
            recorded = ids_in(tmp_path)
        upstream.failures.clear()  # connections that were cut
    assert seen.whole <= seen.begun <= set(recorded)
    assert set(recorded.values()) == {1}
    with closing(sqlite3.connect(tmp_path / "records.db")) as database:
        lost = {name for (name,) in database.execute("SELECT id FROM records WHERE code = 'lost'")}
    assert not lost & seen.whole  # whose end a client saw has its own record


async def test_of_four_processes_that_share_a_store_exactly_the_limit_passes(
    tmp_path: Path,
) -> None:
    with closing(Store(tmp_path / "records.db")) as store:
        key, _ = store.create_key("x", limits=KeyLimits(requests_per_minute=100))
    statuses: Counter[int] = Counter()

    async def ask(program: Program) -> None:
        async with program.connect() as client:
            for _ in range(15):
                await client.ask(chat(), headers=[f"authorization: Bearer {key}"])
                statuses[(await client.read_reply()).status] += 1

    async with (
        ScriptedUpstream(default=answer) as upstream,
        AsyncExitStack() as stack,
    ):
        programs = [
            await stack.enter_async_context(running_program(tmp_path, upstream, keys=True))
            for _ in range(4)
        ]
        await asyncio.gather(*(ask(program) for program in programs * 3))
    assert statuses == {200: 100, 429: 80}


async def test_a_new_process_beside_a_draining_one_disturbs_none_of_its_requests(
    tmp_path: Path,
) -> None:
    async with ScriptedUpstream(WAITING, default=answer) as upstream:
        async with (
            running_program(tmp_path, upstream) as old,
            old.connect() as client,
        ):
            await client.ask(chat(stream=True))
            _, headers = await client.read_head()
            await client.read_until(b"word0")
            old.process.terminate()
            async with running_program(tmp_path, upstream) as new:
                assert (await new.post(chat())).status == 200
                await asyncio.sleep(0.5)  # it has looked for what others left
                upstream.release("go")
                await client.read_until(b"[DONE]\n\n")
                assert await old.wait() == 0
        with closing(Store(tmp_path / "records.db")) as store:
            record = store.find_record(dict(headers)["x-request-id"])
    assert record is not None and (record.status, record.code) == (200, "")


async def ask_while_locked(port: int, folder: Path) -> None:
    """Six clients ask all the while that nobody can write to the store, and have their records."""
    seen = Seen()
    answered = [0] * 6
    is_over = False

    async def load(number: int) -> None:
        async with connected(port) as client:
            while not is_over:
                await seen.ask_once(client, stream=number % 2 == 0)
                answered[number] += 1
                await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for number in range(len(answered)):
            group.create_task(load(number))
        await eventually(lambda: ids_in(folder))
        with closing(sqlite3.connect(folder / "records.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            stored = ids_in(folder)
            locked_until = time.monotonic() + LOCKED
            while time.monotonic() < locked_until:
                wanted = min(answered) + 5
                await eventually(lambda wanted=wanted: min(answered) >= wanted)
            assert ids_in(folder) == stored
            database.execute("ROLLBACK")
        is_over = True
    assert seen.begun == seen.whole
    async with asyncio.timeout(WAIT):
        while len(recorded := ids_in(folder)) < len(seen.whole):  # noqa: ASYNC110  # a file
            await asyncio.sleep(0.1)
    assert set(recorded) == seen.whole and set(recorded.values()) == {1}


@pytest.mark.timeout(LOCKED + 120)
async def test_while_the_store_is_locked_no_request_waits_and_all_records_come_later(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedUpstream(default=answer) as upstream,
        running_program(tmp_path, upstream) as program,
    ):
        await ask_while_locked(program.port, tmp_path)


@pytest.mark.parametrize("is_killed", [False, True], ids=["stopped", "killed"])
async def test_the_count_of_a_day_survives_the_process(tmp_path: Path, is_killed: bool) -> None:
    with closing(Store(tmp_path / "records.db")) as store:
        key, _ = store.create_key("x", limits=KeyLimits(requests_per_day=3))

    async def ask(program: Program) -> int:
        async with program.connect() as client:
            await client.ask(chat(), headers=[f"authorization: Bearer {key}"])
            return (await client.read_reply()).status

    async with ScriptedUpstream(default=answer) as upstream:
        async with running_program(tmp_path, upstream, keys=True) as program:
            first = [await ask(program) for _ in range(2)]
            if is_killed:
                await program.kill()
            else:
                program.process.terminate()
                await program.wait()
        (tmp_path / "records.db-limits").unlink()  # as after a power cut, at the worst
        async with running_program(tmp_path, upstream, keys=True) as program:
            second = [await ask(program) for _ in range(2)]
        upstream.failures.clear()
    assert (first, second) == ([200, 200], [200, 429])
