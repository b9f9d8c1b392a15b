"""The build of a wheel: with the path of a request compiled to C by mypyc where that can be done.

`pip install .`, `deploy/install.sh` and `make wheel` come here through pyproject.toml, which says
what is compiled. HOBERPROXY_BUILD=pure or =compiled in the environment decides; without it the
package is compiled where a C compiler and Python's headers are. Editable installs run the sources.

`python hatch_build.py` prints which of the two a build would make here, and why.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# One release series, so that what users compile is what the tests and the bench have run.
REQUIRES = ["mypy[mypyc]==2.4.*", "orjson>=3.10"]
MYPY_OPTIONS = ["--config-file=", "--ignore-missing-imports", f"--cache-dir={os.devnull}"]

# setuptools puts them in place of Python's own. What is hidden within the one library is reached
# without a table, and so are Python's functions: 180 cache lines less a request.
C_FLAGS = "-DNDEBUG -fwrapv -fstack-protector-strong -fvisibility=hidden -fno-plt"

REMEDY = "install gcc and Python's headers (Debian: gcc python3-dev) and build again"
ADVICE = "set HOBERPROXY_BUILD=pure to install without compiling"


class BuildError(Exception):
    """The package cannot be built as it is wanted."""


class Choice(NamedTuple):
    """Whether a build compiles, and if not why."""

    is_compiled: bool
    reason: str = ""

    def __str__(self) -> str:
        return "compiled" if self.is_compiled else f"pure: {self.reason}"


def choose(environ: Mapping[str, str]) -> Choice:
    """Choose between compiled and pure; raises BuildError if what `environ` wants cannot be."""
    wanted = environ.get("HOBERPROXY_BUILD", "")
    if wanted not in ("", "pure", "compiled"):
        raise BuildError(f"HOBERPROXY_BUILD: expected pure or compiled, got {wanted!r}")
    if wanted == "pure":
        return Choice(False, "HOBERPROXY_BUILD=pure")
    problem = find_problem(environ)
    if problem is None:
        return Choice(True)
    if wanted:
        raise BuildError(f"HOBERPROXY_BUILD=compiled, but {problem}: {REMEDY}")
    return Choice(False, f"{problem}; to have it compiled, {REMEDY}")


def find_problem(environ: Mapping[str, str]) -> str | None:
    """Return why nothing can be compiled here, or None: a small extension is tried.

    A compiler that has no headers of Python or of the C library counts as none.
    """
    if sys.implementation.name != "cpython":
        return f"this is {sys.implementation.name}, not CPython"
    command = shlex.split(environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(command[0], path=environ.get("PATH")) is None:
        return f"no C compiler is here ({command[0]})"
    return _try_compiler(command)


def _try_compiler(command: list[str]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\nint probe(void) { return PY_MAJOR_VERSION; }\n")
        include, target = sysconfig.get_path("include"), str(source.with_suffix(".so"))
        tried = subprocess.run(
            [*command, "-shared", "-fPIC", f"-I{include}", str(source), "-o", target],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if tried.returncode == 0:
        return None
    errors = [line for line in tried.stdout.splitlines() if "error" in line]
    said = errors[0].strip() if errors else f"it ended with {tried.returncode}"
    return f"{command[0]} cannot compile an extension ({said})"


def list_compiled(root: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the files that pyproject.toml has compiled, relative to `root`, in order.

    `config` is the table of the hook: `compiled` has patterns, `interpreted` those that are left
    out. A pattern without a file is a mistake. An `__init__.py` has nothing to compile.
    """
    found = _expand(root, config["compiled"]) - _expand(root, config["interpreted"])
    return sorted(path for path in found if not path.endswith("/__init__.py"))


def _expand(root: Path, patterns: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        paths = {path.relative_to(root).as_posix() for path in root.glob(pattern)}
        if not paths:
            raise BuildError(f"pyproject.toml names {pattern} to the compiler, where no file is")
        found |= paths
    return found


def compile_files(root: str, files: list[str], target: Path) -> None:
    """Compile `files` into extension modules under `target`; raises BuildError with the output."""
    flags = f"{C_FLAGS} {os.environ.get('CFLAGS', '')}".strip()
    ended = subprocess.run(
        [sys.executable, __file__, "compile", str(target), *files],
        cwd=root,
        env=os.environ | {"CFLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode != 0:
        raise BuildError(f"{ended.stdout}\nhoberproxy could not be compiled (above); {ADVICE}")


def _run_mypyc(target: str, files: list[str]) -> None:
    """Compile in this process, which mypy ends on an error; leaves nothing beside the sources."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    with tempfile.TemporaryDirectory() as folder:
        extensions = mypycify(
            [*MYPY_OPTIONS, *files],
            opt_level="2",
            debug_level="0",
            target_dir=folder,
            group_name="hoberproxy",
        )
        for extension in extensions:  # another compiler may warn of what this one does not
            flags = extension.extra_compile_args
            extension.extra_compile_args = [flag for flag in flags if flag != "-Werror"]
        distribution = Distribution({"name": "hoberproxy", "ext_modules": extensions})
        command = distribution.get_command_obj("build_ext")
        command.build_lib, command.build_temp = target, folder
        distribution.run_command("build_ext")


def get_build_hook() -> type[Any]:
    """Return the hook's class; called by hatchling, which only a build has."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class BuildHook(BuildHookInterface[Any]):
        """Adds the compiled modules to a wheel; the sources are in it either way."""

        _folder: tempfile.TemporaryDirectory[str] | None = None

        def dependencies(self) -> list[str]:
            return REQUIRES if choose(os.environ).is_compiled else []

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if version == "editable":
                return
            choice = choose(os.environ)
            self.app.display_info(f"hoberproxy is built {choice}")
            if choice.is_compiled:
                self._add_compiled(build_data)

        def _add_compiled(self, build_data: dict[str, Any]) -> None:
            self._folder = tempfile.TemporaryDirectory()
            target = Path(self._folder.name)
            files = list_compiled(Path(self.root), self.config)
            compile_files(self.root, files, target)
            for library in target.rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"):
                build_data["force_include"][str(library)] = str(library.relative_to(target))
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            if self._folder is not None:
                self._folder.cleanup()

    return BuildHook


def main(arguments: list[str]) -> int:
    """Run as a program: say what a build would make, or compile for the hook."""
    if arguments[:1] == ["compile"]:
        _run_mypyc(arguments[1], arguments[2:])
        return 0
    try:
        print(choose(os.environ))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
