"""Exact numbers of policies whose laws over all completions are known: targets, KL, win rates by reward and judge.

>>> laws = Laws(np.full((2, 4), 0.25), np.array([[1.0, 2.0, 3.0, 4.0]] * 2), np.array([[1.0, 2.0, 4.0, 3.0]] * 2))
>>> point = laws.point(1.0, np.log([[0.1, 0.2, 0.3, 0.4]] * 2))
>>> [float(point.rates[judge]["one draw"][0].round(3)) for judge in ("reward", "judge")]
[0.625, 0.6]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from arms import PROCEDURES, Array, Point, Rates, Targets, compute_targets, get_reward
from exact import Exact, best_of, worst_of

from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import WorstOf

REFERENCES = 20_000
DECILES = 10


@dataclass(frozen=True, eq=False)
class Laws:
    """The reference's laws over the completions of each prompt, and their scores by reward and judge."""

    reference: Float[np.ndarray, "P M"]
    reward: Float[np.ndarray, "P M"]
    judge: Float[np.ndarray, "P M"]
    known: dict[tuple[str, float], Targets] = field(default_factory=dict)
    """Targets that were computed."""

    @cached_property
    def exact(self) -> Exact:
        """Quantiles, optima and KL."""
        return Exact(self.reference, self.reward)

    @cached_property
    def log_reference(self) -> Array:
        """Log-probabilities of the reference."""
        return np.log(self.reference)

    @cached_property
    def table(self) -> ReferenceTable:
        """References in the proportions of the laws, by largest remainders."""
        rows = []
        for at, (law, scores) in enumerate(zip(self.reference, self.reward, strict=True)):
            whole = np.floor(law * REFERENCES).astype(int)
            left = REFERENCES - whole.sum()
            whole[np.argsort(whole - law * REFERENCES, kind="stable")[:left]] += 1
            rows.append((at.to_bytes(16, "big"), np.repeat(scores, whole)))
        return ReferenceTable.build(rows)

    def targets(self, arm: str, kl: float) -> Targets:
        """Compute an arm's targets for infinitely many rollouts: of all completions, at a KL that is exact."""
        if (arm, kl) in self.known:
            return self.known[arm, kl]
        prompts, size = self.reward.shape
        each = np.repeat(np.arange(prompts), size)
        scores = self.reward.astype(np.float32).ravel()
        values = np.asarray(get_reward(arm, kl)(self.table, each, scores), np.float64).reshape(prompts, size)
        beta = self.exact.beta(values, kl)
        top = values.max(axis=1, keepdims=True)
        log_z = (top / beta)[:, 0] + np.log((self.reference * np.exp((values - top) / beta)).sum(axis=1))
        self.known[arm, kl] = Targets(arm, kl, beta, values, log_z)
        return self.known[arm, kl]

    def point(self, factor: float, log_ratios: Float[np.ndarray, "P M"]) -> Point:
        """Compute KL and win rates of a policy from its log-ratios, up to constants of each prompt."""
        law = self.reference * np.exp(log_ratios - log_ratios.max(axis=1, keepdims=True))
        law /= law.sum(axis=1, keepdims=True)
        return Point(factor, self.exact.kl_by_prompt(law), self.rates(law))

    def rates(self, law: Float[np.ndarray, "P M"]) -> Rates:
        """Compute the win rates of each prompt over the reference, by judge and procedure."""
        found: dict[str, dict[str, Array]] = {"reward": {}, "judge": {}}
        for name, procedure in PROCEDURES.items():
            ours, theirs = (self._output(each, procedure) for each in (law, self.reference))
            for judge, scores in (("reward", self.reward), ("judge", self.judge)):
                beaten = np.array([_beaten(*rows) for rows in zip(scores, theirs, strict=True)])
                found[judge][name] = (ours * beaten).sum(axis=1)
        return found

    def _output(self, law: Array, procedure: Any) -> Array:
        """Compute the law of what a procedure selects by the reward, ties at random."""
        mass = self.exact.by_level(law)
        output = worst_of if isinstance(procedure, WorstOf) else best_of
        selected = output(procedure.draws, mass, mass)
        each = np.divide(selected, mass, out=np.zeros_like(mass), where=mass > 0)
        return np.asarray(law * np.take_along_axis(each, self.exact.levels, 1))

    def correlate(self, log_ratios: Array, targets: Array) -> Float[np.ndarray, " P"]:
        """Compute each prompt's correlation of log-ratio and target under the reference."""
        a, b = (each - (self.reference * each).sum(axis=1, keepdims=True) for each in (log_ratios, targets))
        both, *own = ((self.reference * x * y).sum(axis=1) for x, y in ((a, b), (a, a), (b, b)))
        return np.asarray(both / np.sqrt(np.maximum(own[0] * own[1], 1e-30)))

    def density_ratios(self, log_ratios: Array) -> list[float]:
        """Compute the policy's share of each tenth of u, over the reference's: the mean over prompts."""
        law = self.reference * np.exp(log_ratios - log_ratios.max(axis=1, keepdims=True))
        law /= law.sum(axis=1, keepdims=True)
        step = np.minimum((self.exact.quantiles * DECILES).astype(int), DECILES - 1)
        shares = [
            [float((each * (step == i)).sum(axis=1).mean()) for i in range(DECILES)] for each in (law, self.reference)
        ]
        return [ours / theirs if theirs > 0 else float("nan") for ours, theirs in zip(*shares, strict=True)]


def _beaten(scores: Array, law: Array) -> Array:
    """Compute the share of a law that each completion beats by a score, ties one half."""
    order = np.argsort(scores)
    ordered, upto = scores[order], np.concatenate([[0.0], np.cumsum(law[order])])
    below, above = (upto[np.searchsorted(ordered, scores, side)] for side in ("left", "right"))
    return np.asarray((below + above) / 2)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Draws of the reference for training, and some that tell when to stop: how often each completion was drawn."""

    train: Int[np.ndarray, "P M"]
    check: Int[np.ndarray, "P M"]

    @classmethod
    def draw(cls, laws: Laws, k: int, seed: int, held: float = 0.2) -> Rollouts:
        """Draw K completions of each prompt, of which a part is held out."""
        rng = np.random.default_rng([seed, k])
        few = max(1, round(held * k))
        return cls(*(np.array([rng.multinomial(n, law / law.sum()) for law in laws.reference]) for n in (k - few, few)))

    @property
    def drawn(self) -> Int[np.ndarray, " distinct"]:
        """The completions that were drawn, numbered through all prompts."""
        return np.flatnonzero((self.train + self.check).ravel())

    def targets(self, laws: Laws, arm: str, kl: float) -> Float[np.ndarray, " distinct"]:
        """Compute the targets of what was drawn, from ranks among these K rollouts."""
        counts = self.train + self.check
        each = np.array([np.repeat(np.arange(len(row)), row) for row in counts])
        known = compute_targets(arm, np.take_along_axis(laws.reward, each, 1), kl).log_ratios
        found = np.zeros_like(laws.reward)
        np.put_along_axis(found, each, known, 1)
        return np.asarray(found.ravel()[self.drawn])

    def weights(self, counts: Int[np.ndarray, "P M"]) -> Float[np.ndarray, " distinct"]:
        """Return the share that each drawn completion has of its prompt's rollouts."""
        return np.asarray((counts / counts.sum(axis=1, keepdims=True)).ravel()[self.drawn])
