"""Coarse deadlines: any number of waits on one timer of the loop (a timing wheel).

A timer for each request or chunk costs more than relaying the chunk, and the limits of requests are
seconds to minutes, so a tick of 50 ms is precise enough. The wheel reads no clock; `Ticker` is the
one timer that turns it.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

from ._mypyc import mypyc_attr

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("hoberproxy.server")

TICK: Final = 0.05


@mypyc_attr(allow_interpreted_subclasses=True)
class Timed:
    """An item with a deadline. Only the wheel sets `wheel_slot`."""

    wheel_slot = 0

    def on_deadline(self, now: float) -> float | None:
        """Act on what is due; return the loop time of the next call, None for never."""
        raise NotImplementedError


class Wheel:
    """Deadlines in slots of one tick.

    `now` is the loop time of the last turn, for readers that need no more precision.
    """

    def __init__(self, now: float, tick: float = TICK) -> None:
        self.now = now
        self.tick = tick
        self._slots: dict[int, dict[Timed, None]] = {}
        self._turned = math.floor(now / tick)

    def schedule(self, item: Timed, when: float) -> None:
        """Call `item` at the first tick not before `when`, instead of at a time set before."""
        self.cancel(item)
        slot = max(math.ceil(when / self.tick), self._turned + 1)
        item.wheel_slot = slot
        self._slots.setdefault(slot, {})[item] = None

    def hasten(self, item: Timed, when: float) -> None:
        """Call `item` at the first tick not before `when`, or at an earlier time set before.

        An item that is called too early returns when it is due: so an item that waits again with
        each request is moved only now and then.
        """
        slot = item.wheel_slot
        if (slot == 0 or (slot - 1) * self.tick >= when) and when < math.inf:
            self.schedule(item, when)

    def cancel(self, item: Timed) -> None:
        """Forget `item`; harmless if it is not waiting."""
        waiting = self._slots.get(item.wheel_slot)
        if waiting is not None:
            waiting.pop(item, None)
        item.wheel_slot = 0

    def turn(self, now: float) -> None:
        """Call every item that is due at `now`, also those that a late turn has missed."""
        self.now = now
        last = math.floor(now / self.tick)
        if last - self._turned > len(self._slots):  # slept long: visit the slots that exist
            due = sorted(slot for slot in self._slots if slot <= last)
        else:
            due = list(range(self._turned + 1, last + 1))
        self._turned = max(self._turned, last)
        for slot in due:
            # The slot stays in place meanwhile, so that an item can cancel its neighbour.
            waiting = self._slots.get(slot)
            while waiting:
                self._call(waiting.popitem()[0], now)
            self._slots.pop(slot, None)

    def _call(self, item: Timed, now: float) -> None:
        item.wheel_slot = 0
        try:
            when = item.on_deadline(now)
        except Exception:  # one broken item must not end the deadlines of all others
            logger.exception("a deadline failed")
            return
        if when is not None:
            self.schedule(item, when)

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))


class Ticker:
    """Turns a wheel on the running loop until closed."""

    def __init__(self, wheel: Wheel, loop: asyncio.AbstractEventLoop) -> None:
        self._wheel = wheel
        self._loop = loop
        self._handle = loop.call_later(wheel.tick, self._turn)

    def _turn(self) -> None:
        self._handle = self._loop.call_later(self._wheel.tick, self._turn)
        self._wheel.turn(self._loop.time())

    def close(self) -> None:
        """Stop turning."""
        self._handle.cancel()
