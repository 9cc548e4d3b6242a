"""Trackers of a run's metrics, `--report-to`: what they are sent, and what cannot be sent."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from calibrated_rewards.cli.main import main
from calibrated_rewards.training.run_folder import RunFolder
from calibrated_rewards.training.trackers import check_trackers, place_files

TRAINERS = ["rloo", "grpo", "grpo --plain", "ppo"]


class Lines(TrainerCallback):
    """A tracker that keeps what it is sent."""

    events: list[tuple[str, Any]] = []  # noqa: RUF012  (transformers makes the object: only its class is known here)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the run's name and its number of steps."""
        self.events.append(("begin", (args.run_name, args.max_steps, state.is_world_process_zero)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the step and its numbers."""
        self.events.append(("log", (state.global_step, dict(logs))))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep that it is over."""
        self.events.append(("end", None))


def words(run: Path, out: Path, *options: str) -> list[str]:
    """The options of a run of two steps."""
    named = {"policy": run / "policy", "reward": run / "reward", "prompts": run / "prompts.jsonl", "out": out}
    parts = [word for name, path in named.items() for word in (f"--{name}", str(path))]
    return [*parts, "--completions", "2", "--prompts-a-step", "2", "--steps", "2", *options]


@pytest.fixture
def events(monkeypatch: Any) -> list[tuple[str, Any]]:
    """What a tracker by the name of `lines` gets, among those that transformers knows."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "lines", Lines)
    monkeypatch.setattr(Lines, "events", [])
    return Lines.events


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_tracker_gets_each_step(trainer: str, run: Path, tmp_path: Path, events: Any) -> None:
    """The run under its folder's name, each step's numbers as the log has them, and the end."""
    out = tmp_path / "my-run"
    assert main(["train", *trainer.split(), *words(run, out, "--report-to", "lines")]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert events[0] == ("begin", ("my-run", 2, True))
    assert events[-1][0] == "end"
    logs = [row for event, row in events if event == "log" and "reward" in row[1]]
    assert [step for step, _ in logs] == [1, 2]
    assert [row["reward"] for _, row in logs] == [row["reward"] for row in rows]
    assert [row["calibrated/u"] for _, row in logs] == pytest.approx([row["u"] for row in rows])


def test_no_tracker_is_called_without_the_option(run: Path, tmp_path: Path, events: Any) -> None:
    """Neither by default, nor by its opposite; and the tracker is no part of what makes a run another one."""
    out = tmp_path / "out"
    assert main(["train", "rloo", *words(run, out)]) == 0
    assert main(["train", "rloo", *words(run, out, "--report-to", "none")]) == 0
    assert main(["train", "rloo", *words(run, out, "--report-to", "lines")]) == 0  # finished: the same run
    assert main(["train", "ppo", *words(run, out, "--report-to", "none", "--force")]) == 0
    assert events == []


@pytest.mark.parametrize("trainer", ["rloo", "ppo"])
def test_a_tracker_that_cannot_be_used_is_an_error(trainer: str, run: Path, tmp_path: Path, capsys: Any) -> None:
    """One that is unknown, with the nearest name, and one that is not installed; before anything is written."""
    missing = next(
        name for name in ("clearml", "codecarbon", "comet_ml", "swanlab", "trackio", "wandb") if find_spec(name) is None
    )
    for name, why in [("trackoi", "did you mean trackio?"), (missing, f"--report-to {missing}: ")]:
        out = tmp_path / name
        assert main(["train", trainer, *words(run, out, "--report-to", name)]) == 2
        assert why in capsys.readouterr().err
        assert not out.exists()
    with pytest.raises(ImportError, match="install"):
        check_trackers([missing])
    check_trackers(["all"])


def test_tensorboard_writes_where_nothing_is_removed(tmp_path: Path) -> None:
    """Into the run's folder, unless the environment names another: its checkpoints are removed at the end."""
    own, other = (TensorBoardCallback.__new__(TensorBoardCallback) for _ in range(2))
    own.logging_dir, other.logging_dir = None, "elsewhere"
    place_files([own, other], RunFolder(tmp_path))
    assert (own.logging_dir, other.logging_dir) == (str(tmp_path / "runs"), "elsewhere")
