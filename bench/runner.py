"""One run: a server between the generator and the mock upstream, measured and ended.

A server is started again for every run, so that no run has the memory or the connections of the
one before, and nothing but the server under test is awake on its core.
"""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

from .c_upstream import c_upstream, find_compiler
from .certificates import Certificates
from .machine import Cores
from .mock_answers import Settings
from .peers import MODEL, Peer, Wiring, create_key
from .processes import (
    StartError,
    as_installed,
    dead_port,
    free_port,
    own_module,
    read_line,
    running,
    wait_listening,
    wait_quiet,
)
from .procfs import ProcessTree, core_seconds
from .saturate import find_wrk, wrk_options
from .scenarios import DIRECT, MEASURES, PROXY_WITH_LOG, ROLES, Scenario, Variant

PATIENCE = 60.0  # seconds that a run may take over what its pace asks for
STEADY_PATIENCE = 60.0
POLL = 0.2
BUSY_SHARE = 0.1  # of the server's core that others may have before the report says so
LATE_US = 5_000


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: a peer and its program, or the upstream itself."""

    name: str
    peer: Peer | None = None
    program: str = ""


@dataclass(slots=True)
class Run:
    """`values` by measure; empty if anything failed, which `problem` tells."""

    round: int
    variant: str
    target: str
    values: dict[str, float] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)  # the generator's report
    steady: dict[str, float] = field(default_factory=dict)  # while all streams were open
    around: dict[str, float] = field(default_factory=dict)  # over the whole run
    problem: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Started:
    """A server that runs; without processes of its own if it is the upstream, not measured."""

    port: int
    pid: int | None = None
    tree: ProcessTree | None = None


@dataclass(frozen=True, slots=True)
class Upstream:
    """A mock upstream that runs."""

    port: int
    ca_file: Path | None = None

    @property
    def url(self) -> str:
        return f"http{'' if self.ca_file is None else 's'}://127.0.0.1:{self.port}"

    def stats(self) -> dict[str, Any]:
        """What it counted since its start."""
        connection: HTTPConnection
        if self.ca_file is None:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        else:
            context = ssl.create_default_context(cafile=str(self.ca_file))
            connection = HTTPSConnection("127.0.0.1", self.port, timeout=10, context=context)
        try:
            connection.request("GET", "/bench/stats")
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()


@contextmanager
def upstream(folder: Path, cores: Cores, certificates: Certificates | None) -> Iterator[Upstream]:
    """Start the mock upstream, over TLS with certificates."""
    options = ["--port", "0", "--cpu", str(cores.upstream)]
    if certificates is not None:
        options += ["--tls-cert", str(certificates.cert_file)]
        options += ["--tls-key", str(certificates.key_file)]
    log = folder / "upstream.log"
    command = own_module("mock_upstream", *options)
    with running(command, log, cores.upstream, tells=True) as process:
        port = int(json.loads(read_line(process, log))["port"])
        yield Upstream(port, certificates.ca_file if certificates else None)


@contextmanager
def fast_upstream(folder: Path, cores: Cores, variant: Variant) -> Iterator[Upstream]:
    """Start the upstream in C; all its streams are as `variant` has them."""
    traffic = variant.traffic
    settings = Settings(block_bytes=0, plain_events=traffic.plain_events)
    if traffic.events and traffic.event_bytes:
        settings = replace(settings, events=traffic.events, event_bytes=traffic.event_bytes)
    with c_upstream(folder, cores.upstream, settings) as port:
        yield Upstream(port)


def lacking(scenario: Scenario) -> str:
    """Name what this machine lacks for a scenario; empty if nothing is lacking."""
    if not scenario.is_saturating:
        return ""
    needed = {"wrk (Debian: wrk)": find_wrk(), "a C compiler (Debian: gcc)": find_compiler()}
    return " and ".join(name for name, program in needed.items() if program is None)


class Runner:
    """Runs of one scenario's targets against one mock upstream. `folder` is for all that is made.

    Duty of the caller: enter it as a context, which starts the mock and makes a key of the proxy's.
    """

    def __init__(
        self,
        folder: Path,
        cores: Cores,
        scenario: Scenario,
        certificates: Certificates | None,
        most_connections: int,
    ) -> None:
        self._folder = folder
        self._cores = cores
        self._scenario = scenario
        self._certificates = certificates
        self._most_connections = most_connections
        self._stack = ExitStack()
        self._keys: dict[str, tuple[str, str]] = {}  # of each Python: without limits, with all
        self._dead_port: int | None = None

    def __enter__(self) -> Runner:
        with ExitStack() as stack:  # what was started ends, should the rest fail
            self._upstream = stack.enter_context(self._make_upstream())
            if self._scenario.dead_first:
                self._dead_port = stack.enter_context(dead_port())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def run(self, number: int, target: Target, variant: Variant) -> Run:
        """Start the server, send the load, read the values. Problems are in the run, not raised."""
        result = Run(number, variant.name, target.name)
        is_ours = target.peer is not None and target.peer.is_ours
        try:
            with self._started(target) as server:
                keys = self._keys.get(target.program, ("bench", "bench"))
                key = keys[target.name == PROXY_WITH_LOG]
                self._measure(result, server, variant, key, is_ours=is_ours)
        except (StartError, OSError, ValueError, HTTPException) as exc:
            result.problem = f"{type(exc).__name__}: {exc}"
        if not result.problem:
            result.values = _read_values(self._scenario, variant, result, is_ours=is_ours)
            result.warnings = list(_doubts(result))
        return result

    def _make_upstream(self) -> AbstractContextManager[Upstream]:
        if self._scenario.is_saturating:
            return fast_upstream(self._folder, self._cores, self._scenario.variants[-1])
        return upstream(self._folder, self._cores, self._certificates)

    # One run

    def _make_keys(self, python: str) -> None:
        """Make a version's keys, in a database that each of its starts gets a copy of."""
        self._remove_database()
        config = self._folder / "hoberproxy.toml"
        self._keys[python] = (
            create_key(config, has_limits=False, python=python),
            create_key(config, has_limits=True, python=python),
        )
        shutil.move(self._folder / "hoberproxy.db", self._empty_database(python))

    def _empty_database(self, python: str) -> Path:
        return self._folder / f"empty-{list(self._keys).index(python)}.db"

    def _wiring(self, port: int) -> Wiring:
        return Wiring(
            self._folder,
            port,
            self._upstream.port,
            self._upstream.ca_file,
            self._dead_port,
            self._most_connections,
        )

    @contextmanager
    def _started(self, target: Target) -> Iterator[Started]:
        if target.peer is None:
            yield Started(self._upstream.port)
            return
        port, log = free_port(), self._folder / "server.log"
        command = target.peer.command(target.program, self._wiring(port))
        if target.peer.is_ours:
            self._renew_database(target.program)
        with running(command, log, self._cores.server, variables=as_installed()) as process:
            wait_listening(process, port, log)
            tree = ProcessTree([process.pid])
            wait_quiet(tree)
            yield Started(port, process.pid, tree)

    def _renew_database(self, python: str) -> None:
        if python not in self._keys:
            self._make_keys(python)
        self._remove_database()
        shutil.copy(self._empty_database(python), self._folder / "hoberproxy.db")

    def _remove_database(self) -> None:
        for path in self._folder.glob("hoberproxy.db*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _measure(
        self, run: Run, server: Started, variant: Variant, key: str, *, is_ours: bool
    ) -> None:
        output, log = self._folder / "load.json", self._folder / "load.log"
        output.unlink(missing_ok=True)
        meter = Meter(server.tree, self._cores.server)
        command, variables = self._load_command(server, variant, output), {"BENCH_KEY": key}
        with running(command, log, self._cores.load, variables=variables) as load:
            if variant.steady and server.tree is not None:
                run.steady = self._sample(load, server.tree, variant, meter.idle_bytes)
            _wait(load, variant.traffic.seconds * 2 + PATIENCE)
        run.around = meter.read()
        if is_ours and server.tree is not None:
            run.around["is_compiled"] = float(bool(server.tree.compiled_modules()))
        if not output.exists():
            raise StartError(f"no report of the generator: {log.read_text()[-1000:]}")
        run.load = json.loads(output.read_bytes())
        run.problem = _failures(run, variant)

    def _load_command(self, server: Started, variant: Variant, output: Path) -> list[str]:
        url = self._upstream.url if server.pid is None else f"http://127.0.0.1:{server.port}"
        target = ["--url", url, "--model", MODEL]
        measured = [] if server.pid is None else ["--server-pid", str(server.pid)]
        own = ["--cpu", str(self._cores.load), "--json", str(output)]
        if self._scenario.is_saturating:
            return own_module("saturate", *target, *measured, *own, *wrk_options(variant.traffic))
        own += ["--mock-url", self._upstream.url]
        return own_module("load", *target, *measured, *own, *variant.traffic.options())

    def _sample(
        self,
        load: subprocess.Popen[bytes],
        tree: ProcessTree,
        variant: Variant,
        idle_bytes: int,
    ) -> dict[str, float]:
        """Once all streams are open: CPU per event and memory per stream, opening them left out."""
        streams = variant.traffic.connections
        deadline = time.monotonic() + STEADY_PATIENCE
        before = self._upstream.stats()
        while before["streams_open"] < streams:
            if load.poll() is not None or time.monotonic() > deadline:
                return {"streams": float(before["streams_open"])}  # too few: _failures tells
            time.sleep(POLL)
            before = self._upstream.stats()
        spent = tree.cpu_seconds()
        time.sleep(variant.steady)
        after, spent = self._upstream.stats(), tree.cpu_seconds() - spent
        events = max(1, after["events"] - before["events"])
        return {
            "streams": float(after["streams_open"]),
            "wanted_streams": float(streams),
            "events": float(events),
            "cpu_us_per_event": spent / events * 1e6,
            "kb_per_stream": (tree.memory_bytes()[0] - idle_bytes) / streams / 1000,
        }


def _wait(load: subprocess.Popen[bytes], timeout: float) -> None:
    try:
        load.wait(timeout)
    except subprocess.TimeoutExpired:
        raise StartError(f"expected an end of the load within {timeout:.0f} s, got none") from None


class Meter:
    """What a run as a whole took: seconds, and how much of the server's core others had."""

    def __init__(self, tree: ProcessTree | None, core: int) -> None:
        self._tree = tree
        self._core = core
        self._started = time.monotonic()
        self._spent = tree.cpu_seconds() if tree else 0.0
        self._busy = core_seconds(core)
        self.idle_bytes = tree.memory_bytes()[0] if tree else 0

    def read(self) -> dict[str, float]:
        """To be called while the server still runs."""
        figures = {"seconds": time.monotonic() - self._started}
        busy = core_seconds(self._core)
        if self._tree is not None:
            figures["idle_bytes"] = float(self.idle_bytes)
            if self._busy is not None and busy is not None and busy[1] > self._busy[1]:
                own = self._tree.cpu_seconds() - self._spent
                others = busy[0] - self._busy[0] - own
                figures["others_share"] = max(0.0, others / (busy[1] - self._busy[1]))
        return figures


def _failures(run: Run, variant: Variant) -> str:
    """Why the run does not count; empty if it does."""
    requests = run.load["requests"]
    if requests["failed"] or requests["complete"] < requests["sent"]:
        errors = ", ".join(f"{count} {name}" for name, count in run.load["errors"].items())
        return f"{requests['complete']} of {requests['sent']} requests complete: {errors}"
    wanted = variant.traffic.connections
    if run.steady and run.steady["streams"] < wanted:
        return f"expected {wanted} streams open at a time, got {run.steady['streams']:.0f}"
    return ""


def _read_values(
    scenario: Scenario, variant: Variant, run: Run, *, is_ours: bool
) -> dict[str, float]:
    """The scenario's measures, as far as this target has them."""
    values = {name: MEASURES[name].read(run.load) for name in scenario.measures}
    if not is_ours:  # of whose processes we do not ask which is which
        values = {name: value for name, value in values.items() if name not in ROLES}
    if run.target == DIRECT:
        values = {name: value for name, value in values.items() if not name.startswith("cpu")}
    if run.steady:
        values["cpu_event"] = run.steady["cpu_us_per_event"]
        values["stream_memory"] = run.steady["kb_per_stream"]
    elif "stream_memory" in values and run.load["server"]:
        grown = run.load["server"]["rss_peak_bytes"] - run.around["idle_bytes"]
        values["stream_memory"] = grown / variant.traffic.connections / 1000
    return {name: value for name, value in values.items() if value is not None}


def _doubts(run: Run) -> Iterator[str]:
    """Reasons to take the run's figures with care."""
    if doubts := run.load["generator"]["reasons"]:
        yield f"{' and '.join(doubts)}: delays are its own too, CPU figures hold"
    yield from run.load.get("warnings", ())
    if run.around.get("others_share", 0.0) > BUSY_SHARE:
        yield f"others had {run.around['others_share']:.0%} of the server's core"
    late = ((run.load.get("upstream") or {}).get("late_us") or {}).get("p99")
    if late is not None and late > LATE_US:
        yield f"the mock upstream was late by {late / 1000:.1f} ms at p99"
