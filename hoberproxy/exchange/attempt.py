"""Tries one endpoint: connects, sends, checks the head, has the answer relayed, within limits.

Leaves to its owner, the exchange, what is tried next and how the client is answered.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Final

from .._mypyc import mypyc_attr
from ..dialects.outcome import Outcome
from ..downstream.request_handler import RequestHandler
from ..downstream.response import ResponseBody
from ..errors import Phase, UpstreamError
from ..protocol.http_head import Headers, ResponseHead
from ..protocol.json_bytes import dump_json
from ..relay.edge_templates import EdgeTemplates
from ..relay.relay import BodyRelay, RefusalReader, Relay, Reporter, StreamRelay
from ..relay.scanner import StreamScanner
from ..request.call import Call
from ..routing.catalog import TimeLimits
from ..routing.plan import Step
from ..upstream.body import make_upstream_body, named_option
from ..upstream.connection import ChunkTaker, Loss, UpstreamConnection
from ..upstream.credentials import secrets_of
from ..upstream.error_response import judge_document, parse_error_response, parse_retry_after
from ..upstream.provider import Upstream

logger = logging.getLogger("hoberproxy.upstream")

# Some servers label their streams wrongly; a body that is no stream has no content and fails.
_STREAM_TYPES: Final = frozenset(
    (b"text/event-stream", b"", b"text/plain", b"application/octet-stream")
)
_JSON_TYPE: Final = b"application/json"
# A body's first byte decides what it is, whatever its label: the first of a line of an event
# (`data`, `id`, `event`, `error`, `retry`, a comment) begins no JSON document, and vice versa.
_EVENT_BYTES: Final = frozenset(b"deir:")
_JSON_BYTES: Final = frozenset(b"{[")
_NO_FIELDS: Final[Headers] = []
_WHITE: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"
# The part of `first_content` after which a stream is watched for content: so one event is parsed in
# some minutes, and a stream that stalls ends by this part later.
WATCH_AFTER: Final = 0.25
# Seconds of silence that end an error response whose body has begun: some servers leave it open.
REFUSAL_WAIT: Final = 2.0
_CONNECT: Final = Phase.CONNECT
_HEAD: Final = Phase.HEAD
_OPENING: Final = Phase.OPENING
_CONTENT: Final = Phase.CONTENT
_BODY: Final = Phase.BODY
_BEFORE_CONTENT: Final = frozenset((_CONNECT, _HEAD, _OPENING))


@mypyc_attr(allow_interpreted_subclasses=True)
class AttemptOwner(RequestHandler):
    """Owns an attempt, which reports to it; `attempt_finished` or `attempt_failed` comes last.

    It is a request handler, since a compiled class derives from one class only.
    """

    @property
    def now(self) -> float:
        """Loop time, as of the wheel's last turn."""
        raise NotImplementedError

    def open_answer(self, head: ResponseHead, *, is_stream: bool) -> None:
        """Start the answer, whose first content has come; `head` is the upstream's."""
        raise NotImplementedError

    def note_opened(self, *, is_stream: bool) -> None:
        """Take note that the first content was written."""
        raise NotImplementedError

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        """Send a whole answer with a checked `body`."""
        raise NotImplementedError

    def seal(self, status: int, following: int = 0) -> None:
        """Account for an answer whose last `following` bytes are about to be written."""
        raise NotImplementedError

    def sent_body(self) -> bytes:
        """Return the client's body, empty if it is held no more."""
        raise NotImplementedError

    def attempt_finished(self, attempt: Attempt) -> None:
        """Take note that the answer was passed on to its end."""
        raise NotImplementedError

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        """Go on after an `error`; the client has seen nothing of the answer before CONTENT."""
        raise NotImplementedError


class Attempt(Reporter):
    """One try of one step: call `start`, then `check_limits` when `due`; `abort` at any time."""

    # On the class, since to set them on each object would cost a microsecond.
    _is_paused = False
    _is_ended = False
    _connection: UpstreamConnection | None = None
    _connecting: asyncio.Task[UpstreamConnection] | None = None
    _head: ResponseHead | None = None
    _relay: Relay | None = None
    _is_watching = False  # for content in what comes
    _looked_at = 0.0  # loop time of the last content, or when watching began
    _begun = b""  # a part of a byte order mark at the beginning of a body

    def __init__(
        self,
        owner: AttemptOwner,
        call: Call,
        step: Step,
        upstream: Upstream,
        answer: ResponseBody,
        without: frozenset[str] = frozenset(),
        forwarded: Headers = _NO_FIELDS,
        edges: EdgeTemplates | None = None,
    ) -> None:
        """Prepare the request, `without` some options and with fields `forwarded` to `upstream`.

        Raises RequestError if the endpoint's rules cannot be applied to the body of the `call`.
        """
        body, self._injected = make_upstream_body(  # the second: members that are not the client's
            call,
            step.endpoint.upstream_model,
            stream_options=upstream.provider.stream_options,
            adaptation=step.endpoint.adaptation,
            without=without,
        )
        self._request = upstream.serialize_request(body, forwarded, stream=call.terms.stream)
        self.phase = _CONNECT
        self._owner = owner
        self._is_stream = call.terms.stream  # not the call itself: it holds the body
        self._wants_usage = call.terms.wants_usage
        self.step = step
        self._pool = upstream.pool
        self._answer = answer
        self._edges = edges  # how such streams begin and end
        self.limits: TimeLimits = step.endpoint.limits or upstream.provider.limits
        self.started = self._last_activity = owner.now

    # Connect

    def start(self) -> None:
        """Send the request on a kept connection, or on a new one as soon as there is one."""
        connection = self._pool.acquire()
        if connection is not None:
            self._send(connection)
        else:
            self._connect()

    def _connect(self) -> None:
        self.phase = _CONNECT
        self._connecting = asyncio.get_running_loop().create_task(
            self._pool.connect(self.limits.connect), name=f"connect {self._pool.provider.name}"
        )
        self._connecting.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[UpstreamConnection]) -> None:
        self._connecting = None
        if task.cancelled():
            return
        error = task.exception()
        if self._is_ended:
            if error is None:
                task.result().abort()
        elif isinstance(error, UpstreamError):
            self.fail(error)
        elif error is not None:
            logger.error("connecting failed unexpectedly", exc_info=error)
            self.fail(self.broken("could not connect"))
        elif task.result().is_closed:
            self.fail(self.broken("the connection was closed as soon as it was made"))
        else:
            self._send(task.result())

    def _send(self, connection: UpstreamConnection) -> None:
        self.phase = _HEAD
        self._connection = connection
        connection.send(self._request, self)
        if self._is_paused:
            connection.pause_upstream()

    # The answer's head (Receiver)

    def on_head(self, head: ResponseHead) -> None:
        assert self._connection is not None
        self._head = head
        self._request = []
        if head.status != 200:
            self._take_over(RefusalReader(self, self._answer))
        elif head.content_encoding not in (b"", b"identity"):
            self._reject("a content encoding we did not ask for")
        elif self._is_stream:
            self.phase = _OPENING  # and the first byte decides
        else:
            self.phase = _BODY
            if head.content_type == _JSON_TYPE:
                self._take_over(self._body_relay())

    def _take_over(self, relay: Relay) -> None:
        """Give the rest of the answer to `relay`, unless all of it has been read."""
        self._relay = relay
        connection = self._connection
        if connection is not None and connection.receiver is self:
            connection.receiver = relay

    def on_body(self, data: bytes) -> ChunkTaker | None:
        relay, data = self._choose_relay(data)
        return relay.on_body(data) if relay is not None else None

    def on_last(self, data: bytes) -> None:
        relay, data = self._choose_relay(data)
        if relay is not None:
            relay.on_last(data)

    def on_whole(self, data: bytes) -> None:
        relay, data = self._choose_relay(data)
        if relay is not None:
            relay.on_whole(data)
        else:
            self.on_end()

    def on_end(self) -> None:
        """Fail for a body that was empty or white space, unless the attempt has ended."""
        assert self._head is not None
        if self._is_stream:
            is_invalid = self._head.content_type == _JSON_TYPE
            self.fail(self.broken("the body ended before any content", is_invalid=is_invalid))
        else:
            self._reject("an empty body")

    def _choose_relay(self, data: bytes) -> tuple[Relay | None, bytes]:
        """Return the relay for a body that begins with `data`, None if not yet, and its bytes.

        White space and a byte order mark in front are dropped: within a stream, after a comment
        line of the proxy's, a mark would be a part of the first event's first name.
        """
        data = (self._begun + data).lstrip(_WHITE)
        if data[:3] == _BOM:
            data = data[3:].lstrip(_WHITE)
        self._begun = data if _BOM.startswith(data) else b""
        if self._begun or not data:
            return None, b""
        relay = self._relay_for(data[0])
        if relay is not None:
            self._take_over(relay)
        return relay, data

    def _relay_for(self, first: int) -> Relay | None:
        assert self._head is not None
        content_type = self._head.content_type
        if first in _JSON_BYTES:
            return self._body_relay()
        if self._is_stream:
            if first in _EVENT_BYTES or content_type in _STREAM_TYPES:
                scanner = StreamScanner(
                    self.step.slug, wants_usage=self._wants_usage, edges=self._edges
                )
                return StreamRelay(self, self._answer, scanner)
            if content_type == _JSON_TYPE:
                return self._body_relay()
        self._reject("a stream of events" if first in _EVENT_BYTES else "something else")
        return None

    def _body_relay(self) -> BodyRelay:
        return BodyRelay(
            self,
            self._answer,
            self.step.slug,
            as_stream=self._is_stream,
            wants_usage=self._wants_usage,
        )

    def _reject(self, got: str) -> None:
        """Fail for an answer of another kind, and close its connection."""
        expected = "a stream" if self._is_stream else "a JSON body"
        self.phase = _HEAD
        if self._connection is not None:
            self._connection.abort()
        self.fail(self.broken(f"expected {expected}, got {got}", is_invalid=True))

    def on_lost(self, loss: Loss) -> None:
        """Connect once more, or fail: no byte of a body has come."""
        self._connection = None
        if loss is Loss.STALE:
            # It was closed while idle and nothing of an answer came: no failure of the endpoint. A
            # new connection, since the kept ones were likely closed together.
            self._connect()
        else:
            self.fail(self.broken(loss.value, is_invalid=loss is Loss.MALFORMED))

    # Reports of the relay (Reporter)

    def open_answer(self, *, is_stream: bool) -> None:
        assert self._head is not None
        self.phase = _CONTENT
        self._looked_at = self._owner.now
        self._owner.open_answer(self._head, is_stream=is_stream)

    def note_opened(self, *, is_stream: bool) -> None:
        self._owner.note_opened(is_stream=is_stream)

    def note_progress(self) -> None:
        self._is_watching = False
        self._looked_at = self._owner.now

    def send_answer(self, body: bytes) -> None:
        assert self._head is not None
        self._owner.send_answer(self._head, body)

    def refuse(self, body: bytes) -> None:
        head = self._head
        assert head is not None
        provider = self._pool.provider
        error = parse_error_response(
            provider.name,
            head.status,
            head.get,
            body,
            time.time(),
            secrets_of(provider),
            self._owner.sent_body,
        )
        self._note_option(error, body)
        self.fail(error)

    def reported(self, message: str, document: object) -> UpstreamError:
        head, provider = self._head, self._pool.provider
        error = self.broken(message)
        secrets = secrets_of(provider)
        judge_document(error, provider.name, document, secrets, self._owner.sent_body)
        if self.phase is not _CONTENT and document is not None:
            self._note_option(error, dump_json(document))
            if error.upstream_status in (429, 503) and head is not None:
                error.retry_after = parse_retry_after(head.get, time.time())
        return error

    def _note_option(self, error: UpstreamError, body: bytes) -> None:
        """Note in `error` which of the members that the proxy put in is refused, if any."""
        if self._injected and error.upstream_status in (400, 422):
            error.refused_option = named_option(body.decode("utf-8", "replace"), self._injected)

    def seal(self, following: int) -> None:
        if not self._is_ended:
            self._owner.seal(200, following)

    def finish(self) -> None:
        if not self._is_ended:
            connection = self._connection
            if connection is not None and connection.receiver is self._relay:
                connection.await_end()  # [DONE] came before the end of the framing
            self._close()
            self._owner.attempt_finished(self)

    def fail(self, error: UpstreamError) -> None:
        if not self._is_ended:
            self._close()
            self._owner.attempt_failed(self, error)

    def broken(self, message: str, *, is_invalid: bool = False) -> UpstreamError:
        return UpstreamError(
            f"provider {self._pool.provider.name}: {message}",
            phase=self.phase,
            code="upstream_invalid_response" if is_invalid else "upstream_error",
            upstream_status=self._head.status if self._head is not None else None,
            is_retryable=self.phase is not _CONTENT,
        )

    # For the owner

    @property
    def is_at_boundary(self) -> bool:
        """Whether the client has whole events only, so that an event may follow."""
        return not isinstance(self._relay, StreamRelay) or self._relay.is_at_boundary

    @property
    def may_insert_line(self) -> bool:
        """Whether a comment line may follow what the client has got so far."""
        return not isinstance(self._relay, StreamRelay) or self._relay.may_insert_line

    @property
    def idle_since(self) -> float:
        """Loop time of the last bytes of the upstream, or when it was read again."""
        if self._connection is None:
            return self._last_activity
        return max(self._last_activity, self._connection.heard_at)

    @property
    def silent_since(self) -> float:
        """Loop time since which a stream is silent: 0 before its content, inf within a line."""
        if self.phase is not _CONTENT:
            return 0.0
        return self.idle_since if self.may_insert_line else math.inf

    def outcome(self) -> Outcome:
        """Return what the answer has said of itself so far."""
        return self._relay.outcome() if self._relay is not None else Outcome()

    def pause(self) -> None:
        """Read no more of the upstream for now: the client is slow."""
        self._is_paused = True
        if self._connection is not None:
            self._connection.pause_upstream()

    def resume(self) -> None:
        """Read on: the client has caught up."""
        self._is_paused = False
        self._last_activity = self._looked_at = self._owner.now
        if self._connection is not None:
            self._connection.resume_upstream()

    def abort(self) -> None:
        """Close the upstream connection now, and report nothing any more."""
        self._close()

    def forget(self) -> None:
        """Free the answer, which has been accounted for."""
        self._relay = None

    @property
    def due(self) -> float:
        """Loop time at which a limit passes if nothing comes before."""
        limits, due = self.limits, self.started + self.limits.total
        if self.phase in _BEFORE_CONTENT:
            if self._is_stream:
                due = min(due, self.started + limits.first_content)
            relay = self._relay
            if isinstance(relay, RefusalReader):
                wait = min(limits.idle, REFUSAL_WAIT) if relay.has_begun else limits.idle
                due = min(due, self.idle_since + wait)
            return due
        if self._is_paused:
            return due
        due = min(due, self.idle_since + limits.idle)
        return min(due, self._look_due) if self._is_stream else due

    def check_limits(self, now: float) -> None:
        """Fail if a time limit has passed."""
        if now >= self.due:
            self._look(now)
        if now < self.due:
            return
        seconds, what = self._passed_limit(now)
        error = self.broken(f"no answer within {seconds:g} s {what}")
        error.code, error.status = "upstream_timeout", 504
        if self._relay is not None:
            self._relay.give_up(error)
        else:
            self.fail(error)

    @property
    def _look_due(self) -> float:
        """Loop time at which to watch a stream, or at which it has had no content for too long."""
        wait = self.limits.first_content
        return self._looked_at + (wait if self._is_watching else wait * WATCH_AFTER)

    def _look(self, now: float) -> None:
        """Begin to watch a stream when it is due: it may send nothing but comments.

        Watching begins again if no byte has come, for silence has a separate limit.
        """
        relay = self._relay
        if self.phase is not _CONTENT or self._is_paused or now < self._look_due:
            return
        if self._is_watching and self.idle_since > self._looked_at:
            return
        if isinstance(relay, StreamRelay) and self._connection is not None:
            self._is_watching, self._looked_at = True, now
            self._connection.drop_taker()
            relay.watch()

    def _passed_limit(self, now: float) -> tuple[float, str]:
        """Return the limit that has passed at `now`: its seconds, and their kind."""
        limits = self.limits
        if now >= self.started + limits.total:
            return limits.total, "in all"
        if self.phase in _BEFORE_CONTENT:
            return limits.first_content, "before the first content"
        if now >= self.idle_since + limits.idle:
            return limits.idle, "between bytes"
        return limits.first_content, "but comments or empty events"

    def _close(self) -> None:
        """End the attempt; close a connection whose answer has not ended."""
        self._is_ended = True
        self._request = []
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        connection, self._connection = self._connection, None
        if (
            connection is not None
            and connection.receiver is not None
            and connection.receiver in (self, self._relay)
        ):
            connection.abort()
