"""Nothing is counted twice by processes that share a store, follow each other, or are killed."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from hoberproxy.access.limits import KeyLimits
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.support.scripted import ScriptedUpstream

from .harness import Program, chat, running_program
from .test_records import answer
from .test_workers import WAITING


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
