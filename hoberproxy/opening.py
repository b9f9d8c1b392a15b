"""How the streams of a model server begin: like its last one, but for a few values.

Of a stream nothing is known before its first events, so they are parsed. But what a server writes
first, the role and the first content, differs from the stream before in an identifier, a time and a
text only. An `Opening` keeps what stands around these in an event that was parsed. Another event
with the same bytes around two strings without escapes and a number in these places says the same:
nothing else can have changed. Whatever differs in any other way is parsed.
"""

from __future__ import annotations

from typing import Any, Final

from .ending import MAX_EVENT_BYTES, Ending, is_lesson, read_number
from .stencil import Shape, find_text

_BACKSLASH: Final = 0x5C
_QUOTE: Final = 0x22
_SPACE: Final = 0x20
_TILDE: Final = 0x7E
_KEPT: Final = 4  # events of a stream: filters of the prompt, the role, the first content
_NOWHERE: Final = -1


class Form:
    """An event but for its values. `befores` stand before each, `end` behind the last one.

    `raw_id` and the place of the text are those of the event that was `like` it last.
    """

    __slots__ = (
        "_befores",
        "_created_slot",
        "_end",
        "_id_slot",
        "_name_at",
        "_name_slot",
        "_named",
        "_text_slot",
        "has_text",
        "model",
        "pattern",
        "raw_id",
        "replacement",
        "shape",  # of further events, behind the values of a stream's own; None if that is not all
        "text_end",
        "text_start",
    )

    def __init__(
        self,
        event: bytes,
        spans: list[tuple[int, int, str]],
        model: str,
        pattern: bytes,
        replacement: bytes,
    ) -> None:
        """`spans` are those of the values in order, with what each is: id, created, text."""
        self.model = model  # the upstream's name for it, "" if the event has none
        self.pattern = pattern  # the member that names it, b"" if the event has none
        self.replacement = replacement
        self._befores: list[bytes] = []
        kinds: list[str] = []
        at = 0
        for start, end, kind in spans:
            self._befores.append(event[at:start])
            kinds.append(kind)
            at = end
        self._end = event[at:]
        # Where the model is named, and what the client gets in place of that.
        self._name_slot, self._name_at, self._named = _NOWHERE, 0, b""
        for slot, text in enumerate((*self._befores, self._end)):
            if pattern and pattern in text:
                self._name_slot, self._named = slot, text.replace(pattern, replacement)
        self._id_slot = kinds.index("id") if "id" in kinds else _NOWHERE
        self._created_slot = kinds.index("created") if "created" in kinds else _NOWHERE
        self._text_slot = kinds.index("text") if "text" in kinds else _NOWHERE
        self.has_text = "text" in kinds
        self.text_start = self.text_end = 0
        self.shape: Shape | None = None
        if self.has_text and kinds[-1] == "text":
            head, tail = self._befores[-1], self._end
            if not pattern or pattern in head or pattern in tail:
                self.shape = self._make_shape(head, tail)
                self.shape.ending = Ending()
        self.raw_id = b""

    def is_like(self, event: bytes) -> bool:
        """Whether an event has the same bytes around other values of the same kind."""
        befores, size = self._befores, len(event)
        unusual: list[bytes] = []
        at = 0
        for slot in range(len(befores)):
            before = befores[slot]
            start = at + len(before)
            if event[at:start] != before:
                return False
            if slot == self._name_slot:
                self._name_at = at
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
        if event[at:] != self._end:
            return False
        if len(befores) == self._name_slot:
            self._name_at = at
        return not unusual or _are_inside_strings(unusual)

    def passed(self, event: bytes) -> bytes:
        """What the client sees of the event that was `like` it last."""
        if self._name_slot == _NOWHERE:
            return event
        at, slot = self._name_at, self._name_slot
        text = self._befores[slot] if slot < len(self._befores) else self._end
        return b"".join((event[:at], self._named, event[at + len(text) :]))

    def shape_behind(self, event: bytes) -> tuple[bytes, Shape]:
        """The lead of the event that was `like` it last, and the shape that stands behind it."""
        if self.shape is not None:
            return event[: self.text_start - self.shape.head_size], self.shape
        return b"", self._make_shape(event[: self.text_start], event[self.text_end :])

    def _make_shape(self, head: bytes, tail: bytes) -> Shape:
        if not self.pattern:
            return Shape(head, tail, head, tail)
        pattern, replacement = self.pattern, self.replacement
        return Shape(
            head, tail, head.replace(pattern, replacement), tail.replace(pattern, replacement)
        )


class Opening:
    """Of one model server's streams under one slug."""

    __slots__ = ("_forms", "_unlike")

    def __init__(self) -> None:
        self._forms: list[Form | None] = [None] * _KEPT  # by the event's place in its stream
        self._unlike = 0  # events in a row that were parsed

    def find(self, place: int, event: bytes) -> Form | None:
        """The form of the event at this place of a stream, if it is as in an earlier one."""
        form = self._forms[place] if place < _KEPT else None
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
        model: str,
        pattern: bytes,
        replacement: bytes,
    ) -> None:
        """Keep the form of an event that was parsed to `document`.

        Duty of the caller: the event is one `data:` line and an empty one, both ended by LF, and no
        event before it had content; if it has, it is that of the delta `text_of`, else this is
        None. What the client sees of it differs in that `replacement` is in place of `pattern`,
        the only one, which names the `model`; or in nothing, if they are empty.
        """
        self._unlike += 1
        if not is_lesson(self._unlike):
            return
        if place >= _KEPT or len(event) > MAX_EVENT_BYTES or _has_logprobs(document):
            return
        spans = _find_values(event, document, text_of)
        if spans is None:
            return
        form = Form(event, spans, model, pattern, replacement)
        # Nothing is taken for granted.
        if form.is_like(event) and form.passed(event) == event.replace(pattern, replacement):
            self._forms[place] = form


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
