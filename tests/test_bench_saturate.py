"""The load by wrk and the upstream in C: whole answers, right counts. Nothing asserts on speed."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench import runner, saturate
from bench.c_upstream import ANSWERS, c_upstream, find_compiler, serialize_answers
from bench.checks import Answer
from bench.mock_answers import Settings
from bench.procfs import ProcessTree
from bench.scenarios import SCENARIOS

from .patience import WAIT

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(events=4, event_bytes=240, block_bytes=0)
SATURATION = next(each for each in SCENARIOS if each.name == "saturation")

with_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
with_wrk = pytest.mark.skipif(saturate.find_wrk() is None, reason="needs wrk (Debian: wrk)")


def answers_of(raw: bytes) -> list[list[list[bytes]]]:
    """By kind and answer: the parts that are written."""
    at, kinds = 0, []

    def take() -> int:
        nonlocal at
        at += 4
        value: int = struct.unpack_from("=I", raw, at - 4)[0]
        return value

    for _ in range(3):
        kinds.append([[] for _ in range(take())])
        for answer in kinds[-1]:
            for _ in range(take()):
                size = take()
                answer.append(raw[at : at + size])
                at += size
    assert at == len(raw)
    return kinds


def check(raw: bytes, events: int | None) -> None:
    answer = Answer(events is not None, events)
    answer.feed(raw)
    answer.finish()
    assert answer.is_complete


def test_the_file_holds_whole_answers_that_differ() -> None:
    plain, bare, counted = answers_of(serialize_answers(SETTINGS))
    for kind, events in ((plain, None), (bare, 4), (counted, 4)):
        assert len({b"".join(answer) for answer in kind}) == len(kind) == ANSWERS
        for answer in kind:
            check(b"".join(answer), events)
            assert not set(b"\x01\x02\x03\x04\x05") & set(b"".join(answer))
    assert b'"usage":{' in counted[0][-1] and b'"usage"' not in b"".join(bare[0])


def test_each_event_is_written_alone() -> None:
    *_, counted = answers_of(serialize_answers(SETTINGS))
    assert [part.count(b"~") // 2 for part in counted[0]] == [1] * 4


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with c_upstream(tmp_path_factory.mktemp("upstream"), 0, SETTINGS) as port:
        yield port


def request(**body: Any) -> bytes:
    data = orjson.dumps({"model": "m", "messages": [], **body})
    return b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


ASKED = {"stream": True, "stream_options": {"include_usage": True}}


@with_compiler
@pytest.mark.parametrize(
    ("body", "events", "end"),
    [
        ({}, None, b'"system_fingerprint":"fp_560af6e559"}'),
        ({"stream": True}, 4, b"0\r\n\r\n"),
        (ASKED, 4, b"0\r\n\r\n"),
    ],
    ids=["a plain answer", "a stream", "a stream with usage"],
)
def test_the_upstream_answers_requests_one_after_the_other(
    port: int, body: dict[str, Any], events: int | None, end: bytes
) -> None:
    raw = request(**body)
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as peer:
        for size in (len(raw), 30):
            for at in range(0, len(raw), size):
                peer.sendall(raw[at : at + size])
            answer = b""
            while not answer.endswith(end):
                answer += peer.recv(65_536)
            check(answer, events)
            assert (b'"usage":{' in answer) is (body != {"stream": True})


def run_saturate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.saturate", *arguments, "--seconds", "1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=2 * WAIT)


@with_compiler
@with_wrk
@pytest.mark.parametrize("stream", [[], ["--stream", "--events", "4"]], ids=["plain", "stream"])
def test_wrk_counts_what_was_sent_and_how_long_it_took(
    port: int, tmp_path: Path, stream: list[str]
) -> None:
    path = tmp_path / "report.json"
    url = f"http://127.0.0.1:{port}"
    done = run_saturate("--url", url, "--connections", "4", "--json", str(path), *stream)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_bytes())
    requests = report["requests"]
    assert requests["complete"] == requests["sent"] > 0 == requests["failed"]
    assert report["events"] == (4 * requests["complete"] if stream else 0)
    assert report["total_ms"]["p50"] <= report["total_ms"]["p99"] <= report["total_ms"]["max"]
    assert report["requests_per_second"] == requests["complete"] / report["seconds"]
    assert report["server"] == {}


@with_compiler
@with_wrk
def test_answers_of_another_size_are_no_load(port: int) -> None:
    done = run_saturate("--url", f"http://127.0.0.1:{port}", "--stream", "--events", "5")
    assert done.returncode == 1
    assert "event_count" in done.stderr


def test_cpu_is_told_by_what_a_process_does() -> None:
    start = "import subprocess, sys; subprocess.run([sys.executable, '-', 'worker'])"
    with subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE) as process:
        tree, deadline = ProcessTree([process.pid]), time.monotonic() + WAIT
        while not (roles := tree.cpu_by_role()).get("worker") and time.monotonic() < deadline:
            time.sleep(0.01)
        process.communicate()  # the child's program has come to its end
    assert roles["worker"] > 0 and roles["main"] > 0
    assert tree.cpu_by_role().keys() == {"worker", "main"}, "of processes that have ended, too"


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_wrk", lambda: None)
    monkeypatch.setattr(runner, "find_compiler", lambda: "/usr/bin/cc")
    assert runner.lacking(SATURATION) == "wrk (Debian: wrk)"
    assert runner.lacking(SCENARIOS[0]) == ""


def test_wrk_is_asked_for_what_the_scenario_says() -> None:
    for variant in SATURATION.variants:
        options = saturate.parse_options(
            ["--url", "http://127.0.0.1:1", *saturate.wrk_options(variant.traffic)]
        )
        assert options.seconds == variant.traffic.duration
        assert options.stream is variant.traffic.stream
        assert options.prompt_bytes == variant.traffic.prompt_bytes
        assert not variant.traffic.stream or options.events == variant.traffic.events
