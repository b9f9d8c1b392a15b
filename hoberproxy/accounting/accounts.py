"""Keeps a request's account: admits it, holds what it may use, and settles usage and cost.

It brings together the limits, the journal, and the estimates of what endpoints answer. The exchange
calls `enter` where a request's body is still to come, `open` before the first attempt, `seal`
before the last byte of the answer goes out, and `close` at the end, however the request ended.
"""

from __future__ import annotations

import asyncio
import logging

import orjson

from ..access.keys import Caller
from ..access.limits import NO_DEMAND, Demand, Lease
from ..access.shared_limits import SharedLimits
from ..dialects.outcome import Outcome
from ..dialects.usage import Usage
from ..protocol.text import clip_text
from ..request.call import CHOICES, MAXIMA, Call, Terms, output_limits
from ..routing.catalog import NO_ADAPTATION, Adaptation, Endpoint, Prices
from ..routing.health import Key
from ..routing.plan import Plan, Step
from .estimates import Estimates
from .journal import Journal
from .record import Record
from .tokenizer import TokenCounter

logger = logging.getLogger("hoberproxy.upstream")

MAX_SILENT = 256  # endpoints that the log names: behind wildcards, clients name them
MAX_PLANS = 256  # whose offers are remembered


class _Offer:
    """The prices and lengths of endpoints at which the same request costs the same.

    `longest` is the most tokens of one answer where the request sets no limit.
    """

    __slots__ = ("adaptation", "longest", "prices")

    def __init__(self, prices: Prices | None, longest: int, adaptation: Adaptation) -> None:
        self.prices = prices
        self.longest = longest
        self.adaptation = adaptation


class Accounts:
    """The accounts of one process, for use on the loop's thread."""

    def __init__(self, journal: Journal, shared_limits: SharedLimits, assumed_output: int) -> None:
        """Assume `assumed_output` tokens for an answer that neither request nor endpoint limits."""
        self._journal = journal
        self._shared_limits = shared_limits
        self._estimates = Estimates()
        self._assumed_output = assumed_output
        self._offers: dict[int, tuple[Plan, tuple[_Offer, ...]]] = {}  # by the plan's id
        self._counter: TokenCounter | None = None  # with the first request to be counted
        self._silent: set[Key] = set()  # endpoints that the log has named for want of usage

    def enter(self, caller: Caller, now: float) -> Lease | None:
        """Count in a call whose body is still to come; return its lease, None without limits.

        Raises AccessError where no body could make it pass. The lease goes to `open` and, if `open`
        is not called or raises, to `close`.
        """
        return self._shared_limits.enter(caller, now) if caller.limits is not None else None

    def open(
        self,
        record: Record,
        caller: Caller,
        call: Call,
        plan: Plan,
        now: float,
        lease: Lease | None = None,
    ) -> Lease | None:
        """Count the call in, note it in the journal, and return the lease for `close`.

        `lease` is what `enter` returned, if it was called. `now` is unix time, and not the record's
        start, for a body may have taken long. Raises AccessError.
        """
        step = plan.steps[0]
        prompt, usual = self._estimates.of_call(step.endpoint.key, call.prompt_bytes)
        wish = call.terms.max_output
        if (limits := caller.limits) is not None:
            demand = NO_DEMAND
            if limits.budget is not None or limits.tokens_per_minute is not None:
                demand = self._demand(plan, call.terms, prompt)
            if lease is None:
                lease = self._shared_limits.admit(caller, now, demand)
            else:
                lease = self._shared_limits.reserve(caller, now, demand, lease)
        if wish is not None and wish < usual:
            usual = wish
        self._journal.open_record(record, step.slug, step.endpoint, prompt, usual)
        return lease

    def _demand(self, plan: Plan, terms: Terms, prompt: int) -> Demand:
        """Return the most that the call may take at any step: the longest answer, the top cost."""
        is_bounded, most_choices, longest, of_prompt, of_answer = True, 1, 0, 0, 0
        for offer in self._offers_of(plan):
            length, choices = terms.max_output, terms.choices
            if offer.adaptation is not NO_ADAPTATION:
                length, choices = _adapted_output(terms, offer.adaptation)
            if length is None:
                is_bounded, length = False, offer.longest
            answer = length * choices
            if answer > longest:
                longest = answer
            if choices > most_choices:
                most_choices = choices
            if offer.prices is not None:
                cost = offer.prices.most(prompt, answer)
                if cost[0] + cost[1] > of_prompt + of_answer:
                    of_prompt, of_answer = cost
        return Demand(prompt, longest, is_bounded, of_prompt, of_answer, most_choices)

    def _offers_of(self, plan: Plan) -> tuple[_Offer, ...]:
        """Return the different offers of a plan's steps, kept since most plans serve many calls."""
        known = self._offers.get(id(plan))
        if known is not None:
            return known[1]
        different: dict[tuple[int, int, int], _Offer] = {}
        for _, endpoint, _ in plan.steps:
            offer = _Offer(endpoint.prices, self._longest_of(endpoint), endpoint.adaptation)
            different[id(offer.prices), offer.longest, id(offer.adaptation)] = offer
        if len(self._offers) >= MAX_PLANS:
            self._offers.clear()
        # With the plan itself: as long as it is kept, no other plan has its id.
        self._offers[id(plan)] = plan, tuple(different.values())
        return self._offers[id(plan)][1]

    def _longest_of(self, endpoint: Endpoint) -> int:
        """Return the most tokens of an answer that its request does not limit."""
        if endpoint.max_output is not None:
            return endpoint.max_output
        length = endpoint.context_length
        return self._assumed_output if length is None else min(self._assumed_output, length)

    def fill(
        self,
        record: Record,
        step: Step,
        outcome: Outcome,
        *,
        prompt_bytes: int,
        is_answered: bool,
    ) -> None:
        """Put the `outcome` of an attempt on `step` into `record`, with usage and cost.

        Usage is as reported, else estimated if the attempt `is_answered`.
        """
        slug, endpoint, _ = step
        record.slug = slug
        record.provider = endpoint.provider
        record.upstream_model = clip_text(outcome.upstream_model)
        record.upstream_id = clip_text(outcome.upstream_id)
        record.finish_reason = clip_text(outcome.finish_reason)
        record.events = events = outcome.content_events
        key, prices, usage = endpoint.key, endpoint.prices, outcome.usage
        body_bytes = outcome.content_bytes
        is_whole = record.status == 200 and not record.code
        record.has_usage = usage is not None and not usage.has_gaps(events)
        if usage is not None and record.has_usage:
            if is_whole and usage:
                self._estimates.learn(
                    key, usage, prompt_bytes=prompt_bytes, events=events, body_bytes=body_bytes
                )
        elif usage is not None or is_answered:
            usage = self._estimates.usage(
                key, usage, prompt_bytes=prompt_bytes, events=events, body_bytes=body_bytes
            )
        else:
            record.cost = 0  # no upstream answered, so none charges
            return
        if is_whole and usage.is_estimated and usage.completion_tokens:
            self._note_silent(endpoint)
        record.prompt_tokens = usage.prompt_tokens
        record.completion_tokens = usage.completion_tokens
        record.cached_tokens = usage.cached_tokens
        record.cache_write_tokens = usage.cache_write_tokens
        record.reasoning_tokens = usage.reasoning_tokens
        record.estimated = usage.is_estimated
        if prices is not None:
            record.price = prices.text
            record.cost = cost_of(usage, prices)

    def _note_silent(self, endpoint: Endpoint) -> None:
        """Log once that an endpoint sends whole answers without usage."""
        silent, key = self._silent, endpoint.key
        if endpoint.usage == "count" or key in silent or len(silent) >= MAX_SILENT:
            return
        silent.add(key)
        logger.warning(
            "provider %s, model %s: expected usage with an answer, got none that can be read; its "
            "tokens are estimated. Let the server report them (stream_options = true of the "
            'provider, where it knows that option), or set usage = "count" for the endpoint',
            endpoint.provider,
            endpoint.upstream_model[:128],
        )

    def seal(self, record: Record) -> None:
        """Append `record`, as it will be stored, to the journal."""
        self._journal.seal(record)

    def close(self, record: Record, caller: Caller, lease: Lease | None) -> None:
        """Seal `record` unless it is sealed, and settle what was held by its lease."""
        if not record.is_sealed:
            self._journal.seal(record)
        if lease is None:
            return
        if not lease.is_reserved:
            self._shared_limits.leave(caller, lease)
            return
        tokens, spent = _used(record)
        self._shared_limits.settle(caller, lease, tokens=tokens, spent=spent)

    def count(
        self,
        record: Record,
        caller: Caller,
        lease: Lease | None,
        endpoint: Endpoint,
        body: bytes,
        answer: bytes | None,
    ) -> None:
        """Have the tokens of a closed `record` counted off the loop, in place of an estimate."""
        if record.has_usage or not record.estimated or answer is None:
            return
        if self._counter is None:
            self._counter = TokenCounter(asyncio.get_running_loop().call_soon_threadsafe)
        name, prices = record.id, endpoint.prices
        settled_tokens, settled_cost = _used(record)

        def amend(prompt: int, completion: int) -> None:
            cost = prices.cost(prompt, completion) if prices is not None else None
            self._journal.amend([name, prompt, completion, cost])
            if lease is not None:
                more_tokens = prompt + completion - settled_tokens
                self._shared_limits.amend(
                    caller, lease, tokens=more_tokens, spent=(cost or 0) - settled_cost
                )

        self._counter.count(body, answer, amend)

    def shut(self) -> None:
        """Count no more tokens, after the last request and before the journal ends."""
        if self._counter is not None:
            self._counter.close()

    def counters(self, caller: Caller, now: float) -> list[int]:
        """Return what a caller has used of its limits, by the places in access/limits.py."""
        return self._shared_limits.counters(caller, now)

    def limit_lines(self, caller: Caller, now: float) -> bytes:
        """Return the x-ratelimit-* lines of a head for a caller with limits."""
        return self._shared_limits.lines(caller, now)


def _adapted_output(terms: Terms, adaptation: Adaptation) -> tuple[int | None, int]:
    """Return the tokens that one answer may take, None for no limit, and the number of answers.

    They are those of the body that goes upstream: `adaptation` may take a maximum out of what the
    client's `terms` say, or put one in.
    """
    sizes, maxima = dict(terms.sizes), set(MAXIMA)
    for old, new in adaptation.rename:
        size = sizes.pop(old, None)
        if size is not None and new not in terms.given:
            sizes[new] = size
            if old in maxima:
                maxima.add(new)
    for name in adaptation.drop:
        sizes.pop(name, None)
    for name, value in adaptation.set:
        if name in maxima or name in CHOICES:
            maximum: object = orjson.loads(value)
            if type(maximum) is int:
                # An endpoint that refuses this value gets the client's: the larger is held.
                sizes[name] = max(maximum, sizes.get(name, 0))
            else:
                sizes.pop(name, None)
    return output_limits(sizes.items(), maxima)


def cost_of(usage: Usage, prices: Prices) -> int:
    """Return the picodollars of `usage` at `prices`."""
    return prices.cost(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        usage.reasoning_tokens,
        usage.cache_write_tokens,
    )


def _used(record: Record) -> tuple[int, int]:
    """Return the tokens and picodollars that `record` used."""
    return record.prompt_tokens + record.completion_tokens, record.cost or 0
