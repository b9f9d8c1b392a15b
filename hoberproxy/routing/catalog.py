"""The catalog: providers, models and endpoints as values, and the look-up by slug.

The values come from the config file or from presets. The rules for the texts in them (a URL, a key)
are in config/values.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any, ClassVar, Final

# `created` of an entry that names none (the contract's example, February 2024): a fixed value keeps
# GET /v1/models the same across restarts and workers.
DEFAULT_CREATED: Final = 1709000000
MAX_SLUG_LENGTH: Final = 256
# How what clients ask for is sorted, by the end of its slug; no model's slug ends in one.
ROUTING_SUFFIXES: Final = {":nitro": "latency", ":floor": "price"}
DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# A price has up to 12 decimals per million tokens: in attodollars (1e-18 USD) a token's is whole.
_PER_TOKEN: Final = 10**12
_PER_REQUEST: Final = 10**18
_ATTO_IN_PICO: Final = 10**6
_VISIBLE: Final = re.compile(r"[!-~]+")  # ASCII without spaces and controls
_ALWAYS: Final = frozenset(("prompt", "completion"))  # prices that are written even if they are 0


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """The limits of one attempt on an endpoint, in seconds."""

    # DNS, TCP and TLS. A server that is up answers in well under a second; five leave room for two
    # lost SYNs (sent again after 1 s and 3 s) before the next endpoint gets its chance.
    connect: float = 5.0
    # Of a stream, from the request to its first content. Reasoning models think for minutes in
    # silence; whoever has a faster model to fall over to sets this lower.
    first_content: float = 300.0
    # Between bytes after that, and of a body. Tokens come every few milliseconds, tool calls and
    # hidden reasoning pause for a minute; beyond two the peer is gone without a FIN.
    idle: float = 120.0
    # The whole attempt. 100,000 tokens at 60 a second take 28 minutes.
    total: float = 1800.0

    @property
    def shortest(self) -> float:
        """Return the shortest of the limits that count from when a request was sent."""
        return min(self.first_content, self.idle, self.total)


@dataclass(frozen=True, slots=True)
class Abilities:
    """The abilities of an endpoint, as the config says; None where it does not say."""

    tools: bool | None = None
    json_mode: bool | None = None  # response_format json_object
    json_schema: bool | None = None
    vision: bool | None = None  # image_url parts
    parameters: frozenset[str] | None = None  # members of a request that it supports
    accepts: frozenset[str] | None = None  # request/extensions.py

    def over(self, default: Abilities) -> Abilities:
        """Return these abilities, and those of `default` where these say nothing."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(
            default, **{name: value for name, value in said.items() if value is not None}
        )


@dataclass(frozen=True, slots=True)
class Adaptation:
    """The changes of a request's body for an endpoint, in this order.

    No member is in two rules. One renamed to itself, and a role that becomes itself, says that a
    default's rule does not hold; `over` leaves them out, and returns NO_ADAPTATION where nothing is
    left, so that the path of a request can compare by identity.
    """

    rename: tuple[tuple[str, str], ...] = ()  # member to member
    drop: frozenset[str] = frozenset()
    set: tuple[tuple[str, bytes], ...] = ()  # member to JSON text
    roles: tuple[tuple[str, str], ...] = ()  # role of a message to role

    @property
    def names(self) -> frozenset[str]:
        """Return the names of all members that the rules are about."""
        renamed = frozenset(name for pair in self.rename for name in pair)
        return renamed.union(self.drop, dict(self.set))

    def over(self, default: Adaptation) -> Adaptation:
        """Return these rules, and those of `default` that are about other members and roles."""
        names, roles = self.names, dict(self.roles)
        kept = [pair for pair in default.rename if names.isdisjoint(pair)]
        merged = Adaptation(
            rename=_without_same((*kept, *self.rename)),
            drop=self.drop | (default.drop - names),
            set=(*((name, value) for name, value in default.set if name not in names), *self.set),
            roles=_without_same(tuple({**dict(default.roles), **roles}.items())),
        )
        return merged if merged != NO_ADAPTATION else NO_ADAPTATION


# Of an endpoint for which the config has none.
NO_ABILITIES: Final = Abilities()
NO_ADAPTATION: Final = Adaptation()


def _without_same(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in pairs if pair[0] != pair[1])


@dataclass(frozen=True, slots=True)
class Provider:
    """A model server: its address, its key, and what is passed on to it and from it."""

    name: str
    scheme: str  # "http" or "https"
    host: str  # lower case, IPv6 without brackets
    port: int
    path: str  # of base_url, without a trailing slash; may be ""
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # may hold a key as well
    limits: TimeLimits = TimeLimits()
    stream_options: bool = True  # understands `stream_options.include_usage`
    ca_file: str | None = None
    forward_headers: tuple[str, ...] = ()  # lower case, of the client's request
    response_headers: tuple[str, ...] = ()  # lower case, of this upstream's response
    # Seconds an idle connection is kept: servers and balancers drop theirs after 60 or more, and
    # one that closes earlier is seen to close.
    keepalive: float = 60.0
    max_idle_connections: int = 1024
    # Defaults of its endpoints, which hold their own already merged with these.
    abilities: Abilities = NO_ABILITIES
    adaptation: Adaptation = NO_ADAPTATION

    @property
    def chat_path(self) -> str:
        return self.path + "/chat/completions"

    @property
    def authority(self) -> str:
        """Return the Host header (RFC 9110 section 7.2), without the scheme's default port."""
        host = bracketed(self.host)
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Prices:
    """USD per million tokens, and per request; at most 12 decimals.

    Where they are None, `cached` and `cache_write` input cost as `prompt` does, and `reasoning` as
    `completion`.
    """

    prompt: Decimal = Decimal(0)
    completion: Decimal = Decimal(0)
    cached: Decimal | None = None
    reasoning: Decimal | None = None
    request: Decimal = Decimal(0)
    cache_write: Decimal | None = None
    text: str = field(init=False, repr=False, compare=False)  # of records: `prompt=0.14 …`
    _rates: tuple[int, int, int, int, int, int] = field(init=False, repr=False, compare=False)
    _most_rates: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cached = self.prompt if self.cached is None else self.cached
        written = self.prompt if self.cache_write is None else self.cache_write
        reasoning = self.completion if self.reasoning is None else self.reasoning
        per_token = (self.prompt, cached, written, self.completion, reasoning)
        rates = (
            *(int(price * _PER_TOKEN) for price in per_token),
            int(self.request * _PER_REQUEST),
        )
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        given = {name: price for name, price in named.items() if price or name in _ALWAYS}
        text = " ".join(f"{name}={price:f}" for name, price in given.items() if price is not None)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "_rates", rates)
        most = (max(rates[:3]), max(rates[3:5]), rates[5])
        object.__setattr__(self, "_most_rates", most)

    @property
    def is_free(self) -> bool:
        """Return whether no part of a request costs anything."""
        return not any(self._rates)

    def cost(
        self,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        reasoning_tokens: int = 0,
        cache_write_tokens: int = 0,
    ) -> int:
        """Return the picodollars of one request, rounded half up.

        `cached_tokens` and `cache_write_tokens` are parts of `prompt_tokens`, `reasoning_tokens`
        are a part of `completion_tokens`.
        """
        prompt, cached, written, completion, reasoning, request = self._rates
        # Upstreams that count the parts apart from the whole must not make it negative.
        cached_tokens = min(cached_tokens, prompt_tokens)
        cache_write_tokens = min(cache_write_tokens, prompt_tokens - cached_tokens)
        reasoning_tokens = min(reasoning_tokens, completion_tokens)
        atto = (
            (prompt_tokens - cached_tokens - cache_write_tokens) * prompt
            + cached_tokens * cached
            + cache_write_tokens * written
            + (completion_tokens - reasoning_tokens) * completion
            + reasoning_tokens * reasoning
            + request
        )
        return (atto + _ATTO_IN_PICO // 2) // _ATTO_IN_PICO

    def most(self, prompt_tokens: int, answer_tokens: int) -> tuple[int, int]:
        """Return the most picodollars that a prompt costs, and that an answer adds to them."""
        prompt, answer, request = self._most_rates
        atto = prompt_tokens * prompt + request
        before = (atto + _ATTO_IN_PICO // 2) // _ATTO_IN_PICO
        atto += answer_tokens * answer
        # Rounded as a whole, like the cost: rounded each for itself, the parts could be less.
        return before, (atto + _ATTO_IN_PICO // 2) // _ATTO_IN_PICO - before


def parse_prices(text: str) -> Prices:
    """Return the prices whose `text` this is. Raises ValueError or ArithmeticError for others."""
    pairs = dict(part.split("=", 1) for part in text.split())
    return Prices(**{name: Decimal(value) for name, value in pairs.items()})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model at a provider, under the name it has there. None is "not known"."""

    provider: str
    upstream_model: str
    context_length: int | None = None  # tokens
    max_output: int | None = None  # tokens
    prices: Prices | None = None
    limits: TimeLimits | None = None  # instead of the provider's
    weight: float | None = None  # its share of the requests, against those beside it
    abilities: Abilities = NO_ABILITIES
    adaptation: Adaptation = NO_ADAPTATION
    usage: str = "report"  # "count": what it does not report is counted by a tokenizer
    # Its identity, for health too: its place may change with the config.
    key: tuple[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (self.provider, self.upstream_model))


@dataclass(frozen=True, slots=True)
class Model:
    """A catalog entry.

    Under a slug that ends in "/*", the "*" in an endpoint's upstream_model stands for the rest of
    the slug a client asks for.
    """

    slug: str
    endpoints: tuple[Endpoint, ...]
    owned_by: str = "hoberproxy"
    created: int = DEFAULT_CREATED  # unix seconds
    context_length: int | None = None  # tokens

    @property
    def is_wildcard(self) -> bool:
        return self.slug.endswith("/*")


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_visible(text: str) -> bool:
    """Return whether `text` is not empty and all visible ASCII: safe in a header and a log."""
    return _VISIBLE.fullmatch(text) is not None


# The look-up

_NONE_LISTED: Final[Mapping[str, Sequence[str]]] = {}


class Catalog:
    """The models by slug, in the config's order."""

    # Clients choose what comes after a wildcard's prefix: without a bound they could fill memory.
    CACHE_SIZE: ClassVar[int] = 1024

    def __init__(self, models: Iterable[Model]) -> None:
        self._all = {model.slug: model for model in models}
        self._models = {slug: model for slug, model in self._all.items() if not model.is_wildcard}
        self._wildcards = {
            slug.removesuffix("*"): model for slug, model in self._all.items() if model.is_wildcard
        }
        self._filled: dict[str, Model] = {}
        self.kept_plans: dict[str, Any] = {}  # those that routing/router.py keeps, by slug

    def find(self, slug: str) -> Model | None:
        """Return the entry of `slug`, else the longest wildcard's, filled in with the rest of it.

        A wildcard's own pattern is no model: it is listed, not served.
        """
        return self._models.get(slug) or self._filled.get(slug) or self._fill(slug)

    def models(self) -> Iterable[Model]:
        """Return the models under a slug of their own, in the config's order; no wildcards."""
        return self._models.values()

    def accepts(self, extension: str) -> bool:
        """Return whether any endpoint accepts `extension`, those of wildcards included."""
        return any(
            extension in (endpoint.abilities.accepts or ())
            for model in self._all.values()
            for endpoint in model.endpoints
        )

    def listing(self, listed: Mapping[str, Sequence[str]] = _NONE_LISTED) -> list[dict[str, Any]]:
        """Return the entries of GET /v1/models, in the config's order.

        In the place of a wildcard stand the models that its providers have, as far as `listed`
        (provider to names) knows them, each under the slug by which it can be asked for.
        """
        entries = {slug: _describe(model) for slug, model in self._models.items()}
        ordered = []
        for model in self._all.values():
            if not model.is_wildcard:
                ordered.append(entries[model.slug])
                continue
            common = _describe(model)
            for slug in self._listed_slugs(model, listed):
                if slug not in entries:
                    entries[slug] = {**common, "id": slug}
                    ordered.append(entries[slug])
        return ordered

    def _listed_slugs(self, model: Model, listed: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """Yield the slugs of the models of a wildcard's providers that no other entry serves."""
        prefix = model.slug.removesuffix("*")
        for endpoint in model.endpoints:
            before, _, after = endpoint.upstream_model.partition("*")
            for name in listed.get(endpoint.provider, ()):
                rest = name.removeprefix(before).removesuffix(after)
                slug = prefix + rest
                is_whole = rest and len(name) == len(before) + len(rest) + len(after)
                if not is_whole or slug.endswith(tuple(ROUTING_SUFFIXES)):
                    continue
                found = self._wildcard_of(slug)
                if found is not None and found[0] is model and found[1] == rest:
                    yield slug

    def describe(self, slug: str) -> dict[str, Any] | None:
        """Return the listing's entry of one model, also of any that a wildcard serves."""
        model = self.find(slug)
        return None if model is None else _describe(model)

    def label(self, slug: str) -> str:
        """Return the entry that `slug` belongs to, for metrics: their number is bounded."""
        if slug in self._all:
            return slug
        cut = slug.rfind("/") + 1
        while cut > 0:
            if slug[:cut] in self._wildcards:
                return slug[:cut] + "*"
            cut = slug.rfind("/", 0, cut - 1) + 1
        return "other"

    def _fill(self, slug: str) -> Model | None:
        found = self._wildcard_of(slug)
        return None if found is None else self._keep(slug, _filled_in(found[0], slug, found[1]))

    def _wildcard_of(self, slug: str) -> tuple[Model, str] | None:
        """Return the longest wildcard that serves `slug`, and the rest that its "*" stands for."""
        # The slug goes into a response header and upstream: what no model can be called stops here.
        if len(slug) > MAX_SLUG_LENGTH or "*" in slug or not is_visible(slug):
            return None
        cut = slug.rfind("/", 0, -1) + 1  # what follows the last slash that has a rest
        while cut > 0:
            wildcard = self._wildcards.get(slug[:cut])
            if wildcard is not None:
                return wildcard, slug[cut:]
            cut = slug.rfind("/", 0, cut - 1) + 1
        return None

    def _keep(self, slug: str, model: Model) -> Model:
        if len(self._filled) >= self.CACHE_SIZE:
            del self._filled[next(iter(self._filled))]  # the oldest
        self._filled[slug] = model
        return model


def _filled_in(wildcard: Model, slug: str, rest: str) -> Model:
    endpoints = tuple(
        replace(endpoint, upstream_model=endpoint.upstream_model.replace("*", rest))
        for endpoint in wildcard.endpoints
    )
    return replace(wildcard, slug=slug, endpoints=endpoints)


def _describe(model: Model) -> dict[str, Any]:
    prices = _cheapest(model)
    lengths = [endpoint.context_length for endpoint in model.endpoints]
    known = [length for length in (model.context_length, *lengths) if length is not None]
    return {
        "id": model.slug,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        "context_length": max(known, default=None),
        # An unknown price is no promise: clients that add up read "0", `free` stays false.
        "free": prices is not None and prices.is_free,
        "pricing": {
            "prompt": _per_token(prices.prompt if prices else Decimal(0)),
            "completion": _per_token(prices.completion if prices else Decimal(0)),
        },
    }


def _cheapest(model: Model) -> Prices | None:
    """Return the prices with the lowest sum among those that are known."""
    known = [endpoint.prices for endpoint in model.endpoints if endpoint.prices is not None]
    return min(known, key=lambda prices: prices.prompt + prices.completion, default=None)


def _per_token(price: Decimal) -> str:
    """Return USD per token in plain notation; exact, since no arithmetic context rounds it."""
    sign, digits, exponent = price.as_tuple()
    assert isinstance(exponent, int), "prices are finite: the config refuses others"
    text = format(Decimal((sign, digits, exponent - 6)), "f")
    return (text.rstrip("0").rstrip(".") or "0") if "." in text else text
