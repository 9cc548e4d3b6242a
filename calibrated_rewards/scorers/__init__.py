"""Scorers: anything that gives a prompt's completion a number. A plain function is one.

Reward models have a file a kind; `load_scorer` looks at a checkpoint and picks the kind.

>>> from calibrated_rewards.scorers import score
>>> score(lambda prompts, completions: [len(c) for c in completions], ["Hi", "Hi"], ["Hello!", "Go away"])
array([6., 7.], dtype=float32)
"""

from typing import TYPE_CHECKING, Any

from calibrated_rewards.scorers.protocol import Scorer as Scorer, fingerprint as fingerprint, score as score

if TYPE_CHECKING:
    from calibrated_rewards.scorers.loading import load_scorer as load_scorer


def __getattr__(name: str) -> Any:
    """`load_scorer`, when it is asked for: it brings torch and transformers, which a plain function does not need."""
    if name != "load_scorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from calibrated_rewards.scorers.loading import load_scorer
    except ModuleNotFoundError as missing:
        raise ImportError(f"load_scorer needs {missing.name}: pip install 'calibrated-rewards[hf]'") from missing
    return load_scorer
