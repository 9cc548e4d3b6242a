"""The steps of a demo, each of which goes on where it was: calibrate, foresee, train, evaluate.

They are the library's public functions, in the order in which one calls them for a policy of one's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.cli.demo.parts import Parts, Scale
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.policies import evaluate
from calibrated_rewards.evaluation.results import Evaluation, FrontierEstimate
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.optimum import Choice, optimum
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Standard
from calibrated_rewards.training.online import train_rloo
from calibrated_rewards.training.raw import RawReward

# The policy that is trained for what it will be served with, and the one that is not.
CALIBRATED, RAW = "calibrated", "raw"
# Prompts of a shard, which is what a Ctrl-C loses: about as many completions in calibration as in evaluation.
SHARD, EVALUATED_SHARD = 4, 12


@dataclass(frozen=True)
class Demo:
    """What is made of what, how much of it, and where it is kept."""

    parts: Parts
    scale: Scale
    out: Path
    seed: int = 0

    @property
    def decoding(self) -> Decoding:
        """How all completions are drawn, in calibration, training and evaluation."""
        return Decoding(self.scale.tokens, self.scale.temperature)

    @property
    def procedures(self) -> tuple[CalibratedProcedure, ...]:
        """One draw, and what the policy will be served with."""
        return Standard(), BestOf(self.scale.n)

    @cached_property
    def scorers(self) -> dict[str, Any]:
        """The reward model, by which best-of-N selects as well, and the judge."""
        folders = {"reward": self.parts.reward_model, "judge": self.parts.judge}
        return {name: load_scorer(at, kind="sequence-classifier", show_progress=False) for name, at in folders.items()}

    @cached_property
    def choice(self) -> Choice:
        """The exact optimum for best-of-N at the KL, and its beta."""
        return optimum(BestOf(self.scale.n), kl=self.scale.kl)

    def calibrate(self) -> Mapping[str, ReferenceTable]:
        """K rollouts of the reference policy for each prompt, scored by reward model and judge."""
        policy = load_sampler(self.parts.policy, self.decoding)
        at, k = self.out / "table", self.scale.k
        return calibrate(self.parts.prompts, policy, self.scorers, at, k=k, seed=self.seed, prompts_per_shard=SHARD)

    def reward(self, table: ReferenceTable) -> CalibratedReward:
        """Reward model, table and transform as one reward, saved for any trainer, once it is verified."""
        made = CalibratedReward(self.scorers["reward"], table, self.choice.transform, beta=self.choice.beta)
        made.verify()
        made.save_pretrained(self.out / "reward")
        return made

    def foresee(self, references: Samples) -> FrontierEstimate:
        """What training for each reward would come to, by reweighting the rollouts; nothing is trained."""
        found = estimate_frontier(references, kls=(self.scale.kl / 2, self.scale.kl), procedures=self.procedures)
        found.save(self.out / "frontier.json")
        return found

    def train(self, name: str, reward: CalibratedReward, beta: float) -> Path:
        """RLOO with TRL's trainer, for the calibrated and transformed reward or for the raw one."""
        scale = self.scale
        settings = train_rloo.Settings(
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
        paid = reward if name == CALIBRATED else RawReward(reward)
        asked = [Asked(prompt) for prompt in self.parts.prompts]
        at = self.out / name
        return train_rloo.train(self.parts.policy, paid, asked, self.decoding, settings, at, dtype="auto")

    def evaluate(self, models: Mapping[str, Path]) -> Evaluation:
        """Both policies and the reference on prompts that nobody has seen, judged by the judge."""
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
            prompts_per_shard=EVALUATED_SHARD,
        )


def betas(found: FrontierEstimate, choice: Choice, kl: float) -> dict[str, float]:
    """For each policy the beta at which its optimum has that KL on the rollouts.

    For the raw score there is no theory that would know it: it depends on the spread of scores within a prompt.
    """
    (raw,) = (point.beta for point in found.points if point.arm == "raw" and point.kl == kl)
    return {CALIBRATED: choice.beta, RAW: raw}
