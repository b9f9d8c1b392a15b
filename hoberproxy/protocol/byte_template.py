"""Recognises bytes that are equal to earlier ones but for some values, without parsing them.

A specimen was parsed, and the places of the values in it that may differ are known. Other bytes
that are the same around values of the same kinds mean the same but for these values: nothing else
can have changed, since the kind of a value settles where it ends. Only values that have differed
are holes; the others are compared together with the bytes around them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

# Kinds of values
TEXT: Final = 0  # the inside of a JSON string, on one line
NUMBER: Final = 1  # of JSON
COUNT: Final = 2  # a whole number of JSON without a sign, in at most 15 digits
NUMBERS: Final = 3  # the inside of a JSON array of numbers
FIELD: Final = 4  # the value of a header, printable ASCII
STRING: Final = 5  # as TEXT, but for what is nobody's text
OBJECT: Final = 6  # a JSON object on one line; whether it is one, its reader finds out

Value = tuple[int, int, int, bool]
"""Where a value begins and ends in a specimen, its kind, and whether it is a hole already."""
Edit = tuple[int, int, bytes]
"""What is replaced in a specimen, from where to where, and by what."""

_ALWAYS: Final = (TEXT, COUNT)
MAX_DIGITS: Final = 15
_BY_HAND: Final = 64  # bytes of a text; a longer one is left to an expression's engine
_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_OPENING: Final = 0x7B
_CLOSING: Final = 0x7D
_LF: Final = 0x0A
_CR: Final = 0x0D
_SPACE: Final = 0x20
_TILDE: Final = 0x7E
_ZERO: Final = 0x30
_NINE: Final = 0x39
_BEHIND_NUMBER: Final = frozenset(b",]} ")
_PLAIN: Final = rb'[^"\\\x00-\x1f]*+'
_ESCAPE: Final = rb'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_text: Final = re.compile(rb"%b(?>(?:%b%b)*)" % (_PLAIN, _ESCAPE, _PLAIN))
_NUMBER: Final = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
_number: Final = re.compile(_NUMBER)
_numbers: Final = re.compile(rb" *+(?:%b(?>(?: *+, *+%b)*) *+)?" % (_NUMBER, _NUMBER))


def is_text(value: bytes) -> bool:
    """Whether `value` may stand inside a JSON string as it is: a TEXT."""
    return _text.fullmatch(value) is not None


class ByteTemplate:
    """The bytes that a specimen and others like it have in common, and the holes between them.

    `values` are those of the holes in the bytes that `match` or `learn_from` has had last. `kinds`
    are those of the holes, `literals` the bytes around them, and `new_literals` the same with the
    specimen's edits. `are_holes` has True for each of all values that is a hole.
    """

    __slots__ = (
        "_kinds",
        "_known",
        "_literals",
        "_new_literals",
        "are_holes",
        "kinds",
        "literals",
        "new_literals",
        "values",
    )
    literals: list[bytes]
    new_literals: list[bytes]
    values: list[bytes]
    kinds: bytes

    def __init__(
        self, literals: list[bytes], new_literals: list[bytes], kinds: bytes, are_holes: list[bool]
    ) -> None:
        """For `make_template` and `copy_for`, which go on with `_join`."""
        self._literals = literals  # around all values
        self._new_literals = new_literals  # the same object where nothing is edited
        self._kinds = kinds
        self.are_holes = are_holes  # shared with copies

    def match(self, data: bytes, at: int) -> int:
        """Return where the bytes end that begin at `at` and match; 0 if they do not."""
        end = self._walk(data, at, self.literals, self.kinds)
        if not end:
            self.drop_values()
        return end

    def drop_values(self) -> None:
        """Drop the values of the bytes that have matched last: they may be texts of an answer."""
        self.values = [b""] * len(self.kinds)

    def learn_from(self, data: bytes, at: int, *, widen: bool = True) -> int:
        """Do as `match`, whichever values differ; later bytes match if they have the same ones.

        With `widen`, values that differ are holes from now on; a TEXT or COUNT is one in any case.
        """
        self.values = values = [b""] * len(self._kinds)
        if not self._walk(data, at, self._literals, self._kinds):
            self.drop_values()
            return 0
        for slot, value in enumerate(values):
            if value != self._known[slot] and (widen or self._kinds[slot] in _ALWAYS):
                self.are_holes[slot] = True
        self._join(data, at, values)
        return self.match(data, at)

    def without_values(self) -> bytes:
        """Return the specimen without its values."""
        return b"".join(self._literals)

    def hole_of(self, slot: int) -> int:
        """Return which hole it is, counted from 0, that value number `slot` has."""
        return sum(self.are_holes[:slot])

    def copy_for(self, data: bytes) -> ByteTemplate | None:
        """Return a template for bytes like `data`; None if these do not match as a whole.

        It shares the holes: what becomes one here becomes one there when it next learns.
        """
        copy = ByteTemplate(self._literals, self._new_literals, self._kinds, self.are_holes)
        copy.values = values = [b""] * len(self._kinds)
        if copy._walk(data, 0, self._literals, self._kinds) != len(data):
            return None
        copy._join(data, 0, values)
        return copy

    def forget_values(self) -> None:
        """Drop the values of specimens; from now on only `copy_for` is of use."""
        self._known = [b""] * len(self._kinds)
        self.literals = []
        self.new_literals = []
        self.values = []

    def put_together(self, out: list[bytes]) -> None:
        """Append to `out` the bytes that have matched last, edited."""
        news = self.new_literals
        out.append(news[0])
        slot = 0
        for value in self.values:
            slot += 1
            out.append(value)
            out.append(news[slot])

    def _walk(self, data: bytes, at: int, literals: list[bytes], kinds: bytes) -> int:
        values, slot, holes = self.values, 0, len(kinds)
        for literal in literals:
            start = at + len(literal)
            # Slices are compared: compiled, one costs a third of `startswith` at an offset.
            if data[at:start] != literal:
                return 0
            if slot == holes:
                return start
            at = value_end(data, start, kinds[slot])
            if at < 0:
                return 0
            values[slot] = data[start:at]
            slot += 1
        return 0

    def _join(self, data: bytes, at: int, values: list[bytes]) -> None:
        """Make a part of the literals what is no hole: as in `data`, which has these `values`."""
        known: list[bytes] = []  # what came last in place of those that are no holes
        literals: list[bytes] = []
        news: list[bytes] = []
        kinds: list[bytes] = []
        new: list[bytes] = []  # parts of the next one of `news`
        is_edited = False
        start, count = at, len(values)
        for slot, literal in enumerate(self._literals):
            at += len(literal)
            edited = self._new_literals[slot]
            is_edited = is_edited or edited is not literal
            new.append(edited)
            is_last = slot == count
            if is_last or self.are_holes[slot]:
                whole = data[start:at]
                literals.append(whole)
                news.append(b"".join(new) if is_edited else whole)
                if is_last:
                    break
                new = []
                is_edited = False
                kinds.append(self._kinds[slot : slot + 1])
                at += len(values[slot])
                start = at
                known.append(b"")
            else:
                new.append(values[slot])
                at += len(values[slot])
                known.append(values[slot])
        self._known = known
        self.literals, self.new_literals = literals, news
        self.kinds = b"".join(kinds)
        self.values = [b""] * len(kinds)


def make_template(
    specimen: bytes, values: Sequence[Value], edits: Sequence[Edit] = ()
) -> ByteTemplate:
    """Make the template of a specimen with `values`, of which others get what `edits` make of it.

    Both are in order; an edit that is not between two values is left out.
    """
    literals: list[bytes] = []
    new_literals: list[bytes] = []
    at = 0
    for start, end, _, _ in [*values, (len(specimen), 0, 0, False)]:
        literal = specimen[at:start]
        literals.append(literal)
        new_literals.append(_edited(literal, at, edits))
        at = end
    kinds = bytes([kind for _, _, kind, _ in values])
    template = ByteTemplate(literals, new_literals, kinds, [is_hole for _, _, _, is_hole in values])
    template._join(specimen, 0, [specimen[start:end] for start, end, _, _ in values])
    return template


def value_end(data: bytes, start: int, kind: int) -> int:
    """Return where a value of this kind ends that begins at `start`; -1 if none does."""
    # By hand where it is short: compiled, that costs less than a call of the engine's.
    if kind == TEXT or kind == STRING:
        return _text_end(data, start)
    if kind == FIELD:
        return _field_end(data, start)
    if kind == OBJECT:
        return _object_end(data, start)
    if kind == NUMBERS:
        found = _numbers.match(data, start)
        return -1 if found is None else found.end()
    at, last = start, min(len(data), start + MAX_DIGITS + 1)
    while at < last and _ZERO <= data[at] <= _NINE:
        at += 1
    digits = at - start
    if 0 < digits <= MAX_DIGITS and (digits == 1 or data[start] != _ZERO):
        if kind == COUNT or (at < len(data) and data[at] in _BEHIND_NUMBER):
            return at
    if kind == COUNT:
        return -1
    found = _number.match(data, start)
    return -1 if found is None else found.end()


def _text_end(data: bytes, start: int) -> int:
    at, last = start, min(len(data), start + _BY_HAND)
    while at < last:
        byte = data[at]
        if byte == _QUOTE:
            return at
        if byte < _SPACE or byte == _BACKSLASH:
            break
        at += 1
    found = _text.match(data, at)
    return -1 if found is None else found.end()


def _object_end(data: bytes, start: int) -> int:
    at, size, depth = start, len(data), 0
    while at < size and (byte := data[at]) != _LF and byte != _CR:
        at += 1
        if byte == _OPENING:
            depth += 1
        elif byte == _QUOTE:
            at = _text_end(data, at) + 1
        elif byte == _CLOSING:
            depth -= 1
        if not depth:
            return at if byte == _CLOSING else -1
    return -1


def _field_end(data: bytes, start: int) -> int:
    at, size = start, len(data)
    while at < size and _SPACE <= data[at] <= _TILDE:
        at += 1
    if at == start or at == size or data[start] == _SPACE or data[at - 1] == _SPACE:
        return -1
    return at


def _edited(literal: bytes, at: int, edits: Sequence[Edit]) -> bytes:
    """What becomes of the literal that stands at `at` in its specimen."""
    parts: list[bytes] = []
    done, size = 0, len(literal)
    for start, end, new in edits:
        if at <= start and end <= at + size:
            parts += (literal[done : start - at], new)
            done = end - at
    return b"".join([*parts, literal[done:]]) if parts else literal
