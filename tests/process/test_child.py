"""Which Python runs what is installed by now, and what a child finds in its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hoberproxy.process.child import start_child
from hoberproxy.process.machine import malloc_variables
from hoberproxy.process.upgrade import installed_python


def test_the_script_that_started_us_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("old", "new"):
        python = tmp_path / version / "python3"
        python.parent.mkdir()
        python.touch(mode=0o755)
        (tmp_path / version / "script").write_text(f"#!{python}\nimport hoberproxy\n")
    link = tmp_path / "script"
    monkeypatch.setattr(sys, "argv", [str(link)])
    for version in ("old", "new"):
        link.unlink(missing_ok=True)
        link.symlink_to(f"{version}/script")
        assert installed_python() == str(tmp_path / version / "python3")


@pytest.mark.parametrize(
    "script",
    ["import hoberproxy\n", "#!/bin/sh\n", "#!/nowhere/python3\n", "", None],
    ids=["a module", "a shell's", "gone", "empty", "no file"],
)
def test_else_it_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    path = tmp_path / "script"
    if script is not None:
        path.write_text(script)
    monkeypatch.setattr(sys, "argv", [str(path)])
    assert installed_python() == sys.executable


def test_a_child_keeps_freed_memory_and_is_no_service_of_systemd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environs = []

    def note(path: str, arguments: list[str], environ: dict[str, str], **options: object) -> int:
        environs.append(environ)
        return 1

    monkeypatch.setattr(os, "posix_spawn", note)
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/socket")
    for name in [*malloc_variables({}), "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name, raising=False)
    start_child("worker", generation=1).close()
    (environ,) = environs
    assert malloc_variables({}).items() <= environ.items()
    assert "NOTIFY_SOCKET" not in environ
