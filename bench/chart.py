"""The results as a picture: CPU of each server as a multiple of nginx's, with the bars as marks.

python -m bench.report --svg bench/results/*.json

Pure: result files in, SVG out. Every text of it is a name or a number of the results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil
from typing import Any

from .scenarios import DIRECT, MEASURES, PROXY, PROXY_WITH_LOG, REFERENCE

Report = dict[str, Any]

WIDTH = 940  # all in pixels
LEFT = 350  # of the names
RIGHT = 90  # of the last number
TOP = 64
BAR, GAP, GROUP_GAP = 13, 4, 16
COLOURS = {PROXY: "#1f6feb", PROXY_WITH_LOG: "#8ab4f8", "haproxy": "#9aa0a6"}
OTHER_COLOUR = "#c8ccd0"
FONT = "font-family='system-ui,sans-serif'"


@dataclass(frozen=True, slots=True)
class Bar:
    """One server in one scenario; `limit` is what it may be at most, where there is such a bar."""

    target: str
    ratio: float
    low: float
    high: float
    limit: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """One load and what is counted."""

    name: str
    bars: tuple[Bar, ...]


def groups(reports: Iterable[Report]) -> list[Group]:
    """All that has a bar against nginx; of a scenario in two reports the later one counts."""
    return [group for part in scenarios_of(reports) for group in _groups_of(part)]


def without_beside(report: Report) -> Report:
    """Return a report without other versions of the proxy, which a README is not about."""
    beside = re.findall(r"--beside[ =]'?([^ =]+)=", report.get("command", ""))
    if not beside or "scenarios" not in report:
        return report
    peers = {name: each for name, each in report["peers"].items() if name not in beside}
    scenarios = [
        part | {"results": [each for each in part["results"] if each["target"] not in beside]}
        for part in report["scenarios"]
    ]
    return report | {"peers": peers, "scenarios": scenarios}


def scenarios_of(reports: Iterable[Report]) -> list[Report]:
    """Each scenario once, as the last report has it that does; some have none."""
    kept = [without_beside(report) for report in reports]
    parts = {part["name"]: part for report in kept for part in report.get("scenarios", ())}
    return list(parts.values())


def _groups_of(scenario: Report) -> Iterator[Group]:
    limits: dict[tuple[str, str], dict[str, float]] = {}
    for bar in scenario["bars"]:
        if bar["text"].endswith(f"× {REFERENCE}"):
            limits.setdefault((bar["variant"], bar["measure"]), {})[bar["target"]] = bar["limit"]
    for (variant, measure), of_target in limits.items():
        bars = tuple(
            Bar(
                each["target"],
                each["ratio"],
                each["ratio_low"],
                each["ratio_high"],
                of_target.get(each["target"]),
            )
            for each in scenario["results"]
            if (each["variant"], each["measure"]) == (variant, measure)
            and each["ratio"] is not None
            and each["target"] not in (DIRECT, REFERENCE)
        )
        name = ", ".join(filter(None, (scenario["name"], variant)))
        if bars:
            yield Group(f"{name}: {MEASURES[measure].label}", bars)


def svg(reports: Sequence[Report]) -> str:
    """The picture; bars beyond its right edge are cut and say their number."""
    drawn = groups(reports)
    known = [bar.ratio for group in drawn for bar in group.bars]
    known += [bar.limit for group in drawn for bar in group.bars if bar.limit is not None]
    most = min(ceil(max(known, default=1.0) * 2) / 2, 8.0)
    scale = (WIDTH - LEFT - RIGHT) / most
    rows = sum(len(group.bars) for group in drawn)
    height = TOP + rows * (BAR + GAP) + len(drawn) * GROUP_GAP + 40
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' "
        f"width='{WIDTH}' height='{height}' role='img'>",
        f"<title>CPU of the hop as a multiple of {REFERENCE}'s</title>",
        f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
        _text(16, 26, f"CPU of the hop, {REFERENCE} = 1", size=16, weight="600"),
        *_legend(drawn),
        *_grid(most, scale, height),
    ]
    y = float(TOP)
    for group in drawn:
        middle = y + len(group.bars) * (BAR + GAP) / 2 + 2
        lines.append(_text(LEFT - 10, middle, group.name, anchor="end"))
        for bar in group.bars:
            lines += _bar(bar, y, scale, most)
            y += BAR + GAP
        y += GROUP_GAP
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend(drawn: Iterable[Group]) -> Iterator[str]:
    names = dict.fromkeys(bar.target for group in drawn for bar in group.bars)
    x = 16.0
    for name in names:
        colour = COLOURS.get(name, OTHER_COLOUR)
        yield f"<rect x='{x:.0f}' y='38' width='11' height='11' fill='{colour}'/>"
        yield _text(x + 16, 48, name, size=12)
        x += 34 + 7 * len(name)
    yield f"<path d='M{x + 4:.0f} 37v13' stroke='#111111' stroke-width='2'/>"
    yield _text(x + 12, 48, "the most it may be", size=12)
    x += 140
    yield f"<path d='M{x:.0f} 43.5h16' stroke='#111111' stroke-opacity='.45'/>"
    yield _text(x + 22, 48, "spread of the rounds", size=12)


def _grid(most: float, scale: float, height: int) -> Iterator[str]:
    bottom = height - 34
    for number in range(int(most) + 1):
        x = LEFT + number * scale
        dash = "" if number == 1 else " stroke-dasharray='2 4'"
        colour = "#d0443e" if number == 1 else "#c8ccd0"
        yield f"<path d='M{x:.1f} {TOP - 6}V{bottom}' stroke='{colour}'{dash}/>"
        yield _text(x, bottom + 16, f"{number} ×" if number else "0", size=12, anchor="middle")


def _bar(bar: Bar, y: float, scale: float, most: float) -> Iterator[str]:
    width = min(bar.ratio, most) * scale
    colour = COLOURS.get(bar.target, OTHER_COLOUR)
    middle = y + BAR / 2
    yield f"<rect x='{LEFT}' y='{y:.1f}' width='{width:.1f}' height='{BAR}' fill='{colour}'/>"
    low, high = (LEFT + min(each, most) * scale for each in (bar.low, bar.high))
    yield f"<path d='M{low:.1f} {middle:.1f}H{high:.1f}' stroke='#111111' stroke-opacity='.45'/>"
    end = LEFT + width
    if bar.limit is not None:
        x = LEFT + min(bar.limit, most) * scale
        yield f"<path d='M{x:.1f} {y - 2:.1f}v{BAR + 4}' stroke='#111111' stroke-width='2'/>"
        end = max(end, x)
    yield _text(max(end, high) + 8, y + BAR - 2, f"{bar.ratio:.2f}", size=12)


def _text(
    x: float, y: float, text: str, *, size: int = 13, weight: str = "400", anchor: str = "start"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='#111111'>{escape(text)}</text>"
    )
