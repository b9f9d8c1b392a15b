"""The systemd unit says what the program does, and systemd understands all of it."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hoberproxy.cli import make_parser
from hoberproxy.config import ServerSettings

DEPLOY = Path(__file__).parent.parent / "deploy"
UNIT = DEPLOY / "hoberproxy.service"
PROGRAM = "/opt/hoberproxy/bin/hoberproxy"


def read_service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(UNIT.read_text())
    return parser["Service"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("credentials", [False, True], ids=["as it is", "with its credentials"])
def test_systemd_has_nothing_to_say_against_the_unit(tmp_path: Path, credentials: bool) -> None:
    # The program must exist for systemd; any does, what it is given is the next test's.
    text = UNIT.read_text().replace(PROGRAM, sys.executable)
    if credentials:
        text = text.replace("\n#LoadCredential=", "\nLoadCredential=")
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    # Its status is 0 even for a name it does not know: only silence is good.
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    assert (verified.stdout, verified.returncode) == ("", 0)


def test_the_command_line_knows_what_the_unit_starts() -> None:
    program, *arguments = shlex.split(read_service()["ExecStart"])
    assert program == PROGRAM
    parsed = make_parser().parse_args(arguments)
    assert parsed.config == "/etc/hoberproxy/hoberproxy.toml"


def test_systemd_kills_only_after_the_drain_has_had_its_time() -> None:
    assert float(read_service()["TimeoutStopSec"]) > ServerSettings().drain_timeout


def test_ten_thousand_streams_have_their_sockets() -> None:
    assert int(read_service()["LimitNOFILE"]) >= 2 * 10_000 + 4096


COMMANDS = re.findall(r"(?m)(?<=/bin/hoberproxy) (.*)$", (DEPLOY / "README.md").read_text())


def test_the_steps_by_hand_name_commands() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_knows_every_command_of_the_steps_by_hand(command: str) -> None:
    arguments = shlex.split(command.partition(" > ")[0], comments=True)
    assert make_parser().parse_args(arguments).run
