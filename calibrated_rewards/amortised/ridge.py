"""Ridge regression on many features; the penalty is the one that predicts best when each prompt is left out."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# Features of more dimensions are first projected onto this many principal directions: ridge hardly uses the others.
MOST_DIRECTIONS = 1024
# From nearly none to nearly all shrunk away, in parts of the directions' mean variance; the last is the mean alone.
PENALTIES = 25


class Directions(NamedTuple):
    """The principal directions of a set of features, each feature in its standard deviations; the leading one first."""

    mean: Float[np.ndarray, " d"]
    basis: Float[np.ndarray, "d r"]
    """Standard deviations are divided out."""

    def __call__(self, features: Float[np.ndarray, "P d"]) -> Float[np.ndarray, "P r"]:
        """The coordinates of features."""
        # In parts: many features in single precision have no room for a copy in double.
        parts = np.array_split(features, max(1, len(features) // 4096))
        return np.asarray(np.vstack([part @ self.basis for part in parts]) - self.mean @ self.basis)

    def on_features(
        self, weights: Float[np.ndarray, "r T"], intercept: Float[np.ndarray, " T"]
    ) -> tuple[Float[np.ndarray, "d T"], Float[np.ndarray, " T"]]:
        """A linear map of coordinates as one of the features themselves."""
        whole = self.basis @ weights
        return whole, intercept - self.mean @ whole


class Ridge(NamedTuple):
    """A linear map, and what it says of each prompt that it learnt from when that prompt is left out."""

    weights: Float[np.ndarray, "r T"]
    intercept: Float[np.ndarray, " T"]
    left_out: Float[np.ndarray, "P T"]


def directions(features: Float[np.ndarray, "P d"]) -> Directions:
    """The directions in which features vary most, at most `MOST_DIRECTIONS` of them; no score is looked at."""
    from scipy.linalg import eigh

    mean, sd = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(sd > 1e-6 * (np.abs(mean) + 1e-30), sd, np.inf)
    if np.isinf(scale).all():
        raise ValueError(f"features need to differ between prompts, got {len(features)} equal rows")
    # The larger of the arrays stays in the features' own precision.
    centred = (features - mean.astype(features.dtype)) / scale.astype(features.dtype)
    wide = features.shape[1] > len(features)
    gram = (centred @ centred.T if wide else centred.T @ centred).astype(np.float64)
    first = max(0, len(gram) - MOST_DIRECTIONS)
    variances, vectors = eigh(gram, subset_by_index=[first, len(gram) - 1])
    kept = variances > 1e-6 * max(float(variances[-1]), 1e-30)
    variances, vectors = variances[kept][::-1], vectors[:, kept][:, ::-1]
    basis = centred.T @ (vectors / np.sqrt(variances)) if wide else vectors
    return Directions(mean, basis / scale[:, None])


def ridge(coordinates: Float[np.ndarray, "P r"], targets: Float[np.ndarray, "P T"]) -> Ridge:
    """Each target on the coordinates, with a penalty of its own.

    A prompt that is left out changes a ridge regression's answer for it by a factor that is known without doing it
    again (Allen's PRESS): residual / (1 - leverage).

    >>> x = np.arange(8.0)[:, None]
    >>> ridge(x, 2 * x + 1).left_out.round(2).ravel()
    array([ 1.,  3.,  5.,  7.,  9., 11., 13., 15.])
    """
    prompts, centre, average = len(targets), coordinates.mean(axis=0), targets.mean(axis=0)
    variances, vectors = np.linalg.eigh((coordinates - centre).T @ (coordinates - centre))
    # Rounding leaves directions of no variance with some.
    kept = variances > 1e-10 * max(float(variances.max(initial=0.0)), 1e-300)
    variances, vectors = variances[kept], vectors[:, kept]
    left = (coordinates - centre) @ (vectors / np.sqrt(variances))
    along, gaps = left.T @ (targets - average), targets - average
    shrunk = np.array([variances / (variances + penalty) for penalty in penalties(variances)])
    leverages = 1 / prompts + left**2 @ shrunk.T
    best, weights, left_out = np.full(len(average), np.inf), np.zeros_like(along), np.zeros_like(gaps)
    for keep, leverage in zip(shrunk, leverages.T, strict=True):
        coefficients = keep[:, None] * along
        missed = (gaps - left @ coefficients) / np.maximum(1 - leverage, 1e-9)[:, None]
        error = (missed**2).mean(axis=0)
        better = error < best
        best[better] = error[better]
        weights[:, better], left_out[:, better] = coefficients[:, better], (targets - missed)[:, better]
    slopes = vectors @ (weights / np.sqrt(variances)[:, None])
    return Ridge(slopes, average - centre @ slopes, left_out)


def penalties(variances: Float[np.ndarray, " r"]) -> Float[np.ndarray, " _"]:
    """The penalties to choose from, the largest first: of two that predict alike, it is the safer."""
    if not len(variances):
        return np.array([np.inf])
    return np.append(np.inf, np.geomspace(1e3 * variances.max(), 1e-4 * variances.mean(), PENALTIES))
