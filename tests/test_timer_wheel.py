"""The timing wheel on times that the tests make up."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.timer_wheel import TICK, Ticker, Timed, Wheel
from tests.support.patience import WAIT

START = 1000.0


class Item(Timed):
    """Records the times at which the wheel called it, and returns what the test wants."""

    def __init__(
        self,
        name: str = "",
        log: list[str] | None = None,
        answer: Callable[[], float | None] | None = None,
    ) -> None:
        self.called_at: list[float] = []
        self._name = name
        self._log = log
        self._answer = answer

    def on_deadline(self, now: float) -> float | None:
        self.called_at.append(now)
        if self._log is not None:
            self._log.append(self._name)
        return self._answer() if self._answer is not None else None


def test_an_item_is_called_once_and_forgotten() -> None:
    wheel, item = Wheel(START), Item()
    wheel.schedule(item, START + 1)
    assert len(wheel) == 1
    for step in range(1, 60):
        wheel.turn(START + step * TICK)
    assert len(item.called_at) == 1
    assert START + 1 <= item.called_at[0] <= START + 1 + 2 * TICK
    assert len(wheel) == 0


def test_items_are_called_in_the_order_of_their_deadlines() -> None:
    wheel = Wheel(START)
    log: list[str] = []
    items = [Item(str(number), log) for number in range(20)]
    for item, number in random.Random(7).sample([(i, n) for n, i in enumerate(items)], 20):
        wheel.schedule(item, START + 0.1 * (number + 1))
    wheel.turn(START + 60)
    assert log == [str(number) for number in range(20)]


@pytest.mark.parametrize("late", [1, 50, 100_000], ids="{} s late".format)
def test_a_late_turn_asks_all_that_was_missed(late: float) -> None:
    wheel = Wheel(START)
    items = [Item() for _ in range(50)]
    for number, item in enumerate(items):
        wheel.schedule(item, START + number * 0.013)
    beyond = Item()
    wheel.schedule(beyond, START + late + 10)
    wheel.turn(START + late)
    assert [len(item.called_at) for item in items] == [1] * 50
    assert (beyond.called_at, len(wheel)) == ([], 1)


def test_nothing_is_called_before_its_time() -> None:
    wheel, item = Wheel(START), Item()
    wheel.schedule(item, START + 1 + 0.9 * TICK)
    wheel.turn(START + 1 + 0.5 * TICK)
    assert item.called_at == []


@pytest.mark.parametrize("slept", [0.1, 100.0], ids="{} s".format)
def test_after_a_sleep_what_has_just_become_due_is_called_too(slept: float) -> None:
    wheel, item = Wheel(START), Item()
    wheel.schedule(item, START + slept)
    wheel.turn(START + slept + TICK / 2)
    assert len(item.called_at) == 1


@pytest.mark.parametrize("when", [START - 500, START, START + 1e-9], ids=["past", "now", "soon"])
def test_what_is_due_is_called_at_the_next_tick_and_not_at_once(when: float) -> None:
    wheel, item = Wheel(START), Item()
    wheel.schedule(item, when)
    wheel.turn(START)
    assert item.called_at == []
    wheel.turn(START + 1.5 * TICK)
    assert len(item.called_at) == 1


def test_a_later_time_replaces_the_earlier_one() -> None:
    wheel, item = Wheel(START), Item()
    wheel.schedule(item, START + 1)
    wheel.schedule(item, START + 5)
    wheel.turn(START + 4)
    assert item.called_at == []
    wheel.schedule(item, START + 4.5)
    wheel.turn(START + 60)
    assert len(item.called_at) == 1


def test_a_cancelled_item_is_not_called() -> None:
    wheel, item = Wheel(START), Item()
    wheel.schedule(item, START + 1)
    wheel.cancel(item)
    wheel.cancel(item)
    wheel.turn(START + 60)
    assert (item.called_at, len(wheel)) == ([], 0)


def test_an_item_says_when_it_wants_to_be_called_again() -> None:
    wheel = Wheel(START)
    times = iter([START + 2, START + 3, None])
    item = Item(answer=lambda: next(times))
    wheel.schedule(item, START + 1)
    for step in range(1, 100):
        wheel.turn(START + step * TICK)
    assert [round(when - START, 1) for when in item.called_at] == [1.0, 2.0, 3.0]
    assert len(wheel) == 0


def test_an_item_that_is_always_due_is_called_once_a_turn() -> None:
    wheel = Wheel(START)
    item = Item(answer=lambda: START)
    wheel.schedule(item, START)
    for step in range(1, 6):
        wheel.turn(START + (step + 0.5) * TICK)
    assert len(item.called_at) == 5


def test_of_two_neighbours_that_cancel_each_other_one_is_called() -> None:
    wheel = Wheel(START)
    one, other = Item(), Item()
    one._answer = lambda: wheel.cancel(other)
    other._answer = lambda: wheel.cancel(one)
    wheel.schedule(one, START + 1)
    wheel.schedule(other, START + 1)
    wheel.turn(START + 2)
    assert len(one.called_at) + len(other.called_at) == 1
    assert len(wheel) == 0


def test_an_item_may_put_off_its_neighbour_and_start_others_during_a_turn() -> None:
    wheel = Wheel(START)
    new, neighbours = Item(), [Item(), Item()]

    def put_off() -> None:
        for neighbour in neighbours:
            if not neighbour.called_at:
                wheel.schedule(neighbour, START + 5)
        wheel.schedule(new, START + 1)

    for neighbour in neighbours:
        neighbour._answer = put_off
        wheel.schedule(neighbour, START + 1)
    wheel.turn(START + 2)
    assert sorted(len(neighbour.called_at) for neighbour in neighbours) == [0, 1]
    assert new.called_at == []
    wheel.turn(START + 6)
    assert sorted(len(neighbour.called_at) for neighbour in neighbours) == [1, 1]
    assert new.called_at


def test_an_item_that_raises_takes_nobody_with_it(caplog: pytest.LogCaptureFixture) -> None:
    wheel = Wheel(START)

    def fail() -> None:
        raise RuntimeError("broken")

    items = [Item(answer=fail if number % 2 else None) for number in range(10)]
    for item in items:
        wheel.schedule(item, START + 1)
    with caplog.at_level(logging.ERROR, "hoberproxy.server"):
        wheel.turn(START + 2)
    assert [len(item.called_at) for item in items] == [1] * 10
    assert [record.message for record in caplog.records] == ["a deadline failed"] * 5
    assert len(wheel) == 0


def test_a_clock_that_goes_back_asks_nobody_twice() -> None:
    wheel, item = Wheel(START), Item()
    wheel.schedule(item, START + 1)
    wheel.turn(START + 2)
    wheel.turn(START)
    wheel.schedule(item, START + 1)
    wheel.turn(START + 2)
    assert len(item.called_at) == 1
    wheel.turn(START + 2 + 2 * TICK)
    assert len(item.called_at) == 2


def test_the_past_is_not_kept() -> None:
    wheel = Wheel(START)
    for step in range(1, 1000):
        for ahead in (1, 5):
            item = Item()
            wheel.schedule(item, START + step * TICK + ahead)
            wheel.cancel(item)
        wheel.turn(START + step * TICK)
    assert len(wheel._slots) <= 5 / TICK + 2


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("schedule"), st.integers(0, 5), st.floats(-1, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 5), st.just(0.0)),
        st.tuples(st.just("turn"), st.just(0), st.floats(0, 5) | st.just(TICK) | st.just(900.0)),
    ),
    max_size=60,
)


@given(STEPS, st.floats(0, 1e6))
def test_the_wheel_does_what_a_plain_list_of_deadlines_would(
    steps: list[tuple[str, int, float]], start: float
) -> None:
    wheel, now = Wheel(start), start
    items = [Item() for _ in range(6)]
    waiting: dict[int, float] = {}  # item → its deadline
    for action, number, value in steps:
        if action == "schedule":
            wheel.schedule(items[number], now + value)
            waiting[number] = max(now + value, now)
        elif action == "cancel":
            wheel.cancel(items[number])
            waiting.pop(number, None)
        else:
            before = [len(item.called_at) for item in items]
            now += value
            wheel.turn(now)
            called = {n for n, item in enumerate(items) if len(item.called_at) > before[n]}
            assert all(len(item.called_at) <= before[n] + 1 for n, item in enumerate(items))
            must = {n for n, when in waiting.items() if when + 2 * TICK < now}
            may = {n for n, when in waiting.items() if when <= now + 1e-6}
            assert must <= called <= may
            for n in called:
                del waiting[n]
        assert len(wheel) == len(waiting)


async def test_a_ticker_turns_the_wheel_until_it_is_closed() -> None:
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop.time(), tick=0.002)
    ticker = Ticker(wheel, loop)
    called = asyncio.Event()
    item = Item(answer=called.set)
    wheel.schedule(item, loop.time())
    await asyncio.wait_for(called.wait(), WAIT)
    ticker.close()
    turned = wheel.now
    wheel.schedule(item, loop.time())
    await asyncio.sleep(0.02)
    assert (wheel.now, len(item.called_at)) == (turned, 1)
