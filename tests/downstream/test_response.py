"""The framing of an answer, on a transport that only remembers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hoberproxy.downstream.response import Answer, Client
from hoberproxy.downstream.socket_writer import Sink

JSON = [(b"content-type", b"application/json")]
SSE = [(b"content-type", b"text/event-stream")]


class FakeTransport:
    """Keeps what is written, one entry a write; says that it waits for as long as `waits`."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.waits = False
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def abort(self) -> None:
        self.is_aborted = True

    def get_write_buffer_size(self) -> int:
        return len(self.writes) if self.waits else 0


class FakeClient(Client):
    """Keeps how answers ended."""

    def __init__(self) -> None:
        self.ends: list[bool] = []

    def on_answer_end(self, *, keep_alive: bool) -> None:
        self.ends.append(keep_alive)


class Sent:
    """An answer and both of its ends."""

    def __init__(self, version_minor: int = 1, keep_alive: bool = True) -> None:
        self.transport = FakeTransport()
        self.client = FakeClient()
        self.answer = Answer(
            Sink(self.transport), self.client, version_minor=version_minor, keep_alive=keep_alive
        )

    @property
    def head(self) -> list[bytes]:
        return b"".join(self.transport.writes).partition(b"\r\n\r\n")[0].split(b"\r\n")

    @property
    def body(self) -> bytes:
        return b"".join(self.transport.writes).partition(b"\r\n\r\n")[2]


def test_a_whole_answer_is_one_write_with_its_length() -> None:
    sent = Sent()
    sent.answer.send(200, JSON, b"{}")
    assert sent.transport.writes == [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
    ]
    assert sent.client.ends == [True]


def test_the_head_of_a_stream_waits_for_the_first_bytes_and_shares_their_write() -> None:
    sent = Sent()
    sent.answer.start(200, SSE)
    assert sent.transport.writes == []
    assert sent.answer.is_started
    sent.answer.write(b"data: 1\n\n")
    (first,) = sent.transport.writes
    assert first.endswith(b"\r\n\r\n9\r\ndata: 1\n\n\r\n")
    assert b"transfer-encoding: chunked" in sent.head


def test_chunks_are_framed_with_their_size_in_hex() -> None:
    sent = Sent()
    sent.answer.start(200, SSE)
    sent.answer.write(b"x" * 16)
    sent.answer.finish(b"y")
    assert sent.body == b"10\r\n" + b"x" * 16 + b"\r\n1\r\ny\r\n0\r\n\r\n"
    assert sent.client.ends == [True]


def test_a_stream_without_a_last_part_ends_with_the_last_chunk_alone() -> None:
    sent = Sent()
    sent.answer.start(200, SSE)
    sent.answer.write(b"x")
    sent.answer.finish()
    assert sent.transport.writes[-1] == b"0\r\n\r\n"


def test_a_stream_that_is_finished_at_once_is_one_write() -> None:
    sent = Sent()
    sent.answer.start(200, SSE)
    sent.answer.finish(b"all")
    assert len(sent.transport.writes) == 1
    assert sent.body == b"3\r\nall\r\n0\r\n\r\n"


@pytest.mark.parametrize("keep_alive", [True, False], ids=["keep-alive asked for", "not asked for"])
def test_http_1_0_gets_no_chunks_and_the_close_is_the_end(keep_alive: bool) -> None:
    sent = Sent(version_minor=0, keep_alive=keep_alive)
    sent.answer.start(200, SSE)
    sent.answer.write(b"data: 1\n\n")
    sent.answer.finish(b"data: 2\n\n")
    assert sent.body == b"data: 1\n\ndata: 2\n\n"
    assert not any(line.startswith(b"transfer-encoding") for line in sent.head)
    assert b"connection: close" in sent.head
    assert sent.client.ends == [False]


def test_http_1_0_without_any_body_still_gets_its_head() -> None:
    sent = Sent(version_minor=0)
    sent.answer.start(200, SSE)
    sent.answer.finish()
    assert sent.head[0] == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    ("version_minor", "keep_alive", "expected"),
    [
        pytest.param(1, True, [], id="1.1 keeps without saying so"),
        pytest.param(1, False, [b"connection: close"], id="1.1 says that it closes"),
        pytest.param(0, True, [b"connection: keep-alive"], id="1.0 says that it keeps"),
        pytest.param(0, False, [b"connection: close"], id="1.0 says that it closes"),
    ],
)
def test_the_connection_header_says_what_the_version_needs(
    version_minor: int, keep_alive: bool, expected: list[bytes]
) -> None:
    sent = Sent(version_minor, keep_alive)
    sent.answer.send(200, JSON, b"{}")
    assert [line for line in sent.head if line.startswith(b"connection")] == expected
    assert sent.client.ends == [keep_alive]


def test_an_answer_can_decide_to_close_when_it_is_sent() -> None:
    sent = Sent()
    sent.answer.send(413, JSON, b"{}", close=True)
    assert b"connection: close" in sent.head
    assert sent.client.ends == [False]


def test_a_failed_stream_closes_after_a_proper_end() -> None:
    sent = Sent()
    sent.answer.start(200, SSE)
    sent.answer.write(b"a")
    sent.answer.finish(b"data: {}\n\n", close=True)
    assert sent.transport.writes[-1].endswith(b"\r\n0\r\n\r\n")
    assert sent.client.ends == [False]


def test_an_aborted_answer_cuts_the_connection_without_the_last_chunk() -> None:
    sent = Sent()
    sent.answer.start(200, SSE)
    sent.answer.write(b"a")
    sent.answer.abort()
    assert sent.transport.is_aborted
    assert not sent.body.endswith(b"0\r\n\r\n")
    assert sent.client.ends == []


def test_aborting_an_answer_that_has_ended_leaves_the_connection_to_the_next() -> None:
    sent = Sent()
    sent.answer.send(200, JSON, b"{}")
    sent.answer.abort()
    assert not sent.transport.is_aborted


def finish(answer: Answer) -> None:
    answer.start(200, SSE)
    answer.write(b"12")
    answer.write(b"345")
    answer.finish(b"6")


@pytest.mark.parametrize(
    "speak",
    [
        pytest.param(lambda answer: answer.send(200, JSON, b"123456"), id="sent whole"),
        pytest.param(finish, id="in parts"),
    ],
)
@pytest.mark.parametrize("version_minor", [0, 1], ids=["HTTP/1.0", "HTTP/1.1"])
def test_body_bytes_count_the_body_without_its_framing(
    version_minor: int, speak: Callable[[Answer], None]
) -> None:
    sent = Sent(version_minor)
    speak(sent.answer)
    assert sent.answer.body_bytes == 6


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\nb", b"a\x00b"], ids=["CR LF", "LF", "NUL"])
def test_a_header_value_that_would_break_the_head_is_refused(value: bytes) -> None:
    sent = Sent()
    with pytest.raises(ValueError, match="x-upstream"):
        sent.answer.send(200, [(b"x-upstream", value)], b"")
    assert sent.transport.writes == []


def holding() -> Sent:
    """An answer that has begun, and holds a chunk."""
    sent = Sent()
    sent.answer.start(200, SSE)
    sent.answer.write(b"a")
    sent.answer.hold(b"1\r\nb\r\n")
    return sent


def test_what_is_held_goes_with_what_is_written_next() -> None:
    sent = holding()
    sent.answer.write(b"c")
    sent.answer.hold(b"1\r\nd\r\n")
    sent.answer.finish()
    assert sent.transport.writes[1:] == [b"1\r\nb\r\n1\r\nc\r\n", b"1\r\nd\r\n0\r\n\r\n"]


def test_what_is_held_goes_alone_if_nothing_follows_and_once() -> None:
    sent = holding()
    sent.answer.flush()
    sent.answer.flush()
    assert sent.transport.writes[1:] == [b"1\r\nb\r\n"]


def test_nothing_held_goes_out_after_an_answer_was_cut() -> None:
    sent = holding()
    sent.answer.abort()
    sent.answer.flush()
    assert len(sent.transport.writes) == 1
