"""Parse the command line and run one command.

Exit codes: 1 a command failed, 2 a wrong command line (from argparse), 3 could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from .._mypyc import HOW_TO_COMPILE, describe_build, is_compiled
from ..access.admission import MAX_WORKERS
from ..config.settings import Config, RecordSettings, ServerSettings
from ..config.source import parse_listen, read_example, read_source
from ..config.values import ConfigError
from ..storage.sqlite_records import open_store
from ..storage.store import Store, StoreError
from .keys import add_keys
from .printing import print_table
from .usage import add_usage

T = TypeVar("T", int, float)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CANNOT_START = 3
DEFAULT_CONFIG = "hoberproxy.toml"
BENCH_PARTS = {
    "mock": ("mock_upstream", "a model server to measure against"),
    "load": ("load", "load on any OpenAI-compatible server"),
    "compare": ("side_by_side", "the proxy beside a plain relay, under the same load"),
    "account": ("account", "the cost of keys and limits over several workers"),
    "report": ("report", "tables from a result file"),
    "micro": ("micro.__main__", "ns and instructions per operation of the core"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` and return the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        return _cannot_start(*error.problems)
    except StoreError as error:
        print(f"hoberproxy: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # `hoberproxy usage | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="hoberproxy",
        description="An OpenAI-compatible endpoint that relays LLM streams.",
        epilog="Without a config file, `hoberproxy serve` starts with a demo model and the "
        "providers whose keys are in the environment.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    config_option = argparse.ArgumentParser(add_help=False)
    config_option.add_argument(
        "--config",
        metavar="FILE",
        help=f"config file (TOML); default: ./{DEFAULT_CONFIG}, if it exists",
    )

    serve = commands.add_parser("serve", parents=[config_option], help="start the proxy")
    serve.add_argument(
        "--listen", metavar="HOST:PORT", help="address to listen on, in place of server.listen"
    )
    serve.add_argument(
        "--workers",
        metavar="COUNT",
        type=_number_parser(int, 0, MAX_WORKERS),
        help="processes that serve, under one that watches them; 0 is one per core; default: 1",
    )
    serve.set_defaults(run=_serve)

    status = commands.add_parser(
        "status", parents=[config_option], help="print the state of the running proxy"
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)

    upgrade = commands.add_parser(
        "upgrade",
        parents=[config_option],
        help="let the running proxy go on with what is installed now",
    )
    upgrade.set_defaults(run=_upgrade)

    check = commands.add_parser(
        "check", parents=[config_option], help="check the config and list all its problems"
    )
    check.add_argument(
        "--live",
        action="store_true",
        help="also send three small requests to each endpoint and report what it supports",
    )
    check.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_number_parser(float, 0.1, 3600),
        default=30.0,
        help="with --live: time limit of one request; default: 30",
    )
    check.add_argument(
        "--concurrency",
        metavar="COUNT",
        type=_number_parser(int, 1, 256),
        default=8,
        help="with --live: endpoints checked at a time; default: 8",
    )
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="print a commented example config")
    config.add_argument("--example", action="store_true", required=True, help="print the example")
    config.set_defaults(run=_print_example)

    add_keys(commands, config_option, _open_store)
    add_usage(commands, config_option, _open_store)
    _add_bench(commands)

    # What a supervisor starts. Without a help text they are in no list of commands.
    for name, run in (("worker", _worker), ("writer", _writer)):
        child = commands.add_parser(name)
        child.add_argument("channel", help="number of a descriptor")
        child.set_defaults(run=run)

    version = commands.add_parser("version", help="print the version, and whether it is compiled")
    version.set_defaults(run=_version)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parts = "\n".join(f"  {name:<9}{what}" for name, (_, what) in BENCH_PARTS.items())
    bench = commands.add_parser(
        "bench",
        help="measure the cost of the proxy on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"parts:\n{parts}\n\n`hoberproxy bench PART --help` lists the options of a part.",
    )
    bench.add_argument(
        "part", choices=BENCH_PARTS, metavar="PART", help="what to measure, see below"
    )
    bench.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="options of the part"
    )
    bench.set_defaults(run=_bench)


# serve, check


def _serve(arguments: argparse.Namespace) -> int:
    path = _config_path(arguments)
    if path is None:
        if arguments.workers is not None:
            return _cannot_start(
                f"--workers needs a config: expected ./{DEFAULT_CONFIG} or --config FILE"
            )
        return _serve_embedded(arguments.listen)
    # A signal for a reload or an upgrade that comes during the start waits for its handler.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR2))
    from ..process.listeners import StartError
    from ..process.supervisor import serve

    try:
        serve(path, arguments.listen, 1 if arguments.workers is None else arguments.workers)
    except StartError as error:
        return _cannot_start(*error.problems)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return EXIT_OK


def _serve_embedded(listen: str | None) -> int:
    """Serve the demo model, and what the environment names, in this one process."""
    from ..process.channel import LOG_FORMAT
    from ..process.listeners import StartError
    from ..process.server import run

    settings = ServerSettings(listen=(parse_listen(listen),)) if listen else ServerSettings()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    try:
        run(lambda: _run_embedded(settings))
    except (StartError, StoreError) as error:
        return _cannot_start(str(error))
    return EXIT_OK


async def _run_embedded(settings: ServerSettings) -> None:
    from ..accounting.journal_directory import count_living
    from ..process.listeners import Listeners
    from ..process.server import Server
    from .demo import DemoModel
    from .quickstart import embedded_config, make_key, welcome

    demo, listeners = DemoModel(), Listeners()
    try:
        config = embedded_config(await demo.start(), os.environ, settings)
        key = make_key(config.records.file)  # before the start, which reads the keys
        await listeners.listen(settings.listen, lambda: count_living(config.records.file) > 0)
        server = Server(config, listeners)
        try:
            await server.start()
        except BaseException:
            await server.aclose()
            raise
        server.stop_on_signals()
        print(welcome(config, server.addresses[0], key, _program()), flush=True)
        await server.wait_closed()
    finally:
        listeners.close()
        await demo.aclose()


def _worker(arguments: argparse.Namespace) -> int:
    from ..process import worker

    if arguments.channel == "check":
        return worker.check(sys.stdin.buffer.read())
    return worker.main(arguments.channel)


def _writer(arguments: argparse.Namespace) -> int:
    from ..process.writer_process import main

    return main(arguments.channel)


def _status(arguments: argparse.Namespace) -> int:
    from .service import show_status

    return show_status(_need_config(arguments), as_json=arguments.json)


def _upgrade(arguments: argparse.Namespace) -> int:
    from .service import upgrade

    return upgrade(_need_config(arguments))


def _program() -> str:
    """Return the words by which a user in this directory can call this program."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{_from_here(sys.executable)} -m hoberproxy"
    return _from_here(str(called))


def _from_here(path: str) -> str:
    name = Path(path).name
    if (found := shutil.which(name)) is not None and Path(found) == Path(path):
        return name
    return os.path.relpath(path)


def _check(arguments: argparse.Namespace) -> int:
    config = _need_config(arguments)
    endpoints = sum(len(model.endpoints) for model in config.models)
    print(
        f"ok: {len(config.providers)} providers, {len(config.models)} models, {endpoints} endpoints"
    )
    return _check_live(config, arguments) if arguments.live else EXIT_OK


def _check_live(config: Config, arguments: argparse.Namespace) -> int:
    """Check all endpoints; return EXIT_FAILED if one cannot be reached."""
    from .live_check import run_live_check
    from .live_check_report import COLUMNS

    reports = run_live_check(
        config,
        limit=arguments.timeout,
        concurrency=arguments.concurrency,
        on_progress=_print_progress,
    )
    print_table(COLUMNS, [report.cells for report in reports])
    if any(model.is_wildcard for model in config.models):
        print('for a model that ends in "/*", the first fitting model of the provider was checked')
    for report in reports:
        for problem in report.problems:
            print(problem)
    return EXIT_FAILED if any(report.is_unreachable for report in reports) else EXIT_OK


def _print_progress(done: int, total: int) -> None:
    """Print the progress on a terminal, and clear it when all is done."""
    if sys.stderr.isatty():
        line = f"\rchecked {done} of {total}" if done < total else "\r\x1b[K"
        print(line, end="", file=sys.stderr, flush=True)


def _bench(arguments: argparse.Namespace) -> int:
    """Run a part of the benchmarks: of `bench` in a checkout, else of `hoberproxy_bench`."""
    checkout = Path(__file__).parents[2] / "bench" / "side_by_side.py"
    package = "bench" if checkout.exists() else "hoberproxy_bench"
    module, _ = BENCH_PARTS[arguments.part]
    return int(importlib.import_module(f"{package}.{module}").main(arguments.options))


def _print_example(arguments: argparse.Namespace) -> int:
    print(read_example(), end="")
    return EXIT_OK


def _version(arguments: argparse.Namespace) -> int:
    print(describe_build() if is_compiled() else f"{describe_build()}; {HOW_TO_COMPILE}")
    return EXIT_OK


def _config_path(arguments: argparse.Namespace) -> str | None:
    """Return the path of --config, or of the config in this directory; None if neither is there."""
    path: str | None = arguments.config
    return path or (DEFAULT_CONFIG if Path(DEFAULT_CONFIG).exists() else None)


def _load_config(arguments: argparse.Namespace) -> Config | None:
    path = _config_path(arguments)
    return read_source(path)[1] if path is not None else None


def _need_config(arguments: argparse.Namespace) -> Config:
    config = _load_config(arguments)
    if config is None:
        problem = (
            f"expected ./{DEFAULT_CONFIG} or --config FILE, got neither; "
            "make one with `hoberproxy config --example`"
        )
        raise ConfigError([problem])
    return config


def _number_parser(kind: type[T], low: float, high: float) -> Callable[[str], T]:
    """Return a parser, for argparse, of a number from `low` to `high`."""

    def parse(text: str) -> T:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        expected = f"a number from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def _cannot_start(*problems: str) -> int:
    for problem in problems:
        print(f"hoberproxy: {problem}", file=sys.stderr)
    return EXIT_CANNOT_START


def _open_store(arguments: argparse.Namespace, *, create: bool = False) -> Store:
    """Open the store of the config, or the one that `serve` without a config makes here."""
    config = _load_config(arguments)
    path = config.records.file if config is not None else RecordSettings().file
    if not create and not Path(path).exists():
        raise StoreError(
            f"expected keys and records at {path}, got no such file; "
            "run the command where the proxy was started, or with its --config"
        )
    return open_store(path)
