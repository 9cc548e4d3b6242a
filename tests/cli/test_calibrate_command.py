"""`calibrated-rewards calibrate` with tiny models: what it prints and keeps, and what it refuses before sampling."""

import json

import numpy as np
import pytest
import tiny

from calibrated_rewards import ReferenceTable, id_key
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli import model_options
from calibrated_rewards.cli.main import main
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.classifiers import SequenceClassifier

CHATS = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, two reward models, and prompts, on disk."""
    folder = tmp_path_factory.mktemp("models")
    tiny.saved(tiny.causal(), folder / "policy", tiny.tokenizer())
    for seed, name in enumerate(("rm", "rm2")):
        tiny.saved(tiny.classifier(seed), folder / name, tiny.tokenizer())
    rows = [{"prompt": chat, "prompt_id": f"q{i}"} for i, chat in enumerate(CHATS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(models, out, *more):
    """The words of a call."""
    policy = ["--policy", str(models / "policy"), "--prompts", str(models / "prompts.jsonl"), "--max-tokens", "5"]
    return ["calibrate", *policy, "--reward-model", str(models / "rm"), "--out", str(out), "-k", "4", *more]


def test_the_command_does_what_the_function_does(models, tmp_path, capsys):
    """The same rows; ids and the rendered chat lead to them; and the line says what came of it."""
    assert main(asked(models, tmp_path / "t")) == 0
    assert capsys.readouterr().out.endswith("3 prompts, 12 references, 0.0% tied, 0 prompts without resolution\n")
    table = ReferenceTable.load(tmp_path / "t")
    sampler = HfSampler(tiny.causal(), tiny.tokenizer(), Decoding(5))
    expected = calibrate(CHATS, sampler, SequenceClassifier(tiny.classifier(0), tiny.tokenizer()), k=4)
    for row in range(3):
        np.testing.assert_array_equal(table.scores(row), expected.scores(row))
    assert (table.rows([id_key("q1"), "<s><|user|>question 1<|end|><|assistant|>"]) == table.rows([CHATS[1]])[0]).all()
    assert table.meta["sampler"]["decoding"]["max_tokens"] == 5


def test_reward_models_by_name_and_later(models, tmp_path, capsys):
    """Two at once, then a third over the same rollouts, without a policy."""
    out = tmp_path / "t"
    rms = ["--reward-model", f"a={models / 'rm'}", "--reward-model", f"b={models / 'rm2'}"]
    words = [word for word in asked(models, out) if word not in ("--reward-model", str(models / "rm"))]
    assert main([*words, *rms]) == 0
    assert main(["calibrate", "--reward-model", f"c={models / 'rm'}", "--out", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    a, b, c = (ReferenceTable.load(out / name) for name in "abc")
    assert [*map(list, (s.tolist() for _, s in a.items()))] == [s.tolist() for _, s in c.items()]
    assert [s.tolist() for _, s in a.items()] != [s.tolist() for _, s in b.items()]


def test_a_dry_run_writes_nothing(models, tmp_path, capsys):
    """It says what would be done, and what it would take."""
    assert main(asked(models, tmp_path / "t", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "3: 3 new, 0 known" in said
    assert "to draw   12 rollouts" in said
    assert "estimate" in said
    assert not (tmp_path / "t").exists()


def test_rollouts_made_elsewhere(tmp_path, capsys):
    """With the scores that they have; what comes next is said, to the stream that scripts do not read."""
    rows = [{"prompt": "2+2=", "text": text, "r": score} for text, score in (("4", 1.0), ("5", 0.0))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--rollouts", str(tmp_path / "rows.jsonl"), "--completions", "text", "--scores", "r"]
    assert main(["calibrate", *words, "--out", str(tmp_path / "t")]) == 0
    output = capsys.readouterr()
    assert "1 prompts, 2 references" in output.out
    for command in "inspect", "recommend", "frontier":
        assert f"calibrated-rewards {command} {tmp_path / 't'} " in output.err
    assert ReferenceTable.load(tmp_path / "t").scores(0).tolist() == [0.0, 1.0]


def test_adaptive_rounds_by_option(models, tmp_path):
    """--adaptive with its rounds; a band that nothing can reach ends with the last of them."""
    words = ["--adaptive", "0.01", "--rounds", "2,3", "--transform", "exp:5", "--quiet"]
    call = [word for word in asked(models, tmp_path / "t", *words) if word not in ("-k", "4")]
    assert main([*call, "--dry-run"]) == 0
    assert main(call) == 0
    assert ReferenceTable.load(tmp_path / "t").describe()["references"] == 9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--reward-model", "policy"], "has no head that gives a score"),
        (["--max-tokens", "600"], "question 0"),
        (["--budget", "9"], "--budget: they belong to --adaptive, leave it out"),
        (["--scores", "r"], "--scores: they belong to --rollouts"),
        (["--adaptive", "0.1"], "-k: with --adaptive"),
        (["--adaptive", "0.1", "--transform", "exp:5:0.5"], "are the same at every KL, leave it out of exp:5:0.5"),
        (["--rollouts", "x.jsonl", "--dry-run"], "--dry-run: --rollouts has the prompts"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_before_sampling(models, tmp_path, capsys, words, says):
    """A policy as reward model, a completion longer than the context, options without effect: exit code 2."""
    given = [str(models / word) if word == "policy" else word for word in words]
    call = asked(models, tmp_path / "t")
    if words[0] in call:
        at = call.index(words[0])
        del call[at : at + 2]
    assert main([*call, *given]) == 2
    assert says in capsys.readouterr().err
    assert not [*tmp_path.glob("t/rollouts/*")]


def test_other_settings_are_refused_in_words(models, tmp_path, capsys):
    """The error says which, and the table stays."""
    assert main(asked(models, tmp_path / "t", "--quiet")) == 0
    before = (tmp_path / "t" / "table.safetensors").read_bytes()
    assert main(asked(models, tmp_path / "t", "--temperature", "0.5")) == 2
    assert "sampler.decoding.temperature is 1.0 there and 0.5 here" in capsys.readouterr().err
    assert (tmp_path / "t" / "table.safetensors").read_bytes() == before


def test_another_cost_than_the_runs_names_the_file_and_the_rule(models, tmp_path, capsys):
    """The same command with --cost added: which file, and what to leave out."""
    assert main(asked(models, tmp_path / "t", "--quiet")) == 0
    assert main(asked(models, tmp_path / "t", "--quiet", "--cost")) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 't' / 'run.json'}: the scorer reward was made without --cost" in said
    assert "leave --cost out" in said


def test_a_dry_run_refuses_what_the_run_would(models, tmp_path, capsys):
    """Settings of another run."""
    assert main(asked(models, tmp_path / "t", "--quiet")) == 0
    assert main(asked(models, tmp_path / "t", "--temperature", "0.5", "--dry-run")) == 2
    assert "temperature is 1.0 there and 0.5 here" in capsys.readouterr().err


def test_a_directory_keeps_its_k(models, tmp_path):
    """The same command without -k draws nothing."""
    assert main(asked(models, tmp_path / "t", "--quiet")) == 0
    call = [word for word in asked(models, tmp_path / "t", "--quiet") if word not in ("-k", "4")]
    assert main(call) == 0
    assert ReferenceTable.load(tmp_path / "t").describe()["references"] == 12


def test_ctrl_c_is_no_crash(models, tmp_path, capsys, monkeypatch):
    """One line, and the exit code of a program that was stopped."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("calibrated_rewards.calibration.run.Filling.fill", stopped)
    assert main(asked(models, tmp_path / "t", "--quiet")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "calibrated-rewards calibrate: stopped"


def test_help_teaches(capsys):
    """Examples, and every option with its meaning."""
    with pytest.raises(SystemExit) as left:
        main(["calibrate", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for word in ("--dry-run", "--id-column", "accelerate launch", "--temperature", "the same run with a larger K"):
        assert word in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "has no prompts"),
        ("[]", "line 4: a prompt says something"),
        ('{"question": "x"}', "column prompt"),
        ("{", "not JSON"),
    ],
    ids=["empty", "no message", "no column", "no JSON"],
)
def test_prompts_are_checked_before_models_are_loaded(models, tmp_path, capsys, monkeypatch, line, says):
    """All of them, the last one too; nothing is loaded, and no folder is made."""

    def load(*_):
        raise AssertionError("a model was loaded before the prompts were read")

    monkeypatch.setattr(model_options, "load_policy", load)
    monkeypatch.setattr(model_options, "load_reward_models", load)
    good = (models / "prompts.jsonl").read_text() if line else ""
    (tmp_path / "bad.jsonl").write_text(f"{good}{line}")
    for more in [], ["--dry-run"]:
        words = asked(models, tmp_path / "t", "--prompts", str(tmp_path / "bad.jsonl"), *more)
        assert main(words) == 2
        assert says in capsys.readouterr().err
    rollouts = ["--rollouts", str(tmp_path / "bad.jsonl"), "--reward-model", "rm", "--out", str(tmp_path / "t")]
    assert main(["calibrate", *rollouts]) == 2
    assert not (tmp_path / "t").exists()


def test_one_rollout_is_warned_of(models, tmp_path, caplog):
    """With --quiet too, and with the option that mends it."""
    assert main(asked(models, tmp_path / "t", "-k", "1", "--quiet")) == 0
    assert [record.levelname for record in caplog.records if "-k 32" in record.getMessage()] == ["WARNING"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", ""], "argument --out: needs a folder, got ''"),
        (["--label", "0-0"], "argument --label: "),
        (["--option", "name_or_path=x"], "--option name_or_path=...: there is no such option, --reward-model"),
        (
            ["--option", "api-key=secret"],
            "argument --option: an option is NAME=VALUE, NAME of letters, digits and _, got 'api-key=...'",
        ),
        (["--option", "text=3"], "--option text=...: there is no such option, --max-length and --chat-template"),
        (["--max-length", "100000"], "the model reads at most 512 tokens, got --max-length 100000 "),
        (["--option", "output=zz"], "; say --option output=... which is the score "),
    ],
)
def test_options_that_mean_nothing_are_refused(models, tmp_path, capsys, monkeypatch, words, says):
    """In a line that names the option; an unset variable of a shell is no folder."""
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*asked(models, tmp_path / "new"), *words])
    except SystemExit as error:
        code = error.code
    assert code == 2
    said = capsys.readouterr().err
    assert says in said.splitlines()[-1]
    assert "secret" not in said
    assert not (tmp_path / "run.json").exists()
