"""What a build makes, compiled or pure, and that what is installed is what pyproject.toml says."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import hoberproxy
from hatch_build import BuildError, choose, compile_files, list_compiled
from hoberproxy.native import COMPILED_MODULE

from .conftest import IS_COMPILED
from .patience import WAIT

ROOT = Path(__file__).parent.parent
INSTALLED = Path(hoberproxy.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TABLE = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]


def name_module(path: str) -> str:
    """The module's dotted name, of a path as in `hoberproxy/relay.py`."""
    return path.removesuffix(".py").replace("/", ".")


def is_extension(module: str) -> bool:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return spec.origin.endswith(".so")


# What is compiled


def test_the_program_knows_itself_by_a_module_that_is_compiled() -> None:
    compiled = map(name_module, list_compiled(INSTALLED, TABLE))
    assert f"hoberproxy.{COMPILED_MODULE}" in compiled


@pytest.mark.skipif(not IS_COMPILED, reason="the package is not compiled (make test-compiled)")
def test_all_that_is_listed_is_compiled_and_nothing_else() -> None:
    modules = {each.name for each in pkgutil.walk_packages(hoberproxy.__path__, "hoberproxy.")}
    listed = set(map(name_module, list_compiled(INSTALLED, TABLE)))
    assert {module for module in modules if is_extension(module)} == listed


def test_a_file_is_compiled_unless_it_is_left_out(tmp_path: Path) -> None:
    for name in ("a/__init__.py", "a/b.py", "a/c.py", "d/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    table = {"compiled": ["a/*.py"], "interpreted": ["a/c.py"]}
    assert list_compiled(tmp_path, table) == ["a/b.py"]


@pytest.mark.parametrize("name", ["compiled", "interpreted"])
def test_a_pattern_without_a_file_is_a_mistake(tmp_path: Path, name: str) -> None:
    table = {"compiled": [], "interpreted": []} | {name: ["hoberproxy/gone/*.py"]}
    with pytest.raises(BuildError, match=r"hoberproxy/gone/\*\.py"):
        list_compiled(tmp_path, table)


# Compiled or pure


def compiler(folder: Path, script: str) -> dict[str, str]:
    """An environment whose C compiler is this shell script."""
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"CC": str(path), "PATH": "/usr/bin:/bin"}


def test_with_a_compiler_that_works_the_package_is_compiled(tmp_path: Path) -> None:
    assert str(choose(compiler(tmp_path, "exit 0"))) == "compiled"


def test_without_a_compiler_it_is_pure_and_says_what_to_do(tmp_path: Path) -> None:
    chosen = choose({"CC": "gcc-of-nowhere", "PATH": str(tmp_path)})
    assert not chosen.is_compiled
    assert chosen.reason.startswith("no C compiler is here (gcc-of-nowhere)")
    assert "install gcc and Python's headers" in chosen.reason


def test_a_compiler_without_its_headers_counts_as_none_and_says_so(tmp_path: Path) -> None:
    environ = compiler(tmp_path, "echo 'x.c:1: fatal error: limits.h: no such file'; exit 1")
    assert "cc cannot compile an extension (x.c:1: fatal error: limits.h" in choose(environ).reason


def test_the_environment_can_have_it_pure(tmp_path: Path) -> None:
    environ = compiler(tmp_path, "exit 0") | {"HOBERPROXY_BUILD": "pure"}
    assert str(choose(environ)) == "pure: HOBERPROXY_BUILD=pure"


def test_what_must_be_compiled_and_cannot_be_is_an_error(tmp_path: Path) -> None:
    environ = compiler(tmp_path, "exit 1") | {"HOBERPROXY_BUILD": "compiled"}
    with pytest.raises(BuildError, match=r"HOBERPROXY_BUILD=compiled, but .* cannot compile"):
        choose(environ)


def test_another_word_in_the_environment_is_an_error() -> None:
    with pytest.raises(BuildError, match="expected pure or compiled, got 'fast'"):
        choose({"HOBERPROXY_BUILD": "fast"})


def test_the_hook_says_as_a_program_what_a_build_would_make() -> None:
    program = [sys.executable, str(ROOT / "hatch_build.py")]
    for word, status, said in (("pure", 0, "pure: HOBER"), ("fast", 1, "HOBERPROXY_BUILD: exp")):
        ended = subprocess.run(
            program,
            env={"HOBERPROXY_BUILD": word},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT,
        )
        assert (ended.returncode, ended.stdout.startswith(said)) == (status, True), ended.stdout


def test_what_does_not_compile_fails_the_build_and_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("mypyc")
    pytest.importorskip("setuptools")
    (tmp_path / "wrong.py").write_text("number: int = 'text'\n")
    with pytest.raises(BuildError, match=r"(?s)wrong\.py:1: error: .*HOBERPROXY_BUILD=pure"):
        compile_files(str(tmp_path), ["wrong.py"], tmp_path)
