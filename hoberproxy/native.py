"""What the compiler has to be told, without a runtime dependency for it.

A call on a class costs a third of one on a Protocol, for the compiler knows where its methods are.
Uncompiled classes, such as those of tests, can derive from such a class only if it says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_: Any) -> Any:
        """Leaves a class as it is."""
        return lambda decorated: decorated


__all__ = ["mypyc_attr"]
