"""Ask every endpoint of a config what it can do, for `hoberproxy check --live`.

The requests are tiny and take the path of real ones: checked call, the endpoint's adaptation, pool,
attempt, relay; where an exchange would serve a client, a `_Question` keeps what it learns. Nothing
is recorded. What is told is in our own words: no key, no text of an upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import orjson
import uvloop

from .attempts import Attempt, Owner
from .catalog import Endpoint, Model, TimeLimits
from .deadlines import Ticker, Wheel
from .diagnosis import Report
from .downstream import Answer, Client
from .errors import UpstreamError
from .http11_head import ResponseHead
from .listing import list_models
from .provider import Upstream, make_upstreams
from .request import parse_call
from .routing import Step
from .settings import Config
from .sink import Sink
from .upstream_body import make_upstream_body

SHORTEST_MEASURED = 0.05  # seconds of writing; below, tokens per second are noise of a few packets

Body = dict[str, Any]


def _body(prompt: str, max_tokens: int, **members: Any) -> Body:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "probe", "messages": messages, "max_tokens": max_tokens, **members}


_FUNCTION = {"name": "ok", "description": "Reply with OK.", "parameters": {"type": "object"}}
_STREAM = _body("Reply with OK, ten times.", 16, stream=True)  # one alone has no speed
MAX_TOKENS = 64  # the marks around a call alone are 20 tokens with some models
_TOOL = _body(
    "Reply with OK.",
    MAX_TOKENS,
    tools=[{"type": "function", "function": _FUNCTION}],
    tool_choice="required",
)
# Without the word JSON in a prompt OpenAI refuses the mode.
_JSON = _body(
    'Reply with {"ok": true} as JSON.', MAX_TOKENS, response_format={"type": "json_object"}
)


def run_probe(
    config: Config, *, limit: float, concurrency: int, tell: Callable[[int, int], None]
) -> list[Report]:
    """`probe` on the loop that real requests run on."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(probe(config, limit=limit, concurrency=concurrency, tell=tell))


async def probe(
    config: Config, *, limit: float, concurrency: int, tell: Callable[[int, int], None]
) -> list[Report]:
    """One report an endpoint, in the config's order. Raises ConfigError for a bad ca_file.

    `limit` is in seconds and for each request, of which an endpoint gets three at most, one
    after the other; `concurrency` endpoints are asked at a time. `tell(done, all)` is called after
    each.
    """
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop.time())
    upstreams, ticker = make_upstreams(config, loop, wheel), Ticker(wheel, loop)
    prober, gate, done = _Prober(upstreams, limit), asyncio.Semaphore(concurrency), 0
    pairs = [(model, endpoint) for model in config.models for endpoint in model.endpoints]

    async def ask(model: Model, endpoint: Endpoint) -> Report:
        nonlocal done
        async with gate:
            report = await prober.ask(model, endpoint)
        done += 1
        tell(done, len(pairs))
        return report

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(*pair)) for pair in pairs]
    finally:
        ticker.close()
        for upstream in upstreams.values():
            await upstream.pool.aclose()
    return [task.result() for task in tasks]


class _Prober:
    def __init__(self, upstreams: Mapping[str, Upstream], limit: float) -> None:
        self._upstreams = upstreams
        self._limit = limit
        self._listings: dict[str, asyncio.Task[list[str] | None]] = {}  # one for each provider

    async def ask(self, model: Model, endpoint: Endpoint) -> Report:
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
                report.note("no model was asked: it lists none that fits; name one in [[models]]")
                return report
            endpoint = replace(endpoint, upstream_model=name)
        await _ask_all(report, upstream, Step(model.slug, endpoint))
        return report

    def _bounded(self, limits: TimeLimits) -> TimeLimits:
        """The endpoint's own, none longer than ours."""
        return TimeLimits(
            *(min(getattr(limits, each.name), self._limit) for each in fields(limits))
        )

    async def _first_listed(
        self, upstream: Upstream, pattern: str, limits: TimeLimits
    ) -> str | None:
        """The first model that the provider lists and that fits a wildcard's endpoint."""
        name = upstream.provider.name
        if name not in self._listings:
            self._listings[name] = asyncio.create_task(list_models(upstream, limits))
        before, _, after = pattern.partition("*")
        for model in await self._listings[name] or ():
            is_longer = len(model) > len(before) + len(after)
            if is_longer and model.startswith(before) and model.endswith(after):
                return model
        return None


# The three questions


async def _ask_all(report: Report, upstream: Upstream, step: Step) -> None:
    stream = await _Question(upstream, step, _STREAM).ask()
    _report_stream(report, stream)
    without: frozenset[str] = frozenset()
    if stream.error is not None:
        if (option := stream.error.refused_option) is None:
            report.fail(stream.error)
        else:
            without = frozenset((option,))
            report.reachable = f"no ({stream.error.upstream_status})"
            advice = "set stream_options = false for the provider"
            advice = advice if option == "stream_options" else "take it out of the endpoint's set"
            report.note(f"it refuses {option}, which the proxy puts in; {advice}")
        if not stream.error.is_refusal:
            return  # the others would fail for the same reason
    tools = await _Question(upstream, step, _TOOL, without).ask()
    json_mode = await _Question(upstream, step, _JSON, without).ask()
    if tools.error is None or json_mode.error is None:
        report.reachable = "yes"
    report.tools = tools.verdict("no call", bool(tools.message.get("tool_calls")))
    report.json_mode = json_mode.verdict("no JSON", _is_object(json_mode.message.get("content")))
    if not report.is_unreachable:
        own = step.endpoint.abilities
        report.note_ability("tools", report.tools, own.tools)
        report.note_ability("json_mode", report.json_mode, own.json_mode)


def _report_stream(report: Report, stream: _Question) -> None:
    outcome, began = stream.attempt.outcome(), stream.first_content
    if began is not None:
        report.first_content = began - stream.attempt.started
    if stream.error is not None or began is None:
        return
    report.reachable = "yes"
    usage, events = outcome.usage, outcome.content_events
    if usage is not None and usage.has_gaps(events):  # zeros beside a text
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


class _Question(Owner):
    """One request: what an exchange is to its attempt, and the client, who keeps a little."""

    def __init__(
        self, upstream: Upstream, step: Step, body: Body, without: frozenset[str] = frozenset()
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self.first_content: float | None = None  # loop time
        self.error: UpstreamError | None = None
        self.message: dict[str, Any] = {}  # of an answer that is no stream
        call, endpoint = parse_call(orjson.dumps(body)), step.endpoint
        rules, options = endpoint.adaptation, upstream.provider.stream_options
        adapted, injected = make_upstream_body(
            call,
            endpoint.upstream_model,
            stream_options=options,
            adaptation=rules,
            without=without,
        )
        request = upstream.serialize_request(adapted, [], stream=call.terms.stream)
        nobody = _Nobody()
        answer = Answer(Sink(nobody), nobody, version_minor=1, keep_alive=True)
        self.attempt = Attempt(self, call, step, upstream.pool, answer, request, injected)

    async def ask(self) -> _Question:
        """Wait for the end, which the attempt's limits see to."""
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

    def verdict(self, otherwise: str, is_shown: bool) -> str:
        if self.error is not None:
            return "refused" if self.error.is_refusal else "failed"
        if not is_shown and self.attempt.outcome().finish_reason == "length":
            return "cut"  # it may think first
        return "yes" if is_shown else otherwise

    # What the attempt reports

    @property
    def now(self) -> float:
        return self._loop.time()

    def open_answer(self, head: ResponseHead, *, is_stream: bool) -> None:
        self.first_content = self.now

    def note_opened(self, *, is_stream: bool) -> None:
        """Questions of the probe teach health nothing."""

    def send_answer(self, head: ResponseHead, body: bytes) -> None:
        choice = orjson.loads(body)["choices"][0]  # checked by the relay
        message = choice.get("message") if isinstance(choice, dict) else None
        self.message = message if isinstance(message, dict) else {}

    def sent_body(self) -> bytes:
        """The body is the probe's own."""
        return b""

    def seal(self, status: int, following: int = 0) -> None:
        """Questions of the probe are not recorded."""

    def attempt_finished(self, attempt: Attempt) -> None:
        self._ended.set_result(None)

    def attempt_failed(self, attempt: Attempt, error: UpstreamError) -> None:
        self.error = error
        self._ended.set_result(None)


class _Nobody(Client):
    """The client of a question, and its transport: nobody reads the answer."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def on_answer_end(self, *, keep_alive: bool) -> None: ...
