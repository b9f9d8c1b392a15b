"""What an endpoint asks for its work, and what one request cost by it. Exact: no floats."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Final

from .usage import Usage

# A price has up to 12 decimals per million tokens: in attodollars (1e-18 USD) a token's is whole.
_PER_TOKEN: Final = 10**12
_PER_REQUEST: Final = 10**18
_ATTO_IN_PICO: Final = 10**6


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
        """Nothing costs anything."""
        return not any(self._rates)

    def cost(self, usage: Usage) -> int:
        """Picodollars for one request, rounded half up."""
        prompt, cached, written, completion, reasoning, request = self._rates
        # Upstreams that count the parts apart from the whole must not make it negative.
        cached_tokens = min(usage.cached_tokens, usage.prompt_tokens)
        written_tokens = min(usage.cache_write_tokens, usage.prompt_tokens - cached_tokens)
        reasoning_tokens = min(usage.reasoning_tokens, usage.completion_tokens)
        atto = (
            (usage.prompt_tokens - cached_tokens - written_tokens) * prompt
            + cached_tokens * cached
            + written_tokens * written
            + (usage.completion_tokens - reasoning_tokens) * completion
            + reasoning_tokens * reasoning
            + request
        )
        return (atto + _ATTO_IN_PICO // 2) // _ATTO_IN_PICO

    def most(self, prompt_tokens: int, answer_tokens: int) -> tuple[int, int]:
        """Picodollars for a prompt, and for an answer, that one request costs at most."""
        prompt, answer, request = self._most_rates
        atto = prompt_tokens * prompt + request
        before = (atto + _ATTO_IN_PICO // 2) // _ATTO_IN_PICO
        atto += answer_tokens * answer
        # Rounded as a whole, like the cost: rounded each for itself, the parts could be less.
        return before, (atto + _ATTO_IN_PICO // 2) // _ATTO_IN_PICO - before


_ALWAYS: Final = frozenset(("prompt", "completion"))


def parse_prices(text: str) -> Prices:
    """What a record's `price` says. Raises ValueError, or an ArithmeticError, for other texts."""
    pairs = dict(part.split("=", 1) for part in text.split())
    return Prices(**{name: Decimal(value) for name, value in pairs.items()})
