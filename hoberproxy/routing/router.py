"""The router: one pure function from a call to its plan.

routing/filters.py leaves endpoints out, routing/order.py puts the rest in order; each place and
each removal has its reason. No I/O and no clock; random numbers come from `draw` alone. Which step
is tried when is decided in exchange/failover.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Final

from ..errors import RouteError
from ..request.call import NO_PREFERENCES, Call
from ..request.extensions import check_accepted, param_of
from .catalog import ROUTING_SUFFIXES, Abilities, Catalog, Model
from .filters import (
    BYTES_PER_TOKEN,
    MAX_NAMED,
    apply_filters,
    choose_filters,
    prompt_tokens,
    used_extensions,
)
from .health import Health, Key
from .order import arrange
from .plan import Plan, Removal, Step

# Of each of ROUTING_SUFFIXES. Another colon belongs to the slug ("llama3.2:3b").
_SUFFIX_LENGTH: Final = 6
# Virtual models over all others, and how they sort these.
_VIRTUAL: Final = {
    "hober/auto": "balanced",
    "hober/auto:cost": "price",
    "hober/auto:fast": "latency",
}

_NO_OBSERVATIONS: Final = Health()  # only read


def make_plan(
    call: Call,
    catalog: Catalog,
    health: Health | None = None,
    now: float = 0.0,
    draw: Callable[[], float] = random.random,
) -> Plan:
    """Return the plan of `call`: the endpoints of each candidate, filtered and put in order.

    `health` is what is known of endpoints at the time `now`; `draw` returns numbers in [0, 1). An
    unknown slug among several is skipped. Raises RouteError 404: `model_not_found` if none is
    known, `no_endpoint` if the filters left nothing; and 400 `context_length_exceeded` if a shorter
    prompt would have left something; and RequestError for an extension that no endpoint of the
    catalog accepts.
    """
    if health is None:
        health = _NO_OBSERVATIONS
    terms = call.terms
    may_be_kept = len(terms.candidates) == 1 and terms.provider is NO_PREFERENCES and health.is_calm
    if may_be_kept and (kept := _find_kept(call, catalog)) is not None:
        return kept
    plan = _work_out(call, catalog, health, now, draw)
    if may_be_kept:
        _keep(terms.candidates[0], plan, catalog)
    return plan


def _work_out(
    call: Call, catalog: Catalog, health: Health, now: float, draw: Callable[[], float]
) -> Plan:
    """Return the plan of `call` as `make_plan` does, without the plans that are kept."""
    terms = call.terms
    filters = choose_filters(call)
    steps: list[Step] = []
    removed: list[Removal] = []
    unknown: list[str] = []
    taken: set[Key] = set()
    for candidate in terms.candidates:
        models, sort = _look_up(candidate, catalog)
        if models is None:
            unknown.append(candidate)
            continue
        offers = apply_filters(models, filters, taken, removed)
        sort = terms.provider.sort or sort
        steps += arrange(offers, sort, terms.provider, health, now, draw)
    if not steps:
        removing = {each.filter for each in removed}
        check_accepted(used_extensions(call), call.place_without_content, catalog.accepts, removing)
        raise _nothing_left(call, removed, unknown)
    if not terms.provider.allow_fallbacks:
        words = "provider.allow_fallbacks is false"
        removed += [
            Removal(step.slug, *step.endpoint.key, "fallbacks_off", words) for step in steps[1:]
        ]
        del steps[1:]
    return Plan(tuple(steps), tuple(removed), tuple(unknown))


class _KeptPlan:  # no tuple: see docs/mypyc.md
    """The plan of a model, kept for all calls that every one of its endpoints can serve.

    Lengths are in tokens; `abilities` are those that no endpoint denies.
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
        """Return whether no filter would take an endpoint out for `call`."""
        terms = call.terms
        output = terms.max_output or 0
        return (
            len(call.body) // BYTES_PER_TOKEN + output <= self.context_length
            and output <= self.max_output
            and (not terms.needs_tools or "tools" in self.abilities)
            and (terms.json_format is None or "json" in self.abilities)
            and (not call.needs_images or "vision" in self.abilities)
            and not terms.extensions
            and call.place_without_content is None
        )


def _find_kept(call: Call, catalog: Catalog) -> Plan | None:
    kept: _KeptPlan | None = catalog.kept_plans.get(call.terms.candidates[0])
    return kept.plan if kept is not None and kept.serves(call) else None


def _keep(slug: str, plan: Plan, catalog: Catalog) -> None:
    """Keep `plan` for later calls if it depends on nothing but the config."""
    model = catalog.find(slug)
    if model is None or plan.removed or any(step.reason != "config" for step in plan.steps):
        return
    if len(catalog.kept_plans) >= catalog.CACHE_SIZE:
        catalog.kept_plans.clear()
    catalog.kept_plans[slug] = _KeptPlan(
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
    """Return the models that `candidate` stands for, None if unknown, and how to sort them."""
    slug, sort = _without_suffix(candidate)
    if slug in _VIRTUAL:
        return catalog.models(), sort or _VIRTUAL[slug]
    model = catalog.find(slug)
    return None if model is None else (model,), sort


def _without_suffix(candidate: str) -> tuple[str, str | None]:
    """Return the slug of `candidate`, and how its suffix sorts."""
    sort = ROUTING_SUFFIXES.get(candidate[-_SUFFIX_LENGTH:])
    return (candidate if sort is None else candidate[:-_SUFFIX_LENGTH]), sort


def _is_virtual(candidate: str) -> bool:
    return _without_suffix(candidate)[0] in _VIRTUAL


# Errors where there is no plan

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
    """Return the field at fault where `filter` removed an endpoint, and what to do."""
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
    """Return the longest context of all in tokens, if nothing but length removed endpoints."""
    if all(_is_virtual(candidate) for candidate in candidates):
        # A virtual model stands only for models that can do what the call wants.
        removed = [each for each in removed if each.filter not in _INABILITIES]
    lengths = [each.context_length for each in removed]
    known = [length for length in lengths if length is not None]
    return max(known) if known and len(known) == len(lengths) else None


def _too_long(call: Call, length: int) -> RouteError:
    """Return the error by whose code and words clients know to compact their messages."""
    prompt, completion = prompt_tokens(call), call.terms.max_output or 0
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
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - MAX_NAMED} more" if len(unique) > MAX_NAMED else ""
    return (", ".join(unique[:MAX_NAMED]) or "none") + more
