"""The life of an installed service under a real systemd, from install to uninstall.

The tests run in their order, on one machine; each begins with a running service.
"""

from __future__ import annotations

import json
import resource
import shutil

import pytest

from hoberproxy import __version__

from .conftest import NEXT_VERSION, NEXT_WHEEL, UPSTREAM_PORT
from .machine import Machine
from .service import CONFIG, DROP_IN, METRICS_PORT, PROVIDER_KEY, Service
from .upstream import Upstream

pytestmark = pytest.mark.systemd

MORE_MODELS = """
[[models]]
slug = "test/second"
endpoints = [{ provider = "test", model = "m" }]
"""


def test_a_dry_run_changes_nothing(machine: Machine) -> None:
    said = Service(machine).install("--dry-run")
    assert "  + systemctl daemon-reload" in said
    assert not machine.path("/opt").exists()
    assert not machine.path("/etc/hoberproxy").exists()


def test_the_second_install_finds_all_done(installed: Service) -> None:
    commands = [line for line in installed.install().splitlines() if line.startswith("  + ")]
    assert commands == []


def test_what_is_installed_is_compiled(installed: Service) -> None:
    assert f"hoberproxy {__version__} (compiled, Python 3." in installed.hoberproxy("version")


def test_what_is_installed_pleases_systemd(installed: Service) -> None:
    units = [f"/etc/systemd/system/hoberproxy.{kind}" for kind in ("service", "socket")]
    assert installed.machine.run("systemd-analyze", "verify", "--man=no", *units) == ""


def test_the_first_start_waits_for_a_key_and_says_so(installed: Service) -> None:
    installed.machine.run("cp", "/srv/checkout/deploy/hoberproxy.toml", CONFIG)
    units = ("hoberproxy.socket", "hoberproxy.service")
    assert installed.machine.attempt("systemctl", "enable", "--now", *units).returncode != 0
    installed.wait_until(
        lambda: "providers.openai.api_key_file: expected a readable file" in installed.journal(),
        "telling what is missing",
    )
    # No second start by hand: it is retried until the config is right.
    installed.configure(UPSTREAM_PORT)
    installed.wait_until(lambda: installed.show("ActiveState") == "active", "active")


def test_a_started_service_answers_at_once(service: Service) -> None:
    service.systemctl("restart", "hoberproxy.service")
    assert service.get("/readyz")[0] == 200


def test_a_request_is_answered_logged_and_counted(service: Service, upstream: Upstream) -> None:
    assert service.ask() == 200
    assert f"Bearer {PROVIDER_KEY}" in upstream.authorizations
    # Lines and records are written off the path, a moment later.
    service.wait_until(lambda: '"status":200' in service.journal(), "logging the request")
    assert PROVIDER_KEY not in service.journal()
    status, metrics = service.get("/metrics", METRICS_PORT)
    assert status == 200
    assert 'hoberproxy_requests_total{model="test/model",provider="test",status="2xx"}' in metrics
    service.wait_until(
        lambda: "test/model" in service.hoberproxy("usage", "--config", CONFIG), "recording it"
    )


def test_the_service_sees_only_what_it_needs(service: Service) -> None:
    pid = str(service.main_pid)
    machine = service.machine
    inside = ("nsenter", "--target", pid, "--mount", "setpriv", "--reuid=hoberproxy")
    inside = (*inside, "--regid=hoberproxy", "--clear-groups")
    assert machine.attempt(*inside, "cat", "/etc/hoberproxy/keys/test").returncode != 0
    assert machine.attempt(*inside, "touch", "/etc/hoberproxy/x").returncode != 0
    assert machine.attempt(*inside, "touch", "/opt/hoberproxy/x").returncode != 0
    assert machine.attempt(*inside, "touch", "/var/lib/hoberproxy/x").returncode == 0
    # A container may not have more than the machine outside gives.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = machine.run("grep", "Max open files", f"/proc/{pid}/limits")
    assert int(limits.split()[3]) == (65536 if most == resource.RLIM_INFINITY else min(65536, most))


def test_a_reload_takes_the_new_config_and_cuts_no_stream(
    service: Service, upstream: Upstream
) -> None:
    stream = service.stream()
    assert service.ask("test/second") == 404
    service.configure(UPSTREAM_PORT, MORE_MODELS)
    service.systemctl("reload", "hoberproxy.service")
    service.wait_until(lambda: service.ask("test/second") == 200, "serving the new model")
    assert stream.goes_on()
    upstream.may_end.set()
    assert stream.is_whole()


def test_a_reload_of_a_bad_config_fails_and_changes_nothing(service: Service) -> None:
    pid = service.main_pid
    service.configure(UPSTREAM_PORT, "[[models]]\nslug = 5\n")
    assert service.machine.attempt("systemctl", "reload", "hoberproxy.service").returncode != 0
    assert "models[1].slug: expected" in service.journal()
    assert service.ask() == 200
    assert (service.show("ActiveState"), service.main_pid) == ("active", pid)


def test_a_new_version_that_would_not_start_is_left_aside(service: Service) -> None:
    service.configure(UPSTREAM_PORT, "[[models]]\nslug = 5\n")
    with pytest.raises(AssertionError, match="does not take the config; the old one stays"):
        service.install("--wheel", NEXT_WHEEL)
    assert service.hoberproxy("version").startswith(f"hoberproxy {__version__} (")
    assert service.ask() == 200


def test_a_new_version_takes_over_under_a_running_stream(
    service: Service, upstream: Upstream
) -> None:
    stream, pid = service.stream(), service.main_pid
    said = service.install("--wheel", NEXT_WHEEL)
    assert f"it serves: 2 workers, {NEXT_VERSION}" in said.replace("1 worker,", "2 workers,"), said
    assert service.main_pid == pid
    assert service.ask() == 200
    assert stream.goes_on()
    upstream.may_end.set()
    assert stream.is_whole()
    assert service.hoberproxy("version").startswith(f"hoberproxy {NEXT_VERSION} (")
    releases = service.machine.run("ls", "/opt/hoberproxy/releases").split()
    assert len(releases) == 2, "the one before is kept"


def test_root_sees_how_the_service_is_and_others_do_not(service: Service) -> None:
    stream = service.stream()
    status = json.loads(service.hoberproxy("status", "--json", "--config", CONFIG))
    serving = [worker["pid"] for worker in status["workers"] if worker["state"] == "serving"]
    assert set(serving) <= set(service.workers)
    assert status["streams"] == 1
    mode = service.machine.run("stat", "--format=%A %U", "/var/lib/hoberproxy/hoberproxy.sock")
    assert mode == "srw------- hoberproxy\n"
    assert stream.goes_on()


def test_a_worker_that_dies_is_replaced(service: Service) -> None:
    pid, before = service.main_pid, service.workers
    service.machine.run("kill", "-KILL", str(before[0]))
    service.wait_until(
        lambda: len(service.workers) == len(before) and before[0] not in service.workers,
        "replacing the worker",
    )
    assert service.ask() == 200
    assert (service.show("ActiveState"), service.main_pid) == ("active", pid)


def test_the_watchdog_ends_a_service_whose_loop_is_stuck(service: Service) -> None:
    service.write(DROP_IN, "[Service]\nWatchdogSec=3\n")
    service.systemctl("daemon-reload")
    service.systemctl("restart", "hoberproxy.service")
    pid = service.main_pid
    service.machine.run("kill", "-STOP", str(service.workers[0]))
    service.wait_until_started_again(pid)
    assert "Failed with result 'watchdog'" in service.journal()
    assert service.ask() == 200, "clients wait in the socket"
    shutil.rmtree(service.machine.path(DROP_IN).parent)
    service.systemctl("daemon-reload")


def test_stopping_lets_running_answers_end(service: Service, upstream: Upstream) -> None:
    stream = service.stream()
    service.systemctl("stop", "--no-block", "hoberproxy.socket", "hoberproxy.service")
    service.wait_until(lambda: service.show("ActiveState") == "deactivating", "stopping")
    assert stream.goes_on()
    upstream.may_end.set()
    assert stream.is_whole()
    service.wait_until(lambda: service.show("ActiveState") == "inactive", "stopped")
    assert service.show("Result") == "success"


def test_a_killed_service_is_started_again(service: Service) -> None:
    pid = service.main_pid
    service.systemctl("kill", "--kill-whom=main", "--signal=KILL", "hoberproxy.service")
    service.wait_until(lambda: service.show("SubState") == "auto-restart", "ended")
    assert service.ask() == 200, "clients wait in the socket"
    service.wait_until_started_again(pid)


def test_uninstalling_leaves_config_keys_and_records_unless_told(service: Service) -> None:
    machine = service.machine
    service.install("--uninstall")
    assert not machine.path("/opt/hoberproxy").exists()
    assert machine.attempt("systemctl", "cat", "hoberproxy.service").returncode != 0
    assert "hoberproxy" not in machine.run("systemctl", "list-sockets")
    assert machine.path("/etc/hoberproxy/keys/test").exists()
    assert machine.path("/var/lib/hoberproxy/hoberproxy.db").exists()
    service.install("--uninstall", "--purge")
    assert not machine.path("/etc/hoberproxy").exists()
    assert not machine.path("/var/lib/hoberproxy").exists()
    assert machine.attempt("getent", "passwd", "hoberproxy").returncode != 0
    left = machine.run("find", "/etc", "/opt", "/run", "/var/lib", "-name", "*hoberproxy*")
    assert left == ""
