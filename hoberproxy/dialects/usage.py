"""Reads token usage as model servers report it; without a report accounting/estimates.py helps.

One reader serves every dialect seen on the wire; `tests/support/usage_forms.py` holds an example of
each, with its source. Which events of a stream have usage is for relay/scanner.py to find, where
the numbers go for accounting/accounts.py.

Servers agree on prompt and completion, but not on what these hold. With OpenAI the cached part is
inside the prompt, and reasoning inside the completion. Others count a part beside its whole: then
`total_tokens`, which holds everything, says so (`_Reading.settle`).
"""

from __future__ import annotations

from typing import Any, Final

# English prose has about 4 bytes a token with today's vocabularies; code and CJK have fewer.
BYTES_PER_TOKEN: Final = 4
# No request has as many; the store's integers end at 2**63, and must hold sums as well.
MAX_TOKENS: Final = 1 << 40
# What a total holds beyond prompt and completion is taken for output that was not listed (Gemini's
# thoughts) up to here, the longest output of any model; above, the total is nonsense.
MAX_UNLISTED: Final = 1 << 20
MAX_COUNTED_CHOICES: Final = 128  # whose usage is added up; OpenAI's `n` ends there too


class Usage:  # made for each request: no dataclass, see docs/mypyc.md
    """Token counts of one request; false where nothing was counted.

    `cached` and `cache_write` are parts of `prompt`, `reasoning` is one of `completion`.
    """

    __slots__ = (
        "cache_write_tokens",
        "cached_tokens",
        "choices",
        "completion_tokens",
        "is_beside_text",
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
        self.is_beside_text = False  # a message with a text stood in the same body
        self.choices: dict[int, Usage] | None = None  # its parts by their index, if it is a sum

    def __bool__(self) -> bool:
        return self.prompt_tokens > 0 or self.completion_tokens > 0

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

    def has_gaps(self, events: int) -> bool:
        """Return whether a count of zero is wrong, for an answer of so many content `events`.

        No prompt has no tokens (Ollama said 0 of a cached one), and no text has none.
        """
        has_text = events > 0 or self.is_beside_text
        if self.completion_tokens:
            return not self.prompt_tokens
        return has_text


def read_usage(document: dict[str, Any]) -> Usage | None:
    """Return the usage of a completion or of one event of a stream; None without one.

    Nearly all servers have it on top; Groq nests it in `x_groq`, Moonshot in each choice.
    """
    usage = document.get("usage")
    found = parse_usage(usage) if isinstance(usage, dict) else None
    if found is not None and found.completion_tokens:
        return found
    other = _read_elsewhere(document)
    if other is not None and (other or found is None):
        found = other
    if found is not None and not found.completion_tokens:
        found.is_beside_text = _has_text(document)
    return found


def newest_usage(known: Usage | None, document: dict[str, Any]) -> Usage | None:
    """Return the usage of a stream with one event more; `known` is that of the events before it.

    The last one counts; but zeros, which some servers send before the first text or after the
    last, do not take the place of numbers, nor do the same numbers without their parts.
    """
    usage = read_usage(document)
    if usage is None:
        return known
    if known is None:
        return usage
    if not usage.completion_tokens and (known.completion_tokens or not usage):
        return known
    if known.choices is not None and usage.choices is not None:
        return _add_up(known.choices | usage.choices)  # each comes with its choice's last event
    return known if _says_less(usage, known) else usage


def _says_less(usage: Usage, known: Usage) -> bool:
    """Return whether `usage` has the counts of `known` without their parts."""
    return (
        usage.prompt_tokens == known.prompt_tokens
        and usage.completion_tokens == known.completion_tokens
        and not (usage.cached_tokens or usage.reasoning_tokens or usage.cache_write_tokens)
    )


def parse_usage(usage: dict[str, Any]) -> Usage | None:
    """Return the counts of a `usage` object; None without prompt and completion tokens."""
    prompt = _count(usage.get("prompt_tokens"))
    completion = _count(usage.get("completion_tokens"))
    total = _count(usage.get("total_tokens"))
    if prompt is not None and completion is not None and total == prompt + completion:
        usual = _parse_usual(usage, prompt, completion)
        if usual is not None:
            return usual
    reading = _Reading(prompt, completion, total or 0)
    reading.read(usage)
    return reading.settle()


def _parse_usual(usage: dict[str, Any], prompt: int, completion: int) -> Usage | None:
    """Return the counts of a `usage` object in OpenAI's own form; None for any other.

    Nearly every request has this form: it costs a third of what the others do.
    """
    cached = written = reasoning = 0
    members = 3
    if (details := usage.get("prompt_tokens_details")) is not None:
        members += 1
        if isinstance(details, dict):
            cached = _count(details.get("cached_tokens")) or 0
            if len(details) > 1 + ("audio_tokens" in details):
                cached = _read_cached(details)
                written = _read_written(details)
    if (details := usage.get("completion_tokens_details")) is not None:
        members += 1
        if isinstance(details, dict):
            reasoning = _count(details.get("reasoning_tokens")) or 0
    if len(usage) != members or cached + written > prompt or reasoning > completion:
        return None
    return Usage(prompt, completion, cached, reasoning, written)


class _Reading:
    """The counts of a usage object under any name, before parts are added to their wholes."""

    __slots__ = (
        "cached",
        "completion",
        "has_anthropic_cache",
        "has_anthropic_prompt",
        "has_flat_reasoning",
        "prompt",
        "reasoning",
        "total",
        "written",
    )

    def __init__(self, prompt: int | None, completion: int | None, total: int) -> None:
        self.prompt = prompt
        self.completion = completion
        self.total = total
        self.cached = 0
        self.written = 0
        self.reasoning = 0
        # Anthropic's names: its input tokens are those that neither came from a cache nor went
        # into one, where OpenAI's hold all three.
        self.has_anthropic_cache = False
        self.has_anthropic_prompt = False
        self.has_flat_reasoning = False

    def read(self, usage: dict[str, Any]) -> None:
        """Take every count of `usage`, of several names for one the first that is not zero."""
        if not self.prompt and (count := _count(usage.get("input_tokens"))) is not None:
            self.prompt = count
            self.has_anthropic_prompt = True
        if not self.completion and (count := _count(usage.get("output_tokens"))) is not None:
            self.completion = count
        self._read_cache(usage)
        self._read_reasoning(usage)

    def _read_cache(self, usage: dict[str, Any]) -> None:
        for name in _PROMPT_DETAILS:
            details = usage.get(name)
            if isinstance(details, dict):
                self.cached = self.cached or _read_cached(details)
                self.written = self.written or _read_written(details)
        self.cached = self.cached or _first(usage, _FLAT_CACHED)
        if not self.cached and (count := _count(usage.get("cache_read_input_tokens"))):
            self.cached = count
            self.has_anthropic_cache = True
        if not self.written and (count := _read_written(usage)):
            self.written = count
            self.has_anthropic_cache = True

    def _read_reasoning(self, usage: dict[str, Any]) -> None:
        for name in _COMPLETION_DETAILS:
            details = usage.get(name)
            if isinstance(details, dict):
                self.reasoning = self.reasoning or _count(details.get("reasoning_tokens")) or 0
        if not self.reasoning and (count := _count(usage.get("reasoning_tokens"))):
            self.reasoning = count
            self.has_flat_reasoning = True

    def settle(self) -> Usage | None:
        """Return the counts with every part in its whole; None without prompt and completion.

        - A total beyond prompt and completion holds parts that these do not. If the rest equals the
          reasoning, the cache's part, or both, it is those; else it is a prompt that is missing, or
          output that was not listed.
        - A total that is their sum says that the parts are inside. None, or one that is less than
          the sum, says nothing.
        - A part that is more than its whole was counted beside it, unless the total says no.
        """
        if self.prompt is None and self.completion is None:
            return None
        prompt, completion = self.prompt or 0, self.completion or 0
        aside, reasoning = self.cached + self.written, self.reasoning
        rest = self.total - prompt - completion
        if rest > 0:
            if rest == reasoning:
                completion += rest
            elif rest == aside:
                prompt += rest
            elif rest == aside + reasoning:
                prompt += aside
                completion += reasoning
            elif not prompt and rest > reasoning:
                prompt = rest
            elif rest <= MAX_UNLISTED:
                completion += rest
        else:
            is_sum = rest == 0 and self.total > 0
            if self.has_anthropic_cache and (
                aside > prompt or (self.has_anthropic_prompt and not is_sum)
            ):
                prompt += aside
            # Perplexity's deep research lists more reasoning than its total holds, and bills it.
            if reasoning > completion and (self.has_flat_reasoning or not is_sum):
                completion += reasoning
        return _clamped(prompt, completion, self.cached, self.written, reasoning)


_PROMPT_DETAILS: Final = (
    "prompt_tokens_details",
    "input_tokens_details",  # the Responses API's name
    "prompt_token_details",  # Mistral has it both ways
)
_COMPLETION_DETAILS: Final = ("completion_tokens_details", "output_tokens_details")
_FLAT_CACHED: Final = (
    "prompt_cache_hit_tokens",  # DeepSeek's older name
    "cached_tokens",  # Moonshot, Together
    "num_cached_tokens",  # Mistral
)
_WRITTEN: Final = (
    "cache_write_tokens",  # OpenAI, OpenRouter
    "cache_creation_input_tokens",  # Anthropic, DashScope
    "cache_creation_tokens",  # LiteLLM
    "cached_creation_tokens",  # new-api
    "cached_write_tokens",  # Bifrost
)


def _read_cached(details: dict[str, Any]) -> int:
    """Return how many tokens of the prompt came from a cache.

    Bifrost's `cached_tokens` is the sum of the other two, of which it leaves out those of zero.
    """
    both = _count(details.get("cached_tokens")) or 0
    read, written = details.get("cached_read_tokens"), details.get("cached_write_tokens")
    if (count := _count(read)) is not None:
        return count
    return max(0, both - (_count(written) or 0))


def _read_written(details: dict[str, Any]) -> int:
    """Return how many tokens of the prompt were written to a cache."""
    written = _first(details, _WRITTEN)
    if not written and isinstance(parts := details.get("cache_creation"), dict):
        # Anthropic's, by how long they are kept.
        for value in parts.values():
            written += _count(value) or 0
    return written


def _first(values: dict[str, Any], names: tuple[str, ...]) -> int:
    """Return the first count under these `names` that is not zero; 0 if there is none."""
    for name in names:
        value = values.get(name)
        if value is not None and (count := _count(value)):
            return count
    return 0


def _clamped(prompt: int, completion: int, cached: int, written: int, reasoning: int) -> Usage:
    """Return usage in which no part is more than its whole, and no count more than MAX_TOKENS."""
    prompt, completion = min(prompt, MAX_TOKENS), min(completion, MAX_TOKENS)
    cached = min(cached, prompt)
    written = min(written, prompt - cached)
    return Usage(prompt, completion, cached, min(reasoning, completion), written)


def _read_elsewhere(document: dict[str, Any]) -> Usage | None:
    """Return usage that is not on top of `document`."""
    nested = document.get("x_groq")
    if isinstance(nested, dict) and isinstance(usage := nested.get("usage"), dict):
        return parse_usage(usage)
    choices = document.get("choices")
    if isinstance(choices, list):
        for choice in choices:
            if isinstance(choice, dict) and isinstance(choice.get("usage"), dict):
                return _read_choices(choices)
    timings = document.get("timings")
    return _parse_timings(timings) if isinstance(timings, dict) else None


def _read_choices(choices: list[Any]) -> Usage | None:
    """Return the usage of `choices`, some of which have their own."""
    by_index: dict[int, Usage] = {}
    for place, choice in enumerate(choices):
        if isinstance(choice, dict) and isinstance(usage := choice.get("usage"), dict):
            found = parse_usage(usage)
            if found is not None:
                index = _count(choice.get("index"))
                by_index[place if index is None else index] = found
    return _add_up(by_index) if by_index else None


def _add_up(by_index: dict[int, Usage]) -> Usage:
    """Return the usage of a request whose choices have their own: one prompt, all answers."""
    prompt = completion = cached = written = reasoning = 0
    choices: dict[int, Usage] = {}
    for index, usage in by_index.items():
        if len(choices) == MAX_COUNTED_CHOICES:
            break
        choices[index] = usage
        prompt = max(prompt, usage.prompt_tokens)
        cached = max(cached, usage.cached_tokens)
        written = max(written, usage.cache_write_tokens)
        completion += usage.completion_tokens
        reasoning += usage.reasoning_tokens
    total = _clamped(prompt, completion, cached, written, reasoning)
    total.choices = choices
    return total


def _parse_timings(timings: dict[str, Any]) -> Usage | None:
    """Return the usage in llama.cpp's `timings`, which its last event has in any case.

    `prompt_n` is without what came from its cache: in versions without `cache_n` the prompt is not
    known.
    """
    completion = _count(timings.get("predicted_n"))
    if completion is None:
        return None
    cached, fresh = _count(timings.get("cache_n")), _count(timings.get("prompt_n"))
    prompt = 0 if cached is None or fresh is None else cached + fresh
    return _clamped(prompt, completion, cached or 0, 0, 0)


def _has_text(document: dict[str, Any]) -> bool:
    """Return whether any `message` of a body has more than its role."""
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        message = choice.get("message") if isinstance(choice, dict) else None
        if isinstance(message, dict):
            for name, value in message.items():
                if value and name != "role":
                    return True
    return False


def _count(value: object) -> int | None:
    """Return `value` if it can be a count, else None: upstreams send nulls and floats."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None
