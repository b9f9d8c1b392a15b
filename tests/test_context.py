"""What requests share."""

from __future__ import annotations

from dataclasses import replace

from hoberproxy.catalog import Endpoint, Model, TimeLimits
from hoberproxy.context import MAX_LEARNT

from .conftest import Proxy, StartProxy


async def test_ids_of_requests_are_all_different_and_of_one_form(proxy: Proxy) -> None:
    ids = [proxy.gateway.new_request_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {len(each) for each in ids} == {len("req_") + 16 + 8}


async def test_the_shortest_of_all_limits_is_known(start_proxy: StartProxy) -> None:
    proxy = await start_proxy(write_timeout=50.0, comment_after=0.0)
    context = proxy.gateway
    assert context.shortest_wait == 50.0
    own = Endpoint("scripted", "m", limits=TimeLimits(idle=7.0))
    config = replace(context.config, models=(*context.config.models, Model("a/b", (own,))))
    context.configure(config, context.upstreams)
    assert context.shortest_wait == 7.0
    settings = replace(config.server, comment_after=3.0)
    context.configure(replace(config, server=settings), context.upstreams)
    assert context.shortest_wait == 3.0


async def test_refused_options_add_up_and_the_oldest_endpoint_is_forgotten(proxy: Proxy) -> None:
    context = proxy.gateway
    for number in range(MAX_LEARNT):
        context.learn_refused(("scripted", str(number)), frozenset(("seed",)))
    context.learn_refused(("scripted", "0"), frozenset(("user",)))
    context.learn_refused(("scripted", "new"), frozenset(("seed",)))
    assert context.refused_options["scripted", "0"] == {"seed", "user"}
    assert ("scripted", "1") not in context.refused_options
    assert len(context.refused_options) == MAX_LEARNT
