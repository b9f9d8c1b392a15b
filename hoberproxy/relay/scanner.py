"""Edits the events of a stream for the client, and reads usage, errors and its end from them.

The scanner takes the payload of an upstream's SSE response in pieces of any size and returns the
bytes to pass on. They are the same bytes, but for the top-level `model` of each event, which
becomes the catalog's slug, and for what the upstream sends only because the proxy requests usage:
a client that did not request it gets neither the usage event nor a `usage` of null on others.

Theory of operation. Until the first content all events are held back, so that another endpoint can
still be tried. Each is parsed, unless an earlier stream began alike (relay/edge_templates.py).
From the first content on, an event takes the first of these ways that is open to it:

- it differs from an earlier event in its text and a few values: it is compared, not parsed
  (relay/content_template.py, mostly before its framing is walked)
- an earlier stream ended alike: the same (relay/edge_templates.py)
- it is whole: it is parsed (`_pass_event`)
- it is longer than HOLD_LIMIT_BYTES: it is edited and read while it passes (relay/long_json.py)

Only an unfinished event is held. All ways give the same bytes and the same facts: where the bytes
are cut decides which way an event takes, and nothing else.
"""

from __future__ import annotations

from typing import Any, Final

from ..dialects.chat import content_of, is_usage_event
from ..dialects.stream_errors import (
    StreamFailure,
    error_event,
    error_field,
    find_broken_error,
    find_error,
)
from ..dialects.usage import Usage, newest_usage
from ..protocol.sse import DONE, Data, blank_line_end, parse_event
from .content_template import ContentTemplate
from .edge_templates import MAX_EVENT_BYTES, EdgeTemplates, KnownEvent
from .event_edits import Edit, Editor, apply_edits, parse_json, place_edits
from .long_json import LongEvent

HOLD_LIMIT_BYTES = 16 * 1024
OPENING_LIMIT_BYTES: Final = 64 * 1024
_CR: Final = 0x0D
_LF_LF: Final = b"\n\n"
_DONE_EVENT: Final = b"data: [DONE]\n\n"


class StreamScanner:
    """Scans the stream of one response: `feed` it pieces, and send what that returns.

    `slug` is the model's name for the client; `edges` are templates of the first and last events of
    such streams. Check `failure` after each `feed`: once it is set, nothing more may be fed, and
    what that `feed` returned came before the failure. Bytes after [DONE] are dropped.
    """

    def __init__(self, slug: str, *, wants_usage: bool, edges: EdgeTemplates | None = None) -> None:
        self._editor = Editor(slug, wants_usage=wants_usage)
        self._wants_usage = wants_usage
        self._edges = edges
        self._next_edge = 0  # number of the template that matched next in an earlier stream
        self._is_flowing = False  # there was content, and nothing but `_tail` is held
        self._tail = b""  # the beginning of an unfinished event
        self._held: list[bytes] = []  # whole events before the first content
        self._held_bytes = 0
        self._long: LongEvent | None = None  # an unfinished event that is too long to be held
        self._long_end = b""  # its last bytes: the blank line at its end may be cut in two
        self._long_passed = False  # the client has a part of it
        self._was_dropped = False  # the last whole event was not passed on
        self._ended_in_cr = False  # the last whole event ended in CR, and an LF may follow
        self._has_other_data = False  # there was data that is no JSON object

        self.template = ContentTemplate()
        self.failure: StreamFailure | None = None
        self.has_content = False
        self.is_done = False  # [DONE] has come
        self.is_cut = False  # the body ended in the middle of an event
        self._content_events = 0  # without those that the template passed
        self._usage: Usage | None = None  # without that of events which the template passed
        self.finish_reason = ""
        self._raw_id = b""  # the upstream's id of the answer, as it came

    @property
    def upstream_id(self) -> str:
        """The upstream's id of the answer; "" if it has none."""
        return self._raw_id.decode("utf-8", "replace")

    @property
    def upstream_model(self) -> str:
        """The upstream's name for the model; "" if it gave none."""
        return self._editor.model

    @property
    def is_at_boundary(self) -> bool:
        """Whether the bytes passed on so far end with a whole event."""
        return self._long is None or not self._long_passed

    @property
    def may_end_line(self) -> bool:
        """Whether the last byte passed on is a CR, so that an LF may complete its line end."""
        return self._ended_in_cr

    @property
    def holds_done(self) -> bool:
        """Whether the unfinished event is [DONE], without the empty line that ends an event."""
        return self._tail.rstrip() == b"data: [DONE]"

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete, by [DONE] or by a finish reason."""
        return (self.is_done or bool(self.finish_reason)) and not self.is_cut

    @property
    def content_events(self) -> int:
        """The number of events with content so far; a few without any may be counted too."""
        return self._content_events + self.template.events

    @property
    def usage(self) -> Usage | None:
        """The usage that the stream has reported so far; None if none."""
        for event in self.template.take_usages():
            data = parse_event(event)
            document = parse_json(data.payload) if data is not None else None
            if isinstance(document, dict):
                self._usage = newest_usage(self._usage, document)
        return self._usage

    @property
    def is_ready_for_template(self) -> bool:
        """Whether the template may take the next bytes, since nothing is held before them."""
        return self._is_flowing and not self._tail and self.template.is_learnt

    def feed(self, data: bytes) -> bytes:
        """Take the next piece of the payload; return the bytes to send now."""
        tail = self._tail
        if not self._is_flowing or (tail and _CR in tail):
            return self._feed_any(data)
        if tail:
            data, self._tail = tail + data, b""
        template, at = self.template, 0
        passed = template.pass_events(data, 0)
        if passed is not None:  # the way of nearly every piece
            at = template.end
            if at == len(data):
                return passed
        elif _CR not in data and data.find(_LF_LF) < 0 and len(data) <= HOLD_LIMIT_BYTES:
            self._tail = data
            return b""
        out = [passed] if passed is not None else []
        end = self._pass_known(data, at, out)
        if end < len(data) or self.is_done:
            if not self.is_done:
                self._flow(data, end, end, out, tried=end)
            self._note_flow()
        return out[0] if len(out) == 1 else b"".join(out)

    def feed_eof(self) -> bytes:
        """Take note that the body has ended properly; return the bytes still to send.

        Some servers omit the last blank line: what stands after the one before is an event, too.
        """
        out: list[bytes] = []
        if self._long is not None:  # kept, for `is_at_boundary`: no blank line has ended it
            self._end_long(self._long, self._long.feed_eof(), out)
        elif self._tail:
            event, self._tail = self._tail, b""
            self._take_event(event, out)
            if self.failure is None and _is_cut(event):
                self.is_cut, out = True, []
        if self._has_other_data and not self.has_content and self.failure is None:
            self.failure = _not_an_object()
        return self._release(out)

    def _feed_any(self, data: bytes) -> bytes:
        """Do as `feed`, whatever is held and whatever the line ends are."""
        if data:
            out: list[bytes] = []
            self._take(data, out)
            self._note_flow()
            return self._release(out)
        return b""

    def _note_flow(self) -> None:
        self._is_flowing = (
            self.has_content
            and not self._ended_in_cr
            and self._long is None
            and not self._is_over()
        )

    def _take(self, data: bytes, out: list[bytes]) -> None:
        at = 0
        if self._ended_in_cr:
            at = self._take_late_lf(data, out)
        if self._is_over():
            return
        long = self._long
        if long is not None:
            at = self._feed_long(long, data, at, out)
            if self._long is not None or self._is_over():
                return
        search_from = max(at, len(self._tail) - 3)  # no empty line is before that
        if self._tail:
            data, self._tail = self._tail + data, b""
        if not self.has_content:
            at = self._open(data, at, search_from, out)
        if self._is_over():
            self._end_in_done(data[at - 1 : at], out)
        elif self.has_content:
            self._flow(data, at, search_from, out, tried=-1)
        else:
            self._keep(data, at)

    def _end_in_done(self, last: bytes, out: list[bytes]) -> None:
        """Complete a line end at the end of [DONE], for an LF after the CR is not waited for."""
        if self.is_done and last == b"\r":
            out.append(b"\n")

    def _is_over(self) -> bool:
        """Return whether further bytes are ignored (a method: see docs/mypyc.md)."""
        return self.is_done or self.failure is not None

    def _take_late_lf(self, data: bytes, out: list[bytes]) -> int:
        """Take an LF after the CR that ended an event: it is no line of its own."""
        self._ended_in_cr = False
        if not data.startswith(b"\n"):
            return 0
        if not self._was_dropped:
            out.append(b"\n")
            self._held_bytes += 1
        return 1

    def _release(self, out: list[bytes]) -> bytes:
        """Return the bytes to send: none before the first content, then those held and `out`."""
        if self.has_content:
            if self._held:
                out = self._held + out
                self._held = []
            return out[0] if len(out) == 1 else b"".join(out)
        self._held += out
        return b""

    def _keep(self, data: bytes, at: int) -> None:
        """Keep the bytes of `data` from `at` on, after the last whole event."""
        self._ended_in_cr = at == len(data) and at > 0 and data[-1] == _CR
        self._tail = data[at:]

    # Before the first content

    def _open(self, data: bytes, at: int, search_from: int, out: list[bytes]) -> int:
        """Take whole events up to the first content or the limit; return where the last ends."""
        has_cr = _CR in data
        while at < len(data):
            before, end = len(out), at
            if self._held_bytes + 2 * MAX_EVENT_BYTES <= OPENING_LIMIT_BYTES:
                end = self._take_known(data, at, out)
            if end == at:
                end = blank_line_end(data, max(at, search_from), has_cr=has_cr)
                if end < 0:
                    break
                if self._held_bytes + _size(data, at, end) > OPENING_LIMIT_BYTES:
                    self.has_content = True  # too much to be held: it counts as content
                    return at
                self._take_event(data[at:end], out)
            self._held_bytes += sum(map(len, out[before:]))
            at = end
            if self.has_content or self.is_done or self.failure is not None:
                return at
        if self._held_bytes + len(data) - at > OPENING_LIMIT_BYTES:
            self.has_content = True
        return at

    def _take_known(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Take the event at `at` if an edge template matches it; return its end, else `at`."""
        if self._edges is None:
            return at
        known, end = self._edges.find(
            data,
            at,
            wants_usage=self._wants_usage,
            is_opening=not self.has_content,
            first=self._next_edge,
        )
        if known is None:
            return at
        self._next_edge = self._edges.following
        if not self._raw_id:
            self._raw_id = known.raw_id
        self._editor.model = self._editor.model or known.model
        if known.usage_document:
            self._usage = newest_usage(self.usage, known.usage_document)
        self.finish_reason = known.finish_reason or self.finish_reason
        self._content_events += known.has_content
        if known.has_content or known.finish_reason:
            self.has_content = True
        if known.content is not None:
            self.template.adopt(known.content, data[at:end])
        self._was_dropped = known.is_usage and not self._wants_usage
        if not self._was_dropped:
            known.put_together(out)
        return end

    # From the first content on

    def _pass_known(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Pass events that edge templates match, and [DONE]; return where they end."""
        while True:
            if data[at : at + len(_DONE_EVENT)] == _DONE_EVENT:
                self.is_done = True
                out.append(_DONE_EVENT)
                return at + len(_DONE_EVENT)
            end = self._take_known(data, at, out)
            if end == at:
                return at
            at = end

    def _flow(
        self, data: bytes, at: int, search_from: int, out: list[bytes], *, tried: int
    ) -> None:
        """Pass all whole events from `at` on, and keep or pass the beginning of the next one.

        No template matches the event that begins at `tried` (-1: none was tried).
        """
        template, size = self.template, len(data)
        has_cr = _CR in data
        while at < size:
            if at != tried:
                passed = template.pass_events(data, at)
                if passed is not None:
                    out.append(passed)
                    at = template.end
                at = self._pass_known(data, at, out)
                if self._is_over():
                    return
                tried = at
                if at == size:
                    break
            end = blank_line_end(data, max(at, search_from), has_cr=has_cr)
            if end < 0:
                break
            passed = template.learn_like(data[at:end])
            if passed is not None:
                out.append(passed)
                at = end
                continue
            self._take_any(data, at, end, out)
            if self._is_over():
                self._end_in_done(data[end - 1 : end], out)
                return
            at = end
        self._keep(data, at)
        if len(self._tail) > HOLD_LIMIT_BYTES:
            self._start_long(out)

    def _take_any(self, data: bytes, at: int, end: int, out: list[bytes]) -> None:
        if _size(data, at, end) > HOLD_LIMIT_BYTES:
            long = LongEvent(self._editor.slug, wants_usage=self._wants_usage)
            self._end_long(long, long.feed(data[at:end]) + long.feed_eof(), out)
        else:
            self._take_event(data[at:end], out)

    # Events too long to be held

    def _start_long(self, out: list[bytes]) -> None:
        long = self._long = LongEvent(self._editor.slug, wants_usage=self._wants_usage)
        data, self._tail = self._tail, b""
        self._long_end = data[-3:]
        self._long_passed = False
        self._pass_part(long.feed(data), out)

    def _pass_part(self, passed: bytes, out: list[bytes]) -> None:
        if passed:
            self._long_passed = True
            out.append(passed)

    def _feed_long(self, long: LongEvent, data: bytes, at: int, out: list[bytes]) -> int:
        """Pass on more of a long event, from `at` on; return where it or the data ends."""
        before = len(self._long_end)
        buffer = self._long_end + data[at:]
        end = blank_line_end(buffer, 0, has_cr=_CR in buffer)
        if end < 0:
            self._long_end = buffer[-3:]
            self._pass_part(long.feed(data[at:]), out)
            return len(data)
        self._long_end = b""
        end += at - before
        self._long = None
        self._end_long(long, long.feed(data[at:end]) + long.feed_eof(), out)
        if self.failure is not None and self._long_passed:
            self._long = long  # for `is_at_boundary`: the client has a part of it
        if self._is_over():
            self._end_in_done(data[end - 1 : end], out)
        else:
            self._ended_in_cr = end == len(data) and data.endswith(b"\r")
        return end

    def _end_long(self, long: LongEvent, passed: bytes, out: list[bytes]) -> None:
        """Read a long event that has ended, and pass its last bytes unless it is a failure."""
        self._was_dropped = False
        try:
            self._read_long(long)
        except StreamFailure as failure:
            self.failure = failure
        else:
            self._pass_part(passed, out)

    def _read_long(self, long: LongEvent) -> None:
        if long.failure is not None:
            raise long.failure
        document = long.document
        if long.is_error_event:
            raise error_event(document)
        if long.is_done:
            self.is_done = True
        if not long.has_data or long.is_done:
            return
        events = self._content_events + 1
        if isinstance(document, dict):
            self._read_document(document)
        self._content_events = events
        if long.model:
            self._editor.note_model(long.model)

    # Single events

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
        """Return a whole event as the client gets it; None if the client does not get it."""
        data = parse_event(event)
        if data is None:
            return event
        if data.error_line or data.is_error:
            _check_lines(data)
        payload = data.payload
        if not payload:  # clients ignore an event without data
            return event
        is_opening = not self.has_content
        if payload == DONE:
            self.is_done = True
            return event
        document = parse_json(payload)
        if not isinstance(document, dict):
            self._has_other_data = True
            _check_other_data(document, payload, is_opening=is_opening)
            return event
        self._read_document(document)
        edits = self._editor.find_edits(payload, document)
        if edits:
            edits = place_edits(data, edits)
        if _is_plain(event, data):
            self._teach_templates(event, data.starts[0], edits, document, is_opening=is_opening)
        if not self._wants_usage and is_usage_event(document):
            return None
        return apply_edits(event, edits)

    def _teach_templates(
        self,
        event: bytes,
        payload_at: int,
        edits: list[Edit],
        document: dict[str, Any],
        *,
        is_opening: bool,
    ) -> None:
        """Have the templates learn from an event with one line of data."""
        known: KnownEvent | None = None
        if self._edges is not None and (is_opening or not content_of(document)[1]):
            known = self._edges.learn_from(
                event, payload_at, edits, document, wants_usage=self._wants_usage
            )
        if known is not None:
            is_content = known.has_content and not known.finish_reason
            known.is_opening = is_content or not _says_more(known.template.without_values())
        if self.has_content and self.template.wants_specimen:
            if self.template.learn_from(event, payload_at, edits, document) and known is not None:
                known.content = self.template.share(event)

    def _read_document(self, document: dict[str, Any]) -> None:
        failure = find_error(document)
        if failure is not None:
            raise failure
        self._usage = newest_usage(self.usage, document)
        if not self._raw_id and isinstance(upstream_id := document.get("id"), str):
            self._raw_id = upstream_id.encode("utf-8", "replace")
        finish_reason, has_content = content_of(document)
        self.finish_reason = finish_reason or self.finish_reason
        self._content_events += has_content
        if has_content or finish_reason:
            self.has_content = True


def _size(data: bytes, at: int, end: int) -> int:
    """Return the length of an event, without the LF of a last CRLF, which may come later."""
    return end - at - (data[end - 2 : end] == b"\r\n")


def _says_more(data: bytes) -> bool:
    """Return whether events after the first content have a usage, an error or a finish reason.

    Null is none of these: OpenAI has `"usage":null` on every event of a stream with usage.
    """
    count = data.count  # half the cost of `in`, which goes through the buffer protocol
    return (
        (
            (reasons := count(b'"finish_reason"')) > 0
            and reasons != count(b'"finish_reason":null')
            and reasons != count(b'"finish_reason":null') + count(b'"finish_reason": null')
        )
        or (
            (usages := count(b'"usage"')) > 0
            and usages != count(b'"usage":null') + count(b'"usage": null')
        )
        or (
            (errors := count(b'"error"')) > 0
            and errors != count(b'"error":null') + count(b'"error": null')
        )
        or count(b'"base_resp"') > 0
    )


def _is_cut(event: bytes) -> bool:
    """Return whether the data of an event that no empty line ends is a part of a JSON object."""
    data = parse_event(event)
    return data is not None and data.payload[:1] == b"{" and parse_json(data.payload) is None


def _check_lines(data: Data) -> None:
    """Raise the failure that an event reports by `event: error` or a line `error: …`."""
    if data.error_line:
        failure = error_field(data.error_line)
        if failure is not None:
            raise failure
    if data.is_error:
        document = parse_json(data.payload)
        if document is None:
            raise error_event(data.payload.decode("utf-8", "replace"))
        raise find_error(document) or error_event(document)


def _check_other_data(document: Any, payload: bytes, *, is_opening: bool) -> None:
    """Raise the failure in data that is no JSON object, if there is one.

    Before the first content, data without an error is passed over, for a better event may follow;
    later a usage or a finish reason in it would be lost.
    """
    failure = find_error(document) if document is not None else find_broken_error(payload)
    if failure is not None:
        raise failure
    if not is_opening and _says_more(payload):
        raise _not_an_object()


def _not_an_object() -> StreamFailure:
    return StreamFailure("expected a JSON object as the data of an event", is_error_event=False)


def _is_plain(event: bytes, data: Data) -> bool:
    """Return whether an event is one `data:` line and an empty one, with the same line end."""
    if len(data.starts) != 1 or data.starts[0] > len(b"data: "):
        return False
    end = event[data.starts[0] + len(data.payload) :]
    return end == _LF_LF or end == b"\r\n\r\n"
