"""The outcome of an answer: its usage, identifiers, finish reason and size."""

from __future__ import annotations

from .usage import Usage


class Outcome:
    """The facts of one answer, for its record, as far as the answer came.

    A stream has `content_events`, a body `content_bytes`.
    """

    __slots__ = (
        "content_bytes",
        "content_events",
        "finish_reason",
        "upstream_id",
        "upstream_model",
        "usage",
    )

    def __init__(
        self,
        usage: Usage | None = None,
        finish_reason: str = "",
        upstream_model: str = "",
        upstream_id: str = "",
        content_events: int = 0,
        content_bytes: int = 0,
    ) -> None:
        self.usage = usage
        self.finish_reason = finish_reason
        self.upstream_model = upstream_model
        self.upstream_id = upstream_id
        self.content_events = content_events
        self.content_bytes = content_bytes
