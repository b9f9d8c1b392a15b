"""What requests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hoberproxy.exchange.context import MAX_LEARNT, shortest_wait_of
from hoberproxy.routing.catalog import Endpoint, Model, TimeLimits
from tests.conftest import Proxy, make_config


async def test_ids_of_requests_are_all_different_and_of_one_form(proxy: Proxy) -> None:
    ids = [proxy.context.new_request_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {len(each) for each in ids} == {len("req_") + 16 + 8}


def test_the_shortest_of_all_limits_is_known(tmp_path: Path) -> None:
    config = make_config(tmp_path / "records.db", 9, write_timeout=50.0, comment_after=0.0)
    assert shortest_wait_of(config) == 50.0
    own = Endpoint("scripted", "m", limits=TimeLimits(idle=7.0))
    config = replace(config, models=(*config.models, Model("a/b", (own,))))
    assert shortest_wait_of(config) == 7.0
    settings = replace(config.server, comment_after=3.0)
    assert shortest_wait_of(replace(config, server=settings)) == 3.0


async def test_refused_options_add_up_and_the_oldest_endpoint_is_forgotten(proxy: Proxy) -> None:
    context = proxy.context
    for number in range(MAX_LEARNT):
        context.learn_refused(("scripted", str(number)), frozenset(("seed",)))
    context.learn_refused(("scripted", "0"), frozenset(("user",)))
    context.learn_refused(("scripted", "new"), frozenset(("seed",)))
    assert context.refused_options["scripted", "0"] == {"seed", "user"}
    assert ("scripted", "1") not in context.refused_options
    assert len(context.refused_options) == MAX_LEARNT
