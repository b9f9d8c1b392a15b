"""Load on any OpenAI-compatible server: a closed loop of connections, or an open one of arrivals.

    python -m bench.load --url http://127.0.0.1:8080 --model M --key K --connections 50 \\
        --requests 1000 --stream

In an open loop times count from when a request was due, so that a server that makes us wait is not
spared (coordinated omission). README.md says how to read the report. Exit code 1: a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import math
import os
import resource
import shutil
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic_ns
from typing import Any, TextIO
from urllib.parse import urlsplit

import orjson
import uvloop

from .client import Client, Exchange, Results, Target, connect
from .histogram import Histogram
from .procfs import ProcessTree, core_seconds

HEARTBEAT = 0.01  # seconds; how late it comes tells whether we were
MAX_CONNECTING = 256  # at a time: more would overflow the server's backlog and wait for a second
BUSY_SHARE = 0.8  # of a core: beyond it our own work shows in the delays
BUSY_CORE = 0.95
LATE_NS = 5_000_000
_FILLER = "The quick brown fox jumps over the lazy dog and goes on to the next line. "


# Settings


def make_exchange(options: argparse.Namespace, host: str) -> Exchange:
    """The request's bytes, and what its answer must be."""
    body: dict[str, Any] = {
        "model": options.model,
        "messages": [{"role": "user", "content": make_prompt(options.prompt_bytes)}],
    }
    if options.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if not options.plain:
        body["bench"] = bench_settings(options)
    data = orjson.dumps(body)
    head = [
        f"POST {urlsplit(options.url).path.rstrip('/')}{options.path} HTTP/1.1",
        f"Host: {host}",
        f"Authorization: Bearer {options.key}",
        "Content-Type: application/json",
        "Accept: application/json",
        f"Content-Length: {len(data)}",
        *(["Connection: close"] if options.new_connection else []),
    ]
    return Exchange(
        "\r\n".join([*head, "", ""]).encode("latin-1") + data,
        options.stream,
        None if options.plain else options.events,
        None if options.plain else options.answer_bytes,
        options.read_rate,
    )


def bench_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the mock upstream reads of the body (mock_upstream.Settings)."""
    names = (
        "events event_bytes pace first_delay events_per_write block_bytes answer_bytes logprobs"
        " plain_events"
    ).split()
    settings = {name: getattr(options, name) for name in names}
    if options.upstream_fault:
        settings["fault"] = options.upstream_fault
    return settings


def make_prompt(size: int) -> str:
    """A text of so many bytes."""
    return (_FILLER * (size // len(_FILLER) + 1))[:size]


def resolve(url: str, allow_remote: bool) -> Target:
    """Where to connect. Raises ValueError for what is not on this machine, unless allowed."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected a URL such as http://127.0.0.1:8080, got another")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    family, _, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
    is_local = ipaddress.ip_address(address[0]).is_loopback
    if not is_local and not allow_remote:
        message = f"expected a server on this machine, got {parts.hostname}: say --allow-remote if"
        raise ValueError(f"{message} you may put load on it")
    tls = None
    if parts.scheme == "https":
        tls = ssl.create_default_context()
        if is_local:  # a throw-away certificate, and nobody in between
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
    where = (str(address[0]), int(address[1]))
    return Target(family, where, tls, parts.hostname if tls else None)


# A run


class Phase:
    """Requests from the first to the end of the last: `requests` of them, or begun in `duration`.

    Closed loop: `connections` requests at a time, begun over `ramp` seconds, each followed by the
    next at once. Open loop: `rate` a second, come what may; it grows to that over `ramp`.
    """

    def __init__(self, load: Load, requests: int | None, duration: float | None) -> None:
        options = load.options
        self._load = load
        self._requests = requests
        self.started = monotonic_ns()
        self._ends_at = None if duration is None else self.started + round(duration * 1e9)
        self._rate: float | None = options.rate
        self._ramp: float = options.ramp
        self._connections = options.connections or 0
        if requests is not None:
            self._connections = min(self._connections, requests)
        self._arrived = 0  # by the plan: in a closed loop, the first request of each connection
        self._stopped = False
        self._open = 0
        self._ended = asyncio.Event()
        self.results = Results()
        self.seconds = 0.0

    async def run(self) -> None:
        """Until the last answer."""
        self._arrive()
        await self._ended.wait()
        self.seconds = (monotonic_ns() - self.started) / 1e9

    def stop(self) -> None:
        """Begin no more."""
        self._stopped = True
        self._end_if_over()

    @property
    def share_done(self) -> float:
        """From 0 to 1, for the progress bar."""
        if self._requests is not None:
            return (self.results.complete + self.results.failed) / self._requests
        assert self._ends_at is not None, "either requests or duration is given"
        passed = (monotonic_ns() - self.started) / max(1, self._ends_at - self.started)
        return min(1.0, passed)

    def on_end(self, client: Client | None) -> None:
        """A request has ended. In a closed loop the next begins at once, on its connection."""
        self._open -= 1
        if self._rate is None and self._may_begin(monotonic_ns()):
            if client is None or client.is_closed:  # a server that refuses must not spin us
                is_refused = self.results.failed > self.results.complete
                self._load.loop.call_later(0.01 if is_refused else 0.0, self._begin_again)
                self._open += 1
                self._load.forget(client)
                return
            self._begin(monotonic_ns(), client)
        else:
            self._load.release(client)
        self._end_if_over()

    def _begin_again(self) -> None:
        self._open -= 1
        if self._may_begin(monotonic_ns()):
            self._begin(monotonic_ns(), None)
        self._end_if_over()

    def _begin(self, due: int, client: Client | None) -> None:
        self._open += 1
        self.results.sent += 1
        self._load.begin(self, due, client)

    def _may_begin(self, due: int) -> bool:
        if self._stopped or (self._requests is not None and self.results.sent >= self._requests):
            return False
        return self._ends_at is None or due < self._ends_at

    def _arrive(self) -> None:
        """Begin what is due by the plan, and come again for the next."""
        while self._has_arrivals():
            due = self._due()
            wait = due - monotonic_ns()
            if wait > 0:
                self._load.loop.call_later(max(wait / 1e9, 0.001), self._arrive)
                return
            self._arrived += 1
            self._begin(due if self._rate else monotonic_ns(), self._load.acquire())
        self._end_if_over()

    def _has_arrivals(self) -> bool:
        if self._rate:  # what was due in time is begun, however late we are
            return self._may_begin(self._due())
        return self._may_begin(monotonic_ns()) and self._arrived < self._connections

    def _due(self) -> int:
        """When the next arrival is due, by the monotonic clock (ns)."""
        return self.started + round(self._arrival(self._arrived) * 1e9)

    def _arrival(self, number: int) -> float:
        """Seconds from the start until arrival `number` is due."""
        if not self._rate:
            return self._ramp * number / self._connections
        in_ramp = self._rate * self._ramp / 2  # as many come while the rate grows evenly
        if number < in_ramp:
            return math.sqrt(2 * number * self._ramp / self._rate)
        return self._ramp + (number - in_ramp) / self._rate

    def _end_if_over(self) -> None:
        if not self._open and not self._has_arrivals():
            self._ended.set()


class Load:
    """All connections and phases of a run."""

    def __init__(self, options: argparse.Namespace, target: Target, exchange: Exchange) -> None:
        self.options = options
        self.loop = asyncio.get_running_loop()
        self._target = target
        self._exchange = exchange
        self._phase: Phase | None = None
        self._clients: set[Client] = set()
        self._idle: list[Client] = []  # the last released is the first taken
        self._tasks: set[asyncio.Task[None]] = set()
        self._connecting = asyncio.Semaphore(MAX_CONNECTING)
        self._connects = 0
        self._beats = 0
        self._is_counted = False
        self._interrupted = False
        self.late_ns = Histogram()
        self.progress = Progress(sys.stderr)

    async def run(self) -> tuple[Phase, Phase | None, Meter]:
        """The warm-up, if any, to its end; then what is counted."""
        options = self.options
        with suppress(NotImplementedError, RuntimeError):  # only the main thread has signals
            self.loop.add_signal_handler(signal.SIGINT, self.interrupt)
        beat = self.loop.create_task(self._beat(), name="heartbeat")
        try:
            warmup = await self._run_phase(options.warmup, None) if options.warmup else None
            meter = Meter(options)
            await meter.start()
            self._is_counted = True
            phase = await self._run_phase(options.requests, options.duration)
            await meter.stop()
        finally:
            beat.cancel()
            for client in list(self._clients):
                client.close()
            self.progress.clear()
        return phase, warmup, meter

    def interrupt(self) -> None:
        """Ctrl-C: report what there is."""
        self._interrupted = True
        if self._phase is not None:
            self._phase.stop()
        for client in list(self._clients):
            client.fail("interrupted")

    async def _run_phase(self, requests: int | None, duration: float | None) -> Phase:
        self._phase = phase = Phase(self, requests, duration)
        if self._interrupted:
            phase.stop()
        await phase.run()
        return phase

    # Connections

    def acquire(self) -> Client | None:
        """An idle connection, if there is one that still lives."""
        while self._idle:
            client = self._idle.pop()
            if client.is_idle:
                return client
            self.forget(client)
        return None

    def _on_end(self, client: Client) -> None:
        assert self._phase is not None, "a request belongs to a phase"
        self._phase.on_end(client)

    def release(self, client: Client | None) -> None:
        if client is not None and client.is_idle:
            self._idle.append(client)
        else:
            self.forget(client)

    def forget(self, client: Client | None) -> None:
        if client is not None:
            self._clients.discard(client)

    def begin(self, phase: Phase, due: int, client: Client | None) -> None:
        """Send a request, on a connection of its own if none is given."""
        if client is not None:
            client.begin(phase.results, due)
            return
        task = self.loop.create_task(self._connect(phase, due), name="connect")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, phase: Phase, due: int) -> None:
        self._connects += 1
        options = self.options
        try:
            async with self._connecting, asyncio.timeout(options.timeout):
                number, exchange = self._connects - 1, self._exchange
                client = await connect(self._target, exchange, number, self._on_end)
            if not client.is_idle:
                raise ConnectionError("expected a connection to stay open, got its end")
        except (OSError, TimeoutError) as exc:
            phase.results.errors[_connect_error(exc)] += 1
            phase.on_end(None)
            return
        self._clients.add(client)
        # A connection that is kept is no part of a request's time; one per request, and the time
        # that an arrival had to wait for it, are.
        counts = options.new_connection or options.rate
        client.begin(phase.results, due if counts else monotonic_ns())

    # The heartbeat

    async def _beat(self) -> None:
        while True:
            due = monotonic_ns() + round(HEARTBEAT * 1e9)
            await asyncio.sleep(HEARTBEAT)
            if self._is_counted:
                self.late_ns.record(monotonic_ns() - due)
            self._beats += 1
            if self._beats % 20 == 0 and self._phase is not None:
                self.progress.show(self._phase, self._is_counted)
            if self._beats % 50 == 0:
                self._expire()

    def _expire(self) -> None:
        oldest = monotonic_ns() - round(self.options.timeout * 1e9)
        for client in [each for each in self._clients if each.began < oldest]:
            client.fail("timeout")


def _connect_error(exc: BaseException) -> str:
    if isinstance(exc, TimeoutError):
        return "connect_timeout"
    if isinstance(exc, ConnectionRefusedError):
        return "connect_refused"
    return "connect_tls" if isinstance(exc, ssl.SSLError) else "connect"


class Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_on = out.isatty()

    def show(self, phase: Phase, is_counted: bool) -> None:
        if not self._is_on:
            return
        results, share = phase.results, phase.share_done
        bar = "#" * round(share * 24)
        seconds = (monotonic_ns() - phase.started) / 1e9
        label = "" if is_counted else "warm-up "
        text = (
            f"\r{label}[{bar:<24}] {share:4.0%} {results.complete:,} complete, "
            f"{results.failed:,} failed, {results.events / seconds:,.0f} events/s"
        )
        width = shutil.get_terminal_size().columns
        self._out.write(f"{text[:width]}\x1b[K")
        self._out.flush()

    def clear(self) -> None:
        if self._is_on:
            self._out.write("\r\x1b[K")
            self._out.flush()


# What it cost


class Meter:
    """CPU and memory of the server and of ourselves while requests are counted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._tree = ProcessTree(options.server_pid) if options.server_pid else None
        self._mock: str | None = options.mock_url
        cores = os.sched_getaffinity(0)
        self._core = next(iter(cores)) if len(cores) == 1 else None
        self.server: dict[str, Any] = {}
        self.upstream: dict[str, Any] | None = None
        self.cpu_share = 0.0
        self.core_share: float | None = None

    async def start(self) -> None:
        if self._mock:
            await fetch(self._mock, "/bench/stats?reset=1")
        if self._tree is not None:
            self._tree.reset_peak()
            self._server_cpu = self._tree.cpu_seconds()
            self.server["rss_start_bytes"] = self._tree.memory_bytes()[0]
        self._core_before = None if self._core is None else core_seconds(self._core)
        self._wall, self._own = time.monotonic(), time.process_time()

    async def stop(self) -> None:
        wall = max(time.monotonic() - self._wall, 1e-9)
        self.cpu_share = (time.process_time() - self._own) / wall
        if self._core is not None and self._core_before is not None:
            after = core_seconds(self._core)
            if after is not None and after[1] > self._core_before[1]:
                busy, whole = (a - b for a, b in zip(after, self._core_before, strict=True))
                self.core_share = busy / whole
        if self._tree is not None:
            self.server["cpu_seconds"] = self._tree.cpu_seconds() - self._server_cpu
            self.server["rss_peak_bytes"] = self._tree.memory_bytes()[1]
            self.server["processes"] = len(self._tree.pids())
        if self._mock:
            self.upstream = orjson.loads(await fetch(self._mock, "/bench/stats"))


async def fetch(url: str, path: str) -> bytes:
    """The body of a small GET on this machine."""
    target = resolve(url, allow_remote=False)
    reader, writer = await asyncio.open_connection(
        *target.address, ssl=target.tls, server_hostname=target.server_name
    )
    try:
        writer.write(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        return await reader.readexactly(length)
    finally:
        writer.close()


# The report


def make_report(load: Load, phase: Phase, warmup: Phase | None, meter: Meter) -> dict[str, Any]:
    results, options = phase.results, load.options
    doubts = list(find_doubts(meter, load.late_ns))
    hidden = {"key", "json"}
    return {
        "settings": {k: v for k, v in vars(options).items() if k not in hidden},
        "requests": {
            "sent": results.sent,
            "complete": results.complete,
            "failed": results.failed,
            "warmup": warmup.results.sent if warmup else 0,
            "warmup_failed": warmup.results.failed if warmup else 0,
        },
        "errors": dict(results.errors.most_common()),
        "events": results.events,
        "bytes": results.received_bytes,
        "seconds": phase.seconds,
        "first_content_ms": _summary(results.first_content_ns, 1e6),
        "event_delay_us": _summary(results.event_delay_ns, 1e3),
        "gap_ms": _summary(results.gap_ns, 1e6),
        "total_ms": _summary(results.total_ns, 1e6),
        "tokens_per_second": _summary(results.rate_milli, 1e3),
        "server": _server(meter, results),
        "generator": {
            "cpu_share": meter.cpu_share,
            "core_share": meter.core_share,  # of its core, with all that runs there; if pinned
            "late_wakeups_ms": _summary(load.late_ns, 1e6),
            "is_bottleneck": bool(doubts),
            "reasons": doubts,
        },
        "upstream": meter.upstream,
    }


def _summary(histogram: Histogram, unit: float) -> dict[str, Any]:
    return asdict(histogram.summary(unit))


def _server(meter: Meter, results: Results) -> dict[str, Any] | None:
    if not meter.server:
        return None
    spent = meter.server["cpu_seconds"] * 1e6
    per_request = spent / results.complete if results.complete else None
    per_event = spent / results.events if results.events else None
    return meter.server | {"cpu_us_per_request": per_request, "cpu_us_per_event": per_event}


def find_doubts(meter: Meter, late_ns: Histogram) -> list[str]:
    """Signs that we were measured, not the server."""
    doubts = []
    if meter.cpu_share > BUSY_SHARE:
        doubts.append(f"the generator took {meter.cpu_share:.0%} of a core")
    if meter.core_share is not None and meter.core_share > BUSY_CORE:
        doubts.append(f"the generator's core was busy for {meter.core_share:.0%} of the time")
    late = late_ns.percentile(99)
    if late > LATE_NS:
        doubts.append(f"the generator woke up {late / 1e6:.1f} ms late at p99")
    return doubts


ROWS = (
    ("first_content_ms", "first content, ms"),
    ("event_delay_us", "event delay, µs"),
    ("gap_ms", "gap between events, ms"),
    ("total_ms", "whole answer, ms"),
    ("tokens_per_second", "tokens/s of a stream"),
)


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    requests, seconds = report["requests"], max(report["seconds"], 1e-9)
    lines = [
        "{complete:,} of {sent:,} requests complete, {failed:,} failed".format(**requests)
        + f", in {seconds:.2f} s: {requests['complete'] / seconds:,.0f} requests/s, "
        f"{report['events'] / seconds:,.0f} events/s, {report['bytes'] / seconds / 1e6:.2f} MB/s",
        "",
        f"{'':<24}{'p50':>10}{'p90':>10}{'p99':>10}{'p99.9':>10}{'max':>10}{'mean':>10}",
    ]
    for name, label in ROWS:
        if report[name]["count"]:
            lines.append(_row(label, report[name]))
    late = (report["upstream"] or {}).get("late_us")
    if late and late["count"]:
        lines.append(_row("mock upstream late, µs", late))
    lines += ["", *_costs(report)]
    lines += [f"error {kind}: {count:,}" for kind, count in report["errors"].items()]
    if requests["warmup_failed"]:
        lines.append(f"warning: {requests['warmup_failed']:,} requests of the warm-up failed")
    lines += [f"warning: {doubt}" for doubt in report["generator"]["reasons"]]
    return "\n".join(lines)


def _row(label: str, summary: dict[str, Any]) -> str:
    names = ("p50", "p90", "p99", "p999", "max", "mean")
    return f"{label:<24}" + "".join(f"{summary[name]:10.2f}" for name in names)


def _costs(report: dict[str, Any]) -> list[str]:
    generator, server = report["generator"], report["server"]
    late = generator["late_wakeups_ms"]["p99"] or 0.0
    lines = [f"generator: {generator['cpu_share']:.0%} of a core, p99 {late:.1f} ms late"]
    if server:
        costs = [f"server: {server['cpu_seconds']:.2f} s CPU"]
        for name, label in (("cpu_us_per_request", "request"), ("cpu_us_per_event", "event")):
            if server[name] is not None:
                costs.append(f"{server[name]:.1f} µs per {label}")
        costs.append(f"peak {server['rss_peak_bytes'] / 2**20:.1f} MiB")
        lines.append(", ".join(costs))
    return lines


# The command


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--url", required=True, help="of the server, e.g. http://127.0.0.1:8080")
    add("--path", default="/v1/chat/completions", help="after the URL (/v1/chat/completions)")
    add("--model", default="bench/model", help="asked for (bench/model)")
    add("--key", default=os.environ.get("BENCH_KEY", "bench"), help="(BENCH_KEY, or bench)")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--connections", type=int, help="closed loop: requests at a time (20)")
    loop.add_argument("--rate", type=float, help="open loop: requests that arrive a second")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--requests", type=int, help="in all, after the warm-up (200)")
    length.add_argument("--duration", type=float, help="seconds in which requests are begun")
    add("--stream", action="store_true", help="ask for a stream")
    add("--prompt-bytes", type=int, default=1000, help="size of the message (1000)")
    add("--ramp", type=float, default=0.0, help="seconds over which the load grows (0)")
    add("--warmup", type=int, default=0, help="requests before, which are not counted (0)")
    add("--new-connection", action="store_true", help="one for each request")
    add("--read-rate", type=float, help="bytes a second that each connection reads at most")
    add("--timeout", type=float, default=120.0, help="seconds that an answer may take (120)")
    add("--plain", action="store_true", help="not the bench's mock: send no `bench`, parse events")
    add("--events", type=int, default=64, help="mock: content events of a stream (64)")
    add("--event-bytes", type=int, default=200, help="mock: size of an event (200, at least 352)")
    add("--pace", type=float, default=0.02, help="mock: seconds between writes (0.02)")
    add("--first-delay", type=float, default=0.0, help="mock: seconds to the first content (0)")
    add("--events-per-write", type=int, default=1, help="mock: events in a chunk (1)")
    add("--block-bytes", type=int, default=65_536, help="mock: sent at once without a pace (65536)")
    add("--answer-bytes", type=int, default=200, help="mock: text of a plain answer (200)")
    add("--logprobs", action="store_true", help="mock: events with logprobs")
    add("--plain-events", action="store_true", help="mock: without what OpenAI adds to events")
    add("--upstream-fault", default="", help="mock: status:N stall cut reset error slow-head:S")
    add("--mock-url", help="of the mock, to tell how late it was")
    add(
        "--server-pid",
        type=int,
        action="append",
        default=[],
        help="whose CPU is reported; repeatable",
    )
    add("--cpu", type=int, metavar="N", help="run on this core only")
    add("--json", type=Path, metavar="FILE", help="write the report there")
    add("--allow-remote", action="store_true", help="the server may be another machine's")
    options = parser.parse_args(argv)
    _complete_options(parser, options)
    return options


def _complete_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.rate is None and options.connections is None:
        options.connections = 20
    if options.requests is None and options.duration is None:
        options.requests = 200
    if options.allow_remote:
        options.plain = True
    for name in ("connections", "requests", "duration", "rate", "read_rate", "events", "timeout"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"expected --{name.replace('_', '-')} to be more than 0, got {value}")
    for name in ("ramp", "warmup", "pace", "first_delay", "prompt_bytes"):
        if not 0 <= getattr(options, name) < math.inf:
            parser.error(f"expected --{name.replace('_', '-')} to be 0 or more, got less")
    if any(each in options.key + options.path for each in "\r\n"):
        parser.error("expected a key and a path of one line, got more")


async def run(options: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Send the load; the report as JSON values."""
    host = urlsplit(options.url).netloc.rpartition("@")[2]
    load = Load(options, target, make_exchange(options, host))
    phase, warmup, meter = await load.run()
    return make_report(load, phase, warmup, meter)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    try:
        target = resolve(options.url, options.allow_remote)
        ProcessTree(options.server_pid)
    except (ValueError, OSError) as exc:
        print(f"cannot start: {exc}", file=sys.stderr)
        return 2
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()  # a collection over 10,000 streams would be in their delays
    report = uvloop.run(run(options, target))
    print(render(report))
    if options.json is not None:
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE))
    return 1 if report["requests"]["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
