"""RLOO and GRPO by TRL: what runs learn, write and resume from, with tiny models."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.theory.transforms import Identity, Log
from calibrated_rewards.training import progress
from calibrated_rewards.training.callbacks import TimedReward
from calibrated_rewards.training.check_settings.check import check_settings
from calibrated_rewards.training.loop import make_head_contiguous, prepare_model
from calibrated_rewards.training.online import TRLSettings, train_grpo, train_rloo, trl
from calibrated_rewards.training.run_folder import RunFolder

PROMPTS = tiny.texts(3)
ASKED = [Asked(prompt) for prompt in PROMPTS]
SMALL = {"prompts_a_step": 2, "completions": 2, "lr": 1e-3, "rows": 2}
DECODING = Decoding(5, temperature=0.9)
TIMES = {"seconds", "seconds_drawing", "seconds_scoring", "seconds_lookup"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: Any) -> Path:
    """A saved policy that ends its completions now and then."""
    model = tiny.causal()
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] = model.lm_head.weight.mean(0) + 0.1
        model.lm_head.weight.mul_(10)
    return Path(tiny.saved(model, tmp_path_factory.mktemp("policy") / "it", tiny.tokenizer()))


def calibrated(scorer: Any = None) -> CalibratedReward:
    """A reward whose references are drawn by nobody, which is no cause for alarm."""
    rng = np.random.default_rng(0)
    table = ReferenceTable.build([(p, rng.normal(size=16)) for p in PROMPTS])
    return CalibratedReward(scorer or HashScorer(), table, Log(), alarm=False)


def weights(at: Path) -> dict[str, torch.Tensor]:
    """What was saved."""
    return dict(AutoModelForCausalLM.from_pretrained(at, dtype="float32").state_dict())


def logged(out: Path) -> list[dict[str, Any]]:
    """The rows of a log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what differs from run to run."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def endless() -> Any:
    """A tokenizer without an end token, and without one for padding."""
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    return tokenizer


@dataclass(eq=False)
class Dying:
    """A reward model that is interrupted at one of its calls."""

    dies_at: int
    asked: list[tuple[str, str]] = field(default_factory=list)
    calls: int = 0

    def __call__(self, prompts: Any, completions: Any) -> Any:
        """Scores, or Ctrl-C."""
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.asked += zip(prompts, completions, strict=True)
        return HashScorer()(prompts, completions)

    def fingerprint(self) -> dict[str, Any]:
        """That of the one that does not die."""
        return {"kind": "dying"}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("train", [train_rloo, train_grpo])
def test_a_run_that_was_interrupted_is_the_run_that_was_not(
    train: Any, rank: int, policy: Path, tmp_path: Path
) -> None:
    """Ctrl-C in the fourth of five steps, the last checkpoint of which is two steps old: weights, log and drawing."""
    settings = TRLSettings(steps=5, lora_rank=rank, save_steps=2, **SMALL)

    def run(scorer: Dying, out: Path) -> Path:
        return train(policy, calibrated(scorer), ASKED, DECODING, settings, out, show_progress=False)

    whole, first, second = Dying(0), Dying(4), Dying(0)
    model = run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "parts")
    assert [row["step"] for row in logged(tmp_path / "parts")] == [0, 1, 2]
    resumed = run(second, tmp_path / "parts")

    assert first.asked[:8] + second.asked == whole.asked  # step 2 happened twice, and was the same
    assert first.asked[8:] == second.asked[:4]
    expected = weights(model)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert untimed(logged(tmp_path / "parts")) == untimed(logged(tmp_path / "whole"))
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"settings.json", "log.jsonl", "model", ".lock"}
    start = weights(policy)
    assert max((start[name] - value).abs().max() for name, value in expected.items() if name in start) > 1e-4 or rank
    (tmp_path / "parts/checkpoints/checkpoint-5").mkdir(parents=True)  # ended between the model and the cleaning up
    assert run(Dying(1), tmp_path / "parts") == resumed  # finished: nothing is scored any more
    assert not (tmp_path / "parts/checkpoints").exists()


@dataclass(eq=False)
class Recorded:
    """A reward that is any function: it keeps the tokens that it was given."""

    ids: list[list[list[int]]] = field(default_factory=list)

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        """The share of lower bytes, of each completion."""
        self.ids.append(completion_ids)
        return [float(np.mean(np.array(own) < 100)) for own in completion_ids]


@pytest.mark.parametrize("train", [train_rloo, train_grpo])
def test_the_logged_kl_is_that_of_whole_completions(train: Any, policy: Path, tmp_path: Path) -> None:
    """Against log-ratios of the two models themselves, for the tokens that were drawn in the second step.

    The policy that wrote them is what a run of one step leaves. RLOO's KL is the mean log-ratio; GRPO's is the sum of
    e^-x - 1 + x over tokens.
    """
    seen = Recorded()
    one = TRLSettings(steps=1, **SMALL | {"completions": 4, "rows": 8, "lr": 1e-3})
    after = train(policy, seen, ASKED, DECODING, one, tmp_path / "one", show_progress=False)
    two = replace(one, steps=2, beta=0.3)
    train(policy, seen, ASKED, DECODING, replace(two, beta=one.beta), tmp_path / "two", show_progress=False)
    row = logged(tmp_path / "two")[1]
    prompts = [prompt for prompt in trl.build_dataset(ASKED, two, None)["prompt"][2:4] for _ in range(4)]

    ratios = [log_ratios(after, policy, prompt, own) for prompt, own in zip(prompts, seen.ids[2], strict=True)]

    per = (lambda x: x) if train is train_rloo else (lambda x: np.exp(-x) - 1 + x)
    expected = float(np.mean([per(own).sum() for own in ratios]))
    assert abs(expected) > 1e-3
    assert row["tokens"] > 1.2
    assert row["kl"] == pytest.approx(expected, rel=1e-3)
    assert row["tokens"] == np.mean([len(own) for own in seen.ids[2]])
    assert row["objective"] == pytest.approx(row["reward"] - one.beta * row["kl"])
    assert "u" not in row
    assert TIMES - {"seconds_lookup"} < set(row)


def log_ratios(after: Path, before: Path, prompt: str, completion: list[int]) -> Any:
    """Of each token of a completion, by a plain forward pass without padding."""
    begins = tiny.tokenizer()(prompt)["input_ids"]
    each = []
    for at in (after, before):
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(at, dtype="float32")
            logits = model(torch.tensor([[*begins, *completion]])).logits[0, len(begins) - 1 : -1].double()
        each.append((logits / DECODING.temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return (each[0] - each[1]).numpy()


# PEFT asks models by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_is_a_policy_again(policy: Path, tmp_path: Path) -> None:
    """With transformers, and as a sampler: the adapter that was trained, on the base that was named."""
    settings = TRLSettings(steps=2, lora_rank=2, **SMALL)
    raw = replace(calibrated(), calibration=Uncalibrated(), beta=None)
    at = train_rloo(policy, raw, ASKED, DECODING, settings, tmp_path, show_progress=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy, dtype="float32"), at).eval()
    moved = [value.abs().max() for name, value in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14  # seven linear layers in each of two; not the head
    assert min(moved) > 0
    seeds = [[1, 2, 3]] * len(PROMPTS)
    expected = HfSampler(model, tiny.tokenizer(), DECODING, Text())(PROMPTS, seeds)
    assert load_sampler(at, DECODING, dtype="float32")(PROMPTS, seeds) == expected
    assert expected != load_sampler(policy, DECODING, dtype="float32")(PROMPTS, seeds)
    row = logged(tmp_path)[0]
    assert row["reward"] == pytest.approx(row["raw"])
    assert 0 < row["u"] < 1
    assert row["seconds_lookup"] < row["seconds_scoring"] < row["seconds"]


def test_half_precision_has_adapters_in_float32(policy: Path) -> None:
    """Small steps would be rounded away; and on a CPU the head gets rows that lie together."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(policy, dtype="bfloat16")
    states = torch.randn(2, 3, 32, dtype=torch.bfloat16)[:, -1:]
    given = []
    adapted = prepare_model(model, 2)
    model.lm_head.register_forward_pre_hook(lambda _, args: given.append(args[0].is_contiguous()))
    assert torch.equal(model.lm_head(states), plain.lm_head(states))
    assert given == [True]
    assert not states.is_contiguous()
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    whole = AutoModelForCausalLM.from_pretrained(policy, dtype="float32")
    make_head_contiguous(whole)
    assert not whole.lm_head._forward_pre_hooks


def test_another_run_does_not_go_on_here(policy: Path, tmp_path: Path) -> None:
    """Settings, reward, prompts or decoding that differ are named; so is a log of something else."""
    settings = TRLSettings(steps=1, **SMALL)
    given = [policy, calibrated(), ASKED, DECODING, settings]
    train_rloo(*given, tmp_path / "run", show_progress=False)
    others = {
        "settings.lr was 0.001, is 0.02": {4: replace(settings, lr=0.02)},
        "reward.kind was 'calibrated', is 'raw'": {1: replace(calibrated(), calibration=Uncalibrated(), beta=None)},
        "prompts.number was 3, is 2": {2: ASKED[:2]},
        "decoding.max_tokens was 5, is 6": {3: Decoding(6, temperature=0.9)},
        "reward.transform was 'Log": {1: replace(calibrated(), transform=Identity())},
    }
    for why, changes in others.items():
        with pytest.raises(ValueError, match=why):
            train_rloo(*[changes.get(i, each) for i, each in enumerate(given)], tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/log.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="without settings"):
        train_rloo(*given, tmp_path / "other")


def test_a_checkpoint_that_was_cut_short_is_none(tmp_path: Path, capsys: Any) -> None:
    """The newest of those that have the file that is written last, whole; by number, not by letters.

    The others go when the run goes on, or the trainer would keep them as its newest.
    """
    folder = RunFolder(tmp_path)
    assert folder.find_checkpoint() is None
    for step, state in {9: "{}", 10: "{}", 11: None, 12: "{", 13: "", 14: "[]"}.items():
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        if state is not None:
            (tmp_path / f"checkpoints/checkpoint-{step}/trainer_state.json").write_text(state)
    assert folder.find_checkpoint() == str(tmp_path / "checkpoints/checkpoint-10")
    folder.begin({})
    assert sorted(int(each.name[11:]) for each in folder.checkpoints.iterdir()) == [9, 10]
    assert capsys.readouterr().err.count("was cut short") == 4


def test_a_run_goes_on_from_before_a_torn_checkpoint(policy: Path, tmp_path: Path, capsys: Any) -> None:
    """It says which one was cut short, begins anew if there is no other, and is the run that it would have been."""
    settings = TRLSettings(steps=3, save_steps=2, **SMALL)

    def run(scorer: Dying, out: Path) -> Path:
        return train_rloo(policy, calibrated(scorer), ASKED, DECODING, settings, out, show_progress=False)

    whole = run(Dying(0), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Dying(3), tmp_path / "parts")
    state = tmp_path / "parts/checkpoints/checkpoint-2/trainer_state.json"
    os.truncate(state, state.stat().st_size // 2)
    capsys.readouterr()
    resumed = run(Dying(0), tmp_path / "parts")
    assert f"{state.parent} was cut short" in capsys.readouterr().err
    assert untimed(logged(tmp_path / "parts")) == untimed(logged(tmp_path / "whole"))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def test_two_runs_do_not_train_in_one_folder(policy: Path, tmp_path: Path) -> None:
    """The second one is told where and why, whoever is first; a run's own other processes go on without the lock."""
    settings = TRLSettings(steps=1, **SMALL)
    with RunFolder(tmp_path).reserve(), RunFolder(tmp_path).reserve(main=False):
        with pytest.raises(ValueError, match=f"{tmp_path} is for one run at a time, and another process"):
            train_rloo(policy, calibrated(), ASKED, DECODING, settings, tmp_path, show_progress=False)
        assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    with RunFolder(tmp_path).reserve():
        pass


@pytest.mark.parametrize("train", [train_rloo, train_grpo])
def test_the_settings_are_faithful(train: Any, tmp_path: Path) -> None:
    """What check_settings has against them is nothing, in one process and in two; parts are all of one size."""
    settings = TRLSettings(beta=0.3, prompts_a_step=6, completions=4, rows=5)
    for processes, rows in ((1, 4), (2, 4), (3, 4), (4, 3)):
        assert trl.share_completions(settings, processes) == (24 // processes, rows)
    with pytest.raises(ValueError, match="24 for 5"):
        trl.share_completions(settings, 5)
    args = train.configure(settings, DECODING, RunFolder(tmp_path))
    report = check_settings(args, beta=0.3)
    assert report.problems == ()
    assert report.beta == pytest.approx(0.3)
    assert (args.max_completion_length, args.temperature, args.min_p) == (5, 0.9, None)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"prompts": [Asked("a"), Asked([{"role": "user", "content": "b"}])]}, "all texts or all messages"),
        ({"decoding": Decoding(5, stop=("x",))}, "tokens alone"),
        ({"policy": tiny.causal()}, "path or an id"),
        ({"tokenizer": endless()}, "eos_token, got a tokenizer that has none"),
    ],
)
def test_what_trl_cannot_do_is_refused(wrong: dict[str, Any], why: str, policy: Path, tmp_path: Path) -> None:
    """Before anything is trained."""
    given = {"policy": policy, "prompts": ASKED, "decoding": DECODING, "tokenizer": tiny.tokenizer(), **wrong}
    settings = TRLSettings(steps=1, **SMALL)
    with pytest.raises(ValueError, match=why):
        train_rloo(reward=calibrated(), settings=settings, out=tmp_path, **given)
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, [0, 1]), (30.0, [])])
def test_a_line_now_and_then_where_there_is_no_terminal(
    seconds: float, lines: list[int], policy: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Of each step that comes so long after the last line; its numbers are those of the log."""
    monkeypatch.setattr(progress, "BETWEEN_LINES", seconds)
    train_rloo(policy, calibrated(), ASKED, DECODING, TRLSettings(steps=2, **SMALL), tmp_path)
    rows, said = logged(tmp_path), capsys.readouterr().err.splitlines()
    shown = [f"reward {rows[i]['reward']:.4g}, u {rows[i]['u']:.4g}, kl {rows[i]['kl']:.4g}" for i in lines]
    lined = [line.partition("; about ") for line in said if line.startswith("step ")]
    assert all(left.endswith(" left") for *_, left in lined)
    assert [line for line, *_ in lined] == [f"step {i} of 2: {each}" for i, each in zip(lines, shown, strict=True)]


def test_adapters_on_the_last_layers_alone() -> None:
    """All linear layers of the last one, none of those before it, and not the head."""
    adapted = {name for name, _ in prepare_model(tiny.causal(), 2, 1).named_parameters() if "lora_A" in name}
    whole = {name for name, _ in prepare_model(tiny.causal(), 2).named_parameters() if "lora_A" in name}

    assert adapted == {name for name in whole if ".layers.1." in name}
    assert len(adapted) == 7
    with pytest.raises(ValueError, match="has 2 layers to adapt, got lora_layers=3"):
        prepare_model(tiny.causal(), 2, 3)


@pytest.mark.parametrize(
    "name", ["steps", "prompts_a_step", "completions", "lora_rank", "lora_layers", "rows", "save_steps"]
)
def test_settings_name_what_is_wrong(name: str) -> None:
    """And what it got."""
    with pytest.raises(ValueError, match=f"{name} >= [0-2], got {name}=-1"):
        TRLSettings(**{name: -1})


def test_end_tokens_of_the_table_end_completions(policy: Path, tmp_path: Path) -> None:
    """Every token but a few ends a completion, besides the model's own."""
    seen = Recorded()
    ends = Decoding(5, stop_token_ids=tuple(range(4, tiny.VOCABULARY)))
    settings = TRLSettings(steps=1, **SMALL)
    train_rloo(policy, seen, ASKED, ends, settings, tmp_path, show_progress=False)
    assert all(token < 4 for own in seen.ids[0] for token in own[:-1])
    assert min(len(own) for own in seen.ids[0]) < 5


def test_functions_as_trl_calls_them_are_timed() -> None:
    """A reward function of TRL's, which takes no prompts by place, is scored under the clock as without it."""

    def reward_function(completions, **_):
        return [float(len(completion)) for completion in completions]

    reward = CalibratedReward(reward_function, ReferenceTable.build([("p", [1.0, 2.0, 3.0, 4.0])]))
    logged: dict[str, float] = {}

    rewards = TimedReward.of(reward)(prompts=["p", "p"], completions=["a", "abc"], log_metric=logged.__setitem__)

    assert rewards == [0.125, 0.625]  # (below + equal / 2) / 4
    assert {"seconds_scoring", "seconds_lookup"} <= set(logged)
