"""Questions to a running service over a Unix socket: one JSON line there, one back.

The socket is a file that its owner alone can use; there is no network port. A service goes on
without it where it cannot be made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from .channel import Message, parse_message, read_first_message, serialize_message
from .settings import Config

logger = logging.getLogger("hoberproxy.server")

OFF = "off"
MAX_QUESTION_BYTES = 4096
LIMIT = 10.0  # seconds for a question and its answer
PATIENCE = 2.0  # seconds in which a service that is being upgraded may be silent

Answer = Callable[[Message], Awaitable[Message]]


class AdminError(Exception):
    """Nobody answered; the message says why."""


def admin_path(config: Config) -> Path | None:
    """Where the service of this config is asked: beside its records, unless it says otherwise."""
    named = config.server.admin_socket
    if named == OFF:
        return None
    return Path(named) if named else Path(config.records.file).with_suffix(".sock")


class AdminSocket:
    """The service's end. `answer` turns a question into a message that has no `kind`."""

    def __init__(self, path: Path | None, answer: Answer) -> None:
        self._path = path
        self._answer = answer
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen, in place of a service that is gone."""
        if self._path is None:
            return
        try:
            listener = _bind(self._path)
        except OSError as exc:
            logger.warning("`hoberproxy status` cannot be answered: %s", exc.strerror or exc)
            self._path = None
            return
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=MAX_QUESTION_BYTES
        )

    def close(self) -> None:
        """Answer no more, and leave no file."""
        if self._server is not None:
            self._server.close()
            self._server = None
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(LIMIT):
                question = parse_message((await reader.readline()).rstrip(b"\n"))
                writer.write(serialize_message("answer", **await self._answer(question)))
                await writer.drain()
        except (TimeoutError, OSError, ValueError):  # ValueError: a line that is too long
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _bind(path: Path) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        else:
            raise OSError(0, f"another service answers at {path}")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def ask(path: Path, kind: str) -> Message:
    """Ask a running service. Raises AdminError."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _ask_once(path, kind)
        except (ConnectionError, FileNotFoundError, EOFError) as exc:
            if time.monotonic() > deadline:
                raise AdminError(f"no service answers at {path}; is it running?") from exc
            time.sleep(0.1)
        except TimeoutError as exc:
            raise AdminError(f"the service at {path} does not answer") from exc
        except OSError as exc:
            raise AdminError(f"{path}: {exc.strerror or exc}") from exc


def _ask_once(path: Path, kind: str) -> Message:
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(LIMIT)
        end.connect(str(path))
        end.sendall(serialize_message(kind))
        return read_first_message(end)
