"""`calibrated-rewards export`: the same beta as `reward`, the run found from a table, and errors in options."""

import json
from pathlib import Path

import jaxtyping
import numpy as np
import pyarrow.parquet as pq
import pytest
from rollout_runs import save_run
from scipy.special import softmax

from calibrated_rewards import BestOf, CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import main
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.theory.finite_k import values
from calibrated_rewards.theory.named import parse_transform
from calibrated_rewards.theory.scale import scaled


@pytest.fixture(autouse=True)
def without_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run-time types take nearly all of the time of solving for an optimum."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the scores of two reward models."""
    folder = tmp_path_factory.mktemp("made") / "run"
    scorers = {"safe": HashScorer(), "reward": NumberScorer()}
    calibrate(["one", "two", "three"], NumberSampler(), scorers, folder, k=8, show_progress=False)
    return folder


def test_its_beta_is_that_of_reward(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The beta for the KL in the transform, solved for on the table; the weights are those of that beta."""
    words = ["export", str(run), "--as", "scored", "--transform", "best-of:4:0.5", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    named, table = parse_transform("best-of:4:0.5"), ReferenceTable.load(run / "reward")
    solved = expect(table, named.transform, kl=0.5, procedure=BestOf(4))
    output = capsys.readouterr().out
    assert f"beta {solved.beta:.4g}, " in output
    assert "24 rows of 3 prompts, from 24 rollouts with the scores of 'reward'" in output
    columns = pq.read_table(tmp_path / "out" / "train.parquet").to_pydict()
    rewards, weights = np.array(columns["reward"]).reshape(3, 8), np.array(columns["weight"]).reshape(3, 8)
    factors = np.exp(rewards / solved.beta)
    np.testing.assert_allclose(weights, factors / factors.sum(axis=1, keepdims=True), rtol=1e-9)
    # Each rollout is ranked among the seven others, for which the KL is nearly that for eight.
    kl, ess = (weights * np.log(8 * weights)).sum(axis=1).mean(), (1 / (weights**2).sum(axis=1)).mean()
    others = softmax(values(scaled(named.transform, "unit"), 7)[::2] / solved.beta)
    assert kl == pytest.approx(float((others * np.log(8 * others)).sum()), rel=1e-6)
    assert f"weights: KL {kl:.3g} nats from equal ones, effective sample size {ess:.3g}, on average" in output
    written = (tmp_path / "out" / "export.json").read_bytes()
    assert main(words) == 0
    assert "there already: nothing is written" in capsys.readouterr().err
    assert (tmp_path / "out" / "export.json").read_bytes() == written


def test_the_run_of_a_table_is_found(run: Path, tmp_path: Path) -> None:
    """A table in a run names its scorer, as --select does."""
    paths = [[str(run / "safe")], [str(run), "--select", "safe"]]
    for at, words in enumerate(paths):
        assert main(["export", *words, "--as", "sft", "--out", str(tmp_path / str(at))]) == 0
    first, second = (pq.read_table(tmp_path / str(at) / "train.parquet").to_pylist() for at in range(2))
    assert first == second
    references = ReferenceTable.load(run / "safe")
    assert [row["score"] for row in first] == [
        references.scores(int(r)).max() for r in references.rows(["one", "two", "three"])
    ]


def test_a_saved_reward_gives_transform_and_beta(run: Path, tmp_path: Path) -> None:
    """Its own beta, or the one that is given; no second transform."""
    reward = CalibratedReward(NumberScorer(), ReferenceTable.load(run / "reward"), beta=0.25)
    reward.save_pretrained(tmp_path / "reward")
    words = ["export", str(run), "--as", "weighted", "--reward", str(tmp_path / "reward"), "--trust-remote-code"]
    assert main([*words, "--out", str(tmp_path / "own")]) == 0
    assert main([*words, "--beta", "2", "--out", str(tmp_path / "given")]) == 0
    betas = [json.loads((tmp_path / n / "export.json").read_text())["settings"]["beta"] for n in ("own", "given")]
    assert betas == [0.25, 2.0]
    assert main([*words, "--scale", "raw", "--out", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--as", "weighted"], "name it by a KL, --transform best-of:4:0.5, or --beta B"),
        (["--as", "scored", "--beta", "1", "--layout", "openrlhf"], "one layout, trl, got --layout openrlhf"),
        (["--as", "sft", "--layout", "axolotl", "--format", "datasets"], "choose --format jsonl"),
        (["--as", "weighted", "--beta", "1", "--draws", "2"], "--draws 2 needs >= 1, and sft or pairs"),
        (["--as", "sft", "--transform", "identity:0.5", "--beta", "1"], "names a KL, which has its beta"),
        (["--as", "sft", "--select", "judge"], "got 'judge'"),
    ],
)
def test_errors_name_options(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, with exit code 2, and nothing is written."""
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bare_table_and_another_export_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table without its run has no rollouts; --force is named where it helps."""
    save_run(tmp_path / "run", [("p", ["a", "b"], [0.0, 1.0])])
    ReferenceTable.load(tmp_path / "run").save(tmp_path / "bare")
    assert main(["export", str(tmp_path / "bare"), "--as", "sft", "--out", str(tmp_path / "out")]) == 2
    assert "needs the folder of a calibration" in capsys.readouterr().err
    for words, code in ((["sft"], 0), (["pairs"], 2), (["pairs", "--force"], 0), (["pairs"], 0)):
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--as", *words]) == code
    assert "or --force to write over it" in capsys.readouterr().err
