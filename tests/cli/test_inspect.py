"""`inspect`: from a directory to lines or JSON, and an exit code; the numbers are tested with what computes them."""

import json
from argparse import ArgumentParser

import numpy as np
import pytest

from calibrated_rewards.calibration.shards import Planned, new_shard, write_shard
from calibrated_rewards.cli import inspect
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.table.reference_table import ReferenceTable


def told(capsys, *words):
    """The exit code and what was said."""
    parser = ArgumentParser()
    inspect.add_arguments(parser)
    code = inspect.run(parser.parse_args([*map(str, words)]))
    return code, capsys.readouterr().out


def rows(faults=0):
    """Prompts of normal scores, and some whose scores are equal."""
    rng = np.random.default_rng(0)
    return [*((f"p{i}", rng.normal(size=12)) for i in range(30)), *((f"odd {i}", [2.5] * 12) for i in range(faults))]


def run_at(path, names=()):
    """A directory with rollouts and tables: its own, or one for each name."""
    for place in [path / name for name in names] or [path]:
        ReferenceTable.build(rows(2), path=place, meta={"scorer": {"kind": place.name}})
    (path / "run.json").write_text("{}")
    planned = [Planned(prompt_key(prompt), prompt) for prompt, _ in rows(2)]
    drawn = [[Rollout(f"{j}", 3, "stop") for j in range(12)] for _ in planned]
    shard = new_shard(planned).add_rollouts(drawn, [[*range(12)]] * len(planned))
    write_shard(path / "rollouts" / "00000.parquet", shard)


def test_a_table_is_told(tmp_path, capsys):
    """Headings with aligned lines; without rollouts there is nothing of them, and no prompt is known."""
    ReferenceTable.build(rows(1), path=tmp_path / "t", meta={"seed": 3})
    code, said = told(capsys, tmp_path / "t")

    assert code == 0
    headings = [line for line in said.splitlines() if not line.startswith(" ")]
    assert headings == [
        "Suspicious rows: 1 all equal.",
        "",
        str(tmp_path / "t"),
        "made with",
        "resolution",
        "precision at K = 12, 95 %, 3.2 % of references tie",
        "spread between prompts",
        "suspicious rows",
    ]
    assert {line.find(line[26:].strip()) for line in said.splitlines() if line.startswith("  ") and line[26:]} == {26}
    assert f"{prompt_key('odd 0').hex()} (row " in said
    assert "odd 0" not in said


def test_a_run_is_told(tmp_path, capsys):
    """With the rollouts, and how suspicious prompts start; from the run's directory or from its table's."""
    run_at(tmp_path, ["helpful", "safe"])
    code, said = told(capsys, tmp_path)
    tables = [line for line in said.splitlines() if line.startswith(str(tmp_path))]

    assert code == 0
    assert tables == [str(tmp_path / name) for name in ("helpful", "safe", "rollouts")]
    assert f"{prompt_key('odd 0').hex()} (row " in said
    assert said.count("12 references of 2.5  'odd 0'\n") == 2
    assert "384 of 32 prompts" in said
    _, one = told(capsys, tmp_path / "safe")
    assert [line for line in one.splitlines() if line.startswith(str(tmp_path))] == tables[1:]


def test_as_json(tmp_path, capsys):
    """One object, whatever there is."""
    run_at(tmp_path)
    _, said = told(capsys, tmp_path, "--json", "--rows", 1)
    found = json.loads(said)

    assert found["rollouts"]["prompts"] == 32
    (table,) = found["tables"]
    assert table["where"] == str(tmp_path)
    assert table["size"] == {"prompts": 32, "references": 384, "fewest": 12, "median": 12.0, "most": 12}
    assert table["odd_rows"] == {"all equal": 2}
    assert [each["prompt"] for each in table["odd"]] in (["'odd 0'"], ["'odd 1'"])
    ReferenceTable.build(rows(), path=tmp_path / "alone" / "t")
    assert json.loads(told(capsys, tmp_path / "alone" / "t", "--json")[1])["rollouts"] is None


def test_strict(tmp_path, capsys):
    """1 where a row is suspicious, 0 where none is."""
    ReferenceTable.build(rows(1), path=tmp_path / "odd")
    ReferenceTable.build(rows(), path=tmp_path / "clean")

    assert [told(capsys, tmp_path / name, "--strict")[0] for name in ("odd", "clean")] == [1, 0]
    assert told(capsys, tmp_path, "--strict")[0] == 1


def test_a_table_of_the_hub(tmp_path, monkeypatch, capsys):
    """A name with one slash that is no directory is asked for there, at its revision."""
    ReferenceTable.build(rows(), path=tmp_path / "t")
    asked = []

    def download(name, revision=None, token=None, **_):
        asked.append((name, revision, token))
        return str(tmp_path / "t")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    assert told(capsys, "mine/table", "--revision", "v1")[0] == 0
    assert asked == [("mine/table", "v1", None)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{at}/nothing"], "a table is a directory, or a name on the Hub .*nothing', and there is no such"),
        (["./nothing"], "a table is a directory"),
        (["nothing"], "a table is a directory"),
        (["{at}"], r"needs a table.json, in it or in a folder of it, got none"),
    ],
)
def test_what_is_no_table(words, message, tmp_path, capsys):
    """What there should be, and what was given."""
    with pytest.raises(ValueError, match=message):
        told(capsys, *(word.format(at=tmp_path) for word in words))
