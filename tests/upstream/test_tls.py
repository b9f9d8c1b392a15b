"""TLS on bytes alone: the other side is OpenSSL, too, and what passes between is cut anywhere."""

from __future__ import annotations

import asyncio
import ssl
from functools import cache
from typing import Any, cast

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from hoberproxy.upstream.tls import MAX_RECORD_BYTES, WRITE_BYTES, Tls
from tests.support.cuts import cut_at
from tests.support.patience import WAIT

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
AUTHORITY = trustme.CA()


@cache
def server_context(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    AUTHORITY.issue_cert("localhost").configure_cert(context)
    return context


@cache
def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


class Peer:
    """The server's side: `take` what came, and what it has to say goes to `sent`."""

    def __init__(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = server_context(version).wrap_bio(self._incoming, self._outgoing, True)
        self._is_open = False
        self.got = b""
        self.has_ended = False

    def take(self, data: bytes) -> None:
        self._incoming.write(data)
        try:
            if not self._is_open:
                self.tls.do_handshake()
                self._is_open = True
            while piece := self.tls.read(1 << 20):
                self.got += piece
            self.has_ended = True
        except ssl.SSLZeroReturnError:
            self.has_ended = True
        except ssl.SSLWantReadError:
            pass

    def say(self, *records: bytes) -> bytes:
        for record in records:
            self.tls.write(record)
        return self.sent()

    def end(self) -> bytes:
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self.sent()

    def sent(self) -> bytes:
        return self._outgoing.read()


class Transport:
    """The socket's: keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = ""
        self.reading = True

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def take(self) -> bytes:
        data = b"".join(self.written)
        self.written.clear()
        return data

    def abort(self) -> None:
        self.closed = self.closed or "aborted"

    def close(self) -> None:
        self.closed = self.closed or "closed"

    def is_closing(self) -> bool:
        return bool(self.closed)

    def get_write_buffer_size(self) -> int:
        return 7

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Connection:
    """Records the calls of an UpstreamConnection, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pieces: list[bytes] = []
        self.lost: Exception | None = None

    def connection_made(self, transport: Any) -> None:
        self.calls.append("made")

    def data_received(self, data: bytes) -> None:
        self.calls.append("data")
        self.pieces.append(data)

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")
        self.lost = exc

    @property
    def got(self) -> bytes:
        return b"".join(self.pieces)


class Link:
    """A client's side that is tested, and its peer."""

    def __init__(
        self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, host: str = "localhost"
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.connection, self.transport, self.peer = Connection(), Transport(), Peer(version)
        self.tls = Tls(self.connection, client_context(), host, self.loop)

    def shake_hands(self, size: int = 1 << 20) -> None:
        """All the way, in pieces of `size` bytes."""
        self.tls.connection_made(cast(Any, self.transport))
        for _ in range(10):
            self.peer.take(self.transport.take())
            self.receive(self.peer.sent(), size)

    def receive(self, data: bytes, size: int = 1 << 20) -> None:
        for start in range(0, len(data), size):
            self.tls.data_received(data[start : start + size])

    def opened(self) -> None:
        self.loop.run_until_complete(asyncio.wait_for(self.tls.opened(), WAIT))

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.loop.close()


def open_link(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Link:
    link = Link(version)
    link.shake_hands()
    return link


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_hands_are_shaken_however_the_bytes_are_cut(version: ssl.TLSVersion, size: int) -> None:
    with Link(version) as link:
        link.shake_hands(size)
        link.opened()
        assert link.connection.calls == ["made"]
        link.tls.write(b"a question")
        link.peer.take(link.transport.take())
        assert link.peer.got == b"a question"
        link.receive(link.peer.say(b"an answer"), size)
        assert link.connection.got == b"an answer"


RECORDS = st.lists(st.integers(1, MAX_RECORD_BYTES), min_size=1, max_size=6)


@settings(max_examples=60)
@given(RECORDS, st.data())
def test_what_is_said_arrives_however_it_is_cut(lengths: list[int], data: st.DataObject) -> None:
    with open_link() as link:
        said = [bytes([65 + number]) * length for number, length in enumerate(lengths)]
        wire = link.peer.say(*said)
        for piece in cut_at(wire, data.draw(st.lists(st.integers(0, len(wire)), max_size=8))):
            if piece:  # a socket brings no empty ones
                link.tls.data_received(piece)
        assert link.connection.got == b"".join(said)


def test_records_that_come_together_are_handed_on_together() -> None:
    with open_link() as link:
        link.receive(link.peer.say(b"one ", b"two ", b"three"))
        assert link.connection.pieces == [b"one two three"]


def test_a_whole_record_waits_for_no_other() -> None:
    with open_link() as link:
        first, second = link.peer.say(b"first"), link.peer.say(b"second")
        link.tls.data_received(first + second[:9])
        assert link.connection.pieces == [b"first"]
        link.tls.data_received(second[9:])
        assert link.connection.pieces == [b"first", b"second"]


@pytest.mark.parametrize("form", [bytes, memoryview])
def test_a_long_request_goes_out_in_pieces_and_whole(form: type[bytes | memoryview]) -> None:
    text = bytes(range(256)) * (WRITE_BYTES // 100)
    with open_link() as link:
        link.tls.write(form(text))
        pieces = list(link.transport.written)
        assert len(pieces) == -(-len(text) // WRITE_BYTES)
        assert max(map(len, pieces)) < WRITE_BYTES * 1.01
        link.peer.take(link.transport.take())
        assert link.peer.got == text


def test_an_end_that_is_told_is_answered() -> None:
    with open_link() as link:
        link.receive(link.peer.say(b"the last") + link.peer.end())
        assert link.connection.calls == ["made", "data", "eof"]
        assert link.connection.got == b"the last"
        assert link.transport.closed == "closed"
        link.peer.take(link.transport.take())
        assert link.peer.has_ended
        link.tls.connection_lost(None)
        assert (link.connection.calls[-1], link.connection.lost) == ("lost", None)
        assert link.tls.is_closing()


def test_an_end_of_the_socket_is_passed_on() -> None:
    with open_link() as link:
        assert link.tls.eof_received() is False
        assert link.connection.calls == ["made", "eof"]


def test_forged_bytes_end_the_connection_and_are_not_handed_on() -> None:
    with open_link() as link:
        wire = bytearray(link.peer.say(b"an answer"))
        wire[-1] ^= 1
        link.receive(bytes(wire))
        assert link.connection.calls == ["made"]
        assert link.transport.closed == "aborted"
        link.tls.connection_lost(None)  # as after an abort: no reason is given
        assert isinstance(link.connection.lost, ssl.SSLError), "not to be taken for a proper end"


def test_what_came_before_forged_bytes_is_handed_on() -> None:
    with open_link() as link:
        good, bad = link.peer.say(b"an answer"), bytearray(link.peer.say(b"another"))
        bad[-1] ^= 1
        link.receive(good + bytes(bad))
        assert link.connection.calls == ["made", "data"]
        assert (link.connection.got, link.transport.closed) == (b"an answer", "aborted")


def test_nothing_is_written_once_the_connection_has_gone() -> None:
    with open_link() as link:
        link.tls.connection_lost(None)
        link.tls.write(b"too late")
        link.tls.abort()
        link.tls.pause_reading()
        link.tls.resume_reading()
        assert (link.transport.written, link.transport.closed) == ([], "")
        assert (link.tls.get_write_buffer_size(), link.tls.is_reading()) == (0, False)


def test_the_socket_is_asked_about_reading_and_buffers() -> None:
    with open_link() as link:
        link.tls.pause_reading()
        assert (link.tls.is_reading(), link.transport.reading) == (False, False)
        link.tls.resume_reading()
        assert link.tls.is_reading()
        assert link.tls.get_write_buffer_size() == 7
        assert not link.tls.is_closing()


def refused(link: Link) -> Exception:
    with pytest.raises(OSError) as caught:
        link.opened()
    link.tls.abort()
    assert link.connection.calls == []
    return caught.value


def test_a_certificate_for_another_name_is_refused_and_the_peer_is_told() -> None:
    with Link(host="example.org") as link:
        link.tls.connection_made(cast(Any, link.transport))
        link.peer.take(link.transport.take())
        link.receive(link.peer.sent())
        assert isinstance(refused(link), ssl.SSLCertVerificationError)
        with pytest.raises(ssl.SSLError, match="alert"):
            link.peer.take(link.transport.take())


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 50])
def test_what_is_no_tls_is_refused(answer: bytes) -> None:
    with Link() as link:
        link.tls.connection_made(cast(Any, link.transport))
        link.receive(answer)
        assert isinstance(refused(link), ssl.SSLError)


def test_a_hang_up_during_the_handshake_is_told() -> None:
    with Link() as link:
        link.tls.connection_made(cast(Any, link.transport))
        assert link.tls.eof_received() is False
        link.tls.connection_lost(None)
        assert isinstance(refused(link), ConnectionResetError)


def test_who_has_stopped_waiting_is_not_told() -> None:
    with Link() as link:
        waiting = link.loop.create_task(link.tls.opened())
        link.loop.call_soon(waiting.cancel)
        with pytest.raises(asyncio.CancelledError):
            link.loop.run_until_complete(waiting)
        link.tls.abort()
        link.tls.connection_lost(None)
        assert link.connection.calls == []


@pytest.mark.skipif(not hasattr(ssl, "OP_IGNORE_UNEXPECTED_EOF"), reason="OpenSSL 3 alone")
def test_tickets_that_come_with_an_answer_are_not_taken_for_it() -> None:
    with Link() as link:
        link.tls.connection_made(cast(Any, link.transport))
        link.peer.take(link.transport.take())
        link.receive(link.peer.sent())
        link.peer.take(link.transport.take())
        tickets = link.peer.sent()
        assert tickets, "TLS 1.3 sends them after the handshake"
        both = tickets + link.peer.say(b"an answer")
        for data in cut_at(both, [len(tickets) - 3, len(tickets) + 3]):
            link.tls.data_received(data)
        assert link.connection.got == b"an answer"
