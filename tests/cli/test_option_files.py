"""Options in YAML files: what is written is read as the same options, and what cannot be read is an error."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from calibrated_rewards.cli import train
from calibrated_rewards.cli.main import COMMANDS, load_command, main
from calibrated_rewards.cli.option_files import parse_options, write_config
from calibrated_rewards.training.launch import Launch

POLICY = ["--policy", "./sft", "--max-tokens", "64"]
# For each command options of every form: texts, numbers, flags and their opposites, lists, positional arguments.
WORDS: dict[str, list[str]] = {
    "demo": ["--quick", "--out", "demo"],
    "check-scorer": ["--reward-model", "./rm", "--option", "mark=<x>", "--option", "step_tokens=[3, 5]", "--no-cost"],
    "calibrate": [
        *POLICY,
        "-k",
        "8",
        "--stop",
        "\n\n",
        "--stop",
        "null",
        "--cost",
        "--reward-model",
        "a=./b=c",
        "--out",
        "t",
    ],
    "inspect": ["table/"],
    "recommend": ["run/", "--best-of", "1-16", "--kl", "0.4", "--judge", "j", "--estimator", "posterior"],
    "frontier": ["run/", "--kl", "0.5", "1e-1", "--best-of", "2", "4"],
    "reward": ["table/", "--reward-model", "./rm", "--transform", "best-of:4:1.0", "--out", "reward"],
    "export": ["run/", "--as", "sft", "--draws", "4", "--transform", "exp:5:0.5", "--out", "e", "--finished-only"],
    "evaluate": [
        *POLICY,
        "--policy",
        "raw=x",
        "--reference",
        "r",
        "--prompts",
        "p",
        "--out",
        "e",
        "-m",
        "4",
        "--no-kl",
    ],
    "generate": [*POLICY, "--prompts", "p", "--out", "a.jsonl", "--soft-best-of", "8:0.1", "--reward-model", "./rm"],
    "multiple-choice": ["--questions", "q", "--policy", "./sft", "--reward-model", "a=./rm", "--sum", "--limit", "3"],
    "best-at-n": ["dump/", "--n", "1", "4", "--threshold", "-0.5", "--json"],
    "report": ["experiment/"],
    "serve": ["reward/", "--port", "0", "--seconds", "2.5", "--insecure"],
    "push": ["table/", "me/table", "--private", "--rollouts", "--licence", "mit", "--base-model", "a/b"],
    "path": ["trl_reward"],
    "cp": ["trl_reward", "there", "--force"],
}
LAUNCH = ["--policy", "./sft", "--reward", "reward", "--prompts", "p.jsonl", "--out", "run", "--lr", "1e-4"]
HEAD = ["--policy", "./sft", "--pairs", "a=a.jsonl", "b"]
TRAINERS = {
    "rloo": [*LAUNCH, "--transform", "exp:5:0.5", "--lora-rank", "16", "--report-to", "trackio", "tensorboard"],
    "grpo": [*LAUNCH, "--raw", "--beta", "2"],
    "grpo --plain": [*LAUNCH, "--plain", "--baseline", "group-mean", "--force"],
    "ppo": [*LAUNCH, "--whiten", "no", "--device", "cpu"],
    "head": [*HEAD, "--out", "run", "--chat", "--layers=-1,4", "--backbone", "lora", "--bf16"],
}


def parse(command: str, words: list[str]) -> dict[str, Any]:
    """The options of a command, without the names of the files."""
    parser = argparse.ArgumentParser(command)
    load_command(command).add_arguments(parser)
    options = vars(parse_options(parser, words))
    return {name: value for name, value in options.items() if name not in ("config", "save_config")}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "train"])
def test_saved_options_are_the_same_options(command: str, tmp_path: Path) -> None:
    """Of each command: from the command line, to a file, and from the file alone."""
    plain = parse(command, WORDS[command])
    file = tmp_path / "options.yaml"
    assert parse(command, [*WORDS[command], "--save-config", str(file)]) == plain
    assert parse(command, ["--config", str(file)]) == plain
    assert parse(command, ["--config", str(file), "--save-config", str(tmp_path / "again.yaml")]) == plain
    assert (tmp_path / "again.yaml").read_text() == file.read_text()
    assert len(yaml.safe_load(file.read_text())) >= 2


@pytest.mark.parametrize("trainer", TRAINERS)
def test_saved_options_of_a_trainer_are_the_same_run(trainer: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Its launch and its settings; `plain: true` of a file chooses the plain loop as --plain does."""
    runs: list[tuple[Launch, Any]] = []
    load = train.Trainer.load

    def recorded(self: train.Trainer) -> Any:
        description, settings, _ = load(self)
        return description, settings, lambda launch, settings: runs.append((launch, settings))

    monkeypatch.setattr(train.Trainer, "load", recorded)
    name, file = trainer.split(maxsplit=1)[0], str(tmp_path / "options.yaml")
    for words in (TRAINERS[trainer], [*TRAINERS[trainer], "--save-config", file], ["--config", file]):
        assert main(["train", name, *words]) == 0
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][1].lr == 1e-4


def parser() -> argparse.ArgumentParser:
    """A parser of options of every form."""
    made = argparse.ArgumentParser("it")
    made.add_argument("place", nargs="?")
    made.add_argument("--text")
    made.add_argument("--number", type=float, default=1.5)
    made.add_argument("--flag", action="store_true")
    made.add_argument("--cost", action=argparse.BooleanOptionalAction, default=None)
    made.add_argument("--each", action="append")
    made.add_argument("--several", nargs="+", type=int)
    made.add_argument("--how", choices=("no", "yes"))
    return made


printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: text != "--")


@given(printable, st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.lists(printable, min_size=1))
def test_any_text_comes_back(tmp_path_factory: Any, text: str, number: float, flag: bool, each: list[str]) -> None:
    """Quotes, colons, hashes, words that YAML takes for other things: the text that was given."""
    file = str(tmp_path_factory.mktemp("any") / "options.yaml")
    words = [f"--text={text}", f"--number={number}", "--cost" if flag else "--no-cost", *(f"--each={e}" for e in each)]
    expected = vars(parser().parse_args(words))
    parse_options(parser(), [*words, "--save-config", file])
    options = vars(parse_options(parser(), ["--config", file]))
    assert {name: options[name] for name in expected} == expected


class ParserBuiltError(Exception):
    """Raised in place of a run, with its parser."""


def find_parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command or a trainer, whose options take any text."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise ParserBuiltError(parser)

    built = argparse.ArgumentParser(command)
    if command in TRAINERS:
        name, *words = command.split()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "parse_options", stop)
            with pytest.raises(ParserBuiltError) as stopped:
                train.run(argparse.Namespace(trainer=name, words=words))
        built = stopped.value.args[0]
    else:
        load_command(command).add_arguments(built)
    for action in built._actions:
        action.type = action.choices = None
    return built


@st.composite
def command_lines(draw: Any, command: str) -> list[str]:
    """Words for a random part of a command's options, of each form that it has."""
    texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text != "--") | st.sampled_from(
        ["null", "~", "no", "1e-6", "-x", "a: b"]
    )
    words, positional = [], []
    parser = find_parser(command)
    actions = [action for action in parser._actions if action.dest != "help"]
    for group in parser._mutually_exclusive_groups:
        least = 1 if group.required else 0
        chosen = draw(st.lists(st.sampled_from(group._group_actions), min_size=least, max_size=1))
        actions = [action for action in actions if action in chosen or action not in group._group_actions]
    for action in actions:
        if not action.required and action.option_strings and draw(st.booleans()):
            continue
        if not action.option_strings:
            positional += [draw(texts)]
        elif action.nargs == 0:
            words += [draw(st.sampled_from(action.option_strings))]
        elif action.nargs == "+":
            words += [action.option_strings[-1], *draw(st.lists(texts.map(lambda text: text.lstrip("-")), min_size=1))]
        else:
            several = isinstance(action, argparse._AppendAction)
            values = draw(st.lists(texts, min_size=1, max_size=3 if several else 1))
            words += [f"{action.option_strings[-1]}={value}" for value in values]
    return [*words, "--", *positional] if positional else words


@pytest.mark.parametrize("command", [*(command for command in COMMANDS if command != "train"), *TRAINERS])
@settings(max_examples=15)
@given(st.data())
def test_any_options_of_every_command_come_back(command: str, tmp_path_factory: Any, data: Any) -> None:
    """What argparse reads from the words, it reads from the file that --save-config wrote of them."""
    words = data.draw(command_lines(command))
    file = str(tmp_path_factory.mktemp("any") / "options.yaml")
    expected = vars(find_parser(command).parse_args(words))
    parse_options(find_parser(command), ["--save-config", file, *words])
    options = vars(parse_options(find_parser(command), ["--config", file]))
    assert {name: options[name] for name in expected} == expected


def test_a_dash_makes_no_option_of_a_value(tmp_path: Path, capsys: Any) -> None:
    """Alone, repeated or negative it is the value; in a list, where the command line could not have it, an error."""
    file = tmp_path / "options.yaml"
    file.write_text("place: --flag\ntext: --flag\neach: [a, --flag]\nseveral: [-1, -2]\n")
    options = parse_options(parser(), ["--config", str(file)])
    assert (options.place, options.text, options.each) == ("--flag", "--flag", ["a", "--flag"])
    assert (options.several, options.flag) == ([-1, -2], False)
    words = ["frontier", "run/", "--config", str(file)]
    for content, why in [
        ("kl: [0.5, --exact]", "line 1: kl needs texts that do not begin with -, as on the command line, got --exact"),
        ("kl: [0.5, --, out]", "line 1: kl needs another text than --, which ends the options of a command line"),
        ("kl: [--debug]", f"--config {file}, line 1: argument --kl: needs a number > 0, got '--debug'"),
    ]:
        file.write_text(content)
        with pytest.raises(SystemExit):
            main(words)
        assert why in capsys.readouterr().err


def test_the_command_line_wins(tmp_path: Path) -> None:
    """Over the file's text, list, flag and positional argument; what neither says has its default."""
    file = tmp_path / "options.yaml"
    file.write_text("place: there\ntext: a\neach: [b, c]\nseveral:\n  - 1\n  - 2\ncost: yes\nflag: true\nhow: no\n")
    options = parse_options(parser(), ["--config", str(file)])
    assert (options.place, options.text, options.each, options.several) == ("there", "a", ["b", "c"], [1, 2])
    assert (options.cost, options.flag, options.how, options.number) == (True, True, "no", 1.5)
    words = ["here", "--text", "z", "--each", "y", "--several", "3", "--no-cost", "--number", "2"]
    options = parse_options(parser(), [*words, "--config", str(file)])
    assert (options.place, options.text, options.each, options.several) == ("here", "z", ["y"], [3])
    assert (options.cost, options.flag, options.how, options.number) == (False, True, "no", 2.0)


def test_a_value_that_the_command_line_replaces_may_be_wrong(tmp_path: Path, capsys: Any) -> None:
    """Only what is used is checked; of two that exclude each other the line of the second is named."""
    file = tmp_path / "options.yaml"
    file.write_text("table: there\nkl: FILL IN\n")
    assert parse("recommend", ["--config", str(file), "--kl", "1"])["kl"] == 1.0
    with pytest.raises(SystemExit):
        parse("recommend", ["--config", str(file)])
    why = f"--config {file}, line 2: argument --kl: needs a number > 0, got 'FILL IN'"
    assert why in capsys.readouterr().err
    file.write_text("table: there\nbest-of: 8\nworst-of: 8\n")
    with pytest.raises(SystemExit):
        parse("recommend", ["--config", str(file)])
    assert f"{file}, line 3: worst-of is not allowed with argument --best-of" in capsys.readouterr().err


def test_two_dashes_are_no_value(tmp_path: Path, capsys: Any) -> None:
    """With a name argparse would drop them: an error; after the end of the options they are a positional argument."""
    for word in ("--text=--", "--each=--", "--several=--"):
        with pytest.raises(SystemExit):
            parse_options(parser(), [word])
        name = word.partition("=")[0]
        assert f"argument {name}: needs another text than --, which ends the options" in capsys.readouterr().err
    file = tmp_path / "options.yaml"
    file.write_text('place: "--"\n')
    options = parse_options(parser(), ["--config", str(file)])
    assert options.place == parse_options(parser(), ["--", "--"]).place == "--"
    assert parse_options(parser(), ["--", "--text=--"]).place == "--text=--"


def test_the_command_line_wins_over_what_it_excludes(tmp_path: Path, capsys: Any) -> None:
    """`--worst-of` drops the file's `best-of`, and it alone; two that the file or the words have are an error."""
    file = tmp_path / "rec.yaml"
    file.write_text("table: there\nbest-of: 8\nkl: 2\n")
    options = parse("recommend", ["--config", str(file), "--worst-of", "16", "--save-config", str(tmp_path / "again")])
    assert (options["best_of"], options["worst_of"], options["kl"]) == (None, 16, 2.0)
    assert yaml.safe_load((tmp_path / "again").read_text()).keys() == {"command", "table", "worst-of", "kl"}
    assert parse("recommend", ["--config", str(file), "--best-of", "2"])["best_of"].n == 2
    file.write_text("table: there\nbest-of: 8\nworst-of: 8\n")
    for words in (["--config", str(file)], ["--config", str(file), "--best-of", "2", "--worst-of", "2"]):
        with pytest.raises(SystemExit):
            parse("recommend", words)
        assert "not allowed with argument" in capsys.readouterr().err


def test_a_file_of_another_command_is_refused(tmp_path: Path, capsys: Any) -> None:
    """Its `out` would be overwritten; a file without a name, and one of another trainer, are taken."""
    file = tmp_path / "rec.yaml"
    parse("recommend", ["run/", "--out", "rec.json", "--save-config", str(file)])
    with pytest.raises(SystemExit):
        parse("frontier", ["--config", str(file)])
    assert f"--config {file}, line 1: needs options of frontier, got those of recommend" in capsys.readouterr().err
    file.write_text(file.read_text().replace("command: recommend\n", ""))
    assert parse("frontier", ["--config", str(file)])["out"] == Path("rec.json")
    rloo, grpo = (argparse.ArgumentParser(f"calibrated-rewards train {name}") for name in ("rloo", "grpo --plain"))
    rloo.add_argument("--lr", type=float)
    grpo.add_argument("--lr", type=float)
    parse_options(rloo, ["--lr=2", "--save-config", str(file)])
    assert parse_options(grpo, ["--config", str(file)]).lr == 2.0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("text: a\nnumbr: 2", "line 2: numbr is no option of this command; did you mean number?"),
        ("zzzz: 2", "there are place, text, number"),
        ("text: [a, b]", "line 1: text needs one value, got a list"),
        ("text: {a: b}", "text needs one value, got a mapping"),
        ("each: [{a: b}]", "each needs a list of texts, got a mapping"),
        ("each: [[a]]", "each needs a list of texts, got a list in it"),
        ("each: &a [*a]", "each needs a list of texts, got a list in it"),
        ("each: [~, a]", "each needs a list of texts, got ~ in it"),
        ("each:\n-\n- a", "each needs a list of texts, got nothing in it"),
        ("flag: [a]", "flag needs true or false, got a list\n"),
        ("flag: {a: b}", "flag needs true or false, got a mapping\n"),
        ("command: [a]", "needs options of it, got those of a list\n"),
        ("? [a]\n: b", "line 1: a list is no option of this command"),
        ("text: " + "[" * 5000, "needs lines of OPTION: VALUE, got lists in lists, too deep to read"),
        ("text: &a [x, x]\neach: &b [*a, *a]", "line 1: text needs one value, got a list"),
        ("text: a\n---\ntext: b", "is no YAML: expected a single document"),
        ("flag: 3", "flag needs true or false, got 3"),
        ("text: a\ntext: b", "line 2: text is there twice"),
        ("text: a\nnumber: many", "line 2: argument --number: invalid float value: 'many'"),
        ("how: maybe", "line 1: argument --how: invalid choice: 'maybe'"),
        ("several: [1, 2,\n two]", "line 1: argument --several: invalid int value: 'two'"),
        ("text: --", "line 1: text needs another text than --"),
        ("each: [a, --]", "line 1: each needs another text than --"),
        ("- text", "needs lines of OPTION: VALUE, got a sequence"),
        ("text: 'a", "is no YAML"),
        ("config: other.yaml", "config is no option"),
    ],
)
def test_what_is_no_option_is_an_error(content: str, why: str, tmp_path: Path, capsys: Any) -> None:
    """With the file, the line and the nearest name, or in argparse's words; and nothing is saved."""
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit):
        parse_options(parser(), ["--config", str(file), "--save-config", str(tmp_path / "saved.yaml")])
    assert why in capsys.readouterr().err
    assert not (tmp_path / "saved.yaml").exists()


def test_files_that_are_not_there_and_words_cut_short(tmp_path: Path, capsys: Any) -> None:
    """A missing file is named; an abbreviation would be overlooked, and is an error; null is as if not said."""
    for words, why in [(["--config", "none.yaml"], "none.yaml: No such file"), (["--conf", "x"], "not abbreviated")]:
        with pytest.raises(SystemExit):
            parse_options(parser(), words)
        assert why in capsys.readouterr().err
    file = tmp_path / "options.yaml"
    file.write_text("text: null\nnumber:\n")
    options = parse_options(parser(), ["--config", str(file)])
    assert (options.text, options.number) == (None, 1.5)
    for content in (b"", b"\xef\xbb\xbf", b"# nothing\n"):
        file.write_bytes(content)
        assert parse_options(parser(), ["--config", str(file)]).text is None
    file.write_bytes(b"\xef\xbb\xbftext: a\n")
    assert parse_options(parser(), ["--config", str(file)]).text == "a"
    file.write_bytes(b"text: \xe9\n")
    with pytest.raises(SystemExit):
        parse_options(parser(), ["--config", str(file)])
    assert f"--config {file} is no text in UTF-8: invalid continuation byte at byte 6" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_options(parser(), ["--text=a", "--save-config", str(file / "below.yaml")])
    assert f"error: {file / 'below.yaml'}: " in capsys.readouterr().err


def test_the_file_is_one_that_people_write() -> None:
    """Numbers and words without quotes, lists in brackets, in the order of the help."""
    actions = {name: parser()._option_string_actions[f"--{name}"] for name in ("number", "several", "cost")}
    content = write_config(actions, {"cost": True, "several": ["1", "2"], "number": "1e-6"}, "reward")
    assert content == "command: reward\nnumber: 1e-6\nseveral: [1, 2]\ncost: true\n"
