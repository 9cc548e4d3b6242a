"""Check a policy on held-out rollouts of the reference, without generating: KL, correlation with the target, win rates.

The K rollouts that a calibration drew for a prompt are a sample of the reference. A policy is judged on them by its
log-ratios d = log pi(y|x) - log pi_ref(y|x), summed over the tokens of a completion, which take forward passes alone:
weights e^d turn averages over the reference into averages over the policy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy.typing as npt

from calibrated_rewards.evaluation.estimates import Estimate, IntervalEstimate, RatesByJudge, Samples
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

HeldOutProcedure = Standard | BestOf | WorstOf


@dataclass(frozen=True)
class HeldOutCheck:
    """Estimates of a policy from its log-ratios on held-out rollouts of the reference; intervals are over prompts."""

    prompts: int
    rollouts: int
    kl: IntervalEstimate
    """KL(policy || reference) in nats: the mean of w log w - w + 1 with w = e^d, which is unbiased and never negative."""
    kl_normalised: IntervalEstimate
    """The same from weights that add up to 1 within a prompt; too low by O(1/K), at most log K, blind to constants."""
    mean_weight: IntervalEstimate
    """The mean of w, which is 1: another value says that these are no log-ratios to the policy that drew the rollouts."""
    ess: float
    """Effective sample size, 1 / sum W^2 of a prompt's normalised weights: the harmonic mean over prompts."""
    correlation: IntervalEstimate | None
    """Mean within-prompt correlation of log-ratio and target; None without targets, or where either is constant."""
    win_rates: RatesByJudge
    """By "select" and, if another scorer judges, "judge"; then by the procedure's repr."""
    density_ratio: tuple[IntervalEstimate, ...]
    """The policy's share of each decile of u over the reference's."""
    target_density_ratio: tuple[float, ...] | None
    """The same of the optimum whose log-ratios are the targets."""
    share_by_u: float | None
    """Share of the KL that one function of u for all prompts has; None where there is no KL."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers by the names that trainers log: `held_out/kl`, `held_out/ess`, ..."""
        raise NotImplementedError

    def to_json(self) -> dict[str, object]:
        """Return the check as JSON holds it; `from_json` reads it."""
        raise NotImplementedError


def check_log_ratios(
    log_ratios: Iterable[npt.ArrayLike],
    samples: Samples,
    targets: Iterable[npt.ArrayLike] | None = None,
    procedures: Sequence[HeldOutProcedure] | None = None,
) -> HeldOutCheck:
    """Estimate KL, correlation with the target, effective sample size and win rates from log-ratios on rollouts.

    `log_ratios` are log pi(y|x) - log pi_ref(y|x) of the rollouts in `samples`, a row a prompt; `targets` those of the
    optimum, Phi / beta - log Z (`PromptRollouts.log_ratios`). `procedures` are by default one draw, best of 4 and worst
    of 4, as far as there are 2 N rollouts of each prompt.
    """
    raise NotImplementedError


def compare_log_ratios(
    a: Iterable[npt.ArrayLike],
    b: Iterable[npt.ArrayLike],
    samples: Samples,
    procedures: Sequence[HeldOutProcedure] | None = None,
) -> Mapping[str, Mapping[str, IntervalEstimate]]:
    """Estimate how much more policy a wins than policy b, by judge and procedure: paired on the same rollouts."""
    raise NotImplementedError


def weighted_win_rate(log_ratios: Iterable[npt.ArrayLike], samples: Samples, procedure: HeldOutProcedure) -> Estimate:
    """Estimate a policy's win rate over the reference under a procedure, from its log-ratios on reference rollouts."""
    raise NotImplementedError


def realised_share(
    trained: Estimate, best_other: Estimate, optimum: Estimate, best_other_optimum: Estimate, level: float = 0.95
) -> IntervalEstimate:
    """Estimate which share of the gap between two optima training realised, at equal KL.

    (trained - best_other) / (optimum - best_other_optimum), of win rates on the same prompts in the same order; the
    interval resamples prompts, of all four at once.
    """
    raise NotImplementedError
