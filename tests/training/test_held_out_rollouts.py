"""The check on held-out rollouts while a policy trains: its numbers by plain forward passes, in runs of the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from calibrated_rewards import CalibratedReward
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.shards import read_table
from calibrated_rewards.cli.main import main
from calibrated_rewards.evaluation import Samples, check_log_ratios
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers import load_scorer
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.training.held_out import HeldOutRollouts

PROMPTS = tiny.texts(5)
TRAINED, HELD_OUT = PROMPTS[:2], PROMPTS[2:]
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that ends now and then, a calibration with two scorers, and the prompts that are trained on."""
    root = tmp_path_factory.mktemp("held_out")
    model = tiny.causal()
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] = model.lm_head.weight.mean(0) + 0.1
        model.lm_head.weight.mul_(10)
    tiny.saved(model, root / "policy", tiny.tokenizer())
    tiny.saved(tiny.classifier(), root / "rm", tiny.tokenizer())
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": each}) for each in TRAINED))
    draw = load_sampler(root / "policy", Decoding(5, temperature=TEMPERATURE), dtype="float32")
    scorer = load_scorer(root / "rm", dtype="float32")
    tables = calibrate(PROMPTS, draw, {"reward": scorer, "judge": HashScorer(2)}, k=6, out=root / "run")
    CalibratedReward(scorer, tables["reward"], beta=0.3).save_pretrained(root / "reward")
    return Path(root)


def read_rollouts(run: Path) -> list[dict[str, Any]]:
    """The rows of the files, as they are."""
    files = sorted((run / "run" / "rollouts").glob("*.parquet"))
    return [row for file in files for row in read_table(file).to_pylist()]


def log_probability(model: Any, prompt: str, completion: list[int]) -> float:
    """One completion by itself, by a plain forward pass."""
    opening = tiny.tokenizer()(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([opening + completion])).logits[0, len(opening) - 1 : -1] / TEMPERATURE
    return float(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())


def check_by_hand(run: Path, model: Any, beta: float = 0.3) -> Any:
    """The check of the held-out prompts by plain forward passes, and Phi / beta - log Z of the reward's ranks."""
    reference = AutoModelForCausalLM.from_pretrained(run / "policy").eval()
    d, select, judge, targets = [], [], [], []
    rows = read_rollouts(run)
    for prompt in HELD_OUT:
        own = [row for row in rows if row["key"] == prompt_key(prompt)]
        d.append([])
        for row in own:
            ids = tiny.tokenizer()(row["completion"], add_special_tokens=False)["input_ids"]
            # A token that is no text by itself makes three as text: as many are read as were drawn at most.
            ids = (ids if row["finish"] == "length" else [*ids, tiny.EOS])[:5]
            d[-1].append(log_probability(model, prompt, ids) - log_probability(reference, prompt, ids))
        scores = np.array([row["score:reward"] for row in own])
        equal = (scores[:, None] == scores).sum(1) - 1  # each among the others
        u = ((scores[:, None] > scores).sum(1) + equal / 2) / (len(scores) - 1)
        select.append(scores)
        judge.append([row["score:judge"] for row in own])
        targets.append(u / beta - np.log(np.exp(u / beta).mean()))
    return check_log_ratios(d, Samples(select, judge), targets)


def train(run: Path, out: Path, name: str, *options: str) -> list[dict[str, Any]]:
    """Run the command for two steps, and read its log."""
    words = ["--policy", run / "policy", "--reward", run / "reward", "--prompts", run / "prompts.jsonl", "--out", out]
    sizes = ["--completions", "2", "--prompts-a-step", "2", "--steps", "2", "--lr", "0.0005"]
    assert main(["train", *name.split(), *map(str, words), *sizes, *options]) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without seconds and without the check."""
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "held_out/"))} for row in rows]


@pytest.mark.parametrize(
    ("name", "options"),
    [("rloo", []), ("rloo", ["--lora-rank", "2"]), ("grpo --plain", []), ("ppo", ["--lora-rank", "2"])],
)
def test_a_run_logs_what_plain_forward_passes_give(
    name: str, options: list[str], run: Path, tmp_path: Path, capsys: Any
) -> None:
    """After the last step the numbers are those of the saved model; the run is the one that it would be without."""
    check = ["--check-rollouts", str(run / "run"), "--check-every", "5", "--judge", "judge"]
    rows = train(run, tmp_path / "checked", name, *options, *check)
    said, told = capsys.readouterr()
    assert "a check every 5 steps on 3 held-out prompts, 18 rollouts of " in told
    assert f"held-out check after step 1: KL {rows[1]['held_out/kl']:.3g}, correlation with the target " in said
    plain = train(run, tmp_path / "plain", name, *options)
    assert untimed(rows) == untimed(plain)
    assert not any(key.startswith("held_out/") for key in rows[0])
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "checked" / "model")  # an adapter brings its base
    expected = check_by_hand(run, model.eval()).metrics()
    found = {key: value for key, value in rows[1].items() if key.startswith("held_out/")}
    assert found.keys() == expected.keys()
    assert expected["held_out/kl"] > 1e-3
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_a_check_is_of_the_model_that_training_begins_with(run: Path, tmp_path: Path) -> None:
    """With --start another model than the policy is trained: the KL is that of the saved model, not 0."""
    moved: Any = AutoModelForCausalLM.from_pretrained(run / "policy")
    with torch.no_grad():
        moved.lm_head.weight.add_(torch.randn(moved.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)))
    start = tiny.saved(moved, tmp_path / "moved", tiny.tokenizer())
    options = ["--start", start, "--check-rollouts", str(run / "run"), "--check-every", "1", "--judge", "judge"]
    rows = train(run, tmp_path / "out", "grpo --plain", *options)

    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    expected = check_by_hand(run, model.eval()).metrics()
    assert expected["held_out/kl"] > 0.01
    assert rows[-1]["held_out/kl"] == pytest.approx(expected["held_out/kl"], rel=1e-3)
    assert rows[0]["held_out/kl"] > 0.01


def load(run: Path, **options: Any) -> HeldOutRollouts:
    """The rollouts, read from Python."""
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    policy = Policy(model, tiny.tokenizer(), Decoding(options.pop("tokens", 5), TEMPERATURE), Text())
    reward = CalibratedReward.from_pretrained(run / "reward")
    return HeldOutRollouts.load(run / "run", reward, policy, **options)


def test_the_model_is_left_as_it_was(run: Path) -> None:
    """Modes, gradients and random numbers stay; the reference against itself is exactly neutral."""
    rollouts = load(run, trained_on=TRAINED, judge="judge", prompts=2)
    model: Any = rollouts.reader.model
    model.train()
    model.model.layers[0].eval()
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    check = rollouts.check()
    assert check.kl.value == 0
    assert (check.prompts, check.rollouts) == (2, 12)
    assert [part.training for part in model.modules()] == modes
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert "2 held-out prompts, 12 rollouts of" in str(rollouts)


def test_of_many_rollouts_the_first_are_read(run: Path) -> None:
    """Tokens, scores and targets are those of the same rollouts."""
    whole = load(run, trained_on=TRAINED, judge="judge")
    few = load(run, trained_on=TRAINED, judge="judge", rollouts=4)
    for i in range(len(HELD_OUT)):
        assert few.groups[i].completions == whole.groups[i].completions[:4]
        assert few.reference[i].tolist() == pytest.approx(whole.reference[i][:4].tolist(), rel=1e-5)
        np.testing.assert_array_equal(few.samples.select[i], whole.samples.select[i][:4])
        np.testing.assert_array_equal(few.samples.judge[i], whole.samples.judge[i][:4])
        np.testing.assert_array_equal(few.targets[i], whole.targets[i][:4])


def test_a_policy_too_far_for_a_check_does_not_end_the_run(run: Path, capsys: Any) -> None:
    """No metrics and a line that says so; a check that is asked for is an error."""
    rollouts = load(run, trained_on=TRAINED)
    found = rollouts.measure()
    assert found is not None
    assert found.metrics()["held_out/kl"] == 0
    far = replace(rollouts, reference=[each - 800 for each in rollouts.reference])
    with pytest.raises(ValueError, match="below 700"):
        far.check()
    assert far.measure() is None
    assert "no held-out check, for the policy is too far from the reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layers", "changed", "from_states"), [(0, "model.norm", False), (1, "model.norm", True), (1, "layers.0", False)]
)
def test_another_model_is_read_on_as_many_rollouts_as_asked_for(
    run: Path, layers: int, changed: str, from_states: bool
) -> None:
    """Log-ratios are those of plain forward passes; states are left out for a model that has other lower layers."""
    reward = CalibratedReward.from_pretrained(run / "reward")
    reference, other = (AutoModelForCausalLM.from_pretrained(run / "policy").eval() for _ in range(2))
    policy = Policy(reference, tiny.tokenizer(), Decoding(5, temperature=TEMPERATURE), Text())
    rollouts = HeldOutRollouts.load(run / "run", reward, policy, trained_on=TRAINED, rollouts=4, layers=layers)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if changed in name:
                weight.mul_(1.2)
    assert (rollouts.follow(other).groups[0].states is not None) == from_states
    for group, log_ratios in zip(rollouts.groups, rollouts.compute_log_ratios(other), strict=True):
        prompt = next(each for each in HELD_OUT if tiny.tokenizer()(each)["input_ids"] == group.prompt)
        read = [
            log_probability(other, prompt, row) - log_probability(reference, prompt, row) for row in group.completions
        ]
        assert len(read) == 4
        np.testing.assert_allclose(log_ratios, read, atol=1e-4)
    np.testing.assert_allclose(rollouts.compute_log_ratios(), 0, atol=1e-5)


def test_what_cannot_be_checked_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    """No prompt left over, a length of other rollouts, an unknown judge, a judge alone, and another policy."""
    with pytest.raises(ValueError, match="none of its prompts is: leave some out"):
        load(run, trained_on=PROMPTS)
    with pytest.raises(ValueError, match="1 of its prompts is: leave some out"):
        load(run, trained_on=PROMPTS[1:])
    with pytest.raises(ValueError, match="drawn with max_tokens=5, got max_tokens=7"):
        load(run, tokens=7)
    with pytest.raises(ValueError, match=r"have scores of .*, got 'nobody'"):
        load(run, judge="nobody")
    with pytest.raises(ValueError, match="whole prompts >= 1, got prompts=0"):
        load(run, prompts=0)
    words = ["--policy", run / "policy", "--reward", run / "reward", "--prompts", run / "prompts.jsonl"]
    command = ["train", "grpo", "--plain", *map(str, words), "--out", str(tmp_path / "out")]
    assert main([*command, "--judge", "judge"]) == 2
    assert "--judge is a scorer of --check-rollouts, got --judge judge alone" in capsys.readouterr().err
    assert main([*command, "--check-rollouts", str(tmp_path)]) == 2
    assert "needs rollouts" in capsys.readouterr().err
