"""The demo's models, sizes and steps: the library's public functions, in the order of use for a policy of your own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.cli.demo import assets, reward_models
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.policies import evaluate
from calibrated_rewards.evaluation.results import Evaluation
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.optimum import Choice, optimum
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Standard
from calibrated_rewards.training.online import TRLSettings, train_rloo

# The policy that is trained for the procedure that it is served with, and the one that is not.
CALIBRATED, RAW = "calibrated", "raw"
# Prompts of a shard, which is what a Ctrl-C loses: about as many completions in calibration as in evaluation.
SHARD, EVALUATION_SHARD = 4, 12


@dataclass(frozen=True)
class Scale:
    """The sizes of a demo; the same ones give the same numbers."""

    prompts: int
    """To calibrate and to train on."""
    held_out: int
    """To evaluate on."""
    k: int
    """Rollouts of a prompt in the table."""
    tokens: int
    """Of the longest completion."""
    texts: int
    """That each of the two reward models learns from."""
    steps: int
    """Of training, for each reward."""
    prompts_a_step: int
    completions: int
    """Of a prompt, in a step."""
    lr: float
    lora_rank: int
    lora_layers: int
    """The last layers, which have adapters."""
    m: int
    """Completions of a held-out prompt by each policy."""
    n: int = 4
    """The policy is served with best of n."""
    kl: float = 0.5
    """Wanted distance of the trained policy from the reference, in nats."""
    temperature: float = 0.8


FULL = Scale(24, 24, 48, 10, 1_500, 18, 8, 4, 3e-3, 16, 10, 12)
QUICK = Scale(6, 6, 16, 8, 0, 3, 2, 4, 1e-2, 2, 1, 8)


@dataclass(frozen=True)
class Parts:
    """Folders of checkpoints, and prompts."""

    description: str
    policy: Path
    reward_model: Path
    judge: Path
    prompts: list[str]
    held_out: list[str]


def make_real_parts(cache: Path, scale: Scale) -> Parts:
    """Fetch SmolLM2-135M-Instruct, which continues movie reviews, and train models of how people rate them."""
    prompts = reward_models.make_prompts(cache, scale.prompts + scale.held_out)
    return Parts(
        "SmolLM2-135M-Instruct goes on from the first three words of movie reviews. Reward model and judge are MiniLM "
        f"encoders, each trained on {scale.texts:,} reviews of its own that people have rated.",
        assets.fetch_language_model(cache),
        reward_models.train_reward_model(cache, scale.texts),
        reward_models.train_judge(cache, scale.texts),
        prompts[: scale.prompts],
        prompts[scale.prompts :],
    )


def make_tiny_parts(folder: Path, scale: Scale) -> Parts:
    """Make random models that write random letters."""
    prompts = assets.make_tiny_prompts(scale.prompts + scale.held_out)
    models = assets.make_folder(folder, "reward-models", assets.save_tiny_reward_models)
    return Parts(
        "Random models of two layers that write letters: this shows that the parts fit together, and nothing else.",
        assets.make_folder(folder, "policy", assets.save_tiny_policy),
        models / "reward-model",
        models / "judge",
        prompts[: scale.prompts],
        prompts[scale.prompts :],
    )


@dataclass(frozen=True)
class Demo:
    """The steps of a demo, each of which goes on where an earlier run stopped."""

    parts: Parts
    scale: Scale
    out: Path
    seed: int = 0

    @property
    def decoding(self) -> Decoding:
        """The decoding of calibration, training and evaluation."""
        return Decoding(self.scale.tokens, self.scale.temperature)

    @property
    def procedures(self) -> tuple[CalibratedProcedure, ...]:
        """Single responses, and the procedure that the policy is served with."""
        return Standard(), BestOf(self.scale.n)

    @cached_property
    def scorers(self) -> dict[str, Any]:
        """The reward model, which also selects the best of N, and the judge."""
        folders = {"reward": self.parts.reward_model, "judge": self.parts.judge}
        return {name: load_scorer(at, kind="sequence-classifier", show_progress=False) for name, at in folders.items()}

    @cached_property
    def choice(self) -> Choice:
        """The exact optimum for best-of-N at the KL, and its beta."""
        return optimum(BestOf(self.scale.n), kl=self.scale.kl)

    def calibrate(self) -> Mapping[str, ReferenceTable]:
        """Draw K rollouts of the reference policy for each prompt, scored by reward model and judge."""
        policy = load_sampler(self.parts.policy, self.decoding)
        at, k = self.out / "table", self.scale.k
        return calibrate(self.parts.prompts, policy, self.scorers, at, k=k, seed=self.seed, prompts_per_shard=SHARD)

    def save_reward(self, table: ReferenceTable) -> CalibratedReward:
        """Join reward model, table and transform in one reward, verify it, and save it for any trainer."""
        reward = CalibratedReward(self.scorers["reward"], table, self.choice.transform, beta=self.choice.beta)
        reward.verify()
        reward.save_pretrained(self.out / "reward")
        return reward

    def estimate_frontier(self, references: Samples) -> FrontierEstimate:
        """Estimate what training for each reward would achieve, by reweighting the rollouts; nothing is trained."""
        frontier = estimate_frontier(references, kls=(self.scale.kl / 2, self.scale.kl), procedures=self.procedures)
        frontier.save(self.out / "frontier.json")
        return frontier

    def train(self, name: str, reward: CalibratedReward, beta: float) -> Path:
        """Train by RLOO, with TRL's trainer, for the calibrated and transformed reward or for the raw one."""
        scale = self.scale
        settings = TRLSettings(
            beta=beta,
            steps=scale.steps,
            prompts_a_step=scale.prompts_a_step,
            completions=scale.completions,
            lr=scale.lr,
            lora_rank=scale.lora_rank,
            lora_layers=scale.lora_layers,
            rows=scale.prompts_a_step * scale.completions,
            save_steps=4,
            seed=self.seed,
        )
        paid = reward if name == CALIBRATED else replace(reward, calibration=Uncalibrated(), beta=None)
        prompts = [Asked(prompt) for prompt in self.parts.prompts]
        at = self.out / name
        return train_rloo(self.parts.policy, paid, prompts, self.decoding, settings, at, dtype="auto")

    def evaluate(self, models: Mapping[str, Path]) -> Evaluation:
        """Evaluate both policies and the reference on held-out prompts, by the judge."""
        samplers = {name: load_sampler(at, self.decoding) for name, at in models.items()}
        return evaluate(
            samplers,
            load_sampler(self.parts.policy, self.decoding),
            self.parts.held_out,
            self.scorers,
            self.out / "evaluation",
            m=self.scale.m,
            seed=self.seed + 1,
            select="reward",
            procedures=self.procedures,
            prompts_per_shard=EVALUATION_SHARD,
        )


def choose_betas(frontier: FrontierEstimate, choice: Choice, kl: float) -> dict[str, float]:
    """Choose for each policy the beta at which its optimum has that KL on the rollouts.

    No theory knows it for the raw score: it depends on the spread of scores within a prompt.
    """
    (raw,) = (point.beta for point in frontier.points if point.arm == "raw" and point.kl == kl)
    return {CALIBRATED: choice.beta, RAW: raw}
