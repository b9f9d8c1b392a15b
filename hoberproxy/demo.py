"""Serve a demo model behind the proxy: an HTTP server that answers by rule, without a model.

A first request then has streaming, tool calls, JSON mode and usage on the wire without a key or a
download. `answer` makes a `Reply`, `serialize_stream` its events, `DemoModel` serves them.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from .errors import ProxyError, RequestError, serialize_error
from .request import parse_call

MODEL = "hober-demo-1"  # differs from any slug, as the names of real upstreams do

_ECHO_CHARACTERS = 200
_COUNT_LIMIT = 1000
_EXACT_CHARACTERS = 65_536  # a longer prompt is counted by its length: a piece costs time
_PIECE = re.compile(r" ?\S{1,8}|\s")  # matches every character, so pieces join to the text
_COUNT = re.compile(r"\bcount (?:up )?to (\d{1,9})\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z]{4,}")
_COMMON_WORDS = frozenset(
    "about call description from function given have into return returns that their them then "
    "this tool user what when which with your".split()
)

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the client's tools; the pieces of the reply join to its arguments."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request: the pieces of its text, or of a tool call's arguments."""

    id: str
    created: int
    pieces: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    tool_call: ToolCall | None = None

    @property
    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage object; a piece of up to eight characters is a token."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.pieces),
            "total_tokens": self.prompt_tokens + len(self.pieces),
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


def split_pieces(text: str) -> list[str]:
    """Divide `text` into pieces that join to it."""
    return _PIECE.findall(text)


def count_pieces(text: str) -> int:
    """Count the pieces of `text`: exact up to 64 K characters, then four characters a piece."""
    beyond = max(0, len(text) - _EXACT_CHARACTERS)
    return len(split_pieces(text[:_EXACT_CHARACTERS])) + beyond // 4


# Reading the request


def parse_body(raw: bytes) -> dict[str, Any]:
    """Parse a request's body by the proxy's own rules. Raises RequestError."""
    parse_call(raw)
    body: dict[str, Any] = orjson.loads(raw)
    if body.get("n") not in (None, 1):
        raise _wrong("n", "1")
    return body


def _wrong(param: str, expected: str) -> RequestError:
    return RequestError(f"{param}: expected {expected}", code="invalid_value", param=param)


def _text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content is a string or an array of parts."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(text for text in parts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    return next((_text_of(m) for m in reversed(messages) if m["role"] == "user"), "")


# Choosing an answer


def answer(body: dict[str, Any], *, id: str, created: int) -> Reply:
    """Return the reply to a parsed `body`; `created` is unix seconds. Raises RequestError."""
    messages = body["messages"]
    asked = _last_user_text(messages)
    tool = None if messages[-1]["role"] == "tool" else _choose_tool(body, asked)
    finish_reason, tool_call = "stop", None
    if tool is not None:
        arguments = SchemaFiller(tool.get("parameters"), asked).fill_root()
        text = orjson.dumps(arguments).decode()
        finish_reason, tool_call = "tool_calls", ToolCall(f"call_{id[-12:]}", tool["name"])
    else:
        text = _cut_at_stop(_say(body, asked), body.get("stop"))
    pieces = split_pieces(text)
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(pieces)
    if limit < len(pieces):
        pieces, finish_reason = pieces[:limit], "length"
    return Reply(id, created, tuple(pieces), finish_reason, _count_prompt(body), tool_call)


def _say(body: dict[str, Any], asked: str) -> str:
    response_format = body.get("response_format") or {}
    if response_format.get("type") == "json_schema":
        wrapper = response_format.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        return orjson.dumps(SchemaFiller(schema, asked).fill_root()).decode()
    text = _say_text(body["messages"], asked)
    if response_format.get("type") == "json_object":
        return orjson.dumps({"model": MODEL, "answer": text}).decode()
    return text


def _say_text(messages: Sequence[Mapping[str, Any]], asked: str) -> str:
    if messages[-1]["role"] == "tool":
        return f"The tool answered: {_shorten(_text_of(messages[-1]))}"
    if found := _COUNT.search(asked[:_EXACT_CHARACTERS]):
        return _count_to(int(found[1]))
    return (
        "I am hoberproxy's demo model: I don't think, I show the wire. "
        f"You wrote: “{_shorten(asked)}”. "
        "Ask me to count to 10, or name a real provider in the config to get a real answer."
    )


def _count_to(number: int) -> str:
    counted = ", ".join(str(n) for n in range(1, min(number, _COUNT_LIMIT) + 1))
    if number > _COUNT_LIMIT:
        return f"{counted}, and so on: {_COUNT_LIMIT} is as far as I go."
    return counted or "There is nothing to count."


def _shorten(text: str) -> str:
    cut = text[: _ECHO_CHARACTERS + 1].strip()
    return cut if len(cut) <= _ECHO_CHARACTERS else cut[:_ECHO_CHARACTERS] + "…"


def _cut_at_stop(text: str, stop: object) -> str:
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    for mark in stops:
        if isinstance(mark, str) and mark:
            text = text.split(mark, 1)[0]
    return text


def _count_prompt(body: dict[str, Any]) -> int:
    total = sum(count_pieces(_text_of(message)) for message in body["messages"])
    if body.get("tools"):
        total += count_pieces(orjson.dumps(body["tools"]).decode())
    return total


# Tools


def _choose_tool(body: dict[str, Any], asked: str) -> dict[str, Any] | None:
    """Return the function to call, None to answer in text."""
    functions = list(_functions(body.get("tools") or []))
    choice = body.get("tool_choice") or "auto"
    if not functions or choice == "none":
        return None
    if isinstance(choice, dict):
        return _named_tool(functions, choice)
    words = set(_WORD.findall(asked[:_EXACT_CHARACTERS].lower()))
    fitting = [function for function in functions if words & _words_of(function)]
    if fitting or choice == "required":
        return (fitting or functions)[0]
    return None


def _functions(tools: list[Any]) -> Iterator[dict[str, Any]]:
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"tools[{place}]", "an object whose function has a name")
        yield function


def _named_tool(functions: list[dict[str, Any]], choice: dict[str, Any]) -> dict[str, Any]:
    wanted = choice.get("function")
    name = wanted.get("name") if isinstance(wanted, dict) else None
    for function in functions:
        if function["name"] == name:
            return function
    raise _wrong("tool_choice", "the name of one of the tools")


def _words_of(function: Mapping[str, Any]) -> set[str]:
    text = f"{function['name']} {function.get('description') or ''}".lower()
    return set(_WORD.findall(text)) - _COMMON_WORDS


class SchemaFiller:
    """Makes up a value that fits a JSON schema: its required properties, with plausible values.

    Depth and number of values are bounded, since a schema may refer to itself. `asked` is the text
    of the user, which may hold a value.
    """

    _DEPTH = 12
    _VALUES = 1000
    _FORMATS: Mapping[str, str] = {
        "date": "2025-01-31",
        "date-time": "2025-01-31T12:00:00Z",
        "time": "12:00:00Z",
        "email": "someone@example.com",
        "hostname": "example.com",
        "ipv4": "192.0.2.1",
        "uri": "https://example.com/",
        "uuid": "00000000-0000-4000-8000-000000000000",
    }

    def __init__(self, schema: object, asked: str) -> None:
        self._root: Schema = schema if isinstance(schema, dict) else {}
        self._asked = _shorten(asked)
        self._left = self._VALUES

    def fill_root(self) -> Any:
        """Return a value for the whole schema, {} for none. A broken schema raises RequestError."""
        try:
            return self._fill(self._root, "", 0) if self._root else {}
        except (AttributeError, KeyError, TypeError) as exc:  # a member of a wrong type
            raise RequestError("schema: expected a JSON schema", code="invalid_value") from exc

    def _fill(self, schema: object, name: str, depth: int) -> Any:
        self._left -= 1
        if not isinstance(schema, dict) or depth > self._DEPTH or self._left < 0:
            return None
        schema = self._resolve(schema, depth)
        for given in ("const", "default"):
            if given in schema:
                return self._charge(schema[given])
        for given in ("enum", "examples"):
            if isinstance(schema.get(given), list) and schema[given]:
                return self._charge(schema[given][0])
        return self._fill_type(schema, name, depth)

    def _charge(self, value: Any) -> Any:
        """Count `value`, which the schema gives, by its size: an array could repeat it."""
        self._left -= len(orjson.dumps(value)) // 64
        return value

    def _resolve(self, schema: Schema, depth: int) -> Schema:
        """Follow references and take a branch, until `schema` has the type of the value."""
        for _ in range(self._DEPTH):
            self._left -= 1
            if depth > self._DEPTH or self._left < 0:
                break
            if isinstance(schema.get("$ref"), str):
                schema = self._look_up(schema["$ref"])
            elif branches := schema.get("anyOf") or schema.get("oneOf"):
                # Deep down, null ends a schema that refers to itself.
                nulls = [branch for branch in branches if branch == {"type": "null"}]
                schema = nulls[0] if nulls and depth > 3 else branches[0]
            elif parts := schema.get("allOf"):
                resolved = [self._resolve(part, depth + 1) for part in parts]
                schema = {key: value for part in resolved for key, value in part.items()}
            else:
                break
        return schema

    def _look_up(self, reference: str) -> Schema:
        found: Any = self._root
        for step in reference.removeprefix("#").strip("/").split("/"):
            found = found.get(step) if step and isinstance(found, dict) else found
        return found if isinstance(found, dict) else {}

    def _fill_type(self, schema: Schema, name: str, depth: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((each for each in kind if each != "null"), "null")
        if kind == "object" or (kind is None and "properties" in schema):
            return self._fill_object(schema, depth)
        if kind == "array":
            length = max(schema.get("minItems") or 0, 0 if schema.get("maxItems") == 0 else 1)
            items = schema.get("items", {"type": "string"})
            return [self._fill(items, name, depth + 1) for _ in range(min(length, self._VALUES))]
        if kind in ("integer", "number"):
            return self._fill_number(schema)
        if kind == "boolean":
            return True
        return None if kind == "null" else self._fill_string(schema, name)

    def _fill_object(self, schema: Schema, depth: int) -> dict[str, Any]:
        properties = schema.get("properties") or {}
        names = schema.get("required")
        names = list(properties) if names is None else names
        return {str(name): self._fill(properties.get(name, {}), name, depth + 1) for name in names}

    @staticmethod
    def _fill_number(schema: Schema) -> int | float:
        value: int | float = 1
        if "exclusiveMinimum" in schema:
            value = max(value, schema["exclusiveMinimum"] + 1)
        if "exclusiveMaximum" in schema:
            value = min(value, schema["exclusiveMaximum"] - 1)
        value = max(value, schema.get("minimum", value))
        value = min(value, schema.get("maximum", value))
        return value

    def _fill_string(self, schema: Schema, name: str) -> str:
        value = self._FORMATS.get(schema.get("format") or "") or self._guess(name)
        value = value.ljust(min(schema.get("minLength") or 0, self._VALUES), "x")
        return value[: schema.get("maxLength")]

    def _guess(self, name: str) -> str:
        """Return a value for the property `name`: the last name in the text, such as Paris."""
        if name.lower() in ("query", "question", "prompt", "text", "input") and self._asked:
            return self._asked
        names = re.findall(r"(?<=\s)[A-Z][\w-]+", self._asked)
        return names[-1] if names else "example"


# On the wire
#
# Members without a value are left out: strict clients (@openrouter/sdk) refuse some of the nulls
# that OpenAI sends, such as `"usage":null`. A choice of a stream keeps its `finish_reason`, which
# they demand, and `system_fingerprint`, which they demand of a body, has a value.


def serialize_completion(reply: Reply) -> bytes:
    """Return the body of `reply` if it is not streamed."""
    text = "".join(reply.pieces)
    message: dict[str, Any] = {"role": "assistant"}
    if reply.tool_call is None:
        message["content"] = text
    else:
        call = {"name": reply.tool_call.name, "arguments": text}
        message["tool_calls"] = [{"id": reply.tool_call.id, "type": "function", "function": call}]
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    return orjson.dumps(
        {**_envelope(reply, "chat.completion"), "choices": [choice], "usage": reply.usage}
    )


def serialize_stream(reply: Reply, *, include_usage: bool) -> Iterator[bytes]:
    """Yield the events of `reply` in OpenAI's order: role, pieces, finish, usage, [DONE]."""
    envelope = _envelope(reply, "chat.completion.chunk")

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return b"data: %b\n\n" % orjson.dumps({**envelope, "choices": [choice]})

    yield event(_opening_delta(reply))
    for piece in reply.pieces:
        yield event(_piece_delta(reply, piece))
    yield event({}, reply.finish_reason)
    if include_usage:
        yield b"data: %b\n\n" % orjson.dumps({**envelope, "choices": [], "usage": reply.usage})
    yield b"data: [DONE]\n\n"


def _envelope(reply: Reply, kind: str) -> dict[str, Any]:
    return {
        "id": reply.id,
        "object": kind,
        "created": reply.created,
        "model": MODEL,
        "system_fingerprint": "fp_demo",
    }


def _opening_delta(reply: Reply) -> dict[str, Any]:
    if reply.tool_call is None:
        return {"role": "assistant", "content": ""}
    call = {"name": reply.tool_call.name, "arguments": ""}
    opened = {"index": 0, "id": reply.tool_call.id, "type": "function", "function": call}
    return {"role": "assistant", "tool_calls": [opened]}


def _piece_delta(reply: Reply, piece: str) -> dict[str, Any]:
    if reply.tool_call is None:
        return {"content": piece}
    return {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}


# The server


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class DemoModel:
    """The demo model's HTTP server, on a loopback port that the system chooses.

    `pace` is the time between two pieces in seconds. The caller starts and closes the server.
    """

    def __init__(self, *, pace: float = 0.015, max_body_bytes: int = 64 * 1024 * 1024) -> None:
        self._pace = pace
        self._max_body_bytes = max_body_bytes
        self._runner: web.AppRunner | None = None
        self.streaming = 0  # answers in flight

    async def start(self) -> int:
        """Listen, and return the port."""
        app = web.Application(middlewares=[_serialize_errors], client_max_size=self._max_body_bytes)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._list_models)
        # Handlers are cancelled when the client hangs up: nobody reads what they would generate.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def aclose(self) -> None:
        """Stop listening, and cut the streams that still run after a second."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = parse_body(await request.read())
        reply = answer(body, id=f"chatcmpl-demo{secrets.token_hex(12)}", created=int(time.time()))
        if not body.get("stream"):
            return _json_response(serialize_completion(reply))
        options = body.get("stream_options") or {}
        return await self._stream(request, reply, bool(options.get("include_usage")))

    async def _stream(
        self, request: web.Request, reply: Reply, include_usage: bool
    ) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        self.streaming += 1
        try:
            await response.prepare(request)
            for event in serialize_stream(reply, include_usage=include_usage):
                await response.write(event)
                await asyncio.sleep(self._pace)
        finally:
            self.streaming -= 1
        return response

    async def _list_models(self, request: web.Request) -> web.Response:
        entry = {"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "hober"}
        return _json_response(orjson.dumps({"object": "list", "data": [entry]}))


def _json_response(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


@web.middleware
async def _serialize_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer errors in OpenAI's form, those of aiohttp included."""
    try:
        return await handler(request)
    except ProxyError as exc:
        return _json_response(serialize_error(exc), exc.status)
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        error = RequestError(
            f"{request.method} {request.path}: {exc.reason.lower()}; the demo model has "
            "POST /v1/chat/completions and GET /v1/models",
            code=exc.reason.lower().replace(" ", "_"),
            status=exc.status,
        )
        return _json_response(serialize_error(error), exc.status)
