"""Several calibrated rewards as one: quantiles, unlike raw scores, can be averaged, compared and multiplied.

Each component has its own reward model and table, and says how good a completion is among its prompt's references. So
a weight means what it says, and the lowest of several is the aspect that is worst, not the one with the lowest scale.

>>> from calibrated_rewards import ReferenceTable
>>> from calibrated_rewards.testing.suites import NumberScorer
>>> table = ReferenceTable.build([("2+2=", [1.0, 2.0, 3.0, 5.0])])
>>> length = ReferenceTable.build([("2+2=", [-9.0, -5.0, -3.0, -2.0])])
>>> brief = CalibratedReward(lambda prompts, completions: [-len(c) for c in completions], length)
>>> both = {"right": CalibratedReward(NumberScorer(), table), "brief": brief}
>>> CombinedReward(both, Lowest())(["2+2=", "2+2="], ["4", "It is 4"])
[0.75, 0.25]
>>> CombinedReward(both, constraints={"brief": 0.5})(["2+2=", "2+2="], ["4", "It is 4"])
[0.75, -1.25]

A combination of uniform quantiles is not uniform itself. Where a transform is to follow, calibrate the combination: it
is a scorer, `calibrate(prompts, sampler, combined)`, and then `CalibratedReward(combined, table, Exponential(10.0))`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.scorers.ensemble import identify
from calibrated_rewards.scorers.protocol import fingerprint
from calibrated_rewards.theory.transforms import Identity


@runtime_checkable
class Combining(Protocol):
    """Makes one value of the quantiles of M components; yours may do it otherwise."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """The values; `least` is half a reference, 1 / 2K, where a logarithm takes 0 to be."""


@dataclass(frozen=True)
class WeightedMean:
    """sum_m w_m u_m / sum_m w_m: in [0, 1]."""

    weights: tuple[float, ...] | None = None
    """One for each component, in their order; None for equal ones."""

    def __post_init__(self) -> None:
        if isinstance(self.weights, Mapping):
            raise TypeError("WeightedMean has its weights in the components' order, a tuple, got a mapping")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))
            if not (np.isfinite(self.weights).all() and min(self.weights) >= 0 and sum(self.weights) > 0):
                raise ValueError(f"WeightedMean needs finite weights >= 0, not all 0, got {self.weights}")

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """The mean."""
        if self.weights is not None and len(self.weights) != len(u):
            raise ValueError(f"WeightedMean needs a weight for each of {len(u)} components, got {self.weights}")
        return np.asarray(np.average(u, axis=0, weights=self.weights))


@dataclass(frozen=True)
class Lowest:
    """min_m u_m: as good as its worst aspect; in [0, 1]."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """The minimum."""
        return np.asarray(u.min(0))


@dataclass(frozen=True)
class And:
    """sum_m log u_m: the log-chance to beat one reference by each component, drawn anew for each; at most 0."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """The sum of logarithms."""
        return np.asarray(np.log(np.maximum(u, least)).sum(0))


@dataclass(frozen=True)
class Or:
    """log(1 - prod_m (1 - u_m)): the log-chance to beat its reference by one component at least; at most 0."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """The logarithm."""
        return np.asarray(np.log1p(-np.prod(1 - np.maximum(u, least), axis=0)))


@dataclass(frozen=True, eq=False)
class CombinedReward:
    """A reward made of several, which is called as each of them is."""

    rewards: Mapping[str, CalibratedReward]
    """By name. Their transforms are Identity(): what is combined is quantiles."""
    how: Combining = field(default_factory=WeightedMean)
    constraints: Mapping[str, float] = field(default_factory=dict)
    """Components that are no part of the value, and the least quantile of each. A completion that falls short is worth
    1 less than the worst that does not, less what it falls short by."""
    name: str = "combined"

    def __post_init__(self) -> None:
        if not isinstance(self.rewards, Mapping):
            raise TypeError(f"a combined reward has its components by name, a dict, got {type(self.rewards).__name__}")
        if unknown := {*self.constraints} - {*self.rewards}:
            raise ValueError(f"a constraint is on one of {sorted(self.rewards)}, got {sorted(unknown)}")
        if not {*self.rewards} - {*self.constraints}:
            raise ValueError("a combined reward needs a component that is no constraint, got none")
        if not all(0 <= least <= 1 for least in self.constraints.values()):
            raise ValueError(f"a constraint is a quantile in [0, 1], got {dict(self.constraints)}")
        for name, reward in self.rewards.items():
            if not isinstance(reward.transform, Identity) or reward.scale == "standard":
                raise ValueError(
                    f"quantiles are combined, the component {name!r} has the transform {reward.transform!r} and the "
                    f"scale {reward.scale!r}: give it Identity(), calibrate the combination, and transform that"
                )
            if not isinstance(reward.calibration, EmpiricalCDF):
                raise ValueError(
                    f"quantiles are combined, the component {name!r} gives {reward.calibration!r}'s values"
                )
            if reward.on_missing == "skip":
                raise ValueError(f'the component {name!r} skips unknown prompts: on_missing="raise" or "neutral"')
        _ = self._combined({name: np.zeros(1) for name in self.rewards}, {name: np.ones(1) for name in self.rewards})

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        """The reward of each completion; columns, ids among them, and functions for logging go to the components."""
        prompts, completions = list(prompts), list(completions)
        log_metric = columns.get("log_metric")
        u = {
            name: np.asarray(reward(prompts, completions, completion_ids, **columns), np.float64)
            for name, reward in self.rewards.items()
        }
        least = {name: self._least(reward, prompts, columns) for name, reward in self.rewards.items()}
        values = self._combined(u, least)
        if log_metric is not None:
            for name, at_least in self.constraints.items():
                log_metric(f"{self.name}/{name}_violated", float((u[name] < at_least).mean()) if len(values) else 0.0)
        rewards: list[float] = values.tolist()
        return rewards

    def from_scores(self, prompts: Sequence[Prompt], raw: Mapping[str, Any], ids: Any = None) -> Any:
        """The rewards of each component's raw scores, by its name: arrays, or tensors, of shape (P,) or (P, G)."""
        if {*raw} != {*self.rewards}:
            raise ValueError(f"raw scores come by the names {sorted(self.rewards)}, got {sorted(raw)}")
        prompts = list(prompts)
        first = next(iter(raw.values()))
        shape = tuple(np.shape(first))
        u = {name: _flat(reward.from_scores(prompts, raw[name], ids)) for name, reward in self.rewards.items()}
        least = {}
        for name, reward in self.rewards.items():
            each = 0.5 / _counts(reward, reward.table.find(list(prompts), ids))
            least[name] = np.repeat(each, int(np.prod(shape[1:])))
        values = self._combined(u, least).reshape(shape)
        if isinstance(first, np.ndarray | list | tuple):
            return values
        import torch

        from calibrated_rewards.reward.device import like

        return like(torch.from_numpy(values).to(first.device), first)

    @property
    def thread_safe(self) -> bool:
        """Whether all components' reward models say so, of which a call may ask each."""
        return all(reward.thread_safe for reward in self.rewards.values())

    def fingerprint(self) -> dict[str, Any]:
        """What the values depend on: each component's scorer and references, and how they are combined."""
        parts = {
            name: {"scorer": fingerprint(reward.scorer), "table": reward.table.describe(), "meta": reward.table.meta}
            for name, reward in self.rewards.items()
        }
        return {"kind": "combined", "how": identify(self.how), "constraints": dict(self.constraints), "of": parts}

    def _combined(
        self, u: Mapping[str, Float64[np.ndarray, " n"]], least: Mapping[str, Float64[np.ndarray, " n"]]
    ) -> Float64[np.ndarray, " n"]:
        valued = [name for name in self.rewards if name not in self.constraints]
        members, floor = np.stack([u[name] for name in valued]), np.stack([least[name] for name in valued])
        values = self.how(members, floor)
        short = [np.maximum(at_least - u[name], 0.0) for name, at_least in self.constraints.items()]
        if not short:
            return values
        shortfall = np.max(short, axis=0)
        return np.where(shortfall > 0, self.how(np.zeros_like(floor), floor) - 1 - shortfall, values)

    def _least(
        self, reward: CalibratedReward, prompts: Sequence[Prompt], columns: Mapping[str, Any]
    ) -> Float64[np.ndarray, " n"]:
        ids = columns.get(reward.id_column) if reward.id_column else None
        return np.asarray(0.5 / _counts(reward, reward.table.find(list(prompts), ids)))


def _counts(reward: CalibratedReward, rows: Any) -> Any:
    """K of each row; of an unknown prompt, as good as many."""
    return np.where(rows >= 0, reward.table.counts(np.maximum(rows, 0)), 10**6)


def _flat(values: Any) -> Float64[np.ndarray, " n"]:
    array = values if isinstance(values, np.ndarray) else values.detach().cpu().double().numpy()
    return np.asarray(array, np.float64).ravel()
