"""`serve`: one writer brings all records into the store, though processes are killed meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.patience import WAIT
from tests.support.processes import is_alive
from tests.support.scripted import (
    Script,
    ScriptedUpstream,
    SeenRequest,
    completion,
    json_response,
    sse,
)

from .harness import WRITER, Client, chat, connected, eventually
from .test_status import command
from .test_workers import EVENTS, WAITING, Service, begin_stream, finish_stream, service

# `kill -9` at so many random moments; 50 where there is time.
KILLS = int(os.environ.get("HOBERPROXY_TEST_KILLS", "5"))
# For so many seconds the store is locked; 60 where there is time.
LOCKED = float(os.environ.get("HOBERPROXY_TEST_LOCKED", "2"))
Victims = Callable[[Service], list[int]]


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
                    await self.ask(client, stream)
        except (OSError, EOFError):
            pass

    async def load_once(self, port: int) -> None:
        """One request on a connection of its own, which must not fail."""
        async with connected(port) as client:
            await self.ask(client, True)

    async def ask(self, client: Client, stream: bool) -> None:
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


def writers(running: Service) -> list[int]:
    """Process ids of the writers of records."""
    return running.children(WRITER)


def holder_of_lock(folder: Path) -> list[int]:
    """Who has the writer's lock, by what the kernel says."""
    inode = (folder / "records.db-writer").stat().st_ino
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [int(line[4]) for line in lines if line[5].endswith(f":{inode}") and line[1] == "FLOCK"]


def all_of(running: Service) -> list[int]:
    return [running.process.pid, *running.workers(), *writers(running)]


VICTIMS: dict[str, Victims] = {
    "a worker": lambda running: running.workers()[:1],
    "the writer": writers,
    "all": all_of,
}


@pytest.mark.parametrize("kill", range(KILLS))
@pytest.mark.parametrize("victim", VICTIMS)
async def test_whichever_process_is_killed_each_request_has_one_record(
    tmp_path: Path, victim: str, kill: int
) -> None:
    seen = Seen()
    async with ScriptedUpstream(default=answer) as upstream:
        async with service(tmp_path, upstream) as running:
            loads = [asyncio.create_task(seen.load(running.port, n % 2 == 0)) for n in range(6)]
            await eventually(lambda: len(seen.whole) > 5)
            await asyncio.sleep(random.random() * 0.5)
            for pid in VICTIMS[victim](running):
                os.kill(pid, signal.SIGKILL)
            if victim == "all":
                await running.wait()
            else:
                count = len(seen.whole)
                if victim == "the writer":  # no client sees anything of it
                    await eventually(lambda: len(seen.whole) > count + 20)
                    assert not any(load.done() for load in loads)
                    await eventually(lambda: writers(running))
                for load in loads:
                    load.cancel()
            ends = await asyncio.gather(*loads, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError | None) for end in ends), ends
            if victim != "all":
                running.process.terminate()
                assert await running.wait() == 0
        if victim == "all":
            async with service(tmp_path, upstream):
                pass
        upstream.failures.clear()  # connections that were cut
    recorded = ids_in(tmp_path)
    assert seen.whole <= seen.begun <= set(recorded)
    assert set(recorded.values()) == {1}
    with closing(sqlite3.connect(tmp_path / "records.db")) as database:
        lost = {name for (name,) in database.execute("SELECT id FROM records WHERE code = 'lost'")}
    assert not lost & seen.whole
    assert not list((tmp_path / "records.db-requests").glob("*.segment"))


async def test_damage_in_a_journal_loses_no_other_record_whichever_process_is_killed(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "records.db-requests"
    async with ScriptedUpstream(default=answer) as upstream:
        async with service(tmp_path, upstream) as running:
            blocked = sqlite3.connect(tmp_path / "records.db", isolation_level=None)
            blocked.execute("BEGIN IMMEDIATE")  # so that all of it is in the journals
            seen = Seen()
            for _ in range(60):
                await seen.load_once(running.port)
            everyone = [running.process.pid, *running.children("hoberproxy")]
            for pid in everyone:
                os.kill(pid, signal.SIGKILL)
            await running.wait()
            await eventually(lambda: not any(is_alive(pid) for pid in everyone))
            blocked.close()
        whole = set[str]()
        for path in segments(folder):
            data = bytearray(path.read_bytes())
            data[4096:8192] = bytes(4096)
            path.write_bytes(data)
            for name in seen.whole:
                place = data.find(name.encode())
                if 0 <= place < 4096 - 1200 or place >= 8192:  # one of its entries is whole
                    whole.add(name)
        holes = sum(b"req_" in path.read_bytes()[8192:] for path in segments(folder))
        assert holes and len(whole) > 20
        async with service(tmp_path, upstream) as running:
            await eventually(lambda: whole <= set(ids_in(tmp_path)))
            assert len(list(folder.glob("*.unreadable"))) >= holes
            for pid in writers(running):
                os.kill(pid, signal.SIGKILL)
            await eventually(lambda: writers(running))
            await running.post(chat())
            running.process.terminate()
            await running.wait()
        async with service(tmp_path, upstream) as running:
            assert (await running.post(chat())).status == 200
            running.process.terminate()
            await running.wait()
        assert running.log().count("damaged; ") == len(list(folder.glob("*.unreadable")))
        upstream.failures.clear()
    assert set(ids_in(tmp_path).values()) == {1}


def segments(folder: Path) -> list[Path]:
    """Files of journals that hold more than their head."""
    return [path for path in folder.glob("*.segment") if b"req_" in path.read_bytes()]


async def test_however_many_workers_one_process_writes(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(default=answer) as upstream,
        service(tmp_path, upstream, workers=4) as running,
    ):
        for _ in range(8):
            assert (await running.post(chat())).status == 200
        await eventually(lambda: len(ids_in(tmp_path)) == 8)
        (writer,) = writers(running)
        assert holder_of_lock(tmp_path) == [writer]
        code, out, _ = await command(tmp_path, "status")
        assert code == 0
        (line,) = (line for line in out.splitlines() if " writer " in line)
        assert line.split()[0] == str(writer)
        running.send(signal.SIGTERM)
        assert await running.wait() == 0
    assert not holder_of_lock(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2], ids=["reload", "upgrade"])
async def test_at_a_reload_and_an_upgrade_the_writer_hands_over(
    tmp_path: Path, number: signal.Signals
) -> None:
    seen = Seen()
    async with ScriptedUpstream(default=answer) as upstream:
        async with service(tmp_path, upstream) as running:

            async def load() -> None:
                while not is_done:
                    await seen.load_once(running.port)

            is_done = False
            loading = asyncio.create_task(load())
            (before,) = writers(running)
            running.send(number)
            await running.logged("config reloaded")
            await eventually(lambda: not is_alive(before))
            (after,) = await eventually(lambda: writers(running))
            await eventually(lambda: holder_of_lock(tmp_path) == [after])
            count = len(seen.whole)
            await eventually(lambda: len(seen.whole) > count + 5)
            is_done = True
            await loading
            await eventually(lambda: set(ids_in(tmp_path)) >= seen.whole)
        upstream.failures.clear()
    recorded = ids_in(tmp_path)
    assert set(recorded) == seen.whole and set(recorded.values()) == {1}


async def test_a_writer_whose_supervisor_was_killed_waits_for_the_last_record(
    tmp_path: Path,
) -> None:
    async with ScriptedUpstream(default=answer) as upstream, service(tmp_path, upstream) as running:
        (writer,) = writers(running)
        seen = Seen()
        async with running.connect() as client:
            await seen.ask(client, stream=True)
            os.kill(running.process.pid, signal.SIGKILL)
            await running.wait()
        await eventually(lambda: not is_alive(writer))
        assert set(ids_in(tmp_path)) == seen.whole
        assert not list((tmp_path / "records.db-requests").iterdir())


@pytest.mark.timeout(LOCKED + 120)
async def test_while_the_store_is_locked_no_request_waits_and_all_records_come_later(
    tmp_path: Path,
) -> None:
    seen = Seen()
    answered = [0] * 6
    is_over = False

    async def load(running: Service, number: int) -> None:
        async with running.connect() as client:
            while not is_over:
                await seen.ask(client, stream=number % 2 == 0)
                answered[number] += 1
                await asyncio.sleep(0.01)

    async with (
        ScriptedUpstream(default=answer) as upstream,
        service(tmp_path, upstream) as running,
    ):
        async with asyncio.TaskGroup() as group:
            for number in range(len(answered)):
                group.create_task(load(running, number))
            await eventually(lambda: ids_in(tmp_path))
            path = tmp_path / "records.db"
            with closing(sqlite3.connect(path, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                stored = ids_in(tmp_path)
                locked_until = time.monotonic() + LOCKED
                while time.monotonic() < locked_until:
                    wanted = min(answered) + 5
                    await eventually(lambda wanted=wanted: min(answered) >= wanted)
                assert ids_in(tmp_path) == stored
                database.execute("ROLLBACK")
            is_over = True
        assert seen.begun == seen.whole
        async with asyncio.timeout(WAIT):
            while len(recorded := ids_in(tmp_path)) < len(seen.whole):  # noqa: ASYNC110  # a file
                await asyncio.sleep(0.1)
        assert set(recorded) == seen.whole and set(recorded.values()) == {1}


async def test_a_process_with_a_writer_beside_a_service_takes_its_turn(tmp_path: Path) -> None:
    """Two generations by other means than ours: each by itself, on one records file."""
    async with ScriptedUpstream(default=answer) as upstream:
        async with service(tmp_path, upstream) as old:
            (first,) = writers(old)
            async with service(tmp_path, upstream, server='admin_socket = "off"') as new:
                (second,) = writers(new)
                assert holder_of_lock(tmp_path) == [first]
                assert (await new.post(chat())).status == 200
                await eventually(lambda: len(ids_in(tmp_path)) == 1)
                old.process.terminate()
                assert await old.wait() == 0
                await eventually(lambda: holder_of_lock(tmp_path) == [second])
                assert (await new.post(chat())).status == 200
                await eventually(lambda: len(ids_in(tmp_path)) == 2)
    assert not list((tmp_path / "records.db-requests").iterdir())


async def test_after_a_reload_to_another_file_the_old_writer_stays_for_the_old_workers(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedUpstream(WAITING, default=answer) as upstream,
        service(tmp_path, upstream) as running,
    ):
        (old,) = writers(running)
        async with running.connect() as client:
            await begin_stream(client)
            config = tmp_path / "hoberproxy.toml"
            config.write_text(config.read_text().replace("records.db", "others.db"))
            running.send(signal.SIGHUP)
            await running.logged("config reloaded")
            requests = 0
            async with asyncio.timeout(WAIT):
                # An old worker may still accept a connection that came with the reload.
                while not stored_in(tmp_path / "others.db"):
                    assert (await running.post(chat())).status == 200
                    requests += 1
                    await asyncio.sleep(0.5)  # in which a record gets into the store
            assert old in writers(running)
            upstream.release("go")
            await finish_stream(client)
        await eventually(lambda: not is_alive(old))
        assert len(writers(running)) == 1
        by_old = stored_in(tmp_path / "records.db")
        assert by_old >= 1, "the stream's"
        await eventually(lambda: stored_in(tmp_path / "others.db") == requests + 1 - by_old)


def stored_in(file: Path) -> int:
    with closing(sqlite3.connect(file)) as database:
        count: int = database.execute("SELECT COUNT(*) FROM records").fetchone()[0]
    return count
