"""How many files a process may open, and how many of them clients may take."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hoberproxy.process import file_limits as files

LIMITED = """
import resource
from hoberproxy.files import connections_limit, raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 500))
raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE), connections_limit())
"""


def test_a_process_takes_all_files_that_it_may_have() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(Path(files.__file__).parents[2])},
    )
    assert done.stdout.split() == ["500", "500", "218"], done.stderr


@pytest.mark.parametrize(
    ("soft", "limit"), [(1024, 480), (65536, 32736), (10, 1), (resource.RLIM_INFINITY, 2**31)]
)
def test_half_of_the_files_are_for_model_servers(
    soft: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    assert files.connections_limit() == limit
