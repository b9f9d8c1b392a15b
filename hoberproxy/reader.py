"""Parse a config's TOML into settings; name every problem by its dotted path.

Callers pass the environment and a reader of files, so this module touches nothing of the machine.
Secrets come by reference and are never in a message: what a user may have pasted into the wrong
place (a URL, a header, a variable's name) is not quoted.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, TypeVar

from .adaptations import read_abilities, read_adaptation
from .catalog import (
    DEFAULT_CREATED,
    NO_ABILITIES,
    NO_ADAPTATION,
    Endpoint,
    Model,
    Prices,
    Provider,
    TimeLimits,
)
from .presets import PRESETS, Preset, first_set, preset_key, preset_url
from .settings import (
    Address,
    Config,
    KeySettings,
    LogSettings,
    RecordSettings,
    RoutingSettings,
    ServerSettings,
)
from .tables import Table, nearest, plain_number, shown
from .values import (
    NOT_FORWARDED,
    NOT_RETURNED,
    OWN_HEADERS,
    BaseUrl,
    ConfigError,
    InvalidValue,
    header_name_parser,
    parse_base_url,
    parse_header_value,
    parse_host_and_port,
    parse_key,
    parse_slug,
    upstream_model_parser,
)

T = TypeVar("T")


def parse_config(
    text: str, *, environ: Mapping[str, str], read_file: Callable[[str], str]
) -> Config:
    """Parse `text` (TOML) as a config. Raises ConfigError with all problems at once.

    `read_file` returns a file's text or raises OSError. It is called for key files, and for
    certificate files to check that they are readable.
    """
    problems: list[str] = []
    root = Table(_load(text), "", problems)
    config = _read_config(root, _Sources(environ, read_file))
    root.finish()
    if problems:
        raise ConfigError(problems)
    return config


def _load(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text.removeprefix("\ufeff"), parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        # The message of tomllib holds a place and at most a character or a key, never a value.
        words = str(error)
        line = re.search(r"line [0-9]+", words)
        place = line[0] if line else f"line {len(text.splitlines())}"  # at its end
        problem = InvalidValue("TOML", f"{words[:1].lower()}{words[1:]}", "mend the line")
    except (ValueError, RecursionError):
        place, problem = "file", InvalidValue("TOML", "an endless number or nesting", "shorten it")
    raise ConfigError([f"{place}: {problem}"])


# The sections of the file


@dataclass(frozen=True, slots=True)
class _Sources:
    """The environment and the files that a config may refer to."""

    environ: Mapping[str, str]
    read_file: Callable[[str], str]


def _read_config(root: Table, sources: _Sources) -> Config:
    server = _read_server(root.table("server"))
    keys = _read_keys(root.table("keys"), server)
    providers = _read_providers(root.table("providers"), sources)
    models = _read_models(root, providers)
    root.require("providers", "at least one provider", "add a [providers.NAME] table")
    return Config(
        server=server,
        keys=keys,
        records=_read_records(root.table("records")),
        log=_read_log(root.table("log")),
        providers=providers,
        models=models,
        routing=_read_routing(root.table("routing")),
    )


def _read_server(table: Table) -> ServerSettings:
    default = ServerSettings()
    _refuse_limit_per_address(table)
    listen = _read_listen(table, default.listen)
    metrics = table.parse("metrics_listen", default.metrics_listen, _parse_address_or_off)
    if metrics is not None and metrics.port and metrics in listen:
        problem = InvalidValue("an address of its own", "one of server.listen", "change its port")
        table.note("metrics_listen", problem)
    max_body_bytes = table.integer("max_body_bytes", default.max_body_bytes, 1024, 2**30)
    max_body_memory = table.integer("max_body_memory", default.max_body_memory, 0, 2**50)
    if 0 < max_body_memory < max_body_bytes:
        problem = InvalidValue(
            f"at least server.max_body_bytes ({max_body_bytes})",
            str(max_body_memory),
            "raise it, or lower max_body_bytes",
        )
        table.note("max_body_memory", problem)
    return ServerSettings(
        listen=listen,
        metrics_listen=metrics,
        admin_socket=table.parse("admin_socket", default.admin_socket, str),
        max_body_bytes=max_body_bytes,
        max_body_memory=max_body_memory,
        head_timeout=table.seconds("head_timeout", default.head_timeout),
        body_timeout=table.seconds("body_timeout", default.body_timeout),
        keepalive_timeout=table.seconds("keepalive_timeout", default.keepalive_timeout),
        write_timeout=table.seconds("write_timeout", default.write_timeout),
        drain_timeout=table.seconds("drain_timeout", default.drain_timeout, low="0"),
        comment_after=table.seconds("comment_after", default.comment_after, low="0"),
        cors_origins=table.strings("cors_origins", _parse_origin),
        max_streams=table.integer("max_streams", default.max_streams, 0, 10**7),
        models_refresh=table.seconds("models_refresh", default.models_refresh, low="0"),
    )


def _refuse_limit_per_address(table: Table) -> None:
    for name in ("max_connections_per_address", "trusted_proxies"):
        if name in table.values:
            table.know(name)
            advice = "set limit_conn in the front proxy; deploy/ has nginx and Caddy"
            table.note(name, InvalidValue("a known setting", "a limit per address", advice))


def _read_listen(table: Table, default: tuple[Address, ...]) -> tuple[Address, ...]:
    if isinstance(table.values.get("listen"), str):
        return (table.parse("listen", default[0], _parse_address),)
    if "listen" not in table.values:
        table.know("listen")
        return default
    addresses = table.strings("listen", _parse_address)
    table.require("listen", "at least one address", 'add "127.0.0.1:8080"')
    for address in {each for each in addresses if each.port and addresses.count(each) > 1}:
        table.note(
            "listen", InvalidValue("different addresses", f"{address} twice", "take one out")
        )
    return addresses


def _read_keys(table: Table, server: ServerSettings) -> KeySettings:
    default = KeySettings()
    required = table.boolean("required", default.required)
    public = [str(address) for address in server.listen if not address.is_loopback]
    if public and not required:
        got = f"false while server.listen has {', '.join(public)}"
        advice = "require keys, or listen on 127.0.0.1 alone"
        table.note("required", InvalidValue("true unless only this machine is served", got, advice))
    return KeySettings(
        required,
        assumed_output=table.integer("assumed_output", default.assumed_output, 1, 2**31),
    )


def _read_records(table: Table) -> RecordSettings:
    default = RecordSettings()
    return RecordSettings(
        file=table.parse("file", default.file, _parse_path),
        keep_days=table.integer("keep_days", default.keep_days, 0, 36500),
    )


def _read_routing(table: Table) -> RoutingSettings:
    default = RoutingSettings()
    return RoutingSettings(
        max_attempts=table.integer("max_attempts", default.max_attempts, 1, 100),
        attempts_timeout=table.seconds("attempts_timeout", default.attempts_timeout),
    )


def _read_log(table: Table) -> LogSettings:
    default = LogSettings()
    sample = table.number("sample", "0", "1")
    return LogSettings(
        level=table.choice("level", default.level, ("debug", "info", "warning", "error")),
        access=table.boolean("access", default.access),
        format=table.choice("format", default.format, ("auto", "human", "json")),
        sample=default.sample if sample is None else sample,
    )


def _read_providers(table: Table, sources: _Sources) -> dict[str, Provider]:
    providers = {}
    for name, below in table.each_table():
        if not _PROVIDER_NAME.fullmatch(name):  # a header's value and a metric's label hold it
            expected = "a name of up to 64 letters, digits, dots, hyphens and underscores"
            table.note(name, InvalidValue(expected, "another name", "rename it"))
        providers[name] = _read_provider(name, below, sources)
    return providers


def _read_provider(name: str, table: Table, sources: _Sources) -> Provider:
    preset = table.parse("preset", None, _parse_preset)
    provider = Provider(name, *_read_base_url(table, preset, sources))
    understood = preset.stream_options if preset else provider.stream_options
    idle_connections = provider.max_idle_connections
    provider = replace(
        provider,
        api_key=_read_key(table, preset, sources),
        headers=_read_headers(table.table("headers")),
        limits=_read_limits(table.table("limits"), provider.limits),
        stream_options=table.boolean("stream_options", understood),
        ca_file=_read_ca_file(table, sources),
        forward_headers=table.strings("forward_headers", header_name_parser(NOT_FORWARDED)),
        response_headers=table.strings("response_headers", header_name_parser(NOT_RETURNED)),
        keepalive=table.seconds("keepalive", provider.keepalive, low="0"),
        max_idle_connections=table.integer("max_idle_connections", idle_connections, 0, 65536),
        abilities=read_abilities(table, preset.abilities if preset else NO_ABILITIES),
        adaptation=read_adaptation(table, preset.adaptation if preset else NO_ADAPTATION),
    )
    _check_headers(table, provider)
    return provider


def _check_headers(table: Table, provider: Provider) -> None:
    own = {name.lower() for name, _ in provider.headers}
    for name in own.intersection(provider.forward_headers):
        got = f'"{name}" in headers too'
        table.note("forward_headers", InvalidValue("other headers", got, "take one of the two out"))


# Stands in for a URL that could not be read, until all problems are raised.
_NO_URL = BaseUrl("https", "invalid", 443, "")


def _read_base_url(table: Table, preset: Preset | None, sources: _Sources) -> BaseUrl:
    url = table.parse("base_url", None, parse_base_url)
    if url is not None or "base_url" in table.values:
        return url or _NO_URL
    if preset is not None:
        return _from_environment(table, preset_url, preset, sources) or _NO_URL
    if "preset" not in table.values:
        table.require("base_url", "a URL", 'add one like "https://host/v1", or a preset')
    return _NO_URL


def _read_key(table: Table, preset: Preset | None, sources: _Sources) -> str | None:
    if "api_key" in table.values:
        table.know("api_key")
        advice = "use api_key_env or api_key_file"
        table.note("api_key", InvalidValue("a reference to the key", "the key itself", advice))
    given = {"api_key", "api_key_env", "api_key_file"} & set(table.values)
    if {"api_key_env", "api_key_file"} <= given:
        got = "api_key_env and api_key_file"
        table.note(
            "api_key_env", InvalidValue("one place for the key", got, "take one of them out")
        )
    from_variable = table.parse("api_key_env", None, _variable_reader(sources))
    from_file = table.parse("api_key_file", None, lambda path: parse_key(_text_of(path, sources)))
    if preset is not None and not given:
        return _read_preset_key(table, preset, sources)
    return from_variable or from_file


def _read_preset_key(table: Table, preset: Preset, sources: _Sources) -> str | None:
    if first_set(preset.key_variables, sources.environ):
        return _from_environment(table, preset_key, preset, sources)
    if not preset.is_local:
        names = " or ".join(preset.key_variables)
        got = "an environment without it"
        table.note("preset", InvalidValue(f"{names} to be set", got, "set it, or name api_key_env"))
    return None


def _from_environment(
    table: Table,
    read: Callable[[Preset, Mapping[str, str]], T],
    preset: Preset,
    sources: _Sources,
) -> T | None:
    """Return `read` of a preset's variable; note its problems under `preset`."""
    try:
        return read(preset, sources.environ)
    except ConfigError as error:
        table.note_all("preset", error.problems)
        return None


def _variable_reader(sources: _Sources) -> Callable[[str], str]:
    def read(name: str) -> str:
        # A key that was pasted in place of the name has small letters: it is not quoted.
        quoted = name if _VARIABLE.fullmatch(name) else "a variable (not quoted: is it the key?)"
        if not sources.environ.get(name, "").strip():
            raise InvalidValue("the name of a variable that is set", f"{quoted}, not set", "set it")
        return parse_key(sources.environ[name])

    return read


def _text_of(path: str, sources: _Sources) -> str:
    try:
        return sources.read_file(path)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
    except ValueError:  # not UTF-8, or NUL in the name
        reason = "no text file"
    raise InvalidValue("a readable file", reason, "mend the path or the file's permissions")


def _read_ca_file(table: Table, sources: _Sources) -> str | None:
    def parse(path: str) -> str:
        if "-----BEGIN CERTIFICATE-----" not in _text_of(path, sources):
            raise InvalidValue(
                "certificates in PEM form", "a file without one", "name another file"
            )
        return path

    return table.parse("ca_file", None, parse)


def _read_headers(table: Table) -> tuple[tuple[str, str], ...]:
    headers = []
    check, seen = header_name_parser(OWN_HEADERS), set[str]()
    for name in table.values:
        value = table.parse(name, "", parse_header_value)
        try:
            lower = check(name)
        except InvalidValue as error:
            table.note(name, error)
            continue
        if lower in seen:
            table.note(
                name, InvalidValue("each header once", "one in two spellings", "take one out")
            )
        seen.add(lower)
        headers.append((name, value))
    return tuple(headers)


def _read_limits(table: Table, default: TimeLimits) -> TimeLimits:
    return TimeLimits(
        connect=table.seconds("connect", default.connect),
        first_content=table.seconds("first_content", default.first_content),
        idle=table.seconds("idle", default.idle),
        total=table.seconds("total", default.total),
    )


def _read_models(root: Table, providers: Mapping[str, Provider]) -> tuple[Model, ...]:
    tables = root.tables("models")
    root.require("models", "at least one model", "add a [[models]] table")
    models = [_read_model(table, providers) for table in tables]
    first: dict[str, str] = {}
    for table, model in zip(tables, models, strict=True):
        place = first.setdefault(model.slug, table.path)
        if model.slug and place != table.path:
            got = f'"{model.slug}" again, as in {place}'
            table.note("slug", InvalidValue("a slug once", got, "merge their endpoints"))
    return tuple(models)


def _read_model(table: Table, providers: Mapping[str, Provider]) -> Model:
    slug = table.parse("slug", "", parse_slug)
    table.require("slug", "a name for clients", 'add one like "deepseek/deepseek-chat"')
    owner = slug.partition("/")[0] if "/" in slug else "hoberproxy"
    return Model(
        slug=slug,
        endpoints=_read_endpoints(table, slug, providers),
        owned_by=table.parse("owned_by", owner, _parse_owner),
        created=table.integer("created", DEFAULT_CREATED, 0, 2**53),
        context_length=table.integer("context_length", None, 1, 2**53),
    )


def _read_endpoints(
    model: Table, slug: str, providers: Mapping[str, Provider]
) -> tuple[Endpoint, ...]:
    tables = model.tables("endpoints")
    model.require("endpoints", "at least one endpoint", "add [[models.endpoints]] below the model")
    first: dict[tuple[str, str], str] = {}
    endpoints = [_read_endpoint(table, slug, providers) for table in tables]
    for table, endpoint in zip(tables, endpoints, strict=True):
        same = first.setdefault(endpoint.key, table.path)
        if endpoint.provider and same != table.path:
            got = f"the provider and model of {same}"
            table.note("provider", InvalidValue("another endpoint", got, "take one of them out"))
    return tuple(endpoints)


def _read_endpoint(table: Table, slug: str, providers: Mapping[str, Provider]) -> Endpoint:
    name = table.parse("provider", "", _provider_parser(providers))
    table.require("provider", "a name from [providers]", "add it")
    provider = providers.get(name)
    limits = _read_limits(table.table("limits"), provider.limits if provider else TimeLimits())
    upstream_model = "*" if slug.endswith("/*") else slug
    return Endpoint(
        provider=name,
        upstream_model=table.parse("model", upstream_model, upstream_model_parser(slug)),
        context_length=table.integer("context_length", None, 1, 2**53),
        max_output=table.integer("max_output", None, 1, 2**53),
        prices=_read_prices(table),
        limits=limits if "limits" in table.values else None,
        weight=table.number("weight", "0", "1000000"),
        abilities=read_abilities(table, provider.abilities if provider else NO_ABILITIES),
        adaptation=read_adaptation(table, provider.adaptation if provider else NO_ADAPTATION),
        usage=table.choice("usage", "report", ("report", "count")),
    )


def _read_prices(table: Table) -> Prices | None:
    below = table.table("price")
    prices = Prices(
        prompt=_read_price(below, "prompt") or Decimal(0),
        completion=_read_price(below, "completion") or Decimal(0),
        cached=_read_price(below, "cached"),
        reasoning=_read_price(below, "reasoning"),
        request=_read_price(below, "request", "USD per request") or Decimal(0),
        cache_write=_read_price(below, "cache_write"),
    )
    return prices if "price" in table.values else None


def _read_price(table: Table, name: str, unit: str = "USD per million tokens") -> Decimal | None:
    table.know(name)
    value = table.values.get(name)
    if value is None:
        return None
    text = value if isinstance(value, str) else plain_number(value)
    if _PRICE.fullmatch(text):
        return Decimal(text)
    expected = f"{unit}, 0 to 9999999, at most 12 decimals"
    got = "another string" if isinstance(value, str) else shown(value)
    table.note(name, InvalidValue(expected, got, 'write it like "0.14"'))
    return Decimal(0)


# Parsers of texts; those that presets share are in values.py

_PROVIDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Of web pages, and of desktop apps and extensions, which have schemes of their own.
_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._\[\]:-]+")
# Bounded on both sides: a price of 1e-999999 would be a megabyte in GET /v1/models.
_PRICE = re.compile(r"[0-9]{1,7}(?:\.[0-9]{1,12})?")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


def _parse_address(text: str) -> Address:
    return Address(*parse_host_and_port(text))


def _parse_address_or_off(text: str) -> Address | None:
    return None if text == "off" else _parse_address(text)


def _parse_path(text: str) -> str:
    if not text.strip():
        raise InvalidValue("a path", "an empty string", "name a file")
    return text


def _parse_origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text):
        raise InvalidValue(
            "an origin", "something else", 'write it like "https://host", without path'
        )
    return text.lower()  # as browsers send it


def _parse_owner(text: str) -> str:
    if not text or not text.isprintable():
        raise InvalidValue("printable characters", "none or others", "name who makes the model")
    return text


def _parse_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise InvalidValue("a known preset", "an unknown name", nearest(name, PRESETS))
    return PRESETS[name]


def _provider_parser(providers: Mapping[str, Provider]) -> Callable[[str], str]:
    def parse(name: str) -> str:
        if name not in providers:
            raise InvalidValue(
                "a name from [providers]", "an unknown name", nearest(name, providers)
            )
        return name

    return parse
