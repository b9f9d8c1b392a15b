"""Answers questions to a running service over a Unix socket, with a line of JSON each way.

The socket is a file that its owner alone can use; there is no network port. A service goes on
without it where it cannot be made. A report has the state and the counts of one worker at a moment;
two reports of each worker give the rates between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config.settings import Config
from .channel import Message, parse_message, read_first_message, serialize_message

logger = logging.getLogger("hoberproxy.server")

OFF = "off"
MAX_QUESTION_BYTES = 4096
LIMIT = 10.0  # seconds for a question and its answer
PATIENCE = 2.0  # seconds in which a service that is being upgraded may be silent

Answer = Callable[[Message], Awaitable[Message]]


class AdminError(Exception):
    """No service has answered; the message says why."""


def admin_path(config: Config) -> Path | None:
    """Return the admin socket's path, by default beside the records file; None for none."""
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
        """Listen; the file of a service that is gone is replaced."""
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
        """Stop listening and remove the file."""
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


def ask(path: Path, kind: str, patience: float = PATIENCE) -> Message:
    """Ask a running service, which may be silent for `patience` seconds. Raises AdminError."""
    deadline = time.monotonic() + patience
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


# The report that answers `hoberproxy status`

Report = dict[str, Any]


def combine(before: Sequence[Report], after: Sequence[Report], seconds: float) -> Report:
    """Return one document of all workers. `events` of a report counts tokens since its start."""
    earlier = {report["pid"]: report for report in before}
    workers = []
    keys: Counter[str] = Counter()
    for report in after:
        since = earlier.get(report["pid"], report)
        rate = max(report.get("events", 0) - since.get("events", 0), 0) / seconds
        keys.update(report.get("keys", {}))
        workers.append(
            {
                **{name: report.get(name) for name in _OF_A_WORKER},
                "tokens_per_second": round(rate, 1),
            }
        )
    return {
        "streams": sum(worker["streams"] or 0 for worker in workers),
        "tokens_per_second": round(sum(worker["tokens_per_second"] for worker in workers), 1),
        "workers": workers,
        "endpoints": _endpoints(after),
        "keys": [{"key": key, "streams": count} for key, count in sorted(keys.items())],
    }


_OF_A_WORKER = ("pid", "state", "generation", "started", "streams", "connections", "resident_bytes")


def _endpoints(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """Return for each endpoint the means over the workers, and in how many of them it cools."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        if report.get("state") != "draining":  # whose measurements are old
            for health in report.get("health", ()):
                key = health["provider"], health["upstream_model"]
                groups.setdefault(key, []).append(health)
    return [
        {
            "provider": provider,
            "model": model,
            "cooling_in": sum(bool(each["is_cooling"]) for each in group),
            "known_in": len(group),
            "cooldown": max(each["cooldown"] for each in group),
            "failure_rate": _mean(group, "failure_rate"),
            "first_content": _mean(group, "first_content"),
            "throughput": _mean(group, "throughput"),
        }
        for (provider, model), group in sorted(groups.items())
    ]


def _mean(group: list[dict[str, Any]], name: str) -> float | None:
    known = [each[name] for each in group if each[name] is not None]
    return round(sum(known) / len(known), 4) if known else None
