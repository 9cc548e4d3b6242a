"""Prompts are the same from every source, TRL's own where TRL makes them, and errors say where."""

import csv
import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from calibrated_rewards.calibration.shards import Planned, write_prompts
from calibrated_rewards.calibration.sources import Asked, prompts_from, read_rows
from calibrated_rewards.prompts import prompt_key

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
spoken = st.text(st.characters(codec="utf-8"), max_size=12).filter(str.strip)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": spoken}, optional={"name": spoken}
)
chats = st.lists(messages, min_size=1, max_size=3)
rows_of_one_kind = st.one_of(
    *(
        st.lists(st.fixed_dictionaries({"prompt": prompt, "prompt_id": st.integers(0, 2**40)}), min_size=1, max_size=4)
        for prompt in (spoken, chats)
    )
)


def lines(path: Path, values: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return path


def parquet(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(values), path)
    return path


def packed(path: Path, values: list[Any]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(value) + "\n" for value in values).encode()))
    return path


def folder(path: Path, values: list[Any]) -> Path:
    for i, value in enumerate(values):
        parquet(path / f"{i:05d}.parquet", [value])
    return path


def whole(path: Path, values: list[Any]) -> Path:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def saved(path: Path, values: list[Any]) -> Path:
    datasets.Dataset.from_list(values).save_to_disk(path)
    return path


WRITTEN: dict[str, Callable[[Path, list[Any]], Any]] = {
    "a.jsonl": lines,
    "b.json": lines,
    "c.json": whole,
    "d.jsonl.gz": packed,
    "e.parquet": parquet,
    "f": folder,
    "g": saved,
    "dataset": lambda _, values: datasets.Dataset.from_list(values),
    "torch dataset": lambda _, values: datasets.Dataset.from_list(values).with_format("torch"),
    "stream": lambda _, values: datasets.Dataset.from_list(values).to_iterable_dataset(),
    "frame": lambda _, values: pandas.DataFrame(values),
    "frame of arrays": lambda path, values: pandas.read_parquet(parquet(path, values)),
    "rows": lambda _, values: values,
    "asked": lambda _, values: (Asked(value["prompt"], value["prompt_id"]) for value in values),
}


@settings(max_examples=8)
@given(rows_of_one_kind)
def test_every_source_gives_the_same_prompts(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    """Texts, chats and ids come through files, folders, datasets, frames and iterables as they went in."""
    path = tmp_path_factory.mktemp("sources")
    expected = [Asked(value["prompt"], value["prompt_id"]) for value in values]

    for name, written in WRITTEN.items():
        assert [*prompts_from(written(path / name, values))] == expected, name


@settings(max_examples=30)
@given(st.lists(spoken, min_size=1, max_size=4))
def test_texts_come_through_lines_and_tables(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    """CSV keeps every text; a text file those without a line's end; whitespace and other separators are kept."""
    path = tmp_path_factory.mktemp("texts")
    with open(path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["n", "question"], *enumerate(texts)])
    in_lines = [text.replace("\n", " ").rstrip("\r") + "." for text in texts]
    (path / "b.txt").write_bytes("\r\n".join(in_lines).encode("utf-8-sig"))

    asked = [*prompts_from(path / "a.csv", column="question", id_column="n")]
    assert asked == [Asked(text, str(i)) for i, text in enumerate(texts)]
    assert [prompt for prompt, _ in prompts_from(str(path / "b.txt"))] == in_lines
    assert [prompt for prompt, _ in prompts_from(np.array(texts, dtype=object))] == texts


def trl_prompt(row: dict[str, Any]) -> Any:
    """What TRL makes of a row: its own function, and its own way to drop what Arrow adds."""
    from trl import maybe_extract_prompt
    from trl.trainer.utils import remove_none_values

    return remove_none_values(maybe_extract_prompt(row))["prompt"]


@settings(max_examples=20)
@given(st.lists(st.tuples(chats, chats, chats, st.sampled_from(["none", "text", "chat"])), min_size=1, max_size=4))
def test_preferences_have_the_prompt_that_trl_gives(drawn: list[Any]) -> None:
    """Common turns, one answer within the other, equal answers, and prompts beside them; with Arrow's None in place."""
    # A name in both columns of some row, so that Arrow gives both the same members.
    named = {**USER, "name": "bob"}
    pairs = [([*start, *one], [*start, *other], kind) for start, one, other, kind in drawn]
    pairs += [([named, ASSISTANT], [named, USER], kind) for _, _, kind in pairs]
    pairs += [(one, one, kind) for one, _, kind in pairs] + [(one, [*one, ASSISTANT], kind) for one, _, kind in pairs]
    for wanted in ("none", "text", "chat"):
        beside = {"none": {}, "text": {"prompt": "Hi"}, "chat": {"prompt": [named]}}[wanted]
        values = [{"chosen": one, "rejected": other, **beside} for one, other, kind in pairs if kind == wanted]
        filled = datasets.Dataset.from_list(values).to_list()
        kept = [(row, prompt) for row, prompt in zip(filled, map(trl_prompt, filled), strict=True) if prompt]

        asked = [*prompts_from([row for row, _ in kept])]
        assert [prompt for prompt, _ in asked] == [prompt for _, prompt in kept]


def test_texts_with_a_prompt_are_as_trl_has_them() -> None:
    """A text beside texts is the prompt; a text beside messages is not, which are UltraFeedback's rows."""
    explicit = {"prompt": "Q: a?", "chosen": " yes", "rejected": " no"}
    feedback = {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "Hm"}]}

    assert [prompt for prompt, _ in prompts_from([explicit, feedback])] == [trl_prompt(explicit), trl_prompt(feedback)]
    assert trl_prompt(feedback) == [USER]


def test_members_that_arrow_adds_to_one_column_part_no_turns() -> None:
    """Where chosen has names and rejected has none, TRL finds no common turn; the turns are the same all the same."""
    implicit = {"chosen": [{**USER, "name": None}, ASSISTANT], "rejected": [USER, USER]}

    assert [*prompts_from([implicit])] == [Asked([USER])]


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ([USER, ASSISTANT], [USER]),
        ([USER, ASSISTANT, USER, ASSISTANT], [USER, ASSISTANT, USER]),
        ([USER, ASSISTANT, USER], [USER, ASSISTANT, USER]),
        ([USER], [USER]),
    ],
)
def test_messages_are_asked_up_to_the_last_answer(said: list[Any], asked: list[Any]) -> None:
    """A chat that ends with the assistant's words loses them; one that waits for them is a prompt already."""
    assert [*prompts_from([{"messages": said}])] == [*prompts_from([{"x": 1, "messages": said}], column="messages")]
    assert [*prompts_from([{"messages": said}])] == [Asked(asked)]


def test_a_prompt_has_the_key_of_what_was_given() -> None:
    """What a source makes of messages changes no key: parts, objects, arrays and numpy's numbers."""
    call = {"function": {"name": "add", "arguments": {"b": np.int64(2), "a": np.float32(1.5)}}}
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": np.array([call], dtype=object)}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]
    [first, second, third] = [prompt for prompt, _ in prompts_from([chat, tuple(parts), [{"role": "system", **USER}]])]

    assert [prompt_key(first), prompt_key(second)] == [prompt_key(chat), prompt_key(parts)]
    assert json.loads(json.dumps([first, second, third])) == [first, second, third]
    # Arguments keep their order, which a template writes out.
    assert [*first[1]["tool_calls"][0]["function"]["arguments"]] == ["b", "a"]


def test_the_prompts_of_a_run_are_a_source(tmp_path: Path) -> None:
    """What calibrate wrote about its prompts can be asked again: messages are messages, and text is text."""
    prompts: list[Any] = ["Hi", "[1]", [USER, ASSISTANT, USER]]
    write_prompts(tmp_path / "prompts.parquet", [Planned(prompt_key(prompt), prompt) for prompt in prompts])

    assert [prompt for prompt, _ in prompts_from(tmp_path)] == prompts


UNUSABLE: list[tuple[Any, type[Exception], str]] = [
    (["Hi", ""], ValueError, r"^row 1: a prompt says something, got ''$"),
    ([" \n"], ValueError, "row 0: a prompt says something"),
    ([[]], ValueError, "row 0: a prompt says something"),
    ([[{"role": "user", "content": " "}, {"role": "user", "content": None}]], ValueError, "says something"),
    ([[{"role": "user", "content": [{"type": "text", "text": ""}, "\t"]}]], ValueError, "says something"),
    ([[{"role": "user", "content": [{"type": "text", "text": None}]}]], ValueError, "says something"),
    ([{"messages": [ASSISTANT]}], ValueError, "says something"),
    ([{"prompt": None}], TypeError, "row 0: a prompt is a text or a list of messages, got None"),
    ([{"prompt": 7}], TypeError, "got 7"),
    ([3.5], TypeError, "got 3.5"),
    ([("What is 2+2?", "4")], TypeError, r"Asked\(prompt, id\)"),
    ([["Hi", "Hello"]], TypeError, "a row is one prompt"),
    ([USER], ValueError, "a list of messages is one row"),
    ([[{"role": None, "content": "Hi"}]], TypeError, "row 0: message 0 needs a role"),
    ([{"prompt": [{"from": "human", "value": "Hi"}]}], ValueError, "trl.maybe_convert_to_chatml"),
    ([{"text": "Hi", "label": 1}], ValueError, "it has text, label: name the prompt's with column="),
    ([{"chosen": "Q: a? yes", "rejected": "Q: a? yellow"}], ValueError, "where texts stop to be prompt"),
    ([{"chosen": [USER], "rejected": "Hi"}], ValueError, "where texts stop to be prompt"),
    ([{"chosen": [USER], "rejected": [ASSISTANT]}], ValueError, "begin with the same turns"),
    ([[{"role": "user", "content": b"Hi"}]], TypeError, "rollouts are kept as JSON, which has no bytes"),
    ([[{"role": "user", "content": [{"type": "image", "image": np.zeros((2, 2))}]}]], TypeError, "no ndarray"),
    ([{"prompt": [USER], "images": [Image.new("L", (1, 1))]}], TypeError, "has no pictures, got column 'images'"),
    ([{"prompt": "Hi", "image": Image.new("L", (1, 1))}], TypeError, "has no pictures, got column 'image'"),
    ([[{"role": "user", "content": "Hi", "seen": float("nan")}]], ValueError, "row 0: message 0.seen has no canonical"),
    (["Hi \ud83d"], ValueError, "row 0: a text has whole characters"),
    ([{"prompt": "Hi", "prompt_id": 1.5}], TypeError, "row 0: a prompt id is a str or an int"),
    (pandas.DataFrame({"prompt": ["Hi", None]}), TypeError, "row 1: a prompt is a text or a list of messages, got nan"),
    ({"prompt": ["Hi"]}, TypeError, "a mapping is one row, .* got {'prompt'"),
    (b"Hi", TypeError, "bytes are no path.* got b'Hi'"),
    ({"Hi", "Hello"}, TypeError, "a set has no order"),
    (7, TypeError, "a source is a path, a dataset, a DataFrame or an iterable"),
    ("Tell me about Berlin.", FileNotFoundError, "is no file or folder with prompts, and no name on the Hub"),
    ("x" * 5000 + " ", FileNotFoundError, "is no file or folder with prompts, and no name on the Hub"),
    ("nowhere/prompts.jsonl", FileNotFoundError, "'nowhere/prompts.jsonl' is no file or folder with prompts"),
]


@pytest.mark.parametrize(("source", "kind", "said"), UNUSABLE, ids=[said[:30] for _, _, said in UNUSABLE])
def test_what_is_no_prompt_is_told(source: Any, kind: type[Exception], said: str) -> None:
    """Each error names the row, the rule and what was there."""
    with pytest.raises(kind, match=said):
        [*prompts_from(source)]


def test_columns_and_ids_must_be_there() -> None:
    """A column that a row lacks is an error with those that it has; so is an id that is missing."""
    values = [{"q": "Hi", "n": 1}, {"q": "Hello"}]
    for options, said in (
        ({"column": "question"}, "row 0 has no column 'question', it has q, n"),
        ({"column": "q", "id_column": "n"}, "row 1 has no column 'n', it has q"),
    ):
        with pytest.raises(ValueError, match=said):
            [*prompts_from(values, **options)]
    with pytest.raises(ValueError, match="row 0 needs an id in its column 'n', got nan"):
        [*prompts_from(pandas.DataFrame({"q": ["Hi"], "n": [np.nan]}), column="q", id_column="n")]
    with pytest.raises(TypeError, match="row 0 has no column 'q', it is 'Hi'"):
        [*prompts_from(["Hi"], column="q")]
    assert [*prompts_from([{"prompt": "Hi", "prompt_id": None, "image": None, "images": []}])] == [Asked("Hi")]


def test_broken_files_say_where(tmp_path: Path) -> None:
    """The file and its line or row: broken JSON, letters that are no UTF-8, a cut archive, a table that is none."""
    broken = {
        "a.jsonl": (b'{"prompt": "Hi"}\n\n{"prompt": "H\n', r"a.jsonl, line 3 is not JSON: Unterminated"),
        "b.json": (b'[{"prompt": "Hi"}, {]', r"b.json .* is not JSON"),
        "c.json": (b'[{"role": "user"}]\n[{"role": "user"}]', r"a file with a list a line is .jsonl"),
        "d.txt": (b"Hi\nH\xff\n", r"d.txt, line 2 is not UTF-8"),
        "e.txt": (b"Hi\n\nHello\n", r"e.txt, line 2: a prompt says something"),
        "f.jsonl.gz": (gzip.compress(b'{"prompt": "Hi"}\n' * 9)[:-12], r"f.jsonl.gz, after line \d+: no whole gzip"),
        "g.txt.gz": (b"Hi", r"g.txt.gz, after line 0: no whole gzip"),
        "h.parquet": (b"PAR1PAR1", r"h.parquet cannot be read as Parquet from row 0 on"),
        "i.csv": (b"prompt,n\nHi,1\nHello\n", r"i.csv, line 3 is no CSV in UTF-8: 2 values in the header"),
        "j.csv": (b'prompt,n\n"Hi,1\n', r"j.csv, line 1 is no CSV in UTF-8"),
        "k.xml": (b"<p>Hi</p>", r"a file of rows ends in .jsonl, .*, got .*k.xml"),
        "l.parquet.gz": (b"", r"a file of rows ends in"),
    }
    for name, (data, said) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=said):
            [*prompts_from(tmp_path / name)]
    parquet(tmp_path / "m.parquet", [{"prompt": "Hi"}] * 300 + [{"prompt": None}])
    with pytest.raises(TypeError, match=r"m.parquet, row 300: a prompt is a text"):
        [*prompts_from(tmp_path / "m.parquet")]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"a folder of rows has files that end in .*, got none in"):
        prompts_from(tmp_path / "folder")
    (tmp_path / "folder" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a run of calibrate has its prompts in .*folder.prompts"):
        prompts_from(tmp_path / "folder")


def test_a_folder_that_export_wrote_is_read_without_its_description(tmp_path: Path) -> None:
    """`export` writes export.json beside the rows; it is no row."""
    (tmp_path / "export.json").write_text('{\n  "prompts": 2\n}')
    (tmp_path / "train.jsonl").write_text('{"prompt": "Hi"}\n')
    assert [row.value for row in read_rows(tmp_path)] == [{"prompt": "Hi"}]


def test_splits_are_chosen_by_name(tmp_path: Path) -> None:
    """A set of two splits needs split=, in memory, saved or as files; one of one split does not; a file has none."""
    both = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train_sft", "test_sft")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    for name, split in both.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        split.to_parquet(tmp_path / "files" / f"{name}-00000-of-00001.parquet")

    for source in (datasets.DatasetDict(both), tmp_path / "saved", tmp_path / "files"):
        assert [*prompts_from(source, split="train_sft")] == [Asked("train_sft")]
        for wrong in (None, "validation"):
            with pytest.raises(
                ValueError,
                match=r"has the splits (train_sft, test|test_sft, train)_sft, name one of them",
            ):
                prompts_from(source, split=wrong)
    assert [*prompts_from(datasets.DatasetDict(test=both["test_sft"]))] == [Asked("test_sft")]
    for source in (lines(tmp_path / "a.jsonl", ["Hi"]), ["Hi"], both["test_sft"], folder(tmp_path / "f", [{"a": 1}])):
        with pytest.raises(ValueError, match="has no splits: leave out split=train"):
            prompts_from(source, split="train")


def test_names_on_the_hub_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, subset and split are passed on and streamed; a name that is not there either is said to be no file."""
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        if path == "no/where":
            raise datasets.exceptions.DatasetNotFoundError("doesn't exist")
        stream = datasets.Dataset.from_list([{"question": "Hi"}, {"question": ""}]).to_iterable_dataset()
        return stream if options["split"] else datasets.IterableDatasetDict(train=stream)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ("train", None):
        prompts = prompts_from("openai/gsm8k:main", column="question", split=split)
        assert next(prompts) == Asked("Hi")
        with pytest.raises(ValueError, match=r"^openai/gsm8k:main, row 1: a prompt says something"):
            next(prompts)
        assert asked.pop() == ("openai/gsm8k", {"name": "main", "split": split, "streaming": True})
    with pytest.raises(FileNotFoundError) as caught:
        prompts_from("no/where")
    assert caught.value.__notes__ == [
        "no/where is no file or folder here, so it was looked for on the Hub (owner/name:subset)"
    ]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    """The first prompts of an endless source, and of a file that is broken later on; a limit of none is an error."""
    endless = (f"prompt {i}" for i in count())
    assert [prompt for prompt, _ in prompts_from(endless, limit=2)] == ["prompt 0", "prompt 1"]
    assert next(endless) == "prompt 2"
    path = tmp_path / "a.jsonl"
    path.write_text('"Hi"\n"Hello"\n{')
    assert [*prompts_from(path, limit=2)] == [Asked("Hi"), Asked("Hello")]
    with pytest.raises(ValueError, match="prompts_from needs limit >= 1, got limit=0"):
        prompts_from(path, limit=0)


@pytest.mark.parametrize("written", [lines, parquet])
def test_memory_does_not_grow_with_the_source(written: Callable[[Path, list[Any]], Path], tmp_path: Path) -> None:
    """Five times the rows, and the same peak: one row, or one small batch, is held at a time."""

    def peak(n: int) -> int:
        path = written(
            tmp_path / f"{n}.{'jsonl' if written is lines else 'parquet'}",
            [{"prompt": f"{i} {'x' * 500}"} for i in range(n)],
        )
        tracemalloc.start()
        try:
            assert sum(1 for _ in prompts_from(path)) == n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is loaded once
    assert peak(1500) < 1.2 * peak(300)


def test_rows_need_no_arrow_and_no_datasets() -> None:
    """Lines and iterables are read where neither is installed: nothing of them is imported for those."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'datasets', 'pandas']));"
        "from calibrated_rewards.calibration.sources import prompts_from; print(next(prompts_from(['Hi'])))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "Asked(prompt='Hi', id=None)"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    """Files of several kinds, one after the other; what is hidden or of another kind is left."""
    lines(tmp_path / "b.jsonl", ["two"])
    parquet(tmp_path / "a.parquet", [{"prompt": "one"}])
    for name in (".hidden.jsonl", "README.md"):
        (tmp_path / name).write_text("no")

    found: Iterator[Any] = read_rows(tmp_path)
    assert [(Path(place.split(",")[0]).name, value) for place, value in found] == [
        ("a.parquet", {"prompt": "one"}),
        ("b.jsonl", "two"),
    ]
