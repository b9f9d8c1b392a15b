"""Edits and reads JSON that is too long to be held, an event's or a body's, while it passes.

Theory of operation. `LongEvent` walks the lines of an event and feeds their data to `LongObject`,
which walks the tokens of the JSON. Of what the outline (relay/json_outline.py) keeps, each token is
a step; of all else a step is as much as a pattern matches. The inside of a string is never walked
byte by byte. Two things are held back, up to a limit: the value of `model`; and, for a client that
did not request usage, a member until it is known not to be a `usage` of null. Where the bytes turn
out to be no JSON, the rest passes unchanged.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ..dialects.stream_errors import StreamFailure, error_field
from ..protocol.json_bytes import load_json
from ..protocol.sse import BOM, DONE
from .json_outline import Outline, clip

_HELD_BYTES: Final = 4096  # of a member, or of a value of `model`
_NAME_BYTES: Final = 256
_SCALAR_BYTES: Final = 64
_LINE_BYTES: Final = 4096  # of a line that is no data
_WHITE: Final = re.compile(rb"[ \t\n\r]*+")
_SCALAR_END: Final = re.compile(rb'[^\s,:"\[\]{}]*+')
_QUOTE: Final = 0x22
_COMMA: Final = 0x2C
_COLON: Final = 0x3A
_BRACKET: Final = 0x5B
_BRACE: Final = 0x7B
_BRACKET_END: Final = 0x5D
_BRACE_END: Final = 0x7D
_BACKSLASH: Final = 0x5C
_SPACE: Final = 0x20

_FILL: Final = rb'[^"\[\]{}]*+'  # numbers, literals, commas, colons, whitespace


def _walk_pattern() -> re.Pattern[bytes]:
    """Return a pattern of the content of an array or object up to the next bracket or quote.

    The brackets, as many as stand side by side, are its group. Small arrays and objects are a part
    of the content, so that many of them take few steps.
    """
    string = rb'"[^"]*+"%b' % _FILL  # escapes are hidden
    inner = rb"[\[{]%b(?>(?:%b)*)[\]}]%b" % (_FILL, string, _FILL)
    for _ in range(2):
        inner = rb"[\[{]%b(?>(?:%b|%b)*)[\]}]%b" % (_FILL, string, inner, _FILL)
    return re.compile(rb"%b(?>(?:%b|%b)*)([\[{]++|[\]}]++|)" % (_FILL, string, inner))


_WALK: Final = _walk_pattern()

# What the walk expects next.
_START: Final = 0  # the object
_NAME: Final = 1  # a name, or the end of the object
_AFTER_NAME: Final = 2  # a colon
_VALUE: Final = 3
_ELEMENT: Final = 4  # a value, or the end of the array
_AFTER: Final = 5  # a comma or an end
_IN_NAME: Final = 6
_IN_STRING: Final = 7
_IN_MODEL: Final = 8
_IN_SCALAR: Final = 9
_SKIPPING: Final = 10  # an object or array, or the rest of an array
_END: Final = 11  # nothing but whitespace
_BROKEN: Final = 12  # it is no JSON


class LongObject:
    """Edits and reads one JSON object, fed in pieces; the edited bytes are appended to `out`.

    `slug` is the model's name for the client, as JSON. Bytes after the object pass unchanged.
    """

    def __init__(self, slug: bytes, out: list[bytes], *, wants_usage: bool) -> None:
        self.out = out
        self.outline = Outline()
        self.model: bytes | None = None  # the last value of `model` as JSON, unless it is too long
        self.state = _START
        self.is_complete = False  # the object has ended
        self._slug = slug
        self._drops_null = not wants_usage
        self._escape = False  # the last run ended in an unpaired backslash
        self._string: list[bytes] = []  # the current name, string or number, as far as it is kept
        self._string_room = 0  # bytes more of it that are kept; below 0: it is longer
        self._is_kept = True  # the current value goes to the outline
        self._depth = 0  # arrays and objects that are open within the one that is skipped
        self._is_in_string = False  # while skipping
        self._model_parts: list[bytes] = []  # the value of `model`, as far as it has come
        self._model_bytes = 0
        # Of the members of the object itself:
        self._name = b""
        self._is_any_kept = False
        # Bytes held until their member is known, each with whether it is taken out together with
        # the member; bytes of lines that are no data are not.
        self._held: list[tuple[bytes, bool]] = []
        self._held_bytes = 0
        self._is_holding = False
        self._is_of_member = False  # the next bytes to be held are taken out with the member
        self._sent = 0  # the place in the current run up to which bytes were passed on or held

    def feed(self, run: bytes) -> None:
        """Walk through the next bytes of the data."""
        self._sent = 0
        if self.state != _BROKEN:
            plain = self._plain(run)
            at, size = 0, len(run)
            while at < size and self.state != _BROKEN:
                at = self._step(run, plain, at)
        self._send(run, len(run))

    def end_line(self) -> None:
        """Take note that a line of data ends here, which is white space to JSON."""
        if self.state == _IN_SCALAR:
            self._end_scalar()
        elif self.state in (_IN_NAME, _IN_STRING, _IN_MODEL):
            self._break()
        elif self.state == _SKIPPING and self._is_in_string:
            self._break()

    def feed_eof(self) -> None:
        """Take note that nothing follows, and pass on what is held."""
        if self.state != _END:
            self._break()
        self._release()

    def pass_aside(self, data: bytes) -> None:
        """Pass on `data`, which stands here and is no part of the JSON."""
        self._put(data, is_of_member=False)

    def document(self) -> Any:
        """Return the value of the outline; None while the object is not complete."""
        if not self.is_complete:
            return None
        try:
            return load_json(self.outline.text())
        except ValueError:
            return None

    def _plain(self, run: bytes) -> bytes:
        if self._escape and run[:1] in (b'"', b"\\"):
            run = b"_" + run[1:]
        plain = hide_escapes(run)
        self._escape = plain.endswith(b"\\")
        return plain

    # Output

    def _send(self, run: bytes, end: int) -> None:
        """Pass on, or hold, the bytes of `run` up to `end` that were not sent yet."""
        if self._sent < end:
            self._put(run[self._sent : end], is_of_member=self._is_of_member)
            self._sent = end

    def _put(self, data: bytes, *, is_of_member: bool) -> None:
        if not self._is_holding:
            self.out.append(data)
            return
        self._held.append((data, is_of_member))
        self._held_bytes += len(data)
        if self._held_bytes > _HELD_BYTES:
            self._release()

    def _hold_member(self) -> None:
        """Hold the bytes of a member from here on, until it is known what it is."""
        self._is_holding = self._is_of_member = True

    def _release(self) -> None:
        """Pass on all that is held."""
        self.out += [data for data, _ in self._held]
        self._stop_holding()

    def _drop(self) -> None:
        """Take out the held member: pass on only the held bytes that are not part of it."""
        self.out += [data for data, is_of_member in self._held if not is_of_member]
        self._stop_holding()

    def _stop_holding(self) -> None:
        self._held.clear()
        self._held_bytes = 0
        self._is_holding = self._is_of_member = False

    def _break(self) -> None:
        self.state = _BROKEN
        self._release()
        if self._model_bytes <= _HELD_BYTES:
            self.out += self._model_parts
        self._model_parts.clear()

    # The walk: each step goes from one offset in a run to a later one, at most to its end

    def _step(self, run: bytes, plain: bytes, at: int) -> int:
        state = self.state
        if state == _IN_STRING:
            return self._walk_string(run, plain, at)
        if state == _IN_NAME:
            return self._walk_name(run, plain, at)
        if state == _SKIPPING:
            return self._walk_over(plain, at)
        if state == _IN_SCALAR:
            return self._walk_scalar(run, plain, at)
        if state == _IN_MODEL:
            return self._walk_model(run, plain, at)
        white = _WHITE.match(plain, at)
        if white is not None:
            at = white.end()
        if at == len(plain):
            return at
        byte = plain[at]
        if state == _VALUE or state == _ELEMENT:
            return self._begin_value(run, at, byte)
        if state == _AFTER:
            return self._take_separator(run, at, byte)
        if state == _NAME:
            return self._begin_name(run, at, byte)
        if state == _AFTER_NAME and byte == _COLON:
            self.state = _VALUE
            return at + 1
        if state == _START and byte == _BRACE:
            self._is_kept = True
            self.outline.open(_BRACE)
            self.state = _NAME
            return at + 1
        self._break()
        return at

    def _begin_name(self, run: bytes, at: int, byte: int) -> int:
        if byte == _BRACE_END:
            return self._close(at, byte)
        if byte != _QUOTE:
            self._break()
            return at
        if self._drops_null and self.outline.depth == 1:
            self._send(run, at)
            self._hold_member()
        self._collect(_NAME_BYTES)
        self.state = _IN_NAME
        return at + 1

    def _walk_name(self, run: bytes, plain: bytes, at: int) -> int:
        close = plain.find(b'"', at)
        self._gather(run, at, close if close >= 0 else len(run))
        if close < 0:
            return len(run)
        raw = b"".join(self._string)
        name = raw if _BACKSLASH not in raw else _decode(raw)
        is_own = self.outline.depth == 1
        if is_own:
            self._name = name
            if self._is_holding and name != b"usage":
                self._send(run, close + 1)
                self._release()
        self._is_kept = self._string_room >= 0 and self.outline.keeps_member(raw, name)
        self.state = _AFTER_NAME
        return close + 1

    def _begin_value(self, run: bytes, at: int, byte: int) -> int:
        outline = self.outline
        if self.state == _ELEMENT:
            if byte == _BRACKET_END:
                return self._close(at, byte)
            self._is_kept = True
            if not outline.keeps_element():
                self._skip(1)
                return at
        is_own = outline.depth == 1
        if self._is_holding and byte != 0x6E:  # n
            self._send(run, at)
            self._release()
        if byte == _QUOTE:
            if is_own and self._name == b"model":
                self._send(run, at)
                self._sent = at + 1
                self._model_parts, self._model_bytes = [b'"'], 1
                self.model = None
                self.state = _IN_MODEL
            else:
                self.state = _IN_STRING
            self._collect(outline.text_limit if self._is_kept else 0)
            return at + 1
        if byte == _BRACE or byte == _BRACKET:
            if not self._is_kept:
                self._skip(1)
            else:
                outline.open(byte)
                self.state = _NAME if byte == _BRACE else _ELEMENT
            return at + 1
        if byte in (_COMMA, _COLON, _BRACE_END, _BRACKET_END):
            self._break()
            return at
        self._collect(_SCALAR_BYTES)
        self.state = _IN_SCALAR
        return at

    def _walk_string(self, run: bytes, plain: bytes, at: int) -> int:
        close = plain.find(b'"', at)
        end = close if close >= 0 else len(run)
        if self._string_room >= 0:
            self._gather(run, at, end)
            if self._is_kept and at < end:
                self.outline.note_text()
        if close < 0:
            return end
        if self._is_kept:
            self.outline.add_string(clip(b"".join(self._string), self.outline.text_limit))
        self._end_value()
        return close + 1

    def _walk_model(self, run: bytes, plain: bytes, at: int) -> int:
        close = plain.find(b'"', at)
        end = close + 1 if close >= 0 else len(run)
        self._gather(run, at, close if close >= 0 else end)
        was_held = self._model_bytes <= _HELD_BYTES
        self._model_bytes += end - at
        self._sent = end
        if self._model_bytes <= _HELD_BYTES:
            self._model_parts.append(run[at:end])
        elif was_held:  # too long to be held: its further bytes are dropped
            self._model_parts.clear()
            self.out.append(self._slug)
        if close < 0:
            return end
        if self._model_bytes <= _HELD_BYTES:
            self.model = b"".join(self._model_parts)
            self._model_parts.clear()
            self.out.append(self._slug)
        if self._is_kept:
            self.outline.add_string(clip(b"".join(self._string), self.outline.text_limit))
        self._end_value()
        return end

    def _walk_scalar(self, run: bytes, plain: bytes, at: int) -> int:
        found = _SCALAR_END.match(plain, at)
        end = found.end() if found is not None else at
        self._gather(run, at, end)
        if end < len(plain):  # else it may continue in the next run
            if self._is_holding:
                self._send(run, end)
            self._end_scalar()
        return end

    def _end_scalar(self) -> None:
        raw = b"".join(self._string)
        if not raw:
            self._break()
            return
        is_dropped = self._is_holding and raw == b"null"
        if is_dropped:
            self._drop()
        elif self._is_holding:
            self._release()
        if self._is_kept:
            self.outline.add_scalar(raw if self._string_room >= 0 else b"0")
        self._end_value(is_kept=not is_dropped)

    def _end_value(self, *, is_kept: bool = True) -> None:
        self.state = _AFTER
        if self.outline.depth == 1:
            self._is_any_kept = self._is_any_kept or is_kept

    def _take_separator(self, run: bytes, at: int, byte: int) -> int:
        if byte == _BRACE_END or byte == _BRACKET_END:
            return self._close(at, byte)
        if byte != _COMMA:
            self._break()
            return at
        if self.outline.kind == _BRACKET:
            self.state = _ELEMENT
            return at + 1
        self.state = _NAME
        if self._drops_null and self.outline.depth == 1:
            self._send(run, at)
            if self._is_any_kept:  # this comma is taken out if the next member is
                self._hold_member()
            else:
                self._sent = at + 1
        return at + 1

    def _close(self, at: int, byte: int) -> int:
        if (byte == _BRACE_END) == (self.outline.kind == _BRACKET):
            self._break()
            return at
        self.outline.close()
        if self.outline.depth:
            self._end_value()
        else:
            self.state = _END
            self.is_complete = True
        return at + 1

    # What is kept of a token, and what is skipped

    def _collect(self, room: int) -> None:
        self._string.clear()
        self._string_room = room

    def _gather(self, run: bytes, start: int, end: int) -> None:
        """Keep what there is room for, and one byte more, so that a longer token is known."""
        if self._string_room < 0:
            return
        self._string.append(run[start : min(end, start + self._string_room + 1)])
        self._string_room -= end - start

    def _skip(self, depth: int) -> None:
        self._depth = depth
        self._is_in_string = False
        self.state = _SKIPPING

    def _walk_over(self, plain: bytes, at: int) -> int:
        if self._is_in_string:
            close = plain.find(b'"', at)
            self._is_in_string = close < 0
            return len(plain) if close < 0 else close + 1
        found = _WALK.match(plain, at)
        assert found  # it matches the empty string
        start, end = found.span(1)
        if start == end:
            if end < len(plain):  # a quote without its end: the string continues in the next run
                self._is_in_string = True
                return end + 1
            return end
        if plain[start] in (_BRACKET, _BRACE):
            self._depth += end - start
            return end
        self._depth -= end - start
        if self._depth > 0:
            return end
        end += self._depth  # the run of brackets may close outer ones too
        if self._is_kept:  # it was the rest of an array, whose end goes to the outline
            self.state = _AFTER
            return end - 1
        self._end_value()
        return end


def hide_escapes(data: bytes) -> bytes:
    """Return `data` with "__" for every escaped backslash and quote: no offset changes."""
    if _BACKSLASH not in data:
        return data
    return data.replace(b"\\\\", b"__").replace(b'\\"', b"__")


def _decode(raw: bytes) -> bytes:
    """Return the text of a JSON string, `raw` without its quotes; `raw` if it is none."""
    try:
        name = load_json(b'"%b"' % raw)
    except ValueError:
        return raw
    return name.encode("utf-8", "replace") if isinstance(name, str) else raw


class LongEvent:
    """Edits and reads one event, fed in pieces of which none reaches beyond its end.

    `slug` is the model's name for the client, as JSON. Once `has_error` is set nothing more is
    returned: a failure follows, and the upstream's text must not reach the client. The properties
    are valid after `feed_eof`.
    """

    def __init__(self, slug: bytes, *, wants_usage: bool) -> None:
        self._out: list[bytes] = []
        self._json = LongObject(slug, self._out, wants_usage=wants_usage)
        self._line = b""  # the current line, unless it is data, as far as it is kept
        self._is_data = False  # the current line is data
        self._is_first = True  # the current line is the event's first
        self._is_known = False  # enough of the current line has come to know whether it is data
        self._payload = b""  # the first bytes of the event's data
        self.has_data = False
        self.has_error = False
        self.is_error_event = False  # there was a line `event: error`
        self.failure: StreamFailure | None = None  # of a line `error: …`

    @property
    def is_done(self) -> bool:
        """Whether the event's data is [DONE]; all else in it was comments."""
        return self._payload == DONE

    @property
    def model(self) -> bytes:
        """The upstream's name for the model as JSON; empty if there was none or a too long one."""
        return self._json.model or b""

    @property
    def document(self) -> Any:
        """The value of the outline of the event's data; None if the data is no JSON object."""
        return self._json.document() if self._json.state == _END else None

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; return the bytes to send now."""
        at, size = 0, len(data)
        lf = cr = -1
        while at < size:
            if lf < at:  # once a line: else a piece of many lines would be searched again and again
                lf = data.find(b"\n", at)
                lf = size if lf < 0 else lf
            if cr < at:
                cr = data.find(b"\r", at)
                cr = size if cr < 0 else cr
            end = min(lf, cr)
            if at < end:
                self._feed_line(data[at:end])
            if end < size:
                self._end_line()
                self._json.pass_aside(data[end : end + 1])
            at = end + 1
        return self._take()

    def feed_eof(self) -> bytes:
        """Take note that the event has ended; return the bytes still to send."""
        self._end_line()
        self._json.feed_eof()
        return self._take()

    def _take(self) -> bytes:
        if self._json.outline.has_error or self.is_error_event or self.failure is not None:
            self.has_error = True
        passed = b"" if self.has_error else b"".join(self._out)
        self._out.clear()
        return passed

    def _feed_line(self, part: bytes) -> None:
        if self._is_data:
            self._feed_data(part)
            return
        if self._is_known:
            if len(self._line) < _LINE_BYTES:
                self._line += part[:_LINE_BYTES]
            self._json.pass_aside(part)
            return
        before = len(self._line)
        line = self._line + part
        start = len(BOM) if self._is_first and line.startswith(BOM) else 0
        if line.startswith(b"data:", start):
            value = start + 5
            if len(line) == value:  # a space may follow
                self._line = line
                self._json.pass_aside(part)
                return
            if line[value] == _SPACE:
                value += 1
            self._json.pass_aside(part[: max(0, value - before)])
            self._begin_data()
            self._feed_data(line[max(value, before) :])
            return
        self._line = line[:_LINE_BYTES]
        self._is_known = len(line) > start + 5
        self._json.pass_aside(part)

    def _begin_data(self) -> None:
        if self.has_data and len(self._payload) <= len(DONE):
            self._payload += b"\n"
        self._is_data = self._is_known = self.has_data = True
        self._line = b""

    def _feed_data(self, part: bytes) -> None:
        if len(self._payload) <= len(DONE):
            self._payload += part[: len(DONE) + 1]
        self._json.feed(part)

    def _end_line(self) -> None:
        if self._is_data:
            self._json.end_line()
        elif self._line:
            line = self._line
            if self._is_first and line.startswith(BOM):
                line = line[len(BOM) :]
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                self._begin_data()
            elif name == b"event" and value == b"error":
                self.is_error_event = True
            elif name == b"error":
                self.failure = self.failure or error_field(value)
        self._line = b""
        self._is_data = self._is_known = self._is_first = False
