"""What keys and limits cost a request where several workers share them.

    python -m bench.account --rounds 6

Three proxies with the same number of workers are in front of one mock upstream: one needs no key,
one gets a key without limits, one a key with every limit and a budget; endpoints have prices. All
are loaded in every round, in turn. The report has the CPU per request of the whole process tree,
the least of the rounds, and how much more the limited one takes. The journal cannot be switched
off: its share is added from `bench.micro`. Exit code 1: a request failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from os import sched_getaffinity
from pathlib import Path
from typing import Any

import orjson

from .machine import Cores, choose_cores, describe_machine, raise_open_files
from .peers import MODEL, PROXIES, Wiring, create_key
from .processes import (
    StartError,
    as_installed,
    free_port,
    own_module,
    running,
    wait_listening,
    wait_quiet,
)
from .procfs import ProcessTree
from .runner import Upstream, upstream

NO_KEY, PLAIN_KEY, LIMITED = "no key asked for", "a key without limits", "a key with every limit"
TARGETS = (NO_KEY, PLAIN_KEY, LIMITED)
BAR = 20.0  # µs for keys, limits and journal together
PRICE = 'price = { prompt = "0.14", completion = "0.28" }'
PATIENCE = 120.0  # seconds for one load

Rounds = Mapping[str, Sequence[float]]  # µs of CPU per request, by target


@dataclass(frozen=True, slots=True)
class Server:
    """A proxy that runs, and how requests reach it."""

    name: str
    port: int
    pid: int
    key: str


@contextmanager
def started(
    name: str, workers: int, mock: Upstream, folder: Path, core: int | None
) -> Iterator[Server]:
    """A proxy with its own records and its own key, once its workers are idle."""
    folder.mkdir()
    port, log = free_port(), folder / "server.log"
    # The comparison's own config, with prices, so that a budget has something to hold.
    command = PROXIES[0].command(PROXIES[0].program, Wiring(folder, port, mock.port))
    config = folder / "hoberproxy.toml"
    text = config.read_text(encoding="utf-8").replace(
        'model = "bench-', f'{PRICE}, model = "bench-'
    )
    assert PRICE in text, "the peers' config has another form"
    key = "bench"
    if name == NO_KEY:
        text += "\n[keys]\nrequired = false\n"
    config.write_text(text, encoding="utf-8")
    if name != NO_KEY:
        key = create_key(config, has_limits=name == LIMITED)
    command += ["--workers", str(workers)]
    with running(command, log, core, variables=as_installed()) as process:
        wait_listening(process, port, log)
        wait_quiet(ProcessTree([process.pid]), 1 + workers)
        yield Server(name, port, process.pid, key)


def load(server: Server, cores: Cores, options: argparse.Namespace, folder: Path) -> float:
    """µs of CPU per request. Raises StartError if one failed."""
    output, log = folder / "load.json", folder / "load.log"
    output.unlink(missing_ok=True)
    command = own_module("load", "--url", f"http://127.0.0.1:{server.port}", "--model", MODEL)
    command += ["--server-pid", str(server.pid), "--cpu", str(cores.load), "--json", str(output)]
    command += ["--connections", str(options.connections), "--requests", str(options.requests)]
    command += ["--warmup", str(max(1, options.requests // 10)), "--prompt-bytes", "200"]
    with running(command, log, cores.load, variables={"BENCH_KEY": server.key}) as process:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise StartError(f"expected an end of the load within {PATIENCE:.0f} s") from None
    report = json.loads(output.read_bytes()) if output.exists() else {"requests": {"failed": "all"}}
    if report["requests"]["failed"]:
        raise StartError(f"{server.name}: requests failed: {report.get('errors')}")
    return float(report["server"]["cpu_us_per_request"])


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Every proxy in every round; whoever is first in one round is last in the next."""
    raise_open_files()
    cores, values = choose_cores(sched_getaffinity(0)), {name: list[float]() for name in TARGETS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hoberproxy-bench-")))
        mock = stack.enter_context(upstream(folder, cores, None))
        # Unpinned, one proxy was seen to switch context five times as often as another.
        core = None if options.unpinned else cores.server
        servers = [
            stack.enter_context(
                started(name, options.workers, mock, folder / f"proxy-{number}", core)
            )
            for number, name in enumerate(TARGETS)
        ]
        for number in range(options.rounds):
            turn = number % len(servers)
            for server in (*servers[turn:], *servers[:turn]):
                print(f"round {number + 1} of {options.rounds}, {server.name}", file=sys.stderr)
                values[server.name].append(load(server, cores, options, folder))
    return values


def journal_ns(repeats: int) -> float:
    """What a request costs in the micro benchmark that has records and journal, but no limits."""
    from .micro.__main__ import time_case
    from .micro.account import CASES

    return time_case(next(case for case in CASES if case.name == "no limits"), repeats)


# Reports


def summarize(values: Rounds, journal: float) -> dict[str, Any]:
    """Least of rounds to least of rounds, and the spread of the differences within a round."""
    differences = [b - a for a, b in zip(values[NO_KEY], values[LIMITED], strict=True)]
    difference = min(values[LIMITED]) - min(values[NO_KEY])
    return {
        "targets": {
            name: {"least": min(rounds), "most": max(rounds), "rounds": list(rounds)}
            for name, rounds in values.items()
        },
        "keys_and_limits": {
            "of_leasts": difference,
            "least": min(differences),
            "most": max(differences),
        },
        "journal_by_micro": journal,
        "together": difference + journal,
        "bar": BAR,
    }


def render(result: Mapping[str, Any], options: argparse.Namespace) -> str:
    """A table for a terminal."""
    rows = [f"{'CPU per request, µs':<28}{'least':>9}{'most':>9}"]
    rows += [
        f"{name:<28}{each['least']:>9.1f}{each['most']:>9.1f}"
        for name, each in result["targets"].items()
    ]
    limits, together = result["keys_and_limits"], result["together"]
    rows += [
        "",
        f"keys and limits: {limits['of_leasts']:.1f} µs, least to least of {options.rounds} rounds "
        f"with {options.workers} workers; within a round {limits['least']:.1f} to "
        f"{limits['most']:.1f}",
        f"account and journal without limits, by bench.micro: {result['journal_by_micro']:.1f} µs",
        f"together {together:.1f} µs; the bar is {BAR:.0f}",
    ]
    if options.quick:
        rows.append("a quick run shows that the harness works; its figures mean nothing")
    return "\n".join(rows)


# Command line


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.account", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--workers", type=int, default=4, help="of each proxy (4)")
    add("--rounds", type=int, default=6, help="of each proxy (6)")
    add("--requests", type=int, default=10_000, help="in a round (10000)")
    add("--connections", type=int, default=32, help="at a time (32)")
    add("--unpinned", action="store_true", help="let the workers run on every core")
    add("--quick", action="store_true", help="a few seconds, to see that it works")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    for name in ("workers", "rounds", "requests", "connections"):
        if not 1 <= getattr(options, name) <= 1_000_000:
            parser.error(f"expected --{name} to be 1 or more, got {getattr(options, name)}")
    if options.quick:
        options.rounds, options.requests, options.connections = 1, 20, 4
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends what it started
    try:
        values = measure(options)
    except StartError as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    result = summarize(values, journal_ns(1 if options.quick else 7) / 1000)
    print(render(result, options))
    if options.json is not None:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        command = shlex.join(["python", "-m", "bench.account", *(argv or sys.argv[1:])])
        result |= {"machine": describe_machine(), "settings": settings, "peers": {}}
        result |= {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        options.json.write_bytes(orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
