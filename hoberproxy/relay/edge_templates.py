"""Recognises the first and the last events of a stream by those of earlier streams.

What a server writes before and with the first text, and behind the last one, differs from stream to
stream in identifiers, times, texts and the numbers of a usage. An event that was parsed is kept
without these values, together with what the scanner has read in it. Of a later event that matches
(protocol/byte_template.py) only these values are read.
"""

from __future__ import annotations

from typing import Any, Final

from ..dialects.chat import content_of, is_usage_event
from ..protocol.byte_template import OBJECT, STRING, TEXT, ByteTemplate, make_template
from ..protocol.json_bytes import load_json
from .content_template import has_text
from .event_edits import Edit, apply_edits
from .varying_values import TOP, Found, find_values

MAX_EVENTS: Final = 8  # of a server's streams under one slug: for who asks for usage, and who not
MAX_SERVERS: Final = 256  # and slugs: models behind wildcards are named by clients
MAX_EVENT_BYTES: Final = 4096
MAX_VALUES: Final = 32
_FIRST_SPECIMENS: Final = 8
_WORTH_A_SPECIMEN: Final = 64  # events that had to be parsed since the last one
_BACKSLASH: Final = 0x5C
_OWN: Final = (b"id", b"created")  # of each stream
_USAGES: Final = (b"usage", b"timings", b"x_groq")  # members that may have one


class KnownEvent:
    """An event without its values, and what the scanner reads in it.

    `raw_id` and `usage_document` are those of the event that has matched last. `content` is for the
    ContentTemplate of a stream whose first text is in such an event.
    """

    __slots__ = (
        "_found",
        "_id_hole",
        "_usages",
        "content",
        "finish_reason",
        "has_content",
        "is_opening",
        "is_usage",
        "model",
        "raw_id",
        "template",
        "usage_document",
        "wants_usage",
    )

    def __init__(
        self,
        template: ByteTemplate,
        found: list[Found],
        document: dict[str, Any],
        model: str,
        wants_usage: bool,
    ) -> None:
        self.template = template
        self.wants_usage = wants_usage  # what the client gets depends on it
        self.model = model  # the upstream's name for it; "" if it has none
        self.content: ByteTemplate | None = None
        self.is_opening = False  # behind content it is left to the template of that
        self.finish_reason, self.has_content = content_of(document)
        self.is_usage = is_usage_event(document)
        self.raw_id = b""
        self.usage_document: dict[str, Any] = {}  # empty if it has no usage
        self._found = [(kind, where, name) for _, _, kind, where, name in found]
        self._note_holes()

    def _note_holes(self) -> None:
        """Note which holes are the identifier, and members that may have a usage."""
        self._id_hole = -1
        self._usages: list[tuple[int, str]] = []
        for slot, (kind, where, name) in enumerate(self._found):
            if kind == OBJECT:
                self._usages.append((self.template.hole_of(slot), name.decode()))
            elif where == TOP and name == b"id" and kind == STRING:
                self._id_hole = self.template.hole_of(slot)

    def learn_from(self, event: bytes) -> bool:
        """Make holes of the values that differ in `event`; return False if anything else does."""
        if self.template.learn_from(event, 0) != len(event):
            return False
        self._note_holes()
        matches = self.match(event, 0) > 0
        self.template.drop_values()
        return matches

    def match(self, data: bytes, at: int) -> int:
        """Return where the event ends that begins at `at` and matches; 0 if none does."""
        end = self.template.match(data, at)
        if end and not self._read(data[at:end]):
            self.template.drop_values()
            return 0
        return end

    def _read(self, event: bytes) -> bool:
        """Read the values of `event`, which the template has matched; return False to refuse it."""
        template = self.template
        if len(event) > 2 * MAX_EVENT_BYTES:
            return False
        if TEXT in template.kinds and not has_text(template):
            return False
        if not event.isascii() and not _is_utf8(event):
            return False
        values = template.values
        if self._id_hole >= 0:
            self.raw_id = values[self._id_hole]
            if _BACKSLASH in self.raw_id:
                return False
        if self._usages:
            self.usage_document = {}
            for hole, name in self._usages:
                try:
                    self.usage_document[name] = load_json(values[hole])
                except ValueError:
                    return False
        return True

    def put_together(self, out: list[bytes]) -> None:
        """Append to `out` the event that has matched last, edited, and drop its values."""
        self.template.put_together(out)
        self.template.drop_values()


class EdgeTemplates:
    """The first and last events of one model server's streams under one slug."""

    __slots__ = ("_events", "_unmatched", "following")

    def __init__(self) -> None:
        self._events: list[KnownEvent] = []  # the oldest first
        self.following = 0
        self._unmatched = 0  # events in a row that had to be parsed

    def find(
        self, data: bytes, at: int, *, wants_usage: bool, is_opening: bool, first: int = 0
    ) -> tuple[KnownEvent | None, int]:
        """Return the known event that begins at `at`, and where it ends.

        With `is_opening` there was no content before it. The event with the number `first` is tried
        first; afterwards `following` is the number of the one behind it.
        """
        count = len(self._events)
        for place in range(first, first + count):
            known = self._events[place % count]
            if known.wants_usage is wants_usage and (is_opening or not known.is_opening):
                end = known.match(data, at)
                if end:
                    self._unmatched = 0
                    self.following = (place + 1) % count
                    return known, end
        return None, 0

    def learn_from(
        self,
        event: bytes,
        payload_at: int,
        edits: list[Edit],
        document: dict[str, Any],
        *,
        wants_usage: bool,
    ) -> KnownEvent | None:
        """Recognise events like `event` from now on; return what is kept, None if nothing is.

        Duty of the caller: `event` is one `data:` line, with its payload at `payload_at`, and an
        empty line; `document` is the value of the payload, and `edits` are made for the client.
        """
        self._unmatched += 1
        if self._unmatched > _FIRST_SPECIMENS and self._unmatched % _WORTH_A_SPECIMEN:
            return None
        for known in self._events:
            if known.wants_usage is wants_usage and known.learn_from(event):
                return known
        return self._add(event, payload_at, edits, document, wants_usage=wants_usage)

    def _add(
        self,
        event: bytes,
        payload_at: int,
        edits: list[Edit],
        document: dict[str, Any],
        *,
        wants_usage: bool,
    ) -> KnownEvent | None:
        known = _make_known(event, payload_at, edits, document, wants_usage=wants_usage)
        if known is not None:
            self._events = [*self._events[1 - MAX_EVENTS :], known]
        return known


def _make_known(
    event: bytes,
    payload_at: int,
    edits: list[Edit],
    document: dict[str, Any],
    *,
    wants_usage: bool,
) -> KnownEvent | None:
    if len(event) > MAX_EVENT_BYTES or event.count(b'"model"') > 1 or not _is_sure(document):
        return None
    found = find_values(event, payload_at, usages=_USAGES)
    if found is None:
        return None
    # What is empty must stay so: a text more would be content.
    found = [each for each in found if each[2] != TEXT or each[1] > each[0]]
    if len(found) > MAX_VALUES:
        return None
    values = [
        (start, end, kind, where != TOP or kind == OBJECT or name in _OWN)
        for start, end, kind, where, name in found
    ]
    template = make_template(event, values, edits)
    model = document.get("model")
    known = KnownEvent(
        template, found, document, model if isinstance(model, str) else "", wants_usage
    )
    # Nothing is taken for granted.
    if known.match(event, 0) != len(event):
        return None
    passed: list[bytes] = []
    known.put_together(passed)
    return known if b"".join(passed) == apply_edits(event, edits) else None


def _is_sure(document: dict[str, Any]) -> bool:
    """Return whether no choice of an event has a usage or a whole message."""
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict) or choice.get("usage") or choice.get("message"):
            return False
    return True


def _is_utf8(event: bytes) -> bool:
    try:
        event.decode()
    except UnicodeDecodeError:
        return False
    return True
