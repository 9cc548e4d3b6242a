"""Rewards on the Hub: the card, the files of a combination, and what is not pushed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hub import serving
from huggingface_hub import ModelCard

from calibrated_rewards import BestOf, CalibratedReward, Exponential, ReferenceTable, optimum, scaled
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import main
from calibrated_rewards.reward import hub, saving
from calibrated_rewards.reward.combined import CombinedReward, Lowest
from calibrated_rewards.reward.find_prompts import Originals
from calibrated_rewards.scorers.loading import FromCheckpoint
from calibrated_rewards.scorers.protocol import Loaded
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

TABLE = [("a", [1.0, 2.0]), ("b", [0.0, 3.0])]


def combination() -> CombinedReward:
    table = ReferenceTable.build(TABLE)
    return CombinedReward({"first": CalibratedReward(NumberScorer(), table), "second": CalibratedReward(None, table)})


def written(reward: Any, folder: Path, **settings: Any) -> tuple[str, dict[str, Any]]:
    """The text of a reward's card, and its front matter."""
    reward.save_pretrained(folder / "saved")
    hub.write_repository(folder / "saved", folder / "repository", "me/reward", **settings)
    card = ModelCard.load(folder / "repository/README.md")
    return card.content, card.data.to_dict()


def test_the_card_of_a_reward(tmp_path: Path) -> None:
    """Settings, table, models by their names on the Hub; the code loads it, with a scorer where none is saved."""
    scorer = Loaded(FromCheckpoint("org/rm"))
    table = ReferenceTable.build(TABLE, meta={"sampler": {"model": "org/policy"}, "seed": 5})
    text, front = written(CalibratedReward(scorer, table, Exponential(5.0), beta=0.25), tmp_path, licence="mit")

    assert front == {
        "license": "mit",
        "tags": ["calibrated-rewards", "reward-model"],
        "base_model": ["org/policy", "org/rm"],
        "library_name": "calibrated-rewards",
    }
    for row in ("| transform | Exponential(t=5.0) |", "| beta | 0.25 |", "| seed | 5 |", "| prompts | 2 |"):
        assert row in text
    assert 'reward = load_reward("me/reward")\n' in text
    assert "scores.png" in text
    text, front = written(CalibratedReward(None, table), tmp_path, base_model=["org/other"])
    assert front["base_model"] == ["org/other"]
    assert 'load_reward("me/reward", scorer=my_reward_model)' in text


def test_the_card_of_a_combination(tmp_path: Path) -> None:
    """How it is combined, and the table of each component under its name; files of an earlier save are left out."""
    combined = combination()
    CombinedReward({"old": combined.rewards["first"]}).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/notes.txt").write_text("mine")
    text, _ = written(combined, tmp_path)

    for row in ("| how | WeightedMean(weights=None) |", "| prompts, first | 2 |", "| prompts, second | 2 |"):
        assert row in text
    files = {str(path.relative_to(tmp_path / "repository")) for path in (tmp_path / "repository").rglob("*.*")}
    components = {f"rewards/{name}/{file}" for name in combined.rewards for file in hub.FILES if "prompts" not in file}
    assert files == {"README.md", "scores.png", "reward.json", *components} - {"rewards"}


def test_files_of_a_reward_that_was_saved_there_before_are_not_pushed(tmp_path: Path) -> None:
    """Neither its prompts nor its table, in a combination or in a reward that was saved without prompts."""
    table = ReferenceTable.build([("secret", [1.0, 2.0])])
    originals = Originals.write(tmp_path / "prompts.jsonl", table, ["secret"])
    first = CalibratedReward(NumberScorer(), table, originals=originals)
    for name in ("", "rewards/first", "rewards/second"):
        first.save_pretrained(tmp_path / "saved" / name)
    text, _ = written(combination(), tmp_path)

    files = {str(path.relative_to(tmp_path / "repository")) for path in (tmp_path / "repository").rglob("*.json*")}
    parts = [f"rewards/{name}/{file}" for name in ("first", "second") for file in ("reward.json", "table/table.json")]
    assert files == {"reward.json", *parts}
    assert "| prompts |" not in text
    hub.write_repository(tmp_path / "saved/rewards/first", tmp_path / "own", "me/reward", card=False)
    assert not (tmp_path / "own/prompts.jsonl").exists()
    first.save_pretrained(tmp_path / "again")
    hub.write_repository(tmp_path / "again", tmp_path / "own", "me/reward", card=False)
    assert (tmp_path / "own/prompts.jsonl").read_text() == '"secret"\n'
    (tmp_path / "saved/rewards/first/prompts.jsonl").write_text('"secret"\n')
    hub.write_repository(tmp_path / "saved/rewards/first", tmp_path / "other", "me/reward", card=False)
    assert not (tmp_path / "other/prompts.jsonl").exists()


def test_a_setting_is_written_as_its_call() -> None:
    """As its repr, with all fields by name."""
    best = optimum(BestOf(4), kl=1.0).transform
    assert hub.write_setting(saving.to_json(Exponential(5.0))) == repr(Exponential(5.0))
    assert hub.write_setting(saving.to_json(scaled(Exponential(5.0), "unit"))).startswith(
        "Chain(parts=[Exponential(t=5.0)"
    )
    assert "procedure=BestOf(n=4)" in hub.write_setting(saving.to_json(best))


def test_a_reward_model_in_a_component_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    """However deep it is: nobody else has it."""
    table = ReferenceTable.build(TABLE)
    combined = CombinedReward({"a": CalibratedReward(Loaded(FromCheckpoint(str(tmp_path))), table)})
    for reward in (combined, CalibratedReward(combined, table)):
        with pytest.raises(ValueError, match="folder of this machine"):
            reward.push_to_hub("me/reward")


@pytest.mark.parametrize("calibrated", [False, True])
def test_push_and_pull_a_combination(tmp_path: Path, calibrated: bool) -> None:
    """Through the real client: a combination, or one that is calibrated, comes back with all its parts."""
    reward: Any = CombinedReward({"a": CalibratedReward(NumberScorer(), ReferenceTable.build(TABLE))}, Lowest())
    if calibrated:
        reward = CalibratedReward(reward, ReferenceTable.build(TABLE), name="final")
    reward.save_pretrained(tmp_path / "saved")
    code = f"""
        from calibrated_rewards.reward import load_reward
        reward = load_reward({str(tmp_path / "saved")!r})
        reward.push_to_hub("me/reward", token="secret")
        again = load_reward("me/reward", token="secret")
        assert again(["a", "b"], ["1.5", "9"]) == reward(["a", "b"], ["1.5", "9"])
        print(again.name)
    """
    with serving("me/reward", "", tmp_path / "home") as (handler, environment):
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [reward.name]
    assert b"reward-model" in handler.stored["README.md"]
    assert f"{'scorer/' * calibrated}rewards/a/table/table.json" in handler.stored


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record what goes to the Hub's client in this process, with the files as they are then."""
    calls: list[dict[str, Any]] = []

    class Client:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **settings: Any) -> Any:
            calls.append(settings)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> Any:
            files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*.*")}
            calls[-1] |= {"name": repo_id, "files": files}
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    return calls


def test_the_command_pushes_what_the_folder_holds(
    tmp_path: Path, uploads: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with its rollouts, a table without a card, and a reward, of which no code is imported."""
    scorers = {"number": NumberScorer(), "hash": HashScorer()}
    calibrate(["a", "b"], NumberSampler(), scorers, tmp_path / "run", k=4)
    CalibratedReward(json.dumps, ReferenceTable.build(TABLE)).save_pretrained(tmp_path / "reward")
    words = ["--licence", "mit", "--private"]
    assert main(["push", str(tmp_path / "run/hash"), "me/table", "--rollouts", *words]) == 0
    assert main(["push", str(tmp_path / "run/hash"), "me/table", "--no-card"]) == 0
    assert main(["push", str(tmp_path / "reward"), "me/reward", "--base-model", "org/a", "--base-model", "org/b"]) == 0

    names = ["table", "table", "reward"]
    assert capsys.readouterr().out.split() == [f"https://hub/me/{name}/commit/1" for name in names]
    with_rollouts, bare, reward = uploads
    assert [each["repo_type"] for each in uploads] == ["dataset", "dataset", "model"]
    assert [each["private"] for each in uploads] == [True, None, None]
    tables = ["table.json", "table.safetensors"]
    assert sorted(with_rollouts["files"]) == ["README.md", "data/rollouts.parquet", "scores.png", *tables]
    assert b"license: mit" in with_rollouts["files"]["README.md"]
    assert sorted(bare["files"]) == tables
    assert b"base_model:\n- org/a\n- org/b\n" in reward["files"]["README.md"]


def test_a_secret_is_not_uploaded(
    tmp_path: Path, uploads: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the metadata of a table or of a reward's table the setting is named, not its value; --force uploads it."""
    meta = {"sampler": {"auth": True, "max_tokens": 5}, "scorer": {"of": [{"api_key": "k-4711"}]}}
    table = ReferenceTable.build(TABLE, meta=meta)
    table.save(tmp_path / "table")
    CalibratedReward(json.dumps, table).save_pretrained(tmp_path / "reward")
    for folder in ("table", "reward"):
        assert main(["push", str(tmp_path / folder), "me/it"]) == 2
        shown = capsys.readouterr().err
        assert "looks like a secret in it: scorer.of.0.api_key. Write it" in shown
        assert "say --force" in shown
        assert "k-4711" not in shown
        assert not uploads
    for folder in ("table", "reward"):
        assert main(["push", str(tmp_path / folder), "me/it", "--force"]) == 0
    assert all(
        b"k-4711" in data for each in uploads for name, data in each["files"].items() if name.endswith("le.json")
    )
    assert all(b"k-4711" not in each["files"]["README.md"] for each in uploads)
    assert len(uploads) == 2


def test_the_command_refuses(tmp_path: Path, uploads: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """Several tables, which it lists; rollouts of a reward, or of a table without a run; and no table."""
    calibrate(["a"], NumberSampler(), {"x": NumberScorer(), "y": HashScorer()}, tmp_path / "run", k=4)
    ReferenceTable.build(TABLE).save(tmp_path / "table")
    combination().save_pretrained(tmp_path / "reward")
    os.mkdir(tmp_path / "empty")
    for folder, words, said in (
        ("run", [], f"push one of them: {tmp_path}/run/x, {tmp_path}/run/y"),
        ("reward", ["--rollouts"], "is a reward, push the run's table with them"),
        ("table", ["--rollouts"], "folder of a calibration run"),
        ("empty", [], "needs a table.json"),
    ):
        assert main(["push", str(tmp_path / folder), "me/it", *words]) == 2
        assert said in capsys.readouterr().err
    assert uploads == []
