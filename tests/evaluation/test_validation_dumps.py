"""Validation dumps of verl and TRL, written as these write them, are read by step and prompt; errors name the place."""

import inspect
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from calibrated_rewards.cli.main import main
from calibrated_rewards.evaluation import read_dump


def write_verl(folder: Path, step: int, rows: list[tuple[str, float]], **extra: list[Any]) -> None:
    """Write a step as verl's `_dump_generations` does: one object a line, fields in its order."""
    folder.mkdir(exist_ok=True)
    columns = {
        "input": [prompt for prompt, _ in rows],
        "output": [f"answer {i}" for i in range(len(rows))],
        "gts": ["7"] * len(rows),
        "score": [score for _, score in rows],
        "step": [step] * len(rows),
        **extra,
    }
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    (folder / f"{step}.jsonl").write_text("\n".join(lines) + "\n")


def write_trl(folder: Path, step: int, prompts: list[Any], rewards: dict[str, list[float]]) -> None:
    """Write a step as TRL's GRPO and RLOO trainers do: a DataFrame to Parquet."""
    folder.mkdir(exist_ok=True)
    n = len(prompts)
    table = {"step": [step] * n, "prompt": prompts, "completion": ["a"] * n, **rewards, "advantage": [0.0] * n}
    pd.DataFrame(table).to_parquet(folder / f"completions_{step:05d}.parquet")


def scores(step: Any) -> list[list[float]]:
    return [row.tolist() for row in step.scores.judge]


def test_verl(tmp_path: Path) -> None:
    """Completions of a prompt need not stand together; steps come in their order; another field may be read."""
    rows = [("1+1?", 0.0), ("2+2?", 1.0), ("1+1?", 1.0), ("2+2?", 0.5)]
    write_verl(tmp_path / "v", 40, rows, reward=[0.0, 1.0, 1.0, 0.5], acc=[False, True, True, False])
    write_verl(tmp_path / "v", 5, rows[:2])
    steps = read_dump(tmp_path / "v")
    assert [*steps] == [5, 40]
    assert steps[40].prompts == ("1+1?", "2+2?")
    assert scores(steps[40]) == [[0.0, 1.0], [1.0, 0.5]]
    assert (steps[40].binary, steps[5].binary, steps[40].fewest) == (False, True, 2)
    assert scores(read_dump(tmp_path / "v" / "40.jsonl", score="acc")[40]) == [[0.0, 1.0], [1.0, 0.0]]


def test_trl(tmp_path: Path) -> None:
    """Prompts are texts or messages; the only reward is found, one of several is chosen."""
    chat = [[{"role": "user", "content": text}] for text in ("hi", "ho", "hi", "ho")]
    write_trl(tmp_path / "c", 10, chat, {"accuracy_reward": [0.0, 1.0, 1.0, 1.0]})
    found = read_dump(tmp_path / "c")[10]
    assert found.prompts == (chat[0], chat[1])
    assert scores(found) == [[0.0, 1.0], [1.0, 1.0]]
    write_trl(tmp_path / "two", 10, ["a", "a"], {"accuracy": [0.0, 1.0], "format": [0.5, 0.25]})
    assert scores(read_dump(tmp_path / "two", "trl", score="format")[10]) == [[0.5, 0.25]]
    with pytest.raises(ValueError, match=r"00010.parquet, row 1 needs one field .* score=; got accuracy, format"):
        read_dump(tmp_path / "two")


def test_trl_still_writes_these_columns() -> None:
    """The names of columns and files are those in the trainer's source."""
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer.log)
    for name in ('"step"', '"prompt"', '"completion"', '"advantage"', '"completions"', "completions_{"):
        assert name in source


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"1.jsonl, line 2 needs a JSON object, got '\{not json'"),
        ("[1]", r"line 2 needs a JSON object, got '\[1\]'"),
        ('{"input": "a", "step": 1}', "line 2 needs a field 'score', got 'input', 'step'"),
        ('{"score": 1, "step": 1}', "line 2 needs a field 'input'"),
        ('{"input": "a", "score": NaN, "step": 1}', "line 2 needs a finite number as score, got score=nan"),
        ('{"input": "a", "score": "1", "step": 1}', "line 2 needs a finite number as score, got score='1'"),
        ('{"input": "a", "score": 1, "step": "x"}', "line 2 needs a whole number as step, got step='x'"),
        (
            '{"input": null, "score": 1, "step": 1}',
            "line 2 needs a text or a list of messages as input, got input=None",
        ),
        (
            '{"input": "a", "score": 1%s, "step": 1}' % ("0" * 400),
            r"line 2 needs a finite number as score, got score=10+\.$",
        ),
        (
            '{"input": "a", "score": 1%s, "step": 1}' % ("0" * 5000),
            "line 2 needs a JSON object, .* value has 5001 digits",
        ),
        ("[" * 100_000, r"line 2 needs a JSON object, got '\[+': maximum recursion depth"),
        ('{"input": "caf\udce9"}', "line 2 needs a JSON object, got .*: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    """File, line, field and value."""
    content = '{"input": "a", "score": 1, "step": 1}\n' + line + "\n"
    (tmp_path / "1.jsonl").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_dump(tmp_path)


def test_byte_order_marks_and_empty_lines(tmp_path: Path) -> None:
    """A file of Windows, or two of them joined, is read; a line separator inside a text ends no line."""
    line = '{"input": "a\u2028b", "score": 1, "step": 1}\r\n'
    (tmp_path / "1.jsonl").write_text(f"\ufeff{line}\r\n  \n\ufeff{line}\ufeff\n", newline="")
    step = read_dump(tmp_path)[1]
    assert (step.prompts, scores(step)) == (("a\u2028b",), [[1.0, 1.0]])


def test_prompts_of_a_parquet_file_are_texts_or_messages(tmp_path: Path) -> None:
    """Bytes, numbers and gaps are named by their row, also inside messages; so is a file that is cut or damaged."""
    for prompt, shown in [(b"a", "b'a'"), (3, "3"), (None, "None"), ([{"role": b"user"}], r"\[\{'role': b'user'\}\]")]:
        write_trl(tmp_path, 1, [prompt] * 2, {"r": [0.0, 1.0]})
        message = f"00001.parquet, row 1 needs a text or a list of messages as prompt, got prompt={shown}"
        with pytest.raises(ValueError, match=message):
            read_dump(tmp_path, score="r")
    file = tmp_path / "completions_00001.parquet"
    write_trl(tmp_path, 1, ["text" * 9] * 2, {"r": [0.0, 1.0]})
    pd.read_parquet(file).to_parquet(file, compression=None)
    whole = file.read_bytes()
    assert b"text" * 9 in whole
    for content in (whole.replace(b"text" * 9, b"\xff" * 36), whole[:4] + bytes(64) + whole[68:], whole[:-20]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"00001\.parquet needs to be a Parquet file, got"):
            read_dump(tmp_path)


def test_files_that_are_no_dump(tmp_path: Path) -> None:
    """Nothing there, both kinds, neither kind, no completion, no Parquet."""
    with pytest.raises(ValueError, match="which does not exist"):
        read_dump(tmp_path / "none")
    with pytest.raises(ValueError, match="got none in"):
        read_dump(tmp_path)
    (tmp_path / "1.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="a completion or more, got none"):
        read_dump(tmp_path)
    (tmp_path / "1.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"got .jsonl and .parquet"):
        read_dump(tmp_path)
    with pytest.raises(ValueError, match=r"1.parquet needs to be a Parquet file"):
        read_dump(tmp_path, "trl")
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(ValueError, match=r"a dump has .parquet files, got .jsonl in"):
        read_dump(tmp_path, "trl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of verl#7240: of 1 correct in 4 best@4 is 1, where a bootstrap with replacement says .684."""
    write_verl(tmp_path / "v", 0, [(p, s) for p in "ab" for s in (0.0, 0.0, 0.0, 0.0)])
    write_verl(tmp_path / "v", 20, [(p, s) for p in "ab" for s in (0.0, 1.0, 0.0, 0.0)])
    assert main(["best-at-n", str(tmp_path / "v"), "--n", "1", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Step 20: best@4 = pass@4 is 1.000, from 2 prompts with 4 completions or more")
    assert lines[0].endswith("a bootstrap with replacement says 0.684, 0.316 too low.")
    assert lines[2].split() == ["step", "N", "best@N", "=", "pass@N", "worst@N", "bootstrap", "best@N"]
    assert [line.split()[:3] for line in lines[3:]] == [
        ["0", "1", "0.000"],
        ["0", "4", "0.000"],
        ["20", "1", "0.250"],
        ["20", "4", "1.000"],
    ]


def test_each_n_is_reported_once_from_the_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In whatever order they are named; the verdict is of the largest."""
    write_verl(tmp_path / "v", 20, [(p, s) for p in "ab" for s in (0.0, 1.0, 0.0, 0.0)])
    printed = []
    for words in (["1", "4"], ["4", "1"], ["4", "1", "1", "4"]):
        assert main(["best-at-n", str(tmp_path / "v"), "--n", *words]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert printed[0].startswith("Step 20: best@4 = pass@4 is 1.000")


def test_intervals_end_where_scores_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 0/1 scores all within [0, 1] and reached; of other scores pass@N alone, in a column of its own."""
    solved = [(str(p), float(p > 0 or i == 3)) for p in range(5) for i in range(4)]
    write_verl(tmp_path / "v", 0, solved)
    names = ("best", "worst", "pass")

    def read_intervals(*words: str) -> list[dict[str, float]]:
        assert main(["best-at-n", str(tmp_path / "v"), "--n", "1", "2", *words, "--json"]) == 0
        return [row[name] for row in json.loads(capsys.readouterr().out)["rows"] for name in names]

    binary = read_intervals()
    assert all(0.0 <= each["low"] <= each["value"] <= each["high"] <= 1.0 for each in binary)
    assert max(each["high"] for each in binary) == 1.0
    assert [binary[0], binary[3]] == [binary[2], binary[5]]
    write_verl(tmp_path / "v", 0, [(prompt, 3 * score) for prompt, score in solved])
    scaled = read_intervals("--threshold", "3")
    assert scaled[0]["high"] > 3.0  # no bound is known
    assert [scaled[2][end] for end in ("value", "low", "high")] == pytest.approx(
        [binary[2][end] for end in ("value", "low", "high")]
    )
    assert main(["best-at-n", str(tmp_path / "v"), "--threshold", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == [
        "step",
        "N",
        "best@N",
        "worst@N",
        "pass@N",
        "bootstrap",
        "best@N",
    ]


def test_the_command_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores that are no 0/1 have a pass@N by the threshold alone; N default to powers of 2 and all completions."""
    write_trl(tmp_path / "c", 3, ["a", "b"] * 6, {"rm": [0.1 * i for i in range(12)]})
    assert main(["best-at-n", str(tmp_path / "c"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["n"] for row in rows] == [1, 2, 4, 6]
    assert all("pass" not in row for row in rows)
    assert rows[-1]["best"]["value"] == pytest.approx((1.0 + 1.1) / 2)
    assert rows[0]["worst"]["value"] == pytest.approx(0.55)
    assert main(["best-at-n", str(tmp_path / "c"), "--n", "2", "--threshold", "0.75", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["pass"]["value"] == pytest.approx(1 - 6 / 15)  # 4 of 6 fail for both prompts


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too few completions name the step and the prompt; a choice of rewards names the option."""
    write_verl(tmp_path / "v", 7, [("a", 1.0), ("a", 0.0), ("short", 1.0)])
    assert main(["best-at-n", str(tmp_path / "v"), "--n", "2"]) == 2
    assert "--n 2 needs as many completions of each prompt, got 1 at step 7 of 'short'" in capsys.readouterr().err
    write_trl(tmp_path / "c", 3, ["a"], {"one": [0.1], "two": [0.2]})
    assert main(["best-at-n", str(tmp_path / "c")]) == 2
    assert "a choice by --score FIELD; got one, two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["best-at-n", str(tmp_path / "c"), "--threshold", "nan"])
