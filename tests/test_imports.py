"""Imports point one way: errors ← core ← shell ← exchange ← app ← cli."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hoberproxy

PACKAGE = Path(hoberproxy.__file__).parent
# A module is core until it is named here.
SHELL = frozenset(
    "__init__ __main__ accesslog account_pages accounting admin aiohttp_bridge app attempts"
    " channel child cli commands_keys commands_service commands_usage connector content_template"
    " context counting database demo diagnosis downstream edge_templates exchange exposition files"
    " folder joining journal journals key_loader keytable listeners listing memory metrics"
    " model_lists notify origin pool printing probe quickstart relay scrape server service sink"
    " source sqlite_store provider request_handler stream succession supervisor tallies tls"
    " upstream wire worker writer writer_process writers".split()
)
# Of the machine: a core module takes bytes, values and `now`.
SHELL_LIBRARIES = frozenset(
    "aiohttp aiohappyeyeballs asyncio os selectors signal socket sqlite3 ssl subprocess threading"
    " time uvloop".split()
)
TOP = (
    "wire",
    "exchange",
    "app",
    "server",
    "worker",
    "cli",
)  # each is imported only by what follows it
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
CORE = frozenset(MODULES) - SHELL


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """What a module imports at run time, also within functions: name, and whether it is ours."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    skipped = {id(node) for block in type_checking_blocks(tree) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0], False
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or alias.name, True) for alias in node.names)


def type_checking_blocks(tree: ast.Module) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield node


def ours(module: str) -> set[str]:
    return {name for name, is_ours in imports(module) if is_ours and name in MODULES}


@pytest.mark.parametrize("module", sorted(CORE))
def test_core_modules_import_neither_the_machine_nor_a_shell(module: str) -> None:
    libraries = {name for name, is_ours in imports(module) if not is_ours}
    assert not libraries & SHELL_LIBRARIES
    assert "hoberproxy" not in libraries, "imports within the package are relative"
    assert ours(module) <= CORE


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_imported_imports_back(module: str) -> None:
    seen: set[str] = set()
    waiting = ours(module)
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= ours(name) - seen
    assert module not in seen


@pytest.mark.parametrize("module", MODULES)
def test_the_upper_modules_are_known_only_above(module: str) -> None:
    below = TOP[TOP.index(module) :] if module in TOP else TOP
    allowed = {"__main__": {"cli"}}.get(module, set())
    assert not ours(module) & set(below) - allowed


def test_every_shell_module_exists() -> None:
    assert set(MODULES) >= SHELL
