"""From the values of single runs to least, ratio, spread, and whether the bars were met.

Least of rounds to least of rounds: on a shared machine noise only adds. The spread of a ratio is
that of the rounds', each within its own round. Pure: no clock, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .scenarios import MEASURES, PROXY, PROXY_WITH_LOG, REFERENCE, Bar, Kind, Scenario

Rounds = dict[int, float]  # a value of each round that has one
Table = dict[tuple[str, str, str], Rounds]  # by variant, measure and target


@dataclass(frozen=True, slots=True)
class Result:
    """One measure of one target. `ratio` and its spread are to the reference, None without it."""

    variant: str
    measure: str
    target: str
    least: float
    most: float
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar, and what it was held against; `value` None: the run does not say."""

    text: str
    target: str
    variant: str
    measure: str
    limit: float
    value: float | None

    @property
    def is_met(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit


def summarize(scenario: Scenario, table: Table, targets: Sequence[str]) -> list[Result]:
    """All results in the order of the scenario's variants and measures."""
    full = table | _slopes(scenario, table, targets)
    results = []
    names = [each.name for each in scenario.variants]
    for variant in (*names, _slope_name(scenario)) if scenario.slope else names:
        for measure in scenario.measures:
            reference = full.get((variant, measure, REFERENCE), {})
            for target in targets:
                if rounds := full.get((variant, measure, target)):
                    results.append(_result((variant, measure, target), rounds, reference))
    return results


def _result(key: tuple[str, str, str], rounds: Rounds, reference: Rounds) -> Result:
    least, most = min(rounds.values()), max(rounds.values())
    ratios = [rounds[each] / reference[each] for each in rounds if reference.get(each)]
    if not ratios or min(reference.values()) <= 0:
        return Result(*key, least, most)
    return Result(*key, least, most, least / min(reference.values()), min(ratios), max(ratios))


def _slope_name(scenario: Scenario) -> str:
    return " to ".join(scenario.slope) if scenario.slope else ""


def _slopes(scenario: Scenario, table: Table, targets: Iterable[str]) -> Table:
    """What each further KB of the prompt costs, of the leasts and so of all rounds alike."""
    if scenario.slope is None:
        return {}
    low, high = scenario.slope
    sizes = {each.name: each.traffic.prompt_bytes or 0 for each in scenario.variants}
    extra = (sizes[high] - sizes[low]) / 1000
    slopes: Table = {}
    for target in targets:
        small = table.get((low, "cpu_request", target))
        large = table.get((high, "cpu_request", target))
        if small and large and extra > 0:
            base = min(small.values())
            slopes[_slope_name(scenario), "cpu_prompt_kb", target] = {
                number: (value - base) / extra for number, value in large.items()
            }
    return slopes


def judge(scenario: Scenario, results: Sequence[Result]) -> list[Verdict]:
    """Each bar for each of the proxy's two forms that was measured."""
    targets = [each for each in (PROXY, PROXY_WITH_LOG) if any(r.target == each for r in results)]
    return [verdict for bar in scenario.bars for verdict in _verdicts(bar, results, targets)]


def _verdicts(bar: Bar, results: Sequence[Result], targets: Iterable[str]) -> Iterator[Verdict]:
    def least(variant: str, target: str) -> float | None:
        for each in results:
            if (each.variant, each.measure, each.target) == (variant, bar.measure, target):
                return each.least
        return None

    for target in targets:
        limit, own = bar.limit_of(target), least(bar.variant, target)
        other = {
            Kind.RATIO: least(bar.variant, REFERENCE),
            Kind.ADDED: least(bar.variant, REFERENCE),
            Kind.OWN: least(bar.against, target),
            Kind.MOST: 0.0,
        }[bar.kind]
        value = None if own is None or other is None else _compare(bar.kind, own, other)
        text = describe_bar(bar, limit)
        yield Verdict(text, target, bar.variant, bar.measure, limit, value)


def _compare(kind: Kind, own: float, other: float) -> float | None:
    if kind in (Kind.ADDED, Kind.MOST):
        return own - other
    return own / other if other > 0 else None


def describe_bar(bar: Bar, limit: float) -> str:
    """In a few words."""
    unit = MEASURES[bar.measure].unit
    return {
        Kind.RATIO: f"≤ {limit:g} × {REFERENCE}",
        Kind.ADDED: f"≤ {REFERENCE} + {limit:g} {unit}",
        Kind.OWN: f"≤ {limit:g} × its own over {bar.against}",
        Kind.MOST: f"≤ {limit:g} {unit}",
    }[bar.kind]
