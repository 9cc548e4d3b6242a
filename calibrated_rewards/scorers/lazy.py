"""A scorer that is remembered by how it is loaded: it pickles as that, not as its weights."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.protocol import Scorer, check_finite, check_pairs, fingerprint, is_thread_safe, name_of

# One at a time: two threads that ask first would otherwise load the weights twice.
LOADING = threading.RLock()


@runtime_checkable
class Recipe(Protocol):
    """How a scorer is loaded: small, and the same in every process."""

    @property
    def name(self) -> str:
        """Where it comes from."""

    def load(self) -> Any:
        """The scorer itself, with its weights."""


@dataclass(frozen=True, repr=False)
class Loaded:
    """A scorer and its recipe. In another process, after pickling, it loads again when it is first called."""

    recipe: Recipe

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The score of each pair, each a finite number."""
        asked, answered = check_pairs(prompts, completions)
        return check_finite(self.scorer(asked, answered), asked, answered, name_of(self.scorer))

    @property
    def scorer(self) -> Scorer:
        """The scorer that does the work, of the kind that the recipe leads to; the same one from then on."""
        with LOADING:
            return self._scorer  # type: ignore[no-any-return]

    @property
    def thread_safe(self) -> bool:
        """Whether the scorer that was loaded says so."""
        return is_thread_safe(self.scorer)

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return fingerprint(self.scorer)

    def __repr__(self) -> str:
        if "_scorer" not in self.__dict__:
            return f"Loaded({self.recipe.name!r})"
        says, kind = self.fingerprint(), type(self.scorer).__name__
        if isinstance(self.scorer, Cost):
            says, kind = says["of"], f"Cost({type(self.scorer.scorer).__name__})"
        labels, limit = says.get("labels"), says.get("text", {}).get("max_length")
        details = [f"{labels}"] * (labels is not None) + [f"max_length={limit}"] * (limit is not None)
        return f"Loaded({', '.join([repr(self.recipe.name), kind, *details])})"

    def __hash__(self) -> int:
        """By name: a recipe may hold options that have no hash."""
        return hash(self.recipe.name)

    def __getstate__(self) -> dict[str, Any]:
        return {"recipe": self.recipe}

    @cached_property
    def _scorer(self) -> Any:
        return self.recipe.load()


def in_memory(scorer: object) -> NoReturn:
    """Refuse to pickle a scorer whose model was given as an object: nothing says how another process would load it."""
    raise TypeError(
        f"{type(scorer).__name__} holds a model in memory and is not pickled with its weights; "
        "save the model and use load_scorer(name_or_path, ...), which pickles as how to load it"
    )
