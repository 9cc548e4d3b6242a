"""What recommend prints to paste fits the scorer that the table was made by, and makes the reward that it is about."""

import argparse
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny

from calibrated_rewards import ReferenceTable, recommend
from calibrated_rewards.calibration.calibrate import calibrate, import_rollouts
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.cli.main import load_command
from calibrated_rewards.evaluation.reward_commands import SERVERS, RecordedScorer
from calibrated_rewards.heads import HeadedModel
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.scorers import Cost, Function, PreferenceHeadScorer, fingerprint
from calibrated_rewards.scorers.remote import Native, Remote
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
from calibrated_rewards.theory.procedures import BestOf

PROMPTS = [f"prompt {i}" for i in range(8)]


def parse(command):
    """Parse a printed command as its own command does."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("calibrated-rewards", "reward")
    parser = argparse.ArgumentParser()
    load_command("reward").add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("wrap", [None, Function, Cost], ids=["callable", "Function", "Cost"])
def test_of_a_function_python_lines_make_the_reward(wrap, tmp_path, monkeypatch):
    """They run as they are printed: the reward has the recommended beta and transform, and is verified."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    one = "def own(prompt, completion):\n    return float(completion) ** 3\n"
    many = "def own(prompts, completions):\n    return [float(each) ** 3 for each in completions]\n"
    name = f"own_scorer_{'plain' if wrap is None else wrap.__name__}"
    (tmp_path / f"{name}.py").write_text(one if wrap is Function else many)
    own = __import__(name).own
    calibrate(PROMPTS, NumberSampler(), own if wrap is None else wrap(own), Path("table"), k=24, show_progress=False)
    answer = recommend("table", BestOf(2), kl=0.2)
    assert "--reward-model" not in str(answer)
    exec(answer.command, {})
    reward = CalibratedReward.from_pretrained("reward", trust_remote_code=True)
    assert (reward.beta, reward.transform) == (answer.beta, answer.transform)
    assert reward.estimator == answer.estimator


def test_imported_scores_need_a_reward_model_named(tmp_path):
    """The command has a place for it, and the line below says which one it is, by the column."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": p, "completion": f"{i}", "gold": rng.normal()} for p in PROMPTS for i in range(24)]
    import_rollouts(rows, tmp_path / "run", scores="gold", show_progress=False)
    answer = recommend(tmp_path / "run", BestOf(2), kl=0.2)
    options = parse(answer.command)
    assert (options.reward_model, options.no_verify) == ("PATH", False)
    assert (options.transform.name, options.estimator) == (answer.name, answer.estimator)
    assert "\nPATH: the reward model that gave the scores of the column gold, which were imported" in str(answer)
    bare = recommend(ReferenceTable.load(next((tmp_path / "run").glob("**/table.json")).parent), BestOf(2), kl=0.2)
    assert parse(bare.command).reward_model == "PATH"
    plain = recommend(ReferenceTable.build((p, rng.normal(size=24)) for p in PROMPTS), BestOf(2), kl=0.2)
    assert parse(plain.command).no_verify  # without probes there is nothing to verify by
    assert "\nPATH: the reward model that gave the table's scores" in str(plain)


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (NumberScorer(), {"reward_model": "./rm", "server": None, "cost": None}),
        (Cost(NumberScorer()), {"reward_model": "./rm", "cost": True}),
        (
            Remote("http://rm:8000", Native("my rm")),
            {"reward_model": "URL", "server": "native", "served_model": "my rm"},
        ),
    ],
    ids=["model", "cost", "server"],
)
def test_options_follow_the_scorer(scorer, expected):
    """--cost, --server and --served-model are those that the table was made with."""
    recorded = RecordedScorer.of({"scorer": fingerprint(scorer), "probes": [{}]})
    options = parse(recorded.write_command("a table/", "exp:5:0.5", 0.1, "posterior"))
    assert {name: getattr(options, name) for name in expected} == expected
    assert (options.table, options.estimator, options.no_verify) == ("a table/", "posterior", False)


def test_the_command_names_what_calibrate_loaded(tmp_path, monkeypatch):
    """By its path from here, or its id, for the scorer that selects; a folder that has gone is left to fill in."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "models" / "rm"
    model.mkdir(parents=True)
    scorers = {"reward": NumberScorer(), "judge": Cost(NumberScorer())}
    calibrate(PROMPTS, NumberSampler(), scorers, "run", k=24, show_progress=False)
    RunDirectory(Path("run")).note_reward_models({"reward": str(model)})
    RunDirectory(Path("run")).note_reward_models({"judge": "org/judge"})

    answer = recommend("run", BestOf(2), kl=0.2)
    assert parse(answer.command).reward_model == "models/rm"
    assert "\nmodels/rm: the reward model that the table was made with" in str(answer)
    assert parse(recommend("run", BestOf(2), kl=0.2, select="judge").command).reward_model == "org/judge"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parse(recommend(tmp_path / "run", BestOf(2), kl=0.2).command).reward_model == str(model)
    monkeypatch.chdir(tmp_path)
    model.rmdir()
    assert parse(recommend("run", BestOf(2), kl=0.2).command).reward_model == "./rm"


def test_a_head_of_several_names_is_asked_for_its_score():
    """Without the option, the next command would ask which one; a head of one name needs none."""
    for names, expected in ((("help", "safe"), ["name=safe"]), (("safe",), [])):
        headed = HeadedModel.build(tiny.causal(), tiny.tokenizer(), names=names)
        recorded = RecordedScorer.of({"scorer": PreferenceHeadScorer(headed, "safe").fingerprint(), "probes": [{}]})
        words = shlex.split(recorded.write_command("table/", "exp:5:0.5", 0.1, "posterior"))
        assert words[3:5] == ["--reward-model", "./head"]
        assert [words[i + 1] for i, word in enumerate(words) if word == "--option"] == expected
        assert recorded.note.startswith("./head: the preference head that")


@pytest.mark.parametrize("name", ["__main__.own", "module.<lambda>", "module.make.<locals>.own", ""])
def test_a_function_that_cannot_be_imported_is_left_to_fill_in(name):
    """The lines are Python all the same, and say which function is meant."""
    recorded = RecordedScorer.of({"scorer": {"kind": "callable", "name": name}})
    lines = recorded.write_command("table/", "exp:5:0.5", 0.1, "empirical")
    compile(lines, "printed", "exec")
    assert "scorer = ...  # the function that `calibrate` was called with" in lines


def test_every_api_of_a_server_has_its_option():
    """By the choices of --server."""
    parser = argparse.ArgumentParser()
    load_command("reward").add_arguments(parser)
    assert {*SERVERS.values()} == {*parser._option_string_actions["--server"].choices}
