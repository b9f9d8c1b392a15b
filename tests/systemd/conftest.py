"""One booted machine for all tests here, and what is to be installed in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hatch_build import REQUIRES
from hoberproxy import __version__
from tests.support.patience import patient

from .machine import Machine, booted, why_not
from .service import Service
from .upstream import Upstream

REPOSITORY = Path(__file__).parents[2]
DEBIAN_PYTHON = "/usr/bin/python3"  # the only one in the machine
UPSTREAM_PORT = 9100
NEXT_WHEEL = f"/srv/wheels/hoberproxy-{__version__}+next-py3-none-any.whl"
NEXT_VERSION = f"{__version__}+next"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the next version, and all that this one is built from and needs.

    The machine has no network: pip finds everything here.
    """
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("wheels")
    environment = tmp_path_factory.mktemp("build")
    _run(DEBIAN_PYTHON, "-m", "venv", str(environment))
    pip = (str(environment / "bin/pip"), "--disable-pip-version-check")
    needed = (str(REPOSITORY), "hatchling", *REQUIRES)
    _run(*pip, "wheel", "--quiet", "--wheel-dir", str(folder), *needed)
    for own in folder.glob("hoberproxy-*.whl"):
        own.unlink()
    source = _copy_source(tmp_path_factory.mktemp("next"))
    _run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source))
    return folder


def _copy_source(folder: Path) -> Path:
    """Copy the checkout, with the next version's number."""
    for name in ("hoberproxy", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    module = folder / "hoberproxy/__init__.py"
    text = re.sub(
        r'(?m)^__version__ = ".*"$', f'__version__ = "{NEXT_VERSION}"', module.read_text()
    )
    assert NEXT_VERSION in text
    module.write_text(text)
    return folder


def _run(*command: str) -> None:
    """Run pip or venv; what they build is pure, for compiling is install.sh's task."""
    pure = os.environ | {"HOBERPROXY_BUILD": "pure"}
    subprocess.run(command, check=True, timeout=patient(300), env=pure)


@pytest.fixture(scope="session")
def machine(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    shared = {"/srv/checkout": REPOSITORY, "/srv/wheels": wheels}
    with booted(tmp_path_factory.mktemp("machine"), shared) as running:
        yield running


@pytest.fixture(scope="session")
def upstream(machine: Machine) -> Iterator[Upstream]:
    running = Upstream(machine.listen(UPSTREAM_PORT))
    yield running
    running.close()


@pytest.fixture(scope="session")
def installed(machine: Machine, upstream: Upstream) -> Service:
    """Install and configure the service as deploy/README.md says; it is not started."""
    service = Service(machine)
    service.install()
    service.configure(UPSTREAM_PORT)
    return service


@pytest.fixture
def service(installed: Service, upstream: Upstream) -> Service:
    """Have the service running, with the config it was installed with."""
    upstream.may_end.clear()
    installed.configure(UPSTREAM_PORT)
    installed.start()
    return installed
