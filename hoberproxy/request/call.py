"""A chat request as values: its body, and the terms that stand around the messages in it.

Leaves the rules of a body to request/checks.py, and what goes upstream to upstream/body.py. What
stands around the messages is mostly the same in all requests of an app: request/parse_cache.py
keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from ..protocol.http_body import LARGE_BYTES
from ..protocol.json_bytes import Member
from ..protocol.text import clip_text
from .extensions import NO_CONTENT, NO_EXTENSIONS, find_extensions

JsonObject = dict[str, Any]

_JSON_FORMATS: Final = frozenset(("json_object", "json_schema"))
_NOTHING: Final[JsonObject] = {}
ROLES: Final = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
MAX_REQUESTED: Final = 16  # slugs in a record
MAXIMA: Final = ("max_completion_tokens", "max_tokens")  # of one answer, in tokens
CHOICES: Final = ("n", "best_of")  # how many answers are written
# Text around the messages, in bytes, that is taken for names and numbers: what is more are tools
# or a schema, which the model reads as it reads the prompt.
PLAIN_BYTES: Final = 512
_RARER: Final = frozenset(
    ("stream_options", "usage", "tools", "tool_choice", "response_format", *MAXIMA, *CHOICES)
)


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
    """The checked content of a body without its messages; calls may share it (parse_cache.py)."""

    candidates: tuple[str, ...]  # slugs, `model` first, then `models`; suffixes included
    requested: tuple[str, ...]  # the first of these, fit for a record
    stream: bool
    provider: ProviderPreferences
    given: frozenset[str]  # names of all top-level members that are not null, `messages` too
    # What only some bodies say:
    wants_usage = False  # by `stream_options.include_usage`, or by `usage.include`, which is ours
    needs_tools = False
    json_format: str | None = None  # the type of `response_format`, if it is one of JSON
    max_output: int | None = None  # tokens of one answer: the larger, where two members say it
    choices = 1  # answers that the client wants
    sizes: tuple[tuple[str, int], ...] = ()  # MAXIMA and CHOICES as they were given
    extensions = NO_EXTENSIONS  # beside those in the messages

    def __init__(self, document: JsonObject, provider: ProviderPreferences) -> None:
        """Read a checked `document`; `provider` is made of its member of this name."""
        self.prepared: list[Any] = []  # by upstream/body.py, for later calls
        self.members: list[Member] = []  # of the body that these terms were read from
        self.given = frozenset([name for name, value in document.items() if value is not None])
        self.candidates = candidates = _candidates(document)
        self.requested = tuple([clip_text(slug) for slug in candidates[:MAX_REQUESTED]])
        self.stream = document.get("stream") is True
        self.provider = provider
        if not _RARER.isdisjoint(document):
            self._read_rarer(document.get)

    def _read_rarer(self, get: Callable[[str], Any]) -> None:
        asks_upstreams_way = _is_set(get("stream_options"), "include_usage")
        self.wants_usage = asks_upstreams_way or _is_set(get("usage"), "include")
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
    """Return `model`, then `models`, each slug once."""
    model, models = document.get("model"), document.get("models")
    slugs: list[str] = [] if model is None else [model]
    if models:
        slugs = list(dict.fromkeys([*slugs, *models]))
    return tuple(slugs)


def _is_set(options: JsonObject | None, name: str) -> bool:
    return options is not None and options.get(name) is True


class Call:
    """A client's request, checked and never changed; request/checks.py makes it."""

    def __init__(
        self,
        terms: Terms,
        body: bytes,
        raw_messages: bytes | memoryview,
        members: list[Member] | None,
        needs_images: bool,
        excess_bytes: int,
        roles: dict[str, int],
    ) -> None:
        self.terms = terms
        self.body = body  # the client's, as it came
        self.raw_messages = raw_messages  # a part of `body`
        self._members = members  # None: those of `terms`, around messages of another size
        self.needs_images = needs_images
        self._excess_bytes = excess_bytes  # of images and sounds, beyond MEDIA_BYTES for each
        self.roles = roles  # messages by role; and under NO_CONTENT, see below

    @property
    def members(self) -> list[Member]:
        """Return the top-level members as spans into `body`."""
        if self._members is None:
            self._members = _moved(self.terms.members, len(self.raw_messages))
        return self._members

    @property
    def prompt_bytes(self) -> int:
        """Return the bytes of text that the model reads: messages, tools and schemas.

        An image or a sound counts as MEDIA_BYTES at most.
        """
        messages = len(self.raw_messages)
        more = len(self.body) - messages - PLAIN_BYTES
        return messages - self._excess_bytes + (more if more > 0 else 0)

    @property
    def place_without_content(self) -> int | None:
        """Return the place of the first message of an assistant that has no content, or None."""
        return self.roles.get(NO_CONTENT)


def _moved(members: list[Member], messages_bytes: int) -> list[Member]:
    """Return `members` around messages of another size."""
    span = find_messages(members)
    by = messages_bytes - (span.end - span.value_start)
    place = members.index(span)
    behind = [Member(name, a + by, b + by, c + by) for name, a, b, c in members[place + 1 :]]
    return [*members[:place], span._replace(end=span.end + by), *behind]


def find_messages(members: list[Member]) -> Member:
    """Return the messages among the `members` of a checked body."""
    (found,) = [member for member in members if member.name == "messages"]
    return found


def raw_part(body: bytes, start: int, end: int) -> bytes | memoryview:
    """Return the part of `body` from `start` to `end`; a large one as a view."""
    return body[start:end] if end - start < LARGE_BYTES else memoryview(body)[start:end]
