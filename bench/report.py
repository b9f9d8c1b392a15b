"""A result file for people: a table for the terminal, and the one that goes into the README.

python -m bench.report bench/results/*.json             the tables again
python -m bench.report --markdown bench/results/*.json  the README's table
python -m bench.report --svg bench/results/*.json       its picture
python -m bench.report --readme bench/results/*.json    both into the README
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from .chart import scenarios_of, svg, without_beside
from .scenarios import DIRECT, MEASURES, PROXY, PROXY_WITH_LOG, REFERENCE

Report = dict[str, Any]
MOST_WARNINGS = 5  # of a scenario, in the table
README_START, README_END = "<!-- bench -->\n", "<!-- /bench -->"
PICTURE = Path("docs/cost.svg")


# For the terminal


def print_report(report: Report) -> None:
    """All of it, on standard output."""
    print("\n".join(report_lines(report)))


def report_lines(report: Report) -> Iterator[str]:
    yield from _head(report)
    for scenario in report["scenarios"]:
        yield ""
        yield f"{scenario['name']}: {scenario['question']}"
        yield from _blocks(scenario)
        if not report["is_quick"]:
            yield from _bars(scenario)
        yield from _remarks(scenario)


def _head(report: Report) -> Iterator[str]:
    yield report["command"]
    yield describe_machine(report)
    if (form := form_of_proxy(report)) is not None:
        yield f"{PROXY}: {form}"
    yield "load average before: {:.2f} {:.2f} {:.2f}, ".format(
        *report["machine"]["load_average"]
    ) + "after: {:.2f} {:.2f} {:.2f}".format(*report["load_average_after"])
    cores = report["cores"]
    yield "core {server}: server, core {upstream}: mock upstream, core {load}: generator".format(
        **cores
    )
    for name, package in report["missing"].items():
        yield f"not installed: {name} ({package})"
    yield from (f"warning: {each}" for each in report["warnings"])


def _blocks(scenario: Report) -> Iterator[str]:
    """One block of lines for each variant and measure; a line for each target."""
    last = None
    for each in scenario["results"]:
        block = each["variant"], each["measure"]
        if block != last:
            measure = MEASURES[each["measure"]]
            title = ", ".join(filter(None, (each["variant"], f"{measure.label}, {measure.unit}")))
            yield f"  {title:<48}{'least':>10}{'most':>10}{'÷ ' + REFERENCE:>10}{'spread':>16}"
            last = block
        yield f"    {each['target']:<46}{_number(each['least']):>10}{_number(each['most']):>10}" + (
            f"{each['ratio']:>10.2f}{_spread(each):>16}" if each["ratio"] is not None else ""
        )


def _bars(scenario: Report) -> Iterator[str]:
    for bar in scenario["bars"]:
        measure = MEASURES[bar["measure"]]
        value = "not measured" if bar["value"] is None else _number(bar["value"])
        verdict = {True: "met", False: "NOT MET", None: "open"}[bar["is_met"]]
        name = ", ".join(filter(None, (bar["variant"], measure.label)))
        yield f"  bar: {name} {bar['text']}: {bar['target']} {value}, {verdict}"


def _remarks(scenario: Report) -> Iterator[str]:
    """Notes, failures, and the first of the warnings."""
    yield from (f"  note: {each}" for each in scenario["notes"])
    runs = [(run, _name_run(run)) for run in scenario["runs"]]
    yield from (f"  failed: {name}: {run['problem']}" for run, name in runs if run["problem"])
    warnings = [f"  warning: {name}: {each}" for run, name in runs for each in run["warnings"]]
    yield from warnings[:MOST_WARNINGS]
    if len(warnings) > MOST_WARNINGS:
        yield f"  and {len(warnings) - MOST_WARNINGS} warnings more, which --json keeps"


def _name_run(run: Report) -> str:
    return ", ".join(filter(None, (run["variant"], f"round {run['round'] + 1}", run["target"])))


def _number(value: float) -> str:
    """Three digits or so: more would be noise."""
    return (
        f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    )


def _spread(result: Report) -> str:
    return f"{result['ratio_low']:.2f}–{result['ratio_high']:.2f}"


def describe_machine(report: Report) -> str:
    """On one line: machine, versions, date."""
    machine = report["machine"]
    versions = machine["versions"] | {
        name: version for name, version in report["peers"].items() if "hoberproxy" not in name
    }
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    cores = f"{machine['cores']} cores"
    return f"{machine['cpu']}, {cores}, Linux {machine['kernel']}; {listed}; {report['date'][:10]}"


def form_of_proxy(report: Report) -> str | None:
    """Whether the proxy that was measured is compiled; None where the report does not say."""
    runs = [run for scenario in report["scenarios"] for run in scenario["runs"]]
    found = [run["around"].get("is_compiled") for run in runs if "around" in run]
    forms = [bool(each) for each in found if each is not None]
    if not forms:
        return None
    return "compiled" if all(forms) else "pure Python"


# For the README


def markdown(reports: Sequence[Report]) -> str:
    """One row for each measure that has a bar; of a scenario in two files the later one counts."""
    compared = [without_beside(each) for each in reports if "scenarios" in each]
    accounts = [each for each in reports if "keys_and_limits" in each]  # of bench.account
    head = ("", REFERENCE, PROXY, "with log and limits", "others", "bar")
    rows = [
        head,
        ("---",) * len(head),
        *(row for part in scenarios_of(reports) for row in _rows(part)),
    ]
    rows += [_account_row(each) for each in accounts[-1:]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    kept = [*compared, *accounts[-1:]]
    notes = [f"- {describe_machine(each)}. Repeat: `{each['command']}`" for each in kept]
    explained = (
        "Least of the rounds; in brackets the ratio to nginx and its spread over the rounds."
    )
    return "\n".join([*lines, "", explained, "", *dict.fromkeys(notes)]) + "\n"


def _rows(scenario: Report) -> Iterator[tuple[str, ...]]:
    seen = set()
    for bar in scenario["bars"]:
        key = bar["variant"], bar["measure"]
        if key in seen:
            continue
        seen.add(key)
        found = {
            each["target"]: each
            for each in scenario["results"]
            if (each["variant"], each["measure"]) == key
        }
        name = ", ".join(filter(None, (scenario["name"], bar["variant"], MEASURES[key[1]].label)))
        cells = (_cell(found.get(each), key[1]) for each in (REFERENCE, PROXY, PROXY_WITH_LOG))
        yield name, *cells, _others(found, key[1]), _bar_cell(scenario["bars"], key)


def _account_row(account: Report) -> tuple[str, ...]:
    """What keys, limits and journal cost a request, which nginx has none of."""
    together, bar = account["together"], account["bar"]  # in µs
    workers = account["settings"]["workers"]
    return (
        f"account, {workers} workers: keys, limits and journal, CPU per request",
        "–",
        "–",
        f"{_number(together)} µs",
        "–",
        f"≤ {bar:g} µs: {'met' if together <= bar else 'not met'}",
    )


def _cell(result: Report | None, measure: str) -> str:
    if result is None:
        return "–"
    value = f"{_number(result['least'])} {MEASURES[measure].unit}"
    if result["ratio"] is None or result["target"] == REFERENCE:
        return value
    return f"{value} ({result['ratio']:.2f}, {_spread(result)})"


def _others(found: dict[str, Report], measure: str) -> str:
    ours = (DIRECT, REFERENCE, PROXY, PROXY_WITH_LOG)
    cells = (f"{name} {_cell(each, measure)}" for name, each in found.items() if name not in ours)
    return "; ".join(cells) or "–"


def _bar_cell(bars: Iterable[Report], key: tuple[str, str]) -> str:
    """What each form of the proxy may cost, given once where it is the same."""
    own = [bar for bar in bars if (bar["variant"], bar["measure"]) == key]
    texts = dict.fromkeys(bar["text"] for bar in own)
    verdicts = list({True: "met", False: "not met", None: "open"}[b["is_met"]] for b in own)
    distinct = verdicts if len(set(verdicts)) > 1 else verdicts[:1]
    return f"{', with log and limits '.join(texts)}: {' / '.join(distinct)}"


def update_readme(reports: Sequence[Report], root: Path) -> None:
    """Put table and picture where the README of the checkout at `root` shows them."""
    readme = root / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(README_START)
    _, end, after = rest.partition(README_END)
    if not start or not end:
        raise SystemExit(f"expected {README_START.strip()} and {README_END} in {readme}")
    text = "".join((before, start, markdown(reports), end, after))
    readme.write_text(text, encoding="utf-8")
    (root / PICTURE).write_text(svg(reports), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of side_by_side")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the README's table")
    form.add_argument("--svg", action="store_true", help="the README's picture")
    form.add_argument("--readme", action="store_true", help="put both into the checkout's README")
    options = parser.parse_args(argv)
    reports = [orjson.loads(path.read_bytes()) for path in options.files]
    if options.markdown:
        print(markdown(reports), end="")
    elif options.svg:
        print(svg(reports), end="")
    elif options.readme:
        update_readme(reports, Path())
    else:
        for report in reports:
            if "scenarios" in report:
                print_report(report)
            else:
                name, *_, value, _, verdict = _account_row(report)
                print(f"{name}: {value}, {verdict}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
