"""The demo's models, sizes and steps: the library's public functions, in the order of use for a policy of your own."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.demo import assets, reward_models
from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.frontier import estimate_frontier
from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies, compare_held_out
from calibrated_rewards.evaluation.objectives import OBJECTIVES, OptimumAtKL
from calibrated_rewards.evaluation.references import read_scores
from calibrated_rewards.files import replace_file
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.named import parse_transform
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf
from calibrated_rewards.training.launch import Launch, digest_weights, load_policy
from calibrated_rewards.training.offline import OfflineSettings
from calibrated_rewards.training.offline.groups import PromptGroup, RecordedStates, load_groups
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.train import train_from_files
from calibrated_rewards.training.offline.trained_weights import select_weights

# What the policy is served with: an attacker, or bad luck, picks the worst of 16 completions.
SERVED = WorstOf(16)
# All that the policies are compared under.
PROCEDURES = (SERVED, WorstOf(4), Standard(), BestOf(4))
# The policies, by what they are trained for: a raw score, its quantile transformed for `SERVED`, the quantile as it is.
RAW, OPTIMUM, IDENTITY = "raw", "worst-of-16", "identity"
ARMS = {
    RAW: "the raw score, for comparison",
    OPTIMUM: "the calibrated score, transformed for the worst of 16",
}
# Asked for by --identity: it tells what calibration does from what the transform does.
IDENTITY_ARM = {IDENTITY: "the calibrated score as it is, for comparison"}
# Folders of the two calibrations: of the prompts that are trained on, and of those that results are measured on.
TABLE, HELD_OUT = "table", "held-out"
# Prompts of a shard, which is what a Ctrl-C loses.
SHARD = 16
# Prompts that are drawn for together: their completions are short, and a CPU spends its time reading weights.
PROMPTS_AT_ONCE = 8
# Settings were chosen on the prompts before this one, so that results are measured from here on.
UNSEEN = 700


@dataclass(frozen=True)
class Scale:
    """The sizes of a demo; the same ones give the same numbers."""

    prompts: int
    """To calibrate and to train on."""
    k: int
    """Rollouts of each of them."""
    held_out: int
    """Prompts that results are measured on."""
    held_out_k: int
    """Rollouts of each of them."""
    tokens: int
    """Of the longest completion."""
    texts: int
    """That each of the two reward models learns from."""
    steps: int
    """Of training, for each policy."""
    prompts_a_step: int
    layers: int
    """The last layers, which are trained."""
    kl: float = 0.15
    """Distance from the reference, in nats, that each trained policy is brought to."""
    far: float = 0.5
    """KL of the optimum that training aims at: a short training comes a part of the way."""
    temperature: float = 0.8


FULL = Scale(320, 32, 160, 48, 2, 1_500, 24, 12, 10)
QUICK = Scale(12, 32, 6, 32, 4, 0, 3, 4, 1, kl=0.01)


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
    prompts = reward_models.make_prompts(cache, UNSEEN + scale.held_out)
    return Parts(
        f"SmolLM2-135M-Instruct continues the first three words of movie reviews by {scale.tokens} tokens. The reward"
        f" model and the judge are MiniLM encoders, each trained on {scale.texts:,} reviews that people have rated.",
        assets.fetch_language_model(cache),
        reward_models.train_reward_model(cache, scale.texts),
        reward_models.train_judge(cache, scale.texts),
        prompts[: scale.prompts],
        prompts[UNSEEN:],
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


def has_gpu() -> bool:
    """Tell if there is a GPU to compute on."""
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class Demo:
    """The steps of a demo, each of which goes on where an earlier run stopped."""

    parts: Parts
    scale: Scale
    out: Path
    seed: int = 0

    @cached_property
    def dtype(self) -> str:
        """The dtype of the language model: 16 bits are twice as fast where tiles are multiplied, else half as fast."""
        import torch

        multiplies_tiles: Any = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return "bfloat16" if has_gpu() or multiplies_tiles() else "float32"

    @cached_property
    def scorers(self) -> dict[str, Any]:
        """The reward model, which also selects the worst of N, and the judge."""
        folders = {"reward": self.parts.reward_model, "judge": self.parts.judge}
        return {name: load_scorer(at, kind="sequence-classifier", show_progress=False) for name, at in folders.items()}

    @cached_property
    def sampler(self) -> Any:
        """The reference policy."""
        decoding = Decoding(self.scale.tokens, self.scale.temperature)
        return load_sampler(self.parts.policy, decoding, dtype=self.dtype, prompts_at_once=PROMPTS_AT_ONCE)

    def calibrate(self) -> None:
        """Draw K rollouts of the reference for each prompt, scored by the reward model."""
        scorers = {"reward": self.scorers["reward"]}
        options = {"k": self.scale.k, "seed": self.seed, "prompts_per_shard": SHARD}
        calibrate(self.parts.prompts, self.sampler, scorers, self.out / TABLE, **options)
        self.read_reference(TABLE)

    def draw_held_out(self) -> None:
        """Draw rollouts of the reference for the held-out prompts, scored by the reward model and by the judge."""
        options = {"k": self.scale.held_out_k, "seed": self.seed, "prompts_per_shard": SHARD}
        calibrate(self.parts.held_out, self.sampler, self.scorers, self.out / HELD_OUT, **options)
        self.read_reference(HELD_OUT)

    def read_reference(self, run: str) -> None:
        """Read rollouts with the reference, once for all policies: below the trained layers they are the same model."""
        path = self.out / "states" / f"{run}.safetensors"
        if path.exists():
            return
        policy = self._load_policy(self.parts.policy, run)
        groups = self._load_groups(run, policy)
        sys.stderr.write(f"reading the rollouts of {len(groups)} prompts with the reference, which takes minutes\n")
        recorded = RecordedStates(digest_weights(policy.model, self.dtype))
        for _ in recorded.read(self._make_reader(policy), groups):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.save(path)

    @cached_property
    def held_out(self) -> Samples:
        """The scores of the held-out rollouts, by the reward model and by the judge."""
        return read_scores(self.out / HELD_OUT, "reward", "judge")

    def save_reward(self) -> CalibratedReward:
        """Join reward model, table and transform in one reward, with the beta of its KL, verify it, and save it."""
        table = ReferenceTable.load(self.out / TABLE / "reward")
        named = parse_transform(f"worst-of:{SERVED.n}:{self.scale.far}")
        beta = expect(table, named.transform, kl=named.kl, estimator="posterior").beta
        reward = CalibratedReward(self.scorers["reward"], table, named.transform, beta=beta, estimator="posterior")
        reward.verify()
        reward.save_pretrained(self.out / "reward")
        return reward

    def estimate_frontier(self) -> FrontierEstimate:
        """Estimate the optimum of each reward on the held-out prompts, by weights on the rollouts: no training."""
        objectives = {RAW: OBJECTIVES["raw"], IDENTITY: OBJECTIVES["identity"], "worst-of:16": OptimumAtKL(SERVED)}
        objectives["best-of:4"] = OptimumAtKL(BestOf(4))
        frontier = estimate_frontier(self.held_out, objectives, [self.scale.kl], PROCEDURES, estimator="posterior")
        frontier.save(self.out / "frontier.json")
        return frontier

    def train(self, name: str) -> None:
        """Train on the rollouts of the calibration, without drawing any, and compute the held-out log-ratios."""
        scale = self.scale
        reward: dict[str, Any] = {}  # the saved one
        if name == IDENTITY:
            reward["transform"] = parse_transform(f"identity:{scale.far}")
        if name == RAW:
            # No theory knows the raw score's beta: it depends on how scores spread within a prompt.
            scores = read_scores(self.out / TABLE, "reward")
            (point,) = estimate_frontier(scores, {RAW: OBJECTIVES["raw"]}, [scale.far], [Standard()]).points
            reward = {"raw": True, "beta": point.beta}
        settings = OfflineSettings(
            steps=scale.steps,
            prompts_a_step=scale.prompts_a_step,
            completions=scale.k,
            layers=scale.layers,
            kl=scale.kl,
            cache_states=True,
            check_steps=scale.steps,
            save_steps=10,
            seed=self.seed,
        )
        parts: dict[str, Any] = {
            "policy": str(self.parts.policy),
            "reward": str(self.out / "reward"),
            "rollouts": self.out / TABLE,
        }
        launch = Launch(**parts, out=self.out / name, dtype=self.dtype, **reward)
        train_from_files(launch, settings, self._load_states(TABLE))
        if not self.log_ratios(name).exists():
            with replace_file(self.log_ratios(name)) as file:
                np.save(file, self._compute_log_ratios(self.out / name / "model"))

    def log_ratios(self, name: str) -> Path:
        """The file of a policy's log-ratios to the reference on the held-out rollouts."""
        return self.out / name / "held_out.npy"

    def _compute_log_ratios(self, model: Path) -> Any:
        policy = self._load_policy(model, HELD_OUT)
        reader, states = self._make_reader(policy), self._load_states(HELD_OUT)
        known = [*states.read(reader, self._load_groups(HELD_OUT, policy))]
        own = reader.read(group.tokens._replace(states=states) for group, (_, states) in known)
        return np.stack([(a - b).double().numpy() for a, (_, (b, _)) in zip(own, known, strict=True)])

    def _load_states(self, run: str) -> RecordedStates:
        return RecordedStates.load(self.out / "states" / f"{run}.safetensors")

    def _load_policy(self, at: Path, run: str) -> Policy:
        # In the dtype of the reference: rounding is the same on both sides of a log-ratio.
        launch = Launch(str(at), str(self.out / "reward"), out=self.out, dtype=self.dtype, any_policy=True)
        return load_policy(launch, ReferenceTable.load(self.out / run / "reward").meta)

    def _load_groups(self, run: str, policy: Policy) -> list[PromptGroup]:
        reward = CalibratedReward(None, ReferenceTable.load(self.out / run / "reward"))
        return load_groups(self.out / run, reward, policy, beta=1.0).groups

    def _make_reader(self, policy: Policy) -> GroupReader:
        model = select_weights(policy.model, self.scale.layers, 0, 0).eval()
        return GroupReader(model, policy.decoding.temperature, max(self.scale.k, self.scale.held_out_k))

    def compare(self, names: Sequence[str]) -> HeldOutPolicies:
        """Compare the policies on the held-out rollouts of the reference: paired, and nothing is drawn."""
        log_ratios = {name: np.load(self.log_ratios(name)) for name in names}
        compared = compare_held_out(log_ratios, self.held_out, PROCEDURES)
        compared.save(self.out / "held_out.json")
        return compared
