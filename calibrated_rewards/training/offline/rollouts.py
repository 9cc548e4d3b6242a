"""Read the rollouts of a calibration with their rewards: what offline training and exports learn from.

The K rollouts of a prompt are an exact sample of the reference policy, and their ranks are known, so the optimum
pi_ref(y) e^{Phi(u) / beta} / Z is known on them: as weights that add up to 1, and as log-ratios to reach.

>>> from calibrated_rewards.calibration.calibrate import calibrate
>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> folder = getfixture("tmp_path")
>>> table = calibrate(["one", "two"], NumberSampler(), NumberScorer(), folder, k=4, show_progress=False)
>>> reward = CalibratedReward(None, table, beta=0.5)
>>> first = next(iterate_rollouts(folder, reward))
>>> first.weights.round(3), round(float(np.exp(first.log_ratios).mean()), 6)  # of u = 1/3, 0, 2/3, 1
(array([0.138, 0.071, 0.268, 0.523]), 1.0)
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, Float64
from scipy.special import logsumexp, softmax

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import get_completion
from calibrated_rewards.evaluation.references import match_scorer
from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.scale import scaled

# What a sampler says of itself that decides which completions it draws.
DRAWN_BY = ("weights", "tokenizer", "decoding")


@dataclass(frozen=True, eq=False)
class PromptRollouts:
    """The K rollouts of one prompt, their raw scores, quantiles and rewards, and what the optimum makes of them."""

    key: bytes
    prompt: Prompt
    rollouts: Sequence[Rollout]
    scores: Float32[np.ndarray, " K"]
    u: Float64[np.ndarray, " K"]
    rewards: Float64[np.ndarray, " K"]
    """Phi(u) with the reward's transform, estimator and scale, of each rollout's rank among the others."""
    beta: float

    @cached_property
    def completions(self) -> list[Completion]:
        """The completions as scorers read them."""
        return [get_completion(each) for each in self.rollouts]

    @cached_property
    def log_z(self) -> float:
        """The prompt's own partition, log (1/K) sum_j e^{Phi_j / beta}; right with ties as well."""
        return float(logsumexp(self.rewards / self.beta)) - float(np.log(len(self.rewards)))

    @cached_property
    def log_ratios(self) -> Float64[np.ndarray, " K"]:
        """The optimum's log pi(y) - log pi_ref(y) of each rollout: Phi / beta - log Z."""
        return np.asarray(self.rewards / self.beta - self.log_z)

    @cached_property
    def weights(self) -> Float64[np.ndarray, " K"]:
        """The optimum's share of each rollout, which add up to 1: e^{Phi / beta} / sum_j e^{Phi_j / beta}."""
        return np.asarray(softmax(self.rewards / self.beta))

    @property
    def ess(self) -> float:
        """The effective sample size of the weights, 1 / sum w^2: from 1 to K."""
        return float(1 / (self.weights**2).sum())


def iterate_rollouts(
    run: Path, reward: CalibratedReward, *, select: str | None = None, beta: float | None = None
) -> Iterator[PromptRollouts]:
    """Read the rollouts of each prompt of a calibration's directory, shard by shard, and value them by a reward.

    `select` names the scorer, by default the one whose scores the reward's table holds; `beta` is the reward's unless
    it is given. Prompts without rollouts, or without references in the table, are left out.
    """
    beta, directory = choose_beta(reward, beta), RunDirectory(run)
    select = match_scorer(run, reward.table) if select is None else select
    for name in directory.names():
        yield from read_rollouts(directory, name, reward, select, beta)


def choose_beta(reward: CalibratedReward, beta: float | None) -> float:
    """Return the beta that is given, or else the reward's; ValueError if neither is a finite number above 0."""
    beta = reward.beta if beta is None else beta
    if beta is None or not (isfinite(beta) and beta > 0):
        value = setting("beta", str(beta))
        raise ValueError(Message(f"an optimum needs a finite beta > 0, the reward's or one that is given; got {value}"))
    return beta


def check_source(run: Path, reward: CalibratedReward, any_policy: bool = False) -> None:
    """Raise ValueError for rollouts that were drawn in another way than the references of the reward's table.

    What either does not say is not compared. `any_policy` takes them nevertheless.
    """
    theirs, ours = RunDirectory(run).settings().get("sampler"), reward.table.meta.get("sampler")
    if any_policy or not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return
    for name in {*DRAWN_BY} & {*theirs} & {*ours}:
        for place, old, new in differences(theirs[name], ours[name], name):
            raise ValueError(
                f"the rollouts of {run} were drawn in another way than the references of the reward's table: {place} "
                f"is {old!r:.60}, and {new!r:.60} in the table. Take the reward of this calibration"
            )


def read_rollouts(
    directory: RunDirectory, name: str, reward: CalibratedReward, select: str, beta: float
) -> Iterator[PromptRollouts]:
    """Read the rollouts of each prompt of one shard, as `iterate_rollouts` does."""
    shard = directory.load(name)
    if not shard.state.is_scored(select):
        where = f"shard {name} of {directory.path}"
        raise ValueError(f"{where} has rollouts without a score of {select!r}: calibrate to the end.")
    drawn = [i for i, rollouts in enumerate(shard.rollouts) if rollouts]
    rows = reward.rows([shard.prompts[i].prompt for i in drawn])
    for i, row in zip(drawn, rows, strict=True):
        if row < 0:  # unknown to a reward that does not raise
            continue
        scores, planned = shard.scores[select][i], shard.prompts[i]
        u, rewards = value_rollouts(reward, int(row), scores)
        if not isfinite(float(np.abs(rewards).max()) / beta):
            raise ValueError(Message(f"a reward over beta is a finite number, got {setting('beta', str(beta))}"))
        yield PromptRollouts(planned.key, planned.prompt, shard.rollouts[i], scores, u, rewards, beta)


def value_rollouts(
    reward: CalibratedReward, row: int, scores: Float32[np.ndarray, " K"]
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """Compute quantile and reward of a prompt's rollouts; of the references themselves, each among the K - 1 others.

    Its own score tells nothing of a rollout: among the others its rank has the law of a fresh completion's, and so the
    weights have the KL that `expect` promises for K - 1 references. Without ties the prompt's own Z is the exact one.
    """
    at, K = np.array([row]), len(scores)
    references = np.sort(scores)
    own = reward.table.scores(row)
    if not isinstance(reward.calibration, EmpiricalCDF) or K < 2 or not np.array_equal(own, references):
        return reward.table.cdf(at, scores[None])[0], np.asarray(reward.from_scores(at, scores[None])[0], np.float64)
    # 2 below + equal among all, of which the rollout itself is one that equals.
    index = np.rint(2 * K * reward.calibration(reward.table, np.repeat(at, K), scores)).astype(np.int64) - 1
    transform = cast(Hashable, scaled(reward.transform, reward.scale))
    return index / (2 * (K - 1)), compute_values(transform, K - 1, reward.estimator)[index]


@lru_cache(maxsize=1024)
def compute_values(transform: Any, K: int, estimator: Estimator) -> Float64[np.ndarray, " _"]:
    """Compute the value of each rank among K references, once: some take a second."""
    return values(transform, K, estimator)
