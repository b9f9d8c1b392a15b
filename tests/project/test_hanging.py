"""A test that hangs fails by itself, and those after it run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.patience import WAIT

HANGING = """\
import asyncio, threading

async def test_that_waits_in_the_loop():
    await asyncio.Event().wait()

def test_that_waits_in_a_lock():
    threading.Event().wait()

async def test_that_comes_after():
    pass
"""


def test_a_test_that_hangs_fails_alone(tmp_path: Path) -> None:
    file = tmp_path / "test_hang.py"
    file.write_text(HANGING)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml")),
            *("-p", "tests.conftest", "-p", "no:cacheprovider", "--timeout", "0.5", str(file)),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
