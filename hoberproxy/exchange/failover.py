"""Decides which step of a plan is tried next, and which error the client gets at the end.

Values in, values out: the exchange makes the attempts and knows the time.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from ..config.settings import RoutingSettings
from ..errors import FailedAttempt, UpstreamError
from ..routing.health import Health
from ..routing.plan import Plan, Step
from ..upstream.error_response import choose_error

NOTHING_REFUSED: Final[frozenset[str]] = frozenset()


class Failover:
    """The plan of one request: the step that is tried, and what has failed.

    After a failed attempt call `note`, then `advance` for another step or `conclude` for the end.
    `refused` are members that the proxy puts in and the step's endpoint does not take; the exchange
    sets them when it begins a step.
    """

    # On the class, since to set them on each object would cost a microsecond.
    failures: tuple[FailedAttempt, ...] = ()
    refused: frozenset[str] = NOTHING_REFUSED
    _position = 0
    _errors: tuple[UpstreamError, ...] = ()  # of these failures
    _refused_slugs: frozenset[str] = frozenset()  # models for which the request is wrong

    def __init__(self, plan: Plan, settings: RoutingSettings) -> None:
        self._plan = plan
        self._settings = settings

    @property
    def step(self) -> Step:
        """The step that is tried."""
        return self._plan.steps[self._position]

    def note(self, error: UpstreamError, seconds: float) -> None:
        """Note that the attempt on this step failed after `seconds`."""
        slug, endpoint, _ = self.step
        error.metadata["provider"] = endpoint.provider
        if error.is_refusal:
            self._refused_slugs |= {slug}
        self._errors += (error,)
        self.failures += (
            FailedAttempt(
                provider=endpoint.provider,
                status=error.upstream_status,
                code=error.recorded_code,
                phase=error.phase.value,
                milliseconds=round(seconds * 1000),
            ),
        )

    def advance(self, elapsed: float) -> bool:
        """Go on to the next step that may do better; return False if there is none.

        `elapsed` is the time since the request's head came, in seconds.
        """
        error, settings = self._errors[-1], self._settings
        if not (error.is_retryable or error.is_refusal):
            return False
        if len(self._errors) >= settings.max_attempts or elapsed >= settings.attempts_timeout:
            return False
        following = self._plan.after(self._position, self._refused_slugs)
        if following is None:
            return False
        self._position = following
        return True

    def conclude(self, *, has_begun: bool, health: Health, now: float) -> UpstreamError:
        """Return the error that the client gets, with the other attempts in its metadata.

        If the answer `has_begun`, the client has a part of the very answer that broke last.
        """
        chosen = last = self._errors[-1]
        if not has_begun:
            chosen = choose_error(self._errors)
        others = self.failures[:-1] if chosen is last else self.failures
        if not has_begun and chosen.status in (502, 504) and self._is_all_cooling():
            # All had been failing before this request came: say when to come back.
            others = self.failures
            chosen.status, chosen.code = 503, "no_healthy_upstream"
            chosen.retry_after = self._next_trial(health, now)
        if others:
            chosen.metadata["previous_errors"] = [asdict(failure) for failure in others]
        return chosen

    def _is_all_cooling(self) -> bool:
        return all(step.reason == "cooldown" for step in self._plan.steps)

    def _next_trial(self, health: Health, now: float) -> float:
        """Return the seconds until an endpoint of the plan may be tried again; one at least."""
        steps = self._plan.steps
        ends = [health.cooldown_ends(step.endpoint.key) or now for step in steps]
        return max(min(ends) - now, 1.0)
