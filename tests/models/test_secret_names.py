"""Which settings hold secrets, by their names."""

import pytest

from calibrated_rewards.models.server_address import is_secret, without_secrets


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "TOKEN",
        "use_auth_token",
        "hf_token",
        "hub_token",
        "auth-token",
        "accessToken",
        "api_key",
        "apikey",
        "X-API-Key",
        "openai_api_key",
        "password",
        "db_password",
        "client_secret",
        "AWS_SECRET_ACCESS_KEY",
        "cookie",
        "Authorization",
        "Proxy-Authorization",
        "auth",
        "credentials",
        "bearer_token",
        "private_key",
        "aws_session_token",
    ],
)
def test_secrets(name: str) -> None:
    """Those of the Hub, of clouds and of HTTP, in any style."""
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "tokenizer",
        "eos_token",
        "pad_token",
        "step_token",
        "reward_token",
        "reward_token_id",
        "mark",
        "special_tokens",
        "stop_token_ids",
        "batch_tokens",
        "id_key",
        "key_padding",
        "dtype",
        "author",
        "keys",
    ],
)
def test_words_of_texts_are_none(name: str) -> None:
    """Tokens of a vocabulary, and what only sounds alike."""
    assert not is_secret(name)


def test_at_any_depth() -> None:
    """Inside of mappings, lists and tuples; names that are no text stay."""
    held = {1: [{"token": "x", "a": ({"api_key": "y"}, {"b": 2})}], "hf_token": "z"}
    assert without_secrets(held) == {1: [{"a": ({}, {"b": 2})}]}
