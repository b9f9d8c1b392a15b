"""Shared by all tests: the loop they run on, and a proxy in this process with a raw client.

    proxy = await start_proxy(head_timeout=0.1)   # settings of [server] by name
    client = await proxy.connect()
    client.send(b"GET /healthz HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
    assert (await client.read_answer()).status == 200

`upstream` answers every request with a completion, unless the test queues scripts first.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from hoberproxy.accounting.record import Record
from hoberproxy.config.settings import (
    Address,
    Config,
    KeySettings,
    LogSettings,
    RecordSettings,
    ServerSettings,
)
from hoberproxy.exchange.context import ServerContext
from hoberproxy.process.listeners import Listeners
from hoberproxy.process.server import Server
from hoberproxy.relay import content_template
from hoberproxy.routing.catalog import Endpoint, Model, Provider
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.support.patience import LONG_TEST_LIMIT, TEST_LIMIT, WAIT
from tests.support.scripted import ScriptedUpstream, completion, json_response

# Compiled code looks a name up once, so a test cannot put another thing in its place; and its bytes
# are copied where the interpreter hands on the same object.
IS_COMPILED = not str(content_template.__file__).endswith(".py")
pure_only = pytest.mark.skipif(IS_COMPILED, reason="of the sources alone")

# No example fails for being slow: a machine that others share stops for longer than any deadline.
# In CI the examples are the same each time, so that a change is judged by what it changes; other
# runs, and above all `make test-properties`, look for new ones.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

SLUG = "test/model"
QUESTION = {"model": SLUG, "messages": [{"role": "user", "content": "hi"}]}

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Give every test the program's loop, and those whose mark names loops both."""
    named = any("loop_factories" in mark.kwargs for mark in item.iter_markers("asyncio"))
    return LOOPS if named else {"uvloop": LOOPS["uvloop"]}


# Time limits of tests

# Markers of what installs, boots or loads for minutes.
LONG = ("real", "load", "systemd", "wheel", "docker")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Set the time limit of each test, unless the command line names one."""
    if config.option.timeout is None:
        config.option.timeout = TEST_LIMIT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give long tests more time than pyproject.toml gives the others."""
    for item in items:
        if any(item.get_closest_marker(name) for name in LONG):
            item.add_marker(pytest.mark.timeout(LONG_TEST_LIMIT))


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(settings: Any) -> Iterator[Any]:
    """Have the alarm cancel all tasks, too: uvloop only logs what a signal's handler raises."""
    result = yield
    fail = signal.getsignal(signal.SIGALRM)
    if settings.method == "signal" and callable(fail):

        def end_test(number: int, frame: Any) -> None:
            with suppress(RuntimeError):  # no loop runs here
                loop = asyncio.get_running_loop()
                loop.call_soon_threadsafe(_cancel_all, loop)
            fail(number, frame)

        signal.signal(signal.SIGALRM, end_test)
    return result


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel("the test took too long")


# A client that sends what it likes


@dataclass(frozen=True, slots=True)
class ClientAnswer:
    """One answer as it came. `headers` has lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    interim: int = 0  # how many 1xx came before

    def json(self) -> Any:
        """Return the parsed body."""
        return json.loads(self.body)


class RawClient:
    """A client's socket. Raises EOFError where the proxy ends the connection too early."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, *pieces: bytes) -> None:
        """Write, without waiting for the proxy to read."""
        for piece in pieces:
            self._writer.write(piece)

    async def send_each(self, pieces: list[bytes]) -> None:
        """Write each piece as a separate segment, as far as a test can bring that about."""
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0)

    async def flood(self, size_bytes: int) -> None:
        """Send `size_bytes` that are no request, as fast as the proxy reads them."""
        await self.drain(b"x" * 65536, size_bytes // 65536)

    async def drain(self, data: bytes, times: int = 1) -> None:
        """Send `data` as fast as the proxy reads it; ConnectionError when it does not."""
        for _ in range(times):
            self._writer.write(data)
            await asyncio.wait_for(self._writer.drain(), WAIT)

    def send_eof(self) -> None:
        """Close the sending side."""
        self._writer.write_eof()

    async def read_answer(self, method: str = "POST") -> ClientAnswer:
        """Read the next answer, and count the 1xx before it."""
        return await asyncio.wait_for(self._read_answer(method), WAIT)

    async def read_line(self) -> bytes:
        """Read the next line, with its end."""
        return await asyncio.wait_for(self._reader.readline(), WAIT)

    async def read_rest(self) -> bytes:
        """Read everything up to the end of the connection; a reset is an end too."""
        return await asyncio.wait_for(self._read_rest(), WAIT)

    async def is_open(self) -> bool:
        """Return whether the connection serves another request."""
        self.send(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        try:
            return (await self.read_answer()).status == 200
        except (EOFError, ConnectionError):
            return False

    @property
    def socket(self) -> socket.socket:
        """The transport's stand-in for its socket."""
        return self._writer.get_extra_info("socket")  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Cut the connection."""
        self._writer.transport.abort()

    async def _read_answer(self, method: str, interim: int = 0) -> ClientAnswer:
        status, headers = await self._read_head()
        if status < 200:
            return await self._read_answer(method, interim + 1)
        if method == "HEAD" or status in (204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = await self._read_chunks()
        elif "content-length" in headers:
            body = await self._reader.readexactly(int(headers["content-length"]))
        else:
            body = await self._reader.read()
        return ClientAnswer(status, headers, body, interim)

    async def _read_head(self) -> tuple[int, dict[str, str]]:
        raw = await self._reader.readuntil(b"\r\n\r\n")
        status_line, *lines = raw[:-4].decode("latin-1").split("\r\n")
        pairs = [line.split(":", 1) for line in lines]
        headers = {name.lower(): value.strip() for name, value in pairs}
        assert len(headers) == len(pairs), f"a header came twice: {lines}"
        return int(status_line.split(" ")[1]), headers

    async def _read_chunks(self) -> bytes:
        body = b""
        while size := int(await self._reader.readline(), 16):
            body += await self._reader.readexactly(size)
            assert await self._reader.readexactly(2) == b"\r\n"
        assert await self._reader.readexactly(2) == b"\r\n"
        return body

    async def _read_rest(self) -> bytes:
        rest = b""
        try:
            while data := await self._reader.read(65536):
                rest += data
        except ConnectionError:
            pass
        return rest


# The proxy


@dataclass(slots=True)
class Proxy:
    """A proxy that listens in this process, and a key for it."""

    server: Server
    context: ServerContext
    port: int
    key: str
    records: list[Record]  # of all requests that have ended
    _clients: list[RawClient] = field(default_factory=list)

    async def connect(self, **options: Any) -> RawClient:
        """Open a client's connection; `options` are those of `asyncio.open_connection`."""
        client = RawClient(*await asyncio.open_connection("127.0.0.1", self.port, **options))
        self._clients.append(client)
        return client

    async def wait_for_records(self, count: int) -> list[Record]:
        """Wait until that many requests have ended."""
        await wait_until(lambda: len(self.records) >= count)
        return self.records

    async def aclose(self) -> None:
        """Close all clients, then the proxy."""
        for client in self._clients:
            await client.aclose()
        await self.server.aclose()


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that another part of this process will do."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.002)


StartProxy = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """Start a model server that answers everything with a short completion."""
    async with ScriptedUpstream(default=json_response(200, completion())) as running:
        yield running


@pytest.fixture
async def start_proxy(tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[StartProxy]:
    """Starts proxies in front of `upstream`; keywords are settings of `[server]`.

    `change` makes another config of the usual one.
    """
    started: list[Proxy] = []

    async def start(
        *,
        keys_required: bool = True,
        change: Callable[[Config], Config] | None = None,
        **settings: Any,
    ) -> Proxy:
        config = make_config(
            tmp_path / "records.db", upstream.port, keys_required=keys_required, **settings
        )
        if change is not None:
            config = change(config)
        store = Store(config.records.file)
        key, _ = store.create_key("test", kind="test")
        store.close()
        server = Server(config, await listen(config))
        await server.start()
        context = server._context
        assert context is not None
        records: list[Record] = []
        context.on_closed = records.append
        proxy = Proxy(server, context, server.addresses[0].port, key, records)
        started.append(proxy)
        return proxy

    yield start
    for proxy in started:
        await proxy.aclose()


@pytest.fixture
async def proxy(start_proxy: StartProxy) -> Proxy:
    """Start a proxy with the usual settings."""
    return await start_proxy()


async def listen(config: Config) -> Listeners:
    """Open the listening sockets of `config`."""
    listeners = Listeners()
    await listeners.listen(config.server.listen, lambda: False)
    return listeners


def make_config(
    records_file: os.PathLike[str],
    upstream_port: int,
    *,
    keys_required: bool = True,
    **settings: Any,
) -> Config:
    """Return a config with one provider on loopback, one model, and no fixed ports."""
    provider = Provider("scripted", "http", "127.0.0.1", upstream_port, "/v1")
    endpoint = Endpoint(provider.name, "upstream-model")
    wildcard = Endpoint(provider.name, "*")
    return Config(
        server=ServerSettings(
            **(
                {
                    "listen": (Address("127.0.0.1", 0),),
                    "metrics_listen": None,
                    "comment_after": 0.0,  # or a slow machine has them in its streams
                    "models_refresh": 0.0,  # or a script would meet a request that no test has made
                }
                | settings
            )
        ),
        keys=KeySettings(keys_required),
        records=RecordSettings(str(records_file)),
        log=LogSettings(access=False),
        providers={provider.name: provider},
        models=(Model(SLUG, (endpoint,)), Model("any/*", (wildcard,))),
    )


# Requests


def chat(
    key: str,
    body: object = QUESTION,
    *headers: str,
    path: str = "/v1/chat/completions",
    version: str = "1.1",
    framing: str | None = None,
) -> bytes:
    """Return a chat request. `framing` replaces the content-length line; `body` may be bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/{version}",
        "host: localhost",
        f"authorization: Bearer {key}",
        "content-type: application/json",
        f"content-length: {len(data)}" if framing is None else framing,
        *headers,
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1") + data


def get(
    path: str = "/v1/models", *headers: str, method: str = "GET", version: str = "1.1"
) -> bytes:
    """Return a request without a body."""
    lines = [f"{method} {path} HTTP/{version}", "host: localhost", *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
