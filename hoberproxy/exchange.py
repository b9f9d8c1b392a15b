"""One chat request: authenticate → parse → route → connect → relay → account.

The methods stand in that order. The exchange decides what is tried next and what the client is
told; how one endpoint is tried is attempts.py's, how bytes pass is relay.py's. Callbacks instead
of a coroutine: a task and its wake-ups cost as much as the rest of a small request.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable
from dataclasses import asdict
from typing import Protocol

from .access import ANONYMOUS, Caller
from .admission import NO_GROUP
from .attempts import Attempt
from .catalog import Endpoint, Provider
from .downstream import Answer
from .errors import (
    FailedAttempt,
    Phase,
    ProxyError,
    RequestError,
    UnavailableError,
    UpstreamError,
    serialize_error,
    serialize_error_event,
)
from .gateway import Gateway, Upstream, unix_time
from .http11 import Headers, RequestHead, ResponseHead
from .origin import check_local_request, cors_headers
from .record import CLIENT_CLOSED, Record, clip_text, escape_client_text
from .request import Call, injected_options, parse_call, serialize_upstream_body
from .routing import Plan, make_plan
from .usage import Usage, estimate_usage

logger = logging.getLogger("hoberproxy.server")

COMMENT = b": HOBER PROCESSING\n\n"
RETRY_AFTER_DRAIN = 1.0  # seconds; by then another worker or the new process has the socket
# Seconds of writing below which tokens per second are mostly the noise of a few packets.
SHORTEST_MEASURED = 0.05
NOTHING_REFUSED: frozenset[str] = frozenset()
_JSON = (b"content-type", b"application/json")
_SSE = (b"content-type", b"text/event-stream; charset=utf-8")
_TRACE_HEADERS = (b"traceparent", b"tracestate")  # W3C Trace Context, passed on as they came
_SENT_PHASES = frozenset((Phase.HEAD, Phase.OPENING, Phase.CONTENT, Phase.BODY))


class Downstream(Protocol):
    """What an exchange needs of the client's connection beside its answer."""

    @property
    def is_paused(self) -> bool:
        """The client reads slower than we write."""

    @property
    def unread_bytes(self) -> int:
        """What waits for the client to read it, here and in the system."""

    @property
    def address_group(self) -> int:
        """Where its address is counted; NO_GROUP if it is not."""


class Exchange:
    """Made when a request's head has come. `admit` it, `run` it with its body, or `abandon` it.

    The door tells `pause` and `resume` as the client's watermarks say. However it goes, exactly
    one record is closed.
    """

    def __init__(
        self, gateway: Gateway, downstream: Downstream, head: RequestHead, answer: Answer
    ) -> None:
        self._gateway = gateway
        self._downstream = downstream
        self._head = head
        self._answer = answer
        self._clock_start = time.monotonic()
        self._numeric_code = head.path.startswith(b"/api/")
        self.record = Record(
            id=gateway.new_request_id(), started=unix_time(), path=head.path.decode("latin-1")
        )
        if (client_id := head.get(b"x-request-id")) is not None:
            self.record.client_request_id = escape_client_text(client_id)
        self._refusal: ProxyError | None = None
        self._call: Call | None = None
        self._prompt_bytes = 0
        self._upstreams: dict[str, Upstream] = {}  # as of the plan: a reload replaces them
        self._plan: Plan | None = None
        self._position = 0
        self._refused_slugs: set[str] = set()  # models for which the request is wrong
        self._attempt: Attempt | None = None
        self._provider: Provider | None = None  # of the attempt; a reload may replace the gateway's
        self._without = NOTHING_REFUSED  # of what we put in, what this endpoint does not take
        self._bodies: dict[Hashable, bytes] = {}
        self._failures: list[FailedAttempt] = []
        self._quiet_since = 0.0
        # The client may be behind already, with the answer to an earlier request.
        self._paused_since = self.now
        self._unread_bytes = downstream.unread_bytes if downstream.is_paused else 0
        self._is_closed = False
        self._group = NO_GROUP
        self.wheel_slot = 0
        gateway.exchanges.add(self)

    @property
    def content_events(self) -> int:
        """Tokens so far, as near as events tell them."""
        return 0 if self._attempt is None else self._attempt.outcome().content_events

    # Authenticate

    def admit(self) -> bool:
        """Whether the request may go on to its body; if not, `run` tells the client why."""
        gateway = self._gateway
        try:
            self._group = gateway.admission.admit(
                self._head, len(gateway.exchanges), self._downstream.address_group
            )
            caller = self._authenticate()
        except ProxyError as error:
            self._refusal = error
            return False
        self.record.key_id, self.record.key_label = caller.key_id, caller.label
        return True

    @property
    def is_admitted(self) -> bool:
        """The body is worth keeping."""
        return self._refusal is None

    @property
    def has_no_room(self) -> bool:
        """The proxy is full: to be refused at once."""
        return self._refusal is not None and self._refusal.code == "overloaded"

    def _authenticate(self) -> Caller:
        gateway, head = self._gateway, self._head
        if gateway.is_stopping:
            raise UnavailableError(
                "this process is shutting down; try again",
                code="draining",
                retry_after=RETRY_AFTER_DRAIN,
            )
        if gateway.config.keys.required:
            caller = gateway.keyring.authenticate(head.get(b"authorization"), self.record.started)
        else:
            check_local_request(head)
            caller = ANONYMOUS
        _check_media_type(head)
        return caller

    # Parse, route

    def run(self, body: bytes, *, close: bool = False) -> None:
        """The whole body has come: serve it. `close`: the connection ends with a refusal."""
        try:
            if self._refusal is not None:
                raise self._refusal
            self._call = call = parse_call(body)
            self.record.streamed = call.stream
            self.record.requested = tuple(clip_text(slug) for slug in call.candidates[:16])
            self._prompt_bytes = call.prompt_bytes
            self._plan = self._make_plan(call)
            self._upstreams = self._gateway.upstreams
        except ProxyError as error:
            self.refuse(error, close=close)
            return
        except Exception:
            self._fail_ourselves()
            return
        self._quiet_since = self._gateway.loop.time()
        self._begin_step(0)

    def _fail_ourselves(self) -> None:
        """A fault of the proxy: ours to answer for, not to be taken for a client that left."""
        logger.exception("request %s failed", self.record.id)
        self.refuse(ProxyError("an error in the proxy itself", code="internal_error"))

    def _make_plan(self, call: Call) -> Plan:
        gateway = self._gateway
        return make_plan(call, gateway.catalog, gateway.health, gateway.loop.time(), gateway.draw)

    # Connect, relay

    def _begin_step(self, position: int) -> None:
        assert self._plan is not None
        self._position = position
        self._without = self._gateway.refused_options.get(
            self._plan.steps[position].endpoint.key, NOTHING_REFUSED
        )
        self.record.attempts += 1
        self._try_step()

    def _try_step(self) -> None:
        try:
            self._attempt = attempt = self._make_attempt()
        except Exception:
            self._fail_ourselves()
            return
        if self._downstream.is_paused:
            attempt.pause()
        self._gateway.health.begin(attempt.step.endpoint.key, self.now)
        attempt.start()
        if not self._is_closed:
            self.limits_changed()

    def _make_attempt(self) -> Attempt:
        call, plan = self._call, self._plan
        assert call is not None and plan is not None, "nothing is tried after the first content"
        step = plan.steps[self._position]
        upstream = self._upstreams[step.endpoint.provider]
        self._provider = provider = upstream.provider
        request = upstream.serialize_request(
            self._body_for(call, step.endpoint, provider),
            self._forwarded_headers(provider.forward_headers),
            stream=call.stream,
        )
        injected = injected_options(
            call, step.endpoint.adaptation, stream_options=provider.stream_options
        )
        if self._attempt is not None:
            self._attempt.forget()
        return Attempt(
            self, call, step, upstream.pool, self._answer, request, injected - self._without
        )

    def _body_for(self, call: Call, endpoint: Endpoint, provider: Provider) -> bytes:
        """The body under an upstream's name for the model, built once per form of it."""
        key = (
            endpoint.upstream_model,
            provider.stream_options,
            endpoint.adaptation,
            self._without,
        )
        body = self._bodies.get(key)
        if body is None:
            body = self._bodies[key] = serialize_upstream_body(
                call,
                endpoint.upstream_model,
                stream_options=provider.stream_options,
                adaptation=endpoint.adaptation,
                without=self._without,
            )
        return body

    def _forwarded_headers(self, names: tuple[str, ...]) -> Headers:
        head = self._head
        forwarded: Headers = []
        if head.get(b"traceparent") is not None:
            # `tracestate` is a list that may come in several lines, in order.
            forwarded = [item for item in head.headers if item[0] in _TRACE_HEADERS]
        for text in names:
            name = text.encode()
            if (value := head.get(name)) is not None and name not in _TRACE_HEADERS:
                forwarded.append((name, value))
        return forwarded

    @property
    def now(self) -> float:
        """Loop time, as of the wheel's last turn."""
        return self._gateway.wheel.now

    def open_answer(self, head: ResponseHead, *, is_stream: bool) -> None:
        """The first content is here: the body is not needed any more, nor another endpoint."""
        self._observe_first_content(is_stream=is_stream)
        self._call = None
        self._bodies.clear()
        if not self._answer.is_started:
            self._answer.start(200, [_SSE if is_stream else _JSON, *self._answer_headers(head)])
        self.limits_changed()

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        """A whole answer, checked."""
        self._observe_first_content(is_stream=False)
        self._answer.send(200, [_JSON, *self._answer_headers(head)], body)

    def _observe_first_content(self, *, is_stream: bool) -> None:
        attempt, gateway = self._attempt, self._gateway
        assert attempt is not None
        self.record.first_content = time.monotonic() - self._clock_start
        now = gateway.loop.time()
        key = attempt.step.endpoint.key
        # A body's first content comes with its last: better than nothing to sort by, no more.
        is_measure = is_stream or gateway.health.first_content(key, now) is None
        waited = now - attempt.started if is_measure else None
        gateway.health.observe_success(key, now, waited)
        if not self._without <= gateway.refused_options.get(key, NOTHING_REFUSED):
            gateway.learn_refused(key, self._without)  # that it answers now proves it

    def _answer_headers(self, head: ResponseHead) -> Headers:
        attempt = self._attempt
        assert attempt is not None
        step = attempt.step
        headers = [
            *self._common_headers(),
            (b"x-hober-provider", step.endpoint.provider.encode()),
            (b"x-hober-model", step.slug.encode()),
            *self._attempts_header(),
        ]
        assert self._provider is not None
        for text in self._provider.response_headers:
            if (value := head.get(text.encode())) is not None:
                headers.append((text.encode(), value))
        return headers

    def _common_headers(self) -> Headers:
        headers = [(b"x-request-id", self.record.id.encode())]
        origins = self._gateway.config.server.cors_origins
        return headers + cors_headers(origins, self._head.get(b"origin")) if origins else headers

    # What the attempt reports

    def attempt_finished(self, attempt: Attempt) -> None:
        """The answer was passed on to its end."""
        self._account(200)
        self._observe_throughput(attempt)

    def _observe_throughput(self, attempt: Attempt) -> None:
        record = self.record
        if record.streamed and record.has_usage and record.first_content is not None:
            seconds = record.total - record.first_content
            if seconds >= SHORTEST_MEASURED and record.completion_tokens > 1:
                self._gateway.health.observe_throughput(
                    attempt.step.endpoint.key,
                    self._gateway.loop.time(),
                    record.completion_tokens / seconds,
                )

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        """Once more without an option of ours, another endpoint, another model, or the end."""
        if error.refused_option is not None:
            self._gateway.health.abandon(attempt.step.endpoint.key)
            self._without |= {error.refused_option}
            self._try_step()
            return
        self._note_failure(attempt, error)
        following = self._following_step(error)
        if following is None:
            self._fail(attempt, error)
            return
        self._begin_step(following)

    def _following_step(self, error: UpstreamError) -> int | None:
        """Where to go on after a failure; None if it is the end."""
        plan, routing = self._plan, self._gateway.config.routing
        assert plan is not None
        if error.is_refusal:
            self._refused_slugs.add(plan.steps[self._position].slug)
        if self._call is None or not (error.is_retryable or error.is_refusal):
            return None
        if self.record.attempts >= routing.max_attempts:
            return None
        if time.monotonic() - self._clock_start >= routing.attempts_timeout:
            return None
        return plan.after(self._position, self._refused_slugs)

    def _note_failure(self, attempt: Attempt, error: UpstreamError) -> None:
        health, key, now = (
            self._gateway.health,
            attempt.step.endpoint.key,
            self._gateway.loop.time(),
        )
        is_ours = error.code == "upstream_timeout" and self._downstream.is_paused
        if error.is_refusal or is_ours:  # it works: the request was wrong, or the client slow
            health.abandon(key)
        else:
            health.observe_failure(
                key,
                now,
                retry_after=error.retry_after,
                is_rate_limit=error.upstream_status == 429,
                was_answering=error.phase is Phase.CONTENT,
                draw=self._gateway.draw,
            )
        self._failures.append(
            FailedAttempt(
                provider=attempt.step.endpoint.provider,
                status=error.upstream_status,
                code=error.recorded_code,
                phase=error.phase.value,
                milliseconds=round((now - attempt.started) * 1000),
            )
        )

    def _fail(self, attempt: Attempt, error: UpstreamError) -> None:
        """The last attempt failed: tell it, and what was tried before it."""
        self.record.phase = error.phase.value
        earlier = self._failures[:-1]
        if self._call is not None and error.status in (502, 504) and self._is_all_cooling():
            # All had been failing before this request came: say when it is worth coming back.
            earlier = self._failures
            error.status, error.code = 503, "no_healthy_upstream"
            error.retry_after = self._next_trial()
        error.metadata["provider"] = attempt.step.endpoint.provider
        if earlier:
            error.metadata["previous_errors"] = [asdict(failure) for failure in earlier]
        self.refuse(error)

    def _is_all_cooling(self) -> bool:
        return self._plan is not None and all(
            step.reason == "cooldown" for step in self._plan.steps
        )

    def _next_trial(self) -> float:
        """Seconds until the first endpoint of the plan may be tried again; one at least."""
        assert self._plan is not None
        health, now = self._gateway.health, self._gateway.loop.time()
        ends = [health.cooldown_ends(step.endpoint.key) or now for step in self._plan.steps]
        return max(min(ends) - now, 1.0)

    # Refuse: the ends that are not an answer

    def refuse(self, error: ProxyError, *, close: bool = False) -> None:
        """Tell the client that its request failed, in the form that is still possible."""
        if self._is_closed:
            return
        if self._attempt is not None:
            self._attempt.abort()
        answer = self._answer
        if not answer.is_started:
            status = error.status
            body = serialize_error(error, numeric_code=self._numeric_code)
            answer.send(status, [_JSON, *self._error_headers(error)], body, close=close)
        elif self.record.streamed:
            status = answer.status
            # In the middle of a long event a blank line ends what can't be completed.
            is_whole = self._attempt is None or self._attempt.is_at_boundary
            event = serialize_error_event(error, numeric_code=self._numeric_code)
            answer.finish(event if is_whole else b"\n\n" + event, close=True)
        else:
            status = answer.status
            answer.abort()
        self.record.code = error.recorded_code
        self._account(status)

    def _error_headers(self, error: ProxyError) -> Headers:
        headers = self._common_headers()
        if error.retry_after is not None:
            milliseconds = math.ceil(error.retry_after * 1000)
            headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after)))
            headers.append((b"retry-after-ms", b"%d" % milliseconds))
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
        """The client went away: its upstream goes in this very turn of the loop."""
        if self._is_closed:
            return
        is_answered = False
        if self._attempt is not None:
            # Many clients leave at [DONE], before the framing's end: they have got all they wanted.
            is_answered = self._attempt.is_answer_out and not self._downstream.is_paused
            self._attempt.abort()
            self._gateway.health.abandon(self._attempt.step.endpoint.key)
        if is_answered:
            self._account(self._answer.status)
        else:
            self.record.code = "client_closed"
            self._account(CLIENT_CLOSED)

    # Flow control and deadlines

    def pause(self) -> None:
        """The client's buffer is full."""
        self._paused_since = self.now
        self._unread_bytes = self._downstream.unread_bytes
        if self._attempt is not None:
            self._attempt.pause()
        self.limits_changed()

    def resume(self) -> None:
        """The client has caught up."""
        if self._attempt is not None:
            self._attempt.resume()
        self.limits_changed()

    def limits_changed(self) -> None:
        """Look at the deadlines anew."""
        if not self._is_closed and self._attempt is not None:
            self._gateway.wheel.schedule(self, self._next_due())

    def on_deadline(self, now: float) -> float | None:
        """What is due: a limit of the attempt, a comment line, a client that does not read."""
        if self._attempt is not None:
            self._attempt.check_limits(now)
        if not self._is_closed and now >= self._stall_due():
            self._check_stall(now)
        if not self._is_closed and now >= self._comment_due():
            self._write_comment(now)
        if self._is_closed or self._attempt is None:
            return None
        return self._next_due()

    def _check_stall(self, now: float) -> None:
        """Cut a client that has read nothing; one that reads slowly gets the same time again."""
        unread = self._downstream.unread_bytes
        if unread < self._unread_bytes:
            self._paused_since, self._unread_bytes = now, unread
        else:
            self._answer.abort()
            self.abandon()

    def _next_due(self) -> float:
        assert self._attempt is not None
        return min(self._attempt.due, self._comment_due(), self._stall_due())

    def _stall_due(self) -> float:
        if not self._downstream.is_paused:
            return math.inf
        return self._paused_since + self._gateway.config.server.write_timeout

    def _comment_due(self) -> float:
        attempt, after = self._attempt, self._gateway.config.server.comment_after
        if not self.record.streamed or not after or attempt is None or self._downstream.is_paused:
            return math.inf
        if attempt.phase is Phase.CONTENT:
            if not attempt.is_at_boundary:
                return math.inf
            return max(self._quiet_since, attempt.idle_since) + after
        return self._quiet_since + after

    def _write_comment(self, now: float) -> None:
        """Keep a waiting client's connection alive; the first one spends the status line."""
        if not self._answer.is_started:
            self._answer.start(200, [_SSE, *self._common_headers()])
        self._answer.write(COMMENT)
        self._quiet_since = now

    # Account

    def _account(self, status: int) -> None:
        """Close the record; the exchange is over."""
        self._is_closed = True
        gateway, record, attempt = self._gateway, self.record, self._attempt
        gateway.wheel.cancel(self)
        gateway.exchanges.discard(self)
        gateway.admission.note_streams(len(gateway.exchanges))
        gateway.admission.leave(self._group)
        record.status = status
        record.total = time.monotonic() - self._clock_start
        record.bytes_out = self._answer.body_bytes
        record.failures = self._failures
        if attempt is not None:
            self._account_answer(attempt)
            attempt.forget()
        # Body and answer go now: in a ring of references they would wait for the collector.
        self._attempt = self._call = self._refusal = None
        self._bodies.clear()
        gateway.close_record(record)

    def _account_answer(self, attempt: Attempt) -> None:
        record, outcome = self.record, attempt.outcome()
        record.slug = attempt.step.slug
        record.provider = attempt.step.endpoint.provider
        record.upstream_model = clip_text(outcome.upstream_model)
        record.upstream_id = clip_text(outcome.upstream_id)
        record.finish_reason = clip_text(outcome.finish_reason)
        record.events = outcome.content_events
        usage = outcome.usage
        if usage is not None:
            record.has_usage = True
        elif record.first_content is not None or (
            record.status == CLIENT_CLOSED and attempt.phase in _SENT_PHASES
        ):
            usage = estimate_usage(
                prompt_bytes=self._prompt_bytes,
                content_events=outcome.content_events,
                content_bytes=outcome.content_bytes,
            )
        _fill_usage(record, usage)


def _fill_usage(record: Record, usage: Usage | None) -> None:
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens
        record.completion_tokens = usage.completion_tokens
        record.cached_tokens = usage.cached_tokens
        record.reasoning_tokens = usage.reasoning_tokens
        record.estimated = usage.is_estimated


def _check_media_type(head: RequestHead) -> None:
    coding = head.get(b"content-encoding")
    if coding is not None and coding.lower() != b"identity":
        raise RequestError(
            "expected a request body without content-encoding; send it uncompressed",
            code="unsupported_media_type",
            status=415,
        )
    if head.get(b"content-type") is not None:
        media_type = head.content_type
        if media_type != b"application/json" and not media_type.endswith(b"+json"):
            raise RequestError(
                "expected content-type application/json; "
                "with curl add -H 'content-type: application/json'",
                code="unsupported_media_type",
                status=415,
            )
