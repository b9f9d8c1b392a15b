"""The benchmark of keys and limits runs whole and adds up right. Nothing here asserts on speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.account import LIMITED, NO_KEY, PLAIN_KEY, TARGETS, parse_options, render, summarize
from tests.support.patience import WAIT

ROOT = Path(__file__).parents[2]
PATIENCE = 2 * WAIT


def test_a_quick_run_measures_every_proxy(tmp_path: Path) -> None:
    output = tmp_path / "account.json"
    command = [sys.executable, "-m", "bench.account", "--quick", "--workers", "2"]
    done = subprocess.run(
        [*command, "--json", str(output)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_bytes())
    assert set(result["targets"]) == set(TARGETS)
    for each in result["targets"].values():
        assert len(each["rounds"]) == 1 and each["least"] > 0
    assert result["journal_by_micro"] > 0
    assert result["settings"]["workers"] == 2
    assert "its figures mean nothing" in done.stdout
    assert "hb_live_" not in output.read_text() + done.stdout


def test_leasts_are_compared_and_the_spread_is_that_of_single_rounds() -> None:
    values = {NO_KEY: [50.0, 60.0, 40.0], PLAIN_KEY: [51.0] * 3, LIMITED: [70.0, 55.0, 56.0]}
    result = summarize(values, 6.5)
    assert result["keys_and_limits"] == {"of_leasts": 15.0, "least": -5.0, "most": 20.0}
    assert result["together"] == 21.5
    text = render(result, parse_options(["--rounds", "3"]))
    assert "keys and limits: 15.0 µs, least to least of 3 rounds with 4 workers" in text
    assert "together 21.5 µs; the bar is 20" in text


@pytest.mark.parametrize("option", ["--workers", "--rounds", "--requests", "--connections"])
def test_a_wrong_option_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options([option, "0"])
    assert "1 or more" in capsys.readouterr().err
