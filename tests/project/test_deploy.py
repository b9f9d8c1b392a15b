"""What deploy/ has says what the program does, and the programs it is written for take it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from hoberproxy.cli.main import make_parser
from hoberproxy.config.reader import parse_config
from hoberproxy.config.settings import ServerSettings
from hoberproxy.config.source import read_example
from hoberproxy.process.listeners import BACKLOG
from tests.conftest import pure_only
from tests.support.patience import WAIT
from tests.support.tools import need_tool

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "hoberproxy.service"
SOCKET = DEPLOY / "hoberproxy.socket"
INSTALL = DEPLOY / "install.sh"
PROGRAM = "/opt/hoberproxy/bin/hoberproxy"
CONFIG = "/etc/hoberproxy/hoberproxy.toml"


def read_unit(path: Path) -> dict[str, list[str]]:
    """Its settings, all sections together; each may be there several times."""
    settings = defaultdict(list)
    for line in path.read_text().replace("\\\n", " ").splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            settings[name].append(value)
    return dict(settings)


def arguments_of(command: str) -> list[str]:
    """What a unit's command gives our program."""
    words = shlex.split(command)
    return words[words.index(PROGRAM) + 1 :]


def run(*command: str, **environ: str) -> tuple[int, str]:
    """Its status and all that it printed."""
    ended = subprocess.run(
        command,
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT,
    )
    return ended.returncode, ended.stdout


# The unit


def test_systemd_has_nothing_to_say_against_the_units(tmp_path: Path) -> None:
    analyze = need_tool("systemd-analyze")
    units = [tmp_path / each.name for each in (UNIT, SOCKET)]
    # The program must exist for systemd; any does, what it is given is another test's.
    units[0].write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    units[1].write_text(SOCKET.read_text())
    # Its status is 0 even for a name it does not know: only silence is good.
    assert run(analyze, "verify", "--man=no", *map(str, units)) == (0, "")


def test_systemd_rates_the_hardening_two_or_better() -> None:
    analyze = need_tool("systemd-analyze")
    status, said = run(analyze, "security", "--offline=true", "--threshold=20", str(UNIT))
    assert status == 0, said


@pytest.mark.parametrize("name", ["ExecStart", "ExecReload"])
def test_the_command_line_knows_what_the_unit_runs(name: str) -> None:
    commands = [each for each in read_unit(UNIT)[name] if PROGRAM in each]
    assert commands
    for command in commands:
        assert make_parser().parse_args(arguments_of(command)).config == CONFIG


def test_systemd_kills_only_after_the_drain_has_had_its_time() -> None:
    assert float(read_unit(UNIT)["TimeoutStopSec"][0]) > ServerSettings().drain_timeout


def test_the_socket_is_where_the_program_would_listen() -> None:
    socket = read_unit(SOCKET)
    assert socket["ListenStream"] == [str(address) for address in ServerSettings().listen]
    assert int(socket["Backlog"][0]) >= BACKLOG


def test_ten_thousand_streams_have_their_sockets() -> None:
    assert int(read_unit(UNIT)["LimitNOFILE"][0]) >= 2 * 10_000 + 4096


# What is installed beside it


def test_the_config_needs_no_more_than_its_key() -> None:
    paths: list[str] = []
    config = parse_config(
        (DEPLOY / "hoberproxy.toml").read_text(),
        environ={},
        read_file=lambda path: paths.append(path) or "sk-x",  # type: ignore[func-returns-value]
    )
    assert paths == ["/run/credentials/hoberproxy.service/key_openai"]
    assert Path(config.records.file).parent == Path("/var/lib/hoberproxy")


def test_what_is_commented_out_in_the_config_shows_defaults_as_the_example_does() -> None:
    text = (DEPLOY / "hoberproxy.toml").read_text()
    settings = re.findall(r"(?m)^#(\w+ = [^#\n]*[^#\s])", text.partition("[providers")[0])
    assert settings
    assert all(f"#{setting}\n" in read_example() for setting in settings)


def test_users_and_folders_are_taken_by_systemd(tmp_path: Path) -> None:
    sysusers, tmpfiles = need_tool("systemd-sysusers"), need_tool("systemd-tmpfiles")
    status, said = run(
        *(sysusers, "--dry-run", f"--root={tmp_path}", str(DEPLOY / "hoberproxy.sysusers"))
    )
    assert (status, "Creating user 'hoberproxy'" in said) == (0, True), said
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("hoberproxy:x:990:990::/:/bin/false\n")
    (tmp_path / "etc/group").write_text("hoberproxy:x:990:\n")
    command = (tmpfiles, "--create", f"--root={tmp_path}", str(DEPLOY / "hoberproxy.tmpfiles"))
    status, said = run(*command)
    made = {path.name for path in tmp_path.rglob("*")}
    assert {"keys", "hoberproxy.db"} <= made, said


# install.sh


def test_the_shell_reads_the_scripts() -> None:
    for script in (INSTALL, DEPLOY.parent / ".ci/run", DEPLOY.parent / ".ci/tools"):
        assert run("bash", "-n", str(script)) == (0, "")
        assert run(need_tool("shellcheck"), str(script)) == (0, "")


def run_dry(**environ: str) -> str:
    """What install.sh would do."""
    environ = {"HOBERPROXY_BUILD": ""} | environ
    status, said = run(str(INSTALL), "--dry-run", "--python", "/usr/bin/python3", **environ)
    if "is not Python 3.11" in said:
        pytest.skip("/usr/bin/python3 is not Python 3.11 or newer")
    assert status == 0, said
    return said


@pure_only  # it installs a checkout, and the compiled package is tested without one
def test_a_dry_run_needs_no_root_and_says_every_command() -> None:
    said = run_dry()
    for path in ("/etc/systemd/system", "/etc/sysusers.d", "/etc/tmpfiles.d", "/etc/hoberproxy"):
        assert f"  + install -D -m 644 {DEPLOY}/hoberproxy" in said
        assert f" {path}/hoberproxy." in said


@pure_only  # it installs a checkout, and the compiled package is tested without one
def test_it_says_whether_it_compiles_and_if_not_what_to_do() -> None:
    assert "from the checkout, compiled: that takes about two minutes" in run_dry(CC="/bin/true")
    said = run_dry(CC="gcc-of-nowhere")
    assert "from the checkout, pure: no C compiler is here (gcc-of-nowhere)" in said
    assert "install gcc and Python's headers" in said


@pure_only  # it installs a checkout, and the compiled package is tested without one
def test_another_build_is_another_release_and_the_same_the_same() -> None:
    compiled, again, pure = (
        re.findall(r"installing (\S+)", run_dry(CC=compiler))
        for compiler in ("/bin/true", "/bin/true", "gcc-of-nowhere")
    )
    assert compiled == again != pure


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--help"], 0, "usage: deploy/install.sh"),
        (["--what"], 2, "usage: deploy/install.sh"),
        (["--purge"], 1, "--purge goes with --uninstall"),
        (["--wheel"], 1, "--wheel needs a value"),
        (["--dry-run", "--python", "/bin/false"], 1, "/bin/false is not Python 3.11 or newer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_told(options: list[str], status: int, said: str) -> None:
    ended = run(str(INSTALL), *options)
    assert ended[0] == status
    assert said in ended[1]


# The operator's pages

COMMANDS = re.findall(r"(?<=/bin/hoberproxy) ([^`\n]*)", (DEPLOY / "README.md").read_text())


def test_the_steps_by_hand_name_commands() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_knows_every_command_of_the_steps_by_hand(command: str) -> None:
    arguments = shlex.split(command.partition(" > ")[0], comments=True)
    assert make_parser().parse_args(arguments).run
