"""`check --live`: what each column says of which answers, and what it never prints."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from hoberproxy.cli.demo import MODEL, DemoModel
from hoberproxy.cli.live_check import check_endpoints
from hoberproxy.cli.live_check_report import COLUMNS, Report
from hoberproxy.cli.main import _print_progress, main
from hoberproxy.config.settings import (
    Config,
    KeySettings,
    LogSettings,
    RecordSettings,
    ServerSettings,
)
from hoberproxy.routing.catalog import Abilities, Adaptation, Endpoint, Model, Provider, TimeLimits
from hoberproxy.upstream.connector import Connector
from tests.support.patience import WAIT, patient
from tests.support.scripted import (
    DONE,
    LAST_CHUNK,
    AwaitRelease,
    Close,
    Script,
    ScriptedUpstream,
    SeenRequest,
    Send,
    Stall,
    chunk,
    completion,
    json_response,
    refused_port,
    serialize_head,
    sse,
    stream_events,
)

KEY = "sk-secret-of-the-provider"
TEXT = (
    "words of the upstream"  # in every refusal here, in most with the key: neither may be printed
)
# [DONE] and the end of the framing in one write, so that the connection is free for what is next.
STREAM = [*sse(*stream_events(4), pace=0.02)[:-3], Send(chunk(DONE) + LAST_CHUNK)]
CALL = {"id": "call_1", "type": "function", "function": {"name": "ok", "arguments": "{}"}}


def refusal(status: int, message: str = "") -> Script:
    # Of these a key makes another failure: nothing is wrong with the request then.
    key = "" if status in (400, 413, 422) else KEY
    return json_response(status, {"error": {"message": f"{message} {TEXT} {key}", "param": None}})


def called(finish_reason: str = "tool_calls") -> Script:
    whole = completion(finish_reason=finish_reason)
    whole["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    return json_response(200, whole)


def said(text: str, finish_reason: str = "stop") -> Script:
    return json_response(200, completion(text, finish_reason=finish_reason))


def able(seen: SeenRequest) -> Script:
    """Answer as a model that can do everything."""
    if seen.method == "GET":
        return json_response(200, {"data": [{"id": "listed-model"}]})
    body = seen.json()
    if body.get("stream"):
        return STREAM
    return called() if "tools" in body else said('{"ok": true}')


def provider(port: int, name: str = "scripted", **settings: Any) -> Provider:
    values: dict[str, Any] = {"scheme": "http", "host": "127.0.0.1", "path": "/v1", "api_key": KEY}
    return Provider(name, port=port, **(values | settings))


def config_of(providers: list[Provider], *models: Model) -> Config:
    """One endpoint for each provider, unless models are given."""
    one = Model("test/model", tuple(Endpoint(each.name, "upstream-model") for each in providers))
    return Config(
        server=ServerSettings(),
        keys=KeySettings(),
        records=RecordSettings(),
        log=LogSettings(),
        providers={each.name: each for each in providers},
        models=models or (one,),
    )


async def reports_of(config: Config, *, limit: float = WAIT, concurrency: int = 8) -> list[Report]:
    """All reports, none of which has a key or an upstream's text."""
    reports = await check_endpoints(
        config, limit=limit, concurrency=concurrency, on_progress=lambda done, total: None
    )
    printed = "\n".join(" ".join((*report.cells, *report.problems)) for report in reports)
    assert KEY not in printed
    assert TEXT not in printed
    return reports


async def report_of(upstream: ScriptedUpstream, limit: float = WAIT, **settings: Any) -> Report:
    (report,) = await reports_of(config_of([provider(upstream.port, **settings)]), limit=limit)
    return report


# Requests


async def test_three_requests_are_asked_in_the_form_of_real_ones() -> None:
    adaptation = Adaptation(
        rename=(("max_tokens", "max_completion_tokens"),), set=(("seed", b"7"),)
    )
    endpoint = Endpoint("scripted", "upstream-model", adaptation=adaptation)
    async with ScriptedUpstream(default=able) as upstream:
        only = provider(upstream.port, headers=(("x-title", "mine"),))
        (report,) = await reports_of(config_of([only], Model("test/model", (endpoint,))))
    assert report.reachable == "yes"
    bodies = [seen.json() for seen in upstream.requests]
    assert [body.get("stream", False) for body in bodies] == [True, False, False]
    assert bodies[0]["stream_options"] == {"include_usage": True}
    assert bodies[1]["tool_choice"] == "required"
    assert bodies[2]["response_format"] == {"type": "json_object"}
    assert "JSON" in bodies[2]["messages"][0]["content"], "OpenAI refuses the mode without"
    for seen, body in zip(upstream.requests, bodies, strict=True):
        assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
        assert seen.headers["authorization"] == f"Bearer {KEY}"
        assert seen.headers["x-title"] == "mine"
        assert (body["model"], body["seed"]) == ("upstream-model", 7)
        assert body["max_completion_tokens"] <= 64
        assert "max_tokens" not in body
    assert upstream.connections == 1, "the pool's connection is used again"


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_no_more_endpoints_are_asked_at_a_time_than_allowed(concurrency: int) -> None:
    endpoints = tuple(Endpoint("scripted", f"model-{number}") for number in range(5))

    def waiting(seen: SeenRequest) -> Script:
        return [AwaitRelease("go"), *able(seen)]

    async with ScriptedUpstream(default=waiting) as upstream:
        config = config_of([provider(upstream.port)], Model("test/model", endpoints))
        task = asyncio.create_task(reports_of(config, concurrency=concurrency))
        await upstream.wait_for_requests(concurrency)
        await asyncio.sleep(0.05)  # time for one too many to come
        assert len(upstream.requests) == concurrency
        upstream.release("go")
        reports = await task
    assert [report.reachable for report in reports] == ["yes"] * 5
    assert len(upstream.requests) == 15


async def test_progress_is_reported_after_each_endpoint() -> None:
    progress = []
    async with ScriptedUpstream(default=able) as upstream:
        providers = [provider(upstream.port, name) for name in ("one", "two", "three")]
        await check_endpoints(
            config_of(providers),
            limit=WAIT,
            concurrency=8,
            on_progress=lambda *args: progress.append(args),
        )
    assert progress == [(1, 3), (2, 3), (3, 3)]


# What the columns say


async def test_the_demo_model_can_do_all() -> None:
    demo = DemoModel(pace=0.005)
    try:
        model = Model("hober/demo", (Endpoint("demo", MODEL),))
        config = config_of([provider(await demo.start(), "demo")], model)
        (report,) = await reports_of(config)
    finally:
        await demo.aclose()
    cells = dict(zip(COLUMNS, report.cells, strict=True))
    assert re.fullmatch(r"[0-9,]+ ms", cells.pop("first content"))
    assert re.fullmatch(r"[0-9,]+", cells.pop("tokens/s"))
    assert cells == {
        "model": "hober/demo",
        "provider": "demo",
        "reachable": "yes",
        "tools": "yes",
        "JSON mode": "yes",
        "usage": "yes",
    }
    assert not report.problems


@pytest.mark.parametrize(
    ("stream", "usage", "tokens"),
    [
        pytest.param(sse(*stream_events(4), pace=0.02), "yes", 3, id="usage reported"),
        pytest.param(sse(*stream_events(4, usage=None), pace=0.02), "no", 4, id="events counted"),
        pytest.param(sse(*stream_events(4, usage=(0, 0)), pace=0.02), "no", 4, id="zeros reported"),
    ],
)
async def test_speed_is_told_from_the_usage_or_the_events(
    stream: Script, usage: str, tokens: int
) -> None:
    async with ScriptedUpstream(stream, default=able) as upstream:
        report = await report_of(upstream)
    assert report.usage == usage
    assert report.throughput is not None
    # Three pauses at least lie between the first content and the end.
    assert 0 < report.throughput <= (tokens - 1) / 0.05
    assert report.first_content is not None
    assert report.first_content > 0


async def test_no_speed_is_told_of_an_answer_that_came_at_once() -> None:
    at_once = sse(*stream_events(4), per_write=100)
    async with ScriptedUpstream(at_once, default=able) as upstream:
        report = await report_of(upstream)
    assert report.reachable == "yes"
    assert report.throughput is None
    assert dict(zip(COLUMNS, report.cells, strict=True))["tokens/s"] == "-"


async def test_a_stream_that_comes_as_a_json_body_is_an_answer() -> None:
    async with ScriptedUpstream(said("OK"), default=able) as upstream:
        report = await report_of(upstream)
    assert (report.reachable, report.usage) == ("yes", "yes")


TOOL_ANSWERS = {
    "a call": (called(), "yes"),
    "a call cut in its arguments": (called("length"), "yes"),
    "text": (said("OK"), "no call"),
    "text cut before a call": (said("let me th", "length"), "cut"),
    "a refusal": (refusal(400), "refused"),
    "an error of the server": (refusal(500), "failed"),
    "choices of another kind": (json_response(200, {"choices": ["OK"]}), "failed"),
}
JSON_ANSWERS = {
    "an object": (said('{"ok": true}'), "yes"),
    "an object in a fence": (said('```json\n{"ok": true}\n```'), "no JSON"),
    "a bare number": (said("1"), "no JSON"),
    "an object cut": (said('{"ok": tr', "length"), "cut"),
    "a refusal": (refusal(422), "refused"),
    "an error of the server": (refusal(503), "failed"),
}


@pytest.mark.parametrize(("answer", "verdict"), TOOL_ANSWERS.values(), ids=TOOL_ANSWERS)
async def test_the_tools_column_tells(answer: Script, verdict: str) -> None:
    async with ScriptedUpstream(STREAM, answer, said("{}")) as upstream:
        report = await report_of(upstream)
    assert (report.reachable, report.tools, report.json_mode) == ("yes", verdict, "yes")
    assert len(report.problems) == (verdict != "yes")
    assert all("tools: " in problem for problem in report.problems)


@pytest.mark.parametrize(("answer", "verdict"), JSON_ANSWERS.values(), ids=JSON_ANSWERS)
async def test_the_json_column_tells(answer: Script, verdict: str) -> None:
    async with ScriptedUpstream(STREAM, called(), answer) as upstream:
        report = await report_of(upstream)
    assert (report.reachable, report.tools, report.json_mode) == ("yes", "yes", verdict)
    assert len(report.problems) == (verdict != "yes")
    assert all("json_mode: " in problem for problem in report.problems)


async def test_what_the_config_knows_to_be_missing_is_no_problem() -> None:
    endpoint = Endpoint("scripted", "upstream-model", abilities=Abilities(tools=False))
    async with ScriptedUpstream(STREAM, refusal(400), said("no")) as upstream:
        config = config_of([provider(upstream.port)], Model("test/model", (endpoint,)))
        (report,) = await reports_of(config)
    (problem,) = report.problems
    assert "set json_mode = false" in problem


# What is wrong, and what to do

FAILURES: dict[str, tuple[Script, str, str]] = {
    "a wrong key": (refusal(401), "401", "api_key_env"),
    "no credit": (refusal(402), "402", "credit"),
    "a key without rights": (refusal(403), "403", "rights"),
    "an unknown model": (refusal(404), "404", "check the endpoint's model"),
    "a rate limit": (refusal(429), "429", "check again later"),
    "a server that fails": (refusal(503), "503", "its log"),
    "a redirect": (refusal(308), "308", "final address"),
    "a web page": (
        [Send(serialize_head(200, [("content-type", "text/html"), ("content-length", "0")]))],
        "200",
        "base_url",
    ),
    "an error in the stream": (sse(b'data: {"error":{"message":"x"}}\n\n'), "200", "base_url"),
    "a status in the stream": (sse(b'data: {"error":{"code":429}}\n\n'), "429", "later"),
    "a stream that is cut": (sse(*stream_events(2)[:2], complete=False), "200", "incomplete"),
    "no answer at all": ([Close()], "cut", "http or https"),
    "silence": ([Stall()], "time limit", "--timeout"),
    "silence after the head": ([*sse()[:1], Stall()], "time limit", "--timeout"),
}


@pytest.mark.parametrize(("answer", "cell", "advice"), FAILURES.values(), ids=FAILURES)
async def test_an_endpoint_that_fails_is_asked_once_and_told(
    answer: Script, cell: str, advice: str
) -> None:
    async with ScriptedUpstream(answer) as upstream:
        limit = patient(0.2) if cell == "time limit" else WAIT
        report = await report_of(upstream, limit=limit)
    assert report.reachable == f"no ({cell})"
    assert report.is_unreachable
    assert (report.tools, report.json_mode, report.usage) == ("-", "-", "-")
    (problem,) = report.problems
    assert problem.startswith("test/model at scripted: ")
    assert advice in problem
    assert len(upstream.requests) == 1


async def test_a_request_that_is_refused_in_every_form_is_unreachable() -> None:
    async with ScriptedUpstream(default=refusal(400)) as upstream:
        report = await report_of(upstream)
    assert report.cells[2:] == ("no (400)", "-", "-", "refused", "refused", "-")
    (problem,) = report.problems
    assert "check the endpoint's model, rename, drop and set" in problem
    assert len(upstream.requests) == 3


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        pytest.param("stream_options", "stream_options = false", id="usage of streams"),
        pytest.param("seed", "out of the endpoint's set", id="a member the config sets"),
    ],
)
async def test_an_option_of_ours_that_is_refused_is_named_and_left_out(
    option: str, advice: str
) -> None:
    adaptation = Adaptation(set=(("seed", b"7"),))
    endpoint = Endpoint("scripted", "upstream-model", adaptation=adaptation)

    def picky(seen: SeenRequest) -> Script:
        return refusal(400, f"unknown member {option}:") if option in seen.json() else able(seen)

    async with ScriptedUpstream(default=picky) as upstream:
        config = config_of([provider(upstream.port)], Model("test/model", (endpoint,)))
        (report,) = await reports_of(config)
    assert (report.reachable, report.tools, report.json_mode) == ("yes", "yes", "yes")
    (problem,) = report.problems
    assert f"the server refuses {option}" in problem
    assert advice in problem
    assert len(upstream.requests) == 3


async def test_a_certificate_that_is_not_known_is_named_and_one_that_is_serves() -> None:
    async with ScriptedUpstream(default=able, tls=True) as upstream:
        unknown = provider(upstream.port, "unknown", scheme="https")
        known = provider(upstream.port, "known", scheme="https", ca_file=upstream.ca_file)
        reports = await reports_of(config_of([unknown, known]))
    assert [report.reachable for report in reports] == ["no (certificate)", "yes"]
    assert "ca_file" in reports[0].problems[0]


async def test_tls_where_there_is_none_and_none_where_there_is() -> None:
    async with ScriptedUpstream(tls=True) as spoken, ScriptedUpstream() as plain:
        to_tls = provider(spoken.port, "plain")
        to_plain = provider(plain.port, "tls", scheme="https")
        reports = await reports_of(config_of([to_tls, to_plain]), limit=0.3)
    assert all(report.is_unreachable for report in reports)


async def test_a_port_where_nothing_listens() -> None:
    with refused_port() as port:
        (report,) = await reports_of(config_of([provider(port)]))
    assert report.reachable == "no (refused)"
    assert "check the port" in report.problems[0]


async def test_a_name_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(self: Connector) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(Connector, "_look_up", look_up)
    (report,) = await reports_of(config_of([provider(80, host="nothing.invalid")]))
    assert report.reachable == "no (name)"
    assert "check the host" in report.problems[0]


async def test_the_limits_of_the_config_hold_where_they_are_shorter() -> None:
    limits = TimeLimits(first_content=0.1)
    async with ScriptedUpstream([Stall()]) as upstream:
        async with asyncio.timeout(WAIT):
            report = await report_of(upstream, limit=600.0, limits=limits)
    assert report.reachable == "no (time limit)"


# Wildcards


def wildcard(pattern: str = "*") -> Model:
    return Model("any/*", (Endpoint("scripted", pattern),))


async def wildcard_report(upstream: ScriptedUpstream, pattern: str = "*") -> Report:
    only = provider(upstream.port)
    (report,) = await reports_of(config_of([only], wildcard(pattern)), limit=patient(2.0))
    return report


@pytest.mark.parametrize(
    ("pattern", "tried"),
    [
        pytest.param("*", "first", id="the first"),
        pytest.param("acme/*", "acme/second", id="the first with the prefix"),
        pytest.param("acme/*:free", "acme/third:free", id="the first with prefix and suffix"),
    ],
)
async def test_of_a_wildcard_the_first_listed_model_that_fits_is_tried(
    pattern: str, tried: str
) -> None:
    ids = ["first", "acme/", "acme/second", "acme/third:free"]
    listing = json_response(200, {"data": [{"id": 5}, "x", *({"id": each} for each in ids)]})
    async with ScriptedUpstream(listing, default=able) as upstream:
        report = await wildcard_report(upstream, pattern)
    assert report.cells[:3] == ("any/*", "scripted", "yes")
    listed, *others = upstream.requests
    assert (listed.method, listed.path) == ("GET", "/v1/models")
    assert listed.headers["authorization"] == f"Bearer {KEY}"
    assert [seen.json()["model"] for seen in others] == [tried] * 3


@pytest.mark.parametrize(
    "listing",
    [
        pytest.param(json_response(200, {"data": []}), id="no model"),
        pytest.param(json_response(200, {"data": 5}), id="no list"),
        pytest.param(json_response(200, b"<html>"), id="no JSON"),
        pytest.param(refusal(404), id="no such page"),
    ],
)
async def test_a_provider_that_lists_nothing_is_not_asked_and_not_blamed(listing: Script) -> None:
    async with ScriptedUpstream(listing) as upstream:
        report = await wildcard_report(upstream)
    assert report.cells[2:] == ("-",) * 6
    assert not report.is_unreachable
    assert "name one in [[models]]" in report.problems[0]


@pytest.mark.parametrize(
    ("listing", "cell"),
    [
        pytest.param(refusal(401), "401", id="a wrong key"),
        pytest.param([Stall()], "time limit", id="silence"),
        pytest.param([Close()], "cut", id="no answer"),
        pytest.param(
            [Send(json_response(200, {"data": []})[0].data[:-1]), Close()], "cut", id="a part"
        ),  # type: ignore[union-attr]
    ],
)
async def test_a_provider_that_cannot_be_asked_for_its_list_is_unreachable(
    listing: Script, cell: str
) -> None:
    async with ScriptedUpstream(listing) as upstream:
        report = await wildcard_report(upstream)
    assert report.reachable == f"no ({cell})"
    assert len(report.problems) == 1


async def test_a_provider_is_asked_for_its_list_once() -> None:
    async with ScriptedUpstream(default=able) as upstream:
        models = (wildcard(), Model("other/*", (Endpoint("scripted", "*"),)))
        reports = await reports_of(config_of([provider(upstream.port)], *models))
    assert [report.reachable for report in reports] == ["yes", "yes"]
    assert sorted(seen.method for seen in upstream.requests) == ["GET"] + ["POST"] * 6


# The command


async def run_check(folder: Path, config: str, *options: str) -> tuple[int | None, str, str]:
    """Exit code, output and error output of the program."""
    file = folder / "hoberproxy.toml"
    file.write_text(config)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "hoberproxy"),
        *("check", "--live", "--config", str(file), *options),
        env={**os.environ, "TEST_KEY": KEY},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), WAIT)
    return process.returncode, out.decode(), err.decode()


def toml(port: int, *slugs: str) -> str:
    models = "".join(
        f'[[models]]\nslug = "{slug}"\nendpoints = [{{ provider = "one" }}]\n' for slug in slugs
    )
    url = f'base_url = "http://127.0.0.1:{port}/v1"'
    return f'[providers.one]\n{url}\napi_key_env = "TEST_KEY"\n{models}'


async def test_the_program_prints_a_table_and_leaves_with_0_if_all_is_well(tmp_path: Path) -> None:
    demo = DemoModel(pace=0.005)
    try:
        config = toml(await demo.start(), "one/model", "any/*")
        code, out, err = await run_check(tmp_path, config)
    finally:
        await demo.aclose()
    assert (code, err) == (0, "")
    first, head, *rows = out.splitlines()
    assert first == "ok: 1 providers, 2 models, 2 endpoints"
    assert re.split("  +", head) == list(COLUMNS)
    assert [re.split("  +", row)[:3] for row in rows[:2]] == [
        ["one/model", "one", "yes"],
        ["any/*", "one", "yes"],
    ]
    note = 'for a model that ends in "/*", the first fitting model of the provider was checked'
    assert rows[2:] == [note]
    assert os.listdir(tmp_path) == ["hoberproxy.toml"], "nothing is recorded"


async def test_the_program_says_what_is_wrong_and_leaves_with_1(tmp_path: Path) -> None:
    def answer(seen: SeenRequest) -> Script:
        return refusal(401) if seen.json()["model"] == "bad" else able(seen)

    async with ScriptedUpstream(default=answer) as upstream:
        options = ("--timeout", "5", "--concurrency", "1")
        code, out, err = await run_check(tmp_path, toml(upstream.port, "good", "bad"), *options)
    assert (code, err) == (1, "")
    assert "no (401)" in out
    assert out.splitlines()[-1].startswith("bad at one: status 401: the key is not accepted")
    assert KEY not in out
    assert TEXT not in out


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--timeout", "0"], id="no time"),
        pytest.param(["--timeout", "nan"], id="no number"),
        pytest.param(["--concurrency", "0"], id="nobody"),
        pytest.param(["--concurrency", "2.5"], id="half an endpoint"),
    ],
)
def test_options_out_of_range_are_a_wrong_use(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", "--live", *options])
    assert left.value.code == 2
    assert "expected a number from" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False], ids=["a terminal", "a file"])
def test_progress_is_for_terminals(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    _print_progress(1, 2)
    _print_progress(2, 2)
    expected = "\rchecked 1 of 2\r\x1b[K" if is_terminal else ""
    assert capsys.readouterr().err == expected
