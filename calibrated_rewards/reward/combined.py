"""Combine several calibrated rewards: quantiles, unlike raw scores, can be averaged, compared and multiplied.

Each component has its own reward model and table, and ranks a completion among its prompt's references. So a weight
does not depend on a scale, and the lowest of several is the worst aspect, not the reward model with the lowest scores.

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

A combination of uniform quantiles is not uniform itself. Where a transform is to follow, calibrate the combination,
which is a scorer: `calibrate(prompts, sampler, combined, seed=1)`, and then give it a transform and that table,
`CalibratedReward(combined, table, Exponential(10.0))`. The seed is another one than that of the components, whose own
references would be drawn again. Both rewards are saved and loaded (`saving.load_reward`), served, and named in
`CALIBRATED_REWARD` as a single one is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float64

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.reward.calibrated_reward import CalibratedReward, Directory
from calibrated_rewards.reward.calibrators import EmpiricalCDF
from calibrated_rewards.reward.find_prompts import compute_keys, find_rows, split_texts
from calibrated_rewards.reward.lookup import Scores, match_precision
from calibrated_rewards.reward.verification import Verification
from calibrated_rewards.scorers.ensemble import identify
from calibrated_rewards.scorers.protocol import Scorer, check_pairs, fingerprint
from calibrated_rewards.theory.transforms import Identity


@runtime_checkable
class Combining(Protocol):
    """Combines the quantiles of M components to one value; a function of yours may do it too."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """Compute the values; `least` is half a reference, 1 / 2K, which a logarithm takes in place of 0."""


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
        """Compute the mean."""
        if self.weights is not None and len(self.weights) != len(u):
            raise ValueError(f"WeightedMean needs a weight for each of {len(u)} components, got {self.weights}")
        return np.asarray(np.average(u, axis=0, weights=self.weights))


@dataclass(frozen=True)
class Lowest:
    """min_m u_m: the quantile of the worst aspect; in [0, 1]."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """Compute the minimum."""
        return np.asarray(u.min(0))


@dataclass(frozen=True)
class And:
    """sum_m log u_m: the log-chance to beat one reference by each component, drawn anew for each; at most 0."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """Compute the sum of logarithms."""
        return np.asarray(np.log(np.maximum(u, least)).sum(0))


@dataclass(frozen=True)
class Or:
    """log(1 - prod_m (1 - u_m)): the log-chance to beat its reference by one component at least; at most 0."""

    def __call__(
        self, u: Float64[np.ndarray, "M n"], least: Float64[np.ndarray, "M n"], /
    ) -> Float64[np.ndarray, " n"]:
        """Compute the logarithm."""
        return np.asarray(np.log1p(-np.prod(1 - np.maximum(u, least), axis=0)))


@dataclass(frozen=True, eq=False)
class CombinedReward:
    """A reward that combines several, and is called as each of them is."""

    rewards: Mapping[str, CalibratedReward]
    """The components by name. Their transforms are Identity(), since quantiles are combined."""
    how: Combining = field(default_factory=WeightedMean)
    constraints: Mapping[str, float] = field(default_factory=dict)
    """Components that are no part of the value, and the least quantile of each. The reward of a completion that falls
    short is 1 below that of the worst one that does not, minus the shortfall."""
    name: str = "combined"

    def __post_init__(self) -> None:
        if not isinstance(self.rewards, Mapping):
            raise TypeError(f"a combined reward has its components by name, a dict, got {type(self.rewards).__name__}")
        if unknown := {*self.constraints} - {*self.rewards}:
            raise ValueError(f"a constraint is on one of {sorted(self.rewards)}, got {sorted(unknown)}")
        if not {*self.rewards} - {*self.constraints}:
            raise ValueError("a combined reward needs a component that is no constraint, got none")
        if not all(isinstance(least, Real) and 0 <= float(least) <= 1 for least in self.constraints.values()):
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
        _ = self._combine({name: np.zeros(1) for name in self.rewards}, {name: np.ones(1) for name in self.rewards})

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], completion_ids: Any = None, **columns: Any
    ) -> list[float]:
        """Compute the reward of each completion; ids, other columns and functions for logging go to the components."""
        prompts, completions = list(prompts), list(completions)
        log_metric = columns.get("log_metric")
        u = {
            name: np.asarray(
                reward(prompts, completions, completion_ids, **_log_under(name, reward, columns)), np.float64
            )
            for name, reward in self.rewards.items()
        }
        least = {
            name: _find_least(reward, prompts, columns.get(reward.id_column) if reward.id_column else None)
            for name, reward in self.rewards.items()
        }
        values = self._combine(u, least)
        if log_metric is not None:
            for name, least_u in self.constraints.items():
                log_metric(f"{self.name}/{name}_violated", float((u[name] < least_u).mean()) if len(values) else 0.0)
        rewards: list[float] = values.tolist()
        return rewards

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        ids: Sequence[Any] | None = None,
        *,
        watch: bool = False,
    ) -> Scores:
        """Compute the reward of each completion; a prompt that is None is found by its id.

        `raw` is the reward too, since a combination has no score of its own; `u` is the lowest quantile of a component.
        Ids are those of `id_column`: a component with another one finds prompts by themselves.
        """
        prompts, completions = check_pairs(prompts, completions)
        own = {name: ids if each.id_column in (None, self.id_column) else None for name, each in self.rewards.items()}
        scores = {n: each.score(prompts, completions, own[n], watch=watch) for n, each in self.rewards.items()}
        return self._join(scores, {name: _find_least(each, prompts, own[name]) for name, each in self.rewards.items()})

    def check(self, prompts: Sequence[Any]) -> None:
        """Refuse a prompt that a component has no references for, before anything is drawn for it."""
        for reward in self.rewards.values():
            reward.check(prompts)

    def score_texts(self, texts: Sequence[str]) -> Scores:
        """`score` for texts in which the completion follows its prompt, the longest that a component knows."""
        scores = {name: reward.score_texts(texts) for name, reward in self.rewards.items()}
        least = {
            name: _find_least(reward, [prompt for prompt, _ in split_texts(reward.table, texts, False)], None)
            for name, reward in self.rewards.items()
        }
        return self._join(scores, least)

    def from_scores(self, prompts: Sequence[Prompt], raw: Mapping[str, Any], ids: Any = None) -> Any:
        """Compute the rewards of raw scores by component name: arrays, or tensors, of shape (P,) or (P, G)."""
        if {*raw} != {*self.rewards}:
            raise ValueError(f"raw scores come by the names {sorted(self.rewards)}, got {sorted(raw)}")
        prompts = list(prompts)
        first = next(iter(raw.values()))
        shape = tuple(np.shape(first))
        u, least = {}, {}
        for name, reward in self.rewards.items():
            quantiles = reward.from_scores(prompts, raw[name], ids)
            array = quantiles if isinstance(quantiles, np.ndarray) else quantiles.detach().cpu().double().numpy()
            u[name] = np.asarray(array, np.float64).ravel()
            least[name] = np.repeat(_find_least(reward, prompts, ids), int(np.prod(shape[1:])))
        values = self._combine(u, least).reshape(shape)
        if isinstance(first, np.ndarray | list | tuple):
            return values
        import torch

        return match_precision(torch.from_numpy(values).to(first.device), first)

    def verify(self, tolerance: float | None = None) -> Verification:
        """Score the probes of each component's table again; ValueError names the component whose model is another."""
        results = {}
        for name, reward in self.rewards.items():
            try:
                results[name] = reward.verify(tolerance)
            except ValueError as error:
                raise ValueError(f"the component {name!r}: {error}") from error
        return Verification(
            sum(each.probes for each in results.values()),
            max(each.worst for each in results.values()),
            max(each.tolerance for each in results.values()),
            tuple(f"{name}: {setting}" for name, each in results.items() for setting in each.differs),
        )

    def save_pretrained(self, save_directory: Directory) -> None:
        """Write each component as its own `save_pretrained` does, and how they are combined, to a directory."""
        from calibrated_rewards.reward import saving

        saving.save_combined(self, save_directory)

    @classmethod
    def from_pretrained(
        cls,
        name: Directory,
        *,
        scorers: Mapping[str, Scorer] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        **changes: Any,
    ) -> "CombinedReward":
        """Load what `save_pretrained` wrote or `push_to_hub` uploaded, as `CalibratedReward.from_pretrained` does.

        `scorers` are reward models in place of saved ones, by the name of their component.
        """
        from calibrated_rewards.reward import saving

        at = saving.find_folder(name, revision, token)
        reward: CombinedReward = saving.load_combined(cls, at, scorers or {}, trust_remote_code, changes)
        return reward

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **card: Any
    ) -> str:
        """Upload what `save_pretrained` writes and a card, as `CalibratedReward.push_to_hub` does."""
        from calibrated_rewards.reward import hub

        return hub.push(self, repo_id, private=private, token=token, **card)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def id_column(self) -> str | None:
        """The dataset column with the ids of prompts: that of the first component that has one."""
        return next((reward.id_column for reward in self.rewards.values() if reward.id_column), None)

    @property
    def thread_safe(self) -> bool:
        """True if the reward models of all components are thread-safe: a call may use each of them."""
        return all(reward.thread_safe for reward in self.rewards.values())

    def fingerprint(self) -> dict[str, Any]:
        """Describe all that the values depend on: each component's scorer and references, and the combination."""
        parts = {
            name: {"scorer": fingerprint(reward.scorer), "table": reward.table.describe(), "meta": reward.table.meta}
            for name, reward in self.rewards.items()
        }
        return {"kind": "combined", "how": identify(self.how), "constraints": dict(self.constraints), "of": parts}

    def _join(self, scores: Mapping[str, Scores], least: Mapping[str, Float64[np.ndarray, " n"]]) -> Scores:
        """Combine the rewards of the components, which are their quantiles."""
        values = self._combine({name: np.asarray(each.reward, np.float64) for name, each in scores.items()}, least)
        u = np.min([each.u for each in scores.values()], axis=0)
        known = np.all([each.known for each in scores.values()], axis=0)
        return Scores(values.tolist(), values.astype(np.float32), u, known)

    def _combine(
        self, u: Mapping[str, Float64[np.ndarray, " n"]], least: Mapping[str, Float64[np.ndarray, " n"]]
    ) -> Float64[np.ndarray, " n"]:
        components = [name for name in self.rewards if name not in self.constraints]
        members, floor = np.stack([u[name] for name in components]), np.stack([least[name] for name in components])
        if not members.shape[1]:
            return np.zeros(0)  # some functions, such as an average, have no value for no pairs
        values = self.how(members, floor)
        short = [np.maximum(least_u - u[name], 0.0) for name, least_u in self.constraints.items()]
        if not short:
            return values
        shortfall = np.max(short, axis=0)
        return np.where(shortfall > 0, self.how(np.zeros_like(floor), floor) - 1 - shortfall, values)


Reward: TypeAlias = CalibratedReward | CombinedReward


def _find_least(reward: CalibratedReward, prompts: Sequence[Prompt], ids: Any) -> Float64[np.ndarray, " n"]:
    """Half a reference of each prompt, 1 / 2K; next to 0 for an unknown prompt."""
    rows = find_rows(reward.table, compute_keys(prompts), ids)
    return np.asarray(0.5 / np.where(rows >= 0, reward.table.counts(np.maximum(rows, 0)), 10**6))


def _log_under(name: str, reward: CalibratedReward, columns: dict[str, Any]) -> dict[str, Any]:
    """Let a component without a name of its own log its metrics under that which it has here."""
    log_metric = columns.get("log_metric")
    if log_metric is None or reward.name is not None:
        return columns
    return columns | {"log_metric": _RenamedMetrics(log_metric, reward.metric_prefix, name)}


@dataclass(frozen=True)
class _RenamedMetrics:
    """A trainer's function for metrics, with another first part of their names."""

    log_metric: Callable[[str, float], Any]
    before: str
    after: str

    def __call__(self, metric: str, value: float) -> None:
        self.log_metric(f"{self.after}/{metric.removeprefix(f'{self.before}/')}", value)
