"""What a process keeps of the memory it frees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hoberproxy import memory

from .patience import WAIT

# As a prompt of 1 MB does: pieces, the whole, what goes upstream, all freed after the answer.
REQUESTS = """
import resource, sys
from hoberproxy.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def faults():
    blocks = []
    for _ in range(8):
        blocks += [bytes(250_000) for _ in range(4)]
        blocks.append(b"".join(blocks[-4:]))
for _ in range(5):
    faults()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    faults()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str, code: str = REQUESTS, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environ.pop("GLIBC_TUNABLES", None)
    return subprocess.run(
        [sys.executable, "-c", code, how],
        capture_output=True,
        text=True,
        timeout=WAIT,
        env=environ | {"PYTHONPATH": str(Path(memory.__file__).parents[1])} | variables,
    )


@pytest.fixture(scope="module", autouse=True)
def _has_mallopt() -> None:
    if run("keep").returncode == 3:
        pytest.skip("this C library has no mallopt")


def test_freed_memory_is_there_for_the_next_request() -> None:
    kept, given_back = run("keep"), run("as it is")
    assert int(kept.stdout) < 200, "page faults of 20 times 16 MB"
    assert int(given_back.stdout) > 10 * int(kept.stdout), "else there is no need for it"


def test_an_operators_own_choice_is_left_alone() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072").returncode == 3
    assert run("keep", GLIBC_TUNABLES="glibc.malloc.tcache_count=7").returncode == 3


# 600,000 things that are kept, as of thousands of open streams; then rings of references that have
# lived long enough to be seen by full collections alone, and things kept until they are gone.
COLLECTIONS = """
import gc, sys
from hoberproxy.memory import collect_rarely
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
    as_it_is, rarely = run("as it is", COLLECTIONS), run("rarely", COLLECTIONS)
    assert int(rarely.stdout.split()[0]) == 0
    assert int(as_it_is.stdout.split()[0]) > 0, "else there is no need for it"


def test_rings_of_references_are_collected_all_the_same() -> None:
    assert int(run("rarely", COLLECTIONS).stdout.split()[1]) < 5_000_000, "where it gives up"


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
    assert memory.machine_memory(write_files(tmp_path, files)) == 64 * 1024 * 1024


def test_without_limits_the_machines_memory_counts(tmp_path: Path) -> None:
    whole = memory.machine_memory(str(tmp_path))
    assert 64 * 1024 * 1024 < whole < 2**50
    unlimited = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}
    assert memory.machine_memory(write_files(tmp_path, unlimited)) == whole
