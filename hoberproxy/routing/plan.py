"""A plan: the endpoints to try for one call in their order, and those that are left out of it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from .catalog import Endpoint, Model

Offer = tuple[Model, Endpoint]
"""An endpoint that may serve a call, and the model under which it does."""


class Step(NamedTuple):  # made for each request, at a third of the cost of a frozen dataclass
    """One endpoint to try, under the slug that the client will see.

    `reason` says why it has its place: "config", "weight", "order", "price", "latency",
    "throughput", "balanced" or "cooldown".
    """

    slug: str
    endpoint: Endpoint
    reason: str = "config"


@dataclass(frozen=True, slots=True)
class Removal:
    """One endpoint that is not in the plan: which `filter` (a stable code) removed it, and why.

    `context_length` is that of the endpoint in tokens, where it was too short.
    """

    slug: str
    provider: str
    upstream_model: str
    filter: str
    words: str
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Endpoints in the order in which they are to be tried: at least one, none twice.

    Each endpoint of each known candidate is a step or a removal. `unknown` are the candidates that
    are not in the catalog, as the client wrote them.
    """

    steps: tuple[Step, ...]
    removed: tuple[Removal, ...] = ()
    unknown: tuple[str, ...] = ()

    def after(self, position: int, refused: Container[str] = ()) -> int | None:
        """Return the position of the step after the failed one at `position`, None at the end.

        `refused` are the slugs whose endpoints would all say the same: the request is wrong for
        that model.
        """
        for following in range(position + 1, len(self.steps)):
            if self.steps[following].slug not in refused:
                return following
        return None
