"""One chat request: authenticate → parse → route → connect → relay → account.

The methods stand in that order; failures and deadlines follow. What is tried next is decided in
failover.py, one endpoint is tried by attempts.py, and bytes pass through relay.py. Callbacks
instead of a coroutine: a task and its wake-ups cost as much as the rest of a small request.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from typing import Final

from .access import ANONYMOUS, Caller
from .attempts import Attempt, Owner
from .context import ServerContext
from .counting import MAX_KEPT_BYTES
from .downstream import Answer, Client, KeptAnswer, ResponseBody
from .errors import (
    Phase,
    ProxyError,
    RequestError,
    UnavailableError,
    UpstreamError,
    retry_headers,
    serialize_error,
    serialize_error_event,
)
from .failover import NOTHING_REFUSED, Failover
from .filters import keep_permitted
from .frames import STEPPED_BYTES
from .http11_head import Headers, RequestHead, ResponseHead
from .limits import Lease
from .origin import check_local_request, check_media_type, cors_headers
from .provider import SSE_TYPE, Upstream
from .record import CLIENT_CLOSED, Record
from .request import Call
from .request_handler import Admitted
from .routing import Plan, make_plan
from .text import clip_text, escape_client_text
from .upstream_body import make_upstream_body

logger = logging.getLogger("hoberproxy.server")

# No empty line behind it: at one, openai-go before 3.43 dispatches an event without data, and so
# does openai-python once an upstream has sent an `id:`.
COMMENT: Final = b": HOBER PROCESSING\n"
REST: Final = 0.002  # seconds left to others between two steps of reading a large body
RETRY_AFTER_DRAIN: Final = 1.0  # seconds; by then another worker or the new process has the socket
# Seconds of writing below which tokens per second are mostly the noise of a few packets.
SHORTEST_MEASURED: Final = 0.05
_monotonic: Final = time.monotonic
_unix_time: Final = time.time
_JSON: Final = (b"content-type", b"application/json")
_SSE: Final = (b"content-type", SSE_TYPE)
_SENT_PHASES: Final = frozenset((Phase.HEAD, Phase.OPENING, Phase.CONTENT, Phase.BODY))


class Exchange(Owner):
    """One chat request. However it ends, exactly one record is closed."""

    # What an exchange starts with, on the class: to set it on each would cost a microsecond.
    _refusal: ProxyError | None = None
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
    _quiet_since = 0.0
    _paused_since = 0.0
    _unread_bytes = 0
    _is_closed = False
    _upstreams: dict[str, Upstream]  # as of the plan: a reload replaces them
    _upstream: Upstream  # of the attempt

    def __init__(
        self, context: ServerContext, client: Client, head: RequestHead, answer: Answer
    ) -> None:
        self._context = context
        self._client = client
        self._head = head
        self._answer = answer
        self._clock_start = _monotonic()
        self.record = Record(context.new_request_id(), _unix_time(), head.path.decode("latin-1"))
        if (client_id := head.get(b"x-request-id")) is not None:
            self.record.client_request_id = escape_client_text(client_id)
        if client.is_paused:  # behind already, with the answer to an earlier request
            self._paused_since, self._unread_bytes = self.now, client.unread_bytes

    @property
    def key_label(self) -> str:
        return self.record.key_label

    @property
    def content_events(self) -> int:
        return 0 if self._attempt is None else self._attempt.outcome().content_events

    # Authenticate

    def admit(self, known: Admitted | None = None) -> Admitted | None:
        # A request counts as one of `max_streams` from the moment it is known to be a caller's:
        # others would take the callers' room.
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
            self._refusal = error
            return None
        context.exchanges.add(self)
        return known

    def enter(self) -> bool:
        try:
            self._lease = self._context.accounts.enter(self._caller, _unix_time())
        except ProxyError as error:
            self._refusal = error
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
        self._note_caller(caller)  # first: what is refused from here on is in the key's records
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
        if self._refusal is not None:
            self.fail(self._refusal, close=close)
        else:
            self._serve(body)

    def _serve(self, body: bytes) -> None:
        """Parse, route and connect; what follows is reported by the attempt."""
        if self._is_closed:
            return
        try:
            self.hold_body(len(body))
            call = self._parse(body)
            if call is None:
                # Not at the loop's next turn: an answer of another request takes several of them.
                self._context.loop.call_later(REST, self._serve, body)
                return
            self._note_call(call)
            self._open_account(call, self._route(call))
        except ProxyError as error:
            self.fail(error)
            return
        except Exception:
            self._fail_ourselves()
            return
        self._begin_step()

    def _parse(self, body: bytes) -> Call | None:
        """Read the call; None if it is large and the next step of reading is still to be taken."""
        frames, key_id = self._context.frames, self._caller.key_id
        if len(body) <= STEPPED_BYTES:
            return frames.read(body, key_id)
        reading = self._reading
        if reading is None:
            self._reading = frames.read_in_steps(body, key_id)
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
        self._upstreams = context.upstreams
        self._failover = Failover(plan, context.config.routing)
        return plan

    def _open_account(self, call: Call, plan: Plan) -> None:
        """Count the call in. Raises AccessError."""
        self._lease = self._context.accounts.open(
            self.record, self._caller, call, plan, _unix_time(), self._lease
        )
        self._quiet_since = self.now

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
        except RequestError as error:  # a body that the endpoint's rules cannot be applied to
            self.fail(error)
            return
        except Exception:
            self._fail_ourselves()
            return
        # From here on the model server is at work: nobody waits for what is done now.
        self._context.health.begin(attempt.step.endpoint.key, self.now)
        # A plan may be older than the config: only the first try is surely within its limits.
        wait = self._context.shortest_wait if is_first else self._longest_wait(attempt)
        self._client.hasten(self.now + wait)

    def _make_attempt(self) -> Attempt:
        call, failover = self._call, self._failover
        assert call is not None and failover is not None, "nothing is tried after the first content"
        step = failover.step
        self._upstream = upstream = self._upstreams[step.endpoint.provider]
        rules, options = step.endpoint.adaptation, upstream.provider.stream_options
        body, injected = make_upstream_body(
            call,
            step.endpoint.upstream_model,
            stream_options=options,
            adaptation=rules,
            without=failover.refused,
        )
        forwarded = upstream.forwarded_headers(self._head)
        request = upstream.serialize_request(body, forwarded, stream=call.terms.stream)
        if self._attempt is not None:
            self._attempt.forget()
        answer: ResponseBody = self._answer
        self._kept = None
        if step.endpoint.usage == "count":
            answer = self._kept = KeptAnswer(answer, MAX_KEPT_BYTES)
            self._kept_body = call.body
        is_stream = call.terms.stream
        edges = self._context.edges(upstream.provider.name, step.slug) if is_stream else None
        return Attempt(self, call, step, upstream.pool, answer, request, injected, edges)

    # Relay: what the attempt reports of an answer that passes

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
        self._call = None  # nor is another endpoint needed any more
        if self._kept is None:
            self.hold_body(0)
        attempt, context = self._attempt, self._context
        assert attempt is not None
        now, key, waited = self.now, attempt.step.endpoint.key, None
        # A body's first content comes with its last: better than nothing to sort by, no more.
        if is_stream or context.health.first_content(key, now) is None:
            is_first = self.record.attempts == 1  # whose start is known more precisely than a tick
            waited = self.record.first_content if is_first else now - attempt.started
        context.health.observe_success(key, now, waited)
        assert self._failover is not None
        refused = self._failover.refused
        if refused and not refused <= context.refused_options.get(key, NOTHING_REFUSED):
            context.learn_refused(key, refused)  # that it answers now proves it

    def _answer_head(self, head: ResponseHead, *, is_stream: bool) -> tuple[Headers, bytes]:
        """Return the fields of an answer: those that vary, and ready lines of the others."""
        attempt = self._attempt
        assert attempt is not None
        upstream, request_id = self._upstream, self.record.id.encode()
        headers = self._cors_headers() + self._attempts_header() + upstream.passed_headers(head)
        fields = upstream.answer_fields(attempt.step.slug, is_stream)
        limits = self._limit_lines()
        return headers, b"".join((fields, limits, b"x-request-id: ", request_id, b"\r\n"))

    def _common_headers(self) -> Headers:
        return [(b"x-request-id", self.record.id.encode()), *self._cors_headers()]

    def _limit_lines(self) -> bytes:
        """The lines about the limits of the caller's key; well-formed, being ours."""
        if self._caller.limits is None:
            return b""
        return self._context.accounts.limit_lines(self._caller, _unix_time())

    def _cors_headers(self) -> Headers:
        origins = self._context.settings.cors_origins
        return cors_headers(origins, self._head.get(b"origin")) if origins else []

    def sent_body(self) -> bytes:
        return self._call.body if self._call is not None else b""

    def attempt_finished(self, attempt: Attempt) -> None:
        self._account(200)
        self._observe_throughput(attempt)

    def _observe_throughput(self, attempt: Attempt) -> None:
        record = self.record
        if record.streamed and record.has_usage and record.first_content is not None:
            seconds = record.total - record.first_content
            if seconds >= SHORTEST_MEASURED and record.completion_tokens > 1:
                self._context.health.observe_throughput(
                    attempt.step.endpoint.key,
                    self._context.loop.time(),
                    record.completion_tokens / seconds,
                )

    # Failures of an attempt

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        """Try once more without an option of the proxy's, or the next step, or fail."""
        failover, context = self._failover, self._context
        assert failover is not None
        if error.refused_option is not None:
            context.health.abandon(attempt.step.endpoint.key)
            failover.refused |= {error.refused_option}
            self._try_step()
            return
        now, has_begun = context.loop.time(), self._call is None
        self._judge_endpoint(attempt, error, now)
        failover.note(error, now - attempt.started)
        if not has_begun and failover.advance(_monotonic() - self._clock_start):
            self._begin_step()
            return
        final = failover.conclude(has_begun=has_begun, health=context.health, now=now)
        self.record.phase = final.phase.value
        self.fail(final)

    def _judge_endpoint(self, attempt: Attempt, error: UpstreamError, now: float) -> None:
        health, key = self._context.health, attempt.step.endpoint.key
        is_ours = error.code == "upstream_timeout" and self._client.is_paused
        # It works, as far as this tells: the request was wrong, or the client slow.
        if error.is_refusal or is_ours or error.is_doubtful:
            health.abandon(key)
            return
        health.observe_failure(
            key,
            now,
            retry_after=error.retry_after,
            is_rate_limit=error.upstream_status == 429,
            was_answering=error.phase is Phase.CONTENT,
            draw=self._context.draw,
        )

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
            headers = [_JSON, *self._error_headers(error)]
            answer.send(status, headers, body, close=close, prepared=self._limit_lines())
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

    def _fail_ourselves(self) -> None:
        """Answer for a fault of the proxy, which is not to be taken for a client that left."""
        logger.exception("request %s failed", self.record.id)
        self.fail(ProxyError("an error in the proxy itself", code="internal_error"))

    @property
    def _numeric_code(self) -> bool:
        """Whether the client's SDK wants an error's code to be the status."""
        return self._head.path.startswith(b"/api/")

    def _error_headers(self, error: ProxyError) -> Headers:
        headers = self._common_headers() + retry_headers(error)
        # The SDKs try 5xx three times by themselves, which would multiply our own tries.
        is_final = 400 <= error.status < 500 and error.status != 429
        is_tried = error.status in (502, 504) and self.record.attempts >= 2
        if is_final or is_tried:
            headers.append((b"x-should-retry", b"false"))
        return headers + self._attempts_header()

    def _attempts_header(self) -> Headers:
        """How many endpoints were tried, where it was more than one."""
        attempts = self.record.attempts
        return [(b"x-hober-attempts", b"%d" % attempts)] if attempts > 1 else []

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
        self._paused_since = self.now
        self._unread_bytes = self._client.unread_bytes
        if self._attempt is not None:
            self._attempt.pause()

    def resume(self) -> None:
        if self._attempt is not None:
            self._attempt.resume()

    def _longest_wait(self, attempt: Attempt) -> float:
        """Seconds in which no limit can pass that begins later: so long we need not be asked."""
        settings, limits = self._context.settings, attempt.limits
        return min(limits.shortest, settings.write_timeout, settings.comment_after or math.inf)

    def on_deadline(self, now: float) -> float | None:
        if self._attempt is not None:
            self._attempt.check_limits(now)
        if not self._is_closed and now >= self._stall_due():
            self._check_stall(now)
        if not self._is_closed and now >= self._comment_due():
            self._write_comment(now)
        if self._is_closed or self._attempt is None:
            return None
        return min(self._next_due(), now + self._longest_wait(self._attempt))

    def _check_stall(self, now: float) -> None:
        """Cut a client that has read nothing; one that reads slowly gets the same time again."""
        unread = self._client.unread_bytes
        if unread < self._unread_bytes:
            self._paused_since, self._unread_bytes = now, unread
        else:
            self._answer.abort()
            self.abandon()

    def _next_due(self) -> float:
        assert self._attempt is not None
        due = self._attempt.due
        if self.record.streamed:
            due = min(due, self._comment_due())
        return min(due, self._stall_due()) if self._client.is_paused else due

    def _stall_due(self) -> float:
        if not self._client.is_paused:
            return math.inf
        return self._paused_since + self._context.settings.write_timeout

    def _comment_due(self) -> float:
        attempt, after = self._attempt, self._context.settings.comment_after
        if not self.record.streamed or not after or attempt is None or self._client.is_paused:
            return math.inf
        if attempt.phase is Phase.CONTENT:
            if not attempt.may_insert_line:
                return math.inf
            return max(self._quiet_since, attempt.idle_since) + after
        return self._quiet_since + after

    def _write_comment(self, now: float) -> None:
        """Keep a waiting client's connection alive; the first one spends the status line."""
        if not self._answer.is_started:
            self._answer.start(200, [_SSE, *self._common_headers()], self._limit_lines())
        self._answer.write(COMMENT)
        self._quiet_since = now

    # Account

    def _account(self, status: int) -> None:
        """Close the record; the exchange is over."""
        self._is_closed = True
        context, record, attempt = self._context, self.record, self._attempt
        context.exchanges.discard(self)
        self.hold_body(0)
        context.admission.note_streams(len(context.exchanges))
        self.seal(status)
        if attempt is not None:
            attempt.forget()
        # Body and answer go now: in a ring of references they would wait for the collector.
        self._attempt = self._call = self._refusal = self._reading = None
        context.close_record(record, self._caller, self._lease)
        if self._kept is not None and attempt is not None:
            endpoint = attempt.step.endpoint
            kept = self._kept_body, self._kept.kept
            context.accounts.count(record, self._caller, self._lease, endpoint, *kept)

    def seal(self, status: int, following: int = 0) -> None:
        """Account for an answer whose last `following` bytes are about to be written.

        Before the client can take it for complete: what a client saw has a record. Sealing once
        more changes something only if it ended in another way.
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
        if self._attempt is not None:
            self._account_answer(self._attempt)
        self._context.accounts.seal(record)

    def _account_answer(self, attempt: Attempt) -> None:
        record, outcome = self.record, attempt.outcome()
        record.slug = attempt.step.slug
        record.provider = attempt.step.endpoint.provider
        record.upstream_model = clip_text(outcome.upstream_model)
        record.upstream_id = clip_text(outcome.upstream_id)
        record.finish_reason = clip_text(outcome.finish_reason)
        record.events = outcome.content_events
        self._context.accounts.fill(
            record,
            attempt.step.endpoint,
            outcome.usage,
            prompt_bytes=self._prompt_bytes,
            body_bytes=outcome.content_bytes,
            is_answered=record.first_content is not None
            or (record.status == CLIENT_CLOSED and attempt.phase in _SENT_PHASES),
        )
