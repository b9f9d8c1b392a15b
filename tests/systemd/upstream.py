"""A model server in the booted machine's network, whose streams end when the test says so."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GAP = 0.02  # seconds between events
LONGEST = 60.0  # of a stream that nobody ends


class Upstream:
    """Serves on a listening socket, on threads of its own, until closed."""

    def __init__(self, listener: socket.socket) -> None:
        self.may_end = threading.Event()
        self.authorizations: set[str] = set()
        self._server = _Server(listener, self)
        self._thread = threading.Thread(target=self._server.serve_forever, name="upstream")
        self._thread.start()

    def close(self) -> None:
        """End what runs, and serve no more."""
        self.may_end.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, upstream: Upstream) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.upstream = upstream

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a proxy that is killed leaves its upstream."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.upstream.authorizations.add(self.headers.get("authorization", ""))
        if body.get("stream"):
            self._stream()
        else:
            message = {"role": "assistant", "content": "ok"}
            self._answer(_document("chat.completion", "message", message, "stop"))

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _answer(self, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for number in range(int(LONGEST / GAP)):
            self._send_event({"content": f"{number} "}, None)
            if self.server.upstream.may_end.wait(GAP):
                break
        self._send_event({}, "stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def _send_event(self, delta: dict[str, str], finish: str | None) -> None:
        event = json.dumps(_document("chat.completion.chunk", "delta", delta, finish))
        self.wfile.write(f"data: {event}\n\n".encode())


def _document(kind: str, part: str, content: Any, finish: str | None) -> dict[str, Any]:
    choice = {"index": 0, part: content, "finish_reason": finish}
    return {"id": "x", "object": kind, "created": 1, "model": "m", "choices": [choice]}
