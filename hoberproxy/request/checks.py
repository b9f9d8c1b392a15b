"""The rules of a chat request's body: `parse_call` checks them, and makes the Call.

They cover the top level, the roles and the shape of contents; what lies deeper is the upstream's to
judge. Which models and providers exist is the router's business, and how large a body may be the
server's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from decimal import Decimal
from typing import Any, Final

import orjson

from ..errors import RequestError
from ..protocol.json_bytes import Member
from ..protocol.text import is_parameter_name
from .body_scan import MAX_MEMBERS, MAX_VALUES, RepeatedName, Survey, TangledMembers, find_members
from .call import (
    NO_PREFERENCES,
    ROLES,
    Call,
    JsonObject,
    ProviderPreferences,
    Terms,
    find_messages,
    raw_part,
)
from .extensions import NO_CONTENT, RESPONSE_FORMATS, TOOL_CHOICES, UNLIMITED, is_word
from .field_errors import (
    MAX_NAME_LENGTH,
    missing,
    one_of,
    too_long,
    too_many,
    wrong_type,
    wrong_value,
)

_loads: Final = orjson.loads

_NO_ENDS: Final[dict[int, int]] = {}

# What a client may send of each; docs/behaviour.md has them in one table.
MAX_MODELS: Final = 32
MAX_MESSAGES: Final = 50_000
MAX_TOOLS: Final = 4096
MAX_PROVIDERS: Final = 256  # in each list of the `provider` object
MAX_OPTIONS_BYTES: Final = 64 * 1024  # of `stream_options`
MAX_CHOICES: Final = 128  # what OpenAI takes: each is a separate answer, and paid for
# What an image or a sound weighs in a prompt, in bytes of text (some 2,000 tokens), unless its own
# text is shorter: the size of its base64 says nothing of its tokens.
MEDIA_BYTES: Final = 8000
_MEDIA: Final = frozenset(("image_url", "input_audio", "video_url"))
_SORTS: Final = frozenset(("price", "latency", "throughput"))
_SPEAKS_WITHOUT_CONTENT: Final = ("tool_calls", "function_call", "refusal", "audio")

_match_price: Final = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?").fullmatch


def parse_call(body: bytes, known_ends: dict[int, int] = _NO_ENDS) -> Call:
    """Return the call in `body`, checked against every rule of the contract.

    `known_ends` has the ends of top-level values by their beginnings, where they are known. Raises
    RequestError, which names the field.
    """
    survey = Survey(body)
    while survey.step():
        pass
    check_survey(survey)
    document = _load_object(body)
    members = _find_members(body, document, known_ends, survey)
    return _check_document(body, document, members)


def parse_in_steps(
    body: bytes, survey: Survey, known_ends: dict[int, int]
) -> Generator[None, None, Call]:
    """Do as `parse_call` for a large body, which `survey` has counted; pause between long steps."""
    document = _load_object(body)
    yield
    members = _find_members(body, document, known_ends, survey)
    yield
    call = _check_document(body, document, members)
    yield  # before a large document is freed
    return call


def check_survey(survey: Survey) -> None:
    """Raise RequestError if `survey` counted more values than a body may have."""
    if survey.has_too_many:
        message = f"the body: expected at most {MAX_VALUES} JSON values in all, got more"
        raise RequestError(message, code="invalid_value")


def make_call(
    terms: Terms,
    messages: object,
    body: bytes,
    raw_messages: bytes | memoryview,
    members: list[Member] | None = None,
) -> Call:
    """Return the call of `body`, whose part `raw_messages` parses to `messages`.

    Raises RequestError for the first message that is wrong.
    """
    needs_images, excess_bytes, roles = _check_messages(messages)
    return Call(terms, body, raw_messages, members, needs_images, excess_bytes, roles)


def _check_document(body: bytes, document: JsonObject, members: list[Member]) -> Call:
    if not document.keys() <= _PARAMETERS:
        _check_names(document)
    _check_required(document)
    for name, value in document.items():
        if value is not None and (check := _CHECKS.get(name)):
            check(name, value)
    span = find_messages(members)
    raw = raw_part(body, span.value_start, span.end)
    if document.get("stream_options") is not None:
        _check_size("stream_options", members)
    provider = document.get("provider")
    preferences = NO_PREFERENCES if provider is None else _parse_provider(provider)
    terms = Terms(document, preferences)
    terms.members = members
    return make_call(terms, document["messages"], body, raw, members)


def _check_size(param: str, members: list[Member]) -> None:
    """Raise RequestError if the member `param` is too large; a change reads it once more."""
    for member in members:
        if member.name == param and (size := member.end - member.value_start) > MAX_OPTIONS_BYTES:
            expected = f"an object of at most {MAX_OPTIONS_BYTES} bytes"
            raise wrong_value(param, expected, f"one of {size}")


# The document as a whole


def _load_object(body: bytes) -> JsonObject:
    try:
        document = _loads(body)
    except orjson.JSONDecodeError as exc:
        where = f"an error at line {exc.lineno}, column {exc.colno}" if body else "an empty body"
        message = f"the body: expected a JSON object in UTF-8, got {where}"
        # Not `from exc`: it carries the whole document.
        raise RequestError(message, code="invalid_json") from None
    if type(document) is not dict:
        raise wrong_type(None, "object", document)
    return document


def _check_names(document: JsonObject) -> None:
    """Raise RequestError for a name that another server could take for a parameter."""
    for name in document:
        # The first two tests settle nearly every name, at a fifth of the cost of folding it.
        if name in _PARAMETERS:
            continue
        if name.isascii() and name.islower():
            continue
        folded = _fold(name)
        if folded in _PARAMETERS:
            message = f"{folded} is given in another spelling: write it in lower case"
            raise RequestError(message, code="duplicate_parameter", param=name)


def _find_members(
    body: bytes, document: JsonObject, known_ends: dict[int, int], survey: Survey
) -> list[Member]:
    if len(document) > MAX_MEMBERS:
        raise too_many(None, MAX_MEMBERS, "members", len(document))
    if (longest := max(map(len, document), default=0)) > MAX_NAME_LENGTH:
        raise too_long(None, "names of members", longest)
    try:
        return find_members(body, list(document), known_ends, survey)
    except RepeatedName as repeated:
        raise _duplicate(repeated.name, repeated.start) from None
    except TangledMembers:
        message = (
            "the body: expected the names of its top-level members to be rare below the top level, "
            "got them too often to find where the members end"
        )
        raise RequestError(message, code="invalid_value") from None


def _duplicate(name: str, start: int) -> RequestError:
    param = name if is_parameter_name(name) else None
    message = f"{param or 'a name'} is given twice (again at byte {start}): give it once"
    return RequestError(message, code="duplicate_parameter", param=param)


def _fold(name: str) -> str:
    """Return what `name` is to the most lenient of the servers that ignore case.

    Go folds the long s to s and the Kelvin sign to k, Java both Turkish i's to i. Through upper
    case all of these come out, and whatever `lower` or `casefold` alone would find.
    """
    return name.replace("\u0130", "i").upper().casefold()


def _check_required(document: JsonObject) -> None:
    if document.get("model") is None and not document.get("models"):
        if "model" in document:
            raise wrong_type("model", "string", None)
        raise missing("model", "the slug of a model, or a list of them in models")
    if document.get("messages") is None:
        if "messages" in document:
            raise wrong_type("messages", "array", None)
        raise missing("messages", "a non-empty array of objects")


# One check for each parameter; null never gets here


def _check_string(param: str, value: object) -> None:
    if type(value) is not str:
        raise wrong_type(param, "string", value)
    if not value:
        raise wrong_value(param, "a non-empty string", "an empty one")


def _check_slug(param: str, value: object) -> None:
    _check_string(param, value)
    assert type(value) is str
    if len(value) > MAX_NAME_LENGTH:
        raise too_long(param, "a name", len(value))


def _check_boolean(param: str, value: object) -> None:
    if type(value) is not bool:
        raise wrong_type(param, "boolean", value)


def _check_token_count(param: str, value: object) -> None:
    if type(value) is not int:
        raise wrong_type(param, "integer", value)
    if value < 1 and value != UNLIMITED:
        raise wrong_value(param, "1 or more", str(value))


def _check_choices(param: str, value: object) -> None:
    if type(value) is not int:
        raise wrong_type(param, "integer", value)
    if not 1 <= value <= MAX_CHOICES:
        raise wrong_value(param, f"1 to {MAX_CHOICES}", str(value))


def _check_array(param: str, value: object) -> None:
    if type(value) is not list:
        raise wrong_type(param, "array", value)


def _check_list(param: str, value: object, most: int, what: str) -> None:
    _check_array(param, value)
    assert type(value) is list
    if len(value) > most:
        raise too_many(param, most, what, len(value))


def _check_tools(param: str, value: object) -> None:
    _check_list(param, value, MAX_TOOLS, "tools")


def _check_object(param: str, value: object) -> None:
    if type(value) is not dict:
        raise wrong_type(param, "object", value)


def _check_enum(param: str, value: object, allowed: frozenset[str]) -> None:
    if type(value) is not str:
        raise wrong_type(param, "string", value)
    if value not in allowed:
        raise wrong_value(param, one_of(allowed), "another string")


def _check_word(param: str, value: object, usual: frozenset[str]) -> None:
    """Accept the `usual` words, and others that an endpoint may take: see extensions.py."""
    if type(value) is not str or not is_word(value):
        _check_enum(param, value, usual)


def _number_check(highest: int) -> Callable[[str, object], None]:
    def check(param: str, value: object) -> None:
        if type(value) is not float and type(value) is not int:
            raise wrong_type(param, "number", value)
        if not 0 <= value <= highest:
            raise wrong_value(param, f"0 to {highest}", str(value))

    return check


def _flags_check(flag: str) -> Callable[[str, object], None]:
    """Return a check of an object of which only the boolean `flag` is read."""

    def check(param: str, value: object) -> None:
        if type(value) is not dict:
            raise wrong_type(param, "object", value)
        if value.get(flag) is not None:
            _check_boolean(f"{param}.{flag}", value[flag])

    return check


def _check_tool_choice(param: str, value: object) -> None:
    if type(value) is str:
        _check_word(param, value, TOOL_CHOICES)
    elif type(value) is not dict:
        raise wrong_type(param, "string or object", value)


def _check_response_format(param: str, value: object) -> None:
    if type(value) is not dict:
        raise wrong_type(param, "object", value)
    if "type" not in value:
        raise missing(f"{param}.type", one_of(RESPONSE_FORMATS))
    _check_word(f"{param}.type", value["type"], RESPONSE_FORMATS)


def _check_models(param: str, value: object) -> None:
    _check_list(param, value, MAX_MODELS, "models")
    assert type(value) is list
    for index, slug in enumerate(value):
        _check_slug(f"{param}[{index}]", slug)


# Messages are checked last, while the call is made: their images are found on the way.
_CHECKS: Final[dict[str, Callable[[str, object], None]]] = {
    "model": _check_slug,
    "stream": _check_boolean,
    "temperature": _number_check(2),
    "top_p": _number_check(1),
    "max_tokens": _check_token_count,
    "max_completion_tokens": _check_token_count,
    "n": _check_choices,
    "best_of": _check_choices,
    "tools": _check_tools,
    "tool_choice": _check_tool_choice,
    "response_format": _check_response_format,
    "stream_options": _flags_check("include_usage"),
    "usage": _flags_check("include"),
    "models": _check_models,
    "provider": _check_object,
}
_PARAMETERS: Final = frozenset((*_CHECKS, "messages"))


# Messages


def _check_messages(messages: object) -> tuple[bool, int, dict[str, int]]:
    """Return (has an image, bytes of media beyond MEDIA_BYTES for each, messages by role).

    Under NO_CONTENT stands the place of the first message of an assistant that has no content, if
    there is one. Raises RequestError for the first message that is wrong.
    """
    if type(messages) is not list:
        raise wrong_type("messages", "array", messages)
    if not messages:
        raise wrong_value("messages", "one message or more", "an empty array")
    if len(messages) > MAX_MESSAGES:
        raise too_many("messages", MAX_MESSAGES, "messages", len(messages))
    has_images, excess, roles = False, 0, dict[str, int]()
    for index, message in enumerate(messages):
        if type(message) is not dict:
            raise wrong_type(f"messages[{index}]", "object", message)
        role = message.get("role")
        if type(role) is not str or role not in ROLES:
            raise _wrong_role(f"messages[{index}].role", message)
        roles[role] = roles.get(role, 0) + 1
        content = message.get("content")
        if type(content) is list:
            with_image, more = _check_parts(index, content)
            has_images, excess = has_images or with_image, excess + more
        elif type(content) is not str and not _speaks_without_content(message):
            if role != "assistant" or content is not None or "content" not in message:
                raise _wrong_content(f"messages[{index}].content", message)
            roles.setdefault(NO_CONTENT, index)
    return has_images, excess, roles


def _check_parts(index: int, parts: list[Any]) -> tuple[bool, int]:
    """Return whether any part is an image, and the bytes of media beyond MEDIA_BYTES for each."""
    has_images, excess = False, 0
    for place, part in enumerate(parts):
        if type(part) is not dict:
            raise wrong_type(f"messages[{index}].content[{place}]", "object", part)
        kind = part.get("type")
        if kind == "image_url":
            has_images = True
        if type(kind) is str and kind in _MEDIA:
            excess += _media_excess(part[kind]) if kind in part else 0
    return has_images, excess


def _media_excess(media: object) -> int:
    """Return by how many bytes the longest text of an image or a sound is over MEDIA_BYTES."""
    # In base64 a character is a byte of the body; other texts (a URL) are short.
    longest = MEDIA_BYTES
    if type(media) is str:
        if len(media) > longest:
            longest = len(media)
    elif type(media) is dict:
        for text in media.values():  # no generator: there may be as many images as values
            if type(text) is str and len(text) > longest:
                longest = len(text)
    return longest - MEDIA_BYTES


def _speaks_without_content(message: JsonObject) -> bool:
    return (
        message["role"] == "assistant"
        and message.get("content") is None
        and any(message.get(name) for name in _SPEAKS_WITHOUT_CONTENT)
    )


def _wrong_role(param: str, message: JsonObject) -> RequestError:
    if "role" not in message:
        return missing(param, one_of(ROLES))
    if type(message["role"]) is not str:
        return wrong_type(param, "string", message["role"])
    return wrong_value(param, one_of(ROLES), "another string")


def _wrong_content(param: str, message: JsonObject) -> RequestError:
    if "content" not in message:
        return missing(param, "string or array of parts")
    return wrong_type(param, "string or array of parts", message["content"])


# Routing preferences


def _parse_provider(provider: JsonObject) -> ProviderPreferences:
    prices = provider.get("max_price")
    if prices is not None:
        _check_object("provider.max_price", prices)
    sort = provider.get("sort")
    if sort is not None:
        _check_enum("provider.sort", sort, _SORTS)
    return ProviderPreferences(
        only=_parse_names(provider, "only"),
        ignore=_parse_names(provider, "ignore"),
        order=_parse_names(provider, "order"),
        allow_fallbacks=_parse_flag(provider, "allow_fallbacks", default=True),
        sort=sort,
        max_price_prompt=_parse_price(prices or {}, "prompt"),
        max_price_completion=_parse_price(prices or {}, "completion"),
        require_parameters=_parse_flag(provider, "require_parameters", default=False),
    )


def _parse_names(provider: JsonObject, field: str) -> tuple[str, ...] | None:
    names = provider.get(field)
    if names is None:
        return None
    _check_list(f"provider.{field}", names, MAX_PROVIDERS, "names")
    for index, name in enumerate(names):
        _check_slug(f"provider.{field}[{index}]", name)
    return tuple(names) or None


def _parse_flag(provider: JsonObject, field: str, *, default: bool) -> bool:
    flag = provider.get(field)
    if flag is None:
        return default
    _check_boolean(f"provider.{field}", flag)
    return flag is True


def _parse_price(prices: JsonObject, field: str) -> Decimal | None:
    price = prices.get(field)
    if price is None:
        return None
    param = f"provider.max_price.{field}"
    if type(price) is str:
        if not _match_price(price):
            raise wrong_value(param, "a number of 0 or more", "a string of another form")
        return Decimal(price)
    if type(price) is not int and type(price) is not float:
        raise wrong_type(param, "number or string", price)
    if price < 0:
        raise wrong_value(param, "0 or more", str(price))
    return Decimal(str(price))  # by its shortest text: 0.1 stays 0.1
