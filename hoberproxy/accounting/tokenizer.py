"""Counts tokens by a tokenizer, for endpoints with `usage = "count"`, which report none.

The texts of such a request are kept, bounded, until it has ended, and then counted on a thread of
its own; the count amends the record and the key's counters, which have an estimate until then. No
text leaves this module.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

import orjson

from ..protocol.sse import BLANK_LINE, DONE, parse_event

logger = logging.getLogger("hoberproxy.ledger")

ENCODING = "o200k_base"
MAX_KEPT_BYTES: Final = 8 * 1024 * 1024  # of an answer; a longer one stays an estimate
MAX_WAITING = 100  # requests: each may hold its texts
# The tokens of a chat's framing in OpenAI's published formats: for each message, and at the end.
TOKENS_PER_MESSAGE = 3
TOKENS_PER_REPLY = 3


Amend = Callable[[int, int], None]  # takes a prompt's tokens and an answer's


class TokenCounter:
    """A thread that counts; `close` ends it after the count that it has begun.

    `call_soon` has a function called on the loop's thread, which calls all methods here.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hoberproxy-counter")
        self._encode: Callable[[str], list[int]] | None = None
        self._is_missing = False
        self._waiting = 0  # not yet delivered, counted or not
        self._counted: deque[tuple[Amend, tuple[int, int] | None]] = deque()

    def count(self, body: bytes, answer: bytes, amend: Amend) -> None:
        """Count the texts of `body` and `answer`, then call `amend` with the numbers, if any."""
        if self._is_missing or self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        self._executor.submit(self._count, body, answer, amend)

    def close(self) -> None:
        """Deliver what was counted and count no more; what waits stays an estimate."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._deliver()

    def _deliver(self) -> None:
        while self._counted:
            amend, numbers = self._counted.popleft()
            self._waiting -= 1
            if numbers is not None:
                amend(*numbers)

    # The thread

    def _count(self, body: bytes, answer: bytes, amend: Amend) -> None:
        numbers = None
        try:
            encode = self._load()
            if encode is not None:
                numbers = count_prompt(body, encode), count_answer(answer, encode)
        except Exception as exc:  # a text no tokenizer takes must not end the thread's work
            logger.error("tokens could not be counted: %s", type(exc).__name__)
        self._counted.append((amend, numbers))
        with suppress(RuntimeError):  # the loop is closed: `close` delivers
            self._call_soon(self._deliver)

    def _load(self) -> Callable[[str], list[int]] | None:
        if self._encode is None and not self._is_missing:
            try:
                import bpe_openai  # here, since it reads its vocabulary for a second
            except ImportError:
                self._is_missing = True
                logger.error(
                    'usage = "count" needs a tokenizer: pip install "hoberproxy[count]"; '
                    "until then tokens are estimated"
                )
            else:
                self._encode = bpe_openai.get_encoding(ENCODING).encode_ordinary
        return self._encode


def count_prompt(body: bytes, encode: Callable[[str], list[int]]) -> int:
    """Return the tokens of the messages and tools in `body`, a request's."""
    document = orjson.loads(body)
    messages = document["messages"]
    total = TOKENS_PER_REPLY + TOKENS_PER_MESSAGE * len(messages)
    total += sum(len(encode(text)) for message in messages for _, text in _texts(message))
    if document.get("tools"):
        total += len(encode(orjson.dumps(document["tools"]).decode()))
    return total


def count_answer(answer: bytes, encode: Callable[[str], list[int]]) -> int:
    """Return the tokens of the texts in all choices of `answer`, a stream or a body."""
    texts: dict[tuple[Any, ...], list[str]] = {}
    for document in _documents(answer):
        choices = document.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            said = choice.get("delta") or choice.get("message") or {}
            for place, text in _texts(said):
                # A token may be cut by the end of a delta: the pieces of a text are one.
                texts.setdefault((choice.get("index"), *place), []).append(text)
    return sum(len(encode("".join(pieces))) for pieces in texts.values())


def _documents(answer: bytes) -> Iterator[dict[str, Any]]:
    if answer.lstrip().startswith(b"{"):
        yield orjson.loads(answer)
        return
    for event in BLANK_LINE.split(answer):
        data = parse_event(event)
        if data is not None and data.payload not in (b"", DONE):
            yield orjson.loads(data.payload)


_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "name")


def _texts(message: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield the texts of a message or a delta with their places; images are not counted."""
    for name in _TEXTS:
        value = message.get(name)
        if isinstance(value, str):
            yield (name,), value
        for part in value if isinstance(value, list) else ():
            if isinstance(part.get("text"), str):
                yield (name,), part["text"]
    for place, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or {}
        for name in ("name", "arguments"):
            if isinstance(function.get(name), str):
                yield ("tool_calls", call.get("index", place), name), function[name]
