"""The command line: what it says, what it exits with, and that it loads nothing before it is asked to."""

import json
import re
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import tiny
from transformers import GPT2Config, GPT2LMHeadModel

import calibrated_rewards
from calibrated_rewards.cli import check_scorer, evaluate
from calibrated_rewards.cli.check_scorer import read_pairs
from calibrated_rewards.cli.main import COMMANDS, FAILED, PASSED, PLACES, UNUSABLE, load_command, main
from calibrated_rewards.cli.model_options import (
    add_reward_model_options,
    collect_settings,
    load_reward_model,
    parse_labels,
)
from calibrated_rewards.models.labels import Difference, Expected, Label, Ordinal, Weighted
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.remote import Native, OpenRlhf, Remote
from calibrated_rewards.scorers.remote_vllm import Vllm, VllmScore
from calibrated_rewards.testing.check_scorer import CHECKS, Examination


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved classifier with one label."""
    return tiny.saved(tiny.classifier(), tmp_path_factory.mktemp("one"), tiny.tokenizer())


# No more than the minimum of each check.
QUICK = ("--long-words", "100", "--spare-seconds", "0")


def check(*words: str) -> int:
    return main(["check-scorer", *words])


def test_a_model_is_checked(model, capsys):
    """The whole way: what was loaded, a line a check, the speed, and exit code 0."""
    assert check("--reward-model", model, "--no-sign", *QUICK) == PASSED

    told = capsys.readouterr().out
    assert f"Loaded('{model}', SequenceClassifier, Label(index=0), max_length=512)" in told
    assert "\n  text: max_length=512, template=yes\n" in told
    assert [told.count(f"  {name}") for name in (check.name for check in CHECKS)] == [1] * len(CHECKS)
    assert re.search(r"\n  64 completions in [\d.]+ s: [\d,]+ completions, [\d,]+ tokens a second\n", told)
    assert re.search(r"\n\d+ ok, 0 failed, \d+ not asked\n$", told)


def test_a_failed_check_exits_with_one(model, tmp_path, capsys):
    """A random head does not know good from bad: that line says FAIL, the others are told all the same."""
    assert check("--reward-model", model, "--prompts", str(written(tmp_path)), *QUICK) == FAILED

    told = capsys.readouterr().out
    assert re.search(r"\n  FAIL  sign: .*\n        -> is this a cost model\?", told)
    assert re.search(r"\n\d+ ok, 1 failed, \d+ not asked\n$", told)


def test_what_cannot_be_loaded_is_told(capsys, tmp_path):
    """No folder, a language model, a server without its name: why, on stderr, no traceback, exit code 2."""
    policy = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=tiny.VOCABULARY))
    for words, reason in [
        (["--reward-model", str(tmp_path / "nothing")], "nothing"),
        (["--reward-model", tiny.saved(policy, tmp_path / "policy", tiny.tokenizer())], "no head"),
        (["--reward-model", "http://localhost:1", "--server", "vllm"], "--served-model"),
        (["--reward-model", str(tmp_path), "--prompts", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ]:
        assert check(*words) == UNUSABLE
        _, found, told = capsys.readouterr().err.partition("calibrated-rewards check-scorer: error: ")
        assert found
        assert reason in told
        assert told.endswith("(--debug shows where)\n")
        assert "Traceback" not in told


def test_debug_shows_where_an_error_came_from(tmp_path):
    """With --debug the error itself is raised."""
    with pytest.raises(FileNotFoundError, match="nothing"):
        check("--reward-model", str(tmp_path / "nothing"), "--debug")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "COMMAND"),
        (["calibrate-all"], "invalid choice"),
        (["check-scorer"], "--reward-model"),
        (["check-scorer", "--reward-model", "x", "--label", "best"], "expected:1,2,3"),
        (["check-scorer", "--reward-model", "x", "--option", "mark"], "NAME=VALUE"),
    ],
)
def test_wrong_usage(words, told, capsys):
    """argparse's way: the usage, what is wrong, and exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == UNUSABLE
    assert told in capsys.readouterr().err


def test_help_teaches(capsys):
    """The commands with what they are for, and examples for each; --version."""
    for words in (["--help"], ["check-scorer", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == PASSED
    told = capsys.readouterr().out

    assert all(re.search(rf"  {name} +{re.escape(summary)}\n", told) for name, summary in COMMANDS.items())
    assert told.count("  calibrated-rewards check-scorer --reward-model") == 4
    assert f"calibrated-rewards {calibrated_rewards.__version__}\n" in told


def test_help_loads_nothing_heavy(tmp_path):
    """Neither torch nor transformers, to tell the options of a command."""
    code = (
        "import sys\nfrom calibrated_rewards.cli.main import main\ntry: main(['check-scorer', '--help'])\n"
        "except SystemExit: print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.endswith("\nset()\n")


def test_pairs_of_ones_own(model, tmp_path, capsys):
    """--prompts: these pairs are scored, as the scorer itself scores them."""
    rows = [{"prompt": "Hi", "completions": ["Hello!", "Go away"]}, {"prompt": "What?", "completion": "That."}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    prompts, completions = read_pairs(file)
    check("--reward-model", model, "--prompts", str(file), "--no-sign", *QUICK)
    low, high = re.search(r"3 scores, (\S+) to (\S+), sd", capsys.readouterr().out).groups()
    scores = load_scorer(model)(prompts, completions)

    assert (prompts, completions) == (["Hi", "Hi", "What?"], ["Hello!", "Go away", "That."])
    assert [float(low), float(high)] == pytest.approx([scores.min(), scores.max()], rel=1e-2)


@pytest.mark.parametrize(
    ("line", "told"),
    [('{"prompt": "Hi"}', 'needs a "prompt" and a "completion"'), ("[1]", "needs an object"), ("Hi", "is no JSON")],
)
def test_pairs_that_are_none(line, told, tmp_path):
    """The line is named, and what is missing."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{{"prompt": "Hi", "completion": "Hello!"}}\n{line}\n')

    with pytest.raises(ValueError, match=f"line 2 of .*{told}"):
        read_pairs(file)


def test_settings_reach_the_model(tmp_path, capsys):
    """Labels, precision, length and template, as the fingerprint shows them; --option to load_scorer."""
    three = tiny.saved(tiny.classifier(num_labels=3), tmp_path / "three", tiny.tokenizer(template=None))
    template = tmp_path / "chat.jinja"
    template.write_text(tiny.TEMPLATE)
    words = ["--label", "2-0", "--dtype", "bfloat16", "--max-length", "400", "--chat-template", str(template)]
    words += ["--prompts", str(written(tmp_path)), "--option", "pool=last", "--no-sign", *QUICK]
    check("--reward-model", three, *words)
    told = capsys.readouterr().out

    for line in (
        "labels: Difference(good=2, bad=0)",
        "dtype: bfloat16",
        "text: max_length=400, template=yes",
        "pool: last",
    ):
        assert f"\n  {line}\n" in told
    assert "in bfloat16" in told


def written(folder: Path, *lines: str) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("\n".join([*lines, '{"prompt": "Hi", "completions": ["Hello!", "Bye"]}']), encoding="utf-8-sig")
    return file


def test_pairs_are_split_where_lines_end(tmp_path):
    """U+2028 and U+0085 stand inside of a text; a byte order mark is no part of the first line; \\r\\n ends a line."""
    row = json.dumps({"prompt": "a\u2028b", "completion": "c\x85d"}, ensure_ascii=False)

    assert read_pairs(written(tmp_path, row + "\r")) == (["a\u2028b", "Hi", "Hi"], ["c\x85d", "Hello!", "Bye"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completions": "bcd"},
        {"prompt": None, "completion": "c"},
        {"prompt": 3, "completion": "c"},
        {"prompt": [], "completion": "c"},
        {"prompt": ["x"], "completion": "c"},
        {"prompt": "p", "completion": None},
        {"prompt": "p", "completions": ["a", 1]},
        {"prompt": "p", "completion": "a", "completions": ["b"]},
    ],
    ids=str,
)
def test_rows_that_are_no_pairs(row, tmp_path, capsys):
    """A text in place of a list, null, numbers, both words at once: exit code 2, and the line is named."""
    file = written(tmp_path, '{"prompt": "p", "completion": "c"}', json.dumps(row))

    assert check("--reward-model", "http://127.0.0.1:1", "--prompts", str(file)) == UNUSABLE
    assert f"line 2 of {file}" in capsys.readouterr().err


def test_files_that_cannot_be_read(tmp_path, capsys):
    """A folder, bytes that are no text, one pair alone: the option and the file are named."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    (tmp_path / "one").write_text('{"prompt": "p", "completion": "c"}')
    for words in (["--prompts", "."], ["--prompts", "bytes"], ["--prompts", "one"], ["--chat-template", "bytes"]):
        file = str(tmp_path / words[1])
        assert check("--reward-model", "http://127.0.0.1:1", words[0], file) == UNUSABLE
        assert f"error: {words[0]} {file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kind", "judge", "--device", "cpu"], "--kind, --device"),
        (["--dtype", "float32"], "--dtype"),
        (["--option", "a=1"], "--option"),
        (["--trust-remote-code", "--batch-tokens", "9"], "--batch-tokens, --trust-remote-code"),
        (["--label", "1"], "--label"),
        (["--revision", "v1"], "--revision"),
        (["--server", "vllm", "--served-model", "rm", "--max-length", "9"], "--tokenizer"),
    ],
    ids=str,
)
def test_what_a_server_is_not_told(words, said, capsys):
    """Options without an effect on a server are refused, by their names."""
    assert check("--reward-model", "http://127.0.0.1:1", *words) == UNUSABLE
    assert said in capsys.readouterr().err


def test_what_only_servers_are_told(model, capsys):
    """Options of a server, with a reward model that is loaded here, are refused by name."""
    assert check("--reward-model", model, "--server", "vllm", "--tokenizer", "x") == UNUSABLE
    assert "--server, --tokenizer: --reward-model is no URL" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["0", "-3", "many"])
def test_a_long_input_has_words(words, capsys):
    """--long-words is a whole number from 1."""
    with pytest.raises(SystemExit):
        check("--reward-model", "x", "--long-words", words)
    assert ">= 1" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys):
    """Found out by one question and one more, not by a suite of failed checks: exit code 2, and no secrets."""
    assert check("--reward-model", "http://me:password@127.0.0.1:1/?key=secret") == UNUSABLE
    told = capsys.readouterr()

    assert "http://127.0.0.1:1/score gave no answer in 2 tries" in told.err
    assert told.out == ""
    assert "password" not in told.err
    assert "secret" not in told.err


def test_an_empty_token_is_none(monkeypatch):
    """An environment variable that is set to nothing; a password is not what the model is called."""
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN", "")
    scorer = load_reward_model(parsed("--reward-model", "http://me:password@rm:8000/?key=secret"))

    assert scorer.token is None
    assert scorer.dialect == Native("http://rm:8000/")


def without(library: str, *words: str) -> str:
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        f"from calibrated_rewards.cli.main import main; main({list(words)!r})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_server_needs_no_models_here(library):
    """With a URL the command comes as far as asking it; without, it says what to install."""
    assert "gave no answer" in without(library, "check-scorer", "--reward-model", "http://127.0.0.1:1")
    told = without(library, "check-scorer", "--reward-model", "some/model")
    assert f"needs {library}, which is not installed: pip install 'calibrated-rewards[hf]'" in told


def test_a_server_needs_httpx():
    """Without httpx, the command names the extra that brings it."""
    told = without("httpx", "check-scorer", "--reward-model", "http://127.0.0.1:1")

    assert "pip install 'calibrated-rewards[http]'" in told


def test_errors_speak_of_options(tmp_path, capsys):
    """What to say is said as it is said here; of a model without a head the kinds are named."""
    three = tiny.saved(tiny.classifier(num_labels=3), tmp_path / "three", tiny.tokenizer())
    assert check("--reward-model", three) == UNUSABLE
    assert "--label" in (said := capsys.readouterr().err)
    assert "labels=" not in said
    policy = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=tiny.VOCABULARY))
    assert check("--reward-model", tiny.saved(policy, tmp_path / "policy", tiny.tokenizer())) == UNUSABLE
    said = capsys.readouterr().err
    assert "--kind judge" in said


def test_names_of_labels_are_asked_about_and_costs_are_turned_round(tmp_path, capsys):
    """Both ways to go on are in the error; a cost model is minus itself in every line."""
    names = {0: "terse", 1: "verbose"}
    two = tiny.saved(tiny.classifier(num_labels=2, id2label=names), tmp_path / "two", tiny.tokenizer(template=None))
    assert check("--reward-model", two) == UNUSABLE
    said = capsys.readouterr().err
    assert "--label 0-1" in said
    assert "--label 1-0" in said
    assert check("--reward-model", two, "--label", "ordinal") == UNUSABLE
    assert "--label expected:0,1" in capsys.readouterr().err
    words = ["--label", "0-1", "--cost", "--no-sign", "--prompts", str(written(tmp_path)), *QUICK]
    check("--reward-model", two, *words)
    assert "kind: cost" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["calibrate", "check-scorer", "evaluate", "reward"])
def test_each_command_that_takes_a_reward_model_takes_a_cost(command):
    """And an example in its help shows it."""
    module = import_module(f"calibrated_rewards.cli.{command.replace('-', '_')}")
    parser = ArgumentParser()
    module.add_arguments(parser)
    assert {"--cost", "--no-cost"} <= {*parser._option_string_actions}
    assert "./toxicity --cost" in module.EPILOG


def test_the_judge_of_an_evaluation_has_a_sign_of_its_own(model):
    """--cost turns the reward model round and not the judge, --judge-cost the judge alone; neither is of nothing."""
    parser = ArgumentParser()
    evaluate.add_arguments(parser)
    words = ["--policy", "p", "--reference", "r", "--prompts", "x", "--out", "o"]
    both = ["--reward-model", model, "--judge", model]
    for more, costs in ((["--cost"], [True, False]), (["--judge-cost"], [False, True]), ([], [False, False])):
        found = evaluate.load_scorers(parser.parse_args([*words, *both, *more]), None)
        assert [isinstance(scorer.scorer, Cost) for scorer in (found["reward"], found["judge"])] == costs
    for more in (["--judge", model, "--cost"], ["--reward-model", model, "--judge-cost"]):
        with pytest.raises(ValueError, match="there is none"):
            evaluate.load_scorers(parser.parse_args([*words, *more]), None)


def test_a_server_may_serve_a_cost():
    """Its scores are turned round here."""
    scorer = load_reward_model(parsed("--reward-model", "http://rm:8000", "--cost"))
    assert isinstance(scorer, Cost)
    assert scorer.scorer == load_reward_model(parsed("--reward-model", "http://rm:8000"))


def test_what_is_being_checked_is_shown(monkeypatch, capsys):
    """Where somebody watches, until it is done; nothing elsewhere."""
    with check_scorer.show_progress("permuted"):
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with check_scorer.show_progress("permuted"):
        assert "permuted" in capsys.readouterr().err
    assert capsys.readouterr().err == "\x1b[2K\r"


def parsed(*words: str) -> Namespace:
    parser = ArgumentParser()
    check_scorer.add_arguments(parser)
    return parser.parse_args(words)


def test_each_setting_has_its_place():
    """All that is said of the model is told to load_scorer, by the names that it knows; else its own defaults."""
    words = (
        "--kind judge --batch-tokens 99 --device cpu --dtype float16 --revision v1 --trust-remote-code --label 1 --cost"
    )
    said = collect_settings(
        parsed("--reward-model", "x", *words.split(), "--max-length", "9", "--option", "reference=[1]")
    )
    known = signature(load_scorer).parameters

    assert said == {
        "kind": "judge",
        "labels": Label(1),
        "cost": True,
        "text": Text(max_length=9),
        "batch_tokens": 99,
        "dtype": "float16",
        "device": "cpu",
        "revision": "v1",
        "trust_remote_code": True,
        "reference": [1],
    }
    assert all(known[name].default == value for name, value in collect_settings(parsed("--reward-model", "x")).items())


def test_each_question_has_its_option():
    """All that is said of the checks reaches the examination; if nothing, its own defaults."""
    url = ("--reward-model", "http://rm:8000")
    words = ["--tolerance", "0.5", "--no-sign", "--discrete", "--no-prompt", "--long-words", "7"]
    words += ["--may-ignore", "digits", "--may-ignore", "roles", "--spare-seconds", "0.5"]
    told, plain = (
        check_scorer.build_examination(parsed(*url, *words, "--chat")),
        check_scorer.build_examination(parsed(*url)),
    )

    assert (told.tolerance, told.sign, told.discrete, told.long_words, told.chat) == (0.5, False, True, 7, True)
    assert (told.reads_prompt, told.may_ignore, told.spare_seconds) == (False, ("digits", "roles"), 0.5)
    assert vars(plain) == vars(Examination(plain.scorer))
    assert check_scorer.build_examination(parsed(*url, "--no-chat")).chat is False


@pytest.mark.parametrize(
    ("how", "made"),
    [
        ("0", Label(0)),
        ("2-1", Difference(2, 1)),
        ("expected:1,2.5", Expected((1.0, 2.5))),
        ("weighted:1,-0.5", Weighted((1.0, -0.5))),
        ("ordinal", Ordinal()),
    ],
)
def test_labels(how, made):
    """Each way to make one score of several labels can be said in a word."""
    logits = np.array([[0.5, 2.0, -1.0]], np.float32)[:, : 2 if ":" in how else 3]

    assert parse_labels(how) == made
    assert parse_labels(how)(logits) == made(logits)


@pytest.mark.parametrize("how", ["", "a", "1-", "expected:", "expected:1;2", "mean:1,2"])
def test_labels_that_are_none(how):
    """What is no such word is an error that shows them all."""
    with pytest.raises(ArgumentTypeError, match="expected:1,2,3"):
        parse_labels(how)


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("levels:0:3,3", "two different ones or more.*3.0, 3.0"),
        ("levels:0:nan,3", "finite values.*nan"),
        ("levels:-1:3,1", "first >= 0.*first=-1"),
        ("1-1", "of two labels"),
    ],
)
def test_labels_that_break_a_rule(how, rule):
    """The form is right and the numbers are not: the error says which rule they break."""
    with pytest.raises(ArgumentTypeError, match=rule):
        parse_labels(how)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], Native("http://rm:8000")),
        (["--server", "vllm", "--served-model", "rm", "--label", "1"], Vllm("rm", labels=Label(1))),
        (["--server", "vllm-score", "--served-model", "rm"], VllmScore("rm")),
        (["--server", "openrlhf", "--served-model", "rm"], OpenRlhf("rm")),
    ],
)
def test_a_server(words, asked, monkeypatch):
    """A URL is asked in the dialect that is named, with the environment's token, which no repr shows."""
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN", "secret")
    monkeypatch.setenv("CALIBRATED_REWARDS_TOKEN_URL", "http://rm:8000")
    parser = ArgumentParser()
    add_reward_model_options(parser)
    scorer = load_reward_model(parser.parse_args(["--reward-model", "http://rm:8000", *words]))

    assert scorer == Remote("http://rm:8000", asked, token="secret")
    assert "secret" not in repr(scorer)


def test_a_server_that_renders_text_itself():
    """What would have no effect is refused."""
    parser = ArgumentParser()
    add_reward_model_options(parser)
    with pytest.raises(ValueError, match="renders text itself"):
        load_reward_model(parser.parse_args(["--reward-model", "http://rm:8000", "--max-length", "99"]))


def test_every_command_has_its_module():
    """What the help lists is there."""
    assert {*PLACES} <= {*COMMANDS}
    for name in COMMANDS:
        command = load_command(name)
        assert command.EPILOG
        assert callable(command.add_arguments)
        assert callable(command.run)
