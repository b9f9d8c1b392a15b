"""Limits shared by real processes: exactly the limit passes, and the dead hold nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hoberproxy.access import shared_limits as shared_limits_module
from hoberproxy.access.keys import Caller
from hoberproxy.access.limits import (
    BUSY_WAIT,
    DAY_REQUESTS,
    DAY_SPENT,
    TOTAL_SPENT,
    Demand,
    History,
    KeyLimits,
)
from hoberproxy.access.shared_limits import FileLock, SharedLimits
from hoberproxy.errors import AccessError, UnavailableError
from tests.support.patience import WAIT

NOW = 1_700_000_000.0
CALL = Demand(1, 1, is_bounded=True, prompt_cost=3, answer_cost=4)
PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "limits"


@pytest.fixture
def shared(path: Path) -> Iterator[SharedLimits]:
    shared = SharedLimits(path)
    yield shared
    shared.close()


def caller(key_id: str = "key_1", history: History | None = None, **limits: int) -> Caller:
    return Caller(
        key_id,
        "x",
        "live",
        None,
        None,
        limits=KeyLimits(**limits),  # type: ignore[arg-type]
        history=history or History(),
    )


def passes(shared: SharedLimits, caller: Caller, now: float = NOW) -> bool:
    try:
        shared.admit(caller, now, CALL)
    except AccessError:
        return False
    return True


# Within one process


def test_keys_are_counted_apart(shared: SharedLimits) -> None:
    one, other = (caller(name, requests_per_minute=1) for name in ("key_1", "key_2"))
    assert [passes(shared, each) for each in (one, one, other, other)] == [True, False] * 2


def test_a_call_that_ended_makes_room(shared: SharedLimits) -> None:
    one = caller(concurrency=1)
    lease = shared.admit(one, NOW, CALL)
    assert lease is not None and not passes(shared, one)
    shared.settle(one, lease, tokens=2, spent=3)
    assert passes(shared, one)
    assert shared.counters(one, NOW)[TOTAL_SPENT] == 3


def test_where_only_requests_are_limited_nothing_is_left_to_settle(
    shared: SharedLimits,
) -> None:
    one = caller(requests_per_minute=5)
    assert shared.admit(one, NOW, CALL) is None


def test_history_counts_once(shared: SharedLimits, path: Path) -> None:
    one = caller(history=History(day_requests=3), requests_per_day=5)
    assert passes(shared, one)
    other = SharedLimits(path)  # beside a living one nothing is forgotten
    assert other.counters(one, NOW)[DAY_REQUESTS] == 4
    other.close()


def test_a_key_that_is_given_a_budget_has_spent_what_the_records_say(
    shared: SharedLimits,
) -> None:
    today = int(NOW // 86_400)
    assert passes(shared, caller(requests_per_minute=5))  # what is spent is not counted here
    before = History(today, day_requests=1, day_spent=70, month_spent=80, total_spent=90)
    limited = caller(history=before, budget=100)
    lease = shared.admit(limited, NOW, CALL)
    assert lease is not None
    shared.settle(limited, lease, tokens=0, spent=10)
    assert not passes(shared, limited)
    assert shared.counters(limited, NOW)[DAY_SPENT] == 80
    older = History(today, day_requests=1, day_spent=1, month_spent=1, total_spent=1)
    assert shared.counters(caller(history=older, budget=100), NOW)[TOTAL_SPENT] == 100


def test_held_money_counts_for_all_processes_until_it_is_settled(path: Path) -> None:
    one, shared, other = caller(budget=13), SharedLimits(path), SharedLimits(path)
    lease = shared.admit(one, NOW, CALL)
    assert lease is not None
    with pytest.raises(AccessError, match="wait for running calls") as caught:
        other.admit(one, NOW, CALL)
    assert caught.value.retry_after == BUSY_WAIT
    shared.settle(one, lease, tokens=2, spent=6)
    assert passes(other, one)
    with pytest.raises(AccessError, match="wait for running calls"):
        shared.admit(one, NOW, CALL)
    shared.close()
    other.close()


def test_a_key_that_lost_its_budget_meanwhile_gets_back_held_money(
    shared: SharedLimits,
) -> None:
    one = caller(budget=100)
    lease = shared.admit(one, NOW, CALL)
    assert lease is not None
    shared.settle(caller(requests_per_minute=1), lease, tokens=0, spent=1)
    assert shared.counters(one, NOW)[TOTAL_SPENT] == 1
    assert shared._sum_held(shared._slots["key_1"]) == 0


def test_the_first_process_after_all_have_ended_counts_by_the_records(path: Path) -> None:
    one = caller(requests_per_day=9, requests_per_minute=2)
    first = SharedLimits(path)
    assert passes(first, one) and passes(first, one)
    first.close()
    second = SharedLimits(path)
    again = caller(history=History(day_requests=8), requests_per_day=9, requests_per_minute=2)
    assert second.counters(again, NOW)[DAY_REQUESTS] == 8
    assert not passes(second, again)  # the minute is not forgotten
    assert passes(second, again, NOW + 60)
    second.close()


def test_more_limited_keys_than_there_is_room_for_are_refused(
    shared: SharedLimits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_limits_module, "SLOTS", 3)
    for number in range(3):
        assert passes(shared, caller(f"key_{number}", requests_per_minute=1))
    with pytest.raises(UnavailableError):
        passes(shared, caller("key_3", requests_per_minute=1))
    assert "more" in caplog.text


def test_a_lock_whose_holder_does_not_run_is_not_waited_for_forever(
    shared: SharedLimits,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shared_limits_module, "LOCK_PATIENCE", 0.01)
    one = caller(requests_per_minute=2)
    assert passes(shared, one)
    stopped = SharedLimits(path)
    stopped.counters(one, NOW)
    assert stopped._slots["key_1"].lock.try_lock()
    assert passes(shared, one)
    assert not passes(shared, one)
    assert caplog.text.count("holds a lock") == 1
    stopped._slots["key_1"].lock.unlock()
    stopped.close()


# Locks


LOCKED = 7  # the exit code of a process that had the lock


@contextmanager
def opened(path: Path, place: int = 64) -> Iterator[FileLock]:
    """A lock on a byte, as one more process opens the file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield FileLock(fd, place)
    finally:
        os.close(fd)


@pytest.fixture(params=["ctypes", "no ctypes"])
def fcntl_function(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no ctypes":
        monkeypatch.setattr(shared_limits_module, "_fcntl", shared_limits_module._python_fcntl)


@pytest.mark.usefixtures("fcntl_function")
def test_one_open_file_at_a_time_has_a_lock(path: Path) -> None:
    with opened(path) as one, opened(path) as other, opened(path, 65) as beside:
        assert one.try_lock()
        assert not other.try_lock()
        assert other.is_held_elsewhere() and not one.is_held_elsewhere()
        assert beside.try_lock()
        other.unlock()  # without effect
        assert not other.try_lock()
        one.unlock()
        assert other.try_lock()


@pytest.mark.usefixtures("fcntl_function")
def test_a_lock_goes_with_a_holder_that_dies(path: Path) -> None:
    with opened(path) as lock:
        process = PROCESSES.Process(target=lock_and_die, args=(path,))
        process.start()
        process.join(WAIT)
        assert process.exitcode == LOCKED
        assert lock.try_lock()


def lock_and_die(path: Path) -> None:
    with opened(path) as lock:
        if lock.try_lock():
            os._exit(LOCKED)


def test_the_wait_for_a_lock_is_bounded(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        assert one.try_lock()
        began = time.monotonic()
        assert not other.wait(0.05)
        assert time.monotonic() - began >= 0.05


def test_a_waiting_process_gets_a_lock_that_is_freed(path: Path) -> None:
    with opened(path) as lock:
        assert lock.try_lock()
        begin = PROCESSES.Event()
        process = PROCESSES.Process(target=wait_and_die, args=(path, begin))
        process.start()
        assert begin.wait(WAIT)
        assert process.exitcode is None
        lock.unlock()
        process.join(WAIT)
        assert process.exitcode == LOCKED


def wait_and_die(path: Path, begin: object) -> None:
    with opened(path) as lock:
        if not lock.try_lock():
            begin.set()  # type: ignore[attr-defined]
            if lock.wait(WAIT):
                os._exit(LOCKED)


def test_a_file_of_another_layout_is_emptied_once_no_process_uses_it(path: Path) -> None:
    one = caller(requests_per_minute=1)
    old = SharedLimits(path)
    assert passes(old, one)
    old._view[shared_limits_module._MAGIC] += 1
    with pytest.raises(OSError, match="another version"):
        SharedLimits(path)
    old.close()
    new = SharedLimits(path)
    assert passes(new, one)
    new.close()


# Among processes


def count_passes(
    path: Path, limits: dict[str, int], tries: int, begin: object, out: object
) -> None:
    shared = SharedLimits(path)
    begin.wait(WAIT)  # type: ignore[attr-defined]
    one = caller(**limits)
    out.put(sum(passes(shared, one) for _ in range(tries)))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"requests_per_minute": 1000}, id="requests a minute"),
        pytest.param({"requests_per_day": 1000}, id="requests a day"),
        pytest.param({"concurrency": 1000}, id="calls at once"),
        pytest.param({"tokens_per_minute": 2000}, id="tokens a minute"),
        pytest.param({"budget": 7000}, id="a budget for so many"),
    ],
)
def test_of_four_processes_exactly_the_limit_passes(path: Path, limits: dict[str, int]) -> None:
    stays = SharedLimits(path)  # else the first to end would leave its calls to the others
    begin, out = PROCESSES.Barrier(4), PROCESSES.Queue()
    workers = [
        PROCESSES.Process(target=hold, args=(path, limits, 900, begin, out)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    counts = [out.get(timeout=WAIT) for _ in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    stays.close()
    assert sum(counts) == 1000


def hold(path: Path, limits: dict[str, int], tries: int, begin: object, out: object) -> None:
    """Count, and live on: what a dead worker held would be free."""
    count_passes(path, limits, tries, begin, out)
    time.sleep(WAIT)


def test_a_lock_goes_with_its_holder(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared, one = SharedLimits(path), caller(requests_per_minute=2)
    assert passes(shared, one)
    begin = PROCESSES.Event()
    worker = PROCESSES.Process(target=keep_the_lock, args=(path, begin))
    worker.start()
    assert begin.wait(WAIT)
    assert not shared._slots["key_1"].lock.try_lock()
    worker.kill()
    worker.join()
    assert passes(shared, one)
    assert not passes(shared, one)
    assert "holds a lock" not in caplog.text
    shared.close()


def keep_the_lock(path: Path, begin: object) -> None:
    shared = SharedLimits(path)
    shared.counters(caller(requests_per_minute=2), NOW)
    if shared._slots["key_1"].lock.try_lock():
        begin.set()  # type: ignore[attr-defined]
        time.sleep(WAIT)


def test_the_calls_of_a_killed_process_count_no_more(path: Path) -> None:
    shared = SharedLimits(path)
    begin, out = PROCESSES.Barrier(2), PROCESSES.Queue()
    worker = PROCESSES.Process(target=hold, args=(path, {"concurrency": 3}, 3, begin, out))
    worker.start()
    begin.wait(WAIT)
    assert out.get(timeout=WAIT) == 3
    assert not passes(shared, caller(concurrency=3))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert passes(shared, caller(concurrency=3))
    shared.close()


def test_the_money_held_by_a_killed_process_is_spent(path: Path) -> None:
    limits = {"budget": 24}
    shared = SharedLimits(path)
    begin, out = PROCESSES.Barrier(2), PROCESSES.Queue()
    worker = PROCESSES.Process(target=hold, args=(path, limits, 3, begin, out))
    worker.start()
    begin.wait(WAIT)
    assert out.get(timeout=WAIT) == 3
    with pytest.raises(AccessError, match="wait for running calls"):
        shared.admit(caller(**limits), NOW, CALL)
    worker.kill()
    worker.join()
    with pytest.raises(AccessError, match="lower its max_tokens"):
        shared.admit(caller(**limits), NOW, CALL)
    another = SharedLimits(path)  # under the number of the dead one
    with pytest.raises(AccessError, match="lower its max_tokens"):
        another.admit(caller(**limits), NOW, CALL)
    another.close()
    shared.close()
    again = SharedLimits(path)  # all have gone: the records have the calls that were lost
    one = caller(history=History(total_spent=10), **limits)
    assert [passes(again, one) for _ in range(3)] == [True, True, False]
    again.close()


def test_money_adds_up_over_processes(path: Path) -> None:
    shared = SharedLimits(path)
    workers = [PROCESSES.Process(target=spend, args=(path, 200)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT)
    assert shared.counters(caller(budget=10**9), NOW)[TOTAL_SPENT] == 4 * 200 * 5
    shared.close()


def spend(path: Path, times: int) -> None:
    shared = SharedLimits(path)
    one = caller(budget=10**9)
    for _ in range(times):
        lease = shared.admit(one, NOW, CALL)
        assert lease is not None
        shared.settle(one, lease, tokens=0, spent=5)
