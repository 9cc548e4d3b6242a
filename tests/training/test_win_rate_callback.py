"""The callback that compares the policy with the table's references by a second scorer, in real runs of TRL's RLOO."""

import json
import math
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import tiny
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.training.callbacks import BestOfNWinRate

PROMPTS = tiny.texts(5)
TRAINED, HELD_OUT = PROMPTS[:2], PROMPTS[2:]
META = {"sampler": {"decoding": Decoding(5).fingerprint()}}


@dataclass(eq=False)
class Recording:
    """A scorer that keeps what it scored, in whole numbers, so that many scores tie."""

    seed: int
    calls: list[tuple[list[str], list[str], np.ndarray]] = field(default_factory=list)

    def __call__(self, prompts: Any, completions: Any) -> Any:
        """The hash of the pair, rounded."""
        scores = np.round(HashScorer(self.seed)(prompts, completions))
        self.calls.append((list(prompts), list(completions), scores))
        return scores

    def fingerprint(self) -> dict[str, Any]:
        """Its kind."""
        return {"kind": "recording", "seed": self.seed}


def scored(scorer: Any, seed: int) -> CalibratedReward:
    """A scorer with references of its own, whole numbers too."""
    rng = np.random.default_rng(seed)
    rows = [(prompt, np.round(rng.normal(size=7))) for prompt in PROMPTS]
    return CalibratedReward(scorer, ReferenceTable.build(rows, meta=META), alarm=False)


def train(policy: str, out: Path, callback: Any = None, steps: int = 4) -> Any:
    """A run of RLOO on the first prompts, and its trainer."""
    args = RLOOConfig(
        str(out),
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=5,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        activation_checkpointing=False,
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"prompt": TRAINED * 8})
    reward = scored(HashScorer(3), 3)
    trainer = RLOOTrainer(
        model=policy, reward_funcs=reward, args=args, train_dataset=dataset, processing_class=tiny.tokenizer()
    )
    if callback:
        trainer.add_callback(callback(trainer))
    with ignore_peft_warning():
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved policy."""
    return tiny.saved(tiny.causal(), tmp_path_factory.mktemp("policy"), tiny.tokenizer())


def brute_force(select: np.ndarray, judged: np.ndarray, references: np.ndarray, n: int) -> float:
    """The share of references beaten by the best of each n of the completions, ties one half, wherever they occur."""
    beaten = (judged[:, None] > references).mean(1) + (judged[:, None] == references).mean(1) / 2
    means = []
    for chosen in combinations(range(len(select)), n):
        best = [i for i in chosen if select[i] == select[list(chosen)].max()]
        means.append(beaten[best].mean())
    return float(np.mean(means))


@pytest.mark.parametrize("every", [1, 2])
def test_win_rates_are_those_of_all_choices_of_n(every: int, policy: str, tmp_path: Path) -> None:
    """Each logged number is that of all n of m completions against all references, by what the scorers were shown."""
    chooser, judge = Recording(1), Recording(2)
    reward, second = scored(chooser, 1), scored(judge, 2)

    def callback(trainer: Any) -> BestOfNWinRate:
        return BestOfNWinRate(trainer, reward, second, HELD_OUT, n=3, completions=5, every=every)

    rows = [row for row in train(policy, tmp_path, callback).state.log_history if "best_of_3/win_rate" in row]
    # Before the first step, and after each k-th: the first two are one row's mean where both fall into a step.
    measured: list[dict[str, float]] = []
    for (prompts, texts, select), (_, same, judged) in zip(chooser.calls, judge.calls, strict=True):
        assert texts == same
        assert prompts == [prompt for prompt in HELD_OUT for _ in range(5)]
        numbers = {}
        for n in (1, 3):
            wins = [
                brute_force(select[5 * i :][:5], judged[5 * i :][:5], second.table.scores(row), n)
                for i, row in enumerate(second.rows(HELD_OUT).tolist())
            ]
            numbers[f"best_of_{n}/win_rate"] = float(np.mean(wins))
            numbers[f"best_of_{n}/standard_error"] = float(np.std(wins, ddof=1) / math.sqrt(len(wins)))
        measured.append(numbers)
    assert len(measured) == 1 + 4 // every
    if every == 1:
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        first = {name: (measured[0][name] + measured[1][name]) / 2 for name in measured[0]}
        expected = [first, *measured[2:]]
    else:
        assert [row["step"] for row in rows] == [1, 2, 4]
        expected = measured
    for row, numbers in zip(rows, expected, strict=True):
        assert {name: row[name] for name in numbers} == pytest.approx(numbers)


def test_the_run_is_the_run_that_it_would_have_been(policy: str, tmp_path: Path) -> None:
    """Neither its random numbers nor its mode are touched: rewards and loss are the same, step by step."""

    def callback(trainer: Any) -> BestOfNWinRate:
        return BestOfNWinRate(trainer, scored(HashScorer(1), 1), scored(HashScorer(2), 2), HELD_OUT, n=2, every=1)

    plain, watched = (train(policy, tmp_path / str(i), each, 3) for i, each in enumerate((None, callback)))
    for before, after in zip(plain.state.log_history[:3], watched.state.log_history[:3], strict=True):
        names = ("reward", "loss", "kl", "entropy", "completions/mean_length")
        assert {name: before[name] for name in names} == {name: after[name] for name in names}
    assert watched.model.training
    json.dumps(watched.state.log_history)  # numbers that a checkpoint can keep


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n": 0}, "a whole n >= 1, got n=0"),
        ({"n": 2.5}, "a whole n >= 1, got n=2.5"),
        ({"n": True}, "a whole n >= 1, got n=True"),
        ({"every": 0}, "a whole every >= 1, got every=0"),
        ({"every": 1.5}, "a whole every >= 1, got every=1.5"),
        ({"completions": 8.5}, "a whole completions >= 1, got completions=8.5"),
        ({"seed": -1}, "a whole seed >= 0, got seed=-1"),
        ({"seed": 0.5}, "a whole seed >= 0, got seed=0.5"),
        ({"prompts": HELD_OUT[:1]}, "prompts >= 2, got 1"),
        ({"n": 4, "completions": 3}, "completions >= n, got 3 for n=4"),
        ({"prompts": ["never calibrated", "x"]}, "never calibrated"),
    ],
)
def test_what_cannot_be_compared_is_an_error(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the callback is made, not in the middle of a run."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    reward = scored(HashScorer(1), 1)
    with pytest.raises((ValueError, KeyError), match=why):
        BestOfNWinRate(None, reward, reward, **{"prompts": HELD_OUT, **changes})


def test_prompts_are_any_iterable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement reads them again, so a generator becomes a list; too few of it are counted."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    reward = scored(HashScorer(1), 1)
    callback = BestOfNWinRate(None, reward, reward, (each for each in HELD_OUT), ids=(None for _ in HELD_OUT))
    assert (callback.prompts, callback.ids) == (HELD_OUT, [None] * len(HELD_OUT))
    with pytest.raises(ValueError, match="prompts >= 2, got 1"):
        BestOfNWinRate(None, reward, reward, (each for each in HELD_OUT[:1]))


def test_a_table_that_does_not_say_how_it_was_drawn_needs_a_decoding() -> None:
    """Its own is the default, and one that is given is used."""
    reward = scored(HashScorer(1), 1)
    assert BestOfNWinRate(None, reward, reward, HELD_OUT).decoding == Decoding(5)
    bare = CalibratedReward(HashScorer(1), ReferenceTable.build([(prompt, [0.0, 1.0]) for prompt in PROMPTS]))
    with pytest.raises(ValueError, match="give decoding"):
        BestOfNWinRate(None, reward, bare, HELD_OUT)
    assert BestOfNWinRate(None, reward, bare, HELD_OUT, decoding=Decoding(3)).decoding == Decoding(3)


@pytest.mark.parametrize(
    ("sampler", "got"),
    [
        ("my policy", "were drawn: give"),
        ({"decoding": "greedy"}, "were drawn: give"),
        ({"decoding": {}}, r"only \{\}: give"),
        ({"decoding": {"temperature": 1.0}}, r"only \{'temperature': 1.0\}: give"),
        ({"decoding": {**Decoding(5).fingerprint(), "beams": 4}}, "'beams': 4"),
        ({"decoding": {**Decoding(5).fingerprint(), "temperature": 0.0}}, "temperature > 0"),
        ({"decoding": {**Decoding(5).fingerprint(), "stop": "end"}}, "a tuple of texts"),
    ],
)
def test_a_decoding_that_is_none_has_to_be_given(sampler: Any, got: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata in words, a part of the settings, others, and some that nothing can be drawn with."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    rows = [(prompt, [0.0, 1.0]) for prompt in PROMPTS]
    judge = CalibratedReward(HashScorer(1), ReferenceTable.build(rows, meta={"sampler": sampler}))
    with pytest.raises(ValueError, match=f"{got}.*decoding"):
        BestOfNWinRate(None, judge, judge, HELD_OUT)
    assert BestOfNWinRate(None, judge, judge, HELD_OUT, decoding=Decoding(3)).decoding == Decoding(3)
