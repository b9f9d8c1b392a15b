"""Extensions: values beyond the contract's that some servers take.

An extension is written as the member and its value, `tool_choice=any`. Endpoints say which they
accept (`Abilities.accepts`); the router lets a request go to no other. Whether a value has the form
of an extension is checked with the rest of the body, in request/checks.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..errors import RequestError
from .field_errors import one_of, wrong_type, wrong_value

TOOL_CHOICES: Final = frozenset(("auto", "none", "required"))
RESPONSE_FORMATS: Final = frozenset(("text", "json_object", "json_schema"))
UNLIMITED: Final = -1  # llama.cpp's and Ollama's "until the context is full"
NO_CONTENT: Final = "content=null"  # of an assistant that said nothing
NO_EXTENSIONS: Final[frozenset[str]] = frozenset()

_LENGTHS: Final = ("max_tokens", "max_completion_tokens")
_match_word: Final = re.compile(r"[A-Za-z_]{1,40}").fullmatch
_match_extension: Final = re.compile(
    r"(?:tool_choice|response_format)=[A-Za-z_]{1,40}|max_(?:completion_)?tokens=-1|content=null"
).fullmatch


def is_word(text: str) -> bool:
    """Return whether `text` may be the name of a choice or format that some server has."""
    return _match_word(text) is not None


def is_extension(text: str) -> bool:
    """Return whether `text` is an extension's name, as a config may list it."""
    return _match_extension(text) is not None


def find_extensions(get: Callable[[str], Any]) -> frozenset[str]:
    """Return the extensions that a body uses beside its messages; `get` reads a checked member."""
    found = []
    choice, wanted = get("tool_choice"), get("response_format")
    if type(choice) is str and choice not in TOOL_CHOICES:
        found.append(f"tool_choice={choice}")
    if wanted is not None and wanted["type"] not in RESPONSE_FORMATS:
        found.append(f"response_format={wanted['type']}")
    for name in _LENGTHS:
        if get(name) == UNLIMITED:
            found.append(f"{name}={UNLIMITED}")
    return frozenset(found) if found else NO_EXTENSIONS


def param_of(extension: str, place: int | None = None) -> str:
    """Return the field that uses `extension`; `place` is that of a message without content."""
    name = extension.partition("=")[0]
    if name == "content":
        return "messages" if place is None else f"messages[{place}].content"
    return "response_format.type" if name == "response_format" else name


def check_accepted(
    extensions: Sequence[str],
    place: int | None,
    is_accepted: Callable[[str], bool],
    filters: set[str],
) -> None:
    """Raise RequestError for the first of `extensions` that kept a call from every endpoint.

    Either none of the catalog's accepts it, or nothing but extensions is among the `filters` that
    removed the endpoints of the models asked for. `place` is that of a message without content.
    """
    for extension in extensions:
        if not is_accepted(extension) or (extension in filters and filters.issubset(extensions)):
            raise _refused(extension, place)


def _refused(extension: str, place: int | None) -> RequestError:
    """Return the error for `extension`: the contract's value was expected."""
    param, name = param_of(extension, place), extension.partition("=")[0]
    if name == "content":
        return wrong_type(param, "string or array of parts", None)
    if name in _LENGTHS:
        expected, got = "1 or more", str(UNLIMITED)
    else:
        allowed = TOOL_CHOICES if name == "tool_choice" else RESPONSE_FORMATS
        expected, got = one_of(allowed), "another string"
    return wrong_value(param, expected, f"{got}, which no endpoint of this model accepts")
