"""The bench measures whole streams, counts them right, and says when one was not whole.

Nothing here asserts on speed.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
STREAMS, EVENTS, ROUNDS = 3, 5, 2


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The script bounds itself; its own processes end with it.
    command = [sys.executable, str(BENCH / "added_delay.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Any]:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    settings = f"--streams {STREAMS} --events {EVENTS} --pace 0.005 --rounds {ROUNDS}".split()
    finished = run_script(*settings, "--json", str(path))
    assert finished.returncode == 0, finished.stderr + finished.stdout
    return finished, json.loads(path.read_bytes())


@pytest.mark.parametrize("target", ["direct", "proxied"])
def test_every_stream_is_complete_and_every_event_counted(run: Any, target: str) -> None:
    report = run[1]
    assert report["failures"] == []
    counts = {name: report[target][name] for name in ("streams", "complete", "events")}
    total = STREAMS * ROUNDS
    assert counts == {"streams": total, "complete": total, "events": total * EVENTS}


def test_the_report_holds_all_that_is_needed_to_repeat_the_run(run: Any) -> None:
    report = run[1]
    assert report["settings"] == {
        "streams": STREAMS,
        "events": EVENTS,
        "pace": 0.005,
        "rounds": ROUNDS,
    }
    assert f"--streams {STREAMS}" in report["command"]
    assert report["machine"].keys() >= {"cpu", "cores", "kernel", "versions", "load_average"}
    assert report["machine"]["versions"].keys() >= {"python", "hoberproxy", "uvloop"}
    assert len(report["rounds"]) == 2 * ROUNDS


def test_the_delays_are_of_one_clock_and_added_is_their_difference(run: Any) -> None:
    report = run[1]
    for name in ("first_content_us", "event_delay_us"):
        for quantile in ("p50", "p99"):
            direct, proxied = (report[each][name][quantile] for each in ("direct", "proxied"))
            assert direct > 0 and proxied > 0
            assert report["added"][name][quantile] == pytest.approx(proxied - direct)
    assert report["proxy"]["peak_rss_bytes"] > 10 * 2**20


def test_the_table_goes_to_standard_output_and_progress_to_standard_error(run: Any) -> None:
    finished = run[0]
    assert re.search(r"event delay p99 +\d+ +\d+ +-?\d+", finished.stdout)
    assert f"round {ROUNDS} of {ROUNDS}" in finished.stderr
    assert "round 1" not in finished.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--streams", "0"], ["--pace", "nan"], ["--pace", "60"], ["--streams", "100000"]],
    ids=["no stream", "no pace", "hours", "millions of events"],
)
def test_a_run_without_bounds_is_refused_before_anything_starts(arguments: list[str]) -> None:
    refused = run_script(*arguments)
    assert refused.returncode == 2
    assert "expected" in refused.stderr


# What counts as a whole answer


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("added_delay")


def whole_answer(script: ModuleType) -> bytes:
    mock = script.mock_upstream
    body: bytes = b"".join(mock.stream(EVENTS))
    return b"HTTP/1.1 200 OK\r\n\r\n" + body


def test_an_event_is_there_when_its_last_byte_is(script: ModuleType) -> None:
    raw = whole_answer(script)
    pieces = [(10**15 + at, raw[at : at + 1]) for at in range(len(raw))]
    first, delays = script.read_answer(pieces, EVENTS, script.mock_upstream.MODEL)
    assert len(delays) == EVENTS
    ends = [10**15 + match.end() - 1 for match in re.finditer(rb"\n\n", raw)]
    assert first == ends[1]  # the role's event is before it
    sent = [int(each) for each in re.findall(rb'"sent_ns":(\d+)', raw)]
    assert delays == [end - ns for end, ns in zip(ends, sent, strict=False)][1 : EVENTS + 1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"0\r\n\r\n", b""),
        (b"data: [DONE]\n\n", b""),
        (b'" tok3"', b'" tok4"'),
        (b'"stop"', b"null"),
        (b'"completion_tokens":5', b'"completion_tokens":4'),
        (b'-01-01","system', b'-01-02","system'),
        (b"200 OK", b"502 Bad Gateway"),
    ],
    ids=["end", "[DONE]", "content", "finish reason", "usage", "model", "status"],
)
def test_an_answer_that_lacks_something_is_not_whole(
    script: ModuleType, old: bytes, new: bytes
) -> None:
    raw = whole_answer(script)
    assert old in raw
    with pytest.raises(ValueError, match="expected"):
        script.read_answer([(1, raw.replace(old, new))], EVENTS, script.mock_upstream.MODEL)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_answer_that_was_cut_is_not_whole(script: ModuleType, share: float) -> None:
    raw = whole_answer(script)
    with pytest.raises(ValueError):
        pieces = [(1, raw[: int(len(raw) * share)])]
        script.read_answer(pieces, EVENTS, script.mock_upstream.MODEL)


def test_a_busy_client_is_warned_of(script: ModuleType) -> None:
    summary = {
        "busiest_round_cpu_share": {"client": 0.95, "upstream": 0.1, "proxy": 0.9},
        "proxy": {"cpu_seconds": 100.0},
    }
    warnings = list(script.warn(summary, {"cores": 8, "load_average": (0.0, 0.0, 0.0)}))
    assert len(warnings) == 1
    assert "the client took 95% of a core" in warnings[0]
