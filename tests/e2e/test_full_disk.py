"""Records on a full disk: requests go on, and the log reports a loss, which ends with new room."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hoberproxy.accounting.journal_directory import SEGMENT
from tests.support.scripted import ScriptedUpstream

from .harness import Client, chat, eventually
from .test_records import answer, ids_in
from .test_workers import Service, scrape_at, service

# Makes records of 8 kB, so that a segment of the journal is full after 500 requests.
OTHERS = [f"test/{number:02}{'x' * 249}" for number in range(32)]
ROOM_BYTES = 48 << 20  # for what a start allocates, and all requests of these tests


@dataclass(frozen=True)
class Disk:
    """A small filesystem that only those see who run `within` it. `root` leads there from here."""

    within: tuple[str, ...]
    root: Path

    def fill(self) -> None:
        """Leave no byte."""
        with (self.root / "filler").open("ab", buffering=0) as file:
            for size in (1 << 20, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        (self.root / "filler").unlink()

    def recorded(self, folder: Path) -> Counter[str]:
        """Ids in the store: of a copy, for SQLite takes /proc/…/root for a link to our own root."""
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in ("records.db", "records.db-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(self.root / name, copy)
        return ids_in(copy)


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """A disk at `folder`, in a namespace of its own: nobody has to be root for that."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={ROOM_BYTES} tmpfs "$0" && echo mounted && exec cat'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("needs unshare and nsenter, of util-linux")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as keeper:
        output, errors = keeper.stdout, keeper.stderr
        assert output is not None and errors is not None
        if output.readline() != "mounted\n":
            pytest.skip(f"nothing can be mounted without being root: {errors.read().strip()}")
        enter = ("nsenter", "--target", str(keeper.pid), "--user", "--mount")
        yield Disk((*enter, "--preserve-credentials"), Path(f"/proc/{keeper.pid}/root{folder}"))


@dataclass
class Proxy:
    """A proxy with its records on `disk`, and the ids of all requests that it has answered."""

    running: Service
    client: Client
    disk: Disk
    folder: Path
    metrics_port: int
    ids: list[str] = field(default_factory=list)

    async def ask(self, count: int) -> None:
        for _ in range(count):
            await self.client.ask(chat(models=OTHERS))
            reply = await self.client.read_reply()
            assert reply.status == 200
            self.ids.append(reply.headers["x-request-id"])

    async def fill_journal(self) -> None:
        """Ask until a record has found no room."""
        while not await self.count("journal_entries_lost_total"):
            await self.ask(100)

    async def count(self, name: str) -> float:
        return (await scrape_at(self.metrics_port))[f"hoberproxy_{name}"]

    def recorded(self) -> Counter[str]:
        return self.disk.recorded(self.folder)

    def segments(self) -> int:
        """Return the number of journal segments: a spare one in each process, and those in use."""
        return len(list((self.disk.root / "records.db-requests").glob(f"*{SEGMENT}")))


StartProxy = Callable[..., AbstractAsyncContextManager[Proxy]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk") as disk:
        (tmp_path / "records.db").symlink_to(tmp_path / "disk" / "records.db")
        yield disk


@pytest.fixture
def start_proxy(tmp_path: Path, disk: Disk, unused_tcp_port: int) -> StartProxy:
    """Starts one with so many workers; unless the disk is full it has a record."""

    @asynccontextmanager
    async def start(workers: int, *, is_full: bool = False) -> AsyncIterator[Proxy]:
        metrics = f"127.0.0.1:{unused_tcp_port}"
        async with (
            ScriptedUpstream(default=answer) as upstream,
            service(
                tmp_path, upstream, workers=workers, metrics=metrics, within=disk.within
            ) as running,
            running.connect() as client,
        ):
            proxy = Proxy(running, client, disk, tmp_path, unused_tcp_port)
            await proxy.ask(1)
            if not is_full:
                await eventually(lambda: proxy.recorded() >= Counter(proxy.ids))
                # Room that is being allocated when the disk gets full would be given back.
                await eventually(lambda: proxy.segments() == workers + 1)
            yield proxy

    return start


async def test_on_a_full_disk_requests_go_on_and_records_follow_when_there_is_room(
    start_proxy: StartProxy, disk: Disk
) -> None:
    async with start_proxy(2) as proxy:
        disk.fill()
        await proxy.fill_journal()
        await proxy.ask(10)
        assert await proxy.count("records_lost_total") == 0
        assert await proxy.count("records_queued") > len(proxy.ids) - 10
        for line in ("no journal: a crash now would lose requests", "records wait in the journals"):
            await proxy.running.logged(line)
            assert proxy.running.log().count(line) == 1
        disk.free()
        await proxy.running.logged("the journal has room again")
        await proxy.running.logged("records are written again")
        await proxy.ask(1)
        await eventually(lambda: proxy.recorded() == Counter(proxy.ids))
        proxy.running.send(signal.SIGTERM)
        assert await proxy.running.wait() == 0
    assert proxy.recorded() == Counter(proxy.ids)
    assert not list((disk.root / "records.db-requests").iterdir())


async def test_records_for_which_an_ending_worker_has_no_disk_are_lost_counted_and_logged(
    start_proxy: StartProxy, disk: Disk
) -> None:
    async with start_proxy(1) as proxy:
        disk.fill()
        await proxy.fill_journal()
        proxy.running.send(signal.SIGHUP)
        await proxy.running.logged("config reloaded")
        proxy.client.close()
        await proxy.running.logged("records are lost: the journal has no room")
        await eventually(lambda: len(proxy.running.workers()) == 1)
        lost = await proxy.count("records_lost_total")
        reply = await proxy.running.post(chat())
        assert reply.status == 200
        disk.free()
        await eventually(lambda: reply.headers["x-request-id"] in proxy.recorded())
    recorded = proxy.recorded()
    assert set(recorded.values()) == {1}
    # Of one of those that are lost the beginning had found room.
    assert lost > 0 and len(proxy.ids) + 1 - len(recorded) in (lost, lost - 1)


async def test_a_start_on_a_full_disk_serves_and_journals_are_stored_later(
    start_proxy: StartProxy, disk: Disk
) -> None:
    async with start_proxy(2) as proxy:
        disk.fill()
        await proxy.ask(300)
        await proxy.running.logged("records wait in the journals")
        proxy.running.send(signal.SIGTERM)
        assert await proxy.running.wait() == 0
    async with start_proxy(2, is_full=True) as again:
        await again.ask(10)
        disk.free()
        await eventually(lambda: again.recorded() == Counter(proxy.ids + again.ids))
