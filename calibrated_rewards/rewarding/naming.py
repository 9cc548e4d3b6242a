"""Name a reward for a trainer's log: its transform, its reward model, and the settings that change its numbers."""

import os
import re
from hashlib import blake2b
from typing import Any

from calibrated_rewards.models.loading import Loaded
from calibrated_rewards.scorers.protocol import Scorer, fingerprint
from calibrated_rewards.theory.optimum import Optimal
from calibrated_rewards.theory.transforms import Affine, Chain, Transform

LONGEST, KEPT = 60, 40


def named(transform: Transform, scorer: Scorer | None, **settings: tuple[Any, Any]) -> str:
    """A name that is as good as an identifier: of many words the first ones, and a digest of all.

    `settings` are pairs of a value and its default: what differs from its default is part of the name, since TRL logs
    rewards of one name under one key.

    >>> from calibrated_rewards.theory.procedures import BestOf
    >>> from calibrated_rewards.testing import NumberScorer
    >>> from calibrated_rewards.theory.transforms import Exponential
    >>> named(Exponential(-10.0), NumberScorer())
    'calibrated_Exponential_t_minus_10_0_number'
    >>> named(Optimal(BestOf(4), beta=0.1), NumberScorer())
    'calibrated_optimal_BestOf_n_4_number'
    >>> named(Exponential(5.0), NumberScorer(), estimator=("unbiased", "empirical"), scale=("unit", "unit"))
    'calibrated_Exponential_t_5_0_number_estimator_unbiased'
    """
    changed = [
        f"{name} {value if isinstance(value, str) else repr(value)}"
        for name, (value, default) in settings.items()
        if value != default
    ]
    words = " ".join(["calibrated", _said(transform), _scorer_name(scorer), *changed])
    name = re.sub(r"\W+", "_", re.sub(r"-(?=\d)", "minus ", words)).strip("_")
    return name if len(name) <= LONGEST else f"{name[:KEPT]}_{blake2b(words.encode(), digest_size=4).hexdigest()}"


def _said(transform: Transform) -> str:
    """Its repr; of the optimal transform, the question; without a change of scale."""
    match transform:
        case Chain(parts=(*head, Affine())) if head:
            return " ".join(map(_said, head))
        case Optimal(procedure=procedure):
            return f"optimal {procedure!r}"
    return repr(transform)


def _scorer_name(scorer: Scorer | None) -> str:
    if isinstance(scorer, Loaded):
        return os.path.basename(os.path.normpath(scorer.recipe.name))
    return str(fingerprint(scorer).get("kind", "")) if scorer is not None else ""
