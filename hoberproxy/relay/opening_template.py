"""How the streams of a model server begin: like its last one, but for a few values.

Of a stream nothing is known before its first events, so they are parsed. But what a server writes
first, the role and the first content, differs from the stream before in an identifier, a time and a
text only. An `Opening` keeps what stands around these in an event that was parsed. Another event
with the same bytes around two strings without escapes and a number in these places says the same:
nothing else can have changed. Whatever differs in any other way is parsed.
"""

from __future__ import annotations

from typing import Any, Final

from .content_template import Shape, find_text
from .ending_template import MAX_EVENT_BYTES, Ending, is_lesson, read_number
from .event_edits import Edit, apply_edits

_BACKSLASH: Final = 0x5C
_QUOTE: Final = 0x22
_SPACE: Final = 0x20
_TILDE: Final = 0x7E
_KEPT: Final = 4  # events of a stream: filters of the prompt, the role, the first content
_NOWHERE: Final = -1


class Known:
    """What a stream knows of an event of its own, to be kept for others.

    `model` is the upstream's name and `pattern` the member that gives it, with the name at
    `value_at`; empty if the event has none. `edits` are what the client sees otherwise, which
    depends on whether it asked for usage.
    """

    __slots__ = ("edits", "model", "pattern", "value_at", "wants_usage")

    def __init__(
        self, model: str, pattern: bytes, value_at: int, edits: list[Edit], wants_usage: bool
    ) -> None:
        self.model = model
        self.pattern = pattern
        self.value_at = value_at
        self.edits = edits
        self.wants_usage = wants_usage


class Form:
    """An event but for its values. `befores` stand before each, the last one behind all.

    `raw_id` and the place of the text are those of the event that was `like` it last.
    """

    __slots__ = (
        "_ats",
        "_created_slot",
        "_edited",
        "_growth",
        "_id_slot",
        "_news",
        "_text_slot",
        "_texts",
        "has_text",
        "model",
        "pattern",
        "raw_id",
        "shape",  # of further events, behind the values of a stream's own; None if that is not all
        "text_end",
        "text_start",
        "value_at",
    )

    def __init__(
        self, texts: list[bytes], news: list[bytes], kinds: list[str], known: Known
    ) -> None:
        """`texts` stand around the values, which are of these `kinds`: id, created, text.

        `news` are what the client gets in place of the texts.
        """
        self.model = known.model
        self.pattern = known.pattern
        self.value_at = known.value_at
        self._texts, self._news = texts, news
        self._edited = [slot for slot in range(len(texts)) if news[slot] != texts[slot]]
        self._ats = [0] * len(texts)  # where each stands in the event that was `like` it last
        self._id_slot = kinds.index("id") if "id" in kinds else _NOWHERE
        self._created_slot = kinds.index("created") if "created" in kinds else _NOWHERE
        self._text_slot = kinds.index("text") if "text" in kinds else _NOWHERE
        self.has_text = "text" in kinds
        self.text_start = self.text_end = 0
        self._growth = sum(  # of what stands before the text
            len(news[slot]) - len(texts[slot]) for slot in range(self._text_slot + 1)
        )
        self.shape: Shape | None = None
        if self.has_text and kinds[-1] == "text":
            if all(slot >= len(kinds) - 1 for slot in self._edited):
                self.shape = Shape(texts[-2], texts[-1], news[-2], news[-1])
                self.shape.ending = Ending()
        self.raw_id = b""

    def is_like(self, event: bytes) -> bool:
        """Whether an event has the same bytes around other values of the same kind."""
        texts, ats, size = self._texts, self._ats, len(event)
        last = len(texts) - 1
        unusual: list[bytes] = []
        at = 0
        for slot in range(last):
            before = texts[slot]
            start = at + len(before)
            if event[at:start] != before:
                return False
            ats[slot] = at
            at = start
            if slot == self._created_slot:
                at = read_number(event, start)[1]
            else:
                is_usual = True
                # By hand: it is compiled, and methods of bytes are in no cache when it is needed.
                while at < size and (byte := event[at]) != _QUOTE:
                    if byte < _SPACE or byte == _BACKSLASH:
                        return False
                    if byte > _TILDE:
                        is_usual = False
                    at += 1
                if not is_usual:
                    unusual.append(event[start:at])
            if slot == self._id_slot:
                self.raw_id = event[start:at]
            elif at == start:
                return False
            elif slot == self._text_slot:
                self.text_start, self.text_end = start, at
        if event[at:] != texts[last]:
            return False
        ats[last] = at
        return not unusual or _are_inside_strings(unusual)

    def passed(self, event: bytes) -> bytes:
        """What the client sees of the event that was `like` it last."""
        if not self._edited:
            return event
        parts: list[bytes] = []
        end = 0
        for slot in self._edited:
            at = self._ats[slot]
            parts += (event[end:at], self._news[slot])
            end = at + len(self._texts[slot])
        parts.append(event[end:])
        return b"".join(parts)

    def shape_behind(self, event: bytes) -> tuple[bytes, Shape]:
        """The lead of the event that was `like` it last, and the shape that stands behind it."""
        if self.shape is not None:
            return event[: self.text_start - self.shape.head_size], self.shape
        passed = self.passed(event)
        new_start, new_end = self.text_start + self._growth, self.text_end + self._growth
        return b"", Shape(
            event[: self.text_start], event[self.text_end :], passed[:new_start], passed[new_end:]
        )


class Opening:
    """Of one model server's streams under one slug.

    What the client sees of an event depends on whether it asked for usage, so there are two forms.
    """

    __slots__ = ("_forms", "_unlike")

    def __init__(self) -> None:
        # By the event's place in its stream; behind them those for who asked for usage.
        self._forms: list[Form | None] = [None] * (2 * _KEPT)
        self._unlike = 0  # events in a row that were parsed

    def find(self, place: int, event: bytes, *, wants_usage: bool = False) -> Form | None:
        """The form of the event at this place of a stream, if it is as in an earlier one."""
        if place >= _KEPT:
            return None
        form = self._forms[place + _KEPT if wants_usage else place]
        if form is None or not form.is_like(event):
            return None
        self._unlike = 0
        return form

    def learn(
        self,
        place: int,
        event: bytes,
        document: dict[str, Any],
        text_of: dict[str, Any] | None,
        known: Known,
    ) -> None:
        """Keep the form of an event that was parsed to `document`.

        Duty of the caller: the event is one `data:` line and an empty one, both ended by LF, and no
        event before it had content; if it has, it is that of the delta `text_of`, else this is
        None. What the client sees of it differs by the edits of `known`, and by nothing else.
        """
        self._unlike += 1
        if not is_lesson(self._unlike):
            return
        if place >= _KEPT or len(event) > MAX_EVENT_BYTES or _has_logprobs(document):
            return
        spans = _find_values(event, document, text_of)
        form = _make_form(event, spans, known) if spans is not None else None
        # Nothing is taken for granted.
        if form is not None and form.is_like(event):
            if form.passed(event) == apply_edits(event, known.edits):
                self._forms[place + _KEPT if known.wants_usage else place] = form


def _make_form(event: bytes, spans: list[tuple[int, int, str]], known: Known) -> Form | None:
    """The form of an event with values at `spans`; None if an edit goes over one of them."""
    texts: list[bytes] = []
    news: list[bytes] = []
    at = edited = 0
    for start, end, _ in [*spans, (len(event), len(event), "")]:
        edits = [
            (first - at, last - at, new)
            for first, last, new in known.edits
            if at <= first and last <= start
        ]
        edited += len(edits)
        texts.append(event[at:start])
        news.append(apply_edits(event[at:start], edits))
        at = end
    if edited != len(known.edits):
        return None
    return Form(texts, news, [kind for _, _, kind in spans], known)


def _are_inside_strings(values: list[bytes]) -> bool:
    """Whether these, which have no quote, may stand within one in JSON (RFC 8259, 7) as they are.

    Separated, lest two halves of a character make a whole one. What is not printable but allowed is
    rare enough to be parsed.
    """
    try:
        text = b" ".join(values).decode()
    except UnicodeDecodeError:
        return False
    return "\\" not in text and text.isprintable()


def _has_logprobs(document: dict[str, Any]) -> bool:
    """Whether the text stands there once more, as a token: no other event is like it."""
    return any(choice.get("logprobs") for choice in document["choices"])


def _find_values(
    event: bytes, document: dict[str, Any], text_of: dict[str, Any] | None
) -> list[tuple[int, int, str]] | None:
    """Where in the event that stands which differs from stream to stream; None if not sure."""
    if _BACKSLASH in event:  # a name may be written with escapes, and what is found be another one
        return None
    spans: list[tuple[int, int, str]] = []
    upstream_id, created = document.get("id"), document.get("created")
    if isinstance(upstream_id, str):
        start = _find_member(event, b'"id":', b'"%b"' % upstream_id.encode("utf-8", "replace"))
        if not start:
            return None
        spans.append((start + 1, event.index(b'"', start + 1), "id"))
    if type(created) is int:
        digits = b"%d" % created
        start = _find_member(event, b'"created":', digits)
        if not start:
            return None
        spans.append((start, start + len(digits), "created"))
    if text_of is not None:
        start, end = find_text(event, text_of)
        if not end:
            return None
        spans.append((start, end, "text"))
    spans.sort()
    return spans


def _find_member(event: bytes, name: bytes, value: bytes) -> int:
    """Where the value of the one member of this name stands; 0 if it is not sure."""
    if event.count(name) == 1:
        start = event.index(name) + len(name)
        for place in (start, start + 1):  # the usual writers put one space there, or none
            if event[place : place + len(value)] == value:
                return place
    return 0
