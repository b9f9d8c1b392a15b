"""The parse cache: keeps the checked bytes around the messages of a body for later bodies.

In most requests of an app model, parameters and tools are the same bytes, before and after the
messages. A template keeps these bytes, and the terms that were read from them. A body that begins
and ends with them has something else in place of the messages; if that is one JSON value, it is the
messages and nothing else, since where a value begins and ends does not depend on what stands around
it (RFC 8259). So only the messages need be parsed and checked. With a name given twice, or with a
member more, there would be more than one value.

Each key has separate templates: the time of an answer shows no client what another one sends.
A template that is not used again is dropped within minutes, and members that are texts are not kept
at all.
"""

from __future__ import annotations

from collections.abc import Generator
from operator import attrgetter
from typing import Any, Final

import orjson

from .body_scan import Survey, end_by_error, may_have_too_many
from .call import MAX_REQUESTED, Call, Terms, find_messages, raw_part
from .checks import check_survey, make_call, parse_call, parse_in_steps

KEPT: Final = 4  # templates of one key
MAX_TEMPLATE_BYTES: Final = 64 * 1024  # the tools of an agent are most of it
MAX_BYTES: Final = 8 * 1024 * 1024  # of all templates; each form that goes upstream takes as much
OVERHEAD_BYTES: Final = 1024  # of a template's objects
MEMBER_BYTES: Final = 192  # of one of its members'
STEPPED_BYTES: Final = 1024 * 1024  # a larger body is read in steps
# Members that carry what a model is to read or say, as the messages do.
_TEXTS: Final = frozenset(("prediction", "documents", "prompt", "input", "suffix"))
_OPENING: Final = 0x5B  # the brackets of an array
_CLOSING: Final = 0x5D
_SIZE: Final = attrgetter("size")
_NUMBER: Final = attrgetter("number")
_loads: Final = orjson.loads


class _Template:
    """The bytes before and after the messages of a body, and the terms read from them."""

    __slots__ = ("after", "before", "number", "size", "terms", "was_used")

    def __init__(self, before: bytes, after: bytes, terms: Terms, number: int) -> None:
        self.before = before  # up to the messages' first byte
        self.after = after
        self.terms = terms
        self.number = number  # in the order in which templates were made
        self.size = len(before) + len(after) + OVERHEAD_BYTES + MEMBER_BYTES * len(terms.members)
        self.was_used = False  # since it was made, or since `was_used` was last cleared

    def fits(self, body: bytes) -> bool:
        """Return whether `body` begins and ends with these bytes and may have an array between."""
        start, end = len(self.before), len(body) - len(self.after)
        return (
            start < end
            and body.startswith(self.before)
            and body.endswith(self.after)
            and body[start] == _OPENING  # spaces would be counted as prompt
            and body[end - 1] == _CLOSING
        )


class ParseCache:
    """The templates of a process, bounded in number for each key and in bytes over all keys."""

    def __init__(self) -> None:
        # Of each key the largest first: of two that fit, it says more.
        self._templates: dict[str, list[_Template]] = {}
        self._bytes = 0
        self._learnt = 0

    def read(self, body: bytes, key_id: str) -> Call:
        """Do as `parse_call` for the body of key `key_id`, "" where none is needed."""
        ends: dict[int, int] = {}
        template = self._fitting(body, key_id)
        if template is not None:
            if may_have_too_many(body):
                survey = Survey(body)
                while survey.step():
                    pass
                check_survey(survey)
            messages = _parse_messages(body, template, ends)
            if messages is not None:
                return _make_call(body, template, messages)
        call = parse_call(body, ends)
        self._keep(call, key_id)
        return call

    def read_in_steps(self, body: bytes, key_id: str) -> Generator[None, None, Call]:
        """Do as `read` for a large body; pause between long steps."""
        survey = Survey(body)
        while survey.step():
            yield
        check_survey(survey)
        ends: dict[int, int] = {}
        template = self._fitting(body, key_id)
        if template is not None:
            messages = _parse_messages(body, template, ends)
            yield
            if messages is not None:
                call = _make_call(body, template, messages)
                yield
                return call
        call = yield from parse_in_steps(body, survey, ends)
        self._keep(call, key_id)
        return call

    def _fitting(self, body: bytes, key_id: str) -> _Template | None:
        """Return the first template that fits `body`; to try a second one would cost a parse."""
        templates = self._templates.get(key_id)
        if templates is not None:
            for template in templates:
                if template.fits(body):
                    return template
        return None

    def forget_unused(self) -> None:
        """Drop the templates that were not used since the last call."""
        for key_id, templates in list(self._templates.items()):
            kept = [template for template in templates if template.was_used]
            self._bytes -= sum([template.size for template in templates if not template.was_used])
            for template in kept:
                template.was_used = False
            if kept:
                self._templates[key_id] = kept
            else:
                del self._templates[key_id]

    def _keep(self, call: Call, key_id: str) -> None:
        terms = call.terms
        if not _TEXTS.isdisjoint(terms.given) or len(terms.candidates) > MAX_REQUESTED:
            return
        span = find_messages(call.members)
        if span.value_start + len(call.body) - span.end > MAX_TEMPLATE_BYTES:
            return
        self._learnt += 1
        before, after = call.body[: span.value_start], call.body[span.end :]
        template = _Template(before, after, terms, self._learnt)
        if template.size > MAX_TEMPLATE_BYTES:
            return
        templates = self._templates.get(key_id, [])
        if len(templates) >= KEPT:
            self._remove_one(templates)
        self._templates[key_id] = sorted([*templates, template], key=_SIZE, reverse=True)
        self._bytes += template.size
        while self._bytes > MAX_BYTES:
            oldest = next(iter(self._templates))
            templates = self._templates.pop(oldest)
            self._remove_one(templates)
            if templates:
                self._templates[oldest] = templates

    def _remove_one(self, templates: list[_Template]) -> None:
        """Drop the oldest of `templates` that were not used lately, else the oldest."""
        unused = [template for template in templates if not template.was_used]
        for template in templates:
            template.was_used = False
        victim = min(unused or templates, key=_NUMBER)
        templates.remove(victim)
        self._bytes -= victim.size


def _parse_messages(body: bytes, template: _Template, ends: dict[int, int]) -> Any:
    """Return the value that stands in place of the messages, None if it is no JSON value, or null.

    If there is more than one, the end of the first goes into `ends`: it need not be searched again.
    """
    start, stop = len(template.before), len(body) - len(template.after)
    try:
        return _loads(raw_part(body, start, stop))
    except orjson.JSONDecodeError as exc:  # the whole body is parsed for what is wrong, and where
        end = end_by_error(exc, memoryview(body), start, stop)
        if end >= 0:
            ends[start] = end
    return None


def _make_call(body: bytes, template: _Template, messages: object) -> Call:
    """Return the call of a `body` that fits `template`. Raises RequestError for its messages."""
    raw = raw_part(body, len(template.before), len(body) - len(template.after))
    call = make_call(template.terms, messages, body, raw)
    template.was_used = True
    return call
