"""Runs the whole proxy in this process or as a program, with a client that sees every byte.

The upstream is that of tests/support/scripted.py. The client reads HTTP by code of its own, so that
a fault in the package's framing is seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hoberproxy.accounting.record import Record
from hoberproxy.config.settings import (
    Address,
    Config,
    KeySettings,
    LogSettings,
    RecordSettings,
    ServerSettings,
)
from hoberproxy.config.values import parse_base_url
from hoberproxy.process.server import Server
from hoberproxy.routing.catalog import Endpoint, Model, Provider, TimeLimits
from tests.conftest import listen
from tests.support.patience import WAIT, patient
from tests.support.processes import all_below, children_of
from tests.support.scripted import ScriptedUpstream

SLUG = "test/model"
OTHER_SLUG = "test/other"
UPSTREAM_MODEL = "upstream-model"
UPSTREAM_KEY = "sk-upstream-secret"
LIMITS = TimeLimits(connect=WAIT, first_content=WAIT, idle=WAIT, total=2 * WAIT)
# For what is to run out; long enough for a busy machine to do what is to come before.
SOON = TimeLimits(connect=WAIT, first_content=patient(0.5), idle=patient(0.5), total=patient(1.0))
CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "hi"}]


def chat(*, stream: bool = False, model: str = SLUG, **more: Any) -> dict[str, Any]:
    """Return a request's body."""
    return {"model": model, "messages": QUESTION, "stream": stream, **more}


def as_client_sees(
    events: Iterable[bytes], *, usage: bool = False, name: str = UPSTREAM_MODEL, slug: str = SLUG
) -> bytes:
    """Return an upstream's events as the client gets them, found by parsing each of them."""
    return b"".join(
        event.replace(b'"model":"%b"' % name.encode(), b'"model":"%b"' % slug.encode())
        for event in events
        if usage or not is_usage_event(event)
    )


def is_usage_event(event: bytes) -> bool:
    """Return the event that `include_usage` adds."""
    payload = event.removeprefix(b"data: ").strip()
    return payload.startswith(b"{") and json.loads(payload).get("choices") == []


def error_event_of(body: bytes) -> dict[str, Any]:
    """Return the error event that ends a broken stream; assert that it is the last and only one."""
    *before, last, rest = b"\n".join(
        line for line in body.split(b"\n") if not line.startswith(b":")
    ).split(b"\n\n")
    assert rest == b"", "the stream must end with a whole event"
    assert b"[DONE]" not in body
    assert not any(event.startswith(b'data: {"error"') for event in before)
    document = json.loads(last.lstrip(b"\n").removeprefix(b"data: "))
    assert set(document) == {"error"}, "with choices, some clients take the stream for finished"
    error = document["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    return error  # type: ignore[no-any-return]


# The client


@dataclass(frozen=True, slots=True)
class Reply:
    """One response as it arrived. `is_complete`: it ended as its own framing says."""

    status: int
    header_list: list[tuple[str, str]]
    body: bytes
    is_complete: bool

    @property
    def headers(self) -> Mapping[str, str]:
        return dict(self.header_list)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]  # type: ignore[no-any-return]


class Client:
    """A raw connection to the proxy; every wait has a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._buffer = bytearray()

    async def ask(self, body: Any, path: str = CHAT, headers: Iterable[str] = ()) -> None:
        """Send a request; `body` is bytes or a value for JSON."""
        await self.send(request_bytes(body, path, headers))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(WAIT):
            await self.writer.drain()

    async def read_head(self) -> tuple[int, list[tuple[str, str]]]:
        """Read status and headers of the next response; interim ones are skipped."""
        head = (await self._read_through(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        status = int(status_line.split(" ")[1])
        if status == 100:
            return await self.read_head()
        fields = [line.split(": ", 1) for line in lines]
        return status, [(name.lower(), value) for name, value in fields]

    async def read_reply(self) -> Reply:
        """Read the next response to its end, or as far as it comes."""
        status, fields = await self.read_head()
        headers = dict(fields)
        body = bytearray()
        is_complete = True
        try:
            if headers.get("transfer-encoding") == "chunked":
                while piece := await self.read_chunk():
                    body += piece
            elif "content-length" in headers:
                body += await self._read_exactly(int(headers["content-length"]))
            else:
                body += await self._read_to_end()
        except asyncio.IncompleteReadError as exc:
            body += exc.partial
            is_complete = False
        return Reply(status, fields, bytes(body), is_complete)

    async def read_chunk(self) -> bytes:
        """Read the next chunk of a body; b"" at its end."""
        size = int((await self._read_through(b"\r\n")).split(b";")[0], 16)
        return (await self._read_exactly(size + 2))[:-2]

    async def read_until(self, mark: bytes) -> bytes:
        """Read chunks of a body until `mark` has come."""
        body = bytearray()
        while mark not in body:
            piece = await self.read_chunk()
            assert piece, f"the body ended before {mark!r}: {bytes(body)!r}"
            body += piece
        return bytes(body)

    async def is_closed_by_peer(self) -> bool:
        """Wait for the end of the connection; return False if bytes come first."""
        return not self._buffer and await self._more() == b""

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()

    async def _more(self) -> bytes:
        async with asyncio.timeout(WAIT):
            try:
                data = await self.reader.read(1 << 20)
            except ConnectionResetError:
                data = b""
        self._buffer += data
        return data

    async def _read_through(self, mark: bytes) -> bytes:
        searched = 0
        while (found := self._buffer.find(mark, searched)) < 0:
            searched = max(0, len(self._buffer) - len(mark))
            if not await self._more():
                raise asyncio.IncompleteReadError(b"", None)
        return self._take(found + len(mark))

    async def _read_exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not await self._more():
                raise asyncio.IncompleteReadError(self._take(count), count)
        return self._take(count)

    async def _read_to_end(self) -> bytes:
        while await self._more():
            pass
        return self._take(len(self._buffer))

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    """Connect a client to the proxy at `port`; it is cut off at the end."""
    async with asyncio.timeout(WAIT):
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield client
    finally:
        client.abort()


def request_bytes(body: Any, path: str = CHAT, headers: Iterable[str] = ()) -> bytes:
    """Return a whole request; `headers` are lines."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        *headers,
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1") + payload


# The proxy


class Proxy:
    """A running server, and every record it closed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        context = server._context
        assert context is not None
        self.context = context
        self.port = server.addresses[0].port
        self.url = f"http://127.0.0.1:{self.port}"
        self.records: list[Record] = []
        context.on_closed = self.records.append

    async def wait_for_record(self, count: int = 1) -> Record:
        """Wait until `count` requests have ended; return the last of their records."""
        await eventually(lambda: len(self.records) >= count)
        assert len(self.records) == count, "one record for each request"
        return self.records[-1]

    def connect(self) -> AbstractAsyncContextManager[Client]:
        return connected(self.port)

    async def post(self, body: Any, path: str = CHAT, headers: Iterable[str] = ()) -> Reply:
        """Send one request on a new connection; return the reply."""
        async with self.connect() as client:
            await client.ask(body, path, headers)
            return await client.read_reply()

    def pool_of(self, provider: str) -> Any:
        return self.context.upstreams[provider].pool


async def eventually(holds: Callable[[], Any]) -> Any:
    """Wait until a condition holds; return its value."""
    async with asyncio.timeout(WAIT):
        while not (value := holds()):  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.002)
    return value


def provider_for(upstream: ScriptedUpstream | str, name: str = "a", **changes: Any) -> Provider:
    """Return a provider for an upstream or a URL."""
    url = upstream if isinstance(upstream, str) else upstream.base_url
    scheme, host, port, path = parse_base_url(url)
    provider = Provider(name, scheme, host, port, path, api_key=UPSTREAM_KEY, limits=LIMITS)
    if scheme == "https" and not isinstance(upstream, str):
        provider = replace(provider, ca_file=upstream.ca_file)
    return replace(provider, **changes)


def make_config(
    folder: Path, *providers: Provider, models: Iterable[Model] | None = None, **server: Any
) -> Config:
    """Return a config with SLUG at all providers, or `models`; `server` has settings."""
    if models is None:
        models = [model_at(SLUG, *(provider.name for provider in providers))]
    settings = ServerSettings(
        listen=(Address("127.0.0.1", 0),),
        metrics_listen=None,
        drain_timeout=0.0,
        comment_after=0.0,  # or a slow machine has them in its streams
    )
    return Config(
        server=replace(settings, **server),
        keys=KeySettings(required=False),
        records=RecordSettings(file=str(folder / "records.db")),
        log=LogSettings(access=False),
        providers={provider.name: provider for provider in providers},
        models=tuple(models),
    )


def model_at(slug: str, *providers: str) -> Model:
    return Model(slug, tuple(Endpoint(name, UPSTREAM_MODEL) for name in providers))


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Proxy]:
    """Run the proxy; assert at the end that no request, timer or connection is left."""
    server = Server(config, await listen(config))
    await server.start()
    proxy = Proxy(server)
    try:
        yield proxy
    finally:
        server.stop()
        server.stop()  # a second time: now
        async with asyncio.timeout(WAIT):
            await server.wait_closed()
    assert not proxy.context.exchanges, "no request may outlive its connection"
    pools = [upstream.pool for upstream in proxy.context.upstreams.values()]
    await eventually(lambda: sum(pool.open for pool in pools) == 0)
    assert len(proxy.context.wheel) <= 1, "only the pools' sweep may still wait"


# The program, as an operator starts it

PROGRAM_CONFIG = """\
[server]
listen = "127.0.0.1:0"
metrics_listen = "off"
comment_after = 0
{server}

[keys]
required = false

[records]
file = "{folder}/records.db"

[log]
level = "warning"

[providers.a]
base_url = "{url}"

[[models]]
slug = "{slug}"

[[models.endpoints]]
provider = "a"
model = "{upstream_model}"
"""


WORKER, WRITER = "hoberproxy\0worker", "hoberproxy\0writer"  # in their command lines


class Program:
    """`hoberproxy serve`, a supervisor and its processes: its port, its memory, its signals."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, folder: Path) -> None:
        self.process = process
        self.port = port
        self.records_file = folder / "records.db"

    def connect(self) -> AbstractAsyncContextManager[Client]:
        return connected(self.port)

    async def post(self, body: Any) -> Reply:
        async with self.connect() as client:
            await client.ask(body)
            return await client.read_reply()

    async def wait(self) -> int:
        """Wait for the program's end; return the exit code."""
        async with asyncio.timeout(WAIT):
            return await self.process.wait()

    async def kill(self) -> None:
        """Kill all processes of the program."""
        for pid in (self.process.pid, *all_below(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.wait()

    def workers(self) -> list[int]:
        """Return the process ids of all workers, old ones among them."""
        return children_of(self.process.pid, running=WORKER)

    def resident_bytes(self) -> int:
        """Return the physical memory of the workers."""
        statms = [Path(f"/proc/{pid}/statm").read_text() for pid in self.workers()]
        return sum(int(statm.split()[1]) for statm in statms) * resource.getpagesize()

    def stored(self) -> list[tuple[int, str, int, int]]:
        """Return status, code, completion tokens and events of the records in the store."""
        with closing(sqlite3.connect(self.records_file)) as database:
            statement = "SELECT status, code, completion_tokens, events FROM records ORDER BY id"
            return database.execute(statement).fetchall()


@asynccontextmanager
async def running_program(
    folder: Path,
    upstream: ScriptedUpstream,
    server: str = "",
    *,
    keys: bool = False,
    endpoint: str = "",
) -> AsyncIterator[Program]:
    """Run `python -m hoberproxy serve`; `server` and `endpoint` are lines of these tables.

    With `keys` clients need one.
    """
    config = folder / "hoberproxy.toml"
    text = PROGRAM_CONFIG.format(
        server=server,
        folder=folder,
        url=upstream.base_url,
        slug=SLUG,
        upstream_model=UPSTREAM_MODEL,
    )
    text += endpoint
    config.write_text(text.replace("required = false", "required = true") if keys else text)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hoberproxy", "serve", "--config", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT):
            line = await process.stdout.readline()
        yield Program(process, int(line.decode().rpartition(":")[2]), folder)
    finally:
        if process.returncode is None:
            await Program(process, 0, folder).kill()
        await process.communicate()
