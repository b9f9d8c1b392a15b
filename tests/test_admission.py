"""Room for streams in all, and for one address."""

from __future__ import annotations

from typing import Any

import pytest

from hoberproxy.admission import NO_GROUP, Admission
from hoberproxy.config import ServerSettings
from hoberproxy.errors import UnavailableError
from hoberproxy.tally import Tally, new_tally_memory

from .conftest import QUESTION, StartProxy, chat, get, wait_until
from .scripted import ScriptedUpstream, Stall

KEY = bytes(16)


def tallies(count: int) -> list[Tally]:
    memory = new_tally_memory(-1, KEY)
    return [Tally(memory, slot) for slot in range(count)]


def admission(tally: Tally | None = None, **settings: Any) -> Admission:
    return Admission(ServerSettings(**settings), tally)


def forwarded(value: str | None) -> Any:
    return {b"x-forwarded-for": value.encode()} if value is not None else {}


def test_streams_count_over_all_processes() -> None:
    one, other = (admission(tally, max_streams=3) for tally in tallies(2))
    one.admit({}, 2, NO_GROUP)
    other.admit({}, 1, NO_GROUP)
    with pytest.raises(UnavailableError) as refused:
        other.admit({}, 2, NO_GROUP)
    assert (refused.value.status, refused.value.code) == (503, "overloaded")
    assert refused.value.retry_after
    one.note_streams(0)
    other.admit({}, 2, NO_GROUP)


def test_without_limits_nothing_is_counted() -> None:
    free = admission(max_streams=0)
    assert free.enter("192.0.2.1") == NO_GROUP
    assert free.admit(forwarded("192.0.2.1"), 10**6, NO_GROUP) == NO_GROUP


def test_connections_of_an_address_count_over_all_processes_and_come_back() -> None:
    one, other = (admission(tally, max_connections_per_address=2) for tally in tallies(2))
    first = one.enter("192.0.2.1")
    other.enter("192.0.2.1")
    with pytest.raises(UnavailableError):
        one.enter("192.0.2.1")
    one.enter("192.0.2.2")
    one.leave(first)
    other.enter("192.0.2.1")


def test_a_process_that_died_holds_no_place() -> None:
    first, second = tallies(2)
    dead, alive = (admission(each, max_connections_per_address=1) for each in (first, second))
    dead.enter("192.0.2.1")
    dead.note_streams(5)
    second.clear(first.slot)
    alive.enter("192.0.2.1")
    assert second.set_streams(1) == 1


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:0:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_ipv6_is_counted_by_its_subnet(one: str, other: str, is_same: bool) -> None:
    (tally,) = tallies(1)
    assert (tally.group_of(one) == tally.group_of(other)) is is_same


def test_behind_a_trusted_proxy_the_requests_of_the_address_it_names_are_counted() -> None:
    (tally,) = tallies(1)
    limited = admission(
        tally, max_connections_per_address=1, trusted_proxies=("10.0.0.0/8", "127.0.0.1/32")
    )
    assert limited.enter("10.1.2.3") == limited.enter("10.1.2.3") == NO_GROUP
    running = limited.admit(forwarded("192.0.2.1, 10.9.9.9"), 1, NO_GROUP)
    with pytest.raises(UnavailableError):
        limited.admit(forwarded("8.8.8.8, 192.0.2.1"), 2, NO_GROUP)  # the first is its own word
    limited.admit(forwarded("192.0.2.2"), 2, NO_GROUP)
    for nobody in (None, "", "unknown", "10.0.0.1"):
        assert limited.admit(forwarded(nobody), 3, NO_GROUP) == NO_GROUP
    limited.leave(running)
    limited.admit(forwarded("192.0.2.1"), 3, NO_GROUP)


async def test_over_the_maximum_a_request_is_refused_while_what_runs_goes_on(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([Stall()])
    proxy = await start_proxy(max_streams=1)
    running, late = await proxy.connect(), await proxy.connect()
    running.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    late.send(chat(proxy.key))
    answer = await late.read_answer()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert len(proxy.gateway.exchanges) == 1
    slow = await proxy.connect()
    slow.send(chat(proxy.key, framing="content-length: 5000"))  # only a part of it comes
    answer = await slow.read_answer()
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert len(proxy.gateway.exchanges) == 1
    await running.aclose()
    await wait_until(lambda: not proxy.gateway.exchanges)
    late.send(chat(proxy.key))
    assert (await late.read_answer()).status == 200


async def test_strangers_take_no_room_of_callers(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(max_streams=2, trusted_proxies=("127.0.0.1/32",))
    upstream.add([Stall()])
    running, caller = await proxy.connect(), await proxy.connect()
    running.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    strangers = [await proxy.connect() for _ in range(20)]
    for number, stranger in enumerate(strangers):
        key = proxy.key[:-1] + "!" if number % 2 else "none"
        stranger.send(chat(key, b"", framing="content-length: 1000000"))
    for stranger in strangers:
        assert (await stranger.read_answer()).status == 401
    for _ in range(3):
        caller.send(chat(proxy.key))
        assert (await caller.read_answer()).status == 200
    assert len(proxy.gateway.exchanges) == 1
    assert [record.status for record in proxy.records].count(401) == 20


async def test_strangers_do_not_count_for_an_address(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(max_connections_per_address=1, trusted_proxies=("127.0.0.1/32",))
    behind = "x-forwarded-for: 192.0.2.7"
    for _ in range(3):
        stranger = await proxy.connect()
        stranger.send(chat("none", b"", behind, framing="content-length: 1000000"))
        assert (await stranger.read_answer()).status == 401
    caller = await proxy.connect()
    caller.send(chat(proxy.key, QUESTION, behind))
    assert (await caller.read_answer()).status == 200


async def test_who_finds_no_room_is_named_in_the_record(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    upstream.add([Stall()])
    proxy = await start_proxy(max_streams=1)
    running, late = await proxy.connect(), await proxy.connect()
    running.send(chat(proxy.key))
    await upstream.wait_for_requests(1)
    for _ in range(2):  # the second time it is known who sends this head
        late.send(chat(proxy.key))
        assert (await late.read_answer()).status == 503
    assert [(record.code, record.key_label) for record in proxy.records] == [
        ("overloaded", "test"),
        ("overloaded", "test"),
    ]


async def test_a_connection_over_the_limit_of_its_address_is_told_so_and_closed(
    start_proxy: StartProxy,
) -> None:
    proxy = await start_proxy(max_connections_per_address=1)
    first, second = await proxy.connect(), await proxy.connect()
    answer = await second.read_answer()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    assert answer.headers["connection"] == "close"
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("1", "1000")
    assert proxy.gateway.metrics.refused_connections == 1
    first.send(get())
    assert (await first.read_answer()).status == 200
    await first.aclose()
    await second.aclose()
    await wait_until(lambda: not proxy.server._connections)
    third = await proxy.connect()
    third.send(get())
    assert (await third.read_answer()).status == 200
