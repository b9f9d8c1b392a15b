"""Filters of a plan that depend on who asks and not on what is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .errors import AccessError
from .routing import Plan


def keep_permitted(plan: Plan, may_use: Callable[[str], bool], models: Sequence[str]) -> Plan:
    """Return `plan` with only those steps whose slugs `may_use` permits.

    `models` are what a key may use, in the words of its owner. Raises AccessError if no step is
    left.
    """
    steps = tuple([step for step in plan.steps if may_use(step.slug)])
    if not steps:
        slugs = ", ".join(dict.fromkeys([step.slug for step in plan.steps]))
        raise AccessError(
            f"expected a model out of {', '.join(models)} with this key, got {slugs[:256]}; "
            "ask for another model, or use another key",
            code="model_not_allowed",
            status=403,
            type="permission_error",
            param="model",
        )
    return replace(plan, steps=steps)
