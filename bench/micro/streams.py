"""What the cases are fed: a stream's events and a request, as OpenAI and its clients write them."""

from __future__ import annotations

import orjson

MODEL = b"gpt-4o-mini-2024-07-18"
SLUG = "openai/gpt-4o-mini"

_EVENT = (
    b'data: {"id":"chatcmpl-bench0001","object":"chat.completion.chunk","created":1709000000,'
    b'"model":"' + MODEL + b'","choices":[{"index":0,"delta":%b,"logprobs":null,'
    b'"finish_reason":%b}],"usage":null}\n\n'
)
OPENING = _EVENT % (b'{"role":"assistant","content":"","refusal":null}', b"null")
CONTENT = _EVENT % (b'{"content":" token"}', b"null")
FINISH = _EVENT % (b"{}", b'"stop"')


def chunk(data: bytes) -> bytes:
    """In chunked framing."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def pad(event: bytes, number: int) -> bytes:
    """The event with OpenAI's padding, another one for each number."""
    padding = f"{number * 2_654_435_761 % 2**32:08x}"[number % 8 :]
    return event.replace(b"}\n\n", b',"obfuscation":"%b"}\n\n' % padding.encode())


def request_body(prompt_bytes: int, **members: object) -> bytes:
    """A chat request as the official client sends it."""
    text = ("The quick brown fox jumps over the lazy dog. " * (prompt_bytes // 45 + 1))[
        :prompt_bytes
    ]
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": text},
    ]
    body = {"model": SLUG, "messages": messages, "stream": True, "temperature": 0.2}
    return orjson.dumps(body | members)
