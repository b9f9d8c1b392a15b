"""Programs that tests drive if they are here: installed, or unpacked by `make tools`."""

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
    """Its path, or None."""
    return shutil.which(name, path=PATH)


def need_tool(name: str) -> str:
    """Its path; the test is skipped without it."""
    found = find_tool(name)
    if found is None:
        pytest.skip(f"{name} is not here (make tools)")
    return found
