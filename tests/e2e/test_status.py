"""`hoberproxy status` and `hoberproxy upgrade`, as an operator types them."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted import WAIT, AwaitRelease, Script, ScriptedUpstream, sse, stream_events

from .harness import chat
from .test_workers import begin_stream, finish_stream, service, write_config

EVENTS = stream_events(3)
WAITING: Script = [*sse(*EVENTS)[:3], AwaitRelease("go"), *sse(*EVENTS)[3:]]


async def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `hoberproxy …` on the config in `folder`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hoberproxy", *arguments),
        *("--config", str(folder / "hoberproxy.toml")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT * 3):
        out, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


async def test_status_shows_workers_streams_endpoints_and_keys(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(default=WAITING) as upstream,
        service(tmp_path, upstream) as running,
        running.connect() as client,
    ):
        await begin_stream(client)
        code, out, errors = await command(tmp_path, "status", "--json")
        assert (code, errors) == (0, "")
        document: dict[str, Any] = json.loads(out)
        assert document["streams"] == 1
        assert [each["state"] for each in document["workers"]] == ["serving"] * 2
        assert {each["pid"] for each in document["workers"]} == set(running.workers())
        assert sum(each["connections"] for each in document["workers"]) == 1
        assert document["keys"] == [{"key": "anonymous", "streams": 1}]
        (endpoint,) = document["endpoints"]
        assert (endpoint["provider"], endpoint["cooling_in"]) == ("a", 0)
        code, table, _ = await command(tmp_path, "status")
        assert code == 0
        assert "1 streams" in table and "anonymous" in table and "serving" in table
        upstream.release("go")
        await finish_stream(client)


async def test_the_socket_is_for_its_owner_alone_and_goes_with_the_service(tmp_path: Path) -> None:
    path = tmp_path / "records.sock"
    async with ScriptedUpstream() as upstream:
        async with service(tmp_path, upstream, workers=1):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not path.exists()
        code, _, errors = await command(tmp_path, "status")
    assert (code, errors) == (1, f"hoberproxy: no service answers at {path}; is it running?\n")


@pytest.mark.parametrize("is_good", [True, False], ids=["good config", "bad config"])
async def test_upgrade_tells_how_it_went(tmp_path: Path, is_good: bool) -> None:
    async with (
        ScriptedUpstream(default=sse(*EVENTS)) as upstream,
        service(tmp_path, upstream) as running,
    ):
        if is_good:
            code, out, _ = await command(tmp_path, "upgrade")
            assert (code, "generation 2 serves" in out) == (0, True)
        else:
            socket = tmp_path / "records.sock"
            write_config(tmp_path, "ftp://nowhere", server=f'admin_socket = "{socket}"')
            code, _, errors = await command(tmp_path, "upgrade")
            assert code == 3, "the command cannot read the config either"
            assert "providers.a.base_url" in errors
        assert (await running.post(chat(stream=True))).status == 200
