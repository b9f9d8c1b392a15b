"""Which endpoints may serve a call, in which order: one pure function from call to plan.

Filters take endpoints out, preferences and health put the rest in order; each place and each
removal has its reason. No I/O and no clock; chance only as `draw`. What is then tried, for how long
and how often, is attempts.py's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from operator import itemgetter
from typing import Any, Final, NamedTuple

from .catalog import Abilities, Catalog, Endpoint, Model
from .errors import RouteError
from .extensions import NO_CONTENT, check_accepted, param_of
from .health import Health, Key
from .request import NO_PREFERENCES, Call, ProviderPreferences
from .text import is_parameter_name

# Only these, and only at the end: another colon belongs to the slug ("llama3.2:3b"). The config
# refuses slugs that end in one, so none is ever hidden.
_SUFFIXES: Final = {":nitro": "latency", ":floor": "price"}
_SUFFIX_LENGTH: Final = 6
# Virtual models over all others, and how they sort these.
_VIRTUAL: Final = {
    "hober/auto": "balanced",
    "hober/auto:cost": "price",
    "hober/auto:fast": "latency",
}

# Prose has 4 to 5 bytes per token, code and other scripts fewer: one token per 6 bytes would be
# news. So only what is clearly too long is held back; the upstream counts better than we do.
_BYTES_PER_TOKEN: Final = 6
# What every endpoint takes, or what is ours and never sent on.
_COMMON_PARAMETERS: Final = frozenset(
    ("model", "models", "provider", "messages", "stream", "stream_options", "usage")
)
_MOST_TOLD: Final = 8  # endpoints, slugs or parameters in a message, which also reaches the log
_NOTHING_LEARNT: Final = Health()  # only read

_Offer = tuple[Model, Endpoint]
_Filter = Callable[[Model, Endpoint], str | None]  # why not, in words


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


def make_plan(
    call: Call,
    catalog: Catalog,
    health: Health | None = None,
    now: float = 0.0,
    draw: Callable[[], float] = random.random,
) -> Plan:
    """The endpoints of `model`, then of each of `models`, filtered and put in order.

    An unknown slug among several is skipped. Raises RouteError 404: `model_not_found` if none is
    known, `no_endpoint` if the filters left nothing; and 400 `context_length_exceeded` if a shorter
    prompt would have left something; and RequestError for a value beyond the contract's that no
    endpoint of the catalog accepts.
    """
    if health is None:
        health = _NOTHING_LEARNT
    terms = call.terms
    may_stand = len(terms.candidates) == 1 and terms.provider is NO_PREFERENCES and health.is_calm
    if may_stand and (standing := _find_standing(call, catalog)) is not None:
        return standing
    filters = _choose_filters(call)
    steps: list[Step] = []
    removed: list[Removal] = []
    unknown: list[str] = []
    taken: set[Key] = set()
    for candidate in terms.candidates:
        models, sort = _look_up(candidate, catalog)
        if models is None:
            unknown.append(candidate)
            continue
        offers = _filter(models, filters, taken, removed)
        sort = terms.provider.sort or sort
        steps += _arrange(offers, sort, terms.provider, health, now, draw)
    if not steps:
        removing = {each.filter for each in removed}
        check_accepted(_extensions(call), call.place_without_content, catalog.accepts, removing)
        raise _nothing_left(call, removed, unknown)
    if not terms.provider.allow_fallbacks:
        removed += [_fallback(step) for step in steps[1:]]
        del steps[1:]
    plan = Plan(tuple(steps), tuple(removed), tuple(unknown))
    if may_stand:
        _keep_standing(terms.candidates[0], plan, catalog)
    return plan


class _Standing:  # no tuple, whose methods are looked up by name
    """The plan of a model for all calls that it can serve with every endpoint. Tokens.

    `abilities` are those that no endpoint denies.
    """

    __slots__ = ("abilities", "context_length", "max_output", "plan")

    def __init__(
        self, plan: Plan, context_length: float, max_output: float, abilities: frozenset[str]
    ) -> None:
        self.plan = plan
        self.context_length = context_length
        self.max_output = max_output
        self.abilities = abilities

    def serves(self, call: Call) -> bool:
        """Whether no filter would take an endpoint out."""
        terms = call.terms
        output = terms.max_output or 0
        return (
            len(call.body) // _BYTES_PER_TOKEN + output <= self.context_length
            and output <= self.max_output
            and (not terms.needs_tools or "tools" in self.abilities)
            and (terms.json_format is None or "json" in self.abilities)
            and (not call.needs_images or "vision" in self.abilities)
            and not terms.extensions
            and call.place_without_content is None
        )


def _find_standing(call: Call, catalog: Catalog) -> Plan | None:
    standing: _Standing | None = catalog.standing.get(call.terms.candidates[0])
    return standing.plan if standing is not None and standing.serves(call) else None


def _keep_standing(slug: str, plan: Plan, catalog: Catalog) -> None:
    """Keep a plan that nothing has had a part in but the config."""
    model = catalog.find(slug)
    if model is None or plan.removed or any(step.reason != "config" for step in plan.steps):
        return
    if len(catalog.standing) >= catalog.CACHE_SIZE:
        catalog.standing.clear()
    catalog.standing[slug] = _Standing(
        plan,
        min(_known(each.context_length, model.context_length) for each in model.endpoints),
        min(_known(each.max_output) for each in model.endpoints),
        frozenset.intersection(*(_undenied(each.abilities) for each in model.endpoints)),
    )


def _known(*lengths: int | None) -> float:
    return next((length for length in lengths if length is not None), math.inf)


def _undenied(abilities: Abilities) -> frozenset[str]:
    denied = {
        "tools": abilities.tools is False,
        "json": abilities.json_mode is False or abilities.json_schema is False,
        "vision": abilities.vision is False,
    }
    return frozenset(name for name, is_denied in denied.items() if not is_denied)


def _look_up(candidate: str, catalog: Catalog) -> tuple[Iterable[Model] | None, str | None]:
    """The models a candidate stands for, None if it is unknown, and how it sorts them."""
    slug, sort = _without_suffix(candidate)
    if slug in _VIRTUAL:
        return catalog.models(), sort or _VIRTUAL[slug]
    model = catalog.find(slug)
    return None if model is None else (model,), sort


def _without_suffix(candidate: str) -> tuple[str, str | None]:
    """A candidate's slug, and how its suffix sorts."""
    sort = _SUFFIXES.get(candidate[-_SUFFIX_LENGTH:])
    return (candidate if sort is None else candidate[:-_SUFFIX_LENGTH]), sort


def _is_virtual(candidate: str) -> bool:
    return _without_suffix(candidate)[0] in _VIRTUAL


# Filters: each is made for one call, and only if it can say no to anything


def _choose_filters(call: Call) -> list[tuple[str, _Filter]]:
    terms = call.terms
    wanted = terms.provider
    filters: list[tuple[str, _Filter]] = []
    if wanted.only:
        filters.append(("not_only", _only(frozenset(wanted.only))))
    if wanted.ignore:
        filters.append(("ignored", _ignore(frozenset(wanted.ignore))))
    if wanted.max_price_prompt is not None or wanted.max_price_completion is not None:
        filters.append(("price", _price_limit(wanted)))
    filters += [(extension, _without_extension(extension)) for extension in _extensions(call)]
    if terms.needs_tools:
        filters.append(("no_tools", _without_tools))
    if terms.json_format is not None:
        filters.append(_json_filter(call))
    if call.needs_images:
        filters.append(("no_vision", _without_vision))
    else:  # the bytes of an image are no tokens
        filters.append(("context_length", _context_limit(call)))
    if terms.max_output is not None:
        filters.append(("max_output", _output_limit(terms.max_output)))
    if wanted.require_parameters:
        filters.append(("parameters", _require(terms.given - _COMMON_PARAMETERS)))
    return filters


def _filter(
    models: Iterable[Model],
    filters: list[tuple[str, _Filter]],
    taken: set[Key],
    removed: list[Removal],
) -> list[_Offer]:
    """What passes all filters and is in no plan yet; `taken` and `removed` are added to."""
    offers = []
    for model in models:
        for endpoint in model.endpoints:
            key = endpoint.key
            for name, why_not in filters:
                if (words := why_not(model, endpoint)) is not None:
                    length = _context_of(model, endpoint) if name == "context_length" else None
                    removed.append(Removal(model.slug, *key, name, words, length))
                    break
            else:
                if key in taken:
                    words = "it is in the plan already"
                    removed.append(Removal(model.slug, *key, "duplicate", words))
                else:
                    taken.add(key)
                    offers.append((model, endpoint))
    return offers


def _fallback(step: Step) -> Removal:
    endpoint = step.endpoint
    words = "provider.allow_fallbacks is false"
    return Removal(step.slug, endpoint.provider, endpoint.upstream_model, "fallbacks_off", words)


def _only(providers: frozenset[str]) -> _Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        return None if endpoint.provider in providers else "provider.only does not name it"

    return why_not


def _ignore(providers: frozenset[str]) -> _Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        return "provider.ignore names it" if endpoint.provider in providers else None

    return why_not


def _price_limit(wanted: ProviderPreferences) -> _Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        prices = endpoint.prices
        if prices is None:
            return "its price is not known"
        for what, price, limit in (
            ("prompt", prices.prompt, wanted.max_price_prompt),
            ("completion", prices.completion, wanted.max_price_completion),
        ):
            if limit is not None and price > limit:
                return f"its {what} price of {price} USD per million tokens is over {limit}"
        return None

    return why_not


def _extensions(call: Call) -> list[str]:
    """The values beyond the contract's that a call uses."""
    found = sorted(call.terms.extensions)
    return found if call.place_without_content is None else [*found, NO_CONTENT]


def _without_extension(extension: str) -> _Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        accepted = endpoint.abilities.accepts or ()
        return None if extension in accepted else f"it does not accept {extension}"

    return why_not


def _without_tools(model: Model, endpoint: Endpoint) -> str | None:
    return "it takes no tools" if endpoint.abilities.tools is False else None


def _without_vision(model: Model, endpoint: Endpoint) -> str | None:
    return "it takes no images" if endpoint.abilities.vision is False else None


def _json_filter(call: Call) -> tuple[str, _Filter]:
    if call.terms.json_format == "json_schema":
        return "no_json_schema", _without_json_schema
    return "no_json_mode", _without_json_mode


def _without_json_mode(model: Model, endpoint: Endpoint) -> str | None:
    return "it has no JSON mode" if endpoint.abilities.json_mode is False else None


def _without_json_schema(model: Model, endpoint: Endpoint) -> str | None:
    return "it takes no JSON schema" if endpoint.abilities.json_schema is False else None


def _context_limit(call: Call) -> _Filter:
    tokens = _prompt_tokens(call) + (call.terms.max_output or 0)

    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        length = _context_of(model, endpoint)
        if length is None or tokens <= length:
            return None
        return f"its context is {length} tokens, prompt and output need at least {tokens}"

    return why_not


def _prompt_tokens(call: Call) -> int:
    """Fewer than the prompt has: see _BYTES_PER_TOKEN."""
    return call.prompt_bytes // _BYTES_PER_TOKEN


def _context_of(model: Model, endpoint: Endpoint) -> int | None:
    own = endpoint.context_length
    return own if own is not None else model.context_length


def _output_limit(tokens: int) -> _Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        limit = endpoint.max_output
        if limit is None or tokens <= limit:
            return None
        return f"it writes at most {limit} tokens, {tokens} were asked for"

    return why_not


def _require(parameters: frozenset[str]) -> _Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        known = endpoint.abilities.parameters
        if known is None:
            return "it does not say which parameters it supports"
        # A parameter that is renamed on the way is supported under the name it arrives with.
        renamed = {old for old, new in endpoint.adaptation.rename if new in known}
        missing = parameters - known - renamed
        return f"it does not say that it supports {_name(missing)}" if missing else None

    return why_not


def _name(parameters: Iterable[str]) -> str:
    told = sorted(filter(is_parameter_name, parameters))[:_MOST_TOLD]
    return ", ".join(told) or "a parameter that was sent"


# Order


def _arrange(
    offers: list[_Offer],
    sort: str | None,
    wanted: ProviderPreferences,
    health: Health,
    now: float,
    draw: Callable[[], float],
) -> list[Step]:
    """One candidate's steps: sorted, then those of `order` to the front, cooled ones to the end.

    A cooled endpoint is last even if `order` names it: the client's order still holds among those
    that work. But with `allow_fallbacks` false nothing takes the place of a provider in `order`.
    """
    if sort is None and not wanted.order:
        steps = _plain_steps(offers, health, now)
        if steps is not None:
            return steps
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


def _plain_steps(offers: list[_Offer], health: Health, now: float) -> list[Step] | None:
    """The config's order, None where weights or a cooldown change it; what most requests get."""
    steps = []
    for model, endpoint in offers:
        key = endpoint.key
        if endpoint.weight is not None or health.is_cooling(key, now):
            return None
        steps.append(Step(model.slug, endpoint))
    return steps


def _placed(
    offers: list[_Offer], reason: str, wanted: ProviderPreferences, cooled: dict[Key, float]
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


def _drawn(offers: list[_Offer], draw: Callable[[], float]) -> list[_Offer]:
    """A draw without replacement by weight: 1 if not given, and those of 0 only at the end.

    The first of exponential variables, each with its weight as rate, falls to each in proportion
    to its weight; and so for the rest.
    """

    def arrival(offer: _Offer) -> tuple[bool, float]:
        weight = offer[1].weight
        if weight is None:
            weight = 1.0
        return (False, -math.log(1.0 - draw()) / weight) if weight > 0 else (True, 0.0)

    return sorted(offers, key=arrival)


def _sorted(offers: list[_Offer], sort: str, health: Health, now: float) -> list[_Offer]:
    if sort == "price":
        return sorted(offers, key=_price)
    if sort == "balanced":
        return _balanced(offers, health, now)
    return sorted(offers, key=lambda offer: _measured(offer, sort, health, now))


def _price(offer: _Offer) -> tuple[bool, Decimal]:
    prices = offer[1].prices
    if prices is None:
        return True, Decimal(0)  # after all whose price is known
    return False, prices.prompt + prices.completion


def _measured(offer: _Offer, sort: str, health: Health, now: float) -> tuple[int, float]:
    """Best first. What was not measured of late comes before, or it never would be; but while one
    request tries it, it comes after, or all would."""
    key = offer[1].provider, offer[1].upstream_model
    if sort == "throughput":
        value = health.throughput(key, now)
    else:
        value = health.first_content(key, now)
    if value is None:
        return (2 if health.is_tried(key, now) else 0), 0.0
    return 1, -value if sort == "throughput" else value


def _balanced(offers: list[_Offer], health: Health, now: float) -> list[_Offer]:
    """By the sum of the ranks in price and in latency, the cheaper one first among equals.

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


# What the client is told when there is no plan

# By filter: the field at fault, and what to do.
_INABILITIES: Final = frozenset(("no_tools", "no_json_mode", "no_json_schema", "no_vision"))
_ADVICE: Final = {
    "not_only": ("provider.only", "name more providers in provider.only"),
    "ignored": ("provider.ignore", "ignore fewer providers"),
    "price": ("provider.max_price", "raise provider.max_price"),
    "no_tools": ("tools", "choose a model that takes tools"),
    "no_json_mode": ("response_format", "choose a model with JSON mode"),
    "no_json_schema": ("response_format", "choose a model that takes a JSON schema"),
    "no_vision": ("messages", "choose a model that takes images"),
    "context_length": ("messages", "send a shorter prompt or choose a model with a longer context"),
    "max_output": ("max_tokens", "ask for fewer tokens"),
    "parameters": ("provider.require_parameters", "send fewer parameters or don't require them"),
}


def _advice(filter: str) -> tuple[str, str]:
    """The field at fault where `filter` removed an endpoint, and what to do."""
    known = _ADVICE.get(filter)
    return known or (param_of(filter), f"choose a model that takes {filter}, or send another value")


def _nothing_left(call: Call, removed: list[Removal], unknown: list[str]) -> RouteError:
    candidates = call.terms.candidates
    if len(unknown) == len(candidates):
        return RouteError(_unknown_models(candidates), code="model_not_found", param="model")
    if (length := _too_short(candidates, removed)) is not None:
        return _too_long(call, length)
    reasons = [f"{each.provider} of {each.slug[:128]!r} ({each.words})" for each in removed]
    filters = dict.fromkeys(each.filter for each in removed)  # in order, without repeats
    advice = [_advice(name)[1] for name in filters] or ["ask for a model that has an endpoint"]
    params = {_advice(name)[0] for name in filters}
    message = f"no endpoint is left; removed: {_listed(reasons)}; {', or '.join(advice)}"
    if unknown:
        message += f"; not in the catalog: {_listed([repr(slug[:128]) for slug in unknown])}"
    return RouteError(message, code="no_endpoint", param=params.pop() if len(params) == 1 else None)


def _too_short(candidates: tuple[str, ...], removed: list[Removal]) -> int | None:
    """The longest context of all, in tokens, if nothing but length removed endpoints."""
    if all(_is_virtual(candidate) for candidate in candidates):
        # Such a model stands for those alone that can do what is asked for.
        removed = [each for each in removed if each.filter not in _INABILITIES]
    lengths = [each.context_length for each in removed]
    known = [length for length in lengths if length is not None]
    return max(known) if known and len(known) == len(lengths) else None


def _too_long(call: Call, length: int) -> RouteError:
    """The error by whose code and words clients know that they have to compact their messages."""
    prompt, completion = _prompt_tokens(call), call.terms.max_output or 0
    message = (
        f"This model's maximum context length is {length} tokens. However, you requested about"
        f" {prompt + completion} tokens ({prompt} in the messages, {completion} in the completion)."
    )
    return RouteError(message, code="context_length_exceeded", status=400, param="messages")


def _unknown_models(candidates: tuple[str, ...]) -> str:
    # Slugs are what the client itself sent; bounded, since they also reach the log.
    names = _listed([repr(slug[:128]) for slug in candidates])
    return f"no model of this name in the catalog: {names}; GET /v1/models lists what there is"


def _listed(names: list[str]) -> str:
    told = list(dict.fromkeys(names))
    more = f" and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    return (", ".join(told[:_MOST_TOLD]) or "none") + more
