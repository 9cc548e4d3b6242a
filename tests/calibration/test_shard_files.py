"""Shards on disk: what was kept comes back, and a file that is none of ours is refused."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from calibrated_rewards.calibration.shards import (
    Planned,
    Shard,
    count_rows,
    new_shard,
    read_keys,
    read_prompts,
    read_scores,
    read_shard,
    read_state,
    write_prompts,
    write_shard,
)
from calibrated_rewards.prompts import prompt_key
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
    shard = new_shard(given).add_rollouts(drawn, seeds)
    for name in draw(st.sets(st.sampled_from(["reward", "safe"]))):
        counts = [draw(st.integers(0, len(own))) for own in drawn]
        scores = [np.array(draw(st.lists(numbers, min_size=n, max_size=n)), np.float32) for n in counts]
        shard = shard.add_scores(name, scores)
    return shard


@settings(max_examples=40, deadline=None)
@given(shards())
def test_a_shard_comes_back_from_its_file(shard):
    """Prompts, rollouts, seeds and scores, whatever has been done of them; and its state, without reading them."""
    with TemporaryDirectory() as folder:
        write_shard(Path(folder, "rollouts", "0.parquet"), shard)
        write_prompts(Path(folder, "0.parquet"), shard.prompts)
        back = read_shard(Path(folder, "rollouts", "0.parquet"), read_prompts(Path(folder, "0.parquet")))
        assert read_state(Path(folder, "rollouts", "0.parquet")) == shard.state
    assert (back.prompts, back.rollouts, back.seeds) == (shard.prompts, shard.rollouts, shard.seeds)
    assert back.scores.keys() == shard.scores.keys()
    for name, scores in shard.scores.items():
        assert [a.tolist() for a in back.scores[name]] == [a.tolist() for a in scores]


def test_rollouts_are_a_table_that_anybody_reads(tmp_path):
    """pandas sees a row a rollout, with the issue's columns, and null where a score is missing."""
    chat = [{"role": "user", "content": "Hi"}]
    shard = new_shard([Planned(prompt_key("2+2="), "2+2="), Planned(prompt_key(chat), chat)])
    drawn = [[Rollout("4", 2, "stop", -0.5), Rollout("5", 9, "length")], [Rollout("Hello")]]
    shard = shard.add_rollouts(drawn, [[1, 2], [3]])
    write_shard(tmp_path / "0.parquet", shard.add_scores("reward", [*np.float32([[1.5], [2]])]))
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
        write_shard(path, new_shard(planned * 2).add_rollouts([[Rollout("a")], []], [[1], []]))
    with pytest.raises(ValueError, match=r"00000\.parquet must"):
        read_shard(path, planned)


def kept_files(folder: Path) -> list[Path]:
    """A shard's two files, with chats, ids' worth of texts and scores."""
    chat = [{"role": "user", "content": "Grüße " * 5}]
    given = [Planned(prompt_key("p"), "p", "rendered"), Planned(prompt_key(chat), chat)]
    rollouts = [[Rollout(f"é {i}", i, "stop", -1.0) for i in range(5)], [Rollout(chat, 3)] * 3]
    shard = new_shard(given).add_rollouts(rollouts, [[*range(len(own))] for own in rollouts])
    shard = shard.add_scores("reward", [np.arange(5, dtype=np.float32), np.zeros(3, np.float32)])
    write_prompts(folder / "prompts.parquet", given)
    write_shard(folder / "rollouts.parquet", shard)
    return [folder / "prompts.parquet", folder / "rollouts.parquet"]


def read_all(folder: Path) -> str:
    """All that is read of them."""
    prompts = read_prompts(folder / "prompts.parquet")
    own = read_scores(folder / "rollouts.parquet", prompts, "reward")
    shard = read_shard(folder / "rollouts.parquet", prompts)
    keys, rows = read_keys(folder / "prompts.parquet"), count_rows(folder / "prompts.parquet")
    return repr((prompts, shard, [x.tolist() for x in own], read_state(folder / "rollouts.parquet"), keys, rows))


@pytest.mark.parametrize("which", [0, 1], ids=["prompts", "rollouts"])
def test_damage_names_the_file(tmp_path: Path, which: int) -> None:
    """A bit that flips anywhere, or an end that is missing: an error with the file's name, or nothing but itself."""
    file = kept_files(tmp_path)[which]
    whole, before = file.read_bytes(), read_all(tmp_path)
    rng = np.random.default_rng(which)
    named = 0
    for place in rng.integers(0, len(whole), 150).tolist():
        bent = bytearray(whole)
        bent[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(bent))
        try:
            assert len(read_all(tmp_path)) > 0
        except ValueError as error:
            named += 1
            assert str(tmp_path) in str(error)  # noqa: PT017 (most flips raise, and some are in text that nobody reads)
    assert named > 50
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=file.name):
            read_all(tmp_path)
    file.write_bytes(whole)
    assert read_all(tmp_path) == before


def test_a_state_that_does_not_fit_its_rows_names_the_file(tmp_path: Path) -> None:
    """The text that says how far a shard is has no checksum of its own in the file."""
    file = kept_files(tmp_path)[1]
    table = pq.read_table(file)
    for said in ('{"drawn":[5,9],"scored":{}}', '{"drawn":[5,3],"scored":{"reward":[6,2]}}', "[]", "{}"):
        pq.write_table(table.replace_schema_metadata({b"calibrated-rewards shard": said.encode()}), file)
        with pytest.raises(ValueError, match=r"rollouts\.parquet"):
            read_state(file)


FULL = """
import resource, signal, sys
from pathlib import Path
from calibrated_rewards.files import replace_file
from calibrated_rewards.table.reference_table import ReferenceTable
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
def fill():
    with replace_file(folder / "00000.parquet") as file:
        file.write(b"x" * 100_000)
for write in fill, lambda: ReferenceTable.build([("p", [0.0] * 5000)], path=folder / "table"):
    try:
        write()
    except OSError as error:
        print(error)
print(sorted(file.name for file in folder.rglob("*") if file.is_file()))
"""


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """The system's error has no name in it; and what was begun is removed."""
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    shard, table, left = run.stdout.splitlines()
    assert str(tmp_path / "00000.parquet") in shard
    assert str(tmp_path / "table") in table
    assert "File too large" in shard
    assert left == "[]"
