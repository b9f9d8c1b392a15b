"""What passes through of a stream of events, and what is learnt from it on the way.

The scanner takes the payload of an upstream's SSE response in pieces of any size and returns the
bytes to pass on: the same bytes, but for the top-level `model` of each event, which becomes the
catalog's slug, and the usage event, which is left out where the client did not ask for it.

Theory of operation. Until the first content everything is held back, so that another endpoint can
still be tried, and every event is parsed that is not as in the last stream (opening.py). After it
bytes flow: events that differ from one before in their text alone pass by comparison (stencil.py,
which the connection asks even before framing is walked), other whole events in which nothing is
unusual pass together (`_pass_whole`, a handful of C calls for however many), the last ones if they
are as in another stream (ending.py), the rest one by one (`_pass_event`). Only an unfinished event
is held, up to HOLD_LIMIT_BYTES; a longer one cannot be a usage event and flows through a
MemberRewriter in flat memory.
"""

from __future__ import annotations

from typing import Any, Final

from .chunks import content_of, is_usage_event, only_delta
from .ending import Ending
from .events import BLANK_LINE, DONE, Data, blank_line_end, is_one_event, parse_event
from .lenient import load_json
from .members import Member, MemberRewriter, find_member, model_member
from .opening import Opening
from .stencil import Stencil
from .usage import Usage, newest_usage

HOLD_LIMIT_BYTES = 16 * 1024
OPENING_LIMIT_BYTES: Final = 64 * 1024
_CR: Final = 0x0D
_BACKSLASH: Final = 0x5C
_LF_LF: Final = b"\n\n"
_DONE_EVENT: Final = b"data: [DONE]\n\n"
_VALUE_AT: Final = len(b'"model":')


class StreamFailure(Exception):
    """The stream itself says that it failed, or is no stream of completion chunks.

    `is_error_event` tells an upstream's own error from bytes that are not what they should be;
    `upstream_status` is the HTTP status an error event names, if it names one, and `document` the
    value of its data.
    """

    def __init__(
        self,
        message: str,
        *,
        is_error_event: bool,
        upstream_status: int | None = None,
        document: object = None,
    ):
        super().__init__(message)
        self.is_error_event = is_error_event
        self.upstream_status = upstream_status
        self.document = document


class StreamScanner:
    """One response. Feed it pieces, send what it returns, read what it learnt.

    `slug` is the name the client sees, `opening` what is known of how such streams begin. Look at
    `failure` after each feed: once it is set, what that feed returned is the last that came before
    the failure, and nothing more may be fed.
    """

    def __init__(self, slug: str, *, wants_usage: bool, opening: Opening | None = None) -> None:
        self._slug = model_member(slug)[_VALUE_AT:]  # what orjson writes keeps 4 KB, however short
        self._wants_usage = wants_usage
        self._opening = opening
        self._place = 0  # of the next event, as long as there was no content
        self._tail = b""  # an event not yet finished
        self._held: list[bytes] = []  # whole events before the first content
        self._held_bytes = 0
        self._pattern = b""  # the member `"model":"…"` as this upstream writes it
        self._replacement = b""
        self._long: MemberRewriter | None = None  # an event longer than we hold
        self._long_end = b""  # its last bytes, for a blank line cut in two
        self._was_dropped = False  # the event that ended last
        self._ended_in_cr = False  # … and its LF may be still to come

        self.stencil = Stencil()
        self.failure: StreamFailure | None = None
        self.has_content = False
        self.is_done = False  # [DONE] was seen
        self._content_events = 0  # without the stencil's
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.upstream_model = ""
        self._raw_id = b""  # the upstream's name for the answer, as it came

    @property
    def upstream_id(self) -> str:
        """The upstream's name for the answer; "" if it has none."""
        return self._raw_id.decode("utf-8", "replace")

    @property
    def is_at_boundary(self) -> bool:
        """What was passed on ends with a whole event."""
        return self._long is None

    @property
    def may_end_line(self) -> bool:
        """The CR that was passed on last may be half of a line end: an LF may follow."""
        return self._ended_in_cr

    @property
    def holds_done(self) -> bool:
        """What is held is [DONE], without the empty line that ends an event."""
        return self._tail.rstrip() == b"data: [DONE]"

    @property
    def is_finished(self) -> bool:
        """The stream said that its answer is complete, in one way or the other."""
        return self.is_done or bool(self.finish_reason)

    @property
    def content_events(self) -> int:
        """Events with content so far, as far as they were told apart."""
        return self._content_events + self.stencil.events

    @property
    def is_ready_for_stencil(self) -> bool:
        """Nothing is held: what comes now may be tried on the stencil."""
        return (
            self.stencil.is_learnt
            and not self._tail
            and self._long is None
            and not self._ended_in_cr
            and self.failure is None
        )

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; returns what can be sent now. Nothing is, behind [DONE]."""
        if self.is_done:
            return b""
        if self.has_content and self._long is None and not self._ended_in_cr:
            if self._tail:
                data = self._tail + data
                self._tail = b""
            if (passed := self.stencil.pass_events(data)) is not None:
                data, self.stencil.rest = self.stencil.rest, b""
                return passed + self.feed(data) if data else passed
            if (ending := self.stencil.ending) is not None:
                passed, end = self._pass_ending(data, ending)
                if end:
                    return passed + self.feed(data[end:]) if end < len(data) else passed
            if self.stencil.wants_lesson:
                return self._feed_events(data)
            end = data.rfind(_LF_LF) + 2  # 1 if no event ends here
            if end > 1 and len(data) - end <= HOLD_LIMIT_BYTES and _CR not in data:
                if (passed := self._pass_whole(data[:end])) is not None:
                    self._tail = data[end:]
                    return passed
        return self._feed_events(data)

    def feed_eof(self) -> bytes:
        """The body ended properly; returns what was still held.

        Some servers end without the last blank line: what they left is an event all the same.
        """
        out: list[bytes] = []
        if self._long is not None:
            out.append(self._long.feed_eof())  # and it stays: what was passed on is no whole event
        elif self._tail:
            event, self._tail = self._tail, b""
            self._take_event(event, out)
        return self._release(out)

    def _pass_whole(self, data: bytes) -> bytes | None:
        """`data`, whole events, if all are plain content; None if they want a closer look.

        Only an event that repeats the member verbatim inside a nested object, next to one that
        has no `model` at all, would fool the count; inside a string its quotes are escaped.
        """
        events = data.count(_LF_LF)
        if (
            not self._pattern
            or data.count(self._pattern) != events
            or data.count(b"event:")  # of an error, perhaps
            or _wants_parsing(data)
        ):
            return None
        self._content_events += events
        if self._pattern == self._replacement:
            return data
        return data.replace(self._pattern, self._replacement)

    def _feed_events(self, data: bytes) -> bytes:
        """The general path: any line ends, any cut, anything in the events."""
        out: list[bytes] = []
        if self._ended_in_cr and data:
            data = self._take_late_lf(data, out)
        if self._long is not None:
            data = self._feed_long(data, out)
        if data:
            self._split(data, out)
        return self._release(out)

    def _split(self, data: bytes, out: list[bytes]) -> None:
        search_from = max(0, len(self._tail) - 3)
        if not self._tail:
            if not self.has_content and (passed := self._pass_known(data)) is not None:
                out.append(passed)
                return
            if is_one_event(data):
                self._take_event(data, out)
                return
        buffer = self._tail + data if self._tail else data
        start, has_cr = 0, _CR in buffer
        shortcuts = 2  # a piece: each failed one costs as much as a look at all of it
        while (end := blank_line_end(buffer, max(search_from, start), has_cr=has_cr)) > 0:
            self._take_event(buffer[start:end], out)
            if self.failure is not None:
                return
            if self.is_done:
                self._end_in_done(buffer[start:end], out)
                return
            start = end
            if shortcuts and self.has_content and self.stencil.is_learnt:
                shortcuts -= 1
                if (passed := self.stencil.pass_events(buffer[start:])) is not None:
                    out.append(passed)
                    buffer, self.stencil.rest = self.stencil.rest, b""
                    start = search_from = 0
        self._ended_in_cr = start == len(buffer) and buffer.endswith(b"\r")
        self._tail = buffer[start:]
        if len(self._tail) > HOLD_LIMIT_BYTES:
            self._start_long(out)

    def _end_in_done(self, event: bytes, out: list[bytes]) -> None:
        """Drop what stands behind the event."""
        self._tail = b""
        if event[-1] == _CR:  # an LF may be cut off; behind a CR it changes nothing
            out.append(b"\n")

    def _take_late_lf(self, data: bytes, out: list[bytes]) -> bytes:
        """An event ended in CR; an LF right behind it is part of that line end, not a new line."""
        self._ended_in_cr = False
        if not data.startswith(b"\n"):
            return data
        if not self._was_dropped:
            out.append(b"\n")
        return data[1:]

    def _release(self, out: list[bytes]) -> bytes:
        """What can go: nothing before the first content, then all that was held and is new."""
        if self.has_content:
            if self._held:
                out = self._held + out
                self._held = []
            return out[0] if len(out) == 1 else b"".join(out)
        for each in out:
            self._held.append(each)
            self._held_bytes += len(each)
        if self.failure is None and self._held_bytes + len(self._tail) > OPENING_LIMIT_BYTES:
            self.has_content = True  # can't be held any longer: it counts as content
            out = []
            if len(self._tail) > HOLD_LIMIT_BYTES:
                self._start_long(out)
            return self._release(out)
        return b""

    # Events longer than we hold

    def _start_long(self, out: list[bytes]) -> None:
        if not self.has_content:
            return  # the opening's own limit decides
        self._content_events += 1
        self._was_dropped = False
        self._long = MemberRewriter(b"model", self._slug)
        data, self._tail = self._tail, b""
        self._long_end = data[-3:]
        out.append(self._long.feed(data))

    def _feed_long(self, data: bytes, out: list[bytes]) -> bytes:
        """Pass on the rest of a long event; returns what comes after it."""
        rewriter = self._long
        assert rewriter is not None, "only called inside a long event"
        buffer = self._long_end + data
        blank = BLANK_LINE.search(buffer)
        if blank is None:
            out.append(rewriter.feed(data))
            self._long_end = buffer[-3:]
            return b""
        end = blank.end() - len(self._long_end)
        out += (rewriter.feed(data[:end]), rewriter.feed_eof())
        if not self.upstream_model and rewriter.original:
            self.upstream_model = decode_string(rewriter.original)
        self._long = None
        self._ended_in_cr = end == len(data) and data.endswith(b"\r")
        return data[end:]

    # Single events

    def _pass_known(self, event: bytes) -> bytes | None:
        """An event before or with the first content that is as in another stream; else None."""
        form = self._opening.find(self._place, event) if self._opening is not None else None
        if form is None:
            return None
        self._place += 1
        if not self._raw_id:
            self._raw_id = form.raw_id
        if form.pattern:
            if not self.upstream_model:
                self.upstream_model = form.model
            self._pattern, self._replacement = form.pattern, form.replacement
        passed = form.passed(event)
        if form.has_text:
            self.has_content = True
            self._content_events += 1
            self.stencil.keep(*form.shape_behind(event))
        return passed

    def _pass_ending(self, data: bytes, ending: Ending) -> tuple[bytes, int]:
        """The last events of a stream as far as they are as in other ones, and where they end."""
        lead = self.stencil.lead
        lead_size = len(lead)
        passed, at = b"", 0
        while at < len(data):
            if data[at:] == _DONE_EVENT:
                self.is_done = True
                return passed + _DONE_EVENT, len(data)
            start = at + lead_size
            if data[at:start] != lead:
                break
            for last in ending.events:
                end = last.find(data, start)
                if end:
                    break
            else:
                break
            self.usage = newest_usage(self.usage, last.document)
            self.finish_reason = last.finish_reason or self.finish_reason
            if self._wants_usage or not last.is_usage:
                passed += lead + last.new_start + data[start + last.start_size : end]
            at = end
        return passed, at

    def _take_event(self, event: bytes, out: list[bytes]) -> None:
        try:
            passed = self._pass_event(event)
        except StreamFailure as failure:
            self.failure = failure
            return
        self._was_dropped = passed is None
        if passed is not None:
            out.append(passed)

    def _pass_event(self, event: bytes) -> bytes | None:
        """One whole event as the client is to see it; None if it is not to see it."""
        data = parse_event(event)
        if data is None or not data.payload:  # no client is told of an event without data
            return event
        payload = data.payload
        is_opening, place = not self.has_content, self._place
        self._place += 1
        if payload == DONE:
            self.is_done = True
            return event
        if data.is_error:
            raise _error_event(_load(payload))
        document: Any = None
        if not self.has_content or _wants_parsing(payload):
            document = _parse_chunk(payload)
            self._learn(document)
            if not is_opening and _is_plain(event, data):
                self._tell_ending(event, document)
            if is_usage_event(document) and not self._wants_usage:
                return None
        else:
            self._content_events += 1
            if self.stencil.wants_lesson:
                document = _load(payload)
        passed = self._rename(event, data, document)
        if isinstance(document, dict) and self.stencil.wants_lesson and _is_plain(event, data):
            delta = only_delta(document)
            if delta is not None:
                self.stencil.learn(event, passed, delta)
                if is_opening:
                    self._tell_opening(place, event, passed, document, delta)
        return passed

    def _tell_opening(
        self,
        place: int,
        event: bytes,
        passed: bytes,
        document: dict[str, Any],
        delta: dict[str, Any],
    ) -> None:
        """Have the next stream know an event like this one, if all is as it seems."""
        model, pattern, replacement = self.upstream_model, self._pattern, self._replacement
        if passed == event and not pattern:  # it names no model
            model = ""
        elif event.count(pattern) != 1 or event.replace(pattern, replacement) != passed:
            return
        text_of = delta if self.has_content else None
        if self._opening is not None:
            self._opening.learn(place, event, document, text_of, model, pattern, replacement)

    def _tell_ending(self, event: bytes, document: dict[str, Any]) -> None:
        """Have the next stream know an event like this one."""
        ending, lead = self.stencil.ending, self.stencil.lead
        if ending is not None and event.startswith(lead):
            ending.learn(event, document, lead, self._pattern, self._replacement)

    def _learn(self, document: dict[str, Any]) -> None:
        if document.get("error"):
            raise _error_event(document)
        self.usage = newest_usage(self.usage, document)
        if not self._raw_id and isinstance(upstream_id := document.get("id"), str):
            self._raw_id = upstream_id.encode("utf-8", "replace")
        finish_reason, has_delta = content_of(document)
        self.finish_reason = finish_reason or self.finish_reason
        self._content_events += has_delta
        if has_delta or finish_reason:
            self.has_content = True

    def _rename(self, event: bytes, data: Data, document: Any) -> bytes:
        """`event` with the catalog's name for the model, where it names one.

        `document` is its data if that was parsed, else None.
        """
        payload = data.payload
        named = payload.count(b'"model"')
        # A pattern that goes over a line's end is in the payload, not in the event.
        if named == 1 and self._pattern and (place := event.find(self._pattern)) >= 0:
            rest = event[place + len(self._pattern) :]
            return b"".join((event[:place], self._replacement, rest))
        # The name may be written with escapes; a backslash elsewhere costs one look, no more.
        if not named and payload.find(b"\\u") < 0:
            return event
        if named == 1 and (model := _written_model(document, payload)):
            self._learn_member(model_member(model), _VALUE_AT, model)
            return event.replace(self._pattern, self._replacement)
        member = _find_model(payload)
        if member is None:
            return event
        raw = payload[member.start : member.end]
        value_offset = member.value_start - member.start
        self._learn_member(raw, value_offset, decode_string(raw[value_offset:]))
        start = data.place_of(member.value_start)  # a string is within one line
        return event[:start] + self._slug + event[start + member.end - member.value_start :]

    def _learn_member(self, raw: bytes, value_offset: int, model: str) -> None:
        if not self.upstream_model:
            self.upstream_model = model
        self._pattern = raw
        self._replacement = raw[:value_offset] + self._slug


def _wants_parsing(data: bytes) -> bool:
    """Whether events after the first content can carry more than content."""
    count = data.count  # half the cost of `in`, which goes through the buffer protocol
    return (
        count(b'"error"') > 0
        or count(b'"finish_reason":"') > 0
        or count(b'"finish_reason": "') > 0
        # OpenAI puts `"usage":null` on every event once usage is asked for.
        or (
            (usages := count(b'"usage"')) > 0
            and usages != count(b'"usage":null') + count(b'"usage": null')
        )
    )


def _load(payload: bytes) -> Any:
    """The JSON of an event; None if it is none."""
    try:
        return load_json(payload)
    except ValueError:
        return None


def _written_model(document: Any, payload: bytes) -> str:
    """The name in the one `"model":"…"` of an event, if it stands there so; "" if it is not sure.

    A search in place of a scan, for what nearly all servers write.
    """
    model = document.get("model") if isinstance(document, dict) else None
    if isinstance(model, str) and model.isascii():
        has_escapes = _BACKSLASH in payload and payload.find(b"\\u00") >= 0
        if not has_escapes and payload.count(model_member(model)) == 1:
            return model
    return ""


def _find_model(payload: bytes) -> Member | None:
    """The top-level `model`, if it is a string."""
    # Spans mean nothing in bytes that are no JSON, and after the opening nobody has looked yet.
    document = _load(payload)
    if isinstance(document, dict) and isinstance(document.get("model"), str):
        return find_member(payload, "model")
    return None


def _parse_chunk(payload: bytes) -> dict[str, Any]:
    document = _load(payload)
    if not isinstance(document, dict):
        raise StreamFailure("expected a JSON object as the data of an event", is_error_event=False)
    return document


def _is_plain(event: bytes, data: Data) -> bool:
    """One `data: ` line and an empty one, both ended by LF."""
    return data.starts == (6,) and len(data.payload) == len(event) - 8 and event[-2:] == _LF_LF


def _error_event(document: object) -> StreamFailure:
    """The failure that an error event tells; of what it says only the status is kept."""
    error = document.get("error") if isinstance(document, dict) else None
    return StreamFailure(
        "the upstream sent an error event",
        is_error_event=True,
        upstream_status=_status_of(error or document),
        document=document,
    )


def _status_of(error: object) -> int | None:
    """The HTTP status that an error object names, as `code` or `status`."""
    if isinstance(error, dict):
        for name in ("code", "status", "status_code"):
            value = error.get(name)
            if type(value) is int and 400 <= value <= 599:
                return value
    return None


def decode_string(raw: bytes) -> str:
    """The text of a JSON string; empty if it is none."""
    try:
        value = load_json(raw)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
