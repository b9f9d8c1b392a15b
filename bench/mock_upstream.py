"""An OpenAI-compatible upstream to measure against: paced streams, each event with its send time.

The request's `bench` object sets `events` (content events) and `pace` (seconds between them).
Events look as OpenAI's do once usage is asked for, plus `sent_ns`: CLOCK_MONOTONIC just before the
write, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import orjson
import uvloop

MODEL = "bench-model-2025-01-01"  # not the slug, so that the proxy has a name to replace

_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-bench0000000000000001","object":"chat.completion.chunk",'
    b'"created":1709000000,"model":"' + MODEL.encode() + b'","system_fingerprint":"fp_bench",'
    b'"choices":[%b],"usage":%b,"sent_ns":%d}\n\n'
)
_CHOICE = b'{"index":0,"delta":{%b},"logprobs":null,"finish_reason":%b}'
_USAGE = b'{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d}'
_CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)")


def stream(events: int) -> Iterator[bytes]:
    """The body, one write at a time, stamped when it is asked for.

    The role comes with the first content, the end with the finish reason, as real ones send them.
    """
    opening = _chunk(_CHOICE % (b'"role":"assistant","content":""', b"null"))
    for number in range(events):
        yield opening + _chunk(_CHOICE % (b'"content":" tok%d"' % number, b"null"))
        opening = b""
    finish = _chunk(_CHOICE % (b"", b'"stop"'))
    usage = _chunk(b"", _USAGE % (events, events + 9))
    yield finish + usage + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def _chunk(choices: bytes, usage: bytes = b"null") -> bytes:
    event = _EVENT % (choices, usage, time.monotonic_ns())
    return b"%x\r\n%b\r\n" % (len(event), event)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request of a connection after the other; each must have a Content-Length."""
    clock = asyncio.get_running_loop().time
    with suppress(asyncio.IncompleteReadError, ConnectionError), closing(writer):
        while length := _CONTENT_LENGTH.search(await reader.readuntil(b"\r\n\r\n")):
            settings = orjson.loads(await reader.readexactly(int(length[1])))["bench"]
            writer.write(_HEAD)
            due = clock()
            for data in stream(settings["events"]):
                writer.write(data)
                await writer.drain()
                due += settings["pace"]  # not from now: a late timer must not slow the stream
                await asyncio.sleep(due - clock())


async def main() -> None:
    """Serve on a free port of 127.0.0.1 until killed."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(f"listens on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
