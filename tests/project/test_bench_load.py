"""The bench's load generator counts what came whole, and nothing else.

Against its own mock upstream, in both loops; nothing here asserts on speed.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from bench import checks, client, load
from bench import mock_answers as answers
from bench import mock_upstream as mock
from bench.histogram import Histogram
from bench.procfs import ProcessTree
from tests.support.patience import WAIT

DEADLINE = WAIT
ROOT = Path(__file__).parents[2]
STREAM = ["--stream", "--events", "4", "--pace", "0.002"]


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    """The mock as a process of its own; its URL."""
    command = [sys.executable, "-m", "bench.mock_upstream", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        finally:
            process.kill()


async def run_load(url: str, *arguments: str) -> dict[str, Any]:
    """The report of a run in this process."""
    options = load.parse_options(["--url", url, *arguments])
    async with asyncio.timeout(DEADLINE):
        return await load.run(options, load.resolve(options.url, options.allow_remote))


def assert_whole(report: dict[str, Any], requests: int, events: int) -> None:
    assert report["errors"] == {}
    counts = {name: report["requests"][name] for name in ("sent", "complete", "failed")}
    assert counts == {"sent": requests, "complete": requests, "failed": 0}
    assert report["events"] == requests * events
    assert report["total_ms"]["count"] == requests


# Whole runs


async def test_a_closed_loop_of_streams_comes_whole(upstream: str) -> None:
    report = await run_load(upstream, "--connections", "5", "--requests", "20", *STREAM)
    assert_whole(report, 20, 4)
    assert report["first_content_ms"]["count"] == 20
    assert report["event_delay_us"]["count"] == 80
    assert report["gap_ms"]["count"] == 60
    # A stream of which all came in one read has no rate: a busy machine may read so.
    assert report["tokens_per_second"]["count"] <= 20
    assert 0 < report["first_content_ms"]["max"] < report["total_ms"]["max"]


async def test_an_open_loop_begins_all_that_was_due(upstream: str) -> None:
    report = await run_load(upstream, "--rate", "200", "--requests", "30", "--ramp", "0.1")
    assert_whole(report, 30, 0)
    assert report["first_content_ms"]["p50"] is None, "an answer in one piece has none"


async def test_a_stream_over_https_comes_whole() -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
    wheel = mock.Wheel(asyncio.get_running_loop())
    server = await mock.serve(wheel, tls=tls)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    report = await run_load(url, "--requests", "6", *STREAM)
    server.close()
    wheel.close()
    assert_whole(report, 6, 4)


async def test_a_duration_bounds_what_is_begun(upstream: str) -> None:
    report = await run_load(upstream, "--rate", "100", "--duration", "0.2")
    assert_whole(report, 20, 0)


async def test_what_was_due_in_time_is_begun_however_late_the_generator_is(upstream: str) -> None:
    asyncio.get_running_loop().call_later(0.05, time.sleep, 0.3)
    report = await run_load(upstream, "--rate", "100", "--duration", "0.2")
    assert_whole(report, 20, 0)


async def test_an_unpaced_stream_is_counted_event_by_event(upstream: str) -> None:
    long = ["--stream", "--events", "1500", "--pace", "0", "--event-bytes", "300"]
    report = await run_load(upstream, "--connections", "2", "--requests", "4", *long)
    assert_whole(report, 4, 1500)
    assert report["event_delay_us"]["count"] == 6000
    assert report["gap_ms"]["count"] == 4 * 1499
    assert report["bytes"] > 4 * 1500 * 300


async def test_the_warm_up_is_not_counted(upstream: str) -> None:
    report = await run_load(upstream, "--requests", "6", "--warmup", "9", *STREAM)
    assert_whole(report, 6, 4)
    assert report["requests"]["warmup"] == 9


async def test_each_request_can_have_a_connection_of_its_own(
    upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = spy_on_connections(monkeypatch)
    report = await run_load(upstream, "--connections", "3", "--requests", "9", "--new-connection")
    assert_whole(report, 9, 0)
    assert numbers == list(range(9))


async def test_connections_are_kept_otherwise(
    upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = spy_on_connections(monkeypatch)
    report = await run_load(upstream, "--connections", "3", "--requests", "9", "--warmup", "3")
    assert_whole(report, 9, 0)
    assert numbers == [0, 1, 2]


def spy_on_connections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    numbers: list[int] = []

    async def connect(target: Any, exchange: Any, number: int, on_end: Any) -> client.Client:
        numbers.append(number)
        return await client.connect(target, exchange, number, on_end)

    monkeypatch.setattr(load, "connect", connect)
    return numbers


async def test_other_addresses_of_loopback_are_used_when_ports_run_out(
    upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PORTS_PER_ADDRESS", 2)
    report = await run_load(upstream, "--requests", "7", "--new-connection")
    assert_whole(report, 7, 0)


async def test_a_slow_reader_takes_as_long_as_its_rate_says(upstream: str) -> None:
    size = ["--stream", "--pace", "0", "--events", "500", "--read-rate", "400000"]
    report = await run_load(upstream, "--connections", "1", "--requests", "1", *size)
    assert_whole(report, 1, 500)
    assert report["total_ms"]["max"] >= 150, "120 KB and more at 400 KB/s, less one read"


async def test_the_mock_and_the_server_are_measured_when_named(upstream: str) -> None:
    named = ["--mock-url", upstream, "--server-pid", str(os.getpid())]
    report = await run_load(upstream, "--requests", "5", *named, *STREAM)
    assert report["upstream"]["requests"] == 20 / 4
    assert report["upstream"]["late_us"]["count"] == 20
    server = report["server"]
    assert server["cpu_seconds"] > 0 and server["processes"] >= 1
    assert server["cpu_us_per_event"] == pytest.approx(server["cpu_seconds"] * 1e6 / 20)
    assert server["rss_peak_bytes"] > 2**20


# Errors


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("status:503", "status_503"),
        ("cut", "cut"),
        ("cut:2", "cut"),
        ("reset", "reset"),
        ("reset:2", "reset"),
        ("stall", "timeout"),
        ("stall:2", "timeout"),
        ("error:2", "error_event"),
    ],
)
async def test_a_fault_is_an_error_of_its_class_and_in_no_latency(
    upstream: str, fault: str, kind: str
) -> None:
    shortly = ["--upstream-fault", fault, "--timeout", "0.3", *STREAM]
    report = await run_load(upstream, "--connections", "2", "--requests", "3", *shortly)
    assert report["errors"] == {kind: 3}
    assert report["requests"]["failed"] == 3 and report["events"] == 0
    for name in ("first_content_ms", "event_delay_us", "gap_ms", "total_ms", "tokens_per_second"):
        assert report[name]["count"] == 0


async def test_a_slow_head_is_waited_for_and_shows(upstream: str) -> None:
    report = await run_load(
        upstream, "--requests", "1", "--upstream-fault", "slow-head:0.1", *STREAM
    )
    assert_whole(report, 1, 4)
    assert report["first_content_ms"]["max"] >= 100


async def test_a_closed_port_is_told_as_refused(unused_tcp_port: int) -> None:
    report = await run_load(f"http://127.0.0.1:{unused_tcp_port}", "--requests", "4")
    assert report["errors"] == {"connect_refused": 4}


async def test_an_open_loop_counts_from_when_a_request_was_due(upstream: str) -> None:
    loop = asyncio.get_running_loop()
    loop.call_later(0.05, time.sleep, 0.2)  # nothing is sent meanwhile, though it is due
    report = await run_load(upstream, "--rate", "200", "--requests", "50")
    assert_whole(report, 50, 0)
    assert report["total_ms"]["max"] >= 150
    assert report["generator"]["late_wakeups_ms"]["max"] >= 150
    assert report["generator"]["is_bottleneck"]


@pytest.mark.parametrize(
    ("arguments", "is_counted"),
    [
        (["--connections", "1"], False),
        (["--connections", "1", "--new-connection"], True),
        (["--rate", "100"], True),
    ],
    ids=["one that is kept: no", "one per request: yes", "one that an arrival waits for: yes"],
)
async def test_whether_the_time_to_connect_is_part_of_a_request(
    upstream: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], is_counted: bool
) -> None:
    async def connect(*details: Any) -> client.Client:
        await asyncio.sleep(0.2)
        return await client.connect(*details)

    monkeypatch.setattr(load, "connect", connect)
    report = await run_load(upstream, "--requests", "1", *arguments)
    # Less than the 200 ms: the loop's timers count from a time in whole milliseconds.
    assert (report["total_ms"]["max"] >= 150) is is_counted


# What counts as whole


def answer_bytes(events: int = 3, **settings: Any) -> bytes:
    script = answers.make_script(answers.Settings(events=events, **settings), True, True)
    raw = script.head + b"".join(script.writes)
    raw = raw.replace(answers.ID, b"0" * 8).replace(answers.CREATED, b"1700000000")
    return raw.replace(answers.STAMP, b"%019d" % 12345)


def check(pieces: list[bytes], events: int | None = 3) -> checks.Answer:
    answer = checks.Answer(True, events)
    counted = 0
    for piece in pieces:
        counted += answer.feed(piece)
    assert counted == answer.events
    if not answer.is_complete:
        answer.feed_eof()
    answer.finish()
    return answer


RAW = answer_bytes()


@pytest.mark.parametrize("expected", [3, None], ids=["by its marks", "by parsing"])
def test_an_answer_does_not_depend_on_where_it_was_cut(expected: int | None) -> None:
    for cut in range(len(RAW) + 1):
        assert check([RAW[:cut], RAW[cut:]], expected).events == 3, f"cut at {cut}"


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("size", [1, 2, 3, 50, 5000])
def test_framing_and_line_ends_may_come_in_any_pieces(ending: bytes, size: int) -> None:
    chunks = checks.Chunks()
    body = chunks.feed(RAW.partition(b"\r\n\r\n")[2]).replace(b"\n", ending)
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%X;x=y\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    raw = RAW.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + framed
    assert check([raw[at : at + 1] for at in range(len(raw))]).events == 3
    assert check([raw]).events == 3


@given(st.lists(st.binary(min_size=1, max_size=40)), st.integers(1, 20))
def test_chunks_come_out_as_they_went_in(parts: list[bytes], size: int) -> None:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    chunks, seen = checks.Chunks(), b""
    for at in range(0, len(framed), size):
        seen += chunks.feed(framed[at : at + size])
    assert seen == b"".join(parts)
    assert chunks.is_complete


def lacks_event(raw: bytes) -> bytes:
    return re.sub(rb"[0-9a-f]+\r\ndata: [^\n]*~000002@[^\n]*\n\n\r\n", b"", raw)


def swapped(raw: bytes) -> bytes:
    return raw.replace(b"~000001@", b"~x@").replace(b"~000002@", b"~000001@").replace(
        b"~x@", b"~000002@"
    )  # fmt: skip


DAMAGES: list[tuple[str, str, Callable[[bytes], bytes]]] = [
    ("an event is missing", "event_count", lacks_event),
    ("events are swapped", "order", swapped),
    ("an event comes twice", "order", lambda raw: raw.replace(b"~000002@", b"~000001@")),
    ("a mark is gone", "stamp", lambda raw: raw.replace(b"~000002@", b"~??????@")),
    ("no [DONE]", "no_done", lambda raw: raw.replace(b"e\r\ndata: [DONE]\n\n\r\n", b"")),
    ("no last chunk", "cut", lambda raw: raw.removesuffix(b"0\r\n\r\n")),
    ("half a stream", "cut", lambda raw: raw[: len(raw) // 2]),
    ("nothing", "cut", lambda raw: b""),
    ("another status", "status_502", lambda raw: raw.replace(b"200 OK", b"502 Bad Gateway")),
    (
        "an error event",
        "error_event",
        lambda raw: raw.replace(b'e\r\ndata: [DONE]', b'1c\r\ndata: {"error":{"code":1}}'),
    ),
    (
        "events after [DONE]",
        "after_done",
        lambda raw: raw.replace(b"0\r\n\r\n", b"9\r\ndata: {}\n\r\n1\r\n\n\r\n0\r\n\r\n"),
    ),
    ("a broken chunk size", "framing", lambda raw: raw.replace(b"\r\ne\r\n", b"\r\n-e\r\n")),
    ("no HTTP", "framing", lambda raw: b"SSH" + raw[3:]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "damage"), [pytest.param(kind, damage, id=name) for name, kind, damage in DAMAGES]
)
@pytest.mark.parametrize("step", [1, 100, 100_000], ids=["bytes", "pieces", "whole"])
def test_what_is_not_whole_is_told_by_its_class(
    kind: str, damage: Callable[[bytes], bytes], step: int
) -> None:
    raw = damage(RAW)
    assert raw != RAW
    with pytest.raises(checks.AnswerError) as caught:
        check([raw[at : at + step] for at in range(0, len(raw), step)])
    assert caught.value.kind == kind


def test_another_servers_stream_is_counted_by_what_its_deltas_hold() -> None:
    deltas = [b'{"role":"assistant","content":""}', b'{"content":"a"}', b"{}",
              b'{"tool_calls":[{"index":0}]}']  # fmt: skip
    events = [b'data: {"choices":[{"delta":%b}]}\n\n' % delta for delta in deltas]
    events += [b": a comment\n\n", b'data: {"choices":[],"usage":{"completion_tokens":9}}\n\n']
    body = b"".join([*events, b"data: [DONE]\n\n"])
    answer = check([b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body], None)
    assert (answer.events, answer.completion_tokens) == (2, 9)
    assert not answer.can_reuse


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"[]", "invalid_body"), (b'{"choices":[{"message":{"content":"ab"}}]}', "body_size")],
    ids=["no completion", "another size"],
)
def test_an_answer_in_one_piece_is_looked_at_too(body: bytes, kind: str) -> None:
    answer = checks.Answer(False, None, 3)
    answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    with pytest.raises(checks.AnswerError) as caught:
        answer.finish()
    assert caught.value.kind == kind


# The command


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.load", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)


def test_the_command_prints_a_table_and_writes_the_report(upstream: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    finished = run_command(
        "--url", upstream, "--key", "hb_test_secret", "--requests", "10", "--json", str(path),
        *STREAM,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"^event delay, µs( +[0-9.]+){6}$", finished.stdout, re.MULTILINE)
    assert finished.stderr == "", "no progress bar where there is no terminal"
    report = json.loads(path.read_bytes())
    assert report["settings"]["events"] == 4 and report["server"] is None
    assert "hb_test_secret" not in path.read_text() + finished.stdout


def test_the_command_fails_when_a_request_did(upstream: str) -> None:
    finished = run_command("--url", upstream, "--requests", "2", "--upstream-fault", "status:500")
    assert finished.returncode == 1
    assert "error status_500: 2" in finished.stdout


@pytest.mark.parametrize("url", ["http://192.0.2.1", "http://0.0.0.0:1", "ftp://127.0.0.1", "x"])
def test_no_load_goes_to_another_machine_unless_allowed(url: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        load.resolve(url, allow_remote=False)


def test_another_machine_gets_no_field_of_ours() -> None:
    options = load.parse_options(["--url", "http://192.0.2.1", "--allow-remote", "--stream"])
    assert load.resolve(options.url, options.allow_remote).address == ("192.0.2.1", 80)
    exchange = load.make_exchange(options, "192.0.2.1")
    assert b'"bench"' not in exchange.request and exchange.events is None


@pytest.mark.parametrize(
    "arguments",
    [["--connections", "0"], ["--rate", "-1"], ["--rate", "1", "--connections", "1"],
     ["--requests", "1", "--duration", "1"], ["--duration", "nan"], ["--ramp", "-1"],
     ["--key", "a\r\nb"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        load.parse_options(["--url", "http://127.0.0.1", *arguments])


def test_an_interrupted_run_reports_what_there_is(upstream: str) -> None:
    command = [sys.executable, "-m", "bench.load", "--url", upstream, "--duration", "60", *STREAM]
    with subprocess.Popen(
        [*command, "--mock-url", upstream], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            asyncio.run(wait_for_requests(upstream))
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "error interrupted: " in output


async def wait_for_requests(url: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while json.loads(await load.fetch(url, "/bench/stats"))["streams_open"] < 20:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.01)


# Doubts, progress, processes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_terminal_shows_progress(upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    progress = load.Progress(out)
    monkeypatch.setattr(load, "Progress", lambda _: progress)
    await run_load(upstream, "--duration", "0.3", "--connections", "1", *STREAM)
    assert re.search(r"\r\[#+ *\] +\d+% \d+ complete, 0 failed", out.getvalue())
    assert out.getvalue().endswith("\r\x1b[K"), "nothing of it stays"


def test_the_generator_says_when_it_was_the_bottleneck() -> None:
    meter = load.Meter(load.parse_options(["--url", "http://127.0.0.1"]))
    late = Histogram()
    late.record(100_000)
    assert load.find_doubts(meter, late) == []
    meter.cpu_share = 0.97
    late.record(50_000_000, 10)
    share, wakeups = load.find_doubts(meter, late)
    assert "97% of a core" in share and "50.0 ms late" in wakeups


def test_a_process_counts_with_its_children() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", script, child], start_new_session=True) as parent:
        try:
            tree = ProcessTree([parent.pid])
            deadline = time.monotonic() + DEADLINE
            while tree.cpu_seconds() < 0.2 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert len(tree.pids()) == 2
            alone = ProcessTree([pid for pid in tree.pids() if pid != parent.pid])
            assert alone.cpu_seconds() > 0.05
            assert tree.memory_bytes()[1] > alone.memory_bytes()[1] > 2**20
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_process_that_is_none_is_refused() -> None:
    with pytest.raises(ProcessLookupError, match="expected a running process"):
        ProcessTree([2**22 + 1])
