"""Ridge by one decomposition, against leaving each prompt out and solving again."""

import numpy as np
import pytest

from calibrated_rewards.calibration.prediction.regression import find_directions, fit_ridge, list_penalties


def solved(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Slopes and intercept by the normal equations; the mean alone for an infinite penalty."""
    gaps = x - x.mean(0)
    if np.isinf(penalty):
        return np.zeros(x.shape[1]), float(y.mean())
    slopes = np.linalg.solve(gaps.T @ gaps + penalty * np.eye(x.shape[1]), gaps.T @ (y - y.mean()))
    return slopes, float(y.mean() - x.mean(0) @ slopes)


def left_out(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Each prompt's prediction by the solution without it."""
    others = [np.arange(len(y)) != i for i in range(len(y))]
    fits = [solved(x[other], y[other], penalty) for other in others]
    return np.array([x[i] @ slopes + intercept for i, (slopes, intercept) in enumerate(fits)])


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_leaving_out_equals_solving_again(noise: float) -> None:
    """The penalty, the predictions without each prompt, and the slopes are those of doing it the long way."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 5)) * [1, 2, 3, 0.5, 0.1]
    y = np.stack([x[:, 0] + noise * rng.normal(size=24), rng.normal(size=24)], axis=1)
    found = fit_ridge(x, y)
    grid = list_penalties(np.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))))
    for target in range(2):
        long = [left_out(x, y[:, target], penalty) for penalty in grid]
        best = int(np.argmin([np.mean((each - y[:, target]) ** 2) for each in long]))
        np.testing.assert_allclose(found.left_out[:, target], long[best], atol=1e-9)
        slopes, intercept = solved(x, y[:, target], grid[best])
        np.testing.assert_allclose(found.weights[:, target], slopes, atol=1e-9)
        assert found.intercept[target] == pytest.approx(intercept)


@pytest.mark.parametrize("shape", [(40, 6), (12, 30)], ids=["tall", "wide"])
def test_directions_keep_all_there_is(shape: tuple[int, int]) -> None:
    """Coordinates have the distances of the standardised features; a constant feature counts for nothing."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=shape) * rng.uniform(0.1, 100, shape[1]) + 7
    features[:, 2] = 7
    axes = find_directions(features)
    standard = np.delete((features - features.mean(0)) / np.maximum(features.std(0), 1e-12), 2, axis=1)
    distances = [((each[:, None] - each[None]) ** 2).sum(-1) for each in (axes(features), standard)]
    np.testing.assert_allclose(*distances, atol=1e-8)
    weights, intercept = rng.normal(size=(axes.basis.shape[1], 2)), rng.normal(size=2)
    whole, shift = axes.on_features(weights, intercept)
    np.testing.assert_allclose(features @ whole + shift, axes(features) @ weights + intercept, atol=1e-8)


def test_many_features_become_few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more features than `MOST_DIRECTIONS`, those directions stay in which they vary most."""
    rng = np.random.default_rng(2)
    few = rng.normal(size=(1100, 3)).astype(np.float32)
    features = np.hstack([few @ rng.normal(size=(3, 150)), rng.normal(size=(1100, 150))]).astype(np.float32)
    monkeypatch.setattr("calibrated_rewards.calibration.prediction.regression.MOST_DIRECTIONS", 20)
    axes = find_directions(features)
    assert axes.basis.shape == (300, 20)
    fitted = fit_ridge(axes(features)[:, :3], few.astype(np.float64))
    assert ((fitted.left_out - few) ** 2).mean() < 0.01


def test_equal_features_are_refused() -> None:
    """Features that are the same for all prompts tell nothing."""
    with pytest.raises(ValueError, match=r"features need to differ between prompts, got 9 equal rows"):
        find_directions(np.ones((9, 4)))
