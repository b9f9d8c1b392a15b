"""What each fast path buys: one build of the proxy, run several times at once, each without one.

    python -m bench.fast_paths --folder /tmp/fast-paths --turns 7 --json run.json

A copy of this checkout gets a switch at the start of each function in SWITCHES and is built once,
so that the variants are the same program in other environments. All run at the same time on one
core and are loaded at the same time by wrk: what disturbs one disturbs the others. The report has
CPU per request as a multiple of that of the proxy with everything on, the median of the turns and
its quartiles; "again" is that proxy a second time and shows the noise. Exit code 1: a load failed.
"""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from .c_upstream import c_upstream
from .machine import choose_cores, describe_machine, raise_open_files
from .mock_answers import Settings
from .peers import MODEL, PROXIES, Wiring, create_key
from .processes import StartError, free_port, own_module, running, wait_listening, wait_quiet
from .procfs import ProcessTree
from .runner import upstream
from .saturate import FAILURES, LoadError, Request, counted_by, start_wrk

ROOT = Path(__file__).parents[1]
COPIED = (
    "pyproject.toml",
    "hatch_build.py",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "hoberproxy",
    "bench",
)
VARIABLE = "HOBERPROXY_BENCH_OFF"
FULL, AGAIN = "everything on", "again"
EVENTS = 64


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent to every variant at once."""

    connections: int = 16
    prompt_bytes: int = 30
    tools_bytes: int = 0
    is_stream: bool = False
    is_paced: bool = False  # by bench.load and the mock: the core has time to spare
    is_closing: bool = False  # a connection for each request
    has_limits: bool = False


LOADS = {
    "json": Load(),
    "limits": Load(has_limits=True),
    "tools": Load(tools_bytes=40_000),
    "large": Load(connections=4, prompt_bytes=1_000_000),
    "churn": Load(is_closing=True),
    "burst": Load(is_stream=True),
    "paced": Load(connections=40, is_stream=True, is_paced=True),
}


@dataclass(frozen=True, slots=True)
class Switch:
    """A fast path. `off` says by function which statement, run first, switches it off.

    A function is named by its class or alone; in which module it is does not matter.
    """

    what: str
    loads: tuple[str, ...]
    off: Mapping[str, str]


SWITCHES = {
    "content": Switch(
        "template of a stream's events with content",
        ("burst", "paced"),
        {"ContentTemplate.take": "return data", "ContentTemplate.pass_events": "return None"},
    ),
    "edges": Switch(
        "templates of a stream's first and last events",
        ("burst", "paced"),
        {"EdgeTemplates.find": "return None, 0", "EdgeTemplates.learn_from": "return None"},
    ),
    "sink": Switch(
        "socket writer past the transport", ("burst", "json", "paced"), {"Sink.__init__": "fd = -1"}
    ),
    "response-heads": Switch(
        "templates of response heads",
        ("json", "burst"),
        {"ResponseHeads.find": "return 0", "ResponseHeads._learn": "return None"},
    ),
    "repeated-head": Switch(
        "the head that comes again on a connection",
        ("json", "churn"),
        {"RepeatedHead.find": "return 0"},
    ),
    "admitted": Switch(
        "who sent the head that comes again", ("json", "churn"), {"Exchange.admit": "known = None"}
    ),
    "parse-cache": Switch(
        "what a request says around its messages",
        ("json", "tools"),
        {"ParseCache._fitting": "return None", "ParseCache._keep": "return None"},
    ),
    "kept-plans": Switch("the plan of a model", ("json",), {"_find_kept": "return None"}),
    "locks": Switch(
        "locks of a file by the C library itself",
        ("limits",),
        {"_find_fcntl": "return _python_fcntl"},
    ),
    "malloc": Switch(
        "malloc that keeps freed memory", ("large", "json"), {"malloc_variables": "return {}"}
    ),
}


# The copy with its switches


def flag(name: str) -> str:
    """The name of a switch in a module."""
    return f"_IS_OFF_{name.replace('-', '_').upper()}"


def add_switches(source: str, switches: Mapping[str, Switch]) -> tuple[str, set[str]]:
    """Put the switches of a module's functions into its text; also returns which were found."""
    lines, found, flags = source.splitlines(), set[str](), set[str]()
    functions = dict(_functions(ast.parse(source)))
    inserted: list[tuple[int, list[str]]] = []
    for name, switch in switches.items():
        for place, statement in switch.off.items():
            if (node := functions.get(place)) is not None:
                first = (
                    node.body[1] if _has_docstring(node) and len(node.body) > 1 else node.body[0]
                )
                indent = " " * first.col_offset
                inserted.append(
                    (first.lineno - 1, [f"{indent}if {flag(name)}:", f"{indent}    {statement}"])
                )
                found.add(place)
                flags.add(name)
    for at, text in sorted(inserted, reverse=True):
        lines[at:at] = text
    if flags:
        at = 1 + lines.index("from __future__ import annotations")
        lines[at:at] = ["import os as _os", "from typing import Final as _Final", *_flags(flags)]
    return "\n".join(lines) + "\n", found


def _flags(names: Iterable[str]) -> Iterator[str]:
    for name in sorted(names):
        given = f'_os.environ.get("{VARIABLE}", "").split(",")'
        yield f'{flag(name)}: _Final[bool] = "{name}" in {given}'


def _functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    yield f"{node.name}.{each.name}", each


def _has_docstring(node: ast.FunctionDef) -> bool:
    return ast.get_docstring(node) is not None


def make_copy(root: Path, folder: Path, switches: Mapping[str, Switch]) -> None:
    """Copy the checkout to `folder` with switches. ValueError if a function is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = root / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    missing = {place for switch in switches.values() for place in switch.off}
    for path in sorted((folder / "hoberproxy").rglob("*.py")):
        text, found = add_switches(path.read_text(encoding="utf-8"), switches)
        if found:
            path.write_text(text, encoding="utf-8")
            missing -= found
    if missing:
        raise ValueError(f"expected functions {', '.join(sorted(missing))}, got none of the name")


@dataclass(frozen=True, slots=True)
class Program:
    """The copy as it is started: by its own Python, or from its sources."""

    folder: Path
    python: str
    is_compiled: bool

    def variables(self, off: str) -> dict[str, str]:
        """The environment of a variant. No other copy of the package is in reach."""
        path = "" if self.is_compiled else str(self.folder)
        return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", VARIABLE: off}

    def check(self) -> None:
        """Raise StartError unless the package that is imported is the copy's."""
        code = "import hoberproxy; print(hoberproxy.__file__)"
        done = subprocess.run(
            [self.python, "-c", code],
            env=os.environ | self.variables(""),
            capture_output=True,
            text=True,
        )
        if not Path(done.stdout.strip()).is_relative_to(self.folder):
            got = done.stdout.strip() or done.stderr[-500:]
            raise StartError(f"expected the package in {self.folder}, got {got}")

    def check_processes(self, tree: ProcessTree) -> None:
        """Raise StartError unless what is mapped into processes is the copy's compiled code."""
        mapped = tree.compiled_modules()
        inside = {path for path in mapped if path.is_relative_to(self.folder)}
        if self.is_compiled != bool(inside) or mapped - inside:
            raise StartError(f"expected compiled code of {self.folder} alone, got {sorted(mapped)}")


def build(folder: Path, *, is_compiled: bool) -> Program:
    """Make the program in `folder`, or take the one that is there. Raises StartError."""
    folder = folder.resolve()
    if not (folder / "hoberproxy").exists():
        make_copy(ROOT, folder, SWITCHES)
    program = Program(folder, sys.executable, is_compiled)
    if is_compiled:
        print(f"building the copy in {folder}, which takes some minutes", file=sys.stderr)
        command = ["make", "-s", "compiled", "COMPILED=.venv-compiled"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise StartError(f"expected the copy to build, got:\n{done.stderr[-3000:]}")
        program = built_in(folder)
    program.check()
    return program


def built_in(folder: Path) -> Program:
    """The compiled package of a checkout in which `make compiled COMPILED=.venv-compiled` ran."""
    return Program(folder.resolve(), str(folder.resolve() / ".venv-compiled/bin/python"), True)


# Servers


@dataclass(frozen=True, slots=True)
class Server:
    """A variant that runs; `keys` are one without limits and one with all of them."""

    name: str
    port: int
    keys: tuple[str, str]
    tree: ProcessTree


@contextmanager
def started(
    name: str, program: Program, wiring: Wiring, core: int, serve_args: Sequence[str]
) -> Iterator[Server]:
    """Start a variant on `core`, with separate records and keys."""
    folder = wiring.folder
    folder.mkdir()
    log = folder / "server.log"
    _, *arguments = PROXIES[0].command(program.python, wiring)
    config = folder / "hoberproxy.toml"
    keys = (create_key(config, has_limits=False), create_key(config, has_limits=True))
    command = [program.python, *arguments, *serve_args]
    variables = program.variables(name if name in SWITCHES else "")
    with running(command, log, core, variables=variables) as process:
        wait_listening(process, wiring.port, log)
        tree = ProcessTree([process.pid])
        wait_quiet(tree)
        program.check_processes(tree)
        yield Server(name, wiring.port, keys, tree)


class Loader:
    """Loads servers for `seconds`, all at the same time, from `core`."""

    def __init__(self, folder: Path, core: int, options: argparse.Namespace) -> None:
        self._folder = folder
        self._core = core
        self._seconds: int = options.seconds
        self._is_plain: bool = options.plain_events

    def measure(self, servers: Sequence[Server], load: Load) -> dict[str, float]:
        """Return µs of CPU per request of each server. Raises LoadError."""
        before = {server.name: server.tree.cpu_seconds() for server in servers}
        start = self._start_paced if load.is_paced else self._start_wrk
        with ExitStack() as stack:
            waits = {server.name: start(stack, server, load) for server in servers}
            counted = {name: wait() for name, wait in waits.items()}
        return {
            server.name: (server.tree.cpu_seconds() - before[server.name])
            / max(counted[server.name], 1)
            * 1e6
            for server in servers
        }

    def _start_wrk(self, stack: ExitStack, server: Server, load: Load) -> Callable[[], int]:
        events = EVENTS if load.is_stream else None
        url, key = f"http://127.0.0.1:{server.port}", server.keys[load.has_limits]
        request = Request(url, MODEL, key, load.prompt_bytes, events, load.tools_bytes)
        process = stack.enter_context(
            start_wrk(request, load.connections, self._seconds, is_closing=load.is_closing)
        )

        def wait() -> int:
            counted = counted_by(process)
            if any(counted[failure] for failure in FAILURES):
                raise LoadError(f"{server.name}: requests failed: {counted}")
            return int(counted["requests"])

        return wait

    def _start_paced(self, stack: ExitStack, server: Server, load: Load) -> Callable[[], int]:
        output = self._folder / f"load-{server.port}.json"
        output.unlink(missing_ok=True)
        command = own_module("load", "--url", f"http://127.0.0.1:{server.port}", "--stream")
        command += ["--connections", str(load.connections), "--duration", str(self._seconds)]
        command += ["--events", str(EVENTS), "--event-bytes", "240", "--pace", "0.02"]
        command += ["--ramp", "1", "--cpu", str(self._core), "--json", str(output)]
        command += ["--plain-events"] if self._is_plain else []
        log, key = self._folder / f"load-{server.port}.log", server.keys[load.has_limits]
        process = stack.enter_context(running(command, log, variables={"BENCH_KEY": key}))

        def wait() -> int:
            if process.wait():
                raise LoadError(f"{server.name}: {log.read_text()[-1000:]}")
            return int(orjson.loads(output.read_bytes())["requests"]["complete"])

        return wait


Values = dict[str, dict[str, list[float]]]  # µs of each turn, by load and variant


def measure(program: Program, options: argparse.Namespace) -> Values:
    """Measure each load that the command line names."""
    cores = choose_cores(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores.load})
    options.core = cores.server
    values: Values = {}
    for is_paced in (False, True):
        loads = [name for name in options.load if LOADS[name].is_paced is is_paced]
        if not loads:
            continue
        with ExitStack() as stack:
            made = tempfile.TemporaryDirectory(prefix="hoberproxy-bench-")
            folder = Path(stack.enter_context(made))
            if is_paced:
                port = stack.enter_context(upstream(folder, cores, None)).port
            else:
                form = Settings(EVENTS, 240, block_bytes=0, plain_events=options.plain_events)
                port = stack.enter_context(c_upstream(folder, cores.upstream, form))
            servers = start_all(stack, program, folder, port, options)
            run_turns(servers, loads, Loader(folder, cores.load, options), options.turns, values)
    return values


def start_all(
    stack: ExitStack, program: Program, folder: Path, port: int, options: argparse.Namespace
) -> dict[str, Server]:
    """Start every variant in front of the upstream on `port`."""
    servers = {}
    programs = {name: program for name in (FULL, AGAIN, *options.only)}
    for name, each in (programs | options.beside).items():
        wiring = Wiring(folder / name.replace(" ", "-"), free_port(), port)
        server = started(name, each, wiring, options.core, options.serve_args)
        servers[name] = stack.enter_context(server)
    return servers


def run_turns(
    servers: Mapping[str, Server], loads: Sequence[str], loader: Loader, turns: int, values: Values
) -> None:
    """Put into `values` what each turn says; the order of the starts changes from turn to turn."""
    for turn in range(-1, turns):  # the first one warms up
        for load in loads:
            taking_part = [
                server
                for name, server in servers.items()
                if name not in SWITCHES or load in SWITCHES[name].loads
            ]
            if len(taking_part) == 2:
                continue
            place = turn % len(taking_part)
            order = (*taking_part[place:], *taking_part[:place])
            title = f"turn {turn + 1} of {turns}" if turn >= 0 else "warm-up"
            print(f"{title}, {load}", file=sys.stderr)
            for name, us in loader.measure(order, LOADS[load]).items():
                if turn >= 0:
                    values.setdefault(load, {}).setdefault(name, []).append(us)


# The report


def summarize(values: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """A row for each load and variant: median µs, and median and quartiles of the ratios."""
    rows = []
    for load, variants in values.items():
        for name, turns in variants.items():
            pairs = zip(turns, variants[FULL], strict=True)
            ratios = sorted(us / full for us, full in pairs)
            low, middle, high = (
                statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
            )
            row = {"load": load, "variant": name, "median_us": statistics.median(turns)}
            rows.append(row | {"ratio": middle, "ratio_low": low, "ratio_high": high})
    return rows


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for a terminal."""
    lines = [f"{'load':<8}{'off':<24}{'µs':>9}{'ratio':>8}{'quartiles':>15}"]
    for row in rows:
        spread = f"{row['ratio_low']:.3f}–{row['ratio_high']:.3f}"
        figures = f"{row['median_us']:>9.1f}{row['ratio']:>8.3f}{spread:>15}"
        lines.append(f"{row['load']:<8}{row['variant']:<24}{figures}")
    return "\n".join(lines)


def describe_command(argv: Sequence[str]) -> str:
    """The command line without the folders of this machine: a report is for others to read."""
    arguments = [
        f"{before}{equals}{Path(after).name}" if "/" in each else each
        for each in argv
        for before, equals, after in [each.rpartition("=")]
    ]
    return shlex.join(["python", "-m", "bench.fast_paths", *arguments])


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fast_paths", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="for the copy; one that is there is used")
    add(
        "--only",
        default=",".join(SWITCHES),
        help="names of switches with commas; empty for none (all)",
    )
    add(
        "--beside",
        metavar="NAME=FOLDER",
        action="append",
        default=[],
        help="a checkout of another version, compiled, as one more variant; repeatable",
    )
    add("--load", default=",".join(LOADS), help="names of loads with commas (all)")
    add("--turns", type=int, default=7, help="of each load (7)")
    add("--seconds", type=int, default=4, help="of a turn (4)")
    add("--serve-args", default="", help="more arguments of `serve`, e.g. '--workers 2'")
    add("--plain-events", action="store_true", help="streams without what OpenAI adds")
    add("--pure", action="store_true", help="do not compile the copy")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    options.only = options.only.split(",") if options.only else []
    options.load = options.load.split(",")
    for given, known in ((options.only, SWITCHES), (options.load, LOADS)):
        if unknown := set(given) - set(known):
            parser.error(f"expected names of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    pairs = [each.partition("=") for each in options.beside]
    options.beside = {name: built_in(Path(folder)) for name, _, folder in pairs}
    options.serve_args = shlex.split(options.serve_args)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends what it started
    raise_open_files()
    machine = describe_machine()
    try:
        for each in options.beside.values():
            each.check()
        program = build(options.folder, is_compiled=not options.pure)
        values = measure(program, options)
    except (StartError, LoadError, ValueError) as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    rows = summarize(values)
    print(render(rows))
    if options.json is not None:
        report = {
            "command": describe_command(sys.argv[1:] if argv is None else argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "is_compiled": program.is_compiled,
            "machine": machine,
            "load_average_after": os.getloadavg(),
            "rows": rows,
            "turns": values,
        }
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
