"""Secrets by name, and the environment's token, which goes to the server that it is for and to no other."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_remote import QUICK, native, numbered, serving, status

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.models.http_client import Refused, open_client
from calibrated_rewards.models.server_address import POLICY_TOKEN, TOKEN, Address, is_secret, token_for, without_secrets
from calibrated_rewards.samplers.openai import OpenAISampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.remote import Native, Remote
from calibrated_rewards.testing.suites import NumberScorer


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


SECRET = "s3cret-of-the-tests"


def bind(monkeypatch: pytest.MonkeyPatch, server: str, variable: str = TOKEN) -> None:
    monkeypatch.setenv(variable, SECRET)
    monkeypatch.setenv(f"{variable}_URL", server)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://good", True),
        ("HTTPS://GOOD:443/score?x=1", True),
        ("https://good/t/other/score", True),
        ("http://good", False),
        ("http://good:443", False),
        ("https://good:8443", False),
        ("https://good.", False),
        ("https://good.evil", False),
        ("https://evil/good", False),
        ("https://evil?https://good", False),
        ("https://evil#@good", False),
        ("https://good@evil", False),
        ("https://good:443@evil", False),
        ("https://me@good", False),
        ("https://good%2eevil", False),
        ("https://xn--good", False),
    ],
)
def test_scheme_host_and_port_decide(url: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written in any case; a port that is the scheme's own may be left out; nothing else is the same server."""
    bind(monkeypatch, "https://other:1, https://good/ignored")
    assert token_for(url) == (SECRET if sent else None)
    bind(monkeypatch, "https://Good:443", POLICY_TOKEN)
    assert OpenAISampler(url, "m", Decoding(max_tokens=1))._token == (SECRET if sent else None)
    assert not sent or httpx.URL(url).host == "good"  # what is asked in the end


@pytest.mark.parametrize(
    "url",
    [
        "https://evil\\@good",
        "https://good\\.evil",
        "https://a@evil@good",
        "https://ev\til@good",
        " https://good",
        "https://good\n.evil",
        "https://g\uff4f\uff4fd",
        "https://good\u3002evil",
        "https://good evil",
    ],
)
def test_urls_that_libraries_read_in_different_ways_are_refused(url: str) -> None:
    """Before anything is sent anywhere."""
    with pytest.raises(ValueError, match="needs an url"):
        Remote(url, Native("m"), token=SECRET)
    with pytest.raises(ValueError, match="needs an url"):
        OpenAISampler(url, "m", Decoding(max_tokens=1), token=SECRET)


def test_httpx_asks_the_host_that_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it ever another one, no request would be made."""
    monkeypatch.setattr(httpx, "URL", lambda url: httpx._urls.URL("https://evil/"))
    with pytest.raises(ValueError, match="read as another server by httpx, evil"):
        open_client(Address("https://good", SECRET), 1.0, 1)


@pytest.mark.parametrize("servers", ["", "good", "good:443", "https://good,evil", "ftp://good"])
def test_a_token_for_nobody_in_particular_is_an_error(servers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which variable is missing, and not the token."""
    bind(monkeypatch, servers)
    with pytest.raises(ValueError, match=r"CALIBRATED_REWARDS_TOKEN_URL=http://rm:8000") as caught:
        token_for("https://good")
    assert SECRET not in str(caught.value)


def test_a_saved_reward_sends_it_to_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward.json that names another server gets scores without it, and its 401 says why there was none."""
    table = ReferenceTable.build([("p", [1.0, 2.0])])
    CalibratedReward(NumberScorer(), table).save_pretrained(tmp_path)
    with serving(native, None, status(401, b"who are you?")) as evil, serving(native) as good:
        bind(monkeypatch, good.url)
        for server, token in ((evil, None), (good, SECRET)):
            dialect = {"is": "calibrated_rewards.scorers.remote.Native", "model": "rm"}
            own = {"is": "calibrated_rewards.scorers.remote.Remote", "url": server.url, "dialect": dialect}
            settings = json.loads((tmp_path / "reward.json").read_text())
            scorer = {**own, "show_progress": False, "backoff": 0.001, "token": "from the file"}
            (tmp_path / "reward.json").write_text(json.dumps({**settings, "scorer": scorer}))
            reward: Any = CalibratedReward.from_pretrained(tmp_path, trust_remote_code=True)
            assert reward(["p"], ["2"]) == [0.75]
            sent = server.seen[0][1].get("Authorization")
            assert sent == (None if token is None else f"Bearer {token}")
        with pytest.raises(Refused, match=rf"CALIBRATED_REWARDS_TOKEN is for {good.url}, and was not sent"):
            Remote(evil.url, Native("rm"), **QUICK)(*numbered(1))


def test_a_server_that_wants_one_is_answered_with_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 401 names the two variables where no token was sent, and says so where one was."""
    for name in ("CALIBRATED_REWARDS_TOKEN", "CALIBRATED_REWARDS_POLICY_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving(native, status(401, b"no"), status(401, b"no")) as server:
        with pytest.raises(Refused, match=r"no token was sent: set CALIBRATED_REWARDS_TOKEN .*_TOKEN_URL"):
            Remote(server.url, Native("rm"), **QUICK)(*numbered(1))
        with pytest.raises(Refused, match=r"; a token was sent$"):
            Remote(server.url, Native("rm"), token=SECRET, **QUICK)(*numbered(1))


@pytest.mark.parametrize(("address", "got"), [("", "it is not set"), ("rm:8000", "does not begin with http://")])
def test_an_address_that_is_none(address: str, got: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the variable of the address is not shown, for it may be the token itself."""
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN", SECRET)
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN_URL", address)
    with pytest.raises(ValueError, match=got) as raised:
        token_for("http://rm:8000")
    assert not address or f"={address} " not in str(raised.value).replace("=http://rm:8000 ", "")


def test_a_redirect_takes_it_nowhere() -> None:
    """Another host is named in an error, and not asked."""
    with serving(native) as evil:
        with (
            serving(native, status(307, Location=f"{evil.url}/score")) as good,
            pytest.raises(Refused, match="points to"),
        ):
            Remote(good.url, Native("rm"), token=SECRET, **QUICK)(*numbered(1))
        assert evil.seen == []
