"""How model servers report usage: one example a form, with its source, and what it means.

Each row is a usage object (or what stands in its place) as a server sent it or documents it; where
the source has no numbers, they are made up. Expected are the counts in the order of `Usage`
(prompt, completion, cached, reasoning, written to a cache) and the cost in USD by `PRICES`, worked
out by hand: fresh prompt, cached, written and answer, each times its price.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hoberproxy.routing.catalog import Prices

PRICES = Prices(
    prompt=Decimal(1), completion=Decimal(10), cached=Decimal("0.1"), cache_write=Decimal("1.25")
)

Document = dict[str, Any]
Place = Callable[[Document, Document], Document]  # an event or a body, and its usage


def on_top(document: Document, usage: Document) -> Document:
    return document | {"usage": usage}


def in_x_groq(document: Document, usage: Document) -> Document:
    return document | {"x_groq": {"id": "req_1", "usage": usage}}


def in_a_choice(document: Document, usage: Document) -> Document:
    first, *others = document["choices"]
    return document | {"choices": [first | {"usage": usage}, *others]}


def as_timings(document: Document, usage: Document) -> Document:
    return document | {"timings": usage}


@dataclass(frozen=True)
class Form:
    """A way to report usage; `servers` are names of presets, or of others with OpenAI's API."""

    servers: tuple[str, ...]
    what: str
    source: str
    usage: Document
    counts: tuple[int, int, int, int, int]
    cost: str
    place: Place = on_top

    def __str__(self) -> str:
        return f"{self.servers[0]}: {self.what}"


def usage_of(prompt: int, completion: int, total: int | None = None, **more: Any) -> Document:
    """Return a usage object with OpenAI's three counts, and `more`."""
    total = prompt + completion if total is None else total
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        **more,
    }


def cached(count: int, **more: Any) -> Document:
    return {"prompt_tokens_details": {"cached_tokens": count, **more}}


def reasoned(count: int, **more: Any) -> Document:
    return {"completion_tokens_details": {"reasoning_tokens": count, **more}}


FORMS = (
    # OpenAI's own, which is everybody's first
    Form(
        ("openai",),
        "the cached part is in the prompt",
        "https://github.com/64bit/async-openai/issues/272",
        usage_of(2006, 300, **cached(1920), **reasoned(0)),
        (2006, 300, 1920, 0, 0),
        "0.003278",
    ),
    Form(
        ("openai",),
        "cache writes, from GPT-5.6 on",
        "https://github.com/mindroom-ai/mindroom/pull/2134",
        usage_of(2600, 100, **cached(2000, cache_write_tokens=400, audio_tokens=0), **reasoned(40)),
        (2600, 100, 2000, 40, 400),
        "0.0019",
    ),
    Form(
        ("anthropic",),
        "details are there and empty",
        "https://platform.claude.com/docs/en/api/openai-sdk",
        usage_of(18, 12, prompt_tokens_details={}, completion_tokens_details=None),
        (18, 12, 0, 0, 0),
        "0.000138",
    ),
    Form(
        ("fireworks", "cohere", "deepinfra", "cerebras", "together"),
        "three counts",
        "https://docs.stigg.io/documentation/ai-agents/providers/fireworks",
        usage_of(31, 14),
        (31, 14, 0, 0, 0),
        "0.000171",
    ),
    Form(
        ("zai",),
        "the cached part is in the prompt",
        "https://github.com/langgenius/dify-plugin-sdks/issues/188",
        usage_of(15427, 139, **cached(170)),
        (15427, 139, 170, 0, 0),
        "0.016664",
    ),
    Form(
        ("xai",),
        "details of every kind",
        "https://docs.x.ai/developers/advanced-api-usage/prompt-caching/usage-and-pricing",
        usage_of(
            125,
            48,
            **cached(98, text_tokens=125, audio_tokens=0, image_tokens=0),
            **reasoned(0, audio_tokens=0, accepted_prediction_tokens=0),
        ),
        (125, 48, 98, 0, 0),
        "0.0005168",
    ),
    Form(
        ("vllm",),
        "details are null",
        "https://github.com/vllm-project/vllm/issues/18062",
        usage_of(15, 10, prompt_tokens_details=None),
        (15, 10, 0, 0, 0),
        "0.000115",
    ),
    Form(
        ("vllm",),
        "a rate among the details",
        "https://github.com/vllm-project/vllm/pull/44475",
        usage_of(15, 10, **cached(8, cached_rate=0.5333)),
        (15, 10, 8, 0, 0),
        "0.0001078",
    ),
    Form(
        ("sambanova",),
        "beside times and rates",
        "https://github.com/sambanova/ai-starter-kit/pull/560",
        usage_of(
            213,
            53,
            acceptance_rate=5,
            completion_tokens_after_first_per_sec=343.79,
            completion_tokens_per_sec=162.85,
            end_time=1731527851.0698032,
            is_last_response=True,
        ),
        (213, 53, 0, 0, 0),
        "0.000743",
    ),
    Form(
        ("openrouter",),
        "what it cost there, and what was written to a cache",
        "https://openrouter.ai/docs/use-cases/usage-accounting",
        usage_of(
            194,
            2,
            cost=0.95,
            cost_details={"upstream_inference_cost": 19},
            **cached(0, cache_write_tokens=100, audio_tokens=0),
            **reasoned(0),
        ),
        (194, 2, 0, 0, 100),
        "0.000239",
    ),
    # In other places
    Form(
        ("groq",),
        "in x_groq, with times",
        "https://raw.githubusercontent.com/groq/groq-typescript/HEAD/src/resources/completions.ts",
        usage_of(
            18, 12, queue_time=0.02, prompt_time=0.001, completion_time=0.01, total_time=0.011
        ),
        (18, 12, 0, 0, 0),
        "0.000138",
        in_x_groq,
    ),
    Form(
        ("moonshot",),
        "in the choice that ends a stream, the cached part on usage itself",
        "https://github.com/earendil-works/pi/issues/2017",
        usage_of(1336, 31, cached_tokens=1280),
        (1336, 31, 1280, 0, 0),
        "0.000494",
        in_a_choice,
    ),
    Form(
        ("llamacpp",),
        "timings with the last event, where it was not asked for usage",
        "https://github.com/ggml-org/llama.cpp/pull/15827",
        {
            "cache_n": 236,
            "prompt_n": 1,
            "prompt_ms": 30.958,
            "prompt_per_second": 32.301828283480845,
            "predicted_n": 35,
            "predicted_ms": 661.064,
        },
        (237, 35, 236, 0, 0),
        "0.0003746",
        as_timings,
    ),
    # Under other names
    Form(
        ("moonshot",),
        "the cached part in both spellings",
        "https://github.com/Bike4Mind/bike4mind/pull/1089",
        usage_of(2989, 40, cached_tokens=2989, **cached(2989)),
        (2989, 40, 2989, 0, 0),
        "0.0006989",
    ),
    Form(
        ("together", "omlx"),
        "the cached part on usage itself",
        "https://github.com/jundot/omlx/issues/919",
        usage_of(2215, 20, cached_tokens=2048),
        (2215, 20, 2048, 0, 0),
        "0.0005718",
    ),
    Form(
        ("deepseek",),
        "hits and misses of the cache",
        "https://github.com/QuantumNous/new-api/issues/406",
        usage_of(10, 9, prompt_cache_hit_tokens=6, prompt_cache_miss_tokens=4),
        (10, 9, 6, 0, 0),
        "0.0000946",
    ),
    Form(
        ("deepseek",),
        "hits, and the details too",
        "https://docs.rs/crate/deepseek-sdk/0.7.0/source/src/chat/response.rs",
        usage_of(
            1100,
            40,
            prompt_cache_hit_tokens=1024,
            prompt_cache_miss_tokens=76,
            **cached(1024),
            **reasoned(25),
        ),
        (1100, 40, 1024, 25, 0),
        "0.0005784",
    ),
    Form(
        ("mistral",),
        "the cached part in the details",
        "https://github.com/mistralai/client-ts/issues/240",
        usage_of(1013, 30, **cached(1008)),
        (1013, 30, 1008, 0, 0),
        "0.0004058",
    ),
    Form(
        ("mistral",),
        "the cached part in names that its API reference has as well",
        "https://github.com/vercel/ai/issues/14382",
        usage_of(1013, 30, num_cached_tokens=1008, prompt_token_details={"cached_tokens": 1008}),
        (1013, 30, 1008, 0, 0),
        "0.0004058",
    ),
    Form(
        ("nvidia", "sglang"),
        "reasoning on usage itself",
        "https://github.com/sgl-project/sglang/pull/17156",
        usage_of(29, 105, prompt_tokens_details=None, reasoning_tokens=80),
        (29, 105, 0, 80, 0),
        "0.001079",
    ),
    Form(
        ("mlx-vlm",),
        "the names of the Responses API",
        "https://github.com/earendil-works/pi/issues/2326",
        {
            "input_tokens": 11,
            "output_tokens": 5,
            "total_tokens": 16,
            "prompt_tps": 21.55,
            "generation_tps": 81.56,
        },
        (11, 5, 0, 0, 0),
        "0.000061",
    ),
    Form(
        ("gateways",),
        "the names of the Responses API with its details",
        "https://github.com/openai/openai-agents-python/issues/4901",
        {
            "input_tokens": 84,
            "output_tokens": 16,
            "total_tokens": 100,
            "input_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 12},
            "output_tokens_details": {"reasoning_tokens": 16},
        },
        (84, 16, 64, 16, 12),
        "0.0001894",
    ),
    Form(
        ("dashscope",),
        "an explicit cache",
        "https://github.com/nextlevelbuilder/goclaw/pull/1127",
        usage_of(
            6050,
            12,
            **cached(
                0,
                cache_creation_input_tokens=6000,
                cache_creation={"ephemeral_5m_input_tokens": 6000},
                cache_type="ephemeral",
            ),
        ),
        (6050, 12, 0, 0, 6000),
        "0.00767",
    ),
    Form(
        ("litellm",),
        "Anthropic's names beside OpenAI's, the prompt holding all",
        "https://github.com/langchain-ai/langchain-litellm/issues/52",
        usage_of(
            2300,
            50,
            **cached(2000, cache_creation_tokens=200),
            cache_read_input_tokens=2000,
            cache_creation_input_tokens=200,
        ),
        (2300, 50, 2000, 0, 200),
        "0.00105",
    ),
    Form(
        ("minimax",),
        "with characters",
        "https://docs.key4u.shop/api-29972380",
        usage_of(26, 223, total_characters=0, **reasoned(214)),
        (26, 223, 0, 214, 0),
        "0.002256",
    ),
    # Parts that are beside their whole
    Form(
        ("xai",),
        "reasoning beside the completion",
        "https://github.com/Wei-Shaw/sub2api/issues/5771",
        usage_of(10120, 1499, 14428, **cached(128), **reasoned(2809)),
        (10120, 4308, 128, 2809, 0),
        "0.0530848",
    ),
    Form(
        ("xai",),
        "one token of text, and much reasoning",
        "https://github.com/vercel/ai/pull/12425",
        usage_of(12, 1, 399, **reasoned(386)),
        (12, 387, 0, 386, 0),
        "0.003882",
    ),
    Form(
        ("gemini",),
        "reasoning, and no text",
        "https://github.com/router-for-me/CLIProxyAPI/issues/5733",
        usage_of(21, 0, 81, **reasoned(60)),
        (21, 60, 0, 60, 0),
        "0.000621",
    ),
    Form(
        ("gemini",),
        "thoughts that only the total holds",
        "https://github.com/Clarifai/clarifai-python/pull/978",
        usage_of(20, 424, 1016),
        (20, 996, 0, 0, 0),
        "0.00998",
    ),
    Form(
        ("perplexity",),
        "more reasoning than the total holds, which is billed",
        "https://github.com/bgeneto/open-webui-cost-tracker/issues/6",
        usage_of(108, 3256, citation_tokens=7299, num_search_queries=74, reasoning_tokens=73248),
        (108, 76504, 0, 73248, 0),
        "0.765148",
    ),
    Form(
        ("gateways",),
        "Claude's cache beside the prompt, as the total says",
        "https://github.com/Helicone/helicone/pull/4655",
        usage_of(4, 20, 2324, cache_read_input_tokens=2000, cache_creation_input_tokens=300),
        (2304, 20, 2000, 0, 300),
        "0.000779",
    ),
    Form(
        ("gateways",),
        "Claude's cache beside prompt and total",
        "https://github.com/future-agi/future-agi/pull/1122",
        usage_of(4, 20, cache_read_input_tokens=2000, cache_creation_input_tokens=300),
        (2304, 20, 2000, 0, 300),
        "0.000779",
    ),
    Form(
        ("gateways",),
        "Anthropic's own form",
        "https://platform.claude.com/docs/en/build-with-claude/prompt-caching",
        {
            "input_tokens": 50,
            "output_tokens": 20,
            "cache_read_input_tokens": 30,
            "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 6},
        },
        (91, 20, 30, 0, 11),
        "0.00026675",
    ),
    Form(
        ("new-api",),
        "what was written to Claude's cache, inside the prompt",
        "https://github.com/QuantumNous/new-api/blob/main/dto/openai_response.go",
        usage_of(
            100, 20, prompt_tokens_details={"cached_tokens": 30, "cached_creation_tokens": 20}
        ),
        (100, 20, 30, 0, 20),
        "0.000278",
    ),
    Form(
        ("bifrost",),
        "both parts of the cache under names of its own",
        "https://github.com/maximhq/bifrost/pull/1872",
        usage_of(
            *(100, 20),
            prompt_tokens_details={"cached_read_tokens": 30, "cached_write_tokens": 20},
        ),
        (100, 20, 30, 0, 20),
        "0.000278",
    ),
    Form(
        ("bifrost",),
        "what was read and what was written together as cached",
        "https://github.com/maximhq/bifrost/issues/4816",
        usage_of(
            *(100, 20),
            prompt_tokens_details={
                "cached_tokens": 50,
                "cached_read_tokens": 30,
                "cached_write_tokens": 20,
            },
        ),
        (100, 20, 30, 0, 20),
        "0.000278",
    ),
    Form(
        ("bifrost",),
        "nothing but written as cached",
        "https://github.com/maximhq/bifrost/issues/4816",
        usage_of(100, 20, prompt_tokens_details={"cached_tokens": 20, "cached_write_tokens": 20}),
        (100, 20, 0, 0, 20),
        "0.000305",
    ),
    Form(
        ("ollama",),
        "three counts, of llama.cpp's own",
        "https://github.com/ollama/ollama/pull/5371",
        usage_of(26, 298),
        (26, 298, 0, 0, 0),
        "0.003006",
    ),
)
