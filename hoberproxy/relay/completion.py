"""Checks, reads and edits a chat completion that is one JSON body.

It also turns one into the events of a stream, for upstreams that answer `stream: true` with a body.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

from ..dialects.error_document import describes_error
from ..dialects.usage import Usage, read_usage
from ..protocol.json_bytes import dump_json, find_member, load_json, model_member, replace_member
from ..protocol.sse import DONE, serialize_event

_DONE_BEHIND: Final = re.compile(rb"\s*data: ?\[DONE\]\s*\Z")
_DONE_ROOM: Final = 64  # bytes
_BACKSLASH: Final = 0x5C  # `in` takes a number at a tenth of the cost of bytes


class CompletionError(Exception):
    """The body of an answer with status 200 is no completion.

    `is_error_body` says that it is an upstream's error; `document` is the value that describes it.
    """

    def __init__(
        self, message: str, *, is_error_body: bool = False, document: object = None
    ) -> None:
        super().__init__(message)
        self.is_error_body = is_error_body
        self.document = document


class Completion:
    """A checked completion: `body` is as the client gets it, the rest as the upstream sent it."""

    __slots__ = ("body", "document", "finish_reason", "upstream_id", "upstream_model", "usage")

    def __init__(
        self,
        body: bytes,
        document: dict[str, Any],
        usage: Usage | None,
        finish_reason: str,
        upstream_model: str,
        upstream_id: str,
    ) -> None:
        self.body = body
        self.document = document
        self.usage = usage
        self.finish_reason = finish_reason
        self.upstream_model = upstream_model
        self.upstream_id = upstream_id


def parse_completion(body: bytes, slug: str) -> Completion:
    """Check the `body` of an answer that is no stream; its model gets the name `slug`.

    Raises CompletionError for anything but a JSON object with an answer in its `choices` array: a
    message with content, or a finish reason.
    """
    try:
        document = load_json(body)
    except ValueError:
        body = _without_done(body)
        document = _load_rest(body)
    if not isinstance(document, dict):
        raise _no_completion(document, "expected a JSON object as the body")
    get = document.get
    if (error := get("error")) and _is_error(error):
        raise _error_body(document)
    choices = get("choices")
    if not isinstance(choices, list) or not choices:
        raise _no_completion(document, "expected `choices` in the body, got none")
    _check_choices(document, choices)
    model = get("model")
    usage, finish_reason, upstream_id = read_completion(document)
    return Completion(
        _rename(body, model, slug) if isinstance(model, str) else body,
        document,
        usage,
        finish_reason,
        _text(model),
        upstream_id,
    )


def _check_choices(document: dict[str, Any], choices: list[Any]) -> None:
    """Raise CompletionError where no choice holds an answer, or one of them an error."""
    has_answer = False
    for choice in choices:
        if isinstance(choice, dict):
            error = choice.get("error")
            if (error and _is_error(error)) or choice.get("finish_reason") == "error":
                raise _error_body(choice)
            has_answer = has_answer or _is_answer(choice)
    if not has_answer:
        raise _no_completion(document, "expected an answer in `choices`, got none")
    base = document.get("base_resp")  # MiniMax', beside choices if its filter has blocked them
    if isinstance(base, dict) and base.get("status_code"):
        raise _error_body(document)


def _is_error(error: object) -> bool:
    """Return whether member `error` is one: some servers have an object of nulls for none."""
    return any(error.values()) if isinstance(error, dict) else bool(error)


def _is_answer(choice: dict[str, Any]) -> bool:
    """Return whether a choice has a finish reason, or a message with more than its role."""
    if choice.get("finish_reason") or choice.get("text"):
        return True
    for name, value in _message_of(choice).items():
        if value and name != "role":
            return True
    return False


def _message_of(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the message of a choice, which a few servers call `delta`; {} without one."""
    for name in ("message", "delta"):
        message = choice.get(name)
        if isinstance(message, dict):
            return message
    return {}


def _error_body(document: object) -> CompletionError:
    message = "the upstream sent an error with status 200"
    return CompletionError(message, is_error_body=True, document=document)


def _no_completion(document: object, expected: str) -> CompletionError:
    """Return the error for a body without an answer: the upstream's own, if it describes one."""
    return _error_body(document) if describes_error(document) else CompletionError(expected)


def _without_done(body: bytes) -> bytes:
    """Return `body` without a [DONE] event at its end, which some gateways send; else b""."""
    found = _DONE_BEHIND.search(body, max(0, len(body) - _DONE_ROOM))
    return body[: found.start()] if found is not None else b""


def _load_rest(body: bytes) -> Any:
    try:
        return load_json(body)
    except ValueError:
        raise CompletionError("expected a JSON body, got something else or a part of one") from None


def read_completion(document: dict[str, Any]) -> tuple[Usage | None, str, str]:
    """Return what a completion, or the outline of one, says: usage, finish reason and id."""
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    return read_usage(document), _text(reason), _text(document.get("id"))


def serialize_as_stream(completion: Completion, slug: str, *, wants_usage: bool) -> bytes:
    """Return `completion` as a stream of one chunk, with a usage event if the client wants it."""
    chunk = {
        name: value
        for name, value in completion.document.items()
        if name not in ("usage", "model", "error") and value is not None
    }
    chunk["object"] = "chat.completion.chunk"
    chunk["model"] = slug
    chunk["choices"] = _delta_choices(completion.document["choices"])
    events = [serialize_event(dump_json(chunk))]
    if wants_usage and isinstance(completion.document.get("usage"), dict):
        usage = chunk | {"choices": [], "usage": completion.document["usage"]}
        events.append(serialize_event(dump_json(usage)))
    events.append(serialize_event(DONE))
    return b"".join(events)


def _delta_choices(choices: list[Any]) -> list[dict[str, Any]]:
    """Return a chunk's choices for a completion's, numbered if not each has its own index."""
    objects: list[dict[str, Any]] = list(filter(_is_object, choices))
    indexes = [choice.get("index") for choice in objects]
    numbers = {index for index in indexes if type(index) is int}
    if len(numbers) < len(objects):
        indexes = list(range(len(objects)))
    return [
        {
            "index": index,
            "finish_reason": None,  # chunks always have one
            **{
                name: value
                for name, value in choice.items()
                if name not in ("message", "delta", "index", "error")
                and (value is not None or name == "logprobs")
            },
            "delta": _delta(choice),
        }
        for index, choice in zip(indexes, objects, strict=True)
    ]


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the message of a choice as a delta, in which each tool call needs an index."""
    message = _message_of(choice)
    if not message:
        return {}
    # Deltas of OpenAI have null for these two alone, and some clients refuse it elsewhere.
    delta = {
        name: value
        for name, value in message.items()
        if value is not None or name in ("content", "refusal")
    }
    delta.setdefault("role", "assistant")
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        # Servers that number the calls of a message have null in each, or the same number.
        delta["tool_calls"] = [
            {"index": index, **{name: call[name] for name in call if name != "index"}}
            for index, call in enumerate(filter(_is_object, calls))
        ]
    return delta


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _rename(body: bytes, model: str, slug: str) -> bytes:
    # A search is enough where nothing else can be meant: no other such name, none with escapes.
    parts, old = body.split(b'"model"', 2), model_member(model)
    if len(parts) == 2 and (_BACKSLASH not in body or body.find(b"\\u00") < 0):
        before, after = parts
        rest = len(old) - len(b'"model"')
        if after.startswith(old[-rest:]):
            return b"".join((before, model_member(slug), after[rest:]))
    member = find_member(body, "model")
    assert member is not None, "it has just been read"
    return replace_member(body, member, orjson.dumps(slug))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
