"""Relays the answer of a model server to the client, as a stream or as a body.

A relay takes the payload of one response (`Receiver` in upstream/connection.py), feeds the core
(relay/scanner.py, relay/completion.py), writes downstream, and reports to its attempt how it ended.
Framing is left to the connection, time limits to the attempt. Nothing here waits.
"""

from __future__ import annotations

import re
from typing import Final

import orjson

from .._mypyc import mypyc_attr
from ..dialects.outcome import Outcome
from ..downstream.response import ResponseBody
from ..errors import UpstreamError
from ..protocol.http_head import ResponseHead
from ..upstream.connection import ChunkTaker, Loss, Receiver
from ..upstream.error_response import MAX_BODY_BYTES
from .completion import (
    Completion,
    CompletionError,
    parse_completion,
    read_completion,
    serialize_as_stream,
)
from .event_edits import decode_string
from .long_json import LongObject
from .progress import has_progress
from .scanner import StreamScanner

COLLECT_LIMIT_BYTES: Final = 1024 * 1024
STREAM_LIMIT_BYTES: Final = 8 * 1024 * 1024  # of a body to be made into a stream: images, say


@mypyc_attr(allow_interpreted_subclasses=True)
class Reporter(Receiver):
    """The attempt as its relay sees it: receives the head of an answer, then the relay's reports.

    Each relay calls `finish`, `fail` or `refuse` last.
    """

    def open_answer(self, *, is_stream: bool) -> None:
        """Start the answer, whose first content is about to be written; no retry follows."""
        raise NotImplementedError

    def note_opened(self, *, is_stream: bool) -> None:
        """Do what could wait until the first content was written."""
        raise NotImplementedError

    def seal(self, following: int) -> None:
        """Account for the answer, whose last `following` bytes are about to be written."""
        raise NotImplementedError

    def note_progress(self) -> None:
        """Take note that a stream has had content since it is watched."""
        raise NotImplementedError

    def finish(self) -> None:
        """Take note that the answer was passed on to its end."""
        raise NotImplementedError

    def fail(self, error: UpstreamError) -> None:
        """Fail with `error`: no more of the answer is passed on."""
        raise NotImplementedError

    def send_answer(self, body: bytes) -> None:
        """Send a whole JSON answer at once."""
        raise NotImplementedError

    def refuse(self, body: bytes) -> None:
        """Fail for an answer with another status than 200, and this `body`."""
        raise NotImplementedError

    def broken(self, message: str, *, is_invalid: bool = False) -> UpstreamError:
        """Return an error in the attempt's phase; `is_invalid` if the answer breaks the rules."""
        raise NotImplementedError

    def reported(self, message: str, document: object) -> UpstreamError:
        """Return the error that the upstream itself reports in `document`, with status 200."""
        raise NotImplementedError


class Relay(Receiver):
    """Relays the answer of one attempt, whose head has come before."""

    def __init__(self, attempt: Reporter, answer: ResponseBody) -> None:
        self._attempt = attempt
        self._answer = answer

    def on_head(self, head: ResponseHead) -> None:
        raise AssertionError("a relay is made from the head")

    def on_lost(self, loss: Loss) -> None:
        self.give_up(self._attempt.broken(loss.value, is_invalid=loss is Loss.MALFORMED))

    def give_up(self, error: UpstreamError) -> None:
        """End an answer whose rest is lost or late: fail with `error`, unless enough has come."""
        self._attempt.fail(error)

    def outcome(self) -> Outcome:
        """Return what the answer has said of itself so far."""
        return Outcome()


class StreamRelay(Relay):
    """Relays a stream of events."""

    def __init__(self, attempt: Reporter, answer: ResponseBody, scanner: StreamScanner) -> None:
        super().__init__(attempt, answer)
        self._scanner = scanner
        self._is_open = False
        self._is_watched = False
        self._unsent = b""  # the last piece, which is sent together with the end
        self._taker: ChunkTaker | None = None  # if the answer has a sink for chunks

    @property
    def is_at_boundary(self) -> bool:
        """Whether the client has whole events only, so that an event of the proxy may follow."""
        return self._scanner.is_at_boundary

    @property
    def may_insert_line(self) -> bool:
        """Whether the client has whole events only, and whole line ends."""
        return self._scanner.is_at_boundary and not self._scanner.may_end_line

    def on_body(self, data: bytes) -> ChunkTaker | None:
        scanner = self._scanner
        out = scanner.feed(data)
        if scanner.is_done:
            self._finish(out)  # without a wait for the end of the framing
            return None
        if out:
            self._write(out)
        if scanner.failure is not None:
            self._fail_stream()
            return None
        if self._is_watched and not self._has_progress(out):
            return None
        return self._taker if scanner.is_ready_for_template else None

    def watch(self) -> None:
        """Look for content in what comes, until there is some; no ChunkTaker may take any of it."""
        self._is_watched = True

    def _has_progress(self, out: bytes) -> bool:
        # Of an event too long to be held, each piece is progress.
        self._is_watched = self._scanner.is_at_boundary and not has_progress(out)
        if not self._is_watched:
            self._attempt.note_progress()
        return not self._is_watched

    def on_last(self, data: bytes) -> None:
        self._unsent = self._scanner.feed(data)
        if self._scanner.failure is not None:
            self._write_unsent()
            self._fail_stream()

    def on_end(self) -> None:
        scanner = self._scanner
        # The last event may lack its blank line. It is passed on only if it ends the answer: else
        # it may be cut, and a client would read the error event after it as a part of it.
        out = scanner.feed_eof()
        if not scanner.is_finished or scanner.failure is not None:
            self._write_unsent()
        if scanner.failure is not None:
            self._fail_stream()
        elif scanner.has_content and not scanner.is_finished and self._is_open:
            self._attempt.fail(self._attempt.broken("the stream ended in the middle of its answer"))
        else:
            out, self._unsent = self._unsent + out, b""
            self._finish(out)

    def give_up(self, error: UpstreamError) -> None:
        if self._scanner.holds_done:
            self._finish(self._scanner.feed_eof())
        else:
            super().give_up(error)

    def outcome(self) -> Outcome:
        scanner = self._scanner
        return Outcome(
            usage=scanner.usage,
            finish_reason=scanner.finish_reason,
            upstream_model=scanner.upstream_model,
            upstream_id=scanner.upstream_id,
            content_events=scanner.content_events,
        )

    def _finish(self, out: bytes) -> None:
        """End the answer with `out`; fail if it had no content."""
        if not self._scanner.has_content or not (self._scanner.is_finished or self._is_open):
            self._attempt.fail(self._attempt.broken("the stream ended before any content"))
        else:
            self._write(out, is_end=True)
            self._attempt.finish()

    def _write_unsent(self) -> None:
        out, self._unsent = self._unsent, b""
        if out:
            self._write(out)

    def _write(self, out: bytes, *, is_end: bool = False) -> None:
        is_first = not self._is_open
        if is_first:
            self._open()
        if is_end:
            self._attempt.seal(len(out))
            self._answer.finish(out)
        else:
            self._answer.write(out)
        if is_first:
            self._attempt.note_opened(is_stream=True)

    def _open(self) -> None:
        self._is_open = True
        self._attempt.open_answer(is_stream=True)
        sink = self._answer.open_sink()
        if sink is not None:
            self._taker = template = self._scanner.template
            template.open(sink, self._answer)

    def _fail_stream(self) -> None:
        failure = self._scanner.failure
        assert failure is not None
        if failure.is_error_event:
            error = self._attempt.reported(str(failure), failure.document)
        else:
            error = self._attempt.broken(str(failure), is_invalid=True)
        self._attempt.fail(error)


class BodyRelay(Relay):
    """Relays a JSON body, as a stream where the client requested one (`as_stream`).

    A body of up to COLLECT_LIMIT_BYTES is collected, checked and sent whole. A longer one is passed
    on in pieces: if it breaks, the client's connection is cut, for the status has been sent. One to
    be made into a stream is collected up to STREAM_LIMIT_BYTES.
    """

    _bytes = 0
    _completion: Completion | None = None
    _long: LongObject | None = None  # a body that is passed on in pieces

    def __init__(
        self,
        attempt: Reporter,
        answer: ResponseBody,
        slug: str,
        *,
        as_stream: bool,
        wants_usage: bool,
    ) -> None:
        self._attempt = attempt  # not by super(), a call more for every request
        self._answer = answer
        self._slug = slug
        self._as_stream = as_stream
        self._limit = STREAM_LIMIT_BYTES if as_stream else COLLECT_LIMIT_BYTES
        self._wants_usage = wants_usage
        self._collected: list[bytes] = []

    def on_body(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._long is not None:
            self._long.feed(data)
            self._write()
            return
        self._collected.append(data)
        if self._bytes > self._limit:
            self._pass_on()

    def on_end(self) -> None:
        if self._long is not None:
            self._end_long(self._long)
            return
        body = b"".join(self._collected)
        self._collected.clear()
        self._send(body)

    def on_whole(self, data: bytes) -> None:
        self._bytes = len(data)
        if self._bytes > self._limit:
            self._collected.append(data)
            self._pass_on()
            if self._long is not None:
                self._end_long(self._long)
        else:
            self._send(data)

    def _send(self, body: bytes) -> None:
        """Check a whole body, and send it."""
        try:
            completion = parse_completion(body, self._slug)
        except CompletionError as exc:
            if exc.is_error_body:
                error = self._attempt.reported(str(exc), exc.document)
            else:
                error = self._attempt.broken(str(exc), is_invalid=True)
            self._attempt.fail(error)
            return
        self._completion = completion
        if self._as_stream:
            self._attempt.open_answer(is_stream=True)
            stream = serialize_as_stream(completion, self._slug, wants_usage=self._wants_usage)
            self._attempt.seal(len(stream))
            self._answer.finish(stream)
            self._attempt.note_opened(is_stream=True)
        else:
            self._attempt.send_answer(completion.body)
        self._attempt.finish()

    def outcome(self) -> Outcome:
        if self._completion is not None:
            completion = self._completion
            return Outcome(
                usage=completion.usage,
                finish_reason=completion.finish_reason,
                upstream_model=completion.upstream_model,
                upstream_id=completion.upstream_id,
                content_bytes=self._bytes,
            )
        if self._long is not None:
            usage, finish_reason, upstream_id = read_completion(self._long.document() or {})
            if usage is not None:
                usage.is_beside_text = True
            return Outcome(
                usage=usage,
                finish_reason=finish_reason,
                upstream_model=decode_string(self._long.model or b""),
                upstream_id=upstream_id,
                content_bytes=self._bytes,
            )
        return Outcome()

    def _pass_on(self) -> None:
        if self._as_stream:
            self._attempt.fail(
                self._attempt.broken(
                    f"expected a stream, got a JSON body of more than {STREAM_LIMIT_BYTES} bytes",
                    is_invalid=True,
                )
            )
            return
        body = b"".join(self._collected)
        self._collected.clear()
        if body.lstrip()[:1] != b"{":
            message = "expected a JSON object as the body, got something else"
            self._attempt.fail(self._attempt.broken(message, is_invalid=True))
            return
        slug = orjson.dumps(self._slug)
        self._long = long = LongObject(slug, self._collected, wants_usage=True)
        self._attempt.open_answer(is_stream=False)
        long.feed(body)
        self._write()
        self._attempt.note_opened(is_stream=False)

    def _end_long(self, long: LongObject) -> None:
        long.feed_eof()
        self._write()
        if long.is_complete:
            self._attempt.seal(0)
            self._answer.finish()
            self._attempt.finish()
        else:
            self._attempt.fail(self._attempt.broken("the body is not complete", is_invalid=True))

    def _write(self) -> None:
        """Send what the edited body has so far."""
        data = b"".join(self._collected)
        self._collected.clear()
        if data:
            self._answer.write(data)


# A whole event with data, or with a line `error: …`: JSON and HTML begin with no such line.
_match_error_event: Final = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?>(?:(?!data:|error:)[a-z]*+:[^\r\n]*+[\r\n]++)*)"
    rb"(?:data|error):[^\r\n]*+(?>(?:(?:\r\n?|\n)[a-z]*+:[^\r\n]*+)*)(?:\r\n\r\n|\n\n|\r\r)"
).match


class RefusalReader(Relay):
    """Reads the body of an answer with another status than 200; a part of one will do."""

    def __init__(self, attempt: Reporter, answer: ResponseBody) -> None:
        super().__init__(attempt, answer)
        self._collected = bytearray()

    def on_body(self, data: bytes) -> None:
        self._collected += data
        # Nothing follows a whole event: some servers leave the body of such a stream open.
        if len(self._collected) > MAX_BODY_BYTES or _match_error_event(self._collected):
            self.on_end()

    @property
    def has_begun(self) -> bool:
        """Whether a byte of the body has come."""
        return bool(self._collected)

    def on_end(self) -> None:
        self._attempt.refuse(bytes(self._collected[:MAX_BODY_BYTES]))

    def give_up(self, error: UpstreamError) -> None:
        self.on_end()
