"""The outline of JSON that is too long to be kept: what a chunk says besides its text.

It is JSON as well, of bounded size whatever it is the outline of. Texts are cut, arrays but for
the choices keep their first element, what is nested deep or comes when room is short is left out;
usage, errors and finish reasons have room kept for them. So the code that reads whole events reads
it too.
"""

from __future__ import annotations

from typing import Final

_ROOM: Final = 12 * 1024  # for all; behind it, for what matters alone
_LAST_ROOM: Final = 24 * 1024
_TEXT_BYTES: Final = 1024
_SHORT_BYTES: Final = 64
_LEVELS: Final = 10
_CHOICES: Final = 128
_MEMBERS: Final = 64  # of an object
_BACKSLASH: Final = 0x5C
_BRACKET: Final = 0x5B

# What an object or array is to the answer.
OTHER: Final = 0
TOP: Final = 1
CHOICES: Final = 2
CHOICE: Final = 3
USAGE: Final = 4
ERROR: Final = 5

_MATTER: Final = frozenset(
    b"id object type model choices usage x_groq error errors code status status_code message msg"
    b" detail base_resp delta text finish_reason index".split()
)


class Outline:
    """Built by a reader that says what it comes upon, in order.

    `keeps_value` is asked before each value; what is not kept the reader skips and doesn't tell of.
    """

    __slots__ = (
        "_counts",
        "_key",
        "_kinds",
        "_parts",
        "_raw_key",
        "_roles",
        "_size",
        "has_error",
        "role",
    )

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._kinds: list[int] = []  # the opening brackets
        self._roles: list[int] = []
        self._counts: list[int] = []  # of values kept
        self._key = self._raw_key = b""  # the last name
        self.role = OTHER  # of the innermost object or array
        self.has_error = False  # an error was found that says something

    @property
    def depth(self) -> int:
        """How many objects and arrays are open."""
        return len(self._kinds)

    @property
    def kind(self) -> int:
        """The bracket of the innermost; 0 if nothing is open."""
        return self._kinds[-1] if self._kinds else 0

    def text(self) -> bytes:
        """The whole of it; only of use when nothing is open any more."""
        return b"".join(self._parts)

    def keeps_member(self, raw: bytes, name: bytes) -> bool:
        """Whether the value that follows this name is kept; `raw` is the name as it is written."""
        matters = name in _MATTER or self.role == USAGE or b"usage" in name
        if not self._has_room(matters):
            return False
        if not matters and self._counts[-1] >= _MEMBERS:
            return False
        self._key, self._raw_key = name, raw
        return True

    def keeps_element(self) -> bool:
        """Whether the next element of the array is kept; if not, those behind it aren't either."""
        most = _CHOICES if self.role == CHOICES else _MEMBERS if self.role == USAGE else 1
        return self._counts[-1] < most and self._has_room(self.role == CHOICES)

    def _has_room(self, matters: bool) -> bool:
        return len(self._kinds) < _LEVELS and self._size < (_LAST_ROOM if matters else _ROOM)

    def open(self, bracket: int) -> None:
        """An object or array begins, which is kept."""
        role = self._role_of_next()
        self._begin_value()
        self._add(b"[" if bracket == _BRACKET else b"{")
        self._kinds.append(bracket)
        self._roles.append(role)
        self._counts.append(0)
        self.role = role

    def close(self) -> None:
        """The innermost object or array ends."""
        self._add(b"]" if self._kinds.pop() == _BRACKET else b"}")
        self._roles.pop()
        self._counts.pop()
        self.role = self._roles[-1] if self._roles else OTHER

    def add_string(self, raw: bytes) -> None:
        """A string, without its quotes, as far as `text_limit` goes."""
        self._begin_value()
        self._add(b'"%b"' % raw)

    def note_text(self) -> None:
        """The string that is read, and kept, is not empty: known before its end."""
        if self.role == ERROR or (self.role == TOP and self._key == b"error"):
            self.has_error = True

    def add_scalar(self, raw: bytes) -> None:
        """A number or literal."""
        self._begin_value()
        self._add(raw)
        if self.role == ERROR and raw != b"null":
            self.has_error = True

    @property
    def text_limit(self) -> int:
        """How many bytes of the next string are kept."""
        return _TEXT_BYTES if self._size < _ROOM else _SHORT_BYTES

    def _begin_value(self) -> None:
        if not self._kinds:
            return
        if self._counts[-1]:
            self._add(b",")
        self._counts[-1] += 1
        if self._kinds[-1] != _BRACKET:
            self._add(b'"%b":' % self._raw_key)

    def _role_of_next(self) -> int:
        if not self._kinds:
            return TOP
        role = self.role
        if role in (USAGE, ERROR):
            return role
        if role == CHOICES:
            return CHOICE
        if self._kinds[-1] == _BRACKET:
            return OTHER
        if b"usage" in self._key:
            return USAGE
        if role == TOP and self._key == b"choices":
            return CHOICES
        if role == TOP and self._key == b"error":
            return ERROR
        return OTHER

    def _add(self, raw: bytes) -> None:
        self._parts.append(raw)
        self._size += len(raw)


def clip(raw: bytes, limit: int) -> bytes:
    """The inside of a JSON string cut to `limit` bytes, and not within an escape or a character."""
    if len(raw) <= limit:
        return raw
    cut = raw[:limit]
    place = cut.rfind(b"\\", max(0, limit - 12))
    if place >= 0:
        cut = cut[:place].rstrip(b"\\")
    return cut.decode("utf-8", "ignore").encode()
