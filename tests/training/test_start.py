"""Plain loops that begin with a model trained from the policy, while KL and table are still the policy's."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from calibrated_rewards.cli.main import main
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.training import loop
from calibrated_rewards.training.launch import Launch, load_inputs
from calibrated_rewards.training.loop import prepare_model

LOOPS = (["ppo"], ["grpo", "--plain"])


@pytest.fixture
def moved(run: Path, tmp_path: Path) -> Path:
    """The policy after some training: its weights are others."""
    model = AutoModelForCausalLM.from_pretrained(run / "policy", dtype="float32")
    with torch.no_grad():
        model.lm_head.weight.add_(0.3 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator()))
    return Path(tiny.saved(model, tmp_path / "moved", tiny.tokenizer()))


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """An adapter on the policy that is not 0."""
    model = prepare_model(AutoModelForCausalLM.from_pretrained(run / "policy", dtype="float32"), 2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=1.0, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def train(loop_words: list[str], run: Path, out: Path, *options: str) -> int:
    """Train two short steps by the command line; its exit status."""
    words = [f"--{name}={run / name}" for name in ("policy", "reward")] + [f"--prompts={run / 'prompts.jsonl'}"]
    words += [f"--out={out}", "--completions=16", "--prompts-a-step=2", "--steps=2", "--lr=1e-6", *options]
    return main(["train", *loop_words, *words])


def read_log(out: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's log.jsonl, one for each step."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# The table is checked against the policy: another model in its place is refused (test_launch.py).
# PEFT asks models by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("words", LOOPS, ids=" ".join)
@pytest.mark.parametrize("kind", ["moved", "adapter"])
def test_a_run_begins_where_it_is_told(
    words: list[str], kind: str, run: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The first step's KL, to the policy, is above 0; what is saved is the start after an update, of the same kind."""
    start = request.getfixturevalue(kind)
    assert train(words, run, tmp_path / "out", "--start", str(start)) == 0

    rows = read_log(tmp_path / "out")
    assert rows[0]["kl"] > 0.01
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["start"] == str(start)
    assert settings["policy"] == str(run / "policy")
    if kind == "moved":
        before, after = (tiny.LlamaForCausalLM.from_pretrained(at) for at in (start, tmp_path / "out/model"))
    else:
        bases = (AutoModelForCausalLM.from_pretrained(run / "policy", dtype="float32") for _ in range(2))
        places = (start, tmp_path / "out/model")
        before, after = (PeftModel.from_pretrained(base, at) for base, at in zip(bases, places, strict=True))
    changes = {n: (w - dict(before.named_parameters())[n]).abs().max() for n, w in after.named_parameters()}
    assert max(changes.values()) < 1e-5
    assert {n for n, change in changes.items() if change > 0}
    assert all("lora" in n for n, change in changes.items() if change > 0) == (kind == "adapter")


def test_the_kl_is_to_the_policy(run: Path, moved: Path, tmp_path: Path) -> None:
    """A first step from the moved model, against log-ratios by hand over the same completions."""
    parts = {name: str(run / name) for name in ("policy", "reward")}
    launch = Launch(**parts, prompts=str(run / "prompts.jsonl"), out=tmp_path, start=str(moved))
    policy = load_inputs(launch).policy
    assert policy.decoding == Decoding(5, temperature=0.9)
    model, reference = loop.load_start(launch, policy.model)
    assert reference is policy.model
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert all(weight.requires_grad for weight in model.parameters())
    there = tiny.LlamaForCausalLM.from_pretrained(moved)
    assert torch.equal(model.lm_head.weight, there.lm_head.weight)


def test_starts_that_do_not_fit_are_refused(run: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    """An adapter at another rank, a model of other tokens, and a start that --force would remove."""
    other = tiny.saved(tiny.causal(vocab_size=300), tmp_path / "other", tiny.tokenizer())
    inside = tmp_path / "out/model"
    for start, words, why in (
        (adapter, ("--lora-rank", "4"), "trained further at its own rank, got --lora-rank 4"),
        (other, (), "has the policy's 264 tokens, got .*other with 300"),
        (inside, ("--force",), "--start is .*out/model, which --force would remove"),
    ):
        inside.mkdir(parents=True, exist_ok=True)
        with pytest.raises((ValueError, FileExistsError), match=why.replace("--lora-rank 4", ".*rank.4")):
            train(LOOPS[1], run, tmp_path / "out", "--start", str(start), "--debug", "--force", *words)
        capsys.readouterr()
