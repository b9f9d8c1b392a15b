"""The command line: serve, status, upgrade, check, config, keys, usage, bench, version.

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
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import __version__
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
from .store import KeyRow, Store, StoreError, UsageRow

if TYPE_CHECKING:
    from .server import Server

T = TypeVar("T", int, float)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2  # argparse's own
EXIT_CANNOT_START = 3
DEFAULT_CONFIG = "hoberproxy.toml"
GROUPS = ("key", "model", "provider", "day", "status")
BENCH_PARTS = {
    "mock": ("mock_upstream", "a model server to measure against"),
    "load": ("load", "load on any OpenAI-compatible server"),
    "compare": ("side_by_side", "the proxy beside a plain relay, under the same load"),
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

    _add_keys(commands, config_option)

    usage = commands.add_parser(
        "usage", parents=[config_option], help="sum requests and tokens from the records"
    )
    usage.add_argument("--by", choices=GROUPS, default="model", help="default: model")
    usage.add_argument("--since", metavar="DATE", help="from this day on (UTC), YYYY-MM-DD")
    usage.add_argument("--until", metavar="DATE", help="up to and with this day (UTC)")
    usage.set_defaults(run=_usage)

    _add_bench(commands)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_keys(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    config_option: argparse.ArgumentParser,
) -> None:
    keys = commands.add_parser("keys", help="create, list and revoke keys")
    actions = keys.add_subparsers(title="actions", required=True, metavar="ACTION")
    create = actions.add_parser(
        "create", parents=[config_option], help="make a key and print it, this once"
    )
    create.add_argument("--label", required=True, help="what records and logs call it")
    create.add_argument("--test", action="store_true", help="an hb_test_ key, not hb_live_")
    create.add_argument(
        "--expires", metavar="WHEN", help="a day (YYYY-MM-DD, UTC) or a time from now (12h, 30d)"
    )
    create.set_defaults(run=_create_key)
    listing = actions.add_parser("list", parents=[config_option], help="list all keys")
    listing.set_defaults(run=_list_keys)
    revoke = actions.add_parser(
        "revoke", parents=[config_option], help="stop a key, within a second"
    )
    revoke.add_argument("key", metavar="ID", help="its id or hint from `keys list`")
    revoke.set_defaults(run=_revoke_key)


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
    from .listeners import StartError

    if arguments.workers is not None:
        return _serve_with_workers(arguments)
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
    from .listeners import StartError
    from .service import serve_with_workers

    path = arguments.config or DEFAULT_CONFIG
    if arguments.config is None and not Path(path).exists():
        return _cannot_start(f"--workers needs a config: expected ./{path} or --config FILE")
    try:
        serve_with_workers(path, arguments.listen, arguments.workers)
    except StartError as error:
        return _cannot_start(*error.problems)
    return EXIT_OK


def _status(arguments: argparse.Namespace) -> int:
    from .commands_service import show_status

    return show_status(_config_of_service(arguments), _print_table, as_json=arguments.json)


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
            print(f"hoberproxy {__version__} listens on http://{address}", flush=True)
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
    _print_table(COLUMNS, [report.cells for report in reports])
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
    print(f"hoberproxy {__version__}")
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


# keys, usage


def _open_store(arguments: argparse.Namespace, *, create: bool = False) -> Store:
    """The store of the config, or of a start without one in this directory."""
    config = _load_config(arguments)
    path = config.records.file if config is not None else RecordSettings().file
    if not create and not Path(path).exists():
        raise StoreError(
            f"no keys or records at {path} yet; "
            "run this where the proxy was started, or name its --config"
        )
    return Store(path)


def _create_key(arguments: argparse.Namespace) -> int:
    expires = _parse_expiry(arguments.expires, time.time()) if arguments.expires else None
    store = _open_store(arguments, create=True)
    try:
        key, row = store.create_key(
            arguments.label, kind="test" if arguments.test else "live", expires=expires
        )
    finally:
        store.close()
    print(f"{row.key_id} ({row.label}); the key is shown this once:", file=sys.stderr)
    print(key)
    return EXIT_OK


def _list_keys(arguments: argparse.Namespace) -> int:
    store = _open_store(arguments)
    try:
        rows = store.list_keys()
    finally:
        store.close()
    now = time.time()
    _print_table(
        ("id", "label", "key", "created", "expires", "state"),
        [
            (
                row.key_id,
                row.label,
                row.hint,
                _day(row.created),
                _day(row.expires) if row.expires is not None else "never",
                _key_state(row, now),
            )
            for row in rows
        ],
    )
    return EXIT_OK


def _key_state(row: KeyRow, now: float) -> str:
    if row.revoked is not None:
        return "revoked"
    if row.expires is not None and row.expires <= now:
        return "expired"
    return "active"


def _revoke_key(arguments: argparse.Namespace) -> int:
    store = _open_store(arguments)
    try:
        row = store.revoke_key(arguments.key)
    finally:
        store.close()
    print(f"revoked {row.key_id} ({row.label})")
    return EXIT_OK


def _usage(arguments: argparse.Namespace) -> int:
    since = _parse_day(arguments.since) if arguments.since else None
    until = _parse_day(arguments.until) + 86400 if arguments.until else None
    store = _open_store(arguments)
    try:
        rows = store.sum_usage(arguments.by, since, until)
    finally:
        store.close()
    _print_table(
        (arguments.by, "requests", "failed", "prompt", "completion", "cached", "first content"),
        [_usage_cells(row) for row in rows],
        right_from=1,
    )
    if any(row.estimated_share for row in rows):
        print("~ some of these tokens are estimates: their upstream told no usage")
    return EXIT_OK


def _usage_cells(row: UsageRow) -> tuple[str, ...]:
    mark = "~" if row.estimated_share else ""
    return (
        f"{row.label} ({row.name})" if row.label else row.name or "-",
        f"{row.requests:,}",
        f"{row.failed:,}",
        f"{mark}{row.prompt_tokens:,}",
        f"{mark}{row.completion_tokens:,}",
        f"{row.cached_tokens:,}",
        f"{row.first_content * 1000:,.0f} ms" if row.first_content is not None else "-",
    )


def _print_table(
    head: tuple[str, ...], rows: list[tuple[str, ...]], *, right_from: int | None = None
) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.rjust(width)
            if right_from is not None and index >= right_from
            else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _parse_day(text: str) -> float:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise StoreError(f"expected a day as YYYY-MM-DD, got {text!r}") from None


def _parse_expiry(text: str, now: float) -> float:
    units = {"m": "minutes", "h": "hours", "d": "days"}
    if text[:-1].isdigit() and text[-1:] in units:
        return now + timedelta(**{units[text[-1]]: int(text[:-1])}).total_seconds()
    return _parse_day(text)
