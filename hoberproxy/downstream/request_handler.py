"""The interface between a client's connection and the handler of a chat request.

A connection gets a function that makes handlers (`BeginHandler`), so that it imports no handler.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Final, NamedTuple

from .._mypyc import mypyc_attr
from ..access.admission import Admission, ConnectionRoom
from ..access.keys import Caller
from ..config.settings import Config, ServerSettings
from ..errors import ProxyError
from ..protocol.http_head import RequestHead
from ..timer_wheel import Wheel
from .response import Answer, Client

UNBOUNDED: Final = 2**62  # bytes or connections, where no limit is set
_BYTE_DIGITS: Final = [f"{number:02x}" for number in range(256)]


class ConnectionContext:
    """The state that all connections of one process share."""

    is_draining = False  # every connection ends with its next answer
    bad_heads = 0  # requests refused for their head alone
    refused_connections = 0

    def __init__(
        self,
        settings: ServerSettings,
        loop: asyncio.AbstractEventLoop,
        wheel: Wheel,
        admission: Admission,
        room: ConnectionRoom | None = None,
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.wheel = wheel
        self.admission = admission
        self.room = room or ConnectionRoom(UNBOUNDED)
        self._id_prefix = secrets.token_hex(8)
        self._id_start = ""
        self._last_id = 0

    def new_request_id(self) -> str:
        """Return an id for a request: 64 random bits of this process and a count."""
        self._last_id = number = self._last_id + 1
        low = number & 0xFF
        if not low or not self._id_start:  # what goes before the last two digits
            self._id_start = f"req_{self._id_prefix}{number >> 8:06x}"
        return self._id_start + _BYTE_DIGITS[low]


class Admitted(NamedTuple):
    """The sender of a head, which holds for an equal head while keys and config are the same."""

    caller: Caller
    keyring_version: int
    config: Config


@mypyc_attr(allow_interpreted_subclasses=True)
class RequestHandler:
    """Handles one chat request, from when its head has come.

    The connection calls `admit` first, then `run` with the body, or `abandon`; in between `enter`,
    where the body has not come with the head. It calls `pause` and `resume` as the client's
    watermarks say, and `on_deadline`.
    """

    @property
    def key_label(self) -> str:
        """The label of the key that the request came with."""
        raise NotImplementedError

    @property
    def content_events(self) -> int:
        """The number of content events so far, which are an answer's tokens or nearly so."""
        raise NotImplementedError

    def admit(self, known: Admitted | None = None) -> Admitted | None:
        """Check the head; return None if `run` will answer with an error.

        `known` is what `admit` returned for an equal head on the same connection.
        """
        raise NotImplementedError

    def enter(self) -> bool:
        """Count the request in before its body comes; return False if `run` will refuse it."""
        raise NotImplementedError

    def hold_body(self, size: int) -> None:
        """Count `size` bytes of the body as held. Raises UnavailableError if all are too many."""
        raise NotImplementedError

    def run(self, body: bytes, *, close: bool = False) -> None:
        """Serve the request with its whole `body`; `close` the connection after an error."""
        raise NotImplementedError

    def fail(self, error: ProxyError, *, close: bool = False) -> None:
        """Answer with `error` in the form that is still possible; `close` ends the connection."""
        raise NotImplementedError

    def abandon(self) -> None:
        """End the request of a client that went away."""
        raise NotImplementedError

    def pause(self) -> None:
        """Stop reading from upstream: the client's buffer is full."""
        raise NotImplementedError

    def resume(self) -> None:
        """Read from upstream again: the client has caught up."""
        raise NotImplementedError

    def on_deadline(self, now: float) -> float | None:
        """Act on what is due; return the loop time of the next call, None for never."""
        raise NotImplementedError


BeginHandler = Callable[[Client, RequestHead, Answer], RequestHandler]
