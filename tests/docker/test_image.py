"""What the Dockerfile makes, as one who runs it meets it: config, keys, signals, health, user."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hoberproxy import __version__
from tests.support.patience import WAIT
from tests.support.processes import children_of
from tests.systemd.machine import Machine

from .image import Builder, Image, leader_of, make_context, running, why_not

pytestmark = pytest.mark.docker

CHECKOUT = Path(__file__).parents[2]
PORT = 8080
CONFIG = """\
[providers.one]
base_url = "http://127.0.0.1:9/v1"
api_key_env = "ONE_API_KEY"

[[models]]
slug = "one/model"
endpoints = [{ provider = "one" }]
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    if reason := why_not():
        pytest.skip(reason)
    work = tmp_path_factory.mktemp("image")
    make_context(CHECKOUT, work / "context")
    return Builder(work / "context", work).build((CHECKOUT / "Dockerfile").read_text())


class Container:
    """A running one."""

    def __init__(self, image: Image, process: subprocess.Popen[bytes], output: Path) -> None:
        self.image = image
        self.process = process
        self._output = output

    @property
    def leader(self) -> int:
        """The program, which is process 1 within."""
        leader = leader_of(self.process)
        assert leader is not None, self.output
        return leader

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as `docker exec` does."""
        machine = Machine(self.image.root, self.leader)
        return machine.attempt(*self.image.as_user(command))

    def post(self, key: str, **members: object) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=WAIT)
        connection.sock = Machine(self.image.root, self.leader).connect(PORT)
        with closing(connection):
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            body = {"messages": [{"role": "user", "content": "Count to 10"}]} | members
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


@pytest.fixture
def container(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Container]:
    """One with a config mounted and a provider's key in the environment, as it is run for good."""
    monkeypatch.setitem(image.environ, "ONE_API_KEY", "sk-one")
    config, output = tmp_path / "hoberproxy.toml", tmp_path / "output"
    config.write_text(CONFIG)
    mounted = {"/etc/hoberproxy/hoberproxy.toml": config}
    with running(image, output, mounted=mounted) as process:
        started = Container(image, process, output)
        started.wait_until(lambda: f"listens on http://0.0.0.0:{PORT}" in started.output)
        yield started


def test_the_image_is_compiled_and_says_so(container: Container) -> None:
    assert f"hoberproxy {__version__} (compiled, Python 3." in container.output


def test_it_has_neither_compiler_nor_pip(container: Container) -> None:
    for program in ("gcc", "pip"):
        assert container.run("sh", "-c", f"command -v {program}").returncode != 0


def test_it_is_process_1_and_not_root(container: Container) -> None:
    status = Path(f"/proc/{container.leader}/status").read_text()
    assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE)
    assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
    assert container.run("touch", "/opt/hoberproxy/x").returncode != 0


def test_it_is_healthy_while_it_answers(container: Container) -> None:
    assert container.run(*container.image.health).returncode == 0
    # The supervisor first, for it would put another worker in place of one that is silent.
    processes = [container.leader, *children_of(container.leader)]
    for each in processes:
        os.kill(each, signal.SIGSTOP)
    try:
        assert container.run(*container.image.health).returncode != 0
    finally:
        for each in processes:
            os.kill(each, signal.SIGCONT)


def test_a_signal_to_stop_ends_it_at_once(container: Container) -> None:
    os.kill(container.leader, signal.SIGTERM)
    assert container.process.wait(WAIT) == 0


def test_a_key_is_made_within_it_and_is_taken(container: Container) -> None:
    config = ("--config", "/etc/hoberproxy/hoberproxy.toml")
    made = container.run("hoberproxy", "keys", "create", *config, "--label", "test")
    found = re.search(r"hb_live_\w+", made.stdout)
    assert found, made.stdout
    # Nothing answers at the provider's address.
    container.wait_until(lambda: container.post(found[0], model="one/model")[0] >= 500)


def test_without_a_config_it_does_not_start_and_says_why(image: Image, tmp_path: Path) -> None:
    with running(image, tmp_path / "output") as process:
        assert process.wait(WAIT) == 3
    output = (tmp_path / "output").read_text()
    assert "/etc/hoberproxy/hoberproxy.toml: expected a readable file" in output


def test_it_starts_with_the_demo_model_where_that_is_wanted(image: Image, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with running(image, output, "serve", "--listen", f"0.0.0.0:{PORT}") as process:
        started = Container(image, process, output)
        started.wait_until(lambda: "Ctrl-C stops" in started.output)
        (key, *_) = re.findall(r"hb_test_\w+", started.output)
        status, answer = started.post(key, model="hober/demo", stream=True)
    assert (status, answer.endswith("data: [DONE]\n\n")) == (200, True)
