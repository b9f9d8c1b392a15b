"""A scripted upstream on real sockets: what a model server sends, stalls, cuts and resets.

A test gives one script (a sequence of steps) per request and reads back what the upstream saw.
A connection stays open after its script, as with keepalive, unless a step closes it; a peer that
hangs up ends the running script and sets `lost`. The requests it accepts are well formed:
Content-Length or none, since the proxy sends nothing else.

    async with ScriptedUpstream(sse(*stream_events(3))) as upstream:
        ...  # drive the proxy against upstream.base_url
        assert upstream.requests[0].json()["model"] == "upstream-model"
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import socket
import ssl
import struct
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import trustme

from tests.support.patience import WAIT

# Steps


@dataclass(frozen=True, slots=True)
class Send:
    """Write bytes, and wait until the peer has taken enough of them."""

    data: bytes


@dataclass(frozen=True, slots=True)
class SendMany:
    """Write from a generator, with backpressure: 100 MB without holding them."""

    chunks: Iterable[bytes]


@dataclass(frozen=True, slots=True)
class Pause:
    """Say nothing for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class AwaitRelease:
    """Say nothing until the test calls `upstream.release(name)`, or the peer hangs up."""

    name: str


@dataclass(frozen=True, slots=True)
class Stall:
    """Say nothing more until the peer hangs up."""


@dataclass(frozen=True, slots=True)
class Close:
    """End the connection in order, after all that was written."""


@dataclass(frozen=True, slots=True)
class Reset:
    """End the connection with a TCP reset; what waits in this process's buffer is dropped."""


Step = Send | SendMany | Pause | AwaitRelease | Stall | Close | Reset
Script = Sequence[Step]


# Requests that have come


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A request as it arrived. `headers` has lower-case names; of a repeated one, the last."""

    head: bytes
    body: bytes
    method: str
    path: str
    headers: Mapping[str, str]
    header_list: Sequence[tuple[str, str]]
    connection: int  # number of its connection, from 0, in order of arrival
    lost: asyncio.Event  # set when its connection is gone, whoever ended it
    finished: asyncio.Event  # set when the script has run to its end: never, if the peer left

    def json(self) -> Any:
        """Return the parsed body."""
        return json.loads(self.body)


Answer = Script | Callable[[SeenRequest], Script]


class ScriptedUpstream:
    """Serves one script per request, in the order given; `default` when they are used up.

    A script may be a function of the request. `on_connect` runs once per connection before
    anything is read: `[Close()]`, `[Reset()]`, or `[Stall()]` for a black hole. Without a default
    a request too many is answered 500 and fails the test on leaving the context.
    """

    def __init__(
        self,
        *scripts: Answer,
        default: Answer | None = None,
        on_connect: Script = (),
        tls: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        self.requests: list[SeenRequest] = []
        self.opened: list[Connection] = []
        self.port = 0
        self.failures: list[BaseException] = []
        self._scripts = deque(scripts)
        self._default = default
        self._on_connect = on_connect
        self._tls = tls
        self._host = host
        self._released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._arrived = asyncio.Condition()

    # What the test reads

    @property
    def base_url(self) -> str:
        """The URL with /v1, as in a provider's config."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}/v1"

    @property
    def connections(self) -> int:
        """The number of connections accepted so far."""
        return len(self.opened)

    @property
    def open_connections(self) -> int:
        """The number of connections that are open now."""
        return sum(not connection.lost.is_set() for connection in self.opened)

    @property
    def ca_file(self) -> str:
        """The path of the certificate authority to trust, with `tls=True`."""
        return _certificates()[1]

    # What the test does

    def add(self, *scripts: Answer) -> None:
        """Queue scripts for further requests."""
        self._scripts.extend(scripts)

    def release(self, name: str) -> None:
        """Let every script go on that waits, or will wait, at `AwaitRelease(name)`."""
        self._released[name].set()

    async def wait_for_requests(self, count: int = 1) -> SeenRequest:
        """Wait until `count` requests have arrived; return the last of them."""
        async with asyncio.timeout(WAIT), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    async def wait_for_hangup(self, request: int = 0) -> None:
        """Wait until the connection of a request, counted from 0, is gone."""
        seen = await self.wait_for_requests(request + 1)
        async with asyncio.timeout(WAIT):
            await seen.lost.wait()

    # Life

    async def __aenter__(self) -> ScriptedUpstream:
        loop = asyncio.get_running_loop()
        context = _certificates()[0] if self._tls else None
        self._server = await loop.create_server(
            lambda: Connection(self), self._host, 0, ssl=context, backlog=4096
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for connection in self.opened:
            connection.abort()
        for connection in self.opened:
            await connection.wait_closed()
        if failure is None and self.failures:
            raise AssertionError("the upstream's script failed") from self.failures[0]

    # For its connections

    async def _receive(self, seen: SeenRequest) -> Script:
        async with self._arrived:
            self.requests.append(seen)
            answer = self._scripts.popleft() if self._scripts else self._default
            self._arrived.notify_all()
        if answer is None:
            self.failures.append(AssertionError(f"no script for {seen.method} {seen.path}"))
            return json_response(500, {"error": {"message": "the test has no script for this"}})
        return answer(seen) if callable(answer) else answer

    async def _await_release(self, name: str) -> None:
        await self._released[name].wait()


class Connection(asyncio.Protocol):
    """One accepted connection: reads requests, runs their scripts one after the other.

    `lost` is set as soon as the peer's end of file or reset is seen, also in mid-script.
    """

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.lost = asyncio.Event()
        self._closed = asyncio.Event()
        self._upstream = upstream
        self._received = bytearray()
        self._more = asyncio.Event()
        self._writable = asyncio.Event()

    # Callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's
        self._writable.set()
        self.number = len(self._upstream.opened)
        self._upstream.opened.append(self)
        self._task = asyncio.get_running_loop().create_task(self._run())

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._more.set()

    def eof_received(self) -> None:
        self._lose()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose()
        self._closed.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _lose(self) -> None:
        self.lost.set()
        self._task.cancel()

    def abort(self) -> None:
        """Cut the connection, and cancel its script."""
        self._transport.abort()
        self._task.cancel()

    async def wait_closed(self) -> None:
        """Wait until no task of the connection runs any more."""
        await self._closed.wait()
        await asyncio.wait([self._task])

    # The conversation

    async def _run(self) -> None:
        try:
            await self._play(self._upstream._on_connect)
            while not self._transport.is_closing():
                seen = await self._read_request()
                await self._play(await self._upstream._receive(seen))
                seen.finished.set()
        except asyncio.CancelledError:
            pass  # the peer hung up or the test is over: both are ordinary ends here
        except BaseException as exc:
            self._upstream.failures.append(exc)
            self._transport.abort()

    async def _play(self, script: Script) -> None:
        for step in script:
            if self._transport.is_closing():
                return
            await self._take(step)

    async def _take(self, step: Step) -> None:
        match step:
            case Send(data):
                await self._send(data)
            case SendMany(chunks):
                for data in chunks:
                    await self._send(data)
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case AwaitRelease(name):
                await self._upstream._await_release(name)
            case Stall():
                await self.lost.wait()
            case Close():
                self._transport.close()
            case Reset():
                self._reset()

    async def _send(self, data: bytes) -> None:
        self._transport.write(data)
        await self._writable.wait()
        # Each write is a packet of its own, so that the peer sees the cuts that the test made;
        # without the turn of the loop, uvloop would join them.
        await asyncio.sleep(0)

    def _reset(self) -> None:
        # On a copy of the descriptor: uvloop's stand-in for a socket has no setsockopt.
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # Reading

    async def _read_request(self) -> SeenRequest:
        end = await self._read_until(b"\r\n\r\n")
        head = self._take_bytes(end)
        request_line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, path, _ = request_line.split(" ")
        pairs = [(name, value.strip()) for name, _, value in (ln.partition(":") for ln in lines)]
        headers = {name.lower(): value for name, value in pairs}
        length = int(headers.get("content-length", 0))
        while len(self._received) < length:
            await self._await_bytes()
        body = self._take_bytes(length)
        return SeenRequest(
            head, body, method, path, headers, pairs, self.number, self.lost, asyncio.Event()
        )

    async def _read_until(self, mark: bytes) -> int:
        while (found := self._received.find(mark)) < 0:
            await self._await_bytes()
        return found + len(mark)

    async def _await_bytes(self) -> None:
        self._more.clear()
        await self._more.wait()

    def _take_bytes(self, count: int) -> bytes:
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken


# Answers

LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def serialize_head(status: int, headers: Iterable[tuple[str, str]], reason: str = "") -> bytes:
    """Return a response head; unless given, the reason is empty, as HTTP/2 gateways leave it."""
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


def chunk(data: bytes) -> bytes:
    """Return one chunk of the chunked framing (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: object) -> bytes:
    """Return one SSE event around a JSON value."""
    return b"data: %b\n\n" % json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def sse_head(*headers: tuple[str, str], chunked: bool = True) -> Send:
    """Return the head of a stream; without chunked framing the body ends with the connection."""
    framing = ("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")
    return Send(serialize_head(200, [("Content-Type", "text/event-stream"), framing, *headers]))


def sse(
    *events: bytes,
    headers: Iterable[tuple[str, str]] = (),
    chunked: bool = True,
    packed: int = 1,
    per_write: int = 1,
    pace: float = 0.0,
    complete: bool = True,
    close: bool = False,
) -> list[Step]:
    """Return a stream: `packed` events in an HTTP chunk, `per_write` of those in a write.

    `pace` is the pause between writes, in seconds. `complete=False` closes without the last
    chunk: a cut stream. `close` closes after a complete one, without having said so: llama.cpp's
    habit.
    """
    grouped = [b"".join(events[at : at + packed]) for at in range(0, len(events), packed)]
    frames = [chunk(group) if chunked else group for group in grouped]
    if chunked and complete:
        frames.append(LAST_CHUNK)
    steps: list[Step] = [sse_head(*headers, chunked=chunked)]
    for at in range(0, len(frames), per_write):
        if pace and at:
            steps.append(Pause(pace))
        steps.append(Send(b"".join(frames[at : at + per_write])))
    if close or not complete or not chunked:
        steps.append(Close())
    return steps


def json_response(
    status: int, value: object, *headers: tuple[str, str], close: bool = False
) -> list[Step]:
    """Return a JSON answer with its length (bytes are sent as they are); `close` closes after."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers]
    if close:
        fields.append(("Connection", "close"))
    steps: list[Step] = [Send(serialize_head(status, fields) + body)]
    return [*steps, Close()] if close else steps


def dribble(script: Script, size: int = 1, pace: float = 0.0) -> list[Step]:
    """Return the script with every `Send` cut into writes of `size` bytes."""
    steps: list[Step] = []
    for step in script:
        if not isinstance(step, Send):
            steps.append(step)
            continue
        for at in range(0, len(step.data), size):
            steps.append(Send(step.data[at : at + size]))
            steps += [Pause(pace)] if pace else []
    return steps


@dataclass(frozen=True, slots=True)
class Words:
    """The parts of a realistic answer; `usage` is (prompt tokens, completion tokens)."""

    model: str = "upstream-model"
    id: str = "chatcmpl-upstream-1"
    created: int = 1_700_000_000
    usage: tuple[int, int] | None = (7, 3)
    finish_reason: str = "stop"
    extra: Mapping[str, Any] = field(default_factory=dict)  # further top-level members

    def envelope(self, kind: str) -> dict[str, Any]:
        """Return the members that come before the choices."""
        base = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**base, **self.extra}

    @property
    def usage_object(self) -> dict[str, int] | None:
        """Return OpenAI's usage object."""
        if self.usage is None:
            return None
        prompt, completion = self.usage
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def stream_events(
    count: int = 3, *, done: bool = True, null_usage: bool = False, **words: Any
) -> list[bytes]:
    """Return events: role, `count` with content, finish, usage with empty choices, `[DONE]`.

    Keywords are those of `Words`. `null_usage` puts `"usage":null` on the others, as OpenAI does.
    """
    say = Words(**words)
    tail: dict[str, Any] = {"usage": None} if null_usage else {}
    envelope = say.envelope("chat.completion.chunk")

    def choice(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        return event({**envelope, "choices": choices, **tail})

    events = [choice({"role": "assistant", "content": ""})]
    events += [choice({"content": f" word{number}"}) for number in range(count)]
    events.append(choice({}, say.finish_reason))
    if say.usage is not None:
        events.append(event({**envelope, "choices": [], "usage": say.usage_object}))
    return [*events, DONE] if done else events


def completion(text: str = "hello", **words: Any) -> dict[str, Any]:
    """Return the object of an answer that is no stream; keywords are those of `Words`."""
    say = Words(**words)
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": say.finish_reason}
    whole = {**say.envelope("chat.completion"), "choices": [choice]}
    return whole if say.usage is None else {**whole, "usage": say.usage_object}


# Addresses and certificates


@contextmanager
def refused_port() -> Iterator[int]:
    """Yield a loopback port that refuses connections: bound for this test, and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@cache
def _certificates() -> tuple[ssl.SSLContext, str]:
    """Return a server context for this machine's names, and the file of the authority to trust."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1", "::1").configure_cert(context)
    folder = Path(tempfile.mkdtemp(prefix="hoberproxy-test-ca-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return context, str(path)
