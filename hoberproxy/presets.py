"""Hold the presets, one for each known provider: address, variable of the key, quirks.

A preset whose variable is in the environment needs no config file: its models are served under
"name/*". Addresses are those that the providers document for OpenAI's SDK.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from .catalog import (
    NO_ABILITIES,
    NO_ADAPTATION,
    Abilities,
    Adaptation,
    Endpoint,
    Model,
    Provider,
    bracketed,
)
from .values import BaseUrl, ConfigError, InvalidValue, parse_base_url, parse_key

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Preset:
    """A known provider. A local server has `url_variables` and needs no key."""

    key_variables: tuple[str, ...]  # the first that is set holds the key
    base_url: str
    stream_options: bool = True  # understands `stream_options.include_usage`
    url_variables: tuple[str, ...] = ()  # the first that is set holds the base URL
    abilities: Abilities = NO_ABILITIES
    adaptation: Adaptation = NO_ADAPTATION

    @property
    def is_local(self) -> bool:
        return bool(self.url_variables)


PRESETS: Mapping[str, Preset] = {
    # "Deprecated in favor of max_completion_tokens" (API reference, chat/create): newer models
    # refuse max_tokens with a 400, none refuses the other.
    "openai": Preset(
        ("OPENAI_API_KEY",),
        "https://api.openai.com/v1",
        adaptation=Adaptation(rename=(("max_tokens", "max_completion_tokens"),)),
    ),
    "anthropic": Preset(("ANTHROPIC_API_KEY",), "https://api.anthropic.com/v1"),
    "gemini": Preset(
        ("GEMINI_API_KEY",), "https://generativelanguage.googleapis.com/v1beta/openai"
    ),
    # The API reference, create-chat-completion: an assistant's content is "nullable, required".
    # 400 "unknown variant `developer`" and "This response_format type is unavailable now" for
    # json_schema: the API reference, create-chat-completion, has neither.
    "deepseek": Preset(
        ("DEEPSEEK_API_KEY",),
        "https://api.deepseek.com/v1",
        abilities=Abilities(json_schema=False, accepts=frozenset(("content=null",))),
        adaptation=Adaptation(roles=(("developer", "system"),)),
    ),
    # 422 "extra_forbidden" on stream_options (usage comes with the last event unasked) and on
    # max_completion_tokens; the API reference has max_tokens and random_seed in their places, and
    # ToolChoiceEnum: auto, none, any, required.
    "mistral": Preset(
        ("MISTRAL_API_KEY",),
        "https://api.mistral.ai/v1",
        stream_options=False,
        abilities=Abilities(accepts=frozenset(("tool_choice=any",))),
        adaptation=Adaptation(
            rename=(("max_completion_tokens", "max_tokens"), ("seed", "random_seed"))
        ),
    ),
    "xai": Preset(("XAI_API_KEY",), "https://api.x.ai/v1"),
    "groq": Preset(("GROQ_API_KEY",), "https://api.groq.com/openai/v1"),
    "cerebras": Preset(("CEREBRAS_API_KEY",), "https://api.cerebras.ai/v1"),
    # docs.together.ai/docs/json-mode: "Regex mode".
    "together": Preset(
        ("TOGETHER_API_KEY",),
        "https://api.together.ai/v1",
        abilities=Abilities(accepts=frozenset(("response_format=regex",))),
    ),
    # docs.fireworks.ai/structured-responses/structured-output-grammar-based, and tool_choice "any",
    # an alias of "required", of its function-calling guide.
    "fireworks": Preset(
        ("FIREWORKS_API_KEY",),
        "https://api.fireworks.ai/inference/v1",
        abilities=Abilities(accepts=frozenset(("response_format=grammar", "tool_choice=any"))),
    ),
    "deepinfra": Preset(
        ("DEEPINFRA_API_KEY", "DEEPINFRA_TOKEN"), "https://api.deepinfra.com/v1/openai"
    ),
    "nvidia": Preset(("NVIDIA_API_KEY",), "https://integrate.api.nvidia.com/v1"),
    "sambanova": Preset(("SAMBANOVA_API_KEY",), "https://api.sambanova.ai/v1"),
    "moonshot": Preset(("MOONSHOT_API_KEY",), "https://api.moonshot.ai/v1"),
    "zai": Preset(("ZAI_API_KEY",), "https://api.z.ai/api/paas/v4"),
    # The compatibility API rejects stream_options.
    "cohere": Preset(
        ("COHERE_API_KEY",), "https://api.cohere.ai/compatibility/v1", stream_options=False
    ),
    # Model names hold a slash there: openrouter/deepseek/deepseek-chat. Its OpenAPI document has
    # the formats ChatFormatGrammarConfig and ChatFormatPythonConfig, and null for an assistant's
    # content.
    "openrouter": Preset(
        ("OPENROUTER_API_KEY",),
        "https://openrouter.ai/api/v1",
        abilities=Abilities(
            accepts=frozenset(("content=null", "response_format=grammar", "response_format=python"))
        ),
    ),
    # docs/modelfile: num_predict, which max_tokens becomes, is -1 for infinite generation.
    "ollama": Preset(
        (),
        "http://127.0.0.1:11434/v1",
        url_variables=("OLLAMA_HOST",),
        abilities=Abilities(accepts=frozenset(("max_tokens=-1",))),
    ),
    # chat_utils.py reads a content of None as no parts; StructuralTagResponseFormat: protocol.py.
    "vllm": Preset(
        ("VLLM_API_KEY",),
        "http://127.0.0.1:8000/v1",
        url_variables=("VLLM_BASE_URL",),
        abilities=Abilities(accepts=frozenset(("content=null", "response_format=structural_tag"))),
    ),
    # tools/server/README.md: n_predict, which both become, is -1 for infinity; a message needs a
    # `content`, which may be null.
    "llamacpp": Preset(
        ("LLAMACPP_API_KEY",),
        "http://127.0.0.1:8080/v1",
        url_variables=("LLAMACPP_BASE_URL", "LLAMA_CPP_URL"),
        abilities=Abilities(
            accepts=frozenset(("content=null", "max_completion_tokens=-1", "max_tokens=-1"))
        ),
    ),
}


def presets_from_environment(environ: Mapping[str, str]) -> tuple[list[Provider], list[Model]]:
    """Return a provider and a wildcard model for each preset whose variable is set in `environ`.

    An empty variable counts as not set. Raises ConfigError if variables hold no key or no URL; its
    problems name the variables in place of dotted paths.
    """
    providers: list[Provider] = []
    problems: list[str] = []
    for name, preset in PRESETS.items():
        if first_set(preset.url_variables or preset.key_variables, environ) is None:
            continue
        try:
            providers.append(_provider(name, preset, environ))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return providers, [_wildcard(provider) for provider in providers]


def preset_key(preset: Preset, environ: Mapping[str, str]) -> str | None:
    """Return the key in the preset's variable, None if none is set. Raises ConfigError."""
    variable = first_set(preset.key_variables, environ)
    return None if variable is None else _read(variable, environ, parse_key)


def preset_url(preset: Preset, environ: Mapping[str, str]) -> BaseUrl:
    """Return the URL in the preset's variable, else the preset's own. Raises ConfigError."""
    variable = first_set(preset.url_variables, environ)
    if variable is None:
        return parse_base_url(preset.base_url)
    return _read(variable, environ, _ollama_url if variable == "OLLAMA_HOST" else _local_url)


def first_set(variables: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    """Return the first of `variables` that is set and not empty, None if none is."""
    return next((name for name in variables if environ.get(name, "").strip()), None)


def _provider(name: str, preset: Preset, environ: Mapping[str, str]) -> Provider:
    return Provider(
        name,
        *preset_url(preset, environ),
        api_key=preset_key(preset, environ),
        stream_options=preset.stream_options,
        abilities=preset.abilities,
        adaptation=preset.adaptation,
    )


def _wildcard(provider: Provider) -> Model:
    name = provider.name
    endpoint = Endpoint(name, "*", abilities=provider.abilities, adaptation=provider.adaptation)
    return Model(slug=f"{name}/*", endpoints=(endpoint,), owned_by=name)


def _read(variable: str, environ: Mapping[str, str], parse: Callable[[str], T]) -> T:
    try:
        return parse(environ[variable].strip())
    except InvalidValue as error:
        raise ConfigError([f"{variable}: {error}"]) from None


def _local_url(text: str) -> BaseUrl:
    url = parse_base_url(text)
    return url._replace(path=url.path or "/v1")  # users write the server's address alone


def _ollama_url(text: str) -> BaseUrl:
    """Parse OLLAMA_HOST, which is also what Ollama's server listens on: "0.0.0.0", no scheme."""
    scheme, slashes, rest = text.rpartition("://")
    authority, slash, path = rest.partition("/")
    if not slashes:
        authority = _with_port(authority)
    url = _local_url(f"{scheme or 'http'}://{authority}{slash}{path}")
    return url._replace(host={"0.0.0.0": "127.0.0.1", "::": "::1"}.get(url.host, url.host))


def _with_port(authority: str) -> str:
    try:
        return f"{bracketed(str(ipaddress.ip_address(authority.strip('[]'))))}:11434"
    except ValueError:
        host, colon, port = authority.rpartition(":")
        if not colon:
            host, port = authority, ""
        return f"{host or '127.0.0.1'}:{port or '11434'}"
