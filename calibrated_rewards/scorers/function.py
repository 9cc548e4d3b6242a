"""A plain function of one prompt and one completion, as a scorer that has an identity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import checked, fingerprint, paired
from calibrated_rewards.scorers.serial import is_thread_safe


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
