"""make_plan: from a call and a catalog to the endpoints to try."""

from __future__ import annotations

from collections.abc import Callable

from hoberproxy.request.checks import parse_call
from hoberproxy.routing.catalog import Catalog, Endpoint, Model
from hoberproxy.routing.health import Health
from hoberproxy.routing.router import make_plan

from . import Case
from .streams import SLUG, request_body


def _catalog(models: int, endpoints: int) -> Catalog:
    offers = tuple(Endpoint(f"provider-{number}", "gpt-4o-mini") for number in range(endpoints))
    others = [Model(f"other/model-{number}", offers) for number in range(models - 1)]
    return Catalog([Model(SLUG, offers), *others])


def _planning(endpoints: int, **members: object) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        catalog, health = _catalog(100, endpoints), Health()
        call = parse_call(request_body(100, **members))
        return lambda: make_plan(call, catalog, health, 0.0)

    return make


CASES = (
    Case("one endpoint", _planning(1), unit="plan"),
    Case("eight endpoints", _planning(8), unit="plan"),
    Case("eight, sorted by price", _planning(8, provider={"sort": "price"}), unit="plan"),
    Case("eight, some ignored", _planning(8, provider={"ignore": ["provider-1"]}), unit="plan"),
)
