"""`make demo-model`: a real small model behind a real proxy, and the lines to try it with.

Also what the tests use to start the proxy as an operator does: a config file and the command.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.patience import patient

from .model_server import CONTEXT_TOKENS, UPSTREAM_MODEL, run_model_server

SLUG = "smollm2/135m-instruct"
PROVIDER = "llamacpp"
START_LIMIT = patient(60.0)  # seconds

CONFIG = """\
[server]
listen = "127.0.0.1:{port}"
metrics_listen = "off"

[records]
file = "{folder}/hoberproxy.db"

[providers.{provider}]
base_url = "http://127.0.0.1:{model_port}/v1"

[[models]]
slug = "{slug}"
owned_by = "huggingface"
context_length = {context}

[[models.endpoints]]
provider = "{provider}"
model = "{upstream_model}"
"""

INTRODUCTION = """\
{slug} (llama.cpp on one thread) behind hoberproxy at {url}
key: {key}

curl -N {url}/v1/chat/completions \\
  -H 'authorization: Bearer {key}' -H 'content-type: application/json' \\
  -d '{{"model": "{slug}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'

from openai import OpenAI
client = OpenAI(base_url="{url}", api_key="{key}")
stream = client.chat.completions.create(
    model="{slug}", messages=[{{"role": "user", "content": "Hello!"}}], stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)

Ctrl-C ends both.
"""


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """A proxy process that takes traffic, and a key for it."""

    url: str  # without /v1
    key: str
    config_file: Path
    records_file: Path
    process: subprocess.Popen[bytes]


def run_command(*arguments: str) -> str:
    """Run the installed `hoberproxy` command to its end; return its output."""
    done = subprocess.run(
        [_command(), *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=START_LIMIT
    )
    return done.stdout


def _command() -> str:
    return str(Path(sys.executable).with_name("hoberproxy"))


@contextmanager
def run_proxy(folder: Path, model_port: int, port: int = 0) -> Iterator[RunningProxy]:
    """Start a proxy in front of the model server, its config and records in `folder`."""
    port = port or _free_port()
    config_file = folder / "hoberproxy.toml"
    config_file.write_text(
        CONFIG.format(
            port=port,
            folder=folder,
            model_port=model_port,
            provider=PROVIDER,
            slug=SLUG,
            context=CONTEXT_TOKENS,
            upstream_model=UPSTREAM_MODEL,
        )
    )
    created = run_command("keys", "create", "--config", str(config_file), "--label", "demo")
    url, key = f"http://127.0.0.1:{port}", created.split()[-1]
    with subprocess.Popen([_command(), "serve", "--config", str(config_file)]) as process:
        try:
            _wait_until_ready(url, process)
            yield RunningProxy(url, key, config_file, folder / "hoberproxy.db", process)
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=START_LIMIT):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"expected the proxy to take traffic at {url}, see its messages above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def main() -> None:
    """Start both and say how to use them, until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="demo_model", description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="of the proxy; 0 for any")
    port = parser.parse_args().port
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())  # through the contexts, so that both end
    with (
        tempfile.TemporaryDirectory(prefix="hoberproxy-demo-") as folder,
        run_model_server() as model_port,
        run_proxy(Path(folder), model_port, port) as proxy,
    ):
        print(INTRODUCTION.format(slug=SLUG, url=proxy.url, key=proxy.key), flush=True)
        proxy.process.wait()


if __name__ == "__main__":
    main()
