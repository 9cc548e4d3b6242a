"""calibrate(): the table is that of the rollouts, however they were asked for, and however often it was stopped."""

import contextlib
import inspect
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from calibrated_rewards import Identity, ReferenceTable, id_key, prompt_key
from calibrated_rewards.calibration.adaptive import Adaptive
from calibrated_rewards.calibration.calibrate import calibrate, import_rollouts
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.samplers.protocol import Rollout, seeds_of
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer

PROMPTS = [f"prompt {i}" for i in range(10)]
CHAT = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Counting:
    """NumberSampler, with a note of every rollout that it was asked for."""

    asked: Counter = field(default_factory=Counter, compare=False)

    def __call__(self, prompts, seeds):
        """What NumberSampler gives."""
        self.asked.update((prompt, seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own)
        return NumberSampler()(prompts, seeds)

    def fingerprint(self):
        """Not that of NumberSampler."""
        return {"kind": "counting"}


def table_bytes(path):
    return [(Path(path) / name).read_bytes() for name in ("table.safetensors", "table.json")]


def by_hand(prompt, k, seed=0):
    """The sorted scores of a prompt's rollouts, by the sampler and the scorer alone."""
    drawn = NumberSampler()([prompt], [seeds_of(seed, prompt_key(prompt), 0, k)])[0]
    return np.sort(NumberScorer()([prompt] * k, [rollout.completion for rollout in drawn]))


@pytest.mark.parametrize("per_shard", [1, 3, 100])
def test_the_table_is_that_of_the_rollouts(tmp_path, per_shard):
    """Sampler, scorer and sort by hand give the same rows, in memory and on disk, in shards of any size."""
    asked = [*PROMPTS, CHAT]
    kept = calibrate(asked, NumberSampler(), NumberScorer(), tmp_path / "t", k=7, prompts_per_shard=per_shard)
    memory = calibrate(asked, NumberSampler(), NumberScorer(), k=7, prompts_per_shard=per_shard)
    for table in kept, memory, ReferenceTable.load(tmp_path / "t", verify=True):
        assert len(table) == 11
        for prompt in asked:
            np.testing.assert_array_equal(table.scores(int(table.rows([prompt])[0])), by_hand(prompt, 7))
    assert kept.meta == memory.meta


def test_scores_have_the_law_of_the_sampler():
    """The fakes' scores are normal around their prompt's mean: what fresh draws rank to is uniform."""
    table = calibrate(["Hi"], NumberSampler(), NumberScorer(), k=2000)
    scores = np.asarray(table.scores(0), np.float64)
    assert stats.kstest(scores - HashScorer()(["Hi"], [""])[0], "norm").pvalue > 1e-3


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of a table of PROMPTS."""
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path_factory.getbasetemp() / "expected", k=3)
    return table_bytes(tmp_path_factory.getbasetemp() / "expected")


@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(PROMPTS), again=st.lists(st.sampled_from(PROMPTS), max_size=5), per_shard=st.integers(3, 12)
)
def test_order_repeats_and_shards_change_no_byte(expected, order, again, per_shard):
    """Prompts in any order, some of them again, in shards of any size: the same file."""
    with TemporaryDirectory() as folder:
        calibrate(order + again, NumberSampler(), NumberScorer(), folder, k=3, prompts_per_shard=per_shard)
        assert table_bytes(folder) == expected


def test_nothing_is_drawn_twice(tmp_path):
    """Again: nothing; more rollouts, more prompts: those that are new; and the table is that of one run."""
    sampler, out = Counting(), tmp_path / "t"
    calibrate(PROMPTS[:4], sampler, NumberScorer(), out, k=4, prompts_per_shard=3)
    assert sum(sampler.asked.values()) == 16
    written = (out / "table.safetensors").stat().st_ino
    calibrate(PROMPTS[:4], sampler, NumberScorer(), out, k=4)
    assert sum(sampler.asked.values()) == 16
    assert (out / "table.safetensors").stat().st_ino == written
    calibrate(PROMPTS[:4], sampler, NumberScorer(), out, k=9)
    assert sum(sampler.asked.values()) == 36
    calibrate(PROMPTS, sampler, NumberScorer(), out, k=9)
    assert sum(sampler.asked.values()) == 90
    assert set(sampler.asked.values()) == {1}
    calibrate(PROMPTS, Counting(), NumberScorer(), tmp_path / "once", k=9)
    assert table_bytes(out) == table_bytes(tmp_path / "once")


def test_fewer_prompts_or_rollouts_take_nothing_away(tmp_path):
    """A directory keeps what it has: a smaller call is answered with it, and draws nothing."""
    full = calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path, k=5)
    sampler = Counting()
    with pytest.raises(ValueError, match="other settings"):
        calibrate(PROMPTS, sampler, NumberScorer(), tmp_path, k=5)
    again = calibrate(PROMPTS[:2], NumberSampler(), NumberScorer(), tmp_path, k=2)
    assert (len(again), again.describe()["references"]) == (10, 50) == (len(full), full.describe()["references"])


def test_another_reward_model_scores_what_is_there(tmp_path):
    """Without prompts and sampler: the table that the reward model would have made in the first place."""
    both = {"number": NumberScorer(), "hash": HashScorer(1)}
    at_once = calibrate(PROMPTS, NumberSampler(), both, tmp_path / "both", k=6, prompts_per_shard=4)
    calibrate(PROMPTS, NumberSampler(), {"number": NumberScorer()}, tmp_path / "later", k=6, prompts_per_shard=4)
    later = calibrate(None, None, {"hash": HashScorer(1)}, tmp_path / "later")
    assert at_once.keys() == both.keys()
    assert table_bytes(tmp_path / "later" / "hash") == table_bytes(tmp_path / "both" / "hash")
    assert table_bytes(tmp_path / "later" / "number") == table_bytes(tmp_path / "both" / "number")
    row = int(later["hash"].rows([PROMPTS[0]])[0])
    drawn = NumberSampler()([PROMPTS[0]], [seeds_of(0, prompt_key(PROMPTS[0]), 0, 6)])[0]
    expected = np.sort(HashScorer(1)([PROMPTS[0]] * 6, [rollout.completion for rollout in drawn]))
    np.testing.assert_array_equal(later["hash"].scores(row), expected)


def test_ids_and_rendered_prompts_lead_to_the_row(tmp_path):
    """An id, also one that comes with a repeat, and the text that the policy reads."""

    @dataclass(frozen=True)
    class Rendering(NumberSampler):
        def rendered(self, prompt):
            return prompt if isinstance(prompt, str) else f"<user>{prompt[0]['content']}"

    asked = [Asked(CHAT, 7), Asked("Hello", "a"), Asked(CHAT, "again"), Asked(CHAT, 7)]
    table = calibrate(asked, Rendering(), NumberScorer(), tmp_path, k=3)
    row = table.rows([CHAT])[0]
    assert (table.rows(["<user>Hi", id_key(7), id_key("again")]) == row).all()
    assert table.rows([id_key("a")]) == table.rows(["Hello"])
    assert table.rows_by_prefix(["<user>Hi and the answer"])[0] == row
    # A later call, with a new id for a known prompt.
    table = calibrate([Asked("Hello", "b")], Rendering(), NumberScorer(), tmp_path, k=3)
    assert table.rows([id_key("b")]) == table.rows(["Hello"])


def test_a_text_that_two_prompts_become_leads_to_the_one_it_is():
    """A chat whose rendering is another prompt's text does not take it away, nor does the second of two chats."""

    @dataclass(frozen=True)
    class Rendering(NumberSampler):
        def rendered(self, prompt):
            return prompt if isinstance(prompt, str) else prompt[-1]["content"]

    system = [{"role": "system", "content": "Be kind"}, *CHAT]
    table = calibrate([CHAT, "Hi", system], Rendering(), NumberScorer(), k=3)
    assert len(table) == 3
    assert len({*table.rows([CHAT, "Hi", system]).tolist()}) == 3


def test_the_table_says_what_it_is_of(tmp_path):
    """Fingerprints, the seed, and probes: pairs of some prompts with the scores that they had."""
    table = calibrate([*PROMPTS, CHAT], NumberSampler(2.0), NumberScorer(), tmp_path, k=5, seed=3)
    assert table.meta["scorer"] == {"kind": "number", "default": 0.0}
    assert table.meta["sampler"] == {"kind": "number", "spread": 2.0}
    assert table.meta["seed"] == 3
    probes = table.meta["probes"]
    assert len(probes) == 16
    scores = NumberScorer()([p["prompt"] for p in probes], [p["completion"] for p in probes])
    np.testing.assert_array_equal(scores, np.float32([p["score"] for p in probes]))
    keys = sorted({prompt_key(p["prompt"]) for p in probes})
    assert keys == sorted(map(prompt_key, [*PROMPTS, CHAT]))[:8]


@dataclass(frozen=True)
class Faulty:
    """NumberSampler that gives something else for one prompt."""

    answer: object

    def __call__(self, prompts, seeds):
        """All but one as they should be."""
        given = NumberSampler()(prompts, seeds)
        return [self.answer if prompt == PROMPTS[1] else own for prompt, own in zip(prompts, given, strict=True)]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (["a"], ValueError, "gives 3 completions for 'prompt 1'"),
        ("abc", ValueError, "gives 3 completions for 'prompt 1'"),
        ([Rollout(None)] * 3, TypeError, "a completion is a text or a list of messages"),
        ([3.5] * 3, TypeError, "a completion is a text or a list of messages"),
    ],
)
def test_a_sampler_that_gives_something_else_is_named(answer, error, says, tmp_path):
    """Too few completions, or what is none; nothing of that shard is kept, and what was done before is."""
    with pytest.raises(error, match=says):
        calibrate(PROMPTS[:2], Faulty(answer), NumberScorer(), tmp_path, k=3, prompts_per_shard=1)
    assert [*RunDirectory(tmp_path).path.glob("rollouts/*")] == [tmp_path / "rollouts" / "00000.parquet"]


def test_what_was_sampled_outlives_a_reward_model_that_fails(tmp_path):
    """Rollouts are kept before they are scored: the next try does not draw them again."""

    def broken(prompts, completions):
        return [float("nan") for _ in zip(prompts, completions, strict=True)]

    sampler = Counting()
    with pytest.raises(ValueError, match="finite"):
        calibrate(PROMPTS, sampler, {"r": broken}, tmp_path, k=3)
    assert sum(sampler.asked.values()) == 30
    assert json.loads((tmp_path / "run.json").read_text())["scorers"] == {}
    calibrate(None, None, {"r": NumberScorer()}, tmp_path)
    assert sum(sampler.asked.values()) == 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampler": NumberSampler(3.0)}, r"sampler\.spread is 1\.0 there and 3\.0 here"),
        ({"scorers": HashScorer()}, r'scorers\.reward\.kind is "number" there and "hash" here'),
        ({"seed": 1}, "seed is 0 there and 1 here"),
    ],
)
def test_a_directory_of_another_run_is_refused_before_sampling(tmp_path, change, says):
    """Other policy, reward model or seed: an error that says what differs, and a directory that is as it was."""
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path, k=2)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    given = {"sampler": NumberSampler(), "scorers": NumberScorer(), "seed": 0, **change}
    with pytest.raises(ValueError, match=says):
        calibrate(PROMPTS, given["sampler"], given["scorers"], tmp_path, k=9, seed=given["seed"])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((["Hi"], NumberSampler(), {}), ValueError, "needs a reward model, got none"),
        ((["Hi"], NumberSampler(), {"a/b": NumberScorer()}), ValueError, "the name of a reward model"),
        ((["Hi"], NumberSampler(), {"rollouts": NumberScorer()}), ValueError, "the name of a reward model"),
        ((["Hi"], NumberSampler(), {"r": 3}), TypeError, "is called with prompts and completions"),
        (([], NumberSampler(), NumberScorer()), ValueError, "at least one prompt"),
        (([""], NumberSampler(), NumberScorer()), ValueError, "prompt"),
        (([Asked("a", 1), Asked("b", 1)], NumberSampler(), NumberScorer()), ValueError, "an id leads to one prompt"),
        ((["Hi \ud800"], NumberSampler(), NumberScorer()), ValueError, "whole characters"),
        ((["Hi"], None, NumberScorer()), ValueError, "there is no sampler"),
        ((None, None, NumberScorer()), ValueError, "needs prompts, or the directory"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, says):
    """Each with what is wrong."""
    with pytest.raises(error, match=says):
        calibrate(*arguments, k=2)


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_k_is_a_count(wrong):
    """No rollouts are no calibration."""
    with pytest.raises(ValueError, match="k >= 1"):
        calibrate(["Hi"], NumberSampler(), NumberScorer(), k=wrong)


def test_a_prompt_that_is_refused_leaves_no_trace(tmp_path):
    """The sampler checks all prompts before the first rollout; mended, the same directory can be used."""

    @dataclass(frozen=True)
    class Particular(NumberSampler):
        def check(self, prompts):
            if PROMPTS[7] in prompts:
                raise ValueError(f"too long: {PROMPTS[7]}")

    with pytest.raises(ValueError, match="too long: prompt 7"):
        calibrate(PROMPTS, Particular(), NumberScorer(), tmp_path, k=2, prompts_per_shard=2)
    assert RunDirectory(tmp_path).names() == []
    calibrate(PROMPTS[:7], Particular(2.0), NumberScorer(), tmp_path, k=2, prompts_per_shard=2)
    assert len(RunDirectory(tmp_path).names()) == 4


def test_a_cluster_gives_the_same_table(tmp_path):
    """Work that is done elsewhere, and comes back in another order."""

    def shuffled(function, tasks):
        yield from [function(task) for task in tasks][::-1]

    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "a", k=3, prompts_per_shard=2)
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "b", k=3, prompts_per_shard=2, cluster=shuffled)
    assert table_bytes(tmp_path / "a") == table_bytes(tmp_path / "b")


def rows_of(k, names=("reward",)):
    """Rollouts as another program would have kept them: a row a completion, not in order."""
    rows = []
    for prompt in PROMPTS:
        for rollout in NumberSampler()([prompt], [seeds_of(0, prompt_key(prompt), 0, k)])[0]:
            said = rollout.completion
            made = {name: float(NumberScorer()([prompt], [said])[0]) * (-1) ** i for i, name in enumerate(names)}
            rows.append({"prompt": prompt, "completion": said, "finish": "stop", **made})
    return rows[::-1]


def test_rollouts_made_elsewhere_make_the_same_rows(tmp_path):
    """With the scores that they have, or scored here: the rows of a run that drew them itself."""
    drawn = calibrate(PROMPTS, NumberSampler(), NumberScorer(), k=5)
    theirs = import_rollouts(rows_of(5), tmp_path / "a", scores="reward", prompts_per_shard=3)
    scored = import_rollouts(rows_of(5), tmp_path / "b", NumberScorer(), prompts_per_shard=4)
    for table in theirs, scored:
        assert [(key, row.tolist()) for key, row in table.items()] == [(k, r.tolist()) for k, r in drawn.items()]
    assert theirs.meta["scorer"] == {"kind": "imported", "column": "reward"}
    assert scored.meta["scorer"] == {"kind": "number", "default": 0.0}


def test_imported_rollouts_can_be_added_to(tmp_path):
    """More of them are drawn here, another reward model scores all; importing again changes nothing."""
    import_rollouts(rows_of(4), tmp_path, {"mine": NumberScorer()})
    sampler = Counting()
    tables = calibrate(PROMPTS, sampler, {"mine": NumberScorer(), "hash": HashScorer()}, tmp_path, k=6)
    assert sum(sampler.asked.values()) == 2 * len(PROMPTS)
    assert [table.describe()["references"] for table in tables.values()] == [60, 60]
    again = import_rollouts(rows_of(4), tmp_path, {"mine": NumberScorer()})
    assert again["mine"].describe()["references"] == 60


def test_several_columns_of_scores_make_a_table_each(tmp_path):
    """By the names that they are given."""
    tables = import_rollouts(rows_of(3, ("a", "b")), tmp_path, scores={"plus": "a", "minus": "b"})
    plus, minus = (table.scores(int(table.rows([PROMPTS[2]])[0])) for table in (tables["plus"], tables["minus"]))
    np.testing.assert_array_equal(plus, -minus[::-1])
    assert ReferenceTable.load(tmp_path / "minus").meta["scorer"]["column"] == "b"


def test_rollouts_without_scores_are_refused(tmp_path):
    """No column and no reward model; both under one name; and a prompt that lacks a score."""
    with pytest.raises(ValueError, match="rollouts need scores"):
        import_rollouts(rows_of(2), tmp_path)
    with pytest.raises(ValueError, match="or a column does, got both for 'reward'"):
        import_rollouts(rows_of(2), tmp_path, NumberScorer(), scores="reward")
    assert not [*tmp_path.glob("prompts/*")]


def graded(prompts, completions):
    """1 or 0; some prompts are always solved, others never."""
    words = {"prompt 0": 1.0, "prompt 1": 0.0, "prompt 2": 1.0}
    return [words.get(p, float(NumberScorer()([p], [c])[0] > 0)) for p, c in zip(prompts, completions, strict=True)]


def test_adaptive_rounds_stop_where_all_is_known(tmp_path):
    """Prompts without resolution stop early, the others go on; and a second call, or another process, draws nothing."""
    rounds = Adaptive(Identity(), width=0.11, rounds=(16, 32, 64))
    sampler = Counting()
    table = calibrate(PROMPTS, sampler, graded, tmp_path / "a", adaptive=rounds, prompts_per_shard=3)
    counts = dict(zip(PROMPTS, table.counts(table.rows(PROMPTS)).tolist(), strict=True))
    assert max(counts[prompt] for prompt in PROMPTS[:3]) < max(counts.values()) <= 64
    for row in range(len(table)):
        assert rounds.enough(table.scores(row)) or counts[PROMPTS[0]] < len(table.scores(row)) == 64
    assert sum(sampler.asked.values()) == sum(counts.values())
    calibrate(PROMPTS, sampler, graded, tmp_path / "a", adaptive=rounds)
    assert sum(sampler.asked.values()) == sum(counts.values())
    assert rounds.saved(table.items()).used == sum(counts.values())


def test_adaptive_rounds_see_only_their_own_rollouts(tmp_path):
    """A directory that is ahead, by a killed run's next round, comes to the same decisions: the same table."""
    rounds = Adaptive(Identity(), width=0.12, rounds=(8, 16, 32), budget=200)
    calibrate(PROMPTS, NumberSampler(), graded, tmp_path / "whole", adaptive=rounds, prompts_per_shard=4)

    @dataclass
    class Killed:
        left: int

        def __call__(self, prompts, seeds):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return NumberSampler()(prompts, seeds)

        def fingerprint(self):
            return NumberSampler().fingerprint()

    for left in range(1, 9):
        with contextlib.suppress(KeyboardInterrupt):
            calibrate(PROMPTS, Killed(left), graded, tmp_path / "stopped", adaptive=rounds, prompts_per_shard=4)
    calibrate(PROMPTS, NumberSampler(), graded, tmp_path / "stopped", adaptive=rounds, prompts_per_shard=4)
    assert table_bytes(tmp_path / "stopped") == table_bytes(tmp_path / "whole")


def test_what_else_is_there_does_not_count_against_the_budget(tmp_path):
    """Prompts that have more already: the others get what they would have got."""
    rounds = Adaptive(Identity(), width=0.12, rounds=(8, 16, 32), budget=160)
    calibrate(PROMPTS[:3], NumberSampler(), graded, tmp_path / "more", k=60)
    more = calibrate(PROMPTS, NumberSampler(), graded, tmp_path / "more", adaptive=rounds)
    fresh = calibrate(PROMPTS, NumberSampler(), graded, tmp_path / "fresh", adaptive=rounds)
    assert fresh.describe()["references"] <= 160
    assert more.counts(more.rows(PROMPTS[3:])).tolist() == fresh.counts(fresh.rows(PROMPTS[3:])).tolist()
    assert more.counts(more.rows(PROMPTS[:3])).tolist() == [60, 60, 60]


def test_adaptive_rounds_need_one_reward_model():
    """Whose scores say what is enough."""
    with pytest.raises(ValueError, match="adaptive K needs one reward model"):
        calibrate(["a"], NumberSampler(), {"a": graded, "b": graded}, adaptive=Adaptive(Identity(), 0.1))


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    """A table that is no run's, shards whose settings are gone, a file: refused; other files: not minded."""
    ReferenceTable.build([("zzz", [1.0, 2.0])], path=tmp_path / "table")
    with pytest.raises(ValueError, match=r"no run\.json"):
        calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "table", k=2)
    assert len(ReferenceTable.load(tmp_path / "table")) == 1
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "run", k=2)
    (tmp_path / "run" / "prompts" / "00000 (1).parquet").write_text("a copy")
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "run", k=2)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json"):
        calibrate(PROMPTS, NumberSampler(9.0), NumberScorer(), tmp_path / "run", k=4)
    with pytest.raises(NotADirectoryError):
        calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "run" / "table.json", k=2)


@pytest.mark.parametrize("harm", ["another", "cut", "gone", "stamp"])
def test_a_table_that_was_harmed_is_made_again(tmp_path, harm):
    """Replaced by another, cut short, deleted, or with a mark that nobody can read."""
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path, k=3)
    before = table_bytes(tmp_path)
    if harm == "another":
        ReferenceTable.build([("zzz", [1.0])], path=tmp_path)
    elif harm == "cut":
        (tmp_path / "table.safetensors").write_bytes(before[0][:-8])
    elif harm == "gone":
        (tmp_path / "table.json").unlink()
    else:
        (tmp_path / ".made_of").write_bytes(b"\xff\xfe")
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path, k=3)
    assert table_bytes(tmp_path) == before


def test_what_others_do_to_their_arguments_stays_with_them(tmp_path):
    """A sampler that appends to messages and sorts seeds, a scorer that edits completions: nothing of it is kept."""

    def rude(prompts, seeds):
        drawn = NumberSampler()(prompts, seeds)
        for prompt, own in zip(prompts, seeds, strict=True):
            prompt.append({"role": "assistant", "content": "mine"})
            own.clear()
        return [[[{"role": "assistant", "content": one.completion}] for one in own] for own in drawn]

    def editing(prompts, completions):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.clear()
            completion.clear()
        return [0.0] * len(prompts)

    calibrate([CHAT], rude, {"a": editing, "b": NumberScorer()}, tmp_path, k=3)
    (shard,) = [RunDirectory(tmp_path).load(name) for name in RunDirectory(tmp_path).names()]
    assert [planned.prompt for planned in shard.prompts] == [CHAT]
    assert [*shard.seeds[0]] == seeds_of(0, prompt_key(CHAT), 0, 3)
    assert all(rollout.completion[0]["content"] for rollout in shard.rollouts[0])
    np.testing.assert_array_equal(np.sort(shard.scores["b"][0]), by_hand(CHAT, 3))


def test_a_budget_is_a_budget():
    """One that is too small for the first round is refused before anything is drawn."""
    sampler = Counting()
    with pytest.raises(ValueError, match="budget for 4 rollouts of each prompt"):
        calibrate(PROMPTS, sampler, graded, adaptive=Adaptive(Identity(), 1e-4, (4, 8), budget=5))
    assert not sampler.asked


def test_new_prompts_need_a_sampler(tmp_path):
    """Without one they are refused, and the directory is as it was; unfinished ones have no part in the table."""
    calibrate(PROMPTS[:1], NumberSampler(), NumberScorer(), tmp_path, k=2)
    with pytest.raises(ValueError, match="there is no sampler"):
        calibrate(PROMPTS[1:2], None, NumberScorer(), tmp_path, k=2)
    assert len(calibrate(None, None, {"other": HashScorer()}, tmp_path)["other"]) == 1

    def stopped(prompts, seeds):
        raise KeyboardInterrupt(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        calibrate(PROMPTS[:3], stopped, {"r": NumberScorer()}, tmp_path / "b", k=2)
    rows = [row for row in rows_of(2) if row["prompt"] == PROMPTS[5]]
    assert len(import_rollouts(rows, tmp_path / "b", scores={"mine": "reward"})["mine"]) == 1


def test_half_a_character_becomes_the_sign_for_it(tmp_path):
    """Which a server's JSON may bring, and no file in UTF-8 can keep."""

    def half(prompts, seeds):
        return [["a\ud83d" for _ in own] for own in seeds if prompts]

    calibrate(["Hi"], half, NumberScorer(), tmp_path, k=2)
    assert RunDirectory(tmp_path).load("00000").rollouts[0][0].completion == "a\ufffd"


def test_interrupted_planning_is_taken_back(tmp_path):
    """Ctrl-C while prompts are read: none of them stays; nor of an import that is refused."""

    def interrupted():
        yield from PROMPTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(interrupted(), NumberSampler(), NumberScorer(), tmp_path, k=2, prompts_per_shard=3)
    assert RunDirectory(tmp_path).names() == []
    rows = [{"prompt": f"{i}", "completions": ["1"], "r": [1.0]} for i in range(5)] + [{"prompt": "x", "r": [1.0]}]
    with pytest.raises((ValueError, KeyError)):
        import_rollouts(rows, tmp_path, scores="r", prompts_per_shard=2)
    assert RunDirectory(tmp_path).names() == []
    assert not [*tmp_path.glob("rollouts/*")]


def test_scores_for_rollouts_that_are_there_are_not_imported(tmp_path):
    """They might be of other rollouts: a column that the directory lacks is for new prompts alone."""
    rows = rows_of(2, ("a", "b"))
    import_rollouts(rows, tmp_path, scores={"a": "a"})
    with pytest.raises(ValueError, match="without scores of 'b'"):
        import_rollouts(rows, tmp_path, scores={"b": "b"})
    assert "b" not in RunDirectory(tmp_path).settings()["scorers"]


def test_two_partials_are_two_reward_models(tmp_path):
    """What a function was given is part of what it is."""

    def constant(value, prompts, completions):
        return [value for _ in zip(prompts, completions, strict=True)]

    calibrate(PROMPTS[:1], NumberSampler(), partial(constant, 1.0), tmp_path, k=2)
    with pytest.raises(ValueError, match="other settings"):
        calibrate(PROMPTS[:1], NumberSampler(), partial(constant, 5.0), tmp_path, k=4)


@pytest.mark.parametrize("wrong", [True, 1.0, "abc", None])
def test_a_seed_is_a_whole_number(wrong):
    """1.0 and True would be other seeds than 1, and be called the same."""
    with pytest.raises(TypeError, match="whole seed"):
        inspect.unwrap(calibrate)(PROMPTS, NumberSampler(), NumberScorer(), k=2, seed=wrong)
    assert len(calibrate(PROMPTS[:1], NumberSampler(), NumberScorer(), k=int(np.int64(2)), seed=int(np.int64(3)))) == 1


@pytest.mark.parametrize("name", ["run.json", "Prompts", "table.json", "a" * 101, "a/b"])
def test_names_that_are_no_folders_are_refused(name):
    """Before the work, not after it."""
    with pytest.raises(ValueError, match="the name of a reward model"):
        calibrate(PROMPTS, NumberSampler(), {name: NumberScorer()}, k=2)


def test_two_functions_of_one_name_are_two(tmp_path):
    """By their code; the same code is the same function."""

    def run(add):
        scorer = (
            (lambda p, c: [1.0 for _ in zip(p, c, strict=True)]) if add else (lambda p, c: [float(len(p))] * len(c))
        )
        return calibrate(PROMPTS[:1], NumberSampler(), scorer, tmp_path, k=2)

    run(True)
    run(True)
    with pytest.raises(ValueError, match=r"scorers\.reward\.code"):
        run(False)


def test_tables_that_lack_rollouts_are_named(tmp_path, caplog):
    """K was raised with one of two reward models: the other's table is behind."""
    calibrate(PROMPTS, NumberSampler(), {"a": NumberScorer(), "b": HashScorer()}, tmp_path, k=2)
    assert not caplog.records
    calibrate(PROMPTS, NumberSampler(), {"a": NumberScorer()}, tmp_path, k=3)
    assert "the table of 'b' lacks some of these rollouts" in caplog.text
