from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hoberproxy.catalog import Abilities, Adaptation, Catalog
from hoberproxy.presets import PRESETS, presets_from_environment
from hoberproxy.reader import parse_config
from hoberproxy.values import ConfigError, parse_base_url, parse_slug

SETTINGS = Path(__file__).parent.parent / "docs" / "settings.md"


def url_of(environ: dict[str, str]) -> str:
    (provider,), _ = presets_from_environment(environ)
    return f"{provider.scheme}://{provider.authority}{provider.path}"


def test_an_empty_environment_serves_nothing() -> None:
    assert presets_from_environment({}) == ([], [])


def test_an_empty_variable_counts_as_not_set() -> None:
    assert presets_from_environment({"OPENAI_API_KEY": "", "XAI_API_KEY": "  "}) == ([], [])


def test_a_key_in_the_environment_serves_all_models_of_its_provider() -> None:
    (provider,), models = presets_from_environment({"OPENAI_API_KEY": "sk-1\n"})
    assert (provider.name, provider.api_key, provider.host) == ("openai", "sk-1", "api.openai.com")
    found = Catalog(models).find("openai/gpt-4o")
    assert found is not None
    assert found.owned_by == "openai"
    assert [(e.provider, e.upstream_model) for e in found.endpoints] == [("openai", "gpt-4o")]


def test_a_name_with_a_slash_goes_to_openrouter_whole() -> None:
    _, models = presets_from_environment({"OPENROUTER_API_KEY": "k"})
    found = Catalog(models).find("openrouter/deepseek/deepseek-chat")
    assert found is not None
    assert found.endpoints[0].upstream_model == "deepseek/deepseek-chat"


def test_several_providers_come_in_the_order_of_the_table() -> None:
    providers, models = presets_from_environment({"XAI_API_KEY": "k", "OPENAI_API_KEY": "k"})
    assert [provider.name for provider in providers] == ["openai", "xai"]
    assert [model.slug for model in models] == ["openai/*", "xai/*"]


def test_the_second_variable_of_a_provider_is_read_when_the_first_is_not_set() -> None:
    (provider,), _ = presets_from_environment({"DEEPINFRA_API_KEY": "", "DEEPINFRA_TOKEN": "t"})
    assert provider.api_key == "t"


@pytest.mark.parametrize("name", ["mistral", "cohere"])
def test_stream_options_are_kept_from_who_rejects_them(name: str) -> None:
    (provider,), _ = presets_from_environment({PRESETS[name].key_variables[0]: "k"})
    assert not provider.stream_options


RENAMED_LIMIT = (("max_tokens", "max_completion_tokens"),)
QUIRKS = {
    "openai": (Abilities(), Adaptation(rename=RENAMED_LIMIT)),
    "deepseek": (
        Abilities(json_schema=False, accepts=frozenset(["content=null"])),
        Adaptation(roles=(("developer", "system"),)),
    ),
    "mistral": (
        Abilities(accepts=frozenset(["tool_choice=any"])),
        Adaptation(rename=(("max_completion_tokens", "max_tokens"), ("seed", "random_seed"))),
    ),
    "groq": (Abilities(), Adaptation()),
}


@pytest.mark.parametrize("name", QUIRKS)
def test_models_of_a_wildcard_are_spoken_to_as_the_preset_knows(name: str) -> None:
    (provider,), models = presets_from_environment({PRESETS[name].key_variables[0]: "k"})
    found = Catalog(models).find(f"{name}/any-model")
    assert found is not None
    (endpoint,) = found.endpoints
    assert (endpoint.abilities, endpoint.adaptation) == QUIRKS[name]
    assert (provider.abilities, provider.adaptation) == QUIRKS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_quirks_of_a_preset_are_documented_and_could_be_written_as_settings(name: str) -> None:
    preset = PRESETS[name]
    lines = [f"{n} = false" for n in ("tools", "json_mode", "json_schema", "vision")
             if getattr(preset.abilities, n) is False]  # fmt: skip
    for table, pairs in (("rename", preset.adaptation.rename), ("roles", preset.adaptation.roles)):
        if pairs:
            inner = ", ".join(f'{old} = "{new}"' for old, new in pairs)
            lines.append(f"{table} = {{ {inner} }}")
    if preset.abilities.accepts:
        lines.append(f"accepts = {json.dumps(sorted(preset.abilities.accepts))}")
    assert not preset.adaptation.drop
    assert not preset.adaptation.set
    quirks = re.findall(rf"(?ms)^- `{name}`: (.*?)(?=^- |^$)", SETTINGS.read_text())
    for line in lines:
        assert f"`{line}`" in quirks[0]
    text = f'providers.p = {{ preset = "{name}" }}\n[providers.q]\nbase_url = "http://h"\n'
    text += "\n".join(lines) + '\n[[models]]\nslug = "m"\nendpoints = [{ provider = "q" }]'
    environ = {variable: "k" for variable in preset.key_variables}
    config = parse_config(text, environ=environ, read_file=str)
    p, q = config.providers["p"], config.providers["q"]
    assert (p.abilities, p.adaptation) == (q.abilities, q.adaptation)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1:11434", "http://127.0.0.1:11434/v1"),
        ("0.0.0.0", "http://127.0.0.1:11434/v1"),
        ("0.0.0.0:11500", "http://127.0.0.1:11500/v1"),
        (":11500", "http://127.0.0.1:11500/v1"),
        ("gpu-box", "http://gpu-box:11434/v1"),
        ("gpu-box/ollama", "http://gpu-box:11434/ollama"),
        ("::", "http://[::1]:11434/v1"),
        ("[::]:11500", "http://[::1]:11500/v1"),
        ("[::1]", "http://[::1]:11434/v1"),
        ("http://gpu-box:11500", "http://gpu-box:11500/v1"),
        ("https://ollama.example.com", "https://ollama.example.com/v1"),
        ("http://gpu-box:11434/v1/", "http://gpu-box:11434/v1"),
    ],
)
def test_ollama_host_is_read_as_ollama_itself_reads_it(host: str, url: str) -> None:
    assert url_of({"OLLAMA_HOST": host}) == url


@pytest.mark.parametrize("variable", ["VLLM_BASE_URL", "LLAMACPP_BASE_URL", "LLAMA_CPP_URL"])
def test_a_local_server_is_served_from_its_url_and_needs_no_key(variable: str) -> None:
    assert url_of({variable: "http://127.0.0.1:8000"}) == "http://127.0.0.1:8000/v1"
    assert url_of({variable: "http://127.0.0.1:8000/v1"}) == "http://127.0.0.1:8000/v1"
    (provider,), _ = presets_from_environment({variable: "http://127.0.0.1:8000"})
    assert provider.api_key is None


def test_a_key_alone_does_not_bring_a_local_server_up() -> None:
    assert presets_from_environment({"VLLM_API_KEY": "k"}) == ([], [])


def test_every_bad_variable_is_named_and_no_secret_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        presets_from_environment(
            {
                "OPENAI_API_KEY": "sk-hunter2 with a space",
                "XAI_API_KEY": "hunter2\nhunter2",
                "VLLM_BASE_URL": "http://user:hunter2@host/v1",
                "OLLAMA_HOST": "hunter2 hunter2",
                "GROQ_API_KEY": "fine",
            }
        )
    named = {problem.partition(":")[0] for problem in caught.value.problems}
    assert named == {"OPENAI_API_KEY", "XAI_API_KEY", "VLLM_BASE_URL", "OLLAMA_HOST"}
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_sound_and_documented(name: str) -> None:
    preset = PRESETS[name]
    url = parse_base_url(preset.base_url)
    assert url.scheme == ("http" if preset.is_local else "https")
    assert parse_slug(f"{name}/*")
    assert preset.key_variables or preset.is_local
    (row,) = re.findall(rf"(?m)^\| `{name}` \|.*$", SETTINGS.read_text())
    for text in (preset.base_url, *preset.key_variables, *preset.url_variables):
        assert f"`{text}`" in row


def test_no_two_presets_share_a_variable() -> None:
    variables = [v for p in PRESETS.values() for v in (*p.key_variables, *p.url_variables)]
    assert len(variables) == len(set(variables))
