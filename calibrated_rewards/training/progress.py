"""Size of a run before it starts, and lines with the time left where there is no terminal for a progress bar."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from calibrated_rewards.calibration.dry_run import format_seconds

# Seconds between lines.
BETWEEN_LINES = 30.0


def describe_size(settings: Any, prompts: int, max_tokens: int) -> str:
    """Describe how much a run draws, by its settings.

    >>> from calibrated_rewards.training.online import GRPOSettings
    >>> describe_size(GRPOSettings(steps=100, prompts_a_step=8, completions=4), 400, 64)
    '100 steps of 32 completions, 3,200 in all, of at most 64 tokens; each of 400 prompts comes about 2 times'
    """
    each, steps = settings.completions_a_step, settings.steps
    return (
        f"{steps:,} steps of {each:,} completions, {steps * each:,} in all, of at most {max_tokens:,} tokens; "
        f"each of {prompts:,} prompts comes about {steps * settings.prompts_a_step / prompts:.2g} times"
    )


@dataclass
class ProgressLines:
    """Lines on stderr, now and then, with a step's numbers and the time that is left at the speed so far."""

    steps: int
    done: int = 0
    """Steps of the run before this process."""
    start: float = field(default_factory=perf_counter)
    last_line: float = field(default_factory=perf_counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Print the line of a step's log row, if the last line is long enough ago."""
        now = perf_counter()
        if now - self.last_line < BETWEEN_LINES:
            return
        self.last_line, step = now, row["step"] + 1
        names = [name for name in ("reward", "u", "kl") if row.get(name) is not None]
        numbers = ", ".join(f"{name} {row[name]:.4g}" for name in names)
        left = (self.steps - step) * (now - self.start) / max(1, step - self.done)
        sys.stderr.write(f"step {row['step']} of {self.steps}: {numbers}; {format_seconds(left)} left\n")
