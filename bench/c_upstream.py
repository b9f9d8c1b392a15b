"""The mock's answers for a model server in C, which keeps a gateway's core full.

`c_upstream.c` sends what is in a file: for each kind of answer (a plain one, a stream, a stream
with usage) some answers that differ as OpenAI's do, each as the parts that are written one by one.
It reads no settings of a request: all streams are alike but for what always differs.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

from .mock_answers import COUNT, CREATED, DATE, ID, PADDINGS, STAMP, Script, Settings, make_script
from .processes import StartError, read_line, running

SOURCE = Path(__file__).with_suffix(".c")
ANSWERS = 64  # of each kind, which follow one another


def find_compiler() -> str | None:
    """Return the path of a C compiler; None if there is none."""
    return shutil.which("cc") or shutil.which("gcc")


def serialize_answers(settings: Settings) -> bytes:
    """Return the file of answers: counts and sizes are 32 bits in this machine's order."""
    kinds = ((False, False), (True, False), (True, True))  # is it a stream, has it usage
    out = bytearray()
    for is_stream, has_usage in kinds:
        out += struct.pack("=I", ANSWERS)
        for number in range(ANSWERS):
            script = make_script(settings, is_stream, has_usage, number % PADDINGS)
            parts = _parts(script, number)
            out += struct.pack("=I", len(parts))
            for part in parts:
                out += struct.pack("=I", len(part)) + part
    return bytes(out)


def _parts(script: Script, number: int) -> list[bytes]:
    """The writes of one answer, all that differs filled in; the head goes with the first."""
    now = int(time.time())
    values = {
        ID: b"%08x" % (number * 2_654_435_761 % 2**32),
        CREATED: b"%010d" % now,
        DATE: formatdate(now, usegmt=True).encode(),
        COUNT: b"%d" % (100 + number * 13 % 900),
        STAMP: b"0" * len(STAMP),
    }
    parts = [script.head + script.writes[0], *script.writes[1:]]
    for place, value in values.items():
        parts = [part.replace(place, value) for part in parts]
    return parts


@contextmanager
def c_upstream(folder: Path, core: int, settings: Settings) -> Iterator[int]:
    """Build and start the server in `folder` on `core`; yields its port."""
    program, answers, log = folder / "c_upstream", folder / "answers", folder / "upstream.log"
    answers.write_bytes(serialize_answers(settings))
    compiler = find_compiler()
    if compiler is None:
        raise StartError("expected a C compiler for the upstream, got none")
    command = [compiler, "-O2", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StartError(f"expected the upstream to compile, got:\n{done.stderr[-2000:]}")
    with running([str(program), "0", str(answers)], log, core, tells=True) as process:
        yield int(json.loads(read_line(process, log))["port"])
