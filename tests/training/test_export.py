"""An export: the same rows in each format, the same bytes after a death, and a card that says what is in none."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset, load_from_disk
from rollout_runs import Drawn, chat, save_run

import calibrated_rewards.files as files
from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import Planned, new_shard
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import Rollout
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.training.offline.dataset_files import FILES, write_part
from calibrated_rewards.training.offline.dataset_folder import Export, export
from calibrated_rewards.training.offline.datasets import Selection
from calibrated_rewards.training.offline.rollouts import iterate_rollouts

PROMPTS: list[Drawn] = [
    (f"prompt {i}", [f"{i}-{j}" for j in range(3 + i % 3)], [float((7 * j + i) % 5) for j in range(3 + i % 3)])
    for i in range(7)
]
FORMATS = [*FILES]


def make_reward(run: Path) -> CalibratedReward:
    """The reward of the tests, of the table of a run."""
    return CalibratedReward(None, ReferenceTable.load(run), Exponential(5.0), beta=0.3)


def write(run: Path, out: Path, kind: Any = "scored", **settings: Any) -> Export:
    """Export without a progress bar."""
    return export(run, out, kind, make_reward(run), show_progress=False, **settings)


def read_files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a folder."""
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an export, as `datasets` reads them."""
    if path.is_dir():
        return list(load_from_disk(str(path)))
    reader = "parquet" if path.suffix == ".parquet" else "json"
    cache = str(path.parent.with_name("cache"))
    return list(load_dataset(reader, data_files=str(path), split="train", cache_dir=cache))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of seven prompts in four shards, K from 3 to 5."""
    save_run(tmp_path / "run", PROMPTS)
    return tmp_path / "run"


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("chats", [False, True])
def test_each_format_holds_the_rows(file_format: Any, chats: bool, tmp_path: Path) -> None:
    """In the run's order, as `datasets` reads them: of texts, and of chats with keys that only some messages have."""
    drawn = [
        (p if not chats else [{**chat(p)[0], **({"name": "bob"} if p == "prompt 3" else {})}], *rest)
        for p, *rest in PROMPTS
    ]
    save_run(tmp_path / "run", drawn)  # type: ignore[arg-type]
    done = write(tmp_path / "run", tmp_path / "out", file_format=file_format)
    expected = [
        row
        for prompt in iterate_rollouts(tmp_path / "run", make_reward(tmp_path / "run"))
        for row in Selection("scored").rows(prompt, Counter())
    ]
    found = read_rows(done.path)
    if chats:
        for row in found:
            row["prompt"] = [
                {name: value for name, value in turn.items() if value is not None} for turn in row["prompt"]
            ]
    if file_format == "jsonl":
        assert [json.loads(line) for line in done.path.read_text().splitlines()] == expected
        # `datasets` reads nested rows by a parser that keeps ten digits.
        found = [{n: round(v, 6) if isinstance(v, float) else v for n, v in row.items()} for row in found]
        expected = [{n: round(v, 6) if isinstance(v, float) else v for n, v in row.items()} for row in expected]
    assert found == expected
    assert (done.rows, done.prompts, done.rollouts, done.left_out) == (len(expected), 7, len(expected), {})


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_export_that_was_stopped_goes_on(file_format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at any of its atomic writes: no half a file under a final name, and in the end the same bytes."""
    save_run(tmp_path / "run", PROMPTS[:4])
    replace, done, stop_at = files.os.replace, 0, 1_000

    def replace_or_stop(*places: Any) -> None:
        nonlocal done
        if done == stop_at:
            raise KeyboardInterrupt
        done += 1
        replace(*places)

    monkeypatch.setattr(files.os, "replace", replace_or_stop)
    write(tmp_path / "run", tmp_path / "whole" / "out", file_format=file_format)
    expected, writes = read_files(tmp_path / "whole" / "out"), done
    assert writes == 6  # settings, two parts, rows, card, export.json
    for stop_at in range(writes):
        done, out = 0, tmp_path / f"stopped-{stop_at}" / "out"
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "run", out, file_format=file_format)
        ready = {name: content for name, content in read_files(out).items() if not name.startswith(".parts")}
        assert ready == {name: expected[name] for name in ready}
        assert len([*(out / ".parts").glob("0*")]) == min(2, max(0, stop_at - 1))
        before, done = done, -1_000  # far from where it stops
        write(tmp_path / "run", out, file_format=file_format)
        assert read_files(out) == expected
        # Settings, rows, card and result are written again, parts that were there are not.
        removed = file_format == "datasets" and before > 3  # a folder is not written over in one step
        assert done + 1_000 == writes - min(2, max(0, before - 1)) + removed


def test_an_export_that_was_killed_goes_on(run: Path, tmp_path: Path) -> None:
    """SIGKILL as the rows are being joined: what it leaves is removed, and the bytes are the same."""
    write(run, tmp_path / "whole" / "out")
    out = tmp_path / "killed" / "out"
    code = f"""
import os, signal
from calibrated_rewards.training.offline import dataset_files, dataset_folder
from tests.training.test_export import write
from pathlib import Path
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
dataset_files.iterate_groups = die
write(Path({str(run)!r}), Path({str(out)!r}))
"""
    root = Path(__file__).parents[2]
    path = f"{root}:{root / 'tests'}"
    died = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert [each.name for each in out.iterdir() if not each.name.startswith(".")] == []
    assert any(each.name.startswith(".train.parquet.") for each in out.iterdir())
    write(run, out)
    assert read_files(out) == read_files(tmp_path / "whole" / "out")


def test_another_export_is_not_written_over(run: Path, tmp_path: Path) -> None:
    """Done is done; other settings, another run and other files are refused, --force replaces an export."""
    out = tmp_path / "out"
    first = write(run, out, "sft")
    stamp = first.path.stat().st_mtime_ns
    assert write(run, out, "sft") == first
    assert first.path.stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match=r"selection\.kind was 'sft', is 'pairs'.*force=True"):
        write(run, out, "pairs")
    with pytest.raises(FileExistsError, match=r"beta was None, is 0\.3"):
        write(run, out, Selection("sft", draws=2))
    done = write(run, out, "pairs", file_format="jsonl", force=True)
    assert not first.path.exists()
    assert done.rows == 7
    save_run(run, [*PROMPTS, ("one more", ["x", "y"], [0.0, 1.0])])
    with pytest.raises(FileExistsError, match=r"rollouts\.digest was"):
        write(run, out, "pairs", file_format="jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no export"):
        write(run, tmp_path / "mine", force=True)


def test_the_card_says_what_is_in_none(tmp_path: Path) -> None:
    """Counts of each reason, in export.json, in the card and in the lines of the command."""
    drawn: list[Drawn] = [
        ("good", [Rollout("a", 1, "stop"), Rollout("b", 4, "length"), Rollout("", 0, "stop")], [0.0, 1.0, 2.0]),
        ("tied", ["a", "b"], [1.0, 1.0]),
        ("one", ["a"], [1.0]),
    ]
    save_run(tmp_path / "run", drawn)
    directory = RunDirectory(tmp_path / "run")
    directory.write_prompts("00007", [Planned(prompt_key("later"), "later")])
    done = write(tmp_path / "run", tmp_path / "out", Selection("sft", draws=2))
    expected = {
        "prompts whose rollouts all have one reward": 2,
        "prompts without rollouts": 1,
        "rollouts with an empty completion": 1,
    }
    assert done.ess is not None
    assert 1 < done.ess < 3
    kl, ess = done.kl, done.ess
    assert done == Export(tmp_path / "out" / "train.parquet", 2, 1, expected, 6, 1, kl, ess)
    card, saved = (
        (tmp_path / "out" / "README.md").read_text(),
        json.loads((tmp_path / "out" / "export.json").read_text()),
    )
    assert saved["result"] == {
        "path": None,
        "rows": 2,
        "prompts": 1,
        "left_out": expected,
        "rollouts": 6,
        "cut": 1,
        "kl": kl,
        "ess": ess,
        "scorer": "reward",
    }
    assert "| transform | Exponential(t=5.0) |" in card
    assert "| beta | 0.3 |" in card
    assert "| draws | 2 |" in card
    lines = [*done.lines()]
    for reason, count in expected.items():
        assert f"| left out: {reason} | {count} |" in card
        assert f"left out: {count} {reason}" in lines
    assert "the token limit cut 1 of the rollouts" in lines[-1]
    assert 'load_dataset("parquet", data_files="out/train.parquet", split="train")' in card


@pytest.mark.parametrize("on_missing", ["skip", "neutral", "raise"])
def test_a_prompt_that_the_reward_does_not_know(on_missing: Any, run: Path, tmp_path: Path) -> None:
    """It is left out and counted if the reward does not raise for it."""
    table = ReferenceTable.build((prompt, scores) for prompt, _, scores in PROMPTS[1:])
    reward = CalibratedReward(None, table, beta=0.3, on_missing=on_missing)
    if on_missing == "raise":
        with pytest.raises(KeyError, match="prompt 0"):
            export(run, tmp_path / "out", "scored", reward, show_progress=False)
        return
    done = export(run, tmp_path / "out", "scored", reward, show_progress=False)
    assert (done.prompts, done.left_out) == (6, {"prompts without references in the reward's table": 1})


def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path) -> None:
    """Mixed prompts, rollouts without scores, no row at all, no beta, and layouts that do not fit."""
    save_run(tmp_path / "mixed", [("text", ["a", "b"], [0.0, 1.0]), (chat("Hi"), ["a", "b"], [0.0, 1.0])])
    with pytest.raises(ValueError, match="all texts or all chats, got both"):
        write(tmp_path / "mixed", tmp_path / "out")
    save_run(tmp_path / "tied", [("text", ["a", "b"], [1.0, 1.0])])
    with pytest.raises(ValueError, match=r"needs a row, got none\. left out: 1 prompts whose"):
        write(tmp_path / "tied", tmp_path / "out", "pairs")
    with pytest.raises(ValueError, match="finite beta > 0"):
        export(run, tmp_path / "none", "weighted", CalibratedReward(None, ReferenceTable.load(run)))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="one layout, trl, got layout=openrlhf"):
        write(run, tmp_path / "none", "scored", layout="openrlhf")
    with pytest.raises(ValueError, match="choose file_format=jsonl"):
        write(run, tmp_path / "none", "sft", layout="axolotl", file_format="datasets")
    with pytest.raises(ValueError, match="a layout is one of trl"):
        write(run, tmp_path / "none", "sft", layout="verl")
    directory = RunDirectory(run)
    directory.save("00001", new_shard(directory.prompts("00001")).add_rollouts([[Rollout("a")], []], [[0], []]))
    with pytest.raises(ValueError, match="without a score of 'reward'"):
        write(run, tmp_path / "out")


def test_rollouts_of_another_reward_model_are_not_exported(run: Path, tmp_path: Path) -> None:
    """Their scores, ranked among references of another scorer, would say nothing."""
    table = ReferenceTable.build(((p, scores) for p, _, scores in PROMPTS), meta={"scorer": {"kind": "other"}})
    with pytest.raises(ValueError, match="another reward model"):
        export(run, tmp_path / "out", "sft", CalibratedReward(None, table), show_progress=False)


@pytest.mark.parametrize("damage", ["cut", "list", "missing"])
def test_a_damaged_export_is_not_taken_for_a_whole_one(damage: str, run: Path, tmp_path: Path) -> None:
    """Of which export.json cannot be read, or the rows are gone: refused, and with `force` written again."""
    write(run, tmp_path / "out", "sft")
    before = read_files(tmp_path / "out")
    if damage == "missing":
        (tmp_path / "out" / "train.parquet").unlink()
    else:
        (tmp_path / "out" / "export.json").write_text('{"settings": ' if damage == "cut" else "[]")

    with pytest.raises(FileExistsError, match="is missing" if damage == "missing" else "cannot be read"):
        write(run, tmp_path / "out", "sft")

    assert write(run, tmp_path / "out", "sft", force=True).rows == 7
    assert read_files(tmp_path / "out").keys() == before.keys()
    assert read_rows(tmp_path / "out" / "train.parquet")


def test_parts_of_another_export_are_not_used(run: Path, tmp_path: Path) -> None:
    """One that was begun with other settings and never ended: its parts have other rows."""
    parts = tmp_path / "out" / ".parts"
    for name in RunDirectory(run).names():
        write_part(parts / name, [{"prompt": "another"}], {"rows": 1}, "jsonl")
    (parts / "settings.json").write_text("{}")

    done = write(run, tmp_path / "out", "sft", file_format="jsonl")

    assert done.rows == 7
    assert [row["prompt"] for row in read_rows(done.path)] == [prompt for prompt, _, _ in PROMPTS]


def test_a_folder_that_was_half_removed_is_no_obstacle(run: Path, tmp_path: Path) -> None:
    """Killed twice between the rename of the saved dataset and export.json, and while the old one was removed."""
    out = tmp_path / "out"
    write(run, out, file_format="datasets")
    shutil.copytree(out / "train", out / ".parts" / "removed")
    settings = json.loads((out / "export.json").read_text())["settings"]
    (out / ".parts" / "settings.json").write_text(json.dumps(settings, indent=2))
    (out / "export.json").unlink()

    write(run, out, file_format="datasets")

    assert len(read_rows(out / "train")) == sum(len(scores) for _, _, scores in PROMPTS)
    assert not (out / ".parts").exists()


def test_two_processes_do_not_write_one_export(run: Path, tmp_path: Path) -> None:
    """The second is refused while the first holds the lock, whose file stays with the parts."""
    parts = tmp_path / "out" / ".parts"
    parts.mkdir(parents=True)
    (parts / ".lock").touch()
    with files.claim(parts / ".lock"), pytest.raises(ValueError, match="another process writes"):
        write(run, tmp_path / "out")
    assert write(run, tmp_path / "out").rows


def test_shards_of_few_rows_share_row_groups(run: Path, tmp_path: Path) -> None:
    """Four shards, one row group: a reader is not slowed by the run's shards."""
    assert pq.ParquetFile(write(run, tmp_path / "out", "sft").path).num_row_groups == 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lines_are_those_of_json(count: int, tmp_path: Path) -> None:
    """Each row is written as json.dumps writes it, below the counts: signs of zeros, null and other alphabets."""
    row = {"prompt": [{"role": "user", "content": 'é\u2028\n"%s'}], "u": 0.1, "tokens": None, "low": -0.0, "tiny": 1e-7}
    rows = [{**row, "number": number} for number in range(count)]

    write_part(tmp_path / "part", rows, {"rows": count, "kl": 0.5}, "jsonl")

    lines = [json.dumps({"kl": 0.5, "rows": count}), *(json.dumps(each, ensure_ascii=False) for each in rows)]
    assert (tmp_path / "part").read_bytes() == "".join(f"{line}\n" for line in lines).encode()


def test_the_scores_are_those_of_the_rewards_table(tmp_path: Path) -> None:
    """Of two scorers the one that made it, whatever its name; another one, or a run without it, is an error."""
    scorers = {"reward": NumberScorer(), "judge": HashScorer(2)}
    tables = calibrate(["one", "two"], NumberSampler(), scorers, tmp_path / "run", k=6, show_progress=False)
    for name, table in tables.items():
        reward = CalibratedReward(None, table, beta=0.3)
        for prompt in iterate_rollouts(tmp_path / "run", reward):
            assert np.array_equal(np.sort(prompt.scores), table.scores(int(table.rows([prompt.prompt])[0])))
        done = export(tmp_path / "run", tmp_path / name, "sft", reward, show_progress=False)
        for row in read_rows(done.path):
            assert row["score"] == table.scores(int(table.rows([row["prompt"]])[0])).max()
    with pytest.raises(ValueError, match="scored by reward, another reward model"):
        export(tmp_path / "run", tmp_path / "out", "sft", CalibratedReward(None, tables["judge"]), select="reward")
    calibrate(["one", "two"], NumberSampler(), NumberScorer(), tmp_path / "other", k=6, show_progress=False)
    with pytest.raises(ValueError, match="scored by reward, another reward model"):
        next(iterate_rollouts(tmp_path / "other", CalibratedReward(None, tables["judge"], beta=0.3)))
