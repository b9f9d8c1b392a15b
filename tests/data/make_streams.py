"""Write the generated streams of tests/data/streams, in the form that each provider sends.

    python -m tests.data.make_streams          writes the files that differ

README.md beside this file names the source of each form. The values are random by a seed that is
the file's name, so that a file is the same on every machine; a recorded stream is not made here.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Document = dict[str, Any]

FOLDER = Path(__file__).parent / "streams"
LETTERS = string.ascii_letters + string.digits
PLAIN = """ the| of| a| to| model| server| answers| each| token| alone|,|.|:|!| —| It|'s| not
|ing| Berlin| 東京|こんにちは| café| naïve| 😊|**| Step|1|2| 3|`|<div>| &| price| is| $|4|.99
| (see| below|)| and| longer| paragraphs| follow""".replace("\n", "").split("|")
ESCAPED = [".\n\n", "\n", "\n   - ", ' "', '."', ' said "', "`\n", " C:\\", " tab\t"]
START = 1_770_000_000  # `created` of a stream's first event
DONE = b"data: [DONE]\n\n"


class Maker:
    """Random values of one stream."""

    def __init__(self, name: str) -> None:
        self.random = random.Random(name)
        self.now = float(START)

    def letters(self, size: int, letters: str = LETTERS) -> str:
        return "".join(self.random.choices(letters, k=size))

    def digest(self, size: int = 32) -> str:
        return self.letters(size, "0123456789abcdef")

    def uuid(self) -> str:
        return "-".join(self.digest(size) for size in (8, 4, 4, 4, 12))

    def texts(self, count: int) -> Iterator[str]:
        """Return `count` tokens; one in twelve stands in JSON with an escape."""
        for _ in range(count):
            yield self.random.choice(ESCAPED if self.random.random() < 1 / 12 else PLAIN)

    def phrases(self, count: int) -> Iterator[str]:
        """Return texts of several tokens, as of providers that collect them."""
        for _ in range(count):
            yield "".join(self.texts(self.random.randrange(2, 12)))

    def arguments(self, count: int) -> Iterator[str]:
        """Return a tool's arguments, which are JSON, in `count` pieces."""
        yield from ('{"', "path", '":"', "notes", "/today", ".md", '","', "text", '":"')
        for text in self.texts(count - 10):
            yield json.dumps(text, ensure_ascii=False)[1:-1]
        yield '"}'

    def clock(self, token: float = 0.03) -> int:
        """Return `created` as of a server that reads its clock for each event."""
        self.now += self.random.uniform(0.5, 1.5) * token
        return int(self.now)

    def logprobs(self, text: str) -> Document:
        logprob = -round(self.random.expovariate(2.0), self.random.randrange(5, 9))
        token = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
        return {"content": [token | {"top_logprobs": []}], "refusal": None}


def event(document: Document) -> bytes:
    """Return an event as most servers write it: JSON without spaces, UTF-8 as it is."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return b"data: %b\n\n" % text.encode()


def go_event(document: Document) -> bytes:
    """Return an event as Go's encoder writes it, which escapes `<`, `>` and `&`."""
    raw = event(document)
    for sign in b"<>&":
        raw = raw.replace(bytes((sign,)), b"\\u%04x" % sign)
    return raw


def counts(prompt: int, completion: int, **more: Any) -> Document:
    total = prompt + completion
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    return usage | more


def counts_as_vllm(prompt: int, completion: int, **more: Any) -> Document:
    """Return the counts in the order in which vLLM, SGLang and Mistral write them."""
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion}
    return usage | {"completion_tokens": completion} | more


# OpenAI


def _openai(
    maker: Maker, deltas: Iterator[Document], finish: str = "stop", *, logprobs: bool = False
) -> Iterator[bytes]:
    """Return `deltas` within OpenAI's events, with usage, and padded as OpenAI does by default."""
    head = {
        "id": f"chatcmpl-{maker.letters(29)}",
        "object": "chat.completion.chunk",
        "created": START,
        "model": "gpt-4o-mini-2024-07-18",
        "service_tier": "default",
        "system_fingerprint": f"fp_{maker.digest(10)}",
    }

    def chunk(choices: list[Document], usage: Document | None = None) -> bytes:
        padding = maker.letters(maker.random.randrange(1, 17))
        return event(head | {"choices": choices, "usage": usage, "obfuscation": padding})

    tokens = -1  # the first event has none
    for delta in deltas:
        tokens += 1
        text = delta.get("content")
        probabilities = maker.logprobs(text) if logprobs and text else None
        yield chunk([_openai_choice(delta, None, probabilities)])
    yield chunk([_openai_choice({}, finish, None)])
    details = {"cached_tokens": 0, "audio_tokens": 0}
    more = {"reasoning_tokens": 0, "audio_tokens": 0}
    more |= {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    usage = counts(57, tokens, prompt_tokens_details=details, completion_tokens_details=more)
    yield chunk([], usage)
    yield DONE


def _openai_choice(delta: Document, finish: str | None, logprobs: Document | None) -> Document:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _contents(maker: Maker, count: int) -> Iterator[Document]:
    yield {"role": "assistant", "content": "", "refusal": None}
    for text in maker.texts(count):
        yield {"content": text}


def _tool_calls(maker: Maker, calls: int, count: int) -> Iterator[Document]:
    """Return the deltas of several tool calls; only the first of each has its identifier."""
    for index in range(calls):
        call: Document = {"index": index, "id": f"call_{maker.letters(24)}", "type": "function"}
        call["function"] = {"name": "write_file", "arguments": ""}
        first = {"role": "assistant", "content": None} if index == 0 else {}
        yield first | {"tool_calls": [call]} | ({"refusal": None} if index == 0 else {})
        for piece in maker.arguments(count):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def openai(maker: Maker) -> Iterator[bytes]:
    return _openai(maker, _contents(maker, 120))


def openai_logprobs(maker: Maker) -> Iterator[bytes]:
    return _openai(maker, _contents(maker, 80), logprobs=True)


def openai_tools(maker: Maker) -> Iterator[bytes]:
    return _openai(maker, _tool_calls(maker, 2, 60), "tool_calls")


def azure(maker: Maker) -> Iterator[bytes]:
    safe = {"filtered": False, "severity": "safe"}
    results = {name: safe for name in ("hate", "self_harm", "sexual", "violence")}
    jailbreak = {"jailbreak": {"filtered": False, "detected": False}}
    empty: Document = {"choices": [], "created": 0, "id": "", "model": "", "object": ""}
    prompt = {"prompt_index": 0, "content_filter_results": results | jailbreak}
    yield event(empty | {"prompt_filter_results": [prompt]})
    identifier = f"chatcmpl-{maker.letters(29)}"

    def chunk(choices: list[Document], usage: Document | None = None) -> bytes:
        document: Document = {"choices": choices, "created": START, "id": identifier}
        document |= {"model": "gpt-4.1-2025-04-14"}
        document |= {"obfuscation": maker.letters(maker.random.randrange(1, 17))}
        document |= {"object": "chat.completion.chunk", "system_fingerprint": None}
        return event(document | {"usage": usage})

    def choice(filtered: Document, delta: Document, finish: str | None) -> Document:
        filters = {"content_filter_results": filtered, "delta": delta}
        return filters | {"finish_reason": finish, "index": 0, "logprobs": None}

    yield chunk([choice({}, {"content": "", "refusal": None, "role": "assistant"}, None)])
    for text in maker.texts(80):
        yield chunk([choice(results, {"content": text}, None)])
    yield chunk([choice({}, {}, "stop")])
    offsets = {"check_offset": 0, "start_offset": 0, "end_offset": 331}
    late = {"content_filter_offsets": offsets, "content_filter_results": results}
    yield event(empty | {"choices": [late | {"finish_reason": None, "index": 0}]})
    yield chunk([], counts(15, 80))
    yield DONE


# Other providers of their own models


def deepseek(maker: Maker) -> Iterator[bytes]:
    head = {"id": maker.uuid(), "object": "chat.completion.chunk", "created": START}
    head |= {"model": "deepseek-reasoner", "system_fingerprint": maker.digest()}

    def chunk(delta: Document, finish: str | None = None, usage: Document | None = None) -> bytes:
        return event(head | {"choices": [_openai_choice(delta, finish, None)], "usage": usage})

    yield b": keep-alive\n\n"
    yield chunk({"role": "assistant", "content": None, "reasoning_content": ""})
    for text in maker.texts(60):
        yield chunk({"content": None, "reasoning_content": text})
    for text in maker.texts(60):
        yield chunk({"content": text, "reasoning_content": None})
    cache = {"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 23}
    details = {"prompt_tokens_details": {"cached_tokens": 64}}
    details |= {"completion_tokens_details": {"reasoning_tokens": 60}}
    yield chunk(
        {"content": "", "reasoning_content": None}, "stop", counts(87, 121, **details, **cache)
    )
    yield DONE


def _gemini(maker: Maker, model: str, *, clock: bool, thoughts: int) -> Iterator[bytes]:
    """Usage counts up in every event; it holds the thoughts in the total alone."""
    identifier, tokens = maker.letters(23), 0

    def chunk(delta: Document, finish: str | None = None) -> bytes:
        choice: Document = {"delta": delta | {"role": "assistant"}}
        choice |= {"finish_reason": finish} if finish else {}
        usage = {"completion_tokens": tokens, "prompt_tokens": 11}
        usage["total_tokens"] = 11 + tokens + thoughts
        document: Document = {"choices": [choice | {"index": 0}]}
        document |= {"created": maker.clock(0.2) if clock else START, "id": identifier}
        return event(document | {"model": model, "object": "chat.completion.chunk", "usage": usage})

    for _ in range(thoughts // 100):
        text = "<thought>" + "".join(maker.phrases(3))
        yield chunk({"content": text, "extra_content": {"google": {"thought": True}}})
    for text in maker.phrases(64):
        tokens += maker.random.randrange(2, 25)
        yield chunk({"content": text})
    yield chunk({"content": "."}, "stop")
    yield DONE


def gemini(maker: Maker) -> Iterator[bytes]:
    return _gemini(maker, "gemini-2.5-flash-lite", clock=False, thoughts=0)


def gemini_thoughts(maker: Maker) -> Iterator[bytes]:
    return _gemini(maker, "gemini-2.5-flash", clock=True, thoughts=800)


def mistral(maker: Maker) -> Iterator[bytes]:
    head = {"id": maker.digest(), "object": "chat.completion.chunk", "created": START}
    head |= {"model": "mistral-small-latest"}
    filler = string.ascii_lowercase + string.digits

    def chunk(delta: Document, finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        padding = {"p": filler[: maker.random.randrange(1, 37)]} if "role" not in delta else {}
        return event(head | {"choices": [choice]} | more | padding)

    yield chunk({"role": "assistant", "content": ""})
    for text in maker.texts(80):
        yield chunk({"content": text})
    details = {"prompt_tokens_details": {"cached_tokens": 0}, "service_tier": "standard"}
    yield chunk({"content": ""}, "stop", usage=counts_as_vllm(19, 81, **details))
    yield DONE


def xai(maker: Maker) -> Iterator[bytes]:
    identifier, fingerprint = maker.uuid(), f"fp_{maker.digest(10)}"

    def chunk(choices: list[Document], **more: Any) -> bytes:
        head = {"id": identifier, "object": "chat.completion.chunk", "created": maker.clock()}
        head |= {"model": "grok-3-mini", "choices": choices}
        return event(head | more | {"system_fingerprint": fingerprint})

    yield chunk([{"index": 0, "delta": {"reasoning_content": "First", "role": "assistant"}}])
    for text in maker.texts(60):
        yield chunk([{"index": 0, "delta": {"reasoning_content": text}}])
    for text in maker.texts(60):
        yield chunk([{"index": 0, "delta": {"content": text}}])
    yield chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    prompt = {"text_tokens": 12, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 11}
    usage = {"prompt_tokens": 12, "completion_tokens": 60, "total_tokens": 362}
    usage |= {"prompt_tokens_details": prompt}
    usage |= {"completion_tokens_details": {"reasoning_tokens": 290, "audio_tokens": 0}}
    usage |= {"num_sources_used": 0, "cost_in_usd_ticks": 1466250}
    yield chunk([], usage=usage)
    yield DONE


def dashscope(maker: Maker) -> Iterator[bytes]:
    identifier = f"chatcmpl-{maker.uuid()}"

    def chunk(choices: list[Document], usage: Document | None = None) -> bytes:
        document: Document = {"choices": choices, "object": "chat.completion.chunk"}
        document |= {"usage": usage, "created": START, "system_fingerprint": None}
        return event(document | {"model": "qwen3-max", "id": identifier})

    def choice(delta: Document, finish: str | None = None) -> Document:
        ending = {"finish_reason": finish, "index": 0, "logprobs": None}
        return {"delta": delta} | ending

    role = {"content": "", "role": "assistant"}
    yield chunk([{"delta": role, "index": 0, "logprobs": None, "finish_reason": None}])
    first, *texts = maker.phrases(64)  # the first event has another order
    yield chunk(
        [{"finish_reason": None, "logprobs": None, "delta": {"content": first}, "index": 0}]
    )
    for text in texts:
        yield chunk([choice({"content": text})])
    yield chunk([choice({"content": ""}, "stop")])
    yield chunk([], counts(31, 412, prompt_tokens_details={"cached_tokens": 0}))
    yield DONE


def anthropic(maker: Maker) -> Iterator[bytes]:
    identifier = f"msg_01{maker.letters(22)}"

    def chunk(choices: list[Document], **more: Any) -> bytes:
        document: Document = {"id": identifier, "choices": choices, "created": START}
        document |= {"model": "claude-sonnet-4-5-20250929", "object": "chat.completion.chunk"}
        return event(document | more)

    yield chunk([{"index": 0, "delta": {"content": "", "role": "assistant"}}])
    for text in maker.phrases(64):
        yield chunk([{"index": 0, "delta": {"content": text}}])
    yield chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    yield chunk([], usage=counts(18, 395))
    yield DONE


# Those that serve open models


def groq(maker: Maker) -> Iterator[bytes]:
    head = {"id": f"chatcmpl-{maker.uuid()}", "object": "chat.completion.chunk", "created": START}
    head |= {"model": "qwen/qwen3-32b", "system_fingerprint": f"fp_{maker.digest(10)}"}
    request = f"req_{maker.letters(26, string.ascii_lowercase + string.digits)}"

    def chunk(delta: Document, finish: str | None = None, **more: Any) -> bytes:
        return event(head | {"choices": [_openai_choice(delta, finish, None)]} | more)

    first = {"role": "assistant", "content": ""}
    yield chunk(first, x_groq={"id": request, "seed": 872656815})
    for text in maker.texts(60):
        yield chunk({"reasoning": text})
    for text in maker.texts(60):
        yield chunk({"content": text})
    times = {
        "queue_time": 0.0713,
        "prompt_time": 0.0012,
        "completion_time": 0.31,
        "total_time": 0.312,
    }
    yield chunk({}, "stop", x_groq={"id": request, "usage": counts(18, 122, **times)})
    yield DONE


def openrouter(maker: Maker) -> Iterator[bytes]:
    comment = b": OPENROUTER PROCESSING\n\n"
    head = {"id": f"gen-{START}-{maker.letters(20)}", "provider": "DeepInfra"}
    head |= {"model": "deepseek/deepseek-r1", "object": "chat.completion.chunk", "created": START}

    def chunk(text: str, reasoning: str | None, finish: str | None = None, **more: Any) -> bytes:
        delta: Document = {"role": "assistant", "content": text, "reasoning": reasoning}
        detail = {"type": "reasoning.text", "text": reasoning, "format": "unknown", "index": 0}
        delta["reasoning_details"] = [detail] if reasoning else []
        choice: Document = {"index": 0, "delta": delta, "finish_reason": finish}
        choice |= {"native_finish_reason": finish, "logprobs": None}
        return event(head | {"choices": [choice]} | more)

    yield comment * 3
    for text in maker.texts(60):
        yield chunk("", text)
        yield comment if maker.random.random() < 0.05 else b""
    for text in maker.texts(60):
        yield chunk(text, None)
    yield chunk("", None, "stop")
    details = {"cost": 0.00021, "completion_tokens_details": {"reasoning_tokens": 60}}
    yield chunk("", None, usage=counts(14, 120, **details))
    yield DONE


def together(maker: Maker) -> Iterator[bytes]:
    head = {"id": f"{maker.letters(7)}-{maker.letters(6)}-{maker.digest(16)}"}
    head |= {"object": "chat.completion.chunk"}

    def chunk(text: str, token: int, finish: str | None = None, **more: Any) -> bytes:
        delta = {"token_id": token, "role": "assistant", "content": text, "tool_calls": None}
        choice: Document = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        choice |= {"seed": 15924764223251450000 if finish else None, "delta": delta}
        document = head | {"created": START, "choices": [choice]}
        return event(document | {"model": "meta-llama/Llama-3.3-70B-Instruct-Turbo"} | more)

    for text in maker.texts(80):
        yield chunk(text, maker.random.randrange(128_000), usage=None)
    yield chunk("", 128009, "stop", usage=counts(39, 81, cached_tokens=0))
    yield DONE


def fireworks(maker: Maker) -> Iterator[bytes]:
    head = {"id": maker.uuid(), "object": "chat.completion.chunk", "created": START}
    head |= {"model": "accounts/fireworks/models/llama-v3p3-70b-instruct"}

    def chunk(delta: Document, finish: str | None = None, usage: Document | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return event(head | {"choices": [choice], "usage": usage})

    yield chunk({"role": "assistant"})
    for text in maker.texts(80):
        yield chunk({"content": text})
    yield chunk({}, "stop", counts_as_vllm(26, 81))
    yield DONE


def cloudflare(maker: Maker) -> Iterator[bytes]:
    """Usage that counts up, and padding behind it."""
    head = {"id": f"chatcmpl-{maker.digest(16)}", "object": "chat.completion.chunk"}
    head |= {"created": START, "model": "@cf/moonshotai/kimi-k2.5"}
    filler = string.ascii_lowercase + string.digits

    def chunk(choices: list[Document], completion: int) -> bytes:
        document = head | {"choices": choices, "usage": counts_as_vllm(2051, completion)}
        return event(document | {"p": filler[: maker.random.randrange(1, 37)]})

    def choice(delta: Document, finish: str | None = None) -> Document:
        return _openai_choice(delta, finish, None) | {"token_ids": None}

    yield chunk([choice({"role": "assistant", "content": ""})], 0)
    for count, text in enumerate(maker.texts(40), 1):
        yield chunk([choice({"reasoning": text, "reasoning_content": text})], count)
    for count, text in enumerate(maker.texts(60), 41):
        yield chunk([choice({"content": text})], count)
    yield chunk([choice({"content": ""}, "stop")], 101)
    yield chunk([], 101)
    yield DONE


def siliconflow(maker: Maker) -> Iterator[bytes]:
    """Usage that counts up with its details."""
    head = {"id": maker.digest(), "object": "chat.completion.chunk", "created": START}
    head |= {"model": "deepseek-ai/DeepSeek-R1"}

    def chunk(
        text: str | None, thought: str | None, count: int, finish: str | None = None
    ) -> bytes:
        delta = {"content": text, "reasoning_content": thought, "role": "assistant"}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        details: Document = {"reasoning_tokens": min(count, 40)}
        usage = counts(294, count) | ({"completion_tokens_details": details} if count else {})
        return event(head | {"choices": [choice], "system_fingerprint": "", "usage": usage})

    yield chunk(None, "", 0)
    for count, text in enumerate(maker.texts(40), 1):
        yield chunk(None, text, count)
    for count, text in enumerate(maker.texts(60), 41):
        yield chunk(text, None, count)
    yield chunk("", None, 101, "stop")
    yield DONE


# Servers for a machine of one's own


def _vllm(maker: Maker, *, continuous: bool) -> Iterator[bytes]:
    head = {"id": f"chatcmpl-{maker.digest(16)}", "object": "chat.completion.chunk"}
    head |= {"created": START, "model": "Qwen/Qwen3-32B"}

    def chunk(choices: list[Document], count: int, *, is_last: bool = False) -> bytes:
        usage = {"usage": counts_as_vllm(25, count)} if continuous or is_last else {}
        return event(head | {"choices": choices} | usage)

    def choice(delta: Document, finish: str | None = None) -> Document:
        more = {"stop_reason": None} if finish else {}
        return _openai_choice(delta, finish, None) | more | {"token_ids": None}

    role = {"role": "assistant", "content": ""}
    yield chunk([_openai_choice(role, None, None)], 0)
    for count, text in enumerate(maker.texts(80), 1):
        yield chunk([choice({"content": text})], count)
    yield chunk([choice({"content": ""}, "stop")], 81)
    yield chunk([], 81, is_last=True)
    yield DONE


def vllm(maker: Maker) -> Iterator[bytes]:
    return _vllm(maker, continuous=False)


def vllm_usage(maker: Maker) -> Iterator[bytes]:
    return _vllm(maker, continuous=True)


def sglang(maker: Maker) -> Iterator[bytes]:
    head = {"id": maker.digest(), "object": "chat.completion.chunk", "created": START}
    head |= {"model": "Qwen/Qwen3-32B"}

    def chunk(finish: str | None = None, matched: int | None = None, **delta: Any) -> bytes:
        whole = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
        choice = _openai_choice(whole | delta, finish, None) | {"matched_stop": matched}
        return event(head | {"choices": [choice], "usage": None})

    yield chunk(role="assistant", content="")
    for text in maker.texts(40):
        yield chunk(reasoning_content=text)
    for text in maker.texts(60):
        yield chunk(content=text)
    yield chunk("stop", 151645)
    usage = counts_as_vllm(10, 101, prompt_tokens_details=None, reasoning_tokens=40)
    yield event(head | {"choices": [], "usage": usage})
    yield DONE


def ollama(maker: Maker) -> Iterator[bytes]:
    identifier = f"chatcmpl-{maker.random.randrange(1000)}"

    def chunk(choices: list[Document], **more: Any) -> bytes:
        head = {"id": identifier, "object": "chat.completion.chunk", "created": maker.clock()}
        head |= {"model": "qwen3:4b", "system_fingerprint": "fp_ollama", "choices": choices}
        return go_event(head | more)

    def choice(content: str, finish: str | None = None, **more: str) -> Document:
        delta = {"role": "assistant", "content": content} | more
        return {"index": 0, "delta": delta, "finish_reason": finish}

    for text in maker.texts(60):
        yield chunk([choice("", reasoning=text)])
    for text in maker.texts(80):
        yield chunk([choice(text)])
    yield chunk([choice("", "stop")])
    yield chunk([], usage=counts(26, 141))
    yield DONE


def llama_cpp_python(maker: Maker) -> Iterator[bytes]:
    """CR LF line ends, spaces in the JSON, ASCII alone, and pings."""
    head = {"id": f"chatcmpl-{maker.uuid()}", "object": "chat.completion.chunk"}
    head |= {"created": START, "model": "./models/q4.gguf"}

    def chunk(delta: Document, finish: str | None = None) -> bytes:
        choice: Document = {"index": 0, "delta": delta, "logprobs": None}
        document = head | {"choices": [choice | {"finish_reason": finish}]}
        return b"data: %b\r\n\r\n" % json.dumps(document).encode()

    yield b": ping - 2026-11-23 02:00:00.000000\r\n\r\n"
    yield chunk({"role": "assistant"})
    for text in maker.texts(80):
        yield chunk({"content": text})
    yield chunk({}, "stop")
    yield b"data: [DONE]\r\n\r\n"


STREAMS: dict[str, Callable[[Maker], Iterator[bytes]]] = {
    "anthropic": anthropic,
    "azure": azure,
    "cloudflare": cloudflare,
    "dashscope": dashscope,
    "deepseek": deepseek,
    "fireworks": fireworks,
    "gemini": gemini,
    "gemini-thoughts": gemini_thoughts,
    "groq": groq,
    "llama-cpp-python": llama_cpp_python,
    "mistral": mistral,
    "ollama": ollama,
    "openai": openai,
    "openai-logprobs": openai_logprobs,
    "openai-tools": openai_tools,
    "openrouter": openrouter,
    "sglang": sglang,
    "siliconflow": siliconflow,
    "together": together,
    "vllm": vllm,
    "vllm-usage": vllm_usage,
    "xai": xai,
}


def make(name: str) -> bytes:
    """Return the whole generated stream `name`."""
    return b"".join(STREAMS[name](Maker(name)))


def main() -> None:
    for name in STREAMS:
        path, data = FOLDER / f"{name}.sse", make(name)
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
            print(f"wrote {path.name}, {len(data)} bytes")


if __name__ == "__main__":
    main()
