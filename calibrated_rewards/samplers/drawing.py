"""Draw the next token from the distribution that the decoding settings leave, with numbers that belong to a seed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from calibrated_rewards.samplers.protocol import Decoding

# Uniform numbers for each token: one for each halving of the vocabulary.
HALVINGS = 32
# Philox makes four numbers at a time.
COUNTS = HALVINGS // 4
# Advice for a policy that gives nan.
ADVICE = "look for nan among the weights, or try --policy-dtype float32 / bfloat16"


class Drawn(NamedTuple):
    """The next token of each row, and its log-probability, in float64."""

    tokens: Tensor
    logprobs: Tensor


def uniforms(seeds: Sequence[int], first: int, tokens: int) -> Float64[np.ndarray, "rows tokens halvings"]:
    """Generate numbers in [0, 1) that depend on a seed and the number of a token alone, from the first token on.

    >>> bool((uniforms([7, 8], 0, 9)[1, 5:] == uniforms([8], 5, 4)).all())
    True
    """
    raw = [np.random.Philox(key=seed, counter=first * COUNTS).random_raw(tokens * HALVINGS) for seed in seeds]
    # The raw bits are the same in every version of numpy; what its Generator makes of them need not be.
    numbers = (np.stack(raw) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers.reshape(len(seeds), tokens, HALVINGS)


def processors(decoding: Decoding) -> LogitsProcessorList:
    """List transformers' own processors of logits for the settings that are on, in its order."""
    chain: list[Any] = []
    if decoding.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.temperature != 1:
        chain.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_k:
        chain.append(TopKLogitsWarper(int(decoding.top_k)))
    if decoding.top_p < 1:
        chain.append(TopPLogitsWarper(float(decoding.top_p)))
    if decoding.min_p:
        chain.append(MinPLogitsWarper(float(decoding.min_p)))
    return LogitsProcessorList(chain)


def draw(scores: Tensor, chances: Tensor) -> Drawn:
    """Draw a token for each row from softmax(scores).

    The vocabulary is halved until one token is left, by a chance for each halving. Inverting the cumulative
    probability is as fast, but where a batch of another size rounds the scores otherwise, each of the vocabulary's
    boundaries moves, and the token changes a thousand times as often. In float32 rare tokens would be lost, too.
    """
    # Apple's GPUs have no float64.
    scores = (scores.cpu() if scores.device.type == "mps" else scores).float()
    folds = _fold(scores.softmax(-1))
    totals = folds[-1]
    wrong = ~((totals > 0) & totals.isfinite())
    if wrong.any():  # a token would be drawn all the same
        raise FloatingPointError(
            f"the policy gives nan or no probabilities, in {int(wrong.sum())} of {len(totals)} rows of {scores.dtype} "
            f"scores: {ADVICE}"
        )
    at = torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device)
    for chance, weights in zip(chances.to(scores.device).unbind(1), reversed(folds[:-1]), strict=False):
        at = _choose_half(weights, at, chance[:, None])
    logprobs = folds[0].gather(1, at).double().log() - totals.double().log()
    return Drawn(at[:, 0], logprobs[:, 0])


def _fold(weights: Tensor) -> list[Tensor]:
    """Add the second half of the weights to the first, again and again: all foldings, down to the sum of all."""
    folds = [weights]
    while weights.shape[1] > 1:
        half = (weights.shape[1] + 1) // 2
        left, right = weights[:, :half], weights[:, half:]
        weights = left.clone() if right.shape[1] < half else left + right
        if right.shape[1] < half:
            weights[:, : right.shape[1]] += right
        folds.append(weights)
    return folds


def _choose_half(weights: Tensor, at: Tensor, chance: Tensor) -> Tensor:
    """Choose one of the two weights that were added at `at`, never one that is 0."""
    size = weights.shape[1]
    other = at + (size + 1) // 2
    left = weights.gather(1, at).double()
    right = torch.where(other < size, weights.gather(1, other.clamp(max=size - 1)).double(), 0.0)
    return torch.where(chance * (left + right) < left, at, other)
