"""Load by wrk, a generator in C, which keeps a server's core full where bench.load cannot.

    python -m bench.saturate --url http://127.0.0.1:8080 --key K --server-pid 4711 --seconds 5

A few requests go first by bench.load, which looks at the answers; of the others wrk looks at
framing and status. The report has the form of bench.load's, as far as wrk reports it; CPU is of the
processes of `--server-pid`, in all and by what each does. Exit code 1: a request failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from .load import make_prompt
from .processes import environment, own_module
from .procfs import ProcessTree, core_seconds
from .scenarios import Traffic

SCRIPT = Path(__file__).with_name("wrk.lua")
PATH = "/v1/chat/completions"
CHECKED = 20  # requests whose answers are looked at
WARMUP = 1  # seconds
FULL = 0.9  # of its core: a server that has less is not saturated
FAILURES = ("connect", "read", "write", "status", "timeout")


def wrk_options(traffic: Traffic) -> list[str]:
    """Return what this program needs of `traffic` as arguments; the rest is the upstream's."""
    options = ["--connections", str(traffic.connections), "--seconds", f"{traffic.duration:.0f}"]
    if traffic.stream:
        options += ["--stream", "--events", str(traffic.events)]
    if traffic.prompt_bytes is not None:
        options += ["--prompt-bytes", str(traffic.prompt_bytes)]
    return options


class LoadError(Exception):
    """The load could not be sent, or an answer was wrong."""


def find_wrk() -> str | None:
    """Return the path of wrk; None if it is not installed (Debian: wrk)."""
    return shutil.which("wrk")


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent again and again."""

    url: str
    model: str
    key: str
    prompt_bytes: int
    events: int | None  # of a stream; None: not a stream
    tools_bytes: int = 0

    def body(self) -> bytes:
        """The body, as OpenAI's SDK writes it."""
        message = {"role": "user", "content": make_prompt(self.prompt_bytes)}
        body: dict[str, Any] = {"model": self.model, "messages": [message]}
        if self.events is not None:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.tools_bytes:
            body["tools"] = make_tools(self.tools_bytes)
        return orjson.dumps(body)

    def check(self) -> None:
        """Send a few, and look at the answers. Raises LoadError."""
        command = own_module("load", "--url", self.url, "--model", self.model)
        command += ["--requests", str(CHECKED), "--connections", "2"]
        if self.events is not None:
            command += ["--stream", "--events", str(self.events)]
        done = subprocess.run(
            command, env=environment(BENCH_KEY=self.key), capture_output=True, text=True
        )
        if done.returncode:
            raise LoadError(f"the answers are wrong:\n{done.stdout[-2000:]}{done.stderr[-1000:]}")


def make_tools(size: int) -> list[dict[str, Any]]:
    """Tools of about `size` bytes together, each of about a KB, as an agent's."""
    text = {"type": "string", "description": make_prompt(300)}
    properties = {"path": text, "content": text}
    parameters = {"type": "object", "properties": properties, "required": ["path"]}
    names = [f"tool_{number}" for number in range(max(1, size // 1000))]
    description = make_prompt(250)
    function = {"description": description, "parameters": parameters}
    return [{"type": "function", "function": {"name": name} | function} for name in names]


@contextmanager
def start_wrk(
    request: Request, connections: int, seconds: int, *, is_closing: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Start wrk, which sends requests for `seconds`; `counted_by` waits for its end.

    `is_closing`: each request has a separate connection.
    """
    program = find_wrk()
    if program is None:
        raise LoadError("expected wrk on the path, got none (Debian: wrk)")
    with tempfile.NamedTemporaryFile() as body:
        body.write(request.body())
        body.flush()
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
        command = [program, *options, "-s", str(SCRIPT), request.url + PATH, "--", body.name]
        variables = {"BENCH_KEY": request.key} | ({"BENCH_CLOSE": "1"} if is_closing else {})
        with subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def counted_by(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the end of wrk; return what it counted, times in µs. Raises LoadError."""
    output, _ = process.communicate()
    try:
        counted: dict[str, Any] = json.loads(output.strip().rpartition("\n")[2])
    except ValueError:
        raise LoadError(f"expected a report of wrk, got:\n{output[-300:]}") from None
    return counted


def run_wrk(request: Request, connections: int, seconds: int) -> dict[str, Any]:
    """Send requests for `seconds`; return what wrk counted. Raises LoadError."""
    with start_wrk(request, connections, seconds) as process:
        return counted_by(process)


class Meter:
    """CPU of a server and of a core from here on."""

    def __init__(self, pids: Sequence[int], core: int | None) -> None:
        self._tree = ProcessTree(pids) if pids else None
        self._core = core
        self._roles = self._tree.cpu_by_role() if self._tree else {}
        self._busy = None if core is None else core_seconds(core)
        self._started = time.monotonic()

    def read(self, requests: int, events: int) -> dict[str, Any]:
        """What the server took, divided by `requests` and `events`; empty without a server."""
        if self._tree is None:
            return {}
        wall = time.monotonic() - self._started
        roles = {
            name: seconds - self._roles.get(name, 0.0)
            for name, seconds in self._tree.cpu_by_role().items()
        }
        spent = sum(roles.values())
        return {
            "cpu_seconds": spent,
            "core_share": spent / wall,
            "cpu_us_per_request": spent / max(requests, 1) * 1e6,
            "cpu_us_per_event": spent / events * 1e6 if events else None,
            "by_role": {name: each / max(requests, 1) * 1e6 for name, each in roles.items()},
            "rss_peak_bytes": self._tree.memory_bytes()[1],
        }

    def core_share(self) -> float | None:
        """How busy the core was."""
        if self._core is None or self._busy is None:
            return None
        after = core_seconds(self._core)
        if after is None or after[1] <= self._busy[1]:
            return None
        return (after[0] - self._busy[0]) / (after[1] - self._busy[1])


def saturate(
    request: Request, connections: int, seconds: int, pids: Sequence[int], core: int | None
) -> dict[str, Any]:
    """Warm up, send the load, return the report. Raises LoadError."""
    request.check()
    run_wrk(request, connections, min(WARMUP, seconds))
    meter = Meter(pids, core)
    counted = run_wrk(request, connections, seconds)
    events = counted["requests"] * (request.events or 0)
    server = meter.read(counted["requests"], events)
    failed = sum(counted[name] for name in FAILURES)
    return {
        "requests": {
            "sent": counted["requests"] + failed,
            "complete": counted["requests"],
            "failed": failed,
        },
        "errors": {name: counted[name] for name in FAILURES if counted[name]},
        "events": events,
        "bytes": counted["bytes"],
        "seconds": counted["seconds"],
        "requests_per_second": counted["requests"] / counted["seconds"],
        "total_ms": {name: counted[name] / 1000 for name in ("p50", "p90", "p99", "max")},
        "server": server,
        "generator": {"core_share": meter.core_share(), "reasons": []},
        "warnings": _doubts(server),
        "upstream": None,
    }


def _doubts(server: dict[str, Any]) -> list[str]:
    share = server.get("core_share")
    if share is None or share >= FULL:
        return []
    return [f"the server had {share:.0%} of its core and was not saturated"]


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    total, server = report["total_ms"], report["server"]
    lines = [
        f"{report['requests_per_second']:,.0f} requests/s, {report['requests']['failed']} failed; "
        f"p50 {total['p50']:.2f} ms, p99 {total['p99']:.2f} ms"
    ]
    if server:
        roles = ", ".join(f"{name} {us:.1f}" for name, us in server["by_role"].items())
        lines.append(f"CPU {server['cpu_us_per_request']:.1f} µs per request ({roles})")
    return "\n".join([*lines, *report["warnings"]])


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.saturate", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--url", required=True, help="of the server, e.g. http://127.0.0.1:8080")
    add("--model", default="bench/model", help="the model of each request (bench/model)")
    add("--key", default=os.environ.get("BENCH_KEY", "bench"), help="(BENCH_KEY, or bench)")
    add("--connections", type=int, default=32, help="requests at a time (32)")
    add("--seconds", type=int, default=5, help="in which requests are sent (5)")
    add("--stream", action="store_true", help="ask for a stream")
    add("--events", type=int, default=64, help="content events of the upstream's streams (64)")
    add("--prompt-bytes", type=int, default=1000, help="size of the message (1000)")
    add("--server-pid", type=int, action="append", default=[], help="reports its CPU")
    add("--cpu", type=int, metavar="N", help="run on this core only")
    add("--json", type=Path, metavar="FILE", help="write the report there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    events = options.events if options.stream else None
    request = Request(
        options.url.rstrip("/"), options.model, options.key, options.prompt_bytes, events
    )
    try:
        report = saturate(
            request, options.connections, options.seconds, options.server_pid, options.cpu
        )
    except (LoadError, ProcessLookupError) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    print(render(report))
    if options.json is not None:
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE))
    return 1 if report["requests"]["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
