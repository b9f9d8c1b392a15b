"""What `make wheel` leaves in dist/: each wheel, installed alone, starts and answers."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import pytest

from hoberproxy import __version__
from tests.patience import WAIT, patient

pytestmark = pytest.mark.wheel

DIST = Path(__file__).parents[2] / "dist"
INSTALL_TIME = patient(300.0)
PYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"
TAGS = {"pure": "py3-none-any", "compiled": rf"{PYTHON}-{PYTHON}-(many|musl)linux_\S+"}


def find_wheel(build: str) -> Path:
    """Return the one wheel of dist/ whose tags are those of such a build."""
    name = re.compile(rf"hoberproxy-{re.escape(__version__)}-{TAGS[build]}\.whl")
    (wheel,) = [path for path in DIST.iterdir() if name.fullmatch(path.name)]
    return wheel


@pytest.fixture(params=TAGS)
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def program(build: str, tmp_path: Path) -> Path:
    """The program of a wheel in an environment that has nothing else."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=WAIT)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", find_wheel(build)]
    subprocess.run(pip, check=True, timeout=INSTALL_TIME)
    return tmp_path / "venv/bin/hoberproxy"


@contextmanager
def serving(program: Path, folder: Path) -> Iterator[str]:
    """Start it without a config, and yield all that it printed when it was ready."""
    folder.mkdir()
    output = folder / "output"
    command = [program, "serve", "--listen", "127.0.0.1:0"]
    with (
        output.open("wb") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=folder) as process,
    ):
        try:
            deadline = time.monotonic() + WAIT
            while "Ctrl-C stops" not in (printed := output.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, printed
                time.sleep(0.05)
            yield printed
        finally:
            process.kill()


def test_an_installed_wheel_answers_a_request_and_says_what_it_is(
    build: str, program: Path, tmp_path: Path
) -> None:
    with serving(program, tmp_path / "run") as printed:
        assert printed.startswith(f"hoberproxy {__version__} ({build}, Python ")
        curl = printed.partition("\ncurl:\n\n")[2].partition("\n\n")[0]
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=WAIT)
    assert answer.stdout.endswith("data: [DONE]\n\n"), answer


def test_a_wheel_has_the_extensions_of_its_build_and_all_sources(build: str) -> None:
    names = ZipFile(find_wheel(build)).namelist()
    extensions = [name for name in names if ".so" in name]
    assert bool(extensions) == (build == "compiled")
    assert {"hoberproxy/py.typed", "hoberproxy/errors.py", "hoberproxy_bench/load.py"} <= {*names}


def test_the_sdist_has_the_hook_that_compiles() -> None:
    (path,) = DIST.glob(f"hoberproxy-{__version__}.tar.gz")
    with tarfile.open(path) as sdist:
        assert f"hoberproxy-{__version__}/hatch_build.py" in sdist.getnames()


def test_there_is_nothing_else_to_upload() -> None:
    assert len(list(DIST.glob("*.whl"))) == len(TAGS)
    assert len(list(DIST.glob("*.tar.gz"))) == 1
