"""Files are replaced whole, claims have one holder, and only what was asked for is imported."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import main
from calibrated_rewards.cli.options import open_reward
from calibrated_rewards.files import (
    check_folder_name,
    claim,
    import_function,
    replace_file,
    without_current_folder,
    write_file,
)
from calibrated_rewards.reward.frameworks import configured
from calibrated_rewards.reward.saving import NeedsTrust
from calibrated_rewards.scorers.ensemble import Function
from calibrated_rewards.testing.suites import NumberSampler, NumberScorer

HOLDER = """
import sys
from pathlib import Path
from calibrated_rewards.files import claim
with claim(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""

# Forks twice as it holds the claim: once it then leaves the block, once it is killed in it.
FORKER = """
import os, signal, sys, time
from pathlib import Path
from calibrated_rewards.files import claim

def fork():
    child = os.fork()
    if not child:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    return child

file = Path(sys.argv[1])
with claim(file):
    first = fork()
with claim(file) as free_again:
    print(free_again, first, fork(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Its child opens another file in the block, which gets the number of the claim's, and leaves.
LEAVER = """
import os, sys
from pathlib import Path
from calibrated_rewards.files import claim

file = Path(sys.argv[1])
with claim(file):
    child = os.fork()
    if not child:
        other = os.open(file, os.O_RDWR)
    else:
        os.waitpid(child, 0)
    if child:
        with claim(file) as ours:
            print(ours, flush=True)
if not child:
    os.write(1, b"still ") if os.fstat(other) else None
    os._exit(0)
"""


@pytest.fixture
def file(tmp_path):
    """An empty file, which tests claim."""
    (tmp_path / "file").touch()
    return tmp_path / "file"


def holder(file):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline()


def held(file):
    with claim(file) as ours:
        return ours


def test_a_claim_is_of_one_and_ends_with_it(file):
    """Another process is refused while the first lives, and not when it is killed."""
    assert held(file)
    process, answer = holder(file)
    with process:
        assert answer == "True\n"
        assert not held(file)
        process.kill()
        process.wait()
    assert held(file)


def test_a_claim_ends_with_its_block(file):
    """Also in this process, and by an error."""
    with claim(file) as ours:
        assert ours
        assert not held(file)
    assert held(file)
    with pytest.raises(ZeroDivisionError), claim(file):
        1 / 0  # noqa: B018 (an error in the block)
    assert held(file)


def test_who_waits_is_next(file):
    """With wait=True the claim comes when the holder goes."""
    come = threading.Event()

    def waits():
        with claim(file, wait=True) as ours:
            assert ours
            come.set()

    with claim(file):
        thread = threading.Thread(target=waits)
        thread.start()
        assert not come.wait(0.05)
    assert come.wait(10)
    thread.join()


def test_children_hold_no_claims(file):
    """The lock of a process that forked ends with its block, and with itself, though its child lives on."""
    forker = subprocess.Popen([sys.executable, "-c", FORKER, str(file)], stdout=subprocess.PIPE, text=True)
    with forker:
        free_again, *children = forker.stdout.readline().split()
        assert forker.wait() == -signal.SIGKILL
        try:
            assert free_again == "True"
            patience = time.monotonic() + 10  # the child lets go when it first runs
            while not held(file):
                assert time.monotonic() < patience
        finally:
            for child in children:
                os.kill(int(child), signal.SIGKILL)


def test_a_child_that_leaves_the_block_ends_nothing(file):
    """What it closes there is not what its parent holds, nor another file of its own."""
    forker = subprocess.run([sys.executable, "-c", LEAVER, str(file)], capture_output=True, text=True, check=False)
    assert forker.stdout.split() == ["still", "False"], forker.stderr


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    """A claim on a shard that somebody took back is an error, and no empty shard."""
    with pytest.raises(FileNotFoundError), claim(tmp_path / "gone"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_locks_everybody_goes_ahead(file, monkeypatch):
    """A file system that refuses locks: told, and everything is everyone's."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="without locks"), claim(file) as ours:
        assert ours


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """A write that fails leaves the old file, and nothing beside it."""
    path = tmp_path / "folder" / "file"
    write_file(path, "old \u00e9")
    with pytest.raises(TypeError), replace_file(path) as file:
        file.writelines([b"half", 3])
    assert path.read_text("utf-8") == "old \u00e9"
    assert list(path.parent.iterdir()) == [path]
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """The error says which file, not which temporary one."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot be written: .*file/below'"):
        write_file(tmp_path / "file" / "below", "text")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-a", ".a", "a b", "a" * 101, "Run.JSON", "a\n"])
def test_a_name_that_is_no_folder_s_is_refused(name):
    """Nothing hidden, nothing outside, and none of the names that are taken, in whatever case."""
    check_folder_name("a" * 100, "a policy", ["run.json"])
    with pytest.raises(ValueError, match="the name of a policy is that of its folder"):
        check_folder_name(name, "a policy", ["run.json"])
    with pytest.raises(TypeError, match="the name of a policy is a str"):
        check_folder_name(1, "a policy")


def test_the_package_is_imported_without_fcntl(tmp_path):
    """Windows has none: locks need it when they are taken, not before."""
    code = "import sys; sys.modules['fcntl'] = None; import calibrated_rewards, calibrated_rewards.files"
    command = [sys.executable, "-c", code]
    imported = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (imported.returncode, imported.stderr) == (0, "")


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
    assert main(["train", "rloo", "--reward", str(at), *policy]) == 2
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
    """What is not a module, a colon and a name is refused, and nothing is imported."""
    with pytest.raises(ValueError, match="module:name"):
        import_function(place)
