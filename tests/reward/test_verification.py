"""A reward model that is not the table's is caught before training: other weights, template, precision, table."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.verification import verify_scorer
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = [[{"role": "user", "content": text}] for text in tiny.texts(12, seed=5)]
OTHER_TEMPLATE = tiny.TEMPLATE.replace("<|end|>", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved(tiny.classifier(), tmp_path_factory.mktemp("rm"), tiny.tokenizer())


@pytest.fixture(scope="module")
def table(folder: str, tmp_path_factory: pytest.TempPathFactory) -> ReferenceTable:
    made: Any = calibrate(PROMPTS, NumberSampler(), load_scorer(folder), k=16, out=tmp_path_factory.mktemp("run"))
    return made  # type: ignore[no-any-return]


def test_the_table_s_own_reward_model_is_verified(folder: str, table: ReferenceTable) -> None:
    """All probes, to the tolerance of float32, and no difference of fingerprints."""
    found = CalibratedReward(load_scorer(folder), table).verify()

    assert found.probes == len(table.meta["probes"]) == 16
    assert found.worst <= 1e-4
    assert found.differs == ()
    assert "16 probes" in str(found)


def test_another_reward_model_is_caught(table: ReferenceTable, tmp_path: Path) -> None:
    """Other weights behind the same architecture and tokenizer."""
    other = load_scorer(tiny.saved(tiny.classifier(seed=1), tmp_path / "other", tiny.tokenizer()))
    with pytest.raises(ValueError, match="not the one that the table was made with"):
        CalibratedReward(other, table).verify()


def test_weights_that_were_trained_on_are_caught(table: ReferenceTable, tmp_path: Path) -> None:
    """A change of one percent in one layer."""
    model = tiny.classifier()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    moved = load_scorer(tiny.saved(model, tmp_path / "moved", tiny.tokenizer()))
    with pytest.raises(ValueError, match="standard deviations"):
        CalibratedReward(moved, table).verify()


def test_another_template_is_caught(folder: str, table: ReferenceTable) -> None:
    """The same weights that read the conversation otherwise."""
    with pytest.raises(ValueError, match="template"):
        CalibratedReward(load_scorer(folder, text=Text(template=OTHER_TEMPLATE)), table).verify()


def test_bfloat16_in_place_of_float32_is_caught(folder: str, table: ReferenceTable) -> None:
    """It is farther away than equal scores are, and the error says which setting differs."""
    swapped = CalibratedReward(load_scorer(folder, dtype="bfloat16"), table)
    with pytest.raises(ValueError, match=r"dtype \('float32' then, 'bfloat16' now\)"):
        swapped.verify()
    assert swapped.verify(tolerance=1.0).differs[0].startswith("dtype")


def test_a_table_of_another_reward_model_is_caught(folder: str) -> None:
    """The scorer is right, the table is not its."""
    other = calibrate(PROMPTS, NumberSampler(), HashScorer(), k=4)
    with pytest.raises(ValueError, match="not the one that the table was made with"):
        verify_scorer(load_scorer(folder), other)


def test_tables_without_probes_say_so() -> None:
    """There is nothing to verify with; nor is there without a scorer."""
    table = ReferenceTable.build([("p", [0.0, 1.0])])
    with pytest.raises(ValueError, match="no probes"):
        CalibratedReward(NumberScorer(), table).verify()
    with pytest.raises(ValueError, match="no scorer to verify"):
        CalibratedReward(None, table).verify()


def test_a_tolerance_is_in_standard_deviations_of_a_prompt() -> None:
    """The median over prompts, which one with wild scores does not move: here by hand."""
    rows = [("a", [0.0, 2.0]), ("b", [100.0, 106.0]), ("c", [-1e6, 1e6]), ("d", [7.0])]
    spread = 3.0
    table = ReferenceTable.build(rows, meta={"probes": [{"prompt": "a", "completion": "4", "score": 4.0 + spread}]})

    assert verify_scorer(NumberScorer(), table, tolerance=1.01).worst == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="1 of 1 probes are apart, by up to 1 standard"):
        verify_scorer(NumberScorer(), table, tolerance=0.99)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="finite tolerance"):
            verify_scorer(NumberScorer(), table, tolerance=wrong)
