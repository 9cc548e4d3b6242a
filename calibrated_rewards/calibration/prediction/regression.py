"""Regressions on features: ridge with a penalty chosen by leaving prompts out, and a small network for the rest.

The network bends the common curve of scores for each prompt: it learns what is not linear in the features.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit

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
        """Return the coordinates of features."""
        # In parts: many features in single precision have no room for a copy in double.
        parts = np.array_split(features, max(1, len(features) // 4096))
        return np.asarray(np.vstack([part @ self.basis for part in parts]) - self.mean @ self.basis)

    def on_features(
        self, weights: Float[np.ndarray, "r T"], intercept: Float[np.ndarray, " T"]
    ) -> tuple[Float[np.ndarray, "d T"], Float[np.ndarray, " T"]]:
        """Turn a linear map of coordinates into one of the features themselves."""
        whole = self.basis @ weights
        return whole, intercept - self.mean @ whole


class Ridge(NamedTuple):
    """A linear map, and its prediction for each prompt of the fit when that prompt is left out."""

    weights: Float[np.ndarray, "r T"]
    intercept: Float[np.ndarray, " T"]
    left_out: Float[np.ndarray, "P T"]


def find_directions(features: Float[np.ndarray, "P d"]) -> Directions:
    """Find the directions in which features vary most, at most `MOST_DIRECTIONS`; no score is looked at."""
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
    large = variances > 1e-6 * max(float(variances[-1]), 1e-30)
    variances, vectors = variances[large][::-1], vectors[:, large][:, ::-1]
    basis = centred.T @ (vectors / np.sqrt(variances)) if wide else vectors
    return Directions(mean, basis / scale[:, None])


def fit_ridge(coordinates: Float[np.ndarray, "P r"], targets: Float[np.ndarray, "P T"]) -> Ridge:
    """Regress each target on the coordinates, with a penalty of its own.

    A prompt that is left out changes a ridge regression's answer for it by a factor that is known without doing it
    again (Allen's PRESS): residual / (1 - leverage).

    >>> x = np.arange(8.0)[:, None]
    >>> fit_ridge(x, 2 * x + 1).left_out.round(2).ravel()
    array([ 1.,  3.,  5.,  7.,  9., 11., 13., 15.])
    """
    prompts, centre, average = len(targets), coordinates.mean(axis=0), targets.mean(axis=0)
    variances, vectors = np.linalg.eigh((coordinates - centre).T @ (coordinates - centre))
    # Rounding leaves directions of no variance with some.
    large = variances > 1e-10 * max(float(variances.max(initial=0.0)), 1e-300)
    variances, vectors = variances[large], vectors[:, large]
    left = (coordinates - centre) @ (vectors / np.sqrt(variances))
    along, gaps = left.T @ (targets - average), targets - average
    shrunk = np.array([variances / (variances + penalty) for penalty in list_penalties(variances)])
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


def list_penalties(variances: Float[np.ndarray, " r"]) -> Float[np.ndarray, " _"]:
    """List the penalties to choose from, the largest first: of two that predict alike, it is the safer."""
    if not len(variances):
        return np.array([np.inf])
    return np.append(np.inf, np.geomspace(1e3 * variances.max(), 1e-4 * variances.mean(), PENALTIES))


# The levels whose quantiles the network moves.
NETWORK_LEVELS = (np.arange(25) + 0.5) / 25
HIDDEN, DROPOUT, WEIGHT_DECAY, LEARNING_RATE = 32, 0.1, 0.01, 5e-3
# Numbers of coordinates to read; the best is chosen.
WIDTHS = (8, 32, 128)
# Prompts in a step at most, steps in an epoch at least, and how many of a prompt's scores are drawn for a step.
BATCH, STEPS, DRAWS = 256, 8, 8
# Epochs at most, and without an improvement; what improves is the loss on this part of the prompts, for validation.
EPOCHS, PATIENCE, VALIDATION = 300, 20, 1 / 8


@dataclass(frozen=True, eq=False)
class Network:
    """Two hidden layers, evaluated in numpy: torch is needed only to train them.

    The output for a prompt are quantiles that ascend whatever the weights: the lowest, and positive steps.
    """

    quantiles: Float[np.ndarray, " S"]
    """The common curve at `NETWORK_LEVELS`, which it bends."""
    first: Float[np.ndarray, "d H"]
    first_bias: Float[np.ndarray, " H"]
    second: Float[np.ndarray, "H H"]
    second_bias: Float[np.ndarray, " H"]
    last: Float[np.ndarray, "H S"]
    last_bias: Float[np.ndarray, " S"]

    def __call__(self, features: Float[np.ndarray, "P d"]) -> Float[np.ndarray, "P S"]:
        """Return each prompt's quantiles at `NETWORK_LEVELS`, on the common curve's scale."""
        hidden = _silu(features @ self.first + self.first_bias)
        output = _silu(hidden @ self.second + self.second_bias) @ self.last + self.last_bias
        start = self.quantiles[0] + output[:, :1]
        steps = np.logaddexp(0, _invert_softplus(self.quantiles) + output[:, 1:])
        return np.hstack([start, start + np.cumsum(steps, axis=1)])


def train_network(
    coordinates: Float[np.ndarray, "P r"],
    scores: Float[np.ndarray, " n"],
    counts: Int[np.ndarray, " P"],
    quantiles: Float[np.ndarray, " S"],
    seed: int,
) -> Network:
    """Train the network of least pinball loss, which is half of CRPS, on standardised scores; stopped early.

    Of networks that read more and more of the leading coordinates the best is taken: with many of them a network learns
    its prompts by heart. It is trained on the CPU, from a seed: the same machine gives the same network.

    `scores` are the prompts' standardised scores one prompt after the other, `counts` of each; `quantiles` are the
    common curve's at `NETWORK_LEVELS`.
    """
    import torch

    size = max(float(coordinates.std(axis=0).max()), 1e-12)
    inputs = torch.tensor(coordinates / size, dtype=torch.float32)
    width = inputs.shape[1]
    least, weights = np.inf, list[Any]()
    with torch.random.fork_rng(devices=[]):
        for first in sorted({min(first, width) for first in WIDTHS}):
            torch.manual_seed(seed)
            trainer = _Trainer(inputs[:, :first], scores, counts, quantiles, np.random.default_rng(seed))
            loss, trained = trainer.train()
            if loss < least:
                least, weights = loss, trained
    entry, *rest = (np.ascontiguousarray(weight.double().numpy().T) for weight in weights)
    entry = np.vstack([entry / size, np.zeros((width - len(entry), HIDDEN))])
    return Network(quantiles, entry, *rest)


class _Trainer:
    """Layers with the prompts to train them on."""

    def __init__(self, inputs: Any, scores: Any, counts: Any, quantiles: Any, rng: np.random.Generator) -> None:
        import torch
        from torch import nn

        self.inputs, self.rng, self.counts = inputs, rng, counts
        self.scores = torch.tensor(scores, dtype=torch.float32)
        self.starts = np.cumsum(counts) - counts
        self.start = float(quantiles[0])
        self.before = torch.tensor(_invert_softplus(quantiles), dtype=torch.float32)
        self.levels = torch.tensor(NETWORK_LEVELS, dtype=torch.float32)
        width, marks = inputs.shape[1], len(quantiles)
        hidden = [nn.Linear(width, HIDDEN), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(HIDDEN, marks))
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)  # the common curve, to start with

    def train(self) -> tuple[float, list[Any]]:
        """Return the least loss on the validation prompts, and the weights that have it."""
        import torch

        order = self.rng.permutation(len(self.counts))
        validation, training = np.split(order, [max(1, int(len(order) * VALIDATION))])
        scores = self._draw(validation, 8 * DRAWS)
        step = torch.optim.AdamW(self.net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        least, weights, since = float("inf"), self._weights(), 0
        for _ in range(EPOCHS):
            self._epoch(training, step)
            self.net.eval()
            with torch.no_grad():
                loss = float(self._loss(validation, scores))
            since = 0 if loss < least else since + 1
            if loss < least:
                least, weights = loss, self._weights()
            if since == PATIENCE:
                break
        return least, weights

    def _epoch(self, training: Any, step: Any) -> None:
        self.net.train()
        shuffled = self.rng.permutation(training)
        for batch in np.array_split(shuffled, max(min(STEPS, len(shuffled)), len(shuffled) // BATCH)):
            step.zero_grad()
            self._loss(batch, self._draw(batch, DRAWS)).backward()
            step.step()

    def _draw(self, prompts: Any, draws: int) -> Any:
        """Draw some scores of each prompt."""
        at = (self.rng.random((len(prompts), draws)) * self.counts[prompts][:, None]).astype(np.int64)
        return self.scores[self.starts[prompts][:, None] + at]

    def _loss(self, prompts: Any, scores: Any) -> Any:
        import torch

        output = self.net(self.inputs[prompts])
        steps = torch.nn.functional.softplus(self.before + output[:, 1:])
        start = self.start + output[:, :1]
        quantiles = torch.cat([start, start + steps.cumsum(1)], 1)
        gaps = scores[:, :, None] - quantiles[:, None, :]
        return torch.maximum(self.levels * gaps, (self.levels - 1) * gaps).mean()

    def _weights(self) -> list[Any]:
        return [parameter.detach().clone() for parameter in self.net.parameters()]


def _invert_softplus(quantiles: Float[np.ndarray, " S"]) -> Float[np.ndarray, " _"]:
    """Return the inverse softplus of the steps between quantiles; ties are drawn apart a little."""
    steps = np.maximum(np.diff(quantiles), 1e-3 * (quantiles[-1] - quantiles[0]) + 1e-9)
    return np.asarray(steps + np.log(-np.expm1(-steps)))


def _silu(values: Float[np.ndarray, "P H"]) -> Float[np.ndarray, "P H"]:
    return np.asarray(values * expit(values))
