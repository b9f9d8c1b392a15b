"""The commands as an operator types them, and the lines that `serve` gives a newcomer to copy."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hoberproxy import __version__
from hoberproxy._mypyc import HOW_TO_COMPILE, describe_build
from hoberproxy.accounting.record import Record
from hoberproxy.cli import service as commands_service
from hoberproxy.cli.main import main
from hoberproxy.cli.usage import GROUPS
from hoberproxy.config.presets import PRESETS
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.conftest import IS_COMPILED
from tests.support.patience import WAIT, wait_until
from tests.support.processes import all_below
from tests.support.stores import write_records

PATIENCE = WAIT
COMMAND = [str(Path(sys.executable).with_name("hoberproxy"))]
MODULE = [sys.executable, "-W", "error", "-m", "hoberproxy"]
DAY = 1_790_000_000.0  # 21 September 2026, 14:13 UTC

CONFIG = """\
[server]
listen = "127.0.0.1:0"
metrics_listen = "off"

[records]
file = "records.db"

[providers.one]
base_url = "http://127.0.0.1:9/v1"

[[models]]
slug = "one/model"
endpoints = [{ provider = "one" }]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to be in, and no provider's key in the environment."""
    monkeypatch.chdir(tmp_path)
    for preset in PRESETS.values():
        for variable in (*preset.key_variables, *preset.url_variables):
            monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Path:
    path = folder / "hoberproxy.toml"
    path.write_text(CONFIG)
    return path


# version, help, wrong options


@pytest.mark.parametrize("command", [COMMAND, MODULE], ids=["hoberproxy", "python -m hoberproxy"])
def test_the_program_runs_under_both_of_its_names(command: list[str]) -> None:
    done = subprocess.run([*command, "version"], capture_output=True, text=True, timeout=PATIENCE)
    (line,) = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert line.startswith(f"hoberproxy {__version__} (")


def test_the_version_says_whether_it_is_compiled_and_how_to_get_it_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["version"]) == 0
    build = "compiled" if IS_COMPILED else "pure"
    line = f"hoberproxy {__version__} ({build}, Python {platform.python_version()})"
    assert capsys.readouterr().out == f"{line}{'' if IS_COMPILED else f'; {HOW_TO_COMPILE}'}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["serve", "check", "config", "keys", "usage", "version", "demo model"]),
        (["serve"], ["--config", "--listen HOST:PORT"]),
        (["check"], ["--config"]),
        (["config"], ["--example"]),
        (["keys"], ["create", "list", "revoke"]),
        (["keys", "create"], ["--label", "--test", "--expires"]),
        (["keys", "revoke"], ["ID", "keys list"]),
        (["usage"], ["--by", "--since", "--until", *GROUPS]),
        (["version"], ["usage: hoberproxy version"]),
    ],
    ids=lambda part: " ".join(part[:2]) or "no command",
)
def test_help_names_what_there_is(
    command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sevre"],
        ["serve", "--port", "80"],
        ["serve", "--workers", "65"],  # a reload has twice as many processes
        ["config"],
        ["keys"],
        ["keys", "create"],
        ["keys", "revoke"],
        ["usage", "--by", "colour"],
    ],
    ids=lambda arguments: " ".join(arguments) or "no command",
)
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: hoberproxy" in capsys.readouterr().err


# check, config


def test_check_counts_what_a_good_config_holds(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check"]) == 0
    assert main(["check", "--config", str(config)]) == 0
    assert capsys.readouterr().out == "ok: 1 providers, 1 models, 1 endpoints\n" * 2


BAD_CONFIG = CONFIG.replace('"off"', "5").replace("base_url", "base_ulr")


@pytest.mark.parametrize("command", ["check", "serve"])
def test_every_problem_of_a_config_is_told_at_once(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "hoberproxy.toml").write_text(BAD_CONFIG)
    assert main([command]) == 3
    problems = capsys.readouterr().err.splitlines()
    assert len(problems) >= 2
    assert all(line.startswith("hoberproxy: ") for line in problems)
    assert any("server.metrics_listen: expected" in line for line in problems)
    assert any("providers.one.base_ulr" in line for line in problems)
    assert not (folder / "records.db").exists()


@pytest.mark.parametrize("command", ["check", "serve", "usage"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "expected a readable file, got no such file", id="not there"),
        pytest.param(b"\xff\xfe", "expected UTF-8", id="not text"),
        pytest.param(b"[server", "line 1", id="not TOML"),
    ],
)
def test_a_file_that_is_no_config_is_exit_code_3(
    folder: Path,
    command: str,
    content: bytes | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (folder / "named.toml").write_bytes(content)
    assert main([command, "--config", "named.toml"]) == 3
    assert words in capsys.readouterr().err


def test_check_without_a_config_says_where_it_looked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 3
    assert "expected ./hoberproxy.toml or --config FILE" in capsys.readouterr().err


def test_the_example_is_a_config_once_its_keys_are_set(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["config", "--example"]) == 0
    example = capsys.readouterr().out
    (folder / "hoberproxy.toml").write_text(example)
    assert main(["check"]) == 3
    missing = capsys.readouterr().err
    assert "DEEPSEEK_API_KEY" in missing
    for variable in re.findall(r"[A-Z_]+_API_KEY", example + missing):
        monkeypatch.setenv(variable, "sk-something")
    assert main(["check"]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1", "127.0.0.1:70000", ":80:"])
def test_a_listen_option_that_is_no_address_is_exit_code_3(
    config: Path, listen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--listen", listen]) == 3
    assert "--listen: expected" in capsys.readouterr().err


# keys


def test_a_key_is_shown_once_listed_by_its_hint_and_revoked(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", "--label", "laptop"]) == 0
    printed = capsys.readouterr()
    key = printed.out.strip()
    assert re.fullmatch(r"hb_live_[0-9A-Za-z]{39}", key)
    key_id = printed.err.split()[0]
    assert "printed only this once" in printed.err

    assert main(["keys", "list"]) == 0
    listing = capsys.readouterr().out
    assert key not in listing
    head, line = listing.splitlines()
    names = ["id", "label", "key", "created", "last used", "expires", "limits", "state"]
    assert re.split(r" {2,}", head) == names
    assert line.startswith(key_id)
    assert line.endswith("active")
    assert f"hb_live_...{key[-4:]}" in line

    assert main(["keys", "revoke", key_id]) == 0
    assert capsys.readouterr().out == f"revoked {key_id} (laptop)\n"
    main(["keys", "list"])
    assert capsys.readouterr().out.splitlines()[1].endswith("revoked")


def test_the_key_alone_is_on_standard_output(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", "--label", "ci", "--test"]) == 0
    assert re.fullmatch(r"hb_test_[0-9A-Za-z]{39}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("expires", "state"), [("2000-01-01", "expired"), ("30d", "active"), ("12h", "active")]
)
def test_a_key_may_expire(
    config: Path, expires: str, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", "--label", "guest", "--expires", expires]) == 0
    main(["keys", "list"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(state)
    assert "never" not in line


@pytest.mark.parametrize("command", [["usage"], ["keys", "list"], ["keys", "revoke", "key_x"]])
def test_reading_where_nothing_was_kept_makes_no_file(
    config: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    assert "expected keys and records at records.db" in capsys.readouterr().err
    assert not (config.parent / "records.db").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "--label", " "],
        ["create", "--label", "x" * 65],
        ["create", "--label", "a", "--expires", "soon"],
        ["create", "--label", "a", "--expires", "2026-13-01"],
        ["revoke", "key_unknown"],
    ],
    ids=" ".join,
)
def test_what_the_store_refuses_is_exit_code_1(
    config: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "create", "--label", "first"])
    capsys.readouterr()
    assert main(["keys", *arguments]) == 1
    assert capsys.readouterr().err.startswith("hoberproxy: expected ")


def test_a_key_typed_instead_of_its_id_is_not_repeated(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "hb_live_" + "A" * 39
    assert main(["keys", "revoke", typed]) == 1
    assert typed not in capsys.readouterr().err


# usage


@pytest.fixture
def records(config: Path) -> None:
    store = Store("records.db")
    _, row = store.create_key("laptop")
    days = [DAY, DAY, DAY + 86400]
    write_records(
        store,
        [
            Record(
                id=f"req_{number}",
                started=started,
                key_id=row.key_id,
                key_label=row.label,
                slug="one/model" if number else "one/other",
                provider="one",
                status=200 if number else 502,
                prompt_tokens=1000,
                completion_tokens=50,
                has_usage=number != 2,
                estimated=number == 2,
                first_content=0.25,
                total=1.0,
            )
            for number, started in enumerate(days)
        ],
    )
    store.close()


@pytest.mark.parametrize(
    ("by", "first_cells"),
    [
        ("model", {"one/model", "one/other"}),
        ("provider", {"one"}),
        ("day", {"2026-09-21", "2026-09-22"}),
        ("status", {"200", "502"}),
        ("key", {"laptop"}),
    ],
)
def test_usage_is_summed_by_each_group(
    records: None, by: str, first_cells: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--by", by]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(by)
    assert lines.pop().startswith("~ includes estimates")
    assert {line.split()[0] for line in lines} == first_cells
    requests = [int(re.split(r" {2,}", line)[1]) for line in lines]
    assert sum(requests) == 3


def test_usage_shows_numbers_and_marks_estimates(
    records: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--by", "provider"]) == 0
    _, line, _ = capsys.readouterr().out.splitlines()
    assert re.split(r" {2,}", line) == ["one", "3", "1", "~3,000", "~150", "0", "250 ms"]


def test_what_was_written_to_caches_has_a_column_where_there_is_any(
    records: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--by", "provider"]) == 0
    assert "cache write" not in capsys.readouterr().out
    with closing(Store("records.db")) as store:
        write_records(
            store, [Record(id="req_9", started=DAY, provider="one", cache_write_tokens=1200)]
        )
    assert main(["usage", "--by", "provider"]) == 0
    head, line, _ = capsys.readouterr().out.splitlines()
    assert re.split(r" {2,}", head)[5:7] == ["cached", "cache write"]
    assert re.split(r" {2,}", line)[5:7] == ["0", "1,200"]


@pytest.mark.parametrize(
    ("period", "requests"),
    [
        (["--since", "2026-09-22"], 1),
        (["--until", "2026-09-21"], 2),
        (["--since", "2026-09-21", "--until", "2026-09-22"], 3),
        (["--since", "2026-09-23"], 0),
    ],
    ids=["since", "until", "both", "nothing"],
)
def test_usage_of_a_period_holds_its_first_and_last_day(
    records: None, period: list[str], requests: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--by", "day", *period]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines()[1:] if line[0].isdigit()]
    assert sum(int(line.split()[1]) for line in lines) == requests


def test_a_period_that_is_no_day_is_refused(
    records: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--since", "yesterday"]) == 1
    assert "YYYY-MM-DD, got 'yesterday'" in capsys.readouterr().err


# serve


@dataclass(frozen=True, slots=True)
class Running:
    """A `serve` process and what it has printed so far."""

    process: subprocess.Popen[bytes]
    output: Path
    url: str


@contextmanager
def serving(folder: Path, *options: str, command: list[str] = MODULE) -> Iterator[Running]:
    output = folder / "output.txt"
    with (
        output.open("wb") as file,
        subprocess.Popen([*command, "serve", *options], stdout=file, stderr=file) as process,
    ):
        try:
            wait_until(lambda: b"http://" in output.read_bytes() or process.poll() is not None)
            found = re.search(r"listens on (http://\S+)", output.read_text())
            assert found, output.read_text()
            yield Running(process, output, found[1])
        finally:
            for pid in (process.pid, *all_below(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param(COMMAND, signal.SIGTERM, id="hoberproxy and SIGTERM"),
        pytest.param(MODULE, signal.SIGINT, id="python -m hoberproxy and SIGINT"),
    ],
)
def test_serve_listens_until_it_is_told_to_stop(
    config: Path, command: list[str], number: signal.Signals
) -> None:
    with serving(config.parent, command=command) as running:
        with urllib.request.urlopen(f"{running.url}/readyz", timeout=PATIENCE) as answer:
            assert answer.status == 200
        assert f"{describe_build()} listens on {running.url}\n" in running.output.read_text()
        running.process.send_signal(number)
        assert running.process.wait(PATIENCE) == 0
        assert "Traceback" not in running.output.read_text()


def test_a_key_made_while_it_runs_works_and_stops_working_when_revoked(config: Path) -> None:
    with serving(config.parent) as running:
        created = run([*MODULE, "keys", "create", "--label", "late"])

        def status() -> int:
            request = urllib.request.Request(
                f"{running.url}/v1/chat/completions",
                b"{}",
                {
                    "authorization": f"Bearer {created.stdout.strip()}",
                    "content-type": "application/json",
                },
            )
            try:
                urllib.request.urlopen(request, timeout=PATIENCE).close()
            except urllib.error.HTTPError as error:
                error.close()
                return error.code
            raise AssertionError("an empty body is no request")

        wait_until(lambda: status() == 400)  # who asks is known, what is asked is wrong
        assert run([*MODULE, "keys", "revoke", created.stderr.split()[0]]).returncode == 0
        wait_until(lambda: status() == 401)


def test_a_port_in_use_is_told_in_one_sentence_and_exit_code_3(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run([*MODULE, "serve", "--listen", address])
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"hoberproxy: cannot listen on {address}: ")
    assert "address already in use" in line.lower()
    assert line.endswith("choose another with --listen")


def test_a_metrics_port_in_use_is_told_apart(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.write_text(CONFIG.replace('"off"', f'"127.0.0.1:{port}"'))
        done = run([*MODULE, "serve"])
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert f"metrics: cannot listen on 127.0.0.1:{port}" in line
    assert "server.metrics_listen" in line


def test_records_that_cannot_be_written_are_exit_code_3(config: Path) -> None:
    config.write_text(CONFIG.replace("records.db", "/nowhere/records.db"))
    done = run([*MODULE, "serve"])
    assert done.returncode == 3
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


# The first start, without a config


@pytest.fixture
def quickstart(folder: Path) -> Iterator[Running]:
    with serving(folder, "--listen", "127.0.0.1:0") as running:
        wait_until(lambda: "Ctrl-C stops" in running.output.read_text())
        yield running


def lines_after(heading: str, running: Running) -> str:
    """The indented lines under a heading of the welcome, as one copies them."""
    rest = running.output.read_text().partition(f"\n{heading}\n\n")[2]
    return textwrap.dedent(re.split(r"\n\n(?=\S)", rest)[0])


def test_the_printed_lines_work_as_they_are(quickstart: Running) -> None:
    assert f"{describe_build()} listens on {quickstart.url}\n" in quickstart.output.read_text()
    curl = lines_after("curl:", quickstart)
    assert curl.startswith("curl -N http://127.0.0.1:")
    requests = 1
    if shutil.which("curl") is not None:
        requests += 1
        streamed = run(["bash", "-c", curl])
        assert streamed.returncode == 0
        assert '"model":"hober/demo"' in streamed.stdout
        assert streamed.stdout.endswith("data: [DONE]\n\n")

    python = lines_after("Python (pip install openai):", quickstart)
    assert python.startswith("from openai import OpenAI")
    printed = run([sys.executable, "-c", python])
    assert printed.returncode == 0, printed.stderr
    assert "10" in printed.stdout

    (command,) = re.findall(r"Usage so far: +(.+)", quickstart.output.read_text())

    def used() -> str:
        return run(["bash", "-c", command]).stdout

    wait_until(lambda: "hober/demo" in used() and f" {requests} " in used().splitlines()[1])


def test_what_a_killed_one_has_answered_is_in_its_records_after_the_next_start(
    quickstart: Running, folder: Path
) -> None:
    text = quickstart.output.read_text()
    key = re.search(r"hb_test_\w{39}", text)
    assert key is not None and not all_below(quickstart.process.pid), "it is one process"
    ids = set()
    for _ in range(20):
        body = b'{"model": "hober/demo", "messages": [{"role": "user", "content": "Count to 3"}]}'
        headers = {"authorization": f"Bearer {key[0]}", "content-type": "application/json"}
        request = urllib.request.Request(f"{quickstart.url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            ids.add(answer.headers["x-request-id"])
    quickstart.process.kill()
    quickstart.process.wait(PATIENCE)
    with serving(folder, "--listen", "127.0.0.1:0") as again:
        wait_until(lambda: "Ctrl-C stops" in again.output.read_text())
        exported = run([*MODULE, "export"]).stdout.splitlines()
    found = [json.loads(line)["id"] for line in exported]
    assert set(found) == ids and len(found) == len(ids)


def test_it_has_nobody_to_ask_and_says_what_cannot_be_done(quickstart: Running) -> None:
    for command in ("status", "upgrade"):
        done = run([*MODULE, command])
        assert (done.returncode, "expected ./hoberproxy.toml or --config FILE" in done.stderr) == (
            3,
            True,
        )
    quickstart.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "can be upgraded while it runs" in quickstart.output.read_text())
    assert quickstart.process.poll() is None


def test_a_second_one_starts_beside_it(quickstart: Running, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with serving(tmp_path / "second", "--listen", "127.0.0.1:0") as second:
        wait_until(lambda: "Ctrl-C stops" in second.output.read_text())


def test_the_key_it_prints_is_for_a_day_and_the_program_stops_cleanly(quickstart: Running) -> None:
    assert re.search(
        r"key for the next 24 hours:\n\n +hb_test_\w{39}\n", quickstart.output.read_text()
    )
    assert "quickstart" in run([*COMMAND, "keys", "list"]).stdout
    quickstart.process.send_signal(signal.SIGINT)
    assert quickstart.process.wait(PATIENCE) == 0
    assert "Traceback" not in quickstart.output.read_text()


def test_a_key_of_a_provider_in_the_environment_adds_its_models(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-nothing")
    with serving(folder, "--listen", "127.0.0.1:0") as running:
        wait_until(lambda: "Ctrl-C stops" in running.output.read_text())
        text = running.output.read_text()
    assert "deepseek" in re.search(r"models: (.*)", text)[1]  # type: ignore[index]
    assert "sk-nothing" not in text


def test_usage_piped_into_head_ends_without_a_complaint(records: None) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*MODULE, "usage"], stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


# Limits of keys


def created(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    """A new key and its id."""
    assert main(["keys", "create", "--label", "team", *options]) == 0
    printed = capsys.readouterr()
    return printed.out.strip(), printed.err.split()[0]


LIMITS = ("--rpm", "60", "--tpm", "100000", "--rpd", "1000", "--concurrency", "4")
MONEY = ("--budget", "5.00", "--budget-period", "month", "--models", "deepseek/*,openai/*")


def test_a_key_is_made_with_limits_and_shows_them(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, key_id = created(capsys, *LIMITS, *MONEY)
    assert main(["keys", "show", key_id]) == 0
    printed = capsys.readouterr().out
    assert (
        "rpm 60, tpm 100000, rpd 1000, concurrency 4, 5.00 USD a month, "
        "models deepseek/* openai/*\n"
    ) in printed
    assert "0.00 USD today" in printed


def test_an_update_changes_and_takes_away(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, key_id = created(capsys, *LIMITS, *MONEY, "--expires", "30d")
    options = ["--rpm", "none", "--concurrency", "9", "--models", "none", "--expires", "none"]
    assert main(["keys", "update", key_id, *options, "--label", "other"]) == 0
    expected = "tpm 100000, rpd 1000, concurrency 9, 5.00 USD a month"
    assert capsys.readouterr().out == f"updated {key_id} (other): {expected}\n"
    main(["keys", "list"])
    assert " never " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--rpm", "0"], "from 1 to"),
        (["--rpm", "many"], "a whole number"),
        (["--budget", "five"], "an amount in USD"),
        (["--budget", "-1"], "an amount in USD"),
        (["--budget", "NaN"], "an amount in USD"),
        (["--budget", "2000000"], "from 0 to 1000000"),
        (["--expires", "soon"], "a day as YYYY-MM-DD"),
        (["--models", ""], "patterns of slugs"),
    ],
)
def test_limits_that_make_no_sense_are_refused(
    config: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", "--label", "x", *options]) == 1
    assert problem in capsys.readouterr().err


def test_an_update_of_nothing_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, key_id = created(capsys)
    assert main(["keys", "update", key_id]) == 1
    assert "something to change" in capsys.readouterr().err


def test_a_rotation_prints_the_new_key_and_until_when_the_old_one_works(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, key_id = created(capsys)
    assert main(["keys", "rotate", key_id, "--grace", "2h"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"hb_live_[0-9A-Za-z]{39}\n", printed.out) and printed.out.strip() != old
    assert "the old key works until" in printed.err
    main(["keys", "show", key_id])
    assert "old key    works until" in capsys.readouterr().out
    assert main(["keys", "rotate", key_id, "--grace", "a while"]) == 1


# Usage and export in other forms


@pytest.fixture
def costs(config: Path) -> None:
    store = Store("records.db")
    write_records(
        store,
        [
            Record(
                id=f"req_{number}",
                started=1_700_000_000.0 + number,
                key_id="key_1",
                key_label="team",
                slug="a/b",
                provider=provider,
                status=200,
                attempts=1,
                streamed=True,
                requested=("a/b", "c/d"),
                prompt_tokens=10,
                completion_tokens=30,
                first_content=0.5,
                total=2.0,
                cost=cost,
            )
            for number, (provider, cost) in enumerate([("one", 10**12), ("two", 3), ("two", None)])
        ],
    )
    store.close()


def test_usage_shows_money_as_bars(costs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--by", "provider"]) == 0
    head, two, one, note = capsys.readouterr().out.splitlines()
    assert "USD" in head
    assert "0.000000000003+" in two and "▏" in two
    assert "1.0000" in one and one.endswith("█" * 20)
    assert note.startswith("+ excludes requests")


def test_usage_is_written_for_programs(costs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--by", "key", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["key"], row["label"], row["requests"]) == ("key_1", "team", 3)
    assert (row["cost"], row["unpriced"]) == ("1.000000000003", 1)
    assert main(["usage", "--by", "provider", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("provider,requests,failed,") and len(lines) == 3


def test_usage_since_a_while_ago(costs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage", "--since", "30d", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_records_are_exported_as_lines(costs: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 0
    first, *others = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["cost"], first["tokens_per_second"]) == ("req_0", "1.00", 20.0)
    assert first["requested"] == ["a/b", "c/d"] and len(others) == 2
    assert main(["export", "--format", "csv", "--until", "2023-11-14"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("id,started,key_id") and len(lines) == 3
    assert '"[""a/b"",""c/d""]"' in lines[0]


# status

NOW = 1_790_000_000.0
STATUS = {
    "kind": "answer",
    "version": "1.2",
    "pid": 7,
    "started": NOW - 90_000,
    "streams": 3,
    "tokens_per_second": 12.5,
    "generation": 2,
    "upgrades": 1,
    "restarts": 0,
    "problems": ["server.listen: expected another"],
    "workers": [
        {
            "pid": 8,
            "state": "serving",
            "generation": 2,
            "started": NOW - 61,
            "streams": 1234,
            "connections": 5,
            "tokens_per_second": 12.5,
            "resident_bytes": 50 * 2**20,
        }
    ],
    "writers": [{"pid": 9, "state": "serving", "generation": 1, "started": NOW - 5}],
    "endpoints": [
        {
            "provider": "one",
            "model": "m",
            "cooling_in": 1,
            "known_in": 2,
            "cooldown": 30.2,
            "failure_rate": 0.5,
            "first_content": None,
            "throughput": 41.7,
        }
    ],
    "keys": [{"key": "laptop", "streams": 3}],
}


def test_status_prints_a_table_of_processes_endpoints_and_keys(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        commands_service, "ask", lambda path, kind, patience: json.loads(json.dumps(STATUS))
    )
    monkeypatch.setattr(time, "time", lambda: NOW)
    assert main(["status"]) == 0
    headline, problem, *lines = capsys.readouterr().out.splitlines()
    assert headline.startswith(
        "hoberproxy 1.2, process 7, up 1 d 1 h: 3 streams, 12.5 tokens/s; gen"
    )
    assert problem == "the last reload failed: server.listen: expected another"
    assert [re.split("  +", line) for line in lines if line] == [
        "worker state generation up streams connections tokens/s memory".split(),
        ["8", "serving", "2", "1 min 1 s", "1,234", "5", "12.5", "50 MB"],
        ["9", "serving", "1", "5 s", "-", "-", "-", "-"],
        ["provider", "model", "state", "failures", "first content", "tokens/s"],
        ["one", "m", "cools 30 s in 1 of 2", "50%", "-", "42"],
        ["key", "streams", "requests today", "tokens today"],
        ["laptop", "3", "-", "-"],
    ]


@pytest.mark.parametrize("command", ["status", "upgrade"])
def test_a_service_without_an_admin_socket_is_an_error(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CONFIG.replace("[server]\n", '[server]\nadmin_socket = "off"\n')
    (folder / "hoberproxy.toml").write_text(settings)
    assert main([command]) == 1
    assert "expected an admin socket, got server.admin_socket" in capsys.readouterr().err
