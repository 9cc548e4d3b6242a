"""Shards on disk: what was kept comes back, and a file that is none of ours is refused."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.rollouts.shard import Planned, Shard, empty
from calibrated_rewards.rollouts.shard_files import (
    read_prompts,
    read_shard,
    replacing,
    state_of,
    write_prompts,
    write_shard,
)
from calibrated_rewards.samplers.protocol import Rollout

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
chats = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), min_size=1)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
finishes = st.sampled_from([None, "stop", "length"])
rollouts = st.builds(Rollout, texts | chats, st.none() | st.integers(0, 2**20), finishes, st.none() | numbers)
planned = (texts | chats).map(
    lambda prompt: Planned(prompt_key(prompt), prompt, None if len(prompt) % 2 else "rendered")
)
prompts = st.lists(planned, min_size=1, max_size=4, unique_by=lambda prompt: prompt.key)


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    """Shards of any progress: rollouts with and without a seed, some of them scored by some reward models."""
    given = draw(prompts)
    drawn = [draw(st.lists(rollouts, max_size=4)) for _ in given]
    seeds = [[draw(st.none() | st.integers(0, 2**63 - 1)) for _ in own] for own in drawn]
    shard = empty(given).drawn(drawn, seeds)
    for name in draw(st.sets(st.sampled_from(["reward", "safe"]))):
        counts = [draw(st.integers(0, len(own))) for own in drawn]
        scores = [np.array(draw(st.lists(numbers, min_size=n, max_size=n)), np.float32) for n in counts]
        shard = shard.scored(name, scores)
    return shard


@settings(max_examples=40, deadline=None)
@given(shards())
def test_a_shard_comes_back_from_its_file(shard):
    """Prompts, rollouts, seeds and scores, whatever has been done of them; and its state, without reading them."""
    with TemporaryDirectory() as folder:
        write_shard(Path(folder, "rollouts", "0.parquet"), shard)
        write_prompts(Path(folder, "0.parquet"), shard.prompts)
        back = read_shard(Path(folder, "rollouts", "0.parquet"), read_prompts(Path(folder, "0.parquet")))
        assert state_of(Path(folder, "rollouts", "0.parquet")) == shard.state
    assert (back.prompts, back.rollouts, back.seeds) == (shard.prompts, shard.rollouts, shard.seeds)
    assert back.scores.keys() == shard.scores.keys()
    for name, scores in shard.scores.items():
        assert [a.tolist() for a in back.scores[name]] == [a.tolist() for a in scores]


def test_rollouts_are_a_table_that_anybody_reads(tmp_path):
    """pandas sees a row a rollout, with the issue's columns, and null where a score is missing."""
    chat = [{"role": "user", "content": "Hi"}]
    shard = empty([Planned(prompt_key("2+2="), "2+2="), Planned(prompt_key(chat), chat)])
    drawn = [[Rollout("4", 2, "stop", -0.5), Rollout("5", 9, "length")], [Rollout("Hello")]]
    shard = shard.drawn(drawn, [[1, 2], [3]])
    write_shard(tmp_path / "0.parquet", shard.scored("reward", [*np.float32([[1.5], [2]])]))
    frame = pandas.read_parquet(tmp_path / "0.parquet")
    assert frame.completion.tolist() == ["4", "5", "Hello"]
    assert frame.key.tolist() == [prompt_key("2+2=")] * 2 + [prompt_key(chat)]
    assert frame.prompt.tolist() == ["2+2=", "2+2=", '[{"role": "user", "content": "Hi"}]']
    assert frame.chat.tolist() == [False, False, True]
    assert frame.number.tolist() == [0, 1, 0]
    assert frame.seed.tolist() == [1, 2, 3]
    assert frame.finish.tolist()[:2] == ["stop", "length"]
    assert frame["score:reward"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("what", ["text", "parquet", "other prompts"])
def test_a_file_that_is_not_the_shard_is_refused_by_name(tmp_path, what):
    """Cut short, of another program, or with rollouts of other prompts: the error says which file to look at."""
    planned, path = [Planned(prompt_key("Hi"), "Hi")], tmp_path / "00000.parquet"
    if what == "text":
        path.write_text("PAR1 not really")
    elif what == "parquet":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        write_shard(path, empty(planned * 2).drawn([[Rollout("a")], []], [[1], []]))
    with pytest.raises(ValueError, match=r"00000\.parquet must"):
        read_shard(path, planned)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """A write that fails leaves the old file, and nothing beside it."""
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write(3)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
