"""Fit a predictor of reference quantiles, and choose its size by cross-validation over prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from jaxtyping import Bool, Float, Int

from calibrated_rewards.calibration.prediction.conditional import STEPS, Conditional, Steps, fit_steps
from calibrated_rewards.calibration.prediction.curves import Sample, read_sample
from calibrated_rewards.calibration.prediction.judgement import (
    DECILES,
    LEVELS,
    OWN,
    Errors,
    Losses,
    average_losses,
    judge,
)
from calibrated_rewards.calibration.prediction.prediction import Amortised, Features, read_features
from calibrated_rewards.calibration.prediction.regression import find_directions
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.scorers.protocol import fingerprint
from calibrated_rewards.table.reference_table import ReferenceTable


def fit(
    table: ReferenceTable,
    prompts: Iterable[Prompt],
    features: Features,
    *,
    levels: int = 100,
    folds: int = 5,
    seed: int = 0,
    network: bool | None = None,
) -> Amortised:
    """Fit a calibrator for prompts that the table lacks on those that it has: `prompts`, with their features.

    Four steps are tried: one distribution for all; a location for each prompt; a scale as well; and a small network
    that bends the distribution. Location and scale are linear in the features, by ridge regression. The network needs
    torch; None means "if torch is installed". A step is taken if it lowers the CRPS of prompts that were left out.

    `levels` is how many quantiles the common curve has, `folds` into how many parts prompts are split to be left out.
    """
    distinct, rows = _drop_duplicates(table, list(prompts))
    if not 2 <= folds <= len(distinct) // 2:
        raise ValueError(f"fit needs 2 <= folds <= half of the {len(distinct)} prompts, got folds={folds}")
    if levels < 2:
        raise ValueError(f"fit needs levels >= 2, got levels={levels}")
    numbers = read_features(features, distinct)
    axes, sample = find_directions(numbers), read_sample(table, rows)
    with_network = find_spec("torch") is not None if network is None else network
    trial = _Trial(axes(numbers), sample, (np.arange(levels) + 0.5) / levels, seed, len(STEPS) - (not with_network))
    losses = trial.cross_validate(folds)
    chosen = choose_step([np.concatenate([part.crps for part in losses[name]]) for name in STEPS[: trial.steps]])
    whole = trial.fit(np.ones(len(distinct), bool))
    errors = Errors(
        {name: average_losses(parts) for name, parts in losses.items()},
        STEPS[chosen],
        *whole.r_squared(),
        prompts=len(distinct),
        folds=folds,
        half=float(np.median(sample.counts // 2)),
    )
    k = int(np.median(sample.counts))
    return Amortised(features, whole(chosen).on_features(axes), errors, table.meta, k, fingerprint(features))


def choose_step(crps: Sequence[Float[np.ndarray, " P"]]) -> int:
    """Choose the last step that lowers the CRPS of the best before it by more than the gain's standard error.

    >>> choose_step([np.array([3.0, 3.2]), np.array([1.0, 1.1]), np.array([0.5, 1.5])])
    1
    """
    best = 0
    for step in range(1, len(crps)):
        gain = crps[best] - crps[step]
        if gain.mean() > gain.std() / np.sqrt(len(gain)):
            best = step
    return best


@dataclass(frozen=True, eq=False)
class _Trial:
    """The data of a fit, of which some prompts are left out at a time."""

    coordinates: Float[np.ndarray, "P r"]
    sample: Sample
    levels: Float[np.ndarray, " Q"]
    seed: int
    steps: int

    def fit(self, prompts: Bool[np.ndarray, " P"]) -> Steps:
        """Fit the steps on some of the prompts."""
        return fit_steps(self.coordinates[prompts], self.sample.select(prompts), self.levels, self.seed)

    def cross_validate(self, folds: int) -> dict[str, list[Losses]]:
        """Judge each step's predictions for prompts left out of its fit, by half of their scores."""
        from tqdm import tqdm

        rng = np.random.default_rng(self.seed)
        fold = rng.permutation(len(self.coordinates)) % folds
        known, tested = self.sample.halves(rng)
        losses: dict[str, list[Losses]] = {name: [] for name in STEPS[: self.steps]}
        with tqdm(total=folds * self.steps, desc="fitting", unit=" fits", delay=3, disable=None) as bar:
            for left_out in range(folds):
                own, steps = fold == left_out, self.fit(fold != left_out)
                for step in range(self.steps):
                    losses[STEPS[step]].append(_judge_step(steps(step), self.coordinates[own], tested.select(own)))
                    bar.update()
        some = known.counts > 0
        return (
            {**losses, OWN: [_judge_own_references(known.select(some), tested.select(some))]} if some.any() else losses
        )


def _judge_step(model: Conditional, coordinates: Float[np.ndarray, "P r"], tested: Sample) -> Losses:
    parameters = model.parameters(coordinates)
    quantiles = model.cdf(parameters[tested.owners], tested.scores)
    return judge(tested, quantiles, model.quantiles(parameters, LEVELS), model.quantiles(parameters, DECILES))


def _judge_own_references(known: Sample, tested: Sample) -> Losses:
    """Judge half of each prompt's scores as the prediction for its other half."""
    pairs = zip(
        np.split(known.scores, np.cumsum(known.counts)[:-1]),
        np.split(tested.scores, np.cumsum(tested.counts)[:-1]),
        strict=True,
    )
    u, curves, deciles = [], [], []
    for own, scores in pairs:
        sides = np.searchsorted(own, scores, "left") + np.searchsorted(own, scores, "right")
        # One more than there are: a new score is as likely to be in any of the gaps.
        u.append((sides / 2 + 0.5) / (len(own) + 1))
        at = np.arange(1, len(own) + 1) / (len(own) + 1)
        curves.append(np.interp(LEVELS, at, own))
        deciles.append(np.interp(DECILES, at, own))
    return judge(tested, np.concatenate(u), np.array(curves), np.array(deciles))


def _drop_duplicates(table: ReferenceTable, prompts: list[Prompt]) -> tuple[list[Prompt], Int[np.ndarray, " P"]]:
    """Return prompts and their rows, each row once: a copy would not be left out with its original."""
    rows, first = np.unique(table.rows(prompts), return_index=True)
    return [prompts[place] for place in first], rows
