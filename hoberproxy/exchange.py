"""One chat request: authenticate → parse → route → connect → relay → account.

The methods stand in that order. The exchange decides what is tried next and what the client is
told; how one endpoint is tried is attempts.py's, how bytes pass is relay.py's. Callbacks instead
of a coroutine: a task and its wake-ups cost as much as the rest of a small request.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from dataclasses import asdict
from typing import Final, NamedTuple

from .access import ANONYMOUS, Caller
from .accounting import permitted
from .admission import NO_GROUP
from .attempts import Attempt, Owner
from .catalog import Provider
from .config import Config
from .counting import MAX_KEPT_BYTES
from .downstream import Answer, Client, KeptAnswer, ResponseBody
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
from .frames import STEPPED_BYTES
from .gateway import SSE_TYPE, Gateway, Upstream, unix_time
from .http11 import Headers, RequestHead, ResponseHead
from .limits import Lease
from .origin import check_local_request, cors_headers
from .record import CLIENT_CLOSED, Record, clip_text, escape_client_text
from .refusal import choose_error
from .request import Call
from .routing import Plan, make_plan
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
NOTHING_REFUSED: Final[frozenset[str]] = frozenset()
_JSON: Final = (b"content-type", b"application/json")
_SSE: Final = (b"content-type", SSE_TYPE)
_TRACE_HEADERS: Final = (b"traceparent", b"tracestate")  # W3C Trace Context, passed on as they came
_SENT_PHASES: Final = frozenset((Phase.HEAD, Phase.OPENING, Phase.CONTENT, Phase.BODY))


class Admitted(NamedTuple):
    """Who sent a head. It holds for the same head again, while keys and config are the same."""

    caller: Caller
    keyring_version: int
    config: Config


class Exchange(Owner):
    """Made when a request's head has come. `admit` it, `run` it with its body, or `abandon` it.

    Between these, `enter` where the body has not come with the head. The connection calls `pause`
    and `resume` as the client's watermarks say, and `on_deadline`. However it goes, exactly one
    record is closed.
    """

    # What an exchange starts with, on the class: to set it on each would cost a microsecond.
    _refusal: ProxyError | None = None
    _caller = ANONYMOUS
    _group = NO_GROUP  # where its address is counted
    _lease: Lease | None = None
    _sealed_as: tuple[int, str] | None = None  # status and code
    _kept: KeptAnswer | None = None  # where the texts are to be counted
    _kept_body = b""
    _held_bytes = 0  # of the body, counted with those of all others
    _run_start = 0.0
    _reading: Generator[None, None, Call] | None = None  # of a large body, as far as it got
    _call: Call | None = None
    _prompt_bytes = 0
    _plan: Plan | None = None
    _position = 0
    _attempt: Attempt | None = None
    _without = NOTHING_REFUSED  # of what we put in, what this endpoint does not take
    _failures: tuple[FailedAttempt, ...] = ()
    _errors: tuple[UpstreamError, ...] = ()  # of these failures
    _refused_slugs: frozenset[str] = frozenset()  # models for which the request is wrong
    _quiet_since = 0.0
    _paused_since = 0.0
    _unread_bytes = 0
    _is_closed = False
    _upstreams: dict[str, Upstream]  # as of the plan: a reload replaces them
    _provider: Provider  # of the attempt; a reload may replace the gateway's

    def __init__(self, gateway: Gateway, client: Client, head: RequestHead, answer: Answer) -> None:
        self._gateway = gateway
        self._client = client
        self._head = head
        self._answer = answer
        self._clock_start = _monotonic()
        self.record = Record(gateway.new_request_id(), unix_time(), head.path.decode("latin-1"))
        if (client_id := head.get(b"x-request-id")) is not None:
            self.record.client_request_id = escape_client_text(client_id)
        if client.is_paused:  # behind already, with the answer to an earlier request
            self._paused_since, self._unread_bytes = self.now, client.unread_bytes

    @property
    def content_events(self) -> int:
        """Tokens so far, as near as events tell them."""
        return 0 if self._attempt is None else self._attempt.outcome().content_events

    # Authenticate

    def admit(self, known: Admitted | None = None) -> Admitted | None:
        """Who may go on to the body; if None, `run` tells the client why not.

        `known` is what an exchange with the same head was told. A request counts, as one of
        `max_streams` and for its address, from the moment it is known to be a caller's: others
        would take the callers' room.
        """
        gateway, record = self._gateway, self.record
        try:
            if (
                known is None
                or known.keyring_version != gateway.keyring.version
                or known.config is not gateway.config
                or known.caller.has_expired(record.started)
                or gateway.is_stopping
            ):
                known = Admitted(self._authenticate(), gateway.keyring.version, gateway.config)
            else:
                self._note_caller(known.caller)
            self._group = gateway.admission.admit(
                self._head, len(gateway.exchanges) + 1, self._client.address_group
            )
        except ProxyError as error:
            self._refusal = error
            return None
        gateway.exchanges.add(self)
        return known

    def enter(self) -> bool:
        """Count the call in now, since its body is still to come; however it ends, it is settled.

        Returns False where the limits of the caller's key let no body pass: `run` then refuses it.
        """
        try:
            self._lease = self._gateway.accounts.enter(self._caller, unix_time())
        except ProxyError as error:
            self._refusal = error
            return False
        return True

    def _authenticate(self) -> Caller:
        gateway, head = self._gateway, self._head
        if gateway.is_stopping:
            raise UnavailableError(
                "this process is shutting down; try again",
                code="draining",
                retry_after=RETRY_AFTER_DRAIN,
            )
        if gateway.config.keys.required:
            caller = gateway.keyring.authenticate_head(head, self.record.started)
        else:
            check_local_request(head)
            caller = ANONYMOUS
        self._note_caller(caller)  # first: what is refused from here on is in the key's records
        _check_media_type(head)
        return caller

    def _note_caller(self, caller: Caller) -> None:
        self._caller = caller
        self.record.key_id, self.record.key_label = caller.key_id, caller.label

    # Parse, route

    def hold_body(self, size: int) -> None:
        """So many bytes of the body are here. Raises UnavailableError where all are too many."""
        self._gateway.bodies.hold(size - self._held_bytes)
        self._held_bytes = size

    def _release_body(self) -> None:
        self._gateway.bodies.release(self._held_bytes)
        self._held_bytes = 0

    def run(self, body: bytes, *, close: bool = False) -> None:
        """The whole body has come: serve it. `close`: the connection ends with a refusal."""
        self._run_start = _monotonic()
        if self._refusal is not None:
            self.refuse(self._refusal, close=close)
            return
        frames, key_id = self._gateway.frames, self._caller.key_id
        try:
            self.hold_body(len(body))
            if len(body) > STEPPED_BYTES:
                self._reading = frames.read_in_steps(body, key_id)
                self._gateway.loop.call_later(REST, self._read_on)
                return
            self._open(frames.read(body, key_id))
        except ProxyError as error:
            self.refuse(error)
            return
        except Exception:
            self._fail_ourselves()
            return
        self._begin_step(0)

    def _read_on(self) -> None:
        """Take one step of reading a large body; between two of them the loop serves others."""
        reading = self._reading
        if self._is_closed or reading is None:
            return
        try:
            try:
                next(reading)
            except StopIteration as end:
                self._reading = None
                self._open(end.value)
            else:
                # Not at the loop's next turn: an answer of another takes several of them.
                self._gateway.loop.call_later(REST, self._read_on)
                return
        except ProxyError as error:
            self.refuse(error)
            return
        except Exception:
            self._fail_ourselves()
            return
        self._begin_step(0)

    def _fail_ourselves(self) -> None:
        """A fault of the proxy: ours to answer for, not to be taken for a client that left."""
        logger.exception("request %s failed", self.record.id)
        self.refuse(ProxyError("an error in the proxy itself", code="internal_error"))

    def _open(self, call: Call) -> None:
        """Route the call and count it in. Raises ProxyError."""
        self._call = call
        terms = call.terms
        self.record.streamed = terms.stream
        self.record.requested = terms.requested
        self._prompt_bytes = call.prompt_bytes
        self._plan = plan = permitted(self._make_plan(call), self._caller)
        self._upstreams = self._gateway.upstreams
        self._lease = self._gateway.accounts.open(
            self.record, self._caller, call, plan, unix_time(), self._lease
        )
        self._quiet_since = self.now

    def _make_plan(self, call: Call) -> Plan:
        gateway = self._gateway
        health = gateway.health
        now = self.now if health.is_calm else gateway.loop.time()
        return make_plan(call, gateway.catalog, health, now, gateway.draw)

    # Connect, relay

    def _begin_step(self, position: int) -> None:
        assert self._plan is not None
        self._position = position
        key = self._plan.steps[position].endpoint.key
        self._without = self._gateway.refused_options.get(key, NOTHING_REFUSED)
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
            self.refuse(error)
            return
        except Exception:
            if self._attempt is not None:
                self._attempt.abort()
            self._fail_ourselves()
            return
        # From here on the model server is at work: nobody waits for what is done now.
        self._gateway.health.begin(attempt.step.endpoint.key, self.now)
        # A plan may be older than the config: only the first try is surely within its limits.
        wait = self._gateway.shortest_wait if is_first else self._longest_wait(attempt)
        self._client.hasten(self.now + wait)

    def _make_attempt(self) -> Attempt:
        call, plan = self._call, self._plan
        assert call is not None and plan is not None, "nothing is tried after the first content"
        step = plan.steps[self._position]
        upstream = self._upstreams[step.endpoint.provider]
        self._provider = provider = upstream.provider
        rules, options = step.endpoint.adaptation, provider.stream_options
        body, injected = make_upstream_body(
            call,
            step.endpoint.upstream_model,
            stream_options=options,
            adaptation=rules,
            without=self._without,
        )
        forwarded = self._forwarded_headers(provider.forward_headers)
        request = upstream.serialize_request(body, forwarded, stream=call.terms.stream)
        if self._attempt is not None:
            self._attempt.forget()
        answer: ResponseBody = self._answer
        self._kept = None
        if step.endpoint.usage == "count":
            answer = self._kept = KeptAnswer(answer, MAX_KEPT_BYTES)
            self._kept_body = call.body
        return Attempt(self, call, step, upstream.pool, answer, request, injected)

    def _forwarded_headers(self, names: tuple[str, ...]) -> Headers:
        head = self._head
        forwarded: Headers = []
        if not names and head.get(b"traceparent") is None:
            return forwarded
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
        """The first content is here."""
        self.record.first_content = _monotonic() - self._clock_start
        if not self._answer.is_started:
            headers, prepared = self._answer_head(head, is_stream=is_stream)
            self._answer.start(200, headers, prepared)

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        """A whole answer, checked."""
        self.record.first_content = _monotonic() - self._clock_start
        self.seal(200, len(body))
        if self._kept is not None:
            self._kept.keep(body)
        headers, prepared = self._answer_head(head, is_stream=False)
        self._answer.send(200, headers, body, prepared=prepared)
        self.note_opened(is_stream=False)

    def note_opened(self, *, is_stream: bool) -> None:
        """Content was written: the body is not needed any more, nor another endpoint."""
        self._call = None
        if self._kept is None:
            self._release_body()
        attempt, gateway = self._attempt, self._gateway
        assert attempt is not None
        now, key, waited = self.now, attempt.step.endpoint.key, None
        # A body's first content comes with its last: better than nothing to sort by, no more.
        if is_stream or gateway.health.first_content(key, now) is None:
            is_first = self.record.attempts == 1  # whose start is known more precisely than a tick
            waited = self.record.first_content if is_first else now - attempt.started
        gateway.health.observe_success(key, now, waited)
        if self._without and not self._without <= gateway.refused_options.get(key, NOTHING_REFUSED):
            gateway.learn_refused(key, self._without)  # that it answers now proves it

    def _answer_head(self, head: ResponseHead, *, is_stream: bool) -> tuple[Headers, bytes]:
        """The fields of an answer: those that vary, and those that most answers have, ready."""
        attempt = self._attempt
        assert attempt is not None
        step = attempt.step
        fields = self._upstreams[step.endpoint.provider].answer_fields(step.slug, is_stream)
        headers = self._cors_headers() + self._attempts_header()
        for text in self._provider.response_headers:
            if (value := head.get(text.encode())) is not None:
                headers.append((text.encode(), value))
        request_id = self.record.id.encode()
        limits = self._limit_lines()
        return headers, b"".join((fields, limits, b"x-request-id: ", request_id, b"\r\n"))

    def _common_headers(self) -> Headers:
        return [(b"x-request-id", self.record.id.encode()), *self._cors_headers()]

    def _limit_lines(self) -> bytes:
        """The lines about the limits of the caller's key; well-formed, being ours."""
        if self._caller.limits is None:
            return b""
        return self._gateway.accounts.limit_lines(self._caller, unix_time())

    def _cors_headers(self) -> Headers:
        origins = self._gateway.config.server.cors_origins
        return cors_headers(origins, self._head.get(b"origin")) if origins else []

    # What the attempt reports

    def sent_body(self) -> bytes:
        """The client's body, as long as there may be another attempt."""
        return self._call.body if self._call is not None else b""

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
            self._fail(error)
            return
        self._begin_step(following)

    def _following_step(self, error: UpstreamError) -> int | None:
        """Where to go on after a failure; None if it is the end."""
        plan, routing = self._plan, self._gateway.config.routing
        assert plan is not None
        if error.is_refusal:
            self._refused_slugs |= {plan.steps[self._position].slug}
        if self._call is None or not (error.is_retryable or error.is_refusal):
            return None
        if self.record.attempts >= routing.max_attempts:
            return None
        if _monotonic() - self._clock_start >= routing.attempts_timeout:
            return None
        return plan.after(self._position, self._refused_slugs)

    def _note_failure(self, attempt: Attempt, error: UpstreamError) -> None:
        health, key, now = (
            self._gateway.health,
            attempt.step.endpoint.key,
            self._gateway.loop.time(),
        )
        is_ours = error.code == "upstream_timeout" and self._client.is_paused
        # It works, as far as this tells: the request was wrong, or the client slow.
        if error.is_refusal or is_ours or error.is_doubtful:
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
        error.metadata["provider"] = attempt.step.endpoint.provider
        self._errors += (error,)
        self._failures += (
            FailedAttempt(
                provider=attempt.step.endpoint.provider,
                status=error.upstream_status,
                code=error.recorded_code,
                phase=error.phase.value,
                milliseconds=round((now - attempt.started) * 1000),
            ),
        )

    def _fail(self, error: UpstreamError) -> None:
        """Answer with the last attempt's error, or an earlier one, and with what else was tried."""
        chosen = error
        if self._call is not None:  # else the client has a part of this very answer
            chosen = choose_error(self._errors)
        self.record.phase = chosen.phase.value
        others = self._failures[:-1] if chosen is error else self._failures
        if self._call is not None and chosen.status in (502, 504) and self._is_all_cooling():
            # All had been failing before this request came: say when it is worth coming back.
            others = self._failures
            chosen.status, chosen.code = 503, "no_healthy_upstream"
            chosen.retry_after = self._next_trial()
        if others:
            chosen.metadata["previous_errors"] = [asdict(failure) for failure in others]
        self.refuse(chosen)

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

    @property
    def _numeric_code(self) -> bool:
        """Whether the client's SDK wants an error's code to be the status."""
        return self._head.path.startswith(b"/api/")

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
        if self._attempt is not None:
            self._attempt.abort()
            self._gateway.health.abandon(self._attempt.step.endpoint.key)
        self.record.code = "client_closed"
        self._account(CLIENT_CLOSED)

    # Flow control and deadlines

    def pause(self) -> None:
        """The client's buffer is full."""
        self._paused_since = self.now
        self._unread_bytes = self._client.unread_bytes
        if self._attempt is not None:
            self._attempt.pause()

    def resume(self) -> None:
        """The client has caught up."""
        if self._attempt is not None:
            self._attempt.resume()

    def _longest_wait(self, attempt: Attempt) -> float:
        """Seconds in which no limit can pass that begins later: so long we need not be asked."""
        settings, limits = self._gateway.config.server, attempt.limits
        return min(limits.shortest, settings.write_timeout, settings.comment_after or math.inf)

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
        return self._paused_since + self._gateway.config.server.write_timeout

    def _comment_due(self) -> float:
        attempt, after = self._attempt, self._gateway.config.server.comment_after
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
        gateway, record, attempt = self._gateway, self.record, self._attempt
        gateway.exchanges.discard(self)
        self._release_body()
        gateway.admission.note_streams(len(gateway.exchanges))
        gateway.admission.leave(self._group)
        self.seal(status)
        if attempt is not None:
            attempt.forget()
        # Body and answer go now: in a ring of references they would wait for the collector.
        self._attempt = self._call = self._refusal = self._reading = None
        gateway.close_record(record, self._caller, self._lease)
        if self._kept is not None and attempt is not None:
            endpoint = attempt.step.endpoint
            kept = self._kept_body, self._kept.kept
            gateway.accounts.count(record, self._caller, self._lease, endpoint, *kept)

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
        if self._failures:
            record.failures = self._failures
        if self._attempt is not None:
            self._account_answer(self._attempt)
        self._gateway.accounts.seal(record)

    def _account_answer(self, attempt: Attempt) -> None:
        record, outcome = self.record, attempt.outcome()
        record.slug = attempt.step.slug
        record.provider = attempt.step.endpoint.provider
        record.upstream_model = clip_text(outcome.upstream_model)
        record.upstream_id = clip_text(outcome.upstream_id)
        record.finish_reason = clip_text(outcome.finish_reason)
        record.events = outcome.content_events
        self._gateway.accounts.fill(
            record,
            attempt.step.endpoint,
            outcome.usage,
            prompt_bytes=self._prompt_bytes,
            body_bytes=outcome.content_bytes,
            is_answered=record.first_content is not None
            or (record.status == CLIENT_CLOSED and attempt.phase in _SENT_PHASES),
        )


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
