"""Bodies that say the same around their messages, as most of an app's do.

Model, parameters and tools are the same bytes in each request, before and behind the messages. What
such a frame says is remembered. A body that begins and ends with its bytes has what is between them
in place of the messages; if that is one JSON value, it is these messages and nothing else, for
where a value begins and ends is not a matter of what comes before or behind it (RFC 8259): so only
they need be parsed and checked. A name given twice, or a member more, would be no such value.

Each key has frames of its own: nobody learns by the time of an answer what another one sends. What
is not asked for again goes within minutes, and members that are texts are not kept at all.
"""

from __future__ import annotations

from collections.abc import Generator
from operator import attrgetter
from typing import Any, Final

import orjson

from .body_scan import Survey, end_by_error, may_have_too_many
from .call import MAX_REQUESTED, Call, Terms, find_messages, raw_part
from .checks import check_survey, make_call, parse_call, parse_in_steps

KEPT: Final = 4  # frames of one key
MAX_FRAME_BYTES: Final = 64 * 1024  # the tools of an agent are most of it
MAX_BYTES: Final = 8 * 1024 * 1024  # of all frames; each form that goes upstream takes as much
OVERHEAD_BYTES: Final = 1024  # of a frame's objects
MEMBER_BYTES: Final = 192  # of one of its members'
STEPPED_BYTES: Final = 1024 * 1024  # a larger body is read in steps
# Members that carry what a model is to read or say, as the messages do.
_TEXTS: Final = frozenset(("prediction", "documents", "prompt", "input", "suffix"))
_OPENING: Final = 0x5B  # the brackets of an array
_CLOSING: Final = 0x5D
_SIZE: Final = attrgetter("size")
_NUMBER: Final = attrgetter("number")
_loads: Final = orjson.loads


class _Frame:
    __slots__ = ("after", "before", "number", "size", "terms", "was_used")

    def __init__(self, before: bytes, after: bytes, terms: Terms, number: int) -> None:
        self.before = before  # up to the messages' first byte
        self.after = after
        self.terms = terms
        self.number = number  # in the order in which they were learnt
        self.size = len(before) + len(after) + OVERHEAD_BYTES + MEMBER_BYTES * len(terms.members)
        self.was_used = False  # since it was learnt, or since somebody last asked

    def fits(self, body: bytes) -> bool:
        """Whether a body begins and ends as this one, with what may be an array between."""
        start, end = len(self.before), len(body) - len(self.after)
        return (
            start < end
            and body.startswith(self.before)
            and body.endswith(self.after)
            and body[start] == _OPENING  # spaces would be counted as prompt
            and body[end - 1] == _CLOSING
        )


class Frames:
    """One per process. Bounded in frames for each key, and in bytes over all keys."""

    def __init__(self) -> None:
        # Of each key the largest first: of two that fit, it says more. Keys in the order of use,
        # as far as it was looked at.
        self._frames: dict[str, list[_Frame]] = {}
        self._bytes = 0
        self._learnt = 0

    def read(self, body: bytes, key_id: str) -> Call:
        """As `parse_call`, for whose key it is ("" for all who need none)."""
        ends: dict[int, int] = {}
        frame = self._fitting(body, key_id)
        if frame is not None:
            if may_have_too_many(body):
                survey = Survey(body)
                while survey.step():
                    pass
                check_survey(survey)
            messages = _parse_messages(body, frame, ends)
            if messages is not None:
                return _make_call(body, frame, messages)
        call = parse_call(body, ends)
        self._keep(call, key_id)
        return call

    def read_in_steps(self, body: bytes, key_id: str) -> Generator[None, None, Call]:
        """Do as `read`, for a large body: pause where another step may take long."""
        survey = Survey(body)
        while survey.step():
            yield
        check_survey(survey)
        ends: dict[int, int] = {}
        frame = self._fitting(body, key_id)
        if frame is not None:
            messages = _parse_messages(body, frame, ends)
            yield
            if messages is not None:
                call = _make_call(body, frame, messages)
                yield
                return call
        call = yield from parse_in_steps(body, survey, ends)
        self._keep(call, key_id)
        return call

    def _fitting(self, body: bytes, key_id: str) -> _Frame | None:
        """The frame to try; a second guess would cost a parse, too."""
        frames = self._frames.get(key_id)
        if frames is not None:
            for frame in frames:
                if frame.fits(body):
                    return frame
        return None

    def forget_unused(self) -> None:
        """Let go of what nobody has asked for since the last time."""
        for key_id, frames in list(self._frames.items()):
            kept = [frame for frame in frames if frame.was_used]
            self._bytes -= sum([frame.size for frame in frames if not frame.was_used])
            for frame in kept:
                frame.was_used = False
            if kept:
                self._frames[key_id] = kept
            else:
                del self._frames[key_id]

    def _keep(self, call: Call, key_id: str) -> None:
        terms = call.terms
        if not _TEXTS.isdisjoint(terms.given) or len(terms.candidates) > MAX_REQUESTED:
            return
        span = find_messages(call.members)
        if span.value_start + len(call.body) - span.end > MAX_FRAME_BYTES:
            return
        self._learnt += 1
        before, after = call.body[: span.value_start], call.body[span.end :]
        frame = _Frame(before, after, terms, self._learnt)
        if frame.size > MAX_FRAME_BYTES:
            return
        frames = self._frames.get(key_id, [])
        if len(frames) >= KEPT:
            self._remove_one(frames)
        self._frames[key_id] = sorted([*frames, frame], key=_SIZE, reverse=True)
        self._bytes += frame.size
        while self._bytes > MAX_BYTES:
            oldest = next(iter(self._frames))
            frames = self._frames.pop(oldest)
            self._remove_one(frames)
            if frames:
                self._frames[oldest] = frames

    def _remove_one(self, frames: list[_Frame]) -> None:
        """The oldest, of those that were not used since the last time if there are any."""
        unused = [frame for frame in frames if not frame.was_used]
        for frame in frames:
            frame.was_used = False
        victim = min(unused or frames, key=_NUMBER)
        frames.remove(victim)
        self._bytes -= victim.size


def _parse_messages(body: bytes, frame: _Frame, ends: dict[int, int]) -> Any:
    """What stands where the frame has its messages, None if that is no JSON value, or null.

    If it is more than one, the end of the first goes into `ends`: it need not be searched again.
    """
    start, stop = len(frame.before), len(body) - len(frame.after)
    try:
        return _loads(raw_part(body, start, stop))
    except orjson.JSONDecodeError as exc:  # what is wrong, and where, is told of a whole body
        end = end_by_error(exc, memoryview(body), start, stop)
        if end >= 0:
            ends[start] = end
    return None


def _make_call(body: bytes, frame: _Frame, messages: object) -> Call:
    """The call of a body that fits; raises RequestError for the messages."""
    raw = raw_part(body, len(frame.before), len(body) - len(frame.after))
    call = make_call(frame.terms, messages, body, raw)
    frame.was_used = True
    return call
