"""JSON too long to be held, an event's or a body: edited and read on its way to the client.

Theory of operation. `LongEvent` walks the lines of an event and hands what is data to `LongObject`,
which walks the tokens: of what the outline (outline.py) keeps each one, of all else as much at a
step as a pattern takes. Nothing steps through a string. Held back are a name of the model and, for
who did not ask for usage, a member until it is known not to be a `usage` of null; both bounded.
What is no JSON passes as it is from the place on where that shows.
"""

from __future__ import annotations

import re
from typing import Any, Final

from .events import BOM, DONE
from .failures import StreamFailure, error_field
from .lenient import load_json
from .outline import Outline, clip

_HELD_BYTES: Final = 4096  # no name of a model is longer
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
    """Matches what fills a container, and behind it a run of brackets that may be empty.

    Small containers are a part of what fills it, so that many of them cost few steps.
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
    """One JSON object, its bytes fed in pieces; `out` gets them as they are to be passed on.

    `slug` is the model's name as JSON. Bytes behind the object pass as they are.
    """

    def __init__(self, slug: bytes, out: list[bytes], *, wants_usage: bool) -> None:
        self.out = out
        self.outline = Outline()
        self.model: bytes | None = None  # the last one's raw JSON, if it isn't longer than we hold
        self.state = _START
        self.is_complete = False  # the object has ended
        self._slug = slug
        self._drops_null = not wants_usage
        self._escape = False  # the last run ended in an unpaired backslash
        self._string: list[bytes] = []  # a name, string or number, as far as it is kept
        self._string_room = 0
        self._is_kept = True  # the value that is read goes to the outline
        self._depth = 0  # while skipping
        self._is_in_string = False
        self._model_parts: list[bytes] = []  # a name of the model, as far as it came
        self._model_bytes = 0
        # Of the object's own members:
        self._name = b""
        self._is_any_kept = False
        # What waits for its member to be known: bytes, and whether they go with the member.
        self._held: list[tuple[bytes, bool]] = []
        self._held_bytes = 0
        self._is_holding = False
        self._is_dropping = False  # what is held now goes with the member
        self._sent = 0  # where in this run the output has come to

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
        """The line ends here: for JSON that is whitespace."""
        if self.state == _IN_SCALAR:
            self._end_scalar()
        elif self.state in (_IN_NAME, _IN_STRING, _IN_MODEL):
            self._break()
        elif self.state == _SKIPPING and self._is_in_string:
            self._break()

    def feed_eof(self) -> None:
        """Nothing follows: let go of what is held."""
        if self.state != _END:
            self._break()
        self._release()

    def pass_aside(self, data: bytes) -> None:
        """Pass on what is no data, in its place."""
        self._put(data, goes=False)

    def document(self) -> Any:
        """Return the outline's JSON; None as long as the object is not complete."""
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
        """Pass on what comes before `end`, or hold it."""
        if self._sent < end:
            self._put(run[self._sent : end], goes=self._is_dropping)
            self._sent = end

    def _put(self, data: bytes, *, goes: bool) -> None:
        if not self._is_holding:
            self.out.append(data)
            return
        self._held.append((data, goes))
        self._held_bytes += len(data)
        if self._held_bytes > _HELD_BYTES:
            self._release()

    def _hold(self, *, goes: bool) -> None:
        self._is_holding = True
        self._is_dropping = goes

    def _release(self) -> None:
        """Pass on all that is held."""
        self.out += [data for data, _ in self._held]
        self._let_go()

    def _drop(self) -> None:
        """Pass on of what is held that which doesn't go with its member."""
        self.out += [data for data, goes in self._held if not goes]
        self._let_go()

    def _let_go(self) -> None:
        self._held.clear()
        self._held_bytes = 0
        self._is_holding = self._is_dropping = False

    def _break(self) -> None:
        self.state = _BROKEN
        self._release()
        if self._model_bytes <= _HELD_BYTES:
            self.out += self._model_parts
        self._model_parts.clear()

    # The walk: each step from an offset in the run to the next, never beyond its end

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
            self._hold(goes=True)
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
        elif was_held:  # too long for a name: its bytes are dropped as they come
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
        if end < len(plain):  # at the end of a run it may go on in the next
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
            if self._is_any_kept:  # this comma goes with the next member, if that goes
                self._hold(goes=True)
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

    # What is kept of a token, and what isn't

    def _collect(self, room: int) -> None:
        self._string.clear()
        self._string_room = room

    def _gather(self, run: bytes, start: int, end: int) -> None:
        """Keep what there is room for, and a few bytes more, by which a longer one is known."""
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
            if end < len(plain):  # a quote: the string goes on in the next run
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
        if self._is_kept:  # the rest of an array: its end is the outline's too
            self.state = _AFTER
            return end - 1
        self._end_value()
        return end


def hide_escapes(data: bytes) -> bytes:
    """`data` with every escaped backslash and quote made "__": offsets stay as they are."""
    if _BACKSLASH not in data:
        return data
    return data.replace(b"\\\\", b"__").replace(b'\\"', b"__")


def _decode(raw: bytes) -> bytes:
    """The text of a string without its quotes; as it is if that is no JSON."""
    try:
        name = load_json(b'"%b"' % raw)
    except ValueError:
        return raw
    return name.encode("utf-8", "replace") if isinstance(name, str) else raw


class LongEvent:
    """One event, its bytes fed in pieces that end with it at the latest.

    `slug` is the model's name as JSON. Once `has_error` is set nothing more is returned: a failure
    follows, and the upstream's words are not for the client. Ask for `document` and the others
    after `feed_eof`.
    """

    def __init__(self, slug: bytes, *, wants_usage: bool) -> None:
        self._out: list[bytes] = []
        self._json = LongObject(slug, self._out, wants_usage=wants_usage)
        self._line = b""  # the beginning of a line, or one that is no data, as far as it is kept
        self._is_data = False  # in the value of a `data` line
        self._is_first = True
        self._is_known = False  # what the line is
        self._payload = b""  # its first bytes
        self.has_data = False
        self.has_error = False
        self.is_error_event = False  # it has the line `event: error`
        self.failure: StreamFailure | None = None  # … or one that tells an error

    @property
    def is_done(self) -> bool:
        """It says [DONE]; the rest of it was comments."""
        return self._payload == DONE

    @property
    def model(self) -> bytes:
        """The upstream's name for the model as raw JSON; empty without one that was held."""
        return self._json.model or b""

    @property
    def document(self) -> Any:
        """The outline of its data; None if that is no JSON object."""
        return self._json.document() if self._json.state == _END else None

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; returns what can be sent now."""
        at, size = 0, len(data)
        lf = cr = -1
        while at < size:
            if lf < at:  # searched for once a line, lest a piece of many lines cost its square
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
        """The event has ended; returns what was still held."""
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
