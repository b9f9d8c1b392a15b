"""When a client that reads nothing is cut, and when a waiting client gets a comment line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hoberproxy.config.settings import ServerSettings
from hoberproxy.exchange.deadlines import ClientDeadlines

NOW = 100.0


def deadlines(*, is_stream: bool = True, **settings: Any) -> ClientDeadlines:
    """Return those of a request that was counted in at NOW."""
    settings = {"write_timeout": 20.0, "comment_after": 5.0} | settings
    made = ClientDeadlines(ServerSettings(**settings))
    made.begin(NOW, is_stream=is_stream)
    return made


def test_a_client_that_keeps_up_never_stalls() -> None:
    client = deadlines()
    assert client.stall_due == math.inf
    client.pause(NOW, 100)
    client.resume()
    assert client.stall_due == math.inf


def test_a_client_that_reads_nothing_has_stalled_after_the_write_timeout() -> None:
    client = deadlines()
    client.pause(NOW + 1.0, 100)
    assert client.stall_due == NOW + 21.0
    assert client.has_stalled(NOW + 21.0, 100)


def test_a_client_that_reads_slowly_gets_the_same_time_again_each_time() -> None:
    client = deadlines()
    client.pause(NOW, 100)
    assert not client.has_stalled(NOW + 20.0, 99)
    assert client.stall_due == NOW + 40.0
    assert not client.has_stalled(NOW + 40.0, 98)
    assert client.has_stalled(NOW + 60.0, 98)


def test_a_comment_is_due_after_the_last_comment_or_the_last_bytes_of_the_upstream() -> None:
    client = deadlines()
    assert client.comment_due(0.0) == NOW + 5.0
    assert client.comment_due(NOW + 3.0) == NOW + 8.0
    client.note_comment(NOW + 8.0)
    assert client.comment_due(NOW + 3.0) == NOW + 13.0


@pytest.mark.parametrize(
    "options", [{"is_stream": False}, {"comment_after": 0.0}], ids=["a body", "switched off"]
)
def test_some_answers_get_no_comments(options: dict[str, Any]) -> None:
    assert deadlines(**options).comment_due(NOW) == math.inf


def test_a_paused_client_gets_no_comments_until_it_has_caught_up() -> None:
    client = deadlines()
    client.pause(NOW, 100)
    assert client.comment_due(NOW) == math.inf
    client.resume()
    assert client.comment_due(NOW) == NOW + 5.0


def test_a_place_within_a_line_takes_no_comment() -> None:
    assert deadlines().comment_due(math.inf) == math.inf


@pytest.mark.parametrize(
    ("settings", "shortest"),
    [({}, 5.0), ({"comment_after": 0.0}, 20.0), ({"write_timeout": 2.0}, 2.0)],
)
def test_no_deadline_that_begins_later_passes_within_the_shortest(
    settings: dict[str, float], shortest: float
) -> None:
    client = deadlines(**settings)
    assert client.shortest == shortest
    client.pause(NOW, 100)
    assert client.stall_due >= NOW + shortest
