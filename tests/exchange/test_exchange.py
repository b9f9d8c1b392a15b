"""One chat request without a connection: its record, its place among the others, its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from hoberproxy.accounting.record import CLIENT_CLOSED
from hoberproxy.downstream.request_handler import Admitted
from hoberproxy.errors import UnavailableError
from hoberproxy.exchange.exchange import Exchange
from hoberproxy.protocol.http_head import parse_request_head
from tests.conftest import QUESTION, SLUG, Proxy, StartProxy, wait_until
from tests.downstream.test_response import FakeClient, Sent
from tests.support.scripted import ScriptedUpstream, Stall, sse_head

BODY = json.dumps(QUESTION).encode()
STREAMED = json.dumps({**QUESTION, "stream": True}).encode()
LARGE = json.dumps(
    {**QUESTION, "messages": [{"role": "user", "content": "x" * 2 * 1024 * 1024}]}
).encode()
DRAINING = UnavailableError("draining", code="draining")


class SlowClient(FakeClient):
    """One that may stop reading."""

    unread = 0

    @property
    def unread_bytes(self) -> int:
        return self.unread

    def hasten(self, when: float) -> None:
        self.due = when


class Begun(Sent):
    """An exchange, and what its client gets."""

    def __init__(self, proxy: Proxy, key: str | None = None) -> None:
        super().__init__()
        self.context = proxy.context
        self.slow = SlowClient()
        head = parse_request_head(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n"
            b"authorization: Bearer %b\r\n\r\n" % (key or proxy.key).encode()
        )
        self.exchange = Exchange(self.context, self.slow, head, self.answer)

    def run(self, body: bytes = BODY) -> None:
        assert self.exchange.admit() is not None
        self.exchange.run(body)

    @property
    def status(self) -> int:
        return self.answer.status


def assert_let_go(proxy: Proxy) -> None:
    """Nothing of any exchange is left."""
    assert not proxy.context.exchanges
    assert proxy.context.bodies.held == 0
    assert len(proxy.records) == 1, "one record for each request"


async def test_it_authenticates_parses_routes_connects_relays_and_accounts(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    begun = Begun(proxy)
    assert begun.exchange.admit() is not None
    assert proxy.context.exchanges == {begun.exchange}
    assert begun.exchange.key_label == "test"
    begun.exchange.run(BODY)
    await wait_until(lambda: begun.answer.is_ended)
    assert begun.status == 200
    assert json.loads(begun.body)["model"] == SLUG
    (record,) = proxy.records
    assert (record.status, record.slug, record.provider) == (200, SLUG, "scripted")
    assert (record.key_label, record.attempts, record.requested) == ("test", 1, (SLUG,))
    assert_let_go(proxy)


async def test_who_is_not_known_is_refused_once_it_is_run(proxy: Proxy) -> None:
    begun = Begun(proxy, "sk-hober-unknown")
    assert begun.exchange.admit() is None
    assert not proxy.context.exchanges and not begun.transport.writes
    begun.exchange.run(b"", close=True)
    assert begun.status == 401
    assert b"connection: close" in begun.head
    assert_let_go(proxy)


Change = Callable[[Proxy, Admitted], Admitted]
CHANGES: dict[str, Change] = {
    "a key was changed": lambda proxy, known: known._replace(keyring_version=-1),
    "the config is another": lambda proxy, known: known._replace(
        config=replace(proxy.context.config)
    ),
    "the key has expired": lambda proxy, known: known._replace(
        caller=replace(known.caller, expires=time.time() - 1.0)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_what_was_admitted_before_holds_until_something_changes(
    proxy: Proxy, change: Change
) -> None:
    known = Begun(proxy).exchange.admit()
    assert known is not None
    stranger = Begun(proxy, "sk-hober-unknown").exchange
    assert stranger.admit(known) is known, "the head is not read again"
    assert Begun(proxy, "sk-hober-unknown").exchange.admit(change(proxy, known)) is None


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (BODY.replace(SLUG.encode(), b"no/model"), 404, "model_not_found"),
    ],
    ids=["parse", "route"],
)
async def test_what_fails_before_an_attempt_reaches_no_upstream(
    proxy: Proxy, upstream: ScriptedUpstream, body: bytes, status: int, code: str
) -> None:
    begun = Begun(proxy)
    begun.run(body)
    assert begun.status == status
    assert json.loads(begun.body)["error"]["code"] == code
    (record,) = proxy.records
    assert (record.code, record.attempts) == (code, 0)
    assert not upstream.requests
    assert_let_go(proxy)


@pytest.mark.parametrize("how", ["admitted", "entered", "connected", "streamed"])
async def test_a_client_that_leaves_ends_it_wherever_it_is(
    proxy: Proxy, upstream: ScriptedUpstream, how: str
) -> None:
    upstream.add([sse_head(), Stall()] if how == "streamed" else [Stall()])
    begun = Begun(proxy)
    if how in ("admitted", "entered"):
        assert begun.exchange.admit() is not None
        if how == "entered":
            assert begun.exchange.enter()
            begun.exchange.hold_body(5)
    else:
        begun.run(STREAMED)
        await upstream.wait_for_requests(1)
    begun.exchange.abandon()
    begun.exchange.abandon()
    begun.exchange.fail(DRAINING)
    (record,) = proxy.records
    assert (record.status, record.code) == (CLIENT_CLOSED, "client_closed")
    assert not begun.transport.writes
    if upstream.requests:
        await upstream.wait_for_hangup()
    assert_let_go(proxy)


async def test_a_large_body_is_read_in_steps_between_which_a_client_may_leave(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    begun = Begun(proxy)
    begun.run(LARGE)
    assert proxy.context.bodies.held == len(LARGE)
    begun.exchange.abandon()
    assert_let_go(proxy)
    other = Begun(proxy)
    other.run(LARGE)
    await wait_until(lambda: other.answer.is_ended)
    assert other.status == 200
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("is_begun", "status"), [(False, 503), (True, 200)], ids=["nothing sent", "a stream"]
)
async def test_it_fails_in_the_form_that_is_still_possible(
    proxy: Proxy, upstream: ScriptedUpstream, is_begun: bool, status: int
) -> None:
    upstream.add([Stall()])
    begun = Begun(proxy)
    begun.run(STREAMED)
    await upstream.wait_for_requests(1)
    if is_begun:
        begun.exchange._write_comment(proxy.context.wheel.now)
    begun.exchange.fail(DRAINING)
    assert begun.status == status
    assert b"draining" in begun.body and begun.body.endswith(b"0\r\n\r\n") is is_begun
    assert (proxy.records[0].status, proxy.records[0].code) == (status, "draining")
    assert_let_go(proxy)


async def test_deadlines_bring_comments_and_cut_a_client_that_reads_nothing(
    start_proxy: StartProxy, upstream: ScriptedUpstream
) -> None:
    proxy = await start_proxy(comment_after=5.0, write_timeout=20.0)
    upstream.add([Stall()])
    begun = Begun(proxy)
    begun.run(STREAMED)
    now = proxy.context.wheel.now
    due = begun.exchange.on_deadline(now + 1.0)
    assert due is not None and now + 4.0 <= due <= now + 6.0
    begun.exchange.on_deadline(now + 5.5)
    assert b": HOBER PROCESSING" in begun.body
    begun.slow.is_paused, begun.slow.unread = True, 100
    begun.exchange.pause()
    paused = proxy.context.wheel.now
    begun.slow.unread = 50
    assert begun.exchange.on_deadline(paused + 20.5) is not None, "it has read something"
    assert begun.exchange.on_deadline(paused + 41.5) is None
    assert begun.transport.is_aborted
    assert proxy.records[0].code == "client_closed"
    assert_let_go(proxy)
