"""The health of rollouts, counted by hand and by numpy's corrcoef, over files that the library itself wrote."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from calibrated_rewards.calibration.inspect_rollouts import rollout_health
from calibrated_rewards.calibration.shards import Planned, new_shard, write_shard
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import Rollout

NOTHING = [" \n", [], [{"role": "assistant", "content": ""}], [{"role": "assistant", "content": "  "}]]
CALL = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]


def write(folder, prompts, scores=None):
    """A shard a prompt: {prompt: rollouts}, and scores in the same order."""
    for number, (prompt, rollouts) in enumerate(prompts.items()):
        shard = new_shard([Planned(prompt_key(prompt), prompt)]).add_rollouts([rollouts], [[*range(len(rollouts))]])
        for name, of in (scores or {}).items():
            shard = shard.add_scores(name, [np.float32(of[number])])
        write_shard(folder / f"{number:05d}.parquet", shard)


def test_what_is_odd_about_rollouts(tmp_path):
    """Cut, empty and repeated completions, texts and messages; the prompts that have many, and the worst first."""
    fine = [Rollout(f"answer {i}", 5 + i, "stop") for i in range(10)]
    write(
        tmp_path,
        {
            "fine": fine,
            "cut": [Rollout(f"long {i}", 100, "length") for i in range(6)] + fine[:4],
            "all cut": [Rollout(f"other {i}", 100, "length") for i in range(10)],
            "empty": [Rollout(text, 1, "stop") for text in NOTHING] + [Rollout(CALL, 9, "stop"), *fine[:5]],
            "one": [Rollout("the same", 2, "stop")] * 10,
        },
    )
    found = rollout_health(tmp_path, most=1, keys=[prompt_key("fine").hex()])

    assert (found.prompts, found.rollouts) == (5, 50)
    assert (found.cut, found.empty, found.repeated) == (16 / 50, 4 / 50, 9 / 50)
    tokens = [*range(5, 15), *[100] * 6, *range(5, 9), *[100] * 10, *[1] * 4, 9, *range(5, 10), *[2] * 10]
    assert found.tokens_mean == pytest.approx(np.mean(tokens))
    assert found.odd_prompts == {"mostly cut": 2, "often empty": 1, "mostly repeated": 1}
    assert [(each.reason, each.share, each.prompt) for each in found.odd] == [
        ("mostly cut", 1.0, "'all cut'"),
        ("often empty", 0.4, "'empty'"),
        ("mostly repeated", 0.9, "'one'"),
    ]
    assert found.starts == {prompt_key("fine").hex(): "'fine'"}
    told = "\n".join(f"{label}|{text}" for label, text in found.lines())
    assert "cut|32 % ended for want of tokens\nempty|8 %\nrepeated|18 %" in told
    assert f"|{prompt_key('all cut').hex()}: 100 %  'all cut'" in told
    assert json.loads(json.dumps(found.as_json()))["odd"][0]["prompt"] == "'all cut'"


def test_clean_rollouts_have_nothing_odd(tmp_path):
    """Unlike completions that end by themselves."""
    write(tmp_path, {f"p{i}": [Rollout(f"{i} {j}", 5, "stop") for j in range(8)] for i in range(3)})
    found = rollout_health(tmp_path)

    assert (found.cut, found.empty, found.repeated, found.odd_prompts, found.odd) == (0.0, 0.0, 0.0, {}, ())


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_score_and_length(tmp_path, seed):
    """The mean over prompts of numpy's correlation; a prompt of one length does not count, nor what has no score."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, 50, size=9), rng.integers(1, 50, size=5), np.full(6, 7), rng.integers(1, 50, size=9)]
    tokens[3][:2] = 3, 4
    scores = [rng.normal(size=9), rng.normal(size=5), rng.normal(size=6), rng.normal(size=4)]
    rollouts = {f"p{i}": [Rollout(f"{j}", int(n), "stop") for j, n in enumerate(own)] for i, own in enumerate(tokens)}
    write(tmp_path, rollouts, {"rm": scores, "twice": [2 * each for each in scores]})
    found = rollout_health(tmp_path)
    r = [np.corrcoef(tokens[i][: len(scores[i])], np.float32(scores[i]))[0, 1] for i in (0, 1, 3)]

    assert found.score_length == {"rm": pytest.approx(np.mean(r)), "twice": pytest.approx(np.mean(r))}
    assert found.unscored == {"rm": 5, "twice": 5}
    assert found.varied["rm"] == len(r)
    assert f"length and rm|{np.mean(r):+.2f} correlation" in "\n".join(map("|".join, found.lines()))


def test_what_an_engine_does_not_say(tmp_path):
    """Without tokens the length is that of the text; without finish nobody knows what was cut."""
    write(tmp_path, {"p": [Rollout("x" * n) for n in range(1, 7)]}, {"rm": [range(6)]})
    found = rollout_health(tmp_path)

    assert (found.cut, found.tokens_mean, found.score_length) == (None, None, {"rm": pytest.approx(1.0)})
    assert [text for label, text in found.lines() if label in ("cut", "tokens")] == ["not known", "not known"]


def test_the_share_cut_is_of_those_that_say(tmp_path):
    """Half of the rollouts say how they ended, half of them were cut: that is half, also of the prompt."""
    write(tmp_path, {"p": [Rollout(f"{i}", 3, [None, None, "stop", "length"][i % 4]) for i in range(8)]})

    assert rollout_health(tmp_path).cut == 0.5
    assert rollout_health(tmp_path).odd_prompts == {"mostly cut": 1}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from("abc "), min_size=1, max_size=8), min_size=1, max_size=6))
def test_many_prompts_in_a_file(tmp_path, texts):
    """Prompts next to each other in one file are told apart: the same text of two prompts is no repetition."""
    planned = [Planned(prompt_key(f"p{i}"), f"p{i}") for i in range(len(texts))]
    shard = new_shard(planned).add_rollouts(
        [[Rollout(text) for text in own] for own in texts], [[1] * len(own) for own in texts]
    )
    write_shard(tmp_path / "00000.parquet", shard)
    write_shard(tmp_path / "00001.parquet", new_shard([]))
    found, total = rollout_health(tmp_path), sum(map(len, texts))

    assert (found.prompts, found.rollouts) == (len(texts), total)
    assert found.repeated == pytest.approx(sum(len(own) - len({*own}) for own in texts) / total)
    assert found.empty == pytest.approx(sum(Counter(own)[" "] for own in texts) / total)


def test_the_worst_prompts_of_a_file(tmp_path):
    """Of three in one file the two that repeat themselves the most, the most first."""
    texts = {"a": "xxxxyz", "b": "xxxxxx", "c": "xxxxxz", "d": "uvwxyz"}
    shard = new_shard([Planned(prompt_key(name), name) for name in texts])
    write_shard(
        tmp_path / "0.parquet", shard.add_rollouts([[*map(Rollout, own)] for own in texts.values()], [[1] * 6] * 4)
    )
    found = rollout_health(tmp_path, most=2)

    assert found.odd_prompts == {"mostly repeated": 3}
    assert [(each.prompt, each.share) for each in found.odd] == [("'b'", 5 / 6), ("'c'", 4 / 6)]
