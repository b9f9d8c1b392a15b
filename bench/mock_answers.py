"""The answers of the bench's mock upstream as bytes, ready but for what differs each time.

No I/O and no clock. Unless a request asks for plain events, an answer has all that OpenAI sends by
default and that differs from answer to answer or from event to event: padding (`obfuscation`), an
identifier, the second, counts and a date in its head.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import lru_cache
from typing import Any

import orjson

MODEL = "bench-1-2025"  # not the slug, so that a gateway has a name to replace
MAX_STREAM_BYTES = 256_000_000  # all of a stream is prebuilt

# Same length as what replaces them, so chunk sizes are prebuilt; bytes that no JSON has are found
# fastest.
ID = b"\x01" * 8
STAMP = b"\x02" * 19
CREATED = b"\x03" * 10  # seconds since 1970
DATE = b"\x04" * 29
COUNT = b"\x05" * 3  # of 100 to 999, another one in each answer

PADDINGS = 16  # streams that differ in their padding, and follow one another
MOST_PADDED = 10_000  # events: a longer stream is prebuilt once
_LETTERS = string.ascii_letters + string.digits


class SettingsError(ValueError):
    """The `bench` object is wrong; the message says where."""


class Fault(Enum):
    """What goes wrong. With `:K`, after K content events (bytes of a body); else no answer."""

    NONE = ""
    STATUS = "status"  # an error with this status, e.g. status:503
    STALL = "stall"  # silence until the client leaves
    CUT = "cut"  # the connection ends in good order, the answer does not
    RESET = "reset"  # the connection is reset
    ERROR = "error"  # an event with an error, and a regular end
    SLOW_HEAD = "slow-head"  # seconds before the answer's head, e.g. slow-head:1.5


@dataclass(frozen=True, slots=True)
class Settings:
    """How a request is answered. Times in seconds; sizes of a stream and of a plain answer."""

    events: int = 64  # with content; role, finish, usage and [DONE] come on top
    event_bytes: int = 200  # of one of them with `data: ` and empty line; at least what it needs
    pace: float = 0.0  # between writes, in whole ms
    first_delay: float = 0.0  # until the first content
    events_per_write: int = 1
    block_bytes: int = (
        65_536  # that a stream without a pace hands over at once; 0: each write alone
    )
    answer_bytes: int = 200  # text of an answer that is not streamed
    logprobs: bool = False
    plain_events: bool = False  # without what OpenAI adds and changes, as before 2026-12
    fault: str = ""

    @property
    def fault_kind(self) -> Fault:
        return Fault(self.fault.partition(":")[0])

    @property
    def fault_value(self) -> float | None:
        _, colon, value = self.fault.partition(":")
        return float(value) if colon else None


def parse_settings(value: Any) -> Settings:
    """Check a request's `bench` object; None means the defaults. Raises SettingsError."""
    if not isinstance(value, dict | None):
        raise SettingsError("expected bench to be an object, got another type")
    known = {field.name: type(field.default) for field in fields(Settings)}
    for name, given in (value or {}).items():
        expected = known.get(name)
        if expected is None:
            raise SettingsError(f"expected bench to have {', '.join(known)}, got another name")
        if type(given) is not expected and not (expected is float and type(given) is int):
            raise SettingsError(f"expected bench.{name} to be {expected.__name__}, got another")
    settings = Settings(**(value or {}))
    _check_ranges(settings)
    return settings


def _check_ranges(settings: Settings) -> None:
    if not 1 <= settings.events <= 999_999 or settings.events_per_write < 1:
        raise SettingsError("expected 1 to 999,999 events and one or more a write, got others")
    size = max(settings.event_bytes, 400) * settings.events
    if size > MAX_STREAM_BYTES or not 1 <= settings.answer_bytes <= MAX_STREAM_BYTES:
        raise SettingsError(f"expected answers of at most {MAX_STREAM_BYTES} bytes, got more")
    if not (0 <= settings.pace <= 3600 and 0 <= settings.first_delay <= 3600):
        raise SettingsError("expected a pace and a first delay of 0 to 3600 s, got others")
    try:
        kind, value = settings.fault_kind, settings.fault_value
    except ValueError:
        names = ", ".join(each.value for each in Fault if each is not Fault.NONE)
        raise SettingsError(f"expected a fault of {names}, with or without :number") from None
    if kind in (Fault.STATUS, Fault.SLOW_HEAD) and value is None:
        raise SettingsError(f"expected a number after {kind.value}:, got none")
    if value is not None and not 0 <= value < 1e6:
        raise SettingsError("expected a fault's number from 0 on, got another")
    if kind is Fault.STATUS and value is not None and not 400 <= value <= 599:
        raise SettingsError("expected a status of 400 to 599 after status:, got another")


# Answers as bytes


class Ending(Enum):
    """What follows the last write."""

    NEXT = "next"  # the connection is ready for another request
    STALL = "stall"
    CUT = "cut"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Script:
    """An answer, ready but for identifier and stamps. Times in ns.

    `head` goes out after `head_delay`, `writes` from `first_delay` on, one each `pace`; without a
    pace each is a block of many events. `events` counts the content events of each write.
    """

    head: bytes
    writes: tuple[bytes, ...]
    events: tuple[int, ...]
    head_delay: int = 0
    first_delay: int = 0
    pace: int = 0
    ending: Ending = Ending.NEXT


_OPENAI_HEADERS = (
    b"Date: %b\r\nConnection: keep-alive\r\naccess-control-expose-headers: X-Request-ID\r\n"
    b"openai-organization: bench\r\nopenai-processing-ms: %b\r\nopenai-project: proj_bench\r\n"
    b"openai-version: 2020-10-01\r\nx-envoy-upstream-service-time: %b\r\n"
    b"x-ratelimit-limit-requests: 10000\r\nx-ratelimit-limit-tokens: 200000\r\n"
    b"x-ratelimit-remaining-requests: 9999\r\nx-ratelimit-remaining-tokens: 199%b\r\n"
    b"x-ratelimit-reset-requests: 8.64s\r\nx-ratelimit-reset-tokens: 4ms\r\n"
    b"x-request-id: req_9be30c1a5f6d47a2b1c4e8d7%b\r\ncf-cache-status: DYNAMIC\r\n"
    b"Strict-Transport-Security: max-age=31536000; includeSubDomains; preload\r\n"
    b"X-Content-Type-Options: nosniff\r\nServer: cloudflare\r\nCF-RAY: 9a3d51f6%b-FRA\r\n"
    b'alt-svc: h3=":443"; ma=86400\r\n'
) % (DATE, COUNT, COUNT, COUNT, ID, ID)
_PLAIN_HEADERS = b"openai-processing-ms: 12\r\nx-request-id: req_%b\r\n" % ID
STREAM_HEAD, PLAIN_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\n%bTransfer-Encoding: chunked\r\n\r\n" % headers
    for headers in (_OPENAI_HEADERS, _PLAIN_HEADERS)
)
JSON_HEAD = (
    b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\n"
    b"openai-processing-ms: 12\r\nx-request-id: req_%b\r\nContent-Length: %d\r\n\r\n"
)
_OPENAI_JSON_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %%d\r\n\r\n"
) % _OPENAI_HEADERS
_EVENT = (
    b'data: {"id":"chatcmpl-CqT4vWm8yBzKpX2nRsLdE%b","object":"chat.completion.chunk",'
    b'"created":%b,"model":"%b","service_tier":"default","system_fingerprint":"fp_560af6e559",'
    b'"choices":[%%b]%%b,"obfuscation":"%%b"}\n\n'
) % (ID, CREATED, MODEL.encode())
_PLAIN_EVENT = (
    b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":1709000000,'
    b'"model":"%b","choices":[%%b]%%b}\n\n'
) % (ID, MODEL.encode())
_CHOICE = b'{"index":0,"delta":{%b},"logprobs":%b,"finish_reason":%b}'
_LOGPROBS = (
    b'{"content":[{"token":" the","logprob":-0.0214,"bytes":[32,116,104,101],'
    b'"top_logprobs":[]}],"refusal":null}'
)
_FILLER = b" the quick brown fox jumps over the lazy dog and on"
_PLAIN_USAGE = (
    b'{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d,'
    b'"prompt_tokens_details":{"cached_tokens":0}}'
)
_USAGE = (
    b'{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d,'
    b'"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
    b'"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,'
    b'"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}'
)
_PLAIN_ANSWER = (
    b'{"id":"chatcmpl-%b","object":"chat.completion","created":1709000000,"model":"%b",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"%%b","refusal":null},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":%%b}'
) % (ID, MODEL.encode())
_ANSWER = (
    b'{"id":"chatcmpl-CqT4vWm8yBzKpX2nRsLdE%b","object":"chat.completion","created":%b,'
    b'"model":"%b","choices":[{"index":0,"message":{"role":"assistant","content":"%%b",'
    b'"refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],"usage":%%b,'
    b'"service_tier":"default","system_fingerprint":"fp_560af6e559"}'
) % (ID, CREATED, MODEL.encode())
_LAST_CHUNK = b"0\r\n\r\n"
_ERROR = {"message": "the bench asked for this", "type": "server_error", "param": None}


@lru_cache(maxsize=64 * PADDINGS)
def make_script(
    settings: Settings, is_stream: bool, include_usage: bool, padding: int = 0
) -> Script:
    """The answer to a request; the same object for the same settings.

    `padding` is the number of one of the streams that differ in their padding alone.
    """
    kind, value = settings.fault_kind, settings.fault_value
    if kind is Fault.STATUS and value is not None:
        return error_script(int(value), _ERROR["message"] or "")
    if kind is Fault.SLOW_HEAD and value is not None:
        script = make_script(replace(settings, fault=""), is_stream, include_usage, padding)
        return replace(script, head_delay=round(value * 1e9))
    if value is None and kind not in (Fault.NONE, Fault.ERROR):
        return Script(b"", (), (), ending=Ending[kind.name])
    if not is_stream:
        return _plain(settings)
    return _stream(settings, Events(settings, include_usage, padding))


def choose_padding(settings: Settings, number: int) -> int:
    """Which of the prebuilt streams the request of this number gets."""
    return 0 if settings.plain_events or settings.events > MOST_PADDED else number % PADDINGS


def error_script(status: int, message: str) -> Script:
    """A refusal in OpenAI's form."""
    body = orjson.dumps({"error": {**_ERROR, "message": message, "code": f"bench_{status}"}})
    head = JSON_HEAD % (status, b"Refused", ID, len(body))
    return Script(head, (body,), (0,))


def _plain(settings: Settings) -> Script:
    text = _filler(settings.answer_bytes)
    if settings.plain_events:
        body = _PLAIN_ANSWER % (text, _PLAIN_USAGE % (settings.events, settings.events + 9))
        head = JSON_HEAD % (200, b"OK", ID, len(body))
    else:
        body = _ANSWER % (text, _USAGE % (settings.events, settings.events + 9))
        head = _OPENAI_JSON_HEAD % len(body)
    ending = Ending.NEXT
    if settings.fault_kind is not Fault.NONE:
        body, ending = body[: int(settings.fault_value or 0)], _ending(settings)
    return Script(head, (body,), (0,), first_delay=round(settings.first_delay * 1e9), ending=ending)


class Events:
    """The events of one stream, in OpenAI's form or plain."""

    def __init__(self, settings: Settings, include_usage: bool, padding: int) -> None:
        self._settings = settings
        self._include_usage = include_usage
        self._usage = b',"usage":null' if include_usage else b""
        self._random = random.Random(padding)
        self._padding = b""

    def role(self) -> bytes:
        """The first event, without content."""
        self._pad()
        return self._choice(b'"role":"assistant","content":"","refusal":null')

    def content(self, number: int) -> bytes:
        """Return a content event of the wanted size, with its number and the place of its stamp."""
        text = b"~%06d@%b~" % (number, STAMP)
        self._pad()
        bare = self._text(text)
        return self._text(text + _filler(self._settings.event_bytes - len(bare)))

    def ending(self) -> Iterator[bytes]:
        """Return the finish, the usage if the request wants it, and [DONE]."""
        self._pad()
        yield self._choice(b"", finish=b'"stop"')
        if self._include_usage:
            self._pad()
            usage = _PLAIN_USAGE if self._settings.plain_events else _USAGE
            counted = usage % (self._settings.events, self._settings.events + 9)
            yield self._event(b"", b',"usage":' + counted)
        yield b"data: [DONE]\n\n"

    def _text(self, text: bytes) -> bytes:
        logprobs = _LOGPROBS if self._settings.logprobs else b"null"
        return self._choice(b'"content":"%b"' % text, logprobs)

    def _choice(self, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        return self._event(_CHOICE % (delta, logprobs, finish), self._usage)

    def _event(self, choice: bytes, usage: bytes) -> bytes:
        if self._settings.plain_events:
            return _PLAIN_EVENT % (choice, usage)
        return _EVENT % (choice, usage, self._padding)

    def _pad(self) -> None:
        """Take another padding."""
        size = self._random.randrange(1, 17)
        self._padding = "".join(self._random.choices(_LETTERS, k=size)).encode()


def _stream(settings: Settings, events: Events) -> Script:
    count = settings.events
    if settings.fault_kind is not Fault.NONE:
        count = min(count, int(settings.fault_value or 0))
    sizes = [
        min(settings.events_per_write, count - start)
        for start in range(0, count, settings.events_per_write)
    ]
    opening = _chunk(events.role())
    writes, number = [], 0
    for size in sizes:
        writes.append(_chunk(b"".join(events.content(number + at) for at in range(size))))
        number += size
    writes[:1] = [opening + b"".join(writes[:1])]
    writes[-1] += _end_of_stream(settings, events)
    sizes = sizes or [0]
    if settings.pace == 0:
        writes, sizes = _join(writes, sizes, settings.block_bytes)
    return Script(
        PLAIN_STREAM_HEAD if settings.plain_events else STREAM_HEAD,
        tuple(writes),
        tuple(sizes),
        first_delay=round(settings.first_delay * 1e9),
        pace=round(settings.pace * 1e9),
        ending=_ending(settings),
    )


def _ending(settings: Settings) -> Ending:
    return Ending.__members__.get(settings.fault_kind.name, Ending.NEXT)


def _end_of_stream(settings: Settings, events: Events) -> bytes:
    """What comes with the last content, as model servers send it."""
    if settings.fault_kind is Fault.ERROR:
        return _chunk(b"data: %b\n\n" % orjson.dumps({"error": _ERROR})) + _LAST_CHUNK
    if settings.fault_kind is not Fault.NONE:
        return b""
    return b"".join(map(_chunk, events.ending())) + _LAST_CHUNK


def _filler(size: int) -> bytes:
    return (_FILLER * (max(size, 0) // len(_FILLER) + 1))[: max(size, 0)]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _join(
    writes: Sequence[bytes], sizes: Sequence[int], limit: int
) -> tuple[list[bytes], list[int]]:
    """Put neighbours together up to a block's size: nobody waits between them."""
    blocks, counts, size = [[writes[0]]], [sizes[0]], len(writes[0])
    for write, count in zip(writes[1:], sizes[1:], strict=True):
        if size + len(write) > limit:
            blocks.append([])
            counts.append(0)
            size = 0
        blocks[-1].append(write)
        counts[-1] += count
        size += len(write)
    return [b"".join(block) for block in blocks], counts
