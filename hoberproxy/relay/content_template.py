"""Events that are equal but for their text, passed on by comparing bytes.

A model server writes thousands of events a stream that differ in one string. The scanner
(relay/scanner.py) shows one that it has parsed and found to be plain content; from it a stencil
keeps what stands before and behind the text, as it comes and as it is passed on. A later event is
like it if it begins and ends with these bytes and what is in between is the inside of one JSON
string: then nothing else can have changed. Whatever differs in any other way goes the long way.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ..downstream.response import ResponseBody
from ..downstream.socket_writer import Sink
from ..protocol.http_body import SIZE_LINES, size_line, whole_chunk
from ..upstream.connection import ChunkTaker
from .ending_template import Ending

# As numbers: `in` takes bytes for a number first, and fails at that, at ten times the cost.
_LF: Final = 0x0A
_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
# The members of a delta that are text, as the two usual writers of JSON put them.
_MARKS: Final = tuple(
    (name, b'"%b":%b"' % (name.encode(), space))
    for name in ("content", "reasoning_content", "reasoning")
    for space in (b"", b" ")
)
# The inside of a JSON string: quotes only behind a backslash, and on one line.
_is_text: Final = re.compile(rb'[^"\\\r\n]*+(?>(?:\\[^\r\n][^"\\\r\n]*+)*)').fullmatch

_LARGEST: Final = 2048  # bytes of an event; twice as many, which it may grow to, have a line

# A server whose events change all the time is not asked again and again: learning costs a parse.
FIRST_LESSONS: Final = 2
WORTH_A_LESSON: Final = 16  # events passed since the last one


def find_text(event: bytes, delta: dict[str, Any]) -> tuple[int, int]:
    """Where the text of a delta begins and ends in its event; 0, 0 if it is not sure.

    A text with escapes stands there in another form, and is not found: another one will be plainer.
    """
    for name, mark in _MARKS:
        text = delta.get(name)
        if isinstance(text, str) and text and event.count(mark) == 1:
            raw = text.encode("utf-8", "replace")
            start = event.index(mark) + len(mark)
            end = start + len(raw)
            if event[start : end + 1] == raw + b'"' and _BACKSLASH not in raw:
                return start, end
            break
    return 0, 0


class Shape:
    """What like events have in common around their texts, as it comes and as it is passed on.

    One for all streams of a model server where it can be (relay/opening_template.py): else each
    would keep a kilobyte of its own. Before the `head` stands what is a stream's alone; then it has
    an `ending`, which tells how such streams end.
    """

    __slots__ = (
        "ending",
        "growth",
        "head",
        "head_size",
        "new_head",
        "new_tail",
        "tail",
        "tail_size",
    )

    def __init__(self, head: bytes, tail: bytes, new_head: bytes, new_tail: bytes) -> None:
        self.head, self.new_head, self.head_size = head, new_head, len(head)
        # With the CR LF behind the chunk.
        self.tail, self.new_tail, self.tail_size = tail + b"\r\n", new_tail + b"\r\n", len(tail)
        self.growth = len(new_head) + len(new_tail) - len(head) - len(tail)
        self.ending: Ending | None = None


_NO_SHAPE: Final = Shape(b"", b"", b"", b"")


class Stencil(ChunkTaker):
    """One stream's. `events` counts what was passed. Chunks are taken once it is `open`.

    Where the last event passed ends, if they were passed as such, is in `end`.
    """

    __slots__ = (
        "_answer",
        "_lessons",
        "_passed_before",
        "_shape",
        "_sink",
        "end",
        "events",
        "is_learnt",
        "lead",
    )
    # In this order, what an event touches stands side by side.
    lead: bytes
    _shape: Shape
    _sink: Sink
    events: int
    _answer: ResponseBody

    def __init__(self) -> None:
        self.lead = b""  # this stream's own bytes before the shape's, passed on as they come
        self._shape = _NO_SHAPE
        self.events = 0
        self.end = 0
        self.is_learnt = False
        self._lessons = 0
        self._passed_before = 0  # events, at the last lesson

    # Learning

    @property
    def ending(self) -> Ending | None:
        """How streams of this shape end; what is this stream's own in it is the `lead`."""
        return self._shape.ending

    @property
    def wants_lesson(self) -> bool:
        """Another event may be shown: there were few so far, or the last one paid."""
        if self._lessons < FIRST_LESSONS:
            return True
        return self.events - self._passed_before >= WORTH_A_LESSON

    def learn(self, event: bytes, passed: bytes, delta: dict[str, Any]) -> None:
        """Keep the form of a whole event, of which the client gets `passed`.

        Duty of the caller: the event is one `data:` line and an empty one, both ended by LF; its
        `delta` is its only content; and `passed` differs from it outside of the delta alone.
        """
        self._lessons += 1
        self._passed_before = self.events
        self.is_learnt = False
        start, end = find_text(event, delta)
        new_start, new_end = find_text(passed, delta)
        if end and new_end:
            self.keep(b"", Shape(event[:start], event[end:], passed[:new_start], passed[new_end:]))

    def keep(self, lead: bytes, shape: Shape) -> None:
        """Pass what begins with `lead` and has this shape."""
        if shape.growth < _LARGEST:
            self.lead, self._shape, self.is_learnt = lead, shape, True

    # Passing on

    def open(self, sink: Sink, answer: ResponseBody) -> None:
        """Write chunks to `sink`; what the answer's next bytes follow at once is held by it."""
        self._sink, self._answer = sink, answer

    def flush(self) -> None:
        self._answer.flush()

    def take(self, data: bytes) -> bytes:
        """Pass on whole chunks of one event each, framed anew, as far as they are alike.

        `data` begins with a chunk's size line. The path of nearly every event of a stream: one
        function for framing, scan and framing anew, since each call more is felt (bench/micro).
        Compares slices: compiled, a slice costs a third of `find` or `startswith` at an offset.
        """
        end = len(data) - 2
        if end > 5 and data[4] == _LF:
            start = 5
        elif end > 5 and data[3] == _LF:
            start = 4
        else:
            start = 0  # a longer or shorter size line, and not a whole chunk: left to `_pass_many`
        size = end - start
        lead, shape = self.lead, self._shape
        head = start + len(lead)
        text, tail = head + shape.head_size, end - shape.tail_size
        if text > tail or size >= _LARGEST or data[:start] != SIZE_LINES[size]:
            return self._take_many(data)
        if data[start:head] != lead or data[head:text] != shape.head or data[tail:] != shape.tail:
            return data
        inside = data[text:tail]
        if (_QUOTE in inside or _LF in inside or data[tail - 1] == _BACKSLASH) and not _is_text(
            inside
        ):
            return data
        size += shape.growth
        self.events += 1
        sink = self._sink
        sink.framed_bytes += size
        sink.write(b"".join((SIZE_LINES[size], lead, shape.new_head, inside, shape.new_tail)))
        return b""

    def _take_many(self, data: bytes) -> bytes:
        """Pass on the texts of as many chunks as are alike: one chunk for all of them."""
        texts: list[bytes] = []
        at = 0
        before, behind = self.lead + self._shape.head, self._shape.tail
        before_size, behind_size = len(before), self._shape.tail_size
        while True:
            start, end = whole_chunk(data, at)
            text, tail = start + before_size, end - behind_size
            if text > tail or data[start:text] != before or data[tail : end + 2] != behind:
                break
            texts.append(data[text:tail])
            at = end + 2
        if not texts or not _are_texts(texts):
            return data
        passed, rest = self._join(texts), data[at:]
        self._sink.framed_bytes += len(passed)
        chunk = b"".join((size_line(len(passed)), passed, b"\r\n"))
        if rest:
            self._answer.hold(chunk)
        else:
            self._sink.write(chunk)
        return rest

    def pass_events(self, data: bytes, at: int) -> bytes | None:
        """Whole events of a payload from `at` on, as far as they are alike; None without one."""
        if not self.is_learnt:
            return None
        before, behind = self.lead + self._shape.head, self._shape.tail[:-2]
        texts: list[bytes] = []
        while (end := data.find(b"\n\n", at + len(before)) + 2) > 1:
            text, tail = at + len(before), end - len(behind)
            if text > tail or not (data.startswith(before, at) and data.startswith(behind, tail)):
                break
            texts.append(data[text:tail])
            at = end
        if not texts or not _are_texts(texts):
            return None
        self.end = at
        return self._join(texts)

    def _join(self, texts: list[bytes]) -> bytes:
        self.events += len(texts)
        before, behind = self.lead + self._shape.new_head, self._shape.new_tail[:-2]
        return b"".join((before, (behind + before).join(texts), behind))


def _are_texts(texts: list[bytes]) -> bool:
    """Whether each is the inside of a JSON string. Most have no backslash: two looks at all."""
    text = texts[0]
    if len(texts) == 1 and _QUOTE not in text and _LF not in text:
        if not text or text[-1] != _BACKSLASH:  # the usual end of a stream: one more text
            return True
    joined = b"\n".join(texts)
    is_plain = _QUOTE not in joined and joined.count(b"\n") == len(texts) - 1
    if is_plain and joined.find(b"\\\n") < 0 and not joined.endswith(b"\\"):
        return True
    return all(map(_is_text, texts))
