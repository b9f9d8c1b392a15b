"""Passes the content events of a stream on by comparing them with an earlier one, byte by byte.

A model server writes thousands of events a stream that differ in one text, or in a handful of
values beside it. From an event that the scanner (relay/scanner.py) has parsed and found to be plain
content, a ContentTemplate is made. A later event that matches (protocol/byte_template.py) can say
nothing else: it passes with the same edits. Any other event is left to the scanner.

Which values may differ is settled in relay/varying_values.py. The numbers of a usage stay here
until the scanner takes them.
"""

from __future__ import annotations

from typing import Any, Final

from ..dialects.chat import content_of
from ..downstream.response import ResponseBody
from ..downstream.socket_writer import Sink
from ..protocol.byte_template import (
    COUNT,
    STRING,
    TEXT,
    ByteTemplate,
    is_text,
    make_template,
)
from ..protocol.http_body import SIZE_LINES, size_line, whole_chunk
from ..upstream.connection import ChunkTaker
from .event_edits import Edit, apply_edits
from .varying_values import TIMINGS, USAGE, find_values

# As numbers: `in` takes bytes for a number first, and fails at that, at ten times the cost.
_LF: Final = 0x0A
_CR: Final = 0x0D
_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C

_LARGEST: Final = 2048  # bytes of an event; twice as many, which it may grow to, have a line
_MOST_TOGETHER: Final = 64  # texts that are checked together
_NEVER: Final = 1 << 40  # bytes that no event has
_NOTHING: Final[list[bytes]] = []  # for all streams
_USUAL: Final = (bytes((TEXT,)), bytes((TEXT, TEXT)), bytes((TEXT, STRING)))
MAX_SPECIMEN_BYTES: Final = 8192
MAX_VALUES: Final = 96  # of a specimen that may differ
MAX_USAGES: Final = 4  # that wait to be taken

# A server whose events change all the time is not learnt from again and again: it costs a parse.
FIRST_SPECIMENS: Final = 4
WORTH_A_SPECIMEN: Final = 16  # events passed since the last one


class ContentTemplate(ChunkTaker):
    """What the content events of one stream have in common, and how the client gets them.

    `events` counts the events passed, and `end` is where the last one that `pass_events` passed
    ends. Chunks may be given to `take` after `open`.
    """

    __slots__ = (
        "_bare_tail",
        "_between",
        "_between_size",
        "_blank",
        "_body",
        "_counts",
        "_events_before",
        "_events_when_new",
        "_grows",
        "_growth",
        "_has_counts",
        "_new_bare_tail",
        "_new_between",
        "_new_prefix",
        "_new_tail",
        "_prefix",
        "_prefix_size",
        "_sink",
        "_specimens",
        "_tail",
        "_tail_size",
        "_template",
        "_together",
        "_unlike",
        "_usages",
        "end",
        "events",
        "is_learnt",
    )
    # First and in this order, what an event touches: side by side, in two cache lines.
    _prefix: bytes
    _new_prefix: bytes
    _prefix_size: int
    _tail: bytes
    _new_tail: bytes
    _tail_size: int
    _between: bytes
    _new_between: bytes
    _growth: int
    events: int
    _sink: Sink
    _body: ResponseBody

    def __init__(self) -> None:
        # Of an event that has one or two texts, and nothing else that differs:
        self._prefix = self._new_prefix = b""
        self._prefix_size = _NEVER
        self._tail = self._new_tail = b""  # behind it, with the CR LF behind the chunk
        self._tail_size = 0
        self._bare_tail = self._new_bare_tail = b""
        self._blank = b"\n\n"  # with which the tail ends
        self._together = _MOST_TOGETHER
        self._has_counts = False
        self._between = self._new_between = b""  # two texts
        self._between_size = 0
        self._growth = 0
        self.events = 0
        self.end = 0
        self.is_learnt = False
        self._template: ByteTemplate | None = None
        self._usages = _NOTHING  # events with a usage, the newest last
        self._counts = _NOTHING  # of the newest
        self._grows = False  # the last two of these are the ends of some whose counts grow
        self._events_when_new = 0  # passed when the template last changed
        self._specimens = 0  # that were learnt from
        self._unlike = 0  # whole events since the last one that did not match
        self._events_before = 0  # passed before the last one

    # Learning

    @property
    def wants_specimen(self) -> bool:
        """Whether another event may be learnt from: few were, many passed since, or many did not.

        Those that did not may be the usual ones, and the last specimen a rare one.
        """
        if self._specimens < FIRST_SPECIMENS or self._unlike >= WORTH_A_SPECIMEN:
            return True
        return self.events - self._events_before >= WORTH_A_SPECIMEN

    def learn_from(
        self, event: bytes, payload_at: int, edits: list[Edit], document: dict[str, Any]
    ) -> bool:
        """Pass events like `event` from now on, edited as `edits` edit this one.

        Return False if it is not like others: it has no text, or it ends a choice.

        Duty of the caller: `event` is one `data:` line, with its payload at `payload_at`, and an
        empty line; `document` is the value of the payload, and the scanner has read it.
        """
        self._specimens += 1
        self._unlike = 0
        self._events_before = self.events
        template = _template_of(event, payload_at, edits, document)
        if template is not None:
            self._template, self.is_learnt = template, True
            self._events_when_new = self.events
            self._note_usual(template)
        return template is not None

    def _note_usual(self, template: ByteTemplate) -> None:
        """Prepare the comparison of events that have one or two texts and no other hole."""
        self._prefix_size = _NEVER
        self._has_counts = COUNT in template.kinds
        holes, literals, news = len(template.kinds), template.literals, template.new_literals
        if template.kinds not in _USUAL:
            return
        growth = 0
        for slot in range(len(news)):
            growth += len(news[slot]) - len(literals[slot])
        if growth >= _LARGEST:
            return
        self._growth = growth
        self._prefix, self._new_prefix = literals[0], news[0]
        self._prefix_size, self._tail_size = len(literals[0]), len(literals[-1])
        self._bare_tail, self._new_bare_tail = literals[-1], news[-1]
        self._blank = b"\r\n\r\n" if literals[-1].endswith(b"\r\n\r\n") else b"\n\n"
        self._tail, self._new_tail = literals[-1] + b"\r\n", news[-1] + b"\r\n"
        is_pair = holes == 2
        # Without the quote that ends the first text.
        self._between, self._new_between = (literals[1][1:], news[1]) if is_pair else (b"", b"")
        self._between_size = len(self._between)

    def adopt(self, shared: ByteTemplate, event: bytes) -> None:
        """Pass events like `event`, by the template that another stream has shared."""
        template = shared.copy_for(event)
        if template is not None:
            self._template, self.is_learnt = template, True
            self._note_usual(template)

    def share(self, event: bytes) -> ByteTemplate | None:
        """Return a template for `adopt`, without any value of this stream; None without one.

        `event` is the one that `learn_from` has had last.
        """
        template = self._template.copy_for(event) if self._template is not None else None
        if template is not None:
            template.forget_values()
        return template

    # Passing on

    def open(self, sink: Sink, body: ResponseBody) -> None:
        """Write chunks to `sink`, or to `body` where more bytes follow at once."""
        self._sink, self._body = sink, body

    def flush(self) -> None:
        self._body.flush()

    def take(self, data: bytes) -> bytes:
        """Pass on whole chunks of one event each, framed again, as far as they match.

        `data` begins with a chunk's size line. Nearly every event of a stream takes this path, so
        one function reads the framing, compares and frames again: a call costs 2 % of it.
        Compares slices: compiled, a slice costs a third of `find` or `startswith` at an offset.
        """
        end = len(data) - 2
        if end > 5 and data[4] == _LF:
            start = 5
        elif end > 5 and data[3] == _LF:
            start = 4
        else:
            start = 0  # a longer or shorter size line, and not a whole chunk: left to `_take_many`
        size = end - start
        at, tail = start + self._prefix_size, end - self._tail_size
        if (
            at > tail
            or size >= _LARGEST
            or data[start:at] != self._prefix
            or data[tail:] != self._tail
            or data[:start] != SIZE_LINES[size]
        ):
            return self._take_many(data)
        text = data[at:tail]
        between = self._between
        if between:
            # One byte is looked for: that costs a tenth of a search for all that is between.
            text, _, other = text.partition(b'"')
            at = self._between_size
            if other[:at] != between:
                return self._take_many(data)
            other = other[at:]
            if not (other.isalnum() or is_text(other)):
                return self._take_many(data)
        if not text or _QUOTE in text or _LF in text or _CR in text or text[-1] == _BACKSLASH:
            if not text or not is_text(text):
                return self._take_many(data)
        size += self._growth
        self.events += 1
        sink = self._sink
        sink.framed_bytes += size
        line = SIZE_LINES[size]
        if between:
            parts = (line, self._new_prefix, text, self._new_between, other, self._new_tail)
            sink.write(b"".join(parts))
        else:
            sink.write(b"".join((line, self._new_prefix, text, self._new_tail)))
        return b""

    def _take_many(self, data: bytes) -> bytes:
        """Pass on as many chunks as match: one chunk for all of them."""
        parts: list[bytes] = []
        at = self._pass_all(data, 0, parts, is_framed=True)
        if not at:
            return data
        passed, rest = b"".join(parts), data[at:]
        self._sink.framed_bytes += len(passed)
        chunk = b"".join((size_line(len(passed)), passed, b"\r\n"))
        if rest:
            self._body.hold(chunk)
        else:
            self._sink.write(chunk)
        return rest

    def pass_events(self, data: bytes, at: int) -> bytes | None:
        """Return whole events of a payload from `at` on, as far as they match; None without one."""
        if not self.is_learnt:
            return None
        parts: list[bytes] = []
        self.end = self._pass_all(data, at, parts, is_framed=False)
        return b"".join(parts) if parts else None

    def _pass_all(self, data: bytes, at: int, parts: list[bytes], *, is_framed: bool) -> int:
        """Add to `parts` what the client gets of the events from `at` on, as far as they match.

        With `is_framed` each event is a chunk. Return where the last one ends.
        """
        are_texts = True
        while at < len(data):
            if are_texts:
                end = self._pass_texts(data, at, parts, is_framed=is_framed)
                are_texts = end >= at
                if end > at:
                    at = end
                    continue
            start, stop = whole_chunk(data, at) if is_framed else (at, 0)
            if is_framed and not stop:
                break
            end = self._pass(data, start, stop, parts)
            if not end:
                break
            at = end + 2 if is_framed else end
        return at

    def _pass_texts(self, data: bytes, at: int, parts: list[bytes], *, is_framed: bool) -> int:
        """Do as `_pass_all` for some events that have one or two texts, as `take` does for one.

        Return -1, and pass nothing, if there may be other things than texts in between.
        """
        prefix, prefix_size, tail = self._prefix, self._prefix_size, self._bare_tail
        between, between_size = self._between, self._between_size
        texts: list[bytes] = []
        others: list[bytes] = []
        blank = self._blank
        while len(texts) < self._together:
            if is_framed:
                start, end = whole_chunk(data, at)
            else:
                start, end = at, data.find(blank, at + prefix_size) + len(blank)
            first, last = start + prefix_size, end - self._tail_size
            if first >= last or data[start:first] != prefix or data[last:end] != tail:
                break
            text = data[first:last]
            if between:
                text, _, other = text.partition(b'"')
                if not text or other[:between_size] != between:
                    break
                others.append(other[between_size:])
            texts.append(text)
            at = end + 2 if is_framed else end
        if texts:
            if not _are_texts(texts) or (others and not _are_values(others)):
                self._together = 1  # they are looked at again: not many times as many
                return -1
            self._together = min(2 * self._together, _MOST_TOGETHER)
            self.events += len(texts)
            self._put_together(texts, others, parts)
        return at

    def _put_together(self, texts: list[bytes], others: list[bytes], parts: list[bytes]) -> None:
        """Add to `parts` what the client gets of events with these texts."""
        new_prefix, new_tail = self._new_prefix, self._new_bare_tail
        inner = new_tail + new_prefix
        parts.append(new_prefix)
        if not others:
            parts.append(inner.join(texts))
        else:
            new_between = self._new_between
            for number in range(len(texts)):
                if number:
                    parts.append(inner)
                parts.append(texts[number])
                parts.append(new_between)
                parts.append(others[number])
        parts.append(new_tail)

    def _pass(self, data: bytes, start: int, end: int, parts: list[bytes]) -> int:
        """Add to `parts` what the client gets of the event at `start`, if it matches.

        It has to end at `end`, unless that is 0. Return where it ends, 0 if it does not match.
        """
        template = self._template
        if template is None:
            return 0
        matched = template.match(data, start)
        if not matched or (end and matched != end):
            return 0
        if not has_text(template):  # some may count as content, others not
            return 0
        if self._has_counts and not self._keep_usage(data[start:matched], template):
            return 0
        template.put_together(parts)
        self.events += 1
        return matched

    def learn_like(self, event: bytes) -> bytes | None:
        """Return what the client gets of a whole event that differs in values that may differ.

        Events that differ in the same values match from now on. Return None if `event` differs in
        anything else.
        """
        template = self._template
        # A value that differs in two events in a row is a hole; another may stay for a while.
        widen = self.events == self._events_when_new
        if template is None or template.learn_from(event, 0, widen=widen) != len(event):
            self._unlike += 1
            return None
        self._events_when_new = self.events + 1
        self._note_usual(template)
        parts: list[bytes] = []
        return b"".join(parts) if self._pass(event, 0, len(event), parts) else None

    # Usage

    def _keep_usage(self, event: bytes, template: ByteTemplate) -> bool:
        """Keep the event for `take_usages`; return False if it is too long, or too many wait."""
        if len(event) > MAX_SPECIMEN_BYTES:
            return False
        kinds, values = template.kinds, template.values
        counts = [values[slot] for slot in range(len(kinds)) if kinds[slot] == COUNT]
        if self._grows and not _are_less(counts, self._counts):
            self._usages[-1] = event
        elif len(self._usages) < MAX_USAGES:
            # The first of some whose counts grow stays: a later one may look like one before it.
            self._grows = bool(self._usages) and not _are_less(counts, self._counts)
            self._usages = [*self._usages, event]
        else:
            return False
        self._counts = counts
        return True

    def take_usages(self) -> list[bytes]:
        """Return the events, in order, whose usages make up that of all that was passed.

        Of events whose counts only grow these are the first and the last one.
        """
        usages, self._usages = self._usages, _NOTHING
        self._grows = False
        return usages


def _are_texts(texts: list[bytes]) -> bool:
    """Return whether each may stand inside a JSON string: looked at together, as most are plain."""
    joined = b"\n".join(texts)
    if _QUOTE not in joined and _CR not in joined and joined[-1] != _BACKSLASH:
        if joined.count(b"\n") == len(texts) - 1 and joined.find(b"\\\n") < 0:
            return True
    return all(map(is_text, texts))


def _are_values(values: list[bytes]) -> bool:
    """Return whether each, which may be empty, may stand inside a JSON string."""
    joined = b"".join(values)
    return not joined or joined.isalnum() or all(map(is_text, values))


def _are_less(counts: list[bytes], known: list[bytes]) -> bool:
    """Return whether any of `counts` is less than in `known`, or the two differ in number."""
    if len(counts) != len(known):
        return True
    for slot in range(len(counts)):
        new, old = counts[slot], known[slot]
        if len(new) < len(old) or (len(new) == len(old) and new < old):
            return True
    return False


def has_text(template: ByteTemplate) -> bool:
    """Return whether any text is not empty in what `template` has matched last."""
    for slot, kind in enumerate(template.kinds):
        if kind == TEXT and template.values[slot]:
            return True
    return False


def _template_of(
    event: bytes, payload_at: int, edits: list[Edit], document: dict[str, Any]
) -> ByteTemplate | None:
    """Return the template of events like `event`; None if it has more to be read than its text."""
    if len(event) > MAX_SPECIMEN_BYTES or not _is_content(document):
        return None
    found = find_values(event, payload_at)
    if found is None or len(found) > MAX_VALUES:
        return None
    has_counts = _has_counts(document)
    values = [
        (start, end, kind, kind == COUNT or (kind == TEXT and end > start))
        for start, end, kind, where, _ in found
        if has_counts or (where != USAGE and where != TIMINGS)
    ]
    template = make_template(event, values, edits)
    passed: list[bytes] = []
    # Nothing is taken for granted.
    if template.learn_from(event, 0) != len(event) or TEXT not in template.kinds:
        return None
    template.put_together(passed)
    return template if b"".join(passed) == apply_edits(event, edits) else None


def _is_content(document: dict[str, Any]) -> bool:
    """Return whether an event has content and ends no choice."""
    choices = document.get("choices")
    if not isinstance(choices, list) or not content_of(document)[1]:
        return False
    return all([isinstance(each, dict) and not each.get("finish_reason") for each in choices])


def _has_counts(document: dict[str, Any]) -> bool:
    """Return whether an event has a usage with tokens of a completion (`newest_usage`).

    Its counts may differ in like events. Any other usage must be the same in all of them.
    """
    usage, timings = document.get("usage"), document.get("timings")
    if isinstance(usage, dict):
        count = usage.get("completion_tokens")
    elif isinstance(timings, dict) and document.get("x_groq") is None:
        count = timings.get("predicted_n")
    else:
        return False
    return type(count) is int and count > 0
