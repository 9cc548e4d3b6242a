"""Parts of the demo in processes of their own: what fails is named, and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from waiting_parts import DEADLINE, note_and_wait, wait_and_fail, wait_for

from calibrated_rewards.cli.demo.side_by_side import run_side_by_side


def is_running(pid: int) -> bool:
    """Tell if a process is there, and not only its last word to a parent that did not ask."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_part_that_fails_is_named_and_the_others_are_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error has the part's name and its error; what waited for its turn is not started."""
    note = tmp_path / "pid"
    parts = {
        "bad": partial(wait_and_fail, note),
        "long": partial(note_and_wait, note),
        "third": partial(note_and_wait, tmp_path / "never"),
    }
    with pytest.raises(RuntimeError, match=r"bad failed: ValueError: invalid literal for int\(\)") as error:
        run_side_by_side(parts, tmp_path / "logs", 2)
    assert str(error.value).endswith(f"see {tmp_path / 'logs' / 'bad.error'}")
    assert "Traceback" in (tmp_path / "logs" / "bad.error").read_text()
    assert "KeyboardInterrupt" in (tmp_path / "logs" / "long.error").read_text()
    assert not is_running(int(note.read_text()))
    assert {each.name for each in (tmp_path / "logs").iterdir()} == {"bad.log", "bad.error", "long.log", "long.error"}
    assert capfd.readouterr().err == "long: waiting\n"


def test_with_one_process_all_happens_here(tmp_path: Path) -> None:
    """One after the other, in the order given, and no log is kept."""
    done: list[int] = []
    run_side_by_side({str(i): partial(done.append, i) for i in range(3)}, tmp_path / "logs", 1)
    assert done == [0, 1, 2]
    assert not (tmp_path / "logs").exists()


def test_parts_end_where_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    """A kill -9 leaves no process behind that goes on with the work."""
    code = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from waiting_parts import note_and_wait\n"
        "from calibrated_rewards.cli.demo.side_by_side import run_side_by_side\n"
        "if __name__ == '__main__':\n"
        "    at = Path(sys.argv[1]); names = ('one', 'two')\n"
        "    parts = {name: partial(note_and_wait, at / name) for name in names}\n"
        "    run_side_by_side(parts, at / 'logs', 2)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment) as run:
        pids = [int(wait_for(tmp_path / name)) for name in ("one", "two")]
        assert all(map(is_running, pids))
        run.send_signal(signal.SIGKILL)
    end = time.monotonic() + DEADLINE / 2
    while any(map(is_running, pids)):
        assert time.monotonic() < end, "a part goes on alone"
        time.sleep(0.05)
