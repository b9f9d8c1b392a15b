"""Builds the outline of JSON that is too long to be held: what it says besides its texts.

An outline is JSON of a bounded size, so the code that reads whole events can read it. Texts are cut
short, and of arrays other than `choices` the first element is kept. What is nested deep, or comes
when there is little room, is left out; for usage, errors and finish reasons some room is reserved.
"""

from __future__ import annotations

from typing import Final

_ROOM: Final = 12 * 1024  # bytes after which only members in _MATTER are kept
_LAST_ROOM: Final = 24 * 1024  # bytes after which nothing is kept
_TEXT_BYTES: Final = 1024
_SHORT_BYTES: Final = 64
_LEVELS: Final = 10
_CHOICES: Final = 128
_MEMBERS: Final = 64  # of an object
_BRACKET: Final = 0x5B

# The roles of an object or array in an answer.
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
    """An outline that a reader builds, by a call for each thing in the JSON in its order.

    Before each value the reader calls `keeps_member` or `keeps_element`. Of a value that is not
    kept it adds nothing.
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
        self._kinds: list[int] = []  # the brackets of the open objects and arrays, and their
        self._roles: list[int] = []  # … roles, and
        self._counts: list[int] = []  # … numbers of values kept
        self._key = self._raw_key = b""  # the last name
        self.role = OTHER  # of the innermost open object or array
        self.has_error = False  # there is an error that is neither null nor empty

    @property
    def depth(self) -> int:
        """The number of open objects and arrays."""
        return len(self._kinds)

    @property
    def kind(self) -> int:
        """The bracket of the innermost open object or array; 0 if none is open."""
        return self._kinds[-1] if self._kinds else 0

    def text(self) -> bytes:
        """Return the outline, which is JSON once no object or array is open."""
        return b"".join(self._parts)

    def keeps_member(self, raw: bytes, name: bytes) -> bool:
        """Return whether to keep the value of member `name`; `raw` is the name as written."""
        matters = name in _MATTER or self.role == USAGE or b"usage" in name
        if not self._has_room(matters):
            return False
        if not matters and self._counts[-1] >= _MEMBERS:
            return False
        self._key, self._raw_key = name, raw
        return True

    def keeps_element(self) -> bool:
        """Return whether to keep the array's next element; if not, no later one is kept."""
        most = _CHOICES if self.role == CHOICES else _MEMBERS if self.role == USAGE else 1
        return self._counts[-1] < most and self._has_room(self.role == CHOICES)

    def _has_room(self, matters: bool) -> bool:
        return len(self._kinds) < _LEVELS and self._size < (_LAST_ROOM if matters else _ROOM)

    def open(self, bracket: int) -> None:
        """Add the beginning of an object or array."""
        role = self._role_of_next()
        self._begin_value()
        self._add(b"[" if bracket == _BRACKET else b"{")
        self._kinds.append(bracket)
        self._roles.append(role)
        self._counts.append(0)
        self.role = role

    def close(self) -> None:
        """Add the end of the innermost open object or array."""
        self._add(b"]" if self._kinds.pop() == _BRACKET else b"}")
        self._roles.pop()
        self._counts.pop()
        self.role = self._roles[-1] if self._roles else OTHER

    def add_string(self, raw: bytes) -> None:
        """Add a string, `raw` without its quotes and at most `text_limit` bytes of it."""
        self._begin_value()
        self._add(b'"%b"' % raw)

    def note_text(self) -> None:
        """Take note, before its end, that the string which is to be added is not empty."""
        if self.role == ERROR or (self.role == TOP and self._key == b"error"):
            self.has_error = True

    def add_scalar(self, raw: bytes) -> None:
        """Add a number, true, false or null."""
        self._begin_value()
        self._add(raw)
        if self.role == ERROR and raw != b"null":
            self.has_error = True

    @property
    def text_limit(self) -> int:
        """The number of bytes of the next string that are kept."""
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
    """Return at most `limit` bytes of a JSON string's inside; no escape or character is cut."""
    if len(raw) <= limit:
        return raw
    cut = raw[:limit]
    place = cut.rfind(b"\\", max(0, limit - 12))
    if place >= 0:
        cut = cut[:place].rstrip(b"\\")
    return cut.decode("utf-8", "ignore").encode()
