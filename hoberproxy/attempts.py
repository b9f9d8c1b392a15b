"""One try on one endpoint: connect, send, judge the head, relay, within its time limits.

What is tried next, and what the client is told in the end, is the exchange's to decide.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from .catalog import TimeLimits
from .credentials import secrets_of
from .downstream import Answer
from .errors import Phase, UpstreamError
from .http11 import Parts, ResponseHead
from .lenient import dump_json
from .native import mypyc_attr
from .pool import Pool
from .refusal import judge_document, parse_refusal, parse_retry_after
from .relay import BodyRelay, Outcome, RefusalReader, Relay, Reporter, StreamRelay
from .request import Call
from .routing import Step
from .stream import StreamScanner
from .upstream import Loss, UpstreamConnection
from .upstream_body import named_option

logger = logging.getLogger("hoberproxy.upstream")

# Some servers label their streams carelessly; what is no stream then has no content and fails.
_STREAM_TYPES: Final = frozenset(
    (b"text/event-stream", b"", b"text/plain", b"application/octet-stream")
)
# As globals: a look-up on the enum class costs as much as a small function.
_CONNECT: Final = Phase.CONNECT
_HEAD: Final = Phase.HEAD
_OPENING: Final = Phase.OPENING
_CONTENT: Final = Phase.CONTENT
_BODY: Final = Phase.BODY
_BEFORE_CONTENT: Final = frozenset((_CONNECT, _HEAD, _OPENING))


@mypyc_attr(allow_interpreted_subclasses=True)
class Owner:
    """The exchange an attempt belongs to. `attempt_finished` or `attempt_failed` ends it."""

    @property
    def now(self) -> float:
        """Loop time, as of the wheel's last turn."""
        raise NotImplementedError

    def open_answer(self, head: ResponseHead, *, is_stream: bool) -> None:
        """The first content is here: start the answer."""
        raise NotImplementedError

    def note_opened(self, *, is_stream: bool) -> None:
        """The first content was written."""
        raise NotImplementedError

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        """A whole answer, checked: send it."""
        raise NotImplementedError

    def seal(self, status: int, following: int = 0) -> None:
        """The last bytes of the answer, so many, are about to be written."""
        raise NotImplementedError

    def sent_body(self) -> bytes:
        """The client's body, empty if it is held no more."""
        raise NotImplementedError

    def attempt_finished(self, attempt: Attempt) -> None:
        """The answer was passed on to its end."""
        raise NotImplementedError

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        """It was not; the client has seen nothing of it unless its phase is CONTENT."""
        raise NotImplementedError


class Attempt(Reporter):
    """Made for one step of the plan; `start` it, ask `check_limits`, `abort` it at any time."""

    # What an attempt starts with; on the class, for one is made with every request.
    _is_paused = False
    _is_ended = False
    _connection: UpstreamConnection | None = None
    _connecting: asyncio.Task[UpstreamConnection] | None = None
    _head: ResponseHead | None = None
    _relay: Relay | None = None

    def __init__(
        self,
        owner: Owner,
        call: Call,
        step: Step,
        pool: Pool,
        answer: Answer,
        request: Parts,
        injected: frozenset[str] = frozenset(),
    ) -> None:
        self.phase = _CONNECT
        self._owner = owner
        self._is_stream = call.terms.stream  # not the call itself: it holds the body
        self._wants_usage = call.terms.wants_usage
        self.step = step
        self._pool = pool
        self._answer = answer
        self._request = request
        self._injected = injected  # members of the body that are ours, not the client's
        self.limits: TimeLimits = step.endpoint.limits or pool.provider.limits
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
        relay = self._choose_relay(head)
        if relay is not None:
            self._relay = self._connection.receiver = relay

    def _choose_relay(self, head: ResponseHead) -> Relay | None:
        if head.status != 200:
            return RefusalReader(self, self._answer)
        if head.content_encoding not in (b"", b"identity"):
            self._reject("a content encoding we did not ask for")
            return None
        slug, content_type = self.step.slug, head.content_type
        if content_type == b"application/json":
            self.phase = _OPENING if self._is_stream else _BODY
            return BodyRelay(
                self,
                self._answer,
                slug,
                as_stream=self._is_stream,
                wants_usage=self._wants_usage,
            )
        if self._is_stream and content_type in _STREAM_TYPES:
            self.phase = _OPENING
            opening = self._pool.opening(slug)
            scanner = StreamScanner(slug, wants_usage=self._wants_usage, opening=opening)
            return StreamRelay(self, self._answer, scanner)
        self._reject("something else")
        return None

    def _reject(self, got: str) -> None:
        expected = "a stream" if self._is_stream else "a JSON body"
        self.fail(self.broken(f"expected {expected}, got {got}", is_invalid=True))

    def on_whole(self, data: bytes) -> None:
        raise AssertionError("the head has chosen a relay")

    def on_body(self, data: bytes) -> None:
        raise AssertionError("the head has chosen a relay")

    def on_end(self) -> None:
        raise AssertionError("the head has chosen a relay")

    def on_lost(self, loss: Loss) -> None:
        """The connection went before any head came."""
        self._connection = None
        if loss is Loss.STALE:
            # It had been closed while idle and nothing of an answer came: not a failure of the
            # endpoint. Not another kept one: they were likely closed together.
            self._connect()
        else:
            self.fail(self.broken(loss.value, is_invalid=loss is Loss.MALFORMED))

    # What the relay reports (Reporter)

    def open_answer(self, *, is_stream: bool) -> None:
        assert self._head is not None
        self.phase = _CONTENT
        self._owner.open_answer(self._head, is_stream=is_stream)

    def note_opened(self, *, is_stream: bool) -> None:
        self._owner.note_opened(is_stream=is_stream)

    def send_answer(self, body: bytes) -> None:
        assert self._head is not None
        self._owner.send_answer(self._head, body)

    def refuse(self, body: bytes) -> None:
        head = self._head
        assert head is not None
        provider = self._pool.provider
        error = parse_refusal(
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
        """Note which member that we have put in the upstream refuses, if any."""
        if self._injected and error.upstream_status in (400, 422):
            error.refused_option = named_option(body.decode("utf-8", "replace"), self._injected)

    def seal(self, following: int) -> None:
        if not self._is_ended:
            self._owner.seal(200, following)

    def finish(self) -> None:
        if not self._is_ended:
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

    # What the exchange asks for

    @property
    def is_at_boundary(self) -> bool:
        """The client has whole events only: one of our own may follow."""
        return not isinstance(self._relay, StreamRelay) or self._relay.is_at_boundary

    @property
    def is_answer_out(self) -> bool:
        """The client has been sent the whole stream; at most the end of the framing is missing."""
        return isinstance(self._relay, StreamRelay) and self._relay.is_done

    @property
    def idle_since(self) -> float:
        """Loop time at which the upstream was last heard of, or we stopped listening."""
        if self._connection is None:
            return self._last_activity
        return max(self._last_activity, self._connection.heard_at)

    def outcome(self) -> Outcome:
        """What the answer has told so far."""
        return self._relay.outcome() if self._relay is not None else Outcome()

    def pause(self) -> None:
        """The client is slow: read no more of the upstream."""
        self._is_paused = True
        if self._connection is not None:
            self._connection.pause_upstream()

    def resume(self) -> None:
        """The client has caught up."""
        self._is_paused = False
        self._last_activity = self._owner.now
        if self._connection is not None:
            self._connection.resume_upstream()

    def abort(self) -> None:
        """Close the upstream connection now; nothing is reported any more."""
        self._close()

    def forget(self) -> None:
        """Over and accounted for: let go of the answer."""
        self._relay = None

    @property
    def due(self) -> float:
        """Loop time at which a limit will have passed if nothing comes before."""
        limits, due = self.limits, self.started + self.limits.total
        if self.phase in _BEFORE_CONTENT:
            return min(due, self.started + limits.first_content) if self._is_stream else due
        return due if self._is_paused else min(due, self.idle_since + limits.idle)

    def check_limits(self, now: float) -> None:
        """Fail if a time limit has passed."""
        if now < self.due:
            return
        seconds, what = self._passed_limit(now)
        error = self.broken(f"no answer within {seconds:g} s {what}")
        error.code, error.status = "upstream_timeout", 504
        if self._relay is not None:
            self._relay.give_up(error)
        else:
            self.fail(error)

    def _passed_limit(self, now: float) -> tuple[float, str]:
        """The limit that was reached: its seconds, and of what."""
        limits = self.limits
        if now >= self.started + limits.total:
            return limits.total, "in all"
        if self.phase in _BEFORE_CONTENT:
            return limits.first_content, "before the first content"
        return limits.idle, "between bytes"

    def _close(self) -> None:
        """The attempt is over; an answer that did not end exactly takes its connection along."""
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
