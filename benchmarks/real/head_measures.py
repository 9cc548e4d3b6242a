"""Measures of scorers: accuracy on pairs, the best of N by an independent judge, and resolution among rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calibrated_rewards.evaluation.estimates import Estimate, difference
from calibrated_rewards.theory.procedures import BestOf

Scores = npt.NDArray[np.float64]
N = 8
# References of the calibration; best of N chooses among the other rollouts.
K = 32


def find_right(scores: Scores) -> Scores:
    """Tell of each pair if it is in the right order: 1, or 1/2 for a tie, or 0."""
    return np.asarray((scores[:, 0] > scores[:, 1]) + 0.5 * (scores[:, 0] == scores[:, 1]))


def win_rates(scores: Scores, judge: Scores, n: int = N) -> Scores:
    """Compute for each prompt how often the best of n by the scores beats a single draw, by the judge; ties half."""
    rates = []
    for own, judged in zip(scores, judge, strict=True):
        wins = (judged[:, None] > judged) + 0.5 * (judged[:, None] == judged)
        beaten = (wins.sum(1) - 0.5) / (len(judged) - 1)
        rates.append(float(BestOf(n).pool_weights(own) @ beaten))
    return np.array(rates)


def count_ties(scores: Scores) -> float:
    """Compute the share of pairs of one prompt's completions that tie."""
    k = scores.shape[1]
    equal = (scores[:, :, None] == scores[:, None]).sum((1, 2)) - k
    return float(equal.mean() / (k * (k - 1)))


def rank(scores: Scores) -> Scores:
    """Compute the quantile of each rollout behind the first K among those, ties half."""
    references, rest = scores[:, None, :K], scores[:, K:, None]
    return np.asarray(((references < rest) + 0.5 * (references == rest)).mean(2))


def describe_resolution(scores: Scores, judge: Scores) -> dict[str, Any]:
    """Compare scores in float32, in bfloat16, and as quantiles, on the rollouts that are no references."""
    half = torch.from_numpy(scores).bfloat16().double().numpy()
    views = {
        "float32": scores[:, K:], "bfloat16": half[:, K:], "quantile of float32": rank(scores),
        "quantile of bfloat16": rank(half),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, view in views.items():
        rates = Estimate(win_rates(view, judge[:, K:]))
        found[name] = {"ties": count_ties(view), "best_of_8": rates.value, "interval": rates.interval()}
    spread = scores.std(1).mean()
    return {"spread": float(spread), "level_between_prompts": float(scores.mean(1).std()), **found}


def summarise_accuracy(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average the accuracy over seeds, and compare each head with the MiniLM of as many pairs, on the same pairs."""
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        each = [float(row["right"].mean()) for row in own]
        right = Estimate(np.mean([row["right"] for row in own], 0))
        found.append(
            {
                "name": name, "pairs": own[0]["pairs"], "accuracy": right.value,
                "interval_over_pairs": right.interval(), "by_seed": each,
                "seconds": float(np.mean([row["seconds"] for row in own])),
            }
        )  # fmt: skip
        if len(each) > 1:
            found[-1]["standard_error_over_seeds"] = float(np.std(each, ddof=1) / len(each) ** 0.5)
        rivals = {row["seed"]: row["right"] for row in rows if row["name"] == f"MiniLM, {own[0]['pairs']} pairs"}
        gains = [row["right"] - rivals[row["seed"]] for row in own if row["seed"] in rivals]
        if gains and not name.startswith("MiniLM"):
            gain = Estimate(np.mean(gains, 0))
            found[-1] |= {"gain_over_minilm": gain.value, "gain_interval": gain.interval()}
    return found


def compare_choices(served: Mapping[str, Scores], judge: Scores, first: str) -> list[dict[str, Any]]:
    """Compute the win rate of the best of 8 by each scorer, and what the first one gains over it."""
    rates = {name: Estimate(win_rates(scores, judge)) for name, scores in served.items()}
    found: list[dict[str, Any]] = []
    for name, rate in rates.items():
        found.append({"name": name, "best_of_8": rate.value, "interval": rate.interval()})
        if name != first and first in rates:
            gain = difference(rates[first], rate)
            found[-1] |= {"head_gains": gain.value, "gain_interval": gain.interval()}
    return found
