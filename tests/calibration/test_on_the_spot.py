"""Rows drawn when they are asked for, against those of `calibrate`."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.on_demand import OnTheSpot
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer

PROMPTS = [f"prompt {i}" for i in range(9)]
WHOLE = calibrate(PROMPTS, NumberSampler(), NumberScorer(), k=6, seed=3)
SOME = calibrate(PROMPTS[:4], NumberSampler(), NumberScorer(), k=6, seed=3)


@dataclass(frozen=True)
class Watched:
    """A sampler that keeps a list of what it was asked for, and takes its time."""

    asked: list[str] = field(default_factory=list)
    seconds: float = 0.0
    fails: list[str] = field(default_factory=list)

    def __call__(self, prompts: Any, seeds: Any) -> Any:
        """What `NumberSampler` gives."""
        self.asked.extend(prompts)
        time.sleep(self.seconds)
        if self.fails:
            raise ConnectionError(self.fails.pop())
        return NumberSampler()(prompts, seeds)

    def fingerprint(self) -> dict[str, Any]:
        """The same: it draws the same."""
        return NumberSampler().fingerprint()


def same(found: ReferenceTable, prompts: list[str]) -> None:
    """The rows are those of `calibrate`."""
    assert len(found) == len(set(prompts))
    for prompt in prompts:
        rows = [int(table.rows([prompt])[0]) for table in (found, WHOLE)]
        np.testing.assert_array_equal(found.scores(rows[0]), WHOLE.scores(rows[1]))


def test_rows_are_those_of_calibrate() -> None:
    """Alone, together, again, and in any order: the bytes that a calibration of all prompts would have given."""
    spot = OnTheSpot(None, NumberSampler(), NumberScorer(), k=6, seed=3)
    same(spot(PROMPTS[5:6]), PROMPTS[5:6])
    same(spot([*PROMPTS[::-1], PROMPTS[0]]), PROMPTS)
    same(spot.merged(), PROMPTS)
    assert spot(PROMPTS).meta == {key: value for key, value in WHOLE.meta.items() if key != "probes"}


def test_known_prompts_are_not_drawn() -> None:
    """Nor is what was drawn before; K and the seed are the table's."""
    sampler = Watched()
    spot = OnTheSpot(SOME, sampler, NumberScorer())
    assert (spot.k, spot.seed) == (6, 3)
    same(spot(PROMPTS), PROMPTS)
    same(spot(PROMPTS), PROMPTS)
    assert sampler.asked == PROMPTS[4:]
    merged = spot.merged()
    same(merged, PROMPTS)
    assert merged.meta == SOME.meta
    assert len(OnTheSpot(SOME, sampler, NumberScorer()).merged()) == 4


def test_a_prompt_is_drawn_once_for_all_threads() -> None:
    """Eight threads that ask for overlapping prompts at one time draw each once, and each gets its own."""
    sampler = Watched(seconds=0.02)
    spot = OnTheSpot(None, sampler, NumberScorer(), k=6, seed=3)
    start = threading.Barrier(8)

    def ask(i: int) -> ReferenceTable:
        start.wait()
        return spot(PROMPTS[i : i + 2])

    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(ask, range(8))):
            same(found, PROMPTS[i : i + 2])
    assert sorted(sampler.asked) == PROMPTS


def test_an_error_is_told_to_all_and_tried_again() -> None:
    """Whoever waits for a prompt whose drawing fails gets the error; who asks later draws anew."""
    sampler = Watched(seconds=0.1, fails=["no answer"])
    spot = OnTheSpot(None, sampler, NumberScorer(), k=6, seed=3)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(spot, PROMPTS[:1])
        while not sampler.asked:
            time.sleep(0.001)
        second = pool.submit(spot, PROMPTS[:1])
        assert [type(each.exception()) for each in (first, second)] == [ConnectionError] * 2
    same(spot(PROMPTS[:1]), PROMPTS[:1])


def test_another_process_starts_anew() -> None:
    """It pickles as how it was made."""
    spot = OnTheSpot(SOME.merge(), NumberSampler(), NumberScorer())
    spot(PROMPTS)
    again = pickle.loads(pickle.dumps(spot))
    assert (again.k, again.seed, len(again.merged())) == (6, 3, 4)
    same(again(PROMPTS), PROMPTS)


def test_other_tables_are_refused() -> None:
    """Of another reward model or sampler; and without a table, K and a seed have to be said."""
    with pytest.raises(ValueError, match=r"made with another sampler: it differs in spread"):
        OnTheSpot(SOME, NumberSampler(2.0), NumberScorer())
    with pytest.raises(ValueError, match=r"made with another scorer: it differs in code, default, kind, layout, name"):
        OnTheSpot(SOME, NumberSampler(), lambda prompts, completions: [0.0] * len(prompts))
    with pytest.raises(ValueError, match=r"needs a whole k >= 1, or a table that has one, got None"):
        OnTheSpot(None, NumberSampler(), NumberScorer(), seed=0)
    with pytest.raises(ValueError, match=r"needs a whole seed, or a table that has one, got None"):
        OnTheSpot(None, NumberSampler(), NumberScorer(), k=4)
    with pytest.raises(ValueError, match="nothing to merge"):
        OnTheSpot(None, NumberSampler(), NumberScorer(), 4, 0).merged()


@dataclass(frozen=True)
class Choosy:
    """A sampler that refuses a prompt beforehand."""

    def check(self, prompts: Any) -> None:
        """No empty prompts."""
        if "" in prompts:
            raise ValueError("an empty prompt")

    def __call__(self, prompts: Any, seeds: Any) -> Any:
        """Never reached."""
        raise AssertionError("it is asked before it samples")


def test_the_sampler_may_refuse_a_prompt() -> None:
    """Before anything is sampled."""
    with pytest.raises(ValueError, match="an empty prompt"):
        OnTheSpot(None, Choosy(), NumberScorer(), 4, 0)([""])
