"""Saved combinations: a round trip of each kind, what is refused, and that commands and adapters take them."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from starlette.testclient import TestClient

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable, UnknownPromptError, id_key
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import main
from calibrated_rewards.cli.options import open_any_reward, open_reward
from calibrated_rewards.reward import frameworks
from calibrated_rewards.reward.batching import score_one
from calibrated_rewards.reward.combined import And, CombinedReward, Lowest, Or, WeightedMean
from calibrated_rewards.reward.saving import NeedsTrust, load_reward
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.server.app import create_app
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = ["one", "two"]
COMPLETIONS = ["0.3", "-2.5"]


def combination(how: Any = Lowest(), constraints: Any = None, **settings: Any) -> CombinedReward:  # noqa: B008 (frozen)
    scorers = {"good": NumberScorer(), "kind": HashScorer(1)}
    tables = {name: calibrate(PROMPTS, NumberSampler(), scorer, k=8) for name, scorer in scorers.items()}
    parts = {name: CalibratedReward(scorer, tables[name], **settings) for name, scorer in scorers.items()}
    return CombinedReward(parts, how, constraints or {}, name="both")


def brevity(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


@pytest.mark.parametrize("how", [WeightedMean(), WeightedMean((1.0, 3.0)), Lowest(), And(), Or()])
@pytest.mark.parametrize("constraints", [{}, {"kind": 0.4}])
def test_a_combination_comes_back(tmp_path: Path, how: Any, constraints: dict[str, float]) -> None:
    """Components, combination, constraints and name; by its class and by what is said of it on disk."""
    if constraints and how == WeightedMean((1.0, 3.0)):
        how = WeightedMean((2.0,))
    combined = combination(how, constraints)
    combined.save_pretrained(tmp_path / "combined")
    for again in (CombinedReward.from_pretrained(tmp_path / "combined"), load_reward(tmp_path / "combined")):
        assert (again.how, again.constraints, again.name) == (how, constraints, "both")
        assert list(again.rewards) == ["good", "kind"]
        assert again(PROMPTS, COMPLETIONS) == combined(PROMPTS, COMPLETIONS)
        assert again.fingerprint() == combined.fingerprint()
        assert (again.verify().probes, again.verify().worst) == (8, 0)
    again.save_pretrained(tmp_path / "combined")  # over itself
    assert load_reward(tmp_path / "combined")(PROMPTS, COMPLETIONS) == combined(PROMPTS, COMPLETIONS)


def test_real_models_come_back(tmp_path: Path) -> None:
    """Two checkpoints, loaded anew from their folders, with other prompts than those of the hash."""
    parts = {}
    for seed, name in enumerate(("first", "second")):
        place = tiny.saved(tiny.classifier(seed), tmp_path / name, tiny.tokenizer())
        scorer = load_scorer(place, dtype="float32")
        parts[name] = CalibratedReward(scorer, calibrate(PROMPTS, NumberSampler(), scorer, k=6))
    combined = CombinedReward(parts, And())
    combined.save_pretrained(tmp_path / "combined")
    again = load_reward(tmp_path / "combined")
    completions = ["good", "a longer one"]

    assert again(PROMPTS, completions) == combined(PROMPTS, completions)
    assert again.verify().differs == ()
    assert again.rewards["first"].scorer != again.rewards["second"].scorer


def test_a_calibrated_combination_comes_back(tmp_path: Path) -> None:
    """A combination that is calibrated again is the scorer of a reward with a transform, and is saved with it."""
    combined = combination(And())
    table = calibrate(PROMPTS, NumberSampler(), combined, k=16, seed=2)
    reward = CalibratedReward(combined, table, Exponential(5.0), name="final")
    reward.save_pretrained(tmp_path / "final")
    again = CalibratedReward.from_pretrained(tmp_path / "final")

    assert again(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)
    assert (again.transform, again.name, again.scorer.how) == (Exponential(5.0), "final", And())
    assert again.verify().worst == 0
    assert load_reward(tmp_path / "final", scorer=HashScorer()).scorer == HashScorer()
    (tmp_path / "final/scorer/reward.json").write_text("{}")
    with pytest.raises(ValueError, match="not of one save"):
        load_reward(tmp_path / "final")


def test_a_score_is_what_a_call_gives() -> None:
    """One by one, in batches of threads, from texts, with the lowest quantile; a pickled one too, after it was used."""
    combined = combination(And(), {"kind": 0.3})
    expected = combined(PROMPTS, COMPLETIONS)
    quantiles = [each.calibrated(PROMPTS, COMPLETIONS) for each in combined.rewards.values()]
    scores = combined.score(PROMPTS, COMPLETIONS)

    assert scores.reward == expected
    assert scores.u.tolist() == np.min(quantiles, axis=0).tolist()
    np.testing.assert_allclose(scores.raw, expected, rtol=1e-6)
    assert scores.known.all()
    assert combined.score_texts(["one0.3", "two-2.5"]).reward == expected
    assert [score_one(combined, *pair).reward for pair in zip(PROMPTS, COMPLETIONS, strict=True)] == expected
    assert pickle.loads(pickle.dumps(combined)).score(PROMPTS, COMPLETIONS).reward == expected
    neutral = combination(on_missing="neutral").score(["one", "stranger"], ["1", "1"])
    assert (neutral.known.tolist(), neutral.reward[1]) == ([True, False], 0.5)


def test_ids_are_those_of_their_column() -> None:
    """A prompt that is known by its id alone is found, and 1 / 2K is that of its row; another column is not asked."""
    table = ReferenceTable.build([("one", [5.0], [id_key(7)]), ("two", [5.0] * 3)])
    rewards = {"a": CalibratedReward(NumberScorer(), table, id_column="uid")}
    combined = CombinedReward(rewards, And())

    assert combined.id_column == "uid"
    assert combined.score(["one"], ["0"], [7]).reward == [np.log(1 / 2)]
    rewards["b"] = CalibratedReward(NumberScorer(), table, id_column="other")
    assert CombinedReward(rewards, And()).score(["one"], ["0"], [7]).reward == [2 * np.log(1 / 2)]
    with pytest.raises(UnknownPromptError, match="two prompts"):
        CombinedReward(rewards, And()).score(["two"], ["0"], [7])


def test_another_reward_model_is_found_by_its_component() -> None:
    """Verification says which of the models is not the one of its table."""
    combined = combination()
    wrong = {**combined.rewards, "kind": replace(combined.rewards["kind"], scorer=HashScorer(2))}
    with pytest.raises(ValueError, match="the component 'kind': the scorer is not the one"):
        CombinedReward(wrong, Lowest()).verify()


def test_functions_need_trust_and_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that names the function is named, once; scorers are given by the name of their component."""
    scorers = {"brief": brevity, "right": NumberScorer()}
    parts = {n: CalibratedReward(s, calibrate(PROMPTS, NumberSampler(), s, k=4)) for n, s in scorers.items()}
    monkeypatch.setattr(brevity, "__module__", "json")
    monkeypatch.setattr(brevity, "__qualname__", "dumps")
    CombinedReward(parts).save_pretrained(tmp_path)
    with pytest.raises(NeedsTrust) as refused:
        load_reward(tmp_path)
    file = str(tmp_path / "rewards/brief/reward.json")
    assert (str(refused.value).count("reward.json"), str(refused.value).startswith(file)) == (1, True)
    assert load_reward(tmp_path, trust_remote_code=True).rewards["brief"].scorer is json.dumps
    given = CombinedReward.from_pretrained(tmp_path, scorers={"brief": brevity})
    assert given(PROMPTS, COMPLETIONS) == CombinedReward(parts)(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match=r"one of \['brief', 'right'\], got one of \['other'\]"):
        CombinedReward.from_pretrained(tmp_path, scorers={"other": brevity})


def test_what_is_no_combination_is_refused(tmp_path: Path) -> None:
    """The other kind of reward, names that are no folders, a save that was not finished, and a component by a path."""
    combined = combination()
    combined.save_pretrained(tmp_path / "combined")
    combined.rewards["good"].save_pretrained(tmp_path / "single")
    with pytest.raises(ValueError, match="is a combined reward, which load_reward"):
        CalibratedReward.from_pretrained(tmp_path / "combined")
    with pytest.raises(ValueError, match="is a combined reward, which load_reward"):
        open_reward(tmp_path / "combined", trust=False)
    with pytest.raises(ValueError, match="is a calibrated reward, which load_reward"):
        CombinedReward.from_pretrained(tmp_path / "single")
    with pytest.raises(ValueError, match=r"name of a component that is saved.*'\.\./x'"):
        CombinedReward({"../x": combined.rewards["good"]}).save_pretrained(tmp_path / "other")
    with pytest.raises(TypeError, match="JSON, which cannot say"):
        replace(combined, how=_Strange()).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    settings = json.loads((tmp_path / "combined/reward.json").read_text())
    settings["rewards"]["../../single"] = settings["rewards"].pop("good")
    (tmp_path / "combined/reward.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"name of a component that is saved"):
        load_reward(tmp_path / "combined")
    combined.save_pretrained(tmp_path / "combined")
    replace(combined.rewards["good"], name="new").save_pretrained(tmp_path / "combined/rewards/good")
    with pytest.raises(ValueError, match="rewards/good are not of one save"):
        load_reward(tmp_path / "combined")


class _Strange:
    """Combines, and has no form on disk."""

    def __call__(self, u: np.ndarray, least: np.ndarray) -> np.ndarray:
        """The first component."""
        return u[0]


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"format": "combined reward", "version": 1}'])
def test_settings_that_cannot_be_read_name_the_file(tmp_path: Path, text: str) -> None:
    """Whatever is wrong with it, and whoever loads it."""
    (tmp_path / "reward.json").write_text(text)
    for load in (load_reward, CombinedReward.from_pretrained):
        with pytest.raises(ValueError, match=r"reward\.json"):
            load(tmp_path)


def test_the_environment_names_a_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a single one it is loaded once, and verified: another reward model behind a component is an error."""
    combined = combination()
    combined.save_pretrained(tmp_path / "combined")
    monkeypatch.setenv(frameworks.PLACE, str(tmp_path / "combined"))
    assert frameworks.configured() is frameworks.configured()
    assert frameworks.configured()(PROMPTS, COMPLETIONS) == combined(PROMPTS, COMPLETIONS)
    wrong = {**combined.rewards, "kind": replace(combined.rewards["kind"], scorer=HashScorer(2))}
    CombinedReward(wrong, Lowest()).save_pretrained(tmp_path / "wrong")
    monkeypatch.setenv(frameworks.PLACE, str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match="the component 'kind'"):
        frameworks.configured()


def test_a_combination_is_served(tmp_path: Path) -> None:
    """The server verifies it, describes it, scores as it does, and names no path of a component's table."""
    combined = combination()
    combined.save_pretrained(tmp_path / "combined")
    with TestClient(create_app(open_any_reward(tmp_path / "combined", trust=False))) as client:
        answer = client.post("/score", json={"prompts": PROMPTS, "completions": COMPLETIONS}).json()
        health = client.get("/health").json()
        unknown = client.post("/score", json={"prompts": ["stranger"], "completions": ["1"]})

    assert answer["reward"] == combined(PROMPTS, COMPLETIONS)
    assert (health["verified"], health["name"], health["transform"]) == (True, "both", "Lowest()")
    assert health["table"] == {"prompts": 2, "references": 32}
    assert unknown.status_code == 404
    assert str(tmp_path) not in unknown.text
    wrong = {**combined.rewards, "kind": replace(combined.rewards["kind"], scorer=HashScorer(2))}
    with pytest.raises(ValueError, match="the component 'kind'"):
        create_app(CombinedReward(wrong, Lowest()))


def test_commands_take_a_combination_as_a_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`reward` verifies it against the table of its own and saves both; check-scorer and other options are refused."""
    combined = combination(And())
    combined.save_pretrained(tmp_path / "combined")
    calibrate(PROMPTS, NumberSampler(), load_reward(tmp_path / "combined"), k=16, out=tmp_path / "table")
    model = ["--reward-model", str(tmp_path / "combined")]
    out = ["--out", str(tmp_path / "final")]
    assert main(["reward", str(tmp_path / "table"), *model, "--transform", "exp:5", *out]) == 0
    assert "verified: 4 probes, 0 standard deviations" in capsys.readouterr().out
    final = CalibratedReward.from_pretrained(tmp_path / "final")
    assert final.transform == Exponential(5.0)
    assert final.raw(PROMPTS, COMPLETIONS).tolist() == pytest.approx(combined(PROMPTS, COMPLETIONS), rel=1e-6)

    single = str(tmp_path / "single")
    combined.rewards["good"].save_pretrained(single)
    for words, said in (
        (["check-scorer", *model], "check its reward models"),
        (["reward", str(tmp_path / "table"), *model, "--kind", "judge", *out, "--force"], "how its reward models"),
        (
            ["reward", str(tmp_path / "table"), "--reward-model", single, *out, "--force"],
            "raw scores",
        ),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
