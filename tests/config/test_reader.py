from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.config.reader import parse_config
from hoberproxy.config.settings import (
    Address,
    Config,
    KeySettings,
    LogSettings,
    RecordSettings,
    RoutingSettings,
    ServerSettings,
)
from hoberproxy.config.source import read_example
from hoberproxy.config.values import ConfigError
from hoberproxy.routing.catalog import (
    Abilities,
    Adaptation,
    Endpoint,
    Model,
    Prices,
    Provider,
    TimeLimits,
)

SETTINGS = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
SECRET = "sk-hunter2"
EXAMPLE = read_example()
ENVIRON = {"DEEPSEEK_API_KEY": SECRET, "EXAMPLE_API_KEY": SECRET, "EMPTY": " ", "BAD": "a b"}

PROVIDER = '[providers.p]\nbase_url = "https://host/v1"\n'
MODEL = '[[models]]\nslug = "m"\nendpoints = [{ provider = "p" }]\n'


# What test_an_endpoints_own_rules_win_name_by_name starts from.
ABCD = Adaptation((("a", "b"),), frozenset("c"), (("d", b"1"),), (("developer", "system"),))
JSON_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda below: st.lists(below) | st.dictionaries(st.text(), below),
    max_leaves=8,
)


def read_file(path: str) -> str:
    files = {
        "key": SECRET + "\n",
        "empty": "\n",
        "lines": "hunter2\nhunter2\n",
        "ca.pem": "-----BEGIN CERTIFICATE-----\n",
    }
    if path == "binary":
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "hunter2")
    if path not in files:
        raise FileNotFoundError(2, "No such file or directory", path)
    return files[path]


def parse(text: str, environ: Mapping[str, str] = ENVIRON) -> Config:
    return parse_config(text, environ=environ, read_file=read_file)


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "hunter2" not in str(caught.value)
    for problem in caught.value.problems:
        assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+", problem), problem
    return list(caught.value.problems)


def paths_of(text: str) -> list[str]:
    return [problem.partition(": expected ")[0] for problem in problems_of(text)]


def provider(lines: str) -> Provider:
    return parse(PROVIDER + lines + "\n" + MODEL).providers["p"]


def endpoint(lines: str, at_provider: str = "", slug: str = "m") -> Endpoint:
    head = f'{PROVIDER}{at_provider}\n[[models]]\nslug = "{slug}"\n[[models.endpoints]]\n'
    return parse(f'{head}provider = "p"\n{lines}\n').models[0].endpoints[0]


def model(lines: str) -> Model:
    return parse(f"{PROVIDER}[[models]]\n{lines}\n").models[0]


# What is read


def test_the_least_config_has_every_default() -> None:
    config = parse(PROVIDER + MODEL)
    assert config == Config(
        server=ServerSettings(),
        keys=KeySettings(),
        records=RecordSettings(),
        log=LogSettings(),
        providers={"p": Provider("p", "https", "host", 443, "/v1")},
        models=(Model("m", (Endpoint("p", "m"),)),),
        routing=RoutingSettings(max_attempts=6, attempts_timeout=900.0),
    )


def test_the_example_parses() -> None:
    config = parse(EXAMPLE)
    assert set(config.providers) == {"deepseek", "example"}
    assert config.models[0].endpoints[0].prices == Prices(Decimal("0.14"), Decimal("0.28"))


def test_what_the_example_has_commented_out_are_the_defaults() -> None:
    in_full = re.sub(r"(?m)^#(?! )", "", EXAMPLE)
    assert in_full != EXAMPLE
    assert parse(in_full) == parse(EXAMPLE)


def test_server_settings_are_read() -> None:
    text = """[server]
    listen = ["127.0.0.1:0", "[::1]:8080"]
    metrics_listen = "off"
    max_body_bytes = 1024
    max_body_memory = 4096
    head_timeout = 1
    body_timeout = 2.5
    keepalive_timeout = 3
    write_timeout = 4
    drain_timeout = 0
    comment_after = 0
    cors_origins = ["https://Chat.example.com", "app://notes.example", "*"]
    [keys]
    required = false
    [records]
    file = "/var/lib/r.db"
    [routing]
    max_attempts = 2
    attempts_timeout = 30
    [log]
    level = "debug"
    access = false
    format = "json"
    """
    config = parse(text + PROVIDER + MODEL)
    assert config.server == ServerSettings(
        listen=(Address("127.0.0.1", 0), Address("::1", 8080)),
        metrics_listen=None,
        max_body_bytes=1024,
        max_body_memory=4096,
        head_timeout=1.0,
        body_timeout=2.5,
        keepalive_timeout=3.0,
        write_timeout=4.0,
        drain_timeout=0.0,
        comment_after=0.0,
        cors_origins=("https://chat.example.com", "app://notes.example", "*"),
    )
    assert type(config.server.head_timeout) is type(config.server.body_timeout) is float
    assert (config.keys, config.records) == (KeySettings(False), RecordSettings("/var/lib/r.db"))
    assert config.log == LogSettings("debug", False, "json")
    assert config.routing == RoutingSettings(2, 30.0)


def test_listen_may_be_one_address() -> None:
    config = parse('[server]\nlisten = "0.0.0.0:80"\n' + PROVIDER + MODEL)
    assert config.server.listen == (Address("0.0.0.0", 80),)


def test_a_provider_is_read() -> None:
    assert provider(
        """
        api_key_file = "key"
        headers = { X-Title = "a b" }
        forward_headers = ["X-Session"]
        response_headers = ["X-Cache"]
        stream_options = false
        ca_file = "ca.pem"
        keepalive = 0
        max_idle_connections = 5
        [providers.p.limits]
        connect = 1
        idle = 2.5
        """
    ) == Provider(
        name="p",
        scheme="https",
        host="host",
        port=443,
        path="/v1",
        api_key=SECRET,
        headers=(("X-Title", "a b"),),
        limits=TimeLimits(connect=1.0, idle=2.5),
        stream_options=False,
        ca_file="ca.pem",
        forward_headers=("x-session",),
        response_headers=("x-cache",),
        keepalive=0.0,
        max_idle_connections=5,
    )


def test_a_preset_brings_address_key_and_quirks() -> None:
    config = parse('[providers.main]\npreset = "mistral"\n' + MODEL.replace('"p"', '"main"'),
                   {"MISTRAL_API_KEY": "k"})  # fmt: skip
    main = config.providers["main"]
    assert (main.host, main.path, main.api_key) == ("api.mistral.ai", "/v1", "k")
    assert main.stream_options is False


def test_what_is_set_beside_a_preset_wins() -> None:
    text = """[providers.p]
    preset = "mistral"
    base_url = "http://127.0.0.1:9/v2"
    api_key_file = "key"
    stream_options = true
    """
    p = parse(text + MODEL, {"MISTRAL_API_KEY": "k"}).providers["p"]
    assert (p.authority, p.path, p.api_key, p.stream_options) == (
        "127.0.0.1:9", "/v2", SECRET, True,
    )  # fmt: skip


def test_a_local_preset_takes_its_url_from_the_environment_or_its_default() -> None:
    text = '[providers.p]\npreset = "ollama"\n' + MODEL
    assert parse(text, {}).providers["p"].authority == "127.0.0.1:11434"
    assert parse(text, {"OLLAMA_HOST": "gpu-box"}).providers["p"].authority == "gpu-box:11434"


def test_an_endpoint_is_read() -> None:
    assert model(
        """slug = "lab/m"
        owned_by = "the lab"
        created = 5
        context_length = 8192
        [[models.endpoints]]
        provider = "p"
        model = "m v1"
        context_length = 4096
        max_output = 512
        price = { prompt = "0.1", completion = 0.30 }
        limits = { first_content = 7 }
        weight = 2.5
        tools = true
        json_mode = true
        json_schema = false
        vision = false
        parameters = ["tools", "top_k"]
        rename = { max_tokens = "max_completion_tokens" }
        drop = ["user", "logit_bias"]
        set = { top_k = 40 }
        roles = { developer = "system" }
        """
    ) == Model(
        slug="lab/m",
        owned_by="the lab",
        created=5,
        context_length=8192,
        endpoints=(
            Endpoint(
                provider="p",
                upstream_model="m v1",
                context_length=4096,
                max_output=512,
                prices=Prices(Decimal("0.1"), Decimal("0.30")),
                limits=TimeLimits(first_content=7.0),
                weight=2.5,
                abilities=Abilities(True, True, False, False, frozenset(("tools", "top_k"))),
                adaptation=Adaptation(
                    rename=(("max_tokens", "max_completion_tokens"),),
                    drop=frozenset(("user", "logit_bias")),
                    set=(("top_k", b"40"),),
                    roles=(("developer", "system"),),
                ),
            ),
        ),
    )


def test_limits_of_an_endpoint_are_the_providers_where_they_say_nothing() -> None:
    text = PROVIDER + "limits = { connect = 1, idle = 2 }\n" + MODEL
    endpoint = parse(text.replace('"p" }', '"p", limits = { idle = 3 } }')).models[0].endpoints[0]
    assert endpoint.limits == TimeLimits(connect=1.0, idle=3.0)


def test_what_a_provider_says_of_its_endpoints_reaches_them() -> None:
    said = """tools = true
    parameters = []
    rename = { a = "b" }
    drop = ["c"]
    set = { d = 1 }
    roles = { tool = "function" }"""
    p = provider(said)
    assert p.abilities == Abilities(tools=True, parameters=frozenset())
    assert p.adaptation == Adaptation(
        (("a", "b"),), frozenset("c"), (("d", b"1"),), (("tool", "function"),)
    )
    for slug in ("m", "p/*"):
        e = endpoint("", said, slug)
        assert (e.abilities, e.adaptation) == (p.abilities, p.adaptation)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        pytest.param("", ABCD, id="nothing"),
        pytest.param(
            'rename = { x = "y" }\ndrop = ["u"]\nset = { z = 2 }\nroles = { tool = "user" }',
            Adaptation(
                (("a", "b"), ("x", "y")),
                frozenset("cu"),
                (("d", b"1"), ("z", b"2")),
                (("developer", "system"), ("tool", "user")),
            ),
            id="rules-for-other-names-stand-beside",
        ),
        pytest.param(
            'rename = { a = "f" }', replace(ABCD, rename=(("a", "f"),)), id="the-same-renamed"
        ),
        pytest.param(
            'rename = { f = "b" }', replace(ABCD, rename=(("f", "b"),)), id="another-onto-the-same"
        ),
        pytest.param(
            'rename = { b = "f" }', replace(ABCD, rename=(("b", "f"),)), id="no-chain-comes-about"
        ),
        pytest.param('rename = { a = "a" }', replace(ABCD, rename=()), id="renamed-to-itself"),
        pytest.param(
            'rename = { c = "c" }', replace(ABCD, drop=frozenset()), id="kept-not-dropped"
        ),
        pytest.param('rename = { d = "d" }', replace(ABCD, set=()), id="left-not-set"),
        pytest.param(
            'drop = ["a", "d"]',
            replace(ABCD, rename=(), drop=frozenset("acd"), set=()),
            id="dropped-instead",
        ),
        pytest.param(
            "set = { b = 5, c = 6, d = 7 }",
            Adaptation(
                set=(("b", b"5"), ("c", b"6"), ("d", b"7")), roles=(("developer", "system"),)
            ),
            id="set-instead",
        ),
        pytest.param(
            'roles = { developer = "user" }',
            replace(ABCD, roles=(("developer", "user"),)),
            id="another-role",
        ),
        pytest.param(
            'roles = { developer = "developer" }', replace(ABCD, roles=()), id="role-as-it-is"
        ),
    ],
)
def test_an_endpoints_own_rules_win_name_by_name(own: str, expected: Adaptation) -> None:
    defaults = """rename = { a = "b" }
    drop = ["c"]
    set = { d = 1 }
    roles = { developer = "system" }"""
    assert endpoint(own, defaults).adaptation == expected


def test_an_endpoints_own_abilities_win_name_by_name() -> None:
    own = 'vision = true\nparameters = ["b"]\naccepts = ["tool_choice=any"]'
    defaults = 'tools = true\nvision = false\nparameters = ["a"]\naccepts = ["max_tokens=-1"]'
    assert endpoint(own, defaults).abilities == Abilities(
        tools=True,
        vision=True,
        parameters=frozenset("b"),
        accepts=frozenset(["tool_choice=any"]),
    )


@pytest.mark.parametrize("value", ["any", "tool_choice", "max_tokens=-2", "temperature=3", "n=a b"])
def test_what_an_endpoint_accepts_is_a_member_and_a_value(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        provider(f'accepts = ["{value}"]')
    (problem,) = caught.value.problems
    assert "providers.p.accepts[0]: expected a member and a value" in problem


def test_a_preset_brings_abilities_and_adaptations_that_settings_override() -> None:
    def wildcard_of(text: str, variable: str) -> Endpoint:
        config = parse(f"[providers.p]\n{text}\n" + MODEL, {variable: "k"})
        return config.models[0].endpoints[0]

    openai = wildcard_of('preset = "openai"', "OPENAI_API_KEY")
    assert openai.adaptation.rename == (("max_tokens", "max_completion_tokens"),)
    old = wildcard_of('preset = "openai"\nrename = { max_tokens = "max_tokens" }', "OPENAI_API_KEY")
    assert old.adaptation == Adaptation()
    deepseek = wildcard_of('preset = "deepseek"\nvision = false', "DEEPSEEK_API_KEY")
    known = frozenset(["content=null"])
    assert deepseek.abilities == Abilities(json_schema=False, vision=False, accepts=known)
    none = wildcard_of('preset = "deepseek"\naccepts = []', "DEEPSEEK_API_KEY")
    assert none.abilities.accepts == frozenset()
    assert deepseek.adaptation.roles == (("developer", "system"),)


@pytest.mark.parametrize(
    ("toml", "text"),
    [
        ("true", b"true"),
        ("-5", b"-5"),
        ("0x10", b"16"),
        ("18446744073709551615", b"18446744073709551615"),
        ("1.50", b"1.50"),
        ("0.1000000000000000000000001", b"0.1000000000000000000000001"),
        ("1e-7", b"1E-7"),
        ("-0.0", b"-0.0"),
        ("1_000.5", b"1000.5"),
        ('"a\\n\\"é"', rb'"a\n\"\u00e9"'),
        ("[]", b"[]"),
        ("{}", b"{}"),
        ('[1, 2.0, "a", [true], { b = { "c d" = 1 } }]', b'[1,2.0,"a",[true],{"b":{"c d":1}}]'),
    ],
)
def test_a_value_that_is_set_is_json_with_the_digits_written(toml: str, text: bytes) -> None:
    assert endpoint(f"set = {{ x = {toml} }}").adaptation.set == (("x", text),)


@given(JSON_VALUES)
def test_any_json_value_can_be_set(value: Any) -> None:
    place = tomllib.loads(PROVIDER + MODEL)
    place["providers"]["p"]["set"] = {"x": value}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", lambda text, parse_float: place)
        ((_, text),) = parse("").providers["p"].adaptation.set
    assert json.loads(text) == value


def test_a_wildcard_fills_in_the_whole_rest_by_default() -> None:
    endpoints = model('slug = "openai/*"\nendpoints = [{ provider = "p" }]').endpoints
    assert endpoints[0].upstream_model == "*"


def test_every_part_of_usage_can_have_a_price() -> None:
    price = (
        'price = { prompt = 1, completion = "2", cached = "0.1", cache_write = "1.25", '
        "reasoning = 3, request = 0.01 }"
    )
    (endpoint,) = model(f'slug = "m"\nendpoints = [{{ provider = "p", {price} }}]').endpoints
    assert endpoint.prices == Prices(
        prompt=Decimal(1),
        completion=Decimal(2),
        cached=Decimal("0.1"),
        reasoning=Decimal(3),
        request=Decimal("0.01"),
        cache_write=Decimal("1.25"),
    )


def test_a_price_is_free_only_when_said() -> None:
    free = model('slug = "m"\nendpoints = [{ provider = "p", price = {} }]').endpoints[0].prices
    assert free is not None
    assert free.is_free
    assert model('slug = "m"\nendpoints = [{ provider = "p" }]').endpoints[0].prices is None


@pytest.mark.parametrize(
    "slug", ["llama3.2:3b", "x:free", "nitro", "a/b/c", "a/b/*", "hober/other", "@cf/a~b"]
)
def test_any_other_colon_or_slash_belongs_to_the_slug(slug: str) -> None:
    assert model(f'slug = "{slug}"\nendpoints = [{{ provider = "p" }}]').slug == slug


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse("\ufeff" + PROVIDER + MODEL).models


@pytest.mark.parametrize(
    ("address", "text", "loopback"),
    [
        (Address("127.0.0.1", 1), "127.0.0.1:1", True),
        (Address("::1", 2), "[::1]:2", True),
        (Address("localhost", 3), "localhost:3", True),
        (Address("0.0.0.0", 4), "0.0.0.0:4", False),
        (Address("::", 5), "[::]:5", False),
        (Address("localhost.example.com", 6), "localhost.example.com:6", False),
    ],
)
def test_an_address_is_shown_and_known_as_loopback(
    address: Address, text: str, loopback: bool
) -> None:
    assert (str(address), address.is_loopback) == (text, loopback)


# What is refused


def case(path: str, text: str, says: str = "", id: str | None = None) -> Any:
    return pytest.param(path, text, says, id=id or path)


def server(lines: str) -> str:
    return f"[server]\n{lines}\n{PROVIDER}{MODEL}"


def at_provider(lines: str) -> str:
    return PROVIDER + lines + "\n" + MODEL


def at_url(url: str) -> str:
    return f'[providers.p]\nbase_url = "{url}"\n{MODEL}'


def at_model(lines: str) -> str:
    return f'{PROVIDER}[[models]]\n{lines}\nendpoints = [{{ provider = "p" }}]\n'


def at_endpoint(members: str, slug: str = "m") -> str:
    return f'{PROVIDER}[[models]]\nslug = "{slug}"\nendpoints = [{{ {members} }}]\n'


def at_routing(lines: str) -> str:
    return f"[routing]\n{lines}\n{PROVIDER}{MODEL}"


ENDPOINT = "models[0].endpoints[0]"

REFUSED = [
    case("line 2", 'x = "hunter2"\n[server', id="broken-toml"),
    case("line 1", "x = hunter2", id="value-without-quotes"),
    case("file", "x = " + "[" * 9999, id="endless-nesting"),
    case("file", "x = " + "9" * 9999, id="endless-number"),
    case("providers", MODEL, id="no-providers"),
    case("models", PROVIDER, id="no-models"),
    case("models", "models = []\n" + PROVIDER, id="empty-models"),
    case("models", "models = 5\n" + PROVIDER, "an array of tables", id="models-are-no-array"),
    case("models[0]", "models = [5]\n" + PROVIDER, "a table", id="a-model-is-no-table"),
    case("providers.p", "[providers]\np = 5\n" + MODEL, "a table", id="a-provider-is-no-table"),
    case("server", "server = 5\n" + PROVIDER + MODEL, id="a-section-is-no-table"),
    case("sever", "[sever]\n" + PROVIDER + MODEL, 'did you mean "server"?'),
    case("server.lisen", server("lisen = 1"), 'did you mean "listen"?'),
    case("server.trusted_proxies", server("trusted_proxies = []"), "limit_conn in the front proxy"),
    case(
        "server.max_connections_per_address",
        server("max_connections_per_address = 9"),
        "limit_conn in the front proxy",
    ),
    case("keys.x", "[keys]\nx = 1\n" + PROVIDER + MODEL, "known here: required"),
    case("providers.p.base_ur", at_provider("base_ur = 1"), 'did you mean "base_url"?'),
    case("providers.p.limits.idel", at_provider("limits.idel = 1"), 'did you mean "idle"?'),
    case("models[0].slugs", at_model('slug = "m"\nslugs = 1'), 'did you mean "slug"?'),
    case(f"{ENDPOINT}.modle", at_endpoint('provider = "p", modle = 1'), '"model"'),
    case(f"{ENDPOINT}.price.promt", at_endpoint('provider = "p", price.promt = 1'), '"prompt"'),
    case('server."a b"', server('"a b" = 1')),
    case("server.listen", server("listen = 8080"), id="listen-number"),
    case("server.listen", server("listen = []"), id="listen-nowhere"),
    case("server.listen", server('listen = "8080"'), id="listen-port-alone"),
    case("server.listen", server('listen = ":8080"'), id="listen-without-host"),
    case("server.listen", server('listen = "::1:8080"'), id="listen-ipv6-without-brackets"),
    case("server.listen", server('listen = "300.0.0.1:8080"'), id="listen-no-ip"),
    case("server.listen[1]", server('listen = ["h:1", "h:65536"]'), "65536", id="listen-port"),
    case("server.listen", server('listen = ["h:1", "h:1"]'), "h:1 twice", id="listen-twice"),
    case("server.metrics_listen", server('metrics_listen = "none"'), id="metrics-nowhere"),
    case("server.metrics_listen", server('metrics_listen = "127.0.0.1:8080"'), id="metrics-same"),
    case("server.max_body_bytes", server("max_body_bytes = true"), "an integer", id="bool-no-int"),
    case("server.max_body_bytes", server("max_body_bytes = 1023"), "got 1023", id="int-low"),
    case("server.max_body_bytes", server("max_body_bytes = 1e6"), "an integer", id="float-no-int"),
    case("server.max_body_bytes", server("max_body_bytes = 0x" + "f" * 9999), id="int-huge"),
    case("server.head_timeout", server("head_timeout = 0"), "got 0", id="no-time-at-all"),
    case("server.head_timeout", server("head_timeout = -1"), "got -1", id="time-negative"),
    case("server.head_timeout", server("head_timeout = 86400.1"), "86400", id="over-a-day"),
    case("server.head_timeout", server("head_timeout = true"), "got true", id="bool-no-time"),
    case("server.head_timeout", server("head_timeout = nan"), "NaN", id="time-nan"),
    case("server.head_timeout", server("head_timeout = inf"), "Infinity", id="time-inf"),
    case("server.head_timeout", server('head_timeout = "10s"'), "unit", id="time-as-string"),
    case("server.head_timeout", server("head_timeout = 10:00:00"), "a date or", id="time-of-day"),
    case(
        "server.max_body_memory",
        server("max_body_memory = 5000"),
        "at least server.max_body_bytes (33554432)",
        id="memory-for-no-body",
    ),
    case("server.cors_origins", server('cors_origins = "*"'), "an array", id="origin-no-array"),
    case("server.cors_origins[0]", server('cors_origins = ["https://h/"]'), id="origin-path"),
    case("keys.required", "[keys]\nrequired = 0\n" + PROVIDER + MODEL, id="int-is-no-bool"),
    case(
        "keys.required",
        '[keys]\nrequired = false\n[server]\nlisten = ["127.0.0.1:1", "0.0.0.0:2"]\n'
        + PROVIDER + MODEL,
        "0.0.0.0:2",
        id="open-to-the-world",
    ),
    case("records.file", '[records]\nfile = ""\n' + PROVIDER + MODEL),
    case("log.level", '[log]\nlevel = "debu"\n' + PROVIDER + MODEL, 'did you mean "debug"?'),
    case("log.format", '[log]\nformat = "x"\n' + PROVIDER + MODEL, "auto, human, json"),
    case('providers."a b"', at_provider('[providers."a b"]\nbase_url = "http://h"')),
    case("providers.p.base_url", "[providers.p]\n" + MODEL, "got none", id="no-url"),
    case("providers.p.base_url", at_url("host/v1"), id="url-without-scheme"),
    case("providers.p.base_url", at_url("ftp://hunter2"), id="url-scheme"),
    case("providers.p.base_url", at_url("https://a:hunter2@h"), "user name", id="url-user"),
    case("providers.p.base_url", at_url("https://h/?key=hunter2"), "query", id="url-query"),
    case("providers.p.base_url", at_url("https://h/#hunter2"), "fragment", id="url-fragment"),
    case("providers.p.base_url", at_url("https://h:0"), id="url-port-0"),
    case("providers.p.base_url", at_url("https://h:65536"), "65536", id="url-port-high"),
    case("providers.p.base_url", at_url("https://h:x"), id="url-port-word"),
    case("providers.p.base_url", at_url("https:///v1"), id="url-without-host"),
    case("providers.p.base_url", at_url("https://[::g]"), id="url-ipv6"),
    case("providers.p.base_url", at_url("https://h/a\\r\\nb"), id="url-line-break"),
    case("providers.p.base_url", at_url("https://h/v1/chat/completions"), id="url-of-a-call"),
    case("providers.p.api_key", at_provider(f'api_key = "{SECRET}"'), "api_key_env"),
    case("providers.p.api_key_env", at_provider('api_key_env = "UNSET_1"'), "UNSET_1"),
    case("providers.p.api_key_env", at_provider('api_key_env = "EMPTY"'), id="variable-empty"),
    case("providers.p.api_key_env", at_provider('api_key_env = "BAD"'), "space", id="key-space"),
    case("providers.p.api_key_env", at_provider(f'api_key_env = "{SECRET}"'), id="key-as-name"),
    case(
        "providers.p.api_key_env",
        at_provider('api_key_env = "EXAMPLE_API_KEY"\napi_key_file = "key"'),
        id="two-keys",
    ),
    case("providers.p.api_key_file", at_provider('api_key_file = "hunter2"'), "no such file"),
    case("providers.p.api_key_file", at_provider('api_key_file = "empty"'), id="key-file-empty"),
    case("providers.p.api_key_file", at_provider('api_key_file = "lines"'), id="key-two-lines"),
    case("providers.p.api_key_file", at_provider('api_key_file = "binary"'), id="key-binary"),
    case("providers.p.ca_file", at_provider('ca_file = "gone"'), "no such file"),
    case("providers.p.ca_file", at_provider('ca_file = "key"'), "PEM", id="ca-without-one"),
    case("providers.p.preset", at_provider('preset = "deepsek"'), '"deepseek"'),
    case("providers.p.preset", at_provider('preset = "xai"'), "XAI_API_KEY", id="preset-no-key"),
    case("providers.p.headers.x-a", at_provider('headers.x-a = "\\r\\nhunter2"'), id="header-crlf"),
    case("providers.p.headers.x-a", at_provider('headers.x-a = "é"'), id="header-not-ascii"),
    case("providers.p.headers.x-a", at_provider("headers.x-a = 1"), id="header-number"),
    case('providers.p.headers."a b"', at_provider('headers."a b" = "1"')),
    case('providers.p.headers."x-\\u212a"', at_provider('headers."x-\u212a" = "1"')),
    case("providers.p.headers.X-A", at_provider('headers = { x-a = "1", X-A = "2" }')),
    *(
        case(f"providers.p.headers.{name}", at_provider(f'headers.{name} = "{SECRET}"'))
        for name in ("Authorization", "HOST", "Content-Length", "Connection", "te", "x-hober-a")
    ),
    *(
        case(
            "providers.p.forward_headers[1]",
            at_provider(f'forward_headers = ["x-a", "{name}"]'),
            name.lower(),
            id=f"forward-{name}",
        )
        for name in ("Authorization", "Cookie", "X-Forwarded-For", "OpenAI-Organization", "Upgrade")
    ),
    case("providers.p.forward_headers[0]", at_provider("forward_headers = [5]"), id="forward-5"),
    case(
        "providers.p.forward_headers",
        at_provider('headers.X-A = "1"\nforward_headers = ["x-a"]'),
        id="forward-and-set",
    ),
    case("providers.p.response_headers[0]", at_provider('response_headers = ["Set-Cookie"]')),
    case("providers.p.keepalive", at_provider("keepalive = -1")),
    case("providers.p.max_idle_connections", at_provider("max_idle_connections = -1")),
    case("providers.p.stream_options", at_provider('stream_options = "no"'), "true or false"),
    case("providers.p.limits.total", at_provider("limits.total = 0")),
    case("routing.max_attempts", at_routing("max_attempts = 0")),
    case("routing.attempts_timeout", at_routing("attempts_timeout = 0")),
    case("routing.max_atempts", at_routing("max_atempts = 1"), '"max_attempts"'),
    *(
        case(f"{ENDPOINT}.weight", at_endpoint(f'provider = "p", weight = {weight}'), id=name)
        for name, weight in {
            "weight-negative": "-1",
            "weight-nan": "nan",
            "weight-infinite": "inf",
            "weight-boolean": "true",
            "weight-text": '"hunter2"',
        }.items()
    ),
    case("providers.p.tools", at_provider("tools = 1"), "true or false"),
    case(f"{ENDPOINT}.vision", at_endpoint('provider = "p", vision = "yes"'), "true or false"),
    case("providers.p.parameters[1]", at_provider('parameters = ["a", "hunter2 hunter2"]')),
    *(
        case(
            "providers.p." + path.format(name),
            at_provider(rule.format(name)),
            f'"{name}"; take it out: ',
            id=f"{path.partition('[')[0].partition('.')[0]}-{'onto-' * ('{}' not in path)}{name}",
        )
        for path, rule in {
            "rename.{}": 'rename.{} = "x"',
            "rename.x": 'rename.x = "{}"',
            "drop[0]": 'drop = ["{}"]',
            "set.{}": "set.{} = 1",
        }.items()
        for name in "model models messages stream provider usage stream_options Model".split()
    ),
    case('providers.p.rename."a b"', at_provider('rename."a b" = "c"'), "max_tokens"),
    case("providers.p.rename.a", at_provider('rename.a = "hunter2 "'), id="rename-to-no-name"),
    case("providers.p.rename.a", at_provider("rename.a = 1"), "a string", id="rename-to-number"),
    case("providers.p.rename", at_provider('rename = "a"'), "a table"),
    *(
        case(f"providers.p.{path}", at_provider(rules), says, id=name)
        for name, path, rules, says in [
            ("rename-chain", "rename.a", 'rename = { a = "b", b = "c" }', '"b"'),
            ("rename-onto-one", "rename.b", 'rename = { a = "c", b = "c" }', '"c"'),
            ("rename-onto-kept", "rename.b", 'rename = { a = "a", b = "a" }', '"a"'),
            ("drop-renamed", "drop", 'drop = ["a"]\nrename.a = "b"', '"a"'),
            ("drop-new-name", "drop", 'drop = ["b"]\nrename.a = "b"', '"b"'),
            ("drop-and-set", "set.a", 'drop = ["a"]\nset.a = 1', "drop"),
            ("rename-and-set", "set.b", 'rename.a = "b"\nset.b = 1', "rename"),
        ]
    ),
    *(
        case("providers.p.set.a", at_provider(f"set.a = {value}"), says, id=f"set-{name}")
        for name, value, says in [
            ("date", "1979-05-27", "a date or time"),
            ("time-within", "[{ b = 07:32:00 }]", "a date or time"),
            ("nan", "nan", "NaN"),
            ("infinite", "[-inf]", "-Infinity"),
            ("beyond-64-bits", "18446744073709551616", "64 bits"),
            ("beyond-a-double", "1e400", "64 bits"),
            ("endless", "0x" + "f" * 9999, "64 bits"),
        ]
    ),
    case("providers.p.set.hunter3-", at_provider('set.hunter3- = 07:32:00'), id="set-name"),
    case("providers.p.roles.develop", at_provider('roles.develop = "user"'), '"developer"'),
    case("providers.p.roles.tool", at_provider('roles.tool = "hunter2"'), "known here: "),
    case(f"{ENDPOINT}.drop[0]", at_endpoint('provider = "p", drop = ["model"]'), "endpoint"),
    case("models[0].slug", at_model("owned_by = 'x'"), "got none", id="no-slug"),
    case("models[0].endpoints", PROVIDER + '[[models]]\nslug = "m"\n', id="no-endpoints"),
    *(
        case("models[0].slug", at_model(f'slug = "{slug}"'), id=f"slug-{name}")
        for name, slug in {
            "empty": "",
            "with-space": "a b",
            "not-ascii": "é",
            "with-line-break": "a\\nb",
            "too-long": "a" * 257,
            "star-alone": "*",
            "star-and-slash-alone": "/*",
            "star-without-slash": "a*",
            "star-in-the-middle": "a/*/b",
            "nitro": "a:nitro",
            "floor": "a/b:floor",
            "auto": "hober/auto",
            "auto-cost": "hober/auto:cost",
            "over-auto": "hober/*",
        }.items()
    ),
    case("models[1].slug", PROVIDER + MODEL + MODEL, "models[0]", id="slug-twice"),
    case("models[0].created", at_model('slug = "m"\ncreated = -1')),
    case("models[0].context_length", at_model('slug = "m"\ncontext_length = 0')),
    case("models[0].owned_by", at_model('slug = "m"\nowned_by = ""')),
    case(f"{ENDPOINT}.provider", at_endpoint("max_output = 1"), "got none", id="provider-none"),
    case(f"{ENDPOINT}.provider", at_endpoint('provider = "q"'), "known here: p", id="provider-q"),
    case(f"{ENDPOINT}.max_output", at_endpoint('provider = "p", max_output = 0')),
    case(f"{ENDPOINT}.limits.idle", at_endpoint('provider = "p", limits.idle = 0')),
    case(f"{ENDPOINT}.model", at_endpoint('provider = "p", model = ""'), id="upstream-model-empty"),
    case(f"{ENDPOINT}.model", at_endpoint('provider = "p", model = "*"'), id="star-not-wildcard"),
    case(f"{ENDPOINT}.model", at_endpoint('provider = "p", model = "x"', "a/*"), id="star-lacking"),
    case(
        "models[0].endpoints[1].provider",
        at_endpoint('provider = "p" }, { provider = "p", model = "m"'),
        ENDPOINT,
        id="endpoint-twice",
    ),
    *(
        case(
            f"{ENDPOINT}.price.prompt",
            at_endpoint(f'provider = "p", price.prompt = {price}'),
            id=f"price-{name}",
        )
        for name, price in {
            "negative": "-0.1",
            "negative-string": '"-0.1"',
            "nan": "nan",
            "infinite": '"Infinity"',
            "boolean": "true",
            "word": '"hunter2"',
            "too-fine": "1e-13",
            "far-too-fine": "1e-999999",
            "far-too-dear": "1e999999999999999",
            "other-digits": '"\u0661"',
        }.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "text", "says"), REFUSED)
def test_refused_at(path: str, text: str, says: str) -> None:
    problems = problems_of(text)
    (problem,) = [each for each in problems if each.startswith(f"{path}: ")]
    assert says in problem
    # Where a whole table is lacking, so are its members.
    assert len(problems) == 1 or path in ("providers", "providers.p", "models[0]")


def test_all_problems_are_told_at_once() -> None:
    text = """
    [server]
    listen = "x"
    head_timeout = 0
    oops = 1
    [providers.a]
    base_url = "x"
    [providers.b]
    base_url = "http://h"
    keepalive = "x"
    rename = { model = "x", a = "b", c = "b" }
    drop = ["b", "usage"]
    set = { a = 1, d = 07:32:00 }
    roles = { x = "y" }
    [[models]]
    slug = "a b"
    endpoints = [{ provider = "a" }, { provider = "zzz" }]
    """
    assert sorted(paths_of(text)) == [
        "models[0].endpoints[1].provider",
        "models[0].slug",
        "providers.a.base_url",
        "providers.b.drop",
        "providers.b.drop[1]",
        "providers.b.keepalive",
        "providers.b.rename.c",
        "providers.b.rename.model",
        "providers.b.roles.x",
        "providers.b.roles.x",
        "providers.b.set.a",
        "providers.b.set.d",
        "server.head_timeout",
        "server.listen",
        "server.oops",
    ]


def test_a_cycle_of_renames_is_refused_at_each_of_its_members() -> None:
    cycle = at_provider('rename = { a = "b", b = "a" }')
    assert paths_of(cycle) == ["providers.p.rename.a", "providers.p.rename.b"]


def test_a_broken_provider_is_still_known_to_endpoints() -> None:
    assert paths_of('[providers.p]\nbase_url = "x"\n' + MODEL) == ["providers.p.base_url"]


def test_bad_variables_of_a_preset_are_named_under_it() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('[providers.p]\npreset = "xai"\n' + MODEL, {"XAI_API_KEY": "hunter2 hunter2"})
    (problem,) = caught.value.problems
    assert problem.startswith("providers.p.preset: XAI_API_KEY: expected ")
    assert "hunter2" not in problem


def test_keys_are_not_in_the_repr_of_a_config() -> None:
    assert SECRET not in repr(parse(EXAMPLE))


@given(st.text())
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    for whole in (text, f"[server]\n{text}", EXAMPLE + text):
        try:
            parse(whole)
        except ConfigError:
            pass


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.text(), st.decimals(allow_nan=True)),
    lambda below: st.lists(below) | st.dictionaries(st.text(), below),
    max_leaves=5,
)


@given(st.data())
def test_any_type_in_any_place_is_a_config_error_or_fits(data: st.DataObject) -> None:
    tables = tomllib.loads(re.sub(r"(?m)^#(?! )", "", EXAMPLE), parse_float=Decimal)
    place: Any = tables
    for _ in range(6):
        key = data.draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
        )
        if data.draw(st.booleans()) or not isinstance(place[key], dict | list) or not place[key]:
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", lambda text, parse_float: tables)
        try:
            parse("")
        except ConfigError:
            pass


# Documentation


def known_names(section: str) -> list[str]:
    """What the reader knows in a table, as the advice for an unknown name lists it."""
    text = {
        "server": server("zzzzzzzz = 1"),
        "keys": "[keys]\nzzzzzzzz = 1\n" + PROVIDER + MODEL,
        "records": "[records]\nzzzzzzzz = 1\n" + PROVIDER + MODEL,
        "routing": at_routing("zzzzzzzz = 1"),
        "log": "[log]\nzzzzzzzz = 1\n" + PROVIDER + MODEL,
        "providers.NAME": at_provider("zzzzzzzz = 1"),
        "providers.NAME.limits": at_provider("limits.zzzzzzzz = 1"),
        "models": at_model('slug = "m"\nzzzzzzzz = 1'),
        "models.endpoints": at_endpoint('provider = "p", zzzzzzzz = 1'),
        "price": at_endpoint('provider = "p", price.zzzzzzzz = 1'),
    }[section]
    (problem,) = problems_of(text)
    return problem.partition("known here: ")[2].split(", ")


def documented(section: str) -> dict[str, str]:
    """Setting to default, of one table of docs/settings.md."""
    heading = rf"(?ms)^##+ `\[*{re.escape(section)}\]*`[^\n]*\n(.*?)(?=^##|\Z)"
    (body,) = re.findall(heading, SETTINGS)
    return dict(re.findall(r"(?m)^\| `(\w+)` \| (.*?) \|", body))


SECTIONS = {
    "server": ServerSettings,
    "keys": KeySettings,
    "records": RecordSettings,
    "routing": RoutingSettings,
    "log": LogSettings,
    "providers.NAME": Provider,
    "providers.NAME.limits": TimeLimits,
    "models": Model,
    "models.endpoints": Endpoint,
    "price": Prices,
}
# Fields that are set under other names.
SETTINGS_OF = {
    **{field: {"base_url"} for field in ("scheme", "host", "port", "path")},
    "api_key": {"api_key_env", "api_key_file"},
    "upstream_model": {"model"},
    "prices": {"price"},
    "abilities": {field.name for field in dataclasses.fields(Abilities)},
    "adaptation": {field.name for field in dataclasses.fields(Adaptation)},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_that_is_read_is_documented_and_no_other(section: str) -> None:
    assert set(documented(section)) == set(known_names(section))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_documented_setting(section: str) -> None:
    fields = {field.name for field in dataclasses.fields(SECTIONS[section]) if field.init}
    if section == "providers.NAME":
        fields.remove("name")
    settings = set[str]().union(*(SETTINGS_OF.get(field, {field}) for field in fields))
    assert settings <= set(documented(section))


@pytest.mark.parametrize("section", ["server", "keys", "records", "routing", "log"])
def test_the_example_has_every_setting_of_the_proxy_itself(section: str) -> None:
    tables = tomllib.loads(re.sub(r"(?m)^#(?! )", "", EXAMPLE))
    assert set(tables[section]) == set(documented(section))


def as_documented(value: object) -> str:
    """A default as the documentation shows it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, tuple):
        return as_documented(value[0]) if value else "`[]`"
    return f'`"{value}"`' if isinstance(value, str | Address) else f"`{value}`"


@pytest.mark.parametrize("section", SECTIONS)
def test_documented_defaults_are_those_of_the_code(section: str) -> None:
    rows = documented(section)
    for field in dataclasses.fields(SECTIONS[section]):
        row = rows.get(field.name, "")
        if field.default not in (dataclasses.MISSING, None) and row.startswith("`"):
            assert row.startswith(
                "`{}`" if field.name == "headers" else as_documented(field.default)
            )
