"""Notes how attempts went in the health of their endpoints.

The exchange calls these functions, with the time as `now`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..accounting.record import Record
from ..errors import Phase, UpstreamError
from ..routing.health import Health, Key

# Seconds of writing below which tokens per second are mostly the noise of a few packets.
SHORTEST_MEASURED: Final = 0.05


def observe_success(
    health: Health, endpoint: Key, record: Record, now: float, started: float, *, is_stream: bool
) -> None:
    """Note that an attempt, begun at `started`, has had its first content, and how soon."""
    waited = None
    # A body's first content comes with its last: better than nothing to sort by, no more.
    if is_stream or health.first_content(endpoint, now) is None:
        is_first = record.attempts == 1  # whose start is known more precisely than a tick
        waited = record.first_content if is_first else now - started
    health.observe_success(endpoint, now, waited)


def observe_throughput(health: Health, endpoint: Key, record: Record, now: float) -> None:
    """Note how fast a stream of known usage came, if it took long enough to measure."""
    if record.has_usage and record.first_content is not None and record.completion_tokens > 1:
        seconds = record.total - record.first_content
        if seconds >= SHORTEST_MEASURED:
            health.observe_throughput(endpoint, now, record.completion_tokens / seconds)


def observe_failure(
    health: Health,
    endpoint: Key,
    error: UpstreamError,
    now: float,
    *,
    is_client_slow: bool,
    draw: Callable[[], float],
) -> None:
    """Note `error` against its endpoint, unless the endpoint works as far as it shows.

    The request may have been wrong (`is_refusal`, `is_doubtful`), or the client too slow.
    """
    is_ours = error.code == "upstream_timeout" and is_client_slow
    if error.is_refusal or is_ours or error.is_doubtful:
        health.abandon(endpoint)
        return
    health.observe_failure(
        endpoint,
        now,
        retry_after=error.retry_after,
        is_rate_limit=error.upstream_status == 429,
        was_answering=error.phase is Phase.CONTENT,
        draw=draw,
    )
