"""What goes past a transport to the socket, on socket pairs and with a real transport."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from hoberproxy.downstream.socket_writer import Sink
from tests.downstream.test_response import FakeTransport
from tests.support.patience import WAIT


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def fill(ours: socket.socket) -> None:
    """Leave no room in it."""
    with suppress(BlockingIOError):
        while True:
            ours.send(b"x" * 65536)


def drain(theirs: socket.socket) -> bytes:
    read = b""
    with suppress(BlockingIOError):
        while data := theirs.recv(1 << 20):
            read += data
    return read


def test_bytes_go_to_the_socket_at_once() -> None:
    with pair() as (ours, theirs):
        transport = FakeTransport()
        sink = Sink(transport, ours.fileno())
        sink.write(b"one ")
        sink.write(b"two")
        assert theirs.recv(100) == b"one two"
        assert transport.writes == []


def test_what_the_socket_has_no_room_for_goes_by_the_transport_with_all_that_follows() -> None:
    with pair() as (ours, theirs):
        transport = FakeTransport()
        transport.waits = True
        sink = Sink(transport, ours.fileno())
        data = b"0123456789" * 1_000_000
        sink.write(data)
        sent = drain(theirs)
        assert sent
        assert sent + b"".join(transport.writes) == data
        sink.write(b"behind")  # there is room again, and it may not overtake
        assert transport.writes[-1] == b"behind"
        assert drain(theirs) == b""


def test_once_the_transport_has_sent_all_bytes_go_past_it_again() -> None:
    with pair() as (ours, theirs):
        fill(ours)
        transport = FakeTransport()
        transport.waits = True
        sink = Sink(transport, ours.fileno())
        sink.write(b"waits")
        assert transport.writes == [b"waits"]
        drain(theirs)
        transport.waits = False
        sink.write(b"sent by the transport, which is empty after it")
        sink.write(b"past it")
        assert len(transport.writes) == 2
        assert drain(theirs) == b"past it"


def test_nothing_overtakes_what_was_written_to_the_transport_on_purpose() -> None:
    with pair() as (ours, theirs):
        transport = FakeTransport()
        transport.waits = True
        sink = Sink(transport, ours.fileno())
        sink.write_aside(b"first")
        sink.write(b"second")
        assert transport.writes == [b"first", b"second"]
        assert drain(theirs) == b""


def test_a_broken_socket_is_the_transports_to_find() -> None:
    with pair() as (ours, theirs):
        theirs.close()
        transport = FakeTransport()
        sink = Sink(transport, ours.fileno())
        sink.write(b"lost")
        assert transport.writes == [b"lost"]


def test_a_number_that_is_another_sockets_now_gets_nothing() -> None:
    with pair() as (ours, _), pair() as (others, reader):
        transport = FakeTransport()
        sink = Sink(transport, ours.fileno())
        sink.shut()  # as in connection_lost
        os.dup2(others.fileno(), ours.fileno())
        sink.write(b"for the first")
        sink.write(b"for the first, too")
        assert drain(reader) == b""
        assert len(transport.writes) == 2


def test_nothing_goes_past_a_transport_that_failed_to_write() -> None:
    """Behind a part of what was to be sent, it would be taken for the rest."""

    class Failing(FakeTransport):
        def write(self, data: bytes) -> None:
            raise MemoryError

    with pair() as (ours, theirs):
        fill(ours)
        sink = Sink(Failing(), ours.fileno())
        for _ in range(2):
            with pytest.raises(MemoryError):
                sink.write(b"lost")
            drain(theirs)


def test_nothing_goes_past_a_transport_that_was_aborted() -> None:
    with pair() as (ours, theirs):
        transport = FakeTransport()
        sink = Sink(transport, ours.fileno())
        sink.abort()
        sink.write(b"late")
        assert transport.is_aborted
        assert transport.writes == [b"late"]
        assert drain(theirs) == b""


def test_without_a_socket_all_goes_by_the_transport() -> None:
    transport = FakeTransport()
    sink = Sink(transport)
    sink.write(b"a")
    sink.write(b"b")
    sink.abort()
    assert transport.writes == [b"a", b"b"]
    assert transport.is_aborted


@pytest.mark.parametrize("size", [1, 1000, 100_000])
async def test_a_slow_reader_of_a_real_transport_gets_all_in_order(size: int) -> None:
    """Writes by both ways, as the two doors make them, while the reader falls behind."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        sink = Sink(transport, ours.fileno())
        sent, read = bytearray(), bytearray()
        theirs.setblocking(False)
        for number in range(200):
            data = b"%d," % number + b"." * (number * size % 1_000_003 % (size + 1))
            sent += data
            (sink.write_aside if number % 7 == 3 else sink.write)(data)
            if number % 5 == 0:
                await asyncio.sleep(0)  # the transport may send on
                with suppress(BlockingIOError):
                    read += theirs.recv(size * 3)
        transport.close()
        async with asyncio.timeout(WAIT):
            while data := await loop.sock_recv(theirs, 1 << 20):
                read += data
        assert read == sent
