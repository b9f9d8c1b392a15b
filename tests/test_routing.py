from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoberproxy.catalog import Abilities, Adaptation, Catalog, Endpoint, Model, Prices
from hoberproxy.errors import RequestError, RouteError
from hoberproxy.health import TRIAL, Health
from hoberproxy.request import Call, parse_call
from hoberproxy.routing import Plan, Removal, Step, make_plan

NOW = 100.0
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 60_000}}]


def call(*candidates: str, **fields: Any) -> Call:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    body |= {"models": list(candidates)} if len(candidates) > 1 else {"model": candidates[0]}
    return parse_call(json.dumps(body).encode())


def endpoint(provider: str, name: str = "m", price: str | None = None, **fields: Any) -> Endpoint:
    """`price` of a million prompt tokens; of completion tokens twice that."""
    if price is not None:
        fields["prices"] = Prices(Decimal(price), 2 * Decimal(price))
    return Endpoint(provider, name, **fields)


def catalog(*endpoints: Endpoint, **fields: Any) -> Catalog:
    return Catalog([Model("m", endpoints, **fields)])


def providers(plan: Plan) -> list[str]:
    return [step.endpoint.provider for step in plan.steps]


def places(plan: Plan) -> list[tuple[str, str]]:
    return [(step.slug, step.endpoint.provider) for step in plan.steps]


def filters(plan: Plan) -> dict[str, str]:
    return {removal.provider: removal.filter for removal in plan.removed}


def draws(*values: float) -> Callable[[], float]:
    return iter(values).__next__


def measured(**first_content: float) -> Health:
    """Seconds to the first content of model "m" by provider."""
    health = Health()
    for provider, seconds in first_content.items():
        health.observe_success((provider, "m"), NOW, seconds, 1 / seconds)
    return health


def cooling(health: Health, provider: str, seconds: float = 30.0, name: str = "m") -> Health:
    health.observe_failure((provider, name), NOW, retry_after=seconds, draw=lambda: 0.5)
    return health


ABC = catalog(endpoint("a"), endpoint("b"), endpoint("c"))


# Candidates


def test_endpoints_come_in_the_config_s_order() -> None:
    plan = make_plan(call("m"), ABC)
    assert providers(plan) == ["a", "b", "c"]
    assert {step.reason for step in plan.steps} == {"config"}
    assert (plan.removed, plan.unknown) == ((), ())


TWO = Catalog([Model("x", (endpoint("a", "x"),)), Model("y", (endpoint("b", "y"),))])


def test_models_are_tried_in_the_client_s_order() -> None:
    assert places(make_plan(call("y", "x"), TWO)) == [("y", "b"), ("x", "a")]


def test_an_unknown_slug_among_several_is_skipped() -> None:
    plan = make_plan(call("z", "y", "z:floor"), TWO)
    assert places(plan) == [("y", "b")]
    assert plan.unknown == ("z", "z:floor")


def test_only_unknown_slugs_are_a_404_that_names_them() -> None:
    with pytest.raises(RouteError, match=r"'z', 'z:floor'; GET /v1/models") as caught:
        make_plan(call("z", "z:floor"), TWO)
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_an_endpoint_of_two_slugs_is_tried_once_under_the_first() -> None:
    shared = endpoint("a")
    models = Catalog([Model("x", (shared, endpoint("b"))), Model("y", (endpoint("c"), shared))])
    plan = make_plan(call("x", "y"), models)
    assert places(plan) == [("x", "a"), ("x", "b"), ("y", "c")]
    assert plan.removed == (Removal("y", "a", "m", "duplicate", "it is in the plan already"),)


def test_a_wildcard_s_model_is_served_under_the_slug_that_was_asked_for() -> None:
    plan = make_plan(call("o/gpt:free:floor"), Catalog([Model("o/*", (endpoint("a", "*"),))]))
    assert [(step.slug, step.endpoint.upstream_model) for step in plan.steps] == [
        ("o/gpt:free", "gpt:free")
    ]


# Suffixes

PRICED = catalog(
    endpoint("dear", price="3"),
    endpoint("unknown"),
    endpoint("cheap", price="1"),
    endpoint("same", price="1.0"),
)


def test_floor_puts_the_cheapest_first_and_unknown_prices_last() -> None:
    plan = make_plan(call("m:floor"), PRICED)
    assert providers(plan) == ["cheap", "same", "dear", "unknown"]
    assert {(step.slug, step.reason) for step in plan.steps} == {("m", "price")}


def test_nitro_puts_the_soonest_first() -> None:
    plan = make_plan(call("m:nitro"), ABC, measured(a=0.9, b=0.1, c=0.5), NOW)
    assert providers(plan) == ["b", "c", "a"]
    assert plan.steps[0].reason == "latency"


def test_an_explicit_sort_wins_over_a_suffix() -> None:
    plan = make_plan(call("m:nitro", provider={"sort": "price"}), PRICED)
    assert providers(plan)[0] == "cheap"


def test_a_suffix_holds_for_its_own_candidate() -> None:
    models = Catalog(
        [
            Model("x", (endpoint("a", "x", "2"), endpoint("b", "x", "1"))),
            Model("y", (endpoint("a", "y", "2"), endpoint("b", "y", "1"))),
        ]
    )
    plan = make_plan(call("x:floor", "y"), models)
    assert places(plan) == [("x", "b"), ("x", "a"), ("y", "a"), ("y", "b")]


@pytest.mark.parametrize("slug", ["m:3b", "m:free", "m:nitro:3b", "m:nitrous", "floor", ":floor"])
def test_any_other_colon_belongs_to_the_slug(slug: str) -> None:
    with pytest.raises(RouteError, match="no model of this name"):
        make_plan(call(slug), ABC)
    if slug != ":floor":
        plan = make_plan(call(f"{slug}:nitro"), Catalog([Model(slug, (endpoint("a"),))]))
        assert plan.steps[0].slug == slug


# Filters

ABLE = Abilities(True, True, True, True, frozenset(("temperature", "tools", "max_tokens")))
TOOLS = [{"type": "function", "function": {"name": "f"}}]
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}


@pytest.mark.parametrize(
    ("sent", "refusing", "filter", "param"),
    [
        ({"provider": {"only": ["yes"]}}, {}, "not_only", "provider.only"),
        ({"provider": {"ignore": ["no"]}}, {}, "ignored", "provider.ignore"),
        (
            {"provider": {"max_price": {"prompt": 2}}},
            {"price": "2.5"},
            "price",
            "provider.max_price",
        ),
        (
            {"provider": {"max_price": {"completion": "4"}}},
            {"price": "2.5"},
            "price",
            "provider.max_price",
        ),
        ({"provider": {"max_price": {"prompt": 2}}}, {}, "price", "provider.max_price"),
        ({"tools": TOOLS}, {"abilities": Abilities(tools=False)}, "no_tools", "tools"),
        (
            {"response_format": {"type": "json_object"}},
            {"abilities": Abilities(json_mode=False)},
            "no_json_mode",
            "response_format",
        ),
        (
            {"response_format": JSON_SCHEMA},
            {"abilities": Abilities(json_schema=False)},
            "no_json_schema",
            "response_format",
        ),
        (
            {"messages": [{"role": "user", "content": IMAGE}]},
            {"abilities": Abilities(vision=False)},
            "no_vision",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": "a" * 6000}]},
            {"context_length": 1000},
            "context_length",
            "messages",
        ),
        ({"max_tokens": 1000}, {"context_length": 1000}, "context_length", "messages"),
        ({"max_tokens": 1000}, {"max_output": 999}, "max_output", "max_tokens"),
        ({"max_completion_tokens": 1000}, {"max_output": 999}, "max_output", "max_tokens"),
        (
            {"temperature": 1, "provider": {"require_parameters": True}},
            {},
            "parameters",
            "provider.require_parameters",
        ),
        (
            {"temperature": 1, "provider": {"require_parameters": True}},
            {"abilities": Abilities(parameters=frozenset(["top_p"]))},
            "parameters",
            "provider.require_parameters",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_serve_the_call_is_removed_with_its_reason(
    sent: dict[str, Any], refusing: dict[str, Any], filter: str, param: str
) -> None:
    no = endpoint("no", **refusing)
    yes = endpoint("yes", price="2", abilities=ABLE, context_length=10_000, max_output=1000)
    plan = make_plan(call("m", **sent), catalog(no, yes))
    assert providers(plan) == ["yes"]
    assert filters(plan) == {"no": filter}
    with pytest.raises(RouteError) as caught:
        make_plan(call("m", **sent), catalog(no))
    error = caught.value
    if filter == "context_length":
        assert (error.status, error.code) == (400, "context_length_exceeded")
    else:
        assert (error.status, error.code) == (404, "no_endpoint")
        assert f"no of 'm' ({plan.removed[0].words})" in error.message
    assert error.param == param


EMPTY = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
BEYOND: list[tuple[dict[str, Any], str, str, str]] = [
    ({"tool_choice": "any"}, "tool_choice=any", "tool_choice", "invalid_value"),
    (
        {"response_format": {"type": "grammar"}},
        "response_format=grammar",
        "response_format.type",
        "invalid_value",
    ),
    ({"max_tokens": -1}, "max_tokens=-1", "max_tokens", "invalid_value"),
    (
        {"max_completion_tokens": -1},
        "max_completion_tokens=-1",
        "max_completion_tokens",
        "invalid_value",
    ),
    ({"messages": EMPTY}, "content=null", "messages[1].content", "invalid_type"),
]
BEYOND_IDS = [name for _, name, _, _ in BEYOND]


@pytest.mark.parametrize(("sent", "name", "param", "code"), BEYOND, ids=BEYOND_IDS)
def test_a_value_that_only_some_servers_take_goes_to_those_alone(
    sent: dict[str, Any], name: str, param: str, code: str
) -> None:
    accepting = Abilities(accepts=frozenset([name, "tool_choice=other"]))
    models = catalog(endpoint("no"), endpoint("yes", abilities=accepting))
    assert providers(make_plan(call("m"), models)) == ["no", "yes"], "others go to all"
    plan = make_plan(call("m", **sent), models)
    assert providers(plan) == ["yes"]
    assert filters(plan) == {"no": name}
    assert providers(make_plan(call("m"), models)) == ["no", "yes"], "and still do"


@pytest.mark.parametrize(("sent", "name", "param", "code"), BEYOND, ids=BEYOND_IDS)
def test_a_value_that_only_another_model_s_endpoint_takes_is_a_400_all_the_same(
    sent: dict[str, Any], name: str, param: str, code: str
) -> None:
    accepting = endpoint("b", "*", abilities=Abilities(accepts=frozenset([name])))
    models = Catalog([Model("m", (endpoint("a"), endpoint("c"))), Model("o/*", (accepting,))])
    with pytest.raises(RequestError, match=r"no endpoint of this model accepts|got null") as caught:
        make_plan(call("m", **sent), models)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, code, param)


@pytest.mark.parametrize(("sent", "name", "param", "code"), BEYOND, ids=BEYOND_IDS)
def test_where_another_filter_removed_what_takes_a_value_there_is_no_endpoint(
    sent: dict[str, Any], name: str, param: str, code: str
) -> None:
    accepting = endpoint("b", abilities=Abilities(accepts=frozenset([name])))
    models = Catalog([Model("m", (endpoint("a"), accepting))])
    with pytest.raises(RouteError, match=f"it does not accept {name}") as caught:
        make_plan(call("m", **sent, provider={"ignore": ["b"]}), models)
    assert (caught.value.status, caught.value.code) == (404, "no_endpoint")


@pytest.mark.parametrize(("sent", "name", "param", "code"), BEYOND, ids=BEYOND_IDS)
@pytest.mark.parametrize("slug", ["m", "unknown", "hober/auto"])
def test_a_value_that_no_endpoint_takes_is_a_400_that_names_the_field(
    sent: dict[str, Any], name: str, param: str, code: str, slug: str
) -> None:
    accepting = Abilities(accepts=frozenset(["tool_choice=other"]))
    with pytest.raises(RequestError) as caught:
        make_plan(call(slug, **sent), catalog(endpoint("a", abilities=accepting)))
    error = caught.value
    assert (error.status, error.code, error.param) == (400, code, param)


LONG = [{"role": "user", "content": "a" * 6000}]


def short_of(sent: Call, models: Catalog) -> tuple[int, str, str | None]:
    """Status, code and param of the error that there is no endpoint."""
    with pytest.raises(RouteError) as caught:
        make_plan(sent, models)
    return caught.value.status, caught.value.code, caught.value.param


def test_a_prompt_too_long_for_all_endpoints_is_told_in_the_words_that_clients_know() -> None:
    models = catalog(endpoint("a", context_length=900), endpoint("b"), context_length=1000)
    with pytest.raises(RouteError) as caught:
        make_plan(call("m", messages=LONG, max_tokens=70), models)
    error = caught.value
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert error.message == (
        "This model's maximum context length is 1000 tokens. However, you requested about "
        "1075 tokens (1005 in the messages, 70 in the completion)."
    )


TOO_LONG = (400, "context_length_exceeded", "messages")


@pytest.mark.parametrize("slug", ["hober/auto", "hober/auto:cost", "hober/auto:fast:floor"])
def test_for_a_virtual_model_those_do_not_count_that_cannot_serve_the_call(slug: str) -> None:
    unable = endpoint("b", abilities=Abilities(tools=False))
    models = catalog(endpoint("a", context_length=1000), unable)
    assert short_of(call(slug, messages=LONG, tools=TOOLS), models) == TOO_LONG
    assert short_of(call("hober/auto", tools=TOOLS), catalog(unable))[:2] == (404, "no_endpoint")


def test_of_several_models_the_longest_context_is_told() -> None:
    models = Catalog(
        [
            Model("x", (endpoint("a", "x", context_length=900),)),
            Model("y", (endpoint("a", "y", context_length=1000),)),
        ]
    )
    assert short_of(call("x", "y", "?", messages=LONG), models) == TOO_LONG
    with pytest.raises(RouteError, match="length is 1000 tokens"):
        make_plan(call("x", "y", messages=LONG), models)


@pytest.mark.parametrize(
    "sent",
    [
        {"provider": {"ignore": ["b"]}},
        {"provider": {"only": ["a"]}},
        {"tools": TOOLS},
        {"max_tokens": 20},
    ],
    ids=["ignored", "not named", "no tools", "long output"],
)
def test_where_another_filter_has_a_part_in_it_no_endpoint_is_told(sent: dict[str, Any]) -> None:
    other = endpoint("b", abilities=Abilities(tools=False), max_output=10)
    models = catalog(endpoint("a", context_length=1000), other)
    assert short_of(call("m", messages=LONG, **sent), models)[:2] == (404, "no_endpoint")


@pytest.mark.parametrize(
    "sent",
    [
        {"tools": TOOLS},
        {"response_format": {"type": "json_object"}},
        {"response_format": JSON_SCHEMA},
        {"messages": [{"role": "user", "content": IMAGE}]},
        {"max_tokens": 10**9},
    ],
    ids=["tools", "json mode", "json schema", "images", "long output"],
)
def test_an_endpoint_that_does_not_say_what_it_can_is_kept(sent: dict[str, Any]) -> None:
    assert providers(make_plan(call("m", **sent), catalog(endpoint("a")))) == ["a"]


@pytest.mark.parametrize(
    "sent",
    [
        {"tools": []},
        {"response_format": {"type": "text"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"max_tokens": None},
    ],
    ids=["an empty list of tools", "plain text", "parts without an image", "no limit"],
)
def test_an_inability_that_is_not_asked_for_does_not_matter(sent: dict[str, Any]) -> None:
    unable = endpoint("a", abilities=Abilities(False, False, False, False), max_output=1)
    assert providers(make_plan(call("m", **sent), catalog(unable))) == ["a"]


@pytest.mark.parametrize(
    ("wanted", "ability"), [({"type": "json_object"}, "json_schema"), (JSON_SCHEMA, "json_mode")]
)
def test_json_mode_and_json_schema_are_two_abilities(wanted: dict[str, Any], ability: str) -> None:
    other = endpoint("a", abilities=Abilities(**{ability: False}))
    assert providers(make_plan(call("m", response_format=wanted), catalog(other))) == ["a"]


def test_a_prompt_that_may_fit_is_not_removed() -> None:
    prompt = [{"role": "user", "content": "a" * 5900}]
    short = catalog(endpoint("a", context_length=1000))
    assert providers(make_plan(call("m", messages=prompt), short)) == ["a"]


def test_the_bytes_of_an_image_are_no_tokens() -> None:
    short = catalog(endpoint("a", context_length=1000))
    plan = make_plan(call("m", messages=[{"role": "user", "content": IMAGE}]), short)
    assert providers(plan) == ["a"]


def test_an_endpoint_s_own_context_counts_before_the_model_s() -> None:
    models = catalog(endpoint("own", context_length=9000), endpoint("model"), context_length=1000)
    plan = make_plan(call("m", max_tokens=2000), models)
    assert providers(plan) == ["own"]
    assert filters(plan) == {"model": "context_length"}


def test_required_parameters_leave_out_what_every_endpoint_takes_or_never_sees() -> None:
    bare = endpoint("a", abilities=Abilities(parameters=frozenset()))
    sent = call(
        "m",
        stream=True,
        stream_options={"include_usage": True},
        usage={"include": True},
        provider={"require_parameters": True},
        top_p=None,
    )
    assert providers(make_plan(sent, catalog(bare))) == ["a"]


def test_a_parameter_is_supported_under_the_name_it_is_renamed_to() -> None:
    renaming = endpoint(
        "a",
        abilities=Abilities(parameters=frozenset(["max_completion_tokens"])),
        adaptation=Adaptation(rename=(("max_tokens", "max_completion_tokens"),)),
    )
    sent = call("m", max_tokens=5, provider={"require_parameters": True})
    assert providers(make_plan(sent, catalog(renaming))) == ["a"]


def test_a_parameter_s_name_that_may_be_text_is_not_told() -> None:
    sent = call("m", provider={"require_parameters": True}, **{"My Secret": 1, "seed": 2})
    bare = endpoint("a", abilities=Abilities(parameters=frozenset()))
    with pytest.raises(RouteError, match=r"does not say that it supports seed\)") as caught:
        make_plan(sent, catalog(bare))
    assert "Secret" not in caught.value.message


def test_no_endpoint_left_says_which_filter_removed_which_and_what_to_do() -> None:
    models = catalog(endpoint("a"), endpoint("b", abilities=Abilities(tools=False)))
    with pytest.raises(RouteError) as caught:
        make_plan(call("m", tools=TOOLS, provider={"ignore": ["a"]}), models)
    assert caught.value.message == (
        "no endpoint is left; removed: a of 'm' (provider.ignore names it),"
        " b of 'm' (it takes no tools);"
        " ignore fewer providers, or choose a model that takes tools"
    )
    assert caught.value.param is None


def test_no_endpoint_left_tells_of_unknown_models_too() -> None:
    with pytest.raises(RouteError, match="not in the catalog: 'z'"):
        make_plan(call("m", "z", provider={"only": ["z"]}), ABC)


def test_the_messages_are_bounded() -> None:
    many = catalog(*(endpoint(f"p{i}") for i in range(500)))
    with pytest.raises(RouteError, match="and 492 more") as caught:
        make_plan(call("m", provider={"only": ["z"]}), many)
    assert len(caught.value.message) < 1500
    with pytest.raises(RouteError, match="and 24 more") as caught:
        make_plan(call(*(f"{i}" + "z" * 500 for i in range(32))), many)
    assert len(caught.value.message) < 1500


# Preferences


def test_order_goes_first_and_the_rest_follows() -> None:
    plan = make_plan(call("m", provider={"order": ["c", "z", "b", "c"]}), ABC)
    assert [(step.endpoint.provider, step.reason) for step in plan.steps] == [
        ("c", "order"),
        ("b", "order"),
        ("a", "config"),
    ]


def test_the_rest_behind_an_order_is_sorted() -> None:
    wanted = {"order": ["unknown"], "sort": "price"}
    plan = make_plan(call("m", provider=wanted), PRICED)
    assert providers(plan) == ["unknown", "cheap", "same", "dear"]


def test_without_fallbacks_there_is_one_step_and_the_others_say_why() -> None:
    plan = make_plan(call("m", provider={"allow_fallbacks": False}), ABC)
    assert providers(plan) == ["a"]
    assert filters(plan) == {"b": "fallbacks_off", "c": "fallbacks_off"}


def test_without_fallbacks_the_other_models_are_off_as_well() -> None:
    plan = make_plan(call("x", "y", provider={"allow_fallbacks": False}), TWO)
    assert places(plan) == [("x", "a")]


def test_throughput_puts_the_fastest_first() -> None:
    plan = make_plan(
        call("m", provider={"sort": "throughput"}), ABC, measured(a=0.9, b=0.1, c=0.5), NOW
    )
    assert providers(plan) == ["b", "c", "a"]


@pytest.mark.parametrize("sort", ["latency", "throughput"])
def test_an_endpoint_without_measurements_is_explored_first(sort: str) -> None:
    plan = make_plan(call("m", provider={"sort": sort}), ABC, measured(a=0.1, b=0.5), NOW)
    assert providers(plan) == ["c", "a", "b"]


def test_while_one_request_explores_an_endpoint_the_others_keep_away() -> None:
    health = measured(a=0.1, b=0.5)
    health.begin(("c", "m"), NOW)
    assert providers(make_plan(call("m:nitro"), ABC, health, NOW)) == ["a", "b", "c"]
    late = NOW + TRIAL
    assert providers(make_plan(call("m:nitro"), ABC, health, late)) == ["c", "a", "b"]


# Weights


def test_weights_are_drawn_without_replacement() -> None:
    models = catalog(endpoint("a", weight=3.0), endpoint("b"), endpoint("c", weight=0.5))
    draw = random.Random(7).random
    first, second = Counter[str](), Counter[str]()
    for _ in range(6000):
        order = providers(make_plan(call("m"), models, draw=draw))
        assert sorted(order) == ["a", "b", "c"]
        first[order[0]] += 1
        if order[0] == "a":
            second[order[1]] += 1
    shares = [first[name] / 6000 for name in "abc"]
    assert shares == pytest.approx([3 / 4.5, 1 / 4.5, 0.5 / 4.5], abs=0.03)
    assert second["b"] / first["a"] == pytest.approx(1 / 1.5, abs=0.03)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4))
def test_weight_zero_only_comes_last(values: list[float]) -> None:
    models = catalog(
        endpoint("x", weight=0.0), endpoint("a"), endpoint("y", weight=0.0), endpoint("b", weight=9)
    )
    plan = make_plan(call("m"), models, draw=draws(*values))
    assert providers(plan)[2:] == ["x", "y"]
    assert {step.reason for step in plan.steps} == {"weight"}


def test_a_sort_leaves_weights_and_chance_aside() -> None:
    models = catalog(endpoint("a", price="2", weight=99.0), endpoint("b", price="1", weight=0.0))
    assert providers(make_plan(call("m:floor"), models, draw=draws())) == ["b", "a"]


def test_without_weights_nothing_is_drawn() -> None:
    assert providers(make_plan(call("m"), ABC, draw=draws())) == ["a", "b", "c"]


# Cooldown


def test_a_cooled_endpoint_goes_last() -> None:
    plan = make_plan(call("m"), ABC, cooling(Health(), "a"), NOW)
    assert [(step.endpoint.provider, step.reason) for step in plan.steps] == [
        ("b", "config"),
        ("c", "config"),
        ("a", "cooldown"),
    ]


def test_among_cooled_ones_the_first_to_be_over_comes_first() -> None:
    health = Health()
    for provider, seconds in {"a": 90.0, "b": 10.0, "c": 50.0}.items():
        cooling(health, provider, seconds)
    assert providers(make_plan(call("m"), ABC, health, NOW)) == ["b", "c", "a"]


@pytest.mark.parametrize("wanted", [{"order": ["a"]}, {"sort": "price"}, {"order": ["a", "b"]}])
def test_a_cooled_endpoint_is_last_whatever_the_client_prefers(wanted: dict[str, Any]) -> None:
    models = catalog(endpoint("a", price="1"), endpoint("b", price="2"), endpoint("c", price="3"))
    plan = make_plan(call("m", provider=wanted), models, cooling(Health(), "a"), NOW)
    assert providers(plan) == ["b", "c", "a"]


def test_models_keep_the_client_s_order_even_if_all_of_the_first_cool() -> None:
    health = cooling(Health(), "a", name="x")
    assert places(make_plan(call("x", "y"), TWO, health, NOW)) == [("x", "a"), ("y", "b")]


def test_without_fallbacks_a_cooled_provider_of_the_order_is_not_replaced_by_another() -> None:
    wanted = {"order": ["a"], "allow_fallbacks": False}
    health = cooling(Health(), "a")
    assert providers(make_plan(call("m", provider=wanted), ABC, health, NOW)) == ["a"]
    wanted["order"] = ["a", "c"]
    assert providers(make_plan(call("m", provider=wanted), ABC, health, NOW)) == ["c"]


def test_a_trial_brings_an_endpoint_back_for_one_request() -> None:
    health = cooling(Health(), "a", 30.0)
    later = NOW + 30
    assert providers(make_plan(call("m"), ABC, health, later))[0] == "a"
    health.begin(("a", "m"), later)
    assert providers(make_plan(call("m"), ABC, health, later))[-1] == "a"
    health.observe_success(("a", "m"), later, 0.1)
    assert providers(make_plan(call("m"), ABC, health, later))[0] == "a"


# The virtual models

AUTO = Catalog(
    [
        Model("dear", (endpoint("a", "dear", "9"), endpoint("b", "dear", "8"))),
        Model("wild/*", (endpoint("a", "*", "0"),)),
        Model("cheap", (endpoint("a", "cheap", "1"),)),
        Model("middle", (endpoint("b", "middle", "3"),)),
    ]
)


def timed(**seconds: float) -> Health:
    health = Health()
    for key, value in seconds.items():
        name, provider = key.split("_")
        health.observe_success((provider, name), NOW, value)
    return health


SPEEDS = {"dear_a": 0.2, "dear_b": 0.3, "cheap_a": 2.0, "middle_b": 0.1}


@pytest.mark.parametrize(
    ("slug", "expected"),
    [
        ("hober/auto:cost", ["cheap a", "middle b", "dear b", "dear a"]),
        ("hober/auto:floor", ["cheap a", "middle b", "dear b", "dear a"]),
        ("hober/auto:fast", ["middle b", "dear a", "dear b", "cheap a"]),
        ("hober/auto:cost:nitro", ["middle b", "dear a", "dear b", "cheap a"]),
        # Ranks of price and latency: middle 1+0, cheap 0+3, dear b 2+2, dear a 3+1.
        ("hober/auto", ["middle b", "cheap a", "dear b", "dear a"]),
    ],
)
def test_a_virtual_model_sorts_all_models_and_shows_their_slugs(
    slug: str, expected: list[str]
) -> None:
    plan = make_plan(call(slug), AUTO, timed(**SPEEDS), NOW)
    assert [" ".join(place) for place in places(plan)] == expected


def test_an_explicit_sort_wins_over_a_virtual_model_s_own() -> None:
    sent = call("hober/auto:fast", provider={"sort": "price"})
    assert places(make_plan(sent, AUTO, timed(**SPEEDS), NOW))[0] == ("cheap", "a")


def test_a_virtual_model_s_cooled_endpoints_are_last_of_all() -> None:
    health = cooling(timed(**SPEEDS), "a", name="cheap")
    plan = make_plan(call("hober/auto:cost"), AUTO, health, NOW)
    assert places(plan) == [("middle", "b"), ("dear", "b"), ("dear", "a"), ("cheap", "a")]


def test_a_virtual_model_leaves_out_what_cannot_serve_the_call() -> None:
    models = Catalog(
        [
            Model("x", (endpoint("a", "x", "1", abilities=Abilities(vision=False)),)),
            Model("y", (endpoint("a", "y", "2"),)),
        ]
    )
    plan = make_plan(call("hober/auto", messages=[{"role": "user", "content": IMAGE}]), models)
    assert places(plan) == [("y", "a")]
    assert [(each.slug, each.filter) for each in plan.removed] == [("x", "no_vision")]


def test_a_virtual_model_fills_up_behind_a_named_one() -> None:
    plan = make_plan(call("dear", "hober/auto:cost"), AUTO)
    assert places(plan) == [("dear", "a"), ("dear", "b"), ("cheap", "a"), ("middle", "b")]
    assert [(each.slug, each.filter) for each in plan.removed] == [("dear", "duplicate")] * 2


def test_a_virtual_model_over_wildcards_alone_says_that_there_is_nothing_to_choose() -> None:
    with pytest.raises(RouteError, match="removed: none; ask for a model") as caught:
        make_plan(call("hober/auto"), Catalog([Model("wild/*", (endpoint("a", "*"),))]))
    assert caught.value.code == "no_endpoint"


def test_an_unknown_kind_of_virtual_model_is_unknown() -> None:
    with pytest.raises(RouteError, match="no model of this name"):
        make_plan(call("hober/auto:best"), AUTO)


# The next step


def test_after_a_failure_comes_the_next_step_and_after_a_refusal_the_next_model() -> None:
    plan = Plan(tuple(Step(slug, endpoint("p", name)) for slug, name in ("xa", "xb", "yc")))
    assert plan.after(0) == 1
    assert plan.after(0, {plan.steps[0].slug}) == 2
    assert plan.after(2) is None
    assert plan.after(2, {plan.steps[2].slug}) is None


def test_a_model_that_refused_the_request_does_not_come_up_again_between_others() -> None:
    plan = Plan(tuple(Step(slug, endpoint("p", name)) for slug, name in ("xa", "yb", "xc", "yd")))
    assert plan.after(1, {"x"}) == 3
    assert plan.after(1, {"x", "y"}) is None


# Whatever comes

NAMES = ["a", "b", "c", "d"]
SLUGS = ["x", "y", "z"]


@st.composite
def endpoints(draw: st.DrawFn) -> Endpoint:
    maybe = st.sampled_from([None, None, True, False])
    weight = draw(st.sampled_from([None, None, 0.0, 1.0, 5.0]))
    limit = st.sampled_from([None, 10, 1000])
    parameters = st.none() | st.frozensets(st.sampled_from(["seed", "top_p", "max_tokens"]))
    return endpoint(
        draw(st.sampled_from(NAMES)),
        draw(st.sampled_from(["m", "n", "o"])),
        draw(st.sampled_from([None, "0", "1", "2", "2.5"])),
        weight=weight,
        context_length=draw(limit),
        max_output=draw(limit),
        abilities=Abilities(*(draw(maybe) for _ in range(4)), parameters=draw(parameters)),
    )


CATALOGS = st.lists(st.lists(endpoints(), min_size=1, max_size=4), min_size=1, max_size=3).map(
    lambda lists: Catalog(
        [Model(slug, tuple(each)) for slug, each in zip(SLUGS, lists, strict=False)]
    )
)
CANDIDATES = st.lists(
    st.builds(
        str.__add__,
        st.sampled_from([*SLUGS, "?", "hober/auto", "hober/auto:cost", "hober/auto:fast"]),
        st.sampled_from(["", "", ":nitro", ":floor"]),
    ),
    min_size=1,
    max_size=4,
    unique=True,
)
PROVIDERS = st.lists(st.sampled_from([*NAMES, "?"]), max_size=4)
PREFERENCES = st.fixed_dictionaries(
    {},
    optional={
        "only": PROVIDERS,
        "ignore": PROVIDERS,
        "order": PROVIDERS,
        "allow_fallbacks": st.booleans(),
        "sort": st.sampled_from(["price", "latency", "throughput"]),
        "max_price": st.sampled_from([{"prompt": 1}, {"completion": "4.5"}, {}]),
        "require_parameters": st.booleans(),
    },
)
NEEDS = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.just(TOOLS),
        "response_format": st.sampled_from([{"type": "json_object"}, JSON_SCHEMA]),
        "max_tokens": st.sampled_from([5, 500]),
        "seed": st.just(1),
    },
)


KEYS = [(provider, name) for provider in NAMES for name in ("m", "n", "o")]
STATES = st.sampled_from(["soon", "late", "cooling", "cooling longer", "on trial", "tried"])


@st.composite
def healths(draw: st.DrawFn) -> Health:
    health = Health()
    for key, state in draw(st.dictionaries(st.sampled_from(KEYS), STATES)).items():
        match state:
            case "soon" | "late":
                seconds = 0.1 if state == "soon" else 2.0
                health.observe_success(key, NOW, seconds, 1 / seconds)
            case "cooling" | "cooling longer":
                cooling(health, key[0], 5.0 if state == "cooling" else 50.0, key[1])
            case "on trial":
                health.observe_failure(key, 0.0, retry_after=NOW, draw=lambda: 0.5)
                health.begin(key, NOW)
            case "tried":
                health.begin(key, NOW)
    return health


def offers(sent: Call, models: Catalog) -> Iterator[tuple[str, str, str]]:
    """Every endpoint of every candidate, by the contract's words and nothing of the router's."""
    for candidate in sent.terms.candidates:
        slug = candidate.removesuffix(":nitro").removesuffix(":floor")
        if slug.startswith("hober/auto"):
            found = list(models.models())
        else:
            found = [model] if (model := models.find(slug)) else []
        for model in found:
            for each in model.endpoints:
                yield model.slug, each.provider, each.upstream_model


@given(candidates=CANDIDATES, wanted=PREFERENCES, needs=NEEDS, models=CATALOGS, health=healths())
def test_every_plan_keeps_the_rules(
    candidates: list[str],
    wanted: dict[str, Any],
    needs: dict[str, Any],
    models: Catalog,
    health: Health,
) -> None:
    sent = call(*candidates, **needs, provider=wanted)
    known = [slug for slug in candidates if slug.partition(":")[0] != "?"]
    try:
        plan = make_plan(sent, models, health, NOW, random.Random(1).random)
    except RouteError as error:
        none_known = not any(offers(sent, models))
        if error.code == "context_length_exceeded":
            assert error.status == 400
            assert any(each.context_length == 10 for each in all_endpoints(models))
        else:
            assert error.code == ("model_not_found" if none_known else "no_endpoint")
        assert len(error.message) < 2500
        return
    assert known
    assert plan.steps
    check_accounts(plan, sent, models)
    check_filters(plan, sent)
    check_order(plan, sent, health)


def all_endpoints(models: Catalog) -> list[Endpoint]:
    return [each for model in models.models() for each in model.endpoints]


def check_accounts(plan: Plan, sent: Call, models: Catalog) -> None:
    """Steps and removals are all endpoints, no more; no endpoint is tried twice."""
    keys = [(step.endpoint.provider, step.endpoint.upstream_model) for step in plan.steps]
    assert len(set(keys)) == len(keys)
    accounted = [(step.slug, *key) for step, key in zip(plan.steps, keys, strict=True)]
    accounted += [(each.slug, each.provider, each.upstream_model) for each in plan.removed]
    assert Counter(accounted) == Counter(offers(sent, models))
    assert set(plan.unknown) | {slug for slug, *_ in accounted} >= {
        slug for slug in sent.terms.candidates if slug in SLUGS
    }


def check_filters(plan: Plan, sent: Call) -> None:
    wanted = sent.terms.provider
    for step in plan.steps:
        each = step.endpoint
        assert each.provider not in (wanted.ignore or ())
        assert not wanted.only or each.provider in wanted.only
        assert not (sent.terms.needs_tools and each.abilities.tools is False)
        if wanted.max_price_prompt is not None:
            assert each.prices is not None
            assert each.prices.prompt <= wanted.max_price_prompt
        if wanted.max_price_completion is not None:
            assert each.prices is not None
            assert each.prices.completion <= wanted.max_price_completion
        if wanted.require_parameters:
            assert each.abilities.parameters is not None
            assert {"seed"} & sent.terms.given <= each.abilities.parameters
    if not wanted.allow_fallbacks:
        assert len(plan.steps) == 1


def check_order(plan: Plan, sent: Call, health: Health) -> None:
    """Of each candidate: working before cooled, `order` before others, sorted by price."""
    is_virtual = any(slug.startswith("hober/auto") for slug in sent.terms.candidates)
    for earlier, later in zip(plan.steps, plan.steps[1:], strict=False):
        if len(sent.terms.candidates) > 1 if is_virtual else earlier.slug != later.slug:
            continue  # a virtual model's endpoints are ordered over all its models
        first, second = earlier.endpoint, later.endpoint
        is_cooled = [
            health.is_cooling((each.provider, each.upstream_model), NOW) for each in (first, second)
        ]
        assert is_cooled != [True, False]
        assert (earlier.reason == "cooldown") is is_cooled[0]
        if any(is_cooled):
            continue
        order = [*(sent.terms.provider.order or ())]
        ranks = [
            order.index(each.provider) if each.provider in order else len(order)
            for each in (first, second)
        ]
        assert ranks[0] <= ranks[1]
        if sent.terms.provider.sort == "price" and ranks[0] == ranks[1]:
            assert total(first) <= total(second)


def total(each: Endpoint) -> Decimal:
    return each.prices.prompt + each.prices.completion if each.prices else Decimal("inf")


@settings(max_examples=40)
@given(models=CATALOGS, health=healths(), suffix=st.sampled_from(["nitro", "floor"]))
@pytest.mark.parametrize("slug", ["x", "hober/auto", "hober/auto:cost"])
def test_a_suffix_equals_the_explicit_sort(
    slug: str, models: Catalog, health: Health, suffix: str
) -> None:
    sort = {"nitro": "latency", "floor": "price"}[suffix]
    by_suffix = make_plan(call(f"{slug}:{suffix}"), models, health, NOW)
    assert by_suffix == make_plan(call(slug, provider={"sort": sort}), models, health, NOW)


@settings(max_examples=40)
@given(models=CATALOGS, health=healths())
def test_an_unknown_slug_takes_nothing_from_the_known_ones(models: Catalog, health: Health) -> None:
    alone = make_plan(call("x"), models, health, NOW, lambda: 0.5)
    beside = make_plan(call("?", "x", "?:nitro"), models, health, NOW, lambda: 0.5)
    assert (beside.steps, beside.removed) == (alone.steps, alone.removed)


@settings(max_examples=40)
@given(models=CATALOGS, candidates=CANDIDATES)
def test_an_outage_of_everything_still_leaves_the_whole_plan(
    models: Catalog, candidates: list[str]
) -> None:
    health = Health()
    for provider, name in KEYS:
        cooling(health, provider, name=name)
    sent = call(*candidates, "x")
    in_calm = make_plan(sent, models, Health(), NOW, lambda: 0.5)
    in_outage = make_plan(sent, models, health, NOW, lambda: 0.5)
    assert len(in_outage.steps) == len(in_calm.steps)
    assert Counter(places(in_outage)).keys() == Counter(places(in_calm)).keys()


@settings(max_examples=40)
@given(models=CATALOGS, health=healths())
def test_the_balance_never_puts_what_is_worse_in_both_first(
    models: Catalog, health: Health
) -> None:
    plan = make_plan(call("hober/auto"), models, health, NOW)
    working = [step.endpoint for step in plan.steps if step.reason != "cooldown"]
    for place, first in enumerate(working):
        for second in working[place + 1 :]:
            if (waits := [latency(each, health) for each in (first, second)]).count(None):
                continue
            is_worse = total(first) >= total(second) and waits[0] >= waits[1]
            assert not is_worse or (total(first), waits[0]) == (total(second), waits[1])


def latency(each: Endpoint, health: Health) -> float | None:
    return health.first_content((each.provider, each.upstream_model), NOW)
