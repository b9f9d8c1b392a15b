"""The installed service, as an operator and a client use it."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from tests.support.patience import patient

from .machine import WAIT, Machine

PORT = 8080
METRICS_PORT = 9464
SLUG = "test/model"
PROVIDER_KEY = "sk-provider-secret"
INSTALL = "/srv/checkout/deploy/install.sh"
CONFIG = "/etc/hoberproxy/hoberproxy.toml"
PROGRAM = "/opt/hoberproxy/bin/hoberproxy"
INSTALL_TIME = patient(800.0)  # seconds; it compiles
# Given to the service, so that what takes minutes in production takes seconds here.
DROP_IN = "/etc/systemd/system/hoberproxy.service.d/test.conf"

PROVIDERS = """
[records]
file = "/var/lib/hoberproxy/hoberproxy.db"

[providers.test]
base_url = "http://127.0.0.1:{port}/v1"
api_key_file = "/run/credentials/hoberproxy.service/key_test"

[[models]]
slug = "{slug}"
endpoints = [{{ provider = "test", model = "m" }}]
"""


class Service:
    """`hoberproxy.service` of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._key: str | None = None

    # As an operator

    def install(self, *options: str) -> str:
        """Run install.sh of the checkout; return what it printed."""
        # Without a network pip finds there what it would fetch.
        return self.machine.run(
            INSTALL, *options, timeout=INSTALL_TIME, PIP_NO_INDEX="1", PIP_FIND_LINKS="/srv/wheels"
        )

    def configure(self, upstream_port: int, more: str = "") -> None:
        """Write the provider's key and a config; `more` is TOML."""
        self.write("/etc/hoberproxy/keys/test", f"{PROVIDER_KEY}\n")
        self.write(CONFIG, PROVIDERS.format(port=upstream_port, slug=SLUG) + more)

    def write(self, path: str, text: str) -> None:
        outside = self.machine.path(path)
        outside.parent.mkdir(parents=True, exist_ok=True)
        outside.write_text(text)

    def systemctl(self, *arguments: str) -> str:
        return self.machine.run("systemctl", *arguments)

    def start(self) -> None:
        """Enable and start the service; when this returns, clients are served."""
        self.systemctl("enable", "--quiet", "--now", "hoberproxy.socket", "hoberproxy.service")
        assert self.show("ActiveState") == "active"

    @property
    def workers(self) -> list[int]:
        """Processes that serve: the supervisor's children but for the writer of records."""
        parent = str(self.main_pid)
        found = self.machine.attempt("pgrep", "--full", "--parent", parent, "hoberproxy worker")
        return [int(pid) for pid in found.stdout.split()]

    def show(self, name: str) -> str:
        return self.systemctl("show", "--value", f"--property={name}", "hoberproxy.service").strip()

    @property
    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def wait_until_started_again(self, before: int) -> None:
        """Wait until another main process than the one before is active."""
        self.wait_until(
            lambda: self.main_pid not in (0, before) and self.show("ActiveState") == "active",
            "started again",
        )

    def journal(self) -> str:
        return self.machine.run("journalctl", "--unit=hoberproxy", "--output=cat", "--no-pager")

    def hoberproxy(self, *arguments: str) -> str:
        return self.machine.run(PROGRAM, *arguments)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, f"never {what}\n{self.journal()}"
            time.sleep(0.05)

    # As a client

    @property
    def key(self) -> str:
        if self._key is None:
            made = self.hoberproxy("keys", "create", "--config", CONFIG, "--label", "test")
            found = re.search(r"hb_live_\w+", made)
            assert found, made
            self._key = found[0]
            self.wait_until(self._takes_key, "taking the new key")
        return self._key

    def _takes_key(self) -> bool:
        """Return whether the key works for a whole second, in which all workers read it."""
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            if self.ask() != 200:
                return False
            time.sleep(0.05)
        return True

    def get(self, path: str, port: int = PORT) -> tuple[int, str]:
        """Return status and body of a GET."""
        with self._request("GET", path, port) as response:
            return response.status, response.read().decode()

    def ask(self, model: str = SLUG) -> int:
        """Send a short request, and return its status."""
        with self._post(model=model) as response:
            print(response.read())  # shown if the test fails
            return response.status

    def stream(self) -> Stream:
        """Begin a stream."""
        return Stream(self._post(stream=True))

    def _post(self, **members: Any) -> http.client.HTTPResponse:
        body = {"model": SLUG, "messages": [{"role": "user", "content": "hi"}]} | members
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        return self._request("POST", "/v1/chat/completions", PORT, json.dumps(body), headers)

    def _request(
        self,
        method: str,
        path: str,
        port: int,
        body: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
        connection.sock = self.machine.connect(port)
        with closing(connection):  # the answer keeps the socket until it is read
            connection.request(method, path, body, {"connection": "close"} | dict(headers or {}))
            return connection.getresponse()


class Stream:
    """An answer that comes event by event, of which the first has come already."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        assert response.status == 200, response.read()
        self._response = response
        self.events: list[str] = []
        self.read_event()

    def read_event(self) -> str:
        """Read the next event's data; empty at the end of the stream."""
        while line := self._response.readline():
            if line.startswith(b"data: "):
                self.events.append(line[6:].decode().strip())
                return self.events[-1]
        return ""

    def goes_on(self, events: int = 10) -> bool:
        """Whether that many more come."""
        return all(self.read_event() not in ("", "[DONE]") for _ in range(events))

    def read_rest(self) -> list[str]:
        """Read all further events, to the end that the stream's framing says."""
        while self.read_event():
            pass
        self._response.close()
        return self.events

    def is_whole(self) -> bool:
        """Whether it ends with nothing lost on the way."""
        *contents, stop, done = self.read_rest()
        numbers = [json.loads(event)["choices"][0]["delta"]["content"] for event in contents]
        assert numbers == [f"{number} " for number in range(len(numbers))]
        return json.loads(stop)["choices"][0]["finish_reason"] == "stop" and done == "[DONE]"
