"""The real nginx and Caddy with the configs of deploy/: an event passes, and so does a leaving."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from .conftest import RawClient, StartProxy, chat
from .scripted import (
    WAIT,
    AwaitRelease,
    Script,
    ScriptedUpstream,
    Send,
    Stall,
    chunk,
    refused_port,
    sse_head,
    stream_events,
)
from .tools import need_tool

DEPLOY = Path(__file__).parent.parent / "deploy"
NAME = "llm.example.com"
CLIENT = "127.0.0.2"  # another address than the front's own
EVENTS = stream_events(3)


@dataclass(frozen=True, slots=True)
class Front:
    """A server with TLS: how it is checked and started with the files in a folder."""

    check: Callable[[Path], list[str]]
    start: Callable[[Path], list[str]]
    write: Callable[[Path, int, int], None]  # folder, its port, the proxy's port


def write_nginx(folder: Path, port: int, proxy_port: int) -> None:
    site = (DEPLOY / "nginx.conf").read_text()
    for old, new in {
        "127.0.0.1:8080": f"127.0.0.1:{proxy_port}",
        "listen 443": f"listen 127.0.0.1:{port}",
        "    listen [::]:443 ssl;\n": "",
        "# limit_conn": "limit_conn",  # what may be uncommented works, too
        f"/etc/ssl/certs/{NAME}.pem": f"{folder}/certificate.pem",
        f"/etc/ssl/private/{NAME}.key": f"{folder}/certificate.key",
    }.items():
        assert old in site
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}include {folder}/site.conf;\n}}\n"
    )


def write_caddy(folder: Path, port: int, proxy_port: int) -> None:
    site = (DEPLOY / "Caddyfile").read_text()
    for old, new in {
        "127.0.0.1:8080": f"127.0.0.1:{proxy_port}",
        f"\n{NAME} {{\n": f"\n{NAME}:{port} {{\n\tbind 127.0.0.1\n"
        f"\ttls {folder}/certificate.pem {folder}/certificate.key\n",
    }.items():
        assert old in site
        site = site.replace(old, new)
    options = "{\n\tadmin off\n\tauto_https off\n}\n"
    (folder / "Caddyfile").write_text(options + site)


def nginx(folder: Path, *options: str) -> list[str]:
    return [need_tool("nginx"), "-e", "stderr", "-c", f"{folder}/nginx.conf", *options]


def caddy(folder: Path, command: str) -> list[str]:
    file = f"{folder}/Caddyfile"
    return [need_tool("caddy"), command, "--config", file, "--adapter", "caddyfile"]


FRONTS = {
    "nginx": Front(lambda folder: nginx(folder, "-t"), nginx, write_nginx),
    "caddy": Front(
        lambda folder: caddy(folder, "validate"), lambda folder: caddy(folder, "run"), write_caddy
    ),
}


@pytest.fixture(params=FRONTS.values(), ids=FRONTS)
def front(request: pytest.FixtureRequest) -> Front:
    found: Front = request.param
    return found


@asynccontextmanager
async def running_front(
    front: Front, folder: Path, proxy_port: int
) -> AsyncIterator[Callable[[], Awaitable[RawClient]]]:
    """Check the config, start the server, and connect clients that trust its certificate."""
    authority = trustme.CA()
    certificate = authority.issue_cert(NAME)
    certificate.private_key_pem.write_to_path(folder / "certificate.key")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "certificate.pem", append=True)
    with refused_port() as port:
        front.write(folder, port, proxy_port)
    checked = await start(folder, front.check(folder))
    output, _ = await checked.communicate()
    assert checked.returncode == 0, output.decode()
    assert b"[warn]" not in output, output.decode()  # nginx's; Caddy's are about the certificate

    server = await start(folder, front.start(folder))
    clients: list[RawClient] = []

    async def connect_one() -> RawClient:
        clients.append(await connect(port, authority))
        return clients[-1]

    try:
        yield connect_one
    finally:
        for client in clients:
            await client.aclose()
        with suppress(ProcessLookupError):
            server.terminate()
        await server.communicate()


async def start(folder: Path, command: list[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
    )


async def connect(port: int, authority: trustme.CA) -> RawClient:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with asyncio.timeout(WAIT):
        while True:
            try:
                return RawClient(
                    *await asyncio.open_connection(
                        "127.0.0.1",
                        port,
                        ssl=context,
                        server_hostname=NAME,
                        local_addr=(CLIENT, 0),
                    )
                )
            except ConnectionError:
                await asyncio.sleep(0.02)


def ask(key: str) -> bytes:
    body = {"model": "test/model", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    return chat(key, body).replace(b"host: localhost", b"host: " + NAME.encode())


async def read_until(client: RawClient, mark: bytes) -> None:
    while mark not in await client.read_line():
        pass


async def test_each_event_passes_when_it_comes(
    front: Front, start_proxy: StartProxy, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    begin: Script = [sse_head(), Send(chunk(EVENTS[0]) + chunk(EVENTS[1]))]
    rest = b"".join(chunk(event) for event in (*EVENTS[2:], b""))
    upstream.add([*begin, AwaitRelease("the rest"), Send(rest)])
    proxy = await start_proxy()
    async with running_front(front, tmp_path, proxy.port) as connect_one:
        client = await connect_one()
        client.send(ask(proxy.key))
        assert b" 200 " in await client.read_line()
        await read_until(client, b"word0")  # while the upstream is still writing
        upstream.release("the rest")
        await read_until(client, b"[DONE]")


async def test_a_client_that_leaves_takes_its_upstream_along(
    front: Front, start_proxy: StartProxy, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.add([sse_head(), Send(chunk(EVENTS[0]) + chunk(EVENTS[1])), Stall()])
    proxy = await start_proxy()
    async with running_front(front, tmp_path, proxy.port) as connect_one:
        client = await connect_one()
        client.send(ask(proxy.key))
        await read_until(client, b"word0")
        await client.aclose()
        (record,) = await proxy.wait_for_records(1)
        assert record.status == 499
