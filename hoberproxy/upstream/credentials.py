"""Finds out whether an upstream's text is about the proxy's account, or holds a part of its key.

No client gets such a text, for its request was right. The caller decides what follows.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final
from urllib.parse import unquote

from ..routing.catalog import Provider

PIECE: Final = 8  # characters of a key that identify it
_LONG_PIECE: Final = 12  # the same of a key that may be made of words
_SHORT_KEY: Final = 4  # below, what stands in its place is no secret ("k", "x")
# Written where a server of one's own wants any key at all.
_NO_KEYS: Final = frozenset(
    "apikey dummy empty fake local none null ollama secret test token unused".split()
)

_SECRET_HEADER: Final = re.compile(r"key|token|auth|secret|credential|password|cookie", re.I)
# How servers show a key that they do not take: the first and last characters around a mask.
_MASK: Final = re.compile(
    r"\*{2,}|\.{3,}|…+|•{2,}|[xX]{4,}|\[\w{1,16}\]|<\w{1,16}>"
    r"|\bend(?:ing|s)? (?:in|with):? [\"'`]?"
)
_MOST_MASKS: Final = 64  # in a text
_ESCAPE: Final = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.S)  # of JSON
_URL_SAFE: Final = str.maketrans("+/", "-_")  # the other alphabet of base64
_LEAST_AROUND_MASK: Final = 4  # characters, of both ends together

# Codes, types and reasons, in the spelling of dialects/error_document.py.
_WORDS: Final = frozenset(
    "authentication unauthenticated unauthorized permission permission_denied access_denied"
    " invalid_api_key incorrect_api_key api_key_invalid api_key_expired api_key_service_blocked"
    " invalid_authentication invalid_token token_expired expired_token access_token_expired"
    " credentials_missing failed_precondition organization_restricted account_deactivated billing"
    " billing_not_active billing_hard_limit_reached insufficient_quota insufficient_balance"
    " exceeded_current_quota rate_limit_exceeded arrearage".split()
)
_KEY: Final = r"(?<![\w.\-\"'`])(?:x-)?(?:api|subscription)[ _-]?(?:keys?|tokens?)(?![\w\"'`])"
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
    r"|\b(?:invalid|incorrect|missing|no|expired|wrong|default|valid) credentials?\b"
    r"|\bcredentials? (?:(?:is|are|was|were|have|has)(?: been)? )?"
    r"(?:invalid|incorrect|missing|expired|revoked|not (?:found|valid|provided|set))\b"
    r"|\bcredit balance\b|\binsufficient (?:balance|credits?|funds|quota)\b|\bcurrent quota\b"
    r"|\bbilling (?:account|details|hard|limit|plan|settings|status|is|not)\b|/billing\b"
    r"|\bquota\b[^.;]{0,30}?\b(?:not enough|insufficient|exhausted|exceeded|used up)\b"
    r"|\b(?:exhausted|exceeded|not enough|out of)\b[^.;]{0,30}?\bquota\b"
    r"|\brequires? more credits\b|\bkey limit exceeded\b|\barrears?\b|\barrearage\b"
    r"|\b(?:plans? (?:&|and)|enable|your) billing\b"
    r"|\b(?:account|organi[sz]ation|project)\b[^.;]{0,60}?"
    r"\b(?:not active|inactive|deactivated|suspended|disabled|restricted)\b"
    r"|\borgani[sz]ation must be verified\b|\bgood standing\b|\busage limits?\b"
    r"|\buser location is not supported\b|\btokens per (?:minute|day)\b"
    # one-api, new-api, Zhipu and others: a token (of theirs) or key that is invalid, expired, used
    # up or disabled; authentication failed; no balance, no quota, in arrears.
    r"|(?:无效|过期|失效|禁用|错误)的?(?:令牌|密钥|API ?Key)"
    r"|(?:令牌|密钥|API ?Key)[\w ]{0,12}?(?:无效|过期|失效|用尽|禁用|不可用|不存在|不正确|错误)"
    r"|未提供令牌|(?:身份验证|身份认证|鉴权|认证)失败|未授权|无权访问"
    r"|(?:余额|额度|配额)(?:已)?(?:不足|用尽|耗尽)|欠费",
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


# What such a text is about, as far as a client may have put it there.
_SUBJECT: Final = re.compile(
    r"(?:api|subscription)[ _-]?(?:key|token)|credential|auth|jwt|bearer|username|password|token"
    r"|credit|balance|fund|quota|billing|account|organi[sz]ation|project|usage|location|standing|key"
    r"|arrear|令牌|密钥|身份|鉴权|认证|授权|无权|余额|额度|配额|欠费"
)


def secrets_of(provider: Provider) -> tuple[str, ...]:
    """Return the texts that identify the proxy to `provider`: its key, and headers with one."""
    values = [provider.api_key or ""]
    values += [value for name, value in provider.headers if _SECRET_HEADER.search(name)]
    return tuple(value.split()[-1] for value in values if value.strip())  # without its "Bearer"


def concerns_account(text: str, words: Iterable[str] = ()) -> bool:
    """Return whether `text`, or the `words` of its codes, are about credentials or payment."""
    if not _WORDS.isdisjoint(words):
        return True
    return any(
        _TEXT.search(reading) or (_REFUSED.search(reading) and not _FETCHED.search(reading))
        for reading in _readings(text)
    )


def may_be_quoted(text: str, sent: bytes) -> bool:
    """Return whether `text`, about the proxy's account, may quote `sent`, the client's request.

    Such a message says nothing of the endpoint: else a client could have the endpoint taken for a
    broken one, by requests that an error quotes.
    """
    matches = [match[0] for reading in _readings(text) for match in _TEXT.finditer(reading)]
    matches += [match[0] for reading in _readings(text) for match in _REFUSED.finditer(reading)]
    request = _plain(sent)
    subjects = [set(_SUBJECT.findall(match.lower())) for match in matches]
    return all(any(subject in request for subject in each) for each in subjects)


def holds_secret(text: str, secrets: Iterable[str], sent: Callable[[], bytes] = bytes) -> bool:
    """Return whether `text` holds one of `secrets`, a piece that identifies it, or both its ends.

    It is found in base64, in hex, or with letters of another case, too.

    What stands in the client's own request, which `sent` returns, does not count: an upstream may
    quote it, and a client could try out pieces of a key by what becomes of the error.
    """
    readings = _readings(text)
    found = {piece for each in secrets for reading in readings for piece in _find(reading, each)}
    found |= {piece for each in secrets for piece in _find_encoded(text, each)}
    if not found:
        return False
    request = _plain(sent())
    return not all(piece.lower() in request for piece in found)


def _plain(sent: bytes) -> str:
    """Return a request's JSON as an upstream may quote it: without escapes, in lower case."""
    text = sent.decode("utf-8", "replace")
    return "\n".join((text, *_readings(_ESCAPE.sub(_unescaped, text)))).lower()


def _unescaped(match: re.Match[str]) -> str:
    escape = match[1]
    return chr(int(escape[1:], 16)) if len(escape) > 1 else " " if escape in "nrtbf" else escape


def _readings(text: str) -> list[str]:
    """Return `text` as it is, and without the escapes of a URL, HTML or JSON."""
    readings = {text: None}
    if "%" in text:
        readings[unquote(text)] = None
    if "&" in text:
        readings[html.unescape(text)] = None
    if "\\" in text:
        readings[_ESCAPE.sub(_unescaped, text)] = None
    return list(readings)


def _find(text: str, secret: str) -> Iterator[str]:
    """Yield the pieces of `text` that identify `secret`."""
    if len(secret) < PIECE:
        if _holds_short(text, secret):
            yield secret
        return
    last = len(secret) - PIECE
    for start in range(last + 1):
        piece = secret[start : start + PIECE]
        if piece not in text:
            continue
        # Words may be anyone's ("upstream-"): of these it takes some more.
        longer = secret[start : start + _LONG_PIECE]
        if start in (0, last) or _is_random(piece):
            yield piece
        elif len(longer) == _LONG_PIECE and longer in text:
            yield longer
    for mask in islice(_MASK.finditer(text), _MOST_MASKS):
        if (ends := _find_around_mask(secret, text, *mask.span())) is not None:
            yield ends


def _holds_short(text: str, secret: str) -> bool:
    """Return whether `text` holds `secret`, a short key, as a whole."""
    if len(secret) < _SHORT_KEY or secret.lower() in _NO_KEYS:
        return False
    return re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text) is not None


def _find_encoded(text: str, secret: str) -> Iterator[str]:
    """Yield the pieces of `text` that are of `secret` in base64, in hex, or in other cases."""
    if len(secret) < PIECE:
        return
    for encoded in _encodings(secret.encode("utf-8", "replace")):
        yield from _find_long(text, encoded)
    yield from _find_long(text.upper(), secret.upper())


def _find_long(text: str, secret: str) -> Iterator[str]:
    for start in range(len(secret) - _LONG_PIECE + 1):
        piece = secret[start : start + _LONG_PIECE]
        if piece in text:
            yield piece


def _encodings(secret: bytes) -> Iterator[str]:
    """Yield the encodings of `secret` that do not depend on the text around it."""
    yield secret.hex()
    yield secret.hex().upper()
    for before in range(3):  # bytes in front, of the three that become four characters
        encoded = base64.b64encode(bytes(before) + secret).decode()
        fixed = encoded[-(-8 * before // 6) : (before + len(secret)) * 8 // 6]
        yield fixed
        yield fixed.translate(_URL_SAFE)


def _is_random(piece: str) -> bool:
    has_digit = any(character.isdigit() for character in piece)
    return has_digit or (piece != piece.lower() and piece != piece.upper())


def _find_around_mask(secret: str, text: str, start: int, end: int) -> str | None:
    """Return the mask at `start` of `text` with both ends of `secret`, None without them."""
    half = range(len(secret) // 2, 0, -1)
    head = next((n for n in half if text.endswith(secret[:n], max(start - n, 0), start)), 0)
    tail = next((n for n in half if text.startswith(secret[-n:], end)), 0)
    return text[start - head : end + tail] if head + tail >= _LEAST_AROUND_MASK else None
