"""What a scorer is, and the one place where its answer is checked."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of


@runtime_checkable
class Scorer(Protocol):
    """Scores completions: `scorer(prompts, completions)`, two lists of one length, gives as many numbers."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Any:
        """One score for each pair, higher is better: a list, a numpy array or a torch tensor."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A scorer that can say what it is: two that say the same give the same scores."""

    def fingerprint(self) -> dict[str, Any]:
        """What its scores depend on, as JSON: weights, tokenizer, template, precision, truncation."""


def score(scorer: Scorer, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
    """The scores that any scorer gives, checked: one for each pair, none of them nan or infinite."""
    if len(prompts) != len(completions):
        raise ValueError(
            f"each completion needs its prompt, got {len(prompts)} prompts and {len(completions)} completions"
        )
    answer = scorer(prompts, completions) if len(prompts) else []
    scores = _as_array(answer, scorer)
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"a scorer gives one number a completion, {_name(scorer)} gave shape {scores.shape} for {len(prompts)}"
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"a score is a finite number, {_name(scorer)} gave {scores[i]} for completion {start_of(completions[i])} "
            f"of prompt {start_of(prompts[i])} (and {len(bad) - 1} others of {len(scores)})"
        )
    return scores


def fingerprint(scorer: Scorer) -> dict[str, Any]:
    """What a scorer says of itself; for one that says nothing, where its code is."""
    if isinstance(scorer, Fingerprinted):
        return scorer.fingerprint()
    return {"kind": "callable", "name": _name(scorer)}


def _as_array(answer: Any, scorer: Scorer) -> Float32[np.ndarray, "..."]:
    try:
        return np.asarray(_without_tensors(answer), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_name(scorer)} gave no list of numbers: {start_of(answer)}") from error


def _without_tensors(answer: Any) -> Any:
    """Torch's tensors as arrays, without importing torch: numpy knows no gradient, no bfloat16, no other device."""
    if type(answer).__module__.partition(".")[0] == "torch":
        return answer.detach().to("cpu").float().numpy()
    return [_without_tensors(each) for each in answer] if isinstance(answer, list | tuple) else answer


def _name(scorer: Scorer) -> str:
    named = scorer if isinstance(scorer, type | FunctionLike) else type(scorer)
    return f"{named.__module__}.{named.__qualname__}"


@runtime_checkable
class FunctionLike(Protocol):
    """What has a name of its own: functions, methods, classes."""

    __module__: str
    __qualname__: str
