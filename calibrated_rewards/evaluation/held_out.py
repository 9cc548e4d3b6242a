"""Check a policy on held-out rollouts of the reference, without generating: KL, correlation with the target, win rates.

The K rollouts that a calibration drew for a prompt are a sample of the reference. A policy is judged on them by its
log-ratios d = log pi(y|x) - log pi_ref(y|x), summed over the tokens of a completion, which take forward passes alone:
weights w = e^d turn averages over the reference into averages over the policy.

The KL is the mean of w log w - w + 1, which is never negative and has no bias, as w has the mean 1 under the reference;
it varies less than w log w. From weights that add up to 1 within a prompt the KL is too low by O(1 / K).
docs/guides/evaluate.md has the biases and errors that were measured.

>>> rng = np.random.default_rng(0)
>>> u = rng.random((50, 32))  # quantiles of rollouts, and a policy whose log-ratios are u - log(e - 1) and noise
>>> d = u - np.log(np.e - 1) + rng.normal(-0.02, 0.2, u.shape)
>>> check = check_log_ratios(d, Samples(u), targets=2 * u)
>>> print(check)
50 prompts, 32 rollouts each: KL 0.061 [...], correlation with the target 0.817 [...], effective sample size 28.5
            win rate
one draw    58.2 % [57.9, 58.4]
best of 4   60.4 % [59.8, 60.9]
worst of 4  61.4 % [60.7, 62.0]
share of each tenth of u, over the reference's:
         1     2     3     4     5     6     7     8     9     10
policy   0.63  0.66  0.76  0.84  0.93  1.02  1.08  1.24  1.35  1.49
optimum  0.35  0.43  0.54  0.66  0.80  0.96  1.14  1.40  1.69  2.04
61 % of the KL is a function of u
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.evaluation.estimates import (
    Estimate,
    IntervalEstimate,
    RatesByJudge,
    Samples,
    difference,
    estimate_columns,
    from_json,
    resample_means,
    small_sample_factor,
)
from calibrated_rewards.evaluation.importance_weights import (
    DECILES,
    JUDGE,
    SELECT,
    HeldOutPolicy,
    HeldOutProcedure,
    Normalisation,
    check_log_ratio_rows,
)
from calibrated_rewards.evaluation.wording import (
    few_prompts_notes,
    format_count,
    format_estimate,
    format_points,
    format_procedure,
    format_share,
    format_table,
)
from calibrated_rewards.theory.named import parse_procedure
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

PROCEDURES: tuple[HeldOutProcedure, ...] = (Standard(), BestOf(4), WorstOf(4))
# Below this effective sample size a few rollouts decide.
FEW_EFFECTIVE = 5


@dataclass(frozen=True)
class HeldOutCheck:
    """Estimates of a policy from its log-ratios on held-out rollouts of the reference; intervals are over prompts."""

    prompts: int
    rollouts: int
    """Rollouts of all prompts together."""
    kl: IntervalEstimate
    """KL(policy || reference) in nats: the mean of w log w - w + 1."""
    kl_normalised: IntervalEstimate
    """The same from weights that add up to 1 within a prompt: too low by O(1/K), at most log K, blind to constants."""
    mean_weight: IntervalEstimate
    """The mean of w, which is 1 if the log-ratios are to the policy that drew the rollouts."""
    ess: float
    """Effective sample size, 1 / sum W^2 of a prompt's normalised weights: the harmonic mean over prompts."""
    correlation: IntervalEstimate | None
    """Mean within-prompt correlation of log-ratio and target; None without targets, or where one is constant."""
    win_rates: RatesByJudge
    """By "select" and, if another scorer judges, "judge"; then by the procedure's repr."""
    density_ratio: tuple[IntervalEstimate | None, ...]
    """The policy's share of each decile of u over the reference's; None for a decile without rollouts."""
    target_density_ratio: tuple[float | None, ...] | None
    """The same of the optimum whose log-ratios are the targets."""
    share_by_u: float | None
    """The share of the KL that one function of u for all prompts has; None without a KL."""

    @property
    def judged_by(self) -> str:
        """The judge that summaries go by: the second scorer if there is one."""
        return JUDGE if JUDGE in self.win_rates else SELECT

    def metrics(self) -> dict[str, float]:
        """Return the numbers by the names that trainers log: `held_out/kl`, `held_out/best_of_4/win_rate`, ...

        The names are always the same: without a correlation, as at the start, it is 0.
        """
        numbers = {"kl": self.kl.value, "ess": self.ess, "mean_weight": self.mean_weight.value}
        if self.target_density_ratio is not None:
            numbers["correlation"] = 0.0 if self.correlation is None else self.correlation.value
        numbers["share_by_u"] = self.share_by_u or 0.0
        for procedure, rate in self.win_rates[self.judged_by].items():
            name = name_procedure(procedure)
            numbers[f"{name}/win_rate"] = rate.value
            if rate.standard_error is not None:
                numbers[f"{name}/standard_error"] = rate.standard_error
            if self.judged_by == JUDGE:
                numbers[f"{name}/win_rate_by_reward"] = self.win_rates[SELECT][procedure].value
        for name, ratios in (("density_ratio", self.density_ratio), ("target_ratio", self.target_density_ratio or ())):
            for decile, ratio in enumerate(ratios, 1):
                if ratio is not None:
                    numbers[f"{name}_{decile}"] = float(ratio.value if isinstance(ratio, IntervalEstimate) else ratio)
        return {f"held_out/{name}": value for name, value in numbers.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON holds it; `HeldOutCheck.from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "HeldOutCheck":
        """Read what `to_json` returned, after a round through JSON."""
        check: HeldOutCheck = from_json(cls, content)
        return check

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from few_prompts_notes(self.prompts)
        each = self.rollouts / self.prompts
        parts = [f"KL {format_estimate(self.kl)}"]
        if self.correlation is not None:
            parts.append(f"correlation with the target {format_estimate(self.correlation)}")
        parts.append(f"effective sample size {self.ess:.3g}")
        yield f"{format_count(self.prompts, 'prompt')}, {each:.4g} rollouts each: {', '.join(parts)}"
        if self.win_rates[SELECT]:
            names = [format_procedure(name) for name in self.win_rates[SELECT]]
            several = len(self.win_rates) > 1
            heads = {f"by {judge}" if several else "win rate": judge for judge in self.win_rates}
            columns = {
                head: [format_share(rate) for rate in self.win_rates[judge].values()] for head, judge in heads.items()
            }
            yield from format_table(names, columns)
        ratios: dict[str, list[str | None]] = {
            "policy": [None if each is None else f"{each.value:.2f}" for each in self.density_ratio]
        }
        if self.target_density_ratio is not None:
            ratios["optimum"] = [None if each is None else f"{each:.2f}" for each in self.target_density_ratio]
        yield "share of each tenth of u, over the reference's:"
        yield from format_table(
            [*ratios], {str(decile + 1): [row[decile] for row in ratios.values()] for decile in range(DECILES)}
        )
        if self.share_by_u is not None:
            yield f"{100 * self.share_by_u:.0f} % of the KL is a function of u"
        yield from self.notes()

    def notes(self) -> Iterator[str]:
        """Warn of numbers that cannot be trusted."""
        if self.ess < FEW_EFFECTIVE:
            yield f"the effective sample size is {self.ess:.2g}: a few rollouts decide, and rare ones are missed"
        if self.mean_weight.excludes(1.0):
            yield (
                f"the mean weight is {self.mean_weight}, not 1: the log-ratios are to another policy or temperature "
                "than the rollouts were drawn with, or the policy is too far away for so few rollouts"
            )


@dataclass(frozen=True)
class HeldOutComparison:
    """Policy a less policy b, on the same rollouts: paired, so that what they share cancels."""

    kl: IntervalEstimate
    correlation: IntervalEstimate | None
    win_rates: RatesByJudge

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"a less b: KL {format_estimate(self.kl)}"]
        if self.correlation is not None:
            lines[0] += f", correlation with the target {format_estimate(self.correlation)}"
        several = len(self.win_rates) > 1
        names = [format_procedure(name) for name in self.win_rates[SELECT]]
        columns = {
            f"by {judge}" if several else "win rate": [format_points(gain) for gain in gains.values()]
            for judge, gains in self.win_rates.items()
        }
        return "\n".join([*lines, *format_table(names, columns)])


def check_log_ratios(
    log_ratios: Iterable[npt.ArrayLike],
    samples: Samples,
    targets: Iterable[npt.ArrayLike] | None = None,
    procedures: Sequence[HeldOutProcedure] | None = None,
    normalise: Normalisation = "pooled",
) -> HeldOutCheck:
    """Estimate KL, correlation with the target, effective sample size and win rates from log-ratios on rollouts.

    `log_ratios` are log pi(y|x) - log pi_ref(y|x) of the rollouts in `samples`, a row a prompt; `targets` those of the
    optimum, Phi / beta - log Z (`PromptRollouts.log_ratios`). `procedures` are by default one draw, best of 4 and worst
    of 4, those for which each prompt has the 2 N rollouts that both sides need. `normalise="prompt"` is for log-ratios
    that are known up to a constant of each prompt (`weighted_win_rate` says what it costs).
    """
    policy = HeldOutPolicy.of(log_ratios, samples, normalise)
    if procedures is None:
        procedures = [each for each in PROCEDURES if 2 * each.draws <= samples.sizes.min()]
    ratios, rates = policy.density_ratios(), policy.win_rates(procedures)
    kl = policy.kl if normalise == "pooled" else policy.kl_normalised
    estimates = [kl, policy.kl_normalised, policy.mean_weight, *rates.values(), *(each[1] for each in ratios if each)]
    intervals = iter(estimate_columns(np.stack([each.per_prompt for each in estimates], axis=1)))
    kls, kls_normalised, mean_weight = (next(intervals) for _ in range(3))
    judged = group_by_judge({key: next(intervals).clip(0.0, 1.0) for key in rates})
    correlation = target_ratios = None
    if targets is not None:
        optimum = HeldOutPolicy.of(targets, samples, "prompt")
        correlation = estimate_correlation(policy.correlate(optimum.log_ratios))
        correlation = correlation and correlation.clip(-1.0, 1.0)
        target_ratios = tuple(None if each is None else each[1].value for each in optimum.density_ratios())
    return HeldOutCheck(
        prompts=len(samples),
        rollouts=int(samples.sizes.sum()),
        kl=kls,
        kl_normalised=kls_normalised,
        mean_weight=mean_weight,
        ess=policy.ess,
        correlation=correlation,
        win_rates=judged,
        density_ratio=tuple(None if each is None else next(intervals) for each in ratios),
        target_density_ratio=target_ratios,
        share_by_u=policy.share_by_u(),
    )


def compare_log_ratios(
    a: Iterable[npt.ArrayLike],
    b: Iterable[npt.ArrayLike],
    samples: Samples,
    targets: Iterable[npt.ArrayLike] | None = None,
    procedures: Sequence[HeldOutProcedure] | None = None,
    normalise: Normalisation = "pooled",
) -> HeldOutComparison:
    """Estimate how much more policy a wins than policy b, from the log-ratios of both on the same rollouts.

    Arguments are those of `check_log_ratios`. Policies of unlike KL differ in what the KL buys as well.
    """
    ours, theirs = (HeldOutPolicy.of(each, samples, normalise) for each in (a, b))
    if procedures is None:
        procedures = [each for each in PROCEDURES if 2 * each.draws <= samples.sizes.min()]
    pairs = zip(ours.win_rates(procedures).items(), theirs.win_rates(procedures).values(), strict=True)
    gains = {key: difference(rate, other) for (key, rate), other in pairs}
    kl = difference(*((each.kl if normalise == "pooled" else each.kl_normalised) for each in (ours, theirs)))
    columns = np.stack([kl.per_prompt, *(gain.per_prompt for gain in gains.values())], axis=1)
    first, *intervals = estimate_columns(columns)
    correlation = None
    if targets is not None:
        rows = check_log_ratio_rows("targets", targets, samples)
        correlation = estimate_correlation(ours.correlate(rows) - theirs.correlate(rows))
    return HeldOutComparison(first, correlation, group_by_judge(dict(zip(gains, intervals, strict=True))))


def realised_share(
    trained: Estimate, best_other: Estimate, optimum: Estimate, best_other_optimum: Estimate, level: float = 0.95
) -> IntervalEstimate:
    """Estimate which share of the gap between two optima training realised, at equal KL.

    (trained - best_other) / (optimum - best_other_optimum), of win rates on the same prompts in the same order: of
    fresh samples (`win_rate`) or of log-ratios (`weighted_win_rate`, for the optima of their targets). The interval
    resamples prompts, of all four at once, and ValueError says so if it cannot tell the optima apart.

    >>> rows = [0.70, 0.80, 0.76], [0.62, 0.70, 0.66], [0.90, 1.0, 0.95], [0.60, 0.70, 0.66]
    >>> print(realised_share(*(Estimate(np.array(row)) for row in rows)))
    0.315 [0.186, 0.396]
    """
    gained, gap = difference(trained, best_other), difference(optimum, best_other_optimum)
    prompts = len(gained.per_prompt)
    if len(gap.per_prompt) != prompts:
        raise ValueError(f"realised_share needs the same prompts, got {prompts} and {len(gap.per_prompt)}.")
    if prompts < 2:
        raise ValueError("realised_share needs 2 prompts or more, got 1.")
    low, _ = gap.interval(level)
    if low <= 0:
        raise ValueError(
            f"realised_share needs an optimum above the other's beyond doubt, got a gap of {gap.value:.4f} whose "
            f"interval begins at {low:.4f}."
        )
    share = gained.value / gap.value
    values = Estimate((gained.per_prompt - share * gap.per_prompt) / gap.value)
    drawn = resample_means(np.stack([gained.per_prompt, gap.per_prompt], axis=1))
    tail = (1 - level) / 2
    ends = np.quantile(drawn[:, 0] / drawn[:, 1], [tail, 1 - tail])
    low, high = (share + small_sample_factor(prompts, level) * (ends - share)).tolist()
    return IntervalEstimate(share, low, high, values.standard_error, prompts)


def estimate_correlation(per_prompt: Float[np.ndarray, " P"]) -> IntervalEstimate | None:
    """Estimate the mean over the prompts that have a correlation; None if there are none."""
    known = per_prompt[~np.isnan(per_prompt)]
    return IntervalEstimate.of(Estimate(known)) if len(known) else None


def group_by_judge(rates: Mapping[tuple[str, str], IntervalEstimate]) -> RatesByJudge:
    """Group estimates by judge, then by the procedure's repr."""
    judges: dict[str, dict[str, IntervalEstimate]] = {SELECT: {}}
    for (judge, procedure), rate in rates.items():
        judges.setdefault(judge, {})[procedure] = rate
    return judges


def name_procedure(procedure: str) -> str:
    """Name a procedure in a metric, from its repr.

    >>> [name_procedure(each) for each in ("Standard()", "BestOf(n=4)", "WorstOf(n=16)")]
    ['best_of_1', 'best_of_4', 'worst_of_16']
    """
    parsed = parse_procedure(procedure)
    return f"{'worst' if isinstance(parsed, WorstOf) else 'best'}_of_{parsed.draws}"
