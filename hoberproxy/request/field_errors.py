"""The errors of a wrong request: they name the field, what was expected and what came.

Of values they say only types and numbers: a value may be a slipped prompt.
"""

from __future__ import annotations

from typing import Final

from ..errors import RequestError

MAX_NAME_LENGTH: Final = 512  # characters of a slug, a provider's name or a member's
_TYPE_NAMES: Final = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}


def wrong_type(param: str | None, expected: str, value: object) -> RequestError:
    """Return the error for a `value` of another type than `expected`; `param` None is the body."""
    message = f"{param or 'the body'}: expected {expected}, got {_TYPE_NAMES[type(value)]}"
    return RequestError(message, code="invalid_type", param=param)


def wrong_value(param: str, expected: str, got: str) -> RequestError:
    """Return the error for a value that `got` describes where another was `expected`."""
    message = f"{param}: expected {expected}, got {got}"
    return RequestError(message, code="invalid_value", param=param)


def missing(param: str, expected: str) -> RequestError:
    """Return the error for a body without `param`."""
    message = f"{param} is missing: expected {expected}"
    return RequestError(message, code="missing_required_parameter", param=param)


def too_many(param: str | None, most: int, what: str, got: int) -> RequestError:
    """Return the error for more than `most` elements, which `what` names."""
    message = f"{param or 'the body'}: expected at most {most} {what}, got {got}"
    return RequestError(message, code="invalid_value", param=param)


def too_long(param: str | None, what: str, got: int) -> RequestError:
    """Return the error for a name of `got` characters, which `what` names."""
    message = (
        f"{param or 'the body'}: expected {what} of at most {MAX_NAME_LENGTH} characters, got {got}"
    )
    return RequestError(message, code="invalid_value", param=param)


def one_of(allowed: frozenset[str]) -> str:
    """Return the words for any of `allowed`."""
    return "one of " + ", ".join(sorted(allowed))
