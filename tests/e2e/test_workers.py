"""`hoberproxy serve` with a config: nothing is lost when it changes, little when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import hoberproxy
from tests.support.processes import children_of, is_alive, mapped_by, open_files
from tests.support.scripted import (
    WAIT,
    AwaitRelease,
    Pause,
    Script,
    ScriptedUpstream,
    SeenRequest,
    completion,
    json_response,
    sse,
    stream_events,
)

from .harness import (
    OTHER_SLUG,
    PROGRAM_CONFIG,
    SLUG,
    UPSTREAM_MODEL,
    WRITER,
    Client,
    Program,
    Reply,
    as_client_sees,
    chat,
    connected,
    error_event_of,
    eventually,
)

EVENTS = stream_events(3)
GOOD = json_response(200, completion())
WAITING: Script = [*sse(*EVENTS)[:3], AwaitRelease("go"), *sse(*EVENTS)[3:]]
# Under load every start of a process is slow on a machine with few cores.
PATIENCE = WAIT


class Service(Program):
    """A supervisor with workers; `log` is what they have written so far."""

    log: Callable[[], str]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def children(self, command: str) -> list[int]:
        """Process ids of those that run this."""
        return children_of(self.process.pid, running=command)

    async def logged(self, text: str, times: int = 1) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.log().count(text) < times:  # noqa: ASYNC110  # a file has no event
                await asyncio.sleep(0.01)


def write_config(
    folder: Path, url: str, *, server: str = "", slug: str = SLUG, metrics: str = "off"
) -> Path:
    text = PROGRAM_CONFIG.format(
        server=server, folder=folder, url=url, slug=slug, upstream_model=UPSTREAM_MODEL
    )
    config = folder / "hoberproxy.toml"
    text = text.replace('metrics_listen = "off"', f'metrics_listen = "{metrics}"')
    config.write_text(text.replace('"warning"', '"info"'))
    return config


@asynccontextmanager
async def service(
    folder: Path,
    upstream: ScriptedUpstream,
    *,
    workers: int = 2,
    server: str = "",
    metrics: str = "off",
    installed: Path | None = None,
    within: Sequence[str] = (),
) -> AsyncIterator[Service]:
    """Start the service, and end it unless it has ended.

    `within`: a command that runs commands.
    """
    config = write_config(folder, upstream.base_url, server=server, metrics=metrics)
    log = folder / "stderr.txt"
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *(*within, sys.executable, "-m", "hoberproxy", "serve", "--config", str(config)),
            *("--workers", str(workers)),
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            cwd=installed,
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT):
            line = await process.stdout.readline()
        running = Service(process, int(line.decode().rpartition(":")[2]), folder)
        running.log = log.read_text
        yield running
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.sleep(0.3)  # two that are pending are one
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(WAIT):
            await process.communicate()


async def begin_stream(client: Client) -> bytes:
    await client.ask(chat(stream=True))
    await client.read_head()
    return await client.read_until(b"word0")


async def finish_stream(client: Client) -> bytes:
    rest = await client.read_until(b"[DONE]\n\n")
    assert await client.read_chunk() == b""
    return rest


# Start and end


async def test_as_many_workers_serve_as_were_asked_for_and_sigterm_ends_all(tmp_path: Path) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, service(tmp_path, upstream) as running:
        assert len(running.workers()) == 2
        assert (await running.post(chat())).status == 200
        for pid in (running.process.pid, *running.children(WRITER)):
            mapped = mapped_by(pid)
            assert "python" in mapped
            assert "aiohttp" not in mapped and "uvloop" not in mapped, "tens of MB in each"
        running.send(signal.SIGTERM)
        assert await running.wait() == 0
    assert len(running.stored()) == 1


@pytest.mark.parametrize("what", ["address", "store"])
async def test_a_start_that_cannot_succeed_ends_with_3_and_says_why(
    tmp_path: Path, what: str
) -> None:
    async with ScriptedUpstream() as upstream:
        config = write_config(tmp_path, upstream.base_url)
        text = config.read_text()
        if what == "address":
            text = text.replace("127.0.0.1:0", f"127.0.0.1:{upstream.port}")
        else:
            text = text.replace(str(tmp_path / "records.db"), str(tmp_path / "gone" / "records.db"))
        config.write_text(text)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hoberproxy", "serve", "--config", str(config)),
            *("--workers", "2"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(WAIT):
            _, errors = await process.communicate()
    assert process.returncode == 3
    expected = "cannot listen on" if what == "address" else "/gone to exist"
    assert expected in errors.decode()
    assert "Traceback" not in errors.decode()


async def test_a_second_signal_ends_running_streams_with_an_error_event(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(WAITING) as upstream,
        service(tmp_path, upstream) as running,
        running.connect() as client,
    ):
        await begin_stream(client)
        running.send(signal.SIGTERM)
        await running.logged("draining: 1 request")
        running.send(signal.SIGTERM)
        rest = b""
        while piece := await client.read_chunk():
            rest += piece
        assert error_event_of(rest)["code"] == "draining"
        assert await running.wait() == 0


async def test_workers_whose_supervisor_was_killed_finish_their_streams_and_go(
    tmp_path: Path,
) -> None:
    async with ScriptedUpstream(WAITING) as upstream, service(tmp_path, upstream) as running:
        async with running.connect() as client:
            workers = running.workers()
            first = await begin_stream(client)
            running.process.kill()
            await running.wait()
            await running.logged("the supervisor is gone")
            upstream.release("go")
            assert first + await finish_stream(client) == as_client_sees(EVENTS)
        await eventually(lambda: not any(is_alive(pid) for pid in workers))


# Workers that break


async def test_a_killed_worker_is_replaced_and_only_its_own_streams_are_lost(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedUpstream(WAITING, WAITING, default=GOOD) as upstream,
        service(tmp_path, upstream) as running,
        running.connect() as one,
        running.connect() as other,
    ):
        await begin_stream(one)
        await begin_stream(other)
        before = running.workers()
        owner = await owner_of(one, before)
        survivor = other if await owner_of(other, before) != owner else None
        os.kill(owner, signal.SIGKILL)
        await running.logged("serves")
        assert set(running.workers()) != set(before)
        assert len(running.workers()) == 2
        assert (await running.post(chat())).status == 200
        upstream.release("go")
        if survivor is not None:
            await finish_stream(survivor)
        assert b"[DONE]" not in await one.reader.read()


async def owner_of(client: Client, workers: list[int]) -> int:
    """The worker that has accepted this client's connection."""
    port = client.writer.get_extra_info("sockname")[1]
    inode = await eventually(lambda: inode_of(port))
    (owner,) = (pid for pid in workers if f"socket:[{inode}]" in open_files(pid))
    return owner


def inode_of(remote_port: int) -> str | None:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].rpartition(":")[2], 16) == remote_port and fields[9] != "0":
            return fields[9]
    return None


# Reload, upgrade


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2], ids=["reload", "upgrade"])
async def test_a_running_stream_goes_on_and_new_requests_meet_the_new_config(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with (
        ScriptedUpstream(WAITING, default=GOOD) as upstream,
        service(tmp_path, upstream) as running,
        running.connect() as client,
        running.connect() as idle,
    ):
        await idle.ask(chat(model=OTHER_SLUG))
        assert (await idle.read_reply()).status == 404
        first = await begin_stream(client)
        before = running.workers()
        write_config(tmp_path, upstream.base_url, slug=OTHER_SLUG)
        running.send(number)
        await running.logged("config reloaded")
        assert set(before).isdisjoint(set(running.workers()) - set(before))
        # A worker that is leaving has its part of the queue of new connections for a moment.
        for _ in range(100):
            if (await running.post(chat(model=OTHER_SLUG))).status == 200:
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("expected the new config to answer new connections, the old one does")
        await idle.ask(chat())  # the old worker's, by its old config
        last = await idle.read_reply()
        assert (last.status, last.headers["connection"]) == (200, "close")
        assert await idle.is_closed_by_peer()
        upstream.release("go")
        assert first + await finish_stream(client) == as_client_sees(EVENTS)
        await client.ask(chat())  # its head had promised to keep the connection
        last = await client.read_reply()
        assert (last.status, last.headers["connection"]) == (200, "close")
        await eventually(lambda: not set(before) & set(running.workers()))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2], ids=["reload", "upgrade"])
async def test_a_bad_config_changes_nothing_and_a_new_worker_still_gets_the_good_one(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, service(tmp_path, upstream) as running:
        before = running.workers()
        write_config(tmp_path, "ftp://nowhere")
        running.send(number)
        await running.logged("providers.a.base_url")
        assert running.workers() == before
        os.kill(before[0], signal.SIGKILL)
        await running.logged(" serves")
        for _ in range(4):
            assert (await running.post(chat())).status == 200


async def test_an_upgrade_brings_the_installed_version_unless_that_is_broken(
    tmp_path: Path,
) -> None:
    installed = tmp_path / "installed"
    shutil.copytree(Path(hoberproxy.__file__).parent, installed / "hoberproxy")
    init, server, source = (  # none of which is compiled
        installed / "hoberproxy" / name
        for name in ("__init__.py", "process/supervisor.py", "config/source.py")
    )
    good, read = server.read_text(), source.read_text()
    async with (
        ScriptedUpstream(WAITING, default=GOOD) as upstream,
        service(tmp_path, upstream, installed=installed) as running,
        running.connect() as client,
    ):
        first = await begin_stream(client)
        before = running.workers()
        init.write_text('__version__ = "99.0"')
        server.write_text("import nothing_of_that_name")
        running.send(signal.SIGUSR2)
        await running.logged("not upgraded: the installed code cannot be run: ModuleNotFound")
        assert running.workers() == before
        assert (await running.post(chat())).status == 200
        server.write_text(good)
        # It refuses the config that is served.
        source.write_text(read.replace("(self.text,", '(self.text.replace("models", "slugs"),'))
        running.send(signal.SIGUSR2)
        await running.logged("slugs: ")
        assert running.workers() == before
        source.write_text(read)
        running.send(signal.SIGUSR2)
        await running.logged("upgraded to 99.0")
        await running.logged("config reloaded")
        assert (await running.post(chat())).status == 200
        upstream.release("go")
        assert first + await finish_stream(client) == as_client_sees(EVENTS)


async def test_a_reload_may_listen_elsewhere(tmp_path: Path) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, service(tmp_path, upstream) as running:
        before = running.port
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            config = write_config(tmp_path, upstream.base_url)
            text = config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}")
            config.write_text(text)
            running.send(signal.SIGHUP)
            await running.logged(f"config not reloaded: cannot listen on 127.0.0.1:{port}")
        assert (await running.post(chat())).status == 200
        running.send(signal.SIGHUP)
        await running.logged("config reloaded")
        async with connected(port) as client:
            await client.ask(chat())
            assert (await client.read_reply()).status == 200
        await eventually(lambda: len(running.workers()) == 2)
        with pytest.raises(ConnectionError):
            async with connected(before):
                pass


async def test_a_config_that_workers_cannot_start_with_changes_nothing(tmp_path: Path) -> None:
    async with ScriptedUpstream(default=GOOD) as upstream, service(tmp_path, upstream) as running:
        before = running.workers()
        config = write_config(tmp_path, upstream.base_url)
        gone = str(tmp_path / "gone" / "records.db")
        config.write_text(config.read_text().replace(str(tmp_path / "records.db"), gone))
        running.send(signal.SIGHUP)
        await running.logged("config not reloaded")
        assert running.workers() == before
        assert (await running.post(chat())).status == 200


# Limits


async def test_the_maximum_of_streams_holds_over_all_workers_and_a_dead_one_frees_its_share(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedUpstream(default=WAITING) as upstream,
        service(tmp_path, upstream, server="max_streams = 3") as running,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(running.connect()) for _ in range(6)]
        for client in clients[:3]:
            await begin_stream(client)
        for client in clients[3:]:
            await client.ask(chat(stream=True))
            refused = await client.read_reply()
            assert (refused.status, refused.error["code"]) == (503, "overloaded")
        for pid in running.workers():
            os.kill(pid, signal.SIGKILL)
        await running.logged(" serves", 2)
        async with running.connect() as again:
            await begin_stream(again)


# Metrics


async def scrape(running: Service) -> dict[str, float]:
    """Samples by name, summed over their labels."""
    await running.logged("metrics of all workers are at")
    line = running.log().partition("metrics of all workers are at http://127.0.0.1:")[2]
    return await scrape_at(int(line[:5]))


async def scrape_at(port: int) -> dict[str, float]:
    async with connected(port) as client:
        await client.send(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
        reply = await client.read_reply()
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain")
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


async def test_one_scrape_tells_the_sum_over_all_workers_also_those_that_are_gone(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedUpstream(default=GOOD) as upstream,
        service(tmp_path, upstream, metrics="127.0.0.1:0") as running,
    ):
        for _ in range(10):
            assert (await running.post(chat())).status == 200
        before = await scrape(running)
        assert before["hoberproxy_requests_total"] == 10
        assert before["hoberproxy_request_seconds_count"] == 10
        assert before["hoberproxy_workers"] == 2
        assert before["hoberproxy_loop_lag_seconds_count"] >= 0
        old = running.workers()
        os.kill(old[0], signal.SIGKILL)
        await running.logged(" serves")
        assert (await scrape(running))["hoberproxy_requests_total"] == 10
        for count, number in enumerate((signal.SIGHUP, signal.SIGUSR2), start=1):
            running.send(number)
            await running.logged("config reloaded", count)
            assert (await running.post(chat())).status == 200
            await eventually(lambda: len(running.workers()) == 2)
            assert (await scrape(running))["hoberproxy_requests_total"] == 10 + count
        after = await scrape(running)
        assert after["hoberproxy_worker_restarts_total"] == 1
        assert after["hoberproxy_reloads_total"] == 2
        assert after["hoberproxy_connections_open"] == 0
        assert after["hoberproxy_resident_bytes"] > 3 * 2**20


async def test_other_paths_of_the_metrics_listener_are_404(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream() as upstream,
        service(tmp_path, upstream, workers=1, metrics="127.0.0.1:0") as running,
    ):
        await scrape(running)
        port = int(running.log().partition("are at http://127.0.0.1:")[2][:5])
        for path, status in (("/", 404), ("/metrics?x=1", 200)):
            async with connected(port) as client:
                await client.send(b"GET %b HTTP/1.1\r\n\r\n" % path.encode())
                assert (await client.read_reply()).status == status


# Under load


class Load:
    """Requests on kept connections, until stopped; everything but a whole answer is noted."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.failed: list[str] = []
        self.streams = 0
        self.requests = 0
        self._is_ending = asyncio.Event()

    def end(self) -> None:
        self._is_ending.set()

    async def stream(self) -> None:
        """One stream after the other."""
        expected = as_client_sees(LONG_EVENTS)
        async for reply in self._replies(chat(stream=True), pause=0.0):
            self.streams += 1
            if (reply.status, reply.is_complete, reply.body) != (200, True, expected):
                self.failed.append(f"stream: {reply.status} {reply.body[-200:]!r}")

    async def ask(self, interval: float) -> None:
        """A short request each `interval` seconds."""
        async for reply in self._replies(chat(), pause=interval):
            self.requests += 1
            if (reply.status, reply.is_complete) != (200, True):
                self.failed.append(f"request: {reply.status} {reply.body[-200:]!r}")

    async def _replies(self, body: object, *, pause: float) -> AsyncIterator[Reply]:
        while not self._is_ending.is_set():
            try:
                async with connected(self.port) as client:
                    is_kept = True
                    while is_kept and not self._is_ending.is_set():
                        await client.ask(body)
                        reply = await client.read_reply()
                        is_kept = reply.headers.get("connection") != "close"
                        yield reply
                        await asyncio.sleep(pause)
            except (ConnectionError, TimeoutError, asyncio.IncompleteReadError) as exc:
                self.failed.append(f"connection: {exc!r}")
                await asyncio.sleep(0.1)


LONG_EVENTS = stream_events(30)


def answer(seen: SeenRequest) -> Script:
    return long_stream() if seen.json().get("stream") else GOOD


def long_stream() -> Script:
    """Three seconds."""

    def steps() -> Iterator[object]:
        for step in sse(*LONG_EVENTS):
            yield step
            yield Pause(0.1)

    return list(steps())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("streams", "rate", "rounds"),
    [(40, 20, 2), pytest.param(200, 50, 10, marks=pytest.mark.load)],
    ids=["short", "full"],
)
async def test_no_request_fails_and_no_stream_is_cut_by_reloads_and_upgrades(
    tmp_path: Path, streams: int, rate: int, rounds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    callers = 10
    async with (
        ScriptedUpstream(default=answer) as upstream,
        service(tmp_path, upstream) as running,
    ):
        load = Load(running.port)
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(load.stream())
            for _ in range(callers):
                group.create_task(load.ask(callers / rate))
            for count in range(1, 2 * rounds + 1):
                await asyncio.sleep(0.3)
                running.send(signal.SIGUSR2 if count % 2 else signal.SIGHUP)
                await running.logged("config reloaded", count)
            load.end()
        with capsys.disabled():
            print(f"[{load.streams} streams, {load.requests} requests]", end=" ")
        assert not load.failed
        assert "upgraded to" in running.log()
        assert "ERROR" not in running.log()
