"""What an upstream's text tells of our account with it; clients must never read that."""

from __future__ import annotations

import html
import json
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.dialects.error_document import read_error
from hoberproxy.routing.catalog import Provider
from hoberproxy.upstream.credentials import (
    PIECE,
    concerns_account,
    holds_secret,
    may_be_quoted,
    secrets_of,
)

KEY = "sk-proj-T3BlbkFJ9aQz0+/x7Rw_mKdUe4Yh2Lp8"


def provider(**values: object) -> Provider:
    return Provider("p", "http", "h", 80, "/v1", **values)  # type: ignore[arg-type]


# Words

OURS = {
    # https://github.com/cequence-io/openai-scala-client/issues/109
    "Gemini": "API key not valid. Please pass a valid API key.",
    "Gemini's reason": "API_KEY_INVALID",
    "Gemini's expired": "API key expired. Please renew the API key.",
    # https://aifreeapi.com and ai.google.dev/gemini-api/docs/troubleshooting
    "Gemini's region": "User location is not supported for the API use.",
    # https://github.com/continuedev/continue/issues/10778
    "xAI": "Incorrect API key provided: na***ys. You can obtain an API key from https://console.x.ai.",
    # https://github.com/i-am-bee/beeai-framework/issues/447
    "xAI, of a URL": "Incorrect%20API%20key%20provided:%20ba***na.%20You%20can%20obtain%20an%20API",
    "OpenAI": "You didn't provide an API key. You need to provide your API key in an Authorization "
    "header using Bearer auth",
    "DeepSeek": "Authentication Fails (auth header format should be Bearer sk-...)",
    # https://github.com/crewAIInc/crewAI/issues/783
    "Groq": "Organization has been restricted. Please reach out to support if you believe this was "
    "in error.",
    # https://github.com/cline/cline/issues/4971
    "Groq's rate": "Request too large for model `x` in organization `org_01` service tier "
    "`on_demand` on tokens per minute (TPM): Limit 10000, Requested 15088",
    # https://github.com/anthropics/claude-code/issues/4684
    "Anthropic": "Your credit balance is too low to access the Anthropic API. Please go to Plans & "
    "Billing to upgrade or purchase credits.",
    # https://github.com/MoonshotAI/Kimi-K2/issues/5
    "Moonshot": "Your account x is not active, organization y exceeded current quota, please check "
    "your plan and billing details",
    # docs.litellm.ai/docs/exception_mapping
    "Anthropic's SDK": "Could not resolve authentication method. Expected api_key or auth_token: "
    "invalid authentication",
    "missing": "missing API key",
    "header": "x-api-key header is required",
    "no header": "Missing Authorization header",
    "bearer": "Malformed bearer token",
    "token": "Invalid token",
    "access token": "The access token is expired",
    "JWT": "jwt expired",
    "unauthorized": "Unauthorized",
    "unauthenticated": "Request is unauthenticated",
    "credentials": "Invalid credentials",
    "default credentials": "Your default credentials were not found.",
    "failed": "Failed to authenticate request with Clerk",
    "Azure": "Access denied due to invalid subscription key or wrong API endpoint.",
    "AWS": "The security token included in the request is invalid",
    "Cohere": "no api token supplied",
    "OpenAI's verification": "Your organization must be verified to stream this model.",
    # docs.claude.com/en/api/errors: "invalid_request_error (spend limit reached)"
    "Anthropic's limits": "You have reached your specified API usage limits.",
    # help.aliyun.com, error code Arrearage
    "DashScope": "Access denied, please make sure your account is in good standing.",
    "a parameter's name": "The api_key is invalid",
    "billing": "Billing not enabled",
    # github.com/songquanpeng/one-api, model/token.go and relay/controller
    "one-api's quota": "token quota is not enough",
    "a quota that is used up": "User quota exhausted",
    "one-api": "无效的令牌",
    "one-api, expired": "该令牌已过期",
    "one-api, used up": "该令牌额度已用尽",
    "one-api, state": "该令牌状态不可用",  # QuantumNous/new-api#3302
    "Zhipu": "身份验证失败。",
    "Zhipu's balance": "您的账户已欠费,请充值后重试。",
    "balance": "余额不足",
    # openrouter.ai/docs/api-reference/errors
    "OpenRouter's credits": "This request requires more credits, or fewer max_tokens.",
    "OpenRouter's limit": "Key limit exceeded (total limit).",
    "valid credentials": "Please provide valid credentials",
    "arrears": "Arrearage",
}


@pytest.mark.parametrize("text", OURS.values(), ids=OURS)
def test_credentials_are_spoken_of_by(text: str) -> None:
    assert concerns_account(text)
    assert concerns_account(f"the gateway says: {text}") or text == "Invalid token"


@pytest.mark.parametrize(
    "error",
    [
        {"type": "authentication_error"},
        {"type": "invalid_request_error", "code": "invalid_api_key"},
        {"status": "UNAUTHENTICATED"},
        {"status": "FAILED_PRECONDITION"},
        {"type": "AuthenticationError"},
        {"details": [{"reason": "API_KEY_INVALID"}]},
        {"code": "organization_restricted"},
        {"code": "rate_limit_exceeded"},
        {"metadata": {"raw": '{"error":{"code":"invalid_api_key"}}'}},
    ],
    ids=str,
)
def test_credentials_are_spoken_of_by_a_code(error: dict[str, object]) -> None:
    assert concerns_account("no", read_error({"error": error}).words)


THEIRS = [
    "max_tokens must be at least 1, got -5",
    "This model's maximum context length is 8192 tokens. Please reduce the length of the messages.",
    "token limit exceeded",
    "Invalid token in JSON at position 5",
    "unexpected token '<'",
    "Invalid value: 'stop' has an invalid token id 50256",
    "Invalid schema for function 'get_api_key': type must be object",
    "tools[0].function.parameters.properties.api_key: is not valid under any of the given schemas",
    "tools.0.custom.input_schema.properties.access_token.type: Field required",
    "Invalid parameter: 'tool_call_id' of 'call_billing' not found",
    "messages[1].name: 'billing' does not match '^[a-z]+$'",
    "Your message contains an API key and was blocked by the data-loss filter",
    "Sharing credentials is not allowed by the content policy",
    "The response was filtered due to the prompt triggering our content management policy.",
    "Unsupported value: 'temperature' does not support 0.2 with this model.",
    "Missing required parameter: 'messages[0].content'.",
    "Model supports at most 1 image per prompt.",
    "Invalid 'user': expected a string, got an authorization_code",
    "Extra inputs are not permitted",
    "llama3 does not support tools",
    "response_format: must be one of text, json_object",
    "stream_options is only allowed when stream is enabled",
    "The keys of logit_bias must be valid token ids",
    "seed: must be an integer; the API takes no string",
    "Failed to fetch image from URL: status code 401 Unauthorized",
    "Error while downloading https://example.org/a.png: not authorized",
    "'tool_choice' is only allowed when 'tools' are specified",
    "An assistant message with 'tool_calls' must be followed by tool messages",
    "messages: text content blocks must be non-empty",
    "Unrecognized request argument supplied: reasoning_effort",
    "tools[0].function.parameters: 'api_key' must be an object",
    "输入超过最大令牌数",
    "提示词包含敏感内容",
]


@pytest.mark.parametrize("text", THEIRS)
def test_the_client_s_own_business_is_spoken_of_by(text: str) -> None:
    assert not concerns_account(text)


@pytest.mark.parametrize(
    "error",
    [
        {"type": "invalid_request_error", "code": "context_length_exceeded"},
        {"status": "INVALID_ARGUMENT"},
        {"code": "content_filter"},
        {"type": "BadRequestError", "code": 400},
        {"type": "tokens", "code": "max_tokens"},
    ],
    ids=str,
)
def test_the_client_s_own_business_is_told_by_a_code(error: dict[str, object]) -> None:
    assert not concerns_account("no", read_error({"error": error}).words)


# The key itself


def test_secrets_are_the_key_and_what_stands_in_such_headers() -> None:
    headers = (("api-key", "k1"), ("Authorization", "Bearer k2"), ("x-title", "hober"))
    assert secrets_of(provider(api_key="k0", headers=headers)) == ("k0", "k1", "k2")
    assert secrets_of(provider()) == ()


@pytest.mark.parametrize(
    "excerpt",
    [
        KEY,
        f"Bearer {KEY}",
        f"key={KEY}&x=1",
        KEY[:PIECE],
        KEY[-PIECE:],
        KEY[11:19],
        quote(KEY, safe=""),
        html.escape(KEY).replace("+", "&#43;"),
        json.dumps(KEY).replace("/", "\\/"),
        KEY.replace("+", "\\u002b"),
        "sk-proj-****2Lp8",
        "sk-pr***Lp8",
        "sk***p8",
        "sk-p...2Lp8",
        "sk-proj-…Lp8",
        "****************2Lp8",
        "sk-proj-T3**********",
        "sk-pXXXXXXXX2Lp8",
        "key:sk-pr***Lp8.",
        "the key ending in 2Lp8",
        'that ends with "2Lp8"',
        KEY.upper(),
        KEY.lower(),
        KEY.encode().hex(),
        KEY.encode().hex().upper(),
        *(b64encode(before + KEY.encode()).decode() for before in (b"", b":", b"u:", b"Bearer ")),
        urlsafe_b64encode(f"x:{KEY}:y".encode()).decode(),
    ],
)
def test_a_text_with_a_part_of_the_key_is_found(excerpt: str) -> None:
    assert holds_secret(f"no: {excerpt} (see the docs)", (KEY,))
    assert holds_secret(excerpt, ("other-0123456789", KEY))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (KEY, "the key sk-live-T3Blbk is another's"),
        (KEY, "wait... then try again"),
        (KEY, "at most 1 image per prompt, 8 tokens"),
        (KEY, "sk-"),
        (KEY, "a ** b ** c"),
        (KEY, "a list ending in 2, or 2Lp"),
        (KEY, b64encode(b"sk-live-another-one").decode()),
        ("sk-upstream-secret", "upstream-model takes no upstream images, dear secretary"),
        ("k", "k is not known, kk"),
        ("EMPTY", "messages must not be EMPTY"),
        ("ollama", "ollama does not support tools"),
    ],
)
def test_a_text_that_does_not_is_none(key: str, text: str) -> None:
    assert not holds_secret(text, (key,))


@pytest.mark.parametrize(
    ("key", "text"), [("s3cret", "key s3cret?"), ("abc-1", "'abc-1'"), ("qwert", "qwert!")]
)
def test_a_short_key_is_found_whole(key: str, text: str) -> None:
    assert holds_secret(text, (key,))
    assert not holds_secret(text.replace(key, key + "x"), (key,))


# What the client itself has sent


@pytest.mark.parametrize("guess", ["k-proj-T", "sk-pr***Lp8", KEY[11:19], KEY])
@pytest.mark.parametrize(
    "write",
    [str, lambda text: quote(text, safe=""), html.escape],
    ids=["plain", "in a URL", "in HTML"],
)
@pytest.mark.parametrize(
    "dump",
    [
        json.dumps,
        lambda text: '"' + "".join(f"\\u{ord(letter):04X}" for letter in text) + '"',
    ],
    ids=["plain", "escaped"],
)
def test_a_client_can_not_try_out_pieces_of_the_key(
    guess: str, write: Callable[[str], str], dump: Callable[[str], str]
) -> None:
    written = write(guess)
    sent = f'{{"user":{dump(written)}}}'.encode()
    answer = f"Invalid value: {written}"
    assert holds_secret(answer, (KEY,))
    assert not holds_secret(answer, (KEY,), lambda: sent)
    assert holds_secret(f"{answer} {KEY[-12:-3]}", (KEY,), lambda: sent) == (KEY != guess)


@pytest.mark.parametrize(
    ("message", "sent", "is_quoted"),
    [
        ("API key not valid. Please pass a valid API key.", b'{"user":"x"}', False),
        ("Unauthorized", b'{"max_tokens":5}', False),
        ("Invalid value: 'x API key is invalid'", b'{"user":"x API key is invalid"}', True),
        ("Invalid value: an API key", b'{"user":"an\\nAPI\\u0020key"}', True),
        ("no such role: unauthorized", b'{"role":"unauthorized"}', True),
        ("API key not valid", b'{"content":"what is an api key?"}', True),
    ],
)
def test_a_message_that_may_quote_the_client_is_known(
    message: str, sent: bytes, is_quoted: bool
) -> None:
    assert concerns_account(message)
    assert may_be_quoted(message, sent) is is_quoted


KEYS = st.from_regex(r"[a-z]{2}-[A-Za-z0-9_-]{20,60}", fullmatch=True)


@given(KEYS, st.integers(0, 40), st.text(max_size=20), st.text(max_size=20))
def test_any_piece_of_twelve_is_found_anywhere(key: str, at: int, before: str, after: str) -> None:
    piece = key[min(at, len(key) - 12) :][:12]
    assert holds_secret(f"{before} {piece} {after}", (key,))


@given(st.text(), st.text())
def test_no_text_is_too_strange(text: str, key: str) -> None:
    assert holds_secret(text, (key,)) in (True, False)
    assert concerns_account(text) in (True, False)


def test_a_long_text_ends_soon() -> None:
    for text in ("a" * 65536, "api key " * 8192, "*" * 65536, "account " * 8192, "\\u00" * 16384):
        holds_secret(text, (KEY,))
        concerns_account(text[:2000])
