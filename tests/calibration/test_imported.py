"""Rollouts made elsewhere come in whole, each prompt once, whatever the shape that they have; errors say where."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from calibrated_rewards.calibration.importing import Imported, read_rollouts
from calibrated_rewards.calibration.shards import Planned, Shard, write_shard
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import Rollout

ANSWER = {"role": "assistant", "content": "4"}
words = st.text(st.characters(codec="utf-8"), max_size=8)
prompts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
rollouts = st.builds(
    Rollout,
    words,
    st.none() | st.integers(0, 2**31 - 1),
    st.sampled_from(["stop", "length", None]),
    st.none() | st.floats(-1e6, 0),
)
scored = st.lists(st.tuples(rollouts, st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=4)
tables = st.dictionaries(prompts, scored, min_size=1, max_size=4)


def wide(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "completions": [rollout.completion for rollout, _ in own],
            "tokens": [rollout.tokens for rollout, _ in own],
            "finish_reason": [rollout.finish for rollout, _ in own],
            "logprob": [rollout.logprob for rollout, _ in own],
            "reward": [score for _, score in own],
        }
        for prompt, own in table.items()
    ]


def long(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, **rollout._asdict(), "reward": score}
        for prompt, own in table.items()
        for rollout, score in own
    ]


def engine(table: dict[str, Any]) -> list[dict[str, Any]]:
    """As vLLM tells it: outputs that say themselves how they ended."""
    return [
        {
            "prompt": prompt,
            "outputs": [
                {"text": r.completion, "tokens": r.tokens, "finish_reason": r.finish, "cumulative_logprob": r.logprob}
                for r, _ in own
            ],
            "reward": [score for _, score in own],
        }
        for prompt, own in table.items()
    ]


def lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def parquet(path: Path, values: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(values), path)
    return path


def read(found: Iterator[Imported]) -> dict[Any, Any]:
    """What came, by prompt; each prompt once."""
    table: dict[Any, Any] = {}
    for prompt, _, rollouts, scores in found:
        assert prompt not in table
        assert {name: each.dtype for name, each in scores.items()} == dict.fromkeys(scores, np.float32)
        table[prompt] = [*zip(rollouts, *(each.tolist() for each in scores.values()), strict=True)]
    return table


@settings(max_examples=20)
@given(tables, st.randoms(use_true_random=False))
def test_every_shape_gives_the_same_rollouts(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any], chance: random.Random
) -> None:
    """A row a prompt and a row a completion, from files, frames and iterables, hold the same."""
    path = tmp_path_factory.mktemp("imported")
    sources = [
        wide(table),
        (row for row in wide(table)),
        lines(path / "wide.jsonl", wide(table)),
        parquet(path / "wide.parquet", wide(table)),
        pandas.read_parquet(path / "wide.parquet"),
        long(table),
        iter(long(table)),
        lines(path / "long.jsonl", long(table)),
        parquet(path / "long.parquet", long(table)),
    ]
    for source in sources:
        assert read(read_rollouts(source, scores="reward")) == table
    assert read(read_rollouts(lines(path / "a.jsonl", engine(table)), completions="outputs", scores="reward")) == table

    shuffled = long(table)
    chance.shuffle(shuffled)
    found = read(read_rollouts(shuffled, scores={"helpful": "reward"}))
    assert {prompt: sorted(own, key=repr) for prompt, own in found.items()} == {
        prompt: sorted(own, key=repr) for prompt, own in table.items()
    }


@settings(max_examples=20)
@given(tables)
def test_what_this_library_wrote_is_read(tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any]) -> None:
    """A run's own files of rollouts: every score by its name, messages as messages, and texts that look like JSON."""
    path = tmp_path_factory.mktemp("own")
    chat = [{"role": "user", "content": "2+2="}]
    spoken = [(Rollout([ANSWER]), 0.5), (Rollout("[]"), 1.5)]
    everything = [*table.items(), (chat, spoken)]
    shard = Shard(
        tuple(Planned(prompt_key(prompt), prompt) for prompt, _ in everything),
        tuple(tuple(rollout for rollout, _ in own) for _, own in everything),
        tuple((None,) * len(own) for _, own in everything),
        {
            "a": tuple(np.array([score for _, score in own], np.float32) for _, own in everything),
            "b:c": tuple(np.arange(len(own), dtype=np.float32) for _, own in everything),
        },
    )
    write_shard(path / "00000.parquet", shard)

    *texts, messages = read_rollouts(path)
    assert read(iter(texts)) == {prompt: [(*each, i) for i, each in enumerate(own)] for prompt, own in table.items()}
    assert [*texts[0].scores] == ["a", "b:c"]
    assert (messages.prompt, messages.rollouts) == (chat, [rollout for rollout, _ in spoken])
    assert [each.prompt for each in read_rollouts(path, scores={})] == [prompt for prompt, _ in everything]


FORMS: list[tuple[Any, Rollout]] = [
    ("4", Rollout("4")),
    ("", Rollout("")),
    ([ANSWER], Rollout([ANSWER])),
    (({**ANSWER, "name": None},), Rollout([ANSWER])),
    (np.array([ANSWER], dtype=object), Rollout([ANSWER])),
    (ANSWER, Rollout([ANSWER])),
    ({**ANSWER, "finish_reason": "stop"}, Rollout([ANSWER], None, "stop")),
    ({"text": "4", "finish_reason": "length", "tokens": 7}, Rollout("4", 7, "length")),
    ({"text": "", "token_ids": None, "finish_reason": None}, Rollout("")),
    ({"content": "4", "token_ids": [5, 2], "cumulative_logprob": -1.5}, Rollout("4", 2, None, -1.5)),
    ({"index": 0, "message": ANSWER, "finish_reason": "tool_calls"}, Rollout([ANSWER], None, "stop")),
    ({"text": "4", "finish_reason": {"type": "length", "length": 8}}, Rollout("4", None, "length")),
    ([{**ANSWER, "content": ""}, {"role": "tool", "content": "4"}, ANSWER],
     Rollout([{**ANSWER, "content": ""}, {"role": "tool", "content": "4"}, ANSWER])),
]  # fmt: skip


@pytest.mark.parametrize(("said", "rollout"), FORMS, ids=range(len(FORMS)))
def test_a_completion_has_many_forms(said: Any, rollout: Rollout) -> None:
    """The same rollout alone in its row, and in a list of two; but messages of a list are one completion."""
    [alone] = read_rollouts([{"prompt": "2+2=", "completion": said}])
    assert alone.rollouts == [rollout]
    if not (isinstance(said, dict) and "role" in said):
        [both] = read_rollouts([{"prompt": "2+2=", "completions": [said, said]}])
        assert (both.rollouts, both.scores) == ([rollout, rollout], {})


def test_numbers_may_be_texts_and_columns_may_have_gaps(tmp_path: Path) -> None:
    """CSV has only texts; pandas makes floats of whole numbers beside a gap; what is missing is None."""
    (tmp_path / "a.csv").write_text("prompt,completion,r,tokens,finish\n2+2=,4,1.5,7,stop\n2+2=,5,-2,,\n")
    frame = pandas.DataFrame(
        {
            "prompt": ["2+2="] * 2,
            "completion": ["4", "5"],
            "r": [1.5, -2],
            "tokens": [7, None],
            "finish": ["stop", None],
        }
    )
    for source in (tmp_path / "a.csv", frame):
        [found] = read_rollouts(source, scores="r")
        assert found.rollouts == [Rollout("4", 7, "stop"), Rollout("5")]
        assert found.scores["r"].tolist() == [1.5, -2.0]


def test_columns_have_the_names_that_are_given() -> None:
    """As OpenRLHF and others name them; the id is that of the prompt, and may be missing in some of its rows."""
    rows = [
        {"input": "2+2=", "output": "4", "reward": True, "n": 7},
        {"input": "2+2=", "output": "5", "reward": 0, "n": 7},
    ]
    [found] = read_rollouts(rows, prompt="input", completions="output", scores={"r": "reward"}, id_column="n")
    assert (found.prompt, found.id, found.scores["r"].tolist()) == ("2+2=", 7, [1.0, 0.0])

    [found] = read_rollouts(
        [{"prompt": "Hi", "completion": "a"}, {"prompt": "Hi", "completion": "b", "prompt_id": "x"}]
    )
    assert (found.id, len(found.rollouts)) == ("x", 2)


def test_a_completion_knows_itself_better_than_columns_do() -> None:
    """What stands within it goes before the column; what does not is taken from there."""
    [found] = read_rollouts([row(completion={"text": "4", "tokens": 3}, tokens=9, finish="stop")])
    assert found.rollouts == [Rollout("4", 3, "stop")]


class Counted:
    """Rows that can be read again, and how many of them have been."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.read += 1
            yield row


def test_a_prompt_is_given_with_its_last_row() -> None:
    """Not one row later: what waits in memory are the prompts whose rows have not all been read."""
    rows = Counted([{"prompt": prompt, "completion": f"{i}"} for i, prompt in enumerate("aabacc")])
    found = [(each.prompt, len(each.rollouts), rows.read - 6) for each in read_rollouts(rows)]

    assert found == [("b", 1, 3), ("a", 3, 4), ("c", 2, 6)]


def test_rows_of_one_prompt_in_both_shapes_and_forms_are_one() -> None:
    """The key decides: the same messages written in another way are the same prompt."""
    one, other = ([{"role": "user", "content": "Hi", "name": None}], [{"content": "Hi", "role": "user"}])
    [found] = read_rollouts([{"prompt": one, "completions": ["a", "b"]}, {"prompt": other, "completion": "c"}])
    assert [rollout.completion for rollout in found.rollouts] == ["a", "b", "c"]


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": "2+2=", **columns}


REFUSED: list[tuple[list[Any], type[Exception], str]] = [
    ([row(completions=["4", "5"], s=[1.0])], ValueError, "'2[+]2=' has 2 completions, and as many of 's', got 1"),
    ([row(completions=["4"], s=1.0)], TypeError, "has a list of completions, and of 's', got 1.0"),
    ([row(completion="4", s=[1.0])], TypeError, r"a score is a number, got \[1.0\]"),
    ([row(completion="4", s="good")], TypeError, "row 0, prompt '2[+]2=': a score is a number, got 'good'"),
    ([row(completion="4", s=None)], ValueError, "'s' of completion 0 is None"),
    ([row(completions=["4", "5"], s=[1.0, float("nan")])], ValueError, "number, 's' of completion 1 is nan"),
    ([row(completion="4", s=float("inf"))], ValueError, "completion 0 is inf"),
    ([row(completion="4", s=1e39)], ValueError, r"completion 0 is 1e\+39"),
    ([row(completion="4")], ValueError, "has no column 's', it has prompt, completion"),
    ([row(completions=[], s=[])], ValueError, "row 0, prompt '2[+]2=' needs a completion, got none"),
    ([row(completion=None, s=1)], TypeError, "needs completions, texts or messages, got None"),
    ([row(completions=["4", None], s=[1, 2])], TypeError, "a completion is a text or a list of messages, got None"),
    ([row(completions=[[]], s=[1])], TypeError, r"a completion is a text or a list of messages, got \[\]"),
    ([row(completions=[{"index": 0}], s=[1])], TypeError, "a completion is a text or a list of messages, got None"),
    ([row(completions=[ANSWER, ANSWER], s=[1, 2])], ValueError, "the assistant speaks twice on end"),
    ([row(completion="4", s=1, tokens=-1)], ValueError, "a count of tokens is a whole number >= 0, got -1"),
    ([row(completion="4", s=1, tokens=1.5)], ValueError, "a count of tokens is a whole number >= 0, got 1.5"),
    ([row(completion="4", s=1, finish="abort")], ValueError, "broken off otherwise is no rollout, got finish 'abort'"),
    ([row(completion="4", s=1, logprob=-np.inf)], ValueError, "a sum of log-probabilities is finite, got -inf"),
    ([row(completions=["4"], s=[1], tokens=[1, 2])], ValueError, "has 1 completions, and as many of 'tokens', got 2"),
    ([{"prompt": "", "completion": "4", "s": 1}], ValueError, "row 0: a prompt says something"),
    ([row(s=1)], ValueError, "has no column 'completions', it has prompt, s"),
    (["4"], TypeError, "row 0 needs columns, a prompt and completions, got '4'"),
    ([row(completion="\ud83d", s=1)], ValueError, "a text has whole characters"),
    ([row(completion=[{"role": "assistant", "content": b"4"}], s=1)], TypeError, "kept as JSON, which has no bytes"),
    ([row(completion="4", s=1, prompt_id=i) for i in range(2)], ValueError, "row 1: a prompt has one id, .* got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "kind", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_rollout_is_told(rows: list[Any], kind: type[Exception], said: str) -> None:
    """Each error names the row and the prompt, the rule and what was there."""
    with pytest.raises(kind, match=said):
        [*read_rollouts(rows, scores="s")]


def test_scores_are_the_same_in_all_rows() -> None:
    """A reward model whose column is in some rows only would leave rollouts without a score."""
    rows = [row(completion="4", **{"score:a": 1.0}), row(completion="5", **{"score:b": 1.0})]
    with pytest.raises(ValueError, match=r"row 1: all rows have the same scores, \['a'\], got \['b'\]"):
        [*read_rollouts(rows)]


def test_a_source_that_changes_is_noticed(tmp_path: Path) -> None:
    """It is read twice: other rows the second time are an error, and a file that is missing is one at once."""

    class Fickle(Counted):
        def __iter__(self) -> Iterator[Any]:
            self.read += 1
            yield row(completion="4")
            if self.read == self.more:
                yield row(completion="5")

        more = 0

    for more in (1, 2):
        source = Fickle([])
        source.more = more
        with pytest.raises(ValueError, match="gave other rows when it was read again"):
            [*read_rollouts(source)]
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_rollouts(tmp_path / "rollouts.jsonl")
