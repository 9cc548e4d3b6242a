"""The demo in miniature: all of it, stopped in the middle and taken up again, and its reward models."""

import contextlib
import io
import json
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from calibrated_rewards.cli.demo import assets, reward_models
from calibrated_rewards.cli.demo.assets import Rated, make_folder, make_tiny_prompts
from calibrated_rewards.cli.demo.command import format_frontier
from calibrated_rewards.cli.demo.pipeline import ARMS
from calibrated_rewards.cli.demo.side_by_side import Part
from calibrated_rewards.cli.main import STOPPED, main
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.theory.procedures import WorstOf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo from start to end."""
    out, printed = tmp_path_factory.mktemp("demo") / "whole", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--quick", "--out", str(out)]) == 0
    (out / "said.txt").write_text(printed.getvalue())
    return out


def test_all_parts_are_there_and_agree(whole: Path) -> None:
    """What it leaves can be opened by the public names, and what it says is what they hold."""
    said = (whole / "said.txt").read_text()
    compared = HeldOutPolicies.load(whole / "held_out.json")
    assert [*compared.checks] == ["raw", "worst-of-16"]
    assert str(compared) in said
    assert said.splitlines()[-1] == compared.claim("worst-of-16", "raw", WorstOf(16))
    assert format_frontier(FrontierEstimate.load(whole / "frontier.json")) in said
    assert "nothing else" in said.splitlines()[2]  # that random models mean nothing is said first
    reward = CalibratedReward.from_pretrained(whole / "reward")
    assert reward.table.meta["sampler"]["decoding"]["max_tokens"] == 4
    assert "On held-out rollouts" in (whole / "report.html").read_text()
    for name in compared.checks:
        assert len((whole / name / "log.jsonl").read_text().splitlines()) == 3
        outcome = json.loads((whole / name / "model" / "training.json").read_text())
        assert outcome["held_out"]["held_out/kl"] == pytest.approx(0.01, rel=0.03)  # all are brought to one KL


def test_the_comparison_is_that_of_the_saved_policies(whole: Path) -> None:
    """Log-ratios by plain forwards of each saved policy, in float32 and without a shared prompt, give the same KL."""
    compared = HeldOutPolicies.load(whole / "held_out.json")
    rows = [
        row
        for path in sorted((whole / "held-out/rollouts").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    tokenizer = AutoTokenizer.from_pretrained(whole / "miniature/policy")
    prompts = make_tiny_prompts(18)[12:]

    def read(model: Any, row: Any) -> float:
        start = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ended = [0] if row["finish"] == "stop" else []
        ids = torch.tensor([start + tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + ended])
        logprobs = (model(ids).logits[0, :-1] / 0.8).log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum())

    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(whole / "miniature/policy", dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(whole / "raw/model", dtype=torch.float32)
        by_prompt = {prompt: [row for row in rows if row["prompt"] == prompt] for prompt in prompts}
        d = np.array([[read(model, row) - read(reference, row) for row in each] for each in by_prompt.values()])
    kl = float((np.exp(d) * d - np.exp(d) + 1).mean())
    assert compared.checks["raw"].kl.value == pytest.approx(kl, rel=0.15)  # those of the demo are read in bfloat16


def test_goes_on_after_ctrl_c_with_the_same_numbers(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped while it trains side by side, it finishes in one process when called again, as if nothing had been."""
    out = tmp_path / "stopped"
    trains: list[BaseProcess] = []

    def stop_when_all_train(part: Part) -> None:
        show(part)
        if part.name in ARMS:
            trains.append(part.process)
        if len(trains) == len(ARMS):
            assert all(process.is_alive() for process in trains)
            raise KeyboardInterrupt

    show = Part.show
    with monkeypatch.context() as patched:
        patched.setattr(Part, "show", stop_when_all_train)
        assert main(["demo", "--quick", "--out", str(out), "--processes", "2"]) == STOPPED
    assert not any(process.is_alive() for process in trains)
    assert capfd.readouterr().err.endswith("calibrated-rewards demo: stopped\n")
    assert not (out / "held_out.json").exists()
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    for name in ("held_out.json", "frontier.json"):
        assert json.loads((out / name).read_text()) == json.loads((whole / name).read_text())
    # Another policy is added to those that are there.
    assert main(["demo", "--quick", "--identity", "--out", str(out)]) == 0
    two, three = (HeldOutPolicies.load(each / "held_out.json").checks for each in (whole, out))
    assert [*three] == [*two, "identity"]
    assert {name: three[name] for name in two} == two


def test_another_demo_in_the_same_folder_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sizes or seeds are not mixed."""
    assert main(["demo", "--quick", "--seed", "1", "--out", str(whole)]) == 2
    assert "seed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--quick", "--seed", "-1", "--out", str(whole)])
    assert "--seed: needs a whole number >= 0, got '-1'" in capsys.readouterr().err


def test_a_reward_model_in_the_middle_of_its_epoch_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after some batches, it has the weights of one that was not."""
    monkeypatch.setattr(reward_models, "OFTEN", 1)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    base = BertModel(BertConfig(vocab_size=tiny.VOCABULARY, **shape))
    at = Path(tiny.saved(base, tmp_path / "base", tiny.tokenizer(template=None)))
    texts = [Rated("Movie: ", text, float(i % 9 - 4)) for i, text in enumerate(tiny.texts(200))]

    def stop_at_fourth(learner: reward_models.Learner, done: int, path: Path) -> None:
        save(learner, done, path)
        if done == 4:
            raise KeyboardInterrupt

    save = reward_models.Learner.save
    reward_models.train(at, texts, tmp_path / "once", tmp_path / "once.so-far")
    monkeypatch.setattr(reward_models.Learner, "save", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        reward_models.train(at, texts, tmp_path / "twice", tmp_path / "twice.so-far")
    monkeypatch.setattr(reward_models.Learner, "save", save)
    reward_models.train(at, texts, tmp_path / "twice", tmp_path / "twice.so-far")
    same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert same == other
    assert same != (at / "model.safetensors").read_bytes()


def test_what_is_half_made_does_not_count(tmp_path: Path) -> None:
    """A folder of the cache is there when it is whole, and is then not made again."""

    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no more room")

    def right(folder: Path) -> None:
        (folder / "whole").touch()

    with pytest.raises(OSError, match="no more room"):
        make_folder(tmp_path, "thing", broken)
    assert not (tmp_path / "thing").exists()
    assert make_folder(tmp_path, "thing", right) == make_folder(tmp_path, "thing", broken) == tmp_path / "thing"
    assert [each.name for each in (tmp_path / "thing").iterdir()] == ["whole"]
    assert not [*tmp_path.glob("*.partial-*")]


def test_prompts_are_different_and_the_models_disagree(tmp_path: Path) -> None:
    """In miniature: prompts that a table would not take for one another, and a judge that is not the reward model."""
    assert len({*assets.make_tiny_prompts(50)}) == 50
    assets.save_tiny_reward_models(tmp_path)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("reward-model", "judge"))
    assert one != two
