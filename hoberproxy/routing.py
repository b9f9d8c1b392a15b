"""Which endpoints may serve a call, in which order: one pure function from call to plan.

No I/O, no clock, no chance. What is then tried, for how long and how often, is attempts.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .catalog import Catalog, Endpoint
from .errors import RouteError
from .request import Call


@dataclass(frozen=True, slots=True)
class Step:
    """One endpoint to try, under the slug the client will see."""

    slug: str
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Plan:
    """Endpoints in the order in which they are to be tried; never empty."""

    steps: tuple[Step, ...]

    def after(self, position: int, *, other_model: bool = False) -> int | None:
        """The step to try when that at `position` failed, None when there is none left.

        `other_model`: the endpoints of this model would all say the same, go to the next model.
        """
        slug = self.steps[position].slug
        for following in range(position + 1, len(self.steps)):
            if not other_model or self.steps[following].slug != slug:
                return following
        return None


def make_plan(call: Call, catalog: Catalog) -> Plan:
    """The endpoints of `model`, then of each of `models`, in the config's order.

    An unknown slug among several is skipped. Raises RouteError 404 if none is known.
    """
    steps = [
        Step(slug, endpoint)
        for slug in call.candidates
        if (model := catalog.find(slug)) is not None
        for endpoint in model.endpoints
    ]
    if not steps:
        raise RouteError(_unknown_models(call.candidates), code="model_not_found", param="model")
    return Plan(tuple(steps))


def _unknown_models(candidates: tuple[str, ...]) -> str:
    # Slugs are what the client itself sent; bounded, since they also reach the log.
    names = ", ".join(repr(slug[:128]) for slug in candidates[:5])
    return f"no model of this name in the catalog: {names}; GET /v1/models lists what there is"
