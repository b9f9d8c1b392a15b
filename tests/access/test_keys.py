"""Keys: their form, their checksum, and the error for a caller without a valid one."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hoberproxy.access.keys import (
    Caller,
    Keyring,
    display_hint,
    generate_key,
    hash_key,
    is_well_formed,
)
from hoberproxy.errors import AccessError
from tests.conftest import Proxy, chat, get
from tests.support.scripted import ScriptedUpstream

NOW = 1_700_000_000.0
KEY = generate_key("live", bytes(range(24)))
CALLER = Caller(key_id="key_1", label="team-a", kind="live", expires=None, revoked=None)


def keyring(caller: Caller = CALLER) -> Keyring:
    ring = Keyring()
    ring.replace({hash_key(KEY): caller})
    return ring


def refusal(authorization: bytes | None, ring: Keyring | None = None, now: float = NOW) -> str:
    with pytest.raises(AccessError) as caught:
        (ring or keyring()).authenticate(authorization, now)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.type == "authentication_error"
    return caught.value.message


# Form of a key


@given(st.binary(min_size=24, max_size=24), st.sampled_from(["live", "test"]))
def test_a_generated_key_is_well_formed(random: bytes, kind: str) -> None:
    key = generate_key(kind, random)
    assert key.startswith(f"hb_{kind}_")
    assert len(key) == 8 + 33 + 6
    assert is_well_formed(key)


@given(st.binary(min_size=24, max_size=24), st.binary(min_size=24, max_size=24))
def test_different_random_bytes_give_different_keys(one: bytes, other: bytes) -> None:
    assert (generate_key("live", one) == generate_key("live", other)) is (one == other)


def test_the_greatest_random_number_fits() -> None:
    assert is_well_formed(generate_key("live", b"\xff" * 24))


@pytest.mark.parametrize("place", range(len(KEY)))
def test_one_wrong_character_anywhere_is_noticed(place: int) -> None:
    other = "A" if KEY[place] != "A" else "B"
    assert not is_well_formed(KEY[:place] + other + KEY[place + 1 :])


@pytest.mark.parametrize("place", [p for p in range(8, len(KEY) - 1) if KEY[p] != KEY[p + 1]])
def test_two_swapped_characters_are_noticed(place: int) -> None:
    assert not is_well_formed(KEY[:place] + KEY[place + 1] + KEY[place] + KEY[place + 2 :])


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="nothing"),
        pytest.param(KEY[:-1], id="cut"),
        pytest.param(KEY + "0", id="too long"),
        pytest.param(KEY + "\n", id="a newline after it"),
        pytest.param(KEY.replace("live", "test"), id="live turned into test"),
        pytest.param("sk-" + KEY[3:], id="another prefix"),
        pytest.param(KEY[:-1] + "é", id="a letter outside ASCII"),
    ],
)
def test_other_texts_are_not_well_formed(key: str) -> None:
    assert not is_well_formed(key)


@pytest.mark.parametrize("size", [0, 16, 23, 25])
def test_a_key_is_made_of_exactly_192_random_bits(size: int) -> None:
    with pytest.raises(ValueError, match="24 random bytes"):
        generate_key("live", bytes(size))


def test_a_key_is_live_or_test() -> None:
    with pytest.raises(ValueError, match="live and test"):
        generate_key("prod", bytes(24))


def test_a_key_is_stored_as_its_sha256() -> None:
    assert hash_key(KEY) == hashlib.sha256(KEY.encode()).digest()


def test_hashing_takes_any_text_a_command_line_can_hold() -> None:
    assert len(hash_key("hb_live_\udcff")) == 32


def test_a_hint_has_the_prefix_and_the_last_four_characters_alone() -> None:
    assert display_hint(KEY) == f"hb_live_...{KEY[-4:]}"


def test_no_hint_is_made_of_another_text() -> None:
    with pytest.raises(ValueError, match="well-formed") as caught:
        display_hint("sk-secret-of-another-service")
    assert "secret" not in str(caught.value)


# Authentication


@pytest.mark.parametrize(
    "authorization",
    [
        pytest.param(f"Bearer {KEY}", id="as the SDKs send it"),
        pytest.param(f"bearer {KEY}", id="scheme in lower case"),
        pytest.param(f"BEARER {KEY}", id="scheme in upper case"),
        pytest.param(f"Bearer   {KEY}", id="several spaces"),
        pytest.param(f"Bearer {KEY}  ", id="trailing spaces"),
        pytest.param(f" \tBearer {KEY}\t", id="white space around"),
    ],
)
def test_a_known_key_gives_its_caller(authorization: str) -> None:
    assert keyring().authenticate(authorization.encode(), NOW) is CALLER


UNKNOWN = generate_key("test", b"\x07" * 24)


@pytest.mark.parametrize(
    ("authorization", "words"),
    [
        pytest.param(None, "got none", id="no header"),
        pytest.param(b"", "got none", id="empty header"),
        pytest.param(b"Bearer", "got none", id="scheme alone"),
        pytest.param(b"Bearer   ", "got none", id="scheme and spaces"),
        pytest.param(b"Basic dXNlcjpwYXNz", "Bearer token", id="another scheme"),
        pytest.param(KEY.encode(), "Bearer token", id="key without a scheme"),
        pytest.param(b"Bearer sk-proj-abcdef", "another form", id="key of another service"),
        pytest.param(b"Bearer \xff\xfe", "another form", id="bytes outside ASCII"),
        pytest.param(f"Bearer {KEY[:-1]}".encode(), "mistyped or cut", id="cut key"),
        pytest.param(f"Bearer {KEY} x".encode(), "mistyped or cut", id="word after the key"),
        pytest.param(f"Bearer {KEY.swapcase()}".encode(), "another form", id="case swapped"),
        pytest.param(f"Bearer {UNKNOWN}".encode(), "does not know it", id="unknown key"),
    ],
)
def test_an_error_says_what_is_wrong_and_never_contains_the_key(
    authorization: bytes | None, words: str
) -> None:
    message = refusal(authorization)
    assert words in message
    for word in (authorization or b"").split():
        assert len(word) <= 8 or word.decode("latin-1") not in message


def test_a_revoked_key_is_refused() -> None:
    ring = keyring(Caller("key_1", "team-a", "live", expires=None, revoked=NOW - 1))
    assert "revoked" in refusal(b"Bearer " + KEY.encode(), ring)


def test_a_key_works_until_it_expires_and_not_at_that_moment() -> None:
    ring = keyring(caller := Caller("key_1", "team-a", "live", expires=NOW, revoked=None))
    header = b"Bearer " + KEY.encode()
    assert ring.authenticate(header, NOW - 0.001) is caller
    assert "expired" in refusal(header, ring, NOW)


def test_an_empty_keyring_knows_nobody() -> None:
    assert "does not know it" in refusal(b"Bearer " + KEY.encode(), Keyring())


def test_replacing_the_keys_forgets_those_left_out() -> None:
    ring = keyring()
    ring.replace({hash_key(UNKNOWN): CALLER})
    assert ring.count == 1
    assert ring.authenticate(b"Bearer " + UNKNOWN.encode(), NOW) is CALLER
    assert "does not know it" in refusal(b"Bearer " + KEY.encode(), ring)


def test_a_later_change_of_the_callers_mapping_is_not_seen() -> None:
    ring = Keyring()
    keys = {hash_key(KEY): CALLER}
    ring.replace(keys)
    keys.clear()
    assert ring.count == 1


# Fields that hold a key


def head(*fields: tuple[str, str]) -> Any:
    values = {name.encode(): value.encode() for name, value in fields}

    class Head:
        def get(self, name: bytes, /) -> bytes | None:
            return values.get(name)

    return Head()


BEARER = ("authorization", f"Bearer {KEY}")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([BEARER], id="as OpenAI's clients send it"),
        pytest.param([("x-api-key", KEY)], id="as Anthropic's"),
        pytest.param([("api-key", KEY)], id="as Azure's"),
        pytest.param([("api-key", f" {KEY}\t")], id="white space around"),
        pytest.param([BEARER, ("x-api-key", KEY), ("api-key", KEY)], id="the same in all"),
        pytest.param([BEARER, ("x-api-key", UNKNOWN)], id="of two, Authorization's"),
        pytest.param([("x-api-key", KEY), ("api-key", UNKNOWN)], id="of two, x-api-key's"),
        pytest.param([("authorization", "Bearer sk-x"), ("api-key", KEY)], id="a provider's too"),
        pytest.param([("authorization", "Bearer"), ("x-api-key", KEY)], id="an empty token too"),
        pytest.param([("authorization", "Basic eDp5"), ("x-api-key", KEY)], id="a password too"),
        pytest.param([("x-api-key", "sk-ant-x"), ("api-key", KEY)], id="the second is ours"),
        pytest.param([("authorization", f"bearer  {KEY}"), ("api-key", UNKNOWN)], id="any case"),
    ],
)
def test_the_first_field_with_a_key_of_this_proxy_counts(fields: list[tuple[str, str]]) -> None:
    assert keyring().authenticate_head(head(*fields), NOW) is CALLER


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param([], "got none", id="no field"),
        pytest.param([("x-api-key", "")], "got none", id="an empty field"),
        pytest.param([("x-api-key", "sk-ant-secret")], "another form", id="a provider's key"),
        pytest.param([("api-key", KEY[:-1])], "mistyped or cut", id="a cut key"),
        pytest.param([("api-key", UNKNOWN)], "does not know it", id="an unknown key"),
        pytest.param(
            [("authorization", f"Bearer {UNKNOWN}"), ("x-api-key", KEY)],
            "does not know it",
            id="an unknown key first",
        ),
        pytest.param(
            [("authorization", f"Basic {KEY}"), ("x-api-key", "secret")],
            "Bearer token",
            id="another scheme",
        ),
        pytest.param([("x-api-key", f"Bearer {KEY}")], "another form", id="a word before it"),
    ],
)
def test_an_error_is_about_the_key_that_counts(fields: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(AccessError) as refused:
        keyring().authenticate_head(head(*fields), NOW)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    assert words in refused.value.message
    assert "secret" not in refused.value.message and KEY[8:] not in refused.value.message


# … of a running proxy


def with_field(request: bytes, field: str) -> bytes:
    """The request with another line in place of its Authorization."""
    lines = request.split(b"\r\n")
    place = next(n for n, line in enumerate(lines) if line.startswith(b"authorization:"))
    lines[place : place + 1] = [field.encode()] if field else []
    return b"\r\n".join(lines)


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "X-Api-Key", "API-KEY"])
async def test_a_key_may_come_in_another_field(
    proxy: Proxy, upstream: ScriptedUpstream, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "hoberproxy")
    client = await proxy.connect()
    for _ in range(2):
        client.send(with_field(chat(proxy.key), f"{name}: {proxy.key}"))
        answer = await client.read_answer()
        assert answer.status == 200
    client.send(get("/v1/key", f"{name}: {proxy.key}"))
    assert (await client.read_answer()).json()["data"]["kind"] == "test"
    id = answer.headers["x-request-id"]
    client.send(get(f"/v1/generation?id={id}", f"{name}: {proxy.key}"))
    assert (await client.read_answer()).status == 200
    assert {record.key_label for record in proxy.records} == {"test"}
    secret = proxy.key.encode()
    assert not any(secret in each.head + each.body for each in upstream.requests)
    assert proxy.key not in caplog.text
    assert not {"x-api-key", "api-key"} & set(upstream.requests[0].headers)


async def test_a_repeated_head_with_another_key_is_read_again(proxy: Proxy) -> None:
    client = await proxy.connect()
    right = with_field(chat(proxy.key), f"x-api-key: {proxy.key}")
    wrong = with_field(chat(proxy.key), f"x-api-key: {UNKNOWN}")
    none = with_field(chat(proxy.key), "")
    for request, status in ((right, 200), (wrong, 401), (right, 200), (none, 401), (right, 200)):
        client.send(request)
        assert (await client.read_answer()).status == status
    assert [record.key_label for record in proxy.records] == ["test", "", "test", "", "test"]
