"""Whether an upstream's text speaks of our account with it, or holds a part of our key.

Such a text is no business of the client: its request was right. Whoever asks decides what follows.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from itertools import islice
from typing import Final
from urllib.parse import unquote

from .catalog import Provider

PIECE: Final = 8  # characters of a key that identify it
_LONG_PIECE: Final = 12  # the same of a key that may be made of words
_SHORT_KEY: Final = 4  # below, what stands in its place is no secret ("k", "x")
# Written where a server of one's own wants any key at all.
_NO_KEYS: Final = frozenset(
    "apikey dummy empty fake local none null ollama secret test token unused".split()
)

_SECRET_HEADER: Final = re.compile(r"key|token|auth|secret|credential|password|cookie", re.I)
# How servers show a key that they do not take: the first and last characters around a mask.
_MASK: Final = re.compile(r"\*{2,}|\.{3,}|…+|•{2,}|[xX]{4,}|\[\w{1,16}\]|<\w{1,16}>")
_MOST_MASKS: Final = 64  # in a text
_SHOWN_BY_MASK: Final = 4  # characters, of both ends together

# Codes, types and reasons, in the spelling of error_document.py.
_WORDS: Final = frozenset(
    "authentication unauthenticated unauthorized permission permission_denied access_denied"
    " invalid_api_key incorrect_api_key api_key_invalid api_key_expired api_key_service_blocked"
    " invalid_authentication invalid_token token_expired expired_token access_token_expired"
    " credentials_missing failed_precondition organization_restricted account_deactivated billing"
    " billing_not_active billing_hard_limit_reached insufficient_quota insufficient_balance"
    " exceeded_current_quota rate_limit_exceeded arrearage".split()
)
_KEY: Final = r"(?<![\w.\-\"'`])(?:x-)?(?:api|subscription)[ -]?(?:keys?|tokens?)(?![\w\"'`])"
_NEAR: Final = r"[^.;{}]{0,40}?"
_BEFORE: Final = (
    r"\b(?:invalid|incorrect|wrong|bad|missing|expired|revoked|malformed|unknown|disabled|inactive"
    r"|leaked|suspended|no|without|valid|provide|check)\b"
)
_BEHIND: Final = (
    r"\b(?:invalid|incorrect|wrong|missing|expired|revoked|malformed|unknown|disabled|inactive"
    r"|leaked|suspended|not|required|provided|must)\b"
)
# A user's own words of limits ("max_tokens", "invalid token in JSON"), of tools ("get_api_key") and
# of what a filter found in a prompt ("contains an API key") are not among these.
_TEXT: Final = re.compile(
    rf"{_BEFORE}{_NEAR}{_KEY}|{_KEY}{_NEAR}{_BEHIND}"
    r"|\b(?:invalid|incorrect|missing|no|expired)[ _]api_key\b|\bAPI_KEY_[A-Z]+\b"
    r"|^\W*(?:invalid|expired|missing) token\W*$"
    r"|\b(?:invalid|incorrect|missing|expired|no) auth(?:entication|orization)?\b"
    r"|\b(?:invalid|incorrect|missing|expired|revoked|no) (?:access|bearer|security|jwt|oauth2?)"
    r"[ -]?tokens?\b"
    r"|\b(?:access|auth|authentication|bearer|security|jwt|oauth2?)[ -]tokens?\b[^.;]{0,40}?\b"
    r"(?:invalid|expired|missing|revoked|not valid|required)\b"
    r"|\bjwt (?:is )?(?:expired|malformed|invalid)\b|\bbearer token\b|\bauthorization header\b"
    r"|\bauthentication (?:fail|error|(?:is )?required|credential)\w*"
    r"|\binvalid username or password\b|\bkey (?:is )?not allowed to access\b"
    r"|\b(?:invalid|incorrect|missing|no|expired|wrong|default) credentials?\b"
    r"|\bcredentials? (?:(?:is|are|was|were|have|has)(?: been)? )?"
    r"(?:invalid|incorrect|missing|expired|revoked|not (?:found|valid|provided|set))\b"
    r"|\bcredit balance\b|\binsufficient (?:balance|credits?|funds|quota)\b|\bcurrent quota\b"
    r"|\bbilling (?:account|details|hard|limit|plan|settings|status|is)\b|/billing\b"
    r"|\b(?:plans? (?:&|and)|enable|your) billing\b"
    r"|\b(?:account|organi[sz]ation|project)\b[^.;]{0,60}?"
    r"\b(?:not active|inactive|deactivated|suspended|disabled|restricted)\b"
    r"|\borgani[sz]ation must be verified\b|\bgood standing\b|\busage limits?\b"
    r"|\buser location is not supported\b|\btokens per (?:minute|day)\b",
    re.I,
)
# The same, unless it is said of what the model server was to fetch for the client.
_REFUSED: Final = re.compile(
    r"\b(?:not |un|could not be |failed to |unable to |cannot |could not )authenticat\w*"
    r"|\bunauthori[sz]ed\b|\bnot authori[sz]ed\b|\bauthorization failed\b",
    re.I,
)
_FETCHED: Final = re.compile(
    r"\b(?:images?|urls?|files?|audio|video|documents?|fetch|download)", re.I
)


def secrets_of(provider: Provider) -> tuple[str, ...]:
    """The texts by which `provider` knows us: its key, and such headers as may hold one."""
    values = [provider.api_key or ""]
    values += [value for name, value in provider.headers if _SECRET_HEADER.search(name)]
    return tuple(value.split()[-1] for value in values if value.strip())  # without its "Bearer"


def concerns_account(text: str, words: Iterable[str] = ()) -> bool:
    """Whether a message, or the `words` of its codes, speak of credentials or of what we pay."""
    if not _WORDS.isdisjoint(words):
        return True
    return any(
        _TEXT.search(reading) or (_REFUSED.search(reading) and not _FETCHED.search(reading))
        for reading in _readings(text)
    )


def holds_secret(text: str, secrets: Iterable[str]) -> bool:
    """Whether `text` holds one of `secrets`, a piece that identifies it, or both ends of it."""
    readings = _readings(text)
    return any(_holds(reading, secret) for secret in secrets for reading in readings)


def _readings(text: str) -> list[str]:
    """`text` as it is, and as it reads without the escapes of a URL, HTML or JSON."""
    readings = {text: None}
    if "%" in text:
        readings[unquote(text)] = None
    if "&" in text:
        readings[html.unescape(text)] = None
    if "\\" in text:
        readings[re.sub(r"\\u00([0-7][0-9a-fA-F])", _unescape, text).replace("\\", "")] = None
    return list(readings)


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match[1], 16))


def _holds(text: str, secret: str) -> bool:
    if len(secret) < PIECE:
        return _holds_short(text, secret)
    last = len(secret) - PIECE
    for start in range(last + 1):
        piece = secret[start : start + PIECE]
        if piece not in text:
            continue
        if start in (0, last) or _is_random(piece):
            return True
        # Words may be anyone's ("upstream-"): of these it takes some more.
        longer = secret[start : start + _LONG_PIECE]
        if len(longer) == _LONG_PIECE and longer in text:
            return True
    masks = islice(_MASK.finditer(text), _MOST_MASKS)
    return any(_is_masked(secret, text, *mask.span()) for mask in masks)


def _holds_short(text: str, secret: str) -> bool:
    """Whether `text` holds a short key as a whole."""
    if len(secret) < _SHORT_KEY or secret.lower() in _NO_KEYS:
        return False
    return re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text) is not None


def _is_random(piece: str) -> bool:
    has_digit = any(character.isdigit() for character in piece)
    return has_digit or (piece != piece.lower() and piece != piece.upper())


def _is_masked(secret: str, text: str, start: int, end: int) -> bool:
    """Whether a mask in `text`, from `start` to `end`, stands between both ends of `secret`."""
    half = range(len(secret) // 2, 0, -1)
    head = next((n for n in half if text.endswith(secret[:n], max(start - n, 0), start)), 0)
    tail = next((n for n in half if text.startswith(secret[-n:], end)), 0)
    return head + tail >= _SHOWN_BY_MASK
