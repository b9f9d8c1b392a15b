"""Messages between supervisor and worker, however the bytes are cut."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from hoberproxy.process.channel import Channel, parse_message, read_first_message, serialize_message

BYTES = serialize_message("one", value="ä\n") + serialize_message("two") + b"nonsense\n[]\n"
MESSAGES = [{"kind": "one", "value": "ä\n"}, {"kind": "two"}, {"kind": ""}, {"kind": ""}]


@pytest.mark.parametrize("cut", range(len(BYTES) + 1))
def test_messages_do_not_depend_on_where_the_bytes_were_cut(cut: int) -> None:
    seen: list[dict[str, Any]] = []
    channel = Channel(seen.append, lambda: None)
    channel.data_received(BYTES[:cut])
    # What was read of a message goes over to the program after an upgrade.
    successor = Channel(seen.append, lambda: None)
    successor.unread = channel.unread
    successor.data_received(BYTES[cut:])
    assert seen == MESSAGES


def test_the_first_message_is_read_and_no_byte_more() -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(BYTES)
        assert read_first_message(here) == MESSAGES[0]
        assert parse_message(here.recv(4096).split(b"\n")[0]) == MESSAGES[1]


def test_a_peer_that_is_gone_ends_the_wait() -> None:
    here, there = socket.socketpair()
    there.sendall(b'{"kind"')
    there.close()
    with here, pytest.raises(EOFError):
        read_first_message(here)


def test_nothing_is_said_to_nobody() -> None:
    channel = Channel(lambda message: None, lambda: None)
    channel.send("hello")
    channel.close()
    assert channel.hold()
