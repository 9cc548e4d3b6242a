"""Offline training: the loop against an enumerable optimum, and runs that are killed, shared out, or end at a KL."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import enumerable
import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors import safe_open
from training_files import BETA, PROMPTS, SMALL, TEMPERATURE, TOKENS, offline_command as words, write_offline_files
from transformers import AutoModelForCausalLM

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.cli.main import main
from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.theory.finite_k import log_partition
from calibrated_rewards.training.offline import trained_weights
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.groups import PromptGroup, ReferenceFile, load_groups, split_groups
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.train import OfflineSettings, choose_completions, choose_prompts, train
from calibrated_rewards.training.offline.trained_weights import TrainedWeights, find_factor, named_trainable
from calibrated_rewards.training.run_folder import RunFolder

# Tokens of a completion in the exact world.
LENGTH = 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with a token a letter, its calibration, and the reward, without a model."""
    return write_offline_files(Path(tmp_path_factory.mktemp("offline")))


def small(files: Path, out: Path, *more: str) -> list[str]:
    """The command of the run that the tests compare with."""
    return words(files, out, *SMALL.split(), *more)


def logged(out: Path) -> list[dict[str, Any]]:
    """The log, without what depends on the machine."""
    rows = RunFolder(out).read_log()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def weights(out: Path) -> bytes:
    """The model's file."""
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(files: Path) -> Path:
    """The run from its first step to its last in one go."""
    assert main(small(files, files / "whole")) == 0
    return files / "whole"


def exact_group(problem: enumerable.Problem, row: int, beta: float, drawn: int | None) -> PromptGroup:
    """All completions of a prompt once, or as often as in so many exact draws; rewards are those of the true law."""
    names = enumerable.completions(problem.length)
    rewards = enumerable.PHI[problem.phi][1](problem.quantiles()[row])
    counts = np.ones(len(names), int) if drawn is None else np.round(problem.laws[row] * drawn).astype(int)
    at = np.repeat(np.arange(len(names)), counts)
    log_z = float(np.log((problem.laws[row] * np.exp(rewards / beta)).sum()))
    tokens = Group(list(enumerable.tokens(enumerable.PROMPTS[row])), [list(names[i]) for i in at])
    scores, prompt = problem.scores[row][at].astype(np.float64), enumerable.PROMPTS[row]
    return PromptGroup(prompt.encode(), prompt, tokens, scores, rewards[at], beta, log_z, None)


@pytest.mark.parametrize(
    ("loss", "phi", "drawn"),
    [("regression", "exp:10", None), ("centred", "identity", None), ("control-variate", "log", 100)],
)
def test_the_loop_converges_to_the_enumerated_optimum(loss: str, phi: str, drawn: int | None, tmp_path: Path) -> None:
    """Regressions from all completions alike, the control variate from completions in the law's proportions."""
    model = enumerable.Tabular(LENGTH, skew=1.0)
    problem = enumerable.Problem.of(model, LENGTH, phi)
    beta = problem.beta()
    groups = [exact_group(problem, row, beta, drawn) for row in range(len(enumerable.PROMPTS))]
    size = max(len(group.rewards) for group in groups)
    options = {"steps": 80, "prompts_a_step": 4, "completions": size, "rows": size, "held_out": 0.0, "layers": 0}
    settings = OfflineSettings(loss=loss, beta=beta, optimizer="adamw", lr=0.3, max_grad_norm=1e9, **options)
    before = problem.distances(model, beta).max()

    train(GroupReader(model), groups, [], settings, RunFolder(tmp_path), ReferenceFile(tmp_path / "reference", "a"))

    # Even exact proportions of draws are rounded.
    assert problem.distances(model, beta).max() < (0.03 if drawn is None else 0.06)
    assert before > 0.4


def test_rollouts_are_read_as_they_were_drawn(files: Path) -> None:
    """Tokens, rewards and log Z of every rollout, against the table and the sampler's own log-probabilities."""
    reward = CalibratedReward.from_pretrained(files / "reward", transform=Exponential(5.0))
    model = AutoModelForCausalLM.from_pretrained(files / "policy")
    policy = Policy(model, enumerable.tokenizer(), Decoding(TOKENS, TEMPERATURE), Text())

    loaded = load_groups(files / "table", reward, policy, BETA)

    assert loaded.as_drawn == 1
    assert {group.prompt for group in loaded.groups} == {*PROMPTS}
    for group in loaded.groups:
        texts = [enumerable.text(tuple(ids)) for ids in group.tokens.completions]
        raw = reward.raw([group.prompt] * 8, texts)
        for i in range(8):  # each among the seven others
            others = ReferenceTable.build([(group.prompt, np.delete(raw, i))])
            expected = CalibratedReward(None, others, Exponential(5.0)).from_scores([group.prompt], raw[i : i + 1])
            assert group.rewards[i] == pytest.approx(float(expected[0]), abs=1e-6)
        assert np.exp(group.rewards / BETA - group.log_z).mean() == pytest.approx(1)
        unit = np.expm1(5 * np.arange(8) / 7) / np.expm1(5.0)
        assert group.exact_log_z == pytest.approx(np.log(np.exp(unit / BETA).mean()))
    assert log_partition(Exponential(5.0), BETA, 7) != group.exact_log_z  # the reward is on the unit scale


def test_a_run_goes_down_in_loss_and_says_what_came_of_it(whole: Path) -> None:
    """The log has a row a step, with a held-out check every third; the first step is at the reference."""
    rows = logged(whole)

    assert [row["step"] for row in rows] == [*range(16)]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["ess"] == pytest.approx(6)
    assert np.mean([row["loss"] for row in rows[-4:]]) < 0.9 * np.mean([row["loss"] for row in rows[:4]])
    assert np.mean([row["corr"] for row in rows[-4:]]) > 0.3
    assert [row["step"] for row in rows if "held_out/kl" in row] == [2, 5, 8, 11, 14, 15]
    assert json.loads((whole / "model" / "training.json").read_text())["alpha"] == 1


@pytest.mark.parametrize("more", [(), ("--cache-states",)])
def test_a_short_run_reads_the_prompts_of_its_steps_alone(files: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """The reference's log-probabilities are computed for what a step or a check reads, not for all prompts."""
    words = small(files, tmp_path, "--steps", "1", "--prompts-a-step", "2", "--held-out", "0", "--layers", "1", *more)
    assert main(words) == 0

    with safe_open(tmp_path / "reference.safetensors", "pt") as file:
        assert len([*file.keys()]) == 2 < len(PROMPTS)


KILLED = """
import os, signal, sys
from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.training.offline import trained_weights
write, count = trained_weights.write_file, 0
def write_or_die(path, text):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
trained_weights.write_file = write_or_die
from calibrated_rewards.cli.main import main
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(files: Path, whole: Path, capsys: Any) -> None:
    """Killed while it writes its third checkpoint, and started again: the same bytes, and the same log."""
    out = files / "killed"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    done = subprocess.run([sys.executable, "-c", KILLED, *small(files, out)], env=env, check=False, timeout=300)

    assert done.returncode == -9
    assert len(logged(out)) == 6
    assert not (out / "model").exists()
    reference = (out / "reference.safetensors").stat().st_mtime_ns
    assert main(small(files, out)) == 0
    assert "checkpoint-6 was cut short" in capsys.readouterr().err
    assert weights(out) == weights(whole)
    assert logged(out) == logged(whole)
    assert (out / "reference.safetensors").stat().st_mtime_ns == reference
    assert not (out / "checkpoints").exists()


def test_another_run_in_the_folder_is_refused(files: Path, whole: Path, capsys: Any) -> None:
    """Other settings are another run; the same ones have nothing left to do."""
    assert main(small(files, whole, "--seed", "1")) == 2
    assert "has a run with other settings" in capsys.readouterr().err
    assert main(small(files, whole)) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--layers", "0", "--kl", "0.1"], ["--layers", "1", "--kl", "0.01"],
     ["--lora-rank", "2", "--optimizer", "adamw", "--lr", "0.02", "--kl", "0.1"]],
    ids=["all", "layers", "lora"],
)  # fmt: skip
def test_a_run_ends_at_the_kl_that_is_asked_for(options: list[str], files: Path, tmp_path: Path, capsys: Any) -> None:
    """The saved model's KL on the held-out rollouts, by plain forwards of it and of the reference."""
    out, asked = tmp_path / "run", float(options[-1])
    assert main([*small(files, out), *options]) == 0

    reference = AutoModelForCausalLM.from_pretrained(files / "policy").eval()
    trained = AutoModelForCausalLM.from_pretrained(files / "policy").eval()
    if "--lora-rank" in options:
        with ignore_peft_warning():
            trained = PeftModel.from_pretrained(trained, out / "model").eval()
    else:
        trained = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    policy = Policy(reference, enumerable.tokenizer(), Decoding(TOKENS, TEMPERATURE), Text())
    groups = load_groups(files / "table", CalibratedReward.from_pretrained(files / "reward"), policy, BETA).groups
    terms = []
    for group in split_groups(groups, 0.3, 0)[1]:
        ours, theirs = (GroupReader(model, TEMPERATURE)(group.tokens).double() for model in (trained, reference))
        log_ratio = ours - theirs
        terms.append(float((log_ratio.exp() * log_ratio - log_ratio.exp() + 1).mean()))
    outcome = json.loads((out / "model" / "training.json").read_text())
    assert np.mean(terms) == pytest.approx(asked, rel=0.03)
    assert outcome["held_out"]["held_out/kl"] == pytest.approx(np.mean(terms), rel=1e-3)
    assert outcome["alpha"] != 1
    assert f"{asked:.3g} was asked for" in capsys.readouterr().out


@pytest.mark.parametrize("target", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_the_factor_of_a_kl_is_found(power: float, target: float) -> None:
    """Of KLs that rise as other powers than the square, in few measurements."""
    calls = []

    def measure(factor: float) -> float:
        calls.append(factor)
        return 0.3 * factor**power

    factor, kl = find_factor(measure, target, measure(1.0))

    best = min((target / 0.3) ** (1 / power), 2.0)
    assert factor == pytest.approx(best, rel=0.025)
    assert kl == pytest.approx(0.3 * best**power, rel=0.025)
    assert len(calls) < 8


def test_a_factor_is_on_the_difference_to_the_start() -> None:
    """Of all weights by their values, of adapters by the product that they add to a weight."""
    model = tiny.causal()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    kept = TrainedWeights.of(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    kept.scale(0.25)

    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, start[name] + 0.25 * (trained[name] - start[name]))


def test_only_the_last_layers_are_trained() -> None:
    """The layers and the norm behind them; of as many layers as there are, all weights."""
    few = trained_weights.select_weights(tiny.causal(num_hidden_layers=3), 2, 0, 0)
    everything = trained_weights.select_weights(tiny.causal(), 10, 0, 0)

    layers = {name.split(".")[2] for name, _ in named_trainable(few) if ".layers." in name}
    assert layers == {"1", "2"}
    assert {name for name, _ in named_trainable(few) if ".layers." not in name} == {"model.norm.weight"}
    assert all(weight.requires_grad for weight in everything.parameters())


def test_each_prompt_comes_once_before_any_comes_again() -> None:
    """Steps do not depend on those before them, so that a run can begin at any; rollouts are drawn without repeats."""
    settings = OfflineSettings(prompts_a_step=4, completions=3)
    order = [i for step in range(5) for i in choose_prompts(10, settings, step)]
    group = PromptGroup(b"a", "a", Group([1], [[i] for i in range(8)]), np.arange(8.0), np.arange(8.0), 1.0, 0.0, None)
    logprobs = {b"a": torch.arange(8.0)}

    drawn = [choose_completions(group, settings, step, 0, logprobs) for step in range(200)]

    assert sorted(order[:10]) == sorted(order[10:]) == [*range(10)]
    assert order[:10] != order[10:]
    for part, reference in drawn:
        assert part.rewards.tolist() == reference.tolist() == [row[0] for row in part.tokens.completions]
        assert len(set(part.rewards.tolist())) == 3
    counts = np.bincount([int(i) for part, _ in drawn for i in part.rewards], minlength=8)
    assert counts.min() > 45  # 75 on average, with a standard deviation below 7


def test_settings_that_no_run_can_be_made_with_are_refused(files: Path, tmp_path: Path, capsys: Any) -> None:
    """Each with the option and the value."""
    for options, message in [
        ("--loss best", "a loss is weighted"),
        ("--held-out 1", "below 1, got --held-out 1"),
        ("--held-out 0 --kl 0.1", "got --held-out 0"),
        ("--held-out 0.99", "12 of 12 prompts held out leave none to train on"),
        ("--lr 0", "got --lr 0"),
        ("--check-steps 0", "got --check-steps 0"),
        ("--loss ipo:40", "40 rollouts compete in --loss ipo:40, got prompts with"),
        (
            "--loss top-1:3 --completions 2",
            "3 rollouts compete in --loss top-1:3, got prompts with 8, and --completions 2",
        ),
    ]:
        assert main(words(files, tmp_path / "out", *options.split())) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_raw_scores_are_learned_too(files: Path, tmp_path: Path, capsys: Any) -> None:
    """--raw with its own beta: targets are the scores over beta, up to a constant."""
    assert main(small(files, tmp_path / "raw", "--raw", "--beta", "2", "--steps", "1", "--held-out", "0")) == 0

    settings = json.loads((tmp_path / "raw" / "settings.json").read_text())
    assert (settings["settings"]["beta"], settings["reward"]["kind"]) == (2, "raw")
    assert "checked" not in capsys.readouterr().out


def test_help_teaches(capsys: Any) -> None:
    """It opens with what the run does, asks for rollouts in place of prompts, and says what each setting is for."""
    with pytest.raises(SystemExit):
        main(["train", "offline", "--help"])

    shown = " ".join(capsys.readouterr().out.split())
    assert "Learn the optimum from the rollouts of a calibration" in shown
    assert "--rollouts DIR" in shown
    assert "--prompts FILE" not in shown
    for each in fields(OfflineSettings):
        assert f"--{each.name.replace('_', '-')}" in shown
        assert " ".join(each.metadata["help"].split()) in shown


def test_kept_states_change_nothing(files: Path, tmp_path: Path) -> None:
    """With --cache-states the last layer is trained as it is by reading the whole model."""
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    assert main([*small(files, plain), "--layers", "1"]) == 0
    assert main([*small(files, kept), "--layers", "1", "--cache-states"]) == 0

    for name in ("loss", "kl", "grad_norm"):
        expected = [row[name] for row in logged(plain)]
        assert [row[name] for row in logged(kept)] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_no_states_are_kept_where_all_layers_are_trained(files: Path, tmp_path: Path, capsys: Any) -> None:
    """There are none below; the run goes on, and says why."""
    options = ("--layers", "0", "--cache-states", "--steps", "1", "--held-out", "0")
    assert main([*small(files, tmp_path / "all"), *options]) == 0

    assert "layers are trained, so no states are kept" in capsys.readouterr().err


def test_steps_below_the_rounding_of_16_bits_add_up() -> None:
    """A hundred steps, each a tenth of what bfloat16 tells apart, move a weight; what is saved has all of them."""
    model = tiny.causal().to(torch.bfloat16)
    name, weight = named_trainable(model)[0]
    before = weight.detach().double().clone()
    weights = TrainedWeights.of(model)
    step = before * 2**-5 / 100

    for _ in range(100):
        weight.grad = -step.to(torch.bfloat16)
        weights.collect_gradients()
        with torch.no_grad():
            weights.masters[name] -= weights.masters[name].grad
        weights.publish()
    moved = dict(model.named_parameters())[name].detach().double()
    assert weight.grad is None
    assert ((moved - before) * before).sum() == pytest.approx(float((before**2).sum()) * 2**-5, rel=0.05)

    weights.widen()

    saved = dict(model.named_parameters())[name]
    assert saved.dtype == torch.float32
    np.testing.assert_allclose(saved.detach().double(), before * (1 + 2**-5), rtol=2e-4)


def test_a_policy_in_16_bits_is_saved_in_32(files: Path, tmp_path: Path) -> None:
    """Trained in bfloat16, the model that is left is in float32, and differs from the policy."""
    assert main([*small(files, tmp_path / "run"), "--dtype", "bfloat16", "--any-policy"]) == 0

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    start = AutoModelForCausalLM.from_pretrained(files / "policy", dtype=torch.bfloat16)
    assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
    pairs = zip(trained.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(one.bfloat16(), other) for one, other in pairs)
