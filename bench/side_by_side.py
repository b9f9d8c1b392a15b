"""The proxy, the direct connection and every peer on this machine under the same load, in turn.

    python -m bench.side_by_side --scenario json,paced --rounds 4 --json run.json

Each server has one worker on one core of its own; mock upstream and generator share the other. All
are measured in every round, in an order that turns, so that all meet the same machine. The table
goes to standard output, progress to standard error; `bench.report` renders a result file again.
Exit code 1: a run failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from .certificates import make_certificates
from .machine import Cores, choose_cores, describe_machine, most_streams, raise_open_files
from .peers import PEERS, PROXIES, Peer, installed_beside
from .processes import StartError
from .ratios import Table, judge, summarize
from .report import print_report
from .runner import Run, Runner, Target, lacking
from .scenarios import DIRECT, SCENARIOS, Scenario, Variant, limited, shortened


def find_targets(
    names: Sequence[str] | None, beside: Sequence[Peer] = ()
) -> tuple[list[Target], list[Peer]]:
    """All to be measured, and the peers that are not on this machine. Names None: all."""
    targets, missing = [Target(DIRECT)], []
    for peer in (*PEERS, *PROXIES, *beside):
        if peer in PEERS and names is not None and peer.name not in names:
            continue
        program = peer.find()
        if program is None:
            missing.append(peer)
        else:
            targets.append(Target(peer.name, peer, program))
    return targets, missing


def fits(target: Target, scenario: Scenario) -> bool:
    """Whether this target can take part in this scenario."""
    if target.peer is None:
        return not scenario.dead_first
    may_tls = target.peer.can_tls or not scenario.tls
    return may_tls and (target.peer.can_fail_over or not scenario.dead_first)


def run_scenario(
    scenario: Scenario,
    targets: Sequence[Target],
    rounds: int,
    runner: Runner,
) -> list[Run]:
    """Every variant of it, round by round; whoever is first in one round is last in the next."""
    runs: list[Run] = []
    for variant in scenario.variants:
        for number in range(rounds):
            turn = number % len(targets)
            for target in (*targets[turn:], *targets[:turn]):
                _tell(scenario, variant, number, rounds, target)
                run = runner.run(number, target, variant)
                if run.problem:
                    print(f"  failed: {run.problem}", file=sys.stderr)
                runs.append(run)
    return runs


def _tell(scenario: Scenario, variant: Variant, number: int, rounds: int, target: Target) -> None:
    name = f"{scenario.name}, {variant.name}" if variant.name else scenario.name
    print(f"{name}: round {number + 1} of {rounds}, {target.name}", file=sys.stderr, flush=True)


def describe_scenario(
    scenario: Scenario, targets: Sequence[Target], runs: Sequence[Run], notes: Sequence[str]
) -> dict[str, Any]:
    """The scenario's part of the report."""
    names = [each.name for each in targets]
    table: Table = {}
    for run in runs:
        for measure, value in run.values.items():
            table.setdefault((run.variant, measure, run.target), {})[run.round] = value
    results = summarize(scenario, table, names)
    verdicts = judge(scenario, results)
    return {
        "name": scenario.name,
        "question": scenario.question,
        "traffic": {each.name: asdict(each.traffic) for each in scenario.variants},
        "targets": names,
        "results": [asdict(each) for each in results],
        "bars": [asdict(each) | {"is_met": each.is_met} for each in verdicts],
        "notes": list(notes),
        "runs": [asdict(each) for each in runs],
    }


def measure(
    scenario: Scenario,
    targets: Sequence[Target],
    options: argparse.Namespace,
    cores: Cores,
    most: int,
) -> dict[str, Any]:
    """Run one scenario in a folder of its own."""
    taking_part = [each for each in targets if fits(each, scenario)]
    notes = [
        f"{variant.name}: {most:,} streams, for no process here may open more files"
        for variant in scenario.variants
        if variant.traffic.connections > most
    ]
    scenario = replace(scenario, variants=tuple(limited(each, most) for each in scenario.variants))
    notes += [f"{each.name} has no part in it" for each in targets if each not in taking_part]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hoberproxy-bench-")))
        folder.chmod(0o711)  # nginx's worker is another user
        certificates = make_certificates(folder) if scenario.tls else None
        runner = stack.enter_context(Runner(folder, cores, scenario, certificates, most))
        runs = run_scenario(scenario, taking_part, options.rounds, runner)
    return describe_scenario(scenario, taking_part, runs, notes)


def describe_run(
    options: argparse.Namespace, cores: Cores, missing: Sequence[Peer]
) -> dict[str, Any]:
    """What one needs to repeat it. No paths: a report is for others to read."""
    return {
        "command": f"python -m bench.side_by_side {shlex.join(_shown(options.argv))}".rstrip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": options.rounds,
        "is_quick": options.quick,
        "machine": describe_machine(),
        "cores": asdict(cores),
        "missing": {peer.name: peer.package for peer in missing},
    }


def _shown(argv: Sequence[str]) -> list[str]:
    """The options without the path of another version."""
    return [re.sub(r"(?<==)/.*", "PYTHON", each) if "=" in each else each for each in argv]


def warn(machine: dict[str, Any], cores: Cores, is_quick: bool) -> list[str]:
    """Reasons not to trust the whole run."""
    warnings = []
    if is_quick:
        warnings.append("a quick run shows that the harness works; its figures mean nothing")
    if cores.server in (cores.upstream, cores.load):
        warnings.append("one core only: the server under test shares it with those who load it")
    if machine["load_average"][0] > 0.5:
        warnings.append("the machine was busy before the start, so its other work is measured too")
    return warnings


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All chosen scenarios; returns the report."""
    targets, missing = find_targets(options.peers, options.beside)
    for peer in missing:
        print(f"{peer.name} is not installed: it is in {peer.package}", file=sys.stderr)
    cores, most = choose_cores(os.sched_getaffinity(0)), most_streams(raise_open_files())
    report = describe_run(options, cores, missing)
    os.sched_setaffinity(0, {cores.load})  # only the server under test is on its core
    versions = {each.name: each.peer.version(each.program) for each in targets if each.peer}
    parts = []
    for scenario in chosen(options):
        if lack := lacking(scenario):
            print(f"{scenario.name} is left out: expected {lack}, got none", file=sys.stderr)
        else:
            parts.append(measure(scenario, targets, options, cores, most))
    return report | {
        "peers": versions,
        "warnings": warn(report["machine"], cores, options.quick),
        "load_average_after": os.getloadavg(),
        "scenarios": parts,
    }


def chosen(options: argparse.Namespace) -> list[Scenario]:
    """The scenarios named, in the order of the table, shortened for a quick run."""
    return [
        replace(each, variants=tuple(_adapted(variant, options) for variant in each.variants))
        for each in SCENARIOS
        if each.name in options.scenario
    ]


def _adapted(variant: Variant, options: argparse.Namespace) -> Variant:
    if options.plain_events:
        variant = replace(variant, traffic=replace(variant.traffic, plain_events=True))
    return shortened(variant) if options.quick else variant


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    names = [each.name for each in SCENARIOS]
    peers = [each.name for each in PEERS]
    parser = argparse.ArgumentParser(
        prog="python -m bench.side_by_side", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add(
        "--scenario",
        metavar="NAMES",
        type=_names(names),
        default=names,
        help=f"some of {', '.join(names)} (all)",
    )
    add("--rounds", type=int, default=4, help="of each target (4)")
    add(
        "--plain-events",
        action="store_true",
        help="answers without what OpenAI adds and changes, to compare with results of before",
    )
    add("--quick", action="store_true", help="a few seconds, to see that it works")
    add(
        "--peers",
        metavar="NAMES",
        type=_names(peers),
        help=f"some of {', '.join(peers)} (all that are found)",
    )
    add(
        "--beside",
        metavar="NAME=PYTHON",
        type=_beside,
        action="append",
        default=[],
        help="another installed version of the proxy, by the Python that it is installed for",
    )
    add("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    if not 1 <= options.rounds <= 100:
        parser.error(f"expected 1 to 100 rounds, got {options.rounds}")
    options.argv = list(argv)
    return options


def _beside(text: str) -> Peer:
    name, _, python = text.partition("=")
    if not name or not os.access(python, os.X_OK):
        raise argparse.ArgumentTypeError("expected NAME=PYTHON, a name and a program")
    return installed_beside(name, python)


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of a list with commas; empty means none."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := set(names) - set(known):
            expected = f"expected names of {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"{expected}, got {', '.join(sorted(unknown))}")
        return names

    return parse


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends what it started
    try:
        report = compare(options)
    except StartError as exc:
        print(f"cannot start: {exc}", file=sys.stderr)
        return 3
    print_report(report)
    if options.json is not None:
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE))
    return 1 if any(run["problem"] for part in report["scenarios"] for run in part["runs"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
