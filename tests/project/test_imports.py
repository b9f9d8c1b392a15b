"""Imports point one way, and every folder and module keeps to its size.

The table is that of CONTRIBUTING.md. Imports within functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import hoberproxy
from tests.support.patience import WAIT

PACKAGE = Path(hoberproxy.__file__).parent
TESTS = Path(__file__).parents[1]
MAX_MODULES = 13  # of a folder
MAX_LINES = 600  # of a module

PATH = (
    "protocol",
    "dialects",
    "request",
    "routing",
    "config",
    "access",
    "downstream",
    "upstream",
    "relay",
    "accounting",
)
MAY_IMPORT: dict[str, set[str]] = {
    "protocol": set(),
    "dialects": {"protocol"},
    "request": {"protocol", "dialects"},
    "routing": {"protocol", "request"},
    "config": {"request", "routing"},
    "access": {"config", "protocol"},
    "downstream": {"protocol", "access", "config"},
    "upstream": {"protocol", "dialects", "request", "routing", "config"},
    "relay": {"protocol", "dialects", "downstream", "upstream"},
    "accounting": {"protocol", "dialects", "request", "routing", "access"},
    "exchange": set(PATH),
    "storage": {"protocol", "routing", "access", "accounting"},
    "api": {
        *("protocol", "dialects", "config", "access", "downstream"),
        *("accounting", "exchange", "storage"),
    },
    "process": {*PATH, "exchange", "storage", "api"},
    "cli": {*PATH, "exchange", "storage", "api", "process"},
}
# Free to all; the two others are where the program starts.
ROOT = {"__init__", "errors", "timer_wheel", "_mypyc"}
STARTS = {"__main__": {"cli"}}
# What a pure package does without: the machine, the loop, the clock.
MACHINE = frozenset(
    "aiohttp aiohappyeyeballs asyncio fcntl mmap os selectors signal socket sqlite3 ssl subprocess"
    " threading time uvloop".split()
)
PURE = ("protocol", "dialects", "request", "routing")
# Of tests/, beside the folders of the package.
OTHER_TESTS = {"support", "project", "e2e", "real", "systemd", "wheel", "docker", "data", "js"}


SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in SOURCES]


def folder_of(module: str) -> str:
    """Return the folder of a dotted name; empty for a module of the root."""
    return module.rpartition(".")[0]


@cache
def imports(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return what `module` imports anywhere in it: modules of ours, and other libraries."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    here = module.split(".")[:-1]
    own: set[str] = set()
    other: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            other |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            other.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1]
            if node.module is not None:
                own.add(_module_named(".".join([*base, node.module])))
            else:
                own |= {_module_named(".".join([*base, alias.name])) for alias in node.names}
    return frozenset(own), frozenset(other)


def _module_named(name: str) -> str:
    """Return the module that `name` is, or the `__init__` that it is found in."""
    if name in MODULES:
        return name
    if f"{name}.__init__" in MODULES:
        return f"{name}.__init__"
    package = folder_of(name)
    return f"{package}.__init__" if package else "__init__"


def reached_from(module: str) -> set[str]:
    """Return all modules of ours that `module` imports, directly or not."""
    seen: set[str] = set()
    waiting = set(imports(module)[0])
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= imports(name)[0] - seen
    return seen


def test_every_folder_has_a_row_in_the_table() -> None:
    folders = {folder_of(module) for module in MODULES} - {""}
    assert folders == set(MAY_IMPORT)
    assert {module for module in MODULES if not folder_of(module)} == ROOT | set(STARTS)


def test_contributing_has_the_table() -> None:
    text = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]+) \|$", text, re.MULTILINE)
    written: dict[str, set[str]] = {}
    for folder, names in rows:
        above = set(written)
        written[folder] = above if names == "all above" else set(names.split(", ")) - {"–"}
    assert written == MAY_IMPORT


def test_the_table_has_no_circle() -> None:
    above: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for name, allowed in MAY_IMPORT.items():
        assert name not in allowed
        for each in allowed:
            above[each] |= {name} | above[name]
    assert not [name for name, users in above.items() if name in users]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_the_table_allows(module: str) -> None:
    folder = folder_of(module)
    allowed = MAY_IMPORT.get(folder, STARTS.get(module, set()))
    wrong = {
        name
        for name in imports(module)[0]
        if name not in ROOT and folder_of(name) not in allowed | {folder}
    }
    assert not wrong, f"{folder or module} may import {sorted(allowed)}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_imported_imports_back(module: str) -> None:
    assert module not in reached_from(module)


@pytest.mark.parametrize("module", [each for each in MODULES if folder_of(each) in PURE])
def test_pure_packages_know_neither_sockets_nor_clocks(module: str) -> None:
    assert not imports(module)[1] & MACHINE


@pytest.mark.parametrize("module", MODULES)
def test_imports_within_the_package_are_relative(module: str) -> None:
    assert "hoberproxy" not in imports(module)[1]


@pytest.mark.parametrize("module", ["process.supervisor", "process.writer_process"])
def test_what_watches_and_writes_does_without_the_web_framework(module: str) -> None:
    everything = {module} | reached_from(module)
    libraries = set().union(*(imports(each)[1] for each in everything))
    assert not libraries & {"aiohttp", "uvloop"}
    heavy = "{'aiohttp', 'uvloop'} & set(sys.modules)"
    code = f"import sys, hoberproxy.{module}; sys.exit(bool({heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT)


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_a_folder_is_small_enough_to_be_known(folder: str) -> None:
    names = [
        name for name in MODULES if folder_of(name) == folder and not name.endswith("__init__")
    ]
    assert 0 < len(names) <= MAX_MODULES


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_a_module_is_small_enough_to_be_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_packages_export_nothing_again() -> None:
    inits = [path for path in SOURCES if path.name == "__init__.py" and path.parent != PACKAGE]
    assert inits
    assert not [path for path in inits if path.read_text(encoding="utf-8").strip()]


def test_the_tests_mirror_the_folders() -> None:
    folders = {
        path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders - OTHER_TESTS <= set(MAY_IMPORT)
    loose = {path.name for path in TESTS.glob("test_*.py")}
    assert not {name for name in loose if name[len("test_") : -len(".py")] not in ROOT}
