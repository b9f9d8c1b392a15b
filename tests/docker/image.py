"""The Dockerfile's steps carried out without Docker: in roots of Debian that mmdebstrap makes.

Each stage is a folder; a command runs in it under systemd-nspawn. Only what the Dockerfile uses is
known here, anything else is an error.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.support.patience import WAIT, patient
from tests.support.processes import children_of

STEP_TIME = patient(900.0)  # seconds; one of them compiles
NSPAWN = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--settings=no")
MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# pip and apt find their way as they do outside.
PASSED_ON = re.compile(r"PIP_(INDEX|EXTRA).*|(https?|no)_proxy", re.IGNORECASE)


def why_not() -> str | None:
    """Return why no image can be made here; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux may run commands in another root"
    for tool in ("systemd-nspawn", "nsenter", "mmdebstrap"):
        if shutil.which(tool) is None:
            return f"{tool} is not here (make tools installs it)"
    return None


@dataclass
class Image:
    """A stage: its files, and what its instructions have set."""

    root: Path
    environ: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin"})
    user: str = "0:0"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def as_user(self, command: Sequence[str]) -> list[str]:
        """Return `command` as the image's user and in its environment and folder."""
        user, _, group = self.user.partition(":")
        return [
            *("env", f"--chdir={self.folder}", *(f"{k}={v}" for k, v in self.environ.items())),
            *("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *command),
        ]

    def path(self, inside: str) -> Path:
        """Return where a path, absolute or of the working directory, is outside."""
        return self.root / str(PurePosixPath(self.folder, inside)).lstrip("/")


def read_instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield each instruction of a Dockerfile and what follows it, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, rest.strip()


def make_context(checkout: Path, context: Path) -> None:
    """Copy what .dockerignore leaves of the checkout."""
    patterns = [
        line
        for line in (checkout / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    for top in checkout.iterdir():
        if _is_ignored(PurePosixPath(top.name), patterns):
            continue
        for path in (top, *top.rglob("*")):
            relative = path.relative_to(checkout)
            if path.is_file() and not _is_ignored(PurePosixPath(relative), patterns):
                (context / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, context / relative)


def _is_ignored(path: PurePosixPath, patterns: list[str]) -> bool:
    ignored = False
    for pattern in patterns:
        glob = pattern.lstrip("!").removeprefix("**/")
        names = [str(each) for each in (path, *path.parents)]
        if pattern.lstrip("!").startswith("**/"):
            names = list(path.parts)
        if any(fnmatch.fnmatch(name, glob) for name in names if name != "."):
            ignored = not pattern.startswith("!")
    return ignored


class Builder:
    """Carries out a Dockerfile; the folders are below `work`."""

    def __init__(self, context: Path, work: Path) -> None:
        self._context = context
        self._work = work
        self._stages: list[Image] = []
        self._names: dict[str, Image] = {}

    def build(self, dockerfile: str) -> Image:
        """Return the last stage."""
        for name, rest in read_instructions(dockerfile):
            getattr(self, f"_{name.lower()}")(rest)
        return self._stages[-1]

    @property
    def _image(self) -> Image:
        return self._stages[-1]

    def _from(self, rest: str) -> None:
        base, *named = rest.split()
        image = Image(self._work / f"stage{len(self._stages)}")
        subprocess.run(["cp", "-a", str(self._base(base)), str(image.root)], check=True)
        self._stages.append(image)
        if named:
            self._names[named[1]] = image

    def _base(self, name: str) -> Path:
        found = re.fullmatch(r"debian:(\w+)-slim", name)
        assert found, f"{name} is no Debian"
        root = self._work / found[1]
        if not root.exists():
            subprocess.run(
                ["mmdebstrap", "--quiet", "--variant=minbase", found[1], str(root), MIRROR],
                check=True,
                timeout=STEP_TIME,
            )
        return root

    def _run(self, rest: str) -> None:
        passed = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        environ = self._image.environ | passed | {"PIP_CERT": "/certificates.pem"}
        ended = subprocess.run(
            [
                *(*NSPAWN, f"--directory={self._image.root}", "--resolv-conf=bind-host"),
                *(f"--bind-ro={CERTIFICATES}:/certificates.pem", f"--chdir={self._image.folder}"),
                *(f"--setenv={name}={value}" for name, value in environ.items()),
                *("/bin/sh", "-c", rest),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_TIME,
        )
        assert ended.returncode == 0, f"RUN {rest}\n{ended.stdout}"

    def _copy(self, rest: str) -> None:
        *sources, target = shlex.split(rest)
        origin = self._context
        if sources[0].startswith("--from="):
            origin = self._names[sources.pop(0).removeprefix("--from=")].root
        for source in sources:
            outside, inside = origin / source.lstrip("/"), self._image.path(target)
            if outside.is_dir():
                shutil.copytree(outside, inside, symlinks=True, dirs_exist_ok=True)
            else:
                inside.mkdir(parents=True, exist_ok=True)
                shutil.copy(outside, inside)

    def _env(self, rest: str) -> None:
        for word in shlex.split(rest):
            name, _, value = word.partition("=")
            for known, has in self._image.environ.items():
                value = value.replace(f"${known}", has)
            self._image.environ[name] = value

    def _workdir(self, rest: str) -> None:
        self._image.folder = rest
        self._image.path("").mkdir(parents=True, exist_ok=True)

    def _user(self, rest: str) -> None:
        self._image.user = rest

    def _entrypoint(self, rest: str) -> None:
        self._image.entrypoint = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        self._image.command = json.loads(rest)

    def _healthcheck(self, rest: str) -> None:
        self._image.health = json.loads(rest.partition(" CMD ")[2])

    def _volume(self, rest: str) -> None:
        assert all(self._image.path(path).is_dir() for path in json.loads(rest))

    def _expose(self, rest: str) -> None:
        assert all(port.isdecimal() for port in rest.split())


@contextmanager
def running(
    image: Image, output: Path, *command: str, mounted: Mapping[str, Path] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a container: `command` in place of the image's; `mounted` is seen in it, read-only."""
    mounted = mounted or {}
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [
                *(*NSPAWN, f"--directory={image.root}", "--private-network"),
                f"--machine=hoberproxy-{secrets.token_hex(4)}",
                *(f"--bind-ro={outside}:{inside}" for inside, outside in mounted.items()),
                *image.as_user([*image.entrypoint, *(command or image.command)]),
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if (leader := leader_of(process)) is not None:
            os.kill(leader, signal.SIGKILL)  # and nspawn clears up behind it
        process.wait(WAIT)
        for inside in mounted:
            image.path(inside).unlink()


def leader_of(process: subprocess.Popen[bytes]) -> int | None:
    """Return the process that is number 1 in a container, by its number outside."""
    children = children_of(process.pid)
    return children[0] if children else None
