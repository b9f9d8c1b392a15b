"""Long streams of each provider: what the scanner makes of them, and which way their events take.

`tests/data/README.md` says where each comes from and what varies in it. A template that stops
matching what providers send fails here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from hoberproxy.dialects.usage import Usage
from hoberproxy.relay.scanner import StreamScanner
from tests.data.make_streams import STREAMS, make
from tests.relay.test_content_template import Passing, unframed
from tests.relay.test_plain_reader import agree
from tests.relay.test_scanner import SLUG, scan
from tests.support.cuts import cut_at
from tests.support.plain_reader import read_plainly, split_events
from tests.support.scripted import chunk

FOLDER = Path(__file__).parents[1] / "data"
CUTTINGS = 8  # at random places


@dataclass(frozen=True)
class Expected:
    """What is known of a stream without the package.

    At least `passed` of its `events` with content take the template's way; `aim` is the share that
    should.
    """

    passed: int
    events: int
    usage: Usage | None
    aim: float = 0.95


EXPECTED = {
    "anthropic": Expected(63, 64, Usage(18, 395)),
    "azure": Expected(79, 80, Usage(15, 80)),
    "cloudflare": Expected(98, 100, Usage(2051, 101)),
    "dashscope": Expected(62, 64, Usage(31, 412)),
    "deepseek": Expected(118, 120, Usage(87, 121, 64, 60)),
    "fireworks": Expected(79, 80, Usage(26, 81)),
    "gemini-thoughts": Expected(70, 73, Usage(11, 1625)),
    "gemini": Expected(63, 65, Usage(11, 775)),
    "groq": Expected(118, 120, Usage(18, 122)),
    "llama-cpp-logprobs": Expected(59, 60, Usage(40, 60, 39)),
    "llama-cpp-python": Expected(79, 80, None),
    "llama-cpp-timings": Expected(99, 100, Usage(40, 100, 39)),
    "llama-cpp-tools": Expected(5, 7, Usage(226, 31), aim=0.7),
    "llama-cpp": Expected(159, 160, Usage(40, 160)),
    "mistral": Expected(79, 80, Usage(19, 81)),
    "ollama": Expected(138, 140, Usage(26, 141)),
    "openai-logprobs": Expected(79, 80, Usage(57, 80)),
    "openai-tools": Expected(119, 122, Usage(57, 121)),
    "openai": Expected(119, 120, Usage(57, 120)),
    "openrouter": Expected(118, 120, Usage(14, 120, 0, 60)),
    "sglang": Expected(98, 100, Usage(10, 101, 0, 40)),
    "siliconflow": Expected(98, 100, Usage(294, 101, 0, 40)),
    "together": Expected(79, 80, Usage(39, 81)),
    "vllm-usage": Expected(79, 80, Usage(25, 81)),
    "vllm": Expected(79, 80, Usage(25, 81)),
    "xai": Expected(118, 121, Usage(12, 350, 11, 290)),
}

all_streams = pytest.mark.parametrize("name", sorted(EXPECTED))
asked_or_not = pytest.mark.parametrize(
    "wants_usage", [pytest.param(True, id="usage asked"), pytest.param(False, id="usage not asked")]
)


def read(name: str) -> bytes:
    return (FOLDER / "streams" / f"{name}.sse").read_bytes()


def pieces_at_random(data: bytes, name: str) -> list[list[bytes]]:
    """Cut the stream at new places each time, into a few long pieces or very many short ones."""
    choose = random.Random(name)
    sizes = [1, 7, 300, 1400, 16_384]
    cuttings = [cut_at(data, range(size, len(data), size)) for size in sizes]
    for number in range(CUTTINGS):
        cuts = [choose.randrange(len(data)) for _ in range(2 << number)]
        cuttings.append(cut_at(data, cuts))
    return cuttings


def pass_as_received(scanner: StreamScanner, data: bytes) -> bytes:
    """Hand over the stream as servers send it: an event a chunk, a chunk a read."""
    out, passing = [], Passing(scanner.template)
    for event in split_events(data):
        passed = b""
        if scanner.is_ready_for_template:
            passed, rest = passing.take(chunk(event.raw))
            assert (rest == b"") is (passed != b""), "all of it or nothing"
        out.append(unframed(passed) if passed else scanner.feed(event.raw))
    return b"".join([*out, scanner.feed_eof()])


def by_template(scanner: StreamScanner) -> int:
    """How many events have taken the template's way."""
    return scanner.template.events


def test_each_stream_is_expected_and_each_expectation_has_its_stream() -> None:
    assert {path.stem for path in (FOLDER / "streams").iterdir()} == set(EXPECTED)


def test_each_stream_has_its_line_in_the_table() -> None:
    table = (FOLDER / "README.md").read_text()
    names = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `streams/")]
    assert sorted(names) == sorted(f"streams/{name}.sse" for name in EXPECTED)


@pytest.mark.parametrize("name", STREAMS)
def test_a_generated_stream_is_as_its_script_makes_it(name: str) -> None:
    assert read(name) == make(name)


@all_streams
@asked_or_not
def test_a_stream_is_what_a_plain_reader_says(name: str, wants_usage: bool) -> None:
    data = read(name)
    reading = read_plainly(data, slug=SLUG, wants_usage=wants_usage)
    assert (reading.failure, reading.usage) == (None, EXPECTED[name].usage)
    for pieces in [[data], *pieces_at_random(data, name)]:
        agree(scan(pieces, wants_usage=wants_usage), reading)


@all_streams
@asked_or_not
def test_a_stream_says_the_same_event_by_event(name: str, wants_usage: bool) -> None:
    data = read(name)
    reading = read_plainly(data, slug=SLUG, wants_usage=wants_usage)
    scanner = StreamScanner(SLUG, wants_usage=wants_usage)
    assert pass_as_received(scanner, data) == reading.output
    assert (scanner.usage, scanner.is_done) == (EXPECTED[name].usage, reading.is_done)
    assert scanner.finish_reason == reading.finish_reason != ""
    assert reading.fewest <= scanner.content_events <= reading.most


@all_streams
@asked_or_not
def test_enough_events_take_the_templates_way(name: str, wants_usage: bool) -> None:
    scanner = StreamScanner(SLUG, wants_usage=wants_usage)
    pass_as_received(scanner, read(name))
    reading = read_plainly(read(name), slug=SLUG, wants_usage=wants_usage)
    expected, passed = EXPECTED[name], by_template(scanner)
    assert reading.fewest == expected.events
    assert passed >= expected.passed
    aim = expected.aim * expected.events
    assert passed < aim or expected.passed >= aim, f"the aim is reached: expect {passed}"
