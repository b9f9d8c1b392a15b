"""The decorator that mypyc reads, without needing mypyc, and whether this build is compiled.

A call on a class costs a third of one on a Protocol, for the compiler knows where its methods are.
Uncompiled classes, such as those of tests, can derive from such a class only if it says so.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_: Any) -> Any:
        """Return a decorator that leaves a class as it is."""
        return lambda decorated: decorated


__all__ = ["HOW_TO_COMPILE", "describe_build", "is_compiled", "mypyc_attr"]

COMPILED_MODULE = "timer_wheel"  # any of those that pyproject.toml has compiled
HOW_TO_COMPILE = "pip install . compiles it where gcc and Python's headers are: half the CPU"


@cache
def is_compiled() -> bool:
    """Whether the installed package has the path of a request compiled."""
    spec = find_spec(f"{__package__}.{COMPILED_MODULE}")
    return spec is not None and not str(spec.origin).endswith(".py")


def describe_build() -> str:
    """Return what runs, as `hoberproxy version` and the start print it: version, build, Python."""
    build = "compiled" if is_compiled() else "pure"
    return f"hoberproxy {__version__} ({build}, Python {sys.version.split()[0]})"
