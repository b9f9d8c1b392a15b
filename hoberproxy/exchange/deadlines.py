"""Decides when a client that reads nothing is cut, and when one that waits gets a comment line.

Takes values and `now`; the exchange does the writing and cutting. Times are those of the loop.
"""

from __future__ import annotations

import math

from ..config.settings import ServerSettings


class ClientDeadlines:
    """The deadlines of one request's client.

    Call `begin` when the request is counted in, `pause` and `resume` as the client's watermarks
    say, and `note_comment` for each comment line.
    """

    # On the class, since to set them on each object would cost a microsecond.
    _is_stream = False
    _paused_since = math.inf  # never, while the client keeps up
    _unread_bytes = 0  # when the client was paused, or when it was last seen to read
    _quiet_since = 0.0  # no comment line since

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings

    def begin(self, now: float, *, is_stream: bool) -> None:
        """Wait for an answer from `now` on; only a stream can take comment lines."""
        self._quiet_since, self._is_stream = now, is_stream

    def pause(self, now: float, unread_bytes: int) -> None:
        """Begin the time in which the client must read some of its `unread_bytes`."""
        self._paused_since, self._unread_bytes = now, unread_bytes

    def resume(self) -> None:
        """End that time: the client has caught up."""
        self._paused_since = math.inf

    def note_comment(self, now: float) -> None:
        """Note that a comment line was written."""
        self._quiet_since = now

    @property
    def shortest(self) -> float:
        """Seconds in which no deadline can pass that begins later."""
        return min(self._settings.write_timeout, self._settings.comment_after or math.inf)

    @property
    def stall_due(self) -> float:
        """The time at which to ask `has_stalled`."""
        return self._paused_since + self._settings.write_timeout

    def has_stalled(self, now: float, unread_bytes: int) -> bool:
        """Return whether the client has read nothing; one that reads gets the same time again."""
        if unread_bytes >= self._unread_bytes:
            return True
        self.pause(now, unread_bytes)
        return False

    def comment_due(self, silent_since: float) -> float:
        """Return when to write a comment line into a stream that is `silent_since` then."""
        after = self._settings.comment_after
        if not after or not self._is_stream or self._paused_since < math.inf:
            return math.inf
        return max(self._quiet_since, silent_since) + after
