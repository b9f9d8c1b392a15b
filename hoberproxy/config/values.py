"""Parse the texts of a config: each parser returns a value or raises InvalidValue.

The config file and the presets share these rules for URLs, keys, headers and slugs. No message
quotes what may be a secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from ..routing.catalog import DEFAULT_PORTS, MAX_SLUG_LENGTH, ROUTING_SUFFIXES, is_visible

_HOST: Final = r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))"
_ADDRESS: Final = re.compile(_HOST + r":(?P<port>[0-9]{1,5})")
_AUTHORITY: Final = re.compile(_HOST + r"(?::(?P<port>[0-9]{1,5}))?")
_URL: Final = re.compile(
    r"(?P<scheme>[^:/?#]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)"
)
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # token, RFC 9110 section 5.6.2
_HEADER_VALUE: Final = re.compile(r"[!-~](?:[\t -~]*[!-~])?")

_HOP_BY_HOP: Final = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    " transfer-encoding upgrade".split()
)
OWN_HEADERS: Final = _HOP_BY_HOP | frozenset(
    "host authorization content-length content-type content-encoding accept accept-encoding"
    " expect".split()
)
# What the contract keeps from upstreams (the client's key, cookies, organisation and address), and
# the trace headers, which are passed on anyway.
NOT_FORWARDED: Final = OWN_HEADERS | frozenset(
    "cookie api-key x-api-key openai-organization openai-project forwarded via x-forwarded-for"
    " x-forwarded-host x-forwarded-proto x-real-ip traceparent tracestate".split()
)
NOT_RETURNED: Final = _HOP_BY_HOP | frozenset(
    "content-length content-type content-encoding set-cookie x-request-id".split()
)


class InvalidValue(ValueError):
    """A value is wrong; the message holds `expected`, `got` (never a secret) and `advice`."""

    def __init__(self, expected: str, got: str, advice: str) -> None:
        super().__init__(f"expected {expected}, got {got}; {advice}")


class ConfigError(Exception):
    """A config has `problems`, each as "dotted.path: expected …, got …; do …"."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class BaseUrl(NamedTuple):
    """A provider's URL in parts; the fields are those of `Provider`."""

    scheme: str
    host: str
    port: int
    path: str


def parse_host_and_port(text: str) -> tuple[str, int]:
    """Parse `text` as host:port or [IPv6]:port. Raises InvalidValue."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise InvalidValue("host:port", "something else", 'write it like "127.0.0.1:8080"')
    return _host_of(match), _port_of(match["port"])


def parse_base_url(text: str) -> BaseUrl:
    """Parse `text` as a provider's URL that ends in the API's version. Raises InvalidValue."""
    match = _URL.fullmatch(text)
    if match is None or not is_visible(text):
        raise InvalidValue("a URL", "something else", 'write it like "https://host/v1"')
    scheme = match["scheme"].lower()
    if scheme not in DEFAULT_PORTS:
        raise InvalidValue("http:// or https://", "another scheme", "use one of them")
    if match["rest"]:
        raise InvalidValue(
            "a URL without query or fragment", "a URL with one", "end it with the path"
        )
    path = match["path"].rstrip("/")
    if path.endswith("/chat/completions"):
        raise InvalidValue(
            "a URL that ends in the version", "the path of a call", "end it before /chat"
        )
    return BaseUrl(scheme, *_authority_of(match["authority"], scheme), path)


def parse_key(text: str) -> str:
    """Parse `text` as a provider's key, without the white space around it. Raises InvalidValue."""
    key = text.strip()
    if not key:
        raise InvalidValue("a key", "nothing", "put the provider's key there")
    if not is_visible(key):
        got = "a space, a line break or another character inside"
        raise InvalidValue("one line of visible ASCII characters", got, "copy the key anew")
    return key


def header_name_parser(reserved: frozenset[str]) -> Callable[[str], str]:
    """Return a parser of header names, to lower case; `reserved` and x-hober-* are invalid."""

    def parse(text: str) -> str:
        # Before lower(): the Kelvin sign becomes an ASCII k.
        if not _HEADER_NAME.fullmatch(text):
            raise InvalidValue(
                "a header's name", "something else", "use letters, digits and hyphens"
            )
        name = text.lower()
        if name in reserved or name.startswith("x-hober-"):
            raise InvalidValue("another header", f'"{name}"', "take it out: the proxy sets it")
        return name

    return parse


def parse_header_value(text: str) -> str:
    """Return `text` if it can be a header's value. Raises InvalidValue."""
    if not _HEADER_VALUE.fullmatch(text):
        got = "nothing, a line break or another character"
        raise InvalidValue("one line of visible ASCII", got, "take that character out")
    return text


def parse_slug(slug: str) -> str:
    """Return `slug` if it can be a model's slug or a wildcard's "prefix/*". Raises InvalidValue."""
    stem = slug.removesuffix("/*")
    if not is_visible(stem) or "*" in stem or len(slug) > MAX_SLUG_LENGTH:
        expected = f'visible ASCII, at most {MAX_SLUG_LENGTH}, "*" only in a "/*" at the end'
        raise InvalidValue(expected, "something else", 'write it like "deepseek/deepseek-chat"')
    if slug.endswith(tuple(ROUTING_SUFFIXES)):
        raise InvalidValue("a slug without routing suffix", f'"{slug}"', "clients add the suffix")
    if slug.startswith("hober/auto") or slug == "hober/*":
        raise InvalidValue(
            "a slug of your own", f'"{slug}", which the router serves', "choose another"
        )
    return slug


def upstream_model_parser(slug: str) -> Callable[[str], str]:
    """Return a parser of the name that a provider has for the model under `slug`."""
    stars = 1 if slug.endswith("/*") else 0

    def parse(name: str) -> str:
        if not name or not name.isprintable():
            raise InvalidValue(
                "printable characters", "none or others", "write the provider's name"
            )
        if name.count("*") != stars:
            got = f"{name.count('*')}"
            advice = 'it stands for the rest of a slug that ends in "/*"'
            raise InvalidValue(f'{stars} "*" under this slug', got, advice)
        return name

    return parse


def _authority_of(text: str, scheme: str) -> tuple[str, int]:
    if "@" in text:
        raise InvalidValue(
            "a URL without user name", "a user name", "use api_key_env or api_key_file"
        )
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        raise InvalidValue(
            "a host and perhaps a port", "something else", 'write it like "host:8000"'
        )
    port = DEFAULT_PORTS[scheme] if match["port"] is None else _port_of(match["port"])
    if port == 0:
        raise InvalidValue("a port from 1 to 65535", "0", "name the port the server listens on")
    return _host_of(match), port


def _host_of(match: re.Match[str]) -> str:
    host = match["v6"] or match["name"].lower()
    if match["v6"] or not host.strip("0123456789."):
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            raise InvalidValue(
                "a host", "no valid IP address", "write 127.0.0.1 or [::1]"
            ) from None
    return host


def _port_of(text: str) -> int:
    if int(text) > 65535:
        raise InvalidValue("a port up to 65535", text, "choose another port")
    return int(text)
