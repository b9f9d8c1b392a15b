"""Reads upstreams' errors of any form: their status, message, field and code.

Servers and the gateways before them put errors into each other: a list, a string of JSON in a
message, an object under `metadata.raw`. So an error is read as its layers, the outermost first,
and each fact is looked for in all of them. What follows from an error is decided in
upstream/error_response.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from ..protocol.json_bytes import load_json
from ..protocol.text import clip_text

JsonObject = dict[str, Any]

MAX_MESSAGE_LENGTH: Final = 2000
MAX_PARAM_LENGTH: Final = 128
MAX_CODE_LENGTH: Final = 64
_MOST_LAYERS: Final = 8
_MOST_LEVELS: Final = 10
_MOST_MESSAGES: Final = 8  # of a list; FastAPI names every field at fault
_MOST_DATA_LINES: Final = 64

# Where one error holds another. `raw` is OpenRouter's, within `metadata`; `innererror` Azure's.
_INNER: Final = (
    *("error", "errors", "detail", "details", "message", "msg", "metadata", "raw", "base_resp"),
)
_TEXTS: Final = (
    *("message", "msg", "detail", "details", "raw", "error_description", "status_msg"),
    # Baidu, AWS' gateways, and some smaller ones.
    *("error_message", "error_msg", "errorMessage", "errorMsg", "description", "reason"),
    "base_resp",
)
# Words of a status line: as a message they say less than our own words do.
_PHRASES: Final = frozenset(
    (
        *("bad request", "content too large", "payload too large", "request entity too large"),
        *("unprocessable entity", "unprocessable content"),
    )
)
_SAYS_NOTHING: Final = _PHRASES | {"", "error", "provider returned error", "upstream error"}
_SPACE: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_MARKUP: Final = re.compile(r"<(?:!doctype|\?xml|html|head|body|title|h[1-6]|center|p|div)\b", re.I)
# The first whole text in JSON that was cut: it stands before what the server quotes of a prompt.
_WHOLE_TEXT: Final = re.compile(r'"(?:message|msg|detail|error)"\s*:\s*("(?:[^"\\]|\\.)+")')
_STATUS_TEXT: Final = re.compile(r"\s*(?:http[\s_/:-]*)?([45][0-9]{2})(?![0-9])", re.I)
_WORD_STARTS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NO_WORD: Final = re.compile(r"[^a-z0-9]+")

_STATUS_NAMES: Final = ("code", "status", "status_code", "statusCode", "http_status", "error_code")
_WORD_NAMES: Final = ("code", "status", "type", "reason", "error_code", "error_type")

# What the words of an error's `code`, `status` or `type` stand for, without "error" at their end.
# OpenAI, platform.openai.com/docs/guides/error-codes; Anthropic, docs.claude.com/en/api/errors;
# gRPC's, github.com/googleapis/googleapis/blob/master/google/rpc/code.proto, with the status that
# ai.google.dev/gemini-api/docs/troubleshooting has for them; Groq, console.groq.com/docs/errors;
# Moonshot, platform.moonshot.ai/docs/api/chat; llama.cpp's format_error_response; the exceptions of
# OpenAI's SDK, under whose names vLLM, SGLang and LiteLLM send theirs.
_STATUSES: Final = {
    400: (
        *("invalid_request", "bad_request", "invalid_argument", "out_of_range", "invalid_value"),
        *("invalid_type", "invalid_prompt", "invalid_parameter", "invalid_parameters"),
        *("missing_required_parameter", "unsupported_parameter", "unsupported_value"),
        *("unknown_parameter", "validation", "value", "string_above_max_length"),
        *("content_filter", "content_policy_violation", "responsible_ai_policy_violation"),
        *("json_validate_failed", "tool_use_failed", "unsupported_params", "invalid_image"),
        *("context_length_exceeded", "context_window_exceeded", "exceed_context_size"),
        *("model_context_window_exceeded", "input_too_long", "prompt_too_long"),
    ),
    401: (
        *("authentication", "unauthenticated", "unauthorized", "invalid_api_key"),
        *("incorrect_api_key", "api_key_invalid", "invalid_authentication", "account_deactivated"),
    ),
    402: (
        *("insufficient_balance", "insufficient_credits", "payment_required", "billing"),
        *("billing_not_active", "billing_hard_limit_reached"),
    ),
    403: (
        *("permission", "permission_denied", "forbidden", "access_denied", "failed_precondition"),
        *("organization_restricted", "exceeded_current_quota"),
    ),
    404: ("not_found", "model_not_found", "resource_not_found"),
    408: ("request_timeout",),
    413: ("request_too_large", "payload_too_large", "request_entity_too_large"),
    422: ("unprocessable_entity",),
    429: (
        *("rate_limit", "rate_limit_exceeded", "rate_limit_reached", "rate_limited"),
        *("too_many_requests", "resource_exhausted", "throttling", "quota_exceeded"),
        *("insufficient_quota", "engine_overloaded"),
    ),
    500: ("internal_server", "internal", "server", "api", "unknown", "data_loss", "aborted"),
    503: ("overloaded", "service_unavailable", "unavailable"),
    504: ("timeout", "deadline_exceeded", "gateway_timeout"),
}
_STATUS_OF: Final = {word: status for status, words in _STATUSES.items() for word in words}

# MiniMax' own numbers, beside its `status_msg`: platform.minimax.io/docs/api-reference/errorcode.
_MINIMAX: Final = {
    **dict.fromkeys((1002, 1039, 1041, 2045, 2056), 429),
    **dict.fromkeys((1004, 2049), 401),
    1008: 402,
    **dict.fromkeys((1026, 1027, 1042, 2013), 400),
}

# A prompt that is too long. The first are codes and types that say nothing else.
_LENGTH_WORDS: Final = frozenset(
    "context_length_exceeded context_window_exceeded exceed_context_size"
    " model_context_window_exceeded input_too_long prompt_too_long".split()
)
_LENGTH: Final = re.compile(
    r"context (?:length|window|size|limit)\W+(?:\w+\W+){0,6}?(?:exceed|smaller)"
    r"|(?:exceed|longer than|larger than|greater than|too (?:long|large|big) for|beyond)\w*"
    r"\W+(?:[\w']+\W+){0,8}?context(?: (?:length|window|size|limit))?\b"
    r"|(?:maximum|max|available|configured) context (?:length|window|size)"
    r"|context_length_exceeded|max_(?:model|seq)_len\b"
    r"|maximum (?:model|prompt|sequence) length|maximum (?:allowed )?input length"
    r"|(?:prompt|input|inputs|conversation)\b[^.]{0,60}? too long\b"
    r"|(?:input|prompt) token(?:s| count)\b.{0,60}?\bexceed"
    r"|exceed\w*\W+(?:\w+\W+){0,3}?(?:model token limit|max(?:imum)? length)"
    r"|max length exceeded|reduce the length of the (?:messages|prompt|input)"
    r"|range of input length should be|too many tokens|token limit exceeded"
    r"|`?inputs`? tokens \+ `?max_new_tokens`?",
    re.I,
)
# These have to do with how many tokens pass in a minute, not with how long one prompt is.
_RATE_LIMIT: Final = re.compile(r"\brate.?limit|\btoo many requests\b", re.I)
_RATE: Final = re.compile(
    r"per (?:second|minute|hour|day)|rate.?limit|\b[rt]p[md]\b|please wait", re.I
)


@dataclass(frozen=True, slots=True)
class ErrorDocument:
    """The facts of an error; empty or None where it does not say.

    `words` are all its codes, types and states, in one spelling.
    """

    status: int | None = None
    message: str = ""
    param: str = ""
    code: str = ""
    words: frozenset[str] = frozenset()

    @property
    def names_length(self) -> bool:
        """Return whether a code or type says that the prompt does not fit into the context."""
        return not _LENGTH_WORDS.isdisjoint(self.words)

    @property
    def is_too_long(self) -> bool:
        """Return whether a code or the message says that the prompt does not fit."""
        if self.names_length:
            return True
        return _LENGTH.search(self.message) is not None and _RATE.search(self.message) is None


def load_error(body: bytes) -> Any:
    """Return the error in a response's body: JSON, the data of an event, or a text.

    None for HTML, which an intermediary sends about itself, and for bytes that are no text.
    """
    text = body.removeprefix(b"\xef\xbb\xbf").strip()
    if text.startswith((b"data:", b"event:", b"id:", b":")):
        return _load_event(text)
    try:
        return load_json(text)
    except ValueError:
        pass
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        decoded = text.decode("utf-8", "ignore")
        if len(decoded) < len(text) * 0.9:  # not merely cut in the middle of a character
            return None
    if decoded.startswith(("{", "[")):
        return _load_lines(text) or _load_cut(decoded)
    return None if _MARKUP.search(decoded) else decoded


def read_error(document: Any) -> ErrorDocument:
    """Return the facts of the error in `document`, the value of JSON or a text."""
    layers = list(islice(_layers(document, _MOST_LEVELS), _MOST_LAYERS))
    objects = [layer for layer in layers if isinstance(layer, dict)]
    words = [word for layer in objects for word in _words(layer)]
    message = _one_line(document)
    return ErrorDocument(
        status=_find_status(objects, words, message),
        message=message,
        param=clean_text(_find_param(document), MAX_PARAM_LENGTH),
        code=_find_code(objects),
        words=frozenset(words),
    )


def describes_error(document: Any) -> bool:
    """Return whether the body of a response without choices describes an error."""
    if isinstance(document, list):
        return bool(document) and describes_error(document[0])
    if not isinstance(document, dict):
        return False
    if document.get("error") or document.get("errors") or document.get("object") == "error":
        return True
    found = read_error(document)
    return found.status is not None or bool(found.message)


# Texts that hold JSON


def _load_event(text: bytes) -> Any:
    """Return the first data of an event stream that is an object, else its first data."""
    lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    payloads = [line[5:].strip() for line in lines if line.startswith(b"data:")][:_MOST_DATA_LINES]
    found = [load_error(each) for each in payloads if each != b"[DONE]" and each[:5] != b"data:"]
    if len(found) > 1 and not any(isinstance(each, dict) for each in found):
        return load_error(b"\n".join(payloads))  # one event over several lines
    return next((each for each in found if isinstance(each, dict)), found[0] if found else None)


def _load_lines(text: bytes) -> Any:
    """Return the first of several documents, one a line; None if it is no JSON."""
    first = text.partition(b"\n")[0]
    try:
        return load_json(first)
    except ValueError:
        return None


def _load_cut(text: str) -> Any:
    """Return the message of JSON that was cut after it, or None."""
    whole = _WHOLE_TEXT.search(text)
    try:
        return json.loads(whole[1], strict=False) if whole else None
    except ValueError:
        return None


def _unpack(text: str) -> Any:
    """Return the object or array that `text` is the JSON of, else `text`."""
    stripped = text.strip()
    if stripped.startswith(("{", "[", "data:")):
        found = load_error(stripped.encode("utf-8", "replace"))
        if isinstance(found, (dict, list)):
            return found
    return text


# The layers of one error


def _layers(value: Any, levels: int) -> Iterator[Any]:
    if not levels:
        return
    if isinstance(value, str):
        value = _unpack(value)
    if isinstance(value, list):
        for item in value[:4]:
            yield from _layers(item, levels - 1)
    elif isinstance(value, dict):
        yield value
        for name in (*_INNER, "innererror"):
            if isinstance(value.get(name), (dict, list, str)):
                yield from _layers(value[name], levels - 1)


def _find_status(layers: Iterable[JsonObject], words: Iterable[str], message: str) -> int | None:
    """Return the HTTP status that an error has as a number, else that of its words, or None."""
    for layer in layers:
        for name in _STATUS_NAMES:
            if (status := as_status(layer.get(name))) is not None:
                return status
        number = layer.get("status_code")
        if type(number) is int and number in _MINIMAX and "status_msg" in layer:
            return _MINIMAX[number]
    for word in words:
        if (known := _STATUS_OF.get(word)) is not None:
            return known
    if any(_is_validation(layer) for layer in layers):
        return 422
    return 429 if _RATE_LIMIT.search(message) else None


def as_status(value: Any) -> int | None:
    """Return the HTTP status of an error that `value` names: a number, or the start of a text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and (match := _STATUS_TEXT.match(value)):
        value = int(match[1])
    return value if isinstance(value, int) and 400 <= value <= 599 else None


def _is_validation(layer: JsonObject) -> bool:
    """Return whether `layer` is FastAPI's error for one field of a body."""
    place = layer.get("loc")
    return isinstance(place, list) and place[:1] == ["body"]


def _words(layer: JsonObject) -> Iterator[str]:
    for name in _WORD_NAMES:
        value = layer.get(name)
        if isinstance(value, str) and value:
            yield _as_word(value[:128])


def _as_word(text: str) -> str:
    """Return bad_request for `BadRequestError`, `bad-request` and `BAD_REQUEST`."""
    word = _NO_WORD.sub("_", _WORD_STARTS.sub("_", text).lower()).strip("_")
    return word.removesuffix("_exception").removesuffix("_error") or word


def _find_code(layers: list[JsonObject]) -> str:
    """Return the innermost code that is no status; codes around it are a gateway's and say less."""
    for layer in reversed(layers):
        code = layer.get("code")
        if isinstance(code, str) and as_status(code) is None:
            if cleaned := clean_text(code, MAX_CODE_LENGTH):
                return cleaned
    return ""


# The message


def clean_text(text: str, limit: int) -> str:
    """Return `text` on one line of at most `limit` characters, fit for any encoding."""
    return _SPACE.sub(" ", clip_text(text, 4 * limit)).strip()[:limit]


def _one_line(document: Any) -> str:
    message = clean_text(_find_message(document), MAX_MESSAGE_LENGTH)
    return "" if message.lower().rstrip(".") in _PHRASES else message


def _find_message(value: Any, levels: int = _MOST_LEVELS) -> str:
    """Return the message of an error, with that of an error within it; empty without one."""
    if not levels:
        return ""
    if isinstance(value, str):
        inner = _unpack(value)
        if inner is not value:
            return _find_message(inner, levels - 1)
        return "" if _MARKUP.search(value) else value.strip()
    if isinstance(value, list):
        found = [_find_message(item, levels - 1) for item in value[:_MOST_MESSAGES]]
        return "; ".join(dict.fromkeys(filter(None, found)))
    if isinstance(value, dict):
        return _message_of(value, levels)
    return ""


def _message_of(error: JsonObject, levels: int) -> str:
    nested = error.get("error") or error.get("errors")
    message = _find_message(nested, levels - 1) if isinstance(nested, (dict, list)) else ""
    message = message or _first_text(error, levels)
    if isinstance(nested, str) and message.lower() in _SAYS_NOTHING:
        message = _find_message(nested, levels - 1) or message
    metadata, inner = error.get("metadata"), error.get("innererror")
    if isinstance(metadata, dict):
        message = _joined(message, _find_message(metadata, levels - 1))
    if isinstance(inner, dict):
        message = _joined(message, _first_text(inner, levels))
    if not message and isinstance(by_field := error.get("errors"), dict):  # ASP.NET's
        message = _find_message(list(by_field.values()), levels - 1)
    if not message:
        message = next((t for n in ("title", "Message") if isinstance(t := error.get(n), str)), "")
    filtered = _filtered(inner) or _filtered(error)
    return f"{message} (filtered: {filtered})" if filtered else message


def _first_text(error: JsonObject, levels: int) -> str:
    found = (_find_message(error.get(name), levels - 1) for name in _TEXTS)
    texts = [text for text in found if text]
    return next((text for text in texts if text.lower() not in _SAYS_NOTHING), "".join(texts[:1]))


def _joined(outer: str, inner: str) -> str:
    """Return both messages, or the one that says something."""
    if not inner or inner in outer:
        return outer
    return inner if outer in inner or outer.lower() in _SAYS_NOTHING else f"{outer}: {inner}"


def _filtered(value: Any) -> str:
    """Return the kinds of content that Azure's filter names."""
    if not isinstance(value, dict):
        return ""
    result = value.get("content_filter_result") or value.get("content_filter_results")
    if not isinstance(result, dict):
        return ""
    kinds = [
        kind
        for kind, verdict in result.items()
        if isinstance(verdict, dict) and (verdict.get("filtered") or verdict.get("detected"))
    ]
    return ", ".join(kinds[:_MOST_MESSAGES])


# The field at fault


def _find_param(error: Any, levels: int = _MOST_LEVELS) -> str:
    """Return the field at fault: `param`, or FastAPI's `loc` as a path; empty without one."""
    if isinstance(error, str):
        error = _unpack(error)
    if isinstance(error, list) and error:
        error = error[0]
    if not isinstance(error, dict) or not levels:
        return ""
    param, place = error.get("param"), error.get("loc")
    if isinstance(param, str) and param:
        return param
    if isinstance(place, list):
        return _path([part for part in place if part != "body"])
    found = (_find_param(error.get(name), levels - 1) for name in _INNER)
    return next(filter(None, found), "")


def _path(place: list[Any]) -> str:
    """Return messages[0].role, the form of our own errors, for ["messages", 0, "role"]."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).lstrip(".")
