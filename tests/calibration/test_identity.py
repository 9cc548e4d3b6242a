"""A directory holds one policy and, under each name, one reward model; what fails leaves it free."""

import contextlib
import json
import logging
import threading
from dataclasses import dataclass, field
from functools import partial

import pytest

from calibrated_rewards.calibration.calibrate import calibrate, import_rollouts
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.work import RunIdentity, Task, Work
from calibrated_rewards.scorers.ensemble import Ensemble, Function
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer

PROMPTS = [f"prompt {i}" for i in range(4)]


class K:
    """A callable with a state."""

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, prompts, completions):
        """The number in each completion, by the sign."""
        return self.sign * NumberScorer()(prompts, completions)

    def method(self, prompts, completions):
        """The same."""
        return self(prompts, completions)


def closed(sign):
    """A closure."""
    return lambda prompts, completions: sign * NumberScorer()(prompts, completions)


def defaulted(sign):
    """A function with a default."""

    def score(prompts, completions, factor=sign):
        return factor * NumberScorer()(prompts, completions)

    return score


def by_keyword(sign):
    """A function with a default by keyword."""

    def score(prompts, completions, *, factor=sign):
        return factor * NumberScorer()(prompts, completions)

    return score


def given(sign, prompts, completions):
    """A function for partial."""
    return sign * NumberScorer()(prompts, completions)


STATEFUL = {
    "object": K,
    "bound method": lambda sign: K(sign).method,
    "closure": closed,
    "default": defaulted,
    "keyword default": by_keyword,
    "partial": lambda sign: partial(given, sign),
    "Function": lambda sign: Function(lambda p, c: sign * float(c), name="number"),
    "ensemble": lambda sign: Ensemble([closed(sign), NumberScorer()]),
    "combination": lambda sign: Ensemble([NumberScorer(), K(2.0)], lambda members: sign * members.mean(0)),
}


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("other", [-1.0, 1.0001])
def test_a_row_is_of_one_reward_model(tmp_path, kind, other):
    """Another state is refused by what it is, before any score; the same one, made anew, goes on."""
    calibrate(PROMPTS, NumberSampler(), STATEFUL[kind](1.0), tmp_path, k=4)
    with pytest.raises(ValueError, match=r"other settings: scorers\.reward\."):
        calibrate(PROMPTS, NumberSampler(), STATEFUL[kind](other), tmp_path, k=8)
    table = calibrate(PROMPTS, NumberSampler(), STATEFUL[kind](1.0), tmp_path, k=8)
    fresh = calibrate(PROMPTS, NumberSampler(), STATEFUL[kind](1.0), k=8)
    assert [row.tolist() for _, row in table.items()] == [row.tolist() for _, row in fresh.items()]


def test_an_object_that_was_changed_is_another_one(tmp_path):
    """In place, in the same process; the error says from what to what, and how to say that it does not matter."""
    scorer = K(1.0)
    calibrate(PROMPTS, NumberSampler(), scorer, tmp_path, k=4)
    scorer.sign = -1.0
    with pytest.raises(ValueError, match=r"state\.sign is 1\.0 there and -1\.0 here.*fingerprint\(\) method"):
        calibrate(PROMPTS, NumberSampler(), scorer, tmp_path, k=8)


@dataclass
class Busy:
    """A scorer that counts its calls, fills a cache and loads something when it is first called."""

    sign: float = 1.0
    calls: int = 0
    cache: dict = field(default_factory=dict)
    model: object = None
    lock: object = field(default_factory=threading.Lock)

    def __call__(self, prompts, completions):
        """The number in each completion, by the sign."""
        self.calls += 1
        self.model = self.model or NumberScorer()
        self.cache.update(dict.fromkeys(completions, 0))
        return self.sign * self.model(prompts, completions)


def test_what_calls_change_makes_no_other_reward_model(tmp_path):
    """The same object goes on, and so does a fresh one; one with another sign does not."""
    scorer = Busy()
    calibrate(PROMPTS, NumberSampler(), scorer, tmp_path, k=4)
    said = json.loads((tmp_path / "run.json").read_text())["scorers"]["reward"]
    assert said["changing"] == ["cache", "calls", "model"]
    assert "unread" not in said
    calibrate(PROMPTS, NumberSampler(), scorer, tmp_path, k=5)
    table = calibrate(PROMPTS, NumberSampler(), Busy(), tmp_path, k=6)
    assert table.describe()["references"] == 24
    with pytest.raises(ValueError, match=r"state\.sign"):
        calibrate(PROMPTS, NumberSampler(), Busy(-1.0), tmp_path, k=8)


class Counting:
    """A sampler without a fingerprint of its own, that counts its calls and is stopped at some of them."""

    def __init__(self):
        self.calls, self.stops = 0, {3, 5, 6}

    def __call__(self, prompts, seeds):
        """Numbers."""
        self.calls += 1
        if self.calls in self.stops:
            self.stops.remove(self.calls)
            raise KeyboardInterrupt
        return NumberSampler()(prompts, seeds)


def test_a_run_that_was_stopped_goes_on_with_the_same_objects(tmp_path):
    """In a notebook, after Ctrl-C: what the calls until then have changed makes no other policy or reward model."""
    scorer, sampler = Busy(), Counting()
    for k in (4, 4, 8):
        with pytest.raises(KeyboardInterrupt):
            calibrate(PROMPTS, sampler, scorer, tmp_path, k=k, prompts_per_shard=1)
    table = calibrate(PROMPTS, sampler, scorer, tmp_path, k=8, prompts_per_shard=1)
    assert table.describe()["references"] == 32
    with pytest.raises(ValueError, match=r"state\.sign"):
        calibrate(PROMPTS, sampler, Busy(-1.0), tmp_path, k=9)


def test_a_run_that_was_killed_goes_on_with_a_cache_on_disk(tmp_path, monkeypatch):
    """Nothing of the end of a run has happened, and the next process begins with what the cache holds by then."""
    scorer = Busy()
    keep, kept = RunDirectory.save, []

    def killed(self, name, shard):
        keep(self, name, shard)
        kept.append(name)
        if len(kept) == 3:
            monkeypatch.setattr(RunIdentity, "mark_changing", lambda *_: None)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(PROMPTS, NumberSampler(), scorer, tmp_path, k=4, prompts_per_shard=1)
    assert scorer.cache
    calibrate(PROMPTS, NumberSampler(), Busy(cache=scorer.cache), tmp_path, k=4, prompts_per_shard=1)


@pytest.mark.parametrize("old", [{}, {"code": "of an older release"}])
def test_directories_of_older_releases_go_on(tmp_path, old):
    """Their fingerprint has no digest of the state: what the reward model gives decides, and is then written down."""
    calibrate(PROMPTS, NumberSampler(), K(1.0), tmp_path, k=4)
    settings = json.loads((tmp_path / "run.json").read_text())
    settings["scorers"]["reward"] = {"kind": "callable", "name": settings["scorers"]["reward"]["name"], **old}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="not the reward model"):
        calibrate(PROMPTS, NumberSampler(), K(-1.0), tmp_path, k=8)
    calibrate(PROMPTS, NumberSampler(), K(1.0), tmp_path, k=8)
    assert RunDirectory(tmp_path).settings()["scorers"]["reward"]["state"]["sign"] == 1.0


def test_a_state_that_cannot_be_read_is_said_to_be(tmp_path, caplog):
    """Two generators cannot be told apart: the log says so, and rescoring decides."""

    class Reading(K):
        def __init__(self, sign):
            super().__init__(sign)
            self.source = (x for x in "ab")

    calibrate(PROMPTS, NumberSampler(), Reading(1.0), tmp_path, k=2)
    assert "cannot be read in full (source (generator))" in caplog.text
    calibrate(PROMPTS, NumberSampler(), Reading(1.0), tmp_path, k=4)


def broken(*_):
    """A reward model that gives no numbers."""
    raise RuntimeError("out of memory")


def test_a_failed_call_leaves_the_name_free(tmp_path):
    """Under the same name another reward model scores what was drawn."""
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(PROMPTS, NumberSampler(), broken, tmp_path, k=3)
    table = calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path, k=3)
    assert table.meta["scorer"] == {"kind": "number", "default": 0.0}


def test_a_directory_that_an_older_release_poisoned_is_free(tmp_path):
    """There the reward model that failed is written down, and has no scores."""
    with pytest.raises(RuntimeError):
        calibrate(PROMPTS, NumberSampler(), broken, tmp_path, k=3)
    settings = json.loads((tmp_path / "run.json").read_text())
    settings["scorers"]["reward"] = {"kind": "number", "default": 9.0}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert len(calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path, k=3)) == 4


@dataclass(frozen=True)
class Rendering(NumberSampler):
    """A sampler with a template, which may fail."""

    template: str = "<a>"
    fails: bool = False

    def __call__(self, prompts, seeds):
        """Numbers."""
        if self.fails:
            raise RuntimeError("out of memory")
        return super().__call__(prompts, seeds)

    def rendered(self, prompt):
        """By the template."""
        return self.template + prompt

    def fingerprint(self):
        """The template."""
        return {"kind": "rendering", "template": self.template}


def test_a_sampler_that_drew_nothing_is_replaced(tmp_path):
    """Its rollouts and its renderings are the second one's; once it drew, another one is refused."""
    with pytest.raises(RuntimeError):
        calibrate(PROMPTS, Rendering(template="<wrong>", fails=True), NumberScorer(), tmp_path, k=2)
    table = calibrate(PROMPTS, Rendering(), NumberScorer(), tmp_path, k=2)
    assert table.rows(["<a>prompt 0"]) == table.rows(["prompt 0"])
    assert table.find(["<wrong>prompt 0"]).tolist() == [-1]
    with pytest.raises(ValueError, match=r"sampler\.template"):
        calibrate(PROMPTS, Rendering(template="<b>"), NumberScorer(), tmp_path, k=2)


def test_two_processes_do_not_mix_reward_models(tmp_path):
    """The second to have scores of a name is refused as it would keep them, and keeps none."""
    calibrate(PROMPTS, NumberSampler(), {"other": NumberScorer()}, tmp_path, k=2)
    directory, work = RunDirectory(tmp_path), Work(None, {"r": K(-1.0)}, 0)
    slow = RunIdentity.of(work)
    slow.check(directory, work)
    before = directory.load("00000")
    calibrate(None, None, {"r": NumberScorer()}, tmp_path)
    scored = work(Task("00000", before, before.state.drawn)).shard
    with pytest.raises(ValueError, match="other settings"):
        slow.save(directory, "00000", before, scored, work)
    assert directory.load("00000").scores["r"][0].tolist() == before.scores["other"][0].tolist()


def test_two_processes_do_not_mix_policies(tmp_path):
    """The second to have rollouts is refused as it would keep them."""
    with pytest.raises(RuntimeError):
        calibrate(PROMPTS, Rendering(template="<x>", fails=True), NumberScorer(), tmp_path, k=2)
    directory, work = RunDirectory(tmp_path), Work(Rendering(template="<x>"), {"reward": NumberScorer()}, 0)
    slow, before = RunIdentity.of(work), directory.load("00000")
    slow.check(directory, work)
    calibrate(PROMPTS, Rendering(template="<y>"), NumberScorer(), tmp_path, k=2)
    drawn = next(work.steps(Task("00000", before, [2] * 4)))
    with pytest.raises(ValueError, match="another sampler"):
        slow.save(directory, "00000", before, drawn, work)


@pytest.mark.parametrize(
    "prompts",
    [[], [""], ["good", 3], [{"question": "x"}], ["half \ud800"]],
    ids=["none", "empty", "number", "no column", "half a character"],
)
def test_bad_prompts_leave_no_folder(tmp_path, prompts):
    """Nor a lock in a folder that was there, nor anything of an import."""
    with pytest.raises((ValueError, TypeError)):
        calibrate(prompts, NumberSampler(), NumberScorer(), tmp_path / "a" / "b", k=2)
    assert [*tmp_path.iterdir()] == []
    rows = [{"prompt": prompt, "completions": ["1"]} for prompt in prompts]
    for out in tmp_path, tmp_path / "new":
        with pytest.raises((ValueError, TypeError)):
            calibrate(prompts, NumberSampler(), NumberScorer(), out, k=2)
        with pytest.raises((ValueError, TypeError)):
            import_rollouts(rows, out, NumberScorer())
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_removed_is_made_by_the_next(tmp_path):
    """Who waits for the lock of a call that fails makes the folder anew."""
    directory, done = RunDirectory(tmp_path / "run"), []

    def second():
        with RunDirectory(tmp_path / "run").lock():
            done.append((tmp_path / "run" / ".lock").exists())

    thread = threading.Thread(target=second)
    with contextlib.suppress(RuntimeError), directory.lock():
        thread.start()
        thread.join(0.2)
        raise RuntimeError
    thread.join(10)
    assert done == [True]


def test_one_rollout_is_warned_of(tmp_path, caplog):
    """A quantile among one reference is 0, 1/2 or 1: drawn here or imported, and not once there are more."""
    with caplog.at_level(logging.WARNING):
        calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "a", k=1)
        assert "K=1 rollout a prompt" in caplog.text
        assert "-k 32" in caplog.text
        caplog.clear()
        import_rollouts([{"prompt": "p", "completions": ["1"]}], tmp_path / "b", NumberScorer())
        assert "K=1 rollout a prompt" in caplog.text
        caplog.clear()
        calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "a", k=2)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["prompts", "rollouts", "../beside", "a b", ""])
def test_a_column_of_scores_has_a_name_for_a_folder(tmp_path, name):
    """As a reward model has: its table is written there, and not over the run's own files or beside them."""
    rows = [{"prompt": "p", "completions": ["1", "2"], "scores": [1.0, 2.0]}]
    with pytest.raises(ValueError, match="the name of a reward model is that of its folder: letters"):
        import_rollouts(rows, tmp_path / "run", scores={name: "scores"})
    assert [*tmp_path.iterdir()] == []
