"""Keys: their form and checksum, and the keyring that finds a caller by the digest of a key.

A key is `hb_live_` or `hb_test_`, 33 base62 characters with 192 random bits, and 6 more with the
CRC-32 of all before them, by which a mistyped key is recognised without a look-up. Storing
keys is left to the store, randomness and the clock to the caller, counting to access/limits.py.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Protocol

from ..errors import AccessError
from .limits import History, KeyLimits

KINDS: Final = ("live", "test")
RANDOM_BYTES: Final = 24  # 192 bits

_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BODY_LENGTH: Final = 33  # 62**33 > 2**192
_CHECKSUM_LENGTH: Final = 6  # 62**6 > 2**32
_KEY_FORM: Final = re.compile(rf"hb_(?:live|test)_[0-9A-Za-z]{{{_BODY_LENGTH + _CHECKSUM_LENGTH}}}")
_PREFIXES: Final = ("hb_live_", "hb_test_")
# As Anthropic's and Azure's clients send a key, without a scheme before it.
_KEY_FIELDS: Final = (b"x-api-key", b"api-key")
_KEY_START: Final = b"hb_"
_match_own_bearer: Final = re.compile(rb"[ \t]*(?i:bearer)[ \t]+hb_").match


# Form of a key


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    assert number == 0, "the lengths above hold every value of their size"
    return "".join(reversed(digits))


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode("ascii")), _CHECKSUM_LENGTH)


def generate_key(kind: str, random: bytes) -> str:
    """Make a key of `kind` "live" or "test" from 24 random bytes; ValueError for anything else."""
    if kind not in KINDS:
        raise ValueError(f"expected a kind of key out of live and test, got {kind!r}")
    if len(random) != RANDOM_BYTES:
        raise ValueError(f"expected {RANDOM_BYTES} random bytes, got {len(random)}")
    text = f"hb_{kind}_{_base62(int.from_bytes(random, 'big'), _BODY_LENGTH)}"
    return text + _checksum(text)


def is_well_formed(key: str) -> bool:
    """Whether `key` has the form and the checksum of a key, be it known or not."""
    if _KEY_FORM.fullmatch(key) is None:
        return False
    return _checksum(key[:-_CHECKSUM_LENGTH]) == key[-_CHECKSUM_LENGTH:]


def hash_key(key: str) -> bytes:
    """Return the SHA-256 digest (32 bytes) by which a key is stored and found."""
    # No salt, no slow hash: with 192 random bits there is nothing to guess.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def display_hint(key: str) -> str:
    """Return the prefix and the last four characters of a well-formed key, which are no secret.

    The last four are checksum, and give away no more of the random bits than any checksum does.
    ValueError for anything else.
    """
    if not is_well_formed(key):
        raise ValueError("expected a well-formed key to make a hint of, got something else")
    return f"{key[:8]}...{key[-4:]}"  # ASCII, since an operator may type it to revoke the key


# Callers

NO_HISTORY: Final = History()


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of a key. `expires` and `revoked` are unix seconds, None for never.

    `models` are patterns of the slugs that the key may use, none for all slugs. `history` is the
    usage from before the limits' own counters began.
    """

    key_id: str
    label: str
    kind: str
    expires: float | None
    revoked: float | None
    models: tuple[str, ...] = ()
    limits: KeyLimits | None = None  # None, not one without limits: nothing is counted then
    history: History = NO_HISTORY

    def may_use(self, slug: str) -> bool:
        """Whether the key may use the model `slug`."""
        return not self.models or any(fnmatchcase(slug, pattern) for pattern in self.models)

    def has_expired(self, now: float) -> bool:
        """Whether the key has expired at `now` (unix seconds)."""
        return self.expires is not None and now >= self.expires


ANONYMOUS: Final = Caller(key_id="", label="anonymous", kind="", expires=None, revoked=None)


def _rejected(message: str) -> AccessError:
    return AccessError(message, code="invalid_api_key")


class Head(Protocol):
    """The fields of a request's head, by their names in lower case."""

    def get(self, name: bytes, /) -> bytes | None: ...


class Keyring:
    """The caller of every key by its digest, replaced as a whole when keys have changed.

    One other thread at a time may call `replace`: readers see the old keys or the new ones.
    """

    def __init__(self) -> None:
        self._callers: Mapping[bytes, Caller] = {}
        self.version = 0  # changes with the keys: callers found before may not be valid any more

    @property
    def count(self) -> int:
        """The number of keys, valid or not."""
        # Not __len__: `if keyring` would take a keyring without keys for none.
        return len(self._callers)

    def replace(self, keys: Mapping[bytes, Caller]) -> None:
        """Put `keys` (digest to caller) in place of all keys."""
        self._callers = dict(keys)
        self.version += 1

    def authenticate_head(self, head: Head, now: float) -> Caller:
        """Return the caller whose key is in the fields of `head`, at `now` (unix seconds).

        The first field with a key of this proxy counts, of `Authorization: Bearer`, `x-api-key` and
        `api-key`. Raises AccessError as `authenticate` does.
        """
        return self.authenticate(_authorization_of(head), now)

    def authenticate(self, authorization: bytes | None, now: float) -> Caller:
        """Return the caller whose key is in an Authorization header, at `now` (unix seconds).

        Raises AccessError (401, `invalid_api_key`), whose message never contains the key.
        """
        token = _parse_bearer(authorization)
        # All of this takes 1.3 µs of a request's 30: a cache by header could save 1 of them, and
        # would keep plain keys in memory.
        caller = self._callers.get(hashlib.sha256(token).digest())
        if caller is None:
            raise _unknown(token)
        if caller.revoked is not None:
            raise _rejected("this key has been revoked; use another key or have a new one created")
        if caller.has_expired(now):
            raise _rejected("this key has expired; use another key or have a new one created")
        return caller


def _authorization_of(head: Head) -> bytes | None:
    """Return the Authorization field of `head`, or one made of another field with a key."""
    authorization = head.get(b"authorization")
    if authorization is not None and _match_own_bearer(authorization):
        return authorization  # nearly always
    fields = [head.get(name) for name in _KEY_FIELDS]
    keys = [value.strip(b" \t") for value in fields if value is not None]
    ours = [key for key in keys if key.startswith(_KEY_START)]
    if ours:
        return b"Bearer " + ours[0]
    # No key of this proxy: the message is about the field that the client takes for one.
    return b"Bearer " + keys[0] if keys and authorization is None else authorization


def _parse_bearer(authorization: bytes | None) -> bytes:
    """Return the token of `Bearer token`, after a scheme in any case and any number of spaces."""
    # RFC 9110 section 11.1: scheme names are case-insensitive; 11.4: 1*SP before the token.
    scheme, _, token = (authorization or b"").strip(b" \t").partition(b" ")
    token = token.lstrip(b" \t")
    if not scheme or (not token and scheme.lower() == b"bearer"):
        raise _rejected(
            "expected a key in the header `Authorization: Bearer hb_live_…` (or `x-api-key`, "
            "`api-key`), got none; set the client's API key"
        )
    if scheme.lower() != b"bearer":
        raise _rejected(
            "expected `Authorization: Bearer hb_live_…`, got something else than a Bearer token; "
            "send the key after the word Bearer"
        )
    return token


def _unknown(token: bytes) -> AccessError:
    key = token.decode("ascii", "replace")
    if not key.startswith(_PREFIXES):
        return _rejected(
            "expected a key that starts with hb_live_ or hb_test_, got one of another form; "
            "use a key of this proxy, not one of a model provider"
        )
    if not is_well_formed(key):
        return _rejected(
            "the key is mistyped or cut: its length or checksum is wrong; copy it once more"
        )
    return _rejected(
        "the key is well-formed, but this proxy does not know it; have one created here"
    )
