"""Finds programs that tests drive: those installed, or those that `make tools` has unpacked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / ".tools/usr"
PATH = os.pathsep.join(
    [os.environ.get("PATH", ""), "/usr/sbin", str(TOOLS / "bin"), str(TOOLS / "sbin")]
)


def find_tool(name: str) -> str | None:
    """Return the path of the program `name`, None if it is not on this machine."""
    return shutil.which(name, path=PATH)


def need_tool(name: str) -> str:
    """Return the path of the program `name`; skip the test if it is not on this machine."""
    found = find_tool(name)
    if found is None:
        pytest.skip(f"{name} is not here (make tools)")
    return found
