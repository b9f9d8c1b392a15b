"""Takes listening sockets from systemd, and sends it the states of the service (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, MutableMapping

from .listeners import BACKLOG, Listeners, StartError, limit_unsent, name_of

FIRST_PASSED = 3  # systemd's first descriptor (sd_listen_fds(3))
METRICS_NAME = "metrics"  # FileDescriptorName= of a socket that is not for clients


class Notifier:
    """Sends states as datagrams. `watchdog` is seconds between signs of life, None without."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the NUL of the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = _watchdog(environ) if address else None

    def ready(self, status: str) -> None:
        """Say that the service serves, after a start or a reload."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that a reload begins; `ready` ends it."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={microseconds}")

    def stopping(self) -> None:
        """Say that the service drains."""
        self._send("STOPPING=1", "STATUS=draining")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        # A manager that is busy or gone must not hold us up.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto("\n".join(lines).encode(), self._address)


def _watchdog(environ: Mapping[str, str]) -> float | None:
    pid = environ.get("WATCHDOG_PID", "")
    microseconds = environ.get("WATCHDOG_USEC", "")
    if (pid and pid != str(os.getpid())) or not microseconds.isdecimal():
        return None
    return int(microseconds) / 1e6 or None


def passed_by_systemd(environ: MutableMapping[str, str]) -> Listeners | None:
    """Return the sockets that systemd has opened for this process, None without.

    Their variables are removed from `environ`, so that no child takes them for its own. Raises
    StartError if they cannot be used.
    """
    pid = environ.pop("LISTEN_PID", None)
    count = environ.pop("LISTEN_FDS", None)
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or count is None or not count.isdecimal() or int(count) == 0:
        return None
    listeners = Listeners(is_passed=True)
    for index in range(int(count)):
        try:
            listener = socket.socket(fileno=FIRST_PASSED + index)
        except OSError as exc:
            raise StartError(f"descriptor {FIRST_PASSED + index} of systemd is no socket") from exc
        listener.set_inheritable(False)
        listener.setblocking(False)
        limit_unsent(listener)
        with contextlib.suppress(OSError):  # a longer queue than the unit's, if it may be
            listener.listen(BACKLOG)
        if index < len(names) and names[index] == METRICS_NAME:
            listeners.metrics.append(listener)
        else:
            listeners.clients[name_of(listener)] = [listener]
    if not listeners.clients:
        raise StartError("systemd handed over no socket for clients")
    return listeners
