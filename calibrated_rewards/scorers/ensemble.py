"""Several scorers as one: their mean, the worst of them, or the mean less what they disagree by."""

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import Scorer, checked, fingerprint, name_of, paired, reads_messages, score
from calibrated_rewards.scorers.serial import is_thread_safe


@runtime_checkable
class Combination(Protocol):
    """Makes one score of those of M scorers; yours may do it otherwise."""

    def __call__(self, members: Float64[np.ndarray, "M n"], /) -> Float64[np.ndarray, " n"]:
        """The scores."""


@dataclass(frozen=True)
class Mean:
    """The mean of all.

    >>> Mean()(np.array([[1.0], [4.0]]))
    array([2.5])
    """

    def __call__(self, members: Float64[np.ndarray, "M n"], /) -> Float64[np.ndarray, " n"]:
        """members.mean(0)."""
        return np.asarray(members.mean(0))


@dataclass(frozen=True)
class Min:
    """The lowest: a completion is as good as the scorer that likes it least says.

    >>> Min()(np.array([[1.0], [4.0]]))
    array([1.])
    """

    def __call__(self, members: Float64[np.ndarray, "M n"], /) -> Float64[np.ndarray, " n"]:
        """members.min(0)."""
        return np.asarray(members.min(0))


@dataclass(frozen=True)
class LowerBound:
    """The mean minus k standard deviations (those of the M scores, not of a population they were drawn from).

    >>> LowerBound(k=1.0)(np.array([[1.0], [4.0]]))
    array([1.])
    """

    k: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.k < np.inf:
            raise ValueError(f"LowerBound needs a finite k >= 0, got k={self.k}")

    def __call__(self, members: Float64[np.ndarray, "M n"], /) -> Float64[np.ndarray, " n"]:
        """members.mean(0) - k * members.std(0)."""
        return np.asarray(members.mean(0) - self.k * members.std(0))


@dataclass(frozen=True)
class Ensemble:
    """Combines scorers; each counts as (score - shift) / scale.

    Raw scores of different reward models stand on different scales: as they are, the one with the widest spread
    outweighs all others in a mean, and the one with the lowest level is nearly always the minimum. So say each one's
    shift and scale: the mean and the standard deviation of its scores for the reference completions, which
    `Ensemble.standardised` measures. A smaller scale is a larger weight.

    >>> length = lambda prompts, completions: [len(c) for c in completions]
    >>> calm = lambda prompts, completions: [-c.count("!") for c in completions]
    >>> Ensemble([length, calm], Min(), shifts=[6.0, 0.0])(["Hi", "Hi"], ["Hello!", "Go away"])
    array([-1.,  0.], dtype=float32)
    """

    scorers: Sequence[Scorer]
    how: Combination = field(default_factory=Mean)
    shifts: Sequence[float] | np.ndarray | None = None
    """One for each scorer; None for 0."""
    scales: Sequence[float] | np.ndarray | None = None
    """One for each scorer, all above 0; None for 1."""

    def __post_init__(self) -> None:
        scorers = tuple(self.scorers)
        count = len(scorers)
        if not count:
            raise ValueError("Ensemble needs at least one scorer, got none")
        shifts = [0.0] * count if self.shifts is None else list(self.shifts)
        scales = [1.0] * count if self.scales is None else list(self.scales)
        for name, values in {"shifts": shifts, "scales": scales}.items():
            if len(values) != count or not np.isfinite(values).all():
                raise ValueError(f"Ensemble needs one finite number for each of {count} scorers, got {name}={values}")
        if min(scales) <= 0:
            raise ValueError(f"Ensemble needs scales > 0, got scales={scales} (for minus a scorer there is Cost)")
        object.__setattr__(self, "scorers", scorers)
        object.__setattr__(self, "shifts", tuple(map(float, shifts)))
        object.__setattr__(self, "scales", tuple(map(float, scales)))

    @classmethod
    def standardised(
        cls,
        scorers: Sequence[Scorer],
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        how: Combination | None = None,
    ) -> "Ensemble":
        """An ensemble in which each scorer has mean 0 and standard deviation 1 over these completions."""
        asked, answered = paired(prompts, completions)
        members = tuple(scorers)
        found = [score(scorer, asked, answered).astype(np.float64) for scorer in members]
        for scorer, scores in zip(members, found, strict=True):
            if len(scores) < 2 or not scores.std() > 0:
                raise ValueError(
                    f"a scale needs two different scores, {name_of(scorer)} gave {len(scores)} without a spread"
                )
        shifts, scales = [float(s.mean()) for s in found], [float(s.std()) for s in found]
        return cls(members, Mean() if how is None else how, shifts, scales)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The combined score of each pair."""
        asked, answered = paired(prompts, completions)
        if not asked:
            return np.empty(0, np.float32)
        members = np.stack([score(scorer, asked, answered).astype(np.float64) for scorer in self.scorers])
        shifts, scales = np.asarray(self.shifts)[:, None], np.asarray(self.scales)[:, None]
        return checked(self.how((members - shifts) / scales), asked, answered, f"the ensemble's {name_of(self.how)}")

    @property
    def reads_messages(self) -> bool:
        """Whether all of the scorers read messages."""
        return all(map(reads_messages, self.scorers))

    @property
    def thread_safe(self) -> bool:
        """Whether all members, and a combination of yours, say so."""
        return all(map(is_thread_safe, self.scorers)) and (
            isinstance(self.how, Mean | Min | LowerBound) or is_thread_safe(self.how)
        )

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "kind": "ensemble",
            "of": [fingerprint(scorer) for scorer in self.scorers],
            "how": identity_of(self.how),
            "shifts": np.asarray(self.shifts).tolist(),
            "scales": np.asarray(self.scales).tolist(),
        }


def identity_of(how: Any) -> Any:
    """What a way to combine scores is, the same in every process: the repr of one of ours, or a fingerprint."""
    ours = is_dataclass(how) and type(how).__module__.startswith("calibrated_rewards.")
    return repr(how) if ours else fingerprint(how)
