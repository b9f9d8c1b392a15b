"""What upstreams' errors say: forms seen in public, each with where it was seen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.dialects.error_document import (
    MAX_MESSAGE_LENGTH,
    MAX_PARAM_LENGTH,
    describes_error,
    load_error,
    read_error,
)

WHY = "Model supports at most 1 image per prompt."
# Form, and the source it was seen in. The reason is WHY in each.
FORMS: dict[str, tuple[Any, str]] = {
    "OpenAI": (
        {"error": {"message": WHY, "type": "invalid_request_error", "param": None, "code": None}},
        "https://github.com/niek/chatgpt-web/issues/525",
    ),
    "Anthropic": (
        {"type": "error", "error": {"type": "invalid_request_error", "message": WHY}},
        "https://docs.claude.com/en/api/errors",
    ),
    "Gemini's array": (
        [{"error": {"code": 400, "message": WHY, "status": "INVALID_ARGUMENT"}}],
        "https://github.com/google-gemini/gemini-cli/issues/14731",
    ),
    "Gemini's JSON in a message": (
        {
            "error": {
                "message": json.dumps({"error": {"code": 400, "message": WHY}}, indent=2),
                "code": 400,
                "status": "Bad Request",
            }
        },
        "https://github.com/continuedev/continue/issues/10290",
    ),
    "OpenRouter, JSON in raw": (
        {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {"raw": json.dumps({"error": {"message": WHY}}), "provider_name": "x"},
            },
            "user_id": "user_1",
        },
        "https://github.com/diegosouzapw/OmniRoute/issues/3044",
    ),
    "OpenRouter, a text in raw": (
        {"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": WHY}}},
        "https://github.com/open-webui/computer/issues/293",
    ),
    "OpenRouter, an object in raw": (
        {
            "error": {
                "message": "Provider returned error",
                "metadata": {"raw": {"error": {"message": WHY, "code": 400}}},
            }
        },
        "https://github.com/truefoundry/models/pull/873",
    ),
    "OpenRouter, an event in raw": (
        {
            "error": {
                "message": "Provider returned error",
                "metadata": {"raw": f"data: {json.dumps({'error': {'message': WHY}})}\n\n"},
            }
        },
        "the same, of a server that streams",
    ),
    "DeepSeek": (
        {
            "error": {
                "message": WHY,
                "type": "invalid_request_error",
                "code": "invalid_request_error",
            }
        },
        "https://github.com/evalstate/fast-agent/issues/621",
    ),
    "Mistral's detail": (
        {
            "object": "error",
            "message": {"detail": [{"type": "x", "loc": ["body", "n"], "msg": WHY}]},
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        },
        "https://github.com/Gage-Technologies/mistral-go/pull/2",
    ),
    "Mistral's JSON in a message": (
        {
            "object": "error",
            "message": json.dumps({"detail": [{"loc": ["body", "n"], "msg": WHY}]}),
            "type": "internal_error_proxy",
            "code": "1000",
        },
        "https://github.com/mistralai/platform-docs-public/issues/7",
    ),
    "Mistral's list in a message": (
        {
            "object": "Error",
            "detail": [{"type": "extra_forbidden", "loc": ["body", "tools"], "msg": WHY}],
            "message": [{"type": "extra_forbidden", "loc": ["body", "tools"], "msg": WHY}],
            "code": 3001,
        },
        "https://github.com/partITech/php-mistral/issues/76",
    ),
    "FastAPI's list": (
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "store"], "msg": WHY}]},
        "https://github.com/Gitlawb/openclaude/issues/739",
    ),
    "FastAPI's text": ({"detail": WHY}, "https://github.com/langchain-ai/deepagents/issues/468"),
    "FastAPI's object": ({"detail": {"error": {"message": WHY}}}, "LiteLLM's and others' handlers"),
    "xAI": (
        {"code": "Client specified an invalid argument", "error": WHY},
        "https://github.com/i-am-bee/beeai-framework/issues/447",
    ),
    "NVIDIA": (
        {"status": 400, "title": "Bad Request", "detail": WHY},
        "https://github.com/decolua/9router/issues/2527",
    ),
    "Z.ai": (
        {"error": {"code": "1210", "message": WHY}},
        "https://github.com/zeroclaw-labs/zeroclaw/issues/4124",
    ),
    "Groq": (
        {
            "request_id": "req_1",
            "error": {
                "message": WHY,
                "type": "invalid_request_error",
                "param": "",
                "code": "tool_use_failed",
                "failed_generation": "<tool-use>",
            },
        },
        "https://github.com/groq/groq-typescript/issues/103",
    ),
    "Cerebras": (
        {
            "message": WHY,
            "type": "invalid_request_error",
            "param": "validation_error",
            "code": "wrong_api_format",
        },
        "https://github.com/egoist/chatwise-releases/issues/1442",
    ),
    "Together": (
        {"id": "o1", "error": {"message": WHY, "type": "invalid_request_error", "param": None}},
        "https://github.com/mozilla-ai/any-llm/issues/714",
    ),
    "Fireworks": (
        {
            "error": {"object": "error", "type": "invalid_request_error", "message": WHY},
            "raw_output": None,
        },
        "https://github.com/TabbyML/tabby/pull/3676",
    ),
    "DeepInfra": (
        {"error": {"message": WHY, "type": "invalid_request_error", "param": None, "code": None}},
        "https://github.com/xtekky/gpt4free/issues/3446",
    ),
    "SambaNova": (
        {"error": {"code": None, "message": WHY, "param": None, "type": "invalid_request_error"}},
        "https://github.com/musistudio/claude-code-router/issues/965",
    ),
    "a gateway's own JSON within a text": (
        {"error": {"message": WHY, "type": "api_error", "code": "provider_response_error"}},
        "https://github.com/musistudio/claude-code-router/issues/965",
    ),
    "Moonshot": (
        {"error": {"message": WHY, "type": "invalid_request_error"}},
        "https://github.com/MoonshotAI/kimi-cli/issues/2011",
    ),
    "Cohere": ({"id": "1", "message": WHY}, "https://docs.cohere.com/reference/errors"),
    "Ollama": (
        {"error": {"message": WHY, "type": "api_error", "param": None, "code": None}},
        "https://github.com/ollama/ollama/issues/5793",
    ),
    "Ollama's own": ({"error": WHY}, "https://github.com/ollama/ollama/issues/14795"),
    "vLLM": (
        {"object": "error", "message": WHY, "type": "BadRequestError", "param": None, "code": 400},
        "https://github.com/llm-d/llm-d-inference-sim/issues/82",
    ),
    "SGLang": (
        {"error": {"object": "error", "message": WHY, "type": "BadRequestError", "code": 400}},
        "https://github.com/sgl-project/sglang/issues/12081",
    ),
    "llama.cpp": (
        {"error": {"code": 400, "message": WHY, "type": "invalid_request_error"}},
        "https://github.com/ggml-org/llama.cpp/pull/15780",
    ),
    "Cloudflare": (
        {"result": None, "success": False, "errors": [{"code": 7003, "message": WHY}]},
        "https://developers.cloudflare.com/fundamentals/api/reference/deprecations/",
    ),
    "NestJS": (
        {"statusCode": 400, "error": "Bad Request", "message": [WHY]},
        "https://docs.nestjs.com/exception-filters",
    ),
    "ASP.NET": (
        {"title": "One or more errors occurred.", "status": 400, "errors": {"messages": [WHY]}},
        "https://learn.microsoft.com/aspnet/core/web-api/handle-errors",
    ),
    "OpenRouter, an error in metadata": (
        {"error": {"message": "Provider returned error", "metadata": {"error": {"message": WHY}}}},
        "gateways before OpenRouter",
    ),
    "AWS": ({"Message": WHY}, "https://docs.aws.amazon.com/bedrock/latest/APIReference/"),
    "an error that is true": ({"error": True, "message": WHY}, "gateways"),
    "a detail within": ({"error": {"detail": WHY}}, "gateways"),
    "JSON thrice within": (
        {"error": {"message": json.dumps({"error": json.dumps({"error": {"message": WHY}})})}},
        "gateways before gateways",
    ),
    "a JSON text": (WHY, "gateways"),
    "MiniMax": (
        {"id": "1", "choices": None, "base_resp": {"status_code": 2013, "status_msg": WHY}},
        "https://platform.minimax.io/docs/api-reference/errorcode",
    ),
    "Baidu": (
        {"error_code": 336003, "error_msg": WHY, "id": "as-1"},
        "https://cloud.baidu.com/doc/WENXINWORKSHOP/s/tlmyncueh",
    ),
    "AWS Lambda": ({"errorMessage": WHY, "errorType": "ValueError"}, "docs.aws.amazon.com/lambda"),
    "a description": ({"error": {"code": 3, "description": WHY}}, "gateways"),
    "a reason": ({"error": {"reason": WHY}}, "gateways"),
}


@pytest.mark.parametrize("document", [form for form, _ in FORMS.values()], ids=FORMS)
def test_the_reason_is_found_in_every_form(document: Any) -> None:
    assert read_error(load_error(json.dumps(document).encode())).message == WHY


@pytest.mark.parametrize("document", [form for form, _ in FORMS.values()], ids=FORMS)
def test_the_reason_is_found_in_every_form_as_an_event(document: Any) -> None:
    raw = json.dumps(document).encode()
    for body in (
        b"data: %b\n\ndata: [DONE]\n\n" % raw,
        b"event: error\r\ndata: %b\r\n\r\n" % raw,
        b": wait\n\nid: 1\ndata:%b\n\n" % raw,
        b"\xef\xbb\xbfdata: %b" % raw,
    ):
        assert read_error(load_error(body)).message == WHY


AZURE = {  # https://github.com/openai/openai-dotnet/issues/55
    "error": {
        "message": "The response was filtered.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {
            "code": "ResponsibleAIPolicyViolation",
            "content_filter_result": {
                "hate": {"filtered": False, "severity": "safe"},
                "jailbreak": {"filtered": False, "detected": True},
                "violence": {"filtered": True, "severity": "medium"},
            },
        },
    }
}


def test_azure_s_filter_says_what_it_has_found() -> None:
    found = read_error(AZURE)
    assert found.message == "The response was filtered. (filtered: jailbreak, violence)"
    assert (found.status, found.param) == (400, "prompt")


def test_both_messages_are_told_where_the_outer_one_says_something() -> None:
    inner = {"raw": {"message": "it is 12 bits"}}
    found = read_error({"error": {"message": "bad depth", "metadata": inner}})
    assert found.message == "bad depth: it is 12 bits"


def test_every_field_at_fault_is_told_of_a_few() -> None:
    fields = [{"loc": ["body", name], "msg": f"{name} is wrong"} for name in "abcdefghijkl"]
    found = read_error({"detail": fields})
    assert found.message.startswith("a is wrong; b is wrong; ")
    assert found.message.count(";") == 7
    assert (found.param, found.status) == ("a", 422)


RUST = (  # serde's words of a body; seen in ai-goofish-monitor#57
    "Failed to deserialize the JSON body into the target type: messages[0]: data did not match any "
    "variant of untagged enum ChatCompletionRequestContent at line 1 column 1301180"
)


def test_a_plain_text_is_told() -> None:
    assert read_error(load_error(RUST.encode())).message == RUST


@pytest.mark.parametrize(
    "body",
    [
        b"<html><h1>400 Bad Request</h1></html>",
        b"<!DOCTYPE html><title>x</title>",
        b"<?xml version='1.0'?><Error>x</Error>",
        b"\n <center>nginx</center>",
        b"Bad Request",
        b"Unprocessable Entity\n",
        b"\x00\x01\xff\xfe\xfd\xfc",
        json.dumps({"error": {"message": "<html><body>nginx</body></html>"}}).encode(),
        json.dumps({"detail": "Bad Request"}).encode(),
    ],
)
def test_a_page_or_a_status_line_says_nothing(body: bytes) -> None:
    assert read_error(load_error(body)).message == ""


def test_a_message_is_one_line_that_every_encoding_takes() -> None:
    body = rb'{"error":{"message":"a\n\tb \u0007\ud83d c","param":"x\ud83d","code":"y\ud83d"}}'
    found = read_error(load_error(body))
    assert (found.message, found.param, found.code) == ("a b ? c", "x?", "y?")


def test_what_is_told_is_bounded() -> None:
    found = read_error({"error": {"message": "m" * 9000, "param": "p" * 9000, "code": "c" * 9000}})
    lengths = len(found.message), len(found.param), len(found.code)
    assert lengths == (MAX_MESSAGE_LENGTH, MAX_PARAM_LENGTH, 64)


BODY = json.dumps(
    {"detail": [{"loc": ["body", "n"], "msg": WHY, "input": {"message": "secret"}}]}
).encode()


@pytest.mark.parametrize("cut", range(len(BODY)))
def test_a_body_that_was_cut_tells_its_whole_message_or_nothing(cut: int) -> None:
    # A server that quotes the prompt says more than we read.
    found = read_error(load_error(BODY[:cut])).message
    assert found == (WHY if cut > BODY.index(WHY.encode()) + len(WHY) else "")


# Status

STATUSES: list[tuple[Any, int | None]] = [
    ({"error": {"code": 400}}, 400),
    ({"error": {"code": "429"}}, 429),
    ({"error": {"code": 429.0}}, 429),
    ({"error": {"status": 503}}, 503),
    ({"error": {"status_code": "503 Service Unavailable"}}, 503),
    ({"error": {"message": "x"}, "status": 400}, 400),
    ({"error": {"message": "x"}, "status_code": 422}, 422),
    ({"error": "x", "code": 413}, 413),
    ({"object": "error", "message": "x", "code": 400}, 400),
    ([{"error": {"code": 400}}], 400),
    ({"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "x"}}}, 429),
    ({"error": {"message": json.dumps({"error": {"code": 503}})}}, 503),
    ({"error": {"status": "RESOURCE_EXHAUSTED"}}, 429),
    ({"error": {"status": "INVALID_ARGUMENT"}}, 400),
    ({"error": {"status": "UNAVAILABLE"}}, 503),
    ({"error": {"status": "DEADLINE_EXCEEDED"}}, 504),
    ({"error": {"code": "rate_limit_exceeded", "type": "tokens"}}, 429),
    ({"error": {"type": "invalid_request_error", "code": "invalid_api_key"}}, 401),
    ({"error": {"type": "invalid_request_error", "code": "context_length_exceeded"}}, 400),
    ({"error": {"type": "exceed_context_size_error"}}, 400),
    ({"error": {"type": "invalid_request_error"}}, 400),
    ({"error": {"type": "BadRequestError"}}, 400),
    ({"error": {"type": "NotFoundError"}}, 404),
    ({"error": {"type": "overloaded_error"}}, 503),
    ({"error": {"type": "server_error", "code": None}}, 500),
    ({"error": {"type": "ThrottlingException"}}, 429),
    ({"error": {"type": "engine_overloaded_error"}}, 429),
    ({"detail": [{"loc": ["body", "messages"], "msg": "field required"}]}, 422),
    ({"error": {"message": "Rate limit exceeded: free-models-per-min."}}, 429),
    ({"error": "Too Many Requests"}, 429),
    ({"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, 429),
    ({"choices": None, "base_resp": {"status_code": 1004, "status_msg": "login fail"}}, 401),
    ({"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, 402),
    ({"base_resp": {"status_code": 2013, "status_msg": "invalid params"}}, 400),
    ({"base_resp": {"status_code": 1000, "status_msg": "unknown error"}}, None),
    ({"base_resp": {"status_code": 0, "status_msg": ""}}, None),
    ({"status_code": 1002}, None),
    ({"error": {"code": True}}, None),
    ({"error": {"code": 200}}, None),
    ({"error": {"code": 4000}}, None),
    ({"error": {"code": "4001"}}, None),
    ({"error": {"code": 1e400}}, None),
    ({"error": {"code": float("nan")}}, None),
    ({"error": {"code": 400.5}}, None),
    ({"error": {"code": "teapot"}}, None),
    ({"error": {"message": "no status at all 429"}}, None),
    ({"detail": "no"}, None),
    (None, None),
    ("x", None),
]


@pytest.mark.parametrize(("document", "status"), STATUSES, ids=[str(x)[:60] for x, _ in STATUSES])
def test_the_status_that_an_error_names(document: Any, status: int | None) -> None:
    assert read_error(document).status == status


# A prompt that is too long

TOO_LONG = {
    # https://github.com/vercel/ai/issues/428
    "OpenAI": "This model's maximum context length is 8192 tokens. However, your messages resulted "
    "in 8312 tokens. Please reduce the length of the messages.",
    "OpenAI's newer": "Your input exceeds the context window of this model",
    # https://github.com/BerriAI/litellm, letta's list
    "OpenAI's newest": "Input tokens exceed the configured limit of 272000 tokens.",
    # https://github.com/stackblitz-labs/bolt.diy/issues/564
    "DeepSeek": "This model's maximum context length is 65536 tokens. However, you requested "
    "190402 tokens (182402 in the messages, 8000 in the completion).",
    # https://github.com/earendil-works/pi/issues/6378
    "OpenRouter": "This endpoint's maximum context length is 262000 tokens. However, you requested "
    "about 263390 tokens (658 of text input, 732 of tool input, 262000 in the output).",
    # https://github.com/earendil-works/pi/issues/4943
    "Poolside": "Input length 131393 exceeds the maximum allowed input length of 131040 tokens.",
    # https://github.com/earendil-works/pi/issues/5677
    "LiteLLM": "Input length (265330) exceeds model's maximum context length (262144).",
    # https://github.com/openclaw/openclaw/issues/129352
    "SGLang": "The input (12345 tokens) is longer than the model's context length (8192 tokens).",
    "SGLang's other": "Requested token count exceeds the model's maximum context length of 262144 "
    "tokens.",
    # https://github.com/entropy-research/Devon/issues/88
    "Anthropic": "prompt is too long: 209353 tokens > 199999 maximum",
    # https://github.com/OpenHands/benchmarks/issues/45
    "Anthropic's sum": "input length and `max_tokens` exceed context limit: 142123 + 64000 > "
    "200000, decrease input length or `max_tokens` and try again",
    # https://github.com/earendil-works/pi, packages/ai/src/utils/overflow.ts, and so on to Mistral
    "Gemini": "The input token count (1196265) exceeds the maximum number of tokens allowed "
    "(1048575)",
    "Groq": "Please reduce the length of the messages or completion",
    "LM Studio": "tokens to keep from the initial prompt is greater than the context length",
    "GitHub": "prompt token count of 130000 exceeds the limit of 128000",
    "MiniMax": "invalid params, context window exceeds limit",
    "Mistral": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 "
    "maximum context length",
    "Ollama": "prompt too long; exceeded max context length by 12 tokens",
    "DashScope": "Range of input length should be [1, 30720]",
    "Bedrock": "Input is too long for requested model.",
    # https://github.com/cline/cline/issues/3120
    "xAI": "This model's maximum prompt length is 131072 but the request contains 136973 tokens.",
    # https://github.com/MoonshotAI/kimi-cli/issues/2011
    "Moonshot": "Invalid request: Your request exceeded model token limit: 262144 (requested: "
    "269030)",
    # https://github.com/zeroclaw-labs/zeroclaw/issues/4124
    "Z.ai": "Prompt exceeds max length",
    # https://github.com/oobabooga/textgen/issues/7257
    "llama.cpp": "the request exceeds the available context size. try increasing the context size "
    "or enable context shift",
    # https://github.com/langchain-ai/deepagents/issues/468
    "vLLM's engine": "The decoder prompt (length 66501) is longer than the maximum model length of "
    "65536.",
    # https://github.com/vllm-project/vllm/issues/10440
    "vLLM's scheduler": "Input prompt (35247 tokens) is too long and exceeds limit of 1000",
    # https://github.com/cohere-ai/sandbox-topically/issues/4
    "Cohere": "too many tokens: total number of tokens (prompt and prediction) cannot exceed 2048",
    # https://github.com/huggingface/text-generation-inference
    "TGI": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: "
    "5000",
    "Atlas": "Prompt too long: 5152 tokens exceeds max_seq_len 2048",
    # https://github.com/earendil-works/pi: DS4
    "DS4": "Prompt has 9,000 tokens, but the configured context size is 8,192 tokens",
}


@pytest.mark.parametrize("message", TOO_LONG.values(), ids=TOO_LONG)
def test_a_prompt_that_is_too_long_is_known_by_the_words_of(message: str) -> None:
    assert read_error({"error": {"message": message}}).is_too_long
    assert read_error({"error": {"metadata": {"raw": message}}}).is_too_long


@pytest.mark.parametrize(
    "code",
    ["context_length_exceeded", "exceed_context_size_error", "ContextWindowExceededError"],
)
@pytest.mark.parametrize("name", ["code", "type"])
def test_a_prompt_that_is_too_long_is_known_by_its_code(name: str, code: str) -> None:
    assert read_error({"error": {"message": "no", name: code}}).is_too_long


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 100000. This model supports at most 16384 completion tokens",
        "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
        "`max_tokens` must be less than or equal to `16384`, the maximum value for `max_tokens` is "
        "less than the `context_window` for this model",  # RooCodeInc/Roo-Code#5729
        "Tokens per minute limit exceeded - too many tokens processed.",  # continuedev#9800
        "Too many tokens, please wait before trying again.",  # jin-bo/agentao#88
        "Request too large for model `x` on tokens per minute (TPM): Limit 10000, Requested 21247",
        "Invalid 'user': string too long. Expected a string with maximum length 64",
        "messages: at least one message is required",
        "unknown field `context_window`",
        "Unsupported value: 'temperature' does not support 0.2 with this model.",
        WHY,
    ],
)
def test_other_limits_are_no_prompt_that_is_too_long(message: str) -> None:
    assert not read_error({"error": {"message": message}}).is_too_long


# Bodies without choices


@pytest.mark.parametrize(
    "document",
    [form for form, _ in FORMS.values() if not isinstance(form, str)],
    ids=[name for name, (form, _) in FORMS.items() if not isinstance(form, str)],
)
def test_every_form_describes_an_error(document: Any) -> None:
    assert describes_error(document)


@pytest.mark.parametrize("document", [{}, [], [[]], "x", 7, None, {"id": "x", "usage": {}}])
def test_anything_else_does_not(document: Any) -> None:
    assert not describes_error(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | inner.map(json.dumps)
        | st.dictionaries(
            st.sampled_from(
                "error errors message detail msg code status param loc metadata raw innererror"
                " content_filter_result type details".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JSON.map(lambda document: json.dumps(document).encode()) | st.binary())
def test_no_error_is_too_strange(body: bytes) -> None:
    found = read_error(load_error(body))
    assert len(found.message) <= MAX_MESSAGE_LENGTH
    assert found.status is None or 400 <= found.status <= 599
    (found.message + found.param + found.code).encode()
    describes_error(load_error(body))
    assert found.is_too_long in (True, False)


def test_a_deep_or_wide_error_ends() -> None:
    deep: Any = "why"
    for _ in range(50):
        deep = {"error": deep, "message": deep if len(str(deep)) < 200 else "x"}
    wide = {"errors": [{"error": {"message": "x"}}] * 1000, "detail": [{"msg": "y"}] * 1000}
    assert len(read_error(deep).message) <= MAX_MESSAGE_LENGTH
    assert read_error(wide).message == "x"
