"""The command line: serve, status, upgrade, check, config, keys, usage, export, bench, version.

Exit code 3: could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .commands_keys import add_keys
from .commands_usage import add_usage
from .config import (
    EXAMPLE,
    Address,
    Config,
    ConfigError,
    KeySettings,
    LogSettings,
    RecordSettings,
    ServerSettings,
    parse_config,
)
from .native import HOW_TO_COMPILE, describe_build, is_compiled
from .printing import print_table
from .store import Store, StoreError
from .stores import open_store

if TYPE_CHECKING:
    from .server import Server

T = TypeVar("T", int, float)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2  # argparse's own
EXIT_CANNOT_START = 3
DEFAULT_CONFIG = "hoberproxy.toml"
BENCH_PARTS = {
    "mock": ("mock_upstream", "a model server to measure against"),
    "load": ("load", "load on any OpenAI-compatible server"),
    "compare": ("side_by_side", "the proxy beside a plain relay, under the same load"),
    "account": ("account", "what keys and limits cost over several workers"),
    "report": ("report", "the tables of a result file"),
    "micro": ("micro.__main__", "ns and instructions per operation of the core"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
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
    """All commands and their options."""
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
        help=f"the TOML file; ./{DEFAULT_CONFIG} if there is one",
    )

    serve = commands.add_parser("serve", parents=[config_option], help="start the proxy")
    serve.add_argument(
        "--listen", metavar="HOST:PORT", help="listen here instead of where the config says"
    )
    serve.add_argument(
        "--workers",
        metavar="COUNT",
        type=_number_parser(int, 0, 256),
        help="processes that serve, under one that watches them; 0 is one per core. "
        "Without it a single process serves",
    )
    serve.set_defaults(run=_serve)

    status = commands.add_parser(
        "status", parents=[config_option], help="ask the running proxy how it is"
    )
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)

    upgrade = commands.add_parser(
        "upgrade",
        parents=[config_option],
        help="let the running `serve --workers` go on with what is installed now",
    )
    upgrade.set_defaults(run=_upgrade)

    check = commands.add_parser(
        "check", parents=[config_option], help="read the config and list every problem in it"
    )
    check.add_argument(
        "--live", action="store_true", help="also ask each endpoint, with three tiny requests"
    )
    check.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_number_parser(float, 0.1, 3600),
        default=30.0,
        help="with --live: the longest for one request; default: 30",
    )
    check.add_argument(
        "--concurrency",
        metavar="COUNT",
        type=_number_parser(int, 1, 256),
        default=8,
        help="with --live: endpoints asked at a time; default: 8",
    )
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="print a commented example of a config")
    config.add_argument("--example", action="store_true", required=True, help="print the example")
    config.set_defaults(run=_print_example)

    add_keys(commands, config_option, _open_store)
    add_usage(commands, config_option, _open_store)
    _add_bench(commands)

    version = commands.add_parser("version", help="print the version, and whether it is compiled")
    version.set_defaults(run=_version)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parts = "\n".join(f"  {name:<9}{what}" for name, (_, what) in BENCH_PARTS.items())
    bench = commands.add_parser(
        "bench",
        help="measure what the hop costs on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"parts:\n{parts}\n\n`hoberproxy bench PART --help` tells the options of one.",
    )
    bench.add_argument("part", choices=BENCH_PARTS, metavar="PART", help="see below")
    bench.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="the part's own")
    bench.set_defaults(run=_bench)


# serve, check


def _serve(arguments: argparse.Namespace) -> int:
    from .joining import hold_signals
    from .listeners import StartError

    if arguments.workers is not None:
        return _serve_with_workers(arguments)
    if arguments.config is not None or Path(DEFAULT_CONFIG).exists():
        hold_signals()
    config = _load_config(arguments)
    listen = _parse_listen(arguments.listen) if arguments.listen else None
    if config is not None:
        config = _at(config, listen)
    _set_up_logging(config.log.level if config is not None else "info")
    try:
        if config is not None:
            _run_configured(config, lambda: _at(_load_again(arguments), listen))
        else:
            _run_embedded(ServerSettings(listen=(listen,)) if listen else ServerSettings())
    except (StartError, StoreError) as error:
        return _cannot_start(str(error))
    return EXIT_OK


def _serve_with_workers(arguments: argparse.Namespace) -> int:
    from .joining import hold_signals
    from .listeners import StartError
    from .service import serve_with_workers

    path = arguments.config or DEFAULT_CONFIG
    if arguments.config is None and not Path(path).exists():
        return _cannot_start(f"--workers needs a config: expected ./{path} or --config FILE")
    hold_signals()
    try:
        serve_with_workers(path, arguments.listen, arguments.workers)
    except StartError as error:
        return _cannot_start(*error.problems)
    return EXIT_OK


def _status(arguments: argparse.Namespace) -> int:
    from .commands_service import show_status

    return show_status(_config_of_service(arguments), print_table, as_json=arguments.json)


def _upgrade(arguments: argparse.Namespace) -> int:
    from .commands_service import upgrade

    return upgrade(_config_of_service(arguments))


def _config_of_service(arguments: argparse.Namespace) -> Config:
    """The config, or as much of it as a start without one in this directory has."""
    config = _load_config(arguments)
    if config is not None:
        return config
    return Config(ServerSettings(), KeySettings(), RecordSettings(), LogSettings(), {}, ())


def _at(config: Config, listen: Address | None) -> Config:
    """The config with the address of --listen, where that was given."""
    if listen is None:
        return config
    return dataclasses.replace(config, server=dataclasses.replace(config.server, listen=(listen,)))


async def _started(config: Config) -> Server:
    from .listeners import passed_by_systemd
    from .notify import Notifier
    from .server import Server

    server = Server(config, passed_by_systemd(os.environ), Notifier(os.environ))
    try:
        await server.start()
    except BaseException:
        await server.aclose()
        raise
    server.stop_on_signals()
    server.announce()
    return server


def _load_again(arguments: argparse.Namespace) -> Config:
    config = _load_config(arguments)
    if config is None:
        raise ConfigError([f"{DEFAULT_CONFIG} is gone"])
    return config


def _run_configured(config: Config, load: Callable[[], Config]) -> None:
    from .server import run

    async def serve() -> None:
        server = await _started(config)
        server.reload_on_signal(load)
        for address in server.addresses:
            print(f"{describe_build()} listens on http://{address}", flush=True)
        await server.wait_closed()

    run(serve)


def _run_embedded(settings: ServerSettings) -> None:
    from .quickstart import (
        embedded_config,
        make_key,
        start_demo,
        welcome,
        without_taken_metrics,
    )
    from .server import run

    async def serve() -> None:
        demo, port = await start_demo()
        try:
            config = embedded_config(port, os.environ, without_taken_metrics(settings))
            key = make_key(config.records.file)  # before the start, which reads the keys
            server = await _started(config)
            print(welcome(config, server.addresses[0], key, _program()), flush=True)
            await server.wait_closed()
        finally:
            await demo.aclose()

    run(serve)


def _program() -> str:
    """How to call this program from where its user is."""
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
    config = _load_config(arguments)
    if config is None:
        return _cannot_start(f"no config: expected ./{DEFAULT_CONFIG} or --config FILE")
    endpoints = sum(len(model.endpoints) for model in config.models)
    print(
        f"ok: {len(config.providers)} providers, {len(config.models)} models, {endpoints} endpoints"
    )
    return _check_live(config, arguments) if arguments.live else EXIT_OK


def _check_live(config: Config, arguments: argparse.Namespace) -> int:
    """Ask all endpoints; EXIT_FAILED if one can't be reached."""
    from .diagnosis import COLUMNS
    from .probe import run_probe

    reports = run_probe(
        config, limit=arguments.timeout, concurrency=arguments.concurrency, tell=_tell_progress
    )
    print_table(COLUMNS, [report.cells for report in reports])
    if any(model.is_wildcard for model in config.models):
        print('of a model that ends in "/*", the first that the provider lists was asked')
    for report in reports:
        for problem in report.problems:
            print(problem)
    return EXIT_FAILED if any(report.is_unreachable for report in reports) else EXIT_OK


def _tell_progress(done: int, total: int) -> None:
    """On a terminal a line that grows and is gone in the end; nothing elsewhere."""
    if sys.stderr.isatty():
        line = f"\rasked {done} of {total}" if done < total else "\r\x1b[K"
        print(line, end="", file=sys.stderr, flush=True)


def _bench(arguments: argparse.Namespace) -> int:
    """Hand over to a part of the benchmarks, which a checkout has under their short name."""
    checkout = Path(__file__).parents[1] / "bench" / "side_by_side.py"
    package = "bench" if checkout.exists() else "hoberproxy_bench"
    module, _ = BENCH_PARTS[arguments.part]
    return int(importlib.import_module(f"{package}.{module}").main(arguments.options))


def _print_example(arguments: argparse.Namespace) -> int:
    print(EXAMPLE, end="")
    return EXIT_OK


def _version(arguments: argparse.Namespace) -> int:
    print(describe_build() if is_compiled() else f"{describe_build()}; {HOW_TO_COMPILE}")
    return EXIT_OK


def _load_config(arguments: argparse.Namespace) -> Config | None:
    """The config named, or the one in this directory; None if there is none."""
    path = arguments.config
    if path is None:
        if not Path(DEFAULT_CONFIG).exists():
            return None
        path = DEFAULT_CONFIG
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError([f"{path}: cannot be read: {exc.strerror}"]) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError([f"{path}: expected UTF-8, got other bytes"]) from exc
    return parse_config(
        text,
        environ=os.environ,
        read_file=lambda name: Path(name).read_text(encoding="utf-8"),
    )


def _number_parser(kind: type[T], low: float, high: float) -> Callable[[str], T]:
    """A parser of an option's number within bounds, for argparse."""

    def parse(text: str) -> T:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        expected = f"a number from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def _parse_listen(text: str) -> Address:
    from .catalog import Refusal, parse_host_and_port

    try:
        return Address(*parse_host_and_port(text))
    except Refusal as refusal:
        raise ConfigError([f"--listen: {refusal}"]) from None


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def _cannot_start(*problems: str) -> int:
    for problem in problems:
        print(f"hoberproxy: {problem}", file=sys.stderr)
    return EXIT_CANNOT_START


# The store that keys, usage and export mean


def _open_store(arguments: argparse.Namespace, *, create: bool = False) -> Store:
    """The store of the config, or of a start without one in this directory."""
    config = _load_config(arguments)
    path = config.records.file if config is not None else RecordSettings().file
    if not create and not Path(path).exists():
        raise StoreError(
            f"no keys or records at {path} yet; "
            "run this where the proxy was started, or name its --config"
        )
    return open_store(path)
