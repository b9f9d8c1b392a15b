"""A request's account: limits, journal and queue on its path, and its record's way into the store.

With "every limit" there is a budget too, and the endpoint has prices: money is held and settled.

The files lie in a folder of their own under the system's temporary one.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from hoberproxy.access.keys import ANONYMOUS, Caller
from hoberproxy.access.limits import PICO, KeyLimits
from hoberproxy.access.shared_limits import SharedLimits
from hoberproxy.accounting.accounts import Accounts
from hoberproxy.accounting.journal import Journal
from hoberproxy.accounting.record import Record, make_row
from hoberproxy.dialects.outcome import Outcome
from hoberproxy.dialects.usage import Usage
from hoberproxy.request.checks import parse_call
from hoberproxy.routing.catalog import Endpoint, Prices
from hoberproxy.routing.plan import Plan, Step
from hoberproxy.storage.journal_reader import Journals
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from hoberproxy.storage.writer import Writer

from . import Case
from .streams import SLUG, request_body

BATCH = 500
PLENTY = 10**9
ENDPOINT = Endpoint("east", "model-2024", prices=Prices(Decimal("0.14"), Decimal("0.28")))
STEP = Step(SLUG, ENDPOINT)
PLAN = Plan((STEP,))
OUTCOME = Outcome(Usage(100, 200, 50), content_events=200)
NO_BUDGET = KeyLimits(PLENTY, PLENTY, PLENTY, PLENTY)
EVERYTHING = replace(NO_BUDGET, budget=10**6 * PICO, budget_period="month")


class Drain:
    """Takes what a journal holds for stored, so that it always has room."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        self._journal = journal
        self._journals = Journals(folder / "store.db-requests")
        self._taken = 0

    def take(self, records: int = 1) -> None:
        """So many more records are in the journal."""
        self._taken += records
        if self._taken >= BATCH:
            self._taken = 0
            self._journal.prepare()
            for segment in self._journals.refresh():
                while segment.read(1000):
                    pass
                segment.mark()


def _record(number: int) -> Record:
    return Record(
        id=f"req_0123456789abcdef{number:08x}",
        started=1_700_000_000.0 + number / 1000,
        key_id="key_0123456789ab",
        key_label="team-a",
        path="/v1/chat/completions",
        requested=(SLUG,),
        slug=SLUG,
        provider="east",
        upstream_model="model-2024",
        upstream_id=f"chatcmpl-{number * 7919:024x}",
        streamed=True,
        status=200,
        finish_reason="stop",
        attempts=1,
        events=64,
        bytes_out=12_345,
        first_content=0.123,
        total=1.234,
    )


def accounts_in(folder: Path) -> tuple[Accounts, Drain]:
    """Make accounts on a journal, and what counts their records so that the journal has room."""
    journal = Journal(folder / "store.db-requests")
    journal.prepare()
    return Accounts(journal, SharedLimits(folder / "limits"), 8192), Drain(journal, folder)


def temporary_folder() -> Path:
    """One that goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="hoberproxy-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _account(limits: KeyLimits | None) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        accounts, drain = accounts_in(temporary_folder())
        caller = ANONYMOUS
        if limits is not None:
            caller = Caller("key_0123456789ab", "team-a", "live", None, None, limits=limits)
        call, record = parse_call(request_body(100)), _record(1)

        def account() -> None:
            record.is_sealed = False
            lease = accounts.open(record, caller, call, PLAN, record.started)
            accounts.fill(record, STEP, OUTCOME, prompt_bytes=100, is_answered=True)
            accounts.seal(record)
            if caller.limits is not None:
                accounts.limit_lines(caller, record.started)
            accounts.close(record, caller, lease)
            drain.take()

        return account

    return make


def _writing() -> Callable[[], object]:
    store = Store(temporary_folder() / "store.db")
    atexit.register(store.close)  # before its folder goes
    rows = [make_row(_record(number)) for number in range(BATCH)]
    written = 0

    def write() -> None:
        nonlocal written
        prefix = f"req_{written:016x}"
        written += 1
        store.write([(prefix + str(row[0])[20:], *row[1:]) for row in rows])

    return write


def _moving() -> Callable[[], object]:
    """What the writer does for each record; telling the journal of it is in here, too."""
    folder = temporary_folder()
    journal = Journal(folder / "store.db-requests")
    journal.prepare()
    writer = Writer(folder / "store.db")
    writer.open()
    atexit.register(writer.close)
    rows = [make_row(_record(number)) for number in range(BATCH)]
    written = 0

    def move() -> None:
        nonlocal written
        prefix = f"req_{written:016x}"
        written += 1
        for row in rows:
            journal.close_request((prefix + str(row[0])[20:], *row[1:]))
        writer.turn()
        journal.prepare()

    return move


CASES = (
    Case("no limits", _account(None), unit="request"),
    Case("requests a minute", _account(KeyLimits(requests_per_minute=PLENTY)), unit="request"),
    Case("every limit but a budget", _account(NO_BUDGET), unit="request"),
    Case("every limit", _account(EVERYTHING), unit="request"),
    Case("into the store, by 500", _writing, BATCH, unit="record"),
    Case("from the journal into the store, by 500", _moving, BATCH, unit="record"),
)
