"""The access log: lines nobody can forge, and a sink that may block, fail or be slow."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.accounting.access_log import AccessLog, format_human, format_json
from hoberproxy.accounting.record import Record
from hoberproxy.errors import FailedAttempt
from tests.support.patience import WAIT, wait_until

PATIENCE = WAIT
PIPE_BYTES = 1 << 20  # more than a pipe holds


def record(**values: Any) -> Record:
    return Record(
        **{
            "id": "req_1",
            "started": 1_700_000_000.0,
            "key_id": "key_1",
            "key_label": "team-a",
            "path": "/v1/chat/completions",
            "requested": ("a/b",),
            "slug": "a/b",
            "provider": "east",
            "status": 200,
            "attempts": 1,
            "prompt_tokens": 12,
            "completion_tokens": 34,
            "has_usage": True,
            "bytes_out": 8211,
            "first_content": 0.21,
            "total": 1.5,
        }
        | values
    )


FAILED = record(
    status=504,
    code="upstream_timeout",
    phase="head",
    has_usage=False,
    first_content=None,
    attempts=2,
    failures=(
        FailedAttempt("west", 503, "upstream_error", "head", 12),
        FailedAttempt("east", None, "upstream_timeout", "connect", 5000),
    ),
)


# Lines


def test_a_finished_request_is_one_human_line() -> None:
    assert format_human(record()) == (
        "2023-11-14T22:13:21.500Z 200 model=a/b provider=east key=team-a in=12 out=34 "
        "first=210ms total=1500ms bytes=8211 tries=1 id=req_1"
    )


def test_the_line_of_a_failed_request_says_why_and_names_its_attempts() -> None:
    line = format_human(FAILED)
    assert " 504 " in line and " in=- out=- first=- " in line
    assert line.endswith(
        " code=upstream_timeout phase=head "
        "failed=west:503:upstream_error:head:12ms,east:-:upstream_timeout:connect:5000ms"
    )


def test_estimated_counts_are_marked() -> None:
    line = format_human(record(has_usage=False, estimated=True))
    assert " in=~12 out=~34 " in line


def test_the_line_of_a_request_that_no_model_answered_has_the_requested_one() -> None:
    assert " model=no/such " in format_human(record(slug="", requested=("no/such", "a/b")))
    assert json.loads(format_json(record(slug="", requested=("no/such",))))["model"] == "no/such"


def test_empty_values_are_a_dash() -> None:
    line = format_human(record(slug="", requested=(), provider="", key_label=""))
    assert " model=- provider=- key=- " in line


@pytest.mark.parametrize(
    ("text", "word"),
    [
        pytest.param("llama3.2:3b", "llama3.2:3b", id="plain"),
        pytest.param("a b", '"a b"', id="a space is quoted"),
        pytest.param("x status=200", '"x status=200"', id="a forged member stays one word"),
        pytest.param('a"b\\', '"a\\"b\\\\"', id="quote and backslash"),
        pytest.param("a\nb\r", '"a\\x0ab\\x0d"', id="line ends"),
        pytest.param("\x1b[31m", '"\\x1b[31m"', id="terminal escape"),
        pytest.param("\x7f\x9b", '"\\x7f\\x9b"', id="DEL and C1 control"),
        pytest.param("a\u2028\u202e", '"a\\u2028\\u202e"', id="line separator, right-to-left"),
        pytest.param("\ud800", '"\\ud800"', id="half a surrogate pair"),
        pytest.param("\U000e0001", '"\\U000e0001"', id="invisible tag"),
        pytest.param("équipe", '"équipe"', id="letters of any language"),
        pytest.param("x" * 300, f'"{"x" * 128}"', id="too long is cut"),
    ],
)
def test_foreign_text_cannot_forge_a_human_line(text: str, word: str) -> None:
    assert f" model={word} provider=" in format_human(record(slug=text))
    assert f" key={word} in=" in format_human(record(key_label=text))


@given(st.text(alphabet=st.characters(), max_size=40))
def test_no_text_puts_a_control_character_into_either_form(text: str) -> None:
    one = record(slug=text, provider=text, client_request_id=text, code=text, finish_reason=text)
    assert format_human(one).isprintable()
    line = format_json(one)
    assert line.decode("ascii").isprintable()
    assert json.loads(line)["model"] == (text or "a/b")


def test_the_json_line_holds_what_an_operator_asks_for() -> None:
    assert json.loads(format_json(FAILED)) == {
        "time": "2023-11-14T22:13:21.500Z",
        "id": "req_1",
        "client_request_id": "",
        "key_id": "key_1",
        "key": "team-a",
        "path": "/v1/chat/completions",
        "model": "a/b",
        "provider": "east",
        "status": 504,
        "code": "upstream_timeout",
        "phase": "head",
        "attempts": 2,
        "failures": [
            {
                "provider": "west",
                "status": 503,
                "code": "upstream_error",
                "phase": "head",
                "milliseconds": 12,
            },
            {
                "provider": "east",
                "status": None,
                "code": "upstream_timeout",
                "phase": "connect",
                "milliseconds": 5000,
            },
        ],
        "streamed": False,
        "finish_reason": "",
        "prompt_tokens": 12,
        "completion_tokens": 34,
        "cached_tokens": 0,
        "cache_write_tokens": 0,
        "estimated": False,
        "first_content_ms": None,
        "total_ms": 1500,
        "bytes": 8211,
    }


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"prompt_tokens": 10**30}, id="a number beyond 64 bits"),
        pytest.param({"slug": "\x7f", "failures": FAILED.failures}, id="DEL beside failures"),
    ],
)
def test_values_that_the_fast_serializer_cannot_write_still_make_a_line(
    values: dict[str, Any],
) -> None:
    assert format_json(record(**values)).decode("ascii").isprintable()
    line = json.loads(format_json(record(**values)))
    assert line["prompt_tokens"] == values.get("prompt_tokens", 12)
    assert len(line["failures"]) == len(values.get("failures", []))


# The log


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:  # the test has closed it
            pass


def read_lines(fd: int, count: int) -> list[bytes]:
    data = b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while data.count(b"\n") < count:
        assert poller.poll(PATIENCE * 1000), f"{count} lines never came"
        data += os.read(fd, 65536)
    return data.splitlines()


def clog(log: AccessLog, lines: int) -> None:
    """Write until the pipe and the queue are full."""
    for _ in range(PIPE_BYTES // len(format_json(record()))):
        log.write(record())
    wait_until(lambda: log.depth == lines)


def test_lines_come_by_themselves_and_in_order(pipe: tuple[int, int]) -> None:
    log = AccessLog(pipe[1], "json", flush_interval=0.001)
    for number in range(100):
        log.write(record(id=f"req_{number}"))
    ids = [json.loads(line)["id"] for line in read_lines(pipe[0], 100)]
    assert ids == [f"req_{number}" for number in range(100)]
    assert log.close() == 0


def test_a_record_that_makes_no_line_costs_that_line_alone(pipe: tuple[int, int]) -> None:
    log = AccessLog(pipe[1], "json", flush_interval=0.001)
    log.write(record(total=float("nan")))
    log.write(record(id="req_2"))
    wait_until(lambda: log.depth == 0 and log.lost == 1)
    lines = [json.loads(line) for line in read_lines(pipe[0], 2)]
    assert sorted(line.get("id", "") or str(line["lost_lines"]) for line in lines) == ["1", "req_2"]
    assert log.close() == 0


def test_closing_writes_what_is_left(tmp_path: Path) -> None:
    with (tmp_path / "access.log").open("w") as sink:
        log = AccessLog(sink, "human", flush_interval=PATIENCE)
        for _ in range(1000):
            log.write(record())
        assert log.close(PATIENCE) == 0
    assert (tmp_path / "access.log").read_text() == f"{format_human(record())}\n" * 1000


def test_auto_means_json_where_there_is_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "access.log").open("w") as sink:
        log = AccessLog(sink)
        log.write(record())
        log.close(PATIENCE)
    assert (tmp_path / "access.log").read_bytes() == format_json(record()) + b"\n"


def test_auto_means_human_on_a_terminal() -> None:
    reader, writer = os.openpty()
    log = AccessLog(writer, flush_interval=0.001)
    log.write(record())
    line = read_lines(reader, 1)[0]
    log.close(PATIENCE)
    os.close(writer)
    os.close(reader)
    assert line.decode() == format_human(record())


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, human and json"):
        AccessLog(1, "xml")


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking sink", "non-blocking sink"])
def test_a_blocked_stream_loses_lines_that_are_counted_and_logged(
    pipe: tuple[int, int], blocking: bool
) -> None:
    reader, writer = pipe
    os.set_blocking(writer, blocking)
    log = AccessLog(writer, "json", capacity=500, flush_interval=0.001)
    clog(log, 500)  # comes back although nobody reads
    lost = log.lost
    assert lost > 0
    written = PIPE_BYTES // len(format_json(record())) - lost
    lines = [json.loads(line) for line in read_lines(reader, written)]
    wait_until(lambda: log.depth == 0)
    log.write(record(id="req_after"))
    while not any(line.get("id") == "req_after" for line in lines):
        lines += [json.loads(line) for line in read_lines(reader, 1)]
    assert sum(line.get("lost_lines", 0) for line in lines) == lost == log.lost
    assert len([line for line in lines if "id" in line]) == written + 1
    assert log.close(PATIENCE) == 0


def test_the_human_form_has_lost_lines_too(pipe: tuple[int, int]) -> None:
    log = AccessLog(pipe[1], "human", capacity=1, flush_interval=0.05, clock=lambda: 0.0)
    while not log.lost:
        log.write(record())
    log.close(PATIENCE)
    lines = read_lines(pipe[0], 2)
    assert b"1970-01-01T00:00:00.000Z lost=1 lines of this log: its sink was too slow" in lines


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking sink", "non-blocking sink"])
def test_closing_on_a_blocked_stream_gives_up_and_returns_how_many(
    pipe: tuple[int, int], blocking: bool
) -> None:
    reader, writer = pipe
    os.set_blocking(writer, blocking)
    log = AccessLog(writer, "json", capacity=500, flush_interval=0.001)
    clog(log, 500)
    assert log.close(0.05) == 500
    os.set_blocking(reader, False)
    log._writer.join(0.0 if blocking else PATIENCE)
    assert log._writer.is_alive() is blocking
    while log._writer.is_alive():  # what hung in the kernel goes out, and nothing after it
        try:
            os.read(reader, 65536)
        except BlockingIOError:
            time.sleep(0.002)


def test_a_closed_stream_loses_lines_and_the_log_goes_on(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    log = AccessLog(writer, "json", flush_interval=0.001)
    for number in range(1, 4):
        log.write(record())
        wait_until(lambda number=number: log.lost == number)
    assert log.close(PATIENCE) == 0


def test_a_line_after_a_torn_one_begins_on_a_new_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    answers = iter([10, OSError(28, "no space left on device")])

    def write_some(fd: int, data: bytes) -> int:
        answer = next(answers, None)
        if isinstance(answer, OSError):
            raise answer
        return write(fd, data[:answer])

    with (tmp_path / "access.log").open("wb") as sink:
        log = AccessLog(sink, "json", flush_interval=0.001)
        monkeypatch.setattr(os, "write", write_some)
        log.write(record(id="req_torn"))
        wait_until(lambda: log.lost == 1)
        log.write(record(id="req_whole"))
        assert log.close(PATIENCE) == 0
        monkeypatch.undo()
    first, lost, whole = (tmp_path / "access.log").read_bytes().splitlines()
    assert first == format_json(record())[:10]
    assert json.loads(lost)["lost_lines"] == 1
    assert json.loads(whole)["id"] == "req_whole"


def test_a_line_after_closing_is_counted_as_lost(pipe: tuple[int, int]) -> None:
    log = AccessLog(pipe[1], "json")
    log.close(PATIENCE)
    log.write(record())
    assert log.lost == 1


def test_of_good_requests_a_share_is_logged_and_of_failures_all(tmp_path: Path) -> None:
    draws = iter([0.05, 0.5, 0.15, 0.0])
    with (tmp_path / "log").open("wb") as sink:
        log = AccessLog(sink, "json", sample=0.1, draw=lambda: next(draws))
        for number in range(4):
            log.write(record(id=f"good{number}"))
        log.write(FAILED)
        assert log.close() == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["good0", "good3", FAILED.id]
    assert log.lost == 0


def test_no_line_of_one_process_is_written_into_a_line_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pipe a write of up to 4096 bytes stays in one piece: none may end within a line."""
    pieces: list[bytes] = []
    write = os.write

    def note(number: int, data: memoryview) -> int:
        pieces.append(bytes(data))
        return write(number, data)

    with (tmp_path / "log").open("wb") as sink:
        log = AccessLog(sink, "json", flush_interval=30.0)
        for _ in range(40):
            log.write(record())
        monkeypatch.setattr(os, "write", note)
        log.close()
    assert sum(piece.count(b"\n") for piece in pieces) == 40
    assert all(len(piece) <= 4096 and piece.endswith(b"\n") for piece in pieces)
    assert len(pieces) > 2
