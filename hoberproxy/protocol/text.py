"""Text of clients and upstreams made fit for records, logs and messages: bounded, printable."""

from __future__ import annotations

import re
from typing import Final

_match_plain_name: Final = re.compile(r"[a-z_]{1,40}").fullmatch

# One entry a byte. The backslash is escaped too, so that "\x0a" in the text is not taken for ours.
_ESCAPED: Final = tuple(
    chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}" for byte in range(256)
)


def clip_text(text: str, limit: int = 128) -> str:
    """Return at most `limit` characters of an upstream's `text`, fit for any encoding."""
    if text.isascii():
        return text[:limit]
    # A JSON escape can smuggle in half a surrogate pair, which no UTF-8 writer takes.
    return text[:limit].encode("utf-8", "replace").decode("utf-8")


def escape_client_text(raw: bytes, limit_bytes: int = 128) -> str:
    """Return a client's header value as printable ASCII, with other bytes as `\\xNN`.

    The text has at most `limit_bytes` and is never cut inside an escape.
    """
    pieces: list[str] = []
    room = limit_bytes
    for byte in raw[:limit_bytes]:  # a byte gives a character at least
        piece = _ESCAPED[byte]
        room -= len(piece)
        if room < 0:
            break
        pieces.append(piece)
    return "".join(pieces)


def is_parameter_name(name: str) -> bool:
    """Return whether `name` is written as parameters are; any other may be a slipped prompt."""
    return _match_plain_name(name) is not None
