"""npm's `ai` with `@ai-sdk/openai` against the proxy: a broken stream must surface as an error.

`make test` installs them where node and npm are; without, these tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted import (
    Close,
    Script,
    ScriptedUpstream,
    Stall,
    event,
    json_response,
    sse,
    stream_events,
)

from .conftest import ProxyTo
from .harness import SLUG, SOON, WAIT, Proxy

FOLDER = Path(__file__).parent.parent / "js"
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not on this machine"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules" / "ai").exists(),
        reason="npm packages are not installed (make test does it, or npm ci in tests/js)",
    ),
]

EVENTS = stream_events(3)
BEGUN: Script = sse(*EVENTS)[:3]  # head, role, the first content


async def what_node_saw(proxy: Proxy, path: str = "/v1") -> dict[str, Any]:
    """What a program around `streamText` sees of one stream."""
    assert NODE is not None
    process = await asyncio.create_subprocess_exec(
        *(NODE, "stream_error.mjs", proxy.url + path, "hb_live_none", SLUG),
        cwd=FOLDER,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(2 * WAIT):
            out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    saw: dict[str, Any] = json.loads(out)
    return saw


async def test_a_whole_stream_is_no_error(proxy_to: ProxyTo) -> None:
    async with ScriptedUpstream(sse(*EVENTS)) as upstream, proxy_to(upstream) as proxy:
        saw = await what_node_saw(proxy)
        assert upstream.requests[0].json()["stream"] is True
    assert saw == {
        "text": " word0 word1 word2",
        "finishReason": "stop",
        "errors": [],
        "rejection": None,
    }


BREAKS: dict[str, tuple[Script, str]] = {
    "cut": ([Close()], "/v1"),
    "cut, as OpenRouter's clients see it": ([Close()], "/api/v1"),
    "silent": ([Stall()], "/v1"),
    "ended by an error event": (sse(event({"error": {"message": "no"}}))[1:], "/v1"),
}


@pytest.mark.parametrize(("rest", "path"), BREAKS.values(), ids=BREAKS)
async def test_a_stream_that_breaks_after_content_surfaces_as_an_error(
    proxy_to: ProxyTo, rest: Script, path: str
) -> None:
    async with (
        ScriptedUpstream([*BEGUN, *rest]) as upstream,
        proxy_to(upstream, limits=SOON) as proxy,
    ):
        saw = await what_node_saw(proxy, path)
        record = await proxy.wait_for_record()
    assert saw["text"] == " word0"
    assert saw["errors"] or saw["rejection"]
    assert saw["finishReason"] != "stop"
    assert record.is_failure


async def test_an_error_instead_of_a_stream_surfaces_too(proxy_to: ProxyTo) -> None:
    async with (
        ScriptedUpstream(json_response(500, {})) as upstream,
        proxy_to(upstream) as proxy,
    ):
        saw = await what_node_saw(proxy)
    assert (saw["text"], saw["finishReason"]) == ("", None)
    assert saw["errors"] == ["provider a answered with status 500"]
