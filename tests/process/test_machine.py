"""What a process may have of its machine, and what it does with it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hoberproxy.process import machine
from tests.support.patience import WAIT


def run(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environ.pop("GLIBC_TUNABLES", None)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT,
        env=environ | {"PYTHONPATH": str(Path(machine.__file__).parents[2])} | variables,
    )


# Files

LIMITED = """
import resource
from hoberproxy.process.machine import connections_limit, raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 500))
raise_file_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE), connections_limit())
"""


def test_a_process_takes_all_files_that_it_may_have() -> None:
    done = run(LIMITED)
    assert done.stdout.split() == ["500", "500", "218"], done.stderr


@pytest.mark.parametrize(
    ("soft", "limit"), [(1024, 480), (65536, 32736), (10, 1), (resource.RLIM_INFINITY, 2**31)]
)
def test_half_of_the_files_are_for_model_servers(
    soft: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    assert machine.connections_limit() == limit


# Memory

# As concurrent prompts of 100 KB: pieces, the whole, the body that goes upstream, freed together.
REQUESTS = """
import resource
def serve():
    blocks = []
    for _ in range(16):
        blocks += [bytes(50_000) for _ in range(2)]
        blocks.append(b"".join(blocks[-2:]))
for _ in range(5):
    serve()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    serve()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_there_for_the_next_request() -> None:
    kept, given_back = run(REQUESTS, **machine.malloc_variables({})), run(REQUESTS)
    if kept.stdout == given_back.stdout:
        pytest.skip("this C library does not know the variables")
    assert int(kept.stdout) < 200, "page faults of 20 times 3 MB"
    assert int(given_back.stdout) > 10 * int(kept.stdout), "else there is no need for it"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_an_operators_own_choice_is_left_alone(name: str) -> None:
    assert machine.malloc_variables({"PATH": "/bin"})
    assert machine.malloc_variables({name: "1"}) == {}


# 600,000 things that are kept, as of thousands of open streams; then rings of references that have
# lived long enough to be seen by full collections alone, and things kept until they are gone.
COLLECTIONS = """
import gc, sys
from hoberproxy.process.machine import collect_rarely
if sys.argv[1] == "rarely":
    collect_rarely()
full = []
gc.callbacks.append(lambda phase, info: full.append(phase) if info["generation"] == 2 else None)
kept = [[number] for number in range(600_000)]
print(full.count("stop"))
class Ring:
    gone = 0
    def __init__(self):
        self.ring = self
    def __del__(self):
        Ring.gone += 1
rings = [Ring() for _ in range(20_000)]
rings.clear()
while Ring.gone < 10_000 and len(kept) < 5_000_000:
    kept.append([])
print(len(kept))
"""


@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="3.14 collects in steps, without full collections"
)
def test_many_open_streams_bring_on_no_full_collection() -> None:
    as_it_is, rarely = run(COLLECTIONS, "as it is"), run(COLLECTIONS, "rarely")
    assert int(rarely.stdout.split()[0]) == 0
    assert int(as_it_is.stdout.split()[0]) > 0, "else there is no need for it"


def test_rings_of_references_are_collected_all_the_same() -> None:
    assert int(run(COLLECTIONS, "rarely").stdout.split()[1]) < 5_000_000, "where it gives up"


def write_files(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(
            {
                "proc/self/cgroup": "0::/system.slice/hoberproxy.service\n",
                "sys/fs/cgroup/system.slice/hoberproxy.service/memory.max": "max\n",
                "sys/fs/cgroup/system.slice/memory.max": "67108864\n",
            },
            id="a slice around a service",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "67108864\n"},
            id="a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu,memory:/docker/abc\n0::/\nnonsense\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "67108864\n",
            },
            id="version 1, seen from inside",
        ),
    ],
)
def test_the_memory_of_a_container_is_less_than_the_machines(
    tmp_path: Path, files: dict[str, str]
) -> None:
    assert machine.machine_memory(write_files(tmp_path, files)) == 64 * 1024 * 1024


def test_without_limits_the_machines_memory_counts(tmp_path: Path) -> None:
    whole = machine.machine_memory(str(tmp_path))
    assert 64 * 1024 * 1024 < whole < 2**50
    unlimited = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}
    assert machine.machine_memory(write_files(tmp_path, unlimited)) == whole
