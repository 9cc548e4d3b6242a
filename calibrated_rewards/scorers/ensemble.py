"""A plain function of one prompt and one completion, as a scorer that has an identity.

Minus a scorer: cost models, and whatever else says how bad a completion is.

Several scorers as one: their mean, the worst of them, or the mean less what they disagree by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import (
    Scorer,
    checked,
    fingerprint,
    is_thread_safe,
    name_of,
    paired,
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
    """What gives a number for a prompt and a completion of it; higher is better."""
    name: str = ""
    """What the fingerprint calls it; where it stands (module.function) if nothing is said."""
    version: str = ""
    """Say another one whenever the function changes, and its code is not compared; "": its code and state are."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", _place(self.function))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        asked, answered = paired(prompts, completions)
        scores = [self._score(prompt, completion) for prompt, completion in zip(asked, answered, strict=True)]
        return checked(scores, asked, answered, self.name)

    @property
    def reads_messages(self) -> bool:
        """Whether messages may take the place of a text: no, the function gets what calibration gave it."""
        return False

    @property
    def thread_safe(self) -> bool:
        """Whether the function says so."""
        return is_thread_safe(self.function)

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on: the name and the version that were given; without a version, the function too."""
        own = {} if self.version else {"function": fingerprint(self.function)}
        return {"kind": "function", "name": self.name, "version": self.version, **own}

    def _score(self, prompt: Prompt, completion: Completion) -> float:
        try:
            return float(self.function(prompt, completion))
        except Exception as error:
            error.add_note(f"{self.name} was scoring {start_of(completion)} for the prompt {start_of(prompt)}")
            raise


def _place(function: Callable[[Any, Any], Any]) -> str:
    """Where a function stands; refused for those that stand nowhere, or are more than their code."""
    if isinstance(function, FunctionType | BuiltinFunctionType) and "<" not in function.__qualname__:
        return f"{function.__module__}.{function.__qualname__}"
    raise ValueError(
        f"Function needs a name for what is not a function of a module, got {function!r}: say name=..., "
        "by which a calibration knows the scorer again"
    )


@dataclass(frozen=True)
class Cost:
    """The other way round: a completion that costs little scores high.

    >>> Cost(lambda prompts, completions: [len(c) for c in completions])(["Hi", "Hi"], ["Hello!", "Go away"])
    array([-6., -7.], dtype=float32)
    """

    scorer: Scorer

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Minus the cost of each pair."""
        return -score(self.scorer, prompts, completions)

    @property
    def reads_messages(self) -> bool:
        """Whether the scorer reads messages."""
        return reads_messages(self.scorer)

    @property
    def thread_safe(self) -> bool:
        """Whether the scorer says so."""
        return is_thread_safe(self.scorer)

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {"kind": "cost", "of": fingerprint(self.scorer)}


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
