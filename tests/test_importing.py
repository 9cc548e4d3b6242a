"""A directory of settings runs nothing that its reader did not allow, and imports nothing from the current folder."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import main
from calibrated_rewards.cli.options import open_reward
from calibrated_rewards.files import import_function, without_current_folder
from calibrated_rewards.reward.frameworks import configured
from calibrated_rewards.reward.saving import NeedsTrust
from calibrated_rewards.scorers.ensemble import Function
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
from calibrated_rewards.training.online import train_rloo

BIN = Path(sys.executable).parent
# What a module leaves behind when it is imported, and when it is called.
BESIDE = """
    from pathlib import Path
    Path("ran").write_text("imported")
    def score(prompts, completions):
        Path("ran").write_text("called")
        return [float(completion) for completion in completions]
"""


def number_of(_prompt: str, completion: str) -> float:
    """The number that a completion is."""
    return float(completion)


def numbers_of(_prompts: list[str], completions: list[str]) -> list[float]:
    """The numbers that completions are."""
    return [float(completion) for completion in completions]


def strangers(at: Path, scorer: Any, probe: Any = None) -> Path:
    """A directory that claims this scorer, with a table whose probe says what it is called with."""
    probe = probe or {"prompt": "2+2=", "completion": "4", "score": 4.0}
    table = ReferenceTable.build([("2+2=", np.arange(9.0))], meta={"probes": [probe]})
    CalibratedReward(NumberScorer(), table, Exponential(2.0)).save_pretrained(at)
    settings = json.loads((at / "reward.json").read_text())
    (at / "reward.json").write_text(json.dumps({**settings, "scorer": scorer}))
    return at


def checkpoint(**placement: Any) -> dict[str, Any]:
    placed = {"is": "calibrated_rewards.models.loading.Placement", **placement}
    recipe = {"is": "calibrated_rewards.scorers.loading.FromCheckpoint", "name": "someone/model", "placement": placed}
    return {"is": "calibrated_rewards.scorers.lazy.Loaded", "recipe": recipe}


def server(url: str) -> dict[str, Any]:
    native = {"is": "calibrated_rewards.scorers.remote.Native", "model": "rm"}
    return {"is": "calibrated_rewards.scorers.remote.Remote", "url": url, "dialect": native}


RISKY = {
    "function": {"function": "pty:spawn"},
    "function inside of the library's own": {
        "is": "calibrated_rewards.scorers.ensemble.Function",
        "function": {"function": "os:system"},
        "name": "x",
    },
    "function of an ensemble": {
        "is": "calibrated_rewards.scorers.ensemble.Ensemble",
        "scorers": [{"function": "pty:spawn"}],
    },
    "code of a checkpoint": checkpoint(trust_remote_code=True),
    "options of a checkpoint": checkpoint(model_options={"attn_implementation": "someone/kernel"}),
    "a quantization of a checkpoint": checkpoint(quantization_config={"quant_method": "x"}),
    "a server": server("http://127.0.0.1:9"),
    "a server of an ensemble": {
        "is": "calibrated_rewards.scorers.ensemble.Ensemble",
        "scorers": [server("http://127.0.0.1:9")],
    },
}


@pytest.mark.parametrize("scorer", RISKY.values(), ids=RISKY)
def test_a_local_directory_is_trusted_no_more_than_the_hub(
    scorer: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """From Python, by the environment, in every command: refused, with the way out in the caller's words."""
    at = strangers(tmp_path / "stranger", scorer, {"prompt": "/bin/sh", "completion": "exit 7", "score": 7.0})
    with pytest.raises(NeedsTrust, match=r"reward\.json: .*trust_remote_code=True, or give the scorer, scorer="):
        CalibratedReward.from_pretrained(at)
    with pytest.raises(ValueError, match="--trust-remote-code"):
        open_reward(at, trust=False)
    monkeypatch.setenv("CALIBRATED_REWARD", str(at))
    with pytest.raises(ValueError, match="CALIBRATED_REWARD_TRUST_REMOTE_CODE=1"):
        configured()
    policy = ["--policy", "./no-such-policy", "--prompts", "no-such-file.jsonl", "--out", str(tmp_path / "out")]
    assert main(["serve", str(at)]) == 2
    assert main(["evaluate", "--reward", str(at), "--reference", "./none", *policy]) == 2
    assert train_rloo.main(["--reward", str(at), *policy]) == 2
    complaints = capsys.readouterr().err.splitlines()
    assert sum("then allow it with --trust-remote-code" in line for line in complaints) == 3
    assert CalibratedReward.from_pretrained(at, scorer=NumberScorer())(["2+2="], ["4"])


def test_what_is_allowed_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    """A user's own function, alone and in the library's wrapper, comes back for those who say so."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    table = calibrate(["one", "two"], NumberSampler(), numbers_of, k=4)
    for scorer in (numbers_of, Function(number_of)):
        CalibratedReward(scorer, table).save_pretrained(tmp_path / "reward")
        with pytest.raises(NeedsTrust, match="would be imported and called"):
            CalibratedReward.from_pretrained(tmp_path / "reward")
        again = CalibratedReward.from_pretrained(tmp_path / "reward", trust_remote_code=True)
        assert again(["one"], ["99"]) == [1.0]
        monkeypatch.setenv("CALIBRATED_REWARD", str(tmp_path / "reward"))
        monkeypatch.setenv("CALIBRATED_REWARD_TRUST_REMOTE_CODE", "1")
        monkeypatch.setenv("CALIBRATED_REWARD_VERIFY", "0")
        assert configured()(["one"], ["99"]) == [1.0]


BUSY = "a port that is taken"


def run_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process whose current folder is this one, and whose path has nothing that is not said."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with socket.create_server(("127.0.0.1", 0)) as taken:  # the server loads its reward, and then finds no port
        words = [str(taken.getsockname()[1]) if word == BUSY else word for word in command]
        return subprocess.run(
            words, cwd=folder, env={**own, **environment}, capture_output=True, text=True, check=False, timeout=60
        )


OPEN = "from calibrated_rewards import CalibratedReward as R; R.from_pretrained('.', trust_remote_code=True).verify()"
SERVE = ["serve", ".", "--port", BUSY, "--trust-remote-code"]


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "calibrated_rewards", *SERVE],
        [str(BIN / "calibrated-rewards"), *SERVE],
        [sys.executable, "-c", OPEN],
    ],
    ids=["python -m", "console script", "python -c"],
)
def test_nothing_is_imported_from_the_current_folder(command: list[str], tmp_path: Path) -> None:
    """A module beside the reward.json that names it stays unread, though its function was allowed."""
    at = strangers(tmp_path / "stranger", {"function": "beside:score"})
    (at / "beside.py").write_text(textwrap.dedent(BESIDE))
    (at / "torch.py").write_text(textwrap.dedent(BESIDE))
    done = run_in(at, *command)
    assert done.returncode != 0
    assert "the current folder is not searched" in done.stderr
    assert not (at / "ran").exists()


def test_a_folder_that_was_named_is_searched(tmp_path: Path) -> None:
    """PYTHONPATH, and the folder of a script, are somebody's choice; also where it is the current one."""
    at = strangers(tmp_path / "mine", {"function": "beside:score"})
    (at / "beside.py").write_text(textwrap.dedent(BESIDE))
    for command in ([sys.executable, "-c", OPEN], [sys.executable, "-m", "calibrated_rewards", *SERVE]):
        done = run_in(at, *command, PYTHONPATH=str(at))
        assert "not searched" not in done.stderr
        assert (at / "ran").read_text() == "called"
        (at / "ran").unlink()
    (at / "train.py").write_text(OPEN)
    assert run_in(at, sys.executable, "train.py").returncode == 0
    assert (at / "ran").read_text() == "called"


def test_the_path_is_put_back(tmp_path: Path, monkeypatch: Any) -> None:
    """What was left out, where it was; what an import added stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/a", ".", "/b"])
    with without_current_folder():
        assert sys.path == ["/a", "/b"]
        sys.path.append("/c")
    assert sys.path == ["", "/a", ".", "/b", "/c"]


@pytest.mark.parametrize("place", ["", "json", ":dumps", "json:", "json:a-b", "../x:f", "json:dumps:x", ".json:dumps"])
def test_only_names_are_imported(place: str) -> None:
    """A module, a colon, a name."""
    with pytest.raises(ValueError, match="module:name"):
        import_function(place)
