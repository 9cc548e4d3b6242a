"""Scorers made of something else: of a function of one pair, minus a scorer, or several combined into one.

`Ensemble` combines by a `Mean`, the worst (`Min`), or the mean less what the scorers disagree by (`LowerBound`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import (
    Scorer,
    check_pairs,
    check_prompts,
    check_scores,
    fingerprint,
    is_thread_safe,
    name_of,
    reads_messages,
    score,
)


@dataclass(frozen=True)
class Function:
    """Scores with `function(prompt, completion)`, one pair at a time.

    >>> def exclamation(prompt: str, completion: str) -> float:
    ...     return float(completion.count("!"))
    >>> scorer = Function(exclamation, name="exclamation", version="2")
    >>> scorer(["Hi", "Hi"], ["Hello!", "Go away"])
    array([1., 0.], dtype=float32)
    >>> scorer.fingerprint()
    {'kind': 'function', 'name': 'exclamation', 'version': '2'}

    A function of two lists is a scorer as it stands, also one of TRL's reward functions, which need no more than these:

    >>> from calibrated_rewards.scorers.protocol import score
    >>> def brevity(prompts, completions, **kwargs):
    ...     return [-float(len(c)) for c in completions]
    >>> score(brevity, ["Hi", "Hi"], ["Hello!", "Go away"])
    array([-6., -7.], dtype=float32)
    """

    function: Callable[[Any, Any], Any]
    """A number for a prompt and a completion of it; higher is better."""
    name: str = ""
    """Its name in the fingerprint; by default where the function is defined, module.function."""
    version: str = ""
    """Change it whenever the function changes, and its code is not compared; "": its code and state are."""

    # The function gets what calibration gave it, so messages may not take the place of a text.
    reads_messages = False
    thread_safe = property(lambda self: is_thread_safe(self.function), doc="True if the function is.")

    def __post_init__(self) -> None:
        if self.name:
            return
        function = self.function
        if not isinstance(function, FunctionType | BuiltinFunctionType) or "<" in function.__qualname__:
            raise ValueError(
                f"Function needs a name for what is not a function of a module, got {function!r}: say name=..., "
                "by which a calibration knows the scorer again"
            )
        object.__setattr__(self, "name", f"{function.__module__}.{function.__qualname__}")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        prompts, completions = check_pairs(prompts, completions)
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                scores.append(float(self.function(prompt, completion)))
            except Exception as error:
                error.add_note(f"{self.name} was scoring {start_of(completion)} for the prompt {start_of(prompt)}")
                raise
        return check_scores(scores, prompts, completions, self.name)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on: the given name and version; without a version, the function too."""
        function = {} if self.version else {"function": fingerprint(self.function)}
        return {"kind": "function", "name": self.name, "version": self.version, **function}


@dataclass(frozen=True)
class Cost:
    """Minus a scorer: a completion that costs little scores high.

    >>> Cost(lambda prompts, completions: [len(c) for c in completions])(["Hi", "Hi"], ["Hello!", "Go away"])
    array([-6., -7.], dtype=float32)
    """

    scorer: Scorer

    reads_messages = property(lambda self: reads_messages(self.scorer), doc="True if the scorer does.")
    thread_safe = property(lambda self: is_thread_safe(self.scorer), doc="True if the scorer is.")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Return minus the cost of each pair."""
        return -score(self.scorer, prompts, completions)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that the scorer refuses."""
        check_prompts(self.scorer, prompts)

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        return {"kind": "cost", "of": fingerprint(self.scorer)}


@runtime_checkable
class Combination(Protocol):
    """A way to make one score of those of M scorers; yours may do it otherwise."""

    def __call__(self, members: Float64[np.ndarray, "M n"], /) -> Float64[np.ndarray, " n"]:
        """Combine each column of scores into one."""


@dataclass(frozen=True)
class Mean:
    """The mean of the scores of all scorers.

    >>> Mean()(np.array([[1.0], [4.0]]))
    array([2.5])
    """

    def __call__(self, members: Float64[np.ndarray, "M n"], /) -> Float64[np.ndarray, " n"]:
        """Return the mean of each column."""
        return np.asarray(members.mean(0))


@dataclass(frozen=True)
class Min:
    """The lowest: a completion is as good as the scorer that likes it least says.

    >>> Min()(np.array([[1.0], [4.0]]))
    array([1.])
    """

    def __call__(self, members: Float64[np.ndarray, "M n"], /) -> Float64[np.ndarray, " n"]:
        """Return the lowest of each column."""
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
        """Return members.mean(0) - k * members.std(0)."""
        return np.asarray(members.mean(0) - self.k * members.std(0))


@dataclass(frozen=True)
class Ensemble:
    """A combination of scorers; each counts as (score - shift) / scale.

    Raw scores of different reward models have different scales: as they are, the one with the widest spread outweighs
    all others in a mean, and the one with the lowest level is nearly always the minimum. So give each one's shift and
    scale: the mean and the standard deviation of its scores for the reference completions, which
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

    reads_messages = property(lambda self: all(map(reads_messages, self.scorers)), doc="True if all members do.")

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
        """Build an ensemble in which each scorer has mean 0 and standard deviation 1 over these completions."""
        prompts, completions = check_pairs(prompts, completions)
        scorers, shifts, scales = tuple(scorers), [], []
        for scorer in scorers:
            scores = score(scorer, prompts, completions).astype(np.float64)
            if len(scores) < 2 or not scores.std() > 0:
                raise ValueError(
                    f"a scale needs two different scores, {name_of(scorer)} gave {len(scores)} without a spread"
                )
            shifts.append(float(scores.mean()))
            scales.append(float(scores.std()))
        return cls(scorers, Mean() if how is None else how, shifts, scales)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Combine the scores of each pair."""
        prompts, completions = check_pairs(prompts, completions)
        if not prompts:
            return np.empty(0, np.float32)
        members = np.stack([score(scorer, prompts, completions).astype(np.float64) for scorer in self.scorers])
        shifts, scales = np.asarray(self.shifts)[:, None], np.asarray(self.scales)[:, None]
        scores = self.how((members - shifts) / scales)
        return check_scores(scores, prompts, completions, f"the ensemble's {name_of(self.how)}")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that a member refuses."""
        for scorer in self.scorers:
            check_prompts(scorer, prompts)

    @property
    def thread_safe(self) -> bool:
        """True if all members, and a combination of yours, say so."""
        how_is_safe = isinstance(self.how, Mean | Min | LowerBound) or is_thread_safe(self.how)
        return how_is_safe and all(map(is_thread_safe, self.scorers))

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        return {
            "kind": "ensemble",
            "of": [fingerprint(scorer) for scorer in self.scorers],
            "how": identify(self.how),
            "shifts": np.asarray(self.shifts).tolist(),
            "scales": np.asarray(self.scales).tolist(),
        }


def identify(how: Any) -> Any:
    """Identify a way to combine scores, alike in every process: by the repr of one of ours, or by its fingerprint."""
    ours = is_dataclass(how) and type(how).__module__.startswith("calibrated_rewards.")
    return repr(how) if ours else fingerprint(how)
