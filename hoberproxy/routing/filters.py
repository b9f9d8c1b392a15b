"""Filters: they leave out of a plan the endpoints that cannot serve a call, or not for its caller.

Each is made for one call, and only if it can remove anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from ..errors import AccessError
from ..protocol.text import is_parameter_name
from ..request.call import Call, ProviderPreferences
from ..request.extensions import NO_CONTENT
from .catalog import Endpoint, Model
from .health import Key
from .plan import Offer, Plan, Removal

# Prose has 4 to 5 bytes per token, code and other scripts fewer; none is known to have 6. So only
# what is clearly too long is held back: the upstream counts better than we do.
BYTES_PER_TOKEN: Final = 6
# What every endpoint takes, or what is ours and never sent on.
_COMMON_PARAMETERS: Final = frozenset(
    ("model", "models", "provider", "messages", "stream", "stream_options", "usage")
)
MAX_NAMED: Final = 8  # endpoints, slugs or parameters in a message, which also reaches the log

Filter = Callable[[Model, Endpoint], str | None]
"""Returns in words why an endpoint is removed, or None."""


def choose_filters(call: Call) -> list[tuple[str, Filter]]:
    terms = call.terms
    wanted = terms.provider
    filters: list[tuple[str, Filter]] = []
    if wanted.only:
        filters.append(("not_only", _only(frozenset(wanted.only))))
    if wanted.ignore:
        filters.append(("ignored", _ignore(frozenset(wanted.ignore))))
    if wanted.max_price_prompt is not None or wanted.max_price_completion is not None:
        filters.append(("price", _price_limit(wanted)))
    filters += [(extension, _without_extension(extension)) for extension in used_extensions(call)]
    if terms.needs_tools:
        filters.append(("no_tools", _without("tools", "it takes no tools")))
    if terms.json_format == "json_schema":
        filters.append(("no_json_schema", _without("json_schema", "it takes no JSON schema")))
    elif terms.json_format is not None:
        filters.append(("no_json_mode", _without("json_mode", "it has no JSON mode")))
    if call.needs_images:
        filters.append(("no_vision", _without("vision", "it takes no images")))
    else:  # the bytes of an image are no tokens
        filters.append(("context_length", _context_limit(call)))
    if terms.max_output is not None:
        filters.append(("max_output", _output_limit(terms.max_output)))
    if wanted.require_parameters:
        filters.append(("parameters", _require(terms.given - _COMMON_PARAMETERS)))
    return filters


def apply_filters(
    models: Iterable[Model],
    filters: list[tuple[str, Filter]],
    taken: set[Key],
    removed: list[Removal],
) -> list[Offer]:
    """Return the offers of `models` that pass all `filters`, each endpoint once.

    The keys of these are added to `taken`, the others to `removed`.
    """
    offers = []
    for model in models:
        for endpoint in model.endpoints:
            key = endpoint.key
            for name, why_not in filters:
                if (words := why_not(model, endpoint)) is not None:
                    length = context_of(model, endpoint) if name == "context_length" else None
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


def _only(providers: frozenset[str]) -> Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        return None if endpoint.provider in providers else "provider.only does not name it"

    return why_not


def _ignore(providers: frozenset[str]) -> Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        return "provider.ignore names it" if endpoint.provider in providers else None

    return why_not


def _price_limit(wanted: ProviderPreferences) -> Filter:
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


def used_extensions(call: Call) -> list[str]:
    """Return the extensions that `call` uses."""
    found = sorted(call.terms.extensions)
    return found if call.place_without_content is None else [*found, NO_CONTENT]


def _without_extension(extension: str) -> Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        accepted = endpoint.abilities.accepts or ()
        return None if extension in accepted else f"it does not accept {extension}"

    return why_not


def _without(ability: str, words: str) -> Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        return words if getattr(endpoint.abilities, ability) is False else None

    return why_not


def _context_limit(call: Call) -> Filter:
    tokens = prompt_tokens(call) + (call.terms.max_output or 0)

    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        length = context_of(model, endpoint)
        if length is None or tokens <= length:
            return None
        return f"its context is {length} tokens, prompt and output need at least {tokens}"

    return why_not


def prompt_tokens(call: Call) -> int:
    """Return a number of tokens that the prompt has at least: see BYTES_PER_TOKEN."""
    return call.prompt_bytes // BYTES_PER_TOKEN


def context_of(model: Model, endpoint: Endpoint) -> int | None:
    own = endpoint.context_length
    return own if own is not None else model.context_length


def _output_limit(tokens: int) -> Filter:
    def why_not(model: Model, endpoint: Endpoint) -> str | None:
        limit = endpoint.max_output
        if limit is None or tokens <= limit:
            return None
        return f"it writes at most {limit} tokens, {tokens} were asked for"

    return why_not


def _require(parameters: frozenset[str]) -> Filter:
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
    names = sorted(filter(is_parameter_name, parameters))[:MAX_NAMED]
    return ", ".join(names) or "a parameter that was sent"


# By caller


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
