"""What describes a prompt: any function from prompts to rows of numbers, and the check of what it gives.

Amortised: the predicted reference quantiles of any prompt, as quantiles, as a cdf, or as a table of its own."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from calibrated_rewards.calibration.prediction.conditional import Conditional
from calibrated_rewards.calibration.prediction.curves import Curve
from calibrated_rewards.calibration.prediction.judgement import Errors
from calibrated_rewards.calibration.prediction.regression import Network
from calibrated_rewards.files import write_file
from calibrated_rewards.prompts import Prompt, prompt_key, start_of
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.scorers.protocol import fingerprint, name_of, without_tensors
from calibrated_rewards.table.reference_table import ReferenceTable


@runtime_checkable
class Features(Protocol):
    """Describes prompts: `features(prompts)` gives each one a row of numbers, all of one width."""

    def __call__(self, prompts: Sequence[Prompt], /) -> Any:
        """An array, or a tensor, of shape (prompts, width)."""


def features_of(features: Features, prompts: Sequence[Prompt], width: int | None = None) -> Float[np.ndarray, "P d"]:
    """The features of prompts, checked: a row for each, of finite numbers, as many as expected."""
    found, who = np.asarray(without_tensors(features(list(prompts)))), name_of(features)
    if found.ndim != 2 or len(found) != len(prompts) or found.dtype.kind not in "fiub" or not found.shape[1]:
        raise ValueError(f"{who} gives {len(prompts)} prompts a row of numbers each, got {found.dtype} {found.shape}")
    if width is not None and found.shape[1] != width:
        raise ValueError(f"the calibrator was fitted on features of width {width}, {who} gave width {found.shape[1]}")
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise ValueError(f"features are finite numbers, {who} gave others for {start_of(prompts[row])}")
    return found if found.dtype.kind == "f" and found.itemsize >= 4 else found.astype(np.float32)


DATA_FILE, SUMMARY_FILE = "amortised.safetensors", "amortised.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Amortised:
    """Predicts the distribution of a prompt's reference scores from its features; `fit` makes it.

    Called with prompts it gives a table of them, which everything that takes a ReferenceTable takes. `errors` says how
    far off it is, for prompts that it did not learn from.
    """

    features: Features
    model: Conditional
    errors: Errors
    meta: Mapping[str, Any]
    """The meta of the table that it learnt from."""
    k: int
    """How many references a row of its table has: as many as that table's rows, in the median."""
    features_fingerprint: Mapping[str, Any]

    def __call__(self, prompts: Sequence[Prompt]) -> ReferenceTable:
        """The predicted table of these prompts."""
        return self.table(prompts)

    def quantiles(self, prompts: Sequence[Prompt], levels: npt.ArrayLike) -> Float[np.ndarray, "P Q"]:
        """The predicted score at each level in (0, 1): a row a prompt, non-decreasing where the levels are."""
        return self.model.quantiles(self._places(prompts), np.asarray(levels, np.float64))

    def cdf(self, prompts: Sequence[Prompt], scores: npt.ArrayLike) -> Float[np.ndarray, "*P"]:
        """The predicted quantile of each score, in [0, 1]: scores of shape (P,), or (P, G) for G responses a prompt."""
        given = np.asarray(scores, np.float64)
        if given.shape[:1] != (len(prompts),) or not np.isfinite(given).all():
            raise ValueError(
                f"cdf needs finite scores, one or more for each of {len(prompts)} prompts, got {given!r:.60}"
            )
        owners = np.repeat(np.arange(len(prompts)), given[0].size) if len(prompts) else np.empty(0, np.int64)
        return self.model.cdf(self._places(prompts)[owners], given.ravel()).reshape(given.shape)

    def table(self, prompts: Sequence[Prompt], k: int | None = None) -> ReferenceTable:
        """A table of predicted references: of each prompt the quantiles at (1/2)/k, (3/2)/k, ..., (k - 1/2)/k."""
        k = self.k if k is None else k
        if k < 1:
            raise ValueError(f"a table needs k >= 1, got k={k}")
        distinct = list({prompt_key(prompt): prompt for prompt in prompts}.values())
        rows = zip(distinct, self.quantiles(distinct, (np.arange(k) + 0.5) / k), strict=True)
        return ReferenceTable.build(rows, meta={**self.meta, "amortised": self._said()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was learnt to a directory; the features are given again to `load`."""
        from safetensors.numpy import save

        folder = Path(path)
        data = save(_arrays(self.model))
        said = {
            "format": FORMAT,
            "data": blake2b(data, digest_size=16).hexdigest(),
            "tails": [self.model.curve.below, self.model.curve.above],
            "errors": self.errors.as_json(),
            "meta": dict(self.meta),
            "k": self.k,
            "features": dict(self.features_fingerprint),
        }
        for name, content in (DATA_FILE, data), (SUMMARY_FILE, json.dumps(said, indent=2).encode()):
            write_file(folder / name, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str], features: Features) -> "Amortised":
        """What `save` wrote, with the features that it was fitted on: others are refused by their fingerprint."""
        from safetensors.numpy import load

        said = json.loads((Path(path) / SUMMARY_FILE).read_text())
        data = (Path(path) / DATA_FILE).read_bytes()
        if said.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {said.get('format')!r}, this version reads {FORMAT}")
        if blake2b(data, digest_size=16).hexdigest() != said["data"]:
            raise ValueError(f"{path}: {DATA_FILE} is not the one that {SUMMARY_FILE} was written with")
        told = json.loads(json.dumps(fingerprint(features)))
        if [*differences(said["features"], told)]:
            raise ValueError(f"{path} was fitted on other features: {said['features']}, got {told}")
        model, errors = _model(load(data), *said["tails"]), Errors.from_json(said["errors"])
        return cls(features, model, errors, said["meta"], said["k"], said["features"])

    def _places(self, prompts: Sequence[Prompt]) -> Float[np.ndarray, "P T"]:
        """What the features say of each prompt; a prompt that comes often is read once."""
        keys = [prompt_key(prompt) for prompt in prompts]
        first = dict(zip(keys, prompts, strict=True))
        at = {key: place for place, key in enumerate(first)}
        found = self.model.places(features_of(self.features, list(first.values()), len(self.model.weights)))
        return found[[at[key] for key in keys]]

    def _said(self) -> dict[str, Any]:
        chosen = self.errors.steps[self.errors.chosen]
        said = {"step": self.errors.chosen, "prompts": self.errors.prompts, "crps": chosen.crps, "pit": chosen.pit}
        return {**said, "features": dict(self.features_fingerprint)}


def _arrays(model: Conditional) -> dict[str, np.ndarray]:
    network = {} if model.network is None else {f"network.{name}": array for name, array in vars(model.network).items()}
    own = {"weights": model.weights, "intercept": model.intercept, "low": model.low, "high": model.high}
    curve = {"curve.levels": model.curve.levels, "curve.values": model.curve.values}
    return {name: np.ascontiguousarray(array) for name, array in {**own, **curve, **network}.items()}


def _model(arrays: Mapping[str, np.ndarray], below: float, above: float) -> Conditional:
    curve = Curve(arrays["curve.levels"], arrays["curve.values"], below, above)
    names = [field.name for field in fields(Network)]
    network = Network(*(arrays[f"network.{name}"] for name in names)) if "network.first" in arrays else None
    return Conditional(arrays["weights"], arrays["intercept"], arrays["low"], arrays["high"], curve, network)
