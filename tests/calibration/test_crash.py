"""Nothing is lost: a run that ended early, at whichever call, is done again as if it had never been interrupted.

benchmarks/crash.py ends runs at every single call, and at random times.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import deaths
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer

CASES = {
    "fresh:killed:37": -signal.SIGKILL,
    "more:killed:61": -signal.SIGKILL,
    "imported:killed:41": -signal.SIGKILL,
    "fresh:terminated:151": -signal.SIGTERM,
    "fresh:interrupted:83": deaths.INTERRUPTED,
    "fresh:full:83": deaths.FULL,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of all cases, by one process that forks those that die."""
    command = [sys.executable, "-W", "error", deaths.__file__, str(tmp_path_factory.mktemp("deaths")), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    sys.stderr.write(done.stderr)  # shown where a test fails
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_ended_early_is_finished_as_if_it_had_not(found, case):
    """The same bytes and no other files, wherever it ended; and of what was sampled at most a shard again."""
    name, _, every = case.rpartition(":")
    assert len(found[name]) > 400 / int(every)
    for died in found[name]:
        assert died["code"] in (CASES[case], deaths.IN_SPITE), died
        assert died["again"] == deaths.DONE, died
        assert died["identical"], died
        assert died["repeated"] <= deaths.PER_SHARD, died


@pytest.mark.parametrize("name", ["fresh:interrupted", "fresh:full"])
def test_an_error_leaves_nothing_half_written(found, name):
    """Ctrl-C and a full disk: there is no temporary file but the table's, which the next writer removes."""
    for died in found[name]:
        assert all(left.startswith(".table.json.") for left in died["left"]), died


def test_a_death_is_seen(found):
    """Kills do leave temporary files, and do cost a shard now and then: the cases are not empty."""
    assert any(died["left"] for died in found["fresh:killed"])
    assert any(died["repeated"] for died in found["fresh:killed"])


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def rotten(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    path.write_bytes(whole)


def foreign(path):
    pq.write_table(pa.table({"key": [1]}), path)


def swapped(path):
    other = path.with_name("00001.parquet")
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


@pytest.mark.parametrize("kind", ["prompts", "rollouts"])
@pytest.mark.parametrize("harm", [cut, emptied, rotten, foreign, swapped])
def test_a_file_that_was_harmed_is_named(tmp_path, kind, harm):
    """Cut, empty, with a bit that fell over, of another program or of another shard: refused by name."""
    prompts = [f"prompt {i}" for i in range(8)]
    calibrate(prompts, NumberSampler(), NumberScorer(), tmp_path, k=3, prompts_per_shard=4)
    before = deaths.files(tmp_path)
    harm(tmp_path / kind / "00000.parquet")
    with pytest.raises(ValueError, match=r"0000[01]\.parquet must"):
        calibrate(prompts, NumberSampler(), NumberScorer(), tmp_path, k=4, prompts_per_shard=4)
    if kind == "rollouts":
        for path in Path(tmp_path, "rollouts").iterdir():
            path.unlink()
        calibrate(prompts, NumberSampler(), NumberScorer(), tmp_path, k=3, prompts_per_shard=4)
        assert deaths.files(tmp_path) == before


def test_a_cluster_that_loses_work_is_an_error(tmp_path):
    """No table without the prompts whose shard did not come back."""
    prompts = [f"prompt {i}" for i in range(8)]

    def forgetful(function, tasks):
        return (function(task) for i, task in enumerate(tasks) if i != 1)

    with pytest.raises(RuntimeError, match=r"none for shards \['00001'\]"):
        calibrate(prompts, NumberSampler(), NumberScorer(), tmp_path, k=3, prompts_per_shard=2, cluster=forgetful)
    assert not (tmp_path / "table.json").exists()
    assert len(calibrate(prompts, NumberSampler(), NumberScorer(), tmp_path, k=3)) == 8
