"""A chat request's body: its rules, and the body that goes upstream.

Checks the top level, the roles and the shape of contents; what lies deeper is the upstream's to
judge. Which models and providers exist is the router's business, and how large a body may be the
server's. What goes upstream is spliced from the client's bytes, so that every value keeps its
digits and escapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, KeysView
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any, Final

import orjson

from .catalog import NO_ADAPTATION, ROLES, Adaptation
from .errors import RequestError
from .http11_body import LARGE_BYTES, Parts
from .members import Member, model_member, scan_elements, scan_members

JsonObject = dict[str, Any]

_loads: Final = orjson.loads
_dumps: Final = orjson.dumps

_TOOL_CHOICES: Final = frozenset(("auto", "none", "required"))
_RESPONSE_FORMATS: Final = frozenset(("text", "json_object", "json_schema"))
_JSON_FORMATS: Final = frozenset(("json_object", "json_schema"))
_NOTHING: Final[JsonObject] = {}
_BRACKET: Final = 0x5B
_LENGTHS: Final = ("max_completion_tokens", "max_tokens")
_RARER: Final = frozenset(
    ("models", "stream_options", "usage", "provider", "tools", "response_format", *_LENGTHS)
)
_SORTS: Final = frozenset(("price", "latency", "throughput"))
_SPEAKS_WITHOUT_CONTENT: Final = ("tool_calls", "function_call", "refusal", "audio")

_TYPE_NAMES: Final = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}
# Names are told in messages only if they look like a parameter's: a name may be a slipped prompt.
_match_tellable_name: Final = re.compile(r"[a-z_]{1,40}").fullmatch
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


class Call:
    """What a client asked, checked; only read. Made by `parse_call`.

    What few requests need is worked out when it is asked for. `is_canonical` says that the body is
    written as orjson would write it, but perhaps for its messages: no spaces, nothing twice, each
    string in its shortest form.
    """

    candidates: tuple[str, ...]  # slugs, `model` first, then `models`; suffixes included
    stream: bool
    needs_images: bool
    roles: dict[str, int]  # each role of the messages, and the place of the last that has it
    # What only some calls say:
    asks_for_usage = False  # in the stream: by `stream_options.include_usage`, as upstreams know it
    wants_usage = False  # in one way or the other: `usage.include` is ours
    provider = NO_PREFERENCES
    needs_tools = False
    needs_json = False
    max_output: int | None = None  # tokens

    def __init__(
        self,
        document: JsonObject,
        body: bytes,
        members: list[Member] | None,
        prompt_bytes: int | None = None,
    ) -> None:
        self._document = document
        self._members = members
        self._prompt_bytes = prompt_bytes
        self.is_canonical = members is None
        self.body = body  # the client's, as it came
        self.needs_images, self.roles = _check_messages(document["messages"])
        model = document.get("model")
        self.candidates = (model,) if model is not None else ()
        self.stream = document.get("stream") is True
        if not _RARER.isdisjoint(document):
            self._read_rarer(document.get)

    def _read_rarer(self, get: Callable[[str], Any]) -> None:
        if models := get("models"):
            self.candidates = tuple(dict.fromkeys((*self.candidates, *models)))
        self.asks_for_usage = _is_set(get("stream_options"), "include_usage")
        self.wants_usage = self.asks_for_usage or _is_set(get("usage"), "include")
        if (provider := get("provider")) is not None:
            self.provider = _parse_provider(provider)
        self.needs_tools = bool(get("tools"))
        self.needs_json = (get("response_format") or _NOTHING).get("type") in _JSON_FORMATS
        self.max_output = get("max_completion_tokens") or get("max_tokens")

    @property
    def members(self) -> list[Member]:
        """The top-level members as spans into `body`."""
        if self._members is None:
            self._members = scan_members(self.body)
        return self._members

    @property
    def parameters(self) -> frozenset[str]:
        """Names of all top-level members that are not null."""
        return frozenset([name for name, value in self._document.items() if value is not None])

    @property
    def prompt_bytes(self) -> int:
        """Size of the raw `messages` value; measured once."""
        if self._prompt_bytes is None:
            (member,) = (member for member in self.members if member.name == "messages")
            self._prompt_bytes = member.end - member.value_start
        return self._prompt_bytes

    def model_place(self) -> int:
        """Where the member `model` begins in a canonical body that has one."""
        body, model = self.body, model_member(self.candidates[0])
        if body[1 : len(model) + 1] == model:
            return 1
        # By the length of what stands on that side of it where the messages do not.
        before, after = _around(self._document, "model")
        if "messages" in before:
            return len(body) - len(model) - (len(orjson.dumps(after)) if after else 1)
        return len(orjson.dumps(before))

    @property
    def names(self) -> KeysView[str]:
        """Of all top-level members, in order."""
        return self._document.keys()

    def is_given(self, name: str) -> bool:
        """Whether the body has this top-level member with a value."""
        return self._document.get(name) is not None


def parse_call(body: bytes) -> Call:
    """Check a body against every rule of the contract; raises RequestError naming the field."""
    document = _load_object(body)
    members, prompt_bytes = None, _canonical_prompt(document, body)
    if prompt_bytes is None:
        members = scan_members(body)
        if len(members) != len(document):
            raise _duplicate(members)
    if not document.keys() <= _PARAMETERS:
        _check_names(document)
    _check_required(document)
    for name, value in document.items():
        if value is not None and (check := _CHECKS.get(name)):
            check(name, value)
    return Call(document, body, members, prompt_bytes)


def _canonical_prompt(document: JsonObject, body: bytes) -> int | None:
    """Bytes of the messages if `body` is what orjson writes for it, as most clients' bodies are.

    A name given twice would be missing from what is written anew, so this is the quickest proof
    that there is none. Most prompts need not be written for it: between canonical parts before and
    behind there is one value if it opens with "[" and its only "]" is its last byte, for that one
    closes the messages, and the part behind them closes nothing but the document.
    """
    before, after = _around(document, "messages")
    try:
        head = _dumps(before)[:-1] + (b',"messages":' if before else b'"messages":')
        tail = b"," + _dumps(after)[1:] if after else b"}"
        start, end = len(head), len(body) - len(tail)
        if end < start or body[:start] != head or body[end:] != tail:
            return None
        is_left_alone = body[start] == _BRACKET and body.find(b"]", start, end) == end - 1
        return end - start if is_left_alone or _dumps(document) == body else None
    except orjson.JSONEncodeError:  # it reads deeper nesting than it writes
        return None


def _around(document: JsonObject, name: str) -> tuple[JsonObject, JsonObject]:
    """The members before the one of that name, and those behind it."""
    before: JsonObject = {}
    after: JsonObject = {}
    part = before
    for each, value in document.items():
        if each == name:
            part = after
        else:
            part[each] = value
    return before, after


def _is_set(options: JsonObject | None, name: str) -> bool:
    return options is not None and options.get(name) is True


# Refusals: the field, what was expected and what came; of values only types and numbers


def _wrong_type(param: str | None, expected: str, value: object) -> RequestError:
    message = f"{param or 'the body'}: expected {expected}, got {_TYPE_NAMES[type(value)]}"
    return RequestError(message, code="invalid_type", param=param)


def _wrong_value(param: str, expected: str, got: str) -> RequestError:
    message = f"{param}: expected {expected}, got {got}"
    return RequestError(message, code="invalid_value", param=param)


def _missing(param: str, expected: str) -> RequestError:
    message = f"{param} is missing: expected {expected}"
    return RequestError(message, code="missing_required_parameter", param=param)


def _one_of(allowed: frozenset[str]) -> str:
    return "one of " + ", ".join(sorted(allowed))


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
        if name in _PARAMETERS or (name.isascii() and name.islower()):
            continue
        folded = _fold(name)
        if folded in _PARAMETERS:
            message = f"{folded} is given in another spelling: write it in lower case"
            raise RequestError(message, code="duplicate_parameter", param=name)


def _duplicate(members: list[Member]) -> RequestError:
    seen: set[str] = set()
    for member in members:
        if member.name in seen:
            break
        seen.add(member.name)
    param = member.name if _match_tellable_name(member.name) else None
    message = f"{param or 'a name'} is given twice (again at byte {member.start}): give it once"
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


def _check_boolean(param: str, value: object) -> None:
    if type(value) is not bool:
        raise _wrong_type(param, "boolean", value)


def _check_token_count(param: str, value: object) -> None:
    if type(value) is not int:
        raise _wrong_type(param, "integer", value)
    if value < 1:
        raise _wrong_value(param, "1 or more", str(value))


def _check_array(param: str, value: object) -> None:
    if type(value) is not list:
        raise _wrong_type(param, "array", value)


def _check_object(param: str, value: object) -> None:
    if type(value) is not dict:
        raise _wrong_type(param, "object", value)


def _check_enum(param: str, value: object, allowed: frozenset[str]) -> None:
    if type(value) is not str:
        raise _wrong_type(param, "string", value)
    if value not in allowed:
        raise _wrong_value(param, _one_of(allowed), "another string")


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
        _check_enum(param, value, _TOOL_CHOICES)
    elif type(value) is not dict:
        raise _wrong_type(param, "string or object", value)


def _check_response_format(param: str, value: object) -> None:
    if type(value) is not dict:
        raise _wrong_type(param, "object", value)
    if "type" not in value:
        raise _missing(f"{param}.type", _one_of(_RESPONSE_FORMATS))
    _check_enum(f"{param}.type", value["type"], _RESPONSE_FORMATS)


def _check_models(param: str, value: object) -> None:
    if type(value) is not list:
        raise _wrong_type(param, "array", value)
    for index, slug in enumerate(value):
        _check_string(f"{param}[{index}]", slug)


# Messages are checked last, while the call is made: their images are found on the way.
_CHECKS: Final[dict[str, Callable[[str, object], None]]] = {
    "model": _check_string,
    "stream": _check_boolean,
    "temperature": _number_check(2),
    "top_p": _number_check(1),
    "max_tokens": _check_token_count,
    "max_completion_tokens": _check_token_count,
    "tools": _check_array,
    "tool_choice": _check_tool_choice,
    "response_format": _check_response_format,
    "stream_options": _flags_check("include_usage"),
    "usage": _flags_check("include"),
    "models": _check_models,
    "provider": _check_object,
}
_PARAMETERS: Final = frozenset((*_CHECKS, "messages"))


# Messages


def _check_messages(messages: object) -> tuple[bool, dict[str, int]]:
    """Whether any message holds an image, and the roles with the last place of each.

    Raises RequestError for the first message that is wrong.
    """
    if type(messages) is not list:
        raise _wrong_type("messages", "array", messages)
    if not messages:
        raise _wrong_value("messages", "one message or more", "an empty array")
    has_images, roles = False, dict[str, int]()
    for index, message in enumerate(messages):
        if type(message) is not dict:
            raise _wrong_type(f"messages[{index}]", "object", message)
        role = message.get("role")
        if type(role) is not str or role not in ROLES:
            raise _wrong_role(f"messages[{index}].role", message)
        roles[role] = index
        content = message.get("content")
        if type(content) is list:
            has_images = _check_parts(index, content) or has_images
        elif type(content) is not str and not _speaks_without_content(message):
            raise _wrong_content(f"messages[{index}].content", message)
    return has_images, roles


def _check_parts(index: int, parts: list[Any]) -> bool:
    """Whether any part is an image."""
    has_images = False
    for place, part in enumerate(parts):
        if type(part) is not dict:
            raise _wrong_type(f"messages[{index}].content[{place}]", "object", part)
        if part.get("type") == "image_url":
            has_images = True
    return has_images


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
    _check_array(f"provider.{field}", names)
    for index, name in enumerate(names):
        _check_string(f"provider.{field}[{index}]", name)
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


# The body that goes upstream


_NO_OPTIONS: Final[frozenset[str]] = frozenset()
_STREAM_OPTIONS: Final = frozenset(("stream_options",))
_INCLUDE_USAGE: Final = b',"stream_options":{"include_usage":true}}'
# Members whose bytes may have to change beside the model's.
_SPECIAL: Final = frozenset(("models", "provider", "usage", "stream_options"))
_SPECIAL_BUT_OPTIONS: Final = _SPECIAL - {"stream_options"}

# What becomes of one member: its new `"name":` and its new raw value, None where the client's
# bytes stay. None for the whole takes the member out.
_Change = tuple[bytes | None, bytes | None] | None


def serialize_upstream_body(
    call: Call,
    upstream_model: str,
    *,
    stream_options: bool,
    adaptation: Adaptation = NO_ADAPTATION,
    without: frozenset[str] = frozenset(),
) -> Parts:
    """The client's body with our few changes; all other members keep their bytes and order.

    `stream_options` says whether the endpoint understands that member, `adaptation` how it wants
    its bodies. A renamed member keeps its place and value; where the client gave the new name a
    value too, that one stands and the renamed member is taken out. Of the options we would put in,
    those in `without`, which the endpoint has refused, go up only as the client sent them.

    In one part, at the cost of a copy of the body, and up to two of the messages where roles are
    changed. Where next to nothing changes, those of a large body are views into the client's.
    """
    if adaptation is NO_ADAPTATION and not without:
        spliced = _splice_plain(call, upstream_model, stream_options)
        if spliced is not None:
            return spliced
    changes = _changes(call, upstream_model, stream_options, without)
    if adaptation is not NO_ADAPTATION:
        _adapt(changes, call, adaptation, without)
    view = memoryview(call.body)
    parts: Parts = []
    for name, start, value_start, end in call.members:
        if name not in changes:
            parts += (b",", view[start:end])
        elif (change := changes.pop(name)) is not None:
            head, value = change
            parts += (b",", head or view[start:value_start], value or view[value_start:end])
    for name, change in changes.items():  # what the client's body had no place for
        if change is not None and change[1] is not None:
            parts += (b",", _head(name), change[1])
    parts[0] = b"{"  # for the first comma
    parts.append(b"}")
    return [b"".join(parts)]


def _splice_plain(call: Call, upstream_model: str, stream_options: bool) -> Parts | None:
    """The same for nearly every body, without a scan; None for the others."""
    body = call.body
    if not call.is_canonical:
        return None
    asks_for_usage = call.asks_for_usage and stream_options
    special = _SPECIAL_BUT_OPTIONS if asks_for_usage else _SPECIAL
    if not special.isdisjoint(call.names):
        return None
    model, start = model_member(call.candidates[0]), call.model_place()
    name, rest = model_member(upstream_model), start + len(model)
    end, options = len(body), b""
    if call.stream and stream_options and not asks_for_usage:
        end, options = end - 1, _INCLUDE_USAGE
    if end > LARGE_BYTES:
        view = memoryview(body)
        return [view[:start], name, view[rest:end], options]
    return [b"".join((body[:start], name, body[rest:end], options))]


def injected_options(call: Call, adaptation: Adaptation, *, stream_options: bool) -> frozenset[str]:
    """The members that we put into the body and the client did not send.

    A renamed one is not among them: its value is the client's, and an upstream that names it may
    well complain of that.
    """
    names = _NO_OPTIONS
    if stream_options and call.stream and not call.is_given("stream_options"):
        names = _STREAM_OPTIONS
    if adaptation.set:
        names |= {name for name, _ in adaptation.set if not call.is_given(name)}
    return names


def named_option(message_text: str, injected: frozenset[str]) -> str | None:
    """Which of the `injected` options an upstream's refusal names, the first if several.

    The text may be a message, a `param` or a whole body. It may also quote the prompt, and so name
    what was not refused: only a second try that succeeds without the option proves it.
    """
    places = {}
    for name in injected:
        if found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message_text):
            places[name] = found.start()
    return min(places, key=places.__getitem__, default=None)


def _changes(
    call: Call, upstream_model: str, stream_options: bool, without: frozenset[str]
) -> dict[str, _Change]:
    changes: dict[str, _Change] = {
        "model": (None, orjson.dumps(upstream_model)),
        "models": None,
        "provider": None,
        "usage": None,
    }
    if not stream_options:
        changes["stream_options"] = None
    elif "stream_options" in without:
        _leave_to_client(changes, call, "stream_options")
    elif call.stream:
        options = _stream_options(call)
        if options.get("include_usage") is not True:
            value = orjson.dumps({**options, "include_usage": True})
            changes["stream_options"] = (None, value)
    return changes


def _stream_options(call: Call) -> JsonObject:
    for member in call.members:
        if member.name == "stream_options":
            return orjson.loads(call.body[member.value_start : member.end]) or {}
    return {}


def _adapt(
    changes: dict[str, _Change], call: Call, adaptation: Adaptation, without: frozenset[str]
) -> None:
    for old, new in adaptation.rename:
        if call.is_given(old) and not call.is_given(new):
            changes[new] = None  # a null, if anything
            changes[old] = (_head(new), None)
        else:
            changes[old] = None
    for name in adaptation.drop:
        changes[name] = None
    for name, value in adaptation.set:
        if name in without:
            _leave_to_client(changes, call, name)
        else:
            changes[name] = (None, value)
    places = [call.roles[role] for role, _ in adaptation.roles if role in call.roles]
    if places:
        changes["messages"] = (None, _adapt_roles(call, dict(adaptation.roles), max(places)))


def _leave_to_client(changes: dict[str, _Change], call: Call, name: str) -> None:
    if not call.is_given(name):  # a null is as good as absent, but not to who forbids the name
        changes[name] = None


def _head(name: str) -> bytes:
    return orjson.dumps(name) + b":"


def _adapt_roles(call: Call, roles: dict[str, str], last: int) -> bytes:
    """The messages with other roles up to the `last`; all else in them keeps its bytes."""
    (messages,) = (member for member in call.members if member.name == "messages")
    view = memoryview(call.body)
    parts: list[bytes | memoryview] = []
    sent = messages.value_start
    # To read all of a prompt again would cost twice its parse; a developer's message stands first.
    for start, end in islice(scan_elements(call.body, messages.value_start), last + 1):
        message = call.body[start:end]
        for member in scan_members(message):
            if member.name != "role":
                continue
            role = orjson.loads(message[member.value_start : member.end])
            if type(role) is str and role in roles:
                parts += (view[sent : start + member.value_start], orjson.dumps(roles[role]))
                sent = start + member.end
    parts.append(view[sent : messages.end])
    return b"".join(parts)
