"""Read the tables of a TOML file value by value; note each problem under its dotted path.

A `Table` reports wrong types and unknown names; reader.py and adaptations.py know what the values
mean. A wrong value is quoted only if it is a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, TypeVar

from .values import InvalidValue

T = TypeVar("T")
D = TypeVar("D", int, None)
B = TypeVar("B", bool, None)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Table:
    """One TOML table, whose problems go to `problems`; a wrong value counts as its default.

    Each method that reads a name makes it known. `finish` notes every unknown name, in this table
    and in those below.
    """

    def __init__(self, values: Mapping[str, Any], path: str, problems: list[str]) -> None:
        self.values = values
        self.path = path
        self._problems = problems
        self._known: dict[str, None] = {}  # a set in order
        self._below: list[Table] = []

    def know(self, name: str) -> None:
        """Count `name` as known without reading its value."""
        self._known[name] = None

    def note(self, name: str, problem: InvalidValue) -> None:
        """Add `problem` under the dotted path of `name`."""
        self._problems.append(f"{self._at(name)}: {problem}")

    def finish(self) -> None:
        """Note every name that no method has read, in this table and in those below."""
        for name in self.values:
            if name not in self._known:
                advice = nearest(name, self._known)
                self.note(name, InvalidValue("a known setting", "an unknown name", advice))
        for table in self._below:
            table.finish()

    def require(self, name: str, expected: str, advice: str) -> None:
        """Note that `name` is absent or empty, if it is."""
        if name not in self.values or self.values[name] in ([], {}):
            self.note(name, InvalidValue(expected, "none", advice))

    def take(self, name: str, kind: type[T] | tuple[type[T], ...], expected: str) -> T | None:
        """Return the value of `name` if it is of `kind`; None if it is absent or was noted."""
        self.know(name)
        value = self.values.get(name)
        # A boolean is an int to Python, not to the reader of a config.
        if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
        if value is not None:
            self.note(name, InvalidValue(expected, shown(value), _ADVICE[expected]))
        return None

    def boolean(self, name: str, default: B) -> bool | B:
        """Return the boolean `name`."""
        value = self.take(name, bool, "true or false")
        return default if value is None else value

    def integer(self, name: str, default: D, low: int, high: int) -> int | D:
        """Return the integer `name`, from `low` to `high`."""
        value = self.take(name, int, "an integer")
        if value is None or low <= value <= high:
            return default if value is None else value
        self.note(name, InvalidValue(f"{low} to {high}", shown(value), "choose one in this range"))
        return default

    def seconds(self, name: str, default: float, *, low: str = "0.001") -> float:
        """Return the number `name`, from `low` to a day in seconds."""
        number = self._decimal(name, "a number of seconds", low, "86400", " seconds")
        return default if number is None else float(number)

    def number(self, name: str, low: str, high: str) -> float | None:
        """Return the number `name`, from `low` to `high`; None if it is absent."""
        number = self._decimal(name, "a number", low, high)
        return None if number is None else float(number)

    def parse(self, name: str, default: T, parse: Callable[[str], T]) -> T:
        """Return `parse` of the string `name`; an InvalidValue from `parse` is noted."""
        text = self.take(name, str, "a string")
        if text is None:
            return default
        try:
            return parse(text)
        except InvalidValue as error:
            self.note(name, error)
            return default

    def strings(self, name: str, parse: Callable[[str], T]) -> tuple[T, ...]:
        """Return `parse` of each string of the array `name`."""
        items = self.take(name, list, "an array of strings") or []
        below = self._child(self._at(name), {f"[{i}]": item for i, item in enumerate(items)})
        parsed = [below.parse(index, None, parse) for index in below.values]
        return tuple(value for value in parsed if value is not None)

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """Return the string `name`, one of `choices`."""

        def parse(text: str) -> str:
            if text not in choices:
                raise InvalidValue("a known choice", "another string", nearest(text, choices))
            return text

        return self.parse(name, default, parse)

    def note_all(self, name: str, problems: Iterable[str]) -> None:
        """Add `problems`, worded by another parser, under the dotted path of `name`."""
        self._problems.extend(f"{self._at(name)}: {each}" for each in problems)

    def table(self, name: str) -> Table:
        """Return the table `name`, an empty one if it is absent."""
        return self._child(self._at(name), self.take(name, dict, "a table") or {})

    def tables(self, name: str) -> list[Table]:
        """Return the tables of the array `name`, written [[name]]."""
        items = self.take(name, list, "an array of tables") or []
        below = self._child(self._at(name), {f"[{i}]": item for i, item in enumerate(items)})
        return [below.table(index) for index in below.values]

    def each_table(self) -> Iterator[tuple[str, Table]]:
        """Yield each name and its table, where the user chooses the names."""
        for name in self.values:
            yield name, self.table(name)

    def _decimal(self, name: str, kind: str, low: str, high: str, unit: str = "") -> Decimal | None:
        value = self.take(name, (int, Decimal), kind)
        if not isinstance(value, (int, Decimal)):
            return None
        number = Decimal(value)
        if not number.is_nan() and Decimal(low) <= number <= Decimal(high):
            return number
        expected = f"{low} to {high}{unit}"
        self.note(name, InvalidValue(expected, shown(value), "choose one in this range"))
        return None

    def _at(self, name: str) -> str:
        return _join(self.path, name)

    def _child(self, path: str, values: Mapping[str, Any]) -> Table:
        child = Table(values, path, self._problems)
        self._below.append(child)
        return child


_ADVICE = {
    "a string": "write it in quotes",
    "true or false": "write it without quotes",
    "an integer": "write a whole number without quotes",
    "a number": "write it without quotes",
    "a number of seconds": "write it without quotes or unit, like 2.5",
    "an array of strings": 'write it like ["one", "two"]',
    "a table": "write it under a [heading], or in braces",
    "an array of tables": "write it under a heading in [[double brackets]]",
}


def shown(value: object) -> str:
    """Describe `value` for a message: a number as it is, anything else by its type."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, Decimal)):
        return f"{Decimal(value):.12g}"
    kinds: dict[type, str] = {str: "a string", dict: "a table", list: "an array"}
    return kinds.get(type(value), "a date or time")


def plain_number(value: object) -> str:
    """Format `value` without exponent; "" if it is no number or needs over 20 digits."""
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        return ""
    number = Decimal(value)
    return f"{number:f}" if -20 < number.adjusted() < 20 else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the advice for an unknown `name`: the closest of `known`, or all of them."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(names)}" if names else "take it out"


def _join(path: str, name: str) -> str:
    if name.startswith("["):
        return path + name
    name = name if _BARE_KEY.fullmatch(name) else json.dumps(name)
    return f"{path}.{name}" if path else name
