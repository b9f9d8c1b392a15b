"""The scanner against a plain reader, on random streams: events of a byte to a megabyte."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hoberproxy.protocol.http_body import ChunkedBody
from hoberproxy.relay.edge_templates import EdgeTemplates
from hoberproxy.relay.scanner import StreamScanner
from hoberproxy.upstream.connection import ChunkTaker
from tests.relay.test_scanner import SLUG, Seen, scan
from tests.support.cuts import cut_at
from tests.support.patience import TEST_LIMIT, examples, patient
from tests.support.plain_reader import HELD_EVENT, HELD_OPENING, Reading, read_plainly, split_events
from tests.support.scripted import chunk

from .test_relay import SLUG as RELAYED_AS
from .test_relay import Relayed

EXAMPLES = examples(150)
many = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

pytestmark = pytest.mark.timeout(TEST_LIMIT + patient(EXAMPLES))

UPSTREAM = "upstream-name"
WORDS = [
    "a",
    " some words",
    "é",
    "日本",
    "\U0001f600",
    '"',
    "\\",
    "\\\\",
    '\\"',
    "\n",
    "\t",
    "{",
    "[[",
]
WORDS += ['"model":"upstream-name"', ',"usage":null', '"usage":null}\n\n', "[DONE]", "data: [DONE]"]
WORDS += ['"error":{', "model", "usage", "error", "finish_reason", '"choices"', "\x7f", "}]", ""]
SIZES = [*range(16_300, 16_420, 7), 20_000, 64_900, 65_200, 65_500, 66_000, 150_000, 1_000_000]
COUNTS = {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18}


class Maker:
    """Makes one stream. Of what is drawn only the seed is hypothesis': a megabyte isn't drawn."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.like = self.random.random() < 0.5  # events are written like one another
        self.style = self._style()
        self.big = self.random.random() < 0.25  # there are events too long to be held
        self.errs = self.random.random() < 0.3
        self.model = self.random.choice([UPSTREAM, UPSTREAM, "m", SLUG, 'q"\\é', ""])
        self.has_null = self.random.random() < 0.5  # as of a server that is asked for usage
        self.nested = self.random.random() < 0.3
        self.order = self.random.random()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def stream(self) -> bytes:
        events = [self.event(self.document(place)) for place in range(self.random.randrange(1, 14))]
        if self.chance(0.7):
            events.append(self.event(self.chunk({}, finish_reason="stop")))
        if self.chance(0.5):
            events.append(self.event(self.usage_event()))
        if self.chance(0.7):
            events.append(self.dress(b"[DONE]", self.style))
        if self.chance(0.15):
            events.append(self.event(self.chunk({"content": "late"})))
        data = b"".join(events)
        for _ in range(self.random.choice([0, 0, 0, 0, 1, 2, 4])):  # it ends without its blank line
            if data.endswith((b"\r", b"\n")):
                data = data[:-1]
        return (b"\xef\xbb\xbf" if self.chance(0.1) else b"") + data

    # What events say

    def text(self) -> str:
        text = "".join(self.random.choice(WORDS) for _ in range(self.random.randrange(1, 5)))
        if self.big and self.chance(0.3):
            text += self.random.choice(["x", "é", "\\", '"', "日", "[{", "words "]) * (
                self.random.choice(SIZES) // self.random.choice([1, 1, 2, 3])
            )
        return text

    def document(self, place: int) -> Any:
        chance = self.random.random()
        if place == 0 and chance < 0.7:
            return self.chunk({"role": "assistant", "content": ""})
        if self.errs and chance < 0.15:
            return self.error()
        if chance < 0.20:
            return self.usage_event()
        if chance < 0.25:
            return self.random.choice(["ping", b"ping", None, [], [1], 7, b"{broken", b'{"a":'])
        if chance < 0.32:
            return self.random.choice([{}, {"choices": []}, {"choices": None}, {"type": "ping"}])
        if chance < 0.45:
            return self.chunk(self.other_delta())
        if chance < 0.50:
            return self.chunk(None, message={"role": "assistant", "content": self.text()})
        if chance < 0.55:
            return self.chunk({"content": self.text()}, usage=dict(COUNTS))
        return self.chunk({"content": self.text()})

    def other_delta(self) -> dict[str, Any]:
        calls = [{"index": 0, "function": {"name": "f", "arguments": self.text()}}]
        return self.random.choice(
            [
                {},
                {"role": "assistant"},
                {"content": None, "refusal": ""},
                {"reasoning_content": self.text()},
                {"reasoning_details": [{"type": "reasoning.text", "text": self.text()}]},
                {"content": "", "tool_calls": calls},
                {"images": [{"image_url": {"url": "data:" + self.text()}}]},
                {"role": "", "content": self.text(), "model": "nested", "usage": None},
            ]
        )

    def chunk(self, delta: Any, **more: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        choice |= {name: more.pop(name) for name in ("finish_reason", "message") if name in more}
        if delta is None:
            del choice["delta"]
        document: dict[str, Any] = {"id": "c-1", "object": "chat.completion.chunk", "created": 1}
        if self.chance(0.05):
            document["created"] = self.random.randrange(1000)
        model = (
            self.model if self.chance(0.9) else self.random.choice(["other", None, {"model": "x"}])
        )
        if self.chance(0.95):
            document["model"] = model
        if self.nested:
            document["meta"] = {"model": UPSTREAM, "usage": None, "x": [{"usage": None}]}
            choice["usage"] = None
        document["choices"] = [choice]
        if self.has_null:
            document["usage"] = None
        if self.chance(0.05):
            document["error"] = self.random.choice([None, {}, ""])
        if self.chance(0.03):
            document["padding"] = [[], {}, [[1, 2], ["a", {"model": "x"}]], -1.5e3, True] * 3
        return document | more

    def usage_event(self) -> dict[str, Any]:
        document = self.chunk({}, usage=COUNTS | {"completion_tokens": self.random.randrange(99)})
        document["choices"] = self.random.choice([[], [], None])
        if self.chance(0.3):
            del document["choices"]
        if self.big and self.chance(0.2):
            document["note"] = self.text()
        return document

    def error(self) -> dict[str, Any]:
        text = self.text()
        failing = self.chunk({"content": text})
        failing["choices"][0] |= self.random.choice(
            [{"finish_reason": "error"}, {"error": {"message": text, "code": 503}}]
        )
        return self.random.choice(
            [
                {"error": {"message": text, "code": self.random.choice([400, 429, 500, "x"])}},
                {"error": text + "."},
                {"object": "error", "message": text, "code": 400},
                {"type": "error", "error": {"type": "overloaded_error", "message": text}},
                {"detail": text + "."},
                {"code": 404, "message": text + ".", "request_id": "r"},
                {"base_resp": {"status_code": 1000, "status_msg": text}},
                self.chunk({"content": text}, error={"code": 502}),
                failing,
            ]
        )

    # How they are written

    def _style(self) -> dict[str, Any]:
        choose = self.random.choice
        return {
            "separators": choose([(",", ":"), (",", ":"), (", ", ": "), (" ,\t", " :\t")]),
            "indent": choose([None, None, None, None, 1]),
            "ascii": choose([True, False]),
            "shuffle": choose([None, None, 1, 2, 3]),
            "escape": choose([False, False, False, False, False, True]),
            "line_end": choose([b"\n", b"\n", b"\n", b"\r\n", b"\r"]),
            "prefix": choose([b"data: ", b"data: ", b"data: ", b"data:"]),
            "dress": choose(["", "", "", "", "id", "comment", "event", "blank"]),
        }

    def event(self, document: Any) -> bytes:
        style = self.style if self.like or self.chance(0.5) else self._style()
        if isinstance(document, bytes):
            return self.dress(document, style)
        if style["shuffle"] is not None and isinstance(document, dict):
            items = list(document.items())
            random.Random(style["shuffle"]).shuffle(items)
            document = dict(items)
        raw = json.dumps(
            document,
            separators=style["separators"],
            indent=style["indent"],
            ensure_ascii=style["ascii"],
        ).encode()
        if style["escape"]:
            for name, escaped in ((b"model", b"m\\u006fdel"), (b"usage", b"\\u0075sage")):
                raw = raw.replace(b'"%b":' % name, b'"%b":' % escaped, 1)
        return self.dress(raw, style)

    def dress(self, payload: bytes, style: dict[str, Any]) -> bytes:
        lines = [style["prefix"] + line for line in payload.split(b"\n")]
        if style["dress"] == "id":
            lines = [b"id: 7", *lines, b"retry: 10"]
        elif style["dress"] == "comment":
            lines = [b": error: {", *lines, b":"]
        elif style["dress"] == "event":
            lines = [b"event: message", *lines]
        elif style["dress"] == "blank":
            lines = [b"", *lines]
        if self.errs and self.chance(0.05):
            lines.insert(
                0, self.random.choice([b"event: error", b'error: {"code":500}', b"error: no"])
            )
        end = style["line_end"]
        return end.join(lines) + end + end

    def cuts(self, data: bytes) -> list[bytes]:
        size, choose = len(data), self.random.choice
        near = [place for place in range(min(size, 200_000)) if data[place : place + 1] in b"\r\n"]
        cuts = [self.random.randrange(size + 1) for _ in range(choose([0, 1, 3, 20]))]
        cuts += [
            choose(near) + self.random.randrange(-3, 4) for _ in range(choose([0, 2, 10])) if near
        ]
        if (step := choose([0, 0, 1, 7, 1400, 65_536])) and size // step < 3000:
            cuts += range(0, size, step)
        return cut_at(data, [max(0, cut) for cut in cuts])


class Server(Maker):
    """Makes streams as model servers write them: event after event the same but for some values."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.like, self.big, self.errs = True, False, self.chance(0.1)
        self.style |= {"escape": False, "dress": "", "indent": None}
        some = [name for name in _FEATURES if self.chance(0.25)]
        self.features = frozenset(some)
        self.total = self.random.choice([0, 0, 1, 90])
        self.created = 1_700_000_000
        self.number = 0  # of the stream
        self.names = ["content"]
        if self.chance(0.3):
            self.names = [self.random.choice(["reasoning", "reasoning_content"]), "content"]
        if self.chance(0.2):
            self.names.append("tool_calls")

    def stream(self) -> bytes:
        self.number += 1
        events = [self.event(self.chunk({"role": "assistant", "content": ""}) | self.values())]
        for name in self.names:
            for _ in range(self.random.randrange(1, 24)):
                document = self.content(name)
                if self.chance(0.04):
                    document = self.document(1)
                events.append(self.event(document))
        events.append(self.event(self.chunk({}, finish_reason="stop") | self.values()))
        if self.chance(0.5):
            events.append(self.event(self.usage_event()))
        return b"".join([*events, self.dress(b"[DONE]", self.style)])

    def text(self) -> str:
        words = [" the", " a", "ing", ".", "", " so"] if self.chance(0.8) else WORDS
        return self.random.choice(words)

    def content(self, name: str) -> dict[str, Any]:
        text = self.text()
        delta: dict[str, Any] = {name: text}
        if name == "tool_calls":
            delta = {name: [{"index": 0, "function": {"arguments": text}}]}
        if "role" in self.features:
            delta = {"role": "assistant", "content": None} | delta
        if name == "reasoning" and "details" in self.features:
            delta["reasoning_details"] = [{"type": "reasoning.text", "text": text, "index": 0}]
        document = self.chunk(delta)
        if "logprobs" in self.features:
            document["choices"][0]["logprobs"] = {"content": [self.logprob(text)]}
        if "choice" in self.features:
            document["choices"][0]["index"] = self.random.randrange(2)
        return document | self.values()

    def values(self) -> dict[str, Any]:
        """Members that change from event to event, or at times."""
        values: dict[str, Any] = {}
        if "stream" in self.features:
            values["id"] = f"stream-{self.number}"
        if "obfuscation" in self.features:
            letters = self.random.choices("abcXYZ019", k=self.random.randrange(14))
            values["obfuscation"] = self.text() if self.chance(0.05) else "".join(letters)
        if "created" in self.features:
            self.created += self.random.choice([0, 0, 0, 1, -1])
            values["created"] = self.created
        if "id" in self.features:
            values["id"] = f"id-{self.random.randrange(10**6)}"
        if "usage" in self.features:
            self.total += self.random.choice([0, 1, 1, 9, 100, 100, -1])
            values["usage"] = self.usage()
        return values

    def usage(self) -> dict[str, Any] | None:
        if self.chance(0.02):
            return None
        completion = max(0, self.total)
        details = {"cached_tokens": self.random.choice([0, 0, 0, 5]), "audio_tokens": None}
        return {
            "prompt_tokens": 7,
            "completion_tokens": completion,
            "total_tokens": 7 + completion,
            "prompt_tokens_details": details,
            "cost": completion * 0.25,
        }

    def logprob(self, token: str) -> dict[str, Any]:
        number = self.random.choice([0, -0.0, -1.25e-07, -12.5, -9999.0, 1e21])
        best = [{"token": self.text(), "logprob": number, "bytes": None} for _ in range(2)]
        raw = list(token.encode()) if self.chance(0.95) else None
        return {"token": token, "logprob": number, "bytes": raw, "top_logprobs": best}


_FEATURES = "role details logprobs choice stream obfuscation created id usage".split()


def relay_chunks(pieces: list[bytes], *, wants_usage: bool) -> Relayed:
    """Relay a stream that comes in these pieces, of whole chunks each, as its connection does."""
    relayed = Relayed(wants_usage=wants_usage)
    taker: ChunkTaker | None = None
    for piece in pieces:
        rest = taker.take(piece) if taker is not None else piece
        if rest:
            before, taker = taker, relayed.relay.on_body(b"".join(ChunkedBody().feed(rest)))
            if before is not None:
                before.flush()
        if relayed.is_over:
            return relayed
    relayed.relay.on_end()
    return relayed


def agree(seen: Seen, reading: Reading) -> None:
    """What the scanner says is what the plain reader says."""
    if reading.failure is not None and len(reading.failed_event) > HELD_EVENT // 2:
        # A part of an event that fails at its end has passed; never more than that.
        assert seen.output.startswith(reading.output)
        assert reading.failed_event.startswith(seen.output[len(reading.output) :])
    else:
        assert seen.output == reading.output
    assert seen.failure == reading.failure
    assert (seen.has_content, seen.is_done) == (reading.has_content, reading.is_done)
    assert (seen.usage, seen.finish_reason) == (reading.usage, reading.finish_reason)
    if reading.failure is None:
        assert seen.upstream_model == reading.model
    assert seen.upstream_id == reading.upstream_id
    assert reading.fewest <= seen.content_events <= reading.most


def without_output(seen: Seen) -> tuple[Any, ...]:
    return (seen.failure, seen.content_events, seen.usage, seen.is_done, seen.finish_reason)


@many
@given(seed=st.integers(0, 2**63), wants_usage=st.booleans())
def test_a_stream_is_what_a_plain_reader_says(seed: int, wants_usage: bool) -> None:
    maker = Maker(seed)
    data = maker.stream()
    reading = read_plainly(data, slug=SLUG, wants_usage=wants_usage)
    whole = scan([data], wants_usage=wants_usage)
    agree(whole, reading)
    for _ in range(2):
        seen = scan(maker.cuts(data), wants_usage=wants_usage)
        agree(seen, reading)
        assert without_output(seen) == without_output(whole)


@many
@given(seed=st.integers(0, 2**63), wants_usage=st.booleans(), asked_before=st.booleans())
@example(seed=12579, wants_usage=False, asked_before=True)  # a name changed at the end
def test_what_is_known_of_earlier_streams_changes_nothing(
    seed: int, wants_usage: bool, asked_before: bool
) -> None:
    edges = EdgeTemplates()
    maker = Server(seed) if seed % 2 else Maker(seed)
    maker.like, maker.big = True, maker.big and maker.chance(0.2)
    streams = [maker.stream() for _ in range(2)]
    for number, data in enumerate([*streams, streams[0], streams[0], streams[1], *streams]):
        wants = wants_usage if number > 3 else asked_before
        reading = read_plainly(data, slug=SLUG, wants_usage=wants)
        events = [each + b"\n\n" for each in data.split(b"\n\n") if each]
        for pieces in ([data], maker.cuts(data), events if data.endswith(b"\n\n") else [data]):
            known = StreamScanner(SLUG, wants_usage=wants, edges=edges)
            seen = scan(pieces, scanner=known)
            agree(seen, reading)
            alone = scan(pieces, wants_usage=wants)
            assert without_output(seen) == without_output(alone)


@many
@given(seed=st.integers(0, 2**63), wants_usage=st.booleans())
def test_a_servers_stream_is_what_a_plain_reader_says(seed: int, wants_usage: bool) -> None:
    server = Server(seed)
    data = server.stream()
    reading = read_plainly(data, slug=SLUG, wants_usage=wants_usage)
    whole = scan([data], wants_usage=wants_usage)
    agree(whole, reading)
    events = [event.raw for event in split_events(data)]
    for pieces in (events, server.cuts(data), server.cuts(data)):
        seen = scan(pieces, wants_usage=wants_usage)
        agree(seen, reading)
        assert without_output(seen) == without_output(whole)


@many
@given(seed=st.integers(0, 2**63), wants_usage=st.booleans())
def test_a_servers_chunks_are_what_a_plain_reader_says(seed: int, wants_usage: bool) -> None:
    server = Server(seed)
    data = server.stream()
    reading = read_plainly(data, slug=RELAYED_AS, wants_usage=wants_usage)
    events = [event.raw for event in split_events(data)]
    cut = server.cuts(data) if server.chance(0.2) else events
    chunks = [chunk(each) for each in cut if each]
    while len(chunks) > 1 and server.chance(0.8):  # some are read at once
        place = server.random.randrange(len(chunks) - 1)
        chunks[place : place + 2] = [chunks[place] + chunks[place + 1]]
    relayed = relay_chunks(chunks, wants_usage=wants_usage)
    assert relayed.payload == reading.output
    assert relayed.sent.answer.body_bytes == len(relayed.payload)
    outcome = relayed.relay.outcome()
    assert (outcome.usage, outcome.finish_reason) == (reading.usage, reading.finish_reason)
    assert outcome.upstream_id == reading.upstream_id
    assert reading.fewest <= outcome.content_events <= reading.most


def test_the_limits_are_those_of_the_scanner() -> None:
    from hoberproxy.relay import scanner as stream

    assert (stream.HOLD_LIMIT_BYTES, stream.OPENING_LIMIT_BYTES) == (HELD_EVENT, HELD_OPENING)
