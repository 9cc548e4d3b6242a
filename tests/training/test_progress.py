"""Lines of progress where there is no terminal: how often, and the time that is left."""

from pathlib import Path
from typing import Any

import pytest

from calibrated_rewards.cli.main import main
from calibrated_rewards.training import progress
from calibrated_rewards.training.progress import ProgressLines


def test_time_left_is_that_of_the_steps_left(monkeypatch: Any, capsys: Any) -> None:
    """At the speed of this process alone, and a line only every half minute."""
    clock = [100.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: clock[0])
    lines = ProgressLines(100, done=20, start=100.0, last_line=100.0)  # went on from a checkpoint at step 20
    for step in range(20, 30):  # 10 seconds a step
        clock[0] += 10.0
        lines.add({"step": step, "reward": 0.5, "kl": 0.25, "u": None})
    shown = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in shown] == [22, 25, 28]
    assert shown[0] == "step 22 of 100: reward 0.5, kl 0.25; about 12.8 minutes left"  # 77 steps


@pytest.mark.parametrize(("steps", "prompts", "times"), [(10, 40, "2"), (1, 80, "0.1")])
def test_size_counts_all_completions(steps: int, prompts: int, times: str) -> None:
    """PPO's are those of a round, whatever the prompts; the other trainers' are for each prompt."""
    from calibrated_rewards.training.online import GRPOSettings, PPOSettings, TRLSettings

    sizes = {"steps": steps, "prompts_a_step": 8, "completions": 16}
    for settings, each in [(PPOSettings(**sizes), 16), (GRPOSettings(**sizes), 128), (TRLSettings(**sizes), 128)]:
        assert progress.describe_size(settings, prompts, 64) == (
            f"{steps} steps of {each} completions, {steps * each:,} in all, of at most 64 tokens; "
            f"each of {prompts} prompts comes about {times} times"
        )


@pytest.mark.parametrize("trainer", ["grpo --plain", "ppo"])
def test_plain_loops_print_lines_too(trainer: str, run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A line for each step that comes late enough, and none otherwise."""
    named = {"policy": run / "policy", "reward": run / "reward", "prompts": run / "prompts.jsonl"}
    words = [word for name, path in named.items() for word in (f"--{name}", str(path))]
    words += ["--completions", "2", "--prompts-a-step", "2", "--steps", "2"]
    for seconds, steps in [(0.0, [0, 1]), (3600.0, [])]:
        monkeypatch.setattr(progress, "BETWEEN_LINES", seconds)
        assert main(["train", *trainer.split(), *words, "--out", str(tmp_path / str(seconds))]) == 0
        shown = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" left")]
        assert [int(line.split()[1]) for line in shown] == steps
