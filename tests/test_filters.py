"""Which models of a plan a key may use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hoberproxy.access import ANONYMOUS
from hoberproxy.catalog import Endpoint
from hoberproxy.errors import AccessError
from hoberproxy.filters import keep_permitted
from hoberproxy.routing import Plan, Step

ENDPOINT = Endpoint("east", "m")
PLAN = Plan((Step("a/b", ENDPOINT), Step("c/d", replace(ENDPOINT, provider="west"))))


def test_a_plan_keeps_the_models_that_a_key_may_use() -> None:
    caller = replace(ANONYMOUS, models=("c/*",))
    kept = keep_permitted(PLAN, caller.may_use, caller.models)
    assert [step.slug for step in kept.steps] == ["c/d"]


def test_if_none_is_left_the_refusal_says_which_there_are() -> None:
    with pytest.raises(AccessError, match=r"out of e/\*, f .*a/b, c/d") as caught:
        keep_permitted(PLAN, lambda slug: False, ("e/*", "f"))
    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")
