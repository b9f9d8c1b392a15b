from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.config.values import InvalidValue, parse_base_url
from hoberproxy.routing.catalog import (
    DEFAULT_CREATED,
    NO_ADAPTATION,
    Abilities,
    Adaptation,
    Catalog,
    Endpoint,
    Model,
    Prices,
    Provider,
)


def model(slug: str, *names: str, **fields: Any) -> Model:
    endpoints = tuple(Endpoint("p", name) for name in names or (slug,))
    return Model(slug, fields.pop("endpoints", endpoints), **fields)


def priced(*prices: tuple[str, str] | None) -> Model:
    endpoints = tuple(
        Endpoint("p", str(i), prices=Prices(*map(Decimal, price)) if price else None)
        for i, price in enumerate(prices)
    )
    return Model("m", endpoints)


CATALOG = Catalog(
    [
        model("openai/*", "*"),
        model("openai/ft/*", "ft-*", "*@2"),
        model("openai/gpt-4o", "gpt-4o-2024"),
        model("plain"),
        model("router/*", "*"),
    ]
)


def test_an_exact_slug_wins_over_a_wildcard() -> None:
    found = CATALOG.find("openai/gpt-4o")
    assert found is not None
    assert found.endpoints[0].upstream_model == "gpt-4o-2024"


def test_a_wildcard_fills_in_the_rest_of_the_slug() -> None:
    found = CATALOG.find("openai/o3")
    assert found is not None
    assert (found.slug, found.endpoints[0].upstream_model) == ("openai/o3", "o3")


def test_the_longest_wildcard_wins_and_fills_in_every_endpoint() -> None:
    found = CATALOG.find("openai/ft/a/b")
    assert found is not None
    assert [each.upstream_model for each in found.endpoints] == ["ft-a/b", "a/b@2"]


def test_the_rest_may_hold_slashes() -> None:
    found = CATALOG.find("router/deepseek/deepseek-chat")
    assert found is not None
    assert found.endpoints[0].upstream_model == "deepseek/deepseek-chat"


@pytest.mark.parametrize(
    "slug",
    [
        pytest.param("nothing/like-it", id="no-entry"),
        pytest.param("openai", id="prefix-without-slash"),
        pytest.param("openai/", id="empty-rest"),
        pytest.param("openai/*", id="the-pattern-itself"),
        pytest.param("openai/a*", id="a-star-in-the-rest"),
        pytest.param("openai/a\r\nx: y", id="line-break"),
        pytest.param("openai/a b", id="space"),
        pytest.param("openai/é", id="not-ascii"),
        pytest.param("openai/" + "a" * 256, id="too-long"),
        pytest.param("", id="empty"),
        pytest.param("/", id="slash"),
        pytest.param("plain/x", id="below-an-exact-slug"),
    ],
)
def test_no_entry_serves(slug: str) -> None:
    assert CATALOG.find(slug) is None


@given(st.text())
def test_any_slug_is_answered(slug: str) -> None:
    found = CATALOG.find("openai/" + slug)
    assert found is None or found.slug == "openai/" + slug


def test_a_model_of_a_wildcard_has_the_abilities_and_changes_of_its_endpoint() -> None:
    endpoint = Endpoint("p", "*", weight=2.0, abilities=ABLE, adaptation=CHANGED)
    found = Catalog([Model("a/*", (endpoint,))]).find("a/b")
    assert found is not None
    assert found.endpoints == (replace(endpoint, upstream_model="b"),)


def test_a_slug_asked_for_again_gives_the_same_object() -> None:
    assert CATALOG.find("openai/again") is CATALOG.find("openai/again")


def test_slugs_that_clients_make_up_do_not_fill_memory() -> None:
    catalog = Catalog([model("openai/*", "*")])
    for number in range(Catalog.CACHE_SIZE + 50):
        assert catalog.find(f"openai/{number}") is not None
    assert len(catalog._filled) == Catalog.CACHE_SIZE


def test_the_listing_has_the_form_and_order_of_the_contract() -> None:
    endpoint = Endpoint("p", "x", 131072, prices=Prices(Decimal("0.14"), Decimal("0.28")))
    catalog = Catalog([Model("deepseek/v3", (endpoint,), "deepseek"), model("openai/*", "*")])
    assert catalog.listing({"p": ["gpt-x"]}) == [
        {
            "id": "deepseek/v3",
            "object": "model",
            "created": 1709000000,
            "owned_by": "deepseek",
            "context_length": 131072,
            "free": False,
            "pricing": {"prompt": "0.00000014", "completion": "0.00000028"},
        },
        {
            "id": "openai/gpt-x",
            "object": "model",
            "created": DEFAULT_CREATED,
            "owned_by": "hoberproxy",
            "context_length": None,
            "free": False,
            "pricing": {"prompt": "0", "completion": "0"},
        },
    ]


def ids(catalog: Catalog, **listed: list[str]) -> list[str]:
    found = [entry["id"] for entry in catalog.listing(listed)]
    for slug in found:
        assert catalog.find(slug) is not None, "what is listed can be asked for"
        assert catalog.describe(slug) == next(e for e in catalog.listing(listed) if e["id"] == slug)
    return found


def wild(slug: str, *endpoints: tuple[str, str]) -> Model:
    return Model(slug, tuple(Endpoint(provider, name) for provider, name in endpoints))


def test_a_wildcard_is_no_model_of_the_listing() -> None:
    catalog = Catalog([wild("a/*", ("p", "*")), wild("b", ("p", "b"))])
    assert ids(catalog) == ["b"]
    assert catalog.describe("a/*") is None


def test_in_a_wildcards_place_stand_the_models_of_its_providers() -> None:
    catalog = Catalog(
        [
            wild("first", ("p", "x")),
            wild("a/*", ("p", "*"), ("q", "*")),
            wild("a/own", ("p", "own")),
            wild("b/*", ("q", "org/*-chat")),
            wild("c/*", ("silent", "*")),
        ]
    )
    listed = {"p": ["m1", "own", "deep/m2", "m1"], "q": ["m1", "org/y-chat", "org/z", "org/-chat"]}
    assert ids(catalog, **listed) == [
        "first",
        *("a/m1", "a/deep/m2", "a/org/y-chat", "a/org/z", "a/org/-chat"),
        "a/own",
        "b/y",
    ]


def test_what_cannot_be_asked_for_under_a_slug_is_not_listed() -> None:
    catalog = Catalog([wild("a/*", ("p", "*"))])
    names = ["", "a b", "é", "x*", "*", "y" * 300, "m:nitro", "m:floor", "line\nbreak", "m:free"]
    assert ids(catalog, p=names) == ["a/m:free"]


def test_what_a_longer_wildcard_serves_is_not_listed_of_a_shorter() -> None:
    catalog = Catalog([wild("a/*", ("p", "*")), wild("a/b/*", ("q", "*"))])
    assert ids(catalog, p=["b/c", "d"], q=["e"]) == ["a/d", "a/b/e"]


def test_models_of_a_wildcard_have_its_owner_price_and_length() -> None:
    endpoint = Endpoint("p", "*", 1000, prices=Prices(Decimal(1), Decimal(2)))
    catalog = Catalog([Model("a/*", (endpoint,), "owner", 7)])
    (entry,) = catalog.listing({"p": ["m"]})
    assert entry["id"] == "a/m"
    assert (entry["owned_by"], entry["created"], entry["context_length"]) == ("owner", 7, 1000)
    assert entry["pricing"] == {"prompt": "0.000001", "completion": "0.000002"}


@pytest.mark.parametrize(
    ("per_million", "per_token"),
    [
        ("0.14", "0.00000014"),
        ("0", "0"),
        ("0.000", "0"),
        ("1000000", "1"),
        ("10000000", "10"),
        ("1E+7", "10"),
        ("2.50", "0.0000025"),
        ("0.000000000001", "0.000000000000000001"),
        ("1234567.123456789012", "1.234567123456789012"),
    ],
)
def test_prices_are_exact_and_without_exponent(per_million: str, per_token: str) -> None:
    entry = Catalog([priced((per_million, "0"))]).listing()[0]
    assert entry["pricing"]["prompt"] == per_token


@given(st.decimals(0, 9999999, places=12))
def test_a_million_tokens_cost_what_the_config_says(price: Decimal) -> None:
    listed = Catalog([priced((str(price), "1"))]).listing()[0]["pricing"]["prompt"]
    assert Decimal(listed) * 1_000_000 == price
    assert "e" not in listed.lower()


@pytest.mark.parametrize(
    ("prices", "prompt", "completion", "free"),
    [
        pytest.param([("3", "1"), ("1", "2")], "0.000001", "0.000002", False, id="lowest-sum"),
        pytest.param([None, ("1", "2")], "0.000001", "0.000002", False, id="unknown-passed-over"),
        pytest.param([None], "0", "0", False, id="unknown-is-not-free"),
        pytest.param([("0", "0"), ("1", "1")], "0", "0", True, id="free"),
        pytest.param([("0", "1")], "0", "0.000001", False, id="half-free"),
    ],
)
def test_the_cheapest_endpoint_is_shown(
    prices: list[tuple[str, str] | None], prompt: str, completion: str, free: bool
) -> None:
    entry = Catalog([priced(*prices)]).listing()[0]
    assert entry["pricing"] == {"prompt": prompt, "completion": completion}
    assert entry["free"] is free


def test_the_largest_known_context_is_shown() -> None:
    endpoints = (Endpoint("p", "a", 8), Endpoint("q", "a", 32), Endpoint("r", "a"))
    entry = Catalog([Model("m", endpoints, context_length=16)]).listing()[0]
    assert entry["context_length"] == 32


def test_a_model_is_described_by_slug_and_through_a_wildcard() -> None:
    for slug in ("plain", "openai/o3"):
        entry = CATALOG.describe(slug)
        assert entry is not None
        assert entry["id"] == slug
    assert CATALOG.describe("nothing") is None


ABLE = Abilities(tools=True, vision=False, parameters=frozenset(("seed",)))
CHANGED = Adaptation((("a", "b"),), frozenset(("c",)), (("d", b"1"),), (("developer", "system"),))


def test_what_says_nothing_leaves_the_defaults_as_they_are() -> None:
    assert Abilities().over(ABLE) == ABLE == ABLE.over(Abilities())
    assert Adaptation().over(CHANGED) == CHANGED == CHANGED.over(Adaptation())
    assert ABLE.over(ABLE) == ABLE
    assert CHANGED.over(CHANGED) == CHANGED


def test_no_changes_at_all_are_one_object() -> None:
    stays = Adaptation(rename=(("a", "a"), ("c", "c"), ("d", "d")), roles=(("tool", "tool"),))
    assert Adaptation().over(Adaptation()) is NO_ADAPTATION
    assert stays.over(Adaptation(CHANGED.rename, CHANGED.drop, CHANGED.set)) is NO_ADAPTATION


def test_false_and_an_empty_list_are_something_said() -> None:
    own = Abilities(tools=False, parameters=frozenset())
    assert own.over(ABLE) == Abilities(tools=False, vision=False, parameters=frozenset())


@st.composite
def adaptations(draw: st.DrawFn) -> Adaptation:
    """Any that the config would take."""
    names = draw(st.permutations("abcdef"))
    cut = draw(st.integers(0, 2))
    pairs = [(names[2 * i], draw(st.sampled_from(names[2 * i : 2 * i + 2]))) for i in range(cut)]
    rest = names[2 * cut :]
    return Adaptation(
        rename=tuple(pairs),
        drop=frozenset(draw(st.sets(st.sampled_from(rest[:1])))),
        set=tuple((name, b"1") for name in draw(st.sets(st.sampled_from(rest[1:])))),
    )


@given(adaptations(), adaptations())
def test_what_two_tables_say_together_has_one_rule_for_a_name(
    own: Adaptation, default: Adaptation
) -> None:
    merged = own.over(default)
    spoken_of = [name for pair in merged.rename for name in pair]
    spoken_of += [*merged.drop, *(name for name, _ in merged.set)]
    assert len(spoken_of) == len(set(spoken_of))
    assert merged.names <= own.names | default.names
    # All of our own rules are in it, and of the default's those that speak of nothing of ours.
    assert {pair for pair in own.rename if pair[0] != pair[1]} <= set(merged.rename)
    assert own.drop <= merged.drop
    assert set(own.set) <= set(merged.set)
    if own.names.isdisjoint(default.names):
        assert default.drop <= merged.drop
        assert set(default.set) <= set(merged.set)


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("https://host/v1/", "host", "/v1/chat/completions"),
        ("HTTPS://Host:443", "host", "/chat/completions"),
        ("http://host:443/v1", "host:443", "/v1/chat/completions"),
        ("http://[::1]:8000/v1", "[::1]:8000", "/v1/chat/completions"),
        ("https://[2001:DB8::1]/a/b", "[2001:db8::1]", "/a/b/chat/completions"),
    ],
)
def test_a_base_url_leads_to_the_host_header_and_path(url: str, authority: str, path: str) -> None:
    provider = Provider("p", *parse_base_url(url))
    assert (provider.authority, provider.chat_path) == (authority, path)


@given(st.text())
def test_no_text_breaks_the_parser_of_urls(text: str) -> None:
    for url in (text, "https://" + text):
        try:
            parse_base_url(url)
        except InvalidValue:
            pass


def test_a_provider_does_not_show_its_key_or_headers() -> None:
    provider = Provider("p", "https", "h", 443, "", "sk-secret", (("x-key", "secret-2"),))
    assert "secret" not in repr(provider)
