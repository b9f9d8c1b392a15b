"""Times the cases, and counts their instructions where the clock is too noisy to compare by.

Instructions come from `perf stat` where the machine lets one count them, else from valgrind's
cachegrind; each case runs in a process of its own, twice, and what the longer run has more is
divided by how many calls it has more. So neither start nor import counts.

`--cold` counts the cache lines that a call touches when it finds none of them in a cache, as at a
low load: valgrind simulates one cache, and between two calls all of it is overwritten.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import shutil
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import orjson

from ..machine import describe_machine
from ..processes import environment
from . import Case

NOTHING = "nothing"  # in place of a case: what emptying the cache costs by itself

MODULES = ("scanner", "framing", "body_checks", "plan", "path", "account")
ROUND_SECONDS = 0.05
CALLS = (20, 120)  # of the two counted runs; the first ones also warm the interpreter up
COLD_CALLS = (4, 24)
CACHE_BYTES = 4 * 1024 * 1024  # what nobody's path fills, and twice as much empties
COUNT_TIMEOUT = 120.0

Counter = Callable[[list[str]], int | None]


def cases(names: Sequence[str]) -> Iterator[tuple[str, Case]]:
    """All cases of the modules named, each with its module."""
    for name in names:
        for case in import_module(f"{__package__}.{name}").CASES:
            yield name, case


def time_case(case: Case, repeats: int) -> float:
    """ns per unit: the least of the repeats, since noise only adds."""
    timer = timeit.Timer(case.make())
    calls = max(1, round(ROUND_SECONDS / max(min(timer.repeat(3, 1)), 1e-9)))
    return min(timer.repeat(repeats, calls)) / calls / case.count * 1e9


# Instructions


def find_counter() -> tuple[str, Counter | None]:
    """What counts instructions here: its name, or why there is none."""
    if shutil.which("perf") and _count_by_perf([sys.executable, "-c", ""]) is not None:
        return "perf stat", _count_by_perf
    if shutil.which("valgrind"):
        return "valgrind", _count_by_valgrind
    return "missing: neither perf with a hardware counter nor valgrind is here", None


def _count_by_perf(command: list[str]) -> int | None:
    done = _run(["perf", "stat", "-x", ",", "-e", "instructions:u", *command])
    found = re.search(r"^([0-9]+),[^,]*,instructions", done, re.MULTILINE)
    return int(found[1]) if found else None


def _count_by_valgrind(command: list[str]) -> int | None:
    options = ["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    found = re.search(r"I +refs: +([0-9,]+)", _run(["valgrind", *options, *command]))
    return int(found[1].replace(",", "")) if found else None


def _run(command: list[str]) -> str:
    settings = environment() | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COUNT_TIMEOUT, env=settings
    )
    return done.stderr if done.returncode == 0 else ""


def count_case(module: str, case: Case, counter: Counter) -> float | None:
    """Instructions per unit; None where they could not be counted."""
    counted = []
    for calls in CALLS:
        command = [sys.executable, "-m", str(__package__), "--repeat-one"]
        counted.append(counter([*command, f"{module}:{case.name}", str(calls)]))
    low, high = counted
    if low is None or high is None:
        return None
    return (high - low) / (CALLS[1] - CALLS[0]) / case.count


# Cache lines


def count_cold(named: str) -> tuple[float, float] | None:
    """Lines of code and of data (64 bytes) that a cold call touches; None without valgrind."""
    counted = [_count_lines(each, calls) for each in (named, NOTHING) for calls in COLD_CALLS]
    low, high, idle_low, idle_high = counted
    if low is None or high is None or idle_low is None or idle_high is None:
        return None
    calls = COLD_CALLS[1] - COLD_CALLS[0]
    code, data = (
        (high[i] - low[i] - (idle_high[i] - idle_low[i])) / calls for i in range(len(low))
    )
    return code, data


def _count_lines(named: str, calls: int) -> tuple[int, int] | None:
    """Misses of code and of data in the last cache; those before it hold next to nothing."""
    caches = ["--I1=1024,2,64", "--D1=1024,2,64", f"--LL={CACHE_BYTES},16,64"]
    options = ["--tool=cachegrind", "--cache-sim=yes", *caches, "--cachegrind-out-file=/dev/null"]
    command = [sys.executable, "-m", str(__package__), "--cold", "--repeat-one", named, str(calls)]
    output = _run(["valgrind", *options, *command])
    code = re.search(r"LLi misses: +([0-9,]+)", output)
    data = re.search(r"LLd misses: +([0-9,]+)", output)
    if code is None or data is None:
        return None
    return int(code[1].replace(",", "")), int(data[1].replace(",", ""))


def _empty_caches() -> Callable[[], object]:
    """What overwrites all that a cache holds."""
    buffer = ctypes.create_string_buffer(2 * CACHE_BYTES)
    return partial(ctypes.memset, buffer, 1, 2 * CACHE_BYTES)


def repeat_one(named: str, calls: int, *, is_cold: bool = False) -> None:
    """What a counted process does."""
    module, _, name = named.partition(":")
    operation: Callable[[], object] = bool
    if named != NOTHING:
        operation = next(case for _, case in cases([module]) if case.name == name).make()
    if not is_cold:
        for _ in range(calls):
            operation()
        return
    empty = _empty_caches()
    for _ in range(3):
        operation()
    gc.collect()
    gc.disable()  # a collection would count for whichever call it hits
    for _ in range(calls):
        operation()
        empty()


# Command line


def run(options: argparse.Namespace) -> dict[str, object]:
    """Time and count all; prints a line as each is done."""
    counted_by, counter = find_counter() if options.instructions else ("not asked for", None)
    cold = f"{'code lines':>12}{'data lines':>12}" if options.cold else ""
    print(f"{'':<46}{'ns':>10}{'instructions':>16}{cold}  per")
    results = []
    for module, case in cases(options.modules):
        nanoseconds = time_case(case, options.repeats)
        instructions = count_case(module, case, counter) if counter else None
        lines = count_cold(f"{module}:{case.name}") if options.cold else None
        results.append(
            {"module": module, "case": case.name, "unit": case.unit, "ns": nanoseconds}
            | {"instructions": instructions, "cold_lines": lines}
        )
        columns = f"{'-' if instructions is None else f'{instructions:,.0f}':>16}"
        if options.cold:
            columns += "".join(f"{each:>12,.0f}" for each in lines) if lines else f"{'-':>12}" * 2
        name = f"{module}: {case.name}"
        print(f"{name:<46}{nanoseconds:>10,.0f}{columns}  {case.unit}", flush=True)
    print(f"instructions: {counted_by}")
    return {"instructions_by": counted_by, "machine": describe_machine(), "results": results}


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--repeats", type=int, default=7, help="of which the least counts (7)")
    parser.add_argument("--no-instructions", dest="instructions", action="store_false")
    parser.add_argument("--cold", action="store_true", help="count cache lines, too (valgrind)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--repeat-one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.modules) - set(MODULES):
        parser.error(f"expected some of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    options.modules = options.modules or list(MODULES)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    if options.repeat_one:
        repeat_one(options.repeat_one[0], int(options.repeat_one[1]), is_cold=options.cold)
        return 0
    report = run(options)
    if options.json is not None:
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
