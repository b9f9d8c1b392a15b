"""The limits of a key: requests and tokens a minute, requests a day, calls in flight, money.

The counters of a key are a list of integers, its cells, so that they can be copied from memory that
several processes share; memory and locks are left to access/shared_limits.py. A minute begins
with the first request after the last minute ended; days and months are those of the calendar in
UTC, so that they can be counted again from the records. Money is in whole picodollars (1e-12 USD).

The tokens and the money that a call may take are held from its admission on, as if it had used
them; at its end, its usage takes their place. If its request does not limit the answer, the longest
that is to be expected is held while there is room for it; with less left, such a call passes only
while nothing is held for others. So all calls together overrun a limit by one answer at most.

A call is admitted at once, or in two steps: it is counted when its head has come (`enter`), and
tokens and money are held when its body has come (`reserve`). `leave` undoes the first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime
from math import ceil
from typing import Final

from ..errors import AccessError

PICO: Final = 10**12  # picodollars in a dollar
PERIODS: Final = ("day", "month", "total")
MINUTE_MS: Final = 60_000
DAY_MS: Final = 86_400_000
BUSY_WAIT: Final = 1.0  # seconds; when a call in flight will end is not known

# The places of a key's cells. Final: else compiled code looks each up by its name.
MINUTE_START: Final = 0  # unix ms; 0: none has begun
MINUTE_REQUESTS: Final = 1
MINUTE_TOKENS: Final = 2  # settled and reserved
DAY: Final = 3  # days since 1970
DAY_REQUESTS: Final = 4
DAY_SPENT: Final = 5  # settled and held, as the other two
MONTH: Final = 6  # year * 12 + month
MONTH_SPENT: Final = 7
TOTAL_SPENT: Final = 8
MINUTE_HELD: Final = 9  # of the minute's tokens, those reserved for calls under way
CELLS: Final = 10

_SPENT: Final = {"day": DAY_SPENT, "month": MONTH_SPENT, "total": TOTAL_SPENT}


Cells = list[int]  # not any sequence of integers: compiled code takes a list's by place


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The limits of a key; None is no limit. `budget` is in picodollars a `budget_period`."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_per_day: int | None = None
    concurrency: int | None = None
    budget: int | None = None
    budget_period: str = "total"

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing is limited."""
        return all(getattr(self, each.name) is None for each in fields(self)[:-1])

    @property
    def needs_settling(self) -> bool:
        """Whether a call's usage matters for the next one."""
        # With a limit a day too: the money is counted, should the key be given a budget.
        return (
            self.tokens_per_minute is not None or self.concurrency is not None or self.needs_history
        )

    @property
    def needs_history(self) -> bool:
        """Whether counters outlive the process: they have to be counted from the records."""
        return self.requests_per_day is not None or self.budget is not None


@dataclass(frozen=True, slots=True)
class History:
    """A key's usage by the records, on `day` (since 1970, UTC), in its month and in all."""

    day: int = 0
    day_requests: int = 0
    day_spent: int = 0
    month_spent: int = 0
    total_spent: int = 0


class Demand:
    """The tokens that a call may take, and their cost in picodollars, 0 if no price is known.

    The answer, of all `choices` together, is the longest that the request permits if `is_bounded`,
    else the longest that is to be expected: one choice of it may be cut if nothing is in flight.
    """

    __slots__ = (
        "answer_cost",
        "answer_tokens",
        "choices",
        "is_bounded",
        "prompt_cost",
        "prompt_tokens",
    )

    def __init__(
        self,
        prompt_tokens: int,
        answer_tokens: int,
        is_bounded: bool,
        prompt_cost: int = 0,
        answer_cost: int = 0,
        choices: int = 1,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.answer_tokens = answer_tokens
        self.is_bounded = is_bounded
        self.prompt_cost = prompt_cost
        self.answer_cost = answer_cost
        self.choices = choices

    def least_cost(self) -> int:
        """Return the picodollars without which the call is not admitted."""
        flexible = 0 if self.is_bounded else self.answer_cost // self.choices
        return self.prompt_cost + self.answer_cost - flexible

    def least_tokens(self) -> int:
        """Return the tokens without which the call is not admitted."""
        flexible = 0 if self.is_bounded else self.answer_tokens // self.choices
        return self.prompt_tokens + self.answer_tokens - flexible


NO_DEMAND: Final = Demand(0, 0, True)  # of a call whose body has not come yet


class Lease:
    """An admitted call, to be settled once: its windows, and the tokens and money held for it.

    Unless it `is_reserved`, it is only counted, and given back by `leave`.
    """

    __slots__ = ("cost", "day", "is_reserved", "minute_start", "month", "tokens")

    def __init__(
        self,
        minute_start: int,
        day: int,
        month: int,
        tokens: int,
        cost: int,
        is_reserved: bool = True,
    ) -> None:
        self.minute_start = minute_start
        self.day = day
        self.month = month
        self.tokens = tokens
        self.cost = cost  # in picodollars
        self.is_reserved = is_reserved

    def settled(self) -> Lease:
        """Return the same call with nothing held for it."""
        return Lease(self.minute_start, self.day, self.month, 0, 0)


# Windows


def day_of(now_ms: int) -> int:
    """Return the days since 1970, UTC."""
    return now_ms // DAY_MS


def month_of(day: int) -> int:
    """Return the months since the year 0, of a day since 1970."""
    date = datetime.fromtimestamp(day * DAY_MS / 1000, UTC)
    return date.year * 12 + date.month - 1


def month_start(month: int) -> float:
    """Return the unix seconds at which a month begins."""
    return datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC).timestamp()


def roll(cells: Cells, now_ms: int) -> None:
    """Begin a new window in place of each that is over.

    `now_ms` may be shortly before a window's start, since processes wait for each other's lock: it
    belongs to that window. Only a clock set back by more than a window begins a new one.
    """
    start = cells[MINUTE_START]
    if not start - MINUTE_MS < now_ms < start + MINUTE_MS:
        cells[MINUTE_START] = now_ms
        cells[MINUTE_REQUESTS] = cells[MINUTE_TOKENS] = cells[MINUTE_HELD] = 0
    day = now_ms // DAY_MS
    if not cells[DAY] - 1 <= day <= cells[DAY]:
        cells[DAY] = day
        cells[DAY_REQUESTS] = cells[DAY_SPENT] = 0
        month = month_of(day)
        if cells[MONTH] != month:
            cells[MONTH] = month
            cells[MONTH_SPENT] = 0


def restore(cells: Cells, history: History, now_ms: int) -> None:
    """Replace the counters that outlive a process by the usage in the records."""
    day = history.day or day_of(now_ms)
    cells[DAY], cells[MONTH] = day, month_of(day)
    cells[DAY_REQUESTS] = history.day_requests
    cells[DAY_SPENT] = history.day_spent
    cells[MONTH_SPENT] = history.month_spent
    cells[TOTAL_SPENT] = history.total_spent
    roll(cells, now_ms)


def catch_up(cells: Cells, history: History, now_ms: int) -> None:
    """Raise counters to the usage in the records: while a key has no limit they are not kept."""
    roll(cells, now_ms)
    if cells[DAY] == history.day:
        cells[DAY_REQUESTS] = max(cells[DAY_REQUESTS], history.day_requests)
        cells[DAY_SPENT] = max(cells[DAY_SPENT], history.day_spent)
    if cells[MONTH] == month_of(history.day):
        cells[MONTH_SPENT] = max(cells[MONTH_SPENT], history.month_spent)
    cells[TOTAL_SPENT] = max(cells[TOTAL_SPENT], history.total_spent)


# Admission


def admit(
    cells: Cells,
    limits: KeyLimits,
    now_ms: int,
    demand: Demand,
    *,
    running: int = 0,
    held: int = 0,
) -> Lease:
    """Admit a call, or raise AccessError (429, or 402) with the seconds to wait.

    `running` is the number of this key's calls in flight, and `held` the picodollars held for them,
    which matter only if the budget has no room for this one.
    """
    roll(cells, now_ms)
    _check_calls(cells, limits, now_ms, running)
    lease = _hold(cells, limits, now_ms, demand, held)
    cells[MINUTE_REQUESTS] += 1
    cells[DAY_REQUESTS] += 1
    return lease


def enter(
    cells: Cells, limits: KeyLimits, now_ms: int, *, running: int = 0, held: int = 0
) -> Lease:
    """Count a call before its body has come; raises AccessError as `admit` does.

    It is rejected if no body could make it pass. `held` matters only if the whole budget is spent
    or held.
    """
    roll(cells, now_ms)
    _check_calls(cells, limits, now_ms, running)
    budget, tokens = limits.budget, limits.tokens_per_minute
    if budget is not None and spent_in(cells, limits.budget_period) - held >= budget:
        raise _over_budget(cells, limits, budget, now_ms, NO_DEMAND, held)
    if tokens is not None and cells[MINUTE_TOKENS] - cells[MINUTE_HELD] >= tokens:
        raise _over_tokens(cells, tokens, now_ms, NO_DEMAND)
    cells[MINUTE_REQUESTS] += 1
    cells[DAY_REQUESTS] += 1
    return Lease(cells[MINUTE_START], cells[DAY], cells[MONTH], 0, 0, False)


def reserve(
    cells: Cells, limits: KeyLimits, now_ms: int, demand: Demand, *, held: int = 0
) -> Lease:
    """Hold what a call of `enter` may take; raises AccessError as `admit` does.

    The lease replaces the one of `enter`, which is still to be given back if this raises.
    """
    roll(cells, now_ms)
    return _hold(cells, limits, now_ms, demand, held)


def leave(cells: Cells, lease: Lease) -> None:
    """Take back the count of a call for which nothing was reserved, in windows that still run."""
    if cells[MINUTE_START] == lease.minute_start:
        cells[MINUTE_REQUESTS] = max(0, cells[MINUTE_REQUESTS] - 1)
    if cells[DAY] == lease.day:
        cells[DAY_REQUESTS] = max(0, cells[DAY_REQUESTS] - 1)


def settle(cells: Cells, lease: Lease, *, tokens: int, spent: int) -> None:
    """Replace what was held for a call by its usage, in tokens and picodollars.

    The usage belongs to the windows in which the call began, unless they are over.
    """
    # Not below 0: a window that began again, by a clock set back and forth, never held anything.
    if cells[MINUTE_START] == lease.minute_start:
        cells[MINUTE_TOKENS] = max(0, cells[MINUTE_TOKENS] + tokens - lease.tokens)
        cells[MINUTE_HELD] = max(0, cells[MINUTE_HELD] - lease.tokens)
    if more := spent - lease.cost:
        if cells[DAY] == lease.day:
            cells[DAY_SPENT] = max(0, cells[DAY_SPENT] + more)
        if cells[MONTH] == lease.month:
            cells[MONTH_SPENT] = max(0, cells[MONTH_SPENT] + more)
        cells[TOTAL_SPENT] += more


def spent_in(cells: Cells, period: str) -> int:
    """Return the picodollars spent and held in the current day or month, or in all."""
    return cells[_SPENT[period]]


def _hold(cells: Cells, limits: KeyLimits, now_ms: int, demand: Demand, held: int) -> Lease:
    """Hold what a call may take, or raise AccessError."""
    tokens = cost = 0
    if limits.budget is not None:
        cost = _reserve_money(cells, limits, limits.budget, now_ms, demand, held)
    if limits.tokens_per_minute is not None:
        tokens = _reserve_tokens(cells, limits.tokens_per_minute, now_ms, demand)
        cells[MINUTE_TOKENS] += tokens
        cells[MINUTE_HELD] += tokens
    if cost:
        cells[DAY_SPENT] += cost
        cells[MONTH_SPENT] += cost
        cells[TOTAL_SPENT] += cost
    return Lease(cells[MINUTE_START], cells[DAY], cells[MONTH], tokens, cost)


def _check_calls(cells: Cells, limits: KeyLimits, now_ms: int, running: int) -> None:
    per_minute, per_day = limits.requests_per_minute, limits.requests_per_day
    if per_minute is not None and cells[MINUTE_REQUESTS] >= per_minute:
        raise _rejected(
            f"{_count(per_minute, 'request')} a minute with this key, got one more; "
            "wait for the next minute",
            _minute_left(cells, now_ms),
        )
    if per_day is not None and cells[DAY_REQUESTS] >= per_day:
        raise _rejected(
            f"{_count(per_day, 'request')} a day (UTC) with this key, got one more; "
            "wait for the next day",
            _day_left(now_ms),
        )
    at_once = limits.concurrency
    if at_once is not None and running >= at_once:
        raise _rejected(
            f"{_count(at_once, 'call')} of this key at once, got one more; wait for one to end",
            BUSY_WAIT,
        )


def _reserve_money(
    cells: Cells, limits: KeyLimits, budget: int, now_ms: int, demand: Demand, held: int
) -> int:
    """Return the picodollars to hold for a call, or raise if too few are left."""
    spent = spent_in(cells, limits.budget_period)
    wanted, left = demand.prompt_cost + demand.answer_cost, budget - spent
    if 0 < left:
        if wanted <= left:
            return wanted
        if demand.least_cost() <= left and not held:
            return left  # a guess: the key may go on for as long as there is something left
    elif not wanted and spent - held < budget:
        return 0  # nothing but holds is in the way, and what costs nothing needs no room
    raise _over_budget(cells, limits, budget, now_ms, demand, held)


def _over_budget(
    cells: Cells, limits: KeyLimits, budget: int, now_ms: int, demand: Demand, held: int
) -> AccessError:
    """Return the error: the money is spent, too little for this call, or held for others."""
    period = limits.budget_period
    span = "in all" if period == "total" else f"a {period} (UTC)"
    message = f"expected this key to spend up to {format_dollars(budget)} USD {span}, "
    wanted = demand.least_cost()
    left = budget - (spent_in(cells, period) - held)  # once the running calls cost nothing
    wait = _period_left(cells, period, now_ms)
    if left <= 0:
        message += "and it is spent; raise the budget, or wait for the next period where it has one"
    elif wanted > left:
        advice = "shorten it"
        if demand.prompt_cost <= left:
            advice = "lower its max_tokens"
            if not demand.is_bounded:
                advice = "lower its n, or give max_tokens"
        message += (
            f"got a request that may cost about {format_dollars(wanted)} USD, and there are "
            f"{format_dollars(left)} left; {advice}, or raise the budget"
        )
        if wanted > budget:
            wait = None  # another period has no more
    else:
        message += (
            f"got a request that may cost about {format_dollars(wanted)} USD, and of the "
            f"{format_dollars(left)} left, {format_dollars(held)} are held for calls under way; "
            f"{_advice_to_wait(demand)}"
        )
        wait = BUSY_WAIT
    return AccessError(
        message,
        code="budget_exceeded",
        status=402,
        type="insufficient_quota",
        retry_after=wait,
    )


def _reserve_tokens(cells: Cells, limit: int, now_ms: int, demand: Demand) -> int:
    """Return the tokens to hold for a call, or raise if too few are left."""
    wanted, left = demand.prompt_tokens + demand.answer_tokens, limit - cells[MINUTE_TOKENS]
    if wanted <= left:
        return wanted
    if 0 < left >= demand.least_tokens() and not cells[MINUTE_HELD]:
        return left  # a guess, as with money
    raise _over_tokens(cells, limit, now_ms, demand)


def _over_tokens(cells: Cells, limit: int, now_ms: int, demand: Demand) -> AccessError:
    """Return the error: the call is too long, or has to wait for a minute or for other calls."""
    wanted = demand.least_tokens()
    if wanted > limit:
        return _rejected(
            f"up to {_count(limit, 'token')} a minute with this key, got a request that may "
            f"take about {wanted}; shorten it, or lower its max_tokens",
            None,
        )
    wait, advice = _minute_left(cells, now_ms), "wait for the next minute"
    # Is there room earlier, at the end of a call that takes less than is held for it?
    if 0 < limit - (cells[MINUTE_TOKENS] - cells[MINUTE_HELD]) >= wanted:
        wait, advice = min(BUSY_WAIT, wait), _advice_to_wait(demand)
    got = "one more request" if demand is NO_DEMAND else f"one that may take about {wanted} more"
    return _rejected(f"{_count(limit, 'token')} a minute with this key, got {got}; {advice}", wait)


def _advice_to_wait(demand: Demand) -> str:
    return "wait for running calls to end" + ("" if demand.is_bounded else ", or give max_tokens")


def _rejected(message: str, wait: float | None) -> AccessError:
    return AccessError(
        f"expected at most {message}",
        code="rate_limit_exceeded",
        status=429,
        type="rate_limit_error",
        retry_after=wait,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _minute_left(cells: Cells, now_ms: int) -> float:
    return (cells[MINUTE_START] + MINUTE_MS - now_ms) / 1000


def _day_left(now_ms: int) -> float:
    return (DAY_MS - now_ms % DAY_MS) / 1000


def _period_left(cells: Cells, period: str, now_ms: int) -> float | None:
    if period == "day":
        return _day_left(now_ms)
    return month_start(cells[MONTH] + 1) - now_ms / 1000 if period == "month" else None


# Header lines


def format_wait(seconds: float) -> str:
    """Return a time as OpenAI writes it, rounded up: `250ms`, `1s`, `6m0s`, `23h59m0s`."""
    if seconds < 1:
        return f"{max(0, ceil(seconds * 1000))}ms"
    whole = ceil(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60}s"
    return f"{whole // 3600}h{whole % 3600 // 60}m{whole % 60}s"


def limit_lines(cells: Cells, limits: KeyLimits, now_ms: int) -> bytes:
    """Return the x-ratelimit-* header lines, of the minute, or else of the day."""
    left_ms = cells[MINUTE_START] + MINUTE_MS - now_ms
    has_ended = not 0 < left_ms <= MINUTE_MS
    if has_ended:
        reset = "0ms"
    else:
        reset = format_wait(left_ms / 1000)
    requests_reset, requests_left = reset, 0
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    if requests is not None:
        requests_left = requests if has_ended else max(0, requests - cells[MINUTE_REQUESTS])
    elif (requests := limits.requests_per_day) is not None:
        is_today = cells[DAY] == now_ms // DAY_MS
        requests_left = max(0, requests - cells[DAY_REQUESTS]) if is_today else requests
        requests_reset = format_wait(_day_left(now_ms))
    lines = ""
    if requests is not None:  # written out: compiled, this is one call
        lines = (
            f"x-ratelimit-limit-requests: {requests}\r\n"
            f"x-ratelimit-remaining-requests: {requests_left}\r\n"
            f"x-ratelimit-reset-requests: {requests_reset}\r\n"
        )
    if tokens is not None:
        tokens_left = tokens if has_ended else max(0, tokens - cells[MINUTE_TOKENS])
        lines += (
            f"x-ratelimit-limit-tokens: {tokens}\r\n"
            f"x-ratelimit-remaining-tokens: {tokens_left}\r\n"
            f"x-ratelimit-reset-tokens: {reset}\r\n"
        )
    return lines.encode()


def format_dollars(pico: int) -> str:
    """Return picodollars as dollars in plain notation, exact, with at least two decimals."""
    sign, pico = ("-", -pico) if pico < 0 else ("", pico)
    whole, rest = divmod(pico, PICO)
    decimals = f"{rest:012d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"
