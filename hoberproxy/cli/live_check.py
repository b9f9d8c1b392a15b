"""Send three small requests to each endpoint of a config, for `hoberproxy check --live`.

They take the path of a client's requests: parsed call, adaptation, pool, attempt, relay. In place
of an exchange a `_Request` owns the attempt and keeps the answer. Nothing is recorded. Reports hold
no key and no text of an upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import orjson
import uvloop

from ..config.settings import Config
from ..downstream.response import Answer, Client
from ..downstream.socket_writer import Sink
from ..errors import UpstreamError
from ..exchange.attempt import Attempt, AttemptOwner
from ..exchange.observations import SHORTEST_MEASURED
from ..protocol.http_head import ResponseHead
from ..request.checks import parse_call
from ..routing.catalog import Endpoint, Model, TimeLimits
from ..routing.plan import Step
from ..timer_wheel import Ticker, Wheel
from ..upstream.models_listing import list_models
from ..upstream.provider import Upstream, make_upstreams
from .live_check_report import Report

Body = dict[str, Any]


def _body(prompt: str, max_tokens: int, **members: Any) -> Body:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "check", "messages": messages, "max_tokens": max_tokens, **members}


_FUNCTION = {"name": "ok", "description": "Reply with OK.", "parameters": {"type": "object"}}
_STREAM = _body("Reply with OK, ten times.", 16, stream=True)  # one OK has no speed
MAX_TOKENS = 64  # with some models the marks around a call are 20 tokens
_TOOL = _body(
    "Reply with OK.",
    MAX_TOKENS,
    tools=[{"type": "function", "function": _FUNCTION}],
    tool_choice="required",
)
# OpenAI refuses JSON mode without the word JSON in the prompt.
_JSON = _body(
    'Reply with {"ok": true} as JSON.', MAX_TOKENS, response_format={"type": "json_object"}
)


def run_live_check(
    config: Config, *, limit: float, concurrency: int, on_progress: Callable[[int, int], None]
) -> list[Report]:
    """Run `check_endpoints` on a loop like that of the proxy."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(
            check_endpoints(config, limit=limit, concurrency=concurrency, on_progress=on_progress)
        )


async def check_endpoints(
    config: Config, *, limit: float, concurrency: int, on_progress: Callable[[int, int], None]
) -> list[Report]:
    """Return a report for each endpoint of `config`, in its order.

    Raises ConfigError for a bad ca_file. `limit` is the seconds of one request. An endpoint gets
    at most three, one after the other, and `concurrency` endpoints are checked at a time.
    `on_progress(done, all)` is called after each.
    """
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop.time())
    upstreams, ticker = make_upstreams(config, loop, wheel), Ticker(wheel, loop)
    checker, gate, done = _Checker(upstreams, limit), asyncio.Semaphore(concurrency), 0
    pairs = [(model, endpoint) for model in config.models for endpoint in model.endpoints]

    async def check(model: Model, endpoint: Endpoint) -> Report:
        nonlocal done
        async with gate:
            report = await checker.check(model, endpoint)
        done += 1
        on_progress(done, len(pairs))
        return report

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(check(*pair)) for pair in pairs]
    finally:
        ticker.close()
        for upstream in upstreams.values():
            await upstream.pool.aclose()
    return [task.result() for task in tasks]


class _Checker:
    """Checks endpoints with requests of at most `limit` seconds each."""

    def __init__(self, upstreams: Mapping[str, Upstream], limit: float) -> None:
        self._upstreams = upstreams
        self._limit = limit
        self._listings: dict[str, asyncio.Task[list[str] | None]] = {}  # by provider

    async def check(self, model: Model, endpoint: Endpoint) -> Report:
        """Report on one endpoint; for a wildcard, on the first fitting model of its provider."""
        upstream = self._upstreams[endpoint.provider]
        report = Report(model.slug, endpoint.provider)
        limits = self._bounded(endpoint.limits or upstream.provider.limits)
        endpoint = replace(endpoint, limits=limits)
        if model.is_wildcard:
            try:
                name = await self._first_listed(upstream, endpoint.upstream_model, limits)
            except UpstreamError as error:
                report.fail(error)
                return report
            if name is None:
                report.note("the provider lists no model that fits; name one in [[models]]")
                return report
            endpoint = replace(endpoint, upstream_model=name)
        await _send_all(report, upstream, Step(model.slug, endpoint))
        return report

    def _bounded(self, limits: TimeLimits) -> TimeLimits:
        """Return `limits`, none of them longer than this check's."""
        return TimeLimits(
            *(min(getattr(limits, each.name), self._limit) for each in fields(limits))
        )

    async def _first_listed(
        self, upstream: Upstream, pattern: str, limits: TimeLimits
    ) -> str | None:
        """Return the first model in the provider's list that fits `pattern`, None if none does."""
        name = upstream.provider.name
        if name not in self._listings:
            self._listings[name] = asyncio.create_task(list_models(upstream, limits))
        before, _, after = pattern.partition("*")
        for model in await self._listings[name] or ():
            is_longer = len(model) > len(before) + len(after)
            if is_longer and model.startswith(before) and model.endswith(after):
                return model
        return None


# The three requests


async def _send_all(report: Report, upstream: Upstream, step: Step) -> None:
    stream = await _Request(upstream, step, _STREAM).send()
    _report_stream(report, stream)
    without: frozenset[str] = frozenset()
    if stream.error is not None:
        without = _report_failure(report, stream.error)
        if not stream.error.is_refusal:
            return  # the others would fail for the same reason
    tools = await _Request(upstream, step, _TOOL, without).send()
    json_mode = await _Request(upstream, step, _JSON, without).send()
    if tools.error is None or json_mode.error is None:
        report.reachable = "yes"
    report.tools = tools.verdict("no call", bool(tools.message.get("tool_calls")))
    report.json_mode = json_mode.verdict("no JSON", _is_object(json_mode.message.get("content")))
    if not report.is_unreachable:
        own = step.endpoint.abilities
        report.note_ability("tools", report.tools, own.tools)
        report.note_ability("json_mode", report.json_mode, own.json_mode)


def _report_failure(report: Report, error: UpstreamError) -> frozenset[str]:
    """Report `error`; return the option that the server refuses, if that is why."""
    if (option := error.refused_option) is None:
        report.fail(error)
        return frozenset()
    report.reachable = f"no ({error.upstream_status})"
    advice = "set stream_options = false for the provider"
    advice = advice if option == "stream_options" else "take it out of the endpoint's set"
    report.note(f"the server refuses {option}, which the proxy adds; {advice}")
    return frozenset((option,))


def _report_stream(report: Report, stream: _Request) -> None:
    outcome, began = stream.attempt.outcome(), stream.first_content
    if began is not None:
        report.first_content = began - stream.attempt.started
    if stream.error is not None or began is None:
        return
    report.reachable = "yes"
    usage, events = outcome.usage, outcome.content_events
    if usage is not None and usage.has_gaps(events):  # zero tokens, and yet a text
        usage = None
    report.usage = "yes" if usage is not None else "no"
    tokens = usage.completion_tokens if usage is not None else events
    seconds = stream.now - began
    if seconds >= SHORTEST_MEASURED and tokens > 1:
        report.throughput = (tokens - 1) / seconds


def _is_object(text: object) -> bool:
    try:
        return isinstance(text, str) and isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


class _Request(AttemptOwner):
    """One request to an endpoint: the owner of its attempt, which keeps what the answer says.

    `without` names options that are left out of the body.
    """

    def __init__(
        self, upstream: Upstream, step: Step, body: Body, without: frozenset[str] = frozenset()
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self.first_content: float | None = None  # loop time
        self.error: UpstreamError | None = None
        self.message: dict[str, Any] = {}  # of an answer that is not streamed
        call = parse_call(orjson.dumps(body))
        nobody = _Nobody()
        answer = Answer(Sink(nobody), nobody, version_minor=1, keep_alive=True)
        self.attempt = Attempt(self, call, step, upstream, answer, without)

    async def send(self) -> _Request:
        """Send the request and wait for its end, which the attempt's limits bring about."""
        self.attempt.start()
        try:
            while not self._ended.done():
                left = max(self.attempt.due - self.now, 0.0)
                await asyncio.wait((self._ended,), timeout=left)
                if not self._ended.done():
                    self.attempt.check_limits(self.now)
        finally:
            self.attempt.abort()
        return self

    def verdict(self, otherwise: str, is_supported: bool) -> str:
        """Return the report's word: "yes" if `is_supported`, or why not, or `otherwise`."""
        if self.error is not None:
            return "refused" if self.error.is_refusal else "failed"
        if not is_supported and self.attempt.outcome().finish_reason == "length":
            return "cut"  # the model may reason first
        return "yes" if is_supported else otherwise

    # What the attempt reports

    @property
    def now(self) -> float:
        return self._loop.time()

    def open_answer(self, head: ResponseHead, *, is_stream: bool) -> None:
        self.first_content = self.now

    def note_opened(self, *, is_stream: bool) -> None:
        """Keep these requests out of health."""

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        choice = orjson.loads(body)["choices"][0]  # checked by the relay
        message = choice.get("message") if isinstance(choice, dict) else None
        self.message = message if isinstance(message, dict) else {}

    def sent_body(self) -> bytes:
        """Return nothing: the body is this module's own."""
        return b""

    def seal(self, status: int, following: int = 0) -> None:
        """Keep these requests out of the records."""

    def attempt_finished(self, attempt: Attempt) -> None:
        self._ended.set_result(None)

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        self.error = error
        self._ended.set_result(None)


class _Nobody(Client):
    """A client, and its transport, that reads nothing."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def on_answer_end(self, *, keep_alive: bool) -> None: ...
