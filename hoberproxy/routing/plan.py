"""A plan: the endpoints to try for one call in their order, and those that are left out of it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from .catalog import Endpoint, Model

Offer = tuple[Model, Endpoint]
"""An endpoint that may serve a call, and the model under which it does."""


class Step(NamedTuple):  # made for every request, at a third of the cost of a frozen dataclass
    """One endpoint to try, under the slug the client will see.

    `reason` for its place: "config", "weight", "order", "price", "latency", "throughput",
    "balanced" or "cooldown".
    """

    slug: str
    endpoint: Endpoint
    reason: str = "config"


@dataclass(frozen=True, slots=True)
class Removal:
    """One endpoint that is not in the plan: the filter (a stable code), and why in words.

    `context_length` is in tokens, where that was too short.
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
        """The step to try when that at `position` failed, None when there is none left.

        `refused` are the slugs whose endpoints would all say the same: the request is wrong for
        that model.
        """
        for following in range(position + 1, len(self.steps)):
            if self.steps[following].slug not in refused:
                return following
        return None
