"""Learning to predict reference quantiles: each step is judged on prompts that were left out, and the best is kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from jaxtyping import Bool, Float, Int

from calibrated_rewards.calibration.prediction.conditional import STEPS, Steps, steps_of
from calibrated_rewards.calibration.prediction.curves import Sample, sample_of
from calibrated_rewards.calibration.prediction.judgement import DECILES, LEVELS, OWN, Errors, Judged, error_of, judged
from calibrated_rewards.calibration.prediction.prediction import Amortised, Features, features_of
from calibrated_rewards.calibration.prediction.regression import directions
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
    """A calibrator for prompts that the table lacks, learnt from those that it has: `prompts`, with their features.

    Four steps are tried: one distribution for all; a location for each prompt; a scale as well; and a small network
    that bends the distribution. Location and scale are linear in the features, by ridge regression. The network needs
    torch; None means "if torch is installed". A step is taken if it lowers the CRPS of prompts that were left out.

    `levels` is how many quantiles the common curve has, `folds` into how many parts prompts are split to be left out.
    """
    asked, rows = _distinct(table, list(prompts))
    if not 2 <= folds <= len(asked) // 2:
        raise ValueError(f"fit needs 2 <= folds <= half of the {len(asked)} prompts, got folds={folds}")
    if levels < 2:
        raise ValueError(f"fit needs levels >= 2, got levels={levels}")
    numbers = features_of(features, asked)
    axes, sample = directions(numbers), sample_of(table, rows)
    with_network = find_spec("torch") is not None if network is None else network
    trial = _Trial(axes(numbers), sample, (np.arange(levels) + 0.5) / levels, seed, len(STEPS) - (not with_network))
    found = trial.judged(folds)
    chosen = better([np.concatenate([part.crps for part in found[name]]) for name in STEPS[: trial.steps]])
    whole = trial.learnt(np.ones(len(asked), bool))
    errors = Errors(
        {name: error_of(parts) for name, parts in found.items()},
        STEPS[chosen],
        *whole.explained(),
        prompts=len(asked),
        folds=folds,
        half=float(np.median(sample.counts // 2)),
    )
    k = int(np.median(sample.counts))
    return Amortised(features, whole(chosen).on_features(axes), errors, table.meta, k, fingerprint(features))


def better(crps: Sequence[Float[np.ndarray, " P"]]) -> int:
    """The last of some steps that lowers the CRPS of the best before it by more than the gain's standard error.

    >>> better([np.array([3.0, 3.2]), np.array([1.0, 1.1]), np.array([0.5, 1.5])])
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
    """All prompts, of which some are left out at a time."""

    coordinates: Float[np.ndarray, "P r"]
    sample: Sample
    levels: Float[np.ndarray, " Q"]
    seed: int
    steps: int

    def learnt(self, prompts: Bool[np.ndarray, " P"]) -> Steps:
        """What some prompts teach."""
        return steps_of(self.coordinates[prompts], self.sample.of(prompts), self.levels, self.seed)

    def judged(self, folds: int) -> dict[str, list[Judged]]:
        """Each step's predictions for prompts that it did not learn from, judged by half of their scores."""
        from tqdm import tqdm

        rng = np.random.default_rng(self.seed)
        fold = rng.permutation(len(self.coordinates)) % folds
        known, asked = self.sample.halves(rng)
        found: dict[str, list[Judged]] = {name: [] for name in STEPS[: self.steps]}
        with tqdm(total=folds * self.steps, desc="fitting", unit=" fits", delay=3, disable=None) as bar:
            for left_out in range(folds):
                own, steps = fold == left_out, self.learnt(fold != left_out)
                for step in range(self.steps):
                    found[STEPS[step]].append(_judged(steps, step, self.coordinates[own], asked.of(own)))
                    bar.update()
        some = known.counts > 0
        return {**found, OWN: [_among_own(known.of(some), asked.of(some))]} if some.any() else found


def _judged(steps: Steps, step: int, coordinates: Float[np.ndarray, "P r"], asked: Sample) -> Judged:
    found = steps(step)
    places = found.places(coordinates)
    quantiles = found.cdf(places[asked.owners], asked.scores)
    return judged(asked, quantiles, found.quantiles(places, LEVELS), found.quantiles(places, DECILES))


def _among_own(known: Sample, asked: Sample) -> Judged:
    """No prediction: half of each prompt's scores among its other half."""
    pairs = zip(
        np.split(known.scores, np.cumsum(known.counts)[:-1]),
        np.split(asked.scores, np.cumsum(asked.counts)[:-1]),
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
    return judged(asked, np.concatenate(u), np.array(curves), np.array(deciles))


def _distinct(table: ReferenceTable, prompts: list[Prompt]) -> tuple[list[Prompt], Int[np.ndarray, " P"]]:
    """Prompts and their rows, each row once: a copy would not be left out with its original."""
    rows, first = np.unique(table.rows(prompts), return_index=True)
    return [prompts[place] for place in first], rows
