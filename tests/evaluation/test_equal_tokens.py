"""benchmarks/paper/equal_tokens.py: a whole run on small budgets, and its numbers beside those of other scripts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_quick_run_counts_the_completions_of_calibration(tmp_path: Path) -> None:
    """Every method ends within its budget, K among it; win rates are below the best at their KL."""
    script = BENCHMARKS / "paper" / "equal_tokens.py"
    subprocess.run([sys.executable, str(script), "--quick", str(tmp_path)], check=True, capture_output=True)
    results = read(tmp_path / "equal_tokens.json")
    assert (tmp_path / "equal_tokens.png").stat().st_size > 10_000
    assert {row["label"].partition(",")[0] for row in results["rows"]} == {"RLOO", "GRPO", "CTRL"}
    found = [row for row in results["rows"] if row["win_rate"]]
    assert len(found) > len(results["rows"]) / 3
    for row in found:
        drawn = row["K"] + row["win_rate"]["steps"] * results["group"]
        assert row["budget"] - results["group"] < drawn <= row["budget"]
        # Between the reference and the optimum, but for what is read between two policies of either side.
        assert 0.55 < row["win_rate"]["value"] < results["optima"][row["procedure"]] + 0.002


def test_the_optima_are_those_of_the_exact_world() -> None:
    """The dashed lines, from this script and from benchmarks/tabular/world.py."""
    ours = read(BENCHMARKS / "results" / "equal_tokens.json")["results"]["optima"]
    world = read(BENCHMARKS / "results" / "tabular_world.json")["results"]["the world"]["optima"]
    for procedure, reward, kl in (
        ("Standard()", "identity", 0.5),
        ("BestOf(n=4)", "best of 4", 0.5),
        ("WorstOf(n=4)", "worst of 4", 0.25),
    ):
        (row,) = (each for each in world if (each["reward"], each["kl"]) == (reward, kl))
        assert ours[procedure] == pytest.approx(row["exact"][procedure], abs=1e-6)


def test_the_committed_differences_are_those_of_the_committed_rates() -> None:
    """Differences at equal budgets alone, CTRL less the other one, with their means inside of their intervals."""
    results = read(BENCHMARKS / "results" / "equal_tokens.json")["results"]
    rates = {(row["label"], row["procedure"], row["budget"]): row["win_rate"] for row in results["rows"]}
    assert len(results["differences"]) > 100
    for row in results["differences"]:
        ours, theirs = (rates[name, row["procedure"], row["budget"]]["value"] for name in (row["label"], row["over"]))
        assert row["value"] == pytest.approx(ours - theirs)
        assert row["interval"][0] < row["value"] < row["interval"][1]
