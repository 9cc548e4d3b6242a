"""Scorers that pickle as the recipe by which they are loaded, not as their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.lazy import Lazy, Recipe, fields_only
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, is_thread_safe, score_with


@dataclass(frozen=True, repr=False)
class Loaded:
    """A scorer and its recipe. In another process, after pickling, it loads again when it is first called."""

    recipe: Recipe

    thread_safe = property(lambda self: is_thread_safe(self.scorer))
    __getstate__ = fields_only

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(self.scorer, self.scorer, prompts, completions)

    @Lazy
    def scorer(self) -> Scorer:
        """Load the scorer that does the work, of the kind that the recipe leads to; the same one from then on."""
        return self.recipe.load()  # type: ignore[no-any-return]

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        return fingerprint(self.scorer)

    def __repr__(self) -> str:
        if "scorer" not in self.__dict__:
            return f"Loaded({self.recipe.name!r})"
        identity, kind = self.fingerprint(), type(self.scorer).__name__
        if isinstance(self.scorer, Cost):
            identity, kind = identity["of"], f"Cost({type(self.scorer.scorer).__name__})"
        labels, limit = identity.get("labels"), identity.get("text", {}).get("max_length")
        details = [f"{labels}"] * (labels is not None) + [f"max_length={limit}"] * (limit is not None)
        return f"Loaded({', '.join([repr(self.recipe.name), kind, *details])})"

    def __hash__(self) -> int:
        """Hash the name: a recipe may hold options that have no hash."""
        return hash(self.recipe.name)
