"""The alarm for a calibration that does not fit: it sounds when it should, and seldom when it should not."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.reward.monitoring import Alarm, drift, log_drift
from calibrated_rewards.testing.suites import NumberScorer


def test_the_standard_error_is_that_of_mann_and_whitney() -> None:
    """Over many tables and batches of one law, drift has mean 0 and variance 1, for unequal G and K too."""
    rng = np.random.default_rng(0)
    found = []
    groups = [(4, 5), (1, 50), (7, 3)]  # responses, references
    for _ in range(3000):
        u, rows, counts = [], [], []
        for row, (g, k) in enumerate(groups):
            references = rng.normal(size=k)
            u.append([(references < x).mean() for x in rng.normal(size=g)])
            rows.append(np.full(g, row))
            counts.append(np.full(g, k))
        found.append(drift(np.concatenate(rows), np.concatenate(u), np.concatenate(counts)))

    assert np.mean(found) == pytest.approx(0, abs=5 / np.sqrt(3000))
    assert np.var(found) == pytest.approx(1, abs=5 * np.sqrt(2 / 3000))


def test_logarithms_vary_as_they_should() -> None:
    """Over many tables and batches of one law, log_drift has mean 0 and variance 1, nearly, also where scores tie."""
    rng = np.random.default_rng(0)
    for decimals in (6, 0):  # no ties, or four values that nearly all scores have
        found = []
        for _ in range(400):
            own = {str(i): rng.normal(size=k).round(decimals) for i, k in enumerate((100, 60, 200))}
            table = ReferenceTable.build(own.items())
            rows = np.repeat(table.rows([*own]), (20, 5, 40))
            found.append(log_drift(rows, table.cdf(rows, rng.normal(size=65).round(decimals)), table))
        assert np.mean(found) == pytest.approx(0, abs=0.3)
        assert np.std(found) == pytest.approx(1, abs=0.3)


TABLE = ReferenceTable.build([(str(i), np.linspace(-1, 1, 100)) for i in range(20)])


def uniform(n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 20, n), np.clip(rng.random(n) + shift, 0, 1)


def test_the_alarm_sounds_once_and_only_when_it_should(caplog: pytest.LogCaptureFixture) -> None:
    """Uniform quantiles are silent; shifted ones warn once, when enough of them have come."""
    quiet = Alarm("quiet", TABLE)
    quiet.hear(*uniform(1000))
    assert not caplog.records

    loud = Alarm("loud", TABLE)
    loud.hear(*uniform(200, 0.2))
    assert not caplog.records
    for _ in range(3):
        loud.hear(*uniform(200, 0.2))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].getMessage().startswith("loud: the first 400 responses have a mean quantile of 0.6")


def test_a_spread_that_leaves_the_mean_alone_is_heard_too(caplog: pytest.LogCaptureFixture) -> None:
    """A policy at another temperature may be as good on average: its quantiles are at the ends."""
    rows, u = uniform(600)
    Alarm("ends", TABLE).hear(rows, np.where(u > 0.5, 1.0, 0.0))
    assert len(caplog.records) == 1
    assert abs(drift(rows, np.where(u > 0.5, 1.0, 0.0), TABLE.counts(rows))) < 5


def test_a_first_step_is_enough_and_later_ones_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    """What comes after a step of the policy says nothing about the calibration."""
    resumed = Alarm("resumed", TABLE)
    resumed.finish()
    resumed.hear(*uniform(500, 0.4))
    assert not caplog.records
    small = Alarm("small", TABLE)
    small.hear(*uniform(64, 0.4))
    assert not caplog.records
    small.finish()
    assert len(caplog.records) == 1


def test_evaluation_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """score() is for looking; the alarm can be left out; and copies of one completion are one."""
    table = ReferenceTable.build([(str(i), np.linspace(-1, 1, 50)) for i in range(300)])
    prompts, completions = [str(i) for i in range(300)], ["0.9"] * 300
    CalibratedReward(NumberScorer(), table).score(prompts, completions)
    CalibratedReward(NumberScorer(), table, alarm=False)(prompts, completions)
    CalibratedReward(NumberScorer(), table)(prompts[:9] * 40, ["0.9"] * 360)
    assert not caplog.records
    CalibratedReward(NumberScorer(), table)(prompts, completions)
    assert len(caplog.records) == 1


def test_a_trainer_s_state_tells_when_the_first_step_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """TRL passes trainer_state: at step 0 the policy is the reference; afterwards it has been trained."""
    table = ReferenceTable.build([(str(i), np.linspace(-1, 1, 50)) for i in range(40)])
    prompts, completions = [str(i) for i in range(40)], ["0.9"] * 40
    CalibratedReward(NumberScorer(), table, name="resumed")(
        prompts, completions, trainer_state=SimpleNamespace(global_step=7)
    )
    assert not caplog.records
    fresh = CalibratedReward(NumberScorer(), table, name="fresh")
    fresh(prompts, completions, trainer_state=SimpleNamespace(global_step=0))
    assert not caplog.records
    fresh(prompts, completions, trainer_state=SimpleNamespace(global_step=1))
    assert caplog.records[0].getMessage().startswith("fresh: the first 40 responses")
