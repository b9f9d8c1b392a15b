"""Listening sockets, and what the connections that come of them inherit."""

from __future__ import annotations

import socket

from hoberproxy.listeners import UNSENT_BYTES, bind
from hoberproxy.settings import Address


def test_connections_of_a_bound_socket_hold_little_that_is_not_on_its_way() -> None:
    (listener,) = bind(Address("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            option = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
    assert option == UNSENT_BYTES


def test_what_nobody_reads_stays_small() -> None:
    (listener,) = bind(Address("127.0.0.1", 0))
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    reader.connect(listener.getsockname())
    with listener, reader:
        listener.setblocking(True)
        accepted, _ = listener.accept()
        accepted.setblocking(False)
        sent = 0
        with accepted:
            try:
                while sent < 2**24:
                    sent += accepted.send(bytes(65536))
            except BlockingIOError:
                pass
    assert sent < 2 * UNSENT_BYTES
