"""TRL's own trainers, command line and workers take the calibrated reward, and what they log is what it gave."""

import asyncio
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable, UnknownPromptError
from calibrated_rewards.adapters import trl_reward
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.prompts import id_key
from calibrated_rewards.reward.find_prompts import Originals
from calibrated_rewards.testing.check_adapter import check_adapter
from calibrated_rewards.testing.suites import HashScorer

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# What TRL and transformers have to say of each other's arguments is not about us.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]
CHATS = [[{"role": "user", "content": f"Say {word}"}] for word in ("one", "two", "three", "four")]
TEXTS = ["Say one", "Say two", "Say three", "Say four"]
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "disable_tqdm": True,
}


def saved(folder: Path) -> str:
    """A reward on disk, as it is given to those who take no objects: conversations, texts, and ids for the former."""
    rng = np.random.default_rng(0)
    probe = {"prompt": "p", "completion": "c", "score": float(HashScorer()(["p"], ["c"])[0])}
    rows = [(chat, rng.normal(size=8), [id_key(f"id{i}")]) for i, chat in enumerate(CHATS)]
    rows += [(text, rng.normal(size=5)) for text in TEXTS]
    table = ReferenceTable.build(rows, meta={"probes": [probe]})
    originals = Originals.write(folder / "prompts.jsonl", table, [*CHATS, *TEXTS])
    reward = CalibratedReward(HashScorer(), table, Exponential(3.0), name="ours", originals=originals)
    reward.save_pretrained(folder / "reward")
    return str(folder / "reward")


@pytest.fixture
def reward(tmp_path, monkeypatch) -> CalibratedReward:
    """The reward that the environment names, by the way that TRL's command line takes to it."""
    monkeypatch.setenv("CALIBRATED_REWARD", saved(tmp_path))
    return trl_reward.reward


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """A checkpoint: with beta > 0 the trainers load the reference from where the policy came."""
    return tiny.saved(tiny.causal(), tmp_path_factory.mktemp("policy"), tiny.tokenizer(side="left"))


@dataclass
class Recorded:
    """Keeps what a trainer asks, and what it is told."""

    reward: CalibratedReward
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def __name__(self) -> str:
        """What the log calls it."""
        return self.reward.__name__

    def __call__(self, prompts, completions, completion_ids=None, **columns):
        """What the reward gives."""
        given = self.reward(prompts, completions, completion_ids, **columns)
        told = columns.get("id")
        self.calls.append({"prompts": prompts, "completions": completions, "ids": told, "rewards": given})
        return given


def same_as_alone(calls: list[dict[str, Any]], reward: CalibratedReward) -> bool:
    """Each of all calls' rewards is what the reward gives for that pair by itself."""
    return all(
        reward.score([prompt], [completion]).reward == [given]
        for call in calls
        for prompt, completion, given in zip(call["prompts"], call["completions"], call["rewards"], strict=True)
    )


def test_only_the_reward_is_there(monkeypatch, tmp_path):
    """It is read when asked for, once; without the variable the error names it; nothing else is there."""
    monkeypatch.setenv("CALIBRATED_REWARD", saved(tmp_path))
    assert trl_reward.reward is trl_reward.reward
    assert isinstance(trl_reward.reward, CalibratedReward)
    assert trl_reward.reward.__name__ == "ours"
    with pytest.raises(AttributeError, match="'rewards': it has `reward`"):
        _ = trl_reward.rewards
    monkeypatch.delenv("CALIBRATED_REWARD")
    with pytest.raises(ValueError, match="CALIBRATED_REWARD"):
        _ = trl_reward.reward


@pytest.mark.parametrize("prompts", [CHATS, TEXTS], ids=["chats", "texts"])
def test_it_conforms(reward, prompts):
    """In TRL's call shape: keywords, the dataset's columns as lists, completions as messages where prompts are."""

    def call(p, c, _):
        return reward(prompts=p, completions=c, completion_ids=[[1]] * len(p), other=[None] * len(p))

    texts = [f"answer {i}" for i in range(8)]
    completions = [[{"role": "assistant", "content": t}] for t in texts] if prompts is CHATS else texts
    check_adapter(call, reward, [*prompts, *prompts], completions)


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_a_trainer_trains_on_it(algorithm, reward, policy, tmp_path):
    """Two real steps on conversations: the log has the reward under its name, our measures, and the right numbers."""
    import trl

    config = getattr(trl, f"{algorithm}Config")(output_dir=str(tmp_path / "out"), beta=0.1, **SMALL)
    recorded = Recorded(reward)
    data = Dataset.from_list([{"prompt": chat, "id": f"id{i}"} for i, chat in enumerate(CHATS)])
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=policy,
        reward_funcs=recorded,
        args=config,
        train_dataset=data,
        processing_class=tiny.tokenizer(side="left"),
    )
    trainer.train()

    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == len(recorded.calls) == 2
    for entry, call in zip(steps, recorded.calls, strict=True):
        assert entry["rewards/ours/mean"] == pytest.approx(np.mean(call["rewards"]), abs=1e-6)
        scores = reward.score(call["prompts"], call["completions"])
        assert entry["ours/u"] == pytest.approx(scores.u.mean(), abs=1e-6)
        assert entry["ours/misses"] == 0
        assert isinstance(call["completions"][0], list)
    assert same_as_alone(recorded.calls, reward)


def length(_, completions: list[Any], **__: Any) -> list[float]:
    """How many letters a text has; of a list of messages that would be how many messages."""
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_a_function_scores_in_training_what_it_scored_in_calibration(algorithm, policy, tmp_path):
    """Calibrated with texts, given messages by the trainer: raw scores and quantiles are those of the texts."""
    import trl

    drawn = ["a", "two", "seven", "an answer"]
    table = calibrate(CHATS, lambda _, seeds: [[drawn[seed % 4] for seed in own] for own in seeds], length, k=8)
    reward = CalibratedReward(length, table, name="ours", alarm=False)
    assert reward.verify().worst == 0
    recorded = Recorded(reward)
    getattr(trl, f"{algorithm}Trainer")(
        model=policy,
        reward_funcs=recorded,
        args=getattr(trl, f"{algorithm}Config")(output_dir=str(tmp_path / "out"), **{**SMALL, "max_steps": 1}),
        train_dataset=Dataset.from_list([{"prompt": chat} for chat in CHATS]),
        processing_class=tiny.tokenizer(side="left"),
    ).train()

    (call,) = recorded.calls
    texts = [completion[0]["content"] for completion in call["completions"]]
    raw = np.array([float(len(text)) for text in texts])
    rows = [table.scores(int(table.rows([prompt])[0])) for prompt in call["prompts"]]
    assert raw.max() > 1.0
    expected = [(row < x).mean() + (row == x).mean() / 2 for row, x in zip(rows, raw, strict=True)]
    assert call["rewards"] == pytest.approx(expected)
    assert reward.raw(call["prompts"], call["completions"]).tolist() == raw.tolist()


def test_prompts_are_found_by_a_column(policy, tmp_path, monkeypatch):
    """With `id_column` RLOO's prompts may be written otherwise than the table's: texts here, conversations there."""
    import trl

    monkeypatch.setenv("CALIBRATED_REWARD", saved(tmp_path))
    by_id = CalibratedReward.from_pretrained(tmp_path / "reward", id_column="id")
    recorded = Recorded(by_id)
    data = Dataset.from_list([{"prompt": f"another text {i}", "id": f"id{i}"} for i in range(4)])
    config = trl.RLOOConfig(output_dir=str(tmp_path / "out"), **SMALL)
    trl.RLOOTrainer(
        model=policy,
        reward_funcs=recorded,
        args=config,
        train_dataset=data,
        processing_class=tiny.tokenizer(side="left"),
    ).train()

    for call in recorded.calls:
        chats = [CHATS[int(name[2:])] for name in call["ids"]]
        assert call["rewards"] == by_id.score(chats, call["completions"]).reward


class Board:
    """An environment of TRL's: what `reset` returns is appended to the prompt's last message."""

    def reset(self, **row) -> str:
        """The observation."""
        return f" The board of {row['id']} is empty."

    def place(self, square: int) -> str:
        """
        Place a stone.

        Args:
            square: where.

        Returns:
            What happened.
        """
        return f"placed on {square}"


@pytest.mark.filterwarnings("ignore")
def test_an_observation_is_part_of_the_prompt(reward, policy, tmp_path, monkeypatch):
    """What an environment adds makes a prompt unknown, and the error says so; with an id column it is found."""
    import trl
    from trl.trainer import grpo_trainer

    # A tiny tokenizer's template has no tools; neither the template nor the parser of calls is the subject here.
    monkeypatch.setattr(grpo_trainer, "supports_tool_calling", lambda _: True)
    monkeypatch.setattr(grpo_trainer, "parse_response", lambda *_, **__: {"role": "assistant", "content": "a"})
    data = Dataset.from_list([{"prompt": chat, "id": f"id{i}"} for i, chat in enumerate(CHATS)])
    tokenizer = tiny.tokenizer(side="left")
    tokenizer.response_schema = {}

    def train(rewarded: Any) -> Recorded:
        recorded = Recorded(rewarded)
        trl.GRPOTrainer(
            model=policy,
            reward_funcs=recorded,
            args=trl.GRPOConfig(output_dir=str(tmp_path / "out"), **{**SMALL, "max_steps": 1}),
            train_dataset=data,
            processing_class=tokenizer,
            environment_factory=Board,
        ).train()
        return recorded

    with pytest.raises(UnknownPromptError, match=r"' The board of id\d is empty.' at the end of its last message"):
        train(reward)
    by_id = CalibratedReward.from_pretrained(tmp_path / "reward", id_column="id")
    (call,) = train(by_id).calls
    chats = [CHATS[int(name[2:])] for name in call["ids"]]
    assert call["prompts"] != chats
    assert call["rewards"] == by_id.score(call["prompts"], call["completions"], call["ids"]).reward


def test_online_dpo_ranks_by_it(reward, tmp_path):
    """Its prompts come twice over, and without functions to log with."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    recorded = Recorded(reward)
    options = {name: value for name, value in SMALL.items() if name not in ("num_generations", "max_completion_length")}
    config = OnlineDPOConfig(output_dir=str(tmp_path / "out"), max_new_tokens=6, **options)
    model = tiny.causal()
    OnlineDPOTrainer(
        model=model,
        reward_funcs=recorded,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tiny.tokenizer(side="left"),
    ).train()

    assert len(recorded.calls) == 2
    assert same_as_alone(recorded.calls, reward)
    prompts = recorded.calls[0]["prompts"]
    assert prompts[: len(prompts) // 2] == prompts[len(prompts) // 2 :]


@pytest.mark.usefixtures("reward")
def test_the_command_line_takes_its_path(policy, tmp_path):
    """`trl rloo --reward_funcs calibrated_rewards.adapters.trl_reward.reward`, by TRL's own parser and main."""
    from trl.scripts import rloo

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    words = {
        **{name: value for name, value in SMALL.items() if name not in ("report_to", "disable_tqdm", "save_strategy")},
        "model_name_or_path": policy,
        "dataset_name": str(folder),
        "reward_funcs": "calibrated_rewards.adapters.trl_reward.reward",
        "output_dir": str(tmp_path / "out"),
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
    }
    parsed = rloo.make_parser().parse_args_and_config([f"--{name}={value}" for name, value in words.items()])
    rloo.main(*parsed[:4])

    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(
        "rewards/ours/mean" in entry and "ours/u" in entry for entry in state["log_history"] if "reward" in entry
    )
    assert sum("reward" in entry for entry in state["log_history"]) == 2


def test_an_async_worker_scores_with_its_pickle(reward):
    """AsyncGRPO's own scoring of a group, by what would come to its process; the loop around it wants a vLLM server."""
    from trl.experimental.async_grpo import async_rollout_worker as worker

    loop = object.__new__(worker._AsyncRolloutLoop)
    loop.reward_funcs, loop.reward_func_names = [pickle.loads(pickle.dumps(reward))], ["ours"]
    loop._env_reward_types = []
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "b", "c", "d")]
    sequences = [[worker.TrainingSequence([1, 2], [0, 1], [0.0, -1.0], 0)] for _ in answers]
    group = worker.RolloutGroup(
        [CHATS[0]] * 4, {}, answers, [[2]] * 4, sequences, [0] * 4, [0] * 4, 0, 0, [None] * 4, []
    )
    samples = asyncio.run(loop._score_group(group))

    wanted = np.array(reward.score([CHATS[0]] * 4, answers).reward)
    assert [sample.metrics["rewards/ours"] for sample in samples] == wanted.tolist()
    # It always divides by the spread, which docs/guides/train.md says it cannot help.
    np.testing.assert_allclose([s.advantage for s in samples], (wanted - wanted.mean()) / wanted.std(), rtol=1e-6)
