"""Estimates token counts of answers without usage, from the usage of an endpoint's other answers.

Keeps for each endpoint the bytes of a prompt in a token, the tokens in an event or in a byte of a
body, and the usual length of an answer. No text is read.
"""

from __future__ import annotations

from typing import Final

from ..dialects.usage import BYTES_PER_TOKEN, Usage
from ..routing.health import Key

MAX_LEARNT: Final = 4096  # endpoints, for clients name the models behind wildcards
USUAL_ANSWER: Final = 500  # tokens, of an endpoint that has not answered yet
SHARE: Final = 0.1  # of the newest answer in a ratio: about twenty answers count
SHORTEST_LEARNT: Final = 8  # tokens: below, the framing of a chat outweighs its text
# The most bytes in a token of text, `\u…` escapes included. Images and runs of spaces have more, by
# which a client could make its prompts count for nothing.
DENSEST_LEARNT: Final = 12.0


class Ratios:
    """The ratios of one endpoint."""

    __slots__ = ("answer", "answers", "per_byte", "per_event", "prompt_bytes")

    def __init__(self) -> None:
        self.prompt_bytes = float(BYTES_PER_TOKEN)  # in a token
        self.per_event = 1.0  # tokens
        self.per_byte = 1.0 / BYTES_PER_TOKEN  # tokens, of a body as it is relayed
        self.answer = float(USUAL_ANSWER)  # tokens
        self.answers = 0


class Estimates:
    """The ratios of all endpoints, in one process."""

    def __init__(self) -> None:
        self._ratios: dict[Key, Ratios] = {}
        self._unknown = Ratios()

    def of_call(self, endpoint: Key, prompt_bytes: int) -> tuple[int, int]:
        """Return the tokens to expect of a prompt of `prompt_bytes`, and of a usual answer.

        A prompt never counts for less than by BYTES_PER_TOKEN, whatever earlier prompts were.
        """
        ratios = self._of(endpoint)
        per_token = ratios.prompt_bytes
        if per_token > BYTES_PER_TOKEN:
            per_token = float(BYTES_PER_TOKEN)
        return int(prompt_bytes / per_token + 0.5), int(ratios.answer + 0.5)

    def usage(
        self,
        endpoint: Key,
        known: Usage | None = None,
        *,
        prompt_bytes: int,
        events: int,
        body_bytes: int,
    ) -> Usage:
        """Estimate what is not `known` of an answer's usage, where a zero is not known either.

        The answer has `events` content events, or `body_bytes`.
        """
        ratios = self._of(endpoint)
        completion = events * ratios.per_event if events else body_bytes * ratios.per_byte
        known = Usage() if known is None else known
        return Usage(
            known.prompt_tokens or int(prompt_bytes / ratios.prompt_bytes + 0.5),
            known.completion_tokens or int(completion + 0.5),
            known.cached_tokens,
            known.reasoning_tokens,
            known.cache_write_tokens,
            is_estimated=True,
        )

    def learn(
        self, endpoint: Key, usage: Usage, *, prompt_bytes: int, events: int, body_bytes: int
    ) -> None:
        """Adjust an endpoint's ratios by the upstream's own usage of a whole answer."""
        ratios = self._ratios.get(endpoint)
        if ratios is None:
            if len(self._ratios) >= MAX_LEARNT:
                del self._ratios[next(iter(self._ratios))]
            ratios = self._ratios[endpoint] = Ratios()
        share = SHARE if ratios.answers >= 1 / SHARE else 1 / (ratios.answers + 1)
        ratios.answers += 1
        completion = usage.completion_tokens
        ratios.answer += (completion - ratios.answer) * share
        if usage.prompt_tokens >= SHORTEST_LEARNT:
            seen = min(prompt_bytes / usage.prompt_tokens, DENSEST_LEARNT)
            ratios.prompt_bytes += (seen - ratios.prompt_bytes) * share
        if completion >= SHORTEST_LEARNT:
            if events:
                ratios.per_event += (completion / events - ratios.per_event) * share
            elif body_bytes:
                ratios.per_byte += (completion / body_bytes - ratios.per_byte) * share

    def _of(self, endpoint: Key) -> Ratios:
        return self._ratios.get(endpoint, self._unknown)
