"""Finds the errors that an upstream reports within a stream, in all forms that servers send.

Whatever the form, the document is kept for the client; no text of it is in a message.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ..protocol.json_bytes import load_json
from .chat import is_empty
from .error_document import as_status

# Names under which a status or a number of the upstream's own stands, and the text beside it.
_CODES: Final = ("code", "error_code", "errorCode")
_STATUSES: Final = ("status", "status_code", "statusCode")
_TEXTS: Final = ("message", "msg", "error_msg", "error_message", "errorMessage")
_FINE: Final = (None, "", 0, 200, "0", "200", "ok", "OK", "success")
_FAILED: Final = ("error", "failed", "failure", "fail")  # a status may also be of a queue
_BROKEN_ERROR: Final = re.compile(rb'\s*\{\s*"error"\s*:\s*[^n\s]')


class StreamFailure(Exception):
    """A stream reports that it failed, or is no stream of completion chunks.

    `is_error_event` says that it is the upstream's own error, and not bytes out of shape.
    `document` is what the upstream sent: the object with the error in it, or a text, or None if it
    said no more; dialects/error_document.py reads it.
    """

    def __init__(
        self,
        message: str,
        *,
        is_error_event: bool,
        document: Any = None,
    ) -> None:
        super().__init__(message)
        self.is_error_event = is_error_event
        self.document = document


def error_event(document: object) -> StreamFailure:
    """Return the failure of an error event; a `document` that says nothing becomes None."""
    return StreamFailure(
        "the upstream sent an error event",
        is_error_event=True,
        document=None if is_empty(document) else document,
    )


def find_error(document: Any) -> StreamFailure | None:
    """Return the failure that a chunk's JSON reports; None if it is a chunk without an error.

    `{"error": …}`, also in an array as Gemini has it; `{"object": "error", …}` of vLLM and
    `{"type": "error", …}`; an error within a choice, or a finish reason that is one; MiniMax'
    `base_resp`; and, where there are no choices, what gateways and web frameworks answer with:
    `{"detail": …}`, `{"code": …, "message": …}`.
    """
    if isinstance(document, list):
        document = document[0] if document else None
    if not isinstance(document, dict):
        return None
    get = document.get
    if get("error") and not is_empty(document["error"]):
        return error_event(document)
    if get("object") == "error" or get("type") == "error":
        return error_event(document)
    choices = get("choices")
    if choices and isinstance(choices, list):
        failure = _find_choice_error(choices)
        if failure is not None:
            return failure
    elif _is_bare_error(document):
        return error_event(document)
    base = get("base_resp")
    if isinstance(base, dict) and base.get("status_code") not in _FINE:
        return error_event(document)
    return None


def find_broken_error(payload: bytes) -> StreamFailure | None:
    """Return the failure in a `payload` that is no JSON but begins as an error does, or None.

    Most of these have quotes in the text that are not escaped.
    """
    if _BROKEN_ERROR.match(payload) is None:
        return None
    return error_event(payload.decode("utf-8", "replace"))


def error_field(value: bytes) -> StreamFailure | None:
    """Return the failure in an event's line `error: …`, which older llama.cpp writes, or None."""
    try:
        document = load_json(value)
    except ValueError:
        document = value.decode("utf-8", "replace")
    return None if is_empty(document) else find_error(document) or error_event(document)


def _find_choice_error(choices: list[Any]) -> StreamFailure | None:
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        error = choice.get("error")
        if error and not is_empty(error):
            return error_event({"error": error})
        for name in ("delta", "message"):
            inner = choice.get(name)
            if isinstance(inner, dict) and (error := inner.get("error")) and not is_empty(error):
                return error_event({"error": error})
        reason = choice.get("finish_reason")
        # Zhipu says `network_error` when its inference broke.
        if isinstance(reason, str) and (reason == "error" or reason == "network_error"):
            return error_event(None)
    return None


def _is_bare_error(document: dict[str, Any]) -> bool:
    """Return whether an object without choices is nothing but an error."""
    if isinstance(document.get("usage"), dict):
        return False
    if not is_empty(document.get("detail")) or not is_empty(document.get("errors")):
        return True
    for text in _TEXTS:
        value = document.get(text)
        if isinstance(value, str) and value:
            return (
                any([_is_code(document.get(name)) for name in _CODES])
                or any([document.get(name) in _FAILED for name in _STATUSES])
                or any([as_status(document.get(name)) is not None for name in _STATUSES])
                or document.get("success") is False
            )
    return False


def _is_code(value: object) -> bool:
    return isinstance(value, int | str) and value not in _FINE
