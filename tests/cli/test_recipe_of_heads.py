"""The recipe of docs/guides/heads.md, command by command, with a tiny model: from preferences to served completions."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny

from calibrated_rewards import CalibratedReward
from calibrated_rewards.cli.main import main

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "heads.md"
# What makes a real run a tiny one.
SMALL = {
    "train head": "--steps 3 --pairs-a-step 4 --held-out 0.3 --eval-steps 1000 --save-steps 1000",
    "calibrate": "-k 12 --quiet",
    "check-scorer": "--no-sign --spare-seconds 0",
    "train rloo": "--steps 2 --prompts-a-step 2 --completions 2",
    "generate": "--quiet",
}


def read_commands(block: int = 0) -> list[list[str]]:
    """The words of each command of a block of the guide."""
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    lines = blocks[block].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines]


def shrink(words: list[str]) -> list[str]:
    """The same command with few steps and short completions."""
    name = " ".join(words[:2]) if words[0] == "train" else words[0]
    words = [{"256": "6", "16": "2"}.get(word, word) for word in words]
    return [*words, *SMALL.get(name, "").split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, preferences and prompts under the names of the guide."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny.saved(tiny.causal(3), folder / "sft", tiny.tokenizer())
    tiny.saved(tiny.classifier(4), folder / "rm", tiny.tokenizer())
    chats = [[{"role": "user", "content": f"question {i}"}] for i in range(12)]
    rows = [{"prompt": chat, "chosen": [_answer("a" * 5)], "rejected": [_answer("b" * 5)]} for chat in chats]
    for name, own in {"preferences": rows, "prompts": chats[:4], "test": chats[4:6]}.items():
        lines = own if name == "preferences" else [{"prompt": chat} for chat in own]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _answer(text):
    return {"role": "assistant", "content": text}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_recipe_runs(folder, monkeypatch, caplog, capsys):
    """Every command of it, in order; what is served are the best of 8 by the head that was trained."""
    monkeypatch.chdir(folder)
    commands = read_commands()
    assert [words[0] for words in commands] == [
        *("train", "check-scorer", "calibrate", "recommend", "reward", "train", "generate"),
    ]
    for words in commands:
        capsys.readouterr()
        with caplog.at_level("INFO"):
            code = main(shrink(words))
        # What so small a model is worth is not the question here.
        output = capsys.readouterr()
        assert code == 0 or words[0] in ("check-scorer",), (words, output.err)
        if words[0] == "recommend":  # what it says to do next is the next command of the guide
            assert "--reward-model head/model --transform best-of:8:0.5" in output.out
    assert "sft: one model writes and scores" in caplog.text
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [row["draws"] for row in rows] == [8, 8]
    reward = CalibratedReward.from_pretrained("reward")
    scores = reward.raw([row["prompt"] for row in rows], [row["completion"] for row in rows])
    np.testing.assert_allclose(scores, [row["score"] for row in rows], atol=1e-4)
    assert reward.verify().worst < 1e-3
    run_snippets()


def test_the_recipe_from_a_reward_model_runs(folder, monkeypatch, capsys):
    """The guide's second recipe: rollouts, pairs of two by the reward model's scores, a head from them.

    How well so small a head learns is not the question here.
    """
    monkeypatch.chdir(folder)
    for words in read_commands(1):
        capsys.readouterr()
        short = [{"head/": "head-of-rm/", "32": "12"}.get(word, word) for word in words]
        assert main(shrink(short)) == 0, capsys.readouterr().err
    assert (folder / "head-of-rm" / "model" / "preference_head.safetensors").exists()


def run_snippets():
    """The guide's Python, with the files that its commands left, as one script: on a CPU, and without a log."""
    script = "\n".join(re.findall(r"^```python3\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL))
    here = 'RLOOConfig("run-trl", bf16=False, use_cpu=True, report_to="none", max_steps=2, '
    script = script.replace("max_tokens=256", "max_tokens=6").replace('RLOOConfig("run-trl", ', here)
    assert here in script
    names = {}
    exec(compile(script, str(GUIDE), "exec"), names)
    choice = names["best"].choose([[{"role": "user", "content": "question 1"}]], [[0]])[0][0]
    assert choice.score == max(choice.scores)
    assert names["scorer"].headed.model is not names["headed"].model  # the second block's, on the policy
    assert names["reward"].scorer is names["scorer"]
