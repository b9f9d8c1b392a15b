"""How a process that a supervisor has started begins: what it hears, ignores, and exits with."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterable

from .channel import serialize_message

START_LIMIT = 30.0  # seconds to wait for the word to start
EXIT_CANNOT_START = 3
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"


# What another process may send before there is a handler for it, and what would end us then.
HELD = (signal.SIGHUP, signal.SIGUSR2)


def hold_signals() -> None:
    """Let a reload or an upgrade that is asked for during a start wait until it is through."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> None:
    """Take what has come meanwhile; there are handlers now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def take_end(number: str) -> socket.socket:
    """Our end of the channel, by the number of its descriptor; it waits START_LIMIT at most."""
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        # A terminal sends Ctrl-C to all its processes; the supervisor says what is to happen.
        signal.signal(ignored, signal.SIG_IGN)
    end = socket.socket(fileno=int(number))
    end.set_inheritable(False)
    end.settimeout(START_LIMIT)
    return end


def tell_failed(end: socket.socket, problems: Iterable[str]) -> int:
    """Say why this process cannot start; what it exits with."""
    with contextlib.suppress(OSError):
        end.setblocking(True)
        end.sendall(serialize_message("failed", problems=list(problems)))
    return EXIT_CANNOT_START
