"""Token usage as model servers report it; where they do not, estimates.py guesses.

One reader for every dialect seen on the wire. Where the numbers stand in a stream is the
scanner's business (stream.py), where they go is the ledger's.
"""

from __future__ import annotations

from typing import Any, Final

# English prose has about 4 bytes a token with today's vocabularies; code and CJK have fewer.
BYTES_PER_TOKEN: Final = 4
# No request has as many; the store's integers end at 2**63, and must hold sums as well.
MAX_TOKENS: Final = 1 << 40


class Usage:  # made for every request: no dataclass, whose making is not compiled
    """Token counts of one request.

    `cached` and `cache_write` are parts of `prompt`, `reasoning` is one of `completion`.
    """

    __slots__ = (
        "cache_write_tokens",
        "cached_tokens",
        "completion_tokens",
        "is_estimated",
        "prompt_tokens",
        "reasoning_tokens",
    )

    def __init__(
        self,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        cached_tokens: int = 0,
        reasoning_tokens: int = 0,
        cache_write_tokens: int = 0,
        is_estimated: bool = False,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.cached_tokens = cached_tokens
        self.reasoning_tokens = reasoning_tokens
        self.cache_write_tokens = cache_write_tokens
        self.is_estimated = is_estimated

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Usage) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"Usage{self._values()}"

    def _values(self) -> tuple[int, int, int, int, int, bool]:
        return (
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
            self.cache_write_tokens,
            self.is_estimated,
        )


def read_usage(document: dict[str, Any]) -> Usage | None:
    """The usage of a completion or of one event of a stream; None where there is none.

    Groq nests it in `x_groq` on the last event; everyone else has it on top.
    """
    usage = document.get("usage")
    if not isinstance(usage, dict):
        nested = document.get("x_groq")
        usage = nested.get("usage") if isinstance(nested, dict) else None
    return parse_usage(usage) if isinstance(usage, dict) else None


def parse_usage(usage: dict[str, Any]) -> Usage | None:
    """Counts from a `usage` object; None if it has neither prompt nor completion tokens."""
    get = usage.get
    prompt, completion = _count(get("prompt_tokens")), _count(get("completion_tokens"))
    if prompt is None and completion is None:
        return None
    # `prompt_cache_hit_tokens` is DeepSeek's older name for the same number.
    cached = written = reasoning = None
    if isinstance(details := get("prompt_tokens_details"), dict):
        cached = _count(details.get("cached_tokens"))
        written = _count(details.get("cache_write_tokens"))
    if isinstance(details := get("completion_tokens_details"), dict):
        reasoning = _count(details.get("reasoning_tokens"))
    cached = cached or _count(get("prompt_cache_hit_tokens"))
    return Usage(prompt or 0, completion or 0, cached or 0, reasoning or 0, written or 0)


def _count(value: object) -> int | None:
    """A number that can be a count, else None: upstreams send nulls and floats."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None
