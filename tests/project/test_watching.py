"""Alerts and dashboard of deploy/ name metrics that there are, in words Prometheus takes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from hoberproxy.accounting.exposition import FAMILIES, render
from tests.support.patience import WAIT
from tests.support.tools import need_tool

DEPLOY = Path(__file__).parents[2] / "deploy"
OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
RULES = DEPLOY / "prometheus-rules.yml"
RULES_TEST = Path(__file__).parents[1] / "data/prometheus-rules.test.yml"
DASHBOARD = DEPLOY / "grafana-dashboard.json"

# What Grafana puts in for its own variables.
VARIABLES = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}
VARIABLES |= {"$model": ".*", "$provider": ".*"}


def promtool(*arguments: str, given: bytes = b"") -> str:
    """What it printed; it must have been content."""
    command = [need_tool("promtool"), *arguments]
    ended = subprocess.run(
        command, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=WAIT
    )
    said = ended.stdout.decode()
    assert ended.returncode == 0, said
    return said


def scraped() -> bytes:
    """Every metric there is, with every label."""
    return render(
        {
            family.name: [
                [
                    list(family.labels),
                    [0.0] * (len(family.buckets) + 2) if family.kind == "histogram" else 1,
                ]
            ]
            for family in FAMILIES
        }
    )


def samples() -> dict[str, set[str]]:
    """Names of samples and the labels they have."""
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(scraped().decode())
        for sample in family.samples
    }


def expressions() -> Iterator[str]:
    """Return all queries of the dashboard."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield expression


def unknown(text: str) -> set[str]:
    """Names of metrics in it that there are not."""
    return set(re.findall(r"\bhoberproxy_\w+", text)) - set(samples())


def test_every_metric_is_documented_and_no_other() -> None:
    (table,) = re.findall(r"(?ms)^## Metrics\n.*?(^\|.*?)\n\n", OPERATING.read_text())
    documented = {
        name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert documented == {family.name for family in FAMILIES}


def test_metrics_are_named_by_the_conventions() -> None:
    assert promtool("check", "metrics", given=scraped()) == ""


def test_prometheus_takes_the_alerts() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(RULES))


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    promtool("test", "rules", str(RULES_TEST))
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    assert alerts == set(re.findall(r"- alertname: (\w+)", RULES_TEST.read_text()))


def test_alerts_name_metrics_that_there_are() -> None:
    assert not unknown(RULES.read_text())
    assert not unknown(RULES_TEST.read_text())


def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    assert not unknown(DASHBOARD.read_text())
    rules: list[dict[str, Any]] = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(expressions())
    ]
    assert len(rules) > 10
    assert not any("$" in rule["expr"] for rule in rules)
    file = tmp_path / "rules.json"  # JSON is YAML too
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


def test_the_dashboard_groups_by_labels_that_there_are() -> None:
    known = {"job", "instance"}.union(*samples().values())
    for expression in expressions():
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= known, expression


def test_the_panels_fit_beside_each_other() -> None:
    seen: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & seen, panel["title"]
        seen |= cells
        assert place["x"] + place["w"] <= 24
