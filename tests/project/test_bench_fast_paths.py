"""Fast paths are switched off one by one, in a copy that nothing else is mistaken for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.c_upstream import find_compiler
from bench.fast_paths import (
    AGAIN,
    FULL,
    LOADS,
    ROOT,
    SWITCHES,
    VARIABLE,
    Program,
    Switch,
    add_switches,
    describe_command,
    make_copy,
    parse_options,
    summarize,
)
from bench.processes import StartError
from bench.saturate import find_wrk
from tests.conftest import pure_only
from tests.support.patience import WAIT

SOURCE = '''"""A module."""

from __future__ import annotations


def double(number: int) -> int:
    """Twice as much."""
    return 2 * number


class Box:
    def value(self) -> int:
        return double(1)
'''
OFF = {"box": Switch("", (), {"Box.value": "return 0", "double": "number = 5"})}


def run(source: str, monkeypatch: pytest.MonkeyPatch, off: str) -> tuple[int, int]:
    monkeypatch.setenv(VARIABLE, off)
    module: dict[str, object] = {}
    exec(compile(source, "module", "exec"), module)
    return eval("double(2), Box().value()", module)  # type: ignore[no-any-return]


def test_a_switch_is_the_first_statement_of_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    text, found = add_switches(SOURCE, OFF)
    assert found == {"Box.value", "double"}
    assert run(text, monkeypatch, "") == (4, 2)
    assert run(text, monkeypatch, "other") == (4, 2)
    assert run(text, monkeypatch, "box") == (10, 0)
    module = ast.parse(text)
    assert ast.get_docstring(module) == "A module."
    assert "double" in {each.name for each in module.body if isinstance(each, ast.FunctionDef)}


def test_a_module_without_such_a_function_stays_as_it_is() -> None:
    assert add_switches(SOURCE, {"other": Switch("", (), {"Other.value": "return"})}) == (
        SOURCE,
        set(),
    )


@pure_only
def test_every_fast_path_is_in_the_package_by_the_name_given(tmp_path: Path) -> None:
    make_copy(ROOT, tmp_path, SWITCHES)
    for path in (tmp_path / "hoberproxy").rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


@pure_only
def test_a_fast_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Nowhere\.find"):
        make_copy(ROOT, tmp_path, {"gone": Switch("", (), {"Nowhere.find": "return 0"})})


def test_each_switch_names_loads_that_exist() -> None:
    for switch in SWITCHES.values():
        assert switch.loads and set(switch.loads) <= set(LOADS)
        assert switch.off


def test_another_package_is_not_taken_for_the_copy(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="expected the package in"):
        Program(tmp_path, sys.executable, is_compiled=True).check()


def test_a_ratio_is_of_the_same_turn_and_its_median_is_told() -> None:
    values = {"json": {FULL: [100.0, 200.0, 100.0], AGAIN: [101.0, 190.0, 100.0]}}
    full, again = summarize(values)
    assert (full["ratio"], full["median_us"]) == (1.0, 100.0)
    assert (again["ratio"], again["median_us"]) == (1.0, 101.0)
    assert again["ratio_low"] == pytest.approx(0.975)
    assert again["ratio_high"] == pytest.approx(1.005)


def test_the_command_that_is_told_has_no_folder_of_this_machine() -> None:
    command = describe_command(["--folder", "/a/copy", "--beside", "old=/b/other", "--turns", "3"])
    assert command == "python -m bench.fast_paths --folder copy --beside old=other --turns 3"


def test_another_version_is_a_variant_of_its_own(tmp_path: Path) -> None:
    options = parse_options(["--folder", "x", "--only", "", "--beside", f"old={tmp_path}"])
    assert options.only == []
    assert options.beside["old"].folder == tmp_path.resolve()
    assert options.beside["old"].is_compiled


@pure_only
@pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
@pytest.mark.skipif(find_wrk() is None, reason="needs wrk (Debian: wrk)")
def test_variants_run_side_by_side(tmp_path: Path) -> None:
    options = "--pure --only admitted,edges --load json,burst --turns 1 --seconds 1".split()
    paths = ["--folder", str(tmp_path / "copy"), "--json", str(tmp_path / "run.json")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.fast_paths", *options, *paths],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=2 * WAIT,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run.json").read_bytes())
    assert {load: set(variants) for load, variants in report["turns"].items()} == {
        "json": {FULL, AGAIN, "admitted"},
        "burst": {FULL, AGAIN, "edges"},
    }
    assert all(
        us > 0 for each in report["turns"].values() for turns in each.values() for us in turns
    )
    assert "edges" in done.stdout
