"""Read abilities and adaptation of a provider or an endpoint from its table in the config.

Both have the same settings; an endpoint's win over its provider's, name by name. upstream_body.py
applies an adaptation to a body.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from decimal import Decimal
from typing import Any

from .catalog import Abilities, Adaptation
from .extensions import is_extension
from .request import ROLES
from .tables import Table, nearest, shown
from .values import InvalidValue

_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
# Members that no rule may change, each with the reason.
_UNTOUCHED = {
    "model": "the endpoint's model names it",
    "models": "the router reads it and it never goes upstream",
    "messages": "it is the prompt, of which only roles can be changed, by roles",
    "stream": "the proxy reads the answer as the client requested it",
    "provider": "the router reads it and it never goes upstream",
    "usage": "the proxy reads it and it never goes upstream",
    "stream_options": "the provider's stream_options says whether it is sent",
}


def read_abilities(table: Table, default: Abilities) -> Abilities:
    """Return the abilities in `table`, and those of `default` for what it leaves out."""
    own = Abilities(
        tools=table.boolean("tools", None),
        json_mode=table.boolean("json_mode", None),
        json_schema=table.boolean("json_schema", None),
        vision=table.boolean("vision", None),
    )
    parameters = frozenset(table.strings("parameters", _parse_name))
    accepts = frozenset(table.strings("accepts", _parse_extension))
    # An empty list says that the endpoint supports none.
    if "parameters" in table.values:
        own = replace(own, parameters=parameters)
    if "accepts" in table.values:
        own = replace(own, accepts=accepts)
    return own.over(default)


def read_adaptation(table: Table, default: Adaptation) -> Adaptation:
    """Return the rules in `table`, and those of `default` for the members it leaves out."""
    renames, values, roles = (table.table(name) for name in ("rename", "set", "roles"))
    own = Adaptation(
        rename=_read_renames(renames),
        drop=frozenset(table.strings("drop", _parse_member)),
        set=_read_values(values),
        roles=_read_roles(roles),
    )
    _check_renames(renames, own.rename)
    _check_rules(table, values, own)
    return own.over(default)


def _read_renames(table: Table) -> tuple[tuple[str, str], ...]:
    pairs = []
    for old in table.values:
        new = table.parse(old, None, _parse_member)
        if _is_member(table, old) and new is not None:
            pairs.append((old, new))
    return tuple(pairs)


def _read_values(table: Table) -> tuple[tuple[str, bytes], ...]:
    values = []
    for name, value in table.values.items():
        table.know(name)
        if not _is_member(table, name):
            continue
        try:
            values.append((name, _json_text(value).encode()))
        except InvalidValue as error:
            table.note(name, error)
    return tuple(values)


def _read_roles(table: Table) -> tuple[tuple[str, str], ...]:
    pairs = []
    for old in table.values:
        new = table.parse(old, None, _parse_role)
        try:
            _parse_role(old)
        except InvalidValue as error:
            table.note(old, error)
            continue
        if new is not None:
            pairs.append((old, new))
    return tuple(pairs)


def _is_member(table: Table, name: str) -> bool:
    try:
        _parse_member(name)
    except InvalidValue as error:
        table.note(name, error)
        return False
    return True


# Rules that contradict each other


def _check_renames(table: Table, pairs: tuple[tuple[str, str], ...]) -> None:
    olds, news = {old for old, _ in pairs}, set[str]()
    for old, new in pairs:
        if new in olds and new != old:
            got = f'"{new}", which is renamed itself'
            table.note(old, InvalidValue("a name that stays", got, "rename each member once"))
        elif new in news:
            got = f'"{new}" for a second member'
            table.note(old, InvalidValue("a name of its own", got, "take one of them out"))
        news.add(new)


def _check_rules(table: Table, values: Table, own: Adaptation) -> None:
    renamed = {name for pair in own.rename for name in pair}
    for name in sorted(own.drop & renamed):
        got = f'"{name}", which is in rename'
        table.note(
            "drop", InvalidValue("members without another rule", got, "take one of them out")
        )
    for name, _ in own.set:
        if name in own.drop or name in renamed:
            got = f"one that is in {'drop' if name in own.drop else 'rename'}"
            values.note(name, InvalidValue("a member without another rule", got, "take one out"))


# Texts and values


def _parse_name(name: str) -> str:
    if not _MEMBER.fullmatch(name):
        raise InvalidValue("a member's name", "something else", 'write it like "max_tokens"')
    return name


def _parse_extension(text: str) -> str:
    if not is_extension(text):
        advice = 'write it like "tool_choice=any", "max_tokens=-1" or "content=null"'
        raise InvalidValue("a member and a value beyond the usual ones", "something else", advice)
    return text


def _parse_member(name: str) -> str:
    """Return `name` if it is a member that a rule may change. Raises InvalidValue."""
    # Compared in lower case: a body never holds a second spelling of a parameter.
    reason = _UNTOUCHED.get(_parse_name(name).lower())
    if reason is not None:
        raise InvalidValue("another member", f'"{name}"', f"take it out: {reason}")
    return name


def _parse_role(role: str) -> str:
    if role not in ROLES:
        raise InvalidValue("a role of the API", "another name", nearest(role, sorted(ROLES)))
    return role


def _json_text(value: Any) -> str:
    """Serialize a TOML value as JSON, numbers with their own digits. Raises InvalidValue."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(k)}:{_json_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_json_text, value))}]"
    if isinstance(value, str | bool):
        return json.dumps(value)
    if isinstance(value, int | Decimal):
        return _number_text(value)
    raise InvalidValue("a value that JSON has", shown(value), "write it as a string")


def _number_text(value: int | Decimal) -> str:
    # What a double or 64 bits cannot hold, some servers refuse and others read as another number.
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return str(value)
    if isinstance(value, Decimal) and value.is_finite() and math.isfinite(float(value)):
        return str(value)
    raise InvalidValue("a number of 64 bits", shown(value), "write a smaller one, or a string")
