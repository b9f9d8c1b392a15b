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

from hoberproxy import tallies as tallies_module
from hoberproxy.access import Caller
from hoberproxy.errors import AccessError, UnavailableError
from hoberproxy.limits import (
    BUSY_WAIT,
    DAY_REQUESTS,
    DAY_SPENT,
    TOTAL_SPENT,
    Demand,
    History,
    KeyLimits,
)
from hoberproxy.tallies import FileLock, Tallies

from .patience import WAIT

NOW = 1_700_000_000.0
CALL = Demand(1, 1, is_bounded=True, prompt_cost=3, answer_cost=4)
PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "limits"


@pytest.fixture
def tallies(path: Path) -> Iterator[Tallies]:
    tallies = Tallies(path)
    yield tallies
    tallies.close()


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


def passes(tallies: Tallies, caller: Caller, now: float = NOW) -> bool:
    try:
        tallies.admit(caller, now, CALL)
    except AccessError:
        return False
    return True


# Within one process


def test_keys_are_counted_apart(tallies: Tallies) -> None:
    one, other = (caller(name, requests_per_minute=1) for name in ("key_1", "key_2"))
    assert [passes(tallies, each) for each in (one, one, other, other)] == [True, False] * 2


def test_a_call_that_ended_makes_room(tallies: Tallies) -> None:
    one = caller(concurrency=1)
    lease = tallies.admit(one, NOW, CALL)
    assert lease is not None and not passes(tallies, one)
    tallies.settle(one, lease, tokens=2, spent=3)
    assert passes(tallies, one)
    assert tallies.counters(one, NOW)[TOTAL_SPENT] == 3


def test_where_only_requests_are_limited_nothing_is_left_to_settle(tallies: Tallies) -> None:
    one = caller(requests_per_minute=5)
    assert tallies.admit(one, NOW, CALL) is None


def test_history_counts_once(tallies: Tallies, path: Path) -> None:
    one = caller(history=History(day_requests=3), requests_per_day=5)
    assert passes(tallies, one)
    other = Tallies(path)  # beside a living one nothing is forgotten
    assert other.counters(one, NOW)[DAY_REQUESTS] == 4
    other.close()


def test_a_key_that_is_given_a_budget_has_spent_what_the_records_say(tallies: Tallies) -> None:
    today = int(NOW // 86_400)
    assert passes(tallies, caller(requests_per_minute=5))  # what is spent is not counted here
    before = History(today, day_requests=1, day_spent=70, month_spent=80, total_spent=90)
    limited = caller(history=before, budget=100)
    lease = tallies.admit(limited, NOW, CALL)
    assert lease is not None
    tallies.settle(limited, lease, tokens=0, spent=10)
    assert not passes(tallies, limited)
    assert tallies.counters(limited, NOW)[DAY_SPENT] == 80
    older = History(today, day_requests=1, day_spent=1, month_spent=1, total_spent=1)
    assert tallies.counters(caller(history=older, budget=100), NOW)[TOTAL_SPENT] == 100


def test_what_is_held_counts_for_all_processes_until_it_is_settled(path: Path) -> None:
    one, tallies, other = caller(budget=13), Tallies(path), Tallies(path)
    lease = tallies.admit(one, NOW, CALL)
    assert lease is not None
    with pytest.raises(AccessError, match="wait for running calls") as caught:
        other.admit(one, NOW, CALL)
    assert caught.value.retry_after == BUSY_WAIT
    tallies.settle(one, lease, tokens=2, spent=6)
    assert passes(other, one)
    with pytest.raises(AccessError, match="wait for running calls"):
        tallies.admit(one, NOW, CALL)
    tallies.close()
    other.close()


def test_a_key_that_lost_its_budget_meanwhile_gets_back_what_was_held(tallies: Tallies) -> None:
    one = caller(budget=100)
    lease = tallies.admit(one, NOW, CALL)
    assert lease is not None
    tallies.settle(caller(requests_per_minute=1), lease, tokens=0, spent=1)
    assert tallies.counters(one, NOW)[TOTAL_SPENT] == 1
    assert tallies._sum_held(tallies._slots["key_1"]) == 0


def test_the_first_process_after_all_have_gone_goes_by_the_records(path: Path) -> None:
    one = caller(requests_per_day=9, requests_per_minute=2)
    first = Tallies(path)
    assert passes(first, one) and passes(first, one)
    first.close()
    second = Tallies(path)
    again = caller(history=History(day_requests=8), requests_per_day=9, requests_per_minute=2)
    assert second.counters(again, NOW)[DAY_REQUESTS] == 8
    assert not passes(second, again)  # the minute is not forgotten
    assert passes(second, again, NOW + 60)
    second.close()


def test_more_limited_keys_than_there_is_room_for_are_refused(
    tallies: Tallies, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tallies_module, "SLOTS", 3)
    for number in range(3):
        assert passes(tallies, caller(f"key_{number}", requests_per_minute=1))
    with pytest.raises(UnavailableError):
        passes(tallies, caller("key_3", requests_per_minute=1))
    assert "more" in caplog.text


def test_a_lock_whose_holder_does_not_run_is_not_waited_for_forever(
    tallies: Tallies, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tallies_module, "LOCK_PATIENCE", 0.01)
    one = caller(requests_per_minute=2)
    assert passes(tallies, one)
    stopped = Tallies(path)
    stopped.counters(one, NOW)
    assert stopped._slots["key_1"].lock.try_lock()
    assert passes(tallies, one)
    assert not passes(tallies, one)
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
        monkeypatch.setattr(tallies_module, "_fcntl", tallies_module._python_fcntl)


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


def test_a_file_of_another_layout_is_begun_anew_once_nobody_uses_it(path: Path) -> None:
    one = caller(requests_per_minute=1)
    old = Tallies(path)
    assert passes(old, one)
    old._view[tallies_module._MAGIC] += 1
    with pytest.raises(OSError, match="another version"):
        Tallies(path)
    old.close()
    new = Tallies(path)
    assert passes(new, one)
    new.close()


# Among processes


def count_passes(
    path: Path, limits: dict[str, int], tries: int, begin: object, out: object
) -> None:
    tallies = Tallies(path)
    begin.wait(WAIT)  # type: ignore[attr-defined]
    one = caller(**limits)
    out.put(sum(passes(tallies, one) for _ in range(tries)))  # type: ignore[attr-defined]


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
    stays = Tallies(path)  # else the first to end would leave its calls to the others
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
    tallies, one = Tallies(path), caller(requests_per_minute=2)
    assert passes(tallies, one)
    begin = PROCESSES.Event()
    worker = PROCESSES.Process(target=keep_the_lock, args=(path, begin))
    worker.start()
    assert begin.wait(WAIT)
    assert not tallies._slots["key_1"].lock.try_lock()
    worker.kill()
    worker.join()
    assert passes(tallies, one)
    assert not passes(tallies, one)
    assert "holds a lock" not in caplog.text
    tallies.close()


def keep_the_lock(path: Path, begin: object) -> None:
    tallies = Tallies(path)
    tallies.counters(caller(requests_per_minute=2), NOW)
    if tallies._slots["key_1"].lock.try_lock():
        begin.set()  # type: ignore[attr-defined]
        time.sleep(WAIT)


def test_what_a_killed_worker_held_is_free(path: Path) -> None:
    tallies = Tallies(path)
    begin, out = PROCESSES.Barrier(2), PROCESSES.Queue()
    worker = PROCESSES.Process(target=hold, args=(path, {"concurrency": 3}, 3, begin, out))
    worker.start()
    begin.wait(WAIT)
    assert out.get(timeout=WAIT) == 3
    assert not passes(tallies, caller(concurrency=3))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert passes(tallies, caller(concurrency=3))
    tallies.close()


def test_what_a_killed_worker_held_of_a_budget_is_spent(path: Path) -> None:
    limits = {"budget": 24}
    tallies = Tallies(path)
    begin, out = PROCESSES.Barrier(2), PROCESSES.Queue()
    worker = PROCESSES.Process(target=hold, args=(path, limits, 3, begin, out))
    worker.start()
    begin.wait(WAIT)
    assert out.get(timeout=WAIT) == 3
    with pytest.raises(AccessError, match="wait for running calls"):
        tallies.admit(caller(**limits), NOW, CALL)
    worker.kill()
    worker.join()
    with pytest.raises(AccessError, match="lower its max_tokens"):
        tallies.admit(caller(**limits), NOW, CALL)
    another = Tallies(path)  # under the number of the dead one
    with pytest.raises(AccessError, match="lower its max_tokens"):
        another.admit(caller(**limits), NOW, CALL)
    another.close()
    tallies.close()
    again = Tallies(path)  # all have gone: the records have the calls that were lost
    one = caller(history=History(total_spent=10), **limits)
    assert [passes(again, one) for _ in range(3)] == [True, True, False]
    again.close()


def test_money_adds_up_over_processes(path: Path) -> None:
    tallies = Tallies(path)
    workers = [PROCESSES.Process(target=spend, args=(path, 200)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT)
    assert tallies.counters(caller(budget=10**9), NOW)[TOTAL_SPENT] == 4 * 200 * 5
    tallies.close()


def spend(path: Path, times: int) -> None:
    tallies = Tallies(path)
    one = caller(budget=10**9)
    for _ in range(times):
        lease = tallies.admit(one, NOW, CALL)
        assert lease is not None
        tallies.settle(one, lease, tokens=0, spent=5)
