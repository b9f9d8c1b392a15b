"""Makes the body that goes upstream: the client's bytes, with the proxy's few changes.

It is spliced, so that every value keeps its digits and escapes. What stands around the messages is
prepared once for each template of the parse cache and kept with its `Terms`; a further body costs a
copy of its messages.
"""

from __future__ import annotations

import re
from typing import Final

import orjson

from ..errors import RequestError
from ..protocol.http_body import Parts
from ..protocol.json_bytes import scan_elements, scan_members
from ..request.call import Call, JsonObject, Terms
from ..routing.catalog import NO_ADAPTATION, Adaptation

_NO_OPTIONS: Final[frozenset[str]] = frozenset()
_STREAM_OPTIONS: Final = frozenset(("stream_options",))
_MOST_KEPT: Final = 8  # bodies prepared of one template: as many as endpoints that take turns

_READ_BYTES: Final = 16 * 1024  # messages that are read one by one without more ado
_MANY_ROLES: Final = 16
_MOST_READ_BYTES: Final = 1024 * 1024  # … and at all, which may take ten times a parse
_ROLE: Final = b'"role"'
_ROLE_VALUE: Final = rb'[ \t\n\r]*+:[ \t\n\r]*+("(?:%b)")'
_BACKSLASH: Final = 0x5C
_HIDING: Final = (b"u006", b"u007")  # of an escaped letter

# What becomes of one member: its new `"name":` and its new raw value, None where the client's
# bytes stay. None for the whole takes the member out.
_Change = tuple[bytes | None, bytes | None] | None


class _Prepared:
    """The bytes before and after the messages of an upstream body, and the rules they follow.

    `injected` are the names of members that are the proxy's and not the client's.
    """

    __slots__ = (
        "adaptation",
        "after",
        "before",
        "injected",
        "model",
        "stream_options",
        "without",
    )

    def __init__(
        self,
        model: str,
        stream_options: bool,
        adaptation: Adaptation,
        without: frozenset[str],
        before: bytes,
        after: bytes,
        injected: frozenset[str],
    ) -> None:
        self.model = model
        self.stream_options = stream_options
        self.adaptation = adaptation
        self.without = without
        self.before = before
        self.after = after
        self.injected = injected


def make_upstream_body(
    call: Call,
    upstream_model: str,
    *,
    stream_options: bool,
    adaptation: Adaptation = NO_ADAPTATION,
    without: frozenset[str] = _NO_OPTIONS,
) -> tuple[Parts, frozenset[str]]:
    """Return the body of `call` for an endpoint, and the names of the members injected into it.

    `stream_options` says whether the endpoint understands that member, `adaptation` how it wants
    its bodies; all other members keep their bytes and order. A renamed member keeps its place and
    value; where the client gave the new name a value too, that value stands and the renamed member
    is taken out. Options in `without`, which the endpoint has refused, go up only as the client
    sent them.

    A large body's messages are a view into the client's, unless roles are changed in them.
    """
    prepared: list[_Prepared] = call.terms.prepared
    for known in prepared:
        # The very same objects, as most of the time: to compare their contents would cost more.
        if (
            known.model == upstream_model
            and known.stream_options is stream_options
            and known.adaptation is adaptation
            and known.without is without
        ):
            found = known
            break
    else:
        found = _prepare(call, upstream_model, stream_options, adaptation, without)
        if len(prepared) >= _MOST_KEPT:
            prepared.clear()
        prepared.append(found)
    messages = call.raw_messages
    if adaptation.roles:
        roles = {old: new for old, new in adaptation.roles if old in call.roles}
        if roles:
            messages = _adapt_roles(call, roles)
    return [found.before, messages, found.after], found.injected


def _prepare(
    call: Call,
    model: str,
    stream_options: bool,
    adaptation: Adaptation,
    without: frozenset[str],
) -> _Prepared:
    changes = _changes(call, model, stream_options, without)
    if adaptation is not NO_ADAPTATION:
        _adapt(changes, call, adaptation, without)
    view = memoryview(call.body)
    before: Parts = []
    after: Parts = []
    parts = before
    for name, start, value_start, end in call.members:
        if name == "messages":
            parts += (b",", view[start:value_start])
            parts = after
        elif name not in changes:
            parts += (b",", view[start:end])
        elif (change := changes.pop(name)) is not None:
            head, value = change
            parts += (b",", head or view[start:value_start], value or view[value_start:end])
    for name, change in changes.items():  # what the client's body had no place for
        if change is not None and change[1] is not None:
            after += (b",", _head(name), change[1])
    before[0] = b"{"  # for the first comma
    after.append(b"}")
    injected = _injected(call.terms, adaptation, stream_options) - without
    return _Prepared(
        model,
        stream_options,
        adaptation,
        without,
        b"".join(before),
        b"".join(after),
        injected,
    )


def _injected(terms: Terms, adaptation: Adaptation, stream_options: bool) -> frozenset[str]:
    """Return the names of the members that the proxy puts in and the client did not send.

    A renamed member is not among them: its value is the client's, and an upstream that names it may
    well complain of that value.
    """
    names = _NO_OPTIONS
    if stream_options and terms.stream and "stream_options" not in terms.given:
        names = _STREAM_OPTIONS
    if adaptation.set:
        names |= {name for name, _ in adaptation.set if name not in terms.given}
    return names


def named_option(message_text: str, injected: frozenset[str]) -> str | None:
    """Return the first of the `injected` options that `message_text` names, None if it names none.

    The text may be a message, a `param` or a whole error response. It may also quote the prompt,
    and so name what was not refused: only a second try that succeeds without the option proves it.
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
    elif call.terms.stream:
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
        if old in call.terms.given and new not in call.terms.given:
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


def _leave_to_client(changes: dict[str, _Change], call: Call, name: str) -> None:
    if name not in call.terms.given:  # a null, which an endpoint that forbids the name refuses too
        changes[name] = None


def _head(name: str) -> bytes:
    return orjson.dumps(name) + b":"


def _adapt_roles(call: Call, roles: dict[str, str]) -> bytes:
    """Return the messages with other roles; all else in them keeps its bytes.

    A short text is read message by message, and only up to the last role: a developer's message
    stands first. In a long one the members are searched for: if there are as many as messages have
    these roles, and none is hidden by escapes, none of them lies deeper.
    """
    raw = bytes(call.raw_messages)
    wanted = sum([call.roles[role] for role in roles])
    if len(raw) <= _READ_BYTES:
        return _replaced(raw, _read_roles(raw, roles, wanted), roles)
    if not any(escape in raw for escape in _HIDING):
        if wanted > _MANY_ROLES and len(roles) == 1:  # at once, if they are written in one way
            ((old, new),) = roles.items()
            member = b'%b:"%b"' % (_ROLE, old.encode())
            if raw.count(member) == wanted and b"\\" + _ROLE not in raw:
                return raw.replace(member, b'%b:"%b"' % (_ROLE, new.encode()))
        found = _find_roles(raw, roles)
        if len(found) == wanted:
            return _replaced(raw, found, roles)
    if len(raw) <= _MOST_READ_BYTES:
        return _replaced(raw, _read_roles(raw, roles, wanted), roles)
    message = (
        "messages: expected roles of messages alone, without escapes, in a body of this size, "
        "got members called role that cannot be told from them"
    )
    raise RequestError(message, code="invalid_value", param="messages")


def _replaced(raw: bytes, spans: list[tuple[int, int, str]], roles: dict[str, str]) -> bytes:
    view = memoryview(raw)
    parts: list[bytes | memoryview] = []
    sent = 0
    for start, end, role in spans:
        parts += (view[sent:start], orjson.dumps(roles[role]))
        sent = end
    parts.append(view[sent:])
    return b"".join(parts)


def _find_roles(raw: bytes, roles: dict[str, str]) -> list[tuple[int, int, str]]:
    """Return the spans of unescaped members called role with one of `roles`, at any depth."""
    names = "|".join(map(re.escape, roles)).encode()
    match_value = re.compile(_ROLE_VALUE % names).match
    spans: list[tuple[int, int, str]] = []
    place = raw.find(_ROLE)
    while place >= 0:
        found = match_value(raw, place + len(_ROLE))
        if found and raw[place - 1] != _BACKSLASH:  # else the quote is one in a string
            spans.append((found.start(1), found.end(1), found[1][1:-1].decode()))
        place = raw.find(_ROLE, place + len(_ROLE))
    return spans


def _read_roles(raw: bytes, roles: dict[str, str], wanted: int) -> list[tuple[int, int, str]]:
    spans: list[tuple[int, int, str]] = []
    for start, end in scan_elements(raw, 0):
        message = raw[start:end]
        last: tuple[int, int, str] | None = None
        for member in scan_members(message):
            if member.name == "role":
                role = orjson.loads(message[member.value_start : member.end])
                is_wanted = type(role) is str and role in roles
                span = start + member.value_start, start + member.end, role
                last = span if is_wanted else None
                if is_wanted:
                    spans.append(span)
        wanted -= last is not None
        if not wanted:
            break
    return spans
