"""Messages of commands about wrong input: their own options, a line or two, exit status 2 and no traceback."""

import json
import os
import re
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import tiny

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import UNUSABLE, main
from calibrated_rewards.cli.options import EXTRAS
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.table.reference_table import ReferenceTable

TRAINERS = ("rloo", "grpo", "grpo --plain", "ppo")
# What only Python says: keyword arguments, calls of classes, its constants and containers.
PYTHON = {
    "a keyword argument": re.compile(r"(?<![\w./-])(?<!option )[a-z]\w*=(?![=\s])"),
    "a keyword argument without a value": re.compile(r"(?<![\w./-])(?<!option )[a-z]\w*=(?=[\s,;:.)]|$)"),
    "a call of a class": re.compile(r"\b[A-Z]\w*[a-z]\w*\("),
    "a constant": re.compile(r"\b(None|True|False)\b"),
    "an error number": re.compile(r"\[Errno"),
    "an internal name": re.compile(r"\bcalibrated_rewards\.|\b(load_scorer|prompts_from|HfSampler)\b"),
    "Python's advice": re.compile(r"goes in a list|[Gg]ive one\b|Traceback"),
}
MODEL = "--policy policy --max-tokens 4 --prompts prompts.jsonl --reward-model rm"
EVALUATE = "evaluate --quiet --out new --policy policy --reference policy --prompts prompts.jsonl --reward reward"
REWARD = "reward table --reward-model rm --out new"
CHECK = "check-scorer --reward-model"
# The words of a call, and what the message has to name.
CASES = {
    "calibrate --out new": "reward model",
    "calibrate --out new --policy policy --max-tokens 4 --reward-model rm": "--prompts",
    "calibrate --out new --policy policy --prompts prompts.jsonl --reward-model rm": "--max-tokens",
    "calibrate --out new --prompts prompts.jsonl --reward-model rm": "--policy",
    f"calibrate --out new {MODEL} --policy nothing": "'nothing'",
    f"calibrate --out new {MODEL} --policy rm": "scores",
    f"calibrate --out new {MODEL} --policy table": "table",
    f"calibrate --out new {MODEL} --prompts nothing.jsonl": "'nothing.jsonl'",
    f"calibrate --out new {MODEL} --prompts columns.jsonl": "--column NAME",
    f"calibrate --out new {MODEL} --prompts broken.jsonl": "broken.jsonl, line 1",
    f"calibrate --out new {MODEL} --prompts folder": "folder",
    f"calibrate --out new {MODEL} --column zz": "'zz'",
    f"calibrate --out new {MODEL} --split train": "--split train",
    f"calibrate --out new {MODEL} --limit 0": "--limit",
    f"calibrate --out new {MODEL} --max-tokens 0": "--max-tokens",
    f"calibrate --out new {MODEL} --temperature -1": "--temperature",
    f"calibrate --out new {MODEL} --temperature nan": "--temperature",
    f"calibrate --out new {MODEL} --top-p 2": "--top-p",
    f"calibrate --out new {MODEL} -k 0": "-k",
    f"calibrate --out new {MODEL} --prompts-per-shard 0": "--prompts-per-shard",
    f"calibrate --out new {MODEL} --adaptive 0": "--adaptive",
    f"calibrate --out new {MODEL} --adaptive 0.1 --rounds 4,2": "--rounds",
    f"calibrate --out new {MODEL} --adaptive 0.1 --budget 1": "--budget",
    f"calibrate --out new {MODEL} --reward-model three": "each --reward-model",
    f"calibrate --out new {MODEL} --policy-option foo=1": "foo",
    f"calibrate --out new {MODEL} --policy-dtype foo": "'foo'",
    f"calibrate --out new {MODEL} --ray 0": "--ray",
    "calibrate --out new --rollouts rollouts.jsonl": "--scores COLUMN",
    "calibrate --out new --rollouts rollouts.jsonl --scores zz": "'zz'",
    f"calibrate --out file {MODEL}": "file",
    f"{EVALUATE} --prompts nothing.jsonl": "'nothing.jsonl'",
    f"{EVALUATE} --policy a=nothing": "'nothing'",
    f"{EVALUATE} --reference nothing": "'nothing'",
    f"{EVALUATE} --reward table": "it is a table",
    f"{EVALUATE} --reward nothing": "'nothing'",
    f"{EVALUATE} --judge table": "table",
    f"{EVALUATE} --select nobody": "--select 'nobody'",
    f"{EVALUATE} -m 0": "-m",
    f"{EVALUATE} -m 2": "best of 4 needs 4 completions",
    f"{EVALUATE} --best-of 0": "--best-of",
    f"{EVALUATE} --prompts columns.jsonl": "--column NAME",
    "frontier nothing": "nothing",
    "frontier reward": "reward",
    "frontier two --select nobody": "'nobody'",
    "frontier two --judge nobody": "'nobody'",
    "frontier two --kl 0": "--kl",
    "frontier two --kl nan": "--kl",
    "frontier two --best-of 0": "--best-of",
    "frontier two --best-of 100": "best of 100 needs 100 rollouts",
    "frontier two --arms nothing": "--arms",
    "frontier two --out folder": "--out",
    "frontier two --arms log --kl 0.1 --plot file/x.png": "file",
    "inspect nothing": "'nothing'",
    "inspect policy": "policy",
    "inspect table --rows 0": "--rows",
    "reward two --reward-model rm --out new": "two/judge or",
    "reward nothing --reward-model rm --out new": "'nothing'",
    "reward policy --reward-model rm --out new": "no table at",
    f"{REWARD} --transform foo": "--transform",
    f"{REWARD} --estimator foo": "--estimator",
    f"{REWARD} --scale foo": "--scale",
    f"{REWARD} --on-missing foo": "--on-missing",
    f"{REWARD} --tolerance -1": "--tolerance",
    "reward table --reward-model judge --out new": "not the one",
    "reward table --reward-model rm --out reward": "--force",
    "reward table --reward-model table --out new": "table",
    "report nothing": "nothing",
    "report folder": "folder",
    "serve nothing": "'nothing'",
    "serve table": "it is a table",
    "serve reward --port 99999": "--port",
    "serve reward --host 0.0.0.0": "--insecure",
    "serve reward --token-env NOT_SET": "--token-env",
    "serve reward --max-batch 0": "--max-batch",
    "serve reward --seconds 0": "--seconds",
    "demo --seed -1": "--seed",
    "cp nothing": "'nothing'",
    "path nothing": "'nothing'",
    f"{CHECK} nothing": "'nothing'",
    f"{CHECK} a/b/c": "'a/b/c'",
    f"{CHECK} table": "table",
    f"{CHECK} three": "--label HOW",
    f"{CHECK} policy": "--kind judge",
    f"{CHECK} without": "--option tokenizer=PATH",
    f"{CHECK} rm --kind foo": "--kind 'foo'",
    f"{CHECK} rm --kind implicit": "--option reference=",
    f"{CHECK} rm --kind judge": "--kind judge",
    f"{CHECK} rm --option foo=1": "--option foo=",
    f"{CHECK} rm --label 5": "--label",
    f"{CHECK} rm --dtype int3": "'int3'",
    f"{CHECK} rm --tolerance -1": "--tolerance",
    f"{CHECK} rm --batch-tokens 0": "--batch-tokens",
    f"{CHECK} rm --max-length 1": "--max-length",
    f"{CHECK} rm --prompts nothing.jsonl": "--prompts nothing.jsonl",
}
OF_TRAINING = {
    "--reward nothing": "'nothing'",
    "--reward table": "it is a table",
    "--prompts nothing.jsonl": "'nothing.jsonl'",
    "--prompts columns.jsonl": "--column NAME",
    "--prompts other.jsonl": "no references",
    "--column zz": "'zz'",
    "--steps 0": "--steps 0",
    "--lr 0": "--lr 0",
    "--completions 1": "--completions 1",
    "--prompts-a-step 0": "--prompts-a-step 0",
    "--temperature 0": "--temperature",
    "--temperature 0.5": "--temperature 0.5",
    "--max-tokens 9": "--max-tokens 9",
    "--dtype foo": "--dtype",
    "--transform zz": "--transform",
    "--raw": "--beta",
    "--policy judge": "--any-policy",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with models, tables, a reward and files of prompts, good and bad."""
    folder = tmp_path_factory.mktemp("messages")
    tiny.saved(tiny.causal(0), folder / "policy", tiny.tokenizer())
    for seed, name in enumerate(("rm", "judge")):
        tiny.saved(tiny.classifier(seed), folder / name, tiny.tokenizer())
    tiny.saved(tiny.classifier(num_labels=3), folder / "three", tiny.tokenizer())
    tiny.classifier(0).save_pretrained(folder / "without")
    chats = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
    files = {
        "prompts": [{"prompt": chat} for chat in chats],
        "other": [{"prompt": "never seen"}],
        "columns": [{"a": "x"}],
    }
    files["rollouts"] = [{"prompt": "x", "completions": ["a", "b"], "r": [1.0, 2.0]}]
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.jsonl").write_text('{"prompt": \n')
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    sampler, scorer = load_sampler(folder / "policy", Decoding(4)), load_scorer(folder / "rm")
    calibrate(chats, sampler, scorer, folder / "table", k=4, show_progress=False)
    both = {"reward": scorer, "judge": load_scorer(folder / "judge")}
    calibrate(chats, sampler, both, folder / "two", k=4, show_progress=False)
    CalibratedReward(scorer, ReferenceTable.load(folder / "table")).save_pretrained(folder / "reward")
    return folder


def complaint(error: str) -> str:
    """The error that a command wrote, without argparse's usage and bars of progress."""
    return re.sub(r".*\d+%\|.*[\r\n]*", "", error.rpartition("error: ")[2]).strip()


def python_in(message: str) -> list[str]:
    """Which of Python's words a message has."""
    return [what for what, pattern in PYTHON.items() if pattern.search(message)]


@pytest.mark.parametrize("words", CASES)
def test_a_command_speaks_of_its_options(words, here, monkeypatch, capsys):
    """Each kind of wrong input is named, in a line or two without a word of Python."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        code = main(words.split())
    except SystemExit as usage:
        code = usage.code
    message = complaint(capsys.readouterr().err)
    assert code == UNUSABLE
    assert CASES[words] in message
    assert python_in(message) == [], message
    assert message.count("\n") <= 1


# The trainers share their launch: each kind of input goes to one of them, in turn.
@pytest.mark.parametrize(("trainer", "words"), [*zip(cycle(TRAINERS), OF_TRAINING, strict=False)])
def test_a_trainer_speaks_of_its_options(trainer, words, here, monkeypatch, capsys):
    """As commands do; nothing is trained."""
    monkeypatch.chdir(here)
    usual = ["--policy", "policy", "--reward", "reward", "--prompts", "prompts.jsonl", "--out", "new-run"]
    try:
        code = main(["train", *trainer.split(), *usual, *words.split()])
    except SystemExit as usage:
        code = usage.code
    message = complaint(capsys.readouterr().err)
    assert code == UNUSABLE
    assert OF_TRAINING[words] in message
    assert python_in(message) == [], message
    assert message.count("\n") <= 1


def without_extras(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Python as on the base install: libraries of extras are hidden from a fresh process."""
    hidden = sorted({library for libraries in EXTRAS.values() for library in libraries})
    (folder / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.machinery import PathFinder\nfind = PathFinder.find_spec\n"
        f"hidden = {hidden!r}\n"
        "PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: "
        "None if name.partition('.')[0] in hidden else find(name, path, target))\n"
    )
    command = [sys.executable, "-m", *words]
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, "PYTHONPATH": paths}
    )


@pytest.mark.parametrize(
    ("words", "extras"),
    [
        ("calibrated_rewards train rloo --help", "calibrate,hf,trl"),
        ("calibrated_rewards train ppo --help", "hf"),
        (
            "calibrated_rewards calibrate --out x --policy p --max-tokens 4 --prompts x.jsonl --reward-model rm",
            "calibrate,hf",
        ),
        (
            "calibrated_rewards calibrate --out x --policy p --max-tokens 4 --reward-model http://rm",
            "calibrate,hf,http",
        ),
        ("calibrated_rewards demo --quick", "calibrate,hf,plots"),
    ],
)
def test_all_that_is_missing_is_named_at_once(words, extras, tmp_path):
    """On the base install: one line, every extra that the command needs, and no traceback."""
    done = without_extras(tmp_path, *words.split())
    assert done.returncode == UNUSABLE
    assert f"pip install 'calibrated-rewards[{extras}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_python_reads_its_own_words(here):
    """The same errors, raised to a caller from Python, name keyword arguments."""
    with pytest.raises(ValueError, match=r"with labels=Difference\(good, bad\), Label\(i\)"):
        load_scorer(here / "three")
    with pytest.raises(ValueError, match=r"is kind=judge, .*kind=implicit with reference="):
        load_scorer(here / "policy")
    with pytest.raises(
        FileNotFoundError, match=r"two has a table for each of its reward models: .*two/judge or .*reward"
    ):
        ReferenceTable.load(here / "two")


def test_a_reward_is_no_table_and_a_function_no_checkpoint(here):
    """What was named by mistake is said, and where it goes."""
    (here / "two" / "reward.json").touch()
    with pytest.raises(FileNotFoundError, match=r"two is a calibrated reward and no table: its table is .*judge"):
        ReferenceTable.load(here / "two")
    (here / "two" / "reward.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"A function of yours .*calibrate\(prompts, sampler, function\)"):
        load_scorer("my_rewards:reward")
