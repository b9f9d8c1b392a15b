"""What the proxy adds to the first content and to each event: proxied against direct, in one run.

Starts a mock upstream and `hoberproxy serve`, sends both the same streams in alternating rounds and
checks every answer. The table goes to standard output, progress to standard error; README.md says
how to read the numbers. Exit code 1: a stream was not complete.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import mock_upstream
import orjson
import uvloop

SLUG = "bench/model"
TIMEOUT = 30.0  # seconds to start a process, and that a round may take over what its pace asks for
MAX_SECONDS, MAX_EVENTS = 900, 1_000_000  # of one run, so that a slip does not fill the machine
TICKS = os.sysconf("SC_CLK_TCK")
PROXY = [sys.executable, "-m", "hoberproxy"]
UPSTREAM = [sys.executable, str(Path(__file__).with_name("mock_upstream.py"))]
CONFIG = """\
server = {{ listen = "127.0.0.1:0", metrics_listen = "off" }}
records = {{ file = "{folder}/bench.db" }}
providers.bench.base_url = "http://127.0.0.1:{port}/v1"
models = [{{ slug = "{slug}", endpoints = [{{ provider = "bench", model = "{model}" }}] }}]
"""
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %b\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
)
CHUNK_SIZE = re.compile(rb"(?:\r\n)?[0-9a-f]+\r\n")  # the events themselves have no CR
OK = b"HTTP/1.1 200 "
LAST_CHUNK = b"\r\n0\r\n\r\n"
SENT = re.compile(rb'"sent_ns":([0-9]+)\}\n\n')


class Target(NamedTuple):
    """Where a round's streams go; `model` is asked for, and each event must carry it."""

    name: str
    port: int
    model: str


@dataclass(slots=True)
class Round:
    """Streams to one target: times in ns; wall and CPU (of each process) in seconds."""

    target: str
    streams: int
    wall: float = 0.0
    first_content: list[int] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)  # of content events, from write to read
    cpu: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One request on a connection of its own: notes pieces and times, to be read afterwards."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self.started = 0
        self.ended = asyncio.Event()
        self._tail = b""  # a last chunk may come in pieces

    def send(self, transport: asyncio.Transport, request: bytes) -> None:
        self.started = time.monotonic_ns()
        transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic_ns(), data))
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK or not self.pieces[0][1].startswith(OK):
            self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


def read_answer(
    pieces: Sequence[tuple[int, bytes]], events: int, model: str
) -> tuple[int, list[int]]:
    """When the first content was there (monotonic_ns), and each content event's delay in ns.

    ValueError unless the answer is whole: content in order, finish reason, usage, [DONE], end.
    """
    raw = b"".join(data for _, data in pieces)
    if not raw.startswith(OK):
        raise ValueError(f"expected status 200, got {raw[9:12].decode('latin-1') or 'nothing'}")
    _, _, framed = raw.partition(b"\r\n\r\n")
    *chunks, done, _ = CHUNK_SIZE.sub(b"", framed).split(b"\n\n")
    if done != b"data: [DONE]" or not raw.endswith(LAST_CHUNK):
        raise ValueError("expected [DONE] and a last chunk at the end, got another")
    parsed = [orjson.loads(each[6:]) for each in chunks if each.startswith(b"data: ")]
    *content, finish = [choice for each in parsed for choice in each["choices"]]
    texts = [choice["delta"]["content"] for choice in content]
    if texts != ["", *(f" tok{number}" for number in range(events))]:
        raise ValueError(f"expected {events} content events in order, got {len(texts) - 1}")
    if finish["finish_reason"] != "stop" or parsed[-1]["usage"]["completion_tokens"] != events:
        raise ValueError("expected a finish reason and the usage, got none or others")
    if any(each["model"] != model for each in parsed):
        raise ValueError(f"expected the model {model} in every event, got another")
    ends = list(accumulate(len(data) for _, data in pieces))
    timed = [  # an event is there when its last byte is
        (pieces[bisect_right(ends, sent.end() - 1)][0], int(sent[1])) for sent in SENT.finditer(raw)
    ][1 : events + 1]  # less the role, finish and usage
    return timed[0][0], [read - sent for read, sent in timed]


async def run_round(
    target: Target, key: str, options: argparse.Namespace, pids: dict[str, int]
) -> Round:
    """Open all connections, then start the streams, spread evenly over one pace."""
    loop, result = asyncio.get_running_loop(), Round(target.name, options.streams)
    request = make_request(key, target.model, options)
    connections = [
        await loop.create_connection(Stream, "127.0.0.1", target.port)
        for _ in range(options.streams)
    ]
    before, started = cpu_seconds(pids), loop.time()
    for number, (transport, stream) in enumerate(connections):
        after = options.pace * number / options.streams
        loop.call_later(after, stream.send, transport, request)
    with suppress(TimeoutError):
        async with asyncio.timeout((options.events + 2) * options.pace + TIMEOUT):
            for _, stream in connections:
                await stream.ended.wait()
    result.wall = loop.time() - started
    result.cpu = {name: spent - before[name] for name, spent in cpu_seconds(pids).items()}
    for transport, stream in connections:
        transport.abort()
        try:
            first, delays = read_answer(stream.pieces, options.events, target.model)
        except (ValueError, KeyError, TypeError) as exc:
            result.failures.append(f"{target.name}: {exc}")
        else:
            result.first_content.append(first - stream.started)
            result.delays += delays
    return result


async def run_rounds(
    targets: Sequence[Target], key: str, options: argparse.Namespace, pids: dict[str, int]
) -> list[Round]:
    """Both targets in turn, each first in every other round; round 0 is a warm-up."""
    rounds = []
    for number in range(options.rounds + 1):
        for target in targets if number % 2 else reversed(targets):
            result = await run_round(target, key, options, pids)
            ending = f"{len(result.failures)} incomplete, {result.wall:.2f} s"
            print(f"round {number} of {options.rounds}: {target.name}, {ending}", file=sys.stderr)
            if number or result.failures:
                rounds.append(result)
    return rounds


def cpu_seconds(pids: dict[str, int]) -> dict[str, float]:
    """User and system time so far: of processes to a clock tick, of this one exactly."""
    spent = {"client": time.process_time()}
    for name, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent[name] = (int(fields[11]) + int(fields[12])) / TICKS
    return spent


@contextmanager
def listening(*arguments: str, log: Path) -> Iterator[tuple[int, int]]:
    """Run a program that prints where it listens; gives its process id and port."""
    with (
        log.open("wb") as errors,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
            line = process.stdout.readline() if ready else b""
            port = re.search(rb"http://127\.0\.0\.1:([0-9]+)", line)
            if port is None:
                raise SystemExit(f"{shlex.join(arguments)} did not start:\n{log.read_text()}")
            yield process.pid, int(port[1])
        finally:
            process.kill()  # nothing of it is kept, and a drain could take minutes


def make_request(key: str, model: str, options: argparse.Namespace) -> bytes:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Measure the hop."}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "bench": {"events": options.events, "pace": options.pace},
    }
    data = orjson.dumps(body)
    return REQUEST % (key.encode(), len(data), data)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Round], int]:
    """Start both processes, run all rounds; returns them and the proxy's peak RSS in bytes."""
    config, model = folder / "bench.toml", mock_upstream.MODEL
    with listening(*UPSTREAM, log=folder / "upstream.log") as (upstream, port):
        config.write_text(CONFIG.format(folder=folder, port=port, slug=SLUG, model=model))
        create = [*PROXY, "keys", "create", "--label", "bench", "--config", str(config)]
        key = subprocess.run(create, capture_output=True, check=True, text=True).stdout.strip()
        targets = [Target("direct", port, model)]
        serve = (*PROXY, "serve", "--config", str(config))
        with listening(*serve, log=folder / "proxy.log") as (proxy, port):
            targets.append(Target("proxied", port, SLUG))
            pids = {"upstream": upstream, "proxy": proxy}
            rounds = uvloop.run(run_rounds(targets, key, options, pids))
            peak = re.search(r"VmHWM:\s+([0-9]+)", Path(f"/proc/{proxy}/status").read_text())
            return rounds, int(peak[1]) * 1024 if peak else 0


def quantiles(times_ns: Sequence[int]) -> dict[str, float]:
    """Nearest-rank p50 and p99 in µs."""
    ordered = sorted(times_ns) or [0]
    return {f"p{q}": ordered[-(-q * len(ordered) // 100) - 1] / 1000 for q in (50, 99)}


def summarize(rounds: Sequence[Round], rss: int) -> dict[str, Any]:
    """The numbers of a run; `added` is the difference of the quantiles, proxied less direct."""
    summary: dict[str, Any] = {}
    for name in ("direct", "proxied"):
        own = [each for each in rounds if each.target == name]
        summary[name] = {
            "streams": sum(each.streams for each in own),
            "complete": sum(len(each.first_content) for each in own),
            "events": sum(len(each.delays) for each in own),
            "first_content_us": quantiles([ns for each in own for ns in each.first_content]),
            "event_delay_us": quantiles([ns for each in own for ns in each.delays]),
        }
    direct, proxied = summary["direct"], summary["proxied"]
    summary["added"] = {
        name: {q: proxied[name][q] - direct[name][q] for q in proxied[name]}
        for name in ("first_content_us", "event_delay_us")
    }
    cpu = sum(each.cpu["proxy"] for each in rounds if each.target == "proxied")
    summary["proxy"] = {
        "cpu_seconds": cpu,
        "cpu_seconds_resolution": 1 / TICKS,
        "cpu_us_per_event": cpu / max(1, proxied["events"]) * 1e6,
        "cpu_us_per_stream": cpu / max(1, proxied["complete"]) * 1e6,
        "peak_rss_bytes": rss,
    }
    busiest = {name: max(r.cpu[name] / r.wall for r in rounds) for name in rounds[0].cpu}
    return summary | {"busiest_round_cpu_share": busiest}


def describe_machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("hoberproxy", "uvloop", "aiohttp", "orjson")
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "load_average": os.getloadavg(),
    }


def warn(summary: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    """Reasons not to trust the numbers."""
    for name in ("client", "upstream"):
        if (share := summary["busiest_round_cpu_share"][name]) > 0.7:
            yield f"the {name} took {share:.0%} of a core, so it is measured too: lower --streams"
    if summary["proxy"]["cpu_seconds"] * TICKS < 100:
        yield "the proxy's CPU is under 100 clock ticks, so it is coarse: raise --rounds"
    if machine["cores"] < 3:
        yield "client, upstream and proxy share fewer than three cores"
    if machine["load_average"][0] > machine["cores"] / 2:
        yield "the machine was busy before the start, so its other work is measured too"


def print_table(report: dict[str, Any]) -> None:
    machine, proxy = report["machine"], report["proxy"]
    print(report["command"])
    print(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}")
    print(", ".join(f"{name} {number}" for name, number in machine["versions"].items()))
    print("load average before: {:.2f} {:.2f} {:.2f}\n".format(*machine["load_average"]))
    print(f"{'µs':<24}{'direct':>10}{'proxied':>10}{'added':>10}")
    for name, label in (("first_content_us", "first content"), ("event_delay_us", "event delay")):
        for q in ("p50", "p99"):
            cells = (f"{report[each][name][q]:10.0f}" for each in ("direct", "proxied", "added"))
            print(f"{f'{label} {q}':<24}{''.join(cells)}")
    print(f"\nproxy CPU: {proxy['cpu_seconds']:.2f} s", end="")
    print(f" = {proxy['cpu_us_per_event']:.1f} µs per event", end="")
    print(f" = {proxy['cpu_us_per_stream']:.0f} µs per stream (the same time, divided twice)")
    print(f"proxy peak RSS: {proxy['peak_rss_bytes'] / 2**20:.1f} MiB")
    for name in ("direct", "proxied"):
        print("{complete} of {streams} streams complete, {events} events".format(**report[name]))
    for line in [*report["failures"][:10], *(f"warning: {each}" for each in report["warnings"])]:
        print(line)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=20, help="at a time (20)")
    parser.add_argument("--events", type=int, default=64, help="content events of a stream (64)")
    parser.add_argument("--pace", type=float, default=0.02, help="seconds between events (0.02)")
    parser.add_argument("--rounds", type=int, default=4, help="of each kind, after a warm-up (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    if min(options.streams, options.events, options.rounds) < 1 or not options.pace >= 0:
        parser.error("expected at least one stream, event and round, and a pace from 0 on")
    each = 2 * (options.rounds + 1) * options.events  # what one stream after the other sends
    if each * options.pace > MAX_SECONDS or each * options.streams > MAX_EVENTS:
        parser.error(f"expected at most {MAX_SECONDS} s and {MAX_EVENTS} events in all, got more")
    return options


def main() -> int:
    options, machine = parse_options(), describe_machine()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends what it started
    with tempfile.TemporaryDirectory(prefix="hoberproxy-bench-") as folder:
        rounds, rss = measure(options, Path(folder))
    summary = summarize(rounds, rss)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    report = summary | {
        "command": shlex.join(sys.orig_argv),
        "machine": machine,
        "settings": settings,
        "failures": [failure for each in rounds for failure in each.failures],
        "warnings": list(warn(summary, machine)),
        "rounds": [asdict(each) for each in rounds],
    }
    print_table(report)
    if options.json is not None:
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
