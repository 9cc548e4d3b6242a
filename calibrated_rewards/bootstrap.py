"""Intervals of many estimates over the same prompts: the prompts are drawn again once, for all of them."""

import numpy as np
from jaxtyping import Float

from calibrated_rewards.estimates import Estimate, Stated, small_sample_factor


def stated(per_prompt: Float[np.ndarray, "P columns"], level: float = 0.95) -> list[Stated]:
    """Each column as `Stated.of(Estimate(column))` has it, in the time of a few.

    >>> stated(np.array([[0.5, 0.0], [0.75, 0.0], [1.0, 0.5], [0.25, 0.5], [0.5, 0.25]]))[0]
    Stated(value=0.6, low=0.28..., high=0.91..., standard_error=0.127..., prompts=5)
    """
    columns = [Estimate(column) for column in per_prompt.T]
    if len(per_prompt) < 2:
        return [Stated.of(column) for column in columns]
    tail, means = (1 - level) / 2, per_prompt.mean(axis=0)
    ends = np.quantile(_means(per_prompt), [tail, 1 - tail], axis=0)
    lows, highs = (means + small_sample_factor(len(per_prompt), level) * (ends - means)).tolist()
    return [
        Stated(column.value, low, high, column.standard_error, len(per_prompt))
        for column, low, high in zip(columns, lows, highs, strict=True)
    ]


def _means(
    per_prompt: Float[np.ndarray, "P columns"], seed: int = 0, resamples: int = 10_000
) -> Float[np.ndarray, "resamples columns"]:
    """As `Estimate.interval` draws them: how often each prompt is drawn is all that a mean needs."""
    prompts, rng = len(per_prompt), np.random.default_rng(seed)
    chunk, means = max(1, 1_000_000 // prompts), []
    for done in range(0, resamples, chunk):
        size = min(chunk, resamples - done)
        drawn = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * prompts).reshape(size, prompts)
        means.append(times.astype(np.float64) @ per_prompt / prompts)
    return np.concatenate(means)
