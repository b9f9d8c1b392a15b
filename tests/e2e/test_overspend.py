"""A key spends its budget, and at most one answer more, whatever its requests ask for at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from hoberproxy.access.limits import PICO, KeyLimits, format_dollars
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from tests.support.scripted import (
    AwaitRelease,
    ScriptedUpstream,
    SeenRequest,
    completion,
    json_response,
)

from .harness import Program, Reply, chat, eventually, running_program

BUDGET = PICO // 1000  # 0.001 USD
TOKEN = 10 * 10**6  # picodollars, at 10 USD per million tokens
PRICE = 'price = { completion = "10" }\n'
LONG = 1000  # tokens of an answer whose request gives no maximum


def write_all_that_is_allowed(seen: SeenRequest) -> Any:
    """As many choices as `n` says, each as long as the larger maximum."""
    body = seen.json()
    lengths = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
    tokens = (body.get("n") or 1) * max(lengths, default=LONG)
    answer = json_response(200, completion(usage=(10, tokens)))
    return answer if lengths else [AwaitRelease("go"), *answer]


@asynccontextmanager
async def proxy_with_key(
    folder: Path, upstream: ScriptedUpstream, limits: KeyLimits
) -> AsyncIterator[tuple[Program, str]]:
    with closing(Store(folder / "records.db")) as store:
        key, _ = store.create_key("x", limits=limits)
    async with running_program(folder, upstream, keys=True, endpoint=PRICE) as program:
        yield program, key


async def ask(program: Program, key: str, **members: Any) -> Reply:
    async with program.connect() as client:
        await client.ask(chat(**members), headers=[f"authorization: Bearer {key}"])
        return await client.read_reply()


def spent(folder: Path) -> int:
    """Picodollars, by the records."""
    with closing(Store(folder / "records.db")) as store:
        (key,) = store.list_keys()
        return store.sum_key(key.key_id)["total"].cost


@pytest.mark.parametrize(
    "members",
    [
        pytest.param({"n": 24, "max_tokens": 1000}, id="many choices"),
        pytest.param({"max_completion_tokens": 1, "max_tokens": 24_000}, id="the older is larger"),
        pytest.param({"max_completion_tokens": 24_000, "max_tokens": 1}, id="the newer is larger"),
        pytest.param({"n": 24, "max_completion_tokens": 1000, "max_tokens": 1}, id="both"),
    ],
)
async def test_a_request_that_may_cost_more_than_the_budget_is_refused(
    tmp_path: Path, members: dict[str, Any]
) -> None:
    async with (
        ScriptedUpstream(default=write_all_that_is_allowed) as upstream,
        proxy_with_key(tmp_path, upstream, KeyLimits(budget=BUDGET)) as (program, key),
    ):
        reply = await ask(program, key, **members)
        assert (reply.status, reply.error["code"]) == (402, "budget_exceeded")
        assert f"{format_dollars(24_000 * TOKEN)} USD" in reply.error["message"]
        assert not upstream.requests
        assert (await ask(program, key, n=4, max_tokens=20)).status == 200


async def test_answers_without_a_maximum_overrun_a_budget_by_one_of_them_at_most(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedUpstream(default=write_all_that_is_allowed) as upstream,
        proxy_with_key(tmp_path, upstream, KeyLimits(budget=BUDGET)) as (program, key),
    ):
        for _ in range(12):  # the usual answer is short from here on
            assert (await ask(program, key, max_tokens=1)).status == 200
        requests = [asyncio.create_task(ask(program, key)) for _ in range(24)]
        await eventually(
            lambda: sum(task.done() for task in requests) + len(upstream.requests) == 12 + 24
        )
        upstream.release("go")
        replies = await asyncio.gather(*requests)
        assert sorted(reply.status for reply in replies) == [200, *[402] * 23]
        assert (await ask(program, key)).status == 402
        await eventually(lambda: spent(tmp_path) == (12 + LONG) * TOKEN)
    assert spent(tmp_path) <= BUDGET + LONG * TOKEN
