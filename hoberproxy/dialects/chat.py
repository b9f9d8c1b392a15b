"""Reads the JSON of completion chunks: content, a finish reason, or nothing but usage."""

from __future__ import annotations

from typing import Any, Final

# Members of a delta that only identify or label it. All others hold content.
NO_CONTENT: Final = frozenset(("role", "name", "id", "index", "type", "object", "error"))
_LEVELS: Final = 6  # of a value that are looked through for one that isn't empty


def is_usage_event(document: dict[str, Any]) -> bool:
    """Return whether `document` is the event that `include_usage` adds: usage without choices.

    OpenAI has an empty array there, ModelScope null, and ROCm's ATOM leaves it out.
    """
    choices = document.get("choices")
    return (choices is None or choices == []) and isinstance(document.get("usage"), dict)


def is_empty(value: object, levels: int = _LEVELS) -> bool:
    """Return whether `value` is null, "", or objects and arrays of nothing else."""
    if value is None or value == "":
        return True
    if levels and isinstance(value, dict):
        return all([is_empty(each, levels - 1) for each in value.values()])
    if levels and isinstance(value, list):
        return all([is_empty(each, levels - 1) for each in value])
    return False


def content_of(document: dict[str, Any]) -> tuple[str, bool]:
    """Return the finish reason of an event, "" without one, and whether a choice has content."""
    finish_reason = ""
    has_content = False
    choices = document.get("choices")
    if not isinstance(choices, list):
        return "", False
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            finish_reason = reason
        has_content = has_content or _has_content(choice)
    return finish_reason, has_content


def _has_content(choice: dict[str, Any]) -> bool:
    """Return whether the delta of `choice`, or what some servers have in its place, has content.

    MiniMax ends with the whole `message`; servers of plain completions send `text`.
    """
    for name in ("delta", "message"):
        delta = choice.get(name)
        if isinstance(delta, dict):
            for member, value in delta.items():
                if value and member not in NO_CONTENT and _is_content(value):
                    return True
    text = choice.get("text")
    return isinstance(text, str) and text != ""


def _is_content(value: object) -> bool:
    """Return whether a member of a delta is text, or an object or array with anything in it."""
    return isinstance(value, str) or (isinstance(value, dict | list) and not is_empty(value))
