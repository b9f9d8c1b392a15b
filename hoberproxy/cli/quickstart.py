"""Make the config, key and welcome text of `serve` without a config file.

Its config has a demo model, so that a first request needs no account, and the providers whose keys
are in the environment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing

from .._mypyc import describe_build
from ..config.presets import PRESETS, presets_from_environment
from ..config.settings import (
    Address,
    Config,
    KeySettings,
    LogSettings,
    RecordSettings,
    ServerSettings,
)
from ..routing.catalog import Endpoint, Model, Prices, Provider
from ..storage.sqlite_records import open_store

DEMO_PROVIDER = "demo"
DEMO_SLUG = "hober/demo"
KEY_LIFETIME = 24 * 3600.0


def embedded_config(demo_port: int, environ: Mapping[str, str], server: ServerSettings) -> Config:
    """Return a config of the demo model and the presets in `environ`. Raises ConfigError."""
    demo = Provider(name=DEMO_PROVIDER, scheme="http", host="127.0.0.1", port=demo_port, path="/v1")
    demo_model = Model(
        slug=DEMO_SLUG,
        endpoints=(Endpoint(DEMO_PROVIDER, "hober-demo-1", prices=Prices()),),
        owned_by="hober",
        context_length=131072,
    )
    providers, models = presets_from_environment(environ)
    return Config(
        server=server,
        keys=KeySettings(),
        records=RecordSettings(),
        log=LogSettings(),
        providers={provider.name: provider for provider in (demo, *providers)},
        models=(demo_model, *models),
    )


def make_key(records_file: str) -> str:
    """Create a test key that expires in a day."""
    with closing(open_store(records_file)) as store:
        key, _ = store.create_key("quickstart", kind="test", expires=time.time() + KEY_LIFETIME)
    return key


_WELCOME = """\
{build} listens on {base_url}
models: {models}
{absent}
Your key for the next 24 hours:

    {key}

curl:

    curl -N {base_url}/v1/chat/completions \\
      -H 'authorization: Bearer {key}' \\
      -H 'content-type: application/json' \\
      -d '{{"model": "{slug}", "stream": true,
           "messages": [{{"role": "user", "content": "Count to 10"}}]}}'

Python (pip install openai):

    from openai import OpenAI
    client = OpenAI(base_url="{base_url}", api_key="{key}")
    stream = client.chat.completions.create(
        model="{slug}",
        messages=[{{"role": "user", "content": "Count to 10"}}],
        stream=True,
    )
    for chunk in stream:
        if chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)

Usage so far:     {program} usage
A config to edit: {program} config --example > hoberproxy.toml
Ctrl-C stops.
"""


def welcome(config: Config, address: Address, key: str, program: str) -> str:
    """Return the lines to copy for a first request; `program` is the command of this program."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return _WELCOME.format(
        build=describe_build(),
        base_url=f"http://{Address(host, address.port)}",
        models=", ".join(model.slug for model in config.models),
        absent=_absent_providers(config),
        key=key,
        slug=DEMO_SLUG,
        program=program,
    )


def _absent_providers(config: Config) -> str:
    known = sorted(
        variable
        for name, preset in PRESETS.items()
        if name not in config.providers
        for variable in (preset.url_variables or preset.key_variables)[:1]
    )
    if not known:
        return ""
    return "more models: set " + ", ".join(known[:6]) + ", … and start again\n"
