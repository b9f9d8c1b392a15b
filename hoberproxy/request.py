"""A chat request's body and its rules.

Checks the top level, the roles and the shape of contents; what lies deeper is the upstream's to
judge. Which models and providers exist is the router's business, and how large a body may be the
server's. What goes upstream is upstream_body.py's.

A body is its messages and what stands around them, its frame. What a frame says is the same for
all requests of an app, as a rule: frames.py knows it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Generator, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import orjson

from .errors import RequestError
from .extensions import (
    NO_CONTENT,
    NO_EXTENSIONS,
    RESPONSE_FORMATS,
    TOOL_CHOICES,
    UNLIMITED,
    find_extensions,
    is_word,
)
from .http11_body import LARGE_BYTES
from .members import Member
from .request_errors import MAX_NAME_LENGTH
from .request_errors import missing as _missing
from .request_errors import one_of as _one_of
from .request_errors import too_long as _too_long
from .request_errors import too_many as _too_many
from .request_errors import wrong_type as _wrong_type
from .request_errors import wrong_value as _wrong_value
from .spans import (
    MAX_MEMBERS,
    MAX_VALUES,
    RepeatedName,
    Survey,
    TangledMembers,
    find_members,
)
from .text import clip_text, is_parameter_name

JsonObject = dict[str, Any]

_loads: Final = orjson.loads

_JSON_FORMATS: Final = frozenset(("json_object", "json_schema"))
_NOTHING: Final[JsonObject] = {}
_NO_ENDS: Final[dict[int, int]] = {}
ROLES: Final = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
MAX_REQUESTED: Final = 16  # slugs that a record tells
MAX_CHOICES: Final = 128  # what OpenAI takes: each is an answer of its own, and paid for
MAXIMA: Final = ("max_completion_tokens", "max_tokens")  # of one answer, in tokens
CHOICES: Final = ("n", "best_of")  # how many answers are written

# What a client may send of each; docs/behaviour.md has them in one table.
MAX_MODELS: Final = 32
MAX_MESSAGES: Final = 50_000
MAX_TOOLS: Final = 4096
MAX_PROVIDERS: Final = 256  # in each list of the `provider` object
MAX_OPTIONS_BYTES: Final = 64 * 1024  # of `stream_options`
_RARER: Final = frozenset(
    (
        *("stream_options", "usage", "provider", "tools", "tool_choice", "response_format"),
        *MAXIMA,
        *CHOICES,
    )
)
# Text around the messages, in bytes, that is taken for names and numbers: what is more are tools
# or a schema, which the model reads as it reads the prompt.
PLAIN_BYTES: Final = 512
# What an image or a sound weighs in a prompt, in bytes of text (some 2,000 tokens), unless its own
# text is shorter: the size of its base64 says nothing of its tokens.
MEDIA_BYTES: Final = 8000
_MEDIA: Final = frozenset(("image_url", "input_audio", "video_url"))
_SORTS: Final = frozenset(("price", "latency", "throughput"))
_SPEAKS_WITHOUT_CONTENT: Final = ("tool_calls", "function_call", "refusal", "audio")

_match_price: Final = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?").fullmatch


@dataclass(frozen=True, slots=True)
class ProviderPreferences:
    """The `provider` object. Prices are in USD per million tokens; empty lists count as absent."""

    only: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    order: tuple[str, ...] | None = None
    allow_fallbacks: bool = True
    sort: str | None = None
    max_price_prompt: Decimal | None = None
    max_price_completion: Decimal | None = None
    require_parameters: bool = False


NO_PREFERENCES: Final = ProviderPreferences()


class Terms:
    """What a body says beside its messages, checked. Calls with the same frame share it."""

    candidates: tuple[str, ...]  # slugs, `model` first, then `models`; suffixes included
    requested: tuple[str, ...]  # the first of these, fit for a record
    stream: bool
    given: frozenset[str]  # names of all top-level members that are not null, `messages` too
    # What only some say:
    wants_usage = False  # by `stream_options.include_usage`, or by `usage.include`, which is ours
    provider = NO_PREFERENCES
    needs_tools = False
    json_format: str | None = None  # the type of `response_format`, if it is one of JSON
    max_output: int | None = None  # tokens of one answer: the larger, where two members say it
    choices = 1  # answers that are asked for
    sizes: tuple[tuple[str, int], ...] = ()  # MAXIMA and CHOICES as they were given
    extensions = NO_EXTENSIONS  # beside those in the messages

    def __init__(self, document: JsonObject) -> None:
        self.prepared: list[Any] = []  # what upstream_body.py made of it, for later calls
        self.members: list[Member] = []  # of the body that this was read from
        self.given = frozenset([name for name, value in document.items() if value is not None])
        self.candidates = candidates = _candidates(document)
        self.requested = tuple([clip_text(slug) for slug in candidates[:MAX_REQUESTED]])
        self.stream = document.get("stream") is True
        if not _RARER.isdisjoint(document):
            self._read_rarer(document.get)

    def _read_rarer(self, get: Callable[[str], Any]) -> None:
        asks_upstreams_way = _is_set(get("stream_options"), "include_usage")
        self.wants_usage = asks_upstreams_way or _is_set(get("usage"), "include")
        if (provider := get("provider")) is not None:
            self.provider = _parse_provider(provider)
        self.needs_tools = bool(get("tools"))
        kind = (get("response_format") or _NOTHING).get("type")
        self.json_format = kind if kind in _JSON_FORMATS else None
        sizes = [(name, get(name)) for name in (*MAXIMA, *CHOICES)]
        self.sizes = tuple([(name, size) for name, size in sizes if size is not None])
        self.max_output, self.choices = output_limits(self.sizes)
        self.extensions = find_extensions(get)


def output_limits(
    sizes: Iterable[tuple[str, int]], maxima: Container[str] = MAXIMA
) -> tuple[int | None, int]:
    """Return the tokens that one answer may take, None for no limit, and the number of answers.

    `sizes` are members of a body, and `maxima` the names of those that limit an answer; the others
    are numbers of answers. The larger counts: servers differ in which of two they go by.
    """
    longest, choices = 0, 1
    is_limited = True
    for name, size in sizes:
        if name not in maxima:
            choices = max(choices, size)
        elif size > 0:
            longest = max(longest, size)
        else:  # -1 is "as many as there is room for" to some servers
            is_limited = False
    return (longest if longest and is_limited else None), choices


def _candidates(document: JsonObject) -> tuple[str, ...]:
    """`model`, then `models`, each once."""
    model, models = document.get("model"), document.get("models")
    slugs: list[str] = [] if model is None else [model]
    if models:
        slugs = list(dict.fromkeys([*slugs, *models]))
    return tuple(slugs)


class Call:
    """What a client asked, checked; only read. Made by `parse_call`, and by frames.py."""

    def __init__(
        self,
        terms: Terms,
        messages: object,
        body: bytes,
        raw_messages: bytes | memoryview,
        members: list[Member] | None = None,
    ) -> None:
        """`messages` are `raw_messages`, a part of `body`, parsed. Raises RequestError for them."""
        self.needs_images, self._excess_bytes, self.roles = _check_messages(messages)
        self.terms = terms
        self.body = body  # the client's, as it came
        self.raw_messages = raw_messages
        self._members = members

    @property
    def members(self) -> list[Member]:
        """The top-level members as spans into `body`."""
        if self._members is None:
            self._members = _moved(self.terms.members, len(self.raw_messages))
        return self._members

    @property
    def prompt_bytes(self) -> int:
        """Bytes of text that the model reads: the messages, tools and schemas.

        An image or a sound counts as MEDIA_BYTES at most.
        """
        messages = len(self.raw_messages)
        more = len(self.body) - messages - PLAIN_BYTES
        return messages - self._excess_bytes + (more if more > 0 else 0)

    @property
    def place_without_content(self) -> int | None:
        """That of an assistant's message whose content is null, which only some servers take."""
        return self.roles.get(NO_CONTENT)


def _moved(members: list[Member], messages_bytes: int) -> list[Member]:
    """The same members around messages of another size."""
    span = find_messages(members)
    by = messages_bytes - (span.end - span.value_start)
    place = members.index(span)
    behind = [Member(name, a + by, b + by, c + by) for name, a, b, c in members[place + 1 :]]
    return [*members[:place], span._replace(end=span.end + by), *behind]


def parse_call(body: bytes, known_ends: dict[int, int] = _NO_ENDS) -> Call:
    """Check a body against every rule of the contract; raises RequestError naming the field.

    `known_ends` has the ends of top-level values by their beginnings, where they are known.
    """
    survey = Survey(body)
    while survey.step():
        pass
    check_survey(survey)
    document = _load_object(body)
    members = _find_members(body, document, known_ends, survey)
    return _make_call(body, document, members)


def parse_in_steps(
    body: bytes, survey: Survey, known_ends: dict[int, int]
) -> Generator[None, None, Call]:
    """Do as `parse_call`, for a large body that `survey` has seen: pause where it may take long."""
    document = _load_object(body)
    yield
    members = _find_members(body, document, known_ends, survey)
    yield
    call = _make_call(body, document, members)
    yield  # before a large document is freed
    return call


def check_survey(survey: Survey) -> None:
    """Raise RequestError for a body of too many values."""
    if survey.has_too_many:
        message = f"the body: expected at most {MAX_VALUES} JSON values in all, got more"
        raise RequestError(message, code="invalid_value")


def _make_call(body: bytes, document: JsonObject, members: list[Member]) -> Call:
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
    terms = Terms(document)
    terms.members = members
    return Call(terms, document["messages"], body, raw, members)


def _check_size(param: str, members: list[Member]) -> None:
    """Of a member that is read once more where it is changed."""
    for member in members:
        if member.name == param and (size := member.end - member.value_start) > MAX_OPTIONS_BYTES:
            expected = f"an object of at most {MAX_OPTIONS_BYTES} bytes"
            raise _wrong_value(param, expected, f"one of {size}")


def find_messages(members: list[Member]) -> Member:
    """The messages among the members of a body that was checked."""
    (found,) = [member for member in members if member.name == "messages"]
    return found


def raw_part(body: bytes, start: int, end: int) -> bytes | memoryview:
    """A part of `body`; a large one as a view."""
    return body[start:end] if end - start < LARGE_BYTES else memoryview(body)[start:end]


def _is_set(options: JsonObject | None, name: str) -> bool:
    return options is not None and options.get(name) is True


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
        raise _wrong_type(None, "object", document)
    return document


def _check_names(document: JsonObject) -> None:
    """No name that another server could take for one of ours."""
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
        raise _too_many(None, MAX_MEMBERS, "members", len(document))
    if (longest := max(map(len, document), default=0)) > MAX_NAME_LENGTH:
        raise _too_long(None, "names of members", longest)
    try:
        return find_members(body, list(document), known_ends, survey)
    except RepeatedName as repeated:
        raise _duplicate(repeated.name, repeated.start) from None
    except TangledMembers:
        message = (
            "the body: expected the names of its members on the top level alone, "
            "got them below it again and again"
        )
        raise RequestError(message, code="invalid_value") from None


def _duplicate(name: str, start: int) -> RequestError:
    param = name if is_parameter_name(name) else None
    message = f"{param or 'a name'} is given twice (again at byte {start}): give it once"
    return RequestError(message, code="duplicate_parameter", param=param)


def _fold(name: str) -> str:
    """What `name` is to the most lenient of the servers that ignore case.

    Go folds the long s to s and the Kelvin sign to k, Java both Turkish i's to i. Through upper
    case all of these come out, and whatever `lower` or `casefold` alone would find.
    """
    return name.replace("\u0130", "i").upper().casefold()


def _check_required(document: JsonObject) -> None:
    if document.get("model") is None and not document.get("models"):
        if "model" in document:
            raise _wrong_type("model", "string", None)
        raise _missing("model", "the slug of a model, or a list of them in models")
    if document.get("messages") is None:
        if "messages" in document:
            raise _wrong_type("messages", "array", None)
        raise _missing("messages", "a non-empty array of objects")


# One check for each parameter; null never gets here


def _check_string(param: str, value: object) -> None:
    if type(value) is not str:
        raise _wrong_type(param, "string", value)
    if not value:
        raise _wrong_value(param, "a non-empty string", "an empty one")


def _check_slug(param: str, value: object) -> None:
    _check_string(param, value)
    assert type(value) is str
    if len(value) > MAX_NAME_LENGTH:
        raise _too_long(param, "a name", len(value))


def _check_boolean(param: str, value: object) -> None:
    if type(value) is not bool:
        raise _wrong_type(param, "boolean", value)


def _check_token_count(param: str, value: object) -> None:
    if type(value) is not int:
        raise _wrong_type(param, "integer", value)
    if value < 1 and value != UNLIMITED:
        raise _wrong_value(param, "1 or more", str(value))


def _check_choices(param: str, value: object) -> None:
    if type(value) is not int:
        raise _wrong_type(param, "integer", value)
    if not 1 <= value <= MAX_CHOICES:
        raise _wrong_value(param, f"1 to {MAX_CHOICES}", str(value))


def _check_array(param: str, value: object) -> None:
    if type(value) is not list:
        raise _wrong_type(param, "array", value)


def _check_list(param: str, value: object, most: int, what: str) -> None:
    _check_array(param, value)
    assert type(value) is list
    if len(value) > most:
        raise _too_many(param, most, what, len(value))


def _check_tools(param: str, value: object) -> None:
    _check_list(param, value, MAX_TOOLS, "tools")


def _check_object(param: str, value: object) -> None:
    if type(value) is not dict:
        raise _wrong_type(param, "object", value)


def _check_enum(param: str, value: object, allowed: frozenset[str]) -> None:
    if type(value) is not str:
        raise _wrong_type(param, "string", value)
    if value not in allowed:
        raise _wrong_value(param, _one_of(allowed), "another string")


def _check_word(param: str, value: object, usual: frozenset[str]) -> None:
    """One of the `usual` words, or another that an endpoint may accept: see extensions.py."""
    if type(value) is not str or not is_word(value):
        _check_enum(param, value, usual)


def _number_check(highest: int) -> Callable[[str, object], None]:
    def check(param: str, value: object) -> None:
        if type(value) is not float and type(value) is not int:
            raise _wrong_type(param, "number", value)
        if not 0 <= value <= highest:
            raise _wrong_value(param, f"0 to {highest}", str(value))

    return check


def _flags_check(flag: str) -> Callable[[str, object], None]:
    """For an object of which one member, a boolean, means something to us."""

    def check(param: str, value: object) -> None:
        if type(value) is not dict:
            raise _wrong_type(param, "object", value)
        if value.get(flag) is not None:
            _check_boolean(f"{param}.{flag}", value[flag])

    return check


def _check_tool_choice(param: str, value: object) -> None:
    if type(value) is str:
        _check_word(param, value, TOOL_CHOICES)
    elif type(value) is not dict:
        raise _wrong_type(param, "string or object", value)


def _check_response_format(param: str, value: object) -> None:
    if type(value) is not dict:
        raise _wrong_type(param, "object", value)
    if "type" not in value:
        raise _missing(f"{param}.type", _one_of(RESPONSE_FORMATS))
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
    """Return whether any message holds an image, and how many messages have which role.

    Between these, the bytes of images and sounds beyond MEDIA_BYTES for each. Under NO_CONTENT
    stands the first place of an assistant that said nothing, if there is one. Raises RequestError
    for the first message that is wrong.
    """
    if type(messages) is not list:
        raise _wrong_type("messages", "array", messages)
    if not messages:
        raise _wrong_value("messages", "one message or more", "an empty array")
    if len(messages) > MAX_MESSAGES:
        raise _too_many("messages", MAX_MESSAGES, "messages", len(messages))
    has_images, excess, roles = False, 0, dict[str, int]()
    for index, message in enumerate(messages):
        if type(message) is not dict:
            raise _wrong_type(f"messages[{index}]", "object", message)
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
            raise _wrong_type(f"messages[{index}].content[{place}]", "object", part)
        kind = part.get("type")
        if kind == "image_url":
            has_images = True
        if type(kind) is str and kind in _MEDIA:
            excess += _media_excess(part[kind]) if kind in part else 0
    return has_images, excess


def _media_excess(media: object) -> int:
    """Return by how many bytes the longest text of an image or a sound is over MEDIA_BYTES."""
    # In base64 a character is a byte of the body; other texts (a URL) are short.
    if type(media) is str:
        return max(0, len(media) - MEDIA_BYTES)
    longest = MEDIA_BYTES
    if type(media) is dict:
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
        return _missing(param, _one_of(ROLES))
    if type(message["role"]) is not str:
        return _wrong_type(param, "string", message["role"])
    return _wrong_value(param, _one_of(ROLES), "another string")


def _wrong_content(param: str, message: JsonObject) -> RequestError:
    if "content" not in message:
        return _missing(param, "string or array of parts")
    return _wrong_type(param, "string or array of parts", message["content"])


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
            raise _wrong_value(param, "a number of 0 or more", "a string of another form")
        return Decimal(price)
    if type(price) is not int and type(price) is not float:
        raise _wrong_type(param, "number or string", price)
    if price < 0:
        raise _wrong_value(param, "0 or more", str(price))
    return Decimal(str(price))  # by its shortest text: 0.1 stays 0.1
