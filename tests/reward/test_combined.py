"""Combined rewards: the combinations by hand, constraints, and that a combination can be calibrated again."""

from dataclasses import replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.reward.calibrators import ZScore
from calibrated_rewards.reward.combined import And, CombinedReward, Lowest, Or, WeightedMean
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = ["one", "two"]
COMPLETIONS = ["0.3", "-2.5"]


def components(k: int = 8, **settings: Any) -> dict[str, CalibratedReward]:
    """Three reward models that know nothing of each other, each with its own table."""
    scorers = {"good": NumberScorer(), "kind": HashScorer(1), "safe": HashScorer(2)}
    tables = {name: calibrate(PROMPTS, NumberSampler(), scorer, k=k) for name, scorer in scorers.items()}
    return {name: CalibratedReward(scorer, tables[name], **settings) for name, scorer in scorers.items()}


def quantiles(rewards: dict[str, CalibratedReward]) -> np.ndarray:
    return np.array([reward.calibrated(PROMPTS, COMPLETIONS) for reward in rewards.values()])


def test_combinations_by_hand() -> None:
    """Weighted mean, minimum, sum of logarithms, and the chance of any, of the components' own quantiles."""
    rewards, u = components(), quantiles(components())
    floored = np.maximum(u, 1 / 16)
    by_hand = {
        WeightedMean(): u.mean(0),
        WeightedMean((1, 2, 5)): (u[0] + 2 * u[1] + 5 * u[2]) / 8,
        Lowest(): u.min(0),
        And(): np.log(floored).sum(0),
        Or(): np.log(1 - (1 - floored[0]) * (1 - floored[1]) * (1 - floored[2])),
    }
    for how, expected in by_hand.items():
        np.testing.assert_allclose(CombinedReward(rewards, how)(PROMPTS, COMPLETIONS), expected, rtol=1e-12)


def test_and_and_or_are_chances() -> None:
    """Drawing a reference for each component, as often as this does a completion beat all of them, or any."""
    rng = np.random.default_rng(0)
    u = np.array([[0.9], [0.6], [0.25]])
    wins = rng.random((200_000, 3)) < u[:, 0]
    tiny = np.full_like(u, 1e-9)

    for how, share in ((And(), wins.all(1).mean()), (Or(), wins.any(1).mean())):
        assert np.exp(how(u, tiny)[0]) == pytest.approx(share, abs=5 * np.sqrt(0.25 / 200_000))


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_combinations_rise_with_each_component(quantiles: list[list[float]]) -> None:
    """No component that rises lowers the reward, and it is finite at the ends of the quantiles."""
    u = np.array(quantiles)
    least = np.full_like(u, 0.01)
    for how in (WeightedMean(), Lowest(), And(), Or()):
        values = how(u, least)
        assert np.isfinite(values).all()
        for m in range(len(u)):
            raised = u.copy()
            raised[m] = np.minimum(raised[m] + 0.1, 1.0)
            assert (how(raised, least) >= values - 1e-12).all()


def test_scores_that_are_there_already() -> None:
    """from_scores of each component's raw scores, as arrays and as tensors, is what a call gives."""
    rewards = components()
    combined = CombinedReward(rewards, And(), {"safe": 0.4})
    raw = {name: reward.raw(PROMPTS, COMPLETIONS) for name, reward in rewards.items()}
    expected = combined(PROMPTS, COMPLETIONS)

    assert combined.from_scores(PROMPTS, raw).tolist() == expected
    tensors = {name: torch.from_numpy(own) for name, own in raw.items()}
    np.testing.assert_allclose(combined.from_scores(PROMPTS, tensors).numpy(), expected, rtol=1e-6)
    square = {name: np.stack([own, own + 0.5], axis=1) for name, own in raw.items()}
    found = combined.from_scores(PROMPTS, square)
    assert found.shape == (2, 2)
    assert found[:, 0].tolist() == expected
    few = ReferenceTable.build([("one", [5.0]), ("two", [5.0] * 3)])
    lowest = CombinedReward({"good": CalibratedReward(NumberScorer(), few)}, And())
    np.testing.assert_allclose(
        lowest.from_scores(PROMPTS, {"good": np.zeros((2, 2))}), np.log([[1 / 2, 1 / 2], [1 / 6, 1 / 6]])
    )
    with pytest.raises(ValueError, match=r"by the names \['good', 'kind', 'safe'\], got \['good'\]"):
        combined.from_scores(PROMPTS, {"good": raw["good"]})


@pytest.mark.parametrize("how", [WeightedMean(), WeightedMean((1.0, 2.0)), Lowest(), And(), Or()])
def test_no_pairs_have_no_rewards(how: Any) -> None:
    """Whatever combines them, in a call, as scores, and under a constraint."""
    combined = CombinedReward(components(), how, {"safe": 0.5})
    assert combined([], []) == combined.score([], []).reward == combined.score_texts([]).reward == []
    logged: dict[str, float] = {}
    assert combined([], [], log_metric=logged.__setitem__) == []
    assert logged["combined/safe_violated"] == 0.0


def test_a_constraint_comes_before_everything() -> None:
    """What violates it is worth less than anything that does not, and the less the further."""
    rewards, u = components(k=64), quantiles(components(k=64))
    for how in (WeightedMean(), Lowest(), And(), Or()):
        combined = CombinedReward(rewards, how, {"safe": 0.5})
        n = 400
        prompts, completions = ["one"] * n, [f"{x:.3f}" for x in np.linspace(-3, 3, n)]
        values = np.array(combined(prompts, completions))
        safe = rewards["safe"].calibrated(prompts, completions)
        assert values[safe < 0.5].max() <= values[safe >= 0.5].min() - 0.5
        np.testing.assert_allclose(np.diff(values[safe < 0.5]), np.diff(safe[safe < 0.5]), atol=1e-12)
    logged: dict[str, float] = {}
    combined(PROMPTS, COMPLETIONS, log_metric=logged.__setitem__)
    assert logged["combined/safe_violated"] == (u[2] < 0.5).mean()
    for i, name in enumerate(rewards):  # each by its own name, and none over another
        assert logged[f"{name}/u"] == pytest.approx(u[i].mean())
    assert not [name for name in logged if name.startswith("calibrated/")]


def test_a_combination_is_calibrated_as_a_scorer() -> None:
    """Then its quantiles are uniform again under the reference, where a plain mean of uniforms is not."""
    combined = CombinedReward(components(k=64), And())
    fresh = calibrate(PROMPTS, NumberSampler(), combined, k=64, seed=1)
    again = CalibratedReward(combined, calibrate(PROMPTS, NumberSampler(), combined, k=256, seed=2), Exponential(5.0))
    u = again.table.cdf(np.repeat([0, 1], 64), np.concatenate([fresh.scores(0), fresh.scores(1)]))

    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(np.exp(np.concatenate([fresh.scores(0), fresh.scores(1)])), "uniform").pvalue < 1e-6
    assert again(PROMPTS, COMPLETIONS) == again(PROMPTS, COMPLETIONS)
    assert again.verify().worst == 0


def test_what_cannot_be_combined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformed components, unknown names, weights that do not fit."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    rewards = components()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rewards": components(transform=Exponential(1.0))}, "has the transform"),
        ({"rewards": components(on_missing="skip")}, "skips unknown prompts"),
        ({"rewards": components(scale="standard")}, "scale 'standard'"),
        ({"rewards": components(calibration=ZScore())}, "gives ZScore"),
        ({"rewards": rewards, "constraints": {"loud": 0.5}}, "a constraint is on one of"),
        ({"rewards": rewards, "constraints": {"safe": 1.5}}, "quantile in"),
        ({"rewards": rewards, "constraints": {"safe": "0.5"}}, r"quantile in \[0, 1\], got \{'safe': '0.5'\}"),
        ({"rewards": rewards, "constraints": {"safe": None}}, "quantile in"),
        ({"rewards": rewards, "constraints": dict.fromkeys(rewards, 0.5)}, "no constraint, got none"),
        ({"rewards": rewards, "how": WeightedMean((1.0,))}, "a weight for each of 3"),
    ]
    for settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            CombinedReward(**settings)
    with pytest.raises(TypeError, match="by name"):
        CombinedReward([*rewards.values()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a mapping"):
        WeightedMean({"good": 1.0})  # type: ignore[arg-type]
    for weights in ((-1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="finite weights"):
            WeightedMean(weights)


def test_an_unknown_prompt_is_loud() -> None:
    """A prompt that no component has references of is named in a KeyError."""
    with pytest.raises(KeyError, match="stranger"):
        CombinedReward(components())(["stranger"], ["1"])
    neutral = CombinedReward(components(on_missing="neutral"))
    assert neutral(["stranger"], ["1"]) == [0.5]


def test_a_prompt_that_a_component_does_not_know() -> None:
    """`check` refuses it, also under a reward that was calibrated for the combination, and draws nothing."""
    rewards = components()
    rewards["short"] = CalibratedReward(HashScorer(3), calibrate(PROMPTS[:1], NumberSampler(), HashScorer(3), k=4))
    combined = CombinedReward(rewards)
    table = ReferenceTable.build([(prompt, [0.1, 0.2, 0.9]) for prompt in PROMPTS])
    for reward in (combined, CalibratedReward(combined, table)):
        reward.check(PROMPTS[:1])
        with pytest.raises(UnknownPromptError, match="two"):
            reward.check(PROMPTS)
    lenient = dict(rewards, short=replace(rewards["short"], on_missing="neutral"))
    CombinedReward(lenient).check(PROMPTS)
