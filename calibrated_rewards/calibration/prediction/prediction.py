"""Amortised: the predicted reference quantiles of any prompt; `fit` makes it, its size chosen by cross-validation."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float

from calibrated_rewards.calibration.prediction.conditional import (
    STEPS,
    Conditional,
    Curve,
    Sample,
    Steps,
    fit_steps,
    read_sample,
)
from calibrated_rewards.calibration.prediction.judgement import (
    DECILES,
    LEVELS,
    OWN,
    Errors,
    Losses,
    average_losses,
    judge,
)
from calibrated_rewards.calibration.prediction.regression import Network, find_directions
from calibrated_rewards.files import write_file
from calibrated_rewards.prompts import Prompt, prompt_key, start_of
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.scorers.protocol import fingerprint, name_of, without_tensors
from calibrated_rewards.table.reference_table import ReferenceTable


@runtime_checkable
class Features(Protocol):
    """A function that describes prompts: it gives each one a row of numbers, all of one width."""

    def __call__(self, prompts: Sequence[Prompt], /) -> Any:
        """Return an array or a tensor of shape (prompts, width)."""


def read_features(features: Features, prompts: Sequence[Prompt], width: int | None = None) -> Float[np.ndarray, "P d"]:
    """Compute the features of prompts; refuse anything but a row of finite numbers for each, `width` of them."""
    rows, who = np.asarray(without_tensors(features(list(prompts)))), name_of(features)
    if rows.ndim != 2 or len(rows) != len(prompts) or rows.dtype.kind not in "fiub" or not rows.shape[1]:
        raise ValueError(f"{who} gives {len(prompts)} prompts a row of numbers each, got {rows.dtype} {rows.shape}")
    if width is not None and rows.shape[1] != width:
        raise ValueError(f"the calibrator was fitted on features of width {width}, {who} gave width {rows.shape[1]}")
    if not np.isfinite(rows).all():
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"features are finite numbers, {who} gave others for {start_of(prompts[row])}")
    return rows if rows.dtype.kind == "f" and rows.itemsize >= 4 else rows.astype(np.float32)


DATA_FILE, SUMMARY_FILE = "amortised.safetensors", "amortised.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Amortised:
    """A predictor of the distribution of a prompt's reference scores from its features, made by `fit`.

    Called with prompts it returns a ReferenceTable of them. `errors` are its errors on prompts that were left out of
    the fit.
    """

    features: Features
    model: Conditional
    errors: Errors
    meta: Mapping[str, Any]
    """The meta of the table that it was fitted on."""
    k: int
    """References in a row of its tables: the median of the table that it was fitted on."""
    features_fingerprint: Mapping[str, Any]

    def __call__(self, prompts: Sequence[Prompt]) -> ReferenceTable:
        """Return the predicted table of these prompts."""
        return self.table(prompts)

    def quantiles(self, prompts: Sequence[Prompt], levels: npt.ArrayLike) -> Float[np.ndarray, "P Q"]:
        """Predict the score at each level in (0, 1): a row a prompt, non-decreasing where the levels are."""
        return self.model.quantiles(self._parameters(prompts), np.asarray(levels, np.float64))

    def cdf(self, prompts: Sequence[Prompt], scores: npt.ArrayLike) -> Float[np.ndarray, "*P"]:
        """Predict the quantile of each score, in [0, 1]: scores of shape (P,), or (P, G) for G responses a prompt."""
        values = np.asarray(scores, np.float64)
        if values.shape[:1] != (len(prompts),) or not np.isfinite(values).all():
            raise ValueError(
                f"cdf needs finite scores, one or more for each of {len(prompts)} prompts, got {values!r:.60}"
            )
        owners = np.repeat(np.arange(len(prompts)), values[0].size) if len(prompts) else np.empty(0, np.int64)
        return self.model.cdf(self._parameters(prompts)[owners], values.ravel()).reshape(values.shape)

    def table(self, prompts: Sequence[Prompt], k: int | None = None) -> ReferenceTable:
        """Return a table of predicted references: each prompt's quantiles at (1/2)/k, (3/2)/k, ..., (k - 1/2)/k."""
        k = self.k if k is None else k
        if k < 1:
            raise ValueError(f"a table needs k >= 1, got k={k}")
        distinct = list({prompt_key(prompt): prompt for prompt in prompts}.values())
        rows = zip(distinct, self.quantiles(distinct, (np.arange(k) + 0.5) / k), strict=True)
        return ReferenceTable.build(rows, meta={**self.meta, "amortised": self._summary()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to a directory; `load` takes the features again."""
        from safetensors.numpy import save

        data = save(_arrays(self.model))
        summary = {
            "format": FORMAT,
            "data": blake2b(data, digest_size=16).hexdigest(),
            "tails": [self.model.curve.below, self.model.curve.above],
            "errors": self.errors.as_json(),
            "meta": dict(self.meta),
            "k": self.k,
            "features": dict(self.features_fingerprint),
        }
        write_file(Path(path, DATA_FILE), data)
        write_file(Path(path, SUMMARY_FILE), json.dumps(summary, indent=2))

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: Features) -> "Amortised":
        """Read what `save` wrote, with the features that it was fitted on: others are refused by their fingerprint."""
        from safetensors.numpy import load

        summary = json.loads((Path(path) / SUMMARY_FILE).read_text())
        data = (Path(path) / DATA_FILE).read_bytes()
        if summary.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {summary.get('format')!r}, this version reads {FORMAT}")
        if blake2b(data, digest_size=16).hexdigest() != summary["data"]:
            raise ValueError(f"{path}: {DATA_FILE} is not the one that {SUMMARY_FILE} was written with")
        here = json.loads(json.dumps(fingerprint(features)))
        if [*differences(summary["features"], here)]:
            raise ValueError(f"{path} was fitted on other features: {summary['features']}, got {here}")
        model, errors = _model(load(data), *summary["tails"]), Errors.from_json(summary["errors"])
        return cls(features, model, errors, summary["meta"], summary["k"], summary["features"])

    def _parameters(self, prompts: Sequence[Prompt]) -> Float[np.ndarray, "P T"]:
        """Return the parameters of each prompt's distribution; a prompt that comes often is read once."""
        keys = [prompt_key(prompt) for prompt in prompts]
        first = dict(zip(keys, prompts, strict=True))
        at = {key: position for position, key in enumerate(first)}
        parameters = self.model.parameters(read_features(self.features, list(first.values()), len(self.model.weights)))
        return parameters[[at[key] for key in keys]]

    def _summary(self) -> dict[str, Any]:
        chosen = self.errors.steps[self.errors.chosen]
        errors = {"step": self.errors.chosen, "prompts": self.errors.prompts, "crps": chosen.crps, "pit": chosen.pit}
        return {**errors, "features": dict(self.features_fingerprint)}


def _arrays(model: Conditional) -> dict[str, np.ndarray]:
    network = {} if model.network is None else {f"network.{name}": array for name, array in vars(model.network).items()}
    linear = {"weights": model.weights, "intercept": model.intercept, "low": model.low, "high": model.high}
    curve = {"curve.levels": model.curve.levels, "curve.values": model.curve.values}
    return {name: np.ascontiguousarray(array) for name, array in {**linear, **curve, **network}.items()}


def _model(arrays: Mapping[str, np.ndarray], below: float, above: float) -> Conditional:
    curve = Curve(arrays["curve.levels"], arrays["curve.values"], below, above)
    names = [field.name for field in fields(Network)]
    network = Network(*(arrays[f"network.{name}"] for name in names)) if "network.first" in arrays else None
    return Conditional(arrays["weights"], arrays["intercept"], arrays["low"], arrays["high"], curve, network)


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
    prompts = list(prompts)
    # Each row once: a copy of a prompt would not be left out with its original.
    rows, first = np.unique(table.rows(prompts), return_index=True)
    distinct = [prompts[position] for position in first]
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
        references, tested = self.sample.halves(rng)
        losses: dict[str, list[Losses]] = {name: [] for name in STEPS[: self.steps]}
        with tqdm(total=folds * self.steps, desc="fitting", unit=" fits", delay=3, disable=None) as bar:
            for left_out in range(folds):
                held_out, steps = fold == left_out, self.fit(fold != left_out)
                for step in range(self.steps):
                    parts = self.coordinates[held_out], tested.select(held_out)
                    losses[STEPS[step]].append(_judge_step(steps(step), *parts))
                    bar.update()
        some = references.counts > 0
        if some.any():
            losses[OWN] = [_judge_own_references(references.select(some), tested.select(some))]
        return losses


def _judge_step(model: Conditional, coordinates: Float[np.ndarray, "P r"], tested: Sample) -> Losses:
    parameters = model.parameters(coordinates)
    quantiles = model.cdf(parameters[tested.owners], tested.scores)
    return judge(tested, quantiles, model.quantiles(parameters, LEVELS), model.quantiles(parameters, DECILES))


def _judge_own_references(references: Sample, tested: Sample) -> Losses:
    """Judge half of each prompt's scores as the prediction for its other half."""
    pairs = zip(
        np.split(references.scores, np.cumsum(references.counts)[:-1]),
        np.split(tested.scores, np.cumsum(tested.counts)[:-1]),
        strict=True,
    )
    u, curves, deciles = [], [], []
    for row, scores in pairs:
        sides = np.searchsorted(row, scores, "left") + np.searchsorted(row, scores, "right")
        # One more than there are: a new score is as likely to be in any of the gaps.
        u.append((sides / 2 + 0.5) / (len(row) + 1))
        at = np.arange(1, len(row) + 1) / (len(row) + 1)
        curves.append(np.interp(LEVELS, at, row))
        deciles.append(np.interp(DECILES, at, row))
    return judge(tested, np.concatenate(u), np.array(curves), np.array(deciles))
