"""What a calibrated reward says of pairs of prompt and completion."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64


@dataclass(frozen=True)
class Score:
    """Of one completion."""

    reward: float | None
    """What a trainer maximises; None where the prompt is unknown and `on_missing="skip"`."""
    raw: float
    """What the reward model said."""
    u: float
    """The quantile among the prompt's references (Eq. 12); one half where the prompt is unknown."""
    known: bool
    """Whether the prompt has references."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Of many, one after the other."""

    reward: list[float | None]
    raw: Float32[np.ndarray, " n"]
    u: Float64[np.ndarray, " n"]
    known: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.reward)

    def __getitem__(self, at: int) -> Score:
        return Score(self.reward[at], float(self.raw[at]), float(self.u[at]), bool(self.known[at]))

    def __iter__(self) -> Iterator[Score]:
        return (self[at] for at in range(len(self)))

    @classmethod
    def of(cls, each: list[Score]) -> "Scores":
        """Several as one."""
        raw = np.array([score.raw for score in each], np.float32)
        u, known = np.array([score.u for score in each]), np.array([score.known for score in each], np.bool_)
        return cls([score.reward for score in each], raw, u.astype(np.float64), known)
