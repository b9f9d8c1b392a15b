"""JSON as model servers write it, which is at times more than orjson takes.

Servers that cut text into tokens send half an emoji as a lone surrogate ("\\ud83d"), and some send
NaN among the logprobs. The SDKs read both, so we must. Requests are held to the strict form.
"""

from __future__ import annotations

import json
from typing import Any

import orjson


def load_json(data: bytes) -> Any:
    """The value of `data`. Raises ValueError, without the data, if it is not JSON at all."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("expected JSON, got something else or a part of it") from None


def dump_json(value: Any) -> bytes:
    """`value` as JSON; lone surrogates stay what they were."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(value, separators=(",", ":")).encode()
