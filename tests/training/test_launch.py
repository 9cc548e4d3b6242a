"""The command `train` and what it is launched with: files to files, and inputs that do not fit."""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import tiny
import torch
from scipy.stats import entropy

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.cli.main import main
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import id_key
from calibrated_rewards.reward.calibrators import Uncalibrated, ZScore
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.named import NamedTransform, parse_transform
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl
from calibrated_rewards.theory.transforms import Identity, Log
from calibrated_rewards.training import launch
from calibrated_rewards.training.launch import Launch
from calibrated_rewards.training.loop import list_trainable, prepare_model
from calibrated_rewards.training.online import GRPOSettings, PPOSettings, TRLSettings, grpo, ppo, trl
from calibrated_rewards.training.run_folder import RunFolder

# The words of the command for each run, its module and its settings.
RUNS: dict[str, tuple[Any, Any]] = {
    "ppo": (ppo, PPOSettings),
    "grpo --plain": (grpo, GRPOSettings),
    "rloo": (trl, TRLSettings),
    "grpo": (trl, TRLSettings),
}
LOOPS = ["ppo", "grpo --plain"]
CHAT = [{"role": "user", "content": "Hi"}]


def asked(run: Path, out: Path, *options: str, **changes: Path) -> list[str]:
    """The options of a run of one step, as a list of words."""
    named = {"policy": run / "policy", "reward": run / "reward", "prompts": run / "prompts.jsonl", "out": out}
    words = [word for name, path in (named | changes).items() for word in (f"--{name}", str(path))]
    return [*words, "--completions", "2", "--prompts-a-step", "2", "--steps", "1", *options]


def launched(run: Path, **changes: Any) -> Launch:
    """The parts of a run of the fixture."""
    parts = {"policy": str(run / "policy"), "reward": str(run / "reward"), "prompts": str(run / "prompts.jsonl")}
    return Launch(**{**parts, "out": run / "out", **changes})


def train(name: str, words: list[str]) -> int:
    """Train with a trainer of the command line; its exit status."""
    trainer, *plain = name.split()
    return main(["train", trainer, *plain, *words])


def train_plain(words: list[str]) -> int:
    """Train with the plain loop of GRPO, without TRL; its exit status."""
    return train("grpo --plain", words)


def refused(capsys: Any, words: list[str], why: str) -> None:
    """The command ends with 2 and one line; with --debug, the error comes out itself."""
    assert train_plain(words) == 2
    said = capsys.readouterr().err  # with bars of the Hub's above it
    assert re.search(f"error: .*{why}", said.splitlines()[-1]), said
    assert "Traceback" not in said
    with pytest.raises((ValueError, OSError, KeyError), match=why):
        train_plain([*words, "--debug"])
    capsys.readouterr()


@pytest.mark.parametrize("name", RUNS)
def test_the_command_trains_and_saves(name: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    """Two steps from files to files: a model that loads and is another one, and a line of log for each step."""
    twice = ["--epochs", "2"] if name in LOOPS else []
    assert train(name, asked(run, tmp_path / "out", "--steps", "2", "--lr", "0.001", *twice)) == 0

    before, after = (tiny.LlamaForCausalLM.from_pretrained(p) for p in (run / "policy", tmp_path / "out/model"))
    assert (before.lm_head.weight - after.lm_head.weight).abs().max() > 1e-4
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert all(0 <= row["reward"] <= 1 and 0 < row["tokens"] <= 5 for row in rows)
    assert all(row["objective"] == pytest.approx(row["reward"] - 0.3 * row["kl"], abs=1e-5) for row in rows)
    assert all(row["u"] == pytest.approx(row["reward"]) for row in rows)  # the transform is none
    said, told = capsys.readouterr()
    per_step = 2 if name == "ppo" else 4
    assert f"2 steps of {per_step} completions, {2 * per_step} in all, of at most 5 tokens; each of 3 prompts" in told
    said = said.splitlines()
    assert said[0].startswith(f"step 0: reward {rows[0]['reward']:.4g}, u {rows[0]['u']:.4g}, KL ")
    assert said[-2:] == [f"model: {tmp_path / 'out/model'}", f"log: {tmp_path / 'out/log.jsonl'}"]


@pytest.mark.parametrize("name", RUNS)
def test_raw_scores_train_an_adapter(name: str, run: Path, tmp_path: Path) -> None:
    """Its rewards are the raw scores, its quantiles are logged all the same, and its base is the policy as it was."""
    words = ["--raw", "--beta", "2", "--lora-rank", "2", "--steps", "2", "--lr", "0.1"]
    assert train(name, asked(run, tmp_path / "out", *words)) == 0

    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert all(row["reward"] == pytest.approx(row["raw"]) for row in rows)
    assert all(0 <= row["u"] <= 1 for row in rows)
    assert all(row["objective"] == pytest.approx(row["reward"] - 2 * row["kl"], abs=1e-5) for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[1]["kl"]) > 1e-4
    adapted = tiny.LlamaForCausalLM.from_pretrained(tmp_path / "out/model")
    base = {n: p for n, p in adapted.named_parameters() if "lora" not in n}
    before = dict(tiny.LlamaForCausalLM.from_pretrained(run / "policy").named_parameters())
    assert all(torch.equal(p, before[n.replace(".base_layer", "")]) for n, p in base.items())
    assert len(base) == len(before)
    assert min(p.abs().max() for n, p in adapted.named_parameters() if "lora_B" in n) > 0


@pytest.mark.parametrize("name", ["grpo --plain", "rloo"])
def test_another_transform_is_trained_on(name: str, run: Path, tmp_path: Path) -> None:
    """Log, whose rewards are never positive, in place of none, at the beta that is said."""
    words = asked(run, tmp_path / "out", "--transform", "log", "--beta", "0.7", "--steps", "2")
    assert train(name, words) == 0
    for row in map(json.loads, (tmp_path / "out/log.jsonl").read_text().splitlines()):
        assert row["objective"] == pytest.approx(row["reward"] - 0.7 * row["kl"], abs=1e-6)
        assert row["reward"] <= np.log(row["u"]) + 1e-6 < 1e-6 or row["u"] == 1  # Jensen
    given = launch.load_reward(launched(run, transform=parse_transform("log"), beta=0.7))
    assert (given.transform, given.beta, given.id_column) == (Log(), 0.7, "prompt_id")


@pytest.mark.parametrize("name", ["exp:10:0.5", "identity:0.5", "log:0.5", "worst-of:2:0.5"])
def test_a_transform_for_a_kl_brings_its_beta(name: str, run: Path, capsys: Any, monkeypatch: Any) -> None:
    """That of the table: gaps between draws of its K references, tilted by their rewards, have that mean KL."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types take nearly all of the time here
    given = launch.load_reward(launched(run, transform=parse_transform(name)))
    kls = []
    for K in given.table.counts(np.arange(len(given.table))).tolist():
        gaps = np.diff(np.sort(np.random.default_rng(K).random((4000, K))), prepend=0.0, append=1.0)
        tilted = gaps * np.exp(values(scaled(given.transform, "unit"), K)[::2] / given.beta)
        tilted /= tilted.sum(axis=1, keepdims=True)
        kls.append(entropy(tilted, gaps, axis=1).mean())
    assert np.mean(kls) == pytest.approx(0.5, rel=0.06)
    assert f"at beta={given.beta:.4g} the policy that fits its rewards has KL 0.5 nats" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["exp:10:0.5", "identity:0.5", "log:0.5"])
def test_names_with_a_kl(name: str) -> None:
    """The KL is kept for the table; without one there is none, and what is no KL is refused."""
    assert parse_transform(name).kl == 0.5
    assert parse_transform(name.removesuffix(":0.5")).kl is None
    for wrong in (f"{name}:1", name.replace("0.5", "x"), name.replace("0.5", "-1")):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(wrong))):
            parse_transform(wrong)


@pytest.mark.parametrize(("last", "told"), [(0.12, "more steps or a larger"), (0.13, ""), (0.9, ""), (1.1, "smaller")])
def test_the_last_words_compare_with_the_optimum(last: float, told: str) -> None:
    """Of 3000 references without ties the identity's optimum has theory's KL; of raw and z-scores nothing is said."""
    table = ReferenceTable.build((f"p{i}", np.random.default_rng(i).normal(size=3000)) for i in range(9))
    reward = CalibratedReward(HashScorer(), table)
    rows = [{"step": i, "kl": kl} for i, kl in enumerate((5.0, last))]
    beta = beta_for_kl(Identity(), 0.5)
    said = launch.compare_with_optimum(rows, reward, beta).splitlines()
    assert said[0].startswith(f"this table, with its ties and K: at beta={beta:.4g} the policy that fits its rewards")
    assert told in "".join(said[1:])
    assert len(said) == 1 + bool(told)
    assert launch.compare_with_optimum(rows, replace(reward, calibration=Uncalibrated(), beta=None), 1.0) == ""
    assert launch.compare_with_optimum(rows, replace(reward, calibration=ZScore()), 1.0) == ""


def test_the_last_words_know_of_ties() -> None:
    """Of rewards of 0 and 1 the table's KL, by enumeration, and theory's, which is another."""
    table = ReferenceTable.build((f"p{i}", [0.0] * 6 + [1.0] * 2) for i in range(5))
    said = launch.compare_with_optimum(
        [{"step": 0, "kl": 0.1}], CalibratedReward(HashScorer(), table), 0.2
    ).splitlines()
    ones = 0.25 * np.exp(0.875 / 0.2) / (0.25 * np.exp(0.875 / 0.2) + 0.75 * np.exp(0.375 / 0.2))
    kl = entropy([1 - ones, ones], [0.75, 0.25])
    assert f"has KL {kl:.3g} nats" in said[0]
    assert said[1].startswith("theory, for scores without ties")
    assert "the last steps' KL, 0.1, is far below that" in said[2]


def test_prompts_that_tie_are_left_out(run: Path, tmp_path: Path, capsys: Any) -> None:
    """By the option alone, told with the reason, and part of which run it is; the others are trained on."""
    reward = CalibratedReward.from_pretrained(run / "reward")
    prompts = tiny.texts(3)
    rows = [(prompt, [0.0, 0.0, 0.0, float(i)]) for i, prompt in enumerate(prompts)]
    tied = ReferenceTable.build([(*row, [id_key(i)]) for i, row in enumerate(rows)], meta=reward.table.meta)
    replace(reward, table=tied).save_pretrained(tmp_path / "reward")
    words = {"reward": str(tmp_path / "reward")}
    assert len(launch.load_inputs(launched(run, **words)).prompts) == 3
    assert "left out" not in capsys.readouterr().err
    inputs = launch.load_inputs(launched(run, **words, most_ties=1.0))
    assert [each.prompt for each in inputs.prompts] == prompts[1:]
    assert "1 of 3 prompts are left out: 1 whose references all tie\n" in capsys.readouterr().err
    out = tmp_path / "out"
    assert train("rloo", asked(run, out, "--least-spread", "0.75", reward=tmp_path / "reward")) == 0
    assert "2 of 3 prompts are left out: 1 whose references all tie, 1 whose" in capsys.readouterr().err
    assert json.loads((out / "settings.json").read_text())["prompts"]["number"] == 1
    refused(capsys, asked(run, tmp_path / "none", "--most-ties", "0.1", reward=tmp_path / "reward"), "3 of 3 prompts")


def test_a_beta_besides_that_of_a_kl_is_told(run: Path, capsys: Any) -> None:
    """Both numbers, where they differ; where they do not, nothing."""
    named = NamedTransform("identity:0.5", Identity(), 0.5)
    solved = launch.load_reward(launched(run, transform=named)).beta
    assert "this table, with its ties and K" in capsys.readouterr().err
    for beta, told in ((5.0, True), (solved, False)):
        assert launch.load_reward(launched(run, transform=named, beta=beta)).beta == beta
        said = capsys.readouterr().err
        assert (f"identity:0.5 takes beta={solved:.6g} on this table, got --beta 5: " in said) == bool(said) == told


@dataclass(frozen=True)
class Stopping:
    """A trained model at whose saving somebody presses Ctrl-C."""

    def save_pretrained(self, at: Path) -> None:
        """Write the first of its files, and be interrupted."""
        at.mkdir()
        (at / "config.json").write_text("{}")
        raise KeyboardInterrupt


def test_force_leaves_nothing_of_the_run_before(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """No adapter beside whole weights, no settings of TRL's; a model only whole, and of the run whose log is there."""
    out = tmp_path / "out"
    assert train_plain(asked(run, out, "--lora-rank", "2")) == 0
    assert (out / "model/adapter_config.json").exists()
    (out / "settings.json").write_text("{}")
    assert train_plain(asked(run, out, "--lr", "0.01", "--force")) == 0
    assert {each.name for each in out.iterdir()} == {"log.jsonl", "model", ".lock", "settings.json"}
    told = json.loads((out / "settings.json").read_text())
    assert (told["recipe"], told["settings"]["lr"], told["reward"]["beta"]) == ("grpo_plain", 0.01, 0.3)
    assert not [*(out / "model").glob("adapter*")]
    trained, start = (tiny.LlamaForCausalLM.from_pretrained(at) for at in (out / "model", run / "policy"))
    assert (trained.lm_head.weight - start.lm_head.weight).abs().max() > 1e-4

    def stopped(*_: Any) -> Stopping:
        return Stopping()

    with monkeypatch.context() as patched:
        patched.setattr(grpo, "train", stopped)
        assert train_plain(asked(run, out, "--force")) == 130
    assert not (out / "model").exists()
    assert not (out / "log.jsonl").read_text()
    assert train_plain(asked(run, out)) == 2
    assert train_plain(asked(run, out, "--force")) == 0
    assert (out / "model/model.safetensors").exists()


def test_a_loop_leaves_alone_what_it_must(run: Path, tmp_path: Path, capsys: Any) -> None:
    """A folder where another process trains, a model without a log, and the policy that it is to begin with."""
    with RunFolder(tmp_path).reserve():
        refused(capsys, asked(run, tmp_path, "--force"), f"{tmp_path} is for one run at a time, and another process")
    kept = Path(tiny.saved(tiny.causal(), tmp_path / "model", tiny.tokenizer()))
    refused(capsys, asked(run, tmp_path), f"{kept} is of another run")
    refused(capsys, asked(run, tmp_path, "--force", policy=kept), f"--policy is {kept}")
    refused(capsys, asked(run, kept), f"{kept} is a model's folder")
    assert (kept / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "code", "told"), [("KeyboardInterrupt", 130, "stopped"), ("ValueError('why')", 2, "error: why (--debug")]
)
def test_ctrl_c_in_the_imports_is_no_traceback(error: str, code: int, told: str, tmp_path: Path) -> None:
    """The first long import of the trainer, in its place one that fails: one line, and an error says what it is."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(f"raise {error}")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "calibrated_rewards", "train", "rloo", "--help"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"calibrated-rewards train: {told}" in done.stderr


def test_ctrl_c_is_no_traceback(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """One line, and the exit status that shells know."""

    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "run", interrupted)
    assert train_plain(asked(run, tmp_path / "out")) == 130
    assert f"stopped; its files so far are in {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_beta_that_is_said_is_not_the_rewards(run: Path, tmp_path: Path) -> None:
    """The reward's beta is the default, no more."""
    reward = run / "reward"
    inputs = launch.load_inputs(launched(run))
    assert inputs.complete(PPOSettings()).beta == 0.3
    assert launch.load_inputs(launched(run, beta=0.2)).complete(PPOSettings(beta=0.2)).beta == 0.2
    replace(CalibratedReward.from_pretrained(reward), beta=None).save_pretrained(tmp_path / "reward")
    inputs = launch.load_inputs(launched(run, reward=str(tmp_path / "reward")))
    assert inputs.complete(PPOSettings()).beta == PPOSettings().beta


def test_another_policy_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Other weights, another tokenizer or template than those that drew the references; --any-policy goes on."""
    others = {
        "weights": (tiny.causal(seed=1), tiny.tokenizer()),
        "tokenizer": (tiny.causal(), tiny.tokenizer(bos=False)),
        "template": (tiny.causal(), tiny.tokenizer(template=tiny.TEMPLATE.replace("|end|", "|assistant|"))),
    }
    for what, (model, tokenizer) in others.items():
        at = Path(tiny.saved(model, tmp_path / what, tokenizer))
        refused(capsys, asked(run, tmp_path / "out", policy=at), f"the policy's .*{what}.*--any-policy")
    adapted = prepare_model(tiny.LlamaForCausalLM.from_pretrained(run / "policy"), 2)
    for weight in list_trainable(adapted):
        weight.data.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    refused(capsys, asked(run, tmp_path / "out", policy=tmp_path / "adapter"), "the policy's weights are others")
    assert train_plain(asked(run, tmp_path / "out", "--any-policy", policy=tmp_path / "weights")) == 0


def test_weights_are_compared_in_the_precision_that_drew(tmp_path: Path, capsys: Any) -> None:
    """A table that bfloat16 drew is of the policy that is now loaded in float32, and not of another one."""
    at = tiny.saved(tiny.causal().bfloat16(), tmp_path / "policy", tiny.tokenizer())
    told = load_sampler(at, Decoding(5)).fingerprint()
    assert told["dtype"] == "bfloat16"
    whole = Policy(tiny.LlamaForCausalLM.from_pretrained(at, dtype="float32"), tiny.tokenizer(), Decoding(5), Text())
    launch.check_policy(whole, {"sampler": told})
    with pytest.raises(ValueError, match="weights are others"):
        launch.check_policy(replace(whole, model=tiny.causal(seed=1)), {"sampler": told})
    assert "not checked" not in capsys.readouterr().err
    for sampler in ({}, "my policy", ["my policy"], {"weights": told["weights"], "kind": "hf"}, None):
        launch.check_policy(whole, {"sampler": sampler})
        assert "not checked" in capsys.readouterr().err
    launch.check_policy(whole, {"sampler": {**told, "text": ["chat"]}})


def test_what_cannot_be_right_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Other decoding, files that are not there, unknown prompts, and a log of another run."""
    out = tmp_path / "out"
    refused(capsys, asked(run, out, "--temperature", "0.5"), r"temperature.0\.9, got .*temperature.0\.5")
    refused(capsys, asked(run, out, prompts=tmp_path / "none.jsonl"), "is no file or folder")
    refused(capsys, asked(run, out, policy=tmp_path / "none"), "none")
    refused(capsys, asked(run, out, "--completions", "1"), "completions.1")
    refused(capsys, asked(run, out, "--raw"), "say --beta")
    refused(capsys, asked(run, out, "--raw", "--transform", "log"), "without a transform")
    refused(capsys, asked(run, out, "--transform", "log"), "--transform log says no KL, and so no beta")
    with pytest.raises(SystemExit):
        train_plain(asked(run, out, "--transform", "exp:"))
    (tmp_path / "strange.jsonl").write_text(json.dumps({"prompt": "?", "prompt_id": 99}))
    refused(capsys, asked(run, out, prompts=tmp_path / "strange.jsonl"), "'[?]'")
    assert not out.exists()
    out.mkdir()
    (out / "log.jsonl").write_text("{}\n")
    refused(capsys, asked(run, out), "of another run: .*--force")
    assert train_plain(asked(run, out, "--force")) == 0


def test_an_id_that_leads_to_another_prompt_is_refused() -> None:
    """A chat whose id is that of a text, a text with the id of another one; an id alone leads to no other prompt."""
    table = ReferenceTable.build([("Hi", [0.0, 1.0], [id_key(1)]), (CHAT, [0.0], [id_key(2)]), (id_key(3), [0.0])])
    reward = CalibratedReward(HashScorer(), table, id_column="id")
    launch.check_prompts(reward, [Asked("Hi", 1), Asked(CHAT, 2), Asked("any", 3), Asked("Hi"), Asked(CHAT)])
    for wrong in (Asked([*CHAT, *CHAT], 1), Asked("Ho", 2), Asked("Ho", 1)):
        with pytest.raises(ValueError, match=rf"\(id {wrong.id}\) as another prompt, or in another form"):
            launch.check_prompts(reward, [Asked("Hi", 1), wrong])
    for mixed in (Asked(CHAT, 1), Asked("Hi", 2)):
        with pytest.raises(KeyError, match="of two prompts of the table"):
            launch.check_prompts(reward, [Asked("Hi", 1), mixed])


@pytest.mark.parametrize("name", RUNS)
def test_help_teaches(name: str, capsys: Any) -> None:
    """It opens with what the file does, and says of each setting what it is for."""
    with pytest.raises(SystemExit):
        train(name, ["--help"])

    shown = " ".join(capsys.readouterr().out.split())
    module, settings = RUNS[name]
    assert inspect.getdoc(module).splitlines()[0] in shown
    for each in fields(settings):
        assert f"--{each.name.replace('_', '-')}" in shown
        assert " ".join(each.metadata["help"].split()) in shown
    choices = {"ppo": "{no,centre,scale}", "grpo --plain": "{leave-one-out,group-mean}"}
    assert choices.get(name, "--transform NAME") in shown
    assert "--lr FLOAT" in shown
    assert "--steps N" in shown


def test_decoding_is_the_tables() -> None:
    """Length and temperature come from the table unless they are said; what bends the distribution is refused."""
    meta = {"sampler": {"decoding": Decoding(7, temperature=0.5).fingerprint()}}

    assert launch.choose_decoding(meta, None, None) == Decoding(7, temperature=0.5)
    assert launch.choose_decoding(meta, 7, 0.5) == Decoding(7, temperature=0.5)
    for other in ((9, None), (None, 1.0)):
        with pytest.raises(ValueError, match=r"drawn with (max_tokens=7|temperature=0.5), got .*--any-policy"):
            launch.choose_decoding(meta, *other)
    assert launch.choose_decoding(meta, 9, 1.0, any_policy=True) == Decoding(9)
    ended = {"sampler": {"decoding": Decoding(7, stop_token_ids=(5,)).fingerprint()}}
    assert launch.choose_decoding(ended, None, None).stop_token_ids == (5,)
    with pytest.raises(ValueError, match=r"drawn with \{'top_p': 0.9\}"):
        launch.choose_decoding({"sampler": {"decoding": Decoding(7, top_p=0.9).fingerprint()}}, None, None)
    for sampler in (None, "my policy", ["my policy"], {"decoding": "greedy"}, {"decoding": ["greedy"]}):
        with pytest.raises(ValueError, match="--max-tokens"):
            launch.choose_decoding({"sampler": sampler}, None, None)
        assert launch.choose_decoding({"sampler": sampler}, 3, None) == Decoding(3)
