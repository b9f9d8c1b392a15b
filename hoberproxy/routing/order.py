"""The order of a plan: by what the client prefers, by price, health, weights and cooldowns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from operator import itemgetter
from typing import Any

from ..request.call import ProviderPreferences
from .health import Health, Key
from .plan import Offer, Step


def arrange(
    offers: list[Offer],
    sort: str | None,
    wanted: ProviderPreferences,
    health: Health,
    now: float,
    draw: Callable[[], float],
) -> list[Step]:
    """Return the steps of one candidate: sorted, those of `order` first, cooling ones last.

    A cooling endpoint is last even if `order` names it: the client's order still holds among those
    that work. But with `allow_fallbacks` false nothing takes the place of a provider in `order`.
    """
    reason = sort or "config"
    if sort is not None:
        offers = _sorted(offers, sort, health, now)
    elif any(endpoint.weight is not None for _, endpoint in offers):
        reason, offers = "weight", _drawn(offers, draw)
    cooled = {
        key: health.cooldown_ends(key) or now
        for _, endpoint in offers
        if health.is_cooling(key := endpoint.key, now)
    }
    if not cooled and not wanted.order:
        return [Step(model.slug, endpoint, reason) for model, endpoint in offers]
    return _placed(offers, reason, wanted, cooled)


def _placed(
    offers: list[Offer], reason: str, wanted: ProviderPreferences, cooled: dict[Key, float]
) -> list[Step]:
    named: dict[str, int] = {}
    for provider in wanted.order or ():
        named.setdefault(provider, len(named))
    placed = []
    for model, endpoint in offers:
        rank = named.get(endpoint.provider, len(named))
        is_unnamed = rank == len(named)
        ends = cooled.get(endpoint.key)
        is_cooled = ends is not None
        place = (is_unnamed and not wanted.allow_fallbacks, is_cooled, ends or 0.0, rank)
        why = "cooldown" if is_cooled else reason if is_unnamed else "order"
        placed.append((place, Step(model.slug, endpoint, why)))
    placed.sort(key=itemgetter(0))  # by the place alone: among equals the sort is kept
    return [step for _, step in placed]


def _drawn(offers: list[Offer], draw: Callable[[], float]) -> list[Offer]:
    """Return `offers` in a random order by their weights, 1 if not given; those of 0 come last.

    Each offer gets a random time, exponential with its weight as rate, and the earliest is first:
    which one that is has a probability in proportion to its weight, and so for the rest.
    """

    def arrival(offer: Offer) -> tuple[bool, float]:
        weight = offer[1].weight
        if weight is None:
            weight = 1.0
        return (False, -math.log(1.0 - draw()) / weight) if weight > 0 else (True, 0.0)

    return sorted(offers, key=arrival)


def _sorted(offers: list[Offer], sort: str, health: Health, now: float) -> list[Offer]:
    if sort == "price":
        return sorted(offers, key=_price)
    if sort == "balanced":
        return _balanced(offers, health, now)
    return sorted(offers, key=lambda offer: _measured(offer, sort, health, now))


def _price(offer: Offer) -> tuple[bool, Decimal]:
    prices = offer[1].prices
    if prices is None:
        return True, Decimal(0)  # after all whose price is known
    return False, prices.prompt + prices.completion


def _measured(offer: Offer, sort: str, health: Health, now: float) -> tuple[int, float]:
    """Return a sort key by speed or latency, the best first.

    An endpoint that was not measured of late comes before the others, or it never would be; but
    while one request tries it, it comes after them, or all would.
    """
    key = offer[1].provider, offer[1].upstream_model
    if sort == "throughput":
        value = health.throughput(key, now)
    else:
        value = health.first_content(key, now)
    if value is None:
        return (2 if health.is_tried(key, now) else 0), 0.0
    return 1, -value if sort == "throughput" else value


def _balanced(offers: list[Offer], health: Health, now: float) -> list[Offer]:
    """Return `offers` by the sum of their ranks in price and latency, then by price.

    Equal values share a rank, so what is no worse in both and better in one always comes first.
    Ranks and not values: dollars and seconds have no common measure.
    """
    prices = _ranks([_price(offer) for offer in offers])
    latencies = _ranks([_measured(offer, "latency", health, now) for offer in offers])
    order = sorted(range(len(offers)), key=lambda i: (prices[i] + latencies[i], prices[i]))
    return [offers[i] for i in order]


def _ranks(values: Sequence[Any]) -> list[int]:
    rank = {value: place for place, value in enumerate(sorted(set(values)))}
    return [rank[value] for value in values]
