"""The health of endpoints: whether they fail, how soon they answer, how fast they write.

A cooldown only moves an endpoint to the end of a plan, it never refuses: routing/order.py sorts by
health, the exchange reports how attempts went. No clock and no random numbers: the caller passes
`now` (seconds of any monotonic clock) and `draw` (which returns numbers in [0, 1)).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

Key = tuple[str, str]  # provider, upstream_model

FAILURES_IN_A_ROW: Final = 3
ENOUGH_REQUESTS: Final = 8.0  # below, a failure rate says little
FAILURE_RATE: Final = 0.5
RATE_HALF_LIFE: Final = 60.0  # seconds in which a request loses half its weight in the failure rate

FIRST_COOLDOWN = 5.0  # seconds, doubled by each failed trial
LONGEST_COOLDOWN: Final = 300.0
LONGEST_RETRY_AFTER: Final = 600.0  # what an upstream may ask for; some say "tomorrow"
JITTER: Final = 0.2  # workers that saw the same outage shall not all come back at once
TRIAL: Final = 60.0  # seconds a trial without a verdict holds the others off

ESTIMATE_DECAY: Final = 0.5 ** (1 / 10)  # ten observations later one counts half
ESTIMATE_LIFE: Final = 300.0  # seconds; an older estimate says nothing of now

_MOST_DOUBLINGS: Final = 6  # 5 s << 6 is past the longest; bounds the exponent


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """The health of one endpoint in a snapshot; None is "not known (any more)"."""

    provider: str
    upstream_model: str
    is_cooling: bool
    cooldown: float  # seconds left, 0 when over
    failures_in_a_row: int
    failure_rate: float  # 0 to 1, recent requests weigh more
    first_content: float | None  # seconds
    throughput: float | None  # tokens per second


class _Estimate:
    """A mean in which recent observations weigh more; none after a while without observations."""

    __slots__ = ("_mean", "_seen", "_weight")

    def __init__(self) -> None:
        self._mean = 0.0
        self._weight = 0.0
        self._seen = 0.0

    def observe(self, value: float, now: float) -> None:
        if now - self._seen > ESTIMATE_LIFE:
            self._weight = 0.0  # begin again: old observations would slow the mean down
        self._weight = self._weight * ESTIMATE_DECAY + 1.0
        self._mean += (value - self._mean) / self._weight
        self._seen = now

    def value(self, now: float) -> float | None:
        if not self._weight or now - self._seen > ESTIMATE_LIFE:
            return None
        return self._mean


class _State:
    """The state of one endpoint.

    `cooling_until` is None while all is well. Once set, the endpoint cools until that time, and
    from then on waits for the verdict on a trial: a success clears it, a failure moves it on.
    `trial_until` marks one running attempt whose verdict is awaited; 0 when there is none.
    """

    __slots__ = (
        "cooling_until",
        "doublings",
        "failures",
        "failures_before",
        "failures_in_a_row",
        "first_content",
        "observed",
        "requests",
        "throughput",
        "trial_until",
    )

    def __init__(self) -> None:
        self.cooling_until: float | None = None
        self.trial_until = 0.0
        self.doublings = 0
        self.failures_in_a_row = 0
        self.failures_before = 0  # in a row, before the last success
        self.requests = 0.0  # decays as `failures` does, so that their quotient is recent
        self.failures = 0.0
        self.observed = 0.0
        self.first_content = _Estimate()
        self.throughput = _Estimate()

    def count(self, now: float, *, is_failure: bool, is_counted: bool = False) -> None:
        """Count a request; `is_counted` if it was counted as a success before it failed."""
        if now > self.observed:
            decay = 0.5 ** ((now - self.observed) / RATE_HALF_LIFE)
            self.requests *= decay
            self.failures *= decay
        if not is_counted:
            self.requests += 1.0
        if is_failure:
            self.failures = min(self.failures + 1.0, self.requests)
        if is_counted:
            self.failures_in_a_row = max(self.failures_in_a_row, self.failures_before)
        elif not is_failure:
            self.failures_before = self.failures_in_a_row
        self.failures_in_a_row = self.failures_in_a_row + 1 if is_failure else 0
        self.observed = now

    @property
    def failure_rate(self) -> float:
        return self.failures / self.requests if self.requests else 0.0

    @property
    def is_failing(self) -> bool:
        return self.failures_in_a_row >= FAILURES_IN_A_ROW or (
            self.requests >= ENOUGH_REQUESTS and self.failure_rate > FAILURE_RATE
        )

    def must_cool(self, now: float, *, at_once: bool) -> bool:
        if self.cooling_until is None:
            return at_once or self.is_failing
        # Before that time failures are of the same outage; there can be hundreds of them.
        return now >= self.cooling_until

    def is_cooling(self, now: float) -> bool:
        return self.cooling_until is not None and (
            now < self.cooling_until or now < self.trial_until
        )

    # The moves of the cooldown

    def cool(self, now: float, draw: Callable[[], float]) -> None:
        delay = min(FIRST_COOLDOWN * 2**self.doublings, LONGEST_COOLDOWN)
        self.doublings = min(self.doublings + 1, _MOST_DOUBLINGS)
        self.extend(now + delay * (1 - JITTER + 2 * JITTER * draw()))

    def extend(self, until: float) -> None:
        if self.cooling_until is None or self.cooling_until < until:
            self.cooling_until = until

    def recover(self) -> None:
        self.cooling_until = None
        self.doublings = 0
        self.requests = self.failures = 0.0  # what made it cool is over


class Health:
    """The state of all endpoints, each under (provider, upstream_model).

    Call `begin` when an attempt starts, then one of `observe_success`, `observe_failure` or
    `abandon`. Endpoints that were not tried lately are forgotten: under a wildcard clients choose
    the names, and could fill memory.
    """

    SIZE: ClassVar[int] = 4096

    def __init__(self) -> None:
        self._states: OrderedDict[Key, _State] = OrderedDict()
        self._troubled: set[Key] = set()  # those with a cooldown, or waiting for a trial's verdict

    # How attempts went

    def begin(self, key: Key, now: float) -> None:
        """Note that an attempt starts; it is the trial if none is running."""
        state = self._touch(key)
        if state.trial_until <= now:
            state.trial_until = now + TRIAL

    def observe_success(
        self,
        key: Key,
        now: float,
        first_content: float | None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Note that an attempt succeeded, with seconds to its first content and its speed.

        These are None if not measured. Call it at the first content, since a trial waits for it,
        and for a stream `observe_throughput` at its end.
        """
        state = self._states.get(key) or self._touch(key)  # its attempt began a moment ago
        state.trial_until = 0.0
        state.count(now, is_failure=False)
        if first_content is not None:
            state.first_content.observe(first_content, now)
        if tokens_per_second is not None:
            state.throughput.observe(tokens_per_second, now)
        # An attempt that began before the cooldown proves nothing, least of all that a rate limit
        # is over.
        if state.cooling_until is not None and now >= state.cooling_until:
            state.recover()
            self._troubled.discard(key)

    def observe_throughput(self, key: Key, now: float, tokens_per_second: float) -> None:
        """Note the speed of an answer whose success was noted before."""
        self._touch(key).throughput.observe(tokens_per_second, now)

    def observe_failure(
        self,
        key: Key,
        now: float,
        *,
        retry_after: float | None = None,
        is_rate_limit: bool = False,
        was_answering: bool = False,
        draw: Callable[[], float],
    ) -> None:
        """Note that an attempt failed by the endpoint's fault, not by the client's (400, 422).

        `retry_after`: seconds the upstream asked to be left alone, which begin at once.
        `is_rate_limit`: a 429, which needs no second one to be believed. `was_answering`: the
        attempt's success was noted at its first content, and what followed has broken.
        """
        state = self._touch(key)
        state.trial_until = 0.0
        state.count(now, is_failure=True, is_counted=was_answering)
        is_asked = retry_after is not None and retry_after > 0  # "0" is sent by servers that guess
        if state.must_cool(now, at_once=is_rate_limit and not is_asked):
            state.cool(now, draw)
        if retry_after is not None and is_asked:
            state.extend(now + min(retry_after, LONGEST_RETRY_AFTER))
        if state.cooling_until is not None:
            self._troubled.add(key)

    def abandon(self, key: Key) -> None:
        """Note that an attempt ended without a verdict: the client left, or its request was wrong.

        Attempts have no identity here: one from before a cooldown lets a second trial pass.
        """
        state = self._states.get(key)
        if state is not None:
            state.trial_until = 0.0

    # For routing

    @property
    def is_calm(self) -> bool:
        """Return whether no endpoint at all cools or waits for a trial."""
        return not self._troubled

    def is_cooling(self, key: Key, now: float) -> bool:
        """Return whether to try others first: the endpoint has failed, and no trial is due yet."""
        state = self._states.get(key)
        # The first two tests settle nearly every request.
        return state is not None and state.cooling_until is not None and state.is_cooling(now)

    def cooldown_ends(self, key: Key) -> float | None:
        """Return the time from which a trial may pass, even a past one; None without cooldown."""
        state = self._states.get(key)
        return None if state is None else state.cooling_until

    def is_tried(self, key: Key, now: float) -> bool:
        """Return whether an attempt is running whose verdict is awaited."""
        state = self._states.get(key)
        return state is not None and now < state.trial_until

    def first_content(self, key: Key, now: float) -> float | None:
        """Return recent seconds from a request to its first content; None if not known."""
        state = self._states.get(key)
        return None if state is None else state.first_content.value(now)

    def throughput(self, key: Key, now: float) -> float | None:
        """Return recent tokens per second; None if not known."""
        state = self._states.get(key)
        return None if state is None else state.throughput.value(now)

    def snapshot(self, now: float) -> tuple[EndpointHealth, ...]:
        """Return the health of all endpoints; the first is the next to be forgotten."""
        return tuple(_describe(key, state, now) for key, state in self._states.items())

    def _touch(self, key: Key) -> _State:
        state = self._states.get(key)
        if state is not None:
            if 2 * len(self._states) > self.SIZE:  # else none is forgotten soon
                self._states.move_to_end(key)
            return state
        if len(self._states) >= self.SIZE:
            self._troubled.discard(self._states.popitem(last=False)[0])
        state = self._states[key] = _State()
        return state


def _describe(key: Key, state: _State, now: float) -> EndpointHealth:
    provider, upstream_model = key
    return EndpointHealth(
        provider=provider,
        upstream_model=upstream_model,
        is_cooling=state.is_cooling(now),
        cooldown=max((state.cooling_until or now) - now, 0.0),
        failures_in_a_row=state.failures_in_a_row,
        failure_rate=state.failure_rate,
        first_content=state.first_content.value(now),
        throughput=state.throughput.value(now),
    )
