"""Handles one chat request: authenticate → parse → route → connect → relay → account.

The methods stand in that order; failures and deadlines follow. Leaves to others: the choice of the
next step (exchange/failover.py), one try on an endpoint (exchange/attempt.py), the bytes of the
answer (relay/relay.py). Callbacks instead of a coroutine: a task and its wake-ups cost as much as
the rest of a small request.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from typing import Final

from ..access.keys import ANONYMOUS, Caller
from ..access.limits import Lease
from ..accounting.record import CLIENT_CLOSED, Record
from ..accounting.tokenizer import MAX_KEPT_BYTES
from ..downstream.cors import check_local_request, check_media_type
from ..downstream.request_handler import Admitted
from ..downstream.response import Answer, Client, KeptAnswer, ResponseBody
from ..errors import (
    Phase,
    ProxyError,
    UnavailableError,
    UpstreamError,
    serialize_error,
    serialize_error_event,
)
from ..protocol.http_head import Headers, RequestHead, ResponseHead
from ..protocol.text import escape_client_text
from ..request.call import Call
from ..request.parse_cache import STEPPED_BYTES
from ..routing.filters import keep_permitted
from ..routing.plan import Plan
from ..routing.router import make_plan
from ..upstream.provider import SSE_TYPE, Upstream
from .attempt import Attempt, AttemptOwner
from .context import ServerContext
from .deadlines import ClientDeadlines
from .failover import NOTHING_REFUSED, Failover
from .observations import observe_failure, observe_success, observe_throughput
from .response_fields import attempts_fields, cors_fields, error_fields

logger = logging.getLogger("hoberproxy.server")

# No empty line after it: at one, openai-go before 3.43 dispatches an event without data, and so
# does openai-python once an upstream has sent an `id:`.
COMMENT: Final = b": HOBER PROCESSING\n"
REST: Final = 0.002  # seconds for other requests between two steps of reading a large body
RETRY_AFTER_DRAIN: Final = 1.0  # seconds; by then another worker or the new process has the socket
_monotonic: Final = time.monotonic
_unix_time: Final = time.time
_SSE: Final = (b"content-type", SSE_TYPE)
_SENT_PHASES: Final = frozenset((Phase.HEAD, Phase.OPENING, Phase.CONTENT, Phase.BODY))


class Exchange(AttemptOwner):
    """One chat request, which closes exactly one record, however it ends."""

    # On the class, since to set them on each object would cost a microsecond.
    _rejection: ProxyError | None = None
    _caller = ANONYMOUS
    _lease: Lease | None = None
    _sealed_as: tuple[int, str] | None = None  # status and code
    _kept: KeptAnswer | None = None  # where the texts are to be counted
    _kept_body = b""
    _held_bytes = 0  # of the body, counted with those of all others
    _run_start = 0.0
    _reading: Generator[None, None, Call] | None = None  # of a large body, as far as it got
    _call: Call | None = None
    _prompt_bytes = 0
    _failover: Failover | None = None  # with the plan
    _attempt: Attempt | None = None
    _is_closed = False
    _upstream: Upstream  # of the attempt

    def __init__(
        self, context: ServerContext, client: Client, head: RequestHead, answer: Answer
    ) -> None:
        self._context = context
        self._client = client
        self._head = head
        self._answer = answer
        self._clock_start = _monotonic()
        self._deadlines = ClientDeadlines(context.settings)
        self.record = Record(context.new_request_id(), _unix_time(), head.path.decode("latin-1"))
        if (client_id := head.get(b"x-request-id")) is not None:
            self.record.client_request_id = escape_client_text(client_id)
        if client.is_paused:  # behind already, with the answer to an earlier request
            self._deadlines.pause(self.now, client.unread_bytes)

    @property
    def key_label(self) -> str:
        return self.record.key_label

    @property
    def content_events(self) -> int:
        return 0 if self._attempt is None else self._attempt.outcome().content_events

    # Authenticate

    def admit(self, known: Admitted | None = None) -> Admitted | None:
        # Only a caller's request counts as one of `max_streams`: strangers would take its room.
        context, record = self._context, self.record
        try:
            if (
                known is None
                or known.keyring_version != context.keyring.version
                or known.config is not context.config
                or known.caller.has_expired(record.started)
                or context.is_stopping
            ):
                known = Admitted(self._authenticate(), context.keyring.version, context.config)
            else:
                self._note_caller(known.caller)
            context.admission.admit(len(context.exchanges) + 1)
        except ProxyError as error:
            self._rejection = error
            return None
        context.exchanges.add(self)
        return known

    def enter(self) -> bool:
        try:
            self._lease = self._context.accounts.enter(self._caller, _unix_time())
        except ProxyError as error:
            self._rejection = error
            return False
        return True

    def _authenticate(self) -> Caller:
        context, head = self._context, self._head
        if context.is_stopping:
            raise UnavailableError(
                "this process is shutting down; try again",
                code="draining",
                retry_after=RETRY_AFTER_DRAIN,
            )
        if context.config.keys.required:
            caller = context.keyring.authenticate_head(head, self.record.started)
        else:
            check_local_request(head)
            caller = ANONYMOUS
        self._note_caller(caller)  # first, so that the key's records have a refusal that follows
        check_media_type(head)
        return caller

    def _note_caller(self, caller: Caller) -> None:
        self._caller = caller
        self.record.key_id, self.record.key_label = caller.key_id, caller.label

    # Parse

    def hold_body(self, size: int) -> None:
        self._context.bodies.hold(size - self._held_bytes)
        self._held_bytes = size

    def run(self, body: bytes, *, close: bool = False) -> None:
        self._run_start = _monotonic()
        if self._rejection is not None:
            self.fail(self._rejection, close=close)
        else:
            self._serve(body)

    def _serve(self, body: bytes) -> None:
        """Parse, route and connect; the attempt reports what follows."""
        if self._is_closed:
            return
        try:
            self.hold_body(len(body))
            call = self._parse(body)
            if call is None:
                # Not at the loop's next turn: another request's answer takes several of them.
                self._context.loop.call_later(REST, self._serve, body)
                return
            self._note_call(call)
            self._open_account(call, self._route(call))
        except Exception as error:
            self._fail_by(error)
        else:
            self._begin_step()

    def _parse(self, body: bytes) -> Call | None:
        """Return the call, or None if `body` is large and reading it takes further steps."""
        cache, key_id = self._context.parse_cache, self._caller.key_id
        if len(body) <= STEPPED_BYTES:
            return cache.read(body, key_id)
        reading = self._reading
        if reading is None:
            self._reading = cache.read_in_steps(body, key_id)
            return None
        try:
            next(reading)
        except StopIteration as end:
            call: Call = end.value
            return call
        return None

    def _note_call(self, call: Call) -> None:
        self._call = call
        self.record.streamed = call.terms.stream
        self.record.requested = call.terms.requested
        self._prompt_bytes = call.prompt_bytes

    # Route

    def _route(self, call: Call) -> Plan:
        context = self._context
        health = context.health
        now = self.now if health.is_calm else context.loop.time()
        plan = make_plan(call, context.catalog, health, now, context.draw)
        if self._caller.models:
            plan = keep_permitted(plan, self._caller.may_use, self._caller.models)
        self._failover = Failover(plan, context.config.routing)
        return plan

    def _open_account(self, call: Call, plan: Plan) -> None:
        """Count the call in, by what the `plan` may cost. Raises AccessError."""
        self._lease = self._context.accounts.open(
            self.record, self._caller, call, plan, _unix_time(), self._lease
        )
        self._deadlines.begin(self.now, is_stream=call.terms.stream)

    # Connect

    def _begin_step(self) -> None:
        failover = self._failover
        assert failover is not None
        key = failover.step.endpoint.key
        failover.refused = self._context.refused_options.get(key, NOTHING_REFUSED)
        self.record.attempts += 1
        self._try_step()

    def _try_step(self) -> None:
        is_first = self.record.attempts == 1
        try:
            self._attempt = attempt = self._make_attempt()
            if self._client.is_paused:
                attempt.pause()
            if is_first:
                self.record.overhead = _monotonic() - self._run_start
            attempt.start()
        except Exception as error:  # as a body that the endpoint's rules cannot be applied to
            self._fail_by(error)
            return
        # The request has been sent, so this delays nothing.
        self._context.health.begin(attempt.step.endpoint.key, self.now)
        self._client.hasten(self.now + self._context.shortest_wait)

    def _make_attempt(self) -> Attempt:
        call, failover = self._call, self._failover
        assert call is not None and failover is not None, "nothing is tried after the first content"
        step = failover.step
        self._upstream = upstream = self._context.upstreams[step.endpoint.provider]
        answer: ResponseBody = self._answer
        self._kept = None
        if step.endpoint.usage == "count":
            answer = self._kept = KeptAnswer(answer, MAX_KEPT_BYTES)
            self._kept_body = call.body
        is_stream = call.terms.stream
        edges = self._context.edges(upstream.provider.name, step.slug) if is_stream else None
        forwarded = upstream.forwarded_headers(self._head)
        without, earlier = failover.refused, self._attempt
        attempt = Attempt(self, call, step, upstream, answer, without, forwarded, edges)
        if earlier is not None:
            earlier.forget()
        return attempt

    # Relay: reports of the attempt whose answer passes

    @property
    def now(self) -> float:
        return self._context.wheel.now

    def open_answer(self, head: ResponseHead, *, is_stream: bool) -> None:
        self.record.first_content = _monotonic() - self._clock_start
        if not self._answer.is_started:
            headers, prepared = self._answer_head(head, is_stream=is_stream)
            self._answer.start(200, headers, prepared)

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        self.record.first_content = _monotonic() - self._clock_start
        self.seal(200, len(body))
        if self._kept is not None:
            self._kept.keep(body)
        headers, prepared = self._answer_head(head, is_stream=False)
        self._answer.send(200, headers, body, prepared=prepared)
        self.note_opened(is_stream=False)

    def note_opened(self, *, is_stream: bool) -> None:
        self._call = None  # no other endpoint is tried any more
        if self._kept is None:
            self.hold_body(0)
        attempt, context, failover = self._attempt, self._context, self._failover
        assert attempt is not None and failover is not None
        key, now, began = attempt.step.endpoint.key, self.now, attempt.started
        observe_success(context.health, key, self.record, now, began, is_stream=is_stream)
        if failover.refused:
            context.learn_refused(key, failover.refused)  # that it answers now proves it

    def _answer_head(self, head: ResponseHead, *, is_stream: bool) -> tuple[Headers, bytes]:
        """Return an answer's fields: those that vary, and the others as lines of a head."""
        attempt, upstream, record = self._attempt, self._upstream, self.record
        assert attempt is not None
        fields = self._cors_fields() + attempts_fields(record.attempts)
        lines = upstream.answer_fields(attempt.step.slug, is_stream)
        request_id = record.id.encode()
        prepared = b"".join((lines, self._limit_lines(), b"x-request-id: ", request_id, b"\r\n"))
        return fields + upstream.passed_headers(head), prepared

    def _common_fields(self) -> Headers:
        return [(b"x-request-id", self.record.id.encode()), *self._cors_fields()]

    def _cors_fields(self) -> Headers:
        return cors_fields(self._context.settings.cors_origins, self._head)

    def _limit_lines(self) -> bytes:
        """Return the lines of a head that say what limits the caller's key has."""
        if self._caller.limits is None:
            return b""
        return self._context.accounts.limit_lines(self._caller, _unix_time())

    def sent_body(self) -> bytes:
        return self._call.body if self._call is not None else b""

    def attempt_finished(self, attempt: Attempt) -> None:
        self._account(200)
        if self.record.streamed:
            context, key = self._context, attempt.step.endpoint.key
            observe_throughput(context.health, key, self.record, self.now)

    # Failures of an attempt

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        """Try once more without an option of the proxy's, or the next step, or fail."""
        failover, context, key = self._failover, self._context, attempt.step.endpoint.key
        assert failover is not None
        if error.refused_option is not None:
            context.health.abandon(key)
            failover.refused |= {error.refused_option}
            self._try_step()
            return
        now, has_begun = context.loop.time(), self._call is None
        is_slow = self._client.is_paused
        observe_failure(context.health, key, error, now, is_client_slow=is_slow, draw=context.draw)
        failover.note(error, now - attempt.started)
        if not has_begun and failover.advance(_monotonic() - self._clock_start):
            self._begin_step()
            return
        final = failover.conclude(has_begun=has_begun, health=context.health, now=now)
        self.record.phase = final.phase.value
        self.fail(final)

    # Ends that are not an answer

    def fail(self, error: ProxyError, *, close: bool = False) -> None:
        if self._is_closed:
            return
        if self._attempt is not None:
            self._attempt.abort()
        answer = self._answer
        self.record.code = error.recorded_code
        if not answer.is_started:
            status = error.status
            body = serialize_error(error, numeric_code=self._numeric_code)
            self.seal(status, len(body))
            fields = self._common_fields() + error_fields(error, self.record.attempts)
            answer.send(status, fields, body, close=close, prepared=self._limit_lines())
        elif self.record.streamed:
            status = answer.status
            # In the middle of a long event a blank line ends what can't be completed.
            is_whole = self._attempt is None or self._attempt.is_at_boundary
            event = serialize_error_event(error, numeric_code=self._numeric_code)
            event = event if is_whole else b"\n\n" + event
            self.seal(status, len(event))
            answer.finish(event, close=True)
        else:
            status = answer.status
            answer.abort()
        self._account(status)

    def _fail_by(self, error: Exception) -> None:
        """Fail by `error`, of which the client gets the text only if it is meant for clients."""
        if isinstance(error, ProxyError):
            self.fail(error)
        else:  # a fault of the proxy, which is not to be taken for a client that left
            logger.error("request %s failed", self.record.id, exc_info=error)
            self.fail(ProxyError("an error in the proxy itself", code="internal_error"))

    @property
    def _numeric_code(self) -> bool:
        """Whether the client's SDK expects the status as an error's code."""
        return self._head.path.startswith(b"/api/")

    def abandon(self) -> None:
        if self._is_closed:
            return
        if self._attempt is not None:
            self._attempt.abort()
            self._context.health.abandon(self._attempt.step.endpoint.key)
        self.record.code = "client_closed"
        self._account(CLIENT_CLOSED)

    # Flow control and deadlines

    def pause(self) -> None:
        self._deadlines.pause(self.now, self._client.unread_bytes)
        if self._attempt is not None:
            self._attempt.pause()

    def resume(self) -> None:
        self._deadlines.resume()
        if self._attempt is not None:
            self._attempt.resume()

    def on_deadline(self, now: float) -> float | None:
        if self._attempt is not None:
            self._attempt.check_limits(now)
        if not self._is_closed and now >= self._deadlines.stall_due:
            self._check_stall(now)
        if not self._is_closed and now >= self._comment_due():
            self._write_comment(now)
        if self._is_closed or self._attempt is None:
            return None
        return self._next_due(self._attempt, now)

    def _check_stall(self, now: float) -> None:
        if self._deadlines.has_stalled(now, self._client.unread_bytes):
            self._answer.abort()
            self.abandon()

    def _write_comment(self, now: float) -> None:
        """Keep a waiting client's connection alive; the first comment spends the status line."""
        if not self._answer.is_started:
            self._answer.start(200, [_SSE, *self._common_fields()], self._limit_lines())
        self._answer.write(COMMENT)
        self._deadlines.note_comment(now)

    def _next_due(self, attempt: Attempt, now: float) -> float:
        due = min(attempt.due, self._deadlines.stall_due, self._comment_due())
        return min(due, now + self._longest_wait(attempt))

    def _comment_due(self) -> float:
        if self._attempt is None:
            return math.inf
        return self._deadlines.comment_due(self._attempt.silent_since)

    def _longest_wait(self, attempt: Attempt) -> float:
        """Return the seconds in which no limit can pass that begins later."""
        return min(attempt.limits.shortest, self._deadlines.shortest)

    # Account

    def _account(self, status: int) -> None:
        """End the exchange and close its record."""
        self._is_closed = True
        context, record, attempt = self._context, self.record, self._attempt
        context.exchanges.discard(self)
        self.hold_body(0)
        context.admission.note_streams(len(context.exchanges))
        self.seal(status)
        if attempt is not None:
            attempt.forget()
        # Free body and answer now: in a ring of references they would wait for the collector.
        self._attempt = self._call = self._rejection = self._reading = None
        context.close_record(record, self._caller, self._lease)
        if self._kept is not None and attempt is not None:
            endpoint = attempt.step.endpoint
            kept = self._kept_body, self._kept.kept
            context.accounts.count(record, self._caller, self._lease, endpoint, *kept)

    def seal(self, status: int, following: int = 0) -> None:
        """Account for an answer whose last `following` bytes are about to be written.

        It comes before the client can take the answer for complete, so that every such answer has a
        record. Sealing once more changes the record only if the answer ended in another way.
        """
        record = self.record
        if self._sealed_as == (status, record.code):
            return
        self._sealed_as = status, record.code
        record.status = status
        record.total = _monotonic() - self._clock_start
        record.bytes_out = self._answer.body_bytes + following
        if self._failover is not None and self._failover.failures:
            record.failures = self._failover.failures
        attempt = self._attempt
        if attempt is not None:
            is_left = status == CLIENT_CLOSED and attempt.phase in _SENT_PHASES
            self._context.accounts.fill(
                record,
                attempt.step,
                attempt.outcome(),
                prompt_bytes=self._prompt_bytes,
                is_answered=record.first_content is not None or is_left,
            )
        self._context.accounts.seal(record)
