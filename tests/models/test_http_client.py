"""Whole runs with planted secrets, logged at DEBUG: not one of them in what is printed, logged or written."""

import json
import logging
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import matplotlib
import pytest
from test_remote import QUICK, native, numbered, reset, serving, status

from calibrated_rewards.models.server_address import redact_url
from calibrated_rewards.scorers.remote import Native, Remote
from calibrated_rewards.scorers.remote_vllm import Vllm

PLANTED = {
    "user": "user-zq1",
    "password": "pass-zq2",
    "query": "query%2Fzq3",
    "path": "path-zq4",
    "token": "token-zq5",
    "policy": "policy-zq6",
    "option": "option-zq7",
}
# As they are meant, as they are written, and as HTTP sends them.
FORMS = [*PLANTED.values(), "query/zq3", "dXNlci16cTE6cGFzcy16cTI=", "zq"]


def texts_and_scores(body: Any) -> Any:
    """What a policy answers, and what a reward model does."""
    if "prompts" in body:
        return native(body)
    return {
        "choices": [{"index": i, "text": str(i), "finish_reason": "stop"} for i in range(body["n"])],
        "usage": {"completion_tokens": body["n"]},
    }


def echoing(code: int) -> Any:
    """An answer that quotes what was sent, in its headers and in its body."""

    def reply(handler: Any, _body: Any) -> None:
        sent = f"{handler.path} {handler.headers['Authorization']}"
        handler.reply(code, sent.encode(), X_Seen=sent, Location=f"http://127.0.0.1{handler.path}")

    return reply


RUN = """
    import logging, os, sys, traceback
    from pathlib import Path
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
    from calibrated_rewards import CalibratedReward, ReferenceTable
    from calibrated_rewards.cli.main import main
    from calibrated_rewards.samplers.protocol import Decoding
    from calibrated_rewards.samplers.openai import OpenAISampler
    from calibrated_rewards.scorers.loading import load_scorer
    from calibrated_rewards.models.loading import (Placement)
    from calibrated_rewards.scorers.remote import Remote
    from calibrated_rewards.scorers.remote import Native
    from calibrated_rewards.scorers.remote_vllm import Vllm
    host, option = sys.argv[1], {"api_key": "option-zq7"}
    secret = f"http://user-zq1:pass-zq2@{host}/path-zq4/score?key=query%2Fzq3"
    os.environ["RM_URL"] = f"http://{host}/t/path-zq4/score?key=query%2Fzq3"
    policy = f"http://user-zq1:pass-zq2@{host}/v1?key=query%2Fzq3"
    Path("prompts.jsonl").write_text('{"prompt": "a"}\\\\n{"prompt": "b"}\\\\n')
    prompts = ["--prompts", "prompts.jsonl", "--policy-served-model", "m", "--max-tokens", "4"]
    calibrate = ["calibrate", *prompts, "-k", "4"]
    served = ["--served-model", "rm"]
    def told(number, *words):
        code = main([*words, "--debug"] if number is None else list(words))
        print("exit", code)
        assert number is None or code == number
    told(0, *calibrate, "--policy", policy, "--reward-model", secret, "--out", "run", *served)
    told(0, *calibrate, "--policy", f"http://{host}", "--reward-model", "$RM_URL", "--out", "other", *served)
    told(2, "reward", "run", "--reward-model", secret, "--out", "refused", *served)
    told(0, "reward", "run", "--reward-model", "$RM_URL", "--out", "reward", *served)
    told(0, "inspect", "run")
    told(0, "report", "run")
    told(2, "evaluate", "--policy", policy, "--policy", policy, "--reference", policy, "--prompts", "prompts.jsonl",
         "--reward", "reward", "--trust-remote-code", "--max-tokens", "4", "--policy-served-model", "m", "--out", "e")
    told(2, "calibrate", "--prompts", "prompts.jsonl", "--policy", secret, "--engine", "hf", "--max-tokens", "4",
         "--reward-model", "$RM_URL", "--out", "never", *served)
    told(2, "serve", "reward")
    reward = CalibratedReward.from_pretrained("reward", trust_remote_code=True)
    print(reward.verify(), reward, reward.scorer)
    reward.save_pretrained("again")
    Path("quoting").touch()
    vllm = Vllm("rm", options=option)
    for scorer in (reward.scorer, Remote(secret, Native("rm"), retries=0), Remote(secret, vllm, retries=0)):
        print(repr(scorer), scorer.address == secret, scorer.shown, scorer.fingerprint())
        for _ in range(2):
            try:
                scorer(["a"], ["1"])
            except Exception:
                traceback.print_exc()
    sampler = OpenAISampler(policy, "m", Decoding(max_tokens=2), extra=option, retries=0)
    print(sampler, sampler.fingerprint(), Placement(model_options={"use_auth_token": "option-zq7"}))
    for call in (lambda: sampler(["a"], [[1]]), lambda: load_scorer(secret), lambda: load_scorer(secret.upper())):
        try:
            call()
        except Exception:
            traceback.print_exc()
    told(2, "check-scorer", "--reward-model", secret.replace(host, "127.0.0.1:1"), *served)
"""


def test_a_run_shows_no_secret(tmp_path: Path) -> None:
    """Calibrate, reward, report, load, save, errors of every kind: all bytes of the output and of every file."""
    with serving(texts_and_scores) as server:
        seen: list[str] = []

        def answer(handler: Any, body: Any) -> Any:
            seen.append(f"{handler.path} {handler.headers['Authorization']}")
            quoting = (tmp_path / "quoting").exists()
            kinds = [echoing(401), echoing(200), echoing(307), echoing(500), reset]
            return (
                kinds[len(seen) % len(kinds)](handler, body) if quoting else handler.reply(200, texts_and_scores(body))
            )

        server.failures = [answer] * 1000
        host = server.url.removeprefix("http://")
        tokens = {"CALIBRATED_REWARDS_TOKEN": PLANTED["token"], "CALIBRATED_REWARDS_POLICY_TOKEN": PLANTED["policy"]}
        bound = {f"{name}_URL": server.url for name in tokens}
        fonts = {"MPLCONFIGDIR": matplotlib.get_configdir()}  # another HOME would have none yet
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RUN).replace("\\\\n", "\\n"), host],
            cwd=tmp_path,
            env={"PATH": "/usr/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", **fonts, **tokens, **bound},
            capture_output=True,
            check=False,
            timeout=120,
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output.decode()
    sent = " ".join(seen)
    for name in ("query", "path", "token", "policy"):  # they were there to be leaked
        assert PLANTED[name] in sent
    assert b"HTTP Request: POST http://" in output
    assert b"httpcore" in output
    assert b"[secret]" in output
    written = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {"reward.json", "run.json", "table.json", "report.html"} <= {file.name for file in written}
    assert json.loads((tmp_path / "again/reward.json").read_text())["scorer"]["url"] == "$RM_URL"
    assert not (tmp_path / "refused").exists() or not (tmp_path / "refused/reward.json").exists()
    for where, data in {"the output": output, **written}.items():
        leaked = [form for form in FORMS if form.encode() in data]
        lines = [line for line in data.splitlines() if b"zq" in line]
        assert not leaked, (where, leaked, lines[:5])


@pytest.mark.parametrize("failure", [None, status(500), echoing(401)])
def test_lines_of_httpx_keep_all_but_secrets(failure: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Method, host, known words of the path and status are there; requests of others stay as they are."""
    with serving(native, failure) as server, caplog.at_level(logging.DEBUG):
        url = server.url.replace("//", "//me:pass1234@") + "/rm-7b/score?key=query789"
        scorer = Remote(url, Native("rm"), retries=1, **QUICK)
        with suppress(ValueError):  # what its message shows is tested in test_remote.py
            scorer(*numbered(1))
        httpx.post("http://localhost:" + server.url.rpartition(":")[2] + "/others?key=public", json={"completions": []})
    lines = [record.getMessage() for record in caplog.records if record.name == "httpx"]
    assert f"HTTP Request: POST {server.url}/[...]/score" in lines[0]
    assert "/others?key=public" in lines[-1]
    assert not any(secret in caplog.text for secret in ("pass1234", "query789", "rm-7b"))


def test_what_is_shown_of_a_path() -> None:
    """Words that such servers use; anything else may be a token."""
    assert redact_url("http://h/v1/chat/completions") == "http://h/v1/chat/completions"
    assert redact_url("http://h/a1b2c3/score") == "http://h/[...]/score"
    assert redact_url("http://token@h:8/score?x#y") == "http://h:8/score"
    assert "hush" not in repr(Remote("http://h/hush", Vllm("m", options={"k": "hush"})))
