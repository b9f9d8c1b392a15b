"""A throw-away machine: Debian's systemd, booted by systemd-nspawn on this machine's /usr.

It has its own files but for /usr, which it can only read, its own processes, and a network of its
own that has nothing but loopback. What is in it is driven from outside, by entering its namespaces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.support.patience import WAIT, patient

CLONE_NEWNET = 0x40000000
PATH = "/usr/sbin:/usr/bin"
BOOT_TIME = patient(60.0)  # seconds; half a one on an idle machine

# Of the machine outside: what the shared /usr needs to work.
SHARED_ETC = ("os-release", "ld.so.cache", "nsswitch.conf", "login.defs")


def why_not() -> str | None:
    """Return why no machine can be booted here; None if one can."""
    if sys.platform != "linux":
        return "this is not Linux"
    if os.geteuid() != 0:
        return "only root may boot a container"
    if not Path("/etc/debian_version").exists():
        return "the container shares /usr and expects Debian's"
    for tool in ("systemd-nspawn", "nsenter", "systemctl"):
        if shutil.which(tool) is None:
            return f"{tool} is not here (make tools installs it)"
    if not Path("/usr/bin/python3").exists():
        return "Debian's python3 is not here"
    return None


class Machine:
    """A booted machine; `booted` makes it."""

    def __init__(self, root: Path, leader: int) -> None:
        self.root = root
        self._leader = leader

    def run(self, *command: str, timeout: float = WAIT, **environ: str) -> str:
        """Run a command that must succeed; return what it printed, errors included."""
        ended = self.attempt(*command, timeout=timeout, **environ)
        assert ended.returncode == 0, f"{' '.join(command)}: {ended.returncode}\n{ended.stdout}"
        return ended.stdout

    def attempt(
        self, *command: str, timeout: float = WAIT, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that may fail."""
        environ = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"} | environ
        return subprocess.run(
            [
                *("nsenter", "--target", str(self._leader)),
                *("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"),
                *("env", "--chdir=/", "--ignore-environment"),
                *(f"{name}={value}" for name, value in environ.items()),
                *command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def path(self, inside: str) -> Path:
        """Return the path outside of one of the machine's files."""
        return self.root / inside.removeprefix("/")

    def connect(self, port: int) -> socket.socket:
        """Connect to a port of the machine's loopback."""
        return self._in_network(lambda: socket.create_connection(("127.0.0.1", port), WAIT))

    def listen(self, port: int) -> socket.socket:
        """Return a socket that listens on the machine's loopback."""
        return self._in_network(lambda: socket.create_server(("127.0.0.1", port), backlog=64))

    def _in_network(self, make: Callable[[], socket.socket]) -> socket.socket:
        """Make a socket in its network, on a thread that entered it and ends afterwards."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter_and_make() -> socket.socket:
            with open(f"/proc/{self._leader}/ns/net", "rb") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            return make()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter_and_make).result()


@contextmanager
def booted(folder: Path, shared: Mapping[str, Path]) -> Iterator[Machine]:
    """Boot a machine with its files in `folder`; it has `shared`, read-only, at the same path."""
    root = folder / "root"
    _lay_out(root)
    name = f"hoberproxy-test-{os.getpid()}"
    with _own_cgroups(name) as enter, open(folder / "console", "wb") as console:
        nspawn = subprocess.Popen(
            [
                *("systemd-nspawn", "--quiet", "--boot", f"--directory={root}"),
                *(f"--machine={name}", "--register=no", "--keep-unit"),
                *("--settings=no", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
                *("--private-network", "--bind-ro=/usr"),
                *(f"--bind-ro={outside}:{inside}" for inside, outside in shared.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            preexec_fn=enter,
            # Only with these control groups is systemd told, in a container, that one is empty.
            env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )
        try:
            yield _wait_until_booted(root, nspawn, folder / "console")
        finally:
            nspawn.send_signal(signal.SIGTERM)  # it passes on an orderly end
            try:
                nspawn.wait(WAIT)
            except subprocess.TimeoutExpired:
                nspawn.kill()
                nspawn.wait(WAIT)


@contextmanager
def _own_cgroups(name: str) -> Iterator[Callable[[], None]]:
    """Where no systemd runs outside, two machines would else be laid into the same groups."""
    hierarchies = [Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified")]
    if Path("/run/systemd/system").exists():
        hierarchies = []
    groups = [hierarchy / name for hierarchy in hierarchies if hierarchy.is_dir()]
    for group in groups:
        group.mkdir()

    def enter() -> None:
        for group in groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        deadline = time.monotonic() + WAIT
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                _remove_group(Path(folder), deadline)


def _remove_group(group: Path, deadline: float) -> None:
    while True:
        try:
            return group.rmdir()
        except OSError:  # the kernel still has a process in it
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _lay_out(root: Path) -> None:
    for name in ("etc/systemd/system", "usr", "var", "run", "tmp", "root", "proc", "sys", "dev"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for name in SHARED_ETC:
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    (root / "etc/machine-id").touch()
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\n")
    # Nobody logs in.
    for unit in ("console-getty.service", "systemd-logind.service"):
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _wait_until_booted(root: Path, nspawn: subprocess.Popen[bytes], console: Path) -> Machine:
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    deadline = time.monotonic() + BOOT_TIME
    state = "no process"
    while time.monotonic() < deadline and nspawn.poll() is None:
        if leader := children.read_text().split():
            machine = Machine(root, int(leader[0]))
            state = machine.attempt("systemctl", "is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                return machine
        time.sleep(0.05)
    raise AssertionError(f"it did not boot: {state}\n{console.read_text(errors='replace')}")
