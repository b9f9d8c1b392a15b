"""What the JSON of a completion chunk says: content, a finish reason, or nothing but usage."""

from __future__ import annotations

from typing import Any, Final

from .usage import read_usage

_LEVELS: Final = 6  # of a value that are looked through for one that isn't empty


def only_delta(document: dict[str, Any]) -> dict[str, Any] | None:
    """The delta of an event that has nothing else to say; None for any other."""
    choices = document.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    delta = choices[0].get("delta")
    if choices[0].get("finish_reason") or not isinstance(delta, dict):
        return None
    has_usage = document.get("usage") is not None or read_usage(document) is not None
    return None if has_usage else delta


def is_usage_event(document: dict[str, Any]) -> bool:
    """The event that `include_usage` adds: no choices, and a usage object."""
    return document.get("choices") == [] and isinstance(document.get("usage"), dict)


_CONTENT_MEMBERS: Final = (
    "content",
    "reasoning_content",  # DeepSeek, vLLM, llama.cpp
    "reasoning",  # OpenRouter, Groq
    "tool_calls",
    "refusal",
    "audio",
    "function_call",
)


def content_of(document: dict[str, Any]) -> tuple[str, bool]:
    """The finish reason of an event, and whether a delta holds content as the contract has it."""
    finish_reason = ""
    has_delta = False
    choices = document.get("choices")
    if not isinstance(choices, list):
        return "", False
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            finish_reason = reason
        delta = choice.get("delta")
        if isinstance(delta, dict):
            for name in _CONTENT_MEMBERS:
                if delta.get(name):
                    has_delta = True
                    break
    return finish_reason, has_delta


def is_empty(value: object, levels: int = _LEVELS) -> bool:
    """Whether there is nothing in it: null, "", or objects and arrays of such alone."""
    if value is None or value == "":
        return True
    if levels and isinstance(value, dict):
        return all([is_empty(each, levels - 1) for each in value.values()])
    if levels and isinstance(value, list):
        return all([is_empty(each, levels - 1) for each in value])
    return False
